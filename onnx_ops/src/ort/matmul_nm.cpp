// The table of functions through which ONNX Runtime meets the operator.
#include "matmul_nm.h"

#include <memory>

#include "kernel.h"
#include "status.h"

namespace nm_ort {
namespace {

struct Operator : CpuOperator {
  explicit Operator(ONNXTensorElementDataType type);
  const ONNXTensorElementDataType activation;
};

const Operator& Self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

OrtStatus* MakeKernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  return Guarded(*api, [&]() -> OrtStatus* {
    auto created = std::make_unique<MatMulNM>(*api, Self(op).activation);
    NM_RETURN_IF_ERROR(created->Init(info));
    *kernel = created.release();
    return nullptr;
  });
}

OrtStatus* RunKernel(void* kernel, OrtKernelContext* context) {
  const MatMulNM& self = *static_cast<const MatMulNM*>(kernel);
  return Guarded(self.api(), [&] { return self.Compute(context); });
}

Operator::Operator(ONNXTensorElementDataType type) : activation(type) {
  GetName = [](const OrtCustomOp*) { return "MatMulNM"; };
  GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
  GetInputType = [](const OrtCustomOp* op, size_t index) {
    return index == kActivations ? Self(op).activation : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index < kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetOutputType = [](const OrtCustomOp* op, size_t) { return Self(op).activation; };
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = RunKernel;
  KernelDestroy = [](void* kernel) { delete static_cast<MatMulNM*>(kernel); };
}

}  // namespace

const OrtCustomOp* const* MatMulNMOperators() {
  static const Operator float32(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static const Operator float16(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  static const Operator bfloat16(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
  static const OrtCustomOp* const operators[kMatMulNMCount] = {&float32, &float16, &bfloat16};
  return operators;
}

}  // namespace nm_ort
