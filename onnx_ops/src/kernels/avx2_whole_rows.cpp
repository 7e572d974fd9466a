// AVX2 kernels of integer weights by bitmaps for few activation rows, where an output row is whole steps, scaled by 32,
// 64 or 128 columns or altogether, and groups are no wider than 16 columns. They are bound by instructions: ranking the
// columns of a bitmap in registers takes a third of those that looking them up does, though weights are expanded then.
#include "avx2_ranks.h"

namespace nm {
namespace {

constexpr int64_t kTogether = 8;  // outputs whose sums are added up together

// ---------------------------------------------------------------------------------------------------------------------
// Packed activations.

constexpr int64_t kPairBytes = 32 * kVectors + 32;  // int8, and what 16-bit sums start from

struct PackedRows {
  size_t pairs;     // kPairBytes each
  size_t scales;    // float32 a unit
  size_t outliers;  // float32, for those
  size_t total;
};

int64_t Pairs(const Layout& l) { return PaddedColumns(l) / kPair; }

PackedRows PlanRows(const Layout& l, int64_t rows) {
  PackedRows p = {};
  Parts parts;
  p.pairs = parts.Take(rows * Pairs(l) * kPairBytes);
  p.scales = parts.Take(rows * PaddedUnits(l) * 4);
  p.outliers = parts.Take(OutlierActivationBytes(l, rows));
  p.total = parts.total();
  return p;
}

size_t PackedBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows).total; }

// Puts rounded columns, a pair or a lone step, in the order of the vectors.
void PackPair(const uint8_t* bytes, bool lone, uint8_t* packed) {
  static constexpr int kPlaces[2][8] = {{0, 1, 4, 5, 2, 3, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}};  // of blocks
  const __m128i every_fourth = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int block = 0; block < 8; ++block) {
    alignas(16) uint8_t columns[16];
    const __m128i shuffled = _mm_shuffle_epi8(Load128(bytes + kBlock * block), every_fourth);
    _mm_store_si128(reinterpret_cast<__m128i*>(columns), shuffled);
    for (int i = 0; i < kVectors; ++i) memcpy(packed + 32 * i + 4 * kPlaces[lone][block], columns + 4 * i, 4);
  }
  __m256i sums = _mm256_setzero_si256();
  for (int i = 0; i < kVectors; ++i) {
    sums = _mm256_sub_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(8), Load256(packed + 32 * i)));
  }
  Store256(packed + 32 * kVectors, sums);
}

void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedRows p = PlanRows(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  PackOutlierActivations(l, a, first, count, rows, reinterpret_cast<float*>(base + p.outliers));
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    uint8_t* pair = base + p.pairs + row * Pairs(l) * kPairBytes;
    float* scales = reinterpret_cast<float*>(base + p.scales) + row * PaddedUnits(l);
    memset(scales, 0, static_cast<size_t>(PaddedUnits(l)) * sizeof(float));
    for (int64_t column = 0; column < l.in_features; column += kPair, pair += kPairBytes) {
      alignas(32) uint8_t bytes[kPair];
      RoundPair(l, a, column, bytes, scales);
      PackPair(bytes, l.in_features - column == kStep, pair);
    }
  }
}

// The scales of a pair's or a lone step's units in the lanes of their blocks.
template <int unit, bool lone>
NM_PIECE __m256 LaneScales(const float* scales) {
  if constexpr (unit == 128 || (unit == 64 && lone)) return _mm256_broadcast_ss(scales);
  const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scales));
  if constexpr (unit == 64 || lone) return _mm256_permutevar_ps(all, _mm256_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1));
  return _mm256_permutevar_ps(all, _mm256_setr_epi32(0, 0, 2, 2, 1, 1, 3, 3));
}

// ---------------------------------------------------------------------------------------------------------------------
// Output rows.

// Where the tensors of an output row begin.
struct Row {
  const uint8_t* bitmap;
  const uint8_t* values;
  const uint8_t* scales;
  const uint8_t* outlier_values;
  const uint8_t* outlier_positions;
};

// What is the same for every output row.
struct Call {
  const Layout& layout;
  const PackedRows plan;
  const uint8_t* packed;
  const int64_t pairs;         // whole ones
  const bool lone;             // step behind them
  const int64_t block_values;  // of 16 columns
  const int64_t units;         // padded
  const int64_t a_stride;
  const int64_t readable_scales;  // output rows whose scales can be read eight at a time where they are
  const int64_t readable_values;  // … whose values have 15 bytes more behind them
  float* const products;          // of scales, for four activation rows
  uint16_t* const copied;         // float16 scales of an output row
  uint8_t* const copied_values;   // … and its values

  Call(const Layout& l, int64_t rows, const uint8_t* activations, void* scratch)
      : layout(l),
        plan(PlanRows(l, rows)),
        packed(activations),
        pairs(l.in_features / kPair),
        lone(l.in_features % kPair != 0),
        block_values(kBlock * l.n / l.m),
        units(PaddedUnits(l)),
        a_stride(Pairs(l) * kPairBytes),
        readable_scales(l.row_scales == 1 ? 0 : l.out_features - (units + l.row_scales - 1) / l.row_scales + 1),
        readable_values(l.out_features - (kBlock - 2 + l.value_bytes) / l.value_bytes),
        products(static_cast<float*>(scratch)),
        copied(reinterpret_cast<uint16_t*>(products + 4 * units)),
        copied_values(reinterpret_cast<uint8_t*>(copied + units)) {}

  template <class Values>
  Row RowOf(int64_t output) const {
    const Layout& l = layout;
    const uint8_t* values = l.values + output * l.value_bytes;
    if (!Values::kHalf && output >= readable_values) {
      values = static_cast<const uint8_t*>(memcpy(copied_values, values, static_cast<size_t>(l.value_bytes)));
    }
    return {l.positions + output * l.position_bytes, values, Scales(output),
            l.outlier_values + output * l.outlier_bytes, l.outlier_positions + output * l.row_outliers};
  }

  // The float16 scales of an output row, one a unit, and anything behind them up to `units`.
  const uint8_t* Scales(int64_t output) const {
    const Layout& l = layout;
    const uint8_t* halves = l.scales + output * l.row_scales * 2;
    Prefetch(halves);
    if (output < readable_scales) return halves;
    if (l.row_scales > 1) {
      memcpy(copied, halves, static_cast<size_t>(l.row_scales) * sizeof(uint16_t));
    } else {
      for (int64_t i = 0; i < units; ++i) memcpy(copied + i, halves, sizeof(uint16_t));
    }
    return reinterpret_cast<const uint8_t*>(copied);
  }

  // Times the scales of R activation rows.
  template <int R>
  NM_PIECE void ScaleProducts(const uint8_t* scales, int64_t row) const {
    const float* rows = reinterpret_cast<const float*>(packed + plan.scales) + row * units;
    for (int64_t u = 0; u < units; u += 8) {
      const __m256 weights = _mm256_cvtph_ps(Load128(scales + 2 * u));
      for (int r = 0; r < R; ++r) {
        const __m256 product = _mm256_mul_ps(weights, _mm256_load_ps(rows + r * units + u));
        _mm256_store_ps(products + r * units + u, product);
      }
    }
  }
};

template <class Values, int unit, bool lone, int R>
NM_PIECE void AddPair(const Call& call, const uint8_t* a, int64_t pair, __m256i halves,
                      const typename Values::Stored& stored, __m256 (&totals)[R]) {
  __m256i ranks[kVectors], weights[kVectors];
  RankColumns<Values::kHalf>(halves, ranks);
  Values::Expand(stored, ranks, weights);
  for (int r = 0; r < R; ++r) {
    const __m256 products = _mm256_cvtepi32_ps(Values::Multiply(weights, a + pair * kPairBytes + r * call.a_stride));
    const float* scales = call.products + pair * (kPair / unit) + r * call.units;
    totals[r] = _mm256_fmadd_ps(products, LaneScales<unit, lone>(scales), totals[r]);
  }
}

// The outliers of a block that ends a row: four of every 64 columns, or two.
NM_PIECE void AddLastOutliers(const uint8_t* values, const uint8_t* positions, int64_t count, const float* columns,
                              __m256& total) {
  for (; count >= 4; count -= 4, values += 8, positions += 4) {
    const __m128 kept =
        _mm_setr_ps(columns[positions[0]], columns[positions[1]], columns[positions[2]], columns[positions[3]]);
    const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
    total = _mm256_add_ps(total, _mm256_zextps128_ps256(_mm_mul_ps(four, kept)));
  }
  for (; count > 0; --count, values += 2, ++positions) {
    const __m128 product = _mm_set_ss(Load1(Float16(), values) * columns[*positions]);
    total = _mm256_add_ps(total, _mm256_zextps128_ps256(product));
  }
}

// Outputs from `first` on times R activation rows, as sums of lanes; for one row with `outliers` of every 256 columns.
template <class Values, int unit, int R, int outliers>
NM_LOOP void MultiplyRows(const Call& call, int64_t row, int64_t first, int64_t count, __m256* sums) {
  const uint8_t* const a = call.packed + call.plan.pairs + row * call.a_stride;
  const float* const natural = reinterpret_cast<const float*>(call.packed + call.plan.outliers);
  const int64_t block_values = call.block_values, pair_bytes = Values::PairBytes(block_values);
  for (int64_t i = 0; i < count; ++i) {
    const Row weight = call.RowOf<Values>(first + i);
    call.ScaleProducts<R>(weight.scales, row);
    __m256 totals[R], outlier_total = _mm256_setzero_ps();
    for (__m256& total : totals) total = _mm256_setzero_ps();
    const uint8_t *outlier_values = weight.outlier_values, *outlier_positions = weight.outlier_positions;
    int64_t pair = 0;
    for (; pair + 2 <= call.pairs; pair += 2) {
      const uint8_t* bitmap = weight.bitmap + 16 * pair;
      const uint8_t* values = weight.values + pair_bytes * pair;
      Prefetch(bitmap);
      for (int64_t line = 0; line < 2 * pair_bytes; line += 64) Prefetch(values + line);
      if (outliers > 0) {
        Prefetch(outlier_values);
        Prefetch(outlier_positions);
      }
      __m256i halves[2];
      TwoPairHalves(bitmap, halves);
      AddPair<Values, unit, false>(call, a, pair, halves[0], Values::LoadPair(values, block_values), totals);
      for (int k = 0; k < outliers; k += 8, outlier_values += 16, outlier_positions += 8) {
        const float* columns = natural + kPair * pair;
        const __m256 kept = EightOf(columns, columns, outlier_positions);
        outlier_total = _mm256_fmadd_ps(Float16::Load8(outlier_values), kept, outlier_total);
      }
      AddPair<Values, unit, false>(call, a, pair + 1, halves[1], Values::LoadPair(values + pair_bytes, block_values),
                                   totals);
    }
    const uint8_t* bitmap = weight.bitmap + 16 * pair;
    const uint8_t* values = weight.values + pair_bytes * pair;
    const int64_t left = outliers > 0 ? call.layout.row_outliers - pair / 2 * outliers : 0;
    Prefetch(bitmap);
    Prefetch(values);
    if (pair < call.pairs) {
      AddPair<Values, unit, false>(call, a, pair, PairHalves(bitmap), Values::LoadPair(values, block_values), totals);
      bitmap += 16;
      values += pair_bytes;
    }
    if (call.lone) {
      AddPair<Values, unit, true>(call, a, call.pairs, LoneHalves(bitmap), Values::LoadLone(values, block_values),
                                  totals);
    }
    if (outliers > 0) AddLastOutliers(outlier_values, outlier_positions, left, natural + kPair * pair, outlier_total);
    if (outliers > 0) totals[0] = _mm256_add_ps(totals[0], outlier_total);
    for (int r = 0; r < R; ++r) sums[r * kTogether + i] = totals[r];
  }
}

// Sum of the lanes of each vector.
__m256 SumsOfLanes(const __m256* v) {
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

// y[r · y_stride + i] for R activation rows from `row` on and at most kTogether outputs.
template <class Values, int unit, int R, int outliers>
void Outputs(const Call& call, int64_t row, int64_t first, int64_t count, float* y, int64_t y_stride) {
  __m256 sums[R * kTogether];
  for (int64_t i = count; i < kTogether; ++i) {
    for (int r = 0; r < R; ++r) sums[r * kTogether + i] = _mm256_setzero_ps();
  }
  MultiplyRows<Values, unit, R, outliers>(call, row, first, count, sums);
  for (int r = 0; r < R; ++r) {
    alignas(32) float eight[kTogether];
    _mm256_store_ps(eight, SumsOfLanes(sums + r * kTogether));
    memcpy(y + r * y_stride, eight, static_cast<size_t>(count) * sizeof(float));
  }
}

// The outliers of one activation row are added along the way, where they are such.
bool AddsOutliers(const Layout& l, int64_t rows, int64_t k) {
  return rows == 1 && l.outlier_k == k && l.outlier_block == 256 && l.outlier_dtype == NM_FLOAT16;
}

template <class Values, int unit>
void RunUnits(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, void* scratch,
              float* y, int64_t y_stride) {
  const Call call(l, rows, packed, scratch);
  const bool sixteen = AddsOutliers(l, rows, 16), eight = AddsOutliers(l, rows, 8);
  const auto one_row = sixteen ? Outputs<Values, unit, 1, 16>
                       : eight ? Outputs<Values, unit, 1, 8>
                               : Outputs<Values, unit, 1, 0>;
  const float* outliers = reinterpret_cast<const float*>(packed + call.plan.outliers);
  for (int64_t end; first < last; y += end - first, first = end) {
    end = Min(first + kFewOutlierOutputs, last);
    for (int64_t output = first; output < end; output += kTogether) {
      const int64_t count = Min(kTogether, end - output);
      ForRows(rows, [&](auto turn, int64_t row) {
        constexpr int R = decltype(turn)::value;
        float* to = y + row * y_stride + output - first;
        if constexpr (R == 1) {
          one_row(call, row, output, count, to, y_stride);
        } else if constexpr (R <= Values::kMostRows) {
          Outputs<Values, unit, R, 0>(call, row, output, count, to, y_stride);
        }
      });
    }
    if (l.row_outliers > 0 && !sixteen && !eight) AddOutliers(l, rows, outliers, first, end, y, y_stride);
  }
}

size_t ScratchBytes(const Layout& l, int64_t) {
  return static_cast<size_t>(PaddedUnits(l) * (4 * 4 + 2) + l.value_bytes + kBlock);
}

template <class Values>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const int64_t unit = UnitColumns(l);
  const auto run = unit == 128 ? RunUnits<Values, 128> : unit == 64 ? RunUnits<Values, 64> : RunUnits<Values, 32>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, scratch, y, y_stride);
}

template <int dtype, bool half>
bool Supports(const Layout& l) {
  const bool pattern = half ? IsHalf(l) : !IsHalf(l) && !l.dense && l.m <= kBlock;
  const bool whole = pattern && l.bitmap && l.in_features % kStep == 0 && l.in_features <= INT32_MAX - 1024;
  return l.dtype == dtype && whole && (l.row_scales == 1 || l.scale_columns == UnitColumns(l));
}

constexpr Kernel kKernels[] = {
    {"int8 whole row, int8 activations", Isa::kAvx2, true, 1, Int8::kMostRows, Supports<NM_INT8, true>, PackedBytes,
     PackRows, ScratchBytes, Run<Int8>},
    {"int4 whole rows, int8 activations", Isa::kAvx2, true, 1, Int4::kMostRows, Supports<NM_INT4, true>, PackedBytes,
     PackRows, ScratchBytes, Run<Int4>},
    {"int8 whole rows of any pattern, int8 activations", Isa::kAvx2, true, 1, AnyInt8::kMostRows,
     Supports<NM_INT8, false>, PackedBytes, PackRows, ScratchBytes, Run<AnyInt8>},
    {"int4 whole rows of any pattern, int8 activations", Isa::kAvx2, true, 1, AnyInt4::kMostRows,
     Supports<NM_INT4, false>, PackedBytes, PackRows, ScratchBytes, Run<AnyInt4>},
};

}  // namespace

KernelList Avx2WholeRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
