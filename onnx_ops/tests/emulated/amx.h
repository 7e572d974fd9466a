// The AMX intrinsics of immintrin.h. As on a processor, a thread that uses tiles without a configuration, or multiplies
// tiles whose sizes do not fit, aborts.
#ifndef NM_TESTS_EMULATED_AMX_H_
#define NM_TESTS_EMULATED_AMX_H_

namespace nm_emulated {

struct Tiles {
  uint8_t configuration[64] = {};
  uint8_t bytes[8][16][64];
};
inline Tiles& ThreadTiles() {
  static thread_local Tiles tiles;
  return tiles;
}

using Tile = uint8_t[16][64];
inline void Require(bool condition, const char* what, int tile) {
  if (condition) return;
  fprintf(stderr, "tile %d %s\n", tile, what);
  abort();
}
inline Tile& TileAt(int tile) {
  Tiles& all = ThreadTiles();
  Require(all.configuration[0] == 1, "is used without a configuration", tile);
  return all.bytes[tile];
}
inline int RowBytes(int tile) { return ThreadTiles().configuration[16 + 2 * tile]; }
inline int Rows(int tile) { return ThreadTiles().configuration[48 + tile]; }

// f(row, lane) of the sums of a product.
template <class F>
void ForSums(int sums, int a, int b, const F& f) {
  Require(Rows(sums) == Rows(a) && RowBytes(sums) == RowBytes(b) && RowBytes(a) == 4 * Rows(b), "does not fit", sums);
  for (int row = 0; row < Rows(sums); ++row) {
    for (int lane = 0; lane < RowBytes(sums) / 4; ++lane) f(row, lane);
  }
}

template <class Lane>
Lane Get(const Tile& tile, int row, int lane) {
  Lane value;
  memcpy(&value, tile[row] + lane * static_cast<int>(sizeof(Lane)), sizeof(Lane));
  return value;
}

}  // namespace nm_emulated

inline void _tile_loadconfig(const void* p) {
  memcpy(nm_emulated::ThreadTiles().configuration, p, 64);
  memset(nm_emulated::ThreadTiles().bytes, 0, sizeof(nm_emulated::ThreadTiles().bytes));
}
inline void _tile_storeconfig(void* p) { memcpy(p, nm_emulated::ThreadTiles().configuration, 64); }
inline void _tile_release() { memset(nm_emulated::ThreadTiles().configuration, 0, 64); }
inline void _tile_zero(int tile) { memset(nm_emulated::TileAt(tile), 0, 1024); }
inline void _tile_loadd(int tile, const void* p, int64_t stride) {
  for (int row = 0; row < nm_emulated::Rows(tile); ++row) {
    memcpy(nm_emulated::TileAt(tile)[row], static_cast<const uint8_t*>(p) + row * stride,
           static_cast<size_t>(nm_emulated::RowBytes(tile)));
  }
}
inline void _tile_stored(int tile, void* p, int64_t stride) {
  for (int row = 0; row < nm_emulated::Rows(tile); ++row) {
    memcpy(static_cast<uint8_t*>(p) + row * stride, nm_emulated::TileAt(tile)[row],
           static_cast<size_t>(nm_emulated::RowBytes(tile)));
  }
}
// Adds four products of signed bytes of a's row and b's column to each lane, for each quadruple.
inline void _tile_dpbssd(int sums, int a, int b) {
  nm_emulated::ForSums(sums, a, b, [&](int row, int lane) {
    int32_t sum = nm_emulated::Get<int32_t>(nm_emulated::TileAt(sums), row, lane);
    for (int k = 0; k < nm_emulated::RowBytes(a); ++k) {
      sum += nm_emulated::Get<int8_t>(nm_emulated::TileAt(a), row, k) *
             nm_emulated::Get<int8_t>(nm_emulated::TileAt(b), k / 4, 4 * lane + k % 4);
    }
    memcpy(nm_emulated::TileAt(sums)[row] + 4 * lane, &sum, 4);
  });
}
// Likewise two products of bfloat16, for each pair.
inline void _tile_dpbf16ps(int sums, int a, int b) {
  const auto number = [](int tile, int row, int lane) {
    return nm_emulated::Flushed(nm::FloatOfBfloat16(nm_emulated::Get<uint16_t>(nm_emulated::TileAt(tile), row, lane)));
  };
  nm_emulated::ForSums(sums, a, b, [&](int row, int lane) {
    float sum = nm_emulated::Get<float>(nm_emulated::TileAt(sums), row, lane);
    for (int k = 0; k < nm_emulated::RowBytes(a) / 2; ++k) {
      sum = nm_emulated::Flushed(std::fma(number(a, row, k), number(b, k / 2, 2 * lane + k % 2), sum));
    }
    memcpy(nm_emulated::TileAt(sums)[row] + 4 * lane, &sum, 4);
  });
}

#endif  // NM_TESTS_EMULATED_AMX_H_
