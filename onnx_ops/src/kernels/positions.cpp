#include "positions.h"

#include <string.h>

#include <mutex>

namespace nm {
namespace {

struct Binomials {
  uint32_t value[33][33];
  constexpr Binomials() : value() {
    for (int n = 0; n <= 32; ++n) {
      value[n][0] = 1;
      for (int k = 1; k <= n; ++k) value[n][k] = value[n - 1][k - 1] + (k < n ? value[n - 1][k] : 0);
    }
  }
};
constexpr Binomials kBinomials;

struct Thresholds {
  uint32_t value[32][32];
  constexpr Thresholds() : value() {
    const Binomials binomials;
    for (int column = 0; column < 32; ++column) {
      value[column][0] = UINT32_MAX;
      for (int left = 1; left < 32; ++left) value[column][left] = binomials.value[column][left];
    }
  }
};
alignas(64) constexpr Thresholds kThresholds;

// All tables in zero pages that cost nothing until a pattern is used: (m, n) ↦ 2^field_bits masks.
constexpr int kLargestTable = 1 << 14;
struct Table {
  std::once_flag filled;
  uint16_t masks[kLargestTable];
};
Table& TableOf(int n, int m) {
  static Table tables[3][16];
  return tables[m == 4 ? 0 : m == 8 ? 1 : 2][n];
}

struct ColumnTable {
  std::once_flag filled;
  uint32_t columns[kLargestTable];
};

}  // namespace

const uint32_t* WideThresholds() { return kThresholds.value[0]; }

uint32_t Binomial(int columns, int chosen) { return kBinomials.value[columns][chosen]; }

int CodeBits(int n, int m) {
  const uint32_t largest = Binomial(m, n) - 1;
  return largest == 0 ? 0 : 32 - __builtin_clz(largest);
}

uint32_t MaskOfCode(uint32_t code, int n, int m) {
  uint32_t mask = 0;
  int left = n;
  for (int column = m - 1; column >= 0 && left > 0; --column) {
    const uint32_t below = kBinomials.value[column][left];  // masks whose highest bit is below this column
    if (code >= below) {
      code -= below;
      mask |= uint32_t{1} << column;
      --left;
    }
  }
  return mask;
}

FieldTable GetFieldTable(int n, int m) {
  Table& table = TableOf(n, m);
  const int bits = CodeBits(n, m);
  const int groups = 16 / m;
  std::call_once(table.filled, [&] {
    const uint32_t count = uint32_t{1} << (bits * groups);
    for (uint32_t field = 0; field < count; ++field) {
      uint32_t mask = 0;
      for (int group = 0; group < groups; ++group) {
        const uint32_t code = field >> (bits * group) & ((uint32_t{1} << bits) - 1);
        mask |= MaskOfCode(code, n, m) << (m * group);
      }
      table.masks[field] = static_cast<uint16_t>(mask);
    }
  });
  return {table.masks, bits * groups};
}

const uint32_t* GetColumnTable(int m) {
  static ColumnTable tables[3];
  ColumnTable& table = tables[m == 4 ? 0 : m == 8 ? 1 : 2];
  const FieldTable fields = GetFieldTable(m / 2, m);
  std::call_once(table.filled, [&] {
    for (uint32_t field = 0; field < uint32_t{1} << fields.field_bits; ++field) {
      uint32_t columns = 0;
      int count = 0;
      for (uint32_t mask = fields.masks[field]; mask != 0 && count < 8; mask &= mask - 1, ++count) {
        columns |= static_cast<uint32_t>(__builtin_ctz(mask)) << (8 * (count % 4) + count / 4 * 4);
      }
      table.columns[field] = columns;
    }
  });
  return table.columns;
}

uint32_t ReadBits(const uint8_t* row, int64_t row_bytes, int64_t offset, int bits) {
  const int64_t first = offset >> 3;
  uint64_t word = 0;
  const int64_t available = row_bytes - first;
  if (available >= 8) {
    memcpy(&word, row + first, 8);
  } else if (available > 0) {
    for (int64_t i = 0; i < available; ++i) word |= uint64_t{row[first + i]} << (8 * i);
  }
  return static_cast<uint32_t>(word >> (offset & 7) & ((uint64_t{1} << bits) - 1));
}

}  // namespace nm
