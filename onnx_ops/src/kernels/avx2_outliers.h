// Outliers: y[o] += Σ values[i] · a[column of i], a tile of output rows at a time.
//
// One activation row lies in order and is looked up float by float (a gather takes twice as long on Zen 3). More lie
// side by side in groups of 8 or 16, column after column: an outlier is then one broadcast times the rows in the lanes
// of a vector or two. Either way the activations of a run of blocks stay in the first-level cache while all output rows
// of the tile use them.
#ifndef NM_KERNELS_AVX2_OUTLIERS_H_
#define NM_KERNELS_AVX2_OUTLIERS_H_

#include "avx2_expand.h"
#include "kernels.h"

namespace nm {
namespace {

constexpr int64_t kFewOutlierOutputs = 32;    // of a tile, where fetching its outliers is what takes time
constexpr int64_t kMostOutlierOutputs = 128;  // where fetching the activations is
constexpr int64_t kOutlierRun = 16 << 10;     // bytes of activations
constexpr int64_t kMostOutlierLanes = 16;
static_assert(kMostOutlierLanes == kRowBlock, "a call of Kernel::pack fills a group");

// Rows of a group.
inline int64_t OutlierLanes(int64_t rows) { return rows == 1 ? 1 : rows <= 8 ? 8 : kMostOutlierLanes; }

// Zeros follow the last column, for positions of the last block may say anything.
inline int64_t OutlierColumns(const Layout& l) { return l.in_features + kLargestOutlierBlock; }
inline int64_t OutlierActivationBytes(const Layout& l, int64_t rows) {
  const int64_t lanes = OutlierLanes(rows);
  return l.row_outliers > 0 ? RoundUp(rows, lanes) * OutlierColumns(l) * 4 : 0;
}

// The group that begins with row `first` of `rows`, from a[count, in_features].
inline void PackOutlierActivations(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows,
                                   float* packed) {
  if (l.row_outliers == 0) return;
  const int64_t lanes = OutlierLanes(rows);
  packed += first * OutlierColumns(l);
  if (lanes == 1) {
    memcpy(packed, a, static_cast<size_t>(l.in_features) * sizeof(float));
    memset(packed + l.in_features, 0, kLargestOutlierBlock * sizeof(float));
    return;
  }
  memset(packed, 0, static_cast<size_t>(OutlierColumns(l) * lanes) * sizeof(float));
  for (int64_t begin = 0; begin < l.in_features; begin += kStep) {
    const int64_t end = Min(begin + kStep, l.in_features);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t column = begin; column < end; ++column) {
        packed[column * lanes + row] = a[row * l.in_features + column];
      }
    }
  }
}

// Into the second-level cache, while the arithmetic on the other tensors of this output row leaves the memory free.
inline void PrefetchOutliers(const Layout& l, int64_t output) {
  const auto prefetch = [](const uint8_t* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T1);
  };
  prefetch(l.outlier_values + output * l.outlier_bytes, l.outlier_bytes);
  prefetch(l.outlier_positions + output * l.row_outliers, l.row_outliers);
}

inline float Load1(Float16, const uint8_t* v) {
  uint16_t half;
  memcpy(&half, v, sizeof(half));
  return _cvtsh_ss(half);
}
inline float Load1(Float32, const uint8_t* v) {
  float value;
  memcpy(&value, v, sizeof(value));
  return value;
}

inline __m256 EightOf(const float* low, const float* high, const uint8_t* p) {
  return _mm256_setr_ps(low[p[0]], low[p[1]], low[p[2]], low[p[3]], high[p[4]], high[p[5]], high[p[6]], high[p[7]]);
}

// One row, blocks of k outliers each, k a multiple of 8 or 4; an odd block of 4 is left.
template <class Type, int k>
int64_t FullBlocks(const Layout& l, const uint8_t* values, const uint8_t* positions, int64_t blocks, const float* a,
                   __m256 (&sums)[2]) {
  constexpr int kBlocks = k == 4 ? 2 : 1;  // of one turn
  int64_t block = 0;
  for (; block + kBlocks <= blocks; block += kBlocks, a += kBlocks * l.outlier_block) {
    for (int i = 0; i < kBlocks * k; i += 8, values += 8 * Type::kBytes, positions += 8) {
      const float* high = k == 4 ? a + l.outlier_block : a;
      sums[i / 8 % 2] = _mm256_fmadd_ps(Type::Load8(values), EightOf(a, high, positions), sums[i / 8 % 2]);
    }
  }
  return block;
}

// The outliers of one block, however many.
template <class Type>
float AnyBlock(const uint8_t* values, const uint8_t* positions, int64_t count, const float* a) {
  __m256 eights = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    eights = _mm256_fmadd_ps(Type::Load8(values + i * Type::kBytes), EightOf(a, a, positions + i), eights);
  }
  float sum = i > 0 ? Sum(eights) : 0.0f;
  for (; i < count; ++i) sum += Load1(Type(), values + i * Type::kBytes) * a[positions[i]];
  return sum;
}

template <class Type>
float RunOfOneRow(const Layout& l, const uint8_t* values, const uint8_t* positions, int64_t count, const float* a) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  const int64_t blocks = count / l.outlier_k;
  int64_t done = 0;
  if (l.outlier_k == 16) done = FullBlocks<Type, 16>(l, values, positions, blocks, a, sums);
  if (l.outlier_k == 8) done = FullBlocks<Type, 8>(l, values, positions, blocks, a, sums);
  if (l.outlier_k == 4) done = FullBlocks<Type, 4>(l, values, positions, blocks, a, sums);
  float sum = done > 0 ? Sum(_mm256_add_ps(sums[0], sums[1])) : 0.0f;
  for (int64_t i = done * l.outlier_k; i < count; i += l.outlier_k, ++done) {
    sum += AnyBlock<Type>(values + i * Type::kBytes, positions + i, Min(l.outlier_k, count - i),
                          a + done * l.outlier_block);
  }
  return sum;
}

template <class Type, int vectors>
void RunOfLanes(const Layout& l, const uint8_t* values, const uint8_t* positions, int64_t count, const float* a,
                float* sums) {
  __m256 even[vectors], odd[vectors];  // two chains, for each product waits for the sum before it
  for (int v = 0; v < vectors; ++v) {
    even[v] = _mm256_load_ps(sums + 8 * v);
    odd[v] = _mm256_setzero_ps();
  }
  const auto add = [&](float value, int64_t column, __m256(&to)[vectors]) __attribute__((always_inline)) {
    const float* lanes = a + column * 8 * vectors;
    for (int v = 0; v < vectors; ++v) {
      to[v] = _mm256_fmadd_ps(_mm256_set1_ps(value), _mm256_loadu_ps(lanes + 8 * v), to[v]);
    }
  };
  for (; count > 0; a += l.outlier_block * 8 * vectors) {
    const int64_t in_block = Min(l.outlier_k, count);
    count -= in_block;
    int64_t i = 0;
    for (; i + 8 <= in_block; i += 8, values += 8 * Type::kBytes, positions += 8) {
      alignas(32) float eight[8];
      _mm256_store_ps(eight, Type::Load8(values));
      for (int j = 0; j < 8; j += 2) {
        add(eight[j], positions[j], even);
        add(eight[j + 1], positions[j + 1], odd);
      }
    }
    for (; i < in_block; ++i, values += Type::kBytes, ++positions) add(Load1(Type(), values), *positions, even);
  }
  for (int v = 0; v < vectors; ++v) _mm256_store_ps(sums + 8 * v, _mm256_add_ps(even[v], odd[v]));
}

// Output rows first … last-1, at most kMostOutlierOutputs of them, times one group of activation rows.
template <class Type>
void AddOutlierGroup(const Layout& l, int64_t lanes, int64_t rows, const float* a, int64_t first, int64_t last,
                     float* y, int64_t y_stride) {
  alignas(32) float sums[kMostOutlierOutputs * kMostOutlierLanes];
  memset(sums, 0, static_cast<size_t>((last - first) * lanes) * sizeof(float));
  const int64_t block_bytes = lanes * 4 * l.outlier_block;
  const int64_t blocks = block_bytes < kOutlierRun ? kOutlierRun / block_bytes : 1;
  for (int64_t run = 0; run < l.row_outliers; run += blocks * l.outlier_k, a += blocks * l.outlier_block * lanes) {
    const int64_t count = Min(blocks * l.outlier_k, l.row_outliers - run);
    for (int64_t output = first; output < last; ++output) {
      const uint8_t* values = l.outlier_values + output * l.outlier_bytes + run * Type::kBytes;
      const uint8_t* positions = l.outlier_positions + output * l.row_outliers + run;
      float* to = sums + (output - first) * lanes;
      if (lanes == 1) *to += RunOfOneRow<Type>(l, values, positions, count, a);
      if (lanes == 8) RunOfLanes<Type, 1>(l, values, positions, count, a, to);
      if (lanes == 16) RunOfLanes<Type, 2>(l, values, positions, count, a, to);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < last - first; ++i) y[row * y_stride + i] += sums[i * lanes + row];
  }
}

// Adds the outliers of output rows first … last-1, at most kMostOutlierOutputs of them, times all activation rows.
inline void AddOutliers(const Layout& l, int64_t rows, const float* a, int64_t first, int64_t last, float* y,
                        int64_t y_stride) {
  const int64_t lanes = OutlierLanes(rows);
  const auto add = l.outlier_dtype == NM_FLOAT16 ? AddOutlierGroup<Float16> : AddOutlierGroup<Float32>;
  for (int64_t row = 0; row < rows; row += lanes, a += lanes * OutlierColumns(l), y += lanes * y_stride) {
    add(l, lanes, Min(lanes, rows - row), a, first, last, y, y_stride);
  }
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_OUTLIERS_H_
