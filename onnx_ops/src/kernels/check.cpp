// nm_weight_check: everything that reading a weight relies on, once, before the first multiplication.
#include "layout.h"
#include "positions.h"

namespace nm {
namespace {

int CheckPositions(const Layout& l, char* message, size_t message_bytes) {
  const uint32_t codes = Binomial(l.m, l.n);
  for (int64_t row = 0; row < l.out_features; ++row) {
    const uint8_t* positions = l.positions + row * l.position_bytes;
    for (int64_t group = 0; group < l.groups; ++group) {
      const uint32_t field = ReadBits(positions, l.position_bytes, group * l.code_bits, l.code_bits);
      if (l.bitmap && __builtin_popcount(field) != l.n) {
        return Fail(message, message_bytes, "positions: row %lld, group %lld marks %d columns; %d must be marked.",
                    static_cast<long long>(row), static_cast<long long>(group), __builtin_popcount(field), l.n);
      }
      if (!l.bitmap && field >= codes) {
        return Fail(message, message_bytes, "positions: row %lld, group %lld has the code %u; it must be below %u.",
                    static_cast<long long>(row), static_cast<long long>(group), field, codes);
      }
    }
    const int used = static_cast<int>(l.groups * l.code_bits % 8);
    if (used != 0 && positions[l.position_bytes - 1] >> used != 0) {
      return Fail(message, message_bytes, "positions: row %lld has unused bits set in its last byte.",
                  static_cast<long long>(row));
    }
  }
  return 0;
}

int CheckOutlierPositions(const Layout& l, char* message, size_t message_bytes) {
  for (int64_t row = 0; row < l.out_features; ++row) {
    const uint8_t* positions = l.outlier_positions + row * l.row_outliers;
    for (int64_t i = 0; i < l.row_outliers; ++i) {
      const int64_t block = i / l.outlier_k;
      const bool first = i % l.outlier_k == 0;
      if (block * l.outlier_block + positions[i] >= l.in_features || positions[i] >= l.outlier_block ||
          (!first && positions[i] <= positions[i - 1])) {
        return Fail(message, message_bytes,
                    "outlier_positions: row %lld, block %lld, position %d must lie inside the block and above the one "
                    "before it.",
                    static_cast<long long>(row), static_cast<long long>(block), positions[i]);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace nm

extern "C" int nm_weight_check(const nm_weight* weight, char* message, size_t message_bytes) {
  if (message != nullptr && message_bytes > 0) message[0] = '\0';
  if (weight == nullptr) return nm::Fail(message, message_bytes, "weight is a null pointer.");
  nm::Layout layout;
  if (nm::MakeLayout(*weight, &layout, message, message_bytes) != 0) return 1;
  if (!layout.dense && nm::CheckPositions(layout, message, message_bytes) != 0) return 1;
  return nm::CheckOutlierPositions(layout, message, message_bytes);
}
