// Pieces shared by the NEON kernels: positions, and stored values spread over their columns. Everything is in an
// anonymous namespace and free of the standard library: no function compiled for a newer processor may be merged with
// one that a lesser one runs.
#ifndef NM_KERNELS_NEON_COMMON_H_
#define NM_KERNELS_NEON_COMMON_H_

#include <arm_neon.h>
#include <string.h>

#include "layout.h"
#include "positions.h"

namespace nm {
namespace {

// The innermost loops are functions of their own, all of whose pieces are inlined. GCC would make copies of them for
// some callers' constants.
#if defined(__clang__)
#define NM_LOOP __attribute__((noinline))
#else
#define NM_LOOP __attribute__((noinline, noclone))
#endif
#define NM_PIECE inline __attribute__((always_inline))

constexpr int64_t kBlock = 16;          // columns of one field of positions
constexpr int64_t kTurn = 128;          // columns of one turn of the loops: eight fields are whole bytes
constexpr int64_t kMaskRun = 64;        // blocks whose masks are read at once
constexpr int64_t kValuesPadding = 16;  // bytes after the unpacked values of a row, so that 16 can be read at any

inline int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Blocks(const Layout& l) { return (l.in_features + kBlock - 1) / kBlock; }
inline int64_t PaddedColumns(const Layout& l) { return RoundUp(l.in_features, kTurn); }

// Eight of 16 columns are kept in every block.
inline bool IsHalf(const Layout& l) { return 2 * l.n == l.m && l.m <= 16; }

NM_PIECE uint64_t Load64(const uint8_t* p) {
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

inline float HalfAt(const uint8_t* p) {
  __fp16 half;
  memcpy(&half, p, sizeof(half));
  return half;
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions.

// For every mask of 8 columns the indices of vqtbl that bring elements of kBytes to their columns and zeros to the
// others: `low` for values from the first on, `high` where those of the mask are the last of eight. `count` is the
// number of columns.
template <int kBytes>
struct SpreadTables {
  uint8_t low[256][8 * kBytes];
  uint8_t high[256][8 * kBytes];
  uint8_t count[256];
  constexpr SpreadTables() : low(), high(), count() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int column = 0; column < 8; ++column) count[mask] += mask >> column & 1;
      for (int column = 0, rank = 0; column < 8; ++column) {
        const bool here = mask >> column & 1;
        for (int byte = 0; byte < kBytes; ++byte) {
          const int first = kBytes * rank + byte, last = first + kBytes * (8 - count[mask]);
          low[mask][kBytes * column + byte] = static_cast<uint8_t>(here ? first : 0xff);
          high[mask][kBytes * column + byte] = static_cast<uint8_t>(here ? last : 0xff);
        }
        rank += here;
      }
    }
  }
};
template <int kBytes>
alignas(64) constexpr SpreadTables<kBytes> kSpread;

// The masks of the blocks of an output row, whatever the pattern and the format. Hostile bytes give masks with other
// numbers of columns than n.
class MaskReader {
 public:
  explicit MaskReader(const Layout& l) : layout_(l), table_{} {
    if (!l.dense && !l.bitmap && l.m != 32) table_ = GetFieldTable(l.n, l.m);
  }

  // Blocks first … first+count-1, count at most kMaskRun, first a multiple of it. Columns past the last group may be
  // set; masks has room for kMaskRun.
  void Read(int64_t output, int64_t first, int64_t count, uint16_t* masks) const {
    const Layout& l = layout_;
    const uint8_t* row = l.positions + output * l.position_bytes;
    if (l.bitmap) {
      memset(masks, 0, static_cast<size_t>(count) * sizeof(*masks));
      memcpy(masks, row + 2 * first, static_cast<size_t>(Min(l.position_bytes - 2 * first, 2 * count)));
    } else if (l.m == 32) {
      WideMasks(row, first, count, masks);
    } else {
      FieldMasks(row, first, count, masks);
    }
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

  // Column by column from the highest, a group that has `left` columns to place takes this one when its rank is at
  // least C(column, left). Four groups in turn, for each alone waits for itself; without branches, for they cannot be
  // foretold.
  void WideMasks(const uint8_t* row, int64_t first, int64_t count, uint16_t* masks) const {
    const Layout& l = layout_;
    for (int64_t i = 0; i < count; i += 8) {
      uint32_t codes[4], left[4], found[4] = {};
      for (int64_t group = 0; group < 4; ++group) {
        codes[group] = ReadBits(row, l.position_bytes, ((first + i) / 2 + group) * l.code_bits, l.code_bits);
        left[group] = static_cast<uint32_t>(l.n);
      }
      for (int column = 31; column >= 0; --column) {
        const uint32_t* thresholds = WideThresholds() + 32 * column;
        for (int group = 0; group < 4; ++group) {
          const uint32_t below = thresholds[left[group]];
          const uint32_t take = codes[group] >= below;
          codes[group] -= take != 0 ? below : 0;
          left[group] -= take;
          found[group] = 2 * found[group] + take;
        }
      }
      memcpy(masks + i, found, sizeof(found));
    }
  }

  const Layout& layout_;
  FieldTable table_;
};

// The positions of an output row from column `first` on, which begin after `used` bytes, and zeros: kTurn columns. A
// block of a bitmap that the row leaves incomplete is filled up to eight columns, as the look-ups by halves of a mask
// expect.
constexpr int64_t kTurnPositions = 16;  // bytes, at most
inline void CopyTailPositions(const Layout& l, int64_t output, int64_t used, int64_t first, uint8_t* tail) {
  memset(tail, 0, kTurnPositions);
  memcpy(tail, l.positions + output * l.position_bytes + used, static_cast<size_t>(l.position_bytes - used));
  if (!l.bitmap) return;
  for (int64_t column = l.groups * l.m; column % kBlock != 0; column += l.m) {
    for (int64_t bit = column - first; bit < column - first + l.n; ++bit) {
      tail[bit / 8] = static_cast<uint8_t>(tail[bit / 8] | 1 << (bit % 8));
    }
  }
}

// Walks over the kept columns of an output row, eight columns at a time: spread(values, mask, left, column) with the
// address of the first value of those columns, of which `left` bytes may be read.
template <int kBytes, class Spread>
void SpreadRow(const Layout& l, const MaskReader& reader, int64_t output, const uint8_t* values,
               const uint8_t* const end, const Spread& spread) {
  for (int64_t first = 0; first < Blocks(l); first += kMaskRun) {
    uint16_t masks[kMaskRun];
    const int64_t count = Min(kMaskRun, Blocks(l) - first);
    reader.Read(output, first, count, masks);
    for (int64_t i = 0; i < 2 * count; ++i) {
      const uint32_t mask = masks[i / 2] >> (8 * (i % 2)) & 255;
      spread(values, mask, end - values, first * kBlock + 8 * i);
      values += kBytes * kSpread<kBytes>.count[mask];
      if (values > end) values = end;  // hostile masks
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Integers as signed bytes. int4 is left in the high half of its byte, sixteen times what it is, for that takes one
// instruction less; ScaleOf takes it back.

NM_PIECE int8x16_t SignedOfInt8(uint8x16_t stored) { return vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(0x80))); }

// Two's complement in both halves.
NM_PIECE uint8x16_t SignedHalves(const uint8_t* packed) { return veorq_u8(vld1q_u8(packed), vdupq_n_u8(0x88)); }
NM_PIECE int8x16_t LowHalves(uint8x16_t halves) { return vreinterpretq_s8_u8(vshlq_n_u8(halves, 4)); }
NM_PIECE int8x16_t HighHalves(uint8x16_t halves) { return vreinterpretq_s8_u8(vandq_u8(halves, vdupq_n_u8(0xf0))); }

// What a signed byte of an output row is multiplied by.
inline float ScaleOf(const Layout& l, int64_t output, int64_t index) {
  return HalfAt(l.scales + 2 * (output * l.row_scales + index)) * (l.dtype == NM_INT4 ? 0x1p-4f : 1.0f);
}

// A chunk of int4 values, at most as many as there are; `half` bytes of it.
inline void UnpackInt4Chunk(const uint8_t* chunk, int64_t half, uint8_t* values) {
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const uint8x16_t halves = SignedHalves(chunk + i);
    vst1q_s8(reinterpret_cast<int8_t*>(values + i), LowHalves(halves));
    vst1q_s8(reinterpret_cast<int8_t*>(values + half + i), HighHalves(halves));
  }
  for (; i < half; ++i) {
    const int halves = chunk[i] ^ 0x88;
    values[i] = static_cast<uint8_t>(halves << 4);
    values[half + i] = static_cast<uint8_t>(halves & 0xf0);
  }
}

// Values first … last-1 of an output row; first is a multiple of int4_chunk. Writes up to one byte past the last.
inline void UnpackSigned(const Layout& l, const uint8_t* row, int64_t first, int64_t last, uint8_t* values) {
  int64_t i = first;
  if (l.dtype == NM_INT4) {
    for (; i < last; i += l.int4_chunk, values += l.int4_chunk) {
      UnpackInt4Chunk(row + i / 2, (Min(l.int4_chunk, last - i) + 1) / 2, values);
    }
    return;
  }
  for (; i + 16 <= last; i += 16, values += 16) {
    vst1q_s8(reinterpret_cast<int8_t*>(values), SignedOfInt8(vld1q_u8(row + i)));
  }
  for (; i < last; ++i) *values++ = row[i] ^ 0x80;
}

inline int64_t SignedValuesBytes(const Layout& l) { return l.row_values + 1 + kValuesPadding; }

// An output row, pruned columns zero, padded with zeros to PaddedColumns. values is scratch of SignedValuesBytes.
inline void ExpandSigned(const Layout& l, const MaskReader& reader, int64_t output, uint8_t* values, uint8_t* bytes) {
  const uint8_t* row = l.values + output * l.value_bytes;
  UnpackSigned(l, row, 0, l.row_values, l.dense ? bytes : values);
  if (!l.dense) {
    memset(values + l.row_values, 0, kValuesPadding);
    SpreadRow<1>(l, reader, output, values, values + l.row_values,
                 [bytes](const uint8_t* next, uint32_t mask, int64_t, int64_t column) {
                   vst1_u8(bytes + column, vqtbl1_u8(vld1q_u8(next), vld1_u8(kSpread<1>.low[mask])));
                 });
  }
  memset(bytes + l.in_features, 0, static_cast<size_t>(PaddedColumns(l) - l.in_features));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_NEON_COMMON_H_
