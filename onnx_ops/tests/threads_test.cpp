// Calls of nm_matmul at once from several threads, each cutting its work among more threads: the same bytes as from
// one. Says most when built with OPTIMUM_NM_SANITIZE=thread.
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>

#include "packed_weight.h"

namespace nm_test {
namespace {

constexpr int kCallers = 4;
constexpr size_t kHelpers = 2;
std::atomic<int> failures{0};

void ParallelFor(void*, nm_task task, void* context, size_t count) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) task(context, i);
  };
  std::vector<std::thread> helpers;
  for (size_t i = 0; i < kHelpers; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

std::vector<float> Product(const nm_weight& weight, const std::vector<float>& a, int64_t rows, int accuracy_level,
                           nm_parallel_for parallel_for) {
  char message[256] = "";
  std::vector<float> y(static_cast<size_t>(rows * weight.out_features));
  nm_matmul_args args = {};
  args.struct_bytes = sizeof(args);
  args.weight = &weight;
  args.a = a.data();
  args.y = y.data();
  args.rows = rows;
  args.accuracy_level = accuracy_level;
  args.parallel_for = parallel_for;
  if (nm_matmul(&args, message, sizeof(message)) != 0) {
    fprintf(stderr, "FAILED %s\n", message);
    ++failures;
  }
  return y;
}

// Everything the library makes on first use is made here by all callers at once.
void TestWeight(const Shape& shape, int64_t rows, std::mt19937& random) {
  const PackedWeight weight(shape, random);
  const nm_weight view = weight.view();
  std::vector<float> a(static_cast<size_t>(rows * shape.in_features));
  std::normal_distribution<float> normal;
  for (float& value : a) value = normal(random);
  for (int accuracy_level : {0, 4}) {
    std::vector<std::vector<float>> products(kCallers);
    std::vector<std::thread> callers;
    for (std::vector<float>& product : products) {
      callers.emplace_back([&] {
        char message[256];
        if (nm_weight_check(&view, message, sizeof(message)) != 0) ++failures;
        product = Product(view, a, rows, accuracy_level, ParallelFor);
      });
    }
    for (std::thread& caller : callers) caller.join();
    const std::vector<float> alone = Product(view, a, rows, accuracy_level, nullptr);
    for (const std::vector<float>& product : products) {
      if (memcmp(product.data(), alone.data(), alone.size() * sizeof(float)) == 0) continue;
      fprintf(stderr, "FAILED %d:%d, dtype %d, rows %lld: not the product of one thread\n", shape.n, shape.m,
              shape.dtype, static_cast<long long>(rows));
      ++failures;
    }
  }
}

}  // namespace
}  // namespace nm_test

int main() {
  std::mt19937 random(1);
  int products = 0;
  for (int m : {4, 8, 16, 32}) {
    for (int dtype = NM_FLOAT32; dtype <= NM_INT4; ++dtype) {
      for (int64_t rows : {1, 40}) {
        const nm_test::Shape shape = {256, 192, m / 2, m, dtype, products++ % 2, 128, 4, 256, NM_FLOAT16};
        nm_test::TestWeight(shape, rows, random);
      }
    }
  }
  printf("%d weights, %d failures\n", products, nm_test::failures.load());
  return nm_test::failures == 0 ? 0 : 1;
}
