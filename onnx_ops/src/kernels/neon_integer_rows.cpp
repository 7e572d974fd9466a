// The NEON integer kernels of every AArch64 processor: products of bytes as sums of two in 16 bits.
#include "neon_integer_rows.h"

namespace nm {
namespace {

struct LongProducts {
  // 2 · 128 · 127 is below 2^15.
  static NM_PIECE int32x4_t Add(int32x4_t sum, int8x16_t w, int8x16_t a) {
    const int16x8_t products = vmull_s8(vget_low_s8(w), vget_low_s8(a));
    return vpadalq_s16(sum, vmlal_high_s8(products, w, a));
  }
};

constexpr Kernel kKernels[] = {
    {"int8 rows, int8 activations", Isa::kNeon, true, 1, INT64_MAX, SupportsIntegers<NM_INT8>, PackedBytes, PackRows,
     ScratchBytes, RunIntegers<LongProducts, Int8>},
    {"int4 rows, int8 activations", Isa::kNeon, true, 1, INT64_MAX, SupportsIntegers<NM_INT4>, PackedBytes, PackRows,
     ScratchBytes, RunIntegers<LongProducts, Int4>},
};

}  // namespace

KernelList NeonIntegerRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
