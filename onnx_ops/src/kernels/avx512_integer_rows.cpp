// AVX-512 kernels of integer weights: bytes q + offset. Pruned columns become the offset, so that one precomputed sum
// of activations cancels it everywhere.
#include "avx512_rows.h"
#include "kernels.h"

namespace nm {
namespace {

template <Density density>
struct Int8 {
  static constexpr Density kDensity = density;
  static constexpr bool kUnpackFirst = false;
  static const uint8_t* Address(const uint8_t* row, int64_t step, int64_t step_values) {
    return row + step * step_values;
  }
  // 64 columns of bytes, pruned ones at the offset; row points to the values of the whole row.
  static __m512i Load(const uint8_t* row, int64_t step, uint64_t mask, int64_t step_values, __m512i offset) {
    const uint8_t* v = row + step * step_values;
    if constexpr (density == Density::kDense) return _mm512_loadu_si512(v);
    const __mmask64 k = mask;
    if constexpr (density == Density::kHalf) {
      return _mm512_mask_expand_epi8(offset, k,
                                     _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))));
    }
    return _mm512_mask_expand_epi8(offset, k, _mm512_maskz_loadu_epi8(LowMask(step_values), v));
  }
};

template <Density density>
struct Int4 {
  static constexpr Density kDensity = density;
  static constexpr bool kUnpackFirst = density == Density::kGeneral;
  static const uint8_t* Address(const uint8_t* row, int64_t step, int64_t) {
    return density == Density::kDense ? row + 32 * step : row + 16 * step;
  }
  static __m512i Load(const uint8_t* row, int64_t step, uint64_t mask, int64_t, __m512i offset) {
    const __m256i low_bits = _mm256_set1_epi8(15);
    if constexpr (density == Density::kDense) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * step));
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low_bits)),
                                _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits), 1);
    }
    // 32 bytes hold the values of an even step in their low halves and of the odd one after it in their high halves.
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * (step / 2)));
    const __m256i halves = step % 2 == 0 ? packed : _mm256_srli_epi16(packed, 4);
    const __mmask64 k = mask;
    return _mm512_mask_expand_epi8(offset, k, _mm512_castsi256_si512(_mm256_and_si256(halves, low_bits)));
  }
};

struct BytesDot {  // int8 activations
  using Sum = __m512i;
  static constexpr bool kInt8Activations = true;
  const uint8_t* a;
  int64_t a_stride;
  const int32_t* starts;
  int64_t starts_stride;
  const float* scales;
  int64_t scales_stride;

  BytesDot(const PackedRows& p, const uint8_t* packed, int64_t row)
      : a(packed + p.bytes + row * p.columns),
        a_stride(p.columns),
        starts(reinterpret_cast<const int32_t*>(packed + p.starts) + row * p.blocks * 16),
        starts_stride(p.blocks * 16),
        scales(reinterpret_cast<const float*>(packed + p.scales) + row * RoundUp(p.blocks, 16)),
        scales_stride(RoundUp(p.blocks, 16)) {}

  // Weight scales of a row times the scales of R activation rows.
  template <int R>
  void ScaleProducts(const float* weight_scales, int64_t blocks, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) {
      for (int64_t b = 0; b < blocks; b += 16) {
        const __m512 product =
            _mm512_mul_ps(_mm512_load_ps(weight_scales + b), _mm512_load_ps(scales + r * scales_stride + b));
        _mm512_store_ps(products + r * stride + b, product);
      }
    }
  }

  Sum Start(int r, int64_t block) const { return _mm512_load_si512(starts + r * starts_stride + 16 * block); }
  template <int R>
  void Step(__m512i w, __m512i, int64_t step, Sum (&sums)[R]) const {
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_load_si512(a + r * a_stride + kStep * step));
    }
  }
  static __m512 Value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

struct FloatsDot {  // float32 activations, every fourth column in one vector
  using Sum = __m512;
  static constexpr bool kInt8Activations = false;
  const float* a;
  int64_t a_stride;

  FloatsDot(const PackedRows& p, const uint8_t* packed, int64_t row)
      : a(reinterpret_cast<const float*>(packed + p.ordered) + row * p.columns), a_stride(p.columns) {}

  template <int R>
  void ScaleProducts(const float* weight_scales, int64_t blocks, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) memcpy(products + r * stride, weight_scales, static_cast<size_t>(blocks) * 4);
  }

  Sum Start(int, int64_t) const { return _mm512_setzero_ps(); }
  template <int R>
  void Step(__m512i w, __m512i offset, int64_t step, Sum (&sums)[R]) const {
    const __m512i q = _mm512_sub_epi8(w, offset);
    const __m512i first = _mm512_slli_epi32(q, 24);
    const __m512i tops[4] = {first, _mm512_slli_epi32(q, 16), _mm512_slli_epi32(q, 8), q};
    for (int j = 0; j < 4; ++j) {
      const __m512 values = _mm512_cvtepi32_ps(_mm512_srai_epi32(tops[j], 24));
      for (int r = 0; r < R; ++r) {
        sums[r] = _mm512_fmadd_ps(values, _mm512_load_ps(a + r * a_stride + kStep * step + 16 * j), sums[r]);
      }
    }
  }
  static __m512 Value(Sum sum) { return sum; }
};

// Scale of each block of an output row, in float32.
void BlockScales(const Layout& l, const PackedRows& p, int64_t output, float* scales) {
  const uint8_t* halves = l.scales + output * l.row_scales * 2;
  const int64_t block = BlockColumns(l);
  Prefetch(halves);
  for (int64_t b = 0; b < p.blocks; b += 16) {
    __m512 values;
    if (l.row_scales == 1) {
      values = _mm512_set1_ps(_mm512_cvtss_f32(HalvesToFloats(halves, 1)));
    } else if (l.scale_columns == block) {
      values = HalvesToFloats(halves + 2 * b, p.blocks - b);
    } else {
      alignas(64) uint16_t repeated[32] = {};
      for (int64_t i = 0; i < Min(16, p.blocks - b); ++i) {
        memcpy(repeated + i, halves + 2 * ((b + i) * block / l.scale_columns), 2);
      }
      values = HalvesToFloats(reinterpret_cast<const uint8_t*>(repeated), 16);
    }
    _mm512_store_ps(scales + b, values);
  }
}

// One output row times R activation rows. Steps below whole_steps are read in place; the rest, at most two, from
// rest_values, one value a byte.
template <class Weights, class Rest, class Masks>
struct IntegerRow {
  Masks masks;
  const uint8_t* values;
  const uint8_t* rest_values;
  int64_t whole_steps;
  int64_t steps;
  int64_t step_values;
  __m512i offset;

  __m512i Load(int64_t step) const {
    const uint64_t mask = masks.Step(step);
    return step < whole_steps ? Weights::Load(values, step, mask, step_values, offset)
                              : Rest::Load(rest_values, step - whole_steps, mask, step_values, offset);
  }

  // kBlockSteps: steps of a block, 0 for block_steps of them. scales[r · scales_stride + block].
  template <int R, int kBlockSteps, class Dot>
  void Multiply(const Dot& dot, int64_t block_steps, const float* scales, int64_t scales_stride, float* sums) const {
    __m512 totals[R];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    const int64_t per_block = kBlockSteps > 0 ? kBlockSteps : block_steps;
    const int64_t count = StepValues<Weights::kDensity>(step_values);
    const int64_t plain_blocks = Min(whole_steps, steps - 1) / per_block;
    const int64_t blocks = (steps + per_block - 1) / per_block;
    for (int64_t b = 0; b < blocks; ++b) {
      typename Dot::Sum block[R];
      for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      int64_t step = b * per_block;
      if (b < plain_blocks) {
        for (int64_t i = 0; i < per_block; ++i, ++step) {
          masks.PrefetchStep(step);
          if (i % 2 == 0) Prefetch(Weights::Address(values, step, count));
          dot.template Step<R>(Weights::Load(values, step, masks.PlainStep(step), count, offset), offset, step, block);
        }
      } else {
        for (; step < Min((b + 1) * per_block, steps); ++step) dot.template Step<R>(Load(step), offset, step, block);
      }
      for (int r = 0; r < R; ++r) {
        totals[r] = _mm512_fmadd_ps(Dot::Value(block[r]), _mm512_set1_ps(scales[r * scales_stride + b]), totals[r]);
      }
    }
    for (int r = 0; r < R; ++r) sums[r] = Sum(totals[r]);
  }
};

struct IntegerScratch {
  size_t masks;
  size_t scales;    // float32 a block
  size_t products;  // float32 a block for four activation rows
  size_t values;    // an int4 row as bytes
  size_t total;
};

IntegerScratch PlanIntegerScratch(const Layout& l) {
  const int64_t blocks = RoundUp(l.in_features, 64) / 64 + 16;
  IntegerScratch s = {};
  s.masks = 0;
  s.scales = static_cast<size_t>(RoundUp(static_cast<int64_t>(MaskReader::ScratchBytes(l)), 64));
  s.products = s.scales + static_cast<size_t>(RoundUp(blocks * 4, 64));
  s.values = s.products + 4 * static_cast<size_t>(RoundUp(blocks * 4, 64));
  s.total = s.values + (l.dtype == NM_INT4 ? static_cast<size_t>(RoundUp(l.row_values, 64)) + 256 : 0);
  return s;
}

template <class Weights, class Rest, class Dot, class Masks>
void IntegerOutputs(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
                    float* y, int64_t y_stride) {
  const PackedRows p = PlanRows(l, rows, Dot::kInt8Activations);
  const IntegerScratch plan = PlanIntegerScratch(l);
  const MaskReader reader(l);
  float* scales = reinterpret_cast<float*>(scratch + plan.scales);
  float* products = reinterpret_cast<float*>(scratch + plan.products);
  const int64_t steps = Steps(l);
  const int64_t step_values = l.dense ? kStep : kStep * l.n / l.m;
  const int64_t block_steps = BlockColumns(l) / kStep;
  const int64_t scales_stride = RoundUp(p.blocks, 16);
  // int4 values come in whole chunks of 64, the rest and every general pattern by bytes.
  const int64_t whole = Weights::kUnpackFirst ? 0 : l.dtype == NM_INT4 ? l.row_values / 64 * 64 : l.row_values;
  const int64_t whole_steps = Min(whole / step_values, steps);
  for (int64_t output = first; output < last; ++output) {
    alignas(64) uint8_t rest[256];
    const uint8_t* values = l.values + output * l.value_bytes;
    const uint8_t* rest_values = rest;
    if (Weights::kUnpackFirst) {
      UnpackInt4Tail(l, values, 0, scratch + plan.values);
      rest_values = scratch + plan.values;
    } else if (whole_steps < steps && l.dtype == NM_INT4) {
      UnpackInt4Tail(l, values, whole, rest);
    } else if (whole_steps < steps) {
      memcpy(rest, values + whole_steps * step_values, static_cast<size_t>(l.row_values - whole_steps * step_values));
    }
    BlockScales(l, p, output, scales);
    const IntegerRow<Weights, Rest, Masks> row{MasksOf<Masks>(reader, output, scratch),
                                               values,
                                               rest_values,
                                               whole_steps,
                                               steps,
                                               step_values,
                                               _mm512_set1_epi8(static_cast<char>(l.dtype == NM_INT4 ? 8 : 128))};
    ForRows(rows, [&](auto count, int64_t r) {
      constexpr int R = decltype(count)::value;
      float sums[R];
      const Dot dot(p, packed, r);
      dot.template ScaleProducts<R>(scales, p.blocks, scales_stride, products);
      if (block_steps == 2) {
        row.template Multiply<R, 2>(dot, 2, products, scales_stride, sums);
      } else {
        row.template Multiply<R, 0>(dot, block_steps, products, scales_stride, sums);
      }
      StoreSums(l, p, packed, output, r, R, sums, y + output - first, y_stride);
    });
  }
}

template <template <Density> class Weights, class Dot>
void RunIntegers(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
                 float* y, int64_t y_stride) {
  constexpr Density kHalf = Density::kHalf;
  constexpr Density kGeneral = Density::kGeneral;
  constexpr Density kDense = Density::kDense;
  const Density density = DensityOf(l);
  const auto run = density == kDense     ? IntegerOutputs<Weights<kDense>, Int8<kDense>, Dot, StoredMasks>
                   : density == kGeneral ? IntegerOutputs<Weights<kGeneral>, Int8<kGeneral>, Dot, StoredMasks>
                   : ReadsCodes(l, rows) ? IntegerOutputs<Weights<kHalf>, Int8<kHalf>, Dot, CodeMasks>
                                         : IntegerOutputs<Weights<kHalf>, Int8<kHalf>, Dot, StoredMasks>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, static_cast<uint8_t*>(scratch), y, y_stride);
}

size_t IntegerScratchBytes(const Layout& l, int64_t) { return PlanIntegerScratch(l).total; }

constexpr Kernel kKernels[] = {
    {"int8 rows, int8 activations", Isa::kAvx512, true, kAny, Supports<NM_INT8>, Int8RowsBytes, PackBytes,
     IntegerScratchBytes, RunIntegers<Int8, BytesDot>},
    {"int4 rows, int8 activations", Isa::kAvx512, true, kAny, Supports<NM_INT4>, Int8RowsBytes, PackBytes,
     IntegerScratchBytes, RunIntegers<Int4, BytesDot>},
    {"int8 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_INT8>, FloatRowsBytes, PackFloats,
     IntegerScratchBytes, RunIntegers<Int8, FloatsDot>},
    {"int4 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_INT4>, FloatRowsBytes, PackFloats,
     IntegerScratchBytes, RunIntegers<Int4, FloatsDot>},
};

}  // namespace

KernelList Avx512IntegerRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
