// Compares ort_abi.h with ONNX Runtime's own header, where the compiler finds one; empty elsewhere.
#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#include <stddef.h>
#include <stdint.h>

namespace declared_here {
#include "ort_abi.h"
}

#define NM_SAME_OFFSET(type, member) \
  static_assert(offsetof(declared_here::type, member) == offsetof(::type, member), #type " " #member)
#define NM_SAME_API_OFFSET(member, index) NM_SAME_OFFSET(OrtApi, member);
NM_ORT_API_MEMBERS(NM_SAME_API_OFFSET)
NM_SAME_OFFSET(OrtCustomOp, version);
NM_SAME_OFFSET(OrtCustomOp, CreateKernel);
NM_SAME_OFFSET(OrtCustomOp, GetName);
NM_SAME_OFFSET(OrtCustomOp, GetExecutionProviderType);
NM_SAME_OFFSET(OrtCustomOp, GetInputType);
NM_SAME_OFFSET(OrtCustomOp, GetInputTypeCount);
NM_SAME_OFFSET(OrtCustomOp, GetOutputType);
NM_SAME_OFFSET(OrtCustomOp, GetOutputTypeCount);
NM_SAME_OFFSET(OrtCustomOp, KernelCompute);
NM_SAME_OFFSET(OrtCustomOp, KernelDestroy);
NM_SAME_OFFSET(OrtCustomOp, GetInputCharacteristic);
NM_SAME_OFFSET(OrtCustomOp, GetOutputCharacteristic);
NM_SAME_OFFSET(OrtCustomOp, GetInputMemoryType);
NM_SAME_OFFSET(OrtCustomOp, GetVariadicInputMinArity);
NM_SAME_OFFSET(OrtCustomOp, GetVariadicInputHomogeneity);
NM_SAME_OFFSET(OrtCustomOp, GetVariadicOutputMinArity);
NM_SAME_OFFSET(OrtCustomOp, GetVariadicOutputHomogeneity);
NM_SAME_OFFSET(OrtCustomOp, CreateKernelV2);
NM_SAME_OFFSET(OrtCustomOp, KernelComputeV2);
NM_SAME_OFFSET(OrtCustomOp, InferOutputShapeFn);
NM_SAME_OFFSET(OrtCustomOp, GetStartVersion);
NM_SAME_OFFSET(OrtCustomOp, GetEndVersion);
NM_SAME_OFFSET(OrtCustomOp, GetMayInplace);
NM_SAME_OFFSET(OrtCustomOp, ReleaseMayInplace);
NM_SAME_OFFSET(OrtCustomOp, GetAliasMap);
NM_SAME_OFFSET(OrtCustomOp, ReleaseAliasMap);
static_assert(int{declared_here::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT} == int{::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
              "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT");
static_assert(int{declared_here::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8} == int{::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
              "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8");
static_assert(int{declared_here::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64} == int{::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
              "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64");
static_assert(int{declared_here::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16} == int{::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
              "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16");
static_assert(int{declared_here::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16} ==
                  int{::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
              "ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16");
static_assert(int{declared_here::ORT_FAIL} == int{::ORT_FAIL}, "ORT_FAIL");
static_assert(int{declared_here::ORT_INVALID_ARGUMENT} == int{::ORT_INVALID_ARGUMENT}, "ORT_INVALID_ARGUMENT");
static_assert(int{declared_here::INPUT_OUTPUT_OPTIONAL} == int{::INPUT_OUTPUT_OPTIONAL}, "INPUT_OUTPUT_OPTIONAL");
static_assert(int{declared_here::OrtMemTypeDefault} == int{::OrtMemTypeDefault}, "OrtMemTypeDefault");
static_assert(int{declared_here::ORT_LOGGING_LEVEL_WARNING} == int{::ORT_LOGGING_LEVEL_WARNING},
              "ORT_LOGGING_LEVEL_WARNING");
#endif
