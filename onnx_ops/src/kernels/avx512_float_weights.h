// Floating-point weights spread over their columns, zeros in the pruned ones.
#ifndef NM_KERNELS_AVX512_FLOAT_WEIGHTS_H_
#define NM_KERNELS_AVX512_FLOAT_WEIGHTS_H_

#include "avx512_rows.h"

namespace nm {
namespace {

// The next 16 columns of a step of float32 values, of which *values are left at *v.
template <Density density>
__m512 ExpandNext(const uint8_t** v, uint64_t mask, int64_t* values) {
  const uint8_t* p = *v;
  if constexpr (density == Density::kDense) {
    *v += 64;
    return _mm512_loadu_ps(p);
  }
  const __mmask16 k = static_cast<__mmask16>(mask);
  if constexpr (density == Density::kHalf) {
    *v += 32;
    return ExpandFloats(k, _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(p))));
  }
  // 16 columns of a 32-wide group keep any number of values: count them, but stay inside the step.
  const int64_t count = Min(_mm_popcnt_u32(k), *values);
  *v += 4 * count;
  *values -= count;
  return ExpandFloats(k, _mm512_maskz_loadu_ps(static_cast<__mmask16>(LowMask(count)), p));
}

// 32 columns of 16-bit values from the values of half a step.
template <Density density>
__m512i Expand16(const uint8_t* v, uint64_t mask, int64_t values) {
  if constexpr (density == Density::kDense) return _mm512_loadu_si512(v);
  const __mmask32 k = static_cast<__mmask32>(mask);
  if constexpr (density == Density::kHalf) {
    return ExpandWords(k, _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))));
  }
  return ExpandWords(k, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(LowMask(values)), v));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_FLOAT_WEIGHTS_H_
