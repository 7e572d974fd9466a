// AMX kernels of integer weights times int8 activations.
#include "amx_tiles.h"
#include "avx512_integer_tiles.h"

namespace nm {
namespace {

// The unpacked weights of a tile and chunk times one or two groups of activation rows.
class TileProduct {
 public:
  static constexpr bool kFetchesColumns = false;

  TileProduct(const Layout& l, const PackedTiles& packed, const TileScratch& plan, const uint8_t* activations,
              const uint8_t* scratch)
      : packed_(packed), block_columns_(BlockColumns(l)), band_outputs_(plan.band_outputs) {
    bytes_ = activations + packed_.bytes;
    row_scales_ = reinterpret_cast<const float*>(activations + packed_.scales);
    weights_ = scratch + plan.weights;
    scales_ = reinterpret_cast<const float*>(scratch + plan.scales);
  }

  // The products of a block are scaled and added while the tiles of the next are multiplied.
  template <int groups>
  void Multiply(const Chunk& chunk, float* sums, Fetcher* fetcher) const {
    TileFence();
    alignas(64) int32_t products[2][groups * kTileSums];
    const int64_t first = chunk.first_step * kStep / block_columns_;
    const int64_t last = (chunk.last_step * kStep + block_columns_ - 1) / block_columns_;
    for (int64_t block = first; block < last; ++block) {
      MultiplyBlock<groups>(chunk, block, fetcher);
      if (block > first) AddProducts<groups>(chunk, block - 1, products[(block - 1) % 2], sums);
      if (fetcher != nullptr) fetcher->Fetch(8);
      StoreProducts<groups>(products[block % 2]);
    }
    AddProducts<groups>(chunk, last - 1, products[(last - 1) % 2], sums);
  }

 private:
  // Tiles 4 to 7: both halves of the outputs times the first group, then times the second.
  template <int groups>
  void MultiplyBlock(const Chunk& chunk, int64_t block, Fetcher* fetcher) const {
    const int64_t stride = packed_.groups * kStepBytes;
    const int64_t column = block * block_columns_;
    const uint8_t* w = weights_ + (column / kStep - chunk.first_step) * kStepBytes + column % kStep;
    const uint8_t* a = bytes_ + packed_.StepOffset(column, chunk.group);
    const int64_t steps = Min(Max(block_columns_ / kStep, 1), packed_.steps - column / kStep);
    _tile_zero(4);
    _tile_zero(5);
    if (groups == 2) {
      _tile_zero(6);
      _tile_zero(7);
    }
    for (int64_t i = 0; i < steps; ++i, w += kStepBytes, a += stride) {
      if (groups == 2) PrefetchTiles(a + kStepsAhead * stride);
      _tile_loadd(0, w, kTileRowBytes);
      _tile_loadd(2, a, kTileRowBytes);
      _tile_dpbssd(4, 0, 2);
      _tile_loadd(1, w + kHalfBytes, kTileRowBytes);
      _tile_dpbssd(5, 1, 2);
      if (groups == 2) {
        _tile_loadd(3, a + kStepBytes, kTileRowBytes);
        _tile_dpbssd(6, 0, 3);
        _tile_dpbssd(7, 1, 3);
      }
      if (fetcher != nullptr) fetcher->Fetch(4);
    }
  }

  // Activations come from the second-level cache, which a tile's load waits for line by line.
  static void PrefetchTiles(const uint8_t* a) {
#pragma GCC unroll 32
    for (int64_t line = 0; line < 2 * kTileBytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(a + line), _MM_HINT_T0);
    }
  }

  template <int groups>
  static void StoreProducts(int32_t* products) {
    _tile_stored(4, products, kTileRowBytes);
    _tile_stored(5, products + 256, kTileRowBytes);
    if (groups == 2) {
      _tile_stored(6, products + 512, kTileRowBytes);
      _tile_stored(7, products + 768, kTileRowBytes);
    }
  }

  template <int groups>
  void AddProducts(const Chunk& chunk, int64_t block, const int32_t* products, float* sums) const {
    const float* weight_scales = scales_ + block * band_outputs_ + chunk.output;
    for (int g = 0; g < groups; ++g, products += kTileSums, sums += kTileSums) {
      const __m512 row_scales = _mm512_load_ps(row_scales_ + ((chunk.group + g) * packed_.blocks + block) * kLanes);
#pragma GCC unroll 4
      for (int64_t o = 0; o < kTileOutputs; ++o) {
        const __m512 scale = _mm512_mul_ps(row_scales, _mm512_set1_ps(weight_scales[o]));
        const __m512 values = _mm512_cvtepi32_ps(_mm512_load_si512(products + o * kLanes));
        _mm512_store_ps(sums + o * kLanes, _mm512_fmadd_ps(values, scale, _mm512_load_ps(sums + o * kLanes)));
      }
    }
  }

  static constexpr int64_t kHalfBytes = kChunkSteps * kStepBytes;  // of 16 outputs
  static constexpr int64_t kStepsAhead = 2;

  const PackedTiles& packed_;
  const int64_t block_columns_;
  const int64_t band_outputs_;
  const uint8_t* bytes_;
  const float* row_scales_;
  const uint8_t* weights_;
  const float* scales_;
};

template <template <Density> class Weights>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const Tiles tiles(BlockColumns(l) < kStep ? kHalfStepTiles : kWholeTiles);
  RunIntegerTiles<SignedStep, Weights, TileProduct>(l, rows, packed, first, last, scratch, y, y_stride);
}

constexpr Kernel kKernels[] = {
    {"int8 tiles, int8 activations", Isa::kAmx, true, kLeastTileRows, kAny, SupportsTiles<NM_INT8>, PackedTilesBytes,
     PackGroup, IntegerTileScratchBytes, Run<Int8>},
    {"int4 tiles, int8 activations", Isa::kAmx, true, kLeastTileRows, kAny, SupportsTiles<NM_INT4>, PackedTilesBytes,
     PackGroup, IntegerTileScratchBytes, Run<Int4>},
};

}  // namespace

KernelList AmxIntegerTiles() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
