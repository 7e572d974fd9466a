// A tensor of ONNX Runtime, seen from outside.
#ifndef NM_ORT_TENSOR_H_
#define NM_ORT_TENSOR_H_

#include <vector>

#include "ort_abi.h"

namespace nm_ort {

struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;
  size_t elements = 0;  // 0 also for an absent input
  const void* data = nullptr;
};

// `value` may be null: an absent input.
OrtStatus* ReadTensor(const OrtApi& api, const OrtValue* value, Tensor* tensor);

// The nm_dtype of a floating element type, or -1.
int32_t FloatDtype(ONNXTensorElementDataType type);

// Bytes of an element: float32, float16, bfloat16 or uint8.
size_t ElementBytes(ONNXTensorElementDataType type);

}  // namespace nm_ort

#endif  // NM_ORT_TENSOR_H_
