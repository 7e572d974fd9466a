// Pieces shared by the AVX-512 kernels. Everything is in an anonymous namespace and free of the standard library: no
// function compiled for AVX-512 may be merged with one that a lesser processor runs.
#ifndef NM_KERNELS_AVX512_COMMON_H_
#define NM_KERNELS_AVX512_COMMON_H_

#include <immintrin.h>
#include <string.h>

#include "layout.h"
#include "positions.h"

namespace nm {
namespace {

constexpr int64_t kStep = 64;  // columns of one step: a 64-bit mask, one vector of bytes
// Bytes ahead in each stream.
constexpr int64_t kPrefetch = 2048;
// Of values, but for int4 of which half is kept: into the second-level cache, which can wait for three times as many
// lines as the first, and from there. It makes rows of 16-bit values a tenth faster where they wait for memory, dense
// int4 a fifth, and that one slower.
constexpr int64_t kFarPrefetch = 6144;
constexpr int64_t kNearPrefetch = 512;

inline int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t Max(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t Steps(const Layout& l) { return (l.in_features + kStep - 1) / kStep; }
inline __mmask64 LowMask(int64_t count) { return count >= 64 ? ~uint64_t{0} : _bzhi_u64(~uint64_t{0}, count); }

inline void Prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetch), _MM_HINT_T0); }
inline void PrefetchFar(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kFarPrefetch), _MM_HINT_T1);
}

template <int64_t bytes>
inline void PrefetchLines(const uint8_t* p, int64_t far) {
  _mm_prefetch(reinterpret_cast<const char*>(p + far), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p + kNearPrefetch), _MM_HINT_T0);
  if constexpr (bytes > 64) PrefetchLines<bytes - 64>(p + 64, far);
}

inline uint64_t Load64(const uint8_t* p) {
  uint64_t value;
  memcpy(&value, p, sizeof(value));
  return value;
}

inline __m512 HalvesToFloats(const uint8_t* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(LowMask(count)), p));
}

inline float Sum(__m512 v) { return _mm512_reduce_add_ps(v); }

// Four neighbouring fields of kBits bits, 0 for `bits` of them, as one 64-bit mask. Scalar loads from the table, which
// fits the first-level cache, beat gathers and every vector form of the unpacking that was tried (docs/kernels.md).
template <int kBits>
inline uint64_t MaskOfFields(const uint16_t* table, uint64_t fields, int bits) {
  const int width = kBits > 0 ? kBits : bits;
  const uint64_t keep = (uint64_t{1} << width) - 1;
  const uint64_t first = table[fields & keep];
  const uint64_t second = table[fields >> width & keep];
  const uint64_t third = table[fields >> (2 * width) & keep];
  const uint64_t fourth = table[fields >> (3 * width) & keep];
  return first | second << 16 | third << 32 | fourth << 48;
}

// Zero behind the compiler's back. vpexpand with zero masking still waits for the old value of its destination (seen on
// Zen 4: a factor of two for a whole kernel); merging into a register that was just cleared does not.
inline __m512i FreshZero() {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  return zero;
}

inline __m512 ExpandFloats(__mmask16 mask, __m512 values) {
  return _mm512_mask_expand_ps(_mm512_castsi512_ps(FreshZero()), mask, values);
}

inline __m512i ExpandWords(__mmask32 mask, __m512i values) {
  return _mm512_mask_expand_epi16(FreshZero(), mask, values);
}

// Up to 8 bytes, zero-extended.
inline uint64_t LoadPartial(const uint8_t* p, int64_t bytes) {
  return static_cast<uint64_t>(
      _mm_cvtsi128_si64(_mm_maskz_loadu_epi8(static_cast<__mmask16>(LowMask(bytes < 8 ? bytes : 8)), p)));
}

// Masks of sixteen 32-wide groups from their codes, one group a lane: column by column from the highest, a group that
// has `left` columns to place takes this one when its rank is at least C(column, left).
inline __m512i UnrankWide(__m512i codes, int n) {
  __m512i left = _mm512_set1_epi32(n);
  __m512i masks = _mm512_setzero_si512();
  const __m512i one = _mm512_set1_epi32(1);
  const uint32_t* thresholds = WideThresholds();
  for (int column = 31; column >= 0; --column) {
    const uint32_t* row = thresholds + 32 * column;
    const __m512i below = _mm512_permutex2var_epi32(_mm512_load_si512(row), left, _mm512_load_si512(row + 16));
    const __mmask16 take = _mm512_cmpge_epu32_mask(codes, below);
    codes = _mm512_mask_sub_epi32(codes, take, codes, below);
    left = _mm512_mask_sub_epi32(left, take, left, one);
    masks = _mm512_mask_or_epi32(masks, take, masks, _mm512_set1_epi32(static_cast<int>(uint32_t{1} << column)));
  }
  return masks;
}

// Masks of an output row as the kernels read them, one 64-column step at a time; `last_step` is the first that cannot
// be read in place, the number of steps where all can. Nothing is read before it is asked for: a row's end is not in
// the cache when its beginning is multiplied. From memory …
struct StoredMasks {
  static constexpr bool kStored = true;
  const uint8_t* masks;
  int64_t bytes;
  uint64_t last_columns;
  int64_t last_step;

  uint64_t Step(int64_t step) const { return step == last_step ? LastStep(step) : PlainStep(step); }
  uint64_t PlainStep(int64_t step) const { return Load64(masks + 8 * step); }
  uint64_t LastStep(int64_t step) const {
    const int64_t left = bytes - 8 * step;
    return (left >= 8 ? PlainStep(step) : LoadPartial(masks + 8 * step, left)) & last_columns;
  }
  const uint8_t* Address(int64_t step) const { return masks + 8 * step; }
  void PrefetchStep(int64_t step) const {
    if (step % 4 == 0) Prefetch(Address(step));
  }
};

// … or straight from the 14-bit codes of 8:16, which spares a pass over the row where every mask is used once.
struct CodeMasks {
  static constexpr bool kStored = false;
  const uint8_t* codes;
  int64_t bytes;
  const uint16_t* table;
  uint64_t last_columns;
  int64_t last_step;

  uint64_t Step(int64_t step) const { return step == last_step ? LastStep(step) : PlainStep(step); }
  // The last step has at least two bytes, so 8 bytes can be read at every other one.
  uint64_t PlainStep(int64_t step) const { return MaskOfFields<14>(table, Load64(codes + 7 * step), 14); }
  uint64_t LastStep(int64_t step) const {
    const uint64_t fields = LoadPartial(codes + 7 * step, bytes - 7 * step);
    return MaskOfFields<14>(table, fields & ((uint64_t{1} << 56) - 1), 14) & last_columns;
  }
  const uint8_t* Address(int64_t step) const { return codes + 7 * step; }
  void PrefetchStep(int64_t step) const {
    if (step % 4 == 0) Prefetch(Address(step));
  }
};

// Finds the masks of output rows. Columns from groups·m on are clear in the last mask.
class MaskReader {
 public:
  explicit MaskReader(const Layout& l) : layout_(l), table_{} {
    if (!l.dense && !l.bitmap && l.m != 32) table_ = GetFieldTable(l.n, l.m);
    steps_ = Steps(l);
    last_columns_ = LowMask(l.groups * l.m - (steps_ - 1) * kStep);
    whole_ = last_columns_ == ~uint64_t{0};
  }

  static size_t ScratchBytes(const Layout& l) { return static_cast<size_t>(RoundUp(l.in_features, 512) / 8 + 64); }

  // A bitmap is used where it is; codes are written to scratch as masks, or have been. Dense rows have no masks.
  StoredMasks Stored(int64_t output, uint8_t* scratch, bool decode = true) const {
    const Layout& l = layout_;
    if (l.dense) return {scratch, 8 * steps_, ~uint64_t{0}, steps_};  // nobody asks which columns are kept
    const uint8_t* row = l.positions + output * l.position_bytes;
    if (l.bitmap) {
      const bool in_place = whole_ && l.position_bytes == 8 * steps_;
      return {row, l.position_bytes, last_columns_, in_place ? steps_ : steps_ - 1};
    }
    if (decode && l.m == 32) DecodeWide(row, scratch);
    if (decode && l.m != 32) DecodeFields(row, scratch);
    return {scratch, 8 * steps_, last_columns_, steps_ - 1};
  }

  // For 8:16 in codes.
  CodeMasks Codes(int64_t output) const {
    const uint8_t* row = layout_.positions + output * layout_.position_bytes;
    return {row, layout_.position_bytes, table_.masks, last_columns_, steps_ - 1};
  }

 private:
  void DecodeFields(const uint8_t* row, uint8_t* scratch) const {
    const int64_t bytes = layout_.position_bytes;
    const int bits = table_.field_bits;
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t first_bit = step * 4 * bits;
      const int64_t byte = first_bit / 8;
      if (step % 8 == 0) Prefetch(row + byte);
      const uint64_t word = byte + 8 <= bytes ? Load64(row + byte) : LoadPartial(row + byte, bytes - byte);
      const uint64_t mask = bits == 14 ? MaskOfFields<14>(table_.masks, word >> (first_bit % 8), 14)
                                       : MaskOfFields<0>(table_.masks, word >> (first_bit % 8), bits);
      memcpy(scratch + 8 * step, &mask, sizeof(mask));
    }
  }

  void DecodeWide(const uint8_t* row, uint8_t* scratch) const {
    const Layout& l = layout_;
    for (int64_t group = 0; group < l.groups; group += 16) {
      alignas(64) uint32_t codes[16];
      for (int64_t i = 0; i < 16; ++i) {
        codes[i] = ReadBits(row, l.position_bytes, (group + i) * l.code_bits, l.code_bits);
      }
      _mm512_storeu_si512(scratch + group * 4, UnrankWide(_mm512_load_si512(codes), l.n));
    }
  }

  const Layout& layout_;
  FieldTable table_;
  int64_t steps_;
  uint64_t last_columns_;
  bool whole_;  // the last step has groups for all its columns
};

// The last chunk of an int4 row, from value `first` on, which is not a whole one: one value a byte.
inline void UnpackInt4Tail(const Layout& l, const uint8_t* values, int64_t first, uint8_t* bytes) {
  const int64_t half = (l.row_values - first + 1) / 2;
  const __m512i packed = _mm512_maskz_loadu_epi8(LowMask(half), values + first / 2);
  const __m512i low_bits = _mm512_set1_epi8(15);
  _mm512_storeu_si512(bytes, _mm512_and_si512(packed, low_bits));
  _mm512_storeu_si512(bytes + half, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_bits));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_COMMON_H_
