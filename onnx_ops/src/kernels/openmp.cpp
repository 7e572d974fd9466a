// nm_openmp_parallel_for: a parallel_for over the OpenMP runtime of the caller, entered through its GOMP_parallel.
#include <atomic>

#include "nm_matmul.h"

namespace {

struct Loop {
  nm_task task;
  void* context;
  size_t count;
  std::atomic<size_t> next{0};
};

void Body(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (;;) {
    const size_t index = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= loop.count) return;
    loop.task(loop.context, index);
  }
}

}  // namespace

extern "C" void nm_openmp_parallel_for(void* pool, nm_task task, void* context, size_t count) {
  const nm_openmp_pool* openmp = static_cast<const nm_openmp_pool*>(pool);
  Loop loop;
  loop.task = task;
  loop.context = context;
  loop.count = count;
  if (openmp == nullptr || openmp->gomp_parallel == nullptr || openmp->threads == 1 || count < 2) {
    Body(&loop);
  } else {
    openmp->gomp_parallel(Body, &loop, openmp->threads, 0);
  }
}
