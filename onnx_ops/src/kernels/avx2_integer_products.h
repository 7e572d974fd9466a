// What the AVX2 kernels for int8 and int4 weights and few activation rows share: rows rounded to int8, and products.
#ifndef NM_KERNELS_AVX2_INTEGER_PRODUCTS_H_
#define NM_KERNELS_AVX2_INTEGER_PRODUCTS_H_

#include "avx2_rows.h"

namespace nm {
namespace {

// Rounds a unit to int8 with its own scale. Activations that are not finite make the scale NaN, and so the outputs.
inline float PackUnit(const float* a, int64_t columns, uint8_t* bytes) {
  __m256i magnitudes = _mm256_setzero_si256();  // of floats as integers, which order alike
  for (int64_t i = 0; i < columns; i += 8) {
    magnitudes = _mm256_max_epu32(magnitudes, _mm256_and_si256(Load256(a + i), _mm256_set1_epi32(0x7fffffff)));
  }
  __m128i most_bits = _mm_max_epu32(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
  most_bits = _mm_max_epu32(most_bits, _mm_unpackhi_epi64(most_bits, most_bits));
  most_bits = _mm_max_epu32(most_bits, _mm_srli_epi64(most_bits, 32));
  const float most = _mm_cvtss_f32(_mm_castsi128_ps(most_bits));
  const bool finite = static_cast<uint32_t>(_mm_cvtsi128_si32(most_bits)) < 0x7f800000u;
  if (!finite || most <= 0x1p-120f) {
    memset(bytes, 0, static_cast<size_t>(columns));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const __m128 inverse = _mm_set1_ps(127.0f / most);
  const auto round = [inverse](const float* four) { return _mm_cvtps_epi32(_mm_mul_ps(_mm_load_ps(four), inverse)); };
  for (int64_t i = 0; i < columns; i += kBlock) {
    const __m128i low = _mm_packs_epi32(round(a + i), round(a + i + 4));
    const __m128i high = _mm_packs_epi32(round(a + i + 8), round(a + i + 12));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm_packs_epi16(low, high));
  }
  return most / 127.0f;
}

inline int64_t PaddedUnits(const Layout& l) { return RoundUp(PaddedColumns(l) / UnitColumns(l), 8); }

// Rounds a pair of steps of a row from `column` on, zeros behind its end; `scales` are the whole row's.
inline void RoundPair(const Layout& l, const float* a, int64_t column, uint8_t* bytes, float* scales) {
  alignas(32) float padded[kPair] = {};
  memcpy(padded, a + column, static_cast<size_t>(Min(kPair, l.in_features - column)) * sizeof(float));
  const int64_t unit = UnitColumns(l);
  for (int64_t i = 0; i < kPair; i += unit) scales[(column + i) / unit] = PackUnit(padded + i, unit, bytes + i);
}

// Products of 32 values and 32 activations, as sums of pairs (16 bits) or fours (32 bits).
NM_PIECE __m256i SumPairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// vpmaddubsw wants one unsigned factor. |w| · (sign of w · a) cannot saturate: 128 · 127 · 2 is below 2^15.
NM_PIECE __m256i SignedProducts(__m256i w, __m256i a) {
  return SumPairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_INTEGER_PRODUCTS_H_
