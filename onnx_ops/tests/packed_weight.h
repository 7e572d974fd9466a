// A random packed weight and the matrix it stands for, built from docs/format.md without the kernels' own code.
#ifndef NM_TESTS_PACKED_WEIGHT_H_
#define NM_TESTS_PACKED_WEIGHT_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "floats.h"
#include "nm_matmul.h"

namespace nm_test {

struct Shape {
  int64_t in_features;
  int64_t out_features;
  int n;
  int m;
  int dtype;
  int positions_format;
  int64_t group_size;
  int outlier_k;
  int outlier_block;
  int outlier_dtype;
};

// Bytes on the heap of exactly the size asked for, so that a sanitizer sees the first byte read past them.
struct Bytes {
  std::unique_ptr<uint8_t[]> data;
  size_t size = 0;
  void Resize(size_t bytes) {
    data.reset(new uint8_t[bytes]());
    size = bytes;
  }
  nm_buffer buffer() const { return {size == 0 ? nullptr : data.get(), size}; }
};

inline uint64_t Choose(int n, int k) {
  uint64_t result = 1;
  for (int i = 1; i <= k; ++i) result = result * static_cast<uint64_t>(n - k + i) / static_cast<uint64_t>(i);
  return k > n ? 0 : result;
}

inline int BitsFor(uint64_t count) {
  int bits = 0;
  while ((uint64_t{1} << bits) < count) ++bits;
  return bits;
}

class PackedWeight {
 public:
  Shape shape;
  Bytes values, positions, scales, outlier_values, outlier_positions;
  std::vector<double> dense;      // [out_features, in_features]
  std::vector<double> magnitude;  // the same shape: |base| + |outlier|, of which one may be rounded alone

  PackedWeight(const Shape& s, std::mt19937& random) : shape(s), random_(random) {
    const int64_t groups = (s.in_features + s.m - 1) / s.m;
    row_values_ = s.n == s.m ? s.in_features : groups * s.n;
    const int bits = s.n == s.m ? 0 : s.positions_format == NM_BITMAP ? s.m : BitsFor(Choose(s.m, s.n));
    const int64_t position_bytes = (groups * bits + 7) / 8;
    const bool integers = s.dtype == NM_INT8 || s.dtype == NM_INT4;
    scale_columns_ = s.group_size == -1 ? s.in_features : s.group_size;
    row_scales_ = integers ? (s.in_features + scale_columns_ - 1) / scale_columns_ : 0;
    value_bytes_ = s.dtype == NM_FLOAT32 ? 4 * row_values_
                   : s.dtype == NM_INT8  ? row_values_
                   : s.dtype == NM_INT4  ? (row_values_ + 1) / 2
                                         : 2 * row_values_;
    values.Resize(static_cast<size_t>(value_bytes_ * s.out_features));
    positions.Resize(static_cast<size_t>(position_bytes * s.out_features));
    scales.Resize(static_cast<size_t>(2 * row_scales_ * s.out_features));
    dense.assign(static_cast<size_t>(s.in_features * s.out_features), 0.0);
    magnitude = dense;
    for (int64_t row = 0; row < s.out_features; ++row) FillRow(row, groups, bits, position_bytes);
    if (s.outlier_k > 0) FillOutliers();
  }

  nm_weight view() const {
    const Shape& s = shape;
    return {s.in_features,
            s.out_features,
            s.n,
            s.m,
            s.dtype,
            s.positions_format,
            s.group_size,
            s.outlier_k,
            s.outlier_block,
            s.outlier_dtype,
            values.buffer(),
            positions.buffer(),
            scales.buffer(),
            outlier_values.buffer(),
            outlier_positions.buffer()};
  }

 private:
  int Uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  void FillRow(int64_t row, int64_t groups, int bits, int64_t position_bytes) {
    const Shape& s = shape;
    std::vector<int64_t> columns;
    for (int64_t group = 0; group < groups; ++group) {
      const uint32_t mask = RandomMask();
      if (bits > 0) {
        uint64_t field = mask;
        if (s.positions_format == NM_CODES) {
          field = 0;
          int chosen = 0;
          for (int c = 0; c < s.m; ++c) {
            if (mask >> c & 1) field += Choose(c, ++chosen);
          }
        }
        for (int b = 0; b < bits; ++b) {
          const int64_t at = group * bits + b;
          positions.data[row * position_bytes + at / 8] |= static_cast<uint8_t>((field >> b & 1) << (at % 8));
        }
      }
      for (int c = 0; c < s.m; ++c) {
        if (mask >> c & 1) columns.push_back(group * s.m + c);
      }
    }
    columns.resize(static_cast<size_t>(row_values_));
    std::vector<float> row_scales(static_cast<size_t>(row_scales_));
    for (int64_t i = 0; i < row_scales_; ++i) {
      const uint16_t half = nm::HalfOfFloat(static_cast<float>(Uniform(-100, 100)) * 0.001f);
      memcpy(scales.data.get() + 2 * (row * row_scales_ + i), &half, 2);
      row_scales[static_cast<size_t>(i)] = nm::FloatOfHalf(half);
    }
    for (int64_t i = 0; i < row_values_; ++i) {
      const int64_t column = columns[static_cast<size_t>(i)];
      const bool inside = column < s.in_features;
      double value = StoreValue(row, i, inside && Uniform(0, 9) > 0);
      if (!inside) continue;
      if (row_scales_ > 0) value *= static_cast<double>(row_scales[static_cast<size_t>(column / scale_columns_)]);
      dense[static_cast<size_t>(row * s.in_features + column)] = value;
      magnitude[static_cast<size_t>(row * s.in_features + column)] = std::fabs(value);
    }
  }

  uint32_t RandomMask() {
    if (shape.n == shape.m) return shape.m == 32 ? UINT32_MAX : (uint32_t{1} << shape.m) - 1;
    uint32_t mask = 0;
    const int kind = Uniform(0, 9);
    for (int left = shape.n, i = 0; left > 0;) {
      const int column = kind == 0 ? i++ : kind == 1 ? shape.m - 1 - i++ : Uniform(0, shape.m - 1);
      if (mask >> column & 1) continue;
      mask |= uint32_t{1} << column;
      --left;
    }
    return mask;
  }

  double StoreValue(int64_t row, int64_t index, bool nonzero) {
    uint8_t* at = values.data.get() + row * value_bytes_;
    const float real = nonzero ? static_cast<float>(Uniform(-1000, 1000)) * (Uniform(0, 20) == 0 ? 0.05f : 0.001f) : 0;
    switch (shape.dtype) {
      case NM_FLOAT32:
        memcpy(at + 4 * index, &real, 4);
        return static_cast<double>(real);
      case NM_FLOAT16: {
        const uint16_t half = nm::HalfOfFloat(real);
        memcpy(at + 2 * index, &half, 2);
        return static_cast<double>(nm::FloatOfHalf(half));
      }
      case NM_BFLOAT16: {
        const uint16_t bits = nm::Bfloat16OfFloat(real);
        memcpy(at + 2 * index, &bits, 2);
        return static_cast<double>(nm::FloatOfBfloat16(bits));
      }
      case NM_INT8: {
        const int q = nonzero ? Uniform(-128, 127) : 0;
        at[index] = static_cast<uint8_t>(q + 128);
        return q;
      }
      default: {
        const int q = nonzero ? Uniform(-8, 7) : 0;
        const int64_t size = shape.n == shape.m ? 64 : 128 / shape.m * shape.n;
        const int64_t chunk = index / size * size;
        const int64_t length = row_values_ - chunk < size ? row_values_ - chunk : size;
        const int64_t half = (length + 1) / 2;
        const int64_t i = index - chunk;
        at[chunk / 2 + (i < half ? i : i - half)] |= static_cast<uint8_t>(i < half ? q + 8 : (q + 8) << 4);
        if (i == length - 1 && length % 2 == 1) at[chunk / 2 + half - 1] |= 0x80;  // the chunk has no such value
        return q;
      }
    }
  }

  void FillOutliers() {
    const Shape& s = shape;
    const int64_t tail = s.in_features % s.outlier_block;
    const int64_t tail_count =
        tail == 0
            ? 0
            : std::max<int64_t>(
                  1, static_cast<int64_t>(std::floor(static_cast<double>(s.outlier_k * tail) / s.outlier_block + 0.5)));
    const int64_t blocks = s.in_features / s.outlier_block;
    const int64_t row_outliers = blocks * s.outlier_k + tail_count;
    const int64_t bytes = s.outlier_dtype == NM_FLOAT32 ? 4 : 2;
    outlier_values.Resize(static_cast<size_t>(row_outliers * bytes * s.out_features));
    outlier_positions.Resize(static_cast<size_t>(row_outliers * s.out_features));
    int64_t at = 0;
    for (int64_t row = 0; row < s.out_features; ++row) {
      for (int64_t block = 0; block < blocks + (tail > 0); ++block) {
        int64_t left = block < blocks ? s.outlier_k : tail_count;
        const int64_t length = block < blocks ? s.outlier_block : tail;
        for (int64_t p = 0; p < length; ++p) {
          if (Uniform(0, static_cast<int>(length - p) - 1) >= left) continue;
          --left;
          const float value = static_cast<float>(Uniform(-1000, 1000)) * 0.01f;
          const uint16_t half = nm::HalfOfFloat(value);
          memcpy(outlier_values.data.get() + at * bytes,
                 bytes == 4 ? static_cast<const void*>(&value) : static_cast<const void*>(&half),
                 static_cast<size_t>(bytes));
          outlier_positions.data[at++] = static_cast<uint8_t>(p);
          const double stored = static_cast<double>(bytes == 4 ? value : nm::FloatOfHalf(half));
          const size_t column = static_cast<size_t>(row * s.in_features + block * s.outlier_block + p);
          dense[column] += stored;
          magnitude[column] += std::fabs(stored);
        }
      }
    }
  }

  std::mt19937& random_;
  int64_t row_values_;
  int64_t value_bytes_;
  int64_t scale_columns_;
  int64_t row_scales_;
};

}  // namespace nm_test

#endif  // NM_TESTS_PACKED_WEIGHT_H_
