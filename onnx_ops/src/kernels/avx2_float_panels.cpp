// AVX2 kernels for many activation rows in float32 arithmetic. The kept weights of a few outputs and a chunk of columns
// become lists of (value, offset), once for all rows; each list then walks a slice of a panel that stays in the
// first-level cache. Only the multiplications of kept weights are done.
#include "avx2_expand.h"
#include "avx2_panels.h"

namespace nm {
namespace {

struct PackedPanels {
  size_t starts;  // floats: see PackStarts
  size_t panels;
  size_t total;

  explicit PackedPanels(const Panels& p) {
    starts = 0;
    panels = static_cast<size_t>(RoundUp(p.count * p.width(), 16)) * sizeof(float);
    total = panels + static_cast<size_t>(p.floats()) * sizeof(float);
  }
};

size_t PackedBytes(const Layout& l, int64_t rows) { return PackedPanels(Panels(l, rows)).total; }
size_t ScratchBytes(const Layout& l, int64_t rows) { return ListScratchBytes(l, rows); }

void Pack(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const Panels p(l, rows);
  const PackedPanels at(p);
  uint8_t* base = static_cast<uint8_t*>(packed);
  PackStarts(l, a, count, reinterpret_cast<float*>(base + at.starts) + first);
  PackPanels(l, p, a, first, count, reinterpret_cast<float*>(base + at.panels));
}

// ---------------------------------------------------------------------------------------------------------------------
// Stored values as floats, eight at a time; int4 once it is unpacked to signed bytes.

template <int dtype>
__m256 LoadFloats(const uint8_t* v) {
  if constexpr (dtype == NM_FLOAT32) return _mm256_loadu_ps(reinterpret_cast<const float*>(v));
  if constexpr (dtype == NM_FLOAT16) return _mm256_cvtph_ps(Load128(v));
  if constexpr (dtype == NM_BFLOAT16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(Load128(v)), 16));
  }
  __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(Load64(v)));
  if constexpr (dtype == NM_INT8) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

template <int dtype>
constexpr int64_t kValueBytes = dtype == NM_FLOAT32                    ? 4
                                : dtype == NM_INT8 || dtype == NM_INT4 ? 1
                                                                       : 2;

// `count` values from v, of which `readable` may be read; up to seven more floats are written.
template <int dtype>
void ConvertValues(const uint8_t* v, int64_t count, int64_t readable, float* floats) {
  constexpr int64_t kBytes = kValueBytes<dtype>;
  for (int64_t i = 0; i < count; i += kLanes) {
    if (i + kLanes <= readable) {
      _mm256_storeu_ps(floats + i, LoadFloats<dtype>(v + i * kBytes));
    } else {
      alignas(32) uint8_t rest[kLanes * 4] = {};
      memcpy(rest, v + i * kBytes, static_cast<size_t>((readable - i) * kBytes));
      _mm256_storeu_ps(floats + i, LoadFloats<dtype>(rest));
    }
  }
}

// Stored values first … first+count-1 of an output row, without their scales.
template <int dtype>
void RowValues(const Layout& l, int64_t output, int64_t first, int64_t count, float* floats) {
  const uint8_t* values = l.values + output * l.value_bytes;
  if constexpr (dtype == NM_INT4) {
    uint8_t bytes[kWideSlice + 2 * kLargestInt4Chunk];
    const int64_t start = first / l.int4_chunk * l.int4_chunk;
    UnpackSigned(l, values, start, Min(RoundUp(first + count, l.int4_chunk), l.row_values), bytes);
    ConvertValues<dtype>(bytes + first - start, count, RoundUp(count, kLanes), floats);
  } else {
    ConvertValues<dtype>(values + first * kValueBytes<dtype>, count, l.row_values - first, floats);
  }
}

// Multiplies the values of columns first … last-1 by their scales.
void ApplyScales(const Layout& l, int64_t output, int64_t first, int64_t last, const WeightList& list) {
  const uint8_t* scales = l.scales + output * l.row_scales * 2;
  float* floats = list.values;
  int64_t left = list.count;
  for (int64_t column = first; column < last;) {
    const int64_t group = column / l.scale_columns;
    const int64_t end = Min(last, (group + 1) * l.scale_columns);
    uint16_t half;
    memcpy(&half, scales + 2 * group, sizeof(half));
    const __m256 scale = _mm256_set1_ps(_cvtsh_ss(half));
    const int64_t count = Min((end - column + l.m - 1) / l.m * l.n, left);
    for (int64_t i = 0; i < count; i += kLanes) {
      const __m256 values = _mm256_loadu_ps(floats + i);
      const __m256 inside = _mm256_castsi256_ps(LaneMask(count - i));
      _mm256_storeu_ps(floats + i, _mm256_blendv_ps(values, _mm256_mul_ps(scale, values), inside));
    }
    floats += count;
    left -= count;
    column = end;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions as offsets into a slice.

// Offsets of eight columns, one a byte, from column `base` of the slice.
inline void StoreOffsets(uint64_t columns, int64_t base, int64_t stride, uint16_t* offsets) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<int64_t>(columns)));
  const __m128i shifted = _mm_add_epi16(wide, _mm_set1_epi16(static_cast<short>(base)));
  const __m128i scaled = _mm_mullo_epi16(shifted, _mm_set1_epi16(static_cast<short>(stride)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), scaled);
}

// The kept weights of one output row at a time, as PanelProduct wants them.
template <int dtype>
class KeptWeights {
 public:
  explicit KeptWeights(const Layout& l) : layout_(l), reader_(l), half_(2 * l.n == l.m && l.m <= 16) {}

  void SetChunk(int64_t output, int64_t chunk) {
    output_ = output;
    chunk_ = chunk;
    PrefetchChunk(Min(output + 8, layout_.out_features - 1));
    const int64_t first = chunk * (kChunk / kBlock);
    const int64_t blocks = Min(kChunk / kBlock, (layout_.groups * layout_.m + kBlock - 1) / kBlock - first);
    if (half_) {
      reader_.Columns(output, first, RoundUp(blocks, 4), columns_);
    } else if (!layout_.dense) {
      memset(masks_, 0, sizeof(masks_));
      reader_.Masks(output, first, blocks, masks_);
    }
  }

  void Append(int64_t begin, int64_t end, int64_t stride, int64_t* cursor, WeightList* list) const {
    const Layout& l = layout_;
    const int64_t first_value = begin / l.m * l.n;
    list->count = Min((end - begin + l.m - 1) / l.m * l.n, l.row_values - first_value);
    Offsets((begin - chunk_ * kChunk) / kBlock, list->count, stride, list->offsets);
    RowValues<dtype>(l, output_, first_value, list->count, list->values);
    if (l.row_scales > 0) ApplyScales(l, output_, begin, end, *list);
    if (l.row_outliers > 0) AppendOutliers(l, output_, begin, end, stride, cursor, list);
  }

 private:
  // An output's rows lie apart, too short in a chunk for the hardware to see a stream.
  void PrefetchChunk(int64_t output) const {
    const int64_t columns = layout_.in_features;
    const int64_t first = chunk_ * kChunk;
    const int64_t last = Min(first + kChunk, columns);
    const auto prefetch = [&](const uint8_t* row, int64_t bytes) {
      const uint8_t* end = row + last * bytes / columns;
      for (const uint8_t* p = row + first * bytes / columns; p < end; p += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
      }
    };
    prefetch(layout_.values + output * layout_.value_bytes, layout_.value_bytes);
    prefetch(layout_.positions + output * layout_.position_bytes, layout_.position_bytes);
    prefetch(layout_.outlier_values + output * layout_.outlier_bytes, layout_.outlier_bytes);
  }

  // Offsets of the first `count` kept columns from block `block` of the chunk on; up to eight more are written.
  void Offsets(int64_t block, int64_t count, int64_t stride, uint16_t* offsets) const {
    if (half_) {
      for (int64_t i = 0; i < count; i += 8) StoreOffsets(columns_[block + i / 8], 2 * i, stride, offsets + i);
      return;
    }
    if (layout_.dense) {
      for (int64_t i = 0; i < count; i += 8) StoreOffsets(0x0706050403020100, i, stride, offsets + i);
      return;
    }
    int64_t at = 0;
    for (int64_t base = 0; at < count; ++block, base += kBlock) {
      const bool inside = block < kChunk / kBlock;  // hostile masks may have fewer bits than there are values
      const uint32_t mask = inside ? masks_[block] : 0xffff;
      StoreOffsets(kByteTables.kept[mask & 255], inside ? base : 0, stride, offsets + at);
      at = Min(at + __builtin_popcount(mask & 255), count);
      StoreOffsets(kByteTables.kept[mask >> 8], inside ? base + 8 : 0, stride, offsets + at);
      at = Min(at + __builtin_popcount(mask >> 8), count);
    }
  }

  const Layout& layout_;
  const PositionReader reader_;
  const bool half_;  // eight of sixteen columns everywhere, in columns_
  int64_t output_ = 0;
  int64_t chunk_ = 0;
  uint64_t columns_[kChunk / kBlock];
  uint16_t masks_[kChunk / kBlock];
};

template <int dtype>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const PackedPanels at{Panels(l, rows)};
  const uint8_t* base = static_cast<const uint8_t*>(packed);
  const float* starts = l.dense ? nullptr : reinterpret_cast<const float*>(base + at.starts);
  const float* panels = reinterpret_cast<const float*>(base + at.panels);
  for (int64_t tile = first; tile < last; tile += kTile) {
    PanelProduct<KeptWeights<dtype>>(l, rows, panels, tile, Min(kTile, last - tile), scratch)
        .Run(starts, y + tile - first, y_stride);
  }
}

template <int dtype>
bool Supports(const Layout& l) {
  return l.dtype == dtype;
}

constexpr int64_t kAny = INT64_MAX;
constexpr Kernel kKernels[] = {
    {"float32 panels", Isa::kAvx2, false, 1, kAny, Supports<NM_FLOAT32>, PackedBytes, Pack, ScratchBytes,
     Run<NM_FLOAT32>},
    {"float16 panels", Isa::kAvx2, false, 1, kAny, Supports<NM_FLOAT16>, PackedBytes, Pack, ScratchBytes,
     Run<NM_FLOAT16>},
    {"bfloat16 panels", Isa::kAvx2, false, 1, kAny, Supports<NM_BFLOAT16>, PackedBytes, Pack, ScratchBytes,
     Run<NM_BFLOAT16>},
    {"int8 panels", Isa::kAvx2, false, 1, kAny, Supports<NM_INT8>, PackedBytes, Pack, ScratchBytes, Run<NM_INT8>},
    {"int4 panels", Isa::kAvx2, false, 1, kAny, Supports<NM_INT4>, PackedBytes, Pack, ScratchBytes, Run<NM_INT4>},
};

}  // namespace

KernelList Avx2FloatPanels() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
