// Every kernel of the table against a float64 product, at every tail length, with buffers of exact size; then hostile
// weights. Prints what failed and exits with 1. Meant to be built with OPTIMUM_NM_SANITIZE.
#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#include "packed_weight.h"

#if defined(NM_EMULATE_AVX512)
#include "immintrin.h"
#endif

namespace nm_test {
namespace {

int failures = 0;
int64_t products = 0;

std::string Describe(const Shape& s, int64_t rows, const char* kernel) {
  char text[256];
  snprintf(text, sizeof(text),
           "%s: rows %lld, out %lld, in %lld, %d:%d, dtype %d, positions %d, group %lld, outliers %d:%d (%d)", kernel,
           static_cast<long long>(rows), static_cast<long long>(s.out_features), static_cast<long long>(s.in_features),
           s.n, s.m, s.dtype, s.positions_format, static_cast<long long>(s.group_size), s.outlier_k, s.outlier_block,
           s.outlier_dtype);
  return text;
}

void Report(const std::string& what, const std::string& why) {
  if (++failures <= 40) fprintf(stderr, "FAILED %s: %s\n", what.c_str(), why.c_str());
}

struct Activations {
  int64_t rows;
  int64_t columns;
  std::vector<float> values;
  Activations(int64_t r, int64_t c, std::mt19937& random) : rows(r), columns(c) {
    std::normal_distribution<float> normal;
    values.resize(static_cast<size_t>(r * c));
    for (float& v : values) v = normal(random);
  }
};

// Error a kernel may make in an output: float32 accumulation, or rounding of the activations to int8 by blocks.
double Tolerance(const PackedWeight& w, const Activations& a, int64_t row, int64_t output, bool int8_activations) {
  double sum = 0, absolute = 0, largest = 0;
  for (int64_t c = 0; c < a.columns; ++c) {
    const double weight = w.magnitude[static_cast<size_t>(output * a.columns + c)];
    const double value = static_cast<double>(a.values[static_cast<size_t>(row * a.columns + c)]);
    absolute += weight * std::fabs(value);
    sum += weight;
    largest = std::max(largest, std::fabs(value));
  }
  return 1e-5 * absolute + (int8_activations ? largest / 254 * sum * 1.001 : 0) + 1e-12;
}

void CheckProduct(const PackedWeight& w, const nm::Kernel& kernel, const Activations& a, bool with_bias,
                  std::mt19937& random) {
  const Shape& s = w.shape;
  const std::string what = Describe(s, a.rows, kernel.name);
  const nm_weight view = w.view();
  Bytes activations, y, bias;
  activations.Resize(a.values.size() * 4);
  memcpy(activations.data.get(), a.values.data(), activations.size);
  y.Resize(static_cast<size_t>(a.rows * s.out_features) * 4);
  bias.Resize(static_cast<size_t>(s.out_features) * 4);
  std::vector<float> bias_values(static_cast<size_t>(s.out_features));
  for (float& b : bias_values) b = static_cast<float>(random() % 100) * 0.01f;
  memcpy(bias.data.get(), bias_values.data(), bias.size);
  char message[256];
  nm_matmul_args args = {};
  args.struct_bytes = sizeof(args);
  args.weight = &view;
  args.a = activations.data.get();
  args.y = y.data.get();
  args.bias = with_bias ? bias.data.get() : nullptr;
  args.rows = a.rows;
  args.accuracy_level = kernel.int8_activations ? 4 : 0;
  ++products;
  if (nm::Multiply(args, &kernel, message, sizeof(message)) != 0) return Report(what, message);
  for (int64_t row = 0; row < a.rows; ++row) {
    bool finite = true;
    for (int64_t c = 0; c < s.in_features; ++c) {
      finite = finite && std::isfinite(a.values[static_cast<size_t>(row * s.in_features + c)]);
    }
    for (int64_t output = 0; output < s.out_features; ++output) {
      float got;
      memcpy(&got, y.data.get() + 4 * (row * s.out_features + output), 4);
      if (!finite) {
        if (!std::isnan(got)) return Report(what, "a row with a NaN has the output " + std::to_string(got));
        continue;
      }
      double expected = with_bias ? static_cast<double>(bias_values[static_cast<size_t>(output)]) : 0;
      for (int64_t c = 0; c < s.in_features; ++c) {
        expected += w.dense[static_cast<size_t>(output * s.in_features + c)] *
                    static_cast<double>(a.values[static_cast<size_t>(row * s.in_features + c)]);
      }
      const double error = std::fabs(static_cast<double>(got) - expected);
      const double allowed = Tolerance(w, a, row, output, kernel.int8_activations) + 1e-6 * std::fabs(expected);
      if (!(error <= allowed)) {
        return Report(what, "row " + std::to_string(row) + ", output " + std::to_string(output) + " is " +
                                std::to_string(got) + ", not " + std::to_string(expected) + " within " +
                                std::to_string(allowed));
      }
    }
  }
}

void CheckShape(const Shape& shape, int64_t rows, bool with_nan, std::mt19937& random) {
  const PackedWeight weight(shape, random);
  char message[256];
  const nm_weight view = weight.view();
  if (nm_weight_check(&view, message, sizeof(message)) != 0) {
    return Report(Describe(shape, rows, "nm_weight_check"), message);
  }
  nm::Layout layout;
  nm::MakeLayout(view, &layout, message, sizeof(message));
  Activations a(rows, shape.in_features, random);
  if (with_nan) {
    const size_t at = random() % a.values.size();
    a.values[at] = std::numeric_limits<float>::quiet_NaN();
  }
  const nm::KernelList all = nm::AllKernels();
  for (size_t i = 0; i < all.count; ++i) {
    const nm::Kernel& kernel = all.kernels[i];
    if (kernel.isa > nm::BestIsa() || rows > kernel.most_rows || !kernel.supports(layout)) continue;
    CheckProduct(weight, kernel, a, random() % 2 == 0, random);
  }
}

Shape RandomShape(std::mt19937& random, int64_t in_features) {
  static const int widths[] = {4, 8, 16, 32};
  Shape s = {};
  s.in_features = in_features;
  s.m = widths[random() % 4];
  const int choice = static_cast<int>(random() % 4);
  s.n = choice == 0 ? s.m : choice == 1 ? 1 + static_cast<int>(random() % s.m) : s.m / 2;
  s.out_features = 1 + random() % 5;
  if (random() % 16 == 0) s.out_features += 64;
  s.dtype = static_cast<int>(random() % 5);
  s.positions_format = static_cast<int>(random() % 2);
  static const int64_t groups[] = {-1, 32, 64, 128, 256, 384, 512};
  s.group_size = groups[random() % 7];
  if (random() % 6 == 0) s.group_size = s.m * (1 + static_cast<int64_t>(random() % 20));
  if (random() % 2 == 0) {
    s.outlier_block = random() % 2 == 0 ? 256 : 1 + static_cast<int>(random() % 256);
    s.outlier_k = 1 + static_cast<int>(random() % (random() % 4 == 0 ? s.outlier_block : (s.outlier_block + 15) / 16));
    s.outlier_dtype = random() % 2 == 0 ? NM_FLOAT16 : NM_FLOAT32;
  }
  return s;
}

// Numbers of rows, formats and scale groups take turns, so that they meet in every combination.
void TestEveryTail(std::mt19937& random) {
  for (int dtype = 0; dtype < 5; ++dtype) {
    for (int64_t in_features = 1; in_features <= 330; ++in_features) {
      const int positions = static_cast<int>(in_features % 2);
      const int64_t group_size = in_features % 3 == 0 ? 32 : 128;
      CheckShape({in_features, 2, 8, 16, dtype, positions, group_size, 0, 0, 0}, 1 + in_features % 7, false, random);
    }
    for (int64_t in_features = 121; in_features <= 160; ++in_features) {
      const int64_t group_size = in_features % 3 == 0 ? 32 : 128;
      for (int m : {4, 8, 16}) {  // groups that may leave a block of 16 incomplete, and dense ones
        for (int positions : {NM_CODES, NM_BITMAP}) {
          const Shape s = {in_features, 3, m == 16 ? 16 : m / 2, m, dtype, positions, group_size, 0, 0, 0};
          CheckShape(s, 1 + in_features % 7, false, random);
        }
      }
    }
  }
}

void TestRandomShapes(std::mt19937& random, int count) {
  for (int i = 0; i < count; ++i) {
    const int64_t in_features = random() % 3 == 0 ? 64 * (1 + random() % 20) : 1 + random() % 1200;
    const int64_t rows = random() % 8 == 0 ? 1 + random() % 70 : 1 + random() % 9;
    CheckShape(RandomShape(random, in_features), rows, random() % 8 == 0, random);
  }
}

// Rows without a tail, which have kernels of their own: an even and an odd number of steps, whatever else varies.
void TestWholeRows(std::mt19937& random) {
  for (int64_t in_features = 128; in_features <= 1344; in_features += 64) {
    for (int dtype : {NM_FLOAT16, NM_BFLOAT16, NM_INT8, NM_INT4}) {
      for (int positions : {NM_CODES, NM_BITMAP}) {
        for (int64_t group_size : {-1, 32, 64, 128}) {
          const int m = positions == NM_CODES || random() % 2 == 0 ? 16 : random() % 2 == 0 ? 8 : 4;
          const int outliers = static_cast<int>(random() % 3) * 8;
          const int64_t out_features = 1 + static_cast<int64_t>(random() % 40);
          const Shape s = {in_features, out_features,           m / 2,     m, dtype, positions, group_size,
                           outliers,    outliers > 0 ? 256 : 0, NM_FLOAT16};
          CheckShape(s, 1 + static_cast<int64_t>(random() % 7), random() % 8 == 0, random);
        }
      }
    }
  }
}

// Whole rows again, of integers with any number of kept columns, whose steps begin anywhere in the bytes.
void TestEveryPattern(std::mt19937& random) {
  for (int m : {4, 8, 16, 32}) {
    for (int n = 1; n <= m; ++n) {
      for (int dtype : {NM_INT8, NM_INT4}) {
        const int64_t in_features = 64 * (2 + static_cast<int64_t>(random() % 20));
        const int64_t group_size = random() % 4 == 0 ? -1 : int64_t{32} << random() % 3;
        CheckShape({in_features, 17, n, m, dtype, NM_BITMAP, group_size, 0, 0, 0},
                   1 + static_cast<int64_t>(random() % 7), random() % 8 == 0, random);
      }
    }
  }
}

// Rows whose activations do not fit the first-level cache, which some kernels take a part at a time: of one activation
// row from 9217 columns on, of sixteen from 577.
void TestWideRows(std::mt19937& random) {
  for (int dtype = 0; dtype < 5; ++dtype) {
    for (int i = 0; i < 12; ++i) {
      const int64_t rows = i % 4 == 3 ? 9 + static_cast<int64_t>(random() % 8) : int64_t{1} << i % 4;
      Shape s = RandomShape(random, 9200 / rows + static_cast<int64_t>(random() % (14000 / rows)));
      if (i % 3 == 0) s.in_features = s.in_features / 64 * 64;
      s.out_features = 1 + static_cast<int64_t>(random() % 20);
      s.dtype = dtype;
      CheckShape(s, rows, false, random);
    }
  }
}

// Rows and outputs around and beyond the tiles of the kernels for many rows.
void TestManyRows(std::mt19937& random, int count) {
  static const int64_t edges[] = {8, 16, 32, 64, 128, 512, 1024};
  for (int i = 0; i < count; ++i) {
    const int64_t rows = edges[random() % 7] + static_cast<int64_t>(random() % 5) - 2;
    Shape s = RandomShape(random, 1 + random() % (rows > 200 ? 70 : 900));
    if (rows < 100 && random() % 4 == 0) s.out_features = 120 + random() % 20;
    CheckShape(s, rows, random() % 8 == 0, random);
  }
}

// Random attributes and bytes: what nm_weight_check accepts, nm_matmul must survive, and nm_matmul alone must not read
// outside the buffers either.
void TestHostileWeights(std::mt19937& random, int count) {
  int accepted = 0;
  for (int i = 0; i < count; ++i) {
    const PackedWeight weight(RandomShape(random, 1 + random() % 300), random);
    nm_weight view = weight.view();
    for (Bytes* bytes : {const_cast<Bytes*>(&weight.values), const_cast<Bytes*>(&weight.positions),
                         const_cast<Bytes*>(&weight.outlier_positions), const_cast<Bytes*>(&weight.scales)}) {
      if (bytes->size == 0 || random() % 2 == 0) continue;
      if (random() % 4 == 0) memset(bytes->data.get(), random() % 4 == 0 ? 0 : 0xff, bytes->size);  // every column kept
      for (size_t change = random() % 8; change > 0; --change) {
        bytes->data[random() % bytes->size] = static_cast<uint8_t>(random());
      }
    }
    if (random() % 2 == 0) {
      static const int64_t odd[] = {0, -1, 1, 2, 3, 5, 16, 255, 256, 257, INT32_MAX, INT64_MAX, INT64_MIN, 1ll << 40};
      const int64_t value = odd[random() % (sizeof(odd) / sizeof(odd[0]))];
      const int32_t small = static_cast<int32_t>(value);
      switch (random() % 12) {
        case 0:
          view.in_features = value;
          break;
        case 1:
          view.out_features = value;
          break;
        case 2:
          view.n = small;
          break;
        case 3:
          view.m = small;
          break;
        case 4:
          view.dtype = small;
          break;
        case 5:
          view.positions_format = small;
          break;
        case 6:
          view.group_size = value;
          break;
        case 7:
          view.outlier_k = small;
          break;
        case 8:
          view.outlier_block = small;
          break;
        case 9:
          view.outlier_dtype = small;
          break;
        case 10:
          view.values.bytes = static_cast<size_t>(value);
          break;
        default:
          view.positions.data = nullptr;
          break;
      }
    }
    char message[64];
    const bool good = nm_weight_check(&view, message, sizeof(message)) == 0;
    accepted += good;
    nm::Layout layout;
    if (nm::MakeLayout(view, &layout, message, sizeof(message)) != 0) continue;
    const Activations a(1 + random() % 5, layout.in_features, random);
    std::vector<float> y(static_cast<size_t>(a.rows * layout.out_features));
    nm_matmul_args args = {};
    args.struct_bytes = sizeof(args);
    args.weight = &view;
    args.a = a.values.data();
    args.y = y.data();
    args.rows = a.rows;
    const nm::KernelList all = nm::AllKernels();
    for (size_t k = 0; k < all.count; ++k) {
      const nm::Kernel& kernel = all.kernels[k];
      if (kernel.isa <= nm::BestIsa() && a.rows <= kernel.most_rows && kernel.supports(layout)) {
        nm::Multiply(args, &kernel, message, sizeof(message));
      }
    }
  }
  if (accepted == 0 || accepted == count) Report("hostile weights", "accepted " + std::to_string(accepted));
}

void TestHalfConversions() {
  for (uint32_t half = 0; half < 65536; ++half) {
    const float value = nm::FloatOfHalf(static_cast<uint16_t>(half));
    const uint16_t back = nm::HalfOfFloat(value);
    const bool nan = (half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0;
    if (nan ? !std::isnan(value) : back != half) Report("float16", std::to_string(half));
    const float wide = nm::FloatOfBfloat16(static_cast<uint16_t>(half));
    if (!std::isnan(wide) && nm::Bfloat16OfFloat(wide) != half) Report("bfloat16", std::to_string(half));
  }
}

// A thread's tile configuration is found afterwards as it was before, whoever made it.
void TestTileConfiguration([[maybe_unused]] std::mt19937& random) {
#if defined(NM_EMULATE_AVX512)
  const uint8_t none[64] = {}, others[64] = {1, 3, 5};
  for (const uint8_t* before : {none, others}) {
    _tile_loadconfig(before);
    for (int dtype : {NM_FLOAT32, NM_FLOAT16, NM_BFLOAT16, NM_INT8, NM_INT4}) {
      CheckShape({100, 40, 8, 16, dtype, NM_BITMAP, 128, 0, 0, 0}, 20, false, random);
    }
    uint8_t after[64];
    _tile_storeconfig(after);
    if (memcmp(before, after, sizeof(after)) != 0) Report("tile configuration", "is another after a product");
  }
  _tile_release();
#endif
}

}  // namespace
}  // namespace nm_test

int main(int argc, char** argv) {
  const int count = argc > 1 ? atoi(argv[1]) : 1500;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1);
  nm_test::TestHalfConversions();
  nm_test::TestEveryTail(random);
  nm_test::TestWholeRows(random);
  nm_test::TestEveryPattern(random);
  nm_test::TestWideRows(random);
  nm_test::TestRandomShapes(random, count);
  nm_test::TestManyRows(random, count / 10);
  nm_test::TestHostileWeights(random, 4 * count);
  nm_test::TestTileConfiguration(random);
  printf("%lld products on %s and below, %d failures; %s is in use\n", static_cast<long long>(nm_test::products),
         nm::IsaName(nm::BestIsa()), nm_test::failures, nm_isa());
  return nm_test::failures == 0 ? 0 : 1;
}
