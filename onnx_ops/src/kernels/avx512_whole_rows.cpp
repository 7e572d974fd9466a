// AVX-512 kernels of integer weights for few activation rows, where nothing of an output row is out of the ordinary:
// half of every group is kept, the columns fill whole steps, a scale covers 32, 64 or 128 of them or all. Narrow
// layers, of 9 steps in SmolLM2, take as long for what surrounds the steps as for these; so there is little of it, and
// sixteen outputs are added up together.
#include "avx512_integer_dots.h"
#include "avx512_integer_weights.h"
#include "kernels.h"

namespace nm {
namespace {

// Masks of a row, 64 columns each: a bitmap …
struct BitmapMasks {
  static constexpr int64_t kStepBytes = 8;
  static constexpr int64_t kMostRows = kAny;
  static bool Reads(const Layout& l) { return l.bitmap; }
  explicit BitmapMasks(const Layout&) {}
  uint64_t Step(const uint8_t* row, int64_t step) const { return Load64(row + kStepBytes * step); }
  uint64_t LastStep(const uint8_t* row, int64_t step) const { return Step(row, step); }
};

// … or the 14-bit codes of 8:16, four of them 7 bytes.
struct FieldMasks {
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

// kBlockColumns: under one scale, 32, 64 or 128.
template <class Weights, class Masks, class Dot, int64_t kBlockColumns>
struct WholeRows {
  static constexpr bool kHalfSteps = kBlockColumns < kStep;
  static constexpr int64_t kSumSteps = Max(kBlockColumns / kStep, 1);
  const Layout& layout;
  const PackedRows plan;
  const uint8_t* packed;
  const Masks masks;
  const __m512i offset;
  const int64_t steps;
  const int64_t scales_stride;
  float* products;  // of scales: [R][scales_stride]

  WholeRows(const Layout& l, int64_t rows, const uint8_t* activations, void* scratch)
      : layout(l),
        plan(PlanRows(l, rows, Dot::kInt8Activations)),
        packed(activations),
        masks(l),
        offset(_mm512_set1_epi8(static_cast<char>(l.dtype == NM_INT4 ? 8 : 128))),
        steps(l.in_features / kStep),
        scales_stride(RoundUp(plan.blocks, 16)),
        products(static_cast<float*>(scratch)) {}

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
    const uint8_t* values = layout.values + output * layout.value_bytes;
    const uint8_t* positions = layout.positions + output * layout.position_bytes;
    Scales<R>(dot, layout.scales + output * layout.row_scales * 2);
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    int64_t step = 0;
    for (; step + 2 < steps; step += 2) {
      const uint64_t pair[] = {masks.Step(positions, step), masks.Step(positions, step + 1)};
      Prefetch(positions + Masks::kStepBytes * step);
      AddPair<R>(dot, values, pair, step, sums);
    }
    if (step + 2 == steps) {
      const uint64_t pair[] = {masks.Step(positions, step), masks.LastStep(positions, step + 1)};
      AddPair<R>(dot, values, pair, step, sums);
    } else {
      AddLone<R>(dot, values, masks.LastStep(positions, step), step, sums);
    }
  }

  template <int R>
  void Scales(const Dot& dot, const uint8_t* halves) const {
    for (int64_t b = 0; b < plan.blocks; b += 16) {
      dot.template ScaleProducts<R>(ScalesFrom(layout, halves, b), b, scales_stride, products);
    }
  }

  // Two steps, whose int4 values share their bytes.
  template <int R>
  void AddPair(const Dot& dot, const uint8_t* values, const uint64_t (&pair)[2], int64_t step,
               __m512 (&sums)[R]) const {
    const uint8_t* pair_values = Weights::Address(values, step, kStep / 2);
    Weights::Fetch(pair_values);
    typename Dot::Sum block[R];
    for (int i = 0; i < 2; ++i) {
      const int64_t b = (step + i) / kSumSteps;
      if (i % kSumSteps == 0) {
        for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      }
      dot.template Step<R>(Weights::Load(pair_values, i, pair[i], kStep / 2, offset), offset, step + i, block);
      if ((i + 1) % kSumSteps == 0) AddScaled<R>(block, b, sums);
    }
  }

  template <int R>
  void AddLone(const Dot& dot, const uint8_t* values, uint64_t mask, int64_t step, __m512 (&sums)[R]) const {
    typename Dot::Sum block[R];
    for (int r = 0; r < R; ++r) block[r] = dot.Start(r, step / kSumSteps);
    dot.template Step<R>(Weights::LoadLone(values, step, mask, offset), offset, step, block);
    AddScaled<R>(block, step / kSumSteps, sums);
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

template <int dtype>
struct WholeWeights {
  using Type = Int8<Density::kHalf>;
};
template <>
struct WholeWeights<NM_INT4> {
  using Type = Int4<Density::kHalf>;
};

template <int dtype, class Masks>
bool SupportsWholeRows(const Layout& l) {
  const bool half = DensityOf(l) == Density::kHalf && Masks::Reads(l);
  const bool whole = l.in_features % kStep == 0 && l.groups * l.m == l.in_features && l.in_features >= 2 * kStep;
  const bool scaled = l.row_scales == 1 || (l.scale_columns == BlockColumns(l) && l.scale_columns <= 2 * kStep);
  return Supports<dtype>(l) && half && whole && scaled;
}

size_t ProductsBytes(const Layout& l, int64_t) {
  return static_cast<size_t>(4 * RoundUp(BlockCount(l), 16)) * sizeof(float);
}

template <int dtype, class Masks, class Dot>
constexpr Kernel WholeRowsKernel(const char* name) {
  using Weights = typename WholeWeights<dtype>::Type;
  return {name,
          Isa::kAvx512,
          Dot::kInt8Activations,
          1,
          Min(Masks::kMostRows, Dot::kInt8Activations ? kAny : kMostFloatRows),
          SupportsWholeRows<dtype, Masks>,
          Dot::kInt8Activations ? Int8RowsBytes : FloatRowsBytes,
          Dot::kInt8Activations ? PackBytes : PackFloats,
          ProductsBytes,
          RunWholeRows<Weights, Masks, Dot>};
}

constexpr Kernel kKernels[] = {
    WholeRowsKernel<NM_INT8, BitmapMasks, BytesDot>("int8 whole rows, int8 activations"),
    WholeRowsKernel<NM_INT4, BitmapMasks, BytesDot>("int4 whole rows, int8 activations"),
    WholeRowsKernel<NM_INT8, FieldMasks, BytesDot>("int8 whole rows by codes, int8 activations"),
    WholeRowsKernel<NM_INT4, FieldMasks, BytesDot>("int4 whole rows by codes, int8 activations"),
    WholeRowsKernel<NM_INT8, BitmapMasks, FloatsDot>("int8 whole rows"),
    WholeRowsKernel<NM_INT4, BitmapMasks, FloatsDot>("int4 whole rows"),
    WholeRowsKernel<NM_INT8, FieldMasks, FloatsDot>("int8 whole rows by codes"),
    WholeRowsKernel<NM_INT4, FieldMasks, FloatsDot>("int4 whole rows by codes"),
};

}  // namespace

KernelList Avx512WholeRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
