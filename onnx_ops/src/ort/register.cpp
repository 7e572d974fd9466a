// The function that ONNX Runtime looks up in the library by name, and calls with the options of a session to come.
#include "matmul_nm.h"
#include "status.h"
#include "swiglu.h"

namespace {

OrtStatus* Register(const OrtApi& api, OrtSessionOptions* options) {
  // ONNX Runtime keeps the domain's address until the last session ends, so the domain is made once and never released.
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* const failure = [&api]() -> OrtStatus* {
    NM_RETURN_IF_ERROR(api.CreateCustomOpDomain(nm_ort::kDomain, &domain));
    for (size_t i = 0; i < nm_ort::kMatMulNMCount; ++i) {
      NM_RETURN_IF_ERROR(api.CustomOpDomain_Add(domain, nm_ort::MatMulNMOperators()[i]));
    }
    return api.CustomOpDomain_Add(domain, nm_ort::SwigluOperator());
  }();
  if (failure != nullptr) return api.CreateStatus(ORT_FAIL, api.GetErrorMessage(failure));
  return api.AddCustomOpDomain(options, domain);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (api != nullptr) return Register(*api, options);
  // An older runtime: version 1 is in every one, and is enough to say so.
  return base->GetApi(1)->CreateStatus(ORT_FAIL, "optimum-nm needs ONNX Runtime 1.18 or newer.");
}
