// AVX2 kernels for many activation rows and int8 or int4 values, with activations rounded to int8. The weights of a few
// outputs and 128 columns are unpacked once for all rows. Where half of 16 columns are kept, one vpshufb picks from a
// row's sixteen bytes the eight that meet the weights of one output and the eight that meet those of the next: half the
// multiplications of a dense product.
#include "avx2_integer_units.h"
#include "avx2_outliers.h"

namespace nm {
namespace {

constexpr int64_t kMostPairs = 8;  // of activation rows in a tile
constexpr int64_t kUnitTile = 32;  // units unpacked at a time

// ---------------------------------------------------------------------------------------------------------------------
// Packed activations.

struct PackedTiles {
  int64_t pairs;  // of rows in a tile, which are cut as evenly as possible
  int64_t all_pairs;
  int64_t tiles;
  int64_t steps;
  int64_t scale_columns;
  int64_t scales_per_step;
  int64_t blocks_per_scale;  // of 16 columns
  size_t bytes;              // [step][tile][16 columns][pair][row][column]: the tiles of a step lie together
  size_t scales;             // float[step][tile][scale][pair][row][4]
  size_t outliers;           // float32, for those
  size_t total;

  PackedTiles(const Layout& l, int64_t rows) {
    all_pairs = (rows + 1) / 2;
    const int64_t least = (all_pairs + kMostPairs - 1) / kMostPairs;
    pairs = (all_pairs + least - 1) / least;
    tiles = (all_pairs + pairs - 1) / pairs;
    steps = (l.in_features + kStepColumns - 1) / kStepColumns;
    scale_columns = UnitColumns(l);
    scales_per_step = kStepColumns / scale_columns;
    blocks_per_scale = scale_columns / kBlock;
    bytes = 0;
    scales = static_cast<size_t>(steps * tiles * TileBytes());
    outliers = scales + static_cast<size_t>(steps * tiles * TileScales()) * sizeof(float);
    total = outliers + static_cast<size_t>(OutlierActivationBytes(l, rows));
  }
  int64_t BlockBytes() const { return pairs * 32; }
  int64_t TileBytes() const { return kStepBlocks * BlockBytes(); }  // of a step
  int64_t TileScales() const { return scales_per_step * pairs * 8; }
  int64_t PairsOf(int64_t tile) const { return Min(pairs, all_pairs - tile * pairs); }
};

// Rounds `count` activations to int8 with a scale of their own, xor `flip`, and writes `columns` of them, 16 every
// `stride` bytes. Activations that are not finite make the scale NaN, and so the outputs.
float PackInt8(const float* a, int64_t count, int64_t columns, uint8_t flip, uint8_t* bytes, int64_t stride) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m256i bits = _mm256_castps_si256(_mm256_maskload_ps(a + i, LaneMask(count - i)));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX)));
  }
  alignas(32) uint32_t lanes[8];
  Store256(lanes, largest);
  uint32_t bits = 0;
  for (uint32_t lane : lanes) bits = lane > bits ? lane : bits;
  const bool finite = bits < 0x7f800000u;
  float most;
  memcpy(&most, &bits, sizeof(most));
  const bool tiny = !(finite && most > 0x1p-120f);
  const __m256 inverse = _mm256_set1_ps(tiny ? 0.0f : 127.0f / most);
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  for (int64_t i = 0; i < columns; i += 16, bytes += stride) {
    __m256i rounded[2];
    for (int64_t j = 0; j < 2; ++j) {
      const __m256 values = _mm256_maskload_ps(a + i + 8 * j, LaneMask(tiny ? 0 : count - i - 8 * j));
      rounded[j] = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
    }
    const __m256i words = _mm256_packs_epi32(rounded[0], rounded[1]);
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words), order);
    const __m128i flipped = _mm_xor_si128(_mm256_castsi256_si128(packed), _mm_set1_epi8(static_cast<char>(flip)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), flipped);
  }
  return !finite ? __builtin_nanf("") : tiny ? 0.0f : most / 127.0f;
}

void Pack(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedTiles p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const uint8_t flip = l.dtype == NM_INT4 ? 0x80 : 0;  // int4 weights meet unsigned activations
  for (int64_t row = first; row < RoundUp(first + count, 2); ++row) {
    const bool present = row < first + count;
    const int64_t tile = row / 2 / p.pairs;
    const int64_t pair = row / 2 % p.pairs;
    const int64_t lane = pair * 2 + row % 2;
    for (int64_t step = 0; step < p.steps; ++step) {
      uint8_t* bytes = base + p.bytes + (step * p.tiles + tile) * p.TileBytes() + lane * 16;
      float* scales = reinterpret_cast<float*>(base + p.scales) + (step * p.tiles + tile) * p.TileScales() + lane * 4;
      for (int64_t i = 0; i < p.scales_per_step; ++i) {
        const int64_t column = step * kStepColumns + i * p.scale_columns;
        const int64_t inside = present ? Min(p.scale_columns, l.in_features - column) : 0;
        const float* from = a + (inside > 0 ? (row - first) * l.in_features + column : 0);
        uint8_t* to = bytes + i * p.blocks_per_scale * p.BlockBytes();
        const float scale = PackInt8(from, inside, p.scale_columns, flip, to, p.BlockBytes());
        _mm_storeu_ps(scales + i * p.pairs * 8, _mm_set1_ps(scale));
      }
    }
  }
  PackOutlierActivations(l, a, first, count, rows, reinterpret_cast<float*>(base + p.outliers));
}

size_t PackedBytes(const Layout& l, int64_t rows) { return PackedTiles(l, rows).total; }

// ---------------------------------------------------------------------------------------------------------------------
// The micro-kernel: P pairs of rows times one unit.

// GCC would load everything ahead and spill the sums.
inline void StayInOrder() { asm volatile("" : : : "memory"); }

inline __m256i Broadcast128(const void* p) { return _mm256_broadcastsi128_si256(Load128(p)); }

// int4: activations are unsigned, offset by 128, so that vpmaddubsw takes them as they are, and 128 columns of products
// fit sums of 16 bits; the start takes the offset back. int8: vpmaddubsw of the weights' magnitudes (no two products
// leave 16 bits), the signs moved to the activations: −a is ~a + 1, and the start adds the ones. vpsignb instead of
// the xor is 10 % slower, vpmaddwd of 16-bit activations needs more shuffles.
template <int P, bool kPicked, int dtype>
void MultiplyTile(const PackedTiles& p, const uint8_t* a, const float* a_scales, const Unit& unit, float* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t blocks = p.blocks_per_scale;
  const int64_t block_bytes = p.BlockBytes();
  const int64_t scales = p.scales_per_step;
  for (int64_t scale = 0; scale < scales; ++scale, a_scales += p.pairs * 8) {
    __m256i lanes[P];
    const __m256i start = Broadcast128(unit.starts[scale]);
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) lanes[i] = start;
    for (int64_t block = scale * blocks; block < (scale + 1) * blocks; ++block, a += block_bytes) {
      const __m256i control = Broadcast128(unit.controls[block]);
      const __m256i weights = Broadcast128(unit.weights[block]);
      const __m256i signs = Broadcast128(unit.signs[block]);
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i) {
        __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(a + 32 * i));
        if (kPicked) values = _mm256_shuffle_epi8(values, control);
        if (dtype == NM_INT4) {
          lanes[i] = _mm256_add_epi16(lanes[i], _mm256_maddubs_epi16(values, weights));
        } else {
          const __m256i products = _mm256_maddubs_epi16(weights, _mm256_xor_si256(values, signs));
          lanes[i] = _mm256_add_epi32(lanes[i], _mm256_madd_epi16(products, ones));
          StayInOrder();
        }
      }
    }
    StayInOrder();
    const __m256 weight_scale = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(unit.scales[scale]));
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) {
      const __m256i wide = dtype == NM_INT4 ? _mm256_madd_epi16(lanes[i], ones) : lanes[i];
      const __m256 factor = _mm256_mul_ps(weight_scale, _mm256_load_ps(a_scales + 8 * i));
      const __m256 sum = _mm256_load_ps(sums + 8 * i);
      _mm256_store_ps(sums + 8 * i, _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), factor, sum));
    }
  }
}

using TileFunction = void (*)(const PackedTiles&, const uint8_t*, const float*, const Unit&, float*);

template <bool kPicked, int dtype>
TileFunction TileOf(int64_t pairs) {
  static constexpr TileFunction kFunctions[kMostPairs] = {
      MultiplyTile<1, kPicked, dtype>, MultiplyTile<2, kPicked, dtype>, MultiplyTile<3, kPicked, dtype>,
      MultiplyTile<4, kPicked, dtype>, MultiplyTile<5, kPicked, dtype>, MultiplyTile<6, kPicked, dtype>,
      MultiplyTile<7, kPicked, dtype>, MultiplyTile<8, kPicked, dtype>};
  return kFunctions[pairs - 1];
}

// ---------------------------------------------------------------------------------------------------------------------
// The loops.

constexpr int64_t kTilesHeld = 32;  // whose sums lie in scratch at a time
constexpr int64_t kStepsHeld = 4;   // unpacked at a time: longer runs of each output's bytes
constexpr int64_t kTilesNear = 8;   // whose activations of a step stay in the first-level cache

struct IntegerScratch {
  size_t units;  // Unit[kStepsHeld][kUnitTile]
  size_t sums;   // float[unit][tile][pair][8]
  size_t total;

  explicit IntegerScratch(const PackedTiles& p) {
    units = 0;
    sums = kStepsHeld * kUnitTile * sizeof(Unit);
    total = sums + static_cast<size_t>(Min(kTilesHeld, p.tiles) * kUnitTile * p.pairs * 8) * sizeof(float);
  }
};

size_t ScratchBytes(const Layout& l, int64_t rows) { return IntegerScratch(PackedTiles(l, rows)).total; }

// Outputs that four vectors of sums at `sums` and every `stride` stand for, of two rows.
template <bool kPicked>
__m256 FourOutputs(const float* sums, int64_t stride) {
  const __m256 low = _mm256_hadd_ps(_mm256_load_ps(sums), _mm256_load_ps(sums + stride));
  if (kPicked) return low;
  return _mm256_hadd_ps(low, _mm256_hadd_ps(_mm256_load_ps(sums + 2 * stride), _mm256_load_ps(sums + 3 * stride)));
}

// The first `count` of four; vmaskmov to memory is slow on AMD's processors.
inline void StoreFloats(__m128 four, int64_t count, float* to) {
  if (count >= 4) return _mm_storeu_ps(to, four);
  alignas(16) float lanes[4];
  _mm_store_ps(lanes, four);
  memcpy(to, lanes, static_cast<size_t>(count) * sizeof(float));
}

template <bool kPicked, int dtype>
class IntegerTiles {
 public:
  IntegerTiles(const Layout& l, int64_t rows, const void* packed, void* scratch)
      : layout_(l),
        plan_(l, rows),
        reader_(l),
        unpackers_{Unpacker<dtype>(l), Unpacker<dtype>(l), Unpacker<dtype>(l), Unpacker<dtype>(l)},
        rows_(rows),
        packed_(static_cast<const uint8_t*>(packed)) {
    uint8_t* memory = static_cast<uint8_t*>(scratch);
    units_ = reinterpret_cast<Unit*>(memory);
    sums_ = reinterpret_cast<float*>(memory + IntegerScratch(plan_).sums);
  }

  static constexpr int64_t kOutputs = kPicked ? 2 : 1;  // of a unit

  // All rows times outputs first … last-1, at most kOutputs·kUnitTile of them.
  void Run(int64_t first, int64_t last, float* y, int64_t y_stride) {
    const int64_t units = (last - first + kOutputs - 1) / kOutputs;
    for (int64_t tile = 0; tile < plan_.tiles; tile += kTilesHeld) {
      const int64_t tiles = Min(kTilesHeld, plan_.tiles - tile);
      memset(sums_, 0, static_cast<size_t>(tiles * units * plan_.pairs * 8) * sizeof(float));
      for (int64_t step = 0; step < plan_.steps; step += kStepsHeld) {
        const int64_t steps = Min(kStepsHeld, plan_.steps - step);
        Unpack(first, last, units, step, steps);
        for (int64_t i = 0; i < steps; ++i) {
          for (int64_t near = 0; near < tiles; near += kTilesNear) {
            MultiplyStep(units_ + i * kUnitTile, units, tile, tiles, near, Min(near + kTilesNear, tiles), step + i);
          }
        }
      }
      for (int64_t i = 0; i < tiles; ++i) Store(tile, tiles, i, last - first, y, y_stride);
    }
  }

 private:
  void Unpack(int64_t first, int64_t last, int64_t units, int64_t step, int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) unpackers_[i].SetStep(step + i);
    const int64_t blocks = Min(steps * kStepBlocks, Blocks(layout_) - step * kStepBlocks);
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t output = first + unit * kOutputs;
      uint16_t masks[kStepsHeld * kStepBlocks] = {};
      if (!kPicked) reader_.Masks(output, step * kStepBlocks, blocks, masks);
      for (int64_t i = 0; i < steps; ++i) {
        Unit* to = units_ + i * kUnitTile + unit;
        if (kPicked) {
          unpackers_[i].Pick(output, Min(output + 1, last - 1), to);
        } else {
          unpackers_[i].Spread(output, masks + i * kStepBlocks, to);
        }
      }
    }
  }

  void MultiplyStep(const Unit* unpacked, int64_t units, int64_t tile, int64_t tiles, int64_t begin, int64_t end,
                    int64_t step) {
    const uint8_t* bytes = packed_ + plan_.bytes + (step * plan_.tiles + tile) * plan_.TileBytes();
    const float* scales =
        reinterpret_cast<const float*>(packed_ + plan_.scales) + (step * plan_.tiles + tile) * plan_.TileScales();
    const TileFunction whole = TileOf<kPicked, dtype>(plan_.pairs);
    const TileFunction last = TileOf<kPicked, dtype>(plan_.PairsOf(tile + end - 1));
    for (int64_t unit = 0; unit < units; ++unit) {
      float* sums = sums_ + unit * tiles * plan_.pairs * 8;
      for (int64_t i = begin; i < end; ++i) {
        const TileFunction multiply = i == end - 1 ? last : whole;
        multiply(plan_, bytes + i * plan_.TileBytes(), scales + i * plan_.TileScales(), unpacked[unit],
                 sums + i * plan_.pairs * 8);
      }
    }
  }

  void Store(int64_t tile, int64_t tiles, int64_t i, int64_t outputs, float* y, int64_t y_stride) {
    const int64_t unit_stride = tiles * plan_.pairs * 8;
    for (int64_t pair = 0; pair < plan_.PairsOf(tile + i); ++pair) {
      const int64_t row = 2 * ((tile + i) * plan_.pairs + pair);
      const float* sums = sums_ + (i * plan_.pairs + pair) * 8;
      for (int64_t output = 0; output < outputs; output += 4) {
        const __m256 four = FourOutputs<kPicked>(sums + output / kOutputs * unit_stride, unit_stride);
        float* to = y + row * y_stride + output;
        StoreFloats(_mm256_castps256_ps128(four), outputs - output, to);
        if (row + 1 < rows_) StoreFloats(_mm256_extractf128_ps(four, 1), outputs - output, to + y_stride);
      }
    }
  }

  const Layout& layout_;
  const PackedTiles plan_;
  const PositionReader reader_;
  Unpacker<dtype> unpackers_[kStepsHeld];
  const int64_t rows_;
  const uint8_t* packed_;
  Unit* units_;
  float* sums_;
};

template <bool kPicked, int dtype>
void RunTiles(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
              int64_t y_stride) {
  IntegerTiles<kPicked, dtype> tiles(l, rows, packed, scratch);
  constexpr int64_t kOutputs = kUnitTile * tiles.kOutputs;
  for (int64_t output = first; output < last; output += kOutputs) {
    tiles.Run(output, Min(output + kOutputs, last), y + output - first, y_stride);
  }
}

template <int dtype>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const auto run = IsHalf(l) ? RunTiles<true, dtype> : RunTiles<false, dtype>;
  run(l, rows, packed, first, last, scratch, y, y_stride);
  if (l.row_outliers == 0) return;
  const uint8_t* outliers = static_cast<const uint8_t*>(packed) + PackedTiles(l, rows).outliers;
  for (int64_t end; first < last; y += end - first, first = end) {
    end = Min(first + kMostOutlierOutputs, last);
    AddOutliers(l, rows, reinterpret_cast<const float*>(outliers), first, end, y, y_stride);
  }
}

template <int dtype>
bool Supports(const Layout& l) {
  return l.dtype == dtype && (l.row_scales == 1 || l.scale_columns % 32 == 0);
}

constexpr int64_t kAny = INT64_MAX;
constexpr Kernel kKernels[] = {
    {"int8 panels, int8 activations", Isa::kAvx2, true, 1, kAny, Supports<NM_INT8>, PackedBytes, Pack, ScratchBytes,
     Run<NM_INT8>},
    {"int4 panels, int8 activations", Isa::kAvx2, true, 1, kAny, Supports<NM_INT4>, PackedBytes, Pack, ScratchBytes,
     Run<NM_INT4>},
};

}  // namespace

KernelList Avx2IntegerPanels() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
