// Panels of activations for the AVX2 kernels of many rows: rows lie in the lanes of vectors, so one weight that is kept
// costs one broadcast and a multiply-add a vector, and one that is pruned costs nothing.
#ifndef NM_KERNELS_AVX2_PANELS_H_
#define NM_KERNELS_AVX2_PANELS_H_

#include "avx2_common.h"
#include "kernels.h"

namespace nm {
namespace {

constexpr int64_t kMostVectors = 8;   // of a panel
constexpr int64_t kOffsetBytes = 8;   // an index register's largest scale
constexpr int64_t kChunk = 768;       // columns whose weights are decoded at a time
constexpr int64_t kWideSlice = 192;   // columns of a panel that stay in the first-level cache: 4 vectors of them …
constexpr int64_t kNarrowSlice = 96;  // … or 8

// A call's activation rows, cut into panels of as equal height as possible: packed as floats [panel][column][row].
struct Panels {
  int64_t vectors;       // of a panel
  int64_t last_vectors;  // of the last one
  int64_t count;
  int64_t columns;  // padded with zeros to whole slices
  int64_t slice;    // columns that are multiplied at a time

  Panels(const Layout& l, int64_t rows) {
    const int64_t all = (rows + kLanes - 1) / kLanes;
    const int64_t least = (all + kMostVectors - 1) / kMostVectors;
    vectors = (all + least - 1) / least;
    count = (all + vectors - 1) / vectors;
    last_vectors = all - (count - 1) * vectors;
    columns = RoundUp(l.in_features, kWideSlice);
    slice = vectors > 4 ? kNarrowSlice : kWideSlice;
  }
  int64_t width() const { return vectors * kLanes; }
  int64_t VectorsOf(int64_t panel) const { return panel == count - 1 ? last_vectors : vectors; }
  int64_t floats() const { return count * width() * columns; }
};

inline void Transpose(__m256 (&v)[8]) {
  __m256 pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      quads[4 * i + 2 * j] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0x44);
      quads[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20);
    v[4 + i] = _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31);
  }
}

// Packs `count` rows of a[count, in_features], from row `first` of all, a multiple of 8, into panels.
inline void PackPanels(const Layout& l, const Panels& p, const float* a, int64_t first, int64_t count, float* panels) {
  for (int64_t row = 0; row < count; row += kLanes) {
    const int64_t vector = (first + row) / kLanes;
    float* to = panels + vector / p.vectors * p.width() * p.columns + vector % p.vectors * kLanes;
    for (int64_t column = 0; column < p.columns; column += kLanes) {
      const __m256i inside = LaneMask(l.in_features - column);
      __m256 block[8];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool present = row + i < count && column < l.in_features;
        block[i] = present ? _mm256_maskload_ps(a + (row + i) * l.in_features + column, inside) : _mm256_setzero_ps();
      }
      Transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) _mm256_store_ps(to + (column + i) * p.width(), block[i]);
    }
  }
}

// Zero for each of `count` rows, a multiple of 8 but for the last rows; NaN where an activation is not finite: such a
// row's outputs are NaN in a dense product, and skipped weights must not hide it.
inline void PackStarts(const Layout& l, const float* a, int64_t count, float* starts) {
  for (int64_t row = 0; row < RoundUp(count, kLanes); ++row) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t column = 0; row < count && column < l.in_features; column += kLanes) {
      const __m256 values = _mm256_maskload_ps(a + row * l.in_features + column, LaneMask(l.in_features - column));
      sum = _mm256_fmadd_ps(values, _mm256_setzero_ps(), sum);
    }
    starts[row] = Sum(sum);
  }
}

// The kept weights of one output row in one slice of columns: values, and where in the slice their activations lie. In
// groups of four, the last filled up by Finish.
struct WeightList {
  float* values;
  uint16_t* offsets;  // in units of kOffsetBytes
  int64_t count;

  void Append(float value, int64_t offset) {
    values[count] = value;
    offsets[count++] = static_cast<uint16_t>(offset);
  }
  void Finish() {
    while (count % 4 != 0) Append(0, 0);
  }
};

// sums[8·R] += Σ values[i] · the R vectors at offsets[i] of the slice. S chains of additions hide their latency where R
// alone does not. Loads are the limit, two a cycle (a 32-bit one counts as well), so offsets and values are loaded four
// at a time: 8.5 loads for 8 multiply-adds instead of 10. Broadcasting each value from memory was 6 % slower.
template <int R, int S>
void Accumulate(const WeightList& list, const float* slice, float* sums) {
  const uint8_t* base = reinterpret_cast<const uint8_t*>(slice);
  __m256 lanes[S][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    lanes[0][r] = _mm256_load_ps(sums + kLanes * r);
#pragma GCC unroll 8
    for (int s = 1; s < S; ++s) lanes[s][r] = _mm256_setzero_ps();
  }
  const auto add = [&](__m256 weight, uint64_t offset, __m256(&chain)[R]) __attribute__((always_inline)) {
    const float* a = reinterpret_cast<const float*>(base + kOffsetBytes * (offset & 0xffff));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) chain[r] = _mm256_fmadd_ps(weight, _mm256_load_ps(a + kLanes * r), chain[r]);
  };
  const float* end = list.values + list.count;
  const uint16_t* offsets = list.offsets;
  for (const float* values = list.values; values < end; values += 4, offsets += 4) {
    uint64_t four;
    memcpy(&four, offsets, sizeof(four));
    const __m256 weights = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values));
    add(_mm256_permute_ps(weights, 0x00), four, lanes[0]);
    add(_mm256_permute_ps(weights, 0x55), four >> 16, lanes[1 % S]);
    add(_mm256_permute_ps(weights, 0xaa), four >> 32, lanes[2 % S]);
    add(_mm256_permute_ps(weights, 0xff), four >> 48, lanes[3 % S]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int s = 1; s < S; ++s) lanes[0][r] = _mm256_add_ps(lanes[0][r], lanes[s][r]);
    _mm256_store_ps(sums + kLanes * r, lanes[0][r]);
  }
}

// The outliers of one output row, in ascending order, handed out slice by slice: those of columns first … last-1.
inline void AppendOutliers(const Layout& l, int64_t output, int64_t first, int64_t last, int64_t stride,
                           int64_t* cursor, WeightList* list) {
  const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
  const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
  const int64_t most = list->count + (last - first);  // hostile positions need not ascend
  for (; *cursor < l.row_outliers && list->count < most; ++*cursor) {
    const int64_t column = *cursor / l.outlier_k * l.outlier_block + positions[*cursor];
    if (column >= last) return;
    if (column < first) continue;
    float value;
    if (l.outlier_dtype == NM_FLOAT32) {
      memcpy(&value, values + 4 * *cursor, sizeof(value));
    } else {
      uint16_t half;
      memcpy(&half, values + 2 * *cursor, sizeof(half));
      value = _cvtsh_ss(half);
    }
    list->Append(value, (column - first) * stride);
  }
}

using AccumulateFunction = void (*)(const WeightList&, const float*, float*);

inline AccumulateFunction AccumulateOf(int64_t vectors) {
  static constexpr AccumulateFunction kFunctions[kMostVectors] = {Accumulate<1, 4>, Accumulate<2, 4>, Accumulate<3, 4>,
                                                                  Accumulate<4, 2>, Accumulate<5, 2>, Accumulate<6, 2>,
                                                                  Accumulate<7, 1>, Accumulate<8, 1>};
  return kFunctions[vectors - 1];
}

// The first `count` of eight; vmaskmov to memory is slow on AMD's processors.
inline void StoreFloats(__m256 eight, int64_t count, float* to) {
  if (count >= kLanes) return _mm256_storeu_ps(to, eight);
  alignas(32) float lanes[kLanes];
  _mm256_store_ps(lanes, eight);
  memcpy(to, lanes, static_cast<size_t>(count) * sizeof(float));
}

// y[row, output] = sums[panel][output][row].
inline void StoreSums(const Panels& p, int64_t rows, int64_t outputs, const float* sums, float* y, int64_t y_stride) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t vector = first / kLanes;
    const float* from = sums + vector / p.vectors * p.width() * outputs + vector % p.vectors * kLanes;
    for (int64_t output = 0; output < outputs; output += kLanes) {
      __m256 block[8];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = output + i < outputs ? _mm256_load_ps(from + (output + i) * p.width()) : _mm256_setzero_ps();
      }
      Transpose(block);
      for (int64_t i = 0; i < Min(kLanes, rows - first); ++i) {
        float* to = y + (first + i) * y_stride + output;
        StoreFloats(block[i], outputs - output, to);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The product of panels with lists of weights.

constexpr int64_t kTile = 128;  // outputs whose lists are made at a time

struct ListScratch {
  int64_t slices;    // of a chunk
  int64_t capacity;  // of the lists of a slice, which lie one behind the other
  size_t values;     // float[slices][capacity]
  size_t offsets;    // uint16 of the same shape
  size_t starts;     // int64[slices][outputs+1]: where each list begins
  size_t cursors;    // int64[outputs]: the next outlier
  size_t sums;       // float[panels][outputs][width]
  size_t total;

  ListScratch(const Layout& l, const Panels& p, int64_t outputs) {
    slices = kChunk / p.slice;
    capacity = outputs * p.slice * (l.row_outliers > 0 ? 2 : 1) + 16;  // decoding writes up to 16 past a list
    size_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const size_t start = at;
      at += static_cast<size_t>(RoundUp(bytes, 64));
      return start;
    };
    values = take(slices * capacity * 4);
    offsets = take(slices * capacity * 2);
    starts = take(slices * (outputs + 1) * 8);
    cursors = take(outputs * 8);
    sums = take(p.count * p.width() * outputs * 4);
    total = at;
  }
};

inline size_t ListScratchBytes(const Layout& l, int64_t rows) {
  return ListScratch(l, Panels(l, rows), Min(kTile, l.out_features)).total;
}

// All activation rows times a tile of output rows, from `first` on. Lists gives the weights: SetChunk(output, chunk),
// then for each slice of the chunk Append(begin, end, stride, cursor, list) the weights of columns begin … end-1.
template <class Lists>
class PanelProduct {
 public:
  PanelProduct(const Layout& l, int64_t rows, const float* activations, int64_t first, int64_t outputs, void* scratch)
      : layout_(l),
        panels_(l, rows),
        plan_(l, panels_, outputs),
        lists_(l),
        rows_(rows),
        first_(first),
        outputs_(outputs),
        activations_(activations) {
    uint8_t* memory = static_cast<uint8_t*>(scratch);
    values_ = reinterpret_cast<float*>(memory + plan_.values);
    offsets_ = reinterpret_cast<uint16_t*>(memory + plan_.offsets);
    list_starts_ = reinterpret_cast<int64_t*>(memory + plan_.starts);
    cursors_ = reinterpret_cast<int64_t*>(memory + plan_.cursors);
    sums_ = reinterpret_cast<float*>(memory + plan_.sums);
  }

  // starts: what each row's sums begin with, or null for zeros; add: to what is in y.
  void Run(const float* starts, float* y, int64_t y_stride) {
    StartSums(starts);
    for (int64_t chunk = 0; chunk * kChunk < panels_.columns; ++chunk) {
      for (int64_t output = 0; output < outputs_; ++output) MakeLists(output, chunk);
      for (int64_t panel = 0; panel < panels_.count; ++panel) MultiplyChunk(panel, chunk);
    }
    StoreSums(panels_, rows_, outputs_, sums_, y, y_stride);
  }

 private:
  WeightList ListAt(int64_t slice, int64_t at, int64_t count) const {
    return {values_ + slice * plan_.capacity + at, offsets_ + slice * plan_.capacity + at, count};
  }

  void StartSums(const float* starts) {
    memset(cursors_, 0, static_cast<size_t>(outputs_) * sizeof(*cursors_));
    const size_t row_bytes = static_cast<size_t>(panels_.width()) * sizeof(float);
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      for (int64_t output = 0; output < outputs_; ++output) {
        float* sums = sums_ + (panel * outputs_ + output) * panels_.width();
        if (starts == nullptr) {
          memset(sums, 0, row_bytes);
        } else {
          memcpy(sums, starts + panel * panels_.width(), row_bytes);
        }
      }
    }
  }

  void MakeLists(int64_t output, int64_t chunk) {
    lists_.SetChunk(first_ + output, chunk);
    const int64_t stride = panels_.width() * static_cast<int64_t>(sizeof(float)) / kOffsetBytes;
    for (int64_t slice = 0; slice < plan_.slices; ++slice) {
      const int64_t begin = chunk * kChunk + slice * panels_.slice;
      const int64_t end = Min(begin + panels_.slice, layout_.in_features);
      int64_t* start = list_starts_ + slice * (outputs_ + 1) + output;
      if (output == 0) *start = 0;
      WeightList list = ListAt(slice, *start, 0);
      if (begin < end) lists_.Append(begin, end, stride, &cursors_[output], &list);
      list.Finish();
      start[1] = *start + list.count;
    }
  }

  void MultiplyChunk(int64_t panel, int64_t chunk) {
    const AccumulateFunction accumulate = AccumulateOf(panels_.VectorsOf(panel));
    const float* activations = activations_ + (panel * panels_.columns + chunk * kChunk) * panels_.width();
    for (int64_t slice = 0; slice < plan_.slices; ++slice) {
      const float* columns = activations + slice * panels_.slice * panels_.width();
      const int64_t* starts = list_starts_ + slice * (outputs_ + 1);
      float* sums = sums_ + panel * outputs_ * panels_.width();
      const int64_t slice_bytes = panels_.slice * panels_.width() * static_cast<int64_t>(sizeof(float));
      const int64_t ahead = RoundUp(slice_bytes / outputs_, 64);  // of the next slice, while this one is in use
      const uint8_t* next = reinterpret_cast<const uint8_t*>(columns) + slice_bytes;
      for (int64_t output = 0; output < outputs_; ++output, sums += panels_.width(), next += ahead) {
        for (int64_t i = 0; i < ahead; i += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
        }
        const int64_t count = starts[output + 1] - starts[output];
        if (count > 0) accumulate(ListAt(slice, starts[output], count), columns, sums);
      }
    }
  }

  const Layout& layout_;
  const Panels panels_;
  const ListScratch plan_;
  Lists lists_;
  const int64_t rows_;
  const int64_t first_;
  const int64_t outputs_;
  const float* activations_;
  float* values_;
  uint16_t* offsets_;
  int64_t* list_starts_;
  int64_t* cursors_;
  float* sums_;
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_PANELS_H_
