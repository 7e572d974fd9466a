// What the NEON kernels for few activation rows share: rows of activations in order, the rows taken in turns, outliers.
#ifndef NM_KERNELS_NEON_ROWS_H_
#define NM_KERNELS_NEON_ROWS_H_

#include "kernels.h"
#include "neon_common.h"
#include "row_turns.h"

namespace nm {
namespace {

// A row in order, zeros after it: a turn of the loops and a block of outliers may reach past its end.
inline int64_t NaturalColumns(const Layout& l) { return PaddedColumns(l) + kLargestOutlierBlock; }

inline void PackNatural(const Layout& l, const float* a, float* row) {
  memcpy(row, a, static_cast<size_t>(l.in_features) * sizeof(float));
  memset(row + l.in_features, 0, static_cast<size_t>(NaturalColumns(l) - l.in_features) * sizeof(float));
}

// ---------------------------------------------------------------------------------------------------------------------
// Outliers. There are no gathers: an activation is a scalar load, and multiplied as a scalar by a lane of eight values.

template <int i, int R>
NM_PIECE void OutlierFour(float32x4_t values, uint32_t positions, const float* a, int64_t a_stride, float (&sums)[R]) {
  if constexpr (i < 4) {
    const float* at = a + (positions >> (8 * i) & 255);
    for (int r = 0; r < R; ++r) sums[r] = vfmas_laneq_f32(sums[r], at[r * a_stride], values, i);
    OutlierFour<i + 1>(values, positions, a, a_stride, sums);
  }
}

// Adds Σ values[i] · a[positions[i]] over one block of outliers.
template <int kValueBytes, int R>
NM_PIECE void OutlierBlock(const uint8_t* values, const uint8_t* positions, int64_t count, const float* a,
                           int64_t a_stride, float (&even)[R], float (&odd)[R]) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8, values += 8 * kValueBytes) {
    const uint64_t places = Load64(positions + i);
    float32x4_t first, second;
    if constexpr (kValueBytes == 2) {
      const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(values));
      first = vcvt_f32_f16(vget_low_f16(halves));
      second = vcvt_high_f32_f16(halves);
    } else {
      first = vreinterpretq_f32_u8(vld1q_u8(values));
      second = vreinterpretq_f32_u8(vld1q_u8(values + 16));
    }
    OutlierFour<0>(first, static_cast<uint32_t>(places), a, a_stride, even);
    OutlierFour<0>(second, static_cast<uint32_t>(places >> 32), a, a_stride, odd);
  }
  for (; i < count; ++i, values += kValueBytes) {
    float value;
    if constexpr (kValueBytes == 2) {
      value = HalfAt(values);
    } else {
      memcpy(&value, values, sizeof(value));
    }
    for (int r = 0; r < R; ++r) even[r] += value * a[r * a_stride + positions[i]];
  }
}

// Adds the outliers of output rows first … last-1 times R activation rows, in order at `a`, to y. A few blocks of all
// output rows at a time: the activations of those stay in the first-level cache.
template <int kValueBytes, int R>
NM_LOOP void OutlierRows(const Layout& l, int64_t first, int64_t last, const float* a, float* y, int64_t y_stride) {
  constexpr int64_t kRun = 4;
  const int64_t a_stride = NaturalColumns(l);
  for (int64_t run = 0; run < l.row_outliers; run += kRun * l.outlier_k, a += kRun * l.outlier_block) {
    const int64_t end = Min(run + kRun * l.outlier_k, l.row_outliers);
    for (int64_t output = first; output < last; ++output) {
      const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
      const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
      const float* block = a;
      float even[R] = {}, odd[R] = {};
      for (int64_t i = run; i < end; i += l.outlier_k, block += l.outlier_block) {
        const int64_t count = Min(l.outlier_k, end - i);
        OutlierBlock<kValueBytes>(values + i * kValueBytes, positions + i, count, block, a_stride, even, odd);
      }
      for (int r = 0; r < R; ++r) y[r * y_stride + output - first] += even[r] + odd[r];
    }
  }
}

// The same for all rows, NaturalColumns apart.
inline void AddOutliers(const Layout& l, int64_t rows, int64_t first, int64_t last, const float* a, float* y,
                        int64_t y_stride) {
  if (l.row_outliers == 0) return;
  ForRows(rows, [&](auto count, int64_t row) {
    constexpr int R = decltype(count)::value;
    const auto add = l.outlier_dtype == NM_FLOAT16 ? OutlierRows<2, R> : OutlierRows<4, R>;
    add(l, first, last, a + row * NaturalColumns(l), y + row * y_stride, y_stride);
  });
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_NEON_ROWS_H_
