#include "custom_op.h"

#include <vector>

#include "status.h"

namespace nm_ort {

CpuOperator::CpuOperator() : OrtCustomOp{} {
  version = kOrtApiVersion;
  GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  // InferOutputShapeFn stays null: with it, ONNX Runtime 1.18 to 1.23 crash on a node that leaves out a middle input.
}

OrtStatus* ReadNodeName(const OrtApi& api, const OrtKernelInfo* info, std::string* name) {
  size_t bytes = 0;
  NM_RETURN_IF_ERROR(api.KernelInfo_GetNodeName(info, nullptr, &bytes));
  std::vector<char> text(bytes + 1);
  NM_RETURN_IF_ERROR(api.KernelInfo_GetNodeName(info, text.data(), &bytes));
  *name = text.data();
  return nullptr;
}

}  // namespace nm_ort
