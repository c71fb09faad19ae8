// SPDX-License-Identifier: Apache-2.0
// sla's mask: score and select (choose); lists to and from codes (compress, expand).
//
//   choose    a block of threads owns eight query blocks of one head; their scores against all key
//             blocks stay in shared memory, where each warp selects of one row
//   compress  a warp owns a row of a CSR; where it begins is known by the counts of the rows before
//   expand    and back: a warp marks the blocks of one row
//
// Scores are float32 sums by FFMA: TF32 would order by chance what differs by less than 2^-11.
// Four lanes share a key block: lane t adds channels 32 i + 8 t + {0 ... 7} in ascending order,
// then (lane 0 + lane 2) + (lane 1 + lane 3).
//
// Nothing is sorted.  A threshold is found by digits of eight bits from the highest: how much of a
// row has the digits so far and each next one (256 bins, of which lane l sums 8 l to 8 l + 7), and
// which digit reaches what is still needed.  For topk a block counts 1.  For topp it counts its
// probability as an integer of 24 bits, so that sums are exact in any order and every run selects
// the same.
//
// Floors: choose B H rows n D FMA over 128 per clock and SM, and a read of k for every eight rows,
// from L2; compress and expand B H rows n bytes and the lists over the memory bandwidth.
#pragma once
#include "common/approx.h"
#include "common/atomic.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/shared.h"
#include "rope_kv/chunk.h"
#include "sla/pool.h"

namespace reeltime {
namespace sla_sm80 {

constexpr int kMaskWarps = 8, kMaskThreads = 32 * kMaskWarps;
constexpr int kRows = kMaskWarps;  // of one block of threads: each warp selects of one
constexpr int kMostShared = 2048;  // key blocks of rows whose scores stay in shared memory
constexpr int kMostBlocks = 1 << 20;

// Probabilities as integers: kOne, in two parts below and above kPart, of each of which kMostBlocks
// stay below 2^32.
constexpr uint32_t kPart = 1 << 12;
constexpr float kOne = 1 << 24;

DEVICE unsigned lower_lanes() { return (1u << lane_index()) - 1; }

// --- Scores --------------------------------------------------------------------------------------

// How much of a row has each digit, in two parts of which neither overflows.
struct Bins {
  alignas(16) uint32_t low[256];
  alignas(16) uint32_t high[256];
};

struct ChooseStorage {
  alignas(16) float q[kRows][kWidest];
  Bins bins[kMaskWarps];
  uint32_t keys[kRows];  // the first of [kRows, n], or none
};

constexpr uint32_t kHighest = 0xffffffffu;  // of NaN
constexpr uint32_t kLowest = 0x007fffffu;   // of -infinity

// Scores as integers of the same order: NaN first, zeros equal.
DEVICE uint32_t key_of(float score) {
  if (score != score) return kHighest;
  const uint32_t bits = bits_of(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float score_of(uint32_t key) {
  return float_of(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Eight rows of q times the scale, one by each warp; zeros where there is nothing.
DEVICE void load_queries(ChooseStorage& shared, const ChooseBlocksParams& p, int64_t start,
                         int row) {
  const int width = ceil_div(p.D, 4 * kChunk) * 4 * kChunk;
  for (int d = static_cast<int>(lane_index()); d < width; d += 32) {
    const bool held = row < p.rows && d < p.D;
    shared.q[warp_index()][d] =
        held ? load_float(p.q, p.q_dtype, start + row * p.stride_qn + d) * p.sm_scale : 0.0f;
  }
}

// One head's key blocks.
struct Columns {
  const ChooseBlocksParams& p;
  const int64_t start;   // elements of k before those of this head
  const uint8_t* guard;  // of this head, or null
  const int count;

  DEVICE Columns(const ChooseBlocksParams& p, int64_t b, int kv_head)
      : p(p),
        start(b * p.stride_kb + kv_head * p.stride_kh),
        guard(p.similar_k ? p.similar_k + b * p.stride_lb + kv_head * p.stride_lh : nullptr),
        count(p.T * p.per_slot) {}
  DEVICE int64_t slot(int column) const { return p.table ? p.table[column / p.per_slot] : 0; }
  DEVICE int64_t offset(int column) const {
    return p.offset_index ? p.offset_index[column / p.per_slot] : 0;
  }
  // Of the whole warp: how many are not absent.
  DEVICE int present() const {
    if (!p.table) return count;
    int entries = 0;
    for (int i = static_cast<int>(lane_index()); i < p.T; i += 32) entries += p.table[i] >= 0;
    return warp_reduce(entries, Sum()) * p.per_slot;
  }
  DEVICE bool unlike(int column) const { return guard && !guard[column * p.stride_ln]; }
};

// Eight channels of a key block, on their way as soon as they are asked for.
template <class K>
struct Channels {
  Words<K> words;
  DEVICE void load(const ChooseBlocksParams& p, int64_t at, int inside) {
    words.load_shared(static_cast<const K*>(p.k) + at, inside);
  }
  DEVICE void expand(float (&x)[kChunk]) const { words.expand(x); }
};
template <>
struct Channels<Any> {
  float at[kChunk];
  DEVICE void load(const ChooseBlocksParams& p, int64_t from, int inside) {
#pragma unroll
    for (int e = 0; e < kChunk; e++)
      at[e] = e < inside ? load_float(p.k, p.k_dtype, from + e) : 0.0f;
  }
  DEVICE void expand(float (&x)[kChunk]) const {
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[e] = at[e];
  }
};

// Keys of eight rows x 32 columns, those of one offset, by one warp: lanes 4 g to 4 g + 3 have
// columns g, g + 8, g + 16 and g + 24, lane t of them every fourth chunk of channels.
template <class K>
DEVICE void score_columns(const ChooseStorage& shared, const Columns& columns, int first,
                          int offset, uint32_t* keys, int rows) {
  constexpr int kColumns = 4, kLanes = 4, kStep = kLanes * kChunk;
  const ChooseBlocksParams& p = columns.p;
  const int t = static_cast<int>(lane_index()) % kLanes;
  first += static_cast<int>(lane_index()) / kLanes;
  int64_t from[kColumns];
  bool mine[kColumns], held[kColumns], any = false;  // absent ones are the first offset's
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    const int column = first + 8 * c;
    const bool inside = column < columns.count;
    const int64_t slot = inside ? columns.slot(column) : -1;
    mine[c] = inside && offset == (slot < 0 ? 0 : columns.offset(column));
    held[c] = mine[c] && slot >= 0;
    from[c] = columns.start + max(slot, int64_t{0}) * p.stride_ks +
              column % p.per_slot * p.stride_kn + t * kChunk;
    any |= mine[c];
  }
  if (!ballot(any)) return;

  // Products, with the next channels on their way
  float sum[kRows][kColumns] = {};
  Channels<K> next[kColumns];
  auto load = [&](int d) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
      next[c].load(p, from[c] + d, held[c] ? min(p.D - d - t * kChunk, kChunk) : 0);
  };
  load(0);
#pragma unroll 1
  for (int d = 0; d < p.D; d += kStep) {
    float k[kColumns][kChunk];
#pragma unroll
    for (int c = 0; c < kColumns; c++) next[c].expand(k[c]);
    if (d + kStep < p.D) load(d + kStep);
#pragma unroll
    for (int row = 0; row < kRows; row++)
#pragma unroll
      for (int half = 0; half < kChunk; half += 4) {
        const auto& at = shared.q[row][d + t * kChunk + half];
        const Vector<float> q = *reinterpret_cast<const Vector<float>*>(&at);
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
          for (int c = 0; c < kColumns; c++)
            sum[row][c] = fmaf(q.at[e], k[c][half + e], sum[row][c]);
      }
  }

  // Four lanes exchange rows for channels: lane t gets rows 2 t and 2 t + 1
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    float four[4], two[2];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float low = sum[r][c], high = sum[r + 4][c];
      four[r] = (t & 2 ? high : low) + shuffle_xor(t & 2 ? low : high, 2);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float low = four[r], high = four[r + 2];
      two[r] = (t & 1 ? high : low) + shuffle_xor(t & 1 ? low : high, 1);
    }
    const int column = first + 8 * c;
    const bool ranked = held[c] && !columns.unlike(column);
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (mine[c] && 2 * t + r < rows)
        keys[int64_t{2 * t + r} * columns.count + column] = ranked ? key_of(two[r]) : kLowest;
  }
}

// --- Select --------------------------------------------------------------------------------------

// Of a row: the blocks with a larger key, and the first `equal` of those with this one.
struct Cut {
  uint32_t key;
  int equal;
  int seen = 0;  // equal ones, as the warp goes through the row

  DEVICE bool takes(bool inside, uint32_t it) {
    if (equal == 0) return inside && it > key;
    const bool level = inside && it == key;
    const unsigned levels = ballot(level);
    const int before = seen + count_bits(levels & lower_lanes());
    seen += count_bits(levels);
    return inside && (it > key || (level && before < equal));
  }
};

// The largest key such that blocks with it or a larger one weigh `need` or more; and how much of
// that those with this very key must weigh.
template <class Weigh>
DEVICE uint32_t threshold(Bins& bins, const uint32_t* keys, int n, uint64_t& need, Weigh weigh) {
  const int lane = static_cast<int>(lane_index());
  auto* low = reinterpret_cast<Vector<uint32_t>*>(bins.low + 8 * lane);
  auto* high = reinterpret_cast<Vector<uint32_t>*>(bins.high + 8 * lane);
  uint32_t found = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    // What has each digit, of all that has the digits before it
    low[0] = low[1] = high[0] = high[1] = Vector<uint32_t>{};
    sync_warp();  // no block is counted before
    const uint32_t before = shift < 24 ? ~0u << (shift + 8) : 0;
#pragma unroll 4
    for (int i = lane; i < n; i += 32) {
      const uint32_t key = keys[i], digit = key >> shift & 255;
      if ((key ^ found) & before) continue;
      const uint32_t weight = weigh(key);
      atomic_add(&bins.low[digit], weight % kPart);
      if (weight >= kPart) atomic_add(&bins.high[digit], weight / kPart);
    }
    sync_warp();  // every block is counted

    // Sums from the highest digit down; one lane has the digit that reaches the need
    uint64_t weight[8], mine = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      weight[e] = low[e / 4].at[e % 4] + uint64_t{high[e / 4].at[e % 4]} * kPart;
      mine += weight[e];
    }
    uint64_t sum = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t higher = shuffle(sum, lane + distance);
      sum += lane + distance < 32 ? higher : 0;
    }
    uint64_t rest = need - (sum - mine);
    uint32_t digit = 8 * lane + 7;
#pragma unroll
    for (int e = 7; e > 0; e--)
      if (digit == static_cast<uint32_t>(8 * lane + e) && rest > weight[e])
        rest -= weight[e], digit--;
    const unsigned reaches = ballot(sum - mine < need && need <= sum);
    found |= shuffle(digit, first_lane(reaches)) << shift;
    need = shuffle(rest, first_lane(reaches));
  }
  return found;
}

// The first `need` blocks.
DEVICE Cut by_rank(Bins& bins, const uint32_t* keys, int n, int need) {
  if (need <= 0) return {kHighest, 0};
  if (need >= n) return {0, 0};
  uint64_t rest = static_cast<uint64_t>(need);
  const uint32_t key = threshold(bins, keys, n, rest, [](uint32_t) { return 1u; });
  return {key, static_cast<int>(rest)};
}

// The fewest blocks whose softmax sums to topp; none where there is no softmax, because of NaN, or
// of infinity, which come first.
DEVICE Cut by_mass(Bins& bins, const uint32_t* keys, int n, float topp) {
  uint32_t largest = 0;
  for (int i = static_cast<int>(lane_index()); i < n; i += 32) largest = max(largest, keys[i]);
  const float top = score_of(warp_reduce(largest, Max()));
  if (!(top - top == 0.0f)) return {kHighest, 0};
  auto mass = [top](uint32_t key) {
    return static_cast<uint32_t>(exp2_approx((score_of(key) - top) * kLog2E) * kOne + 0.5f);
  };
  uint64_t total = 0;
  for (int i = static_cast<int>(lane_index()); i < n; i += 32) total += mass(keys[i]);
  total = warp_reduce(total, Sum());
  // Blocks before the last one that is taken weigh less than topp of all
  uint64_t need = static_cast<uint64_t>(ceil(static_cast<double>(total) * topp));
  const uint32_t key = threshold(bins, keys, n, need, mass);
  return {key, static_cast<int>((need + mass(key) - 1) / mass(key))};
}

// One row: codes, list, counts.  NOTE: absent blocks and those that are not ranked take part as
// -infinity, so that ranks are those of whole rows.
DEVICE void select_row(Bins& bins, const Columns& columns, const uint32_t* keys, int i, bool alike,
                       int64_t row) {
  const ChooseBlocksParams& p = columns.p;
  const int n = columns.count, lane = static_cast<int>(lane_index());
  const bool wants_all = p.code || p.count;
  Cut top = by_rank(bins, keys, n, p.topk), near{kHighest, 0}, lowest{0, 0};
  if (p.topp > 0.0f) near = by_mass(bins, keys, n, p.topp);
  if (wants_all) {
    const int present = columns.present();
    const float dropped = floorf(static_cast<float>(present) * p.negligible);
    lowest = by_rank(bins, keys, n, present - static_cast<int>(dropped));
  }

  int* blocks = p.blocks ? p.blocks + row * p.capacity : nullptr;
  int selected = 0, marginal = 0;
  for (int start = 0; start < n; start += 32) {
    const int column = start + lane;
    const bool inside = column < n;
    const uint32_t key = inside ? keys[column] : 0;
    const bool held = inside && columns.slot(column) >= 0;
    // NOTE: each of the three looks at all lanes
    const bool by_topk = top.takes(inside, key), by_topp = near.takes(inside, key);
    const bool counts = lowest.takes(inside, key);
    const bool taken = held && (by_topk || by_topp || !alike || columns.unlike(column));
    const unsigned all = ballot(taken);
    if (blocks && taken) blocks[selected + count_bits(all & lower_lanes())] = column;
    selected += count_bits(all);
    if (wants_all) marginal += count_bits(ballot(held && !taken && counts));
    if (p.code && inside)
      p.code[row * n + column] = static_cast<int8_t>(!held ? 0 : taken ? 1 : counts ? 2 : 3);
  }
  if (lane) return;
  if (p.bounds) {
    p.bounds[2 * row] = i * p.capacity;
    p.bounds[2 * row + 1] = i * p.capacity + selected;
  }
  if (p.count) {
    p.count[row] = selected;
    p.count[int64_t{p.B} * p.H * p.rows + row] = marginal;
  }
}

// Blocks of threads: tiles of rows first, which read the same keys.
template <class K>
__global__ void __launch_bounds__(kMaskThreads, 1) choose_kernel(const ChooseBlocksParams p) {
  auto& shared = shared_storage<ChooseStorage>();
  const int tiles = ceil_div(p.rows, kRows), warp = static_cast<int>(warp_index());
  const int first = static_cast<int>(blockIdx.x % tiles) * kRows;
  const int h = static_cast<int>(blockIdx.x / tiles % p.H);
  const int64_t b = blockIdx.x / tiles / p.H;
  const Columns columns(p, b, h / (p.H / p.H_kv));
  const int64_t row = (b * p.H + h) * p.rows + first;
  uint32_t* keys = p.keys ? p.keys + row * columns.count : shared.keys;

  // Scores, offset by offset
  for (int offset = 0; offset < p.O; offset++) {
    if (offset > 0) sync_block();  // queries of the offset before have been read
    load_queries(shared, p, offset * p.stride_qo + b * p.stride_qb + h * p.stride_qh, first + warp);
    sync_block();
    for (int column = 32 * warp; column < columns.count; column += kMaskThreads)
      score_columns<K>(shared, columns, column, offset, keys, min(p.rows - first, kRows));
  }
  sync_block();  // rows are whole

  // A row by each warp
  const int i = first + warp;
  if (i >= p.rows) return;
  const bool alike =
      !p.similar_q || p.similar_q[b * p.stride_gb + i * p.stride_gn + h * p.stride_gh];
  select_row(shared.bins[warp], columns, keys + int64_t{warp} * columns.count, i, alike,
             row + warp);
}

// --- CSR -----------------------------------------------------------------------------------------

// Warps: first those of the selected blocks' rows, then those of the marginal ones'.
__global__ void __launch_bounds__(kMaskThreads) compress_kernel(const CompressCodesParams p) {
  const int64_t all = int64_t{p.heads} * p.rows;
  const int64_t item = int64_t{blockIdx.x} * kMaskWarps + warp_index();
  if (item >= 2 * all) return;
  const bool is_marginal = item >= all;
  const int64_t row = item - (is_marginal ? all : 0), head = row / p.rows;
  const int i = static_cast<int>(row % p.rows), lane = static_cast<int>(lane_index());
  const int capacity = is_marginal ? p.n : p.capacity, room = p.rows * capacity;
  int* indptr = (is_marginal ? p.marginal_indptr : p.selected_indptr) + head * (p.rows + 1);
  int* indices = (is_marginal ? p.marginal_indices : p.selected_indices) + head * room;

  // Where this row begins and where all of them end
  const int* count = p.count + item - i;
  int begin = 0, end = 0;
  for (int m = lane; m < p.rows; m += 32) {
    begin += m < i ? count[m] : 0;
    end += count[m];
  }
  begin = warp_reduce(begin, Sum()), end = warp_reduce(end, Sum());
  if (lane == 0) {
    indptr[i + 1] = begin + count[i];
    if (i == 0) indptr[0] = 0;
  }

  // Its blocks, ascending; beyond the last row of all, this row's share of -1
  for (int start = 0; start < p.n; start += 32) {
    const int column = start + lane;
    const bool mine = column < p.n && p.code[row * p.n + column] == (is_marginal ? 2 : 1);
    const unsigned found = ballot(mine);
    const int to = begin + count_bits(found & lower_lanes());
    if (mine && to < room) indices[to] = column;
    begin += count_bits(found);
  }
  for (int slot = max(i * capacity, end) + lane; slot < (i + 1) * capacity; slot += 32)
    indices[slot] = -1;
}

// A warp owns one row of one head.
__global__ void __launch_bounds__(kMaskThreads) expand_kernel(const ExpandListsParams p) {
  const int64_t row = int64_t{blockIdx.x} * kMaskWarps + warp_index();
  const int lane = static_cast<int>(lane_index());
  if (row >= int64_t{p.B} * p.H * p.rows) return;
  const int64_t i = row % p.rows, h = row / p.rows % p.H, b = row / p.rows / p.H;
  int8_t* code = p.code + row * p.n;
  for (int column = lane; column < p.n; column += 32) code[column] = 0;
  sync_warp();  // a zero does not come after a one

  const int* indptr = p.indptr + b * p.stride_pb + h * p.stride_ph + i * p.stride_pn;
  const int* indices = p.indices + b * p.stride_ib + h * p.stride_ih;
  const int end = min(indptr[p.stride_pn], p.room);
  for (int at = indptr[0] + lane; at < end; at += 32) {
    const int column = indices[at * p.stride_in];
    if (column >= 0 && column < p.n) code[column] = 1;
  }
}

// --- Launchers -----------------------------------------------------------------------------------

// A warp per row.
template <class Params>
cudaError_t launch_rows(void (*kernel)(Params), const Params& p, int64_t rows,
                        cudaStream_t stream) {
  const int64_t blocks = (rows + kMaskWarps - 1) / kMaskWarps;
  if (!fits_grid(blocks)) return cudaErrorInvalidValue;
  return launch(kernel, {dim3(static_cast<unsigned>(blocks)), kMaskThreads}, stream, p);
}

template <class K>
cudaError_t launch_choose(const ChooseBlocksParams& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.B} * p.H * ceil_div(p.rows, kRows);
  if (!fits_grid(blocks)) return cudaErrorInvalidValue;
  const size_t keys = p.keys ? 0 : sizeof(uint32_t) * kRows * p.T * p.per_slot;
  const Launch how{dim3(static_cast<unsigned>(blocks)), kMaskThreads,
                   offsetof(ChooseStorage, keys) + keys};
  return launch(choose_kernel<K>, how, stream, p);
}

}  // namespace sla_sm80
}  // namespace reeltime
