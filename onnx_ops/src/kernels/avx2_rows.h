// What the AVX2 kernels for few activation rows share: packed activations and the positions of 128 columns
// as indices of vpshufb. AVX2 cannot expand the weights cheaply, so the kernels compress the activations instead: y = Σ
// values[i] · a[column of i].
#ifndef NM_KERNELS_AVX2_ROWS_H_
#define NM_KERNELS_AVX2_ROWS_H_

#include "avx2_expand.h"
#include "avx2_outliers.h"
#include "kernels.h"

namespace nm {
namespace {

// The innermost loops are functions of their own, for inlined into what prepares them they run out of registers; and
// their pieces are inlined without regard to size, for a call in such a loop doubles its time.
#define NM_LOOP __attribute__((noinline))
#define NM_PIECE inline __attribute__((always_inline))

// Eight of 16 columns are kept in every block.
inline bool IsHalf(const Layout& l) { return 2 * l.n == l.m && l.m <= 16; }

// ---------------------------------------------------------------------------------------------------------------------
// Positions of a pair of steps. A vector of indices has the columns of four blocks of 16, eight bytes each; which block
// goes where is the order: values as they lie in memory, or blocks 0 and 1 in the low halves of the two lanes.

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

  // Of the step that ends a row: its fields end where the row does, and other fields come before them.
  static NM_PIECE __m256i LoadStep(const uint8_t* p, const uint32_t* table) {
    const uint64_t fields = InRegister(Load64(p + kBytes / 2 - 8) >> (64 - 4 * kBits));
    static_assert(order == Order::kValues, "blocks 0 and 1 in the low lane");
    const __m128i nibbles = FourWords<0, 1, 2, 3>(fields, fields, table);
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

// From a buffer that one of the others filled, for more than four activation rows.
struct StoredPairs {
  static constexpr int kBytes = 64;
  static NM_PIECE __m256i LoadStep(const uint8_t* p, const uint32_t*) { return Load256(p); }
  static NM_PIECE Indices Load(const uint8_t* p, const uint32_t*) { return {Load256(p), Load256(p + 32)}; }
};

// The positions of an output row from column `first` on, which begin after `used` bytes, and zeros. A block of a bitmap
// that the row leaves incomplete is filled up to eight columns, as the look-ups by halves of a mask expect.
inline void CopyTailPositions(const Layout& l, int64_t output, int64_t used, int64_t first, uint8_t* tail,
                              size_t bytes) {
  memset(tail, 0, bytes);
  memcpy(tail, l.positions + output * l.position_bytes + used, static_cast<size_t>(l.position_bytes - used));
  if (!l.bitmap) return;
  for (int64_t column = l.groups * l.m; column % kBlock != 0; column += l.m) {
    for (int64_t bit = column - first; bit < column - first + l.n; ++bit) tail[bit / 8] |= 1 << (bit % 8);
  }
}

template <class Pairs>
void StorePairs(const uint8_t* positions, int64_t pairs, bool odd_step, const uint32_t* table, uint8_t* stored) {
  for (int64_t i = 0; i < pairs; ++i, positions += Pairs::kBytes, stored += StoredPairs::kBytes) {
    Prefetch(positions);
    const Indices indices = Pairs::Load(positions, table);
    Store256(stored, indices.first);
    Store256(stored + 32, indices.second);
  }
  if (odd_step) Store256(stored, Pairs::LoadStep(positions, table));
}

// Starts the look-ups of the next pair before the arithmetic on this one, whatever the compiler would prefer: they take
// their time in the second-level cache.
NM_PIECE void Separate(Indices& next, Indices& now) {
  asm("" : "+x"(next.first), "+x"(next.second), "+x"(now.first), "+x"(now.second));
}

// ---------------------------------------------------------------------------------------------------------------------
// Activation rows in turns of four, two and one, each with a kernel of its own.

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class Body>
void ForRows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(Count<4>(), r);
  for (; r + 2 <= rows; r += 2) body(Count<2>(), r);
  if (r < rows) body(Count<1>(), r);
}

// A row in order, zeros after it, for the outliers and for weights that are expanded.
inline int64_t NaturalColumns(const Layout& l) { return PaddedColumns(l) + kLargestOutlierBlock; }

inline void PackNatural(const Layout& l, const float* a, float* row) {
  memcpy(row, a, static_cast<size_t>(l.in_features) * sizeof(float));
  memset(row + l.in_features, 0, static_cast<size_t>(NaturalColumns(l) - l.in_features) * sizeof(float));
}

// Hands out parts of one piece of memory, aligned to cache lines.
class Parts {
 public:
  size_t Take(int64_t bytes) {
    const size_t start = total_;
    total_ += static_cast<size_t>(RoundUp(bytes, 64));
    return start;
  }
  size_t total() const { return total_; }

 private:
  size_t total_ = 0;
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_ROWS_H_
