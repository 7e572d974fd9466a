// Pieces shared by the AVX2 kernels. Everything is in an anonymous namespace and free of the standard library: no
// function compiled for AVX2 may be merged with one that a lesser processor runs.
#ifndef NM_KERNELS_AVX2_COMMON_H_
#define NM_KERNELS_AVX2_COMMON_H_

#include <immintrin.h>
#include <string.h>

#include "layout.h"
#include "positions.h"

namespace nm {
namespace {

constexpr int64_t kBlock = 16;       // columns of one field of positions
constexpr int64_t kStep = 64;        // columns of one step: four fields
constexpr int64_t kLanes = 8;        // floats of a vector
constexpr int64_t kPrefetch = 2048;  // bytes ahead in each stream

inline int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Blocks(const Layout& l) { return (l.in_features + kBlock - 1) / kBlock; }

// As an integer: the address may lie past the end of the tensor.
inline void Prefetch(const void* p, int64_t ahead = kPrefetch) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead);
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

inline uint64_t Load64(const uint8_t* p) {
  uint64_t value;
  memcpy(&value, p, sizeof(value));
  return value;
}

// The next 8 bytes of p, of which `bytes` may be read; the rest are zero.
inline uint64_t LoadPartial(const uint8_t* p, int64_t bytes) {
  if (bytes >= 8) return Load64(p);
  uint64_t value = 0;
  for (int64_t i = 0; i < bytes; ++i) value |= uint64_t{p[i]} << (8 * i);
  return value;
}

inline __m256i Load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i Load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void Store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// The first `count` lanes.
inline __m256i LaneMask(int64_t count) {
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(Min(count, kLanes))), lanes);
}

inline float Sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// For every mask of 8 columns, one a byte: `kept` lists its columns, ascending, then zeros; `kept_high` lists them plus
// 8 in the last bytes, zeros first, so that eight kept columns of 16 are kept[low] | kept_high[high] with no shift;
// `ranks` has at each kept column the number of kept columns before it, at the others 0x80, which vpshufb turns into
// zero.
struct ByteTables {
  uint64_t kept[256];
  uint64_t kept_high[256];
  uint64_t ranks[256];
  constexpr ByteTables() : kept(), kept_high(), ranks() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int column = 0; column < 8; ++column) {
        if (mask >> column & 1) {
          kept[mask] |= static_cast<uint64_t>(column) << (8 * count);
          ranks[mask] |= static_cast<uint64_t>(count++) << (8 * column);
        } else {
          ranks[mask] |= uint64_t{0x80} << (8 * column);
        }
      }
      if (count > 0) kept_high[mask] = (kept[mask] + 0x0808080808080808) << (8 * (8 - count));
    }
  }
};
alignas(64) constexpr ByteTables kByteTables;

constexpr uint64_t kEveryByte = 0x0101010101010101;

// The kept columns of a 16-column mask, one a byte, ascending: the first eight of them.
inline uint64_t ColumnsOfMask(uint32_t mask) {
  const uint32_t low = mask & 255;
  const int count = __builtin_popcount(low);
  const uint64_t high = kByteTables.kept[mask >> 8 & 255] + 8 * kEveryByte;
  return kByteTables.kept[low] | (count == 8 ? 0 : high << (8 * count));
}

// The same from an entry of GetColumnTable.
inline uint64_t ColumnsOfNibbles(uint32_t nibbles) {
  const uint32_t low_bits = 0x0f0f0f0f;
  return (nibbles & low_bits) | static_cast<uint64_t>(nibbles >> 4 & low_bits) << 32;
}

// Where each of 16 columns finds its value among the values of its block, 0x80 and above where it has none.
inline __m128i RanksOfMask(uint32_t mask) {
  const uint32_t low = mask & 255;
  const uint64_t high =
      kByteTables.ranks[mask >> 8 & 255] + kEveryByte * static_cast<uint64_t>(__builtin_popcount(low));
  return _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(kByteTables.ranks[low]));
}

// thresholds[left], left at most `largest`, a lane. (A gather takes three times as long.)
inline __m256i Thresholds(const uint32_t* thresholds, __m256i left, int largest) {
  __m256i found = _mm256_permutevar8x32_epi32(Load256(thresholds), left);  // by the lowest three bits
  for (int first = 8; first <= largest; first += 8) {
    const __m256i here = _mm256_cmpgt_epi32(left, _mm256_set1_epi32(first - 1));
    found = _mm256_blendv_epi8(found, _mm256_permutevar8x32_epi32(Load256(thresholds + first), left), here);
  }
  return found;
}

// Masks of sixteen 32-wide groups from their codes, one group a lane: column by column from the highest, a group that
// has `left` columns to place takes this one when its rank is at least C(column, left). Two vectors in turn, for each
// alone waits for itself.
inline void UnrankWide(__m256i (&codes)[2], int n, __m256i (&masks)[2]) {
  const __m256i top = _mm256_set1_epi32(INT32_MIN);  // to compare unsigned
  __m256i left[2] = {_mm256_set1_epi32(n), _mm256_set1_epi32(n)};
  masks[0] = masks[1] = _mm256_setzero_si256();
  for (int column = 31; column >= 0; --column) {
    const uint32_t* row = WideThresholds() + 32 * column;
    for (int i = 0; i < 2; ++i) {
      const __m256i below = Thresholds(row, left[i], n);
      const __m256i skip = _mm256_cmpgt_epi32(_mm256_xor_si256(below, top), _mm256_xor_si256(codes[i], top));
      codes[i] = _mm256_sub_epi32(codes[i], _mm256_andnot_si256(skip, below));
      left[i] = _mm256_sub_epi32(left[i], _mm256_andnot_si256(skip, _mm256_set1_epi32(1)));
      const __m256i bit = _mm256_set1_epi32(static_cast<int>(1u << column));
      masks[i] = _mm256_or_si256(masks[i], _mm256_andnot_si256(skip, bit));
    }
  }
}

// Reads the positions of output rows, whatever the pattern and the format. Hostile bytes give masks with other numbers
// of columns than n, but never columns outside the block.
class PositionReader {
 public:
  explicit PositionReader(const Layout& l) : layout_(l), table_{}, columns_(nullptr) {
    if (l.dense || l.bitmap || l.m == 32) return;
    table_ = GetFieldTable(l.n, l.m);
    if (2 * l.n == l.m) columns_ = GetColumnTable(l.m);
  }

  // For patterns that keep half of m columns, m at most 16: the eight kept columns of each of the blocks first …
  // first+count-1, one a byte, ascending; first and count are multiples of 4. Columns past the row's end are any
  // below 16.
  void Columns(int64_t output, int64_t first, int64_t count, uint64_t* columns) const {
    const Layout& l = layout_;
    const uint8_t* row = l.positions + output * l.position_bytes;
    const int bits = l.bitmap ? 16 : table_.field_bits;
    const uint64_t keep = (uint64_t{1} << bits) - 1;
    for (int64_t i = 0; i < count; i += 4) {
      const int64_t byte = (first + i) * bits / 8;
      const uint64_t fields = LoadPartial(row + byte, l.position_bytes - byte);
      for (int j = 0; j < 4; ++j) {
        const uint32_t field = static_cast<uint32_t>(fields >> (j * bits) & keep);
        columns[i + j] = l.bitmap ? ColumnsOfMask(field) : ColumnsOfNibbles(columns_[field]);
      }
    }
  }

  // The 16-bit masks of blocks first … first+count-1 of 16 columns; first is a multiple of 16. Columns past the last
  // group are clear; masks has room for count rounded up to 16.
  void Masks(int64_t output, int64_t first, int64_t count, uint16_t* masks) const {
    const Layout& l = layout_;
    const uint8_t* row = l.positions + output * l.position_bytes;
    if (l.dense) {
      memset(masks, 255, static_cast<size_t>(count) * sizeof(*masks));
    } else if (l.bitmap) {
      const int64_t bytes = l.position_bytes - 2 * first;
      memset(masks, 0, static_cast<size_t>(count) * sizeof(*masks));
      memcpy(masks, row + 2 * first, static_cast<size_t>(Min(bytes, 2 * count)));
    } else if (l.m == 32) {
      WideMasks(row, first, count, masks);
    } else {
      FieldMasks(row, first, count, masks);
    }
    const int64_t past = (first + count) * kBlock - l.groups * l.m;  // below 16: some groups of 4 or 8 columns
    if (past > 0) masks[count - 1] &= static_cast<uint16_t>(0xffff >> past);
  }

 private:
  void FieldMasks(const uint8_t* row, int64_t first, int64_t count, uint16_t* masks) const {
    const int bits = table_.field_bits;
    const uint64_t keep = (uint64_t{1} << bits) - 1;
    for (int64_t i = 0; i < count; i += 4) {
      const int64_t bit = (first + i) * bits;
      const uint64_t fields = LoadPartial(row + bit / 8, layout_.position_bytes - bit / 8) >> (bit % 8);
      for (int j = 0; j < 4; ++j) masks[i + j] = table_.masks[fields >> (j * bits) & keep];
    }
  }

  void WideMasks(const uint8_t* row, int64_t first, int64_t count, uint16_t* masks) const {
    const Layout& l = layout_;
    for (int64_t i = 0; i < count; i += 32) {
      __m256i codes[2], found[2];
      for (int64_t half = 0; half < 2; ++half) {
        alignas(32) uint32_t fields[8];
        for (int64_t group = 0; group < 8; ++group) {
          const int64_t at = (first + i) / 2 + 8 * half + group;
          fields[group] = ReadBits(row, l.position_bytes, at * l.code_bits, l.code_bits);
        }
        codes[half] = Load256(fields);
      }
      UnrankWide(codes, l.n, found);
      Store256(masks + i, found[0]);
      if (i + 16 < count) Store256(masks + i + 16, found[1]);
    }
  }

  const Layout& layout_;
  FieldTable table_;
  const uint32_t* columns_;
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_COMMON_H_
