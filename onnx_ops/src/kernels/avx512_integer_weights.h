// Integer weights as the AVX-512 and AMX kernels unpack them: bytes q + offset, 64 columns a step, pruned columns at
// the offset.
#ifndef NM_KERNELS_AVX512_INTEGER_WEIGHTS_H_
#define NM_KERNELS_AVX512_INTEGER_WEIGHTS_H_

#include "avx512_rows.h"

namespace nm {
namespace {

// `WholeSteps` of a row can be loaded in place: what they read is the row's.
template <Density density>
struct Int8 {
  static constexpr Density kDensity = density;
  static int64_t WholeSteps(const Layout& l, int64_t step_values) {
    if constexpr (density != Density::kGeneral) return l.row_values / step_values;
    return l.row_values < kStep ? 0 : (l.row_values - kStep) / step_values + 1;
  }
  static const uint8_t* Address(const uint8_t* row, int64_t step, int64_t step_values) {
    return row + step * step_values;
  }
  static void Fetch(const uint8_t* values) { PrefetchFar(values); }
  // 64 columns of bytes, pruned ones at the offset; row points to the values of the whole row.
  static __m512i Load(const uint8_t* row, int64_t step, uint64_t mask, int64_t step_values, __m512i offset) {
    const uint8_t* v = row + step * step_values;
    const __mmask64 k = mask;
    if constexpr (density == Density::kHalf) {
      return _mm512_mask_expand_epi8(offset, k,
                                     _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))));
    }
    const __m512i values = _mm512_loadu_si512(v);  // more than it takes
    return density == Density::kDense ? values : _mm512_mask_expand_epi8(offset, k, values);
  }
  // The last step of an odd number of them, for Density::kHalf.
  static __m512i LoadLone(const uint8_t* row, int64_t step, uint64_t mask, __m512i offset) {
    return Load(row, step, mask, kStep / 2, offset);
  }
};

template <Density density>
struct Int4 {
  static constexpr Density kDensity = density;
  static int64_t WholeSteps(const Layout& l, int64_t step_values) {
    return l.row_values / l.int4_chunk * (l.int4_chunk / step_values);
  }
  static const uint8_t* Address(const uint8_t* row, int64_t step, int64_t step_values) {
    return row + step * step_values / 2;
  }
  static void Fetch(const uint8_t* values) {
    if constexpr (density != Density::kHalf) {
      PrefetchFar(values);
    } else {
      Prefetch(values);
    }
  }
  static __m512i Load(const uint8_t* row, int64_t step, uint64_t mask, int64_t step_values, __m512i offset) {
    const __m256i low_bits = _mm256_set1_epi8(15);
    const __mmask64 k = mask;
    if constexpr (density == Density::kDense) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * step));
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low_bits)),
                                _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits), 1);
    }
    // A chunk holds the values of an even step in its low halves and of the odd one after it in its high halves.
    const uint8_t* chunk = row + step / 2 * step_values;
    if constexpr (density == Density::kGeneral) {
      const __m512i packed = _mm512_maskz_loadu_epi8(LowMask(step_values), chunk);
      const __m512i halves = step % 2 == 0 ? packed : _mm512_srli_epi16(packed, 4);
      return _mm512_mask_expand_epi8(offset, k, _mm512_and_si512(halves, _mm512_set1_epi8(15)));
    }
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk));
    const __m256i halves = step % 2 == 0 ? packed : _mm256_srli_epi16(packed, 4);
    return _mm512_mask_expand_epi8(offset, k, _mm512_castsi256_si512(_mm256_and_si256(halves, low_bits)));
  }
  // Its 16 bytes hold the first 16 values in their low halves.
  static __m512i LoadLone(const uint8_t* row, int64_t step, uint64_t mask, __m512i offset) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * step));
    const __m256i halves = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    const __mmask64 k = mask;
    return _mm512_mask_expand_epi8(offset, k, _mm512_castsi256_si512(_mm256_and_si256(halves, _mm256_set1_epi8(15))));
  }
};

// The stored values of an output row, and from a copy of one value a byte those behind its whole steps.
struct IntegerValues {
  const uint8_t* values;
  const uint8_t* rest;
};

constexpr int64_t kIntegerCopyBytes = 4 * kStep;  // what two of them store, and as much as is loaded from its end on

// Finds and loads them.
template <class Weights, class Rest>
struct IntegerReader {
  const Layout& layout;
  const __m512i offset;
  const int64_t steps;
  const int64_t step_values;
  const int64_t whole_steps;

  explicit IntegerReader(const Layout& l)
      : layout(l),
        offset(_mm512_set1_epi8(static_cast<char>(l.dtype == NM_INT4 ? 8 : 128))),
        steps(Steps(l)),
        step_values(l.dense ? kStep : kStep * l.n / l.m),
        whole_steps(Min(Weights::WholeSteps(l, step_values), steps)) {}

  // copy: kIntegerCopyBytes of memory that lives as long as the row is read.
  IntegerValues Row(int64_t output, uint8_t* copy) const {
    const uint8_t* values = layout.values + output * layout.value_bytes;
    if (whole_steps == steps) return {values, nullptr};
    const int64_t first = whole_steps * step_values;
    if (layout.dtype == NM_INT4) {
      UnpackInt4Tail(layout, values, first, copy);
    } else {
      memcpy(copy, values + first, static_cast<size_t>(layout.row_values - first));
    }
    return {values, copy};
  }

  // 64 columns of a whole step: the number of its values is a constant where the pattern gives one.
  __m512i LoadInPlace(const IntegerValues& row, int64_t step, uint64_t mask) const {
    return Weights::Load(row.values, step, mask, StepValues<Weights::kDensity>(step_values), offset);
  }
  __m512i Load(const IntegerValues& row, int64_t step, uint64_t mask) const {
    return step < whole_steps ? LoadInPlace(row, step, mask)
                              : Rest::Load(row.rest, step - whole_steps, mask, step_values, offset);
  }
  const uint8_t* Address(const IntegerValues& row, int64_t step) const {
    return Weights::Address(row.values, step, StepValues<Weights::kDensity>(step_values));
  }
};

// Scales of an output row, of sixteen blocks from `block` on, where each block has its own or all have one.
inline __m512 ScalesFrom(const Layout& l, const uint8_t* halves, int64_t block) {
  if (l.row_scales == 1) return _mm512_set1_ps(_mm512_cvtss_f32(HalvesToFloats(halves, 1)));
  return HalvesToFloats(halves + 2 * block, l.row_scales - block);
}

// Scale of each block of an output row, in float32; zeros follow, up to sixteen.
inline void BlockScales(const Layout& l, int64_t output, float* scales) {
  const uint8_t* halves = l.scales + output * l.row_scales * 2;
  const int64_t block = BlockColumns(l);
  const int64_t blocks = (l.in_features + block - 1) / block;
  Prefetch(halves);
  for (int64_t b = 0; b < blocks; b += 16) {
    __m512 values;
    if (l.row_scales == 1 || l.scale_columns == block) {
      values = ScalesFrom(l, halves, b);
    } else {
      alignas(64) uint16_t repeated[32] = {};
      for (int64_t i = 0; i < Min(16, blocks - b); ++i) {
        memcpy(repeated + i, halves + 2 * ((b + i) * block / l.scale_columns), 2);
      }
      values = HalvesToFloats(reinterpret_cast<const uint8_t*>(repeated), 16);
    }
    _mm512_store_ps(scales + b, values);
  }
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_INTEGER_WEIGHTS_H_
