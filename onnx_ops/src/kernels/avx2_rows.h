// What the AVX2 kernels for few activation rows share: packed activations and the positions of 128 columns
// as indices of vpshufb. AVX2 cannot expand the weights cheaply, so the kernels compress the activations instead: y = Σ
// values[i] · a[column of i].
#ifndef NM_KERNELS_AVX2_ROWS_H_
#define NM_KERNELS_AVX2_ROWS_H_

#include "avx2_outliers.h"
#include "avx2_positions.h"
#include "kernels.h"
#include "row_turns.h"

namespace nm {
namespace {

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

// A row in order, zeros after it, for the outliers and for weights that are expanded.
inline int64_t NaturalColumns(const Layout& l) { return PaddedColumns(l) + kLargestOutlierBlock; }

inline void PackNatural(const Layout& l, const float* a, float* row) {
  memcpy(row, a, static_cast<size_t>(l.in_features) * sizeof(float));
  memset(row + l.in_features, 0, static_cast<size_t>(NaturalColumns(l) - l.in_features) * sizeof(float));
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_ROWS_H_
