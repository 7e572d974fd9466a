// Attributes and buffers as the input has them, plausible or not.
#include "../tests/packed_weight.h"
#include "target.h"

namespace nm_fuzz {
namespace {

constexpr size_t kTensors = 5;

struct Header {
  int64_t in_features;
  int64_t out_features;
  int64_t group_size;
  int32_t n;
  int32_t m;
  int32_t dtype;
  int32_t positions_format;
  int32_t outlier_k;
  int32_t outlier_block;
  int32_t outlier_dtype;
  uint16_t bytes[kTensors];  // of values … outlier_positions, which follow the header
  Product product;
};

}  // namespace

std::vector<uint8_t> Seed(std::mt19937& random) {
  static const int widths[] = {4, 8, 16, 32};
  nm_test::Shape s = {};
  s.m = widths[random() % 4];
  s.n = random() % 4 == 0 ? s.m : 1 + static_cast<int>(random() % s.m);
  s.in_features = 1 + random() % 300;
  s.out_features = 1 + random() % 3;
  s.dtype = static_cast<int>(random() % 5);
  s.positions_format = static_cast<int>(random() % 2);
  s.group_size = random() % 2 == 0 ? -1 : 32 * (1 + static_cast<int64_t>(random() % 4));
  if (random() % 2 == 0) {
    s.outlier_block = 1 + static_cast<int>(random() % 256);
    s.outlier_k = 1 + static_cast<int>(random() % ((s.outlier_block + 15) / 16));
    s.outlier_dtype = random() % 2 == 0 ? NM_FLOAT16 : NM_FLOAT32;
  }
  const nm_test::PackedWeight weight(s, random);
  const nm_test::Bytes* const tensors[kTensors] = {&weight.values, &weight.positions, &weight.scales,
                                                   &weight.outlier_values, &weight.outlier_positions};
  Header header = {};
  header.in_features = s.in_features;
  header.out_features = s.out_features;
  header.group_size = s.group_size;
  header.n = s.n;
  header.m = s.m;
  header.dtype = s.dtype;
  header.positions_format = s.positions_format;
  header.outlier_k = s.outlier_k;
  header.outlier_block = s.outlier_block;
  header.outlier_dtype = s.outlier_dtype;
  header.product.rows = static_cast<uint8_t>(random());
  header.product.accuracy_level = static_cast<uint8_t>(random());
  std::vector<uint8_t> input(sizeof(header));
  for (size_t i = 0; i < kTensors; ++i) {
    header.bytes[i] = static_cast<uint16_t>(tensors[i]->size);
    const uint8_t* data = tensors[i]->data.get();
    input.insert(input.end(), data, data + tensors[i]->size);
  }
  memcpy(input.data(), &header, sizeof(header));
  return input;
}

}  // namespace nm_fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using nm_fuzz::ExactBytes;
  nm_fuzz::Header header;
  if (size < sizeof(header)) return 0;
  memcpy(&header, data, sizeof(header));
  data += sizeof(header);
  size -= sizeof(header);
  nm_weight weight = {header.in_features,
                      header.out_features,
                      header.n,
                      header.m,
                      header.dtype,
                      header.positions_format,
                      header.group_size,
                      header.outlier_k,
                      header.outlier_block,
                      header.outlier_dtype,
                      {},
                      {},
                      {},
                      {},
                      {}};
  nm_buffer* const buffers[nm_fuzz::kTensors] = {&weight.values, &weight.positions, &weight.scales,
                                                 &weight.outlier_values, &weight.outlier_positions};
  std::vector<ExactBytes> memory;
  for (size_t i = 0; i < nm_fuzz::kTensors; ++i) {
    const size_t bytes = header.bytes[i] < size ? header.bytes[i] : size;
    memory.emplace_back(bytes, header.product.misalignment % 8);
    if (bytes > 0) memcpy(memory.back().data(), data, bytes);
    *buffers[i] = {memory.back().data(), bytes};
    data += bytes;
    size -= bytes;
  }
  nm_fuzz::Multiply(weight, header.product);
  return 0;
}
