// Weights of 128 columns as the AVX2 kernels for many rows of int8 activations multiply them.
#ifndef NM_KERNELS_AVX2_INTEGER_UNITS_H_
#define NM_KERNELS_AVX2_INTEGER_UNITS_H_

#include "avx2_positions.h"

namespace nm {
namespace {

constexpr int64_t kStepColumns = kPair;                 // unpacked at a time
constexpr int64_t kStepBlocks = kStepColumns / kBlock;  // vectors of a row in them
constexpr int64_t kStepValues = kStepColumns / 2;       // kept ones, where half are

// One step of one output, or of two where columns are picked: the lower half of each vector is the first's.
struct alignas(32) Unit {
  uint8_t controls[kStepBlocks][16];  // which columns are picked
  uint8_t weights[kStepBlocks][16];   // int4: signed; int8: magnitudes
  uint8_t signs[kStepBlocks][16];     // int8: all bits of the bytes of negative weights
  uint8_t starts[4][16];              // of the sums under each scale, 16 bits wide for int4, else 32
  float scales[4][4];
};

// Unpacks the weights of one step of columns at a time.
template <int dtype>
class Unpacker {
 public:
  explicit Unpacker(const Layout& l)
      : layout_(l),
        reader_(l),
        table_(IsHalf(l) && !l.bitmap ? GetColumnTable(l.m) : nullptr),
        join_positions_(l.bitmap   ? JoinPositions<MaskPairs<Order::kLanes>>
                        : l.m == 4 ? JoinPositions<CodePairs<12, Order::kLanes>>
                                   : JoinPositions<CodePairs<14, Order::kLanes>>),
        step_positions_(l.bitmap   ? 16
                        : l.m == 4 ? 12
                                   : 14),
        scale_columns_(UnitColumns(l)) {}

  // The columns that the next calls unpack.
  void SetStep(int64_t step) {
    step_ = step;
    first_value_ = step * kStepColumns / layout_.m * layout_.n;
    values_ = Min(kStepColumns / layout_.m * layout_.n, layout_.row_values - first_value_);
    blocks_ = Min(kStepBlocks, Blocks(layout_) - step * kStepBlocks);
    const int64_t columns = Min(kStepColumns, layout_.in_features - step * kStepColumns);
    odd_step_ = step > 0 && columns == kStep;
    in_place_ = columns == kStepColumns || odd_step_;
    for (int64_t i = 0; i * scale_columns_ < kStepColumns; ++i) {
      const int64_t column = step * kStepColumns + i * scale_columns_;
      groups_[i] = Min(column / layout_.scale_columns, layout_.row_scales - 1);
    }
  }

  // Two neighbouring outputs, or the same one twice; eight of every 16 columns.
  void Pick(int64_t first, int64_t second, Unit* to) const {
    if (in_place_) {
      const int64_t position = step_ * step_positions_;
      const uint8_t* positions = layout_.positions + position;
      join_positions_(positions + first * layout_.position_bytes, positions + second * layout_.position_bytes,
                      odd_step_, table_, to->controls[0]);
      __m256i a[2], b[2];
      StepValues(first, a);
      StepValues(second, b);
      JoinValues(a, b, to->weights[0]);
    } else {
      PickTail(first, second, to);
    }
    for (int64_t i = 0; i * scale_columns_ < kStepColumns; ++i) {
      const __m128 a = _mm_set_ss(Scale(first, i)), b = _mm_set_ss(Scale(second, i));
      _mm_store_ps(to->scales[i], _mm_shuffle_ps(a, b, 0));
    }
    Finish(to);
  }

  // One output, with zeros between the kept weights; masks of the step's blocks of 16 columns.
  void Spread(int64_t output, const uint16_t* masks, Unit* to) const {
    alignas(32) uint8_t values[kUnpacked];
    AnyValues(output, values);
    if (layout_.dense) {
      memcpy(to->weights, values, kStepColumns);
    } else {
      int64_t at = 0;
      for (int64_t i = 0; i < kStepBlocks; ++i) {
        const __m128i spread = _mm_shuffle_epi8(Load128(values + at), RanksOfMask(masks[i]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to->weights[i]), spread);
        at = Min(at + __builtin_popcount(masks[i]), kStepColumns);
      }
    }
    for (int64_t i = 0; i * scale_columns_ < kStepColumns; ++i) {
      _mm_store_ps(to->scales[i], _mm_set1_ps(Scale(output, i)));
    }
    Finish(to);
  }

 private:
  static constexpr int64_t kUnpacked = kStepColumns + 32;

  // The controls of eight blocks of two outputs from their positions; with odd_step of four, which end a row.
  template <class Pairs>
  static void JoinPositions(const uint8_t* first, const uint8_t* second, bool odd_step, const uint32_t* table,
                            uint8_t* controls) {
    Indices a, b;
    if (odd_step) {
      const __m256i none = _mm256_setzero_si256();
      a = {Pairs::LoadStep(first, table), none};
      b = {Pairs::LoadStep(second, table), none};
    } else {
      a = Pairs::Load(first, table);
      b = Pairs::Load(second, table);
    }
    Store256(controls, _mm256_unpacklo_epi64(a.first, b.first));
    Store256(controls + 32, _mm256_unpackhi_epi64(a.first, b.first));
    Store256(controls + 64, _mm256_unpacklo_epi64(a.second, b.second));
    Store256(controls + 96, _mm256_unpackhi_epi64(a.second, b.second));
  }

  // The signed weights of a whole step, or of an odd one and zeros.
  void StepValues(int64_t output, __m256i (&values)[2]) const {
    const uint8_t* row = layout_.values + output * layout_.value_bytes;
    if (dtype == NM_INT8) {
      values[0] = SignedOfInt8(Load256(row + first_value_));
      values[1] = odd_step_ ? _mm256_setzero_si256() : SignedOfInt8(Load256(row + first_value_ + 32));
      return;
    }
    const __m256i low_bits = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    const uint8_t* chunk = row + first_value_ / 2;
    if (odd_step_) {
      const __m128i packed = Load128(chunk);
      const __m256i nibbles = _mm256_and_si256(Lanes(packed, _mm_srli_epi16(packed, 4)), low_bits);
      values[0] = _mm256_sub_epi8(nibbles, eight);
      values[1] = _mm256_setzero_si256();
    } else {
      const __m256i packed = Load256(chunk);
      values[0] = _mm256_sub_epi8(_mm256_and_si256(packed, low_bits), eight);
      values[1] = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits), eight);
    }
  }

  static void JoinValues(const __m256i (&a)[2], const __m256i (&b)[2], uint8_t* joined) {
    for (int i = 0; i < 2; ++i) {  // blocks 0, 2, 1, 3 of both, then side by side
      const __m256i first = _mm256_permute4x64_epi64(a[i], 0xd8), second = _mm256_permute4x64_epi64(b[i], 0xd8);
      Store256(joined + 64 * i, _mm256_unpacklo_epi64(first, second));
      Store256(joined + 64 * i + 32, _mm256_unpackhi_epi64(first, second));
    }
  }

  // The controls and weights of a step that ends anywhere.
  void PickTail(int64_t first, int64_t second, Unit* to) const {
    alignas(32) uint64_t columns[2][kStepBlocks] = {};
    alignas(32) uint8_t values[2][kUnpacked];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t output = half == 0 ? first : second;
      reader_.Columns(output, step_ * kStepBlocks, RoundUp(blocks_, 4), columns[half]);
      AnyValues(output, values[half]);
    }
    for (int64_t i = 0; i < kStepBlocks; ++i) {
      memcpy(to->controls[i], &columns[0][i], 8);
      memcpy(to->controls[i] + 8, &columns[1][i], 8);
      memcpy(to->weights[i], values[0] + 8 * i, 8);
      memcpy(to->weights[i] + 8, values[1] + 8 * i, 8);
    }
  }

  // The signed weights of any pattern and width; zeros behind the last, up to a whole step and 16 more.
  void AnyValues(int64_t output, uint8_t* weights) const {
    const uint8_t* row = layout_.values + output * layout_.value_bytes;
    memset(weights, 0, kUnpacked);
    const int64_t chunk_start =
        dtype == NM_INT4 ? first_value_ / layout_.int4_chunk * layout_.int4_chunk : first_value_;
    alignas(32) uint8_t stored[kStepColumns + 2 * kLargestInt4Chunk];
    UnpackSigned(layout_, row, chunk_start, chunk_start + Needed(chunk_start), stored);
    memcpy(weights, stored + first_value_ - chunk_start, static_cast<size_t>(values_));
  }

  // Values from the start of a chunk that contain those of the step: whole chunks of int4.
  int64_t Needed(int64_t chunk_start) const {
    const int64_t last = first_value_ + values_;
    return Min(dtype == NM_INT4 ? RoundUp(last, layout_.int4_chunk) : last, layout_.row_values) - chunk_start;
  }

  float Scale(int64_t output, int64_t i) const { return ScaleOf(layout_, output, groups_[i]); }

  // What the tricks of MultiplyTile add to the sums, taken back at the start.
  void Finish(Unit* to) const {
    const int64_t vectors = scale_columns_ / kBlock / 2;
    uint8_t* weights = to->weights[0];
    uint8_t* signs = to->signs[0];
    for (int64_t i = 0; i * vectors < kStepBlocks / 2; ++i) {
      __m256i start = _mm256_setzero_si256();
      for (int64_t j = 0; j < vectors; ++j, weights += 32, signs += 32) {
        const __m256i w = Load256(weights);
        if (dtype == NM_INT4) {
          start = _mm256_sub_epi16(start, _mm256_maddubs_epi16(_mm256_set1_epi8(-128), w));
          continue;
        }
        const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), w);
        const __m256i magnitudes = _mm256_abs_epi8(w);
        Store256(signs, negative);
        Store256(weights, magnitudes);
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, negative);
        start = _mm256_sub_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
      const __m128i low = _mm256_castsi256_si128(start), high = _mm256_extracti128_si256(start, 1);
      const __m128i both = dtype == NM_INT4 ? _mm_add_epi16(low, high) : _mm_add_epi32(low, high);
      _mm_store_si128(reinterpret_cast<__m128i*>(to->starts[i]), both);
    }
  }

  const Layout& layout_;
  const PositionReader reader_;
  const uint32_t* table_;
  void (*const join_positions_)(const uint8_t*, const uint8_t*, bool, const uint32_t*, uint8_t*);
  const int64_t step_positions_;  // bytes
  const int64_t scale_columns_;
  int64_t step_ = 0;
  int64_t first_value_ = 0;
  int64_t values_ = 0;
  int64_t blocks_ = 0;      // of 16 columns
  bool odd_step_ = false;   // half of a step ends the row
  bool in_place_ = false;   // read without a copy
  int64_t groups_[4] = {};  // the weight's scale for each scale of activations
};

}  // namespace
}  // namespace nm

#endif  // NM_KERNELS_AVX2_INTEGER_UNITS_H_
