// AVX2 kernels for int8 and int4 weights and few activation rows, rounded to int8 by blocks: one output row at a time,
// one sequential stream per tensor, 128 columns a turn.
#include "avx2_integer_loops.h"

namespace nm {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Packed activations.

struct PackedRows {
  size_t bytes;     // int8
  size_t scales;    // float32 a unit
  size_t outliers;  // float32, for those
  size_t total;
};

PackedRows PlanRows(const Layout& l, int64_t rows) {
  PackedRows p = {};
  Parts parts;
  p.bytes = parts.Take(rows * PaddedColumns(l));
  p.scales = parts.Take(rows * PaddedUnits(l) * 4);
  p.outliers = parts.Take(OutlierActivationBytes(l, rows));
  p.total = parts.total();
  return p;
}

// Where half of the columns are kept, blocks 1 and 2 of a step change places: one look-up takes blocks 0 and 2 in its
// two lanes, the next blocks 1 and 3.
void SwapMiddleBlocks(uint8_t* step) {
  const __m128i first = Load128(step + kBlock), second = Load128(step + 2 * kBlock);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(step + kBlock), second);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(step + 2 * kBlock), first);
}

void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedRows p = PlanRows(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  PackOutlierActivations(l, a, first, count, rows, reinterpret_cast<float*>(base + p.outliers));
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    uint8_t* bytes = base + p.bytes + row * PaddedColumns(l);
    float* scales = reinterpret_cast<float*>(base + p.scales) + row * PaddedUnits(l);
    memset(scales, 0, static_cast<size_t>(PaddedUnits(l)) * sizeof(float));
    for (int64_t column = 0; column < l.in_features; column += kPair) {
      RoundPair(l, a, column, bytes + column, scales);
      if (IsHalf(l)) SwapMiddleBlocks(bytes + column);
      if (IsHalf(l)) SwapMiddleBlocks(bytes + column + kStep);
    }
  }
}

size_t PackedBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows).total; }

// ---------------------------------------------------------------------------------------------------------------------
// All of it.

struct Scratch {
  size_t scales;    // float16 a unit of an output row, where the weight does not have them so
  size_t products;  // float32, the same times the scales of four activation rows
  size_t indices;   // of vpshufb, for more than two activation rows
  size_t bytes;     // an output row expanded to signed bytes
  size_t values;    // its stored values as signed bytes
  size_t total;
};

Scratch PlanScratch(const Layout& l, int64_t rows) {
  const bool expands = !l.dense && !IsHalf(l);
  Scratch s = {};
  Parts parts;
  s.scales = parts.Take(PaddedUnits(l) * 2);
  s.products = parts.Take(4 * PaddedUnits(l) * 4);
  s.indices = parts.Take(IsHalf(l) && rows > 2 ? PaddedColumns(l) / 2 : 0);
  s.bytes = parts.Take(expands ? PaddedColumns(l) : 0);
  s.values = parts.Take(expands ? SignedValuesBytes(l) : 0);
  s.total = parts.total();
  return s;
}

size_t ScratchBytes(const Layout& l, int64_t rows) { return PlanScratch(l, rows).total; }

// What is the same for every output row is worked out once: with 576 columns a row is a hundred cycles.
template <class Values, class Pairs, int unit>
class Outputs {
 public:
  Outputs(const Layout& l, int64_t rows, const uint8_t* packed, uint8_t* scratch)
      : l_(l),
        rows_(rows),
        packed_(packed),
        plan_(PlanRows(l, rows)),
        scratch_(scratch),
        parts_(PlanScratch(l, rows)),
        reader_(l),
        columns_(PaddedColumns(l)),
        units_(RoundUp(columns_ / unit, 8)),
        table_(IsHalf(l) && !l.bitmap ? GetColumnTable(l.m) : nullptr),
        expands_(!l.dense && !IsHalf(l)),
        pairs_(l.in_features / kPair),
        odd_step_(EndsInOddStep(l)),
        in_place_(pairs_ * kPair + (odd_step_ ? kStep : 0)),
        copies_(!expands_ && in_place_ < l.in_features),
        takes_two_(rows == 1 && IsHalf(l) && !copies_ && pairs_ > 0) {}

  void Run(int64_t first, int64_t last, float* y, int64_t y_stride) {
    const float* outliers = reinterpret_cast<const float*>(packed_ + plan_.outliers);
    for (int64_t end; first < last; y += end - first, first = end) {
      end = Min(first + kFewOutlierOutputs, last);
      int64_t output = first;
      if (takes_two_) {
        for (; output + 2 <= end; output += 2) TwoOutputs(output, y + output - first);
      }
      for (; output < end; ++output) OneOutput(output, y + output - first, y_stride);
      if (l_.row_outliers > 0) AddOutliers(l_, rows_, outliers, first, end, y, y_stride);
    }
  }

 private:
  const Layout& l_;
  const int64_t rows_;
  const uint8_t* packed_;
  const PackedRows plan_;
  uint8_t* scratch_;
  const Scratch parts_;
  const PositionReader reader_;
  const int64_t columns_;
  const int64_t units_;  // padded
  const uint32_t* table_;
  const bool expands_;      // output rows to signed bytes
  const int64_t pairs_;     // of an output row that are read where they are, …
  const bool odd_step_;     // … the step that ends it, …
  const int64_t in_place_;  // … and the columns of both;
  const bool copies_;       // what follows those is copied, so that it can be read like a pair
  const bool takes_two_;    // output rows at a time
  alignas(64) uint8_t tail_indices_[StoredPairs::kBytes];
  alignas(64) uint8_t tail_values_[kPair + 64];

  // Without the outliers.
  void OneOutput(int64_t output, float* y, int64_t y_stride) {
    if (l_.row_outliers > 0) PrefetchOutliers(l_, output);
    const uint8_t* scales = UnitScales(output);
    const uint8_t* positions = l_.positions + output * l_.position_bytes;
    const uint8_t* values = l_.values + output * l_.value_bytes;
    if (expands_) ExpandSigned(l_, reader_, output, scratch_ + parts_.values, scratch_ + parts_.bytes);
    if (copies_) CopyTail(output);
    const bool stored = IsHalf(l_) && rows_ > Pairs::kDirectRows;
    uint8_t* indices = scratch_ + parts_.indices;
    if (stored) StorePairs<Pairs>(positions, pairs_, odd_step_, table_, indices);
    ForRows(rows_, [&](auto count, int64_t row) {
      constexpr int R = decltype(count)::value;
      float* products = reinterpret_cast<float*>(scratch_ + parts_.products);
      ScaleProducts<R>(scales, row, products);
      Rows<R> rows = {packed_ + plan_.bytes + row * columns_, columns_, products, units_, {}};
      for (__m256& total : rows.totals) total = _mm256_setzero_ps();
      if (R > Pairs::kDirectRows || stored) {
        Multiply<StoredPairs>(indices, values, rows);
      } else if constexpr (R <= Pairs::kDirectRows) {
        Multiply<Pairs>(positions, values, rows);
      }
      for (int r = 0; r < R; ++r) y[(row + r) * y_stride] = Sum(rows.totals[r]);
    });
  }

  // Of one activation row, without the outliers.
  void TwoOutputs(int64_t output, float* y) {
    float* products = reinterpret_cast<float*>(scratch_ + parts_.products);
    for (int i = 0; i < 2; ++i) {
      if (l_.row_outliers > 0) PrefetchOutliers(l_, output + i);
      ScaleProducts<1>(UnitScales(output + i), 0, products + i * units_);
    }
    Rows<2> rows = {packed_ + plan_.bytes, 0, products, units_, {}};
    for (__m256& total : rows.totals) total = _mm256_setzero_ps();
    HalfPairsOfTwo<Pairs, Values, unit>(l_.positions + output * l_.position_bytes, l_.position_bytes, table_,
                                        l_.values + output * l_.value_bytes, l_.value_bytes, pairs_, odd_step_, rows);
    for (int i = 0; i < 2; ++i) y[i] = Sum(rows.totals[i]);
  }

  // The float16 scales of an output row, one a unit, then any others up to units_: from the weight itself where it has
  // them so, which may go on into the next row.
  const uint8_t* UnitScales(int64_t output) {
    const uint8_t* halves = l_.scales + output * l_.row_scales * 2;
    Prefetch(halves);
    if (l_.scale_columns == unit && output * l_.row_scales + units_ <= l_.out_features * l_.row_scales && !copies_) {
      return halves;
    }
    uint16_t* scales = reinterpret_cast<uint16_t*>(scratch_ + parts_.scales);
    int64_t i = 0;
    for (int64_t group = 0; group < l_.row_scales; ++group, halves += 2) {
      const int64_t last = Min((group + 1) * l_.scale_columns, l_.in_features);
      for (; i * unit < last; ++i) memcpy(scales + i, halves, sizeof(uint16_t));
    }
    memset(scales + i, 0, static_cast<size_t>(units_ - i) * sizeof(uint16_t));
    return scratch_ + parts_.scales;
  }

  void CopyTail(int64_t output) {
    memset(tail_values_, 0, kPair);
    UnpackSigned(l_, l_.values + output * l_.value_bytes, l_.dense ? in_place_ : in_place_ / 2, l_.row_values,
                 tail_values_);
    if (l_.dense) return;
    uint8_t positions[16];
    CopyTailPositions(l_, output, pairs_ * Pairs::kBytes, in_place_, positions, sizeof(positions));
    StorePairs<Pairs>(positions, 1, false, table_, tail_indices_);
  }

  // Weight scales times the scales of R activation rows.
  template <int R>
  void ScaleProducts(const uint8_t* scales, int64_t row, float* products) const {
    const float* rows = reinterpret_cast<const float*>(packed_ + plan_.scales) + row * units_;
    for (int64_t u = 0; u < units_; u += 8) {
      const __m256 weights = _mm256_cvtph_ps(Load128(scales + 2 * u));
      for (int64_t i = u; i < R * units_; i += units_) {
        _mm256_store_ps(products + i, _mm256_mul_ps(weights, _mm256_load_ps(rows + i)));
      }
    }
  }

  template <class Source, int R>
  void Multiply(const uint8_t* positions, const uint8_t* values, Rows<R>& rows) const {
    if (expands_) return DenseSteps<Signed, unit>(scratch_ + parts_.bytes, columns_ / kStep, rows);
    if (l_.dense) {
      DenseSteps<Values, unit>(values, in_place_ / kStep, rows);
    } else if (pairs_ > 0) {
      HalfPairs<Source, Values, unit>(positions, table_, values, pairs_, odd_step_, rows);
    }
    if (!copies_) return;
    rows.a += in_place_;
    rows.products += in_place_ / unit;
    if (l_.dense) {
      DenseSteps<Signed, unit>(tail_values_, 2, rows);
    } else {
      HalfPairs<StoredPairs, Signed, unit>(tail_indices_, table_, tail_values_, 1, false, rows);
    }
  }
};

template <class Values, class Pairs>
void RunUnits(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
              float* y, int64_t y_stride) {
  const int64_t unit = UnitColumns(l);
  if (unit == 128) return Outputs<Values, Pairs, 128>(l, rows, packed, scratch).Run(first, last, y, y_stride);
  if (unit == 64) return Outputs<Values, Pairs, 64>(l, rows, packed, scratch).Run(first, last, y, y_stride);
  Outputs<Values, Pairs, 32>(l, rows, packed, scratch).Run(first, last, y, y_stride);
}

template <class Values>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const bool twelve = l.m == 4;  // four codes of 2:4 make 12 bits, the others' 14
  const auto run = l.bitmap ? RunUnits<Values, MaskPairs<Order::kValues>>
                   : twelve ? RunUnits<Values, CodePairs<12, Order::kValues>>
                            : RunUnits<Values, CodePairs<14, Order::kValues>>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, static_cast<uint8_t*>(scratch), y, y_stride);
}

template <int dtype>
bool Supports(const Layout& l) {
  return l.dtype == dtype && l.in_features <= INT32_MAX - 1024 && (l.row_scales == 1 || l.scale_columns % 32 == 0);
}

constexpr int64_t kMostInt8Rows = 16;  // from then on panels are faster
constexpr int64_t kMostInt4Rows = 12;
constexpr Kernel kKernels[] = {
    {"int8 rows, int8 activations", Isa::kAvx2, true, 1, kMostInt8Rows, Supports<NM_INT8>, PackedBytes, PackRows,
     ScratchBytes, Run<Int8>},
    {"int4 rows, int8 activations", Isa::kAvx2, true, 1, kMostInt4Rows, Supports<NM_INT4>, PackedBytes, PackRows,
     ScratchBytes, Run<Int4>},
};

}  // namespace

KernelList Avx2IntegerRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
