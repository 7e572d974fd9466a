// Activation rows in the lanes of a vector, sixteen of them, for the kernels of many rows: what they share of packing,
// outliers and storing.
#ifndef NM_KERNELS_AVX512_LANES_H_
#define NM_KERNELS_AVX512_LANES_H_

#include "avx512_common.h"
#include "kernels.h"
#include "row_turns.h"

namespace nm {
namespace {

constexpr int64_t kLanes = 16;
static_assert(kLanes == kRowBlock, "a call of Kernel::pack fills the lanes");
constexpr int64_t kTileOutputs = 32;  // output rows whose sums are kept at a time
static_assert(kTileOutputs == kOutputTile, "Kernel::run starts at a whole tile");

inline int64_t LaneGroups(int64_t rows) { return (rows + kLanes - 1) / kLanes; }
inline __mmask16 FirstLanes(int64_t count) { return static_cast<__mmask16>(LowMask(count)); }

// 16×16 floats.
inline void Transpose(__m512 (&v)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // v[i + j]: column j of each quarter of rows i … i+3
    v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// to[i][lane] from the first `count` 32-bit parts of a row.
inline void StoreToLane(__m512i parts, int64_t lane, uint8_t* to, int64_t count = kLanes) {
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(static_cast<int>(kLanes)));
  _mm512_mask_i32scatter_epi32(to + 4 * lane, FirstLanes(count), places, parts, 4);
}

// lanes[column][row], with `stride` floats from column to column, of a[count, in_features]; zeros in the rows and
// columns behind them. columns is a multiple of 16.
inline void PackLanes(const Layout& l, const float* a, int64_t count, int64_t columns, float* lanes,
                      int64_t stride = kLanes) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const __mmask16 inside = FirstLanes(l.in_features > column ? l.in_features - column : 0);
    __m512 block[16];
    for (int64_t i = 0; i < kLanes; ++i) {
      block[i] = i < count ? _mm512_maskz_loadu_ps(inside, a + i * l.in_features + column) : _mm512_setzero_ps();
    }
    Transpose(block);
    for (int64_t i = 0; i < kLanes; ++i) _mm512_store_ps(lanes + (column + i) * stride, block[i]);
  }
}

// y[r · y_stride + o] from sums[o][r], for `rows` rows and `outputs` outputs of one group and tile.
inline void StoreLanes(const float* sums, int64_t rows, int64_t outputs, float* y, int64_t y_stride) {
  for (int64_t first = 0; first < outputs; first += kLanes) {
    __m512 block[16];
    for (int64_t i = 0; i < kLanes; ++i) block[i] = _mm512_load_ps(sums + (first + i) * kLanes);
    Transpose(block);
    const __mmask16 inside = FirstLanes(outputs - first);
    for (int64_t r = 0; r < Min(rows, kLanes); ++r) _mm512_mask_storeu_ps(y + r * y_stride + first, inside, block[r]);
  }
}

// Outliers. Float32 activations of a group, column after column; zeros follow the last column, for positions of the
// last block may say anything.
inline int64_t OutlierColumns(const Layout& l) { return RoundUp(l.in_features + kLargestOutlierBlock, kLanes); }
inline int64_t OutlierGroupFloats(const Layout& l) { return l.row_outliers > 0 ? OutlierColumns(l) * kLanes : 0; }

// A block of outliers of one output times some groups of rows.
template <int groups, bool half>
inline void AddOutlierBlock(const uint8_t* values, const uint8_t* positions, int64_t count, const float* a,
                            int64_t a_stride, float* sums, int64_t sums_stride) {
  __m512 even[groups], odd[groups];  // two chains, for each product waits for the sum before it
#pragma GCC unroll 2
  for (int g = 0; g < groups; ++g) {
    even[g] = _mm512_load_ps(sums + g * sums_stride);
    odd[g] = _mm512_setzero_ps();
  }
  alignas(64) float weights[kLanes];
  const auto add = [&](int64_t i, const uint8_t* position, __m512(&to)[groups]) __attribute__((always_inline)) {
    const __m512 weight = _mm512_set1_ps(weights[i]);
    const float* lanes = a + *position * kLanes;
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) to[g] = _mm512_fmadd_ps(weight, _mm512_load_ps(lanes + g * a_stride), to[g]);
  };
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = Min(count - i, kLanes);
    _mm512_store_ps(
        weights, half ? HalvesToFloats(values + 2 * i, left) : _mm512_maskz_loadu_ps(FirstLanes(left), values + 4 * i));
    // A broadcast from memory takes no shuffle, which the compiler would use if it remembered the vector.
    asm volatile("" ::"r"(weights) : "memory");
    int64_t j = 0;
    for (; j + 2 <= left; j += 2) {
      add(j, positions + i + j, even);
      add(j + 1, positions + i + j + 1, odd);
    }
    if (j < left) add(j, positions + i + j, even);
  }
#pragma GCC unroll 2
  for (int g = 0; g < groups; ++g) _mm512_store_ps(sums + g * sums_stride, _mm512_add_ps(even[g], odd[g]));
}

template <int groups, bool half>
void AddOutlierGroups(const Layout& l, int64_t all_groups, const float* a, int64_t first, int64_t outputs,
                      float* sums) {
  const int64_t sums_stride = kTileOutputs * kLanes;
  const int64_t value_bytes = half ? 2 : 4;
  const int64_t lines = (l.outlier_block + outputs - 1) / outputs;  // of the next block's activations
  for (int64_t i = 0; i < l.row_outliers; i += l.outlier_k, a += l.outlier_block * kLanes) {
    const int64_t count = Min(l.outlier_k, l.row_outliers - i);
    const uint8_t* positions = l.outlier_positions + first * l.row_outliers + i;
    const uint8_t* values = l.outlier_values + first * l.outlier_bytes + i * value_bytes;
    const float* next = a + l.outlier_block * kLanes;
    for (int64_t o = 0; o < outputs; ++o, positions += l.row_outliers, values += l.outlier_bytes) {
      for (int64_t column = 0; column < lines; ++column, next += kLanes) {
        for (int g = 0; g < groups; ++g) {
          _mm_prefetch(reinterpret_cast<const char*>(next + g * OutlierGroupFloats(l)), _MM_HINT_T1);
        }
      }
      float* to = sums + o / kTileOutputs * all_groups * sums_stride + o % kTileOutputs * kLanes;
      AddOutlierBlock<groups, half>(values, positions, count, a, OutlierGroupFloats(l), to, sums_stride);
    }
  }
}

// Adds the outliers of output rows first … first+outputs-1 to sums[output / kTileOutputs][group][kTileOutputs][16]. The
// activations of a block and of two groups stay in the first-level cache while all outputs use them, and those of the
// next block, which would come from the third-level cache, are fetched meanwhile.
inline void AddOutlierLanes(const Layout& l, int64_t groups, const float* a, int64_t first, int64_t outputs,
                            float* sums) {
  const bool half = l.outlier_dtype == NM_FLOAT16;
  const auto one = half ? AddOutlierGroups<1, true> : AddOutlierGroups<1, false>;
  const auto two = half ? AddOutlierGroups<2, true> : AddOutlierGroups<2, false>;
  for (int64_t group = 0; group < groups; group += 2) {
    const auto add = group + 1 < groups ? two : one;
    add(l, groups, a + group * OutlierGroupFloats(l), first, outputs, sums + group * kTileOutputs * kLanes);
  }
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_LANES_H_
