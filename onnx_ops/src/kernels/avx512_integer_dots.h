// What integer weights of a step meet in the AVX-512 kernels for few activation rows: int8 or float32 activations, for
// accuracy_level 4 and 0.
#ifndef NM_KERNELS_AVX512_INTEGER_DOTS_H_
#define NM_KERNELS_AVX512_INTEGER_DOTS_H_

#include "avx512_rows.h"

namespace nm {
namespace {

// The scale of each lane of a sum of one or more steps, of which each has a scale or each half step has.
inline __m512 LaneScales(bool half_steps, const float* scales, int64_t sum) {
  if (!half_steps) return _mm512_set1_ps(scales[sum]);
  int64_t pair;
  memcpy(&pair, scales + 2 * sum, sizeof(pair));
  return _mm512_permutevar_ps(_mm512_castsi512_ps(_mm512_set1_epi64(pair)),
                              _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
}

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
        starts(reinterpret_cast<const int32_t*>(packed + p.starts) + row * p.row_starts),
        starts_stride(p.row_starts),
        scales(reinterpret_cast<const float*>(packed + p.scales) + row * RoundUp(p.blocks, 16)),
        scales_stride(RoundUp(p.blocks, 16)) {}

  // Weight scales of sixteen blocks from `block` on times those of R activation rows.
  template <int R>
  void ScaleProducts(__m512 weight_scales, int64_t block, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) {
      const __m512 product = _mm512_mul_ps(weight_scales, _mm512_load_ps(scales + r * scales_stride + block));
      _mm512_store_ps(products + r * stride + block, product);
    }
  }

  // block: of a step or more; half steps begin in pairs.
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
  void ScaleProducts(__m512 weight_scales, int64_t block, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) _mm512_store_ps(products + r * stride + block, weight_scales);
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

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_INTEGER_DOTS_H_
