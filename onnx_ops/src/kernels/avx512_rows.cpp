// AVX-512 kernels for few activation rows: one output row at a time, one sequential stream per tensor, 64 columns a
// step, and nothing unpacked to memory but the masks of the row. A weight vector is unpacked once for all rows.
#include "avx512_common.h"
#include "kernels.h"

namespace nm {
namespace {

// How the stored values of a step are loaded.
enum class Density {
  kHalf,     // n·2 = m, m at most 16: 8 values for each 16 columns
  kGeneral,  // 64·n/m values for 64 columns
  kDense,    // no positions
};

// Values of a step; a constant where the pattern is, which the loops need to be unrolled.
template <Density density>
inline int64_t StepValues(int64_t general) {
  return density == Density::kHalf ? kStep / 2 : density == Density::kDense ? kStep : general;
}

Density DensityOf(const Layout& l) {
  if (l.dense) return Density::kDense;
  return l.n * 2 == l.m && l.m <= 16 ? Density::kHalf : Density::kGeneral;
}

// ---------------------------------------------------------------------------------------------------------------------
// Packed activations. All rows of a kind lie together; each is padded with zeros to whole steps.

int64_t BlockColumns(const Layout& l) {  // columns of one int8 activation scale, and of one integer accumulator
  if (l.scale_columns >= l.in_features) return 128;
  return l.scale_columns % 256 == 0 ? 256 : l.scale_columns % 128 == 0 ? 128 : 64;
}

struct PackedRows {
  int64_t columns;  // padded
  int64_t blocks;
  int64_t natural_columns;  // padded so that any position byte stays inside
  int64_t ordered_columns;
  size_t natural;  // float32 in order, for the outliers and for float32 and float16 weights
  size_t ordered;  // float32 in the order of the weight vectors
  size_t bytes;    // int8
  size_t starts;   // int32[16] a block: −offset times the sum of the four bytes of a lane
  size_t scales;   // float32 a block
  size_t bases;    // int32 an outlier: first column of its block
  size_t total;
};

int Interleave(const Layout& l) { return IsInteger(l.dtype) ? 4 : l.dtype == NM_BFLOAT16 ? 2 : 1; }

PackedRows PlanRows(const Layout& l, int64_t rows, bool int8_activations) {
  PackedRows p = {};
  const int64_t block = BlockColumns(l);
  p.columns = RoundUp(l.in_features, kStep);
  p.blocks = (l.in_features + block - 1) / block;
  p.natural_columns = p.columns + kLargestOutlierBlock;
  size_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const size_t start = at;
    at += static_cast<size_t>(RoundUp(bytes, 64));
    return start;
  };
  const bool needs_natural = l.row_outliers > 0 || (!int8_activations && Interleave(l) == 1);
  p.natural = take(needs_natural ? rows * p.natural_columns * 4 : 0);
  p.ordered_columns = Interleave(l) == 1 ? p.natural_columns : p.columns;
  p.ordered = Interleave(l) == 1 ? p.natural : take(int8_activations ? 0 : rows * p.columns * 4);
  p.bytes = take(int8_activations ? rows * p.columns : 0);
  p.starts = take(int8_activations ? rows * p.blocks * 64 : 0);
  p.scales = take(int8_activations ? rows * RoundUp(p.blocks, 16) * 4 : 0);
  p.bases = take(RoundUp(l.row_outliers, 16) * 4);
  p.total = at;
  return p;
}

void PackNatural(const Layout& l, const PackedRows& p, const float* a, float* row) {
  memcpy(row, a, static_cast<size_t>(l.in_features) * sizeof(float));
  memset(row + l.in_features, 0, static_cast<size_t>(p.natural_columns - l.in_features) * sizeof(float));
}

// Within each step: all columns 0 mod k, then all 1 mod k, … in the groups of 16 that shifted weight lanes meet.
void PackInterleaved(const Layout& l, const PackedRows& p, const float* a, int k, float* row) {
  for (int64_t column = 0; column < p.columns; column += 16 * k) {
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(k));
    for (int j = 0; j < k; ++j) {
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(column + j)));
      const __mmask16 inside = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(static_cast<int>(l.in_features)));
      const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, a, 4);
      _mm512_store_ps(row + column + 16 * j, values);
    }
  }
}

// Rounds one block to int8 with its own scale. Activations that are not finite make the scale NaN, and so the outputs.
float PackInt8Block(const float* a, int64_t count, int offset, uint8_t* bytes, int32_t* starts) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(LowMask(count - i)), a + i);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
  const bool finite = bits < 0x7f800000u;
  const __m512 inverse = _mm512_set1_ps(finite && most > 0x1p-120f ? 127.0f / most : 0.0f);
  __m512i sums = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < RoundUp(count, kStep); i += 16) {
    const __m512 values = _mm512_maskz_loadu_ps(static_cast<__mmask16>(LowMask(count > i ? count - i : 0)), a + i);
    const __m512i rounded = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse)) : _mm512_setzero_si512();
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtsepi32_epi8(rounded));
  }
  for (int64_t i = 0; i < RoundUp(count, kStep); i += kStep) {
    sums = _mm512_dpbusd_epi32(sums, ones, _mm512_load_si512(bytes + i));
  }
  _mm512_store_si512(starts, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-offset)));
  if (!finite) return __builtin_nanf("");
  return most > 0x1p-120f ? most / 127.0f : 0.0f;
}

void PackRows(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed,
              bool int8_activations) {
  const PackedRows p = PlanRows(l, rows, int8_activations);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int k = Interleave(l);
  for (int64_t row = first; row < first + count; ++row, a += l.in_features) {
    if (l.row_outliers > 0 || (!int8_activations && k == 1)) {
      PackNatural(l, p, a, reinterpret_cast<float*>(base + p.natural) + row * p.natural_columns);
    }
    if (int8_activations) {
      const int64_t block = BlockColumns(l);
      for (int64_t b = 0; b < p.blocks; ++b) {
        const float scale = PackInt8Block(a + b * block, Min(block, l.in_features - b * block),
                                          l.dtype == NM_INT8 ? 128 : 8, base + p.bytes + row * p.columns + b * block,
                                          reinterpret_cast<int32_t*>(base + p.starts) + (row * p.blocks + b) * 16);
        reinterpret_cast<float*>(base + p.scales)[row * RoundUp(p.blocks, 16) + b] = scale;
      }
    } else if (k > 1) {
      PackInterleaved(l, p, a, k, reinterpret_cast<float*>(base + p.ordered) + row * p.columns);
    }
  }
  if (first == 0) {
    int32_t* bases = reinterpret_cast<int32_t*>(base + p.bases);
    for (int64_t i = 0; i < l.row_outliers; ++i) bases[i] = static_cast<int32_t>(i / l.outlier_k * l.outlier_block);
  }
}

void PackFloats(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  PackRows(l, a, first, count, rows, packed, false);
}
void PackBytes(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  PackRows(l, a, first, count, rows, packed, true);
}
size_t FloatRowsBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows, false).total; }
size_t Int8RowsBytes(const Layout& l, int64_t rows) { return PlanRows(l, rows, true).total; }

// ---------------------------------------------------------------------------------------------------------------------
// Outliers: sixteen at a time, the activations gathered.

float OutlierDot(const Layout& l, int64_t output, const int32_t* bases, const float* a) {
  const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
  const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
  const bool half = l.outlier_dtype == NM_FLOAT16;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < l.row_outliers; i += 16) {
    const int64_t left = l.row_outliers - i;
    const __mmask16 inside = static_cast<__mmask16>(LowMask(left));
    _mm_prefetch(reinterpret_cast<const char*>(values + 2 * i + kPrefetch), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(positions + i + kPrefetch), _MM_HINT_T0);
    const __m512i index = _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, positions + i)),
                                           _mm512_load_si512(bases + i));
    const __m512 weights = half ? HalvesToFloats(values + 2 * i, left) : _mm512_maskz_loadu_ps(inside, values + 4 * i);
    const __m512 gathered = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, a, 4);
    sum = _mm512_fmadd_ps(weights, gathered, sum);
  }
  return Sum(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Floating-point weights.

constexpr int kAccumulators = 4;

template <int n>
struct Count {
  static constexpr int value = n;
};

// Activation rows by four, each group with a kernel of its own size.
template <class Body>
void ForRows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(Count<4>(), r);
  if (rows - r == 3) body(Count<3>(), r);
  if (rows - r == 2) body(Count<2>(), r);
  if (rows - r == 1) body(Count<1>(), r);
}

void StoreSums(const Layout& l, const PackedRows& p, const uint8_t* packed, int64_t output, int64_t row, int count,
               const float* sums, float* y, int64_t y_stride) {
  for (int64_t r = row; r < row + count; ++r) {
    float sum = sums[r - row];
    if (l.row_outliers > 0) {
      sum += OutlierDot(l, output, reinterpret_cast<const int32_t*>(packed + p.bases),
                        reinterpret_cast<const float*>(packed + p.natural) + r * p.natural_columns);
    }
    y[r * y_stride] = sum;
  }
}

struct Float32 {
  static constexpr int kBytes = 4;
  template <Density density, int R>
  static void Step(const uint8_t* v, uint64_t mask, int64_t values, const float* a, int64_t a_stride,
                   __m512 (&sums)[R][kAccumulators]) {
    for (int i = 0; i < 4; ++i) {
      __m512 w;
      if constexpr (density == Density::kDense) {
        w = _mm512_loadu_ps(v + 64 * i);
      } else {
        const __mmask16 k = static_cast<__mmask16>(mask >> (16 * i));
        if constexpr (density == Density::kHalf) {
          w = ExpandFloats(k, _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(v + 32 * i))));
        } else {
          // 16 columns of a 32-wide group keep any number of values: count them, but stay inside the step.
          const int64_t count = Min(_mm_popcnt_u32(k), values);
          w = ExpandFloats(k, _mm512_maskz_loadu_ps(static_cast<__mmask16>(LowMask(count)), v));
          v += 4 * count;
          values -= count;
        }
      }
      for (int r = 0; r < R; ++r) {
        sums[r][i] = _mm512_fmadd_ps(w, _mm512_load_ps(a + r * a_stride + 16 * i), sums[r][i]);
      }
    }
  }
};

// 32 columns of 16-bit values from the values of half a step.
template <Density density>
__m512i Expand16(const uint8_t* v, uint64_t mask, int64_t values) {
  if constexpr (density == Density::kDense) return _mm512_loadu_si512(v);
  const __mmask32 k = static_cast<__mmask32>(mask);
  if constexpr (density == Density::kHalf) {
    return ExpandWords(k, _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))));
  }
  return ExpandWords(k, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(LowMask(values)), v));
}

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

template <class Masks>
Masks MasksOf(const MaskReader& reader, int64_t output, uint8_t* scratch) {
  if constexpr (Masks::kStored) {
    return reader.Stored(output, scratch);
  } else {
    return reader.Codes(output);
  }
}

// Every mask is used once: no need to store it.
bool ReadsCodes(const Layout& l, int64_t rows) { return l.n == 8 && l.m == 16 && !l.bitmap && rows <= 4; }

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

// ---------------------------------------------------------------------------------------------------------------------
// Integer weights: bytes q + offset. Pruned columns become the offset, so that one precomputed sum of activations
// cancels it everywhere.

template <Density density>
struct Int8 {
  static constexpr Density kDensity = density;
  static constexpr bool kUnpackFirst = false;
  static const uint8_t* Address(const uint8_t* row, int64_t step, int64_t step_values) {
    return row + step * step_values;
  }
  // 64 columns of bytes, pruned ones at the offset; row points to the values of the whole row.
  static __m512i Load(const uint8_t* row, int64_t step, uint64_t mask, int64_t step_values, __m512i offset) {
    const uint8_t* v = row + step * step_values;
    if constexpr (density == Density::kDense) return _mm512_loadu_si512(v);
    const __mmask64 k = mask;
    if constexpr (density == Density::kHalf) {
      return _mm512_mask_expand_epi8(offset, k,
                                     _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))));
    }
    return _mm512_mask_expand_epi8(offset, k, _mm512_maskz_loadu_epi8(LowMask(step_values), v));
  }
};

template <Density density>
struct Int4 {
  static constexpr Density kDensity = density;
  static constexpr bool kUnpackFirst = density == Density::kGeneral;
  static const uint8_t* Address(const uint8_t* row, int64_t step, int64_t) {
    return density == Density::kDense ? row + 32 * step : row + 16 * step;
  }
  static __m512i Load(const uint8_t* row, int64_t step, uint64_t mask, int64_t, __m512i offset) {
    const __m256i low_bits = _mm256_set1_epi8(15);
    if constexpr (density == Density::kDense) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * step));
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low_bits)),
                                _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits), 1);
    }
    // 32 bytes hold the values of an even step in their low halves and of the odd one after it in their high halves.
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * (step / 2)));
    const __m256i halves = step % 2 == 0 ? packed : _mm256_srli_epi16(packed, 4);
    const __mmask64 k = mask;
    return _mm512_mask_expand_epi8(offset, k, _mm512_castsi256_si512(_mm256_and_si256(halves, low_bits)));
  }
};

struct BytesDot {  // int8 activations
  using Sum = __m512i;
  static constexpr bool kInt8Activations = true;
  const uint8_t* a;
  int64_t a_stride;
  const int32_t* starts;
  int64_t starts_stride;
  const float* scales;
  int64_t scales_stride;

  BytesDot(const PackedRows& p, const uint8_t* packed, int64_t row)
      : a(packed + p.bytes + row * p.columns),
        a_stride(p.columns),
        starts(reinterpret_cast<const int32_t*>(packed + p.starts) + row * p.blocks * 16),
        starts_stride(p.blocks * 16),
        scales(reinterpret_cast<const float*>(packed + p.scales) + row * RoundUp(p.blocks, 16)),
        scales_stride(RoundUp(p.blocks, 16)) {}

  // Weight scales of a row times the scales of R activation rows.
  template <int R>
  void ScaleProducts(const float* weight_scales, int64_t blocks, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) {
      for (int64_t b = 0; b < blocks; b += 16) {
        const __m512 product =
            _mm512_mul_ps(_mm512_load_ps(weight_scales + b), _mm512_load_ps(scales + r * scales_stride + b));
        _mm512_store_ps(products + r * stride + b, product);
      }
    }
  }

  Sum Start(int r, int64_t block) const { return _mm512_load_si512(starts + r * starts_stride + 16 * block); }
  template <int R>
  void Step(__m512i w, __m512i, int64_t step, Sum (&sums)[R]) const {
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_load_si512(a + r * a_stride + kStep * step));
    }
  }
  static __m512 Value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

struct FloatsDot {  // float32 activations, every fourth column in one vector
  using Sum = __m512;
  static constexpr bool kInt8Activations = false;
  const float* a;
  int64_t a_stride;

  FloatsDot(const PackedRows& p, const uint8_t* packed, int64_t row)
      : a(reinterpret_cast<const float*>(packed + p.ordered) + row * p.columns), a_stride(p.columns) {}

  template <int R>
  void ScaleProducts(const float* weight_scales, int64_t blocks, int64_t stride, float* products) const {
    for (int r = 0; r < R; ++r) memcpy(products + r * stride, weight_scales, static_cast<size_t>(blocks) * 4);
  }

  Sum Start(int, int64_t) const { return _mm512_setzero_ps(); }
  template <int R>
  void Step(__m512i w, __m512i offset, int64_t step, Sum (&sums)[R]) const {
    const __m512i q = _mm512_sub_epi8(w, offset);
    const __m512i first = _mm512_slli_epi32(q, 24);
    const __m512i tops[4] = {first, _mm512_slli_epi32(q, 16), _mm512_slli_epi32(q, 8), q};
    for (int j = 0; j < 4; ++j) {
      const __m512 values = _mm512_cvtepi32_ps(_mm512_srai_epi32(tops[j], 24));
      for (int r = 0; r < R; ++r) {
        sums[r] = _mm512_fmadd_ps(values, _mm512_load_ps(a + r * a_stride + kStep * step + 16 * j), sums[r]);
      }
    }
  }
  static __m512 Value(Sum sum) { return sum; }
};

// Scale of each block of an output row, in float32.
void BlockScales(const Layout& l, const PackedRows& p, int64_t output, float* scales) {
  const uint8_t* halves = l.scales + output * l.row_scales * 2;
  const int64_t block = BlockColumns(l);
  Prefetch(halves);
  for (int64_t b = 0; b < p.blocks; b += 16) {
    __m512 values;
    if (l.row_scales == 1) {
      values = _mm512_set1_ps(_mm512_cvtss_f32(HalvesToFloats(halves, 1)));
    } else if (l.scale_columns == block) {
      values = HalvesToFloats(halves + 2 * b, p.blocks - b);
    } else {
      alignas(64) uint16_t repeated[32] = {};
      for (int64_t i = 0; i < Min(16, p.blocks - b); ++i) {
        memcpy(repeated + i, halves + 2 * ((b + i) * block / l.scale_columns), 2);
      }
      values = HalvesToFloats(reinterpret_cast<const uint8_t*>(repeated), 16);
    }
    _mm512_store_ps(scales + b, values);
  }
}

// One output row times R activation rows. Steps below whole_steps are read in place; the rest, at most two, from
// rest_values, one value a byte.
template <class Weights, class Rest, class Masks>
struct IntegerRow {
  Masks masks;
  const uint8_t* values;
  const uint8_t* rest_values;
  int64_t whole_steps;
  int64_t steps;
  int64_t step_values;
  __m512i offset;

  __m512i Load(int64_t step) const {
    const uint64_t mask = masks.Step(step);
    return step < whole_steps ? Weights::Load(values, step, mask, step_values, offset)
                              : Rest::Load(rest_values, step - whole_steps, mask, step_values, offset);
  }

  // kBlockSteps: steps of a block, 0 for block_steps of them. scales[r · scales_stride + block].
  template <int R, int kBlockSteps, class Dot>
  void Multiply(const Dot& dot, int64_t block_steps, const float* scales, int64_t scales_stride, float* sums) const {
    __m512 totals[R];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    const int64_t per_block = kBlockSteps > 0 ? kBlockSteps : block_steps;
    const int64_t count = StepValues<Weights::kDensity>(step_values);
    const int64_t plain_blocks = Min(whole_steps, steps - 1) / per_block;
    const int64_t blocks = (steps + per_block - 1) / per_block;
    for (int64_t b = 0; b < blocks; ++b) {
      typename Dot::Sum block[R];
      for (int r = 0; r < R; ++r) block[r] = dot.Start(r, b);
      int64_t step = b * per_block;
      if (b < plain_blocks) {
        for (int64_t i = 0; i < per_block; ++i, ++step) {
          masks.PrefetchStep(step);
          if (i % 2 == 0) Prefetch(Weights::Address(values, step, count));
          dot.template Step<R>(Weights::Load(values, step, masks.PlainStep(step), count, offset), offset, step, block);
        }
      } else {
        for (; step < Min((b + 1) * per_block, steps); ++step) dot.template Step<R>(Load(step), offset, step, block);
      }
      for (int r = 0; r < R; ++r) {
        totals[r] = _mm512_fmadd_ps(Dot::Value(block[r]), _mm512_set1_ps(scales[r * scales_stride + b]), totals[r]);
      }
    }
    for (int r = 0; r < R; ++r) sums[r] = Sum(totals[r]);
  }
};

struct IntegerScratch {
  size_t masks;
  size_t scales;    // float32 a block
  size_t products;  // float32 a block for four activation rows
  size_t values;    // an int4 row as bytes
  size_t total;
};

IntegerScratch PlanIntegerScratch(const Layout& l) {
  const int64_t blocks = RoundUp(l.in_features, 64) / 64 + 16;
  IntegerScratch s = {};
  s.masks = 0;
  s.scales = static_cast<size_t>(RoundUp(static_cast<int64_t>(MaskReader::ScratchBytes(l)), 64));
  s.products = s.scales + static_cast<size_t>(RoundUp(blocks * 4, 64));
  s.values = s.products + 4 * static_cast<size_t>(RoundUp(blocks * 4, 64));
  s.total = s.values + (l.dtype == NM_INT4 ? static_cast<size_t>(RoundUp(l.row_values, 64)) + 256 : 0);
  return s;
}

template <class Weights, class Rest, class Dot, class Masks>
void IntegerOutputs(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
                    float* y, int64_t y_stride) {
  const PackedRows p = PlanRows(l, rows, Dot::kInt8Activations);
  const IntegerScratch plan = PlanIntegerScratch(l);
  const MaskReader reader(l);
  float* scales = reinterpret_cast<float*>(scratch + plan.scales);
  float* products = reinterpret_cast<float*>(scratch + plan.products);
  const int64_t steps = Steps(l);
  const int64_t step_values = l.dense ? kStep : kStep * l.n / l.m;
  const int64_t block_steps = BlockColumns(l) / kStep;
  const int64_t scales_stride = RoundUp(p.blocks, 16);
  // int4 values come in whole chunks of 64, the rest and every general pattern by bytes.
  const int64_t whole = Weights::kUnpackFirst ? 0 : l.dtype == NM_INT4 ? l.row_values / 64 * 64 : l.row_values;
  const int64_t whole_steps = Min(whole / step_values, steps);
  for (int64_t output = first; output < last; ++output) {
    alignas(64) uint8_t rest[256];
    const uint8_t* values = l.values + output * l.value_bytes;
    const uint8_t* rest_values = rest;
    if (Weights::kUnpackFirst) {
      UnpackInt4Tail(l, values, 0, scratch + plan.values);
      rest_values = scratch + plan.values;
    } else if (whole_steps < steps && l.dtype == NM_INT4) {
      UnpackInt4Tail(l, values, whole, rest);
    } else if (whole_steps < steps) {
      memcpy(rest, values + whole_steps * step_values, static_cast<size_t>(l.row_values - whole_steps * step_values));
    }
    BlockScales(l, p, output, scales);
    const IntegerRow<Weights, Rest, Masks> row{MasksOf<Masks>(reader, output, scratch),
                                               values,
                                               rest_values,
                                               whole_steps,
                                               steps,
                                               step_values,
                                               _mm512_set1_epi8(static_cast<char>(l.dtype == NM_INT4 ? 8 : 128))};
    ForRows(rows, [&](auto count, int64_t r) {
      constexpr int R = decltype(count)::value;
      float sums[R];
      const Dot dot(p, packed, r);
      dot.template ScaleProducts<R>(scales, p.blocks, scales_stride, products);
      if (block_steps == 2) {
        row.template Multiply<R, 2>(dot, 2, products, scales_stride, sums);
      } else {
        row.template Multiply<R, 0>(dot, block_steps, products, scales_stride, sums);
      }
      StoreSums(l, p, packed, output, r, R, sums, y + output - first, y_stride);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The table.

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

size_t FloatScratch(const Layout& l, int64_t) { return MaskReader::ScratchBytes(l); }
size_t IntegerScratchBytes(const Layout& l, int64_t) { return PlanIntegerScratch(l).total; }

template <int dtype>
bool Supports(const Layout& l) {
  if (l.dtype != dtype || l.in_features > INT32_MAX - 1024) return false;
  return !IsInteger(dtype) || l.scale_columns % kStep == 0 || l.row_scales == 1;
}

constexpr int64_t kAny = INT64_MAX;
// Above it float32 arithmetic goes to the AVX2 panels, which multiply kept weights only; where they overtake was
// estimated, not measured.
constexpr int64_t kMostFloatRows = 16;
constexpr Kernel kKernels[] = {
    {"float32 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_FLOAT32>, FloatRowsBytes, PackFloats,
     FloatScratch, RunFloats<Float32>},
    {"float16 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_FLOAT16>, FloatRowsBytes, PackFloats,
     FloatScratch, RunFloats<Float16>},
    {"bfloat16 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_BFLOAT16>, FloatRowsBytes, PackFloats,
     FloatScratch, RunFloats<Bfloat16>},
    {"int8 rows, int8 activations", Isa::kAvx512, true, kAny, Supports<NM_INT8>, Int8RowsBytes, PackBytes,
     IntegerScratchBytes, RunIntegers<Int8, BytesDot>},
    {"int4 rows, int8 activations", Isa::kAvx512, true, kAny, Supports<NM_INT4>, Int8RowsBytes, PackBytes,
     IntegerScratchBytes, RunIntegers<Int4, BytesDot>},
    {"int8 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_INT8>, FloatRowsBytes, PackFloats,
     IntegerScratchBytes, RunIntegers<Int8, FloatsDot>},
    {"int4 rows", Isa::kAvx512, false, kMostFloatRows, Supports<NM_INT4>, FloatRowsBytes, PackFloats,
     IntegerScratchBytes, RunIntegers<Int4, FloatsDot>},
};

}  // namespace

KernelList Avx512Kernels() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
