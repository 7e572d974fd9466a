// AVX-512 kernels of floating-point weights for many activation rows in float32 arithmetic. The kept weights of 64
// columns become lists of values and columns; each is then one broadcast and a multiply-add for every sixteen rows,
// whose activations stay in the first-level cache. What is pruned is not multiplied.
#include "avx512_tiles.h"

namespace nm {
namespace {

constexpr int64_t kMostGroups = 8;  // of a panel: a step of it, 32 KB, stays in the first-level cache
constexpr int64_t kListSteps = 4;   // unpacked at a time

// Activations: float32[panel][column][group of the panel][row]; starts[row] is NaN where an activation is not finite:
// such a row's outputs are NaN in a dense product, and skipped weights must not hide it.
struct PackedPanels {
  int64_t columns;
  int64_t groups;
  int64_t panel_groups;
  size_t panels;
  size_t starts;
  size_t outliers;
  size_t total;

  PackedPanels(const Layout& l, int64_t rows) {
    columns = Steps(l) * kStep;
    groups = LaneGroups(rows);
    const int64_t count = (groups + kMostGroups - 1) / kMostGroups;
    panel_groups = (groups + count - 1) / count;
    Parts parts;
    panels = parts.Take(groups * columns * kLanes * 4);
    starts = parts.Take(groups * kLanes * 4);
    outliers = parts.Take(groups * OutlierGroupFloats(l) * 4);
    total = parts.total();
  }

  // Of the panel that begins with a group, and its first float.
  int64_t Groups(int64_t first) const { return Min(panel_groups, groups - first); }
  int64_t Start(int64_t first) const { return first * columns * kLanes; }
};

size_t PackedBytes(const Layout& l, int64_t rows) { return PackedPanels(l, rows).total; }

void Pack(const Layout& l, const float* a, int64_t first, int64_t count, int64_t rows, void* packed) {
  const PackedPanels p(l, rows);
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t group = first / kLanes;
  const int64_t first_group = group / p.panel_groups * p.panel_groups;
  float* panel = reinterpret_cast<float*>(base + p.panels) + p.Start(first_group);
  PackLanes(l, a, count, p.columns, panel + (group - first_group) * kLanes, p.Groups(first_group) * kLanes);
  if (l.row_outliers > 0) {
    float* lanes = reinterpret_cast<float*>(base + p.outliers) + group * OutlierGroupFloats(l);
    PackLanes(l, a, count, OutlierColumns(l), lanes);
  }
  float* starts = reinterpret_cast<float*>(base + p.starts) + first;
  for (int64_t row = 0; row < kLanes; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t column = 0; row < count && column < l.in_features; column += kLanes) {
      const __m512 values = _mm512_maskz_loadu_ps(FirstLanes(l.in_features - column), a + row * l.in_features + column);
      sum = _mm512_fmadd_ps(values, _mm512_setzero_ps(), sum);
    }
    starts[row] = Sum(sum);
  }
}

// The kept weights of one output and step.
struct alignas(64) KeptWeights {
  float values[kStep];
  uint8_t columns[kStep];
  int64_t count;
};

struct ListScratch {
  int64_t mask_bytes;  // of one output
  size_t masks;        // of each output of a band
  size_t lists;        // [kListSteps][kTileOutputs]
  size_t sums;
  size_t total;

  ListScratch(const Layout& l, int64_t rows) {
    const int64_t groups = LaneGroups(rows);
    const int64_t outputs = BandOutputs(groups);
    mask_bytes = RoundUp(static_cast<int64_t>(MaskReader::ScratchBytes(l)), 64);
    Parts parts;
    masks = parts.Take(outputs * mask_bytes);
    lists = parts.Take(kListSteps * kTileOutputs * static_cast<int64_t>(sizeof(KeptWeights)));
    sums = parts.Take(outputs / kTileOutputs * groups * kTileSums * 4);
    total = parts.total();
  }
};

size_t ScratchBytes(const Layout& l, int64_t rows) { return ListScratch(l, rows).total; }

template <int dtype>
constexpr int64_t kValueBytes = dtype == NM_FLOAT32 ? 4 : 2;

// Sixteen stored values, of which `count` may be read.
template <int dtype>
__m512 LoadValues(const uint8_t* v, int64_t count) {
  if constexpr (dtype == NM_FLOAT32) return _mm512_maskz_loadu_ps(FirstLanes(count), v);
  if constexpr (dtype == NM_FLOAT16) return HalvesToFloats(v, count);
  const __m256i bits = _mm256_maskz_loadu_epi16(FirstLanes(count), v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <int dtype, class Masks>
class ListUnpacker {
 public:
  ListUnpacker(const Layout& l, const ListScratch& plan, uint8_t* scratch)
      : layout_(l),
        plan_(plan),
        scratch_(scratch),
        lists_(reinterpret_cast<KeptWeights*>(scratch + plan.lists)),
        mask_reader_(l),
        last_step_(Steps(l) - 1),
        step_values_(l.dense ? kStep : kStep * l.n / l.m) {}

  void SetOutputs(int64_t band, int64_t begin, int64_t end) {
    band_ = band;
    for (int64_t i = begin; i < end; ++i) {
      masks_[i] = MasksOf<Masks>(mask_reader_, band + i, scratch_ + plan_.masks + i * plan_.mask_bytes);
    }
  }

  void Unpack(int64_t begin, int64_t end, int64_t first_step, int64_t last_step, Fetcher* fetcher) const {
    for (int64_t i = 0; i < kTileOutputs; ++i) {
      fetcher->Fetch(1);
      KeptWeights* list = lists_ + i;
      for (int64_t step = first_step; step < last_step; ++step, list += kTileOutputs) {
        if (begin + i < end) {
          MakeList(begin + i, step, list);
        } else {
          list->count = 0;
        }
      }
    }
  }

 private:
  void MakeList(int64_t i, int64_t step, KeptWeights* list) const {
    const int64_t first = step * step_values_;
    const uint8_t* v = layout_.values + (band_ + i) * layout_.value_bytes + first * kValueBytes<dtype>;
    const int64_t stored = Min(step_values_, layout_.row_values - first);
    uint64_t mask = ~uint64_t{0};
    if (!layout_.dense) mask = step == last_step_ ? masks_[i].Step(step) : masks_[i].PlainStep(step);
    list->count =
        Min(stored, _mm_popcnt_u32(static_cast<uint32_t>(mask)) + _mm_popcnt_u32(static_cast<uint32_t>(mask >> 32)));
    _mm512_store_si512(list->columns, _mm512_maskz_compress_epi8(mask, Columns()));
    for (int64_t j = 0; j < list->count; j += kLanes) {
      _mm512_store_ps(list->values + j, LoadValues<dtype>(v + j * kValueBytes<dtype>, Min(kLanes, stored - j)));
    }
  }

  static __m512i Columns() {
    alignas(64) static const uint8_t columns[kStep] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                       32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                       48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    return _mm512_load_si512(columns);
  }

  const Layout& layout_;
  const ListScratch& plan_;
  uint8_t* const scratch_;
  KeptWeights* const lists_;
  const MaskReader mask_reader_;
  const int64_t last_step_;
  const int64_t step_values_;
  int64_t band_ = 0;
  Masks masks_[kMostBandOutputs];
};

// The lists of a tile times a step of a panel: sums[group][kTileOutputs][16]. Each has two chains, for a
// product waits for the sum before it.
template <int groups>
void MultiplyLists(const KeptWeights* lists, const float* a, float* sums) {
  for (int64_t o = 0; o < kTileOutputs; ++o, sums += kLanes) {
    const KeptWeights& list = lists[o];
    __m512 chains[2][groups];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      chains[0][g] = _mm512_load_ps(sums + g * kTileSums);
      chains[1][g] = _mm512_setzero_ps();
    }
    const auto add = [&](int64_t i, uint64_t column, __m512(&to)[groups]) __attribute__((always_inline)) {
      const __m512 weight = _mm512_set1_ps(list.values[i]);
      const float* lanes = a + column * (groups * kLanes);
#pragma GCC unroll 8
      for (int g = 0; g < groups; ++g) to[g] = _mm512_fmadd_ps(weight, _mm512_load_ps(lanes + g * kLanes), to[g]);
    };
    int64_t i = 0;
    for (; i + 8 <= list.count; i += 8) {
      const uint64_t columns = Load64(list.columns + i);
#pragma GCC unroll 4
      for (int j = 0; j < 8; j += 2) {
        add(i + j, columns >> (8 * j) & 255, chains[0]);
        add(i + j + 1, columns >> (8 * j + 8) & 255, chains[1]);
      }
    }
    for (; i < list.count; ++i) add(i, list.columns[i], chains[0]);
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      _mm512_store_ps(sums + g * kTileSums, _mm512_add_ps(chains[0][g], chains[1][g]));
    }
  }
}

using MultiplyFunction = void (*)(const KeptWeights*, const float*, float*);
constexpr MultiplyFunction kMultiply[kMostGroups] = {MultiplyLists<1>, MultiplyLists<2>, MultiplyLists<3>,
                                                     MultiplyLists<4>, MultiplyLists<5>, MultiplyLists<6>,
                                                     MultiplyLists<7>, MultiplyLists<8>};

template <int dtype>
void Run(const Layout& l, int64_t rows, const void* packed, int64_t first, int64_t last, void* scratch, float* y,
         int64_t y_stride) {
  const PackedPanels p(l, rows);
  const ListScratch plan(l, rows);
  const uint8_t* activations = static_cast<const uint8_t*>(packed);
  uint8_t* memory = static_cast<uint8_t*>(scratch);
  const float* panels = reinterpret_cast<const float*>(activations + p.panels);
  const KeptWeights* lists = reinterpret_cast<const KeptWeights*>(memory + plan.lists);
  const auto multiply = [&](const Chunk& chunk, int64_t groups, float* sums, Fetcher* fetcher) {
    for (int64_t step = chunk.first_step; step < chunk.last_step; ++step) {
      const float* a = panels + p.Start(chunk.group) + step * kStep * groups * kLanes;
      kMultiply[groups - 1](lists + (step - chunk.first_step) * kTileOutputs, a, sums);
      fetcher->Fetch(kFetchTurns / kListSteps);
    }
  };
  const TilePlan tile_plan{rows,
                           INT64_MAX,  // a step of a panel should stay, whatever the size of all
                           kListSteps,
                           p.panel_groups,
                           reinterpret_cast<const float*>(activations + p.outliers),
                           l.dense ? nullptr : reinterpret_cast<const float*>(activations + p.starts),
                           reinterpret_cast<float*>(memory + plan.sums),
                           true};
  const auto run = [&](auto* unpacker) { TileRun(l, tile_plan, unpacker, multiply).Run(first, last, y, y_stride); };
  if (ReadsCodes(l, 1)) {
    ListUnpacker<dtype, CodeMasks> unpacker(l, plan, memory);
    run(&unpacker);
  } else {
    ListUnpacker<dtype, StoredMasks> unpacker(l, plan, memory);
    run(&unpacker);
  }
}

template <int dtype>
bool SupportsPanels(const Layout& l) {
  return Supports<dtype>(l) && l.in_features <= kMostTileColumns;
}

constexpr int64_t kLeastRows = 13;  // with fewer, kernels for few rows are faster

template <int dtype>
constexpr Kernel KernelOf(const char* name) {
  return {name,        Isa::kAvx512, false,        kLeastRows, kAny, SupportsPanels<dtype>,
          PackedBytes, Pack,         ScratchBytes, Run<dtype>};
}

constexpr Kernel kKernels[] = {
    KernelOf<NM_FLOAT32>("float32 panels"),
    KernelOf<NM_FLOAT16>("float16 panels"),
    KernelOf<NM_BFLOAT16>("bfloat16 panels"),
};

}  // namespace

KernelList Avx512FloatPanels() { return {kKernels, sizeof(kKernels) / sizeof(kKernels[0])}; }

}  // namespace nm
