// Numbers as sums of bfloat16 terms, each the rest of those before it rounded to the nearest: a float32 three, a
// float16 two, a bfloat16 or an int8 one, all exactly; a float32 activation two, of which at most 2⁻¹⁷ of it is left.
#ifndef NM_KERNELS_AMX_TERMS_H_
#define NM_KERNELS_AMX_TERMS_H_

#include "amx_tiles.h"
#include "avx512_float_weights.h"
#include "avx512_integer_tiles.h"

namespace nm {
namespace {

constexpr int kActivationTerms = 2;
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

inline size_t PackedTermsBytes(const Layout& l, int64_t rows) { return PackedTerms(l, rows).total; }

inline void PackTerms(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedTerms p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t group = first / kLanes;
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
      SplitFloats<kActivationTerms>(low, high,
                                    [&](int term, __m512i bits) { StoreToLane(bits, row, to + term * kTileBytes); });
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
struct TermStep {
  static constexpr int64_t kBytes = kPairBytes;
  static void Store(__m512i w, __m512i offset, uint8_t* to) {
    const __m512i q = _mm512_sub_epi8(w, offset);
    StoreHalf(_mm512_castsi512_si256(q), to);
    StoreHalf(_mm512_extracti64x4_epi64(q, 1), to + kTileBytes);
  }
  static void StoreHalf(__m256i q, uint8_t* to) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
    _mm512_store_si512(to, ToBfloat16(low, high));
  }
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AMX_TERMS_H_
