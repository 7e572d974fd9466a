// The operator MatMulNM of docs/operator.md.
#ifndef NM_ORT_MATMUL_NM_H_
#define NM_ORT_MATMUL_NM_H_

#include "custom_op.h"

namespace nm_ort {

constexpr size_t kMatMulNMCount = 3;

// One operator for each type of the activations; all share the name. They live as long as the process.
const OrtCustomOp* const* MatMulNMOperators();

}  // namespace nm_ort

#endif  // NM_ORT_MATMUL_NM_H_
