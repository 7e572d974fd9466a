// The innermost loops of the AVX2 kernels for few activation rows in float32.
#ifndef NM_KERNELS_AVX2_FLOAT_LOOPS_H_
#define NM_KERNELS_AVX2_FLOAT_LOOPS_H_

#include "avx2_rows.h"

namespace nm {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Half of the columns are kept, float32. Indices in the order of lanes: a vector of eight activations has four of block
// 0 and four of block 1, then the next four of both, then blocks 2 and 3. The values are loaded to match.

// The 32 values of a step.
NM_PIECE void LaneValues(const uint8_t* v, __m256 (&values)[4]) {
  const float* f = reinterpret_cast<const float*>(v);
  for (int i = 0; i < 4; ++i) {
    const float* low = f + 16 * (i / 2) + 4 * (i % 2);
    values[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(low + 8), 1);
  }
}

// The 32 kept activations of a step from its planes.
NM_PIECE void LaneActivations(const uint8_t* planes, __m256i index, __m256 (&kept)[4]) {
  __m256i bytes[4];
  for (int i = 0; i < 4; ++i) {
    bytes[i] = _mm256_blend_epi32(_mm256_shuffle_epi8(Load256(planes + i * kStep), index),
                                  _mm256_shuffle_epi8(Load256(planes + i * kStep + 32), index), 0xcc);
  }
  const __m256i low[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
  const __m256i high[2] = {_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3])};
  for (int i = 0; i < 2; ++i) {
    kept[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
    kept[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
  }
}

template <class Pairs, int R>
NM_LOOP void HalfPairs(const uint8_t* positions, const uint32_t* table, const uint8_t* values, int64_t pairs,
                       const uint8_t* planes, int64_t planes_stride, __m256 (&totals)[R][4]) {
  constexpr int64_t kStepBytes = kStep / 2 * Float32::kBytes;
  __m256 sums[R][4];
  memcpy(sums, totals, sizeof(sums));
  Indices next = Pairs::Load(positions, table);
  for (int64_t left = pairs; left > 0; --left) {
    Indices now = next;
    positions += left > 1 ? Pairs::kBytes : 0;
    next = Pairs::Load(positions, table);
    Separate(next, now);
    if (left % 4 == 0) Prefetch(positions);
    for (int step = 0; step < 2; ++step, values += kStepBytes, planes += 4 * kStep) {
      for (int64_t i = 0; i < kStepBytes; i += 64) Prefetch(values + i);
      __m256 w[4], a[4];
      LaneValues(values, w);
      for (int r = 0; r < R; ++r) {
        LaneActivations(planes + r * planes_stride, step == 0 ? now.first : now.second, a);
        for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_fmadd_ps(w[i], a[i], sums[r][i]);
      }
    }
  }
  memcpy(totals, sums, sizeof(sums));
}

// The step that ends a row. In one function with the pairs, the compiler would spill more in their loop.
template <class Pairs, int R>
NM_LOOP void LastHalfStep(const uint8_t* positions, const uint32_t* table, const uint8_t* values, const uint8_t* planes,
                          int64_t planes_stride, __m256 (&totals)[R][4]) {
  const __m256i index = Pairs::LoadStep(positions, table);
  for (int64_t i = 0; i < kStep / 2 * Float32::kBytes; i += 64) Prefetch(values + i);
  __m256 w[4], a[4];
  LaneValues(values, w);
  for (int r = 0; r < R; ++r) {
    LaneActivations(planes + r * planes_stride, index, a);
    for (int i = 0; i < 4; ++i) totals[r][i] = _mm256_fmadd_ps(w[i], a[i], totals[r][i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Half of the columns are kept, 16-bit values: expanded block by block.

// For every mask of 8 columns, the indices of vpshufb that bring its words to their columns, zero to the others: `low`
// for values from the first on, `high` for the last of eight.
struct WordTables {
  uint8_t low[256][16];
  uint8_t high[256][16];
  constexpr WordTables() : low(), high() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int column = 0; column < 8; ++column) kept += mask >> column & 1;
      for (int column = 0, rank = 0; column < 8; ++column) {
        const bool here = mask >> column & 1;
        for (int byte = 0; byte < 2; ++byte) {
          low[mask][2 * column + byte] = static_cast<uint8_t>(here ? 2 * rank + byte : 0x80);
          high[mask][2 * column + byte] = static_cast<uint8_t>(here ? 2 * (8 - kept + rank) + byte : 0x80);
        }
        rank += here;
      }
    }
  }
};
alignas(64) constexpr WordTables kWordTables;

// The masks of a pair of steps: from two loads, each with the fields of four blocks from its lowest bit on. Or of the
// step that ends a row, after others.
template <int kBits>
struct CodeMasks {
  static constexpr int kBytes = kBits;  // of eight fields
  static NM_PIECE uint64_t First(const uint8_t* p) { return Load64(p); }
  static NM_PIECE uint64_t Second(const uint8_t* p) { return Load64(p + kBytes - 8) >> (64 - 4 * kBits); }
  static NM_PIECE uint64_t Last(const uint8_t* p) { return Load64(p + kBytes / 2 - 8) >> (64 - 4 * kBits); }
  template <int i>
  static NM_PIECE uint32_t Mask(uint64_t fields, const uint16_t* table) {
    return table[__bextr_u64(fields, kBits << 8 | i * kBits)];
  }
};
struct StoredMasks {
  static constexpr int kBytes = 16;
  static NM_PIECE uint64_t First(const uint8_t* p) { return Load64(p); }
  static NM_PIECE uint64_t Second(const uint8_t* p) { return Load64(p + 8); }
  static NM_PIECE uint64_t Last(const uint8_t* p) { return Load64(p); }
  template <int i>
  static NM_PIECE uint32_t Mask(uint64_t fields, const uint16_t*) {
    return static_cast<uint32_t>(fields >> (16 * i) & 0xffff);
  }
};

// 16 columns of words as float32.
NM_PIECE void Widen(Float16, __m256i words, __m256 (&floats)[2]) {
  floats[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
  floats[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
}
NM_PIECE void Widen(Bfloat16, __m256i words, __m256 (&floats)[2]) {
  floats[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), words));
  floats[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), words));
}

template <class Type, int R>
NM_PIECE void WordBlock(uint32_t mask, const uint8_t* values, const float* a, int64_t a_stride, __m256 (&sums)[R][4],
                        int sum) {
  const __m256i index = Lanes(Load128(kWordTables.low[mask & 255]), Load128(kWordTables.high[mask >> 8]));
  __m256 w[2];
  Widen(Type(), _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(Load128(values)), index), w);
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 2; ++i) {
      sums[r][sum + i] = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(a + r * a_stride + 8 * i), sums[r][sum + i]);
    }
  }
}

template <class Type, class Masks, int R>
NM_PIECE void WordStep(uint64_t fields, const uint16_t* table, const uint8_t* values, const float* a, int64_t a_stride,
                       __m256 (&sums)[R][4]) {
  fields = InRegister(fields);
  WordBlock<Type>(Masks::template Mask<0>(fields, table), values, a, a_stride, sums, 0);
  WordBlock<Type>(Masks::template Mask<1>(fields, table), values + 16, a + 16, a_stride, sums, 2);
  WordBlock<Type>(Masks::template Mask<2>(fields, table), values + 32, a + 32, a_stride, sums, 0);
  WordBlock<Type>(Masks::template Mask<3>(fields, table), values + 48, a + 48, a_stride, sums, 2);
}

template <class Type, class Masks, int R>
NM_LOOP void WordPairs(const uint8_t* positions, const uint16_t* table, const uint8_t* values, int64_t pairs,
                       bool odd_step, const float* a, int64_t a_stride, __m256 (&totals)[R][4]) {
  __m256 sums[R][4];
  memcpy(sums, totals, sizeof(sums));
  for (; pairs > 0; --pairs, positions += Masks::kBytes, values += kPair, a += kPair) {
    Prefetch(values);
    Prefetch(values + 64);
    if (pairs % 4 == 0) Prefetch(positions);
    WordStep<Type, Masks>(Masks::First(positions), table, values, a, a_stride, sums);
    WordStep<Type, Masks>(Masks::Second(positions), table, values + kStep, a + kStep, a_stride, sums);
  }
  if (odd_step) {
    Prefetch(values);
    WordStep<Type, Masks>(Masks::Last(positions), table, values, a, a_stride, sums);
  }
  memcpy(totals, sums, sizeof(sums));
}

// ---------------------------------------------------------------------------------------------------------------------
// Values of every column times R activation rows in order. Up to padded_columns are multiplied: the rest of values is
// read as zeros.

constexpr int64_t kTurn = 32;  // columns

template <class Type, int R>
NM_PIECE void DenseTurn(const uint8_t* values, const float* a, int64_t a_stride, __m256 (&sums)[R][4]) {
  for (int i = 0; i < 4; ++i) {
    const __m256 w = Type::Load8(values + 8 * i * Type::kBytes);
    for (int r = 0; r < R; ++r) {
      sums[r][i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(a + r * a_stride + 8 * i), sums[r][i]);
    }
  }
}

template <class Type, int R>
NM_LOOP void DenseColumns(const uint8_t* values, int64_t columns, const float* a, int64_t a_stride,
                          __m256 (&totals)[R][4]) {
  constexpr int64_t kBytes = kTurn * Type::kBytes;
  __m256 sums[R][4];
  memcpy(sums, totals, sizeof(sums));
  int64_t column = 0;
  for (; column + kTurn <= columns; column += kTurn, values += kBytes) {
    for (int64_t i = 0; i < kBytes; i += 64) Prefetch(values + i);
    DenseTurn<Type>(values, a + column, a_stride, sums);
  }
  if (column < columns) {
    uint8_t padded[kBytes] = {};
    memcpy(padded, values, static_cast<size_t>((columns - column) * Type::kBytes));
    DenseTurn<Type>(padded, a + column, a_stride, sums);
  }
  memcpy(totals, sums, sizeof(sums));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_FLOAT_LOOPS_H_
