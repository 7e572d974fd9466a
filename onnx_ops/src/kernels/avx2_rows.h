// What the AVX2 kernels for few activation rows share: packed activations, outliers, and the positions of 128 columns
// as indices of vpshufb. AVX2 cannot expand the weights cheaply, so the kernels compress the activations instead: y = Σ
// values[i] · a[column of i].
#ifndef NM_KERNELS_AVX2_ROWS_H_
#define NM_KERNELS_AVX2_ROWS_H_

#include "avx2_expand.h"
#include "kernels.h"

namespace nm {
namespace {

// Eight of 16 columns are kept in every block.
bool IsHalf(const Layout& l) { return 2 * l.n == l.m && l.m <= 16; }

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

  static Indices Load(const uint8_t* p, const uint32_t* table) {
    const uint64_t first = InRegister(Load64(p));
    const uint64_t second = InRegister(Load64(p + kBytes - 8));  // its last four fields end at the top bit
    const uint32_t* const b[8] = {table + Field<0>(first),
                                  table + Field<kBits>(first),
                                  table + Field<2 * kBits>(first),
                                  table + Field<3 * kBits>(first),
                                  table + Field<64 - 4 * kBits>(second),
                                  table + Field<64 - 3 * kBits>(second),
                                  table + Field<64 - 2 * kBits>(second),
                                  table + Field<64 - kBits>(second)};
    const __m256i nibbles = order == Order::kValues
                                ? Lanes(FourWords(b[0], b[1], b[4], b[5]), FourWords(b[2], b[3], b[6], b[7]))
                                : Lanes(FourWords(b[0], b[2], b[4], b[6]), FourWords(b[1], b[3], b[5], b[7]));
    const __m256i low_bits = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(nibbles, low_bits);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low_bits);
    return {_mm256_unpacklo_epi32(low, high), _mm256_unpackhi_epi32(low, high)};
  }

 private:
  template <int shift>
  static uint64_t Field(uint64_t word) {
    return __bextr_u64(word, kBits << 8 | shift);
  }
  static __m128i FourWords(const uint32_t* a, const uint32_t* b, const uint32_t* c, const uint32_t* d) {
    const __m128i two = _mm_insert_epi32(_mm_cvtsi32_si128(static_cast<int>(*a)), static_cast<int>(*b), 1);
    return _mm_insert_epi32(_mm_insert_epi32(two, static_cast<int>(*c), 2), static_cast<int>(*d), 3);
  }
};

// From a bitmap, eight columns at a time.
template <Order order>
struct MaskPairs {
  static constexpr int kBytes = 16;

  static Indices Load(const uint8_t* p, const uint32_t*) { return {Step(p), Step(p + 8)}; }

 private:
  static __m256i Step(const uint8_t* p) {
    const uint64_t w = InRegister(Load64(p));
    constexpr int i1 = order == Order::kValues ? 1 : 2;
    constexpr int i2 = 3 - i1;
    const __m128i low = _mm_or_si128(TwoWords(Low<0>(w), Low<i1>(w)), TwoWords(High<0>(w), High<i1>(w)));
    const __m128i high = _mm_or_si128(TwoWords(Low<i2>(w), Low<3>(w)), TwoWords(High<i2>(w), High<3>(w)));
    return Lanes(low, high);
  }
  template <int block>
  static const uint64_t* Low(uint64_t word) {
    return kByteTables.kept + __bextr_u64(word, 8 << 8 | 16 * block);
  }
  template <int block>
  static const uint64_t* High(uint64_t word) {
    return kByteTables.kept_high + __bextr_u64(word, 8 << 8 | (16 * block + 8));
  }
};

// From a buffer that one of the others filled, for more than four activation rows.
struct StoredPairs {
  static constexpr int kBytes = 64;
  static Indices Load(const uint8_t* p, const uint32_t*) { return {Load256(p), Load256(p + 32)}; }
};

// The positions of an output row after `used` bytes, of fewer than 128 columns, to 16 bytes. A block of a bitmap that
// the row leaves incomplete is filled up to eight columns, as MaskPairs expects.
inline void CopyTailPositions(const Layout& l, int64_t output, int64_t used, uint8_t* tail) {
  memset(tail, 0, 16);
  memcpy(tail, l.positions + output * l.position_bytes + used, static_cast<size_t>(l.position_bytes - used));
  if (!l.bitmap) return;
  for (int64_t column = l.groups * l.m; column % kBlock != 0; column += l.m) {
    for (int64_t bit = column % kPair; bit < column % kPair + l.n; ++bit) tail[bit / 8] |= 1 << (bit % 8);
  }
}

template <class Pairs>
void StorePairs(const uint8_t* positions, int64_t pairs, const uint32_t* table, uint8_t* stored) {
  for (int64_t i = 0; i < pairs; ++i, positions += Pairs::kBytes, stored += StoredPairs::kBytes) {
    Prefetch(positions);
    const Indices indices = Pairs::Load(positions, table);
    Store256(stored, indices.first);
    Store256(stored + 32, indices.second);
  }
}

// Starts the look-ups of the next pair before the arithmetic on this one, whatever the compiler would prefer: they take
// their time in the second-level cache.
inline void Separate(Indices& next, Indices& now) {
  asm("" : "+x"(next.first), "+x"(next.second), "+x"(now.first), "+x"(now.second));
}

// ---------------------------------------------------------------------------------------------------------------------
// Outliers: eight at a time. Scalar loads of the activations, for a gather takes twice as long on Zen 3.

inline __m256 EightOf(const float* a, const uint8_t* p) {
  return _mm256_setr_ps(a[p[0]], a[p[1]], a[p[2]], a[p[3]], a[p[4]], a[p[5]], a[p[6]], a[p[7]]);
}

// Σ values[i] · a[positions[i]] over the outliers of one output row; a is padded by kLargestOutlierBlock floats.
float OutlierDot(const Layout& l, int64_t output, const float* a) {
  const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
  const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
  const bool half = l.outlier_dtype == NM_FLOAT16;
  const int64_t value_bytes = half ? 2 : 4;
  const auto eight = [half](const uint8_t* v) {
    return half ? _mm256_cvtph_ps(Load128(v)) : _mm256_loadu_ps(reinterpret_cast<const float*>(v));
  };
  __m256 sum = _mm256_setzero_ps();
  for (int64_t first = 0; first < l.row_outliers; first += l.outlier_k, a += l.outlier_block) {
    const int64_t count = Min(l.outlier_k, l.row_outliers - first);
    Prefetch(values);
    Prefetch(positions);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      sum = _mm256_fmadd_ps(eight(values + i * value_bytes), EightOf(a, positions + i), sum);
    }
    if (i < count) {
      uint8_t padded[32] = {}, places[8] = {};
      memcpy(padded, values + i * value_bytes, static_cast<size_t>((count - i) * value_bytes));
      memcpy(places, positions + i, static_cast<size_t>(count - i));
      // Not a[0] · 0 for the missing ones: a[0] may be infinite.
      alignas(32) float products[8];
      _mm256_store_ps(products, _mm256_mul_ps(eight(padded), EightOf(a, places)));
      for (int64_t j = count - i; j < 8; ++j) products[j] = 0.0f;
      sum = _mm256_add_ps(sum, _mm256_load_ps(products));
    }
    positions += count;
    values += count * value_bytes;
  }
  return Sum(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Activation rows in turns of up to four, each with a kernel of its own size.

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class Body>
void ForRows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(Count<4>(), r);
  if (rows - r == 3) body(Count<3>(), r);
  if (rows - r == 2) body(Count<2>(), r);
  if (rows - r == 1) body(Count<1>(), r);
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
