// AVX-512 kernels of integer weights for few activation rows. Pruned columns become the offset, so that one precomputed
// sum of activations cancels it everywhere.
#include "avx512_integer_dots.h"
#include "avx512_integer_weights.h"
#include "kernels.h"

namespace nm {
namespace {

// A turn: the steps of one sum.
struct Turn {
  int64_t steps;
  bool half_steps;  // have scales of their own

  explicit Turn(int64_t block_columns) : steps(Max(block_columns / kStep, 1)), half_steps(block_columns < kStep) {}
};

// One output row times R activation rows.
template <class Weights, class Rest, class Masks>
struct IntegerRow {
  const IntegerReader<Weights, Rest>& reader;
  IntegerValues values;
  Masks masks;

  // scales[r · scales_stride + block].
  template <int R, class Dot>
  void Multiply(const Dot& dot, const Turn& turn, const float* scales, int64_t scales_stride, float* sums) const {
    __m512 totals[R];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    const int64_t plain_turns = Min(reader.whole_steps, masks.last_step) / turn.steps;
    const int64_t turns = (reader.steps + turn.steps - 1) / turn.steps;
    const auto add = [&](const typename Dot::Sum(&products)[R], int64_t t) {
      for (int r = 0; r < R; ++r) {
        const __m512 lanes = LaneScales(turn.half_steps, scales + r * scales_stride, t);
        totals[r] = _mm512_fmadd_ps(Dot::Value(products[r]), lanes, totals[r]);
      }
    };
    for (int64_t t = 0; t < plain_turns; ++t) {
      typename Dot::Sum products[R];
      for (int r = 0; r < R; ++r) products[r] = dot.Start(r, t);
      for (int64_t step = t * turn.steps; step < (t + 1) * turn.steps; ++step) {
        masks.PrefetchStep(step);
        if (step % 2 == 0) Weights::Fetch(reader.Address(values, step));
        const __m512i w = reader.LoadInPlace(values, step, masks.PlainStep(step));
        dot.template Step<R>(w, reader.offset, step, products);
      }
      add(products, t);
    }
    for (int64_t t = plain_turns; t < turns; ++t) {
      typename Dot::Sum products[R];
      for (int r = 0; r < R; ++r) products[r] = dot.Start(r, t);
      for (int64_t step = t * turn.steps; step < Min((t + 1) * turn.steps, reader.steps); ++step) {
        dot.template Step<R>(reader.Load(values, step, masks.Step(step)), reader.offset, step, products);
      }
      add(products, t);
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
    const int64_t blocks = RoundUp(BlockCount(l), 16);
    Parts parts;
    masks = parts.Take(static_cast<int64_t>(MaskReader::ScratchBytes(l)));
    scales = parts.Take(blocks * 4);
    products = parts.Take(4 * blocks * 4);
    copy = parts.Take(kIntegerCopyBytes);
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
  const Turn turn(BlockColumns(l));
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
      row.template Multiply<R>(dot, turn, products, scales_stride, sums);
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
