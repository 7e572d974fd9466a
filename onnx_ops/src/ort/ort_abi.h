// The part of ONNX Runtime's C interface that is used here, declared anew: the official header is in no package that a
// build can rely on. Names and layouts are ONNX Runtime's. The interface only ever grows at its end, so a member's
// index never changes; abi_check.cpp compares with the official header wherever that is present.
#ifndef NM_ORT_ABI_H_
#define NM_ORT_ABI_H_

#include <stddef.h>
#include <stdint.h>

constexpr uint32_t kOrtApiVersion = 18;  // the oldest runtime served; newer ones hand out this version too

struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtEnv;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtRunOptions;
struct OrtSession;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtTypeInfo;
struct OrtValue;
struct OrtApi;
struct OrtCustomOp;

enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
};
enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
};

struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* msg);
  void* unused_1[1];
  const char* (*GetErrorMessage)(const OrtStatus* status);
  OrtStatus* (*CreateEnv)(OrtLoggingLevel log_severity_level, const char* logid, OrtEnv** out);
  void* unused_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv* env, const char* model_path, const OrtSessionOptions* options,
                              OrtSession** out);
  void* unused_8[1];
  OrtStatus* (*Run)(OrtSession* session, const OrtRunOptions* run_options, const char* const* input_names,
                    const OrtValue* const* inputs, size_t input_len, const char* const* output_names,
                    size_t output_names_len, OrtValue** outputs);
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions** options);
  void* unused_11[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions* options, int intra_op_num_threads);
  void* unused_25[1];
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* custom_op_domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* custom_op_domain);
  void* unused_29[1];
  OrtStatus* (*SessionGetInputCount)(const OrtSession* session, size_t* out);
  OrtStatus* (*SessionGetOutputCount)(const OrtSession* session, size_t* out);
  void* unused_32[1];
  OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession* session, size_t index, OrtTypeInfo** type_info);
  void* unused_34[2];
  OrtStatus* (*SessionGetInputName)(const OrtSession* session, size_t index, OrtAllocator* allocator, char** value);
  OrtStatus* (*SessionGetOutputName)(const OrtSession* session, size_t index, OrtAllocator* allocator, char** value);
  void* unused_38[10];
  OrtStatus* (*CreateTensorAsOrtValue)(OrtAllocator* allocator, const int64_t* shape, size_t shape_len,
                                       ONNXTensorElementDataType type, OrtValue** out);
  void* unused_49[2];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);
  void* unused_52[3];
  OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo* type_info, const OrtTensorTypeAndShapeInfo** out);
  void* unused_56[4];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* out);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dim_values, size_t dim_values_length);
  void* unused_63[1];
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
  void* unused_66[10];
  OrtStatus* (*AllocatorFree)(OrtAllocator* ort_allocator, void* p);
  void* unused_77[1];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator** out);
  void* unused_79[7];
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* out);
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name, char* out, size_t* size);
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* out);
  void* unused_89[1];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** out);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dim_values,
                                        size_t dim_count, OrtValue** out);
  void (*ReleaseEnv)(OrtEnv* input);
  void (*ReleaseStatus)(OrtStatus* input);
  void* unused_94[1];
  void (*ReleaseSession)(OrtSession* input);
  void (*ReleaseValue)(OrtValue* input);
  void* unused_97[1];
  void (*ReleaseTypeInfo)(OrtTypeInfo* input);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* input);
  void (*ReleaseSessionOptions)(OrtSessionOptions* input);
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain* input);
  void* unused_102[126];
  OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions* options, const char* library_name);
  void* unused_229[1];
  OrtStatus* (*KernelInfo_GetInputCount)(const OrtKernelInfo* info, size_t* out);
  void* unused_231[13];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out, size_t* size);
  void* unused_245[4];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** out);
  void* unused_250[24];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*fn)(void*, size_t), size_t total,
                                          size_t num_batch, void* usr_data);
};

// Every member declared here, with its place in the table.
#define NM_ORT_API_MEMBERS(X)               \
  X(CreateStatus, 0)                        \
  X(GetErrorMessage, 2)                     \
  X(CreateEnv, 3)                           \
  X(CreateSession, 7)                       \
  X(Run, 9)                                 \
  X(CreateSessionOptions, 10)               \
  X(SetIntraOpNumThreads, 24)               \
  X(CreateCustomOpDomain, 26)               \
  X(CustomOpDomain_Add, 27)                 \
  X(AddCustomOpDomain, 28)                  \
  X(SessionGetInputCount, 30)               \
  X(SessionGetOutputCount, 31)              \
  X(SessionGetInputTypeInfo, 33)            \
  X(SessionGetInputName, 36)                \
  X(SessionGetOutputName, 37)               \
  X(CreateTensorAsOrtValue, 48)             \
  X(GetTensorMutableData, 51)               \
  X(CastTypeInfoToTensorInfo, 55)           \
  X(GetTensorElementType, 60)               \
  X(GetDimensionsCount, 61)                 \
  X(GetDimensions, 62)                      \
  X(GetTensorShapeElementCount, 64)         \
  X(GetTensorTypeAndShape, 65)              \
  X(AllocatorFree, 76)                      \
  X(GetAllocatorWithDefaultOptions, 78)     \
  X(KernelInfoGetAttribute_int64, 86)       \
  X(KernelInfoGetAttribute_string, 87)      \
  X(KernelContext_GetInputCount, 88)        \
  X(KernelContext_GetInput, 90)             \
  X(KernelContext_GetOutput, 91)            \
  X(ReleaseEnv, 92)                         \
  X(ReleaseStatus, 93)                      \
  X(ReleaseSession, 95)                     \
  X(ReleaseValue, 96)                       \
  X(ReleaseTypeInfo, 98)                    \
  X(ReleaseTensorTypeAndShapeInfo, 99)      \
  X(ReleaseSessionOptions, 100)             \
  X(ReleaseCustomOpDomain, 101)             \
  X(RegisterCustomOpsLibrary_V2, 228)       \
  X(KernelInfo_GetInputCount, 230)          \
  X(KernelInfo_GetNodeName, 244)            \
  X(KernelInfoGetConstantInput_tensor, 249) \
  X(KernelContext_ParallelFor, 274)
#define NM_ORT_API_INDEX(member, index) static_assert(offsetof(OrtApi, member) == (index) * sizeof(void*), #member);
NM_ORT_API_MEMBERS(NM_ORT_API_INDEX)
#undef NM_ORT_API_INDEX

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* op_kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* op_kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* op_kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

#endif  // NM_ORT_ABI_H_
