// libFuzzer begins with no corpus: now and then it gets a sound weight in place of a mutated input.
#include "target.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  std::mt19937 random(seed);
  if (size > 1 && random() % 32 != 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::vector<uint8_t> fresh = nm_fuzz::Seed(random);
  if (fresh.size() > max_size) return size;
  memcpy(data, fresh.data(), fresh.size());
  return fresh.size();
}
