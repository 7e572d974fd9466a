// Integer weights of bitmaps that keep half of the columns, expanded in registers: the columns are ranked by arithmetic
// instead of looked up.
#ifndef NM_KERNELS_AVX2_RANKS_H_
#define NM_KERNELS_AVX2_RANKS_H_

#include "avx2_integer_products.h"

namespace nm {
namespace {

// A pair of steps is eight blocks of 16 columns, each in four bytes of a vector: 0, 1, 4, 5 in its low lane, 2, 3, 6, 7
// in the high one, so that either lane finds the values of its first two blocks and those of its last in one lane of
// the stored ones. Vector i of four has columns i, 4 + i, 8 + i and 12 + i of every block. A lone step at the end of a
// row has its blocks in the low lane.
constexpr int kVectors = 4;

// The halves of the bytes of a bitmap, four to a block.
NM_PIECE __m256i LowHalves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
NM_PIECE __m256i Halves(__m128i bytes) {
  const __m256i words = _mm256_cvtepu8_epi16(bytes);
  return LowHalves(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)));
}
NM_PIECE __m256i PairHalves(const uint8_t* bitmap) { return Halves(_mm_shuffle_epi32(Load128(bitmap), 0xd8)); }
NM_PIECE __m256i LoneHalves(const uint8_t* bitmap) {
  return Halves(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bitmap)));
}
NM_PIECE void TwoPairHalves(const uint8_t* bitmap, __m256i (&halves)[2]) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(Load256(bitmap), order);
  const __m256i low = LowHalves(bytes), high = LowHalves(_mm256_srli_epi16(bytes, 4));
  halves[0] = _mm256_unpacklo_epi8(low, high);
  halves[1] = _mm256_unpackhi_epi8(low, high);
}

// For every four columns, by the half of a byte that says which are kept: how many; and for column i of the four how
// many before it, or 0x80, of which vpshufb makes zero, if it is pruned.
struct HalfTables {
  uint8_t counts[32];
  uint8_t ranks[kVectors][32];
  constexpr HalfTables() : counts(), ranks() {
    for (int half = 0; half < 32; ++half) {
      for (int i = 0; i < kVectors; ++i) {
        const bool kept = half >> i & 1;
        ranks[i][half] = kept ? counts[half] : 0x80;
        counts[half] = static_cast<uint8_t>(counts[half] + kept);
      }
    }
  }
};
alignas(32) constexpr HalfTables kHalfTables;

// Where the stored values have the one of every column: among the sixteen of two blocks.
NM_PIECE void RankColumns(__m256i halves, __m256i (&ranks)[kVectors]) {
  const __m256i counts = _mm256_shuffle_epi8(Load256(kHalfTables.counts), halves);
  const __m256i odd_blocks = _mm256_set1_epi64x(0x0808080800000000);
  // Kept columns of the block in lower halves: 0, c0, c0 + c1, c0 + c1 + c2. The compiler would make five shifts and
  // additions of the product.
  __m256i shifts = _mm256_set1_epi32(0x01010100);
  asm("" : "+x"(shifts));
  const __m256i before = _mm256_add_epi8(_mm256_mullo_epi32(counts, shifts), odd_blocks);
  for (int i = 0; i < kVectors; ++i) {
    ranks[i] = _mm256_add_epi8(_mm256_shuffle_epi8(Load256(kHalfTables.ranks[i]), halves), before);
  }
}

// The kinds of stored values: those of a pair or a lone step, expanded to all columns, and times activations, whose
// sums of each block are in a lane of 32 bits.
struct Int4 {
  static constexpr int kBytes = 32;        // of a pair
  static constexpr int64_t kMostRows = 8;  // from then on columns that are looked up once for all are faster
  using Stored = __m256i;
  static NM_PIECE Stored LoadPair(const uint8_t* v) { return Load256(v); }
  static NM_PIECE Stored LoadLone(const uint8_t* v) { return _mm256_zextsi128_si256(Load128(v)); }
  // Values plus 8, where pruned 8.
  static NM_PIECE void Expand(const Stored& stored, const __m256i (&ranks)[kVectors], __m256i (&weights)[kVectors]) {
    const __m256i signs = _mm256_xor_si256(stored, _mm256_set1_epi8(-120));
    const __m256i high_blocks = _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4);
    for (int i = 0; i < kVectors; ++i) {
      const __m256i values = _mm256_srlv_epi32(_mm256_shuffle_epi8(signs, ranks[i]), high_blocks);
      weights[i] = _mm256_xor_si256(LowHalves(values), _mm256_set1_epi8(8));
    }
  }
  // The start takes 8 · a off.
  static NM_PIECE __m256i Multiply(const __m256i (&weights)[kVectors], const uint8_t* a) {
    __m256i sums = Load256(a + 32 * kVectors);
    for (int i = 0; i < kVectors; ++i) {
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights[i], Load256(a + 32 * i)));
    }
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  }
};

struct Int8 {
  static constexpr int kBytes = 64;
  static constexpr int64_t kMostRows = 1;  // for each row takes the signs of all columns' weights, pruned ones too
  struct Stored {
    __m256i low_blocks;
    __m256i high_blocks;
  };
  static NM_PIECE Stored LoadPair(const uint8_t* v) { return {Load256(v), Load256(v + 32)}; }
  static NM_PIECE Stored LoadLone(const uint8_t* v) {
    return {_mm256_zextsi128_si256(Load128(v)), _mm256_zextsi128_si256(Load128(v + 16))};
  }
  static NM_PIECE void Expand(const Stored& stored, const __m256i (&ranks)[kVectors], __m256i (&weights)[kVectors]) {
    const __m256i low = SignedOfInt8(stored.low_blocks), high = SignedOfInt8(stored.high_blocks);
    for (int i = 0; i < kVectors; ++i) {
      weights[i] = _mm256_blend_epi32(_mm256_shuffle_epi8(low, ranks[i]), _mm256_shuffle_epi8(high, ranks[i]), 0xcc);
    }
  }
  static NM_PIECE __m256i Multiply(const __m256i (&weights)[kVectors], const uint8_t* a) {
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < kVectors; ++i) sums = _mm256_add_epi32(sums, SignedProducts(weights[i], Load256(a + 32 * i)));
    return sums;
  }
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_RANKS_H_
