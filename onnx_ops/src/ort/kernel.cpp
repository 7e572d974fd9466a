#include "kernel.h"

#include <inttypes.h>
#include <stdio.h>

#include "custom_op.h"
#include "status.h"

namespace nm_ort {
namespace {

constexpr const char* kInputNames[] = {"A",   "values", "positions", "scales", "outlier_values", "outlier_positions",
                                       "bias"};
constexpr size_t kMessageBytes = 512;

// In the order of enum nm_dtype and enum nm_positions.
const std::vector<std::string> kDtypeNames = {"float32", "float16", "bfloat16", "int8", "int4"};
const std::vector<std::string> kPositionsNames = {"codes", "bitmap"};

// Whether an input's element type is what the weight asks for.
bool TypeFits(size_t input, ONNXTensorElementDataType type, int32_t dtype) {
  switch (input) {
    case kValues:
      return dtype == NM_INT8 || dtype == NM_INT4 ? type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                                                  : FloatDtype(type) == dtype;
    case kScales:
      return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case kOutlierValues:
      return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case kBias:
      return FloatDtype(type) >= 0;
    default:
      return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
}

// The types for which TypeFits is true, in words.
const char* FittingTypes(size_t input, int32_t dtype) {
  switch (input) {
    case kValues:
      return dtype == NM_INT8 || dtype == NM_INT4 ? "uint8" : kDtypeNames[dtype].c_str();
    case kScales:
      return "float16";
    case kOutlierValues:
      return "float16 or float32";
    case kBias:
      return "float32, float16 or bfloat16";
    default:
      return "uint8";
  }
}

// Splits a loop over ONNX Runtime's own threads.
struct Pool {
  const OrtApi& api;
  const OrtKernelContext* context;
  OrtStatus* failure = nullptr;
};

void ParallelFor(void* pointer, nm_task task, void* context, size_t count) {
  Pool& pool = *static_cast<Pool*>(pointer);
  if (pool.failure == nullptr) {
    pool.failure = pool.api.KernelContext_ParallelFor(pool.context, task, count, count, context);
  }
}

}  // namespace

OrtStatus* MatMulNM::Error(const char* reason) const {
  const std::string message = "MatMulNM node '" + name_ + "': " + reason;
  return api_.CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
}

OrtStatus* MatMulNM::ReadInteger(const OrtKernelInfo* info, const char* name, int64_t smallest, int64_t largest,
                                 int64_t* out) const {
  char reason[kMessageBytes];
  if (OrtStatus* failure = api_.KernelInfoGetAttribute_int64(info, name, out)) {
    api_.ReleaseStatus(failure);
    snprintf(reason, sizeof reason, "attribute %s is missing or not an integer.", name);
    return Error(reason);
  }
  if (*out >= smallest && *out <= largest) return nullptr;
  snprintf(reason, sizeof reason, "attribute %s is %" PRId64 "; it must be between %" PRId64 " and %" PRId64 ".", name,
           *out, smallest, largest);
  return Error(reason);
}

OrtStatus* MatMulNM::ReadInteger(const OrtKernelInfo* info, const char* name, int32_t* out) const {
  int64_t value = 0;
  NM_RETURN_IF_ERROR(ReadInteger(info, name, 0, INT32_MAX, &value));
  *out = static_cast<int32_t>(value);
  return nullptr;
}

OrtStatus* MatMulNM::ReadChoice(const OrtKernelInfo* info, const char* name, const std::vector<std::string>& choices,
                                int32_t* out) const {
  char value[32] = "";
  size_t bytes = sizeof value;
  if (OrtStatus* failure = api_.KernelInfoGetAttribute_string(info, name, value, &bytes)) api_.ReleaseStatus(failure);
  std::string allowed;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] == value) {
      *out = static_cast<int32_t>(i);
      return nullptr;
    }
    allowed += (i == 0 ? " " : i + 1 < choices.size() ? ", " : " or ") + choices[i];
  }
  return Error(("attribute " + std::string(name) + " must be the string" + allowed + ".").c_str());
}

OrtStatus* MatMulNM::ReadAttributes(const OrtKernelInfo* info) {
  NM_RETURN_IF_ERROR(ReadInteger(info, "K", 1, INT32_MAX, &weight_.in_features));
  NM_RETURN_IF_ERROR(ReadInteger(info, "N", 1, INT32_MAX, &weight_.out_features));
  NM_RETURN_IF_ERROR(ReadInteger(info, "n", &weight_.n));
  NM_RETURN_IF_ERROR(ReadInteger(info, "m", &weight_.m));
  NM_RETURN_IF_ERROR(ReadChoice(info, "dtype", kDtypeNames, &weight_.dtype));
  NM_RETURN_IF_ERROR(ReadChoice(info, "positions", kPositionsNames, &weight_.positions_format));
  NM_RETURN_IF_ERROR(ReadInteger(info, "group_size", -1, INT32_MAX, &weight_.group_size));
  NM_RETURN_IF_ERROR(ReadInteger(info, "outlier_k", &weight_.outlier_k));
  NM_RETURN_IF_ERROR(ReadInteger(info, "outlier_block", &weight_.outlier_block));
  NM_RETURN_IF_ERROR(ReadInteger(info, "accuracy_level", &accuracy_level_));
  if (accuracy_level_ != 0 && accuracy_level_ != 4) return Error("attribute accuracy_level must be 0 or 4.");
  return nullptr;
}

// Element type and shape: two dimensions, a row of the weight each; one for the bias. Sizes are nm_weight_check's.
OrtStatus* MatMulNM::CheckTensor(size_t input, const Tensor& tensor) const {
  if (tensor.elements == 0) return nullptr;
  char reason[kMessageBytes];
  if (!TypeFits(input, tensor.type, weight_.dtype)) {
    snprintf(reason, sizeof reason, "%s has the ONNX element type %d; it must be %s.", kInputNames[input],
             static_cast<int>(tensor.type), FittingTypes(input, weight_.dtype));
    return Error(reason);
  }
  const size_t rank = input == kBias ? 1 : 2;
  if (tensor.shape.size() == rank && tensor.shape[0] == weight_.out_features) return nullptr;
  snprintf(reason, sizeof reason, "%s must have %zu dimension%s, the first of %" PRId64 ".", kInputNames[input], rank,
           rank == 1 ? "" : "s", weight_.out_features);
  return Error(reason);
}

// Points the weight at the tensors inputs[kValues … kOutlierPositions] and checks all of it.
OrtStatus* MatMulNM::SetWeight(const Tensor* inputs, nm_weight* weight) const {
  for (size_t i = kValues; i <= kOutlierPositions; ++i) NM_RETURN_IF_ERROR(CheckTensor(i, inputs[i]));
  const auto buffer = [inputs](size_t i) {
    return nm_buffer{inputs[i].data, inputs[i].elements * ElementBytes(inputs[i].type)};
  };
  weight->values = buffer(kValues);
  weight->positions = buffer(kPositions);
  weight->scales = buffer(kScales);
  weight->outlier_values = buffer(kOutlierValues);
  weight->outlier_positions = buffer(kOutlierPositions);
  weight->outlier_dtype = inputs[kOutlierValues].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? NM_FLOAT32 : NM_FLOAT16;
  char reason[kMessageBytes];
  return nm_weight_check(weight, reason, sizeof reason) == 0 ? nullptr : Error(reason);
}

OrtStatus* MatMulNM::ReadConstants(const OrtKernelInfo* info) {
  size_t count = 0;
  NM_RETURN_IF_ERROR(api_.KernelInfo_GetInputCount(info, &count));
  if (count < kRequiredInputs || count > kInputCount) return Error("it must have 3 to 7 inputs.");
  Tensor inputs[kInputCount];
  weight_is_constant_ = bias_is_constant_ = true;
  for (size_t i = kValues; i < count; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    NM_RETURN_IF_ERROR(api_.KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value));
    if (is_constant == 0) (i == kBias ? bias_is_constant_ : weight_is_constant_) = false;
    if (is_constant != 0) NM_RETURN_IF_ERROR(ReadTensor(api_, value, &inputs[i]));
  }
  if (weight_is_constant_) NM_RETURN_IF_ERROR(SetWeight(inputs, &weight_));
  if (bias_is_constant_) {
    NM_RETURN_IF_ERROR(CheckTensor(kBias, inputs[kBias]));
    bias_ = inputs[kBias];
  }
  return nullptr;
}

OrtStatus* MatMulNM::Init(const OrtKernelInfo* info) {
  NM_RETURN_IF_ERROR(ReadNodeName(api_, info, &name_));
  NM_RETURN_IF_ERROR(ReadAttributes(info));
  return ReadConstants(info);
}

OrtStatus* MatMulNM::ReadInputs(const OrtKernelContext* context, size_t first, size_t last, Tensor* inputs) const {
  size_t count = 0;
  NM_RETURN_IF_ERROR(api_.KernelContext_GetInputCount(context, &count));
  for (size_t i = first; i <= last && i < count; ++i) {
    const OrtValue* value = nullptr;
    NM_RETURN_IF_ERROR(api_.KernelContext_GetInput(context, i, &value));
    NM_RETURN_IF_ERROR(ReadTensor(api_, value, &inputs[i]));
  }
  return nullptr;
}

OrtStatus* MatMulNM::Compute(OrtKernelContext* context) const {
  Tensor inputs[kInputCount];
  NM_RETURN_IF_ERROR(ReadInputs(context, kActivations, kActivations, inputs));
  const Tensor& a = inputs[kActivations];
  if (a.shape.empty() || a.shape.back() != weight_.in_features || a.type != activation_) {
    char reason[kMessageBytes];
    snprintf(reason, sizeof reason, "the last dimension of A is %" PRId64 "; it must be K = %" PRId64 ".",
             a.shape.empty() ? int64_t{-1} : a.shape.back(), weight_.in_features);
    return Error(reason);
  }
  nm_weight weight = weight_;
  if (!weight_is_constant_) {
    NM_RETURN_IF_ERROR(ReadInputs(context, kValues, kOutlierPositions, inputs));
    NM_RETURN_IF_ERROR(SetWeight(inputs, &weight));
  }
  if (!bias_is_constant_) {
    NM_RETURN_IF_ERROR(ReadInputs(context, kBias, kBias, inputs));
    NM_RETURN_IF_ERROR(CheckTensor(kBias, inputs[kBias]));
  }
  const Tensor& bias = bias_is_constant_ ? bias_ : inputs[kBias];

  std::vector<int64_t> shape = a.shape;
  shape.back() = weight.out_features;
  OrtValue* output = nullptr;
  NM_RETURN_IF_ERROR(api_.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
  void* y = nullptr;
  NM_RETURN_IF_ERROR(api_.GetTensorMutableData(output, &y));

  Pool pool{api_, context};
  nm_matmul_args args = {};
  args.struct_bytes = sizeof args;
  args.weight = &weight;
  args.a = a.data;
  args.y = y;
  args.bias = bias.elements == 0 ? nullptr : bias.data;
  args.rows = static_cast<int64_t>(a.elements) / weight.in_features;
  args.activation_dtype = FloatDtype(activation_);
  args.bias_dtype = bias.elements == 0 ? NM_FLOAT32 : FloatDtype(bias.type);
  args.accuracy_level = accuracy_level_;
  args.parallel_for = ParallelFor;
  args.pool = &pool;
  char reason[kMessageBytes];
  const bool failed = nm_matmul(&args, reason, sizeof reason) != 0;
  if (pool.failure != nullptr) return pool.failure;
  return failed ? Error(reason) : nullptr;
}

}  // namespace nm_ort
