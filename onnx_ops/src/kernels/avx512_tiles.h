// The course of a product of many activation rows: weights are unpacked once for all of them, 32 outputs and a chunk of
// columns at a time, and multiplied by sixteen rows in the lanes. What is unpacked, and how it is multiplied, is the
// kernels'.
#ifndef NM_KERNELS_AVX512_TILES_H_
#define NM_KERNELS_AVX512_TILES_H_

#include "avx512_lanes.h"
#include "avx512_rows.h"

namespace nm {
namespace {

constexpr int64_t kTileSums = kTileOutputs * kLanes;
constexpr int64_t kMostBandOutputs = 256;
// Packed activations that stay in the second-level cache: each tile of outputs then takes all columns, and its weights
// are one stream. Of more, a chunk of columns stays, and the outputs of a band take turns with it.
constexpr int64_t kNearActivationBytes = 1 << 20;
constexpr int64_t kMostTileColumns = 1 << 20;

// Outputs whose sums are kept.
inline int64_t BandOutputs(int64_t groups) { return groups <= 32 ? kMostBandOutputs : kMostBandOutputs / 2; }

// Fetches bytes into the second-level cache, a few lines at a time between the arithmetic on others, so that memory
// never waits.
class Fetcher {
 public:
  // Steps first_step … last_step-1 of rows first … last-1 of a weight, in `turns` turns. Scales only with whole rows:
  // a kernel that takes a chunk of columns has read them all.
  Fetcher(const Layout& l, int64_t first, int64_t last, int64_t first_step, int64_t last_step, int64_t turns) {
    const int64_t steps = Steps(l);
    const int64_t rows = Max(last - first, 0);
    const auto add = [&](const uint8_t* tensor, int64_t row_bytes) {
      const int64_t skipped = row_bytes * first_step / steps;
      const int64_t bytes = row_bytes * last_step / steps - skipped;
      const uint8_t* start = tensor + first * row_bytes + skipped;
      Add(bytes == row_bytes ? Pieces{start, rows * bytes, 0, 1} : Pieces{start, bytes, row_bytes, rows});
    };
    if (last_step - first_step == steps) add(l.scales, 2 * l.row_scales);
    add(l.values, l.value_bytes);
    add(l.positions, l.position_bytes);
    add(l.outlier_values, l.outlier_bytes);
    add(l.outlier_positions, l.row_outliers);
    lines_ = all_lines_ / turns + 1;
  }

  void Fetch(int64_t turns) {
    for (int64_t lines = turns * lines_; lines > 0 && at_ < count_;) {
      Pieces& pieces = pieces_[at_];
      for (; lines > 0 && offset_ < pieces.bytes; --lines, offset_ += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(pieces.first + offset_), _MM_HINT_T1);
      }
      if (offset_ < pieces.bytes) return;
      offset_ = 0;
      pieces.first += pieces.stride;
      if (--pieces.count <= 0) ++at_;
    }
  }

 private:
  struct Pieces {
    const uint8_t* first;
    int64_t bytes;  // of each
    int64_t stride;
    int64_t count;
  };
  void Add(const Pieces& pieces) {
    all_lines_ += pieces.count * (pieces.bytes / 64 + (pieces.count > 1));
    pieces_[count_++] = pieces;
  }

  static constexpr int kMostPieces = 5;
  Pieces pieces_[kMostPieces];
  int64_t all_lines_ = 0;
  int64_t lines_ = 0;  // of a turn
  int64_t offset_ = 0;
  int count_ = 0;
  int at_ = 0;
};

constexpr int64_t kFetchTurns = 96;  // of a chunk: one for each output, the rest between the first rows' products

// What is multiplied at a time: the columns that are unpacked.
struct Chunk {
  int64_t output;  // the first of 32, in the band
  int64_t first_step;
  int64_t last_step;
  int64_t group;  // of activation rows, the first
};

// What a kernel multiplies, and in which portions.
struct TilePlan {
  int64_t rows;
  int64_t activation_bytes;
  int64_t chunk_steps;
  int64_t groups_at_once;
  const float* outliers;  // activations for AddOutlierLanes
  const float* starts;    // of the sums of each row; null for zeros
  float* sums;
  bool fetch_columns;  // weights of a chunk of columns are fetched ahead too: not measured with AMX yet
};

// Kernel::run. Unpacker: SetOutputs(band, begin, end) tells which outputs of a band come next, Unpack(begin, end,
// first_step, last_step, fetcher) unpacks a tile of them. multiply(chunk, groups, sums, fetcher) adds to the sums of
// some groups of rows. The fetcher may be null.
template <class Unpacker, class Multiply>
class TileRun {
 public:
  TileRun(const Layout& l, const TilePlan& plan, Unpacker* unpacker, const Multiply& multiply)
      : layout_(l),
        plan_(plan),
        groups_(LaneGroups(plan.rows)),
        steps_(Steps(l)),
        unpacker_(unpacker),
        multiply_(multiply) {}

  void Run(int64_t first, int64_t last, float* y, int64_t y_stride) const {
    for (int64_t end; first < last; y += end - first, first = end) {
      end = Min(first + BandOutputs(groups_), last);
      const int64_t count = end - first;
      StartSums(RoundUp(count, kTileOutputs));
      if (plan_.activation_bytes > kNearActivationBytes) {
        MultiplyByColumns(first, count);
      } else {
        MultiplyByOutputs(first, count, last);
      }
      if (layout_.row_outliers > 0) AddOutlierLanes(layout_, groups_, plan_.outliers, first, count, plan_.sums);
      for (int64_t o = 0; o < count; o += kTileOutputs) {
        for (int64_t group = 0; group < groups_; ++group) {
          StoreLanes(SumsAt(o, group), plan_.rows - group * kLanes, Min(kTileOutputs, count - o),
                     y + o + group * kLanes * y_stride, y_stride);
        }
      }
    }
  }

 private:
  void StartSums(int64_t outputs) const {
    for (int64_t i = 0; i < outputs * groups_; ++i) {
      const int64_t group = i / kTileOutputs % groups_;
      const __m512 start =
          plan_.starts == nullptr ? _mm512_setzero_ps() : _mm512_load_ps(plan_.starts + group * kLanes);
      _mm512_store_ps(plan_.sums + i * kLanes, start);
    }
  }
  float* SumsAt(int64_t o, int64_t group) const {
    return plan_.sums + (o / kTileOutputs * groups_ + group) * kTileSums;
  }
  int64_t Chunks() const { return (steps_ + plan_.chunk_steps - 1) / plan_.chunk_steps; }

  void MultiplyByOutputs(int64_t first, int64_t count, int64_t last) const {
    for (int64_t o = 0; o < count; o += kTileOutputs) {
      const int64_t next = first + o + kTileOutputs;
      Fetcher fetcher(layout_, next, Min(next + kTileOutputs, last), 0, steps_, Chunks() * kFetchTurns);
      unpacker_->SetOutputs(first, o, Min(o + kTileOutputs, count));
      for (int64_t step = 0; step < steps_; step += plan_.chunk_steps) MultiplyChunk(o, count, step, &fetcher);
    }
  }

  void MultiplyByColumns(int64_t first, int64_t count) const {
    unpacker_->SetOutputs(first, 0, count);
    for (int64_t step = 0; step < steps_; step += plan_.chunk_steps) {
      for (int64_t o = 0; o < count; o += kTileOutputs) {
        const bool last_tile = o + kTileOutputs >= count;
        const int64_t next = first + (last_tile ? 0 : o + kTileOutputs);
        const int64_t next_step = Min(last_tile ? step + plan_.chunk_steps : step, steps_);
        Fetcher fetcher(layout_, next, Min(next + kTileOutputs, first + count), next_step,
                        Min(next_step + plan_.chunk_steps, steps_), kFetchTurns);
        MultiplyChunk(o, count, step, plan_.fetch_columns ? &fetcher : nullptr);
      }
    }
  }

  void MultiplyChunk(int64_t o, int64_t count, int64_t step, Fetcher* fetcher) const {
    const int64_t last_step = Min(step + plan_.chunk_steps, steps_);
    unpacker_->Unpack(o, Min(o + kTileOutputs, count), step, last_step, fetcher);
    for (int64_t group = 0; group < groups_; group += plan_.groups_at_once) {
      const int64_t groups = Min(plan_.groups_at_once, groups_ - group);
      multiply_({o, step, last_step, group}, groups, SumsAt(o, group), fetcher);
    }
  }

  const Layout& layout_;
  const TilePlan& plan_;
  const int64_t groups_;
  const int64_t steps_;
  Unpacker* const unpacker_;
  const Multiply& multiply_;
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX512_TILES_H_
