// C interface of the optimum-nm kernels: multiply activations by a weight in the packed format of docs/format.md,
// directly from the bytes of the file. No dependency, no allocation that outlives a call, no threads of its own.
#ifndef NM_MATMUL_H_
#define NM_MATMUL_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define NM_EXPORT __declspec(dllexport)
#else
#define NM_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum nm_dtype { NM_FLOAT32 = 0, NM_FLOAT16 = 1, NM_BFLOAT16 = 2, NM_INT8 = 3, NM_INT4 = 4 };
enum nm_positions { NM_CODES = 0, NM_BITMAP = 1 };

// Bytes of one packed tensor, at any alignment. data may be null when bytes is 0.
typedef struct nm_buffer {
  const void* data;
  size_t bytes;
} nm_buffer;

// One packed weight [out_features, in_features].
typedef struct nm_weight {
  int64_t in_features;
  int64_t out_features;
  int32_t n;
  int32_t m;
  int32_t dtype;             // enum nm_dtype
  int32_t positions_format;  // enum nm_positions
  int64_t group_size;        // dense columns a scale covers, a multiple of m; -1: the whole row. Read for int8 and int4
  int32_t outlier_k;         // 0: no outliers
  int32_t outlier_block;     // at most 256
  int32_t outlier_dtype;     // NM_FLOAT16 or NM_FLOAT32
  nm_buffer values;
  nm_buffer positions;
  nm_buffer scales;
  nm_buffer outlier_values;
  nm_buffer outlier_positions;
} nm_weight;

// Checks everything that reading the weight relies on: attributes, sizes of all buffers, N bits in every group or every
// code below C(M,N), outlier positions ascending inside their block. Returns 0, or writes one sentence to message
// (always terminated) and returns 1. Reads the positions once; never the values.
NM_EXPORT int nm_weight_check(const nm_weight* weight, char* message, size_t message_bytes);

// Runs task(context, 0 … count-1), in any order, on any threads, and returns when all are done.
typedef void (*nm_task)(void* context, size_t index);
typedef void (*nm_parallel_for)(void* pool, nm_task task, void* context, size_t count);

// y[rows, out_features] = a[rows, in_features] · Wᵀ + bias.
typedef struct nm_matmul_args {
  size_t struct_bytes;       // sizeof(nm_matmul_args), so that later versions may append
  const nm_weight* weight;   // must have passed nm_weight_check
  const void* a;             // row-major, contiguous
  void* y;                   // row-major, contiguous, the same type as a
  const void* bias;          // out_features elements, or null
  int64_t rows;              // may be 0
  int32_t activation_dtype;  // of a and y: NM_FLOAT32, NM_FLOAT16 or NM_BFLOAT16
  int32_t bias_dtype;        // NM_FLOAT32, NM_FLOAT16 or NM_BFLOAT16
  int32_t accuracy_level;  // 0: float32 arithmetic. 4: int8 activations per row and block where the values are integers
  nm_parallel_for parallel_for;  // null: the calling thread does everything
  void* pool;                    // passed to parallel_for
} nm_matmul_args;

// Returns 0, or 1 with one sentence in message (an argument out of range, no memory for scratch).
NM_EXPORT int nm_matmul(const nm_matmul_args* args, char* message, size_t message_bytes);

// The instruction set in use: "avx512", "avx2" or "portable"; on AArch64 "dotprod", "neon" or "portable".
// OPTIMUM_NM_ISA, read once, lowers it.
NM_EXPORT const char* nm_isa(void);

// A parallel_for over an OpenMP runtime that the caller already has (torch's): pool points to nm_openmp_pool.
typedef struct nm_openmp_pool {
  void (*gomp_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  unsigned threads;
} nm_openmp_pool;
NM_EXPORT void nm_openmp_parallel_for(void* pool, nm_task task, void* context, size_t count);

#ifdef __cplusplus
}
#endif

#endif  // NM_MATMUL_H_
