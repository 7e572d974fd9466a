// What the NEON kernels for int8 and int4 weights read in a turn of 128 columns: positions as indices of vqtbl2, and
// stored values as signed bytes.
#ifndef NM_KERNELS_NEON_TURNS_H_
#define NM_KERNELS_NEON_TURNS_H_

#include "neon_rows.h"

namespace nm {
namespace {

// Into 32 activations each: eight of the first 16 and eight of the others.

struct Indices {
  uint8x16_t of[4];
};

// From codes: fields of kBits bits, each looked up in a table of nibbles.
template <int kBits>
struct CodeTurns {
  static constexpr int kBytes = kBits;  // of eight fields

  static NM_PIECE void Load(const uint8_t* p, const uint32_t* table, Indices& indices) {
    FourBlocks(Load64(p), table, indices.of);
    FourBlocks(Load64(p + kBytes - 8) >> (64 - 4 * kBits), table, indices.of + 2);
  }

 private:
  static NM_PIECE void FourBlocks(uint64_t fields, const uint32_t* table, uint8x16_t* indices) {
    const uint32x2_t first = vzip1_u32(Word<0>(fields, table), Word<1>(fields, table));
    const uint32x2_t second = vzip1_u32(Word<2>(fields, table), Word<3>(fields, table));
    const uint8x16_t nibbles = vreinterpretq_u8_u32(vcombine_u32(first, second));
    const uint32x4_t low = vreinterpretq_u32_u8(vandq_u8(nibbles, vdupq_n_u8(15)));
    const uint32x4_t high = vreinterpretq_u32_u8(vshrq_n_u8(nibbles, 4));
    const uint8x16_t second_block = vcombine_u8(vdup_n_u8(0), vdup_n_u8(16));
    indices[0] = vorrq_u8(vreinterpretq_u8_u32(vzip1q_u32(low, high)), second_block);
    indices[1] = vorrq_u8(vreinterpretq_u8_u32(vzip2q_u32(low, high)), second_block);
  }
  template <int i>
  static NM_PIECE uint32x2_t Word(uint64_t fields, const uint32_t* table) {
    return vcreate_u32(table[fields >> (kBits * i) & ((1 << kBits) - 1)]);
  }
};

// For every mask of 8 columns, in turn the four of two blocks: `kept` lists its columns, ascending, from the front or,
// for the second half of a block, from the back, zeros elsewhere, so that the halves of a block need only be joined.
struct KeptTables {
  uint64_t kept[4][256];
  constexpr KeptTables() : kept() {
    for (int mask = 0; mask < 256; ++mask) {
      uint64_t columns = 0, ones = 0;
      int count = 0;
      for (int column = 0; column < 8; ++column) {
        if ((mask >> column & 1) == 0) continue;
        columns |= static_cast<uint64_t>(column) << (8 * count);
        ones |= uint64_t{1} << (8 * count++);
      }
      for (int half = 0; half < 4; ++half) {
        const bool back = half % 2 == 1 && count > 0;
        kept[half][mask] = (columns + static_cast<uint64_t>(8 * half) * ones) << (back ? 8 * (8 - count) : 0);
      }
    }
  }
};
alignas(64) constexpr KeptTables kKeptTables;

// From a bitmap, eight columns at a time.
struct MaskTurns {
  static constexpr int kBytes = 16;

  static NM_PIECE void Load(const uint8_t* p, const uint32_t*, Indices& indices) {
    const uint64_t first = Load64(p), second = Load64(p + 8);
    indices.of[0] = TwoBlocks<0>(first);
    indices.of[1] = TwoBlocks<32>(first);
    indices.of[2] = TwoBlocks<0>(second);
    indices.of[3] = TwoBlocks<32>(second);
  }

 private:
  template <int bit>
  static NM_PIECE uint8x16_t TwoBlocks(uint64_t masks) {
    return vorrq_u8(vcombine_u8(Half<0>(masks >> bit), Half<2>(masks >> (bit + 16))),
                    vcombine_u8(Half<1>(masks >> (bit + 8)), Half<3>(masks >> (bit + 24))));
  }
  template <int half>
  static NM_PIECE uint8x8_t Half(uint64_t masks) {
    return vreinterpret_u8_u64(vld1_u64(kKeptTables.kept[half] + (masks & 255)));
  }
};

// From a buffer that one of the others filled, for the end of a row and for more than four activation rows.
struct StoredTurns {
  static constexpr int kBytes = sizeof(Indices);
  static NM_PIECE void Load(const uint8_t* p, const uint32_t*, Indices& indices) {
    for (int i = 0; i < 4; ++i) indices.of[i] = vld1q_u8(p + 16 * i);
  }
};

// Every column has a value.
struct DenseTurns {
  static constexpr int kBytes = 0;
  static NM_PIECE void Load(const uint8_t*, const uint32_t*, Indices&) {}
};

template <class Turns>
NM_LOOP void StoreTurns(const uint8_t* positions, int64_t turns, const uint32_t* table, uint8_t* stored) {
  for (; turns > 0; --turns, positions += Turns::kBytes, stored += StoredTurns::kBytes) {
    Indices indices;
    Turns::Load(positions, table, indices);
    for (int i = 0; i < 4; ++i) vst1q_u8(stored + 16 * i, indices.of[i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The kinds of stored values: 64 of them as signed bytes.

struct Signed {  // unpacked before
  static constexpr int kBytes = 64;
  static NM_PIECE void Load(const uint8_t* v, int8x16_t* w) {
    for (int i = 0; i < 4; ++i) w[i] = vreinterpretq_s8_u8(vld1q_u8(v + 16 * i));
  }
};

struct Int8 {
  static constexpr int kBytes = 64;
  static NM_PIECE void Load(const uint8_t* v, int8x16_t* w) {
    for (int i = 0; i < 4; ++i) w[i] = SignedOfInt8(vld1q_u8(v + 16 * i));
  }
};

struct Int4 {
  static constexpr int kBytes = 32;
  static NM_PIECE void Load(const uint8_t* v, int8x16_t* w) {
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t halves = SignedHalves(v + 16 * i);
      w[i] = LowHalves(halves);
      w[i + 2] = HighHalves(halves);
    }
  }
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_NEON_TURNS_H_
