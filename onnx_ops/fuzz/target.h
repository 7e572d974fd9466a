// What a fuzz target is made of: LLVMFuzzerTestOneInput, and Seed to begin from. libFuzzer runs it where the compiler
// is clang, driver.cpp elsewhere; both take -runs=N, -seed=N and files to run again.
#ifndef NM_FUZZ_TARGET_H_
#define NM_FUZZ_TARGET_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace nm_fuzz {

// An input that describes a sound weight.
std::vector<uint8_t> Seed(std::mt19937& random);

// Heap memory that ends exactly after `size` bytes and begins at any alignment.
class ExactBytes {
 public:
  ExactBytes(size_t size, size_t misalignment) : data_(new uint8_t[size + misalignment]()), at_(misalignment) {}
  uint8_t* data() const { return data_.get() + at_; }

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t at_;
};

inline void Require(bool condition) {
  if (!condition) abort();
}

// How the weight of an input is multiplied.
struct Product {
  uint8_t rows;
  uint8_t activation_dtype;
  uint8_t bias_dtype;  // any other than the three of nm_matmul.h: no bias
  uint8_t accuracy_level;
  uint8_t misalignment;
  uint8_t activation_seed;
};

// Multiplies by every kernel this machine can run. What nm_weight_check refuses may be refused or give any product, as
// long as no byte outside the tensors is touched: a file can change after it was checked.
inline void Multiply(const nm_weight& weight, const Product& product) {
  char message[256] = "";
  const bool sound = nm_weight_check(&weight, message, sizeof(message)) == 0;
  Require(sound == (message[0] == '\0'));
  nm::Layout layout;
  if (nm::MakeLayout(weight, &layout, message, sizeof(message)) != 0) {
    Require(!sound);
    return;
  }
  nm_matmul_args args = {};
  args.struct_bytes = sizeof(args);
  args.weight = &weight;
  args.rows = product.rows % 8;
  args.activation_dtype = product.activation_dtype % 3;
  args.bias_dtype = product.bias_dtype % 4;
  args.accuracy_level = product.accuracy_level % 2 == 0 ? 0 : 4;
  const auto bytes = [](int64_t count, int32_t dtype) {
    return static_cast<size_t>(count) * (dtype == NM_FLOAT32 ? 4 : 2);
  };
  const size_t shift = product.misalignment % 4 * 4;  // tensors of activations are aligned to their elements
  const size_t a_bytes = bytes(args.rows * layout.in_features, args.activation_dtype);
  const ExactBytes a(a_bytes, shift);
  const ExactBytes y(bytes(args.rows * layout.out_features, args.activation_dtype), shift);
  const ExactBytes bias(bytes(layout.out_features, args.bias_dtype), shift);
  uint32_t state = product.activation_seed;
  for (size_t i = 0; i < a_bytes; ++i) a.data()[i] = static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
  args.a = a.data();
  args.y = y.data();
  args.bias = args.bias_dtype > NM_BFLOAT16 ? nullptr : bias.data();
  const nm::KernelList all = nm::AllKernels();
  for (size_t i = 0; i < all.count; ++i) {
    const nm::Kernel& kernel = all.kernels[i];
    if (kernel.isa > nm::BestIsa() || args.rows > kernel.most_rows || !kernel.supports(layout)) continue;
    if (kernel.int8_activations && args.accuracy_level == 0) continue;
    Require(nm::Multiply(args, &kernel, message, sizeof(message)) == 0);
  }
}

}  // namespace nm_fuzz

#endif  // NM_FUZZ_TARGET_H_
