// The table of functions through which ONNX Runtime meets the operator.
#include "matmul_nm.h"

#include <exception>
#include <memory>

#include "kernel.h"
#include "status.h"

namespace nm_ort {
namespace {

struct Operator : OrtCustomOp {
  explicit Operator(ONNXTensorElementDataType type);
  const ONNXTensorElementDataType activation;
};

const Operator& Self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

// No exception may cross into ONNX Runtime: what is left is running out of memory.
template <typename Function>
OrtStatus* Guarded(const OrtApi& api, Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

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

Operator::Operator(ONNXTensorElementDataType type) : OrtCustomOp{}, activation(type) {
  version = kOrtApiVersion;
  GetName = [](const OrtCustomOp*) { return "MatMulNM"; };
  GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
  GetInputType = [](const OrtCustomOp* op, size_t index) {
    return index == kActivations ? Self(op).activation : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index < kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetOutputType = [](const OrtCustomOp* op, size_t) { return Self(op).activation; };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = RunKernel;
  KernelDestroy = [](void* kernel) { delete static_cast<MatMulNM*>(kernel); };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  // InferOutputShapeFn stays null: with it, ONNX Runtime 1.18 to 1.23 crash on a node that leaves out a middle input.
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
