// Runs a fuzz target without libFuzzer: sound weights with random changes, or the files named. An input that a
// sanitizer stops at is written to crash-input.
#include <sanitizer/common_interface_defs.h>

#include <csignal>
#include <cstdio>

#include "target.h"

namespace {

std::vector<uint8_t> input;

void Keep() {
  if (FILE* file = fopen("crash-input", "wb")) {
    fwrite(input.data(), 1, input.size(), file);
    fclose(file);
  }
}

void Mutate(std::mt19937& random) {
  for (size_t changes = random() % 6; changes > 0 && !input.empty(); --changes) {
    const size_t at = random() % input.size();
    switch (random() % 5) {
      case 0:
        input[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        input[at] ^= static_cast<uint8_t>(1u << random() % 8);
        break;
      case 2:
        input[at] = static_cast<uint8_t>(input[at] + random() % 5 - 2);
        break;
      case 3:
        input[at] = random() % 2 == 0 ? 0 : 255;
        break;
      default:
        if (random() % 4 == 0) input.resize(at);
    }
  }
}

bool RunFile(const char* path) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) return false;
  input.clear();
  for (int byte; (byte = fgetc(file)) != EOF;) input.push_back(static_cast<uint8_t>(byte));
  fclose(file);
  LLVMFuzzerTestOneInput(input.data(), input.size());
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  long runs = 10000;
  unsigned seed = 1;
  bool files = false;
  __sanitizer_set_death_callback(Keep);
  std::signal(SIGABRT, [](int) { Keep(); });
  for (int i = 1; i < argc; ++i) {
    if (sscanf(argv[i], "-runs=%ld", &runs) == 1 || sscanf(argv[i], "-seed=%u", &seed) == 1) continue;
    if (!RunFile(argv[i])) return fprintf(stderr, "%s cannot be read.\n", argv[i]), 2;
    files = true;
  }
  if (files) return 0;
  std::mt19937 random(seed);
  for (long run = 0; run < runs; ++run) {
    input = nm_fuzz::Seed(random);
    if (run % 4 != 0) Mutate(random);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  printf("%ld inputs\n", runs);
  return 0;
}
