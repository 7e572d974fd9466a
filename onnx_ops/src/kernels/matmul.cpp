// nm_matmul: checks the arguments, packs the activations, cuts the outputs into pieces and runs a kernel on each.
#include <stdlib.h>

#include <atomic>

#include "floats.h"
#include "kernels.h"

namespace nm {
namespace {

constexpr int64_t kMostPieces = 64;
constexpr int64_t kManyRows = 8;
constexpr int64_t kWideOutputs = 256;
constexpr int64_t kLeastPieceBytes =
    24 << 10;  // of weights times activation rows: below it threads cost more than they give

#if defined(__SANITIZE_ADDRESS__)
#define NM_CHECKS_ADDRESSES 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NM_CHECKS_ADDRESSES 1
#endif
#endif

// Memory of one call, aligned to a cache line, freed at the end of the scope. Little of it is on the stack: in a small
// model decoding, malloc and free were a twentieth of the time. A sanitizer is to see what a kernel writes past it:
// there it comes from the heap, not a byte more than asked for.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(near_) {
    if (bytes > kNearBytes && posix_memalign(&data_, 64, bytes) != 0) data_ = nullptr;
  }
  ~Scratch() {
    if (data_ != near_) free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
#if defined(NM_CHECKS_ADDRESSES)
  static constexpr size_t kNearBytes = 0;
#else
  static constexpr size_t kNearBytes = 16 << 10;
#endif
  void* data_;
  alignas(64) char near_[kNearBytes > 0 ? kNearBytes : 1];
};

struct Call {
  const nm_matmul_args& args;
  const Layout& layout;
  const Kernel& kernel;
  void* packed;
  int64_t piece_outputs;
  std::atomic<bool> out_of_memory{false};
};

void PackBlock(void* context, size_t index) {
  Call& call = *static_cast<Call*>(context);
  const nm_matmul_args& args = call.args;
  const int64_t first = static_cast<int64_t>(index) * kRowBlock;
  const int64_t count = args.rows - first < kRowBlock ? args.rows - first : kRowBlock;
  const int64_t columns = call.layout.in_features;
  const char* a = static_cast<const char*>(args.a) + first * columns * FloatBytes(args.activation_dtype);
  if (args.activation_dtype == NM_FLOAT32) {
    call.kernel.pack(call.layout, reinterpret_cast<const float*>(a), first, count, args.rows, call.packed);
    return;
  }
  const Scratch converted(static_cast<size_t>(count * columns) * sizeof(float));
  if (converted.data() == nullptr) {
    call.out_of_memory = true;
    return;
  }
  float* floats = static_cast<float*>(converted.data());
  ToFloat(args.activation_dtype, a, count * columns, floats);
  call.kernel.pack(call.layout, floats, first, count, args.rows, call.packed);
}

// Adds bias[first … first+count-1] to a row of outputs.
void AddBias(const nm_matmul_args& args, int64_t first, int64_t count, float* y) {
  if (args.bias == nullptr) return;
  const char* bias = static_cast<const char*>(args.bias) + first * FloatBytes(args.bias_dtype);
  constexpr int64_t kStep = 64;
  float values[kStep];
  for (int64_t i = 0; i < count; i += kStep) {
    const int64_t step = count - i < kStep ? count - i : kStep;
    ToFloat(args.bias_dtype, bias + i * FloatBytes(args.bias_dtype), step, values);
    for (int64_t j = 0; j < step; ++j) y[i + j] += values[j];
  }
}

void RunPiece(void* context, size_t index) {
  Call& call = *static_cast<Call*>(context);
  const nm_matmul_args& args = call.args;
  const Layout& layout = call.layout;
  const int64_t first = static_cast<int64_t>(index) * call.piece_outputs;
  const int64_t last =
      layout.out_features - first < call.piece_outputs ? layout.out_features : first + call.piece_outputs;
  const int64_t count = last - first;
  const bool direct = args.activation_dtype == NM_FLOAT32;
  const size_t kernel_bytes = (call.kernel.scratch_bytes(layout, args.rows) + 63) / 64 * 64;
  const Scratch scratch(kernel_bytes + (direct ? 0 : static_cast<size_t>(args.rows * count) * sizeof(float)));
  if (scratch.data() == nullptr) {
    call.out_of_memory = true;
    return;
  }
  float* y = direct ? static_cast<float*>(args.y) + first
                    : reinterpret_cast<float*>(static_cast<char*>(scratch.data()) + kernel_bytes);
  const int64_t y_stride = direct ? layout.out_features : count;
  call.kernel.run(layout, args.rows, call.packed, first, last, scratch.data(), y, y_stride);
  for (int64_t row = 0; row < args.rows; ++row) {
    AddBias(args, first, count, y + row * y_stride);
    if (!direct) {
      char* destination = static_cast<char*>(args.y) + (row * layout.out_features + first) * 2;
      FromFloat(args.activation_dtype, y + row * y_stride, count, destination);
    }
  }
}

void ForEach(const nm_matmul_args& args, nm_task task, Call* call, int64_t count) {
  if (args.parallel_for != nullptr && count > 1) {
    args.parallel_for(args.pool, task, call, static_cast<size_t>(count));
  } else {
    for (int64_t i = 0; i < count; ++i) task(call, static_cast<size_t>(i));
  }
}

// Output rows of a piece: a multiple of kOutputTile, at most kMostPieces pieces, none too small to be worth a thread.
// Every piece reads all activations: where those are many, it is worth kWideOutputs if eight pieces remain.
int64_t PieceOutputs(const Layout& l, int64_t rows) {
  const int64_t output_bytes = l.value_bytes + l.position_bytes + 2 * l.row_scales + l.outlier_bytes + l.row_outliers;
  const int64_t by_count = l.out_features / kMostPieces + (l.out_features % kMostPieces != 0);
  const int64_t by_bytes = kLeastPieceBytes / (output_bytes * (rows < 64 ? rows : 64)) + 1;
  int64_t outputs = by_count > by_bytes ? by_count : by_bytes;
  const int64_t by_rows = rows < kManyRows ? 0 : l.out_features / 8 < kWideOutputs ? l.out_features / 8 : kWideOutputs;
  if (by_rows > outputs) outputs = by_rows;
  return (outputs + kOutputTile - 1) / kOutputTile * kOutputTile;
}

bool IsFloat(int32_t dtype) { return dtype == NM_FLOAT32 || dtype == NM_FLOAT16 || dtype == NM_BFLOAT16; }

int CheckArguments(const nm_matmul_args& args, const Layout& layout, char* message, size_t message_bytes) {
  if (args.rows < 0 ||
      args.rows >
          INT64_MAX / 64 / (layout.in_features > layout.out_features ? layout.in_features : layout.out_features)) {
    return Fail(message, message_bytes, "there are %lld rows of activations; that is out of range.",
                static_cast<long long>(args.rows));
  }
  if (!IsFloat(args.activation_dtype)) {
    return Fail(message, message_bytes, "activation dtype is %d; it must be float32, float16 or bfloat16.",
                static_cast<int>(args.activation_dtype));
  }
  if (args.bias != nullptr && !IsFloat(args.bias_dtype)) {
    return Fail(message, message_bytes, "bias dtype is %d; it must be float32, float16 or bfloat16.",
                static_cast<int>(args.bias_dtype));
  }
  if (args.accuracy_level != 0 && args.accuracy_level != 4) {
    return Fail(message, message_bytes, "accuracy_level is %d; it must be 0 or 4.",
                static_cast<int>(args.accuracy_level));
  }
  if (args.rows > 0 && (args.a == nullptr || args.y == nullptr)) {
    return Fail(message, message_bytes, "%s is a null pointer.", args.a == nullptr ? "a" : "y");
  }
  return 0;
}

}  // namespace

int Multiply(const nm_matmul_args& args, const Kernel* kernel, char* message, size_t message_bytes) {
  if (args.struct_bytes < sizeof(nm_matmul_args)) {
    return Fail(message, message_bytes, "struct_bytes is %zu; it must be at least %zu.", args.struct_bytes,
                sizeof(nm_matmul_args));
  }
  if (args.weight == nullptr) return Fail(message, message_bytes, "weight is a null pointer.");
  Layout layout;
  if (MakeLayout(*args.weight, &layout, message, message_bytes) != 0) return 1;
  if (CheckArguments(args, layout, message, message_bytes) != 0) return 1;
  if (args.rows == 0) return 0;
  const Kernel& chosen =
      kernel != nullptr ? *kernel : ChooseKernel(layout, args.rows, args.accuracy_level, ActiveIsa());
  const Scratch packed(chosen.packed_bytes(layout, args.rows));
  if (packed.data() == nullptr) return Fail(message, message_bytes, "there is no memory for the packed activations.");
  Call call{args, layout, chosen, packed.data(), PieceOutputs(layout, args.rows)};
  ForEach(args, PackBlock, &call, (args.rows + kRowBlock - 1) / kRowBlock);
  if (!call.out_of_memory) {
    ForEach(args, RunPiece, &call, (layout.out_features + call.piece_outputs - 1) / call.piece_outputs);
  }
  if (call.out_of_memory) return Fail(message, message_bytes, "there is no memory for scratch.");
  return 0;
}

}  // namespace nm

extern "C" int nm_matmul(const nm_matmul_args* args, char* message, size_t message_bytes) {
  if (message != nullptr && message_bytes > 0) message[0] = '\0';
  if (args == nullptr) return nm::Fail(message, message_bytes, "args is a null pointer.");
  return nm::Multiply(*args, nullptr, message, message_bytes);
}
