// AVX-512 kernels of integer weights for few activation rows. Pruned columns become the offset, so that one precomputed
// sum of activations cancels it everywhere.
#include "avx512_integer_weights.h"
#include "kernels.h"

namespace nm {
namespace {

struct BytesDot {  // int8 activations
  using Sum = __m512i;
  static constexpr bool kInt8Activations = true;
  const uint8_t* a;
  int64_t a_stride;
  const int32_t* starts;
  int64_t starts_stride;
  const float* scales;
  int64_t scales_stride;

  BytesDot(const PackedRows& p, const uint8_t* packed, int64_t row)
      : a(packed + p.bytes + row * p.columns),
        a_stride(p.columns),
        starts(reinterpret_cast<const int32_t*>(packed + p.starts) + row * p.blocks * 16),
        starts_stride(p.blocks * 16),
        scales(reinterpret_cast<const float*>(packed + p.scales) + row * RoundUp(p.blocks, 16)),
        scales_stride(RoundUp(p.blocks, 16)) {}

  // Weight scales of a row times the scales of R activation rows.
  template <int R>
  void ScaleProducts(const float* weight_scales, int64_t blocks, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) {
      for (int64_t b = 0; b < blocks; b += 16) {
        const __m512 product =
            _mm512_mul_ps(_mm512_load_ps(weight_scales + b), _mm512_load_ps(scales + r * scales_stride + b));
        _mm512_store_ps(products + r * stride + b, product);
      }
    }
  }

  Sum Start(int r, int64_t block) const { return _mm512_load_si512(starts + r * starts_stride + 16 * block); }
  template <int R>
  void Step(__m512i w, __m512i, int64_t step, Sum (&sums)[R]) const {
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_load_si512(a + r * a_stride + kStep * step));
    }
  }
  static __m512 Value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

struct FloatsDot {  // float32 activations, every fourth column in one vector
  using Sum = __m512;
  static constexpr bool kInt8Activations = false;
  const float* a;
  int64_t a_stride;

  FloatsDot(const PackedRows& p, const uint8_t* packed, int64_t row)
      : a(reinterpret_cast<const float*>(packed + p.ordered) + row * p.columns), a_stride(p.columns) {}

  template <int R>
  void ScaleProducts(const float* weight_scales, int64_t blocks, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) memcpy(products + r * stride, weight_scales, static_cast<size_t>(blocks) * 4);
  }

  Sum Start(int, int64_t) const { return _mm512_setzero_ps(); }
  template <int R>
  void Step(__m512i w, __m512i offset, int64_t step, Sum (&sums)[R]) const {
    const __m512i q = _mm512_sub_epi8(w, offset);
    const __m512i first = _mm512_slli_epi32(q, 24);
    const __m512i tops[4] = {first, _mm512_slli_epi32(q, 16), _mm512_slli_epi32(q, 8), q};
    for (int j = 0; j < 4; ++j) {
      const __m512 values = _mm512_cvtepi32_ps(_mm512_srai_epi32(tops[j], 24));
      for (int r = 0; r < R; ++r) {
        sums[r] = _mm512_fmadd_ps(values, _mm512_load_ps(a + r * a_stride + kStep * step + 16 * j), sums[r]);
      }
    }
  }
  static __m512 Value(Sum sum) { return sum; }
};

// One output row times R activation rows.
template <class Weights, class Rest, class Masks>
struct IntegerRow {
  const IntegerReader<Weights, Rest>& reader;
  IntegerValues values;
  Masks masks;

  // kBlockSteps: steps of a block, 0 for block_steps of them. scales[r · scales_stride + block].
  template <int R, int kBlockSteps, class Dot>
  void Multiply(const Dot& dot, int64_t block_steps, const float* scales, int64_t scales_stride, float* sums) const {
    __m512 totals[R];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    const int64_t per_block = kBlockSteps > 0 ? kBlockSteps : block_steps;
    const int64_t plain_blocks = Min(reader.whole_steps, masks.last_step) / per_block;
    const int64_t blocks = (reader.steps + per_block - 1) / per_block;
    const auto add = [&](const typename Dot::Sum(&block)[R], int64_t b) {
      for (int r = 0; r < R; ++r) {
        totals[r] = _mm512_fmadd_ps(Dot::Value(block[r]), _mm512_set1_ps(scales[r * scales_stride + b]), totals[r]);
      }
    };
    for (int64_t b = 0; b < plain_blocks; ++b) {
      typename Dot::Sum block[R];
      for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      if constexpr (kBlockSteps > 0) {
        AddPlainBlock<R, kBlockSteps>(dot, b, block);
      } else {
        for (int64_t step = b * per_block; step < (b + 1) * per_block; ++step) {
          masks.PrefetchStep(step);
          if (step % 2 == 0) Prefetch(reader.Address(values, step));
          const __m512i w = reader.LoadInPlace(values, step, masks.PlainStep(step));
          dot.template Step<R>(w, reader.offset, step, block);
        }
      }
      add(block, b);
    }
    for (int64_t b = plain_blocks; b < blocks; ++b) {
      typename Dot::Sum block[R];
      for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      for (int64_t step = b * per_block; step < Min((b + 1) * per_block, reader.steps); ++step) {
        dot.template Step<R>(reader.Load(values, step, masks.Step(step)), reader.offset, step, block);
      }
      add(block, b);
    }
    for (int r = 0; r < R; ++r) sums[r] = Sum(totals[r]);
  }

  // An even number of steps, each at a place known from that of the block: of all instructions half would be for
  // addresses otherwise.
  template <int R, int kBlockSteps, class Dot>
  void AddPlainBlock(const Dot& dot, int64_t b, typename Dot::Sum (&block)[R]) const {
    static_assert(kBlockSteps % 2 == 0, "a pair of steps shares its bytes");
    const uint8_t* block_values = reader.Address(values, b * kBlockSteps);
    Prefetch(masks.Address(b * kBlockSteps));
    for (int i = 0; i < kBlockSteps; ++i) {
      if (i % 2 == 0) Prefetch(reader.Address({block_values, nullptr}, i));
      const __m512i w = reader.LoadInPlace({block_values, nullptr}, i, masks.PlainStep(b * kBlockSteps + i));
      dot.template Step<R>(w, reader.offset, b * kBlockSteps + i, block);
    }
  }
};

struct IntegerScratch {
  size_t masks;
  size_t scales;    // float32 a block
  size_t products;  // float32 a block for four activation rows
  size_t copy;      // of values
  size_t total;

  explicit IntegerScratch(const Layout& l) {
    const int64_t blocks = RoundUp(l.in_features, kStep) / kStep + 16;
    Parts parts;
    masks = parts.Take(static_cast<int64_t>(MaskReader::ScratchBytes(l)));
    scales = parts.Take(blocks * 4);
    products = parts.Take(4 * RoundUp(blocks * 4, 64));
    copy = parts.Take(IntegerCopyBytes(l));
    total = parts.total();
  }
};

template <class Weights, class Rest, class Dot, class Masks>
void IntegerOutputs(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
                    float* y, int64_t y_stride) {
  const PackedRows p = PlanRows(l, rows, Dot::kInt8Activations);
  const IntegerScratch plan(l);
  const MaskReader masks(l);
  const IntegerReader<Weights, Rest> reader(l);
  float* scales = reinterpret_cast<float*>(scratch + plan.scales);
  float* products = reinterpret_cast<float*>(scratch + plan.products);
  const int64_t block_steps = BlockColumns(l) / kStep;
  const int64_t scales_stride = RoundUp(p.blocks, 16);
  for (int64_t output = first; output < last; ++output) {
    BlockScales(l, output, scales);
    const IntegerRow<Weights, Rest, Masks> row{reader, reader.Row(output, scratch + plan.copy),
                                               MasksOf<Masks>(masks, output, scratch + plan.masks)};
    ForRows(rows, [&](auto count, int64_t r) {
      constexpr int R = decltype(count)::value;
      float sums[R];
      const Dot dot(p, packed, r);
      dot.template ScaleProducts<R>(scales, p.blocks, scales_stride, products);
      if (block_steps == 2) {
        row.template Multiply<R, 2>(dot, 2, products, scales_stride, sums);
      } else {
        row.template Multiply<R, 0>(dot, block_steps, products, scales_stride, sums);
      }
      StoreSums(l, p, packed, output, r, R, sums, y + output - first, y_stride);
    });
  }
}

template <template <Density> class Weights, class Dot>
void RunIntegers(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
                 float* y, int64_t y_stride) {
  constexpr Density kHalf = Density::kHalf;
  constexpr Density kGeneral = Density::kGeneral;
  constexpr Density kDense = Density::kDense;
  const Density density = DensityOf(l);
  const auto run = density == kDense     ? IntegerOutputs<Weights<kDense>, Int8<kDense>, Dot, StoredMasks>
                   : density == kGeneral ? IntegerOutputs<Weights<kGeneral>, Int8<kGeneral>, Dot, StoredMasks>
                   : ReadsCodes(l, rows) ? IntegerOutputs<Weights<kHalf>, Int8<kHalf>, Dot, CodeMasks>
                                         : IntegerOutputs<Weights<kHalf>, Int8<kHalf>, Dot, StoredMasks>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, static_cast<uint8_t*>(scratch), y, y_stride);
}

size_t IntegerScratchBytes(const Layout& l, int64_t) { return IntegerScratch(l).total; }

constexpr Kernel kKernels[] = {
    {"int8 rows, int8 activations", Isa::kAvx512, true, 1, kAny, Supports<NM_INT8>, Int8RowsBytes, PackBytes,
     IntegerScratchBytes, RunIntegers<Int8, BytesDot>},
    {"int4 rows, int8 activations", Isa::kAvx512, true, 1, kAny, Supports<NM_INT4>, Int8RowsBytes, PackBytes,
     IntegerScratchBytes, RunIntegers<Int4, BytesDot>},
    {"int8 rows", Isa::kAvx512, false, 1, kMostFloatRows, Supports<NM_INT8>, FloatRowsBytes, PackFloats,
     IntegerScratchBytes, RunIntegers<Int8, FloatsDot>},
    {"int4 rows", Isa::kAvx512, false, 1, kMostFloatRows, Supports<NM_INT4>, FloatRowsBytes, PackFloats,
     IntegerScratchBytes, RunIntegers<Int4, FloatsDot>},
};

}  // namespace

KernelList Avx512IntegerRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
