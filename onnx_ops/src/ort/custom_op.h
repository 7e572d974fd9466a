// What the operators of this library have in common.
#ifndef NM_ORT_CUSTOM_OP_H_
#define NM_ORT_CUSTOM_OP_H_

#include <exception>
#include <string>

#include "ort_abi.h"

namespace nm_ort {

constexpr char kDomain[] = "optimum.nm";

// An operator of one output on the CPU: the answers that are the same for all. The rest of the table is null.
struct CpuOperator : OrtCustomOp {
  CpuOperator();
};

OrtStatus* ReadNodeName(const OrtApi& api, const OrtKernelInfo* info, std::string* name);

// No exception may cross into ONNX Runtime: what is left is running out of memory.
template <typename Function>
OrtStatus* Guarded(const OrtApi& api, Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

}  // namespace nm_ort

#endif  // NM_ORT_CUSTOM_OP_H_
