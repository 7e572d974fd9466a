#include "tensor.h"

#include "nm_matmul.h"
#include "status.h"

namespace nm_ort {

OrtStatus* ReadTensor(const OrtApi& api, const OrtValue* value, Tensor* tensor) {
  *tensor = Tensor();
  if (value == nullptr) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  NM_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* failure = api.GetTensorElementType(info, &tensor->type);
  if (failure == nullptr) failure = api.GetTensorShapeElementCount(info, &tensor->elements);
  if (failure == nullptr) failure = api.GetDimensionsCount(info, &rank);
  if (failure == nullptr) {
    tensor->shape.resize(rank);
    failure = api.GetDimensions(info, tensor->shape.data(), rank);
  }
  api.ReleaseTensorTypeAndShapeInfo(info);
  NM_RETURN_IF_ERROR(failure);
  void* data = nullptr;
  NM_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor->data = data;
  return nullptr;
}

int32_t FloatDtype(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return NM_FLOAT32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return NM_FLOAT16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return NM_BFLOAT16;
    default:
      return -1;
  }
}

size_t ElementBytes(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 ? 1 : 2;
}

}  // namespace nm_ort
