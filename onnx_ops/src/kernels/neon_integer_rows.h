// NEON kernels for int8 and int4 weights and few activation rows, rounded to int8 by blocks: one output row at a time,
// one sequential stream per tensor, 128 columns a turn. The files that include this say how bytes are multiplied.
//
// y = Σ values[i] · a[column of i]: where eight of 16 columns are kept, the columns of two blocks are one vector of
// indices, with which vqtbl2 fetches 16 activations from 32. Dense values are read in place, everything else is
// expanded to a row of bytes and multiplied as if dense.
#ifndef NM_KERNELS_NEON_INTEGER_ROWS_H_
#define NM_KERNELS_NEON_INTEGER_ROWS_H_

#include "neon_turns.h"

namespace nm {
namespace {

// Columns of one scale of the activations, and of one integer sum.
inline int64_t UnitColumns(const Layout& l) { return l.row_scales == 1 || l.scale_columns % 128 == 0 ? 128 : 32; }

inline int64_t PaddedUnits(const Layout& l) { return RoundUp(PaddedColumns(l) / UnitColumns(l), 4); }

// ---------------------------------------------------------------------------------------------------------------------
// Packed activations.

struct PackedRows {
  size_t natural;  // float32, for outliers
  size_t bytes;    // int8
  size_t scales;   // float32 a unit
  size_t total;
};

inline PackedRows PlanRows(const Layout& l, int64_t rows) {
  PackedRows p = {};
  Parts parts;
  p.natural = parts.Take(l.row_outliers > 0 ? rows * NaturalColumns(l) * 4 : 0);
  p.bytes = parts.Take(rows * PaddedColumns(l));
  p.scales = parts.Take(rows * PaddedUnits(l) * 4);
  p.total = parts.total();
  return p;
}

// Rounds a unit to int8 with its own scale. Activations that are not finite make the scale NaN, and so the outputs.
inline float PackUnit(const float* a, int64_t columns, int8_t* bytes) {
  uint32x4_t magnitudes = vdupq_n_u32(0);  // of floats as integers, which order alike
  for (int64_t i = 0; i < columns; i += 4) {
    magnitudes = vmaxq_u32(magnitudes, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(a + i))));
  }
  const uint32_t most_bits = vmaxvq_u32(magnitudes);
  float most;
  memcpy(&most, &most_bits, sizeof(most));
  const bool finite = most_bits < 0x7f800000u;
  if (!finite || most <= 0x1p-120f) {
    memset(bytes, 0, static_cast<size_t>(columns));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float inverse = 127.0f / most;
  const auto round = [inverse](const float* four) { return vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(four), inverse)); };
  for (int64_t i = 0; i < columns; i += 16) {
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(round(a + i)), round(a + i + 4));
    const int16x8_t high = vqmovn_high_s32(vqmovn_s32(round(a + i + 8)), round(a + i + 12));
    vst1q_s8(bytes + i, vqmovn_high_s16(vqmovn_s16(low), high));
  }
  return most / 127.0f;
}

inline void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedRows p = PlanRows(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t unit = UnitColumns(l);
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    if (l.row_outliers > 0) PackNatural(l, a, reinterpret_cast<float*>(base + p.natural) + row * NaturalColumns(l));
    int8_t* bytes = reinterpret_cast<int8_t*>(base + p.bytes) + row * PaddedColumns(l);
    float* scales = reinterpret_cast<float*>(base + p.scales) + row * PaddedUnits(l);
    memset(scales, 0, static_cast<size_t>(PaddedUnits(l)) * sizeof(float));
    for (int64_t column = 0; column < l.in_features; column += kTurn) {
      alignas(16) float padded[kTurn] = {};
      memcpy(padded, a + column, static_cast<size_t>(Min(kTurn, l.in_features - column)) * sizeof(float));
      for (int64_t i = 0; i < kTurn; i += unit) {
        scales[(column + i) / unit] = PackUnit(padded + i, unit, bytes + column + i);
      }
    }
  }
}

inline size_t PackedBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows).total; }

// ---------------------------------------------------------------------------------------------------------------------
// One output row times R activation rows, some turns of it.

template <int R>
struct Rows {
  const int8_t* a;  // at the first turn
  int64_t a_stride;
  const float* products;  // scale of the weights times scale of the activations, a unit; at the first turn
  int64_t products_stride;
  float32x4_t totals[R];
};

// The next 32 activations of a row. Such loads take no offset but may advance their address, if the compiler is kept
// from computing each address from the first.
NM_PIECE int8x16x2_t LoadNext(const int8_t*& a) {
  const int8x16x2_t both = vld1q_s8_x2(a);
  a += 32;
  asm("" : "+r"(a));
  return both;
}

template <class Dot, class Turns, class Values, int unit, int R>
NM_LOOP void RunTurns(const uint8_t* positions, const uint32_t* table, const uint8_t* values, int64_t turns,
                      Rows<R>& rows) {
  constexpr bool dense = Turns::kBytes == 0;
  float32x4_t totals[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) totals[r] = rows.totals[r];
  const int8_t* a[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) a[r] = rows.a + r * rows.a_stride;
  const float* products = rows.products;
  const int64_t products_stride = rows.products_stride;
  for (; turns > 0; --turns) {
    Indices indices;
    int8x16_t w[8];
    Turns::Load(positions, table, indices);
    Values::Load(values, w);
    if constexpr (dense) Values::Load(values + Values::kBytes, w + 4);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32x4_t sum = vdupq_n_s32(0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int8x16x2_t both = LoadNext(a[r]);
        if constexpr (dense) {
          sum = Dot::Add(Dot::Add(sum, w[2 * i], both.val[0]), w[2 * i + 1], both.val[1]);
        } else {
          sum = Dot::Add(sum, w[i], vqtbl2q_s8(both, indices.of[i]));
        }
        if (32 * (i + 1) % unit != 0) continue;
        const float scale = products[r * products_stride + 32 * i / unit];
        totals[r] = vfmaq_n_f32(totals[r], vcvtq_f32_s32(sum), scale);
        sum = vdupq_n_s32(0);
      }
    }
    positions += Turns::kBytes;
    values += (dense ? 2 : 1) * Values::kBytes;
    products += kTurn / unit;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) rows.totals[r] = totals[r];
}

// ---------------------------------------------------------------------------------------------------------------------
// All of it.

struct Scratch {
  size_t scales;    // float32 a unit of an output row
  size_t products;  // the same times the scales of four activation rows
  size_t indices;   // of vqtbl2, for more than four activation rows
  size_t bytes;     // an output row expanded to signed bytes
  size_t values;    // its stored values as signed bytes
  size_t total;
};

inline Scratch PlanScratch(const Layout& l, int64_t rows) {
  const bool expanded = !l.dense && !IsHalf(l);
  Scratch s = {};
  Parts parts;
  s.scales = parts.Take(PaddedUnits(l) * 4);
  s.products = parts.Take(4 * PaddedUnits(l) * 4);
  s.indices = parts.Take(IsHalf(l) && rows > 4 ? PaddedColumns(l) / kTurn * StoredTurns::kBytes : 0);
  s.bytes = parts.Take(expanded ? PaddedColumns(l) : 0);
  s.values = parts.Take(expanded ? SignedValuesBytes(l) : 0);
  s.total = parts.total();
  return s;
}

inline size_t ScratchBytes(const Layout& l, int64_t rows) { return PlanScratch(l, rows).total; }

// The scales of an output row, one for each unit, zero in the padding.
inline void UnitScales(const Layout& l, int64_t unit, int64_t output, int64_t padded_units, float* scales) {
  int64_t i = 0;
  for (int64_t group = 0; group < l.row_scales; ++group) {
    const float scale = ScaleOf(l, output, group);
    const int64_t last = Min((group + 1) * l.scale_columns, l.in_features);
    for (; i * unit < last; ++i) scales[i] = scale;
  }
  for (; i < padded_units; ++i) scales[i] = 0.0f;
}

// Runs a piece of work for one output row at a time.
template <class Dot, class Values, class Turns, int unit>
class Outputs {
 public:
  Outputs(const Layout& l, int64_t rows, const uint8_t* packed, uint8_t* scratch)
      : l_(l),
        rows_(rows),
        packed_(packed),
        plan_(PlanRows(l, rows)),
        scratch_(scratch),
        parts_(PlanScratch(l, rows)),
        reader_(l),
        columns_(PaddedColumns(l)),
        units_(PaddedUnits(l)),
        half_(IsHalf(l)),
        table_(half_ && !l.bitmap ? GetColumnTable(l.m) : nullptr) {}

  void Run(int64_t first, int64_t last, float* y, int64_t y_stride) {
    const bool stored = half_ && rows_ > 4;
    for (int64_t output = first; output < last; ++output) {
      UnitScales(l_, unit, output, units_, reinterpret_cast<float*>(scratch_ + parts_.scales));
      turns_ = TurnsInPlace(output);
      PrepareTail(output);
      if (!l_.dense && !half_) ExpandSigned(l_, reader_, output, scratch_ + parts_.values, scratch_ + parts_.bytes);
      if (stored) StoreTurns<Turns>(Positions(output), turns_, table_, scratch_ + parts_.indices);
      ForRows(rows_, [&](auto count, int64_t row) {
        constexpr int R = decltype(count)::value;
        Rows<R> sums = Prepare<R>(row);
        if (stored) {
          Multiply<StoredTurns>(scratch_ + parts_.indices, output, sums);
        } else {
          Multiply<Turns>(Positions(output), output, sums);
        }
        for (int r = 0; r < R; ++r) y[(row + r) * y_stride + output - first] = vaddvq_f32(sums.totals[r]);
      });
    }
    AddOutliers(l_, rows_, first, last, reinterpret_cast<const float*>(packed_ + plan_.natural), y, y_stride);
  }

 private:
  const Layout& l_;
  const int64_t rows_;
  const uint8_t* packed_;
  const PackedRows plan_;
  uint8_t* scratch_;
  const Scratch parts_;
  const MaskReader reader_;
  const int64_t columns_;
  const int64_t units_;  // padded
  const bool half_;
  const uint32_t* table_;
  int64_t turns_ = 0;  // of the present output row
  alignas(16) uint8_t tail_indices_[StoredTurns::kBytes];
  alignas(16) uint8_t tail_values_[kTurn];

  // Turns of an output row that are read where they are. int8 goes on into the next row, if there is one, times
  // activations that are zero; int4 cannot, for the last chunk of a row is laid out by its own length. Where there are
  // values enough, there are positions enough.
  int64_t TurnsInPlace(int64_t output) const {
    const int64_t complete = l_.in_features / kTurn;
    if (l_.dtype != NM_INT8 || (!l_.dense && l_.in_features % kBlock != 0)) return complete;
    const int64_t turns = columns_ / kTurn;
    const int64_t rows_left = l_.out_features - output;
    return turns * (l_.dense ? kTurn : kTurn / 2) > rows_left * l_.value_bytes ? complete : turns;
  }

  const uint8_t* Positions(int64_t output) const { return l_.positions + output * l_.position_bytes; }

  // Copies what follows those turns, so that it can be read like one.
  void PrepareTail(int64_t output) {
    const int64_t column = turns_ * kTurn;
    if (column >= l_.in_features || (!l_.dense && !half_)) return;
    memset(tail_values_, 0, sizeof(tail_values_));
    UnpackSigned(l_, l_.values + output * l_.value_bytes, l_.dense ? column : column / 2, l_.row_values, tail_values_);
    if (l_.dense) return;
    uint8_t positions[kTurnPositions];
    CopyTailPositions(l_, output, turns_ * Turns::kBytes, column, positions);
    StoreTurns<Turns>(positions, 1, table_, tail_indices_);
  }

  // R activation rows from `row` on, and weight scales times theirs.
  template <int R>
  Rows<R> Prepare(int64_t row) const {
    float* products = reinterpret_cast<float*>(scratch_ + parts_.products);
    const float* weights = reinterpret_cast<const float*>(scratch_ + parts_.scales);
    const float* rows = reinterpret_cast<const float*>(packed_ + plan_.scales) + row * units_;
    for (int64_t i = 0; i < R * units_; i += units_) {
      for (int64_t u = 0; u < units_; u += 4) {
        vst1q_f32(products + i + u, vmulq_f32(vld1q_f32(weights + u), vld1q_f32(rows + i + u)));
      }
    }
    const int8_t* a = reinterpret_cast<const int8_t*>(packed_ + plan_.bytes) + row * columns_;
    Rows<R> prepared = {a, columns_, products, units_, {}};
    for (float32x4_t& total : prepared.totals) total = vdupq_n_f32(0);
    return prepared;
  }

  template <class Source, int R>
  void Multiply(const uint8_t* positions, int64_t output, Rows<R>& rows) const {
    const uint8_t* values = l_.values + output * l_.value_bytes;
    if (!l_.dense && !half_) {
      return RunTurns<Dot, DenseTurns, Signed, unit>(nullptr, nullptr, scratch_ + parts_.bytes, columns_ / kTurn, rows);
    }
    if (l_.dense) {
      RunTurns<Dot, DenseTurns, Values, unit>(nullptr, nullptr, values, turns_, rows);
    } else {
      RunTurns<Dot, Source, Values, unit>(positions, table_, values, turns_, rows);
    }
    if (turns_ * kTurn >= l_.in_features) return;
    rows.a += turns_ * kTurn;
    rows.products += turns_ * kTurn / unit;
    if (l_.dense) {
      RunTurns<Dot, DenseTurns, Signed, unit>(nullptr, nullptr, tail_values_, 1, rows);
    } else {
      RunTurns<Dot, StoredTurns, Signed, unit>(tail_indices_, nullptr, tail_values_, 1, rows);
    }
  }
};

template <class Dot, class Values, class Turns>
void RunUnits(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
              float* y, int64_t y_stride) {
  if (UnitColumns(l) == 128)
    return Outputs<Dot, Values, Turns, 128>(l, rows, packed, scratch).Run(first, last, y, y_stride);
  Outputs<Dot, Values, Turns, 32>(l, rows, packed, scratch).Run(first, last, y, y_stride);
}

template <class Dot, class Values>
void RunIntegers(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
                 float* y, int64_t y_stride) {
  const auto run = l.bitmap   ? RunUnits<Dot, Values, MaskTurns>
                   : l.m == 4 ? RunUnits<Dot, Values, CodeTurns<12>>  // four codes of 2:4 make 12 bits
                              : RunUnits<Dot, Values, CodeTurns<14>>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, static_cast<uint8_t*>(scratch), y, y_stride);
}

template <int dtype>
bool SupportsIntegers(const Layout& l) {
  return l.dtype == dtype && l.in_features <= INT32_MAX - 1024 && (l.row_scales == 1 || l.scale_columns % 32 == 0);
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_NEON_INTEGER_ROWS_H_
