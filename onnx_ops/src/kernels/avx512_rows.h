// What the AVX-512 kernels of floating-point and of integer weights share: one output row at a time, one sequential
// stream per tensor, 64 columns a step, and nothing unpacked to memory but the masks of the row. A weight vector is
// unpacked once for all activation rows.
#ifndef NM_KERNELS_AVX512_ROWS_H_
#define NM_KERNELS_AVX512_ROWS_H_

#include "avx512_activations.h"
#include "avx512_common.h"
#include "row_turns.h"

namespace nm {
namespace {

// How the stored values of a step are loaded.
enum class Density {
  kHalf,     // n·2 = m, m at most 16: 8 values for each 16 columns
  kGeneral,  // 64·n/m values for 64 columns
  kDense,    // no positions
};

// Values of a step; a constant where the pattern is, which the loops need to be unrolled.
template <Density density>
inline int64_t StepValues(int64_t general) {
  return density == Density::kHalf ? kStep / 2 : density == Density::kDense ? kStep : general;
}

inline Density DensityOf(const Layout& l) {
  if (l.dense) return Density::kDense;
  return l.n * 2 == l.m && l.m <= 16 ? Density::kHalf : Density::kGeneral;
}

template <class Masks>
Masks MasksOf(const MaskReader& reader, int64_t output, uint8_t* scratch, bool decode = true) {
  if constexpr (Masks::kStored) {
    return reader.Stored(output, scratch, decode);
  } else {
    return reader.Codes(output);
  }
}

// Every mask is used once: no need to store it.
inline bool ReadsCodes(const Layout& l, int64_t rows) { return l.n == 8 && l.m == 16 && !l.bitmap && rows <= 4; }

// Outliers first … last-1 of an output row, sixteen at a time, the activations gathered; the lanes are to be added up.
inline __m512 OutlierProducts(const Layout& l, int64_t output, const int32_t* bases, const float* a, int64_t first,
                              int64_t last) {
  const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
  const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
  const bool half = l.outlier_dtype == NM_FLOAT16;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = first; i < last; i += 16) {
    const int64_t left = last - i;
    const __mmask16 inside = static_cast<__mmask16>(LowMask(left));
    Prefetch(values + (half ? 2 : 4) * i);
    Prefetch(positions + i);
    const __m512i index = _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, positions + i)),
                                           _mm512_load_si512(bases + i));
    const __m512 weights = half ? HalvesToFloats(values + 2 * i, left) : _mm512_maskz_loadu_ps(inside, values + 4 * i);
    const __m512 gathered = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, a, 4);
    sum = _mm512_fmadd_ps(weights, gathered, sum);
  }
  return sum;
}

// Outliers start … end-1, both where blocks begin, of an output row times four activation rows, side by side in
// `quads`: a multiply-add for each. Gathering takes four times eleven cycles for sixteen; with two rows it is faster.
inline __m128 OutlierQuad(const Layout& l, int64_t output, const float* quads, int64_t start, int64_t end) {
  const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
  const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
  const bool half = l.outlier_dtype == NM_FLOAT16;
  __m128 chains[4];
  for (__m128& chain : chains) chain = _mm_setzero_ps();
  alignas(64) float weights[16];
  quads += start / l.outlier_k * 4 * l.outlier_block;
  for (int64_t first = start; first < end; first += l.outlier_k, quads += 4 * l.outlier_block) {
    const int64_t last = Min(first + l.outlier_k, end);
    for (int64_t i = first; i < last; i += 16) {
      const int64_t left = Min(last - i, 16);
      const __mmask16 inside = static_cast<__mmask16>(LowMask(left));
      Prefetch(values + (half ? 2 : 4) * i);
      Prefetch(positions + i);
      _mm512_store_ps(weights,
                      half ? HalvesToFloats(values + 2 * i, left) : _mm512_maskz_loadu_ps(inside, values + 4 * i));
      // A broadcast from memory takes no shuffle, which the compiler would use if it remembered the vector.
      asm volatile("" ::"r"(weights) : "memory");
      int64_t j = 0;
      for (; j + 4 <= left; j += 4) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          chains[c] =
              _mm_fmadd_ps(_mm_set1_ps(weights[j + c]), _mm_load_ps(quads + 4 * positions[i + j + c]), chains[c]);
        }
      }
      for (; j < left; ++j) {
        chains[0] = _mm_fmadd_ps(_mm_set1_ps(weights[j]), _mm_load_ps(quads + 4 * positions[i + j]), chains[0]);
      }
    }
  }
  return _mm_add_ps(_mm_add_ps(chains[0], chains[1]), _mm_add_ps(chains[2], chains[3]));
}

inline void StoreSums(const Layout& l, const PackedRows& p, const uint8_t* packed, int64_t output, int64_t row,
                      int count, const float* sums, float* y, int64_t y_stride) {
  alignas(16) float outliers[4] = {};
  if (l.row_outliers > 0 && count == 4) {
    const float* quads = reinterpret_cast<const float*>(packed + p.quads) + row * p.natural_columns;
    _mm_store_ps(outliers, OutlierQuad(l, output, quads, 0, l.row_outliers));
  } else if (l.row_outliers > 0) {
    const int32_t* bases = reinterpret_cast<const int32_t*>(packed + p.bases);
    const float* a = reinterpret_cast<const float*>(packed + p.natural) + row * p.natural_columns;
    for (int r = 0; r < count; ++r, a += p.natural_columns) {
      outliers[r] = Sum(OutlierProducts(l, output, bases, a, 0, l.row_outliers));
    }
  }
  for (int r = 0; r < count; ++r) y[(row + r) * y_stride] = sums[r] + outliers[r];
}

// Sum of the lanes of each vector.
inline __m512 SumsOfLanes(const __m512 (&v)[kTogether]) {
  __m512 pairs[8], quads[4], halves[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a quarter holds four vectors' sums of their quarter
    quads[i] = _mm512_add_ps(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// To the lanes of one activation row's sums of `count` outputs …
inline void AddOutliers(const Layout& l, const PackedRows& p, const uint8_t* packed, int64_t row, int64_t first,
                        int64_t count, __m512 (&totals)[kTogether]) {
  const int32_t* bases = reinterpret_cast<const int32_t*>(packed + p.bases);
  const float* a = reinterpret_cast<const float*>(packed + p.natural) + row * p.natural_columns;
  for (int64_t start = 0; start < l.row_outliers; start += p.outlier_part) {
    const int64_t end = Min(start + p.outlier_part, l.row_outliers);
    for (int64_t i = 0; i < count; ++i) {
      totals[i] = _mm512_add_ps(totals[i], OutlierProducts(l, first + i, bases, a, start, end));
    }
  }
}

// … or to the outputs of four.
inline void AddOutliers(const Layout& l, const PackedRows& p, const uint8_t* packed, int64_t row, int64_t first,
                        int64_t count, float* y, int64_t y_stride) {
  const float* quads = reinterpret_cast<const float*>(packed + p.quads) + row * p.natural_columns;
  for (int64_t start = 0; start < l.row_outliers; start += p.quad_part) {
    const int64_t end = Min(start + p.quad_part, l.row_outliers);
    for (int64_t i = 0; i < count; ++i) {
      alignas(16) float sums[4];
      _mm_store_ps(sums, OutlierQuad(l, first + i, quads, start, end));
      for (int r = 0; r < 4; ++r) y[r * y_stride + i] += sums[r];
    }
  }
}

// The outputs whose lanes are in `totals`, with their outliers: y[r · y_stride + i] for R activation rows from `row`
// on.
template <int R>
void StoreTogether(const Layout& l, const PackedRows& p, const uint8_t* packed, int64_t row, int64_t first,
                   int64_t count, __m512 (*totals)[kTogether], float* y, int64_t y_stride) {
  const bool outliers = l.row_outliers > 0;
  for (int r = 0; r < R; ++r) {
    for (int64_t i = count; i < kTogether; ++i) totals[r][i] = _mm512_setzero_ps();
    if (R < 4 && outliers) AddOutliers(l, p, packed, row + r, first, count, totals[r]);
    _mm512_mask_storeu_ps(y + r * y_stride, static_cast<__mmask16>(LowMask(count)), SumsOfLanes(totals[r]));
  }
  if (R == 4 && outliers) AddOutliers(l, p, packed, row, first, count, y, y_stride);
}

constexpr int64_t kAny = INT64_MAX;
// Above it float32 arithmetic goes to the AVX2 panels, which multiply kept weights only; where they overtake was
// estimated, not measured.
constexpr int64_t kMostFloatRows = 16;

template <int dtype>
bool Supports(const Layout& l) {
  if (l.dtype != dtype || l.in_features > INT32_MAX - 1024) return false;
  return !IsInteger(dtype) || l.scale_columns % kHalfStep == 0 || l.row_scales == 1;
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_ROWS_H_
