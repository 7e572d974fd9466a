// AVX-512 kernels of floating-point weights for few activation rows.
#include "avx512_float_weights.h"
#include "kernels.h"

namespace nm {
namespace {

constexpr int kAccumulators = 4;

struct Float32 {
  static constexpr int kBytes = 4;
  template <Density density, int R>
  static void Step(const uint8_t* v, uint64_t mask, int64_t values, const float* a, int64_t a_stride,
                   __m512 (&sums)[R][kAccumulators]) {
    for (int i = 0; i < 4; ++i) {
      const __m512 w = ExpandNext<density>(&v, mask >> (16 * i), &values);
      for (int r = 0; r < R; ++r) {
        sums[r][i] = _mm512_fmadd_ps(w, _mm512_load_ps(a + r * a_stride + 16 * i), sums[r][i]);
      }
    }
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  template <Density density, int R>
  static void Step(const uint8_t* v, uint64_t mask, int64_t values, const float* a, int64_t a_stride,
                   __m512 (&sums)[R][kAccumulators]) {
    for (int i = 0; i < 2; ++i) {
      const __m512i bits = Expand16<density>(v + i * values, mask >> (32 * i), values / 2);  // values/2 of 2 bytes
      const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
      const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
      for (int r = 0; r < R; ++r) {
        const float* row = a + r * a_stride + 32 * i;
        sums[r][2 * i] = _mm512_fmadd_ps(low, _mm512_load_ps(row), sums[r][2 * i]);
        sums[r][2 * i + 1] = _mm512_fmadd_ps(high, _mm512_load_ps(row + 16), sums[r][2 * i + 1]);
      }
    }
  }
};

struct Bfloat16 {
  static constexpr int kBytes = 2;
  template <Density density, int R>
  static void Step(const uint8_t* v, uint64_t mask, int64_t values, const float* a, int64_t a_stride,
                   __m512 (&sums)[R][kAccumulators]) {
    for (int i = 0; i < 2; ++i) {
      const __m512i bits = Expand16<density>(v + i * values, mask >> (32 * i), values / 2);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
      for (int r = 0; r < R; ++r) {
        const float* row = a + r * a_stride + 32 * i;
        sums[r][2 * i] = _mm512_fmadd_ps(even, _mm512_load_ps(row), sums[r][2 * i]);
        sums[r][2 * i + 1] = _mm512_fmadd_ps(odd, _mm512_load_ps(row + 16), sums[r][2 * i + 1]);
      }
    }
  }
};

// One output row.
template <class Type, Density density, class Masks>
struct FloatRow {
  Masks masks;
  const uint8_t* values;
  const uint8_t* last_values;  // of the last step, complete
};

// All activation rows times kTogether outputs, a part of the columns after the other.
template <class Type, Density density, class Masks>
class FloatRows {
 public:
  FloatRows(const Layout& l, int64_t rows, const uint8_t* packed, uint8_t* scratch)
      : layout_(l),
        rows_(rows),
        plan_(PlanRows(l, rows, false)),
        packed_(packed),
        scratch_(scratch),
        reader_(l),
        steps_(Steps(l)),
        step_values_(l.dense ? kStep : kStep * l.n / l.m),
        part_(PartUnits(steps_, rows * kStep * 4, 1)) {}

  // y[r · y_stride + i] for `count` outputs from `first` on.
  void Multiply(int64_t first, int64_t count, float* y, int64_t y_stride) {
    const float* a = reinterpret_cast<const float*>(packed_ + plan_.ordered);
    for (int64_t start = 0; start < steps_; start += part_) {
      for (int64_t i = 0; i < count; ++i) {
        const auto output = Output(first + i, i, start == 0);
        ForRows(rows_, [&](auto turn, int64_t r) {
          AddPart<decltype(turn)::value>(output, start, a + r * plan_.ordered_columns, &totals_[r], i);
        });
      }
    }
    ForRows(rows_, [&](auto turn, int64_t r) {
      StoreTogether<decltype(turn)::value>(layout_, plan_, packed_, r, first, count, &totals_[r], y + r * y_stride,
                                           y_stride);
    });
  }

 private:
  // The i-th of the outputs; its first part writes down the masks of codes.
  FloatRow<Type, density, Masks> Output(int64_t output, int64_t i, bool begins) {
    const int64_t step_bytes = step_values_ * Type::kBytes;
    const uint8_t* values = layout_.values + output * layout_.value_bytes;
    const uint8_t* last_values = values + (steps_ - 1) * step_bytes;
    const int64_t last_bytes = layout_.value_bytes - (steps_ - 1) * step_bytes;
    if (last_bytes < step_bytes) {
      memset(padded_, 0, sizeof(padded_));
      memcpy(padded_, last_values, static_cast<size_t>(last_bytes));
      last_values = padded_;
    }
    uint8_t* masks = scratch_ + i * static_cast<int64_t>(MaskReader::ScratchBytes(layout_));
    return {MasksOf<Masks>(reader_, output, masks, begins), values, last_values};
  }

  // Of the steps from `start` on: totals[r][i] for R activation rows, begun where start is 0.
  template <int R>
  void AddPart(const FloatRow<Type, density, Masks>& output, int64_t start, const float* a, __m512 (*totals)[kTogether],
               int64_t i) const {
    const int64_t a_stride = plan_.ordered_columns;
    const int64_t count = StepValues<density>(step_values_);
    // The next part that is read is the next output's.
    const int64_t ahead = part_ == steps_ ? kFarPrefetch : layout_.value_bytes;
    const int64_t end = Min(start + part_, steps_);
    const int64_t plain_end = Min(end, steps_ - 1);
    __m512 lanes[R][kAccumulators];
    for (auto& row : lanes) {
      for (__m512& lane : row) lane = _mm512_setzero_ps();
    }
    const uint8_t* v = output.values + start * count * Type::kBytes;
    for (int64_t s = start; s < plain_end; ++s, v += count * Type::kBytes) {
      PrefetchLines<(density == Density::kHalf ? kStep / 2 : kStep) * Type::kBytes>(v, ahead);
      if (density != Density::kDense) output.masks.PrefetchStep(s);
      const uint64_t mask = density == Density::kDense ? 0 : output.masks.PlainStep(s);
      Type::template Step<density, R>(v, mask, count, a + kStep * s, a_stride, lanes);
    }
    if (end == steps_) {
      const uint64_t mask = density == Density::kDense ? 0 : output.masks.LastStep(steps_ - 1);
      Type::template Step<density, R>(output.last_values, mask, count, a + kStep * (steps_ - 1), a_stride, lanes);
    }
    for (int r = 0; r < R; ++r) {
      const __m512 sum =
          _mm512_add_ps(_mm512_add_ps(lanes[r][0], lanes[r][1]), _mm512_add_ps(lanes[r][2], lanes[r][3]));
      totals[r][i] = start == 0 ? sum : _mm512_add_ps(totals[r][i], sum);
    }
  }

  const Layout& layout_;
  const int64_t rows_;
  const PackedRows plan_;
  const uint8_t* packed_;
  uint8_t* scratch_;
  const MaskReader reader_;
  const int64_t steps_;
  const int64_t step_values_;
  const int64_t part_;  // steps whose activations stay in the cache
  __m512 totals_[kMostFloatRows][kTogether];
  uint8_t padded_[kStep * Type::kBytes];  // the last step of an output
};

template <class Type, Density density, class Masks>
void FloatOutputs(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
                  float* y, int64_t y_stride) {
  FloatRows<Type, density, Masks> outputs(l, rows, packed, scratch);
  for (int64_t output = first; output < last; output += kTogether) {
    outputs.Multiply(output, Min(kTogether, last - output), y + output - first, y_stride);
  }
}

template <class Type>
void RunFloats(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
               int64_t y_stride) {
  const Density density = DensityOf(l);
  const auto run = density == Density::kDense     ? FloatOutputs<Type, Density::kDense, StoredMasks>
                   : density == Density::kGeneral ? FloatOutputs<Type, Density::kGeneral, StoredMasks>
                   : ReadsCodes(l, rows)          ? FloatOutputs<Type, Density::kHalf, CodeMasks>
                                                  : FloatOutputs<Type, Density::kHalf, StoredMasks>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, static_cast<uint8_t*>(scratch), y, y_stride);
}

size_t FloatScratch(const Layout& l, int64_t) { return kTogether * MaskReader::ScratchBytes(l); }

constexpr Kernel kKernels[] = {
    {"float32 rows", Isa::kAvx512, false, 1, kMostFloatRows, Supports<NM_FLOAT32>, FloatRowsBytes, PackFloats,
     FloatScratch, RunFloats<Float32>},
    {"float16 rows", Isa::kAvx512, false, 1, kMostFloatRows, Supports<NM_FLOAT16>, FloatRowsBytes, PackFloats,
     FloatScratch, RunFloats<Float16>},
    {"bfloat16 rows", Isa::kAvx512, false, 1, kMostFloatRows, Supports<NM_BFLOAT16>, FloatRowsBytes, PackFloats,
     FloatScratch, RunFloats<Bfloat16>},
};

}  // namespace

KernelList Avx512FloatRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
