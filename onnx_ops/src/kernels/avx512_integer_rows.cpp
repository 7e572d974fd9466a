// AVX-512 kernels of integer weights for few activation rows. Pruned columns become the offset, so that one precomputed
// sum of activations cancels it everywhere.
#include "avx512_integer_dots.h"
#include "avx512_integer_weights.h"
#include "kernels.h"

namespace nm {
namespace {

// One output row times R activation rows.
template <class Weights, class Rest, class Masks>
struct IntegerRow {
  const IntegerReader<Weights, Rest>& reader;
  IntegerValues values;
  Masks masks;

  // scales[r · scales_stride + block].
  template <int R, class Dot>
  void Multiply(const Dot& dot, int64_t block_steps, const float* scales, int64_t scales_stride, float* sums) const {
    __m512 totals[R];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    const int64_t plain_blocks = Min(reader.whole_steps, masks.last_step) / block_steps;
    const int64_t blocks = (reader.steps + block_steps - 1) / block_steps;
    const auto add = [&](const typename Dot::Sum(&block)[R], int64_t b) {
      for (int r = 0; r < R; ++r) {
        totals[r] = _mm512_fmadd_ps(Dot::Value(block[r]), _mm512_set1_ps(scales[r * scales_stride + b]), totals[r]);
      }
    };
    for (int64_t b = 0; b < plain_blocks; ++b) {
      typename Dot::Sum block[R];
      for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      for (int64_t step = b * block_steps; step < (b + 1) * block_steps; ++step) {
        masks.PrefetchStep(step);
        if (step % 2 == 0) Weights::Fetch(reader.Address(values, step));
        const __m512i w = reader.LoadInPlace(values, step, masks.PlainStep(step));
        dot.template Step<R>(w, reader.offset, step, block);
      }
      add(block, b);
    }
    for (int64_t b = plain_blocks; b < blocks; ++b) {
      typename Dot::Sum block[R];
      for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      for (int64_t step = b * block_steps; step < Min((b + 1) * block_steps, reader.steps); ++step) {
        dot.template Step<R>(reader.Load(values, step, masks.Step(step)), reader.offset, step, block);
      }
      add(block, b);
    }
    for (int r = 0; r < R; ++r) sums[r] = Sum(totals[r]);
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
      for (int64_t b = 0; b < p.blocks; b += 16) {
        dot.template ScaleProducts<R>(_mm512_load_ps(scales + b), b, scales_stride, products);
      }
      row.template Multiply<R>(dot, block_steps, products, scales_stride, sums);
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
