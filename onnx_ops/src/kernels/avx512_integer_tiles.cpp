// AVX-512 kernels of integer weights for many rows of int8 activations: four weights of an output in every lane, times
// four columns of sixteen activation rows.
#include "avx512_integer_tiles.h"

namespace nm {
namespace {

constexpr int64_t kLeastRows = 9;  // with fewer, kernels for few rows are faster
constexpr int kSums = 16;          // in registers: of eight outputs and two groups of rows, or of sixteen and one

// The unpacked weights of a tile and chunk times one or two groups of activation rows.
class DotProduct {
 public:
  static constexpr bool kFetchesColumns = true;

  DotProduct(const Layout& l, const PackedTiles& packed, const TileScratch& plan, const uint8_t* activations,
             const uint8_t* scratch)
      : packed_(packed),
        block_columns_(BlockColumns(l)),
        band_outputs_(plan.band_outputs),
        bytes_(activations + packed.bytes),
        row_scales_(reinterpret_cast<const float*>(activations + packed.scales)),
        starts_(reinterpret_cast<const int32_t*>(activations + packed.starts)),
        weights_(scratch + plan.weights),
        scales_(reinterpret_cast<const float*>(scratch + plan.scales)) {}

  template <int groups>
  void Multiply(const Chunk& chunk, float* sums, Fetcher* fetcher) const {
    const int64_t last = chunk.last_step * kStep;
    for (int64_t column = chunk.first_step * kStep; column < last; column += block_columns_) {
      for (int64_t output = 0; output < kTileOutputs; output += kSums / groups) {
        MultiplyBlock<groups>(chunk, column, Min(column + block_columns_, last), output, sums);
        if (fetcher != nullptr) fetcher->Fetch(8 / groups);
      }
    }
  }

 private:
  // Not inlined: in a larger function GCC 12 keeps the sums in memory.
  template <int groups>
  __attribute__((noinline)) void MultiplyBlock(const Chunk& chunk, int64_t column, int64_t last_column, int64_t output,
                                               float* sums) const {
    constexpr int kOutputs = kSums / groups;
    const int64_t block = column / block_columns_;
    const int64_t lanes = (chunk.group * packed_.blocks + block) * kLanes;
    const int64_t next_group = packed_.blocks * kLanes;
    __m512i products[groups][kOutputs];
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      const __m512i start = _mm512_load_si512(starts_ + lanes + g * next_group);
#pragma GCC unroll 16
      for (int o = 0; o < kOutputs; ++o) products[g][o] = start;
    }
    const uint8_t* w = weights_ + output / kLanes * kChunkSteps * kStepBytes +
                       (column / kStep - chunk.first_step) * kStepBytes + column % kStep + output % kLanes * kStep;
    const uint8_t* a = bytes_ + packed_.StepOffset(column, chunk.group);
    for (; column < last_column; column += kStep, w += kStepBytes, a += packed_.groups * kStepBytes) {
      const int64_t columns_here = Min(kStep, last_column - column);
      for (int64_t i = 0; i < columns_here; i += 4) {
        __m512i columns[groups];
#pragma GCC unroll 2
        for (int g = 0; g < groups; ++g) columns[g] = _mm512_load_si512(a + g * kStepBytes + i * kLanes);
#pragma GCC unroll 16
        for (int o = 0; o < kOutputs; ++o) {
          int32_t four;
          memcpy(&four, w + o * kStep + i, sizeof(four));
          const __m512i weights = _mm512_set1_epi32(four);
#pragma GCC unroll 2
          for (int g = 0; g < groups; ++g) {
            products[g][o] = _mm512_dpbusd_epi32(products[g][o], weights, columns[g]);
            asm("" : "+v"(products[g][o]));  // or GCC 12 keeps a second copy of every sum, and moves them to and fro
          }
        }
      }
    }
    const float* weight_scales = scales_ + block * band_outputs_ + chunk.output + output;
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      const __m512 row_scales = _mm512_load_ps(row_scales_ + lanes + g * next_group);
      float* to = sums + g * kTileSums + output * kLanes;
#pragma GCC unroll 16
      for (int o = 0; o < kOutputs; ++o, to += kLanes) {
        const __m512 scale = _mm512_mul_ps(row_scales, _mm512_set1_ps(weight_scales[o]));
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[g][o]), scale, _mm512_load_ps(to)));
      }
    }
  }

  const PackedTiles& packed_;
  const int64_t block_columns_;
  const int64_t band_outputs_;
  const uint8_t* const bytes_;
  const float* const row_scales_;
  const int32_t* const starts_;
  const uint8_t* const weights_;
  const float* const scales_;
};

constexpr Kernel kKernels[] = {
    {"int8 tiles, int8 activations", Isa::kAvx512, true, kLeastRows, kAny, SupportsTiles<NM_INT8>, PackedTilesBytes,
     PackGroup, IntegerTileScratchBytes, RunIntegerTiles<OffsetStep, Int8, DotProduct>},
    {"int4 tiles, int8 activations", Isa::kAvx512, true, kLeastRows, kAny, SupportsTiles<NM_INT4>, PackedTilesBytes,
     PackGroup, IntegerTileScratchBytes, RunIntegerTiles<OffsetStep, Int4, DotProduct>},
};

}  // namespace

KernelList Avx512IntegerTiles() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
