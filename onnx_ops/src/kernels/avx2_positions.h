// Positions of 128 columns as indices of vpshufb, for the patterns that keep eight columns of every sixteen.
#ifndef NM_KERNELS_AVX2_POSITIONS_H_
#define NM_KERNELS_AVX2_POSITIONS_H_

#include "avx2_expand.h"

namespace nm {
namespace {

// The innermost loops are functions of their own, for inlined into what prepares them they run out of registers; and
// their pieces are inlined without regard to size, for a call in such a loop doubles its time.
#define NM_LOOP __attribute__((noinline))
#define NM_PIECE inline __attribute__((always_inline))

// Eight of 16 columns are kept in every block.
inline bool IsHalf(const Layout& l) { return 2 * l.n == l.m && l.m <= 16; }

// Half a pair of steps follows whole ones: it can be read in place.
inline bool EndsInOddStep(const Layout& l) { return l.in_features > kPair && l.in_features % kPair == kStep; }

// ---------------------------------------------------------------------------------------------------------------------
// Positions of a pair of steps, which up to kDirectRows activation rows are multiplied as they are looked up; for more
// they are looked up first and kept, which is as fast for codes and makes a loop for all kinds out of one for each. A
// vector of indices has the columns of four blocks of 16, eight bytes each; which block goes where is the order: values
// as they lie in memory, or blocks 0 and 1 in the low halves of the two lanes.

enum class Order { kValues, kLanes };

struct Indices {
  __m256i first;
  __m256i second;
};

// Keeps the compiler from folding the load of a word into each of the instructions that take a field of it.
inline uint64_t InRegister(uint64_t word) {
  asm("" : "+r"(word));
  return word;
}

inline __m128i TwoWords(const uint64_t* low, const uint64_t* high) {
  const __m128d first = _mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)));
  return _mm_castpd_si128(_mm_loadh_pd(first, reinterpret_cast<const double*>(high)));
}

inline __m256i Lanes(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// From codes: fields of kBits bits, each looked up in a table of nibbles.
template <int kBits, Order order>
struct CodePairs {
  static constexpr int kBytes = kBits;  // of eight fields
  static constexpr int kDirectRows = 2;

  // Of the step that ends a row: its fields end where the row does, and other fields come before them.
  static NM_PIECE __m256i LoadStep(const uint8_t* p, const uint32_t* table) {
    const uint64_t fields = InRegister(Load64(p + kBytes / 2 - 8) >> (64 - 4 * kBits));
    constexpr int kSecond = order == Order::kValues ? 1 : 2;
    const __m128i nibbles = FourWords<0, kSecond, 3 - kSecond, 3>(fields, fields, table);
    const __m128i low_bits = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(nibbles, low_bits);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(nibbles, 4), low_bits);
    return Lanes(_mm_unpacklo_epi32(low, high), _mm_unpackhi_epi32(low, high));
  }
  static NM_PIECE Indices Load(const uint8_t* p, const uint32_t* table) {
    const uint64_t first = InRegister(Load64(p));
    const uint64_t second = InRegister(Load64(p + kBytes - 8) >> (64 - 4 * kBits));
    // Of blocks 0 and 1 of either step, then of blocks 2 and 3; or of 0 and 2, then of 1 and 3.
    constexpr int low_second = order == Order::kValues ? 1 : 2, high_first = 3 - low_second;
    const __m256i nibbles = Lanes(FourWords<0, low_second, 0, low_second>(first, second, table),
                                  FourWords<high_first, 3, high_first, 3>(first, second, table));
    const __m256i low_bits = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(nibbles, low_bits);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low_bits);
    return {_mm256_unpacklo_epi32(low, high), _mm256_unpackhi_epi32(low, high)};
  }

 private:
  template <int index>
  static NM_PIECE int Word(uint64_t fields, const uint32_t* table) {
    return static_cast<int>(table[__bextr_u64(fields, kBits << 8 | index * kBits)]);
  }
  template <int i, int j, int k, int l>
  static NM_PIECE __m128i FourWords(uint64_t first, uint64_t second, const uint32_t* table) {
    __m128i words = _mm_cvtsi32_si128(Word<i>(first, table));
    words = _mm_insert_epi32(words, Word<j>(first, table), 1);
    words = _mm_insert_epi32(words, Word<k>(second, table), 2);
    return _mm_insert_epi32(words, Word<l>(second, table), 3);
  }
};

// From a bitmap, eight columns at a time.
template <Order order>
struct MaskPairs {
  static constexpr int kBytes = 16;
  static constexpr int kDirectRows = 4;

  static NM_PIECE __m256i LoadStep(const uint8_t* p, const uint32_t*) { return Step(p); }
  static NM_PIECE Indices Load(const uint8_t* p, const uint32_t*) { return {Step(p), Step(p + 8)}; }

 private:
  static NM_PIECE __m256i Step(const uint8_t* p) {
    const uint64_t w = InRegister(Load64(p));
    constexpr int i1 = order == Order::kValues ? 1 : 2;
    constexpr int i2 = 3 - i1;
    const __m128i low = _mm_or_si128(TwoWords(Low<0>(w), Low<i1>(w)), TwoWords(High<0>(w), High<i1>(w)));
    const __m128i high = _mm_or_si128(TwoWords(Low<i2>(w), Low<3>(w)), TwoWords(High<i2>(w), High<3>(w)));
    return Lanes(low, high);
  }
  template <int block>
  static NM_PIECE const uint64_t* Low(uint64_t word) {
    return kByteTables.kept + __bextr_u64(word, 8 << 8 | 16 * block);
  }
  template <int block>
  static NM_PIECE const uint64_t* High(uint64_t word) {
    return kByteTables.kept_high + __bextr_u64(word, 8 << 8 | (16 * block + 8));
  }
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_POSITIONS_H_
