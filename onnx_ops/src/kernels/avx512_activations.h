// Activations as the AVX-512 kernels take them: all rows of a kind together, each padded with zeros to whole steps.
#ifndef NM_KERNELS_AVX512_ACTIVATIONS_H_
#define NM_KERNELS_AVX512_ACTIVATIONS_H_

#include "avx512_common.h"
#include "row_turns.h"

namespace nm {
namespace {

constexpr int64_t kHalfStep = kStep / 2;

inline int64_t BlockColumns(const Layout& l) {  // columns of one int8 activation scale, and of one integer accumulator
  if (l.scale_columns >= l.in_features) return 128;
  int64_t columns = 256;
  while (columns > kHalfStep && l.scale_columns % columns != 0) columns /= 2;
  return columns;
}

// Half steps make up whole ones: behind the last column there may be a block of zeros.
inline int64_t BlockCount(const Layout& l) {
  const int64_t block = BlockColumns(l);
  return block < kStep ? Steps(l) * (kStep / block) : (l.in_features + block - 1) / block;
}

// Lanes that the columns of a block take, four each; a block of more than a step takes them again.
inline int64_t StartLanes(const Layout& l) { return Min(BlockColumns(l) / 4, 16); }

// Activations of a part of the columns stay in the first-level cache while kTogether outputs are multiplied by them,
// one after the other: a row of 14336 float32 does not, and would be read from the second level for every output, whose
// weights then wait for their cache lines behind it.
constexpr int64_t kTogether = 16;
constexpr int64_t kPartBytes = 36 << 10;

// Of a row of some units (columns, outliers) with bytes of activations each: units of a part, all parts nearly equal.
inline int64_t PartUnits(int64_t units, int64_t unit_bytes, int64_t multiple) {
  const int64_t parts = (units * unit_bytes + kPartBytes - 1) / kPartBytes;
  return RoundUp((units + parts - 1) / parts, multiple);
}

struct PackedRows {
  int64_t columns;  // padded
  int64_t blocks;
  int64_t row_starts;
  int64_t natural_columns;  // padded so that any position byte stays inside
  int64_t ordered_columns;
  int64_t outlier_part;  // outliers of a part, for one activation row …
  int64_t quad_part;     // … and for four side by side
  size_t natural;        // float32 in order, for the outliers and for float32 and float16 weights
  size_t ordered;        // float32 in the order of the weight vectors
  size_t bytes;          // int8
  size_t starts;         // int32 a lane, of each block or of two half steps: −offset times the sum of its four bytes
  size_t scales;         // float32 a block
  size_t bases;          // int32 an outlier: first column of its block
  size_t quads;          // `natural` of each four rows, side by side: [row / 4][column][4]
  size_t total;
};

int Interleave(const Layout& l) { return IsInteger(l.dtype) ? 4 : l.dtype == NM_BFLOAT16 ? 2 : 1; }

inline PackedRows PlanRows(const Layout& l, int64_t rows, bool int8_activations) {
  PackedRows p = {};
  p.columns = RoundUp(l.in_features, kStep);
  p.blocks = BlockCount(l);
  p.row_starts = p.blocks * StartLanes(l);
  p.natural_columns = p.columns + kLargestOutlierBlock;
  if (l.row_outliers > 0) {
    p.outlier_part = PartUnits(l.row_outliers, 4 * l.outlier_block / l.outlier_k, 16);
    p.quad_part = PartUnits(l.row_outliers, 16 * l.outlier_block / l.outlier_k, l.outlier_k);
  }
  Parts parts;
  const bool needs_natural = l.row_outliers > 0 || (!int8_activations && Interleave(l) == 1);
  p.natural = parts.Take(needs_natural ? rows * p.natural_columns * 4 : 0);
  p.ordered_columns = Interleave(l) == 1 ? p.natural_columns : p.columns;
  p.ordered = Interleave(l) == 1 ? p.natural : parts.Take(int8_activations ? 0 : rows * p.columns * 4);
  p.bytes = parts.Take(int8_activations ? rows * p.columns : 0);
  p.starts = parts.Take(int8_activations ? rows * p.row_starts * 4 : 0);
  p.scales = parts.Take(int8_activations ? rows * RoundUp(p.blocks, 16) * 4 : 0);
  p.bases = parts.Take(RoundUp(l.row_outliers, 16) * 4);
  p.quads = parts.Take(l.row_outliers > 0 ? rows / 4 * 4 * p.natural_columns * 4 : 0);
  p.total = parts.total();
  return p;
}

inline void PackNatural(const Layout& l, const PackedRows& p, const float* a, float* row) {
  memcpy(row, a, static_cast<size_t>(l.in_features) * sizeof(float));
  memset(row + l.in_features, 0, static_cast<size_t>(p.natural_columns - l.in_features) * sizeof(float));
}

// Of rows first … first+count-1 in `natural`, whole fours.
inline void PackQuads(const PackedRows& p, int64_t first, int64_t count, uint8_t* packed) {
  const float* natural = reinterpret_cast<const float*>(packed + p.natural);
  float* quads = reinterpret_cast<float*>(packed + p.quads);
  for (int64_t row = first; row + 4 <= first + count; row += 4) {
    for (int64_t column = 0; column < p.natural_columns; column += 16) {
      __m512 v[4], t[4];
      for (int64_t r = 0; r < 4; ++r) {
        v[r] = _mm512_load_ps(natural + (row + r) * p.natural_columns + column);
      }
      for (int i = 0; i < 4; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
      }
      for (int i = 0; i < 2; ++i) {  // quarter q of v[j]: column 4·q + j
        v[2 * i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        v[2 * i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      }
      for (int i = 0; i < 2; ++i) {
        t[2 * i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88);
        t[2 * i + 1] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd);
      }
      float* to = quads + row * p.natural_columns + 4 * column;
      _mm512_store_ps(to, _mm512_shuffle_f32x4(t[0], t[2], 0x88));
      _mm512_store_ps(to + 16, _mm512_shuffle_f32x4(t[1], t[3], 0x88));
      _mm512_store_ps(to + 32, _mm512_shuffle_f32x4(t[0], t[2], 0xdd));
      _mm512_store_ps(to + 48, _mm512_shuffle_f32x4(t[1], t[3], 0xdd));
    }
  }
}

// Within each step: all columns 0 mod k, then all 1 mod k, … in the groups of 16 that shifted weight lanes meet.
inline void PackInterleaved(const Layout& l, const PackedRows& p, const float* a, int k, float* row) {
  for (int64_t column = 0; column < p.columns; column += 16 * k) {
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(k));
    for (int j = 0; j < k; ++j) {
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(column + j)));
      const __mmask16 inside = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(static_cast<int>(l.in_features)));
      const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, a, 4);
      _mm512_store_ps(row + column + 16 * j, values);
    }
  }
}

// Rounds one block to int8 with its own scale; zeros follow up to `columns`, half a step or whole ones. starts: int32 a
// lane. Activations that are not finite make the scale NaN, and so the outputs.
inline float PackInt8Block(const float* a, int64_t count, int64_t columns, int offset, uint8_t* bytes,
                           int32_t* starts) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(LowMask(count - i)), a + i);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
  const bool finite = bits < 0x7f800000u;
  const __m512 inverse = _mm512_set1_ps(finite && most > 0x1p-120f ? 127.0f / most : 0.0f);
  __m512i sums = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < columns; i += 16) {
    const __m512 values = _mm512_maskz_loadu_ps(static_cast<__mmask16>(LowMask(count > i ? count - i : 0)), a + i);
    const __m512i rounded = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse)) : _mm512_setzero_si512();
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtsepi32_epi8(rounded));
  }
  for (int64_t i = 0; i < columns; i += kStep) {
    sums = _mm512_dpbusd_epi32(sums, ones, _mm512_maskz_loadu_epi8(LowMask(columns - i), bytes + i));
  }
  const __mmask16 lanes = static_cast<__mmask16>(LowMask(columns / 4));
  _mm512_mask_storeu_epi32(starts, lanes, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-offset)));
  if (!finite) return __builtin_nanf("");
  return most > 0x1p-120f ? most / 127.0f : 0.0f;
}

inline void PackInt8Row(const Layout& l, const PackedRows& p, const float* a, int64_t row, uint8_t* packed) {
  const int64_t block = BlockColumns(l);
  const int64_t lanes = StartLanes(l);
  const int offset = l.dtype == NM_INT8 ? 128 : 8;
  uint8_t* bytes = packed + p.bytes + row * p.columns;
  int32_t* starts = reinterpret_cast<int32_t*>(packed + p.starts) + row * p.row_starts;
  float* scales = reinterpret_cast<float*>(packed + p.scales) + row * RoundUp(p.blocks, 16);
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t first = b * block;
    const int64_t count = Max(0, Min(block, l.in_features - first));
    scales[b] =
        PackInt8Block(a + first, count, Min(block, p.columns - first), offset, bytes + first, starts + b * lanes);
  }
}

inline void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed,
                     bool int8_activations) {
  const PackedRows p = PlanRows(l, rows, int8_activations);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int k = Interleave(l);
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    if (l.row_outliers > 0 || (!int8_activations && k == 1)) {
      PackNatural(l, p, a, reinterpret_cast<float*>(base + p.natural) + row * p.natural_columns);
    }
    if (int8_activations) {
      PackInt8Row(l, p, a, row, base);
    } else if (k > 1) {
      PackInterleaved(l, p, a, k, reinterpret_cast<float*>(base + p.ordered) + row * p.columns);
    }
  }
  if (l.row_outliers > 0) PackQuads(p, first, count, base);
  if (first == 0) {
    int32_t* bases = reinterpret_cast<int32_t*>(base + p.bases);
    for (int64_t i = 0; i < l.row_outliers; ++i) bases[i] = static_cast<int32_t>(i / l.outlier_k * l.outlier_block);
  }
}

inline void PackFloats(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  PackRows(l, a, first, count, rows, packed, false);
}
inline void PackBytes(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  PackRows(l, a, first, count, rows, packed, true);
}
inline size_t FloatRowsBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows, false).total; }
inline size_t Int8RowsBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows, true).total; }

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_ACTIVATIONS_H_
