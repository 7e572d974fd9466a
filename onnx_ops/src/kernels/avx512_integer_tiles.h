// Integer weights times many rows of int8 activations. The weights are unpacked as signed bytes with zeros in the
// pruned columns, and multiplied by AMX tiles, or with their offset by AVX-512's dot products of bytes.
#ifndef NM_KERNELS_AVX512_INTEGER_TILES_H_
#define NM_KERNELS_AVX512_INTEGER_TILES_H_

#include "avx512_integer_weights.h"
#include "avx512_unpacker.h"

namespace nm {
namespace {

constexpr int64_t kStepBytes = 1024;  // 64 columns of 16 outputs or of 16 activation rows
constexpr int64_t kChunkSteps = 8;    // whose weights, 16 KB, stay in the first-level cache for all rows

// Activations: bytes[step][group][column / 4][row][4], scales[group][block][row].
struct PackedTiles {
  int64_t steps;
  int64_t blocks;
  int64_t groups;
  size_t bytes;
  size_t scales;
  size_t
      starts;  // int32 of the scales' shape: −offset times the sum of a row's bytes, which cancels that of the weights
  size_t outliers;
  size_t total;

  PackedTiles(const Layout& l, int64_t rows) {
    const int64_t block = BlockColumns(l);
    steps = Steps(l);
    blocks = (l.in_features + block - 1) / block;
    groups = LaneGroups(rows);
    Parts parts;
    bytes = parts.Take(groups * steps * kStepBytes);
    scales = parts.Take(groups * blocks * kLanes * 4);
    starts = parts.Take(groups * blocks * kLanes * 4);
    outliers = parts.Take(groups * OutlierGroupFloats(l) * 4);
    total = parts.total();
  }
  int64_t ActivationBytes() const { return groups * steps * kStepBytes; }
};

inline size_t PackedTilesBytes(const Layout& l, int64_t rows) { return PackedTiles(l, rows).total; }

// Rows first … first+count-1, a group.
inline void PackGroup(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedTiles p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t group = first / kLanes;
  const int64_t block = BlockColumns(l);
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(static_cast<int>(kLanes)));
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t columns = Min(block, l.in_features - b * block);
    uint8_t* steps = base + p.bytes + (b * block / kStep * p.groups + group) * kStepBytes;
    float* scales = reinterpret_cast<float*>(base + p.scales) + (group * p.blocks + b) * kLanes;
    int32_t* starts = reinterpret_cast<int32_t*>(base + p.starts) + (group * p.blocks + b) * kLanes;
    for (int64_t row = 0; row < kLanes; ++row) {
      alignas(64) uint8_t bytes[256] = {};
      alignas(64) int32_t lanes[16] = {};
      const int offset = l.dtype == NM_INT4 ? 8 : 128;
      scales[row] =
          row < count ? PackInt8Block(a + row * l.in_features + b * block, columns, offset, bytes, lanes) : 0.0f;
      starts[row] = 0;
      for (int32_t lane : lanes) starts[row] += lane;
      for (int64_t i = 0; i * kStep < columns; ++i) {
        const __m512i step = _mm512_load_si512(bytes + i * kStep);
        _mm512_i32scatter_epi32(steps + i * p.groups * kStepBytes + 4 * row, places, step, 4);
      }
    }
  }
  if (l.row_outliers > 0) {
    float* lanes = reinterpret_cast<float*>(base + p.outliers) + group * OutlierGroupFloats(l);
    PackLanes(l, a, count, OutlierColumns(l), lanes);
  }
}

inline TileScratch IntegerTileScratch(const Layout& l, int64_t rows) {
  return {l, rows, {kChunkSteps, kStepBytes, IntegerCopyBytes(l)}};
}
inline size_t IntegerTileScratchBytes(const Layout& l, int64_t rows) { return IntegerTileScratch(l, rows).total; }

// Bytes of 64 columns: q, or q + offset.
template <class Weights, class Rest, bool is_signed>
struct StoredBytes {
  static constexpr int64_t kBytes = kStepBytes;
  using Row = IntegerValues;
  const IntegerReader<Weights, Rest> reader;

  explicit StoredBytes(const Layout& l) : reader(l) {}
  Row Open(int64_t output, uint8_t* copy) const { return reader.Row(output, copy); }
  int64_t WholeSteps() const { return reader.whole_steps; }
  void StoreInPlace(const Row& row, int64_t step, uint64_t mask, uint8_t* to) const {
    StoreStep(reader.LoadInPlace(row, step, mask), to);
  }
  void Store(const Row& row, int64_t step, uint64_t mask, uint8_t* to) const {
    StoreStep(reader.Load(row, step, mask), to);
  }

 private:
  void StoreStep(__m512i w, uint8_t* to) const {
    _mm512_store_si512(to, is_signed ? _mm512_sub_epi8(w, reader.offset) : w);
  }
};
template <class Weights, class Rest>
using SignedBytes = StoredBytes<Weights, Rest, true>;
template <class Weights, class Rest>
using OffsetBytes = StoredBytes<Weights, Rest, false>;

template <int dtype>
bool SupportsTiles(const Layout& l) {
  return Supports<dtype>(l) && l.in_features <= kMostTileColumns;
}

// Calls run with what unpacks an integer weight; Steps<Weights, Rest> stores a step.
template <template <class, class> class Steps, template <Density> class Weights, class Run>
void WithIntegerUnpacker(const Layout& l, const TileScratch& plan, uint8_t* scratch, const Run& run) {
  constexpr Density kHalf = Density::kHalf;
  constexpr Density kGeneral = Density::kGeneral;
  constexpr Density kDense = Density::kDense;
  const Density density = DensityOf(l);
  if (density == kDense) {
    TileUnpacker<Steps<Weights<kDense>, Int8<kDense>>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else if (density == kGeneral) {
    TileUnpacker<Steps<Weights<kGeneral>, Int8<kGeneral>>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else if (ReadsCodes(l, 1)) {
    TileUnpacker<Steps<Weights<kHalf>, Int8<kHalf>>, CodeMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else {
    TileUnpacker<Steps<Weights<kHalf>, Int8<kHalf>>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  }
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_INTEGER_TILES_H_
