// Integer weights times many rows of int8 activations. The weights of 32 outputs are unpacked once, as signed bytes with
// zeros in the pruned columns, for all activation rows; sixteen of those lie in the lanes. How the two are multiplied is
// the caller's: by AMX tiles or by AVX-512's dot products of bytes.
#ifndef NM_KERNELS_AVX512_INTEGER_TILES_H_
#define NM_KERNELS_AVX512_INTEGER_TILES_H_

#include "avx512_integer_weights.h"
#include "avx512_lanes.h"

namespace nm {
namespace {

constexpr int64_t kStepBytes = 1024;           // 64 columns of 16 outputs or of 16 activation rows
constexpr int64_t kChunkSteps = 8;             // whose weights, 16 KB, stay in the first-level cache for all rows
constexpr int64_t kMostTileColumns = 1 << 20;

// Activations: bytes[group][step][column / 4][row][4], scales[group][block][row].
struct PackedTiles {
  int64_t steps;
  int64_t blocks;
  int64_t groups;
  size_t bytes;
  size_t scales;
  size_t outliers;
  size_t total;

  PackedTiles(const Layout& l, int64_t rows) {
    const int64_t block = BlockColumns(l);
    steps = Steps(l);
    blocks = (l.in_features + block - 1) / block;
    groups = LaneGroups(rows);
    Parts parts;
    bytes = parts.Take(groups * steps * kStepBytes);
    scales = parts.Take(groups * blocks * kLanes * 4);
    outliers = parts.Take(groups * OutlierGroupFloats(l) * 4);
    total = parts.total();
  }
};

inline size_t PackedTilesBytes(const Layout& l, int64_t rows) { return PackedTiles(l, rows).total; }

// Rows first … first+count-1, a group. flip: 0 for signed bytes, 128 for unsigned ones that are larger by 128.
inline void PackGroup(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed,
                      uint8_t flip) {
  const PackedTiles p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t group = first / kLanes;
  const int64_t block = BlockColumns(l);
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(static_cast<int>(kLanes)));
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t columns = Min(block, l.in_features - b * block);
    uint8_t* steps = base + p.bytes + (group * p.steps + b * block / kStep) * kStepBytes;
    float* scales = reinterpret_cast<float*>(base + p.scales) + (group * p.blocks + b) * kLanes;
    for (int64_t row = 0; row < kLanes; ++row) {
      alignas(64) uint8_t bytes[256] = {};
      alignas(64) int32_t starts[16];
      scales[row] =
          row < count ? PackInt8Block(a + row * l.in_features + b * block, columns, 0, bytes, starts) : 0.0f;
      for (int64_t i = 0; i * kStep < columns; ++i) {
        const __m512i step = _mm512_xor_si512(_mm512_load_si512(bytes + i * kStep), flips);
        _mm512_i32scatter_epi32(steps + i * kStepBytes + 4 * row, places, step, 4);
      }
    }
  }
  if (l.row_outliers > 0) {
    float* lanes = reinterpret_cast<float*>(base + p.outliers) + group * OutlierGroupFloats(l);
    PackLanes(l, a, count, OutlierColumns(l), lanes);
  }
}

struct TileScratch {
  int64_t mask_bytes;  // of one output
  int64_t copy_bytes;
  size_t masks;    // of each output, and its copied values
  size_t copies;
  size_t weights;  // int8[kTileOutputs / 16][kChunkSteps][16][64]
  size_t scales;   // float32[block][kTileOutputs]
  size_t row_scales;
  size_t sums;     // float32[group][kTileOutputs][16]
  size_t total;

  TileScratch(const Layout& l, int64_t rows) {
    const PackedTiles p(l, rows);
    mask_bytes = RoundUp(static_cast<int64_t>(MaskReader::ScratchBytes(l)), 64);
    copy_bytes = RoundUp(IntegerCopyBytes(l), 64);
    Parts parts;
    masks = parts.Take(kTileOutputs * mask_bytes);
    copies = parts.Take(kTileOutputs * copy_bytes);
    weights = parts.Take(kTileOutputs / kLanes * kChunkSteps * kStepBytes);
    scales = parts.Take(p.blocks * kTileOutputs * 4);
    row_scales = parts.Take(RoundUp(p.blocks, kLanes) * 4);
    sums = parts.Take(p.groups * kTileOutputs * kLanes * 4);
    total = parts.total();
  }
};

inline size_t TileScratchBytes(const Layout& l, int64_t rows) { return TileScratch(l, rows).total; }

// Unpacks the weights of kTileOutputs outputs, or of those that are left, a chunk of columns at a time.
template <class Weights, class Rest, class MasksType>
class TileUnpacker {
 public:
  TileUnpacker(const Layout& l, const TileScratch& plan, uint8_t* scratch)
      : layout_(l), plan_(plan), scratch_(scratch), mask_reader_(l), reader_(l) {}

  void SetOutputs(int64_t first, int64_t count) {
    count_ = count;
    float* row_scales = reinterpret_cast<float*>(scratch_ + plan_.row_scales);
    float* scales = reinterpret_cast<float*>(scratch_ + plan_.scales);
    const int64_t block = BlockColumns(layout_);
    const int64_t blocks = (layout_.in_features + block - 1) / block;
    for (int64_t i = 0; i < count; ++i) {
      values_[i] = reader_.Row(first + i, scratch_ + plan_.copies + i * plan_.copy_bytes);
      masks_[i] = MasksOf<MasksType>(mask_reader_, first + i, scratch_ + plan_.masks + i * plan_.mask_bytes);
      BlockScales(layout_, first + i, row_scales);
      for (int64_t b = 0; b < blocks; ++b) scales[b * kTileOutputs + i] = row_scales[b];
    }
  }

  // What the next call reads is fetched meanwhile: the same outputs' next chunk, or the next outputs' first.
  void Unpack(int64_t first_step, int64_t last_step) const {
    const bool at_end = last_step == reader_.steps;
    const int64_t ahead = at_end ? -first_step : kChunkSteps;
    const int64_t outputs_ahead = at_end ? kTileOutputs : 0;
    const int64_t plain_steps = Min(Min(reader_.whole_steps, reader_.steps - 1), last_step);
    for (int64_t i = 0; i < count_; ++i) {
      const IntegerValues& row = values_[i];
      const MasksType& masks = masks_[i];
      const uint8_t* next_values = reader_.Address(row, first_step + ahead) + outputs_ahead * layout_.value_bytes;
      const uint8_t* next_masks = masks.Address(first_step + ahead) + outputs_ahead * layout_.position_bytes;
      FetchAhead(next_values, next_values + (reader_.Address(row, last_step) - reader_.Address(row, first_step)));
      FetchAhead(next_masks, next_masks + (masks.Address(last_step) - masks.Address(first_step)));
      uint8_t* to = scratch_ + plan_.weights + i / kLanes * kChunkSteps * kStepBytes + i % kLanes * kStep;
      int64_t step = first_step;
      for (; step < plain_steps; ++step, to += kStepBytes) {
        const __m512i w = reader_.LoadInPlace(row, step, masks.PlainStep(step));
        _mm512_store_si512(to, _mm512_sub_epi8(w, reader_.offset));
      }
      for (; step < last_step; ++step, to += kStepBytes) {
        _mm512_store_si512(to, _mm512_sub_epi8(reader_.Load(row, step, masks.Step(step)), reader_.offset));
      }
    }
  }

 private:
  static void FetchAhead(const uint8_t* p, const uint8_t* end) {
    for (; p < end; p += 64) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  const Layout& layout_;
  const TileScratch& plan_;
  uint8_t* const scratch_;
  const MaskReader mask_reader_;
  const IntegerReader<Weights, Rest> reader_;
  int64_t count_ = 0;
  IntegerValues values_[kTileOutputs];
  MasksType masks_[kTileOutputs];
};

template <int dtype>
bool SupportsTiles(const Layout& l) {
  return Supports<dtype>(l) && l.in_features <= kMostTileColumns;
}

// All of Kernel::run but the multiplication: multiply(first_block, last_block, group, groups) adds to the sums of one
// group or two the products of a chunk of columns.
template <class Unpacker, class Multiply>
void RunUnpacked(const Layout& l, int64_t rows, const uint8_t* packed, int64_t first, int64_t last, uint8_t* scratch,
                 float* y, int64_t y_stride, const Multiply& multiply) {
  const PackedTiles p(l, rows);
  const TileScratch plan(l, rows);
  Unpacker unpacker(l, plan, scratch);
  float* sums = reinterpret_cast<float*>(scratch + plan.sums);
  const int64_t block_steps = BlockColumns(l) / kStep;
  for (int64_t end; first < last; y += end - first, first = end) {
    end = Min(first + kTileOutputs, last);
    unpacker.SetOutputs(first, end - first);
    memset(sums, 0, static_cast<size_t>(p.groups * kTileOutputs * kLanes) * sizeof(float));
    for (int64_t step = 0; step < p.steps; step += kChunkSteps) {
      unpacker.Unpack(step, Min(step + kChunkSteps, p.steps));
      const int64_t last_block = Min((step + kChunkSteps) / block_steps, p.blocks);
      for (int64_t group = 0; group < p.groups; group += 2) {
        multiply(step / block_steps, last_block, group, Min(2, p.groups - group));
      }
    }
    if (l.row_outliers > 0) {
      AddOutlierLanes(l, p.groups, reinterpret_cast<const float*>(packed + p.outliers), first, end - first, sums);
    }
    for (int64_t group = 0; group < p.groups; ++group) {
      StoreLanes(sums + group * kTileOutputs * kLanes, rows - group * kLanes, end - first,
                 y + group * kLanes * y_stride, y_stride);
    }
  }
}

template <template <Density> class Weights, class Multiply>
void RunTiles(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
              int64_t y_stride, const Multiply& multiply) {
  constexpr Density kHalf = Density::kHalf;
  constexpr Density kGeneral = Density::kGeneral;
  constexpr Density kDense = Density::kDense;
  const Density density = DensityOf(l);
  const auto run =
      density == kDense     ? RunUnpacked<TileUnpacker<Weights<kDense>, Int8<kDense>, StoredMasks>, Multiply>
      : density == kGeneral ? RunUnpacked<TileUnpacker<Weights<kGeneral>, Int8<kGeneral>, StoredMasks>, Multiply>
      : ReadsCodes(l, 1)    ? RunUnpacked<TileUnpacker<Weights<kHalf>, Int8<kHalf>, CodeMasks>, Multiply>
                            : RunUnpacked<TileUnpacker<Weights<kHalf>, Int8<kHalf>, StoredMasks>, Multiply>;
  run(l, rows, static_cast<const uint8_t*>(packed), first, last, static_cast<uint8_t*>(scratch), y, y_stride, multiply);
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_INTEGER_TILES_H_
