// Sizes of one row of every tensor of a packed weight, computed from its attributes without overflow.
#ifndef NM_KERNELS_LAYOUT_H_
#define NM_KERNELS_LAYOUT_H_

#include <stddef.h>
#include <stdint.h>

#include "nm_matmul.h"

namespace nm {

constexpr int kLargestOutlierBlock = 256;
constexpr int kLargestInt4Chunk = 124;  // 31:32

struct Layout {
  int64_t in_features;
  int64_t out_features;
  int n;
  int m;
  int dtype;
  bool dense;             // n == m: no positions
  bool bitmap;            // positions are masks, else codes
  int code_bits;          // of one group's field in positions; 0 when dense
  int64_t groups;         // of m columns, in a row
  int64_t row_values;     // stored values of a row
  int64_t int4_chunk;     // values of an int4 row whose low halves precede their high halves: of 128 columns; dense 64
  int64_t scale_columns;  // columns under one scale; at least in_features when a row has a single scale
  int64_t row_scales;     // 0 for floating-point values
  int outlier_k;
  int outlier_block;
  int outlier_dtype;
  int64_t row_outliers;

  // Bytes of one row of each tensor.
  int64_t value_bytes;
  int64_t position_bytes;
  int64_t outlier_bytes;

  const uint8_t* values;
  const uint8_t* positions;
  const uint8_t* scales;
  const uint8_t* outlier_values;
  const uint8_t* outlier_positions;
};

// Returns 0 and fills layout, or writes one sentence to message and returns 1 if an attribute or a buffer size is
// wrong. Reads no buffer.
int MakeLayout(const nm_weight& weight, Layout* layout, char* message, size_t message_bytes);

// Writes one sentence, printf style, and returns 1.
__attribute__((format(printf, 3, 4))) int Fail(char* message, size_t message_bytes, const char* format, ...);

bool IsInteger(int dtype);
const char* DtypeName(int dtype);

}  // namespace nm

#endif  // NM_KERNELS_LAYOUT_H_
