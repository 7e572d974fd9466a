// The NEON integer kernels of processors with dot products (ARMv8.2 on, all of Apple's): sixteen products an
// instruction.
#include "neon_integer_rows.h"

namespace nm {
namespace {

struct DotProducts {
  static NM_PIECE int32x4_t Add(int32x4_t sum, int8x16_t w, int8x16_t a) { return vdotq_s32(sum, w, a); }
};

constexpr Kernel kKernels[] = {
    {"int8 rows, int8 activations, dot products", Isa::kDotprod, true, 1, INT64_MAX, SupportsIntegers<NM_INT8>,
     PackedBytes, PackRows, ScratchBytes, RunIntegers<DotProducts, Int8>},
    {"int4 rows, int8 activations, dot products", Isa::kDotprod, true, 1, INT64_MAX, SupportsIntegers<NM_INT4>,
     PackedBytes, PackRows, ScratchBytes, RunIntegers<DotProducts, Int4>},
};

}  // namespace

KernelList NeonDotprodRows() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
