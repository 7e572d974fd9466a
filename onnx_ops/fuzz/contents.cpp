// A sound weight of any shape, in which the input then sets bytes.
#include "../tests/packed_weight.h"
#include "target.h"

namespace nm_fuzz {
namespace {

struct Header {
  uint16_t in_features;
  uint8_t out_features;
  uint8_t n;
  uint8_t m;
  uint8_t dtype;
  uint8_t positions_format;
  uint8_t groups_of_scale;  // group_size in multiples of m; 0: the whole row
  uint8_t outlier_block;
  uint8_t outlier_k;
  uint8_t outlier_dtype;
  uint8_t weight_seed;
  Product product;
};

// One byte of one tensor, or all of them, set to a value.
struct Edit {
  uint8_t tensor;  // its highest bit: all bytes
  uint8_t value;
  uint16_t offset;
};

nm_test::Shape ShapeOf(const Header& h) {
  nm_test::Shape s = {};
  s.in_features = 1 + h.in_features % 600;
  s.out_features = h.out_features == 255 ? 33 : 1 + h.out_features % 3;  // kernels get at most 32 at once
  s.m = 4 << h.m % 4;
  s.n = 1 + h.n % s.m;
  s.dtype = h.dtype % 5;
  s.positions_format = h.positions_format % 2;
  s.group_size = h.groups_of_scale == 0 ? -1 : int64_t{h.groups_of_scale} * s.m;
  s.outlier_block = 1 + h.outlier_block;
  s.outlier_k = h.outlier_k % (s.outlier_block + 1);
  s.outlier_dtype = h.outlier_dtype % 2 == 0 ? NM_FLOAT16 : NM_FLOAT32;
  return s;
}

}  // namespace

std::vector<uint8_t> Seed(std::mt19937& random) {
  std::vector<uint8_t> input(sizeof(Header) + random() % 8 * sizeof(Edit));
  for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
  return input;
}

}  // namespace nm_fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  nm_fuzz::Header header;
  if (size < sizeof(header)) return 0;
  memcpy(&header, data, sizeof(header));
  std::mt19937 random(header.weight_seed);
  nm_test::PackedWeight weight(ShapeOf(header), random);
  nm_test::Bytes* const tensors[] = {&weight.values, &weight.positions, &weight.scales, &weight.outlier_values,
                                     &weight.outlier_positions};
  for (size_t at = sizeof(header); at + sizeof(nm_fuzz::Edit) <= size; at += sizeof(nm_fuzz::Edit)) {
    nm_fuzz::Edit edit;
    memcpy(&edit, data + at, sizeof(edit));
    const nm_test::Bytes& bytes = *tensors[edit.tensor % 128 % 5];
    if (bytes.size == 0) continue;
    if (edit.tensor >= 128) memset(bytes.data.get(), edit.value, bytes.size);
    bytes.data[edit.offset % bytes.size] = edit.value;
  }
  nm_fuzz::Multiply(weight.view(), header.product);
  return 0;
}
