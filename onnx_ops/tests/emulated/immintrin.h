// The AVX-512 and AMX intrinsics that the kernels use, in plain C++, so that every machine can test those kernels: this
// folder stands before the compiler's own headers in the nm_emulated_test build alone. Semantics are those of Intel's
// Intrinsics Guide. Stricter than a processor: what an instruction leaves undefined reads as 0xff…, and an aligned
// access that is not aligned aborts.
#ifndef NM_TESTS_EMULATED_IMMINTRIN_H_
#define NM_TESTS_EMULATED_IMMINTRIN_H_

#include <stdint.h>
#include <string.h>

#include <cmath>

#include "floats.h"
#include "registers.h"

// The kernels' inline assembly holds no instruction; its operands would be structures here.
#define asm(...)

// ---------------------------------------------------------------------------------------------------------------------
// Scalars.

inline uint64_t _bzhi_u64(uint64_t value, uint64_t index) {
  return (index & 0xff) < 64 ? value & ((uint64_t{1} << (index & 0xff)) - 1) : value;
}
inline int _mm_popcnt_u32(uint32_t value) { return __builtin_popcount(value); }
inline void _mm_prefetch(const void*, int) {}

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

inline __m128i _mm_maskz_loadu_epi8(__mmask16 k, const void* p) {
  return nm_emulated::LoadMasked<__m128i, uint8_t>(k, p);
}
inline void _mm_store_si128(void* p, const __m128i& v) {
  nm_emulated::Aligned<__m128i>(p);
  nm_emulated::Store(p, v);
}

inline __m256 _mm256_loadu_ps(const void* p) { return nm_emulated::Load<__m256>(p); }
inline __m128i _mm_loadu_si128(const void* p) { return nm_emulated::Load<__m128i>(p); }
inline __m256i _mm256_loadu_si256(const void* p) { return nm_emulated::Load<__m256i>(p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
  return nm_emulated::LoadMasked<__m256i, uint16_t>(k, p);
}
inline void _mm256_storeu_si256(void* p, const __m256i& v) { nm_emulated::Store(p, v); }

inline __m128 _mm_load_ps(const void* p) { return nm_emulated::Load<__m128>(nm_emulated::Aligned<__m128>(p)); }
inline __m512 _mm512_load_ps(const void* p) { return nm_emulated::Load<__m512>(nm_emulated::Aligned<__m512>(p)); }
inline __m512 _mm512_loadu_ps(const void* p) { return nm_emulated::Load<__m512>(p); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) { return nm_emulated::LoadMasked<__m512, float>(k, p); }
inline __m512i _mm512_load_si512(const void* p) { return nm_emulated::Load<__m512i>(nm_emulated::Aligned<__m512i>(p)); }
inline __m512i _mm512_loadu_si512(const void* p) { return nm_emulated::Load<__m512i>(p); }
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 k, const void* p) {
  return nm_emulated::LoadMasked<__m512i, uint8_t>(k, p);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void* p) {
  return nm_emulated::LoadMasked<__m512i, uint16_t>(k, p);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 k, const void* p) {
  return nm_emulated::LoadMasked<__m512i, uint32_t>(k, p);
}
inline __m512 _mm512_mask_i32gather_ps(const __m512& source, __mmask16 k, const __m512i& index, const void* base,
                                       int scale) {
  return nm_emulated::Fill<__m512, float>([&](int i) {
    if ((k >> i & 1) == 0) return nm_emulated::Get<float>(source, i);
    float value;
    memcpy(&value, static_cast<const uint8_t*>(base) + int64_t{nm_emulated::Get<int32_t>(index, i)} * scale, 4);
    return value;
  });
}
inline void _mm_store_ps(void* p, const __m128& v) {
  nm_emulated::Aligned<__m128>(p);
  memcpy(p, v.bytes, sizeof(v));
}
inline void _mm512_store_ps(void* p, const __m512& v) {
  nm_emulated::Aligned<__m512>(p);
  nm_emulated::Store(p, v);
}
inline void _mm512_store_si512(void* p, const __m512i& v) {
  nm_emulated::Aligned<__m512i>(p);
  nm_emulated::Store(p, v);
}
inline void _mm512_storeu_si512(void* p, const __m512i& v) { nm_emulated::Store(p, v); }
inline void _mm512_mask_storeu_ps(void* p, __mmask16 k, const __m512& v) {
  for (int i = 0; i < 16; ++i) {
    if ((k >> i & 1) != 0) memcpy(static_cast<uint8_t*>(p) + 4 * i, v.bytes + 4 * i, 4);
  }
}
inline void _mm512_mask_storeu_epi32(void* p, __mmask16 k, const __m512i& v) {
  _mm512_mask_storeu_ps(p, k, nm_emulated::Cast<__m512>(v));
}
inline void _mm512_mask_i32scatter_epi32(void* base, __mmask16 k, const __m512i& index, const __m512i& v, int scale) {
  for (int i = 0; i < 16; ++i) {
    if ((k >> i & 1) == 0) continue;
    memcpy(static_cast<uint8_t*>(base) + int64_t{nm_emulated::Get<int32_t>(index, i)} * scale, v.bytes + 4 * i, 4);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Constants, casts and pieces.

inline __m256i _mm256_set1_epi8(char x) {
  return nm_emulated::Fill<__m256i, char>([x](int) { return x; });
}
inline __m512i _mm512_set1_epi8(char x) {
  return nm_emulated::Fill<__m512i, char>([x](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) {
  return nm_emulated::Fill<__m512i, int>([x](int) { return x; });
}
inline __m512i _mm512_set1_epi64(long long x) {
  return nm_emulated::Fill<__m512i, long long>([x](int) { return x; });
}
inline __m128 _mm_set1_ps(float x) {
  return nm_emulated::Fill<__m128, float>([x](int) { return x; });
}
inline __m128 _mm_setzero_ps() { return _mm_set1_ps(0); }
inline __m512 _mm512_set1_ps(float x) {
  return nm_emulated::Fill<__m512, float>([x](int) { return x; });
}
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0); }
template <class... Ints>
__m512i _mm512_set_epi32(Ints... from_the_highest) {
  static_assert(sizeof...(Ints) == 16, "one a lane");
  const int lanes[] = {from_the_highest...};
  return nm_emulated::Fill<__m512i, int>([&](int i) { return lanes[15 - i]; });
}

inline __m512 _mm512_castps256_ps512(const __m256& v) { return nm_emulated::Cast<__m512>(v); }
inline __m256i _mm256_castsi128_si256(const __m128i& v) { return nm_emulated::Cast<__m256i>(v); }
inline __m512i _mm512_castsi256_si512(const __m256i& v) { return nm_emulated::Cast<__m512i>(v); }
inline __m256i _mm512_castsi512_si256(const __m512i& v) { return nm_emulated::Cast<__m256i>(v); }
inline __m512 _mm512_castsi512_ps(const __m512i& v) { return nm_emulated::Cast<__m512>(v); }
inline __m128 _mm_castsi128_ps(const __m128i& v) { return nm_emulated::Cast<__m128>(v); }
inline long long _mm_cvtsi128_si64(const __m128i& v) { return nm_emulated::Get<long long>(v, 0); }
inline __m128i _mm_cvtsi32_si128(int x) {
  return nm_emulated::Fill<__m128i, int>([x](int i) { return i == 0 ? x : 0; });
}
inline float _mm_cvtss_f32(const __m128& v) { return nm_emulated::Get<float>(v, 0); }
inline float _mm512_cvtss_f32(const __m512& v) { return nm_emulated::Get<float>(v, 0); }
inline __m256i _mm512_extracti64x4_epi64(const __m512i& v, int half) {
  return nm_emulated::Fill<__m256i, int64_t>([&](int i) { return nm_emulated::Get<int64_t>(v, 4 * (half & 1) + i); });
}
inline __m128i _mm256_castsi256_si128(const __m256i& v) { return nm_emulated::Cast<__m128i>(v); }
inline __m128i _mm256_extracti128_si256(const __m256i& v, int half) {
  return nm_emulated::Fill<__m128i, int64_t>([&](int i) { return nm_emulated::Get<int64_t>(v, 2 * (half & 1) + i); });
}
inline __m256i _mm256_inserti128_si256(__m256i v, const __m128i& piece, int half) {
  memcpy(v.bytes + 16 * (half & 1), piece.bytes, 16);
  return v;
}
inline __m512i _mm512_inserti64x4(__m512i v, const __m256i& piece, int half) {
  memcpy(v.bytes + 32 * (half & 1), piece.bytes, 32);
  return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// Permutations.

inline __m512 _mm512_mask_expand_ps(const __m512& source, __mmask16 k, const __m512& a) {
  return nm_emulated::Expand<float>(source, k, a);
}
// The bytes whose bit is set, one after the other, then zeros.
inline __m512i _mm512_maskz_compress_epi8(__mmask64 k, const __m512i& a) {
  __m512i result = {};
  int next = 0;
  for (int i = 0; i < 64; ++i) {
    if ((k >> i & 1) != 0) result.bytes[next++] = a.bytes[i];
  }
  return result;
}
inline __m512i _mm512_mask_expand_epi8(const __m512i& source, __mmask64 k, const __m512i& a) {
  return nm_emulated::Expand<uint8_t>(source, k, a);
}
inline __m512i _mm512_mask_expand_epi16(const __m512i& source, __mmask32 k, const __m512i& a) {
  return nm_emulated::Expand<uint16_t>(source, k, a);
}
// Within each quarter of four lanes.
inline __m512 _mm512_unpacklo_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Fill<__m512, float>(
      [&](int i) { return nm_emulated::Get<float>(i % 2 == 0 ? a : b, i / 4 * 4 + i % 4 / 2); });
}
inline __m512 _mm512_unpackhi_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Fill<__m512, float>(
      [&](int i) { return nm_emulated::Get<float>(i % 2 == 0 ? a : b, i / 4 * 4 + 2 + i % 4 / 2); });
}
inline __m512 _mm512_shuffle_ps(const __m512& a, const __m512& b, int control) {
  return nm_emulated::Fill<__m512, float>(
      [&](int i) { return nm_emulated::Get<float>(i % 4 < 2 ? a : b, i / 4 * 4 + (control >> (2 * (i % 4)) & 3)); });
}
inline __m512 _mm512_permutevar_ps(const __m512& a, const __m512i& control) {
  return nm_emulated::Fill<__m512, float>(
      [&](int i) { return nm_emulated::Get<float>(a, i / 4 * 4 + (nm_emulated::Get<int>(control, i) & 3)); });
}
// Whole quarters: two of a, then two of b.
inline __m512 _mm512_shuffle_f32x4(const __m512& a, const __m512& b, int control) {
  return nm_emulated::Fill<__m512, float>(
      [&](int i) { return nm_emulated::Get<float>(i < 8 ? a : b, (control >> (2 * (i / 4)) & 3) * 4 + i % 4); });
}
inline __m512i _mm512_permutex2var_epi32(const __m512i& a, const __m512i& index, const __m512i& b) {
  return nm_emulated::Map<uint32_t>(
      [&](uint32_t i) { return nm_emulated::Get<uint32_t>((i & 16) != 0 ? b : a, static_cast<int>(i & 15)); }, index);
}

// ---------------------------------------------------------------------------------------------------------------------
// Integers. Sums and products wrap.

inline __m256i _mm256_and_si256(const __m256i& a, const __m256i& b) {
  return nm_emulated::Map<uint64_t>([](uint64_t x, uint64_t y) { return x & y; }, a, b);
}
inline __m128i _mm_srli_epi16(const __m128i& a, int count) {
  return nm_emulated::Map<uint16_t>([=](uint16_t x) { return count > 15 ? 0 : x >> count; }, a);
}
inline __m256i _mm256_srli_epi16(const __m256i& a, int count) {
  return nm_emulated::Map<uint16_t>([=](uint16_t x) { return count > 15 ? 0 : x >> count; }, a);
}
inline __m512i _mm512_srli_epi16(const __m512i& a, unsigned count) {
  return nm_emulated::Map<uint16_t>([=](uint16_t x) { return count > 15 ? 0 : x >> count; }, a);
}
inline __m512i _mm512_and_si512(const __m512i& a, const __m512i& b) {
  return nm_emulated::Map<uint64_t>([](uint64_t x, uint64_t y) { return x & y; }, a, b);
}
inline __m512i _mm512_xor_si512(const __m512i& a, const __m512i& b) {
  return nm_emulated::Map<uint64_t>([](uint64_t x, uint64_t y) { return x ^ y; }, a, b);
}
inline __m512i _mm512_slli_epi32(const __m512i& a, unsigned count) {
  return nm_emulated::Map<uint32_t>([=](uint32_t x) { return count > 31 ? 0 : x << count; }, a);
}
inline __m512i _mm512_srai_epi32(const __m512i& a, unsigned count) {
  return nm_emulated::Map<int32_t>([=](int32_t x) { return x >> (count > 31 ? 31 : count); }, a);
}
inline __m512i _mm512_add_epi32(const __m512i& a, const __m512i& b) {
  return nm_emulated::Map<uint32_t>([](uint32_t x, uint32_t y) { return x + y; }, a, b);
}
inline __m512i _mm512_sub_epi8(const __m512i& a, const __m512i& b) {
  return nm_emulated::Map<uint8_t>([](uint8_t x, uint8_t y) { return x - y; }, a, b);
}
inline __m512i _mm512_mullo_epi32(const __m512i& a, const __m512i& b) {
  return nm_emulated::Map<uint32_t>([](uint32_t x, uint32_t y) { return x * y; }, a, b);
}
inline __m512i _mm512_max_epu32(const __m512i& a, const __m512i& b) {
  return nm_emulated::Map<uint32_t>([](uint32_t x, uint32_t y) { return x > y ? x : y; }, a, b);
}
inline uint32_t _mm512_reduce_max_epu32(const __m512i& a) {
  uint32_t most = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t lane = nm_emulated::Get<uint32_t>(a, i);
    most = lane > most ? lane : most;
  }
  return most;
}
inline __m512i _mm512_mask_sub_epi32(const __m512i& source, __mmask16 k, const __m512i& a, const __m512i& b) {
  return nm_emulated::MapMasked<uint32_t>(k, [](uint32_t x, uint32_t y) { return x - y; }, source, a, b);
}
inline __m512i _mm512_mask_or_epi32(const __m512i& source, __mmask16 k, const __m512i& a, const __m512i& b) {
  return nm_emulated::MapMasked<uint32_t>(k, [](uint32_t x, uint32_t y) { return x | y; }, source, a, b);
}
inline __mmask16 _mm512_cmpge_epu32_mask(const __m512i& a, const __m512i& b) {
  return nm_emulated::Compare<uint32_t>([](uint32_t x, uint32_t y) { return x >= y; }, a, b);
}
inline __mmask16 _mm512_cmplt_epi32_mask(const __m512i& a, const __m512i& b) {
  return nm_emulated::Compare<int32_t>([](int32_t x, int32_t y) { return x < y; }, a, b);
}
// Each lane plus four products of an unsigned byte of a with a signed byte of b.
inline __m512i _mm512_dpbusd_epi32(const __m512i& source, const __m512i& a, const __m512i& b) {
  return nm_emulated::Fill<__m512i, uint32_t>([&](int i) {
    int32_t sum = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += nm_emulated::Get<uint8_t>(a, j) * nm_emulated::Get<int8_t>(b, j);
    return nm_emulated::Get<uint32_t>(source, i) + static_cast<uint32_t>(sum);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversions and floating point.

inline __m512i _mm512_cvtepu8_epi32(const __m128i& a) {
  return nm_emulated::Fill<__m512i, int32_t>([&](int i) { return int32_t{nm_emulated::Get<uint8_t>(a, i)}; });
}
inline __m512i _mm512_cvtepi8_epi32(const __m128i& a) {
  return nm_emulated::Fill<__m512i, int32_t>([&](int i) { return int32_t{nm_emulated::Get<int8_t>(a, i)}; });
}
inline __m512i _mm512_cvtepu16_epi32(const __m256i& a) {
  return nm_emulated::Fill<__m512i, int32_t>([&](int i) { return int32_t{nm_emulated::Get<uint16_t>(a, i)}; });
}
// The lanes of b, then those of a, to the nearest bfloat16; what is too small to be normal becomes zero.
inline __m512bh _mm512_cvtne2ps_pbh(const __m512& a, const __m512& b) {
  return nm_emulated::Fill<__m512bh, uint16_t>([&](int i) {
    const float x = nm_emulated::Get<float>(i < 16 ? b : a, i % 16);
    return nm::Bfloat16OfFloat(nm_emulated::Flushed(x));
  });
}
inline __m128i _mm512_cvtsepi32_epi8(const __m512i& a) {
  return nm_emulated::Fill<__m128i, int8_t>([&](int i) {
    const int32_t x = nm_emulated::Get<int32_t>(a, i);
    return static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
  });
}
inline __m512 _mm512_cvtepi32_ps(const __m512i& a) {
  return nm_emulated::Fill<__m512, float>([&](int i) { return static_cast<float>(nm_emulated::Get<int32_t>(a, i)); });
}
inline __m512i _mm512_cvtps_epi32(const __m512& a) {  // to the nearest, ties to even; what does not fit is INT32_MIN
  return nm_emulated::Fill<__m512i, int32_t>([&](int i) {
    const float rounded = std::nearbyint(nm_emulated::Get<float>(a, i));
    return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<int32_t>(rounded) : INT32_MIN;
  });
}
inline __m512 _mm512_cvtph_ps(const __m256i& a) {
  return nm_emulated::Fill<__m512, float>([&](int i) { return nm::FloatOfHalf(nm_emulated::Get<uint16_t>(a, i)); });
}
inline __m512 _mm512_add_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Map<float>([](float x, float y) { return x + y; }, a, b);
}
inline __m512 _mm512_sub_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Map<float>([](float x, float y) { return x - y; }, a, b);
}
// The second where either is NaN.
inline __m512 _mm512_min_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Map<float>([](float x, float y) { return x < y ? x : y; }, a, b);
}
inline __m512 _mm512_max_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Map<float>([](float x, float y) { return x > y ? x : y; }, a, b);
}
inline __m512 _mm512_mul_ps(const __m512& a, const __m512& b) {
  return nm_emulated::Map<float>([](float x, float y) { return x * y; }, a, b);
}
inline __m128 _mm_add_ps(const __m128& a, const __m128& b) {
  return nm_emulated::Map<float>([](float x, float y) { return x + y; }, a, b);
}
inline __m128 _mm_fmadd_ps(const __m128& a, const __m128& b, const __m128& c) {
  return nm_emulated::Map<float>([](float x, float y, float z) { return std::fma(x, y, z); }, a, b, c);
}
inline __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
  return nm_emulated::Map<float>([](float x, float y, float z) { return std::fma(x, y, z); }, a, b, c);
}
inline float _mm512_reduce_add_ps(const __m512& a) {
  float sums[16];
  nm_emulated::Store(sums, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

#include "amx.h"

#endif  // NM_TESTS_EMULATED_IMMINTRIN_H_
