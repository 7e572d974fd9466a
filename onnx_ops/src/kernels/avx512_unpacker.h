// Unpacks the weights of a tile of outputs, a chunk of columns at a time.
#ifndef NM_KERNELS_AVX512_UNPACKER_H_
#define NM_KERNELS_AVX512_UNPACKER_H_

#include "avx512_integer_weights.h"
#include "avx512_tiles.h"

namespace nm {
namespace {

struct TileFormat {
  int64_t chunk_steps;  // unpacked at a time: they should stay in the first-level cache for all rows
  int64_t step_bytes;   // of 64 columns of 16 outputs
  int64_t copy_bytes;   // of a row's last values
};

struct TileScratch {
  TileFormat format;
  int64_t band_outputs;
  int64_t mask_bytes;  // of one output
  int64_t copy_bytes;
  size_t masks;  // of each output of a band, and its copied values
  size_t copies;
  size_t weights;  // [kTileOutputs / 16][step of the chunk][…][16][64 bytes]
  size_t scales;   // float32[block][output of the band], of integers
  size_t row_scales;
  size_t sums;  // float32[tile of the band][group][kTileOutputs][16]
  size_t total;

  TileScratch(const Layout& l, int64_t rows, const TileFormat& tile_format) : format(tile_format) {
    const int64_t groups = LaneGroups(rows);
    const int64_t blocks = Blocks(l);
    band_outputs = BandOutputs(groups);
    mask_bytes = RoundUp(static_cast<int64_t>(MaskReader::ScratchBytes(l)), 64);
    copy_bytes = RoundUp(format.copy_bytes, 64);
    Parts parts;
    masks = parts.Take(band_outputs * mask_bytes);
    copies = parts.Take(band_outputs * copy_bytes);
    weights = parts.Take(kTileOutputs / kLanes * format.chunk_steps * format.step_bytes);
    scales = parts.Take(blocks * band_outputs * 4);
    row_scales = parts.Take(RoundUp(blocks, kLanes) * 4);
    sums = parts.Take(band_outputs / kTileOutputs * groups * kTileSums * 4);
    total = parts.total();
  }

  static int64_t Blocks(const Layout& l) { return l.row_scales > 0 ? BlockCount(l) : 0; }
};

// StepStore opens a row of values and stores a step of it, kBytes apart from the step before.
template <class StepStore, class Masks>
class TileUnpacker {
 public:
  TileUnpacker(const Layout& l, const TileScratch& plan, uint8_t* scratch)
      : layout_(l), plan_(plan), scratch_(scratch), steps_(Steps(l)), mask_reader_(l), store_(l) {}

  void SetOutputs(int64_t band, int64_t begin, int64_t end) {
    float* row_scales = reinterpret_cast<float*>(scratch_ + plan_.row_scales);
    float* scales = reinterpret_cast<float*>(scratch_ + plan_.scales);
    const int64_t blocks = TileScratch::Blocks(layout_);
    for (int64_t i = begin; i < end; ++i) {
      rows_[i] = store_.Open(band + i, scratch_ + plan_.copies + i * plan_.copy_bytes);
      masks_[i] = MasksOf<Masks>(mask_reader_, band + i, scratch_ + plan_.masks + i * plan_.mask_bytes);
      if (blocks == 0) continue;
      BlockScales(layout_, band + i, row_scales);
      for (int64_t b = 0; b < blocks; ++b) scales[b * plan_.band_outputs + i] = row_scales[b];
    }
  }

  void Unpack(int64_t begin, int64_t end, int64_t first_step, int64_t last_step, Fetcher* fetcher) const {
    const int64_t plain_steps = Min(Min(store_.WholeSteps(), steps_ - 1), last_step);
    const int64_t half_bytes = plan_.format.chunk_steps * StepStore::kBytes;
    for (int64_t i = begin; i < end; ++i) {
      const typename StepStore::Row& row = rows_[i];
      const Masks& masks = masks_[i];
      if (fetcher != nullptr) fetcher->Fetch(1);
      const int64_t at = i - begin;
      uint8_t* to = scratch_ + plan_.weights + at / kLanes * half_bytes + at % kLanes * 64;
      int64_t step = first_step;
      for (; step < plain_steps; ++step, to += StepStore::kBytes) {
        store_.StoreInPlace(row, step, masks.PlainStep(step), to);
      }
      for (; step < last_step; ++step, to += StepStore::kBytes) store_.Store(row, step, masks.Step(step), to);
    }
  }

 private:
  const Layout& layout_;
  const TileScratch& plan_;
  uint8_t* const scratch_;
  const int64_t steps_;
  const MaskReader mask_reader_;
  const StepStore store_;
  typename StepStore::Row rows_[kMostBandOutputs];
  Masks masks_[kMostBandOutputs];
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_UNPACKER_H_
