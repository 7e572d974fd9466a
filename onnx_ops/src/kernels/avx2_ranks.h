// Integer weights of bitmaps, expanded in registers: the columns are ranked by arithmetic instead of looked up.
#ifndef NM_KERNELS_AVX2_RANKS_H_
#define NM_KERNELS_AVX2_RANKS_H_

#include "avx2_integer_products.h"

namespace nm {
namespace {

// A pair of steps is eight blocks of 16 columns, each in four bytes of a vector: 0, 1, 4, 5 in its low lane, 2, 3, 6, 7
// in the high one, so that where half is kept either lane finds the values of its first two blocks and those of its
// last in one lane of the stored ones. Vector i of four has columns i, 4 + i, 8 + i and 12 + i of every block. A lone
// step at the end of a row has its blocks in the low lane.
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

// Where the stored values have the one of every column: among those of its block, or among the sixteen of two blocks.
template <bool two_blocks>
NM_PIECE void RankColumns(__m256i halves, __m256i (&ranks)[kVectors]) {
  const __m256i counts = _mm256_shuffle_epi8(Load256(kHalfTables.counts), halves);
  const __m256i odd_blocks = _mm256_set1_epi64x(0x0808080800000000);
  // Kept columns of the block in lower halves: 0, c0, c0 + c1, c0 + c1 + c2. The compiler would make five shifts and
  // additions of the product.
  __m256i shifts = _mm256_set1_epi32(0x01010100);
  asm("" : "+x"(shifts));
  __m256i before = _mm256_mullo_epi32(counts, shifts);
  if constexpr (two_blocks) before = _mm256_add_epi8(before, odd_blocks);
  for (int i = 0; i < kVectors; ++i) {
    ranks[i] = _mm256_add_epi8(_mm256_shuffle_epi8(Load256(kHalfTables.ranks[i]), halves), before);
  }
}

// The kinds of stored values: those of a pair or a lone step, expanded to all columns, and times activations, whose
// sums of each block are in a lane of 32 bits. Where other than half is kept, of `block_values`, each block is loaded
// by itself, and sixteen bytes of it: up to 15 behind the row.
struct Int4Products {
  static constexpr int64_t kMostRows = 8;  // from then on columns that are looked up once for all are faster
  // Values plus 8, where pruned 8, of bytes that were looked up.
  static NM_PIECE __m256i Weights(__m256i bytes) {
    const __m256i high_blocks = _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4);
    return _mm256_xor_si256(LowHalves(_mm256_srlv_epi32(bytes, high_blocks)), _mm256_set1_epi8(8));
  }
  static NM_PIECE __m256i Signs(__m256i stored) { return _mm256_xor_si256(stored, _mm256_set1_epi8(-120)); }
  // The start takes 8 · a off.
  static NM_PIECE __m256i Multiply(const __m256i (&weights)[kVectors], const uint8_t* a) {
    __m256i sums = Load256(a + 32 * kVectors);
    for (int i = 0; i < kVectors; ++i) {
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights[i], Load256(a + 32 * i)));
    }
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  }
};

struct Int4 : Int4Products {
  static constexpr bool kHalf = true;
  static constexpr int64_t PairBytes(int64_t) { return 32; }
  using Stored = __m256i;
  static NM_PIECE Stored LoadPair(const uint8_t* v, int64_t) { return Load256(v); }
  static NM_PIECE Stored LoadLone(const uint8_t* v, int64_t) { return _mm256_zextsi128_si256(Load128(v)); }
  static NM_PIECE void Expand(const Stored& stored, const __m256i (&ranks)[kVectors], __m256i (&weights)[kVectors]) {
    const __m256i signs = Signs(stored);
    for (int i = 0; i < kVectors; ++i) weights[i] = Weights(_mm256_shuffle_epi8(signs, ranks[i]));
  }
};

struct AnyInt4 : Int4Products {
  static constexpr bool kHalf = false;
  static constexpr int64_t PairBytes(int64_t block_values) { return 4 * block_values; }
  struct Stored {
    __m256i even_blocks;
    __m256i odd_blocks;
  };
  static NM_PIECE Stored LoadPair(const uint8_t* v, int64_t block_values) {
    const uint8_t* third = v + 2 * block_values;
    return {Lanes(Load128(v), Load128(third)), Lanes(Load128(v + block_values), Load128(third + block_values))};
  }
  static NM_PIECE Stored LoadLone(const uint8_t* v, int64_t block_values) {
    return {_mm256_zextsi128_si256(Load128(v)), _mm256_zextsi128_si256(Load128(v + block_values))};
  }
  static NM_PIECE void Expand(const Stored& stored, const __m256i (&ranks)[kVectors], __m256i (&weights)[kVectors]) {
    const __m256i even = Signs(stored.even_blocks), odd = Signs(stored.odd_blocks);
    for (int i = 0; i < kVectors; ++i) {
      const __m256i from_even = _mm256_shuffle_epi8(even, ranks[i]), from_odd = _mm256_shuffle_epi8(odd, ranks[i]);
      weights[i] = Weights(_mm256_blend_epi32(from_even, from_odd, 0xaa));
    }
  }
};

struct Int8Products {
  static NM_PIECE __m256i Multiply(const __m256i (&weights)[kVectors], const uint8_t* a) {
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < kVectors; ++i) sums = _mm256_add_epi32(sums, SignedProducts(weights[i], Load256(a + 32 * i)));
    return sums;
  }
};

struct Int8 : Int8Products {
  static constexpr bool kHalf = true;
  static constexpr int64_t kMostRows = 1;  // for each row takes the signs of all columns' weights, pruned ones too
  static constexpr int64_t PairBytes(int64_t) { return 64; }
  struct Stored {
    __m256i low_blocks;
    __m256i high_blocks;
  };
  static NM_PIECE Stored LoadPair(const uint8_t* v, int64_t) { return {Load256(v), Load256(v + 32)}; }
  static NM_PIECE Stored LoadLone(const uint8_t* v, int64_t) {
    return {_mm256_zextsi128_si256(Load128(v)), _mm256_zextsi128_si256(Load128(v + 16))};
  }
  static NM_PIECE void Expand(const Stored& stored, const __m256i (&ranks)[kVectors], __m256i (&weights)[kVectors]) {
    const __m256i low = SignedOfInt8(stored.low_blocks), high = SignedOfInt8(stored.high_blocks);
    for (int i = 0; i < kVectors; ++i) {
      weights[i] = _mm256_blend_epi32(_mm256_shuffle_epi8(low, ranks[i]), _mm256_shuffle_epi8(high, ranks[i]), 0xcc);
    }
  }
};

struct AnyInt8 : Int8Products {
  static constexpr bool kHalf = false;
  static constexpr int64_t kMostRows = 4;
  static constexpr int64_t PairBytes(int64_t block_values) { return 8 * block_values; }
  struct Stored {
    __m256i of[4];  // the blocks of a lane, one by one
  };
  static NM_PIECE Stored LoadPair(const uint8_t* v, int64_t block_values) {
    Stored stored;
    for (int i = 0; i < 4; ++i) {
      const uint8_t* low = v + (i < 2 ? i : i + 2) * block_values;
      stored.of[i] = Lanes(Load128(low), Load128(low + 2 * block_values));
    }
    return stored;
  }
  static NM_PIECE Stored LoadLone(const uint8_t* v, int64_t block_values) {
    Stored stored;
    for (int i = 0; i < 4; ++i) stored.of[i] = _mm256_zextsi128_si256(Load128(v + i * block_values));
    return stored;
  }
  static NM_PIECE void Expand(const Stored& stored, const __m256i (&ranks)[kVectors], __m256i (&weights)[kVectors]) {
    __m256i blocks[4];
    for (int b = 0; b < 4; ++b) blocks[b] = SignedOfInt8(stored.of[b]);
    for (int i = 0; i < kVectors; ++i) {
      __m256i found[4];
      for (int b = 0; b < 4; ++b) found[b] = _mm256_shuffle_epi8(blocks[b], ranks[i]);
      const __m256i first = _mm256_blend_epi32(found[0], found[1], 0xaa);
      const __m256i last = _mm256_blend_epi32(found[2], found[3], 0xaa);
      weights[i] = _mm256_blend_epi32(first, last, 0xcc);
    }
  }
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_RANKS_H_
