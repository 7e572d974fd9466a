// What kernels for few activation rows share, whatever the instruction set. In an anonymous namespace and free of the
// standard library, as avx2_common.h says.
#ifndef NM_KERNELS_ROW_TURNS_H_
#define NM_KERNELS_ROW_TURNS_H_

#include <stddef.h>
#include <stdint.h>

namespace nm {
namespace {

// Activation rows in turns of four, two and one, each with a kernel of its own.
template <int n>
struct Count {
  static constexpr int value = n;
};

template <class Body>
void ForRows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(Count<4>(), r);
  for (; r + 2 <= rows; r += 2) body(Count<2>(), r);
  if (r < rows) body(Count<1>(), r);
}

// Hands out parts of one piece of memory, aligned to cache lines.
class Parts {
 public:
  size_t Take(int64_t bytes) {
    const size_t start = total_;
    total_ += static_cast<size_t>((bytes + 63) / 64 * 64);
    return start;
  }
  size_t total() const { return total_; }

 private:
  size_t total_ = 0;
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_ROW_TURNS_H_
