// The operator SwiGLU of docs/operator.md: what stands between the two matrix products of a gated feed-forward block.
#ifndef NM_ORT_SWIGLU_H_
#define NM_ORT_SWIGLU_H_

#include "custom_op.h"

namespace nm_ort {

// For float32. It lives as long as the process.
const OrtCustomOp* SwigluOperator();

}  // namespace nm_ort

#endif  // NM_ORT_SWIGLU_H_
