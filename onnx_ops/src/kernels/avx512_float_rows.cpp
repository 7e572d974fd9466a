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

// One output row times R activation rows.

template <class Type, Density density, class Masks>
struct FloatRow {
  Masks masks;
  const uint8_t* values;
  const uint8_t* last_values;  // of the last step, complete
  int64_t steps;
  int64_t step_values;

  template <int R>
  void Dot(const float* a, int64_t a_stride, float* sums) const {
    __m512 lanes[R][kAccumulators];
    for (auto& row : lanes) {
      for (__m512& lane : row) lane = _mm512_setzero_ps();
    }
    const int64_t count = StepValues<density>(step_values);
    const uint8_t* v = values;
    for (int64_t s = 0; s < steps - 1; ++s, v += count * Type::kBytes) {
      PrefetchLines<(density == Density::kHalf ? kStep / 2 : kStep) * Type::kBytes>(v);
      if (density != Density::kDense) masks.PrefetchStep(s);
      const uint64_t mask = density == Density::kDense ? 0 : masks.PlainStep(s);
      Type::template Step<density, R>(v, mask, count, a + kStep * s, a_stride, lanes);
    }
    Type::template Step<density, R>(last_values, masks.last, count, a + kStep * (steps - 1), a_stride, lanes);
    for (int r = 0; r < R; ++r) {
      sums[r] = Sum(_mm512_add_ps(_mm512_add_ps(lanes[r][0], lanes[r][1]), _mm512_add_ps(lanes[r][2], lanes[r][3])));
    }
  }
};

template <class Type, Density density, class Masks>
void FloatOutputs(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
                  float* y, int64_t y_stride) {
  const PackedRows p = PlanRows(l, rows, false);
  const MaskReader reader(l);
  const int64_t steps = Steps(l);
  const int64_t step_values = l.dense ? kStep : kStep * l.n / l.m;
  const int64_t step_bytes = step_values * Type::kBytes;
  const int64_t last_bytes = l.value_bytes - (steps - 1) * step_bytes;
  const float* a = reinterpret_cast<const float*>(packed + p.ordered);
  const int64_t a_stride = p.ordered_columns;
  for (int64_t output = first; output < last; ++output) {
    alignas(64) uint8_t padded[kStep * Type::kBytes];
    const uint8_t* values = l.values + output * l.value_bytes;
    const uint8_t* last_values = values + (steps - 1) * step_bytes;
    if (last_bytes < step_bytes) {
      memset(padded, 0, sizeof(padded));
      memcpy(padded, last_values, static_cast<size_t>(last_bytes));
      last_values = padded;
    }
    const FloatRow<Type, density, Masks> row{MasksOf<Masks>(reader, output, scratch), values, last_values, steps,
                                             step_values};
    ForRows(rows, [&](auto count, int64_t r) {
      float sums[4];
      row.template Dot<decltype(count)::value>(a + r * a_stride, a_stride, sums);
      StoreSums(l, p, packed, output, r, decltype(count)::value, sums, y + output - first, y_stride);
    });
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

size_t FloatScratch(const Layout& l, int64_t) { return MaskReader::ScratchBytes(l); }

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
