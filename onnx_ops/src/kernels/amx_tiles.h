// Tile registers: eight matrices of 16 rows of 64 bytes. In an anonymous namespace, as avx512_common.h says.
#ifndef NM_KERNELS_AMX_TILES_H_
#define NM_KERNELS_AMX_TILES_H_

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace nm {
namespace {

constexpr int64_t kLeastTileRows = 5;  // with fewer, kernels for few rows are faster
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileRowBytes = 64;

struct alignas(64) TileConfiguration {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64, "as LDTILECFG reads it");

constexpr TileConfiguration kWholeTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
// Half of the columns of weights (tiles 0 and 1) and of activations (2 and 3); their products are whole.
constexpr TileConfiguration kHalfStepTiles = {
    1, 0, {}, {32, 32, 64, 64, 64, 64, 64, 64}, {16, 16, 8, 8, 16, 16, 16, 16}};

// The intrinsics of GCC do not tell the compiler which memory they read.
inline void TileFence() { asm volatile("" ::: "memory"); }

// Eight tiles while it lives. A thread's configuration may belong to another library, ONNX Runtime's own int8
// kernels among them, which expects to find it as it was.
class Tiles {
 public:
  explicit Tiles(const TileConfiguration& configuration) {
    memset(&before_, 0, sizeof(before_));
    _tile_storeconfig(&before_);
    TileFence();
    found_ = memcmp(&before_, &configuration, sizeof(before_)) == 0;
    if (!found_) _tile_loadconfig(&configuration);
  }
  ~Tiles() {
    if (found_) return;
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfiguration before_;
  bool found_;
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AMX_TILES_H_
