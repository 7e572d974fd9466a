// AVX2 kernels for few activation rows in float32: one output row at a time, one sequential stream per tensor.
//
// Where every second value is kept, float16 and bfloat16 are expanded in registers, for vpshufb moves eight of them at
// once. float32 values are left as they are and the activations compressed, as the four planes of their bytes, which
// vpshufb can permute, too (vpermps takes eight of the sixteen columns at once, a gather 20 cycles). Dense values are
// read in place. Everything else is expanded to a row of float32 and multiplied as if dense.
#include "avx2_float_loops.h"

namespace nm {
namespace {

bool UsesPlanes(const Layout& l) { return IsHalf(l) && l.dtype == NM_FLOAT32; }
bool UsesWords(const Layout& l) { return IsHalf(l) && (l.dtype == NM_FLOAT16 || l.dtype == NM_BFLOAT16); }
// Widening bfloat16 in the lanes of a vector leaves the middle fours of 16 columns changed.
bool UsesOrder(const Layout& l) { return UsesWords(l) && l.dtype == NM_BFLOAT16; }

// ---------------------------------------------------------------------------------------------------------------------
// Packed activations.

struct PackedRows {
  size_t natural;   // float32 in order
  size_t ordered;   // float32, of each 16 columns the second and the third four changed
  size_t planes;    // of each step of 64 columns: their lowest bytes, the next ones, …
  size_t poison;    // float32 a row: NaN where an activation is not finite, which a pruned column would hide, else 0
  size_t outliers;  // float32, for those
  size_t total;
};

PackedRows PlanRows(const Layout& l, int64_t rows) {
  PackedRows p = {};
  Parts parts;
  const bool planes = UsesPlanes(l);
  p.natural = parts.Take(!planes && !UsesOrder(l) ? rows * NaturalColumns(l) * 4 : 0);
  p.ordered = UsesOrder(l) ? parts.Take(rows * NaturalColumns(l) * 4) : p.natural;
  p.planes = parts.Take(planes ? rows * PaddedColumns(l) * 4 : 0);
  p.poison = parts.Take(rows * 4);
  p.outliers = parts.Take(OutlierActivationBytes(l, rows));
  p.total = parts.total();
  return p;
}

// The bytes of 16 floats: 16 lowest ones, … at distances of a step.
void SplitBytes(const float* a, uint8_t* planes) {
  const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m128i v[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm_shuffle_epi8(Load128(a + 4 * i), by_byte);
  const __m128i low01 = _mm_unpacklo_epi32(v[0], v[1]), low23 = _mm_unpacklo_epi32(v[2], v[3]);
  const __m128i high01 = _mm_unpackhi_epi32(v[0], v[1]), high23 = _mm_unpackhi_epi32(v[2], v[3]);
  const __m128i bytes[4] = {_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
                            _mm_unpacklo_epi64(high01, high23), _mm_unpackhi_epi64(high01, high23)};
  for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + i * kStep), bytes[i]);
}

void PackPlanes(const Layout& l, const float* a, uint8_t* planes) {
  for (int64_t column = 0; column < PaddedColumns(l); column += kStep, planes += 4 * kStep) {
    const float* step = a + column;
    float padded[kStep];
    const int64_t inside = l.in_features - column;
    if (inside < kStep) {
      memset(padded, 0, sizeof(padded));
      if (inside > 0) memcpy(padded, step, static_cast<size_t>(inside) * sizeof(float));
      step = padded;
    }
    for (int64_t block = 0; block < kStep; block += kBlock) SplitBytes(step + block, planes + block);
  }
}

void PackOrdered(const Layout& l, const float* a, float* row) {
  PackNatural(l, a, row);
  for (int64_t column = 0; column < PaddedColumns(l); column += kBlock) {
    const __m128 second = _mm_loadu_ps(row + column + 4), third = _mm_loadu_ps(row + column + 8);
    _mm_storeu_ps(row + column + 4, third);
    _mm_storeu_ps(row + column + 8, second);
  }
}

// 0, or NaN if any of the activations is not finite.
float PoisonOf(const float* a, int64_t count) {
  float zeros = 0;
  const __m256 zero = _mm256_setzero_ps();
  __m256 sum = zero;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), zero, sum);
  for (; i < count; ++i) zeros += a[i] * 0.0f;
  return zeros + Sum(sum);
}

void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedRows p = PlanRows(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const bool planes = UsesPlanes(l);
  PackOutlierActivations(l, a, first, count, rows, reinterpret_cast<float*>(base + p.outliers));
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    if (!planes && !UsesOrder(l)) {
      PackNatural(l, a, reinterpret_cast<float*>(base + p.natural) + row * NaturalColumns(l));
    }
    if (UsesOrder(l)) PackOrdered(l, a, reinterpret_cast<float*>(base + p.ordered) + row * NaturalColumns(l));
    if (planes) PackPlanes(l, a, base + p.planes + row * PaddedColumns(l) * 4);
    reinterpret_cast<float*>(base + p.poison)[row] = planes ? PoisonOf(a, l.in_features) : 0.0f;
  }
}

size_t PackedBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows).total; }

// ---------------------------------------------------------------------------------------------------------------------
// All of it.

struct Scratch {
  size_t floats;  // an output row expanded to float32
  size_t bytes;   // one of integers as signed bytes
  size_t values;  // its stored values as signed bytes
  size_t total;
};

Scratch PlanScratch(const Layout& l) {
  Scratch s = {};
  Parts parts;
  const bool integers = IsInteger(l.dtype);
  const bool expanded = integers || (!l.dense && !UsesPlanes(l) && !UsesWords(l));
  s.floats = parts.Take(expanded ? PaddedColumns(l) * 4 : 0);
  s.bytes = parts.Take(integers ? PaddedColumns(l) : 0);
  s.values = parts.Take(integers && !l.dense ? SignedValuesBytes(l) : 0);
  s.total = parts.total();
  return s;
}

size_t ScratchBytes(const Layout& l, int64_t) { return PlanScratch(l).total; }

struct Call {
  const Layout& l;
  int64_t rows;
  const uint8_t* packed;
  PackedRows plan;
  uint8_t* scratch;
  Scratch parts;
  PositionReader reader;
  const uint32_t* column_table;
  const uint16_t* mask_table;

  const float* Ordered(int64_t row) const {
    return reinterpret_cast<const float*>(packed + plan.ordered) + row * NaturalColumns(l);
  }
  const float* Natural(int64_t row) const {
    return reinterpret_cast<const float*>(packed + plan.natural) + row * NaturalColumns(l);
  }
  float Poison(int64_t row) const { return reinterpret_cast<const float*>(packed + plan.poison)[row]; }
};

template <int R>
void Store(const Call& c, int64_t row, const __m256 (&sums)[R][4], float* y, int64_t y_stride) {
  for (int r = 0; r < R; ++r) {
    const float sum = Sum(_mm256_add_ps(_mm256_add_ps(sums[r][0], sums[r][1]), _mm256_add_ps(sums[r][2], sums[r][3])));
    y[(row + r) * y_stride] = sum + c.Poison(row + r);
  }
}

template <class Pairs>
void PlanesOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  const Layout& l = c.l;
  const uint8_t* positions = l.positions + output * l.position_bytes;
  const uint8_t* values = l.values + output * l.value_bytes;
  const int64_t whole = l.in_features / kPair;
  const int64_t whole_bytes = whole * kPair / 2 * Float32::kBytes;
  const bool odd_step = EndsInOddStep(l);
  const bool copies = !odd_step && whole * kPair < l.in_features;
  uint8_t tail_positions[16], tail_values[kPair / 2 * Float32::kBytes];
  if (copies) {
    CopyTailPositions(l, output, whole * Pairs::kBytes, whole * kPair, tail_positions, sizeof(tail_positions));
    memset(tail_values, 0, sizeof(tail_values));
    memcpy(tail_values, values + whole_bytes, static_cast<size_t>(l.value_bytes - whole_bytes));
  }
  ForRows(c.rows, [&](auto count, int64_t row) {
    constexpr int R = decltype(count)::value;
    const int64_t stride = PaddedColumns(l) * 4;
    const uint8_t* planes = c.packed + c.plan.planes + row * stride;
    __m256 sums[R][4];
    for (auto& lanes : sums) {
      for (__m256& lane : lanes) lane = _mm256_setzero_ps();
    }
    const uint8_t* last_planes = planes + whole * kPair * 4;
    if (whole > 0) HalfPairs<Pairs>(positions, c.column_table, values, whole, planes, stride, sums);
    if (copies) HalfPairs<Pairs>(tail_positions, c.column_table, tail_values, 1, last_planes, stride, sums);
    if (odd_step) {
      LastHalfStep<Pairs>(positions + whole * Pairs::kBytes, c.column_table, values + whole_bytes, last_planes, stride,
                          sums);
    }
    Store(c, row, sums, y, y_stride);
  });
}

template <class Type, class Masks>
void WordsOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  const Layout& l = c.l;
  const uint8_t* positions = l.positions + output * l.position_bytes;
  const uint8_t* values = l.values + output * l.value_bytes;
  const int64_t whole = l.in_features / kPair;
  const bool odd_step = EndsInOddStep(l);
  const bool copies = !odd_step && whole * kPair < l.in_features;
  uint8_t tail_positions[16], tail_values[kPair];
  if (copies) {
    CopyTailPositions(l, output, whole * Masks::kBytes, whole * kPair, tail_positions, sizeof(tail_positions));
    memset(tail_values, 0, sizeof(tail_values));
    memcpy(tail_values, values + whole * kPair, static_cast<size_t>(l.value_bytes - whole * kPair));
  }
  ForRows(c.rows, [&](auto count, int64_t row) {
    constexpr int R = decltype(count)::value;
    const int64_t stride = NaturalColumns(l);
    __m256 sums[R][4];
    for (auto& lanes : sums) {
      for (__m256& lane : lanes) lane = _mm256_setzero_ps();
    }
    WordPairs<Type, Masks>(positions, c.mask_table, values, whole, odd_step, c.Ordered(row), stride, sums);
    if (copies) {
      WordPairs<Type, Masks>(tail_positions, c.mask_table, tail_values, 1, false, c.Ordered(row) + whole * kPair,
                             stride, sums);
    }
    Store(c, row, sums, y, y_stride);
  });
}

template <class Type>
void DenseOutput(const Call& c, const uint8_t* values, int64_t columns, float* y, int64_t y_stride) {
  ForRows(c.rows, [&](auto count, int64_t row) {
    constexpr int R = decltype(count)::value;
    __m256 sums[R][4];
    for (auto& lanes : sums) {
      for (__m256& lane : lanes) lane = _mm256_setzero_ps();
    }
    DenseColumns<Type>(values, columns, c.Natural(row), NaturalColumns(c.l), sums);
    Store(c, row, sums, y, y_stride);
  });
}

template <class Type>
void FloatOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  const Layout& l = c.l;
  if (l.dense) {
    return DenseOutput<Type>(c, l.values + output * l.value_bytes, l.in_features, y, y_stride);
  }
  if constexpr (Type::kBytes == 4) {
    if (UsesPlanes(l)) {
      const auto half = l.bitmap   ? PlanesOutput<MaskPairs<Order::kLanes>>
                        : l.m == 4 ? PlanesOutput<CodePairs<12, Order::kLanes>>
                                   : PlanesOutput<CodePairs<14, Order::kLanes>>;
      return half(c, output, y, y_stride);
    }
  } else if (UsesWords(l)) {
    const auto half = l.bitmap   ? WordsOutput<Type, StoredMasks>
                      : l.m == 4 ? WordsOutput<Type, CodeMasks<12>>
                                 : WordsOutput<Type, CodeMasks<14>>;
    return half(c, output, y, y_stride);
  }
  float* floats = reinterpret_cast<float*>(c.scratch + c.parts.floats);
  ExpandFloats<Type>(l, c.reader, output, floats);
  DenseOutput<Float32>(c, c.scratch + c.parts.floats, PaddedColumns(l), y, y_stride);
}

void IntegerOutput(const Call& c, int64_t output, float* y, int64_t y_stride) {
  uint8_t* bytes = c.scratch + c.parts.bytes;
  ExpandSigned(c.l, c.reader, output, c.scratch + c.parts.values, bytes);
  ScaleSigned(c.l, output, bytes, reinterpret_cast<float*>(c.scratch + c.parts.floats));
  DenseOutput<Float32>(c, c.scratch + c.parts.floats, PaddedColumns(c.l), y, y_stride);
}

template <void (*output_kernel)(const Call&, int64_t, float*, int64_t)>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const Call call = {l,
                     rows,
                     static_cast<const uint8_t*>(packed),
                     PlanRows(l, rows),
                     static_cast<uint8_t*>(scratch),
                     PlanScratch(l),
                     PositionReader(l),
                     UsesPlanes(l) && !l.bitmap ? GetColumnTable(l.m) : nullptr,
                     UsesWords(l) && !l.bitmap ? GetFieldTable(l.n, l.m).masks : nullptr};
  const float* outliers = reinterpret_cast<const float*>(call.packed + call.plan.outliers);
  for (int64_t end; first < last; y += end - first, first = end) {
    end = Min(first + kFewOutlierOutputs, last);
    for (int64_t output = first; output < end; ++output) {
      PrefetchOutliers(l, output);
      output_kernel(call, output, y + output - first, y_stride);
    }
    if (l.row_outliers > 0) AddOutliers(l, rows, outliers, first, end, y, y_stride);
  }
}

template <int dtype>
bool Supports(const Layout& l) {
  return l.dtype == dtype && l.in_features <= INT32_MAX - 1024 && (l.row_scales <= 1 || l.scale_columns % 8 == 0);
}

constexpr int64_t kMostRows = 6;  // from then on panels are faster
constexpr Kernel kKernels[] = {
    {"float32 rows", Isa::kAvx2, false, 1, kMostRows, Supports<NM_FLOAT32>, PackedBytes, PackRows, ScratchBytes,
     Run<FloatOutput<Float32>>},
    {"float16 rows", Isa::kAvx2, false, 1, kMostRows, Supports<NM_FLOAT16>, PackedBytes, PackRows, ScratchBytes,
     Run<FloatOutput<Float16>>},
    {"bfloat16 rows", Isa::kAvx2, false, 1, kMostRows, Supports<NM_BFLOAT16>, PackedBytes, PackRows, ScratchBytes,
     Run<FloatOutput<Bfloat16>>},
    {"int8 rows", Isa::kAvx2, false, 1, kMostRows, Supports<NM_INT8>, PackedBytes, PackRows, ScratchBytes,
     Run<IntegerOutput>},
    {"int4 rows", Isa::kAvx2, false, 1, kMostRows, Supports<NM_INT4>, PackedBytes, PackRows, ScratchBytes,
     Run<IntegerOutput>},
};

}  // namespace

KernelList Avx2FloatRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
