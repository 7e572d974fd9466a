// Positions of the stored values: enumerative codes and bitmaps, and the tables that turn a code into a bitmap.
#ifndef NM_KERNELS_POSITIONS_H_
#define NM_KERNELS_POSITIONS_H_

#include <stdint.h>

namespace nm {

// C(columns, chosen), 0 when chosen > columns; columns at most 32.
uint32_t Binomial(int columns, int chosen);

// ⌈log2 C(m, n)⌉, bits of a code.
int CodeBits(int n, int m);

// The mask with n of m bits set whose rank in ascending order is code. A code out of range gives some mask of m bits.
uint32_t MaskOfCode(uint32_t code, int n, int m);

// For each column 0 … 31 a row of 32 thresholds: entry `left` is C(column, left), above every code for left = 0. A
// group of 32 columns that has `left` to place below column+1 takes this column when its rank is at least the entry.
const uint32_t* WideThresholds();

// Codes of 16 columns side by side (one group of 16, two of 8, four of 4) are one field of at most 14 bits. The table
// maps a field to its 16-bit mask; every index of field_bits bits is inside it. m at most 16, n below m.
struct FieldTable {
  const uint16_t* masks;
  int field_bits;
};
FieldTable GetFieldTable(int n, int m);

// For the patterns that keep half of m columns, m at most 16: maps the same fields to the eight kept columns of 16, in
// ascending order the low halves of four bytes, then their high halves. (Half the size of a table of whole bytes: more
// of it stays in the first-level cache.)
const uint32_t* GetColumnTable(int m);

// Bits of a row's position field starting at bit `offset`, `bits` at most 32; bits past the row's bytes read as zero.
uint32_t ReadBits(const uint8_t* row, int64_t row_bytes, int64_t offset, int bits);

}  // namespace nm

#endif  // NM_KERNELS_POSITIONS_H_
