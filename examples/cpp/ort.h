// ONNX Runtime's C interface, found when the program starts: errors as exceptions, objects that release themselves.
#ifndef EXAMPLES_CPP_ORT_H_
#define EXAMPLES_CPP_ORT_H_

#include <dlfcn.h>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "ort_abi.h"
#endif

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

constexpr uint32_t kOldestApi = 18;  // of ONNX Runtime 1.18; every newer one has it too

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;

inline const OrtApi& LoadOnnxRuntime(const char* library) {
  void* handle = dlopen(library, RTLD_NOW);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error(std::string(library) + " is not ONNX Runtime.");
  const OrtApi* api = get_base()->GetApi(kOldestApi);
  if (api == nullptr) {
    throw std::runtime_error(std::string("ONNX Runtime is ") + get_base()->GetVersionString() +
                             "; it must be 1.18 or newer.");
  }
  return *api;
}

inline void Check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

// A new tensor in memory of ONNX Runtime.
inline Handle<OrtValue> NewTensor(const OrtApi& api, ONNXTensorElementDataType type,
                                  const std::vector<int64_t>& shape) {
  OrtAllocator* allocator = nullptr;
  Check(api, api.GetAllocatorWithDefaultOptions(&allocator));
  OrtValue* value = nullptr;
  Check(api, api.CreateTensorAsOrtValue(allocator, shape.data(), shape.size(), type, &value));
  return Handle<OrtValue>(value, api.ReleaseValue);
}

template <typename T>
T* TensorData(const OrtApi& api, OrtValue* tensor) {
  void* data = nullptr;
  Check(api, api.GetTensorMutableData(tensor, &data));
  return static_cast<T*>(data);
}

#endif  // EXAMPLES_CPP_ORT_H_
