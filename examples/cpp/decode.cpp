// Runs an exported model through ONNX Runtime's C interface: one forward pass, or greedy decoding with the key-value
// cache. Tokens go in and out as numbers; the graph may be the fused or the traced one.
//
//   cmake -S examples/cpp -B build/cpp && cmake --build build/cpp
//   ORT=$(python -c "import glob, onnxruntime as o; print(glob.glob(o.__path__[0] + '/capi/libonnxruntime.so*')[0])")
//   NM=$(python -c "import optimum_nm; print(optimum_nm.library_path())")
//   build/cpp/decode $ORT $NM out/model.onnx 1 504 1735 314         prints the most likely next token
//   build/cpp/decode $ORT $NM out/model.onnx 32 504 1735 314        prints the 32 that follow
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ort.h"

namespace {

struct Input {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;  // -1 where it is not fixed
};

Input ReadInput(const OrtApi& api, const OrtSession* session, size_t index) {
  OrtAllocator* allocator = nullptr;
  Check(api, api.GetAllocatorWithDefaultOptions(&allocator));
  Input input;
  char* name = nullptr;
  Check(api, api.SessionGetInputName(session, index, allocator, &name));
  input.name = name;
  Check(api, api.AllocatorFree(allocator, name));
  OrtTypeInfo* type = nullptr;
  Check(api, api.SessionGetInputTypeInfo(session, index, &type));
  const Handle<OrtTypeInfo> owner(type, api.ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // part of type
  Check(api, api.CastTypeInfoToTensorInfo(type, &tensor));
  size_t rank = 0;
  Check(api, api.GetTensorElementType(tensor, &input.type));
  Check(api, api.GetDimensionsCount(tensor, &rank));
  input.shape.resize(rank);
  Check(api, api.GetDimensions(tensor, input.shape.data(), rank));
  return input;
}

// One sequence of tokens, and the keys and values of those read so far.
class Decoder {
 public:
  Decoder(const OrtApi& api, const char* operators, const char* model)
      : api_(api), env_(nullptr, api.ReleaseEnv), session_(nullptr, api.ReleaseSession) {
    OrtEnv* env = nullptr;
    Check(api, api.CreateEnv(ORT_LOGGING_LEVEL_WARNING, "decode", &env));
    env_.reset(env);
    OrtSessionOptions* options = nullptr;
    Check(api, api.CreateSessionOptions(&options));
    const Handle<OrtSessionOptions> owner(options, api.ReleaseSessionOptions);
    Check(api, api.RegisterCustomOpsLibrary_V2(options, operators));  // all there is to say about optimum-nm
    OrtSession* session = nullptr;
    Check(api, api.CreateSession(env, model, options, &session));
    session_.reset(session);
    size_t inputs = 0;
    Check(api, api.SessionGetInputCount(session, &inputs));
    for (size_t i = 0; i < inputs; ++i) AddInput(ReadInput(api, session, i));
  }

  // Reads tokens that follow those read before, and returns the most likely next one.
  int64_t Read(const std::vector<int64_t>& tokens) {
    if (length_ > 0 && cache_.empty()) throw std::runtime_error("the model has no key-value cache.");
    const int64_t total = length_ + static_cast<int64_t>(tokens.size());
    std::vector<int64_t> positions;
    for (int64_t position = length_; position < total; ++position) positions.push_back(position);
    const std::vector<int64_t> mask(static_cast<size_t>(total), 1);
    std::vector<Handle<OrtValue>> values;
    for (const std::string& name : token_inputs_) {
      values.push_back(Row(name == "input_ids" ? tokens : name == "attention_mask" ? mask : positions));
    }
    for (Handle<OrtValue>& tensor : cache_) values.push_back(std::move(tensor));
    std::vector<Handle<OrtValue>> outputs = Run(values);
    const int64_t next = LargestOfLastRow(outputs[0].get());
    for (size_t i = 0; i < cache_.size(); ++i) cache_[i] = std::move(outputs[i + 1]);
    length_ = total;
    return next;
  }

 private:
  void AddInput(const Input& input) {
    static const std::string past = "past_key_values";
    if (input.name == "input_ids" || input.name == "attention_mask" || input.name == "position_ids") {
      if (input.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) throw std::runtime_error(input.name + " is not int64.");
      token_inputs_.push_back(input.name);
      return;
    }
    if (input.name.compare(0, past.size(), past) != 0 || input.shape.empty()) {
      throw std::runtime_error("the model has an input " + input.name + "; a causal language model is needed.");
    }
    std::vector<int64_t> shape = input.shape;
    shape[0] = 1;                                                       // the batch
    std::replace(shape.begin(), shape.end(), int64_t{-1}, int64_t{0});  // tokens read so far
    cache_.push_back(NewTensor(api_, input.type, shape));
    past_names_.push_back(input.name);
    present_names_.push_back("present" + input.name.substr(past.size()));
  }

  Handle<OrtValue> Row(const std::vector<int64_t>& numbers) const {
    Handle<OrtValue> tensor =
        NewTensor(api_, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {1, static_cast<int64_t>(numbers.size())});
    std::copy(numbers.begin(), numbers.end(), TensorData<int64_t>(api_, tensor.get()));
    return tensor;
  }

  // Values in the order of token_inputs_ and past_names_; returns logits, then the longer cache.
  std::vector<Handle<OrtValue>> Run(const std::vector<Handle<OrtValue>>& values) {
    std::vector<const char*> input_names, output_names = {"logits"};
    std::vector<const OrtValue*> inputs;
    for (const std::string& name : token_inputs_) input_names.push_back(name.c_str());
    for (const std::string& name : past_names_) input_names.push_back(name.c_str());
    for (const std::string& name : present_names_) output_names.push_back(name.c_str());
    for (const Handle<OrtValue>& value : values) inputs.push_back(value.get());
    std::vector<OrtValue*> outputs(output_names.size(), nullptr);
    Check(api_, api_.Run(session_.get(), nullptr, input_names.data(), inputs.data(), inputs.size(), output_names.data(),
                         output_names.size(), outputs.data()));
    std::vector<Handle<OrtValue>> owned;
    for (OrtValue* output : outputs) owned.emplace_back(output, api_.ReleaseValue);
    return owned;
  }

  // Index of the largest logit [1, tokens, vocabulary] of the last token.
  int64_t LargestOfLastRow(OrtValue* logits) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Check(api_, api_.GetTensorTypeAndShape(logits, &info));
    const Handle<OrtTensorTypeAndShapeInfo> owner(info, api_.ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type;
    Check(api_, api_.GetTensorElementType(info, &type));
    int64_t shape[3];
    Check(api_, api_.GetDimensions(info, shape, 3));
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw std::runtime_error("the logits are not float32.");
    const float* row = TensorData<float>(api_, logits) + (shape[1] - 1) * shape[2];
    return std::max_element(row, row + shape[2]) - row;
  }

  const OrtApi& api_;
  Handle<OrtEnv> env_;  // outlives the session
  Handle<OrtSession> session_;
  std::vector<std::string> token_inputs_, past_names_, present_names_;
  std::vector<Handle<OrtValue>> cache_;  // in the order of past_names_
  int64_t length_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6 || atol(argv[4]) < 1) {
    fprintf(stderr, "usage: %s libonnxruntime.so liboptimum_nm.so model.onnx COUNT TOKEN…\n", argv[0]);
    return 2;
  }
  try {
    Decoder decoder(LoadOnnxRuntime(argv[1]), argv[2], argv[3]);
    std::vector<int64_t> tokens;
    for (int i = 5; i < argc; ++i) tokens.push_back(atoll(argv[i]));
    for (long left = atol(argv[4]); left > 0; --left) {
      tokens = {decoder.Read(tokens)};
      printf("%lld%c", static_cast<long long>(tokens[0]), left > 1 ? ' ' : '\n');
      fflush(stdout);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
