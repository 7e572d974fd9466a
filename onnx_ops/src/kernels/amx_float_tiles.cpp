// AMX kernels in float32 arithmetic, of bfloat16 products. Products of terms are exact and summed in float32; an output
// is within 2⁻¹⁷ of Σ|A·W|, the operator's bound being 1e-5, and the errors are as often up as down.
#include "amx_terms.h"

namespace nm {
namespace {

constexpr int64_t kFloatChunkSteps = 16;

// The unpacked weights of a tile and chunk, in `terms` terms, times one or two groups of activation rows. The product
// of a third and a second term, below 2⁻²⁴, is left out.
template <int terms>
class TermProduct {
 public:
  TermProduct(const PackedTerms& packed, const TileScratch& plan, const uint8_t* activations, const uint8_t* scratch)
      : half_step_bytes_(packed.groups * PackedTerms::kBytes),
        steps_(packed.steps),
        band_outputs_(plan.band_outputs),
        activations_(activations + packed.terms),
        weights_(scratch + plan.weights),
        scales_(reinterpret_cast<const float*>(scratch + plan.scales)) {}

  template <int groups>
  void Multiply(const Chunk& chunk, float* sums, Fetcher* fetcher) const {
    LoadTiles<groups>(sums);
    MultiplyHalfSteps<groups>(chunk, 2 * chunk.first_step, 2 * chunk.last_step, fetcher);
    StoreTiles<groups>(sums);
  }

  // block: half steps under one scale.
  template <int groups>
  void MultiplyScaled(const Chunk& chunk, int64_t block, float* sums, Fetcher* fetcher) const {
    alignas(64) float products[groups * kTileSums];
    for (int64_t first = 2 * chunk.first_step; first < 2 * chunk.last_step; first += block) {
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      _tile_zero(7);
      MultiplyHalfSteps<groups>(chunk, first, Min(first + block, 2 * steps_), fetcher);
      StoreTiles<groups>(products);
      const float* scales = scales_ + first / block * band_outputs_ + chunk.output;
      for (int64_t i = 0; i < groups * kTileOutputs; ++i) {
        float* to = sums + i * kLanes;
        const __m512 scale = _mm512_set1_ps(scales[i % kTileOutputs]);
        _mm512_store_ps(to, _mm512_fmadd_ps(scale, _mm512_load_ps(products + i * kLanes), _mm512_load_ps(to)));
      }
    }
  }

 private:
  // Tiles 4 to 7: both halves of the outputs times the first group, then times the second.
  template <int groups>
  static void LoadTiles(const float* sums) {
    _tile_loadd(4, sums, kTileRowBytes);
    _tile_loadd(5, sums + kTileSums / 2, kTileRowBytes);
    if (groups == 2) {
      _tile_loadd(6, sums + kTileSums, kTileRowBytes);
      _tile_loadd(7, sums + kTileSums * 3 / 2, kTileRowBytes);
    }
  }
  template <int groups>
  static void StoreTiles(float* sums) {
    _tile_stored(4, sums, kTileRowBytes);
    _tile_stored(5, sums + kTileSums / 2, kTileRowBytes);
    if (groups == 2) {
      _tile_stored(6, sums + kTileSums, kTileRowBytes);
      _tile_stored(7, sums + kTileSums * 3 / 2, kTileRowBytes);
    }
  }

  template <int groups>
  void MultiplyHalfSteps(const Chunk& chunk, int64_t first, int64_t last, Fetcher* fetcher) const {
    constexpr int64_t kOtherHalf = kFloatChunkSteps * terms * kPairBytes;
    const uint8_t* w = weights_ + (first - 2 * chunk.first_step) * terms * kTileBytes;
    const uint8_t* a = activations_ + first * half_step_bytes_ + chunk.group * PackedTerms::kBytes;
    for (int64_t i = first; i < last; ++i, w += terms * kTileBytes, a += half_step_bytes_) {
      const uint8_t* weight = w;
      for (int term = 0; term < terms; ++term, weight += kTileBytes) {
        _tile_loadd(0, weight, kTileRowBytes);
        _tile_loadd(1, weight + kOtherHalf, kTileRowBytes);
        for (int other = 0; other < kActivationTerms; ++other) {
          if (term + other > 2) break;
          _tile_loadd(2, a + other * kTileBytes, kTileRowBytes);
          _tile_dpbf16ps(4, 0, 2);
          _tile_dpbf16ps(5, 1, 2);
          if (groups == 2) {
            _tile_loadd(3, a + PackedTerms::kBytes + other * kTileBytes, kTileRowBytes);
            _tile_dpbf16ps(6, 0, 3);
            _tile_dpbf16ps(7, 1, 3);
          }
        }
      }
      if (fetcher != nullptr) fetcher->Fetch(8);
    }
  }

  const int64_t half_step_bytes_;
  const int64_t steps_;
  const int64_t band_outputs_;
  const uint8_t* const activations_;
  const uint8_t* const weights_;
  const float* const scales_;
};

template <int dtype>
TileScratch FloatTileScratch(const Layout& l, int64_t rows) {
  const int64_t copy_bytes = IsInteger(dtype) ? kIntegerCopyBytes : kStep * 4;
  return {l, rows, {kFloatChunkSteps, kTerms<dtype> * kPairBytes, copy_bytes}};
}
template <int dtype>
size_t FloatTileScratchBytes(const Layout& l, int64_t rows) {
  return FloatTileScratch<dtype>(l, rows).total;
}

template <int dtype, class Run>
void WithFloatUnpacker(const Layout& l, const TileScratch& plan, uint8_t* scratch, const Run& run) {
  const Density density = DensityOf(l);
  if (density == Density::kDense) {
    TileUnpacker<FloatTerms<dtype, Density::kDense>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else if (density == Density::kGeneral) {
    TileUnpacker<FloatTerms<dtype, Density::kGeneral>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else if (ReadsCodes(l, 1)) {
    TileUnpacker<FloatTerms<dtype, Density::kHalf>, CodeMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  } else {
    TileUnpacker<FloatTerms<dtype, Density::kHalf>, StoredMasks> unpacker(l, plan, scratch);
    run(&unpacker);
  }
}

template <int dtype>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const Tiles tiles(kWholeTiles);
  const PackedTerms p(l, rows);
  const TileScratch plan = FloatTileScratch<dtype>(l, rows);
  const uint8_t* activations = static_cast<const uint8_t*>(packed);
  uint8_t* memory = static_cast<uint8_t*>(scratch);
  const TermProduct<kTerms<dtype>> product(p, plan, activations, memory);
  const int64_t block = BlockColumns(l) / kHalfStep;
  const auto multiply = [&](const Chunk& chunk, int64_t groups, float* sums, Fetcher* fetcher) {
    TileFence();
    if constexpr (dtype == NM_INT8 || dtype == NM_INT4) {
      if (groups == 2) {
        product.template MultiplyScaled<2>(chunk, block, sums, fetcher);
      } else {
        product.template MultiplyScaled<1>(chunk, block, sums, fetcher);
      }
    } else if (groups == 2) {
      product.template Multiply<2>(chunk, sums, fetcher);
    } else {
      product.template Multiply<1>(chunk, sums, fetcher);
    }
  };
  float* sums = reinterpret_cast<float*>(memory + plan.sums);
  const float* outliers = reinterpret_cast<const float*>(activations + p.outliers);
  const TilePlan tile_plan{rows, p.ActivationBytes(), kFloatChunkSteps, 2, outliers, nullptr, sums, false};
  const auto run = [&](auto* unpacker) { TileRun(l, tile_plan, unpacker, multiply).Run(first, last, y, y_stride); };
  if constexpr (dtype == NM_INT8) {
    WithIntegerUnpacker<TermStep, Int8>(l, plan, memory, run);
  } else if constexpr (dtype == NM_INT4) {
    WithIntegerUnpacker<TermStep, Int4>(l, plan, memory, run);
  } else {
    WithFloatUnpacker<dtype>(l, plan, memory, run);
  }
}

template <int dtype>
constexpr Kernel KernelOf(const char* name, int64_t least_rows) {
  return {name,
          Isa::kAmx,
          false,
          least_rows,
          kAny,
          SupportsTiles<dtype>,
          PackedTermsBytes,
          PackTerms,
          FloatTileScratchBytes<dtype>,
          Run<dtype>};
}

constexpr Kernel kKernels[] = {
    KernelOf<NM_FLOAT32>("float32 tiles", 12),
    KernelOf<NM_FLOAT16>("float16 tiles", 9),
    KernelOf<NM_BFLOAT16>("bfloat16 tiles", kLeastTileRows),
    KernelOf<NM_INT8>("int8 tiles", kLeastTileRows),
    KernelOf<NM_INT4>("int4 tiles", kLeastTileRows),
};

}  // namespace

KernelList AmxFloatTiles() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
