// AMX kernels in float32 arithmetic, of bfloat16 products. A number becomes a sum of bfloat16 terms, each the rest of
// those before it rounded to the nearest: a float32 three, a float16 two, a bfloat16 or an int8 one, all exactly; a
// float32 activation two, of which at most 2⁻¹⁷ of it is left. Products of terms are exact and summed in float32. An
// output is within 2⁻¹⁷ of Σ|A·W|, the operator's bound being 1e-5, and the errors are as often up as down.
#include "amx_tiles.h"
#include "avx512_float_weights.h"
#include "avx512_integer_tiles.h"

namespace nm {
namespace {

constexpr int kActivationTerms = 2;
constexpr int64_t kFloatChunkSteps = 16;
constexpr int64_t kPairBytes = 2 * kTileBytes;  // 64 columns of one term of 16 rows or outputs: two tiles

template <int dtype>
constexpr int kTerms = dtype == NM_FLOAT32   ? 3
                       : dtype == NM_FLOAT16 ? 2
                                             : 1;

// Float32 of a vector's halves as bfloat16, to the nearest, and back.
inline __m512i ToBfloat16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline __m512 FromBfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// NaN stays; infinity becomes the largest bfloat16, and is left in the rest.
inline __m512 Finite(__m512 v) {
  const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  const __m512 smallest = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xff7f0000u)));
  return _mm512_min_ps(largest, _mm512_max_ps(smallest, v));
}

// The bfloat16 terms of 32 floats; store(term, bits).
template <int terms, class StoreTerm>
void SplitFloats(__m512 low, __m512 high, const StoreTerm& store) {
  for (int term = 0; term + 1 < terms; ++term) {
    const __m512i bits = ToBfloat16(Finite(low), Finite(high));
    store(term, bits);
    low = _mm512_sub_ps(low, FromBfloat16(_mm512_castsi512_si256(bits)));
    high = _mm512_sub_ps(high, FromBfloat16(_mm512_extracti64x4_epi64(bits, 1)));
  }
  store(terms - 1, ToBfloat16(low, high));
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations: bfloat16[step][half step][group][term][column / 2][row][2].

struct PackedTerms {
  static constexpr int64_t kBytes = kActivationTerms * kTileBytes;  // of half a step of a group
  int64_t steps;
  int64_t groups;
  size_t terms;
  size_t outliers;
  size_t total;

  PackedTerms(const Layout& l, int64_t rows) {
    steps = Steps(l);
    groups = LaneGroups(rows);
    Parts parts;
    terms = parts.Take(ActivationBytes());
    outliers = parts.Take(groups * OutlierGroupFloats(l) * 4);
    total = parts.total();
  }
  int64_t ActivationBytes() const { return 2 * steps * groups * kBytes; }
};

size_t PackedTermsBytes(const Layout& l, int64_t rows) { return PackedTerms(l, rows).total; }

void Pack(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedTerms p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t group = first / kLanes;
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(static_cast<int>(kLanes)));
  uint8_t* to = base + p.terms + group * PackedTerms::kBytes;
  for (int64_t column = 0; column < p.steps * kStep; column += 32, to += p.groups * PackedTerms::kBytes) {
    const int64_t left = l.in_features > column ? l.in_features - column : 0;
    const __mmask16 inside = FirstLanes(left), inside_next = FirstLanes(left > 16 ? left - 16 : 0);
    for (int64_t row = 0; row < kLanes; ++row) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (row < count) {
        low = _mm512_maskz_loadu_ps(inside, a + row * l.in_features + column);
        high = _mm512_maskz_loadu_ps(inside_next, a + row * l.in_features + column + 16);
      }
      SplitFloats<kActivationTerms>(low, high, [&](int term, __m512i bits) {
        _mm512_i32scatter_epi32(to + term * kTileBytes + 4 * row, places, bits, 4);
      });
    }
  }
  if (l.row_outliers > 0) {
    float* lanes = reinterpret_cast<float*>(base + p.outliers) + group * OutlierGroupFloats(l);
    PackLanes(l, a, count, OutlierColumns(l), lanes);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights: bfloat16[half of the outputs][step][half step][term][output][32].

template <int dtype, Density density>
struct FloatTerms {
  static constexpr int kCount = kTerms<dtype>;
  static constexpr int64_t kBytes = kCount * kPairBytes;
  static constexpr int64_t kValueBytes = dtype == NM_FLOAT32 ? 4 : 2;
  struct Row {
    const uint8_t* values;
    const uint8_t* last;  // of the last step, complete
  };
  const Layout& layout;
  const int64_t steps;
  const int64_t step_values;

  explicit FloatTerms(const Layout& l) : layout(l), steps(Steps(l)), step_values(l.dense ? kStep : kStep * l.n / l.m) {}

  int64_t Count() const { return StepValues<density>(step_values); }
  int64_t WholeSteps() const { return steps - 1; }
  const uint8_t* Address(const Row& row, int64_t step) const { return row.values + step * Count() * kValueBytes; }

  Row Open(int64_t output, uint8_t* copy) const {
    const Row row{layout.values + output * layout.value_bytes, copy};
    const int64_t before = (steps - 1) * step_values * kValueBytes;
    memset(copy, 0, static_cast<size_t>(kStep * kValueBytes));
    memcpy(copy, row.values + before, static_cast<size_t>(layout.value_bytes - before));
    return row;
  }
  void StoreInPlace(const Row& row, int64_t step, uint64_t mask, uint8_t* to) const {
    StoreStep(Address(row, step), mask, to);
  }
  void Store(const Row& row, int64_t step, uint64_t mask, uint8_t* to) const {
    StoreStep(step == steps - 1 ? row.last : Address(row, step), mask, to);
  }

 private:
  void StoreStep(const uint8_t* v, uint64_t mask, uint8_t* to) const {
    int64_t values = Count();
    for (int half = 0; half < 2; ++half, mask >>= 32, to += kCount * kTileBytes) {
      const auto store = [&](int term, __m512i bits) { _mm512_store_si512(to + term * kTileBytes, bits); };
      if constexpr (dtype == NM_FLOAT32) {
        const __m512 low = ExpandNext<density>(&v, mask, &values);
        const __m512 high = ExpandNext<density>(&v, mask >> 16, &values);
        SplitFloats<kCount>(low, high, store);
      } else {
        const __m512i bits = Expand16<density>(v + half * Count(), mask, Count() / 2);  // Count()/2 of 2 bytes
        if constexpr (dtype == NM_BFLOAT16) {
          store(0, bits);
        } else {
          SplitFloats<kCount>(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                              _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), store);
        }
      }
    }
  }
};

// Integers without their scales.
template <class Weights, class Rest>
struct IntegerTerms {
  static constexpr int64_t kBytes = kPairBytes;
  using Row = IntegerValues;
  const IntegerReader<Weights, Rest> reader;

  explicit IntegerTerms(const Layout& l) : reader(l) {}
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
    const __m512i q = _mm512_sub_epi8(w, reader.offset);
    StoreHalf(_mm512_castsi512_si256(q), to);
    StoreHalf(_mm512_extracti64x4_epi64(q, 1), to + kTileBytes);
  }
  static void StoreHalf(__m256i q, uint8_t* to) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
    _mm512_store_si512(to, ToBfloat16(low, high));
  }
};

// ---------------------------------------------------------------------------------------------------------------------

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
    MultiplySteps<groups>(chunk, chunk.first_step, chunk.last_step, fetcher);
    StoreTiles<groups>(sums);
  }

  // block_steps: under one scale.
  template <int groups>
  void MultiplyScaled(const Chunk& chunk, int64_t block_steps, float* sums, Fetcher* fetcher) const {
    alignas(64) float products[groups * kTileSums];
    for (int64_t step = chunk.first_step; step < chunk.last_step; step += block_steps) {
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      _tile_zero(7);
      MultiplySteps<groups>(chunk, step, Min(step + block_steps, steps_), fetcher);
      StoreTiles<groups>(products);
      const float* scales = scales_ + step / block_steps * band_outputs_ + chunk.output;
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
  void MultiplySteps(const Chunk& chunk, int64_t first_step, int64_t last_step, Fetcher* fetcher) const {
    constexpr int64_t kOtherHalf = kFloatChunkSteps * terms * kPairBytes;
    const uint8_t* w = weights_ + (first_step - chunk.first_step) * terms * kPairBytes;
    const uint8_t* a = activations_ + 2 * first_step * half_step_bytes_ + chunk.group * PackedTerms::kBytes;
    for (int64_t i = 2 * first_step; i < 2 * last_step; ++i, w += terms * kTileBytes, a += half_step_bytes_) {
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
  const int64_t copy_bytes = IsInteger(dtype) ? IntegerCopyBytes(l) : kStep * 4;
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
  const WholeTiles tiles;
  const PackedTerms p(l, rows);
  const TileScratch plan = FloatTileScratch<dtype>(l, rows);
  const uint8_t* activations = static_cast<const uint8_t*>(packed);
  uint8_t* memory = static_cast<uint8_t*>(scratch);
  const TermProduct<kTerms<dtype>> product(p, plan, activations, memory);
  const int64_t block_steps = BlockColumns(l) / kStep;
  const auto multiply = [&](const Chunk& chunk, int64_t groups, float* sums, Fetcher* fetcher) {
    TileFence();
    if constexpr (dtype == NM_INT8 || dtype == NM_INT4) {
      if (groups == 2) {
        product.template MultiplyScaled<2>(chunk, block_steps, sums, fetcher);
      } else {
        product.template MultiplyScaled<1>(chunk, block_steps, sums, fetcher);
      }
    } else if (groups == 2) {
      product.template Multiply<2>(chunk, sums, fetcher);
    } else {
      product.template Multiply<1>(chunk, sums, fetcher);
    }
  };
  float* sums = reinterpret_cast<float*>(memory + plan.sums);
  const float* outliers = reinterpret_cast<const float*>(activations + p.outliers);
  const auto run = [&](auto* unpacker) {
    const TileRun tile_run(l, rows, p.ActivationBytes(), kFloatChunkSteps, unpacker, outliers, sums, multiply);
    tile_run.Run(first, last, y, y_stride);
  };
  if constexpr (dtype == NM_INT8) {
    WithIntegerUnpacker<IntegerTerms, Int8>(l, plan, memory, run);
  } else if constexpr (dtype == NM_INT4) {
    WithIntegerUnpacker<IntegerTerms, Int4>(l, plan, memory, run);
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
          Pack,
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
