// Output rows unpacked to one number a column, for patterns that the AVX2 kernels do not read in place and for many
// activation rows. Buffers are padded with zeros to whole pairs of steps.
#ifndef NM_KERNELS_AVX2_EXPAND_H_
#define NM_KERNELS_AVX2_EXPAND_H_

#include "avx2_common.h"

namespace nm {
namespace {

constexpr int64_t kPair = 2 * kStep;    // columns of one turn of the loops
constexpr int64_t kMaskRun = 64;        // blocks of 16 columns whose masks are read at once
constexpr int64_t kValuesPadding = 32;  // bytes after the values of a row, so that any column can load 16 of them

inline int64_t PaddedColumns(const Layout& l) { return RoundUp(l.in_features, kPair); }
inline int64_t SignedValuesBytes(const Layout& l) { return RoundUp(l.row_values, kPair) + kValuesPadding; }

inline __m256i SignedOfInt8(__m256i stored) { return _mm256_xor_si256(stored, _mm256_set1_epi8(-128)); }

// A chunk of int4 values, at most as many as there are; `half` bytes of it.
inline void UnpackInt4Chunk(const uint8_t* chunk, int64_t half, uint8_t* values) {
  int64_t i = 0;
  for (; half >= 16 && i < half; i += 16) {
    i = Min(i, half - 16);  // the last sixteen bytes, some of them again
    const __m128i packed = Load128(chunk + i), low_bits = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i low = _mm_and_si128(packed, low_bits), high = _mm_and_si128(_mm_srli_epi16(packed, 4), low_bits);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), _mm_sub_epi8(low, eight));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + half + i), _mm_sub_epi8(high, eight));
  }
  for (; i < half; ++i) {
    values[i] = static_cast<uint8_t>((chunk[i] & 15) - 8);
    values[i + half] = static_cast<uint8_t>((chunk[i] >> 4) - 8);
  }
}

// Values first … last-1 of an output row, of a type of integers, as signed bytes; first is a multiple of int4_chunk.
// Writes up to one byte past the last.
inline void UnpackSigned(const Layout& l, const uint8_t* row, int64_t first, int64_t last, uint8_t* values) {
  int64_t i = first;
  if (l.dtype == NM_INT8) {
    for (; i + 32 <= last; i += 32, values += 32) Store256(values, SignedOfInt8(Load256(row + i)));
    for (; i < last; ++i) *values++ = row[i] ^ 0x80;
    return;
  }
  for (; i < last; i += l.int4_chunk, values += l.int4_chunk) {
    UnpackInt4Chunk(row + i / 2, (Min(l.int4_chunk, last - i) + 1) / 2, values);
  }
}

// An output row of integers as signed bytes, pruned columns zero. values is scratch of SignedValuesBytes.
inline void ExpandSigned(const Layout& l, const PositionReader& reader, int64_t output, uint8_t* values,
                         uint8_t* bytes) {
  const uint8_t* row = l.values + output * l.value_bytes;
  if (l.dense) {
    UnpackSigned(l, row, 0, l.row_values, bytes);
    memset(bytes + l.row_values, 0, static_cast<size_t>(PaddedColumns(l) - l.row_values));
    return;
  }
  UnpackSigned(l, row, 0, l.row_values, values);
  memset(values + l.row_values, 0, kValuesPadding);
  const uint8_t* next = values;
  const uint8_t* const end = values + l.row_values;
  for (int64_t first = 0; first < Blocks(l); first += kMaskRun) {
    uint16_t masks[kMaskRun];
    const int64_t count = Min(kMaskRun, Blocks(l) - first);
    reader.Masks(output, first, count, masks);
    for (int64_t i = 0; i < count; ++i) {
      const __m128i block = _mm_shuffle_epi8(Load128(next), RanksOfMask(masks[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + (first + i) * kBlock), block);
      next += _mm_popcnt_u32(masks[i]);
      if (next > end) next = end;  // hostile masks
    }
  }
  memset(bytes + Blocks(l) * kBlock, 0, static_cast<size_t>(PaddedColumns(l) - Blocks(l) * kBlock));
}

// Columns of one scale of int8 activations, and of one integer sum: a divisor of a pair, and of what a scale of the
// weights covers.
inline int64_t UnitColumns(const Layout& l) {
  if (l.row_scales == 1 || l.scale_columns % 128 == 0) return 128;
  return l.scale_columns % 64 == 0 ? 64 : 32;
}

inline float ScaleOf(const Layout& l, int64_t output, int64_t index) {
  uint16_t half;
  memcpy(&half, l.scales + 2 * (output * l.row_scales + index), sizeof(half));
  return _cvtsh_ss(half);
}

// Signed bytes times the scales of their columns; scales begin at multiples of 8 columns.
inline void ScaleSigned(const Layout& l, int64_t output, const uint8_t* bytes, float* floats) {
  for (int64_t group = 0, column = 0; group < l.row_scales; ++group) {
    const __m256 scale = _mm256_set1_ps(ScaleOf(l, output, group));
    const int64_t last = group + 1 < l.row_scales ? column + l.scale_columns : PaddedColumns(l);
    for (; column < last; column += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + column));
      const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
      _mm256_storeu_ps(floats + column, _mm256_mul_ps(values, scale));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Floating-point types: eight values as float32.

struct Float32 {
  static constexpr int kBytes = 4;
  static __m256 Load8(const uint8_t* v) { return _mm256_loadu_ps(reinterpret_cast<const float*>(v)); }
};

struct Float16 {
  static constexpr int kBytes = 2;
  static __m256 Load8(const uint8_t* v) { return _mm256_cvtph_ps(Load128(v)); }
};

struct Bfloat16 {
  static constexpr int kBytes = 2;
  static __m256 Load8(const uint8_t* v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(Load128(v)), 16));
  }
};

// Eight values of which only `bytes` are there.
template <class Type>
__m256 LoadPartial8(const uint8_t* v, int64_t bytes) {
  uint8_t padded[8 * Type::kBytes] = {};
  memcpy(padded, v, static_cast<size_t>(Min(bytes, sizeof(padded))));
  return Type::Load8(padded);
}

// An output row of floats as float32, pruned columns zero: eight columns at a time.
template <class Type>
void ExpandFloats(const Layout& l, const PositionReader& reader, int64_t output, float* floats) {
  const uint8_t* v = l.values + output * l.value_bytes;
  const uint8_t* const end = v + l.value_bytes;
  for (int64_t first = 0; first < Blocks(l); first += kMaskRun) {
    uint16_t masks[kMaskRun];
    const int64_t count = Min(kMaskRun, Blocks(l) - first);
    reader.Masks(output, first, count, masks);
    for (int64_t i = 0; i < 2 * count; ++i) {
      const uint32_t mask = masks[i / 2] >> (8 * (i % 2)) & 255;
      const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteTables.ranks + mask));
      const __m256i index = _mm256_cvtepi8_epi32(ranks);  // negative where there is no value
      const __m256 values = end - v >= 8 * Type::kBytes ? Type::Load8(v) : LoadPartial8<Type>(v, end - v);
      const __m256 spread = _mm256_permutevar8x32_ps(values, index);
      const __m256 kept = _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(index));
      _mm256_storeu_ps(floats + first * kBlock + 8 * i, kept);
      v += _mm_popcnt_u32(mask) * Type::kBytes;
      if (v > end) v = end;  // hostile masks
    }
  }
  const int64_t written = Blocks(l) * kBlock;
  memset(floats + written, 0, static_cast<size_t>(PaddedColumns(l) - written) * sizeof(float));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_EXPAND_H_
