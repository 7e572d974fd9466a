// AVX-512 kernels of integer weights for few activation rows, where nothing of an output row is out of the ordinary:
// positions are a bitmap or the codes of 8:16, the columns fill whole steps, a scale covers 32, 64 or 128 of them or
// all. Narrow layers, of 9 steps in SmolLM2, take as long for what surrounds the steps as for these; so there is little
// of it, and sixteen outputs are added up together.
#include "avx512_integer_dots.h"
#include "avx512_integer_weights.h"
#include "kernels.h"

namespace nm {
namespace {

// Masks of a row, 64 columns each: a bitmap …
template <Density density>
struct BitmapMasks {
  static constexpr Density kDensity = density;
  static constexpr int64_t kStepBytes = 8;
  static constexpr int64_t kMostRows = kAny;
  static bool Reads(const Layout& l) { return l.bitmap && DensityOf(l) == kDensity; }
  explicit BitmapMasks(const Layout&) {}
  uint64_t Step(const uint8_t* row, int64_t step) const { return Load64(row + kStepBytes * step); }
  uint64_t LastStep(const uint8_t* row, int64_t step) const { return Step(row, step); }
};

// … or the 14-bit codes of 8:16, four of them 7 bytes …
struct FieldMasks {
  static constexpr Density kDensity = Density::kHalf;
  static constexpr int64_t kStepBytes = 7;
  static constexpr int64_t kMostRows = 4;  // with more, decoding once for all of them is faster
  static bool Reads(const Layout& l) { return !l.bitmap && l.n == 8 && l.m == 16; }
  const uint16_t* table;
  explicit FieldMasks(const Layout& l) : table(GetFieldTable(l.n, l.m).masks) {}
  uint64_t Step(const uint8_t* row, int64_t step) const {
    return MaskOfFields<14>(table, Load64(row + kStepBytes * step), 14);
  }
  // Reads no byte behind the row.
  uint64_t LastStep(const uint8_t* row, int64_t step) const {
    return MaskOfFields<14>(table, Load64(row + kStepBytes * step - 1) >> 8, 14);
  }
};

// … or none, where all columns are kept.
struct NoMasks {
  static constexpr Density kDensity = Density::kDense;
  static constexpr int64_t kStepBytes = 0;
  static constexpr int64_t kMostRows = kAny;
  static bool Reads(const Layout& l) { return l.dense; }
  explicit NoMasks(const Layout&) {}
  uint64_t Step(const uint8_t*, int64_t) const { return ~uint64_t{0}; }
  uint64_t LastStep(const uint8_t*, int64_t) const { return ~uint64_t{0}; }
};

size_t ProductsBytes(const Layout& l) { return static_cast<size_t>(4 * RoundUp(BlockCount(l), 16)) * sizeof(float); }

// kBlockColumns: under one scale, 32, 64 or 128.
template <class Weights, class Masks, class Dot, int64_t kBlockColumns>
struct WholeRows {
  static constexpr bool kHalfSteps = kBlockColumns < kStep;
  static constexpr int64_t kSumSteps = Max(kBlockColumns / kStep, 1);
  static constexpr bool kHalf = Weights::kDensity == Density::kHalf;
  const Layout& layout;
  const PackedRows plan;
  const uint8_t* packed;
  const Masks masks;
  const IntegerReader<Weights, Int8<Weights::kDensity>> reader;
  const int64_t steps;
  const int64_t plain_steps;  // pairs of which are alike
  const int64_t scales_stride;
  float* products;  // of scales: [R][scales_stride]
  uint8_t* copy;    // of the last values of a row

  WholeRows(const Layout& l, int64_t rows, const uint8_t* activations, void* scratch)
      : layout(l),
        plan(PlanRows(l, rows, Dot::kInt8Activations)),
        packed(activations),
        masks(l),
        reader(l),
        steps(reader.steps),
        plain_steps(Min(kHalf ? steps : reader.whole_steps, steps - 1) / 2 * 2),
        scales_stride(RoundUp(plan.blocks, 16)),
        products(static_cast<float*>(scratch)),
        copy(static_cast<uint8_t*>(scratch) + ProductsBytes(l)) {}

  // y[r · y_stride + o] for R activation rows from `row` on and `count` outputs from `first` on.
  template <int R>
  void Outputs(int64_t row, int64_t first, int64_t count, float* y, int64_t y_stride) const {
    const Dot dot(plan, packed, row);
    __m512 totals[R][kTogether];
    for (int64_t i = 0; i < count; ++i) {
      __m512 sums[R];
      Row<R>(dot, first + i, sums);
      for (int r = 0; r < R; ++r) totals[r][i] = sums[r];
    }
    StoreTogether<R>(layout, plan, packed, row, first, count, totals, y, y_stride);
  }

 private:
  template <int R>
  void Row(const Dot& dot, int64_t output, __m512 (&sums)[R]) const {
    const IntegerValues values = Values(output);
    const uint8_t* positions = layout.positions + output * layout.position_bytes;
    Scales<R>(dot, layout.scales + output * layout.row_scales * 2);
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    int64_t step = 0;
    for (; step < plain_steps; step += 2) {
      Prefetch(positions + Masks::kStepBytes * step);
      Weights::Fetch(reader.Address(values, step));
      Add<R>(dot, step, 2, sums, [&](int i) { return LoadOfPair(values, step, i, masks.Step(positions, step + i)); });
    }
    for (; step < steps; step += 2) {
      Add<R>(dot, step, Min(2, steps - step), sums, [&](int i) { return LoadLast(values, positions, step, i); });
    }
  }

  IntegerValues Values(int64_t output) const {
    return kHalf ? IntegerValues{layout.values + output * layout.value_bytes, nullptr} : reader.Row(output, copy);
  }

  // Step + i of an even step; the int4 values of both share their bytes, unless all are kept.
  __m512i LoadOfPair(const IntegerValues& values, int64_t step, int i, uint64_t mask) const {
    return Weights::Load(reader.Address(values, step), i, mask, StepValues<Weights::kDensity>(reader.step_values),
                         reader.offset);
  }

  // Behind the plain steps.
  __m512i LoadLast(const IntegerValues& values, const uint8_t* positions, int64_t step, int i) const {
    const int64_t at = step + i;
    const uint64_t mask = at + 1 == steps ? masks.LastStep(positions, at) : masks.Step(positions, at);
    if constexpr (!kHalf) return reader.Load(values, at, mask);
    return step + 1 == steps ? Weights::LoadLone(values.values, step, mask, reader.offset)
                             : LoadOfPair(values, step, i, mask);
  }

  template <int R>
  void Scales(const Dot& dot, const uint8_t* halves) const {
    for (int64_t b = 0; b < plan.blocks; b += 16) {
      dot.template ScaleProducts<R>(ScalesFrom(layout, halves, b), b, scales_stride, products);
    }
  }

  // `count` steps from an even one on, one or two; load(i) gives their weights.
  template <int R, class Load>
  void Add(const Dot& dot, int64_t step, int64_t count, __m512 (&sums)[R], const Load& load) const {
    typename Dot::Sum block[R];
#pragma GCC unroll 2
    for (int i = 0; i < count; ++i) {
      const int64_t b = (step + i) / kSumSteps;
      if (i % kSumSteps == 0) {
        for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      }
      dot.template Step<R>(load(i), reader.offset, step + i, block);
      if ((i + 1) % kSumSteps == 0 || i + 1 == count) AddScaled<R>(block, b, sums);
    }
  }

  template <int R>
  void AddScaled(const typename Dot::Sum (&block)[R], int64_t b, __m512 (&sums)[R]) const {
    for (int r = 0; r < R; ++r) {
      const __m512 lanes = LaneScales(kHalfSteps, products + r * scales_stride, b);
      sums[r] = _mm512_fmadd_ps(Dot::Value(block[r]), lanes, sums[r]);
    }
  }
};

template <class Weights, class Masks, class Dot, int64_t kBlockColumns>
void MultiplyWholeRows(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
                       float* y, int64_t y_stride) {
  const WholeRows<Weights, Masks, Dot, kBlockColumns> whole(l, rows, static_cast<const uint8_t*>(packed), scratch);
  for (int64_t output = first; output < last; output += kTogether) {
    ForRows(rows, [&](auto count, int64_t r) {
      whole.template Outputs<decltype(count)::value>(r, output, Min(kTogether, last - output),
                                                     y + r * y_stride + output - first, y_stride);
    });
  }
}

template <class Weights, class Masks, class Dot>
void RunWholeRows(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
                  float* y, int64_t y_stride) {
  const int64_t block = BlockColumns(l);
  const auto run = block == 32   ? MultiplyWholeRows<Weights, Masks, Dot, 32>
                   : block == 64 ? MultiplyWholeRows<Weights, Masks, Dot, 64>
                                 : MultiplyWholeRows<Weights, Masks, Dot, 128>;
  run(l, rows, packed, first, last, scratch, y, y_stride);
}

template <int dtype, Density density>
struct WholeWeights {
  using Type = Int8<density>;
};
template <Density density>
struct WholeWeights<NM_INT4, density> {
  using Type = Int4<density>;
};

template <int dtype, class Masks>
bool SupportsWholeRows(const Layout& l) {
  const bool whole = l.in_features % kStep == 0 && l.groups * l.m == l.in_features && l.in_features >= 2 * kStep;
  const bool scaled = l.row_scales == 1 || (l.scale_columns == BlockColumns(l) && l.scale_columns <= 2 * kStep);
  return Supports<dtype>(l) && Masks::Reads(l) && whole && scaled;
}

size_t WholeRowsBytes(const Layout& l, int64_t) { return ProductsBytes(l) + kIntegerCopyBytes; }

template <int dtype, class Masks, class Dot>
constexpr Kernel WholeRowsKernel(const char* name) {
  using Weights = typename WholeWeights<dtype, Masks::kDensity>::Type;
  return {name,
          Isa::kAvx512,
          Dot::kInt8Activations,
          1,
          Min(Masks::kMostRows, Dot::kInt8Activations ? kAny : kMostFloatRows),
          SupportsWholeRows<dtype, Masks>,
          Dot::kInt8Activations ? Int8RowsBytes : FloatRowsBytes,
          Dot::kInt8Activations ? PackBytes : PackFloats,
          WholeRowsBytes,
          RunWholeRows<Weights, Masks, Dot>};
}

using HalfMasks = BitmapMasks<Density::kHalf>;
using GeneralMasks = BitmapMasks<Density::kGeneral>;

constexpr Kernel kKernels[] = {
    WholeRowsKernel<NM_INT8, HalfMasks, BytesDot>("int8 whole rows, int8 activations"),
    WholeRowsKernel<NM_INT4, HalfMasks, BytesDot>("int4 whole rows, int8 activations"),
    WholeRowsKernel<NM_INT8, FieldMasks, BytesDot>("int8 whole rows by codes, int8 activations"),
    WholeRowsKernel<NM_INT4, FieldMasks, BytesDot>("int4 whole rows by codes, int8 activations"),
    WholeRowsKernel<NM_INT8, GeneralMasks, BytesDot>("int8 whole rows of any pattern, int8 activations"),
    WholeRowsKernel<NM_INT4, GeneralMasks, BytesDot>("int4 whole rows of any pattern, int8 activations"),
    WholeRowsKernel<NM_INT8, NoMasks, BytesDot>("int8 whole dense rows, int8 activations"),
    WholeRowsKernel<NM_INT4, NoMasks, BytesDot>("int4 whole dense rows, int8 activations"),
    WholeRowsKernel<NM_INT8, HalfMasks, FloatsDot>("int8 whole rows"),
    WholeRowsKernel<NM_INT4, HalfMasks, FloatsDot>("int4 whole rows"),
    WholeRowsKernel<NM_INT8, FieldMasks, FloatsDot>("int8 whole rows by codes"),
    WholeRowsKernel<NM_INT4, FieldMasks, FloatsDot>("int4 whole rows by codes"),
};

}  // namespace

KernelList Avx512WholeRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
