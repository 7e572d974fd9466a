// The kernel of one MatMulNM node: attributes and tensors read and checked, then nm_matmul.
#ifndef NM_ORT_KERNEL_H_
#define NM_ORT_KERNEL_H_

#include <string>
#include <vector>

#include "nm_matmul.h"
#include "ort_abi.h"
#include "tensor.h"

namespace nm_ort {

enum Input : size_t {
  kActivations,
  kValues,
  kPositions,
  kScales,
  kOutlierValues,
  kOutlierPositions,
  kBias,
  kInputCount
};
constexpr size_t kRequiredInputs = 3;

// One node of a model.
class MatMulNM {
 public:
  MatMulNM(const OrtApi& api, ONNXTensorElementDataType activation) : api_(api), activation_(activation) {}

  // Attributes and constant inputs; an error names the node and what is wrong.
  OrtStatus* Init(const OrtKernelInfo* info);
  OrtStatus* Compute(OrtKernelContext* context) const;
  const OrtApi& api() const { return api_; }

 private:
  OrtStatus* Error(const char* reason) const;
  OrtStatus* ReadAttributes(const OrtKernelInfo* info);
  OrtStatus* ReadInteger(const OrtKernelInfo* info, const char* name, int64_t smallest, int64_t largest,
                         int64_t* out) const;
  OrtStatus* ReadInteger(const OrtKernelInfo* info, const char* name, int32_t* out) const;
  OrtStatus* ReadChoice(const OrtKernelInfo* info, const char* name, const std::vector<std::string>& choices,
                        int32_t* out) const;
  OrtStatus* ReadConstants(const OrtKernelInfo* info);
  OrtStatus* CheckTensor(size_t input, const Tensor& tensor) const;
  OrtStatus* SetWeight(const Tensor* inputs, nm_weight* weight) const;
  OrtStatus* CheckBias(const Tensor& bias) const;
  OrtStatus* ReadInputs(const OrtKernelContext* context, size_t first, size_t last, Tensor* inputs) const;

  const OrtApi& api_;
  const ONNXTensorElementDataType activation_;
  std::string name_;
  nm_weight weight_ = {};
  int32_t accuracy_level_ = 0;
  bool weight_is_constant_ = false;
  bool bias_is_constant_ = false;
  Tensor bias_;
};

}  // namespace nm_ort

#endif  // NM_ORT_KERNEL_H_
