// The kernel table: one row per value type, instruction set, arithmetic and number of activation rows, all of one
// signature. nm_matmul takes the first row that fits; the tests run every row.
#ifndef NM_KERNELS_KERNELS_H_
#define NM_KERNELS_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#include "layout.h"

namespace nm {

// Each architecture's in ascending order.
enum class Isa { kPortable, kAvx2, kAvx512, kAmx, kNeon, kDotprod };

// Activation rows are packed in blocks of this many, each by one call of Kernel::pack.
constexpr int64_t kRowBlock = 16;
// Output rows given to Kernel::run start at a multiple of this.
constexpr int64_t kOutputTile = 32;

struct Kernel {
  const char* name;
  Isa isa;
  bool int8_activations;  // for accuracy_level 4
  int64_t least_rows;     // of activations: with fewer it works, but another is faster
  int64_t most_rows;
  bool (*supports)(const Layout& layout);

  // Bytes of `rows` packed activation rows.
  size_t (*packed_bytes)(const Layout& layout, int64_t rows);
  // Packs rows first … first+count-1 (count at most kRowBlock, first a multiple of it) of `rows`, given as
  // a[count, in_features].
  void (*pack)(const Layout& layout, const float* a, int64_t first, int64_t count, int64_t rows, void* packed);
  // Bytes of scratch for one call of run.
  size_t (*scratch_bytes)(const Layout& layout, int64_t rows);
  // y[r · y_stride + o - first] = Σ_k a[r, k] · W[o, k] for all r and first ≤ o < last. packed and scratch are aligned
  // to 64 bytes.
  void (*run)(const Layout& layout, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch,
              float* y, int64_t y_stride);
};

struct KernelList {
  const Kernel* kernels;
  size_t count;
};

// Every kernel of this build, fastest first.
KernelList AllKernels();

// The kernel for a weight, at most of the given instruction set. There always is one.
const Kernel& ChooseKernel(const Layout& layout, int64_t rows, int accuracy_level, Isa isa);

// What the processor has, and what is in use: OPTIMUM_NM_ISA, read once, can lower it.
Isa BestIsa();
Isa ActiveIsa();
const char* IsaName(Isa isa);

// nm_matmul with a given kernel, or the one that fits best when kernel is null.
int Multiply(const nm_matmul_args& args, const Kernel* kernel, char* message, size_t message_bytes);

// Tables of the instruction sets, appended by AllKernels.
KernelList PortableKernels();
KernelList AmxFloatTiles();
KernelList AmxIntegerTiles();
KernelList Avx2FloatPanels();
KernelList Avx2FloatRows();
KernelList Avx2IntegerPanels();
KernelList Avx2IntegerRows();
KernelList Avx2WholeRows();
KernelList Avx512FloatPanels();
KernelList Avx512FloatRows();
KernelList Avx512IntegerRows();
KernelList Avx512IntegerTiles();
KernelList Avx512WholeRows();
KernelList NeonDotprodRows();
KernelList NeonFloatRows();
KernelList NeonIntegerRows();

}  // namespace nm

#endif  // NM_KERNELS_KERNELS_H_
