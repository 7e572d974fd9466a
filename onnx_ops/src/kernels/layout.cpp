#include "layout.h"

#include <stdarg.h>
#include <stdio.h>

#include "positions.h"

namespace nm {

int Fail(char* message, size_t message_bytes, const char* format, ...) {
  if (message != nullptr && message_bytes > 0) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, message_bytes, format, arguments);
    va_end(arguments);
  }
  return 1;
}

bool IsInteger(int dtype) { return dtype == NM_INT8 || dtype == NM_INT4; }

const char* DtypeName(int dtype) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "int8", "int4"};
  return dtype >= NM_FLOAT32 && dtype <= NM_INT4 ? names[dtype] : "unknown";
}

namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t ValueBytes(int dtype, int64_t count) {
  switch (dtype) {
    case NM_FLOAT32:
      return 4 * count;
    case NM_FLOAT16:
    case NM_BFLOAT16:
      return 2 * count;
    case NM_INT8:
      return count;
    default:
      return CeilDiv(count, 2);
  }
}

// Outliers of a row: k in each full block, max(1, round(k·length/block)) in a shorter last one.
int64_t RowOutliers(int64_t in_features, int64_t k, int64_t block) {
  const int64_t tail = in_features % block;
  const int64_t rounded = (2 * k * tail + block) / (2 * block);
  return in_features / block * k + (tail == 0 ? 0 : rounded > 1 ? rounded : 1);
}

int CheckBuffer(const char* name, const nm_buffer& buffer, int64_t row_bytes, int64_t rows, char* message,
                size_t message_bytes) {
  const uint64_t bytes = buffer.bytes;
  const uint64_t row = static_cast<uint64_t>(row_bytes);
  const bool fits = row == 0 ? bytes == 0 : bytes % row == 0 && bytes / row == static_cast<uint64_t>(rows);
  if (!fits) {
    return Fail(message, message_bytes, "%s has %llu bytes; %lld rows of %lld bytes are needed.", name,
                static_cast<unsigned long long>(bytes), static_cast<long long>(rows),
                static_cast<long long>(row_bytes));
  }
  if (bytes != 0 && buffer.data == nullptr) {
    return Fail(message, message_bytes, "%s is a null pointer with %llu bytes.", name,
                static_cast<unsigned long long>(bytes));
  }
  return 0;
}

int CheckAttributes(const nm_weight& w, char* message, size_t message_bytes) {
  // Below 2^31 no size of a row overflows 64 bits.
  const int64_t largest = INT32_MAX;
  if (w.in_features < 1 || w.in_features > largest || w.out_features < 1 || w.out_features > largest) {
    return Fail(message, message_bytes, "the weight is %lld by %lld; both must be between 1 and %lld.",
                static_cast<long long>(w.out_features), static_cast<long long>(w.in_features),
                static_cast<long long>(largest));
  }
  if (w.m != 4 && w.m != 8 && w.m != 16 && w.m != 32) {
    return Fail(message, message_bytes, "m is %d; it must be 4, 8, 16 or 32.", static_cast<int>(w.m));
  }
  if (w.n < 1 || w.n > w.m) {
    return Fail(message, message_bytes, "n is %d; it must be between 1 and m = %d.", static_cast<int>(w.n),
                static_cast<int>(w.m));
  }
  if (w.dtype < NM_FLOAT32 || w.dtype > NM_INT4) {
    return Fail(message, message_bytes, "dtype is %d; it must be between %d and %d.", static_cast<int>(w.dtype),
                NM_FLOAT32, NM_INT4);
  }
  if (w.positions_format != NM_CODES && w.positions_format != NM_BITMAP) {
    return Fail(message, message_bytes, "positions format is %d; it must be %d (codes) or %d (bitmap).",
                static_cast<int>(w.positions_format), NM_CODES, NM_BITMAP);
  }
  if (IsInteger(w.dtype) && w.group_size != -1 &&
      (w.group_size < 1 || w.group_size > largest || w.group_size % w.m != 0)) {
    return Fail(message, message_bytes, "group_size is %lld; it must be -1 or a multiple of m = %d.",
                static_cast<long long>(w.group_size), static_cast<int>(w.m));
  }
  if (w.outlier_k == 0) return 0;
  if (w.outlier_block < 1 || w.outlier_block > kLargestOutlierBlock) {
    return Fail(message, message_bytes, "outlier_block is %d; it must be between 1 and %d.",
                static_cast<int>(w.outlier_block), kLargestOutlierBlock);
  }
  if (w.outlier_k < 1 || w.outlier_k > w.outlier_block) {
    return Fail(message, message_bytes, "outlier_k is %d; it must be between 0 and outlier_block = %d.",
                static_cast<int>(w.outlier_k), static_cast<int>(w.outlier_block));
  }
  if (w.outlier_dtype != NM_FLOAT16 && w.outlier_dtype != NM_FLOAT32) {
    return Fail(message, message_bytes, "outlier dtype is %d; it must be %d (float16) or %d (float32).",
                static_cast<int>(w.outlier_dtype), NM_FLOAT16, NM_FLOAT32);
  }
  return 0;
}

}  // namespace

int MakeLayout(const nm_weight& w, Layout* layout, char* message, size_t message_bytes) {
  if (CheckAttributes(w, message, message_bytes) != 0) return 1;
  Layout l = {};
  l.in_features = w.in_features;
  l.out_features = w.out_features;
  l.n = w.n;
  l.m = w.m;
  l.dtype = w.dtype;
  l.dense = w.n == w.m;
  l.bitmap = w.positions_format == NM_BITMAP;
  l.code_bits = l.dense ? 0 : l.bitmap ? l.m : CodeBits(l.n, l.m);
  l.groups = CeilDiv(l.in_features, l.m);
  l.row_values = l.dense ? l.in_features : l.groups * l.n;
  l.int4_chunk = l.dense ? 64 : 128 * l.n / l.m;
  l.scale_columns = !IsInteger(l.dtype) || w.group_size == -1 ? l.in_features : w.group_size;
  l.row_scales = IsInteger(l.dtype) ? CeilDiv(l.in_features, l.scale_columns) : 0;
  if (w.outlier_k > 0) {
    l.outlier_k = w.outlier_k;
    l.outlier_block = w.outlier_block;
    l.outlier_dtype = w.outlier_dtype;
    l.row_outliers = RowOutliers(l.in_features, l.outlier_k, l.outlier_block);
  }
  l.value_bytes = ValueBytes(l.dtype, l.row_values);
  l.position_bytes = CeilDiv(l.groups * l.code_bits, 8);
  l.outlier_bytes = l.row_outliers == 0 ? 0 : ValueBytes(l.outlier_dtype, l.row_outliers);
  const int64_t rows = l.out_features;
  if (CheckBuffer("values", w.values, l.value_bytes, rows, message, message_bytes) != 0 ||
      CheckBuffer("positions", w.positions, l.position_bytes, rows, message, message_bytes) != 0 ||
      CheckBuffer("scales", w.scales, 2 * l.row_scales, rows, message, message_bytes) != 0 ||
      CheckBuffer("outlier_values", w.outlier_values, l.outlier_bytes, rows, message, message_bytes) != 0 ||
      CheckBuffer("outlier_positions", w.outlier_positions, l.row_outliers, rows, message, message_bytes) != 0) {
    return 1;
  }
  l.values = static_cast<const uint8_t*>(w.values.data);
  l.positions = static_cast<const uint8_t*>(w.positions.data);
  l.scales = static_cast<const uint8_t*>(w.scales.data);
  l.outlier_values = static_cast<const uint8_t*>(w.outlier_values.data);
  l.outlier_positions = static_cast<const uint8_t*>(w.outlier_positions.data);
  *layout = l;
  return 0;
}

}  // namespace nm
