// The innermost loops of the AVX2 kernels for int8 and int4 weights and few activation rows rounded to int8.
#ifndef NM_KERNELS_AVX2_INTEGER_LOOPS_H_
#define NM_KERNELS_AVX2_INTEGER_LOOPS_H_

#include "avx2_integer_products.h"

namespace nm {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Products of 32 values and 32 activations, as sums of pairs (16 bits) or fours (32 bits).

// (u - 8) · a for u below 16, sums of pairs: taking 8 · a off costs less than the signs of u - 8.
NM_PIECE __m256i NibbleProducts(__m256i u, __m256i a) {
  return _mm256_sub_epi16(_mm256_maddubs_epi16(u, a), _mm256_maddubs_epi16(_mm256_set1_epi8(8), a));
}

NM_PIECE __m256i LowNibbles(__m256i packed) { return _mm256_and_si256(packed, _mm256_set1_epi8(15)); }
NM_PIECE __m256i HighNibbles(__m256i packed) { return LowNibbles(_mm256_srli_epi16(packed, 4)); }

// The kinds of stored values. Each multiplies 64 values by the activations a[0] (the first 32) and a[1], for R rows, to
// one sum of all or one for each half; or 32 values that end a row.
struct Signed {  // bytes that were unpacked before
  static constexpr int kBytes = 64;
  template <bool joined, int R>
  static NM_PIECE void Multiply(const uint8_t* v, const __m256i (&a)[R][2], __m256i (&sums)[R][2]) {
    MultiplySigned<joined>(Load256(v), Load256(v + 32), a, sums);
  }
  static NM_PIECE __m256i MultiplyLast(const uint8_t* v, __m256i a) { return SignedProducts(Load256(v), a); }
  template <bool joined, int R>
  static NM_PIECE void MultiplySigned(__m256i w0, __m256i w1, const __m256i (&a)[R][2], __m256i (&sums)[R][2]) {
    for (int r = 0; r < R; ++r) {
      sums[r][0] = SignedProducts(w0, a[r][0]);
      sums[r][1] = SignedProducts(w1, a[r][1]);
      if (joined) sums[r][0] = _mm256_add_epi32(sums[r][0], sums[r][1]);
    }
  }
};

struct Int8 {
  static constexpr int kBytes = 64;
  template <bool joined, int R>
  static NM_PIECE void Multiply(const uint8_t* v, const __m256i (&a)[R][2], __m256i (&sums)[R][2]) {
    Signed::MultiplySigned<joined>(SignedOfInt8(Load256(v)), SignedOfInt8(Load256(v + 32)), a, sums);
  }
  static NM_PIECE __m256i MultiplyLast(const uint8_t* v, __m256i a) {
    return SignedProducts(SignedOfInt8(Load256(v)), a);
  }
};

struct Int4 {
  static constexpr int kBytes = 32;
  template <bool joined, int R>
  static NM_PIECE void Multiply(const uint8_t* v, const __m256i (&a)[R][2], __m256i (&sums)[R][2]) {
    const __m256i packed = Load256(v);
    const __m256i u0 = LowNibbles(packed), u1 = HighNibbles(packed);
    for (int r = 0; r < R; ++r) {
      const __m256i first = NibbleProducts(u0, a[r][0]);
      const __m256i second = NibbleProducts(u1, a[r][1]);
      sums[r][0] = SumPairs(joined ? _mm256_add_epi16(first, second) : first);
      if (!joined) sums[r][1] = SumPairs(second);
    }
  }
  static NM_PIECE __m256i MultiplyLast(const uint8_t* v, __m256i a) {
    const __m128i packed = Load128(v);
    return SumPairs(NibbleProducts(LowNibbles(Lanes(packed, _mm_srli_epi16(packed, 4))), a));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One output row times R activation rows, some pairs of steps of it.

template <int R>
struct Rows {
  const uint8_t* a;  // at the first pair
  int64_t a_stride;
  const float* products;  // scale of the weights times scale of the activations, a unit; at the first pair
  int64_t products_stride;
  __m256 totals[R];
};

// Sums of R rows times their scales, while they are in registers.
template <int R>
class Totals {
 public:
  explicit Totals(const Rows<R>& rows) : products_(rows.products), stride_(rows.products_stride) {
    for (int r = 0; r < R; ++r) lanes_[r] = rows.totals[r];
  }
  void Store(Rows<R>& rows) const {
    for (int r = 0; r < R; ++r) rows.totals[r] = lanes_[r];
  }
  // With the scale of one unit, that many units after the present one …
  void Add(int r, __m256i sums, int unit) { Add(r, sums, _mm256_broadcast_ss(products_ + r * stride_ + unit)); }
  // … or of two, in the lanes that `which` names.
  void AddTwo(int r, __m256i sums, int unit, __m256i which) {
    const double* two = reinterpret_cast<const double*>(products_ + r * stride_ + unit);
    Add(r, sums, _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_broadcast_sd(two)), which));
  }
  void Advance(int units) { products_ += units; }

 private:
  void Add(int r, __m256i sums, __m256 scale) {
    lanes_[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, lanes_[r]);
  }
  const float* products_;
  const int64_t stride_;
  __m256 lanes_[R];
};

// The kept columns of a step.
NM_PIECE __m256i Pick(const uint8_t* step, __m256i index) {
  return _mm256_blend_epi32(_mm256_shuffle_epi8(Load256(step), index),
                            _mm256_shuffle_epi8(Load256(step + kStep / 2), index), 0xcc);
}

// The sum of a step that ends a row, in row r of the totals, and the sums of a pair, that many pairs after the present
// one.
template <int unit, int R>
NM_PIECE void AddStep(Totals<R>& totals, int r, __m256i sum, int first_unit, __m256i by_lane) {
  if constexpr (unit == 32) totals.AddTwo(r, sum, first_unit, by_lane);
  if constexpr (unit != 32) totals.Add(r, sum, first_unit);
}
template <int unit, int R>
NM_PIECE void AddPair(Totals<R>& totals, int r, const __m256i (&sums)[2], int pair, __m256i by_lane) {
  const int first_unit = pair * (kPair / unit);
  AddStep<unit>(totals, r, sums[0], first_unit, by_lane);
  if constexpr (unit != 128) AddStep<unit>(totals, r, sums[1], first_unit + kStep / unit, by_lane);
}

// Positions: indices of vpshufb. The lanes of a sum are the first and the last 32 columns of its step.
template <class Pairs, class Values, int unit, int R>
NM_LOOP void HalfPairs(const uint8_t* positions, const uint32_t* table, const uint8_t* values, int64_t pairs,
                       bool odd_step, Rows<R>& rows) {
  constexpr bool joined = unit == 128;
  const __m256i by_lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  Totals<R> totals(rows);
  const uint8_t* a = rows.a;
  const int64_t a_stride = rows.a_stride;
  const auto turn = [&](const Indices& indices, int pair) __attribute__((always_inline)) {
    __m256i kept[R][2], sums[R][2];
    for (int r = 0; r < R; ++r) {
      const uint8_t* step = a + pair * kPair + r * a_stride;
      kept[r][0] = Pick(step, indices.first);
      kept[r][1] = Pick(step + kStep, indices.second);
    }
    Values::template Multiply<joined>(values + pair * Values::kBytes, kept, sums);
    for (int r = 0; r < R; ++r) AddPair<unit>(totals, r, sums[r], pair, by_lane);
  };
  Indices even = Pairs::Load(positions, table), odd = even;
  for (; pairs > 2; pairs -= 2) {
    Prefetch(positions);
    Prefetch(values);
    if (Values::kBytes == 64) Prefetch(values + 64);
    odd = Pairs::Load(positions + Pairs::kBytes, table);
    Separate(odd, even);
    turn(even, 0);
    even = Pairs::Load(positions + 2 * Pairs::kBytes, table);
    Separate(even, odd);
    turn(odd, 1);
    positions += 2 * Pairs::kBytes;
    values += 2 * Values::kBytes;
    a += 2 * kPair;
    totals.Advance(2 * kPair / unit);
  }
  if (pairs == 2) odd = Pairs::Load(positions + Pairs::kBytes, table);
  turn(even, 0);
  if (pairs == 2) turn(odd, 1);
  if (odd_step) {
    const __m256i index = Pairs::LoadStep(positions + pairs * Pairs::kBytes, table);
    const uint8_t* last_values = values + pairs * Values::kBytes;
    for (const uint8_t* p = values; p <= last_values; p += 64) Prefetch(p);
    Prefetch(positions);
    const int first_unit = static_cast<int>(pairs) * (kPair / unit);
    for (int r = 0; r < R; ++r) {
      const __m256i sum = Values::MultiplyLast(last_values, Pick(a + pairs * kPair + r * a_stride, index));
      AddStep<unit>(totals, r, sum, first_unit, by_lane);
    }
  }
  totals.Store(rows);
}

// Two output rows times one activation row, turn by turn: narrow rows end before the processor has got going, and one
// fills the time that the other's look-ups and sums take. `rows` are of outputs, with one a.
template <class Pairs, class Values, int unit>
NM_LOOP void HalfPairsOfTwo(const uint8_t* positions, int64_t position_bytes, const uint32_t* table,
                            const uint8_t* values, int64_t value_bytes, int64_t pairs, bool odd_step, Rows<2>& rows) {
  const __m256i by_lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  Totals<2> totals(rows);
  const uint8_t* a = rows.a;
  const auto turn = [&](const Indices& indices, int output, int pair) __attribute__((always_inline)) {
    const uint8_t* first = a + pair * kPair;
    const __m256i kept[1][2] = {{Pick(first, indices.first), Pick(first + kStep, indices.second)}};
    __m256i sums[1][2];
    Values::template Multiply<unit == 128>(values + output * value_bytes + pair * Values::kBytes, kept, sums);
    AddPair<unit>(totals, output, sums[0], pair, by_lane);
  };
  const auto load = [&](int output, int pair) __attribute__((always_inline)) {
    return Pairs::Load(positions + output * position_bytes + pair * Pairs::kBytes, table);
  };
  Indices first = load(0, 0), second = first;
  const auto both = [&](int pair, bool more) __attribute__((always_inline)) {
    second = load(1, pair);
    Separate(second, first);
    turn(first, 0, pair);
    if (more) first = load(0, pair + 1);
    Separate(first, second);
    turn(second, 1, pair);
  };
  for (; pairs > 2; pairs -= 2) {
    for (int output = 0; output < 2; ++output) {
      Prefetch(positions + output * position_bytes);
      Prefetch(values + output * value_bytes);
      if (Values::kBytes == 64) Prefetch(values + output * value_bytes + 64);
    }
    both(0, true);
    both(1, true);
    positions += 2 * Pairs::kBytes;
    values += 2 * Values::kBytes;
    a += 2 * kPair;
    totals.Advance(2 * kPair / unit);
  }
  for (int output = 0; output < 2; ++output) {  // what is left of both rows
    const uint8_t* left = values + output * value_bytes;
    Prefetch(positions + output * position_bytes);
    for (const uint8_t* p = left; p <= left + pairs * Values::kBytes; p += 64) Prefetch(p);
  }
  if (pairs == 2) both(0, true);
  both(static_cast<int>(pairs) - 1, false);
  if (odd_step) {
    for (int output = 0; output < 2; ++output) {
      const uint8_t* last_positions = positions + output * position_bytes + pairs * Pairs::kBytes;
      const uint8_t* last_values = values + output * value_bytes + pairs * Values::kBytes;
      const __m256i kept = Pick(a + pairs * kPair, Pairs::LoadStep(last_positions, table));
      const __m256i sum = Values::MultiplyLast(last_values, kept);
      AddStep<unit>(totals, output, sum, static_cast<int>(pairs) * (kPair / unit), by_lane);
    }
  }
  totals.Store(rows);
}

// Every column has a value. The two sums of a step are its first and last 32 columns.
template <class Values, int unit, int R>
NM_LOOP void DenseSteps(const uint8_t* values, int64_t steps, Rows<R>& rows) {
  constexpr bool joined = unit >= 64;
  const __m256i by_half = _mm256_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1);  // as vphaddd leaves them
  Totals<R> totals(rows);
  const uint8_t* a = rows.a;
  const int64_t a_stride = rows.a_stride;
  for (int64_t step = 0; step < steps; ++step, a += kStep, values += Values::kBytes) {
    Prefetch(values);
    __m256i columns[R][2], sums[R][2];
    for (int r = 0; r < R; ++r) {
      columns[r][0] = Load256(a + r * a_stride);
      columns[r][1] = Load256(a + r * a_stride + 32);
    }
    Values::template Multiply<joined>(values, columns, sums);
    for (int r = 0; r < R; ++r) {
      if constexpr (joined) {
        totals.Add(r, sums[r][0], 0);
      } else {
        totals.AddTwo(r, _mm256_hadd_epi32(sums[r][0], sums[r][1]), 0, by_half);
      }
    }
    totals.Advance(unit == 128 ? static_cast<int>(step % 2) : kStep / unit);
  }
  totals.Store(rows);
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_INTEGER_LOOPS_H_
