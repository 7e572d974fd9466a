// NEON kernels for few activation rows in float32: one output row at a time, one sequential stream per tensor.
//
// Where eight of 16 columns are kept, stored values are expanded in registers, eight columns at a time, by indices of
// vqtbl2 from a table: one instruction brings four float32 or eight 16-bit values to their columns, and activations
// stay as they are. (Compressing the activations instead takes a vqtbl4, three times the work, for every four of them,
// and again for each row.) Dense values are read in place. Everything else, and any pattern with more than four rows,
// is expanded to a row of float32 and multiplied as if dense.
#include "neon_rows.h"

namespace nm {
namespace {

constexpr int64_t kMostRowsInPlace = 4;  // above it the same values would be expanded again

bool IsInPlace(const Layout& l, int64_t rows) {
  return !IsInteger(l.dtype) && (l.dense || (IsHalf(l) && rows <= kMostRowsInPlace));
}

// ---------------------------------------------------------------------------------------------------------------------
// Floating-point types: eight values, and how they come to their columns as float32, zero elsewhere.

struct Float32 {
  static constexpr int kBytes = 4;
  using Eight = uint8x16x2_t;
  static NM_PIECE Eight Load(const uint8_t* v) { return vld1q_u8_x2(v); }
  static NM_PIECE Eight Spread(Eight v, const uint8_t* index) {
    return {{vqtbl2q_u8(v, vld1q_u8(index)), vqtbl2q_u8(v, vld1q_u8(index + 16))}};
  }
  static NM_PIECE float32x4x2_t Widen(Eight v) {
    return {{vreinterpretq_f32_u8(v.val[0]), vreinterpretq_f32_u8(v.val[1])}};
  }
};

struct Words {
  static constexpr int kBytes = 2;
  using Eight = uint8x16_t;
  static NM_PIECE Eight Load(const uint8_t* v) { return vld1q_u8(v); }
  static NM_PIECE Eight Spread(Eight v, const uint8_t* index) { return vqtbl1q_u8(v, vld1q_u8(index)); }
};

struct Float16 : Words {
  static NM_PIECE float32x4x2_t Widen(Eight v) {
    const float16x8_t halves = vreinterpretq_f16_u8(v);
    return {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)}};
  }
};

struct Bfloat16 : Words {
  static NM_PIECE float32x4x2_t Widen(Eight v) {
    const uint16x8_t words = vreinterpretq_u16_u8(v);
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))}};
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sums of R activation rows: enough of them that none has to wait for the one before it, few enough to stay in
// registers.

template <int R>
struct Sums {
  static constexpr int kCount = R < 4 ? 4 : 2;
  float32x4_t of[R][kCount];
};

template <int R>
NM_PIECE void Copy(const Sums<R>& from, Sums<R>& to) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < Sums<R>::kCount; ++i) to.of[r][i] = from.of[r][i];
  }
}

// Eight columns, the first or the last of 16.
template <int first, int R>
NM_PIECE void MultiplyEight(float32x4x2_t w, const float* a, int64_t a_stride, Sums<R>& sums) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float32x4_t* at = sums.of[r] + first / 4 % Sums<R>::kCount;
    at[0] = vfmaq_f32(at[0], w.val[0], vld1q_f32(a + r * a_stride + first));
    at[1] = vfmaq_f32(at[1], w.val[1], vld1q_f32(a + r * a_stride + first + 4));
  }
}

// The masks of a turn: from two loads, each with the fields of four blocks from its lowest bit on.
template <int kBits>
struct CodeMasks {
  static constexpr int kBytes = kBits;  // of eight fields
  static NM_PIECE uint64_t First(const uint8_t* p) { return Load64(p); }
  static NM_PIECE uint64_t Second(const uint8_t* p) { return Load64(p + kBytes - 8) >> (64 - 4 * kBits); }
  static NM_PIECE uint32_t Mask(uint64_t fields, int i, const uint16_t* table) {
    return table[fields >> (kBits * i) & ((1 << kBits) - 1)];
  }
};
struct StoredMasks {
  static constexpr int kBytes = 16;
  static NM_PIECE uint64_t First(const uint8_t* p) { return Load64(p); }
  static NM_PIECE uint64_t Second(const uint8_t* p) { return Load64(p + 8); }
  static NM_PIECE uint32_t Mask(uint64_t fields, int i, const uint16_t*) {
    return static_cast<uint32_t>(fields >> (16 * i) & 0xffff);
  }
};

template <class Type, class Masks, int R>
NM_LOOP void HalfTurns(const uint8_t* positions, const uint16_t* table, const uint8_t* values, int64_t turns,
                       const float* a, int64_t a_stride, Sums<R>& totals) {
  constexpr int64_t kEight = 8 * Type::kBytes;
  const uint8_t* low = kSpread<Type::kBytes>.low[0];
  const uint8_t* high = kSpread<Type::kBytes>.high[0];
  asm("" : "+r"(high));  // an address of its own, not an addition to the other one for each block
  Sums<R> sums;
  Copy<R>(totals, sums);
  for (; turns > 0; --turns, positions += Masks::kBytes) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint64_t fields = half == 0 ? Masks::First(positions) : Masks::Second(positions);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, values += kEight, a += kBlock) {
        const uint32_t mask = Masks::Mask(fields, i, table);
        const typename Type::Eight eight = Type::Load(values);
        MultiplyEight<0, R>(Type::Widen(Type::Spread(eight, low + kEight * (mask & 255))), a, a_stride, sums);
        MultiplyEight<8, R>(Type::Widen(Type::Spread(eight, high + kEight * (mask >> 8))), a, a_stride, sums);
      }
    }
  }
  Copy<R>(sums, totals);
}

// Values of every column: `columns` of them.
template <class Type, int R>
NM_LOOP void DenseColumns(const uint8_t* values, int64_t columns, const float* a, int64_t a_stride, Sums<R>& totals) {
  constexpr int64_t kBytes = kBlock * Type::kBytes;
  Sums<R> sums;
  Copy<R>(totals, sums);
  const auto multiply = [&](const uint8_t* v, const float* at) __attribute__((always_inline)) {
    MultiplyEight<0, R>(Type::Widen(Type::Load(v)), at, a_stride, sums);
    MultiplyEight<8, R>(Type::Widen(Type::Load(v + kBytes / 2)), at, a_stride, sums);
  };
  for (; columns >= 2 * kBlock; columns -= 2 * kBlock, values += 2 * kBytes, a += 2 * kBlock) {
    multiply(values, a);
    multiply(values + kBytes, a + kBlock);
  }
  for (; columns > 0; columns -= kBlock, values += kBytes, a += kBlock) {
    uint8_t padded[kBytes] = {};
    memcpy(padded, values, static_cast<size_t>(Min(columns * Type::kBytes, kBytes)));
    multiply(padded, a);
  }
  Copy<R>(sums, totals);
}

// ---------------------------------------------------------------------------------------------------------------------
// All of it.

struct Scratch {
  size_t floats;  // an output row expanded to float32
  size_t bytes;   // one of integers as signed bytes
  size_t values;  // its stored values as signed bytes
  size_t total;
};

Scratch PlanScratch(const Layout& l, int64_t rows) {
  Scratch s = {};
  Parts parts;
  const bool integers = IsInteger(l.dtype);
  s.floats = parts.Take(IsInPlace(l, rows) ? 0 : PaddedColumns(l) * 4);
  s.bytes = parts.Take(integers ? PaddedColumns(l) : 0);
  s.values = parts.Take(integers && !l.dense ? SignedValuesBytes(l) : 0);
  s.total = parts.total();
  return s;
}

size_t ScratchBytes(const Layout& l, int64_t rows) { return PlanScratch(l, rows).total; }

size_t PackedBytes(const Layout& l, int64_t rows) {
  return static_cast<size_t>(rows * NaturalColumns(l)) * sizeof(float);
}

void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t, void* packed) {
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    PackNatural(l, a, static_cast<float*>(packed) + row * NaturalColumns(l));
  }
}

struct Call {
  const Layout& l;
  int64_t rows;
  const float* a;
  uint8_t* scratch;
  Scratch parts;
  MaskReader reader;
  const uint16_t* mask_table;

  // An output row times all activation rows: run(a, a_stride, sums) for up to four of them.
  template <class Body>
  void Multiply(float* y, int64_t y_stride, const Body& run) const {
    ForRows(rows, [&](auto count, int64_t row) {
      constexpr int R = decltype(count)::value;
      Sums<R> sums;
      for (auto& lanes : sums.of) {
        for (float32x4_t& lane : lanes) lane = vdupq_n_f32(0);
      }
      run(a + row * NaturalColumns(l), NaturalColumns(l), sums);
      for (int r = 0; r < R; ++r) {
        float32x4_t sum = vaddq_f32(sums.of[r][0], sums.of[r][1]);
        for (int i = 2; i < Sums<R>::kCount; ++i) sum = vaddq_f32(sum, sums.of[r][i]);
        y[(row + r) * y_stride] = vaddvq_f32(sum);
      }
    });
  }
};

template <class Type>
void DenseOutput(const Call& c, const uint8_t* values, int64_t columns, float* y, int64_t y_stride) {
  c.Multiply(y, y_stride, [&](const float* a, int64_t a_stride, auto& sums) {
    DenseColumns<Type>(values, columns, a, a_stride, sums);
  });
}

template <class Type, class Masks>
void HalfOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  constexpr int64_t kTurnValues = kTurn / 2 * Type::kBytes;
  const Layout& l = c.l;
  const uint8_t* positions = l.positions + output * l.position_bytes;
  const uint8_t* values = l.values + output * l.value_bytes;
  const int64_t whole = l.in_features / kTurn;
  uint8_t tail_positions[kTurnPositions], tail_values[kTurnValues];
  if (whole * kTurn < l.in_features) {
    CopyTailPositions(l, output, whole * Masks::kBytes, whole * kTurn, tail_positions);
    memset(tail_values, 0, sizeof(tail_values));
    memcpy(tail_values, values + whole * kTurnValues, static_cast<size_t>(l.value_bytes - whole * kTurnValues));
  }
  c.Multiply(y, y_stride, [&](const float* a, int64_t a_stride, auto& sums) {
    HalfTurns<Type, Masks>(positions, c.mask_table, values, whole, a, a_stride, sums);
    if (whole * kTurn == l.in_features) return;
    HalfTurns<Type, Masks>(tail_positions, c.mask_table, tail_values, 1, a + whole * kTurn, a_stride, sums);
  });
}

// An output row of floats as float32, pruned columns zero.
template <class Type>
void ExpandFloats(const Layout& l, const MaskReader& reader, int64_t output, float* floats) {
  const uint8_t* values = l.values + output * l.value_bytes;
  SpreadRow<Type::kBytes>(l, reader, output, values, values + l.value_bytes,
                          [floats](const uint8_t* next, uint32_t mask, int64_t left, int64_t column) {
                            uint8_t padded[8 * Type::kBytes] = {};
                            if (left < static_cast<int64_t>(sizeof(padded))) {
                              memcpy(padded, next, static_cast<size_t>(left));
                              next = padded;
                            }
                            const uint8_t* index = kSpread<Type::kBytes>.low[mask];
                            vst1q_f32_x2(floats + column, Type::Widen(Type::Spread(Type::Load(next), index)));
                          });
  memset(floats + l.in_features, 0, static_cast<size_t>(PaddedColumns(l) - l.in_features) * sizeof(float));
}

template <class Type>
void FloatOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  const Layout& l = c.l;
  if (l.dense) return DenseOutput<Type>(c, l.values + output * l.value_bytes, l.in_features, y, y_stride);
  if (IsInPlace(l, c.rows)) {
    const auto half = l.bitmap   ? HalfOutput<Type, StoredMasks>
                      : l.m == 4 ? HalfOutput<Type, CodeMasks<12>>  // four codes of 2:4 make 12 bits
                                 : HalfOutput<Type, CodeMasks<14>>;
    return half(c, output, y, y_stride);
  }
  uint8_t* floats = c.scratch + c.parts.floats;
  ExpandFloats<Type>(l, c.reader, output, reinterpret_cast<float*>(floats));
  DenseOutput<Float32>(c, floats, PaddedColumns(l), y, y_stride);
}

// Signed bytes times the scales of their columns, which change at multiples of 4.
void ScaleSigned(const Layout& l, int64_t output, const uint8_t* bytes, float* floats) {
  for (int64_t group = 0, column = 0; group < l.row_scales; ++group) {
    const float scale = ScaleOf(l, output, group);
    const int64_t last = group + 1 < l.row_scales ? column + l.scale_columns : PaddedColumns(l);
    for (; column < last; column += 4) {
      uint32_t four;
      memcpy(&four, bytes + column, sizeof(four));
      const int32x4_t values = vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
      vst1q_f32(floats + column, vmulq_n_f32(vcvtq_f32_s32(values), scale));
    }
  }
}

void IntegerOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  uint8_t* bytes = c.scratch + c.parts.bytes;
  uint8_t* floats = c.scratch + c.parts.floats;
  ExpandSigned(c.l, c.reader, output, c.scratch + c.parts.values, bytes);
  ScaleSigned(c.l, output, bytes, reinterpret_cast<float*>(floats));
  DenseOutput<Float32>(c, floats, PaddedColumns(c.l), y, y_stride);
}

template <void (*output_kernel)(const Call&, int64_t, float*, int64_t)>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const bool coded = !IsInteger(l.dtype) && IsHalf(l) && !l.bitmap;
  const Call call = {l,
                     rows,
                     static_cast<const float*>(packed),
                     static_cast<uint8_t*>(scratch),
                     PlanScratch(l, rows),
                     MaskReader(l),
                     coded ? GetFieldTable(l.n, l.m).masks : nullptr};
  for (int64_t output = first; output < last; ++output) output_kernel(call, output, y + output - first, y_stride);
  AddOutliers(l, rows, first, last, call.a, y, y_stride);
}

template <int dtype>
bool Supports(const Layout& l) {
  return l.dtype == dtype && l.in_features <= INT32_MAX - 1024;
}

constexpr Kernel kKernels[] = {
    {"float32 rows", Isa::kNeon, false, 1, INT64_MAX, Supports<NM_FLOAT32>, PackedBytes, PackRows, ScratchBytes,
     Run<FloatOutput<Float32>>},
    {"float16 rows", Isa::kNeon, false, 1, INT64_MAX, Supports<NM_FLOAT16>, PackedBytes, PackRows, ScratchBytes,
     Run<FloatOutput<Float16>>},
    {"bfloat16 rows", Isa::kNeon, false, 1, INT64_MAX, Supports<NM_BFLOAT16>, PackedBytes, PackRows, ScratchBytes,
     Run<FloatOutput<Bfloat16>>},
    {"int8 rows", Isa::kNeon, false, 1, INT64_MAX, Supports<NM_INT8>, PackedBytes, PackRows, ScratchBytes,
     Run<IntegerOutput>},
    {"int4 rows", Isa::kNeon, false, 1, INT64_MAX, Supports<NM_INT4>, PackedBytes, PackRows, ScratchBytes,
     Run<IntegerOutput>},
};

}  // namespace

KernelList NeonFloatRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
