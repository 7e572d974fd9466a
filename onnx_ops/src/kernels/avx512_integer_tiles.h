// Integer weights times many rows of int8 activations. The weights of 32 outputs are unpacked once, as signed bytes with
// zeros in the pruned columns, and multiplied by AMX tiles or by AVX-512's dot products of bytes.
#ifndef NM_KERNELS_AVX512_INTEGER_TILES_H_
#define NM_KERNELS_AVX512_INTEGER_TILES_H_

#include "avx512_integer_weights.h"
#include "avx512_tiles.h"

namespace nm {
namespace {

constexpr int64_t kStepBytes = 1024;           // 64 columns of 16 outputs or of 16 activation rows
constexpr int64_t kChunkSteps = 8;             // whose weights, 16 KB, stay in the first-level cache for all rows

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
  int64_t ActivationBytes() const { return groups * steps * kStepBytes; }
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
  size_t masks;    // of each output of a band, and its copied values
  size_t copies;
  size_t weights;  // int8[kTileOutputs / 16][kChunkSteps][16][64]
  size_t scales;   // float32[block][output of the band]
  size_t row_scales;
  size_t sums;     // float32[tile of the band][group][kTileOutputs][16]
  size_t total;

  TileScratch(const Layout& l, int64_t rows) {
    const PackedTiles p(l, rows);
    const int64_t outputs = BandOutputs(p.groups);
    mask_bytes = RoundUp(static_cast<int64_t>(MaskReader::ScratchBytes(l)), 64);
    copy_bytes = RoundUp(IntegerCopyBytes(l), 64);
    Parts parts;
    masks = parts.Take(outputs * mask_bytes);
    copies = parts.Take(outputs * copy_bytes);
    weights = parts.Take(kTileOutputs / kLanes * kChunkSteps * kStepBytes);
    scales = parts.Take(p.blocks * outputs * 4);
    row_scales = parts.Take(RoundUp(p.blocks, kLanes) * 4);
    sums = parts.Take(BandSumsBytes(p.groups));
    total = parts.total();
  }
};

inline size_t TileScratchBytes(const Layout& l, int64_t rows) { return TileScratch(l, rows).total; }

template <class Weights, class Rest, class Masks>
class IntegerUnpacker {
 public:
  IntegerUnpacker(const Layout& l, int64_t rows, uint8_t* scratch)
      : layout_(l),
        plan_(l, rows),
        band_outputs_(BandOutputs(LaneGroups(rows))),
        scratch_(scratch),
        mask_reader_(l),
        reader_(l) {}

  void SetOutputs(int64_t band, int64_t begin, int64_t end) {
    end_ = end;
    float* row_scales = reinterpret_cast<float*>(scratch_ + plan_.row_scales);
    float* scales = reinterpret_cast<float*>(scratch_ + plan_.scales);
    const int64_t block = BlockColumns(layout_);
    const int64_t blocks = (layout_.in_features + block - 1) / block;
    for (int64_t i = begin; i < end; ++i) {
      values_[i] = reader_.Row(band + i, scratch_ + plan_.copies + i * plan_.copy_bytes);
      masks_[i] = MasksOf<Masks>(mask_reader_, band + i, scratch_ + plan_.masks + i * plan_.mask_bytes);
      BlockScales(layout_, band + i, row_scales);
      for (int64_t b = 0; b < blocks; ++b) scales[b * band_outputs_ + i] = row_scales[b];
    }
  }

  void Unpack(int64_t begin, int64_t end, int64_t first_step, int64_t last_step, Fetcher* fetcher) const {
    const int64_t plain_steps = Min(Min(reader_.whole_steps, reader_.steps - 1), last_step);
    for (int64_t i = begin; i < end; ++i) {
      const IntegerValues& row = values_[i];
      const Masks& masks = masks_[i];
      if (fetcher != nullptr) {
        fetcher->Fetch(1);
      } else {
        FetchAhead(i + kTileOutputs, first_step, last_step);
      }
      const int64_t at = i - begin;
      uint8_t* to = scratch_ + plan_.weights + at / kLanes * kChunkSteps * kStepBytes + at % kLanes * kStep;
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
  // The same columns of an output, or behind the band's last one the next columns of its first ones.
  void FetchAhead(int64_t output, int64_t first_step, int64_t last_step) const {
    const int64_t steps = last_step - first_step;
    if (output >= end_) {
      output -= end_;
      first_step = last_step;
    }
    if (output >= end_) return;
    const IntegerValues& row = values_[output];
    FetchRange(reader_.Address(row, first_step), reader_.Address(row, first_step + steps));
    FetchRange(masks_[output].Address(first_step), masks_[output].Address(first_step + steps));
  }
  static void FetchRange(const uint8_t* p, const uint8_t* end) {
    for (; p < end; p += 64) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }

  const Layout& layout_;
  const TileScratch plan_;
  const int64_t band_outputs_;
  uint8_t* const scratch_;
  const MaskReader mask_reader_;
  const IntegerReader<Weights, Rest> reader_;
  int64_t end_ = 0;
  IntegerValues values_[kMostBandOutputs];
  Masks masks_[kMostBandOutputs];
};

template <int dtype>
bool SupportsTiles(const Layout& l) {
  return Supports<dtype>(l) && l.in_features <= kMostTileColumns;
}

// Calls run with the unpacker of a weight.
template <template <Density> class Weights, class Run>
void WithUnpacker(const Layout& l, int64_t rows, uint8_t* scratch, const Run& run) {
  constexpr Density kHalf = Density::kHalf;
  constexpr Density kGeneral = Density::kGeneral;
  constexpr Density kDense = Density::kDense;
  const Density density = DensityOf(l);
  if (density == kDense) {
    IntegerUnpacker<Weights<kDense>, Int8<kDense>, StoredMasks> unpacker(l, rows, scratch);
    run(&unpacker);
  } else if (density == kGeneral) {
    IntegerUnpacker<Weights<kGeneral>, Int8<kGeneral>, StoredMasks> unpacker(l, rows, scratch);
    run(&unpacker);
  } else if (ReadsCodes(l, 1)) {
    IntegerUnpacker<Weights<kHalf>, Int8<kHalf>, CodeMasks> unpacker(l, rows, scratch);
    run(&unpacker);
  } else {
    IntegerUnpacker<Weights<kHalf>, Int8<kHalf>, StoredMasks> unpacker(l, rows, scratch);
    run(&unpacker);
  }
}

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_INTEGER_TILES_H_
