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
    steps = Steps(l);
    blocks = BlockCount(l);
    groups = LaneGroups(rows);
    Parts parts;
    bytes = parts.Take(groups * steps * kStepBytes);
    scales = parts.Take(groups * blocks * kLanes * 4);
    starts = parts.Take(groups * blocks * kLanes * 4);
    outliers = parts.Take(groups * OutlierGroupFloats(l) * 4);
    total = parts.total();
  }
  int64_t ActivationBytes() const { return groups * steps * kStepBytes; }
  // Of `bytes`, in a group: a multiple of four columns.
  int64_t StepOffset(int64_t column, int64_t group) const {
    return (column / kStep * groups + group) * kStepBytes + column % kStep * kLanes;
  }
};

inline size_t PackedTilesBytes(const Layout& l, int64_t rows) { return PackedTiles(l, rows).total; }

// Rows first … first+count-1, a group.
inline void PackGroup(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedTiles p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t group = first / kLanes;
  const int64_t block = BlockColumns(l);
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t first_column = b * block;
    const int64_t columns = Min(block, p.steps * kStep - first_column);
    const int64_t inside = Max(0, Min(columns, l.in_features - first_column));
    uint8_t* steps = base + p.bytes + p.StepOffset(first_column, group);
    float* scales = reinterpret_cast<float*>(base + p.scales) + (group * p.blocks + b) * kLanes;
    int32_t* starts = reinterpret_cast<int32_t*>(base + p.starts) + (group * p.blocks + b) * kLanes;
    for (int64_t row = 0; row < kLanes; ++row) {
      alignas(64) uint8_t bytes[256] = {};
      alignas(64) int32_t lanes[16] = {};
      const int offset = l.dtype == NM_INT4 ? 8 : 128;
      const float* from = a + row * l.in_features + first_column;
      scales[row] = row < count ? PackInt8Block(from, inside, columns, offset, bytes, lanes) : 0.0f;
      starts[row] = 0;
      for (int32_t lane : lanes) starts[row] += lane;
      for (int64_t i = 0; i * kStep < columns; ++i) {
        const __m512i parts = _mm512_load_si512(bytes + i * kStep);
        StoreToLane(parts, row, steps + i * p.groups * kStepBytes, Min(columns / 4, kLanes));
      }
    }
  }
  if (l.row_outliers > 0) {
    float* lanes = reinterpret_cast<float*>(base + p.outliers) + group * OutlierGroupFloats(l);
    PackLanes(l, a, count, OutlierColumns(l), lanes);
  }
}

inline TileScratch IntegerTileScratch(const Layout& l, int64_t rows) {
  return {l, rows, {kChunkSteps, kStepBytes, kIntegerCopyBytes}};
}
inline size_t IntegerTileScratchBytes(const Layout& l, int64_t rows) { return IntegerTileScratch(l, rows).total; }

// Integer weights a step at a time: Step::Store(w, offset, to) stores 64 columns, given as q + offset.
template <class Weights, class Rest, class Step>
struct IntegerSteps {
  static constexpr int64_t kBytes = Step::kBytes;
  using Row = IntegerValues;
  const IntegerReader<Weights, Rest> reader;

  explicit IntegerSteps(const Layout& l) : reader(l) {}
  Row Open(int64_t output, uint8_t* copy) const { return reader.Row(output, copy); }
  int64_t WholeSteps() const { return reader.whole_steps; }
  void StoreInPlace(const Row& row, int64_t step, uint64_t mask, uint8_t* to) const {
    Step::Store(reader.LoadInPlace(row, step, mask), reader.offset, to);
  }
  void Store(const Row& row, int64_t step, uint64_t mask, uint8_t* to) const {
    Step::Store(reader.Load(row, step, mask), reader.offset, to);
  }
};

struct SignedStep {
  static constexpr int64_t kBytes = kStepBytes;
  static void Store(__m512i w, __m512i offset, uint8_t* to) { _mm512_store_si512(to, _mm512_sub_epi8(w, offset)); }
};
struct OffsetStep {
  static constexpr int64_t kBytes = kStepBytes;
  static void Store(__m512i w, __m512i, uint8_t* to) { _mm512_store_si512(to, w); }
};

template <int dtype>
bool SupportsTiles(const Layout& l) {
  return Supports<dtype>(l) && l.in_features <= kMostTileColumns;
}

// Calls run with what unpacks an integer weight, in steps as Step stores them.
template <class Step, template <Density> class Weights, class Run>
void WithIntegerUnpacker(const Layout& l, const TileScratch& plan, uint8_t* scratch, const Run& run) {
  constexpr Density kHalf = Density::kHalf;
  constexpr Density kGeneral = Density::kGeneral;
  constexpr Density kDense = Density::kDense;
  const Density density = DensityOf(l);
  if (density == kDense) {
    TileUnpacker<IntegerSteps<Weights<kDense>, Int8<kDense>, Step>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else if (density == kGeneral) {
    TileUnpacker<IntegerSteps<Weights<kGeneral>, Int8<kGeneral>, Step>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else if (ReadsCodes(l, 1)) {
    TileUnpacker<IntegerSteps<Weights<kHalf>, Int8<kHalf>, Step>, CodeMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else {
    TileUnpacker<IntegerSteps<Weights<kHalf>, Int8<kHalf>, Step>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  }
}

// Kernel::run of int8 activations. Product::Multiply<groups>(chunk, sums, fetcher) multiplies by one or two groups.
template <class Step, template <Density> class Weights, class Product>
void RunIntegerTiles(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
                     float* y, int64_t y_stride) {
  const PackedTiles p(l, rows);
  const TileScratch plan = IntegerTileScratch(l, rows);
  const uint8_t* activations = static_cast<const uint8_t*>(packed);
  uint8_t* memory = static_cast<uint8_t*>(scratch);
  const Product product(l, p, plan, activations, memory);
  const auto multiply = [&](const Chunk& chunk, int64_t groups, float* sums, Fetcher* fetcher) {
    if (groups == 2) {
      product.template Multiply<2>(chunk, sums, fetcher);
    } else {
      product.template Multiply<1>(chunk, sums, fetcher);
    }
  };
  float* sums = reinterpret_cast<float*>(memory + plan.sums);
  const float* outliers = reinterpret_cast<const float*>(activations + p.outliers);
  const TilePlan tile_plan{rows, p.ActivationBytes(),     kChunkSteps, 2, outliers, nullptr,
                           sums, Product::kFetchesColumns};
  WithIntegerUnpacker<Step, Weights>(l, plan, memory, [&](auto* unpacker) {
    TileRun(l, tile_plan, unpacker, multiply).Run(first, last, y, y_stride);
  });
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_INTEGER_TILES_H_
