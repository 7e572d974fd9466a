// The kernel every machine runs: unpacks one output row to float32 and multiplies it with every activation row.
#include <string.h>

#include "floats.h"
#include "kernels.h"
#include "positions.h"

namespace nm {
namespace {

uint16_t Load16(const uint8_t* source) {
  uint16_t value;
  memcpy(&value, source, sizeof(value));
  return value;
}

uint32_t Load32(const uint8_t* source) {
  uint32_t value;
  memcpy(&value, source, sizeof(value));
  return value;
}

// Stored value `index` of an int4 row.
float Int4Value(const Layout& l, const uint8_t* values, int64_t index) {
  const int64_t first = index / l.int4_chunk * l.int4_chunk;
  const int64_t length = l.row_values - first < l.int4_chunk ? l.row_values - first : l.int4_chunk;
  const int64_t half = (length + 1) / 2;
  const int64_t at = index - first;
  const uint8_t byte = values[first / 2 + (at < half ? at : at - half)];
  return static_cast<float>((at < half ? byte & 15 : byte >> 4) - 8);
}

float StoredValue(const Layout& l, const uint8_t* values, int64_t index) {
  switch (l.dtype) {
    case NM_FLOAT32:
      return FloatOfBits(Load32(values + 4 * index));
    case NM_FLOAT16:
      return FloatOfHalf(Load16(values + 2 * index));
    case NM_BFLOAT16:
      return FloatOfBfloat16(Load16(values + 2 * index));
    case NM_INT8:
      return static_cast<float>(values[index] - 128);
    default:
      return Int4Value(l, values, index);
  }
}

// Scatters the stored values of an output row over weights[in_features], zero elsewhere.
void UnpackValues(const Layout& l, int64_t output, const FieldTable& table, float* weights) {
  const uint8_t* values = l.values + output * l.value_bytes;
  if (l.dense) {
    for (int64_t column = 0; column < l.in_features; ++column) weights[column] = StoredValue(l, values, column);
    return;
  }
  memset(weights, 0, static_cast<size_t>(l.in_features) * sizeof(float));
  const uint8_t* positions = l.positions + output * l.position_bytes;
  for (int64_t group = 0; group < l.groups; ++group) {
    const uint32_t field = ReadBits(positions, l.position_bytes, group * l.code_bits, l.code_bits);
    uint32_t mask = field;
    if (!l.bitmap) {
      const uint32_t low = l.m == 32 ? 0 : table.masks[field] & ((uint32_t{1} << l.m) - 1);
      mask = l.m == 32 ? MaskOfCode(field, l.n, l.m) : low;
    }
    int64_t index = group * l.n;
    const int64_t end = index + l.n;
    for (; mask != 0 && index < end; mask &= mask - 1, ++index) {
      const int64_t column = group * l.m + __builtin_ctz(mask);
      if (column < l.in_features) weights[column] = StoredValue(l, values, index);
    }
  }
}

void ApplyScales(const Layout& l, int64_t output, float* weights) {
  const uint8_t* scales = l.scales + output * l.row_scales * 2;
  for (int64_t group = 0; group < l.row_scales; ++group) {
    const float scale = FloatOfHalf(Load16(scales + 2 * group));
    const int64_t first = group * l.scale_columns;
    const int64_t last = l.in_features - first < l.scale_columns ? l.in_features : first + l.scale_columns;
    for (int64_t column = first; column < last; ++column) weights[column] *= scale;
  }
}

void AddOutliers(const Layout& l, int64_t output, float* weights) {
  const uint8_t* values = l.outlier_values + output * l.outlier_bytes;
  const uint8_t* positions = l.outlier_positions + output * l.row_outliers;
  for (int64_t i = 0; i < l.row_outliers; ++i) {
    const int64_t column = i / l.outlier_k * l.outlier_block + positions[i];
    if (column >= l.in_features) continue;
    weights[column] +=
        l.outlier_dtype == NM_FLOAT16 ? FloatOfHalf(Load16(values + 2 * i)) : FloatOfBits(Load32(values + 4 * i));
  }
}

float Dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) sums[i % kLanes] += a[i] * b[i];
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}

bool Supports(const Layout&) { return true; }

size_t PackedBytes(const Layout& l, int64_t rows) { return static_cast<size_t>(rows * l.in_features) * sizeof(float); }

void Pack(const Layout& l, const float* a, int64_t first, int64_t count, int64_t, void* packed) {
  memcpy(static_cast<float*>(packed) + first * l.in_features, a, PackedBytes(l, count));
}

size_t ScratchBytes(const Layout& l, int64_t) { return static_cast<size_t>(l.in_features) * sizeof(float); }

void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const float* a = static_cast<const float*>(packed);
  float* weights = static_cast<float*>(scratch);
  const FieldTable table = l.dense || l.bitmap || l.m == 32 ? FieldTable{} : GetFieldTable(l.n, l.m);
  for (int64_t output = first; output < last; ++output) {
    UnpackValues(l, output, table, weights);
    ApplyScales(l, output, weights);
    AddOutliers(l, output, weights);
    for (int64_t row = 0; row < rows; ++row) {
      y[row * y_stride + output - first] = Dot(a + row * l.in_features, weights, l.in_features);
    }
  }
}

constexpr Kernel kKernels[] = {
    {"portable", Isa::kPortable, false, 1, INT64_MAX, Supports, PackedBytes, Pack, ScratchBytes, Run},
};

}  // namespace

KernelList PortableKernels() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
