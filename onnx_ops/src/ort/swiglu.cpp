#include "swiglu.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>

#include "nm_matmul.h"
#include "status.h"
#include "tensor.h"

namespace nm_ort {
namespace {

constexpr size_t kPieceElements = 1 << 14;  // about 10 µs of work

// Vectors of the compiler's own, which it makes of whatever registers the function may use.
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
constexpr size_t kLanes = 8;

// e^x for |x| <= 87, within 2 units in the last place: 2^n · e^r with r = x − n·ln 2 in ±0.35, by its Taylor series.
inline __attribute__((always_inline)) void Exp(Floats& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it leaves an integer in the lowest bits
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats series = r * (1.0f / 5040) + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  x = (Floats)((Ints)series + ((Ints)shifted << 23));
}

// y = gate · up / (1 + e^−gate) for `count` elements, at most kLanes.
inline __attribute__((always_inline)) void Lanes(const float* gate, const float* up, float* y, size_t count) {
  Floats g = {}, u = {};
  memcpy(&g, gate, count * sizeof(float));
  memcpy(&u, up, count * sizeof(float));
  Floats e = -g;
  e = e < 87.0f ? e : Floats{} + 87.0f;  // a NaN becomes a number here, but g is one still
  e = e > -87.0f ? e : Floats{} - 87.0f;
  Exp(e);
  g = g * u / (1.0f + e);
  memcpy(y, &g, count * sizeof(float));
}

inline __attribute__((always_inline)) void Row(const float* gate, const float* up, float* y, size_t count) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Lanes(gate + i, up + i, y + i, kLanes);
  if (i < count) Lanes(gate + i, up + i, y + i, count - i);
}

using RowFunction = void (*)(const float*, const float*, float*, size_t);

void PortableRow(const float* gate, const float* up, float* y, size_t count) { Row(gate, up, y, count); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void Avx2Row(const float* gate, const float* up, float* y, size_t count) {
  Row(gate, up, y, count);
}
#endif

RowFunction FastestRow() {
#if defined(__x86_64__)
  if (strcmp(nm_isa(), "portable") != 0) return Avx2Row;
#endif
  return PortableRow;
}

class Swiglu {
 public:
  explicit Swiglu(const OrtApi& api) : api_(api), row_(FastestRow()) {}

  OrtStatus* Init(const OrtKernelInfo* info) { return ReadNodeName(api_, info, &name_); }
  OrtStatus* Compute(OrtKernelContext* context) const;
  const OrtApi& api() const { return api_; }

 private:
  OrtStatus* Error(int64_t last) const;

  const OrtApi& api_;
  const RowFunction row_;
  std::string name_;
};

// The rows of one call, cut into pieces.
struct Rows {
  RowFunction row;
  const float* x;
  float* y;
  size_t rows;
  size_t width;  // of y
  size_t rows_per_piece;
};

void ComputePiece(void* argument, size_t piece) {
  const Rows& all = *static_cast<const Rows*>(argument);
  const size_t end = std::min(all.rows, (piece + 1) * all.rows_per_piece);
  for (size_t r = piece * all.rows_per_piece; r < end; ++r) {
    const float* gate = all.x + 2 * all.width * r;
    all.row(gate, gate + all.width, all.y + all.width * r, all.width);
  }
}

OrtStatus* Swiglu::Error(int64_t last) const {
  char reason[128];
  snprintf(reason, sizeof reason, "the last dimension of X is %" PRId64 "; it must be even, and at least 2.", last);
  return api_.CreateStatus(ORT_INVALID_ARGUMENT, ("SwiGLU node '" + name_ + "': " + reason).c_str());
}

OrtStatus* Swiglu::Compute(OrtKernelContext* context) const {
  const OrtValue* value = nullptr;
  NM_RETURN_IF_ERROR(api_.KernelContext_GetInput(context, 0, &value));
  Tensor x;
  NM_RETURN_IF_ERROR(ReadTensor(api_, value, &x));
  const int64_t last = x.shape.empty() ? 0 : x.shape.back();
  if (last < 2 || last % 2 != 0) return Error(last);
  x.shape.back() = last / 2;
  OrtValue* output = nullptr;
  NM_RETURN_IF_ERROR(api_.KernelContext_GetOutput(context, 0, x.shape.data(), x.shape.size(), &output));
  void* y = nullptr;
  NM_RETURN_IF_ERROR(api_.GetTensorMutableData(output, &y));

  Rows all{row_, static_cast<const float*>(x.data), static_cast<float*>(y), 0, static_cast<size_t>(last / 2), 0};
  all.rows = x.elements / (2 * all.width);
  all.rows_per_piece = std::max<size_t>(1, kPieceElements / all.width);
  const size_t pieces = (all.rows + all.rows_per_piece - 1) / all.rows_per_piece;
  if (pieces > 1) return api_.KernelContext_ParallelFor(context, ComputePiece, pieces, pieces, &all);
  if (pieces == 1) ComputePiece(&all, 0);
  return nullptr;
}

struct Operator : CpuOperator {
  Operator();
};

Operator::Operator() {
  GetName = [](const OrtCustomOp*) { return "SwiGLU"; };
  GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return Guarded(*api, [&]() -> OrtStatus* {
      auto created = std::make_unique<Swiglu>(*api);
      NM_RETURN_IF_ERROR(created->Init(info));
      *kernel = created.release();
      return nullptr;
    });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Swiglu& self = *static_cast<const Swiglu*>(kernel);
    return Guarded(self.api(), [&] { return self.Compute(context); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Swiglu*>(kernel); };
}

}  // namespace

const OrtCustomOp* SwigluOperator() {
  static const Operator swiglu;
  return &swiglu;
}

}  // namespace nm_ort
