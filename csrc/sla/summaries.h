// SPDX-License-Identifier: Apache-2.0
// sla's summaries of key blocks, h = phi(K)^T V and z = sum of phi(K), and sums of them.
//
//   sum all    a warp owns 128 neighbouring floats of h or z, its block's eight warps every eighth
//              summary; what they have is added in the order of the warps
//   sum some   [rows, n] x [n, D E], the left operand 0 or 1 and exact in bfloat16, h as three of
//              its terms.  A block of threads owns 64 rows and 256 columns, a warp 32 of them.  It
//              copies h as the operand lies in registers, so a lane waits for its own copies alone,
//              without a barrier, and those of four steps of 16 blocks are on their way
//   keys       a block of threads owns a run of keys of one head, a warp 32 x 64 of their h
//
// Floors: h once, 4 D E bytes per summary, over the memory bandwidth; for up to 64 rows in place of
// one also 2 x 64 rows x 3 terms x D E flops, 96 per byte of h.  keys: S (D + E) itemsize bytes and
// 2 S D E flops per head.
#pragma once
#include "common/convert.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/ldmatrix.h"
#include "common/shared.h"
#include "common/swizzle.h"
#include "sla/terms.h"

namespace reeltime {
namespace sla_sm80 {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// --- Where summaries are, where sums go ----------------------------------------------------------

// The summary of block `column` among all of a batch, or -1 if it is absent or another offset's.
DEVICE int find_summary(const SumSummariesParams& p, int column, int offset) {
  if (column >= p.T * p.per_slot) return -1;
  const int entry = column / p.per_slot;
  const int64_t slot = p.table ? p.table[entry] : 0;
  const int64_t owner = p.offset_index ? p.offset_index[entry] : 0;
  if (slot < 0 || slot >= p.slots || owner != offset) return -1;
  return static_cast<int>(slot) * p.per_slot + column % p.per_slot;
}

// Four neighbours of a sum: of a matrix [D, E] at element `at`, or of Z where `area` is D.
DEVICE void store_four(void* sum, int terms, int64_t matrix, int area, int at, Vector<float> x) {
  if (terms == 0) {
    store_vector(static_cast<float*>(sum) + matrix * area + at, x);
    return;
  }
  bfloat16* to = static_cast<bfloat16*>(sum) + matrix * terms * area + at;
  for (int term = 0; term < terms; term++, to += area) {
    const uint64_t low = take_term(x.at[0], x.at[1]), high = take_term(x.at[2], x.at[3]);
    *reinterpret_cast<uint64_t*>(to) = high << 32 | low;
  }
}

// --- All -----------------------------------------------------------------------------------------

struct AllConfig {
  static constexpr int kAhead = 8;  // summaries of a lane on their way
};

struct AllStorage {
  Vector<float> part[kWarps][32];
};

// blockIdx.x: columns of h of all heads, then of z; blockIdx.y: offset and batch.
__global__ void __launch_bounds__(kThreads, 4) sum_all_kernel(const SumSummariesParams p) {
  constexpr int kAhead = AllConfig::kAhead;
  auto& shared = shared_storage<AllStorage>();
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  const int offset = static_cast<int>(blockIdx.y) / p.B, b = static_cast<int>(blockIdx.y) % p.B;
  const int h_blocks = ceil_div(p.H * p.D * p.E, 128), block = static_cast<int>(blockIdx.x);
  const bool of_z = block >= h_blocks;
  const int area = of_z ? p.D : p.D * p.E, width = p.H * area;
  const int column = (of_z ? block - h_blocks : block) * 128 + lane * 4;
  const int64_t summaries = int64_t{p.slots} * p.per_slot;
  const float* from = (of_z ? p.z : p.h) + b * summaries * width + column;

  // Every eighth summary
  Vector<float> total{};
  for (int first = warp; first < p.T * p.per_slot; first += kWarps * kAhead) {
    Vector<float> x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int64_t found = find_summary(p, first + i * kWarps, offset);
      x[i] = Vector<float>{};
      if (found >= 0 && column < width) x[i] = load_streaming(from + found * width);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) total.at[e] += x[i].at[e];
  }

  // In the order of the warps
  shared.part[warp][lane] = total;
  sync_block();
  if (warp > 0 || column >= width) return;
  Vector<float> sum{};
#pragma unroll
  for (int i = 0; i < kWarps; i++) {
    const Vector<float> part = shared.part[i][lane];
#pragma unroll
    for (int e = 0; e < 4; e++) sum.at[e] += part.at[e];
  }
  const int64_t matrix = int64_t{blockIdx.y} * p.H + column / area;
  if (of_z)
    store_four(p.sum_z, 0, matrix, area, column % area, sum);
  else
    store_four(p.sum_h, p.terms, matrix, area, column % area, sum);
}

// --- Some ----------------------------------------------------------------------------------------

struct SomeConfig {
  static constexpr int kRows = 64, kBlocks = 64, kSteps = kBlocks / 16;  // of a chunk
  static constexpr int kColumns = 32 * kWarps;
  static constexpr int kRowBytes = 2 * kBlocks;
  static constexpr int kChunks = 3;  // one in use, one being copied, one being looked up
};

// Which of 64 blocks are added to which row.
struct Included {
  alignas(
      128) unsigned char include[SomeConfig::kRows * SomeConfig::kRowBytes];  // bfloat16, swizzled
  int summary[SomeConfig::kBlocks];
  unsigned present[SomeConfig::kBlocks / 32];

  DEVICE bool any() const { return present[0] | present[1]; }
};

struct SomeStorage {
  Included chunks[SomeConfig::kChunks];
  Vector<float> copied[SomeConfig::kSteps][kWarps][4][32];
};

// A thread looks up 16 blocks of a row, and of the first two warps one block each.
DEVICE void look_up(Included& chunk, const SumSummariesParams& p, int64_t head, int first_row,
                    int first, int offset) {
  constexpr int kOwn = SomeConfig::kRows * SomeConfig::kBlocks / kThreads;
  static_assert(kOwn == 16, "two chunks of 16 bytes");
  const int thread = opaque(static_cast<int>(threadIdx.x));  // or addresses wait in registers
  const int n = p.T * p.per_slot, row = thread / 4, column = first + thread % 4 * kOwn;
  const int8_t* code = p.code + (head * p.rows + first_row + row) * n + column;
  Vector<uint32_t> words[2] = {};
#pragma unroll
  for (int i = 0; i < kOwn; i++)
    if (first_row + row < p.rows && column + i < n && p.covered >> code[i] & 1)
      words[i / 8].at[i / 2 % 4] |= 0x3f80u << i % 2 * 16;  // 1
#pragma unroll
  for (int i = 0; i < 2; i++)
    *reinterpret_cast<Vector<uint32_t>*>(
        chunk.include + Swizzle<SomeConfig::kRowBytes>::chunk(row, thread % 4 * 2 + i)) = words[i];
  if (thread < SomeConfig::kBlocks) {
    const int found = find_summary(p, first + thread, offset);
    chunk.summary[thread] = found;
    const unsigned present = ballot(found >= 0);
    if (thread % 32 == 0) chunk.present[thread / 32] = present;
  }
}

// Blocks of threads: 64 rows first, which read the same columns.
__global__ void __launch_bounds__(kThreads) sum_some_kernel(const SumSummariesParams p) {
  using C = SomeConfig;
  auto& shared = shared_storage<SomeStorage>();
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  const int g = lane / 4, t = lane % 4;
  const int tiles = ceil_div(p.rows, C::kRows), h_blocks = ceil_div(p.D * p.E, C::kColumns);
  const int blocks = h_blocks + ceil_div(p.D, C::kColumns);
  const int first_row = static_cast<int>(blockIdx.x) % tiles * C::kRows;
  const int block = static_cast<int>(blockIdx.x) / tiles % blocks;
  const int matrix = static_cast<int>(blockIdx.x) / tiles / blocks;  // of offset, batch and head
  const int h = matrix % p.H, b = matrix / p.H % p.B, offset = matrix / p.H / p.B;
  const bool of_z = block >= h_blocks;
  const int area = of_z ? p.D : p.D * p.E;
  const int first_column = (of_z ? block - h_blocks : block) * C::kColumns + warp * 32;
  const int width = p.H * area;
  const bool held = first_column + 4 * g < area;
  const float* from = (of_z ? p.z : p.h) + int64_t{b} * p.slots * p.per_slot * width +
                      int64_t{h} * area + (held ? first_column + 4 * g : 0);
  const int chunks = ceil_div(p.T * p.per_slot, C::kBlocks);

  // A step's blocks 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: four columns of each
  auto copy = [&](const Included& chunk, int step) {
    const int width = p.H * (of_z ? p.D : p.D * p.E);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int found = chunk.summary[step * 16 + 2 * t + i % 2 + i / 2 * 8];
      cp_async(shared_address(&shared.copied[step][warp][i][lane]),
               from + int64_t{max(found, 0)} * width, held && found >= 0);
    }
  };

  float total[4][4][4] = {};  // (16 rows, 8 columns, fragment)
  auto add = [&](const Included& chunk, int step) {
    Vector<float> x[4];
    uint32_t term[4][3][2];  // (column, term, two blocks)
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = shared.copied[step][warp][i][lane];
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int s = 0; s < 3; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) term[e][s][i] = take_term(x[2 * i].at[e], x[2 * i + 1].at[e]);
#pragma unroll
    for (int m = 0; m < 4; m++) {
      if (first_row + 16 * m >= p.rows) continue;
      uint32_t a[1][4];
      ldmatrix_x4(a[0], shared_address(chunk.include) +
                            Swizzle<C::kRowBytes>::chunk(16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int e = 0; e < 4; e++) multiply(total[m][e], a, term[e]);
    }
  };

  look_up(shared.chunks[0], p, int64_t{b} * p.H + h, first_row, 0, offset);
  sync_block();
  for (int step = 0; step < C::kSteps; step++) {
    if (shared.chunks[0].any()) copy(shared.chunks[0], step);
    cp_async_commit();
  }
  for (int c = 0; c < chunks; c++) {
    const Included& now = shared.chunks[c % C::kChunks];
    Included& next = shared.chunks[(c + 1) % C::kChunks];
    if (c + 1 < chunks)
      look_up(next, p, int64_t{b} * p.H + h, first_row, (c + 1) * C::kBlocks, offset);
    sync_block();  // the next chunk has been looked up
    const bool more = c + 1 < chunks && next.any();
#pragma unroll 1
    for (int step = 0; step < C::kSteps; step++) {
      cp_async_wait<C::kSteps - 1>();
      if (now.any()) add(now, step);
      if (more) copy(next, step);
      cp_async_commit();
    }
  }

  // Rows g and g + 8 of 16; column 4 n + e was column n of fragment e
  if (first_column + 8 * t >= area) return;
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const int row = first_row + 16 * m + g + 8 * below;
      if (row >= p.rows) continue;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto& x = total[m];
        const int i = 2 * below + half, at = first_column + 8 * t + 4 * half;
        const Vector<float> four{{x[0][i], x[1][i], x[2][i], x[3][i]}};
        if (of_z)
          store_four(p.sum_z, 0, int64_t{matrix} * p.rows + row, area, at, four);
        else
          store_four(p.sum_h, p.terms, int64_t{matrix} * p.rows + row, area, at, four);
      }
    }
}

// --- Of keys and values --------------------------------------------------------------------------

template <class T>
struct KeysConfig {
  static constexpr int kTokens = 64;  // at a time
  static constexpr int kTerms = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kRowBytes = 2 * kSlice;
  static constexpr int kStrips = 2, kGroups = 4;  // of a warp: 16 rows of h, 16 columns
};

// Tiles [64][128] of each term, a token after the other.
template <class T>
struct KeysStorage {
  using C = KeysConfig<T>;
  unsigned char phi[C::kTerms][C::kTokens * C::kRowBytes];
  unsigned char v[C::kTerms][C::kTokens * C::kRowBytes];
};

// Byte of a 16-byte chunk of a token.  Of eight tokens in a row each has another key, so that
// ldmatrix finds them in eight groups of banks; those of two neighbours differ by 4, so that four
// lanes with four chunks each of both store them into eight groups, too.
DEVICE uint32_t token_byte(uint32_t token, uint32_t chunk) {
  const uint32_t key = token % 2 * 4 + token / 2 % 4;
  return token * 2 * kSlice + ((chunk ^ key) << 4);
}

// Eight channels of a token into its tile, of each term.
template <class T, int kTerms, int kBytes>
DEVICE void store_token(unsigned char (&tile)[kTerms][kBytes], int token, int window,
                        float (&x)[kChunk]) {
  const int chunk = 4 * window + static_cast<int>(lane_index()) % 4;
#pragma unroll
  for (int term = 0; term < kTerms; term++) {
    Vector<uint32_t> words;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (kTerms == 1)
        words.at[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
      else
        words.at[i] = take_term(x[2 * i], x[2 * i + 1]);
    }
    *reinterpret_cast<Vector<uint32_t>*>(tile[term] + token_byte(token, chunk)) = words;
  }
}

// Values of a token into their tile: 16 bits as they are, asynchronously.
template <class T>
DEVICE void load_values(KeysStorage<T>& shared, const T* from, int token, int channels) {
  const int inside = from_lane_on(channels), t = static_cast<int>(lane_index()) % 4;
  if constexpr (KeysConfig<T>::kTerms == 1) {
#pragma unroll
    for (int c = 0; c < kWindows; c++) {
      const bool valid = c * kWindow < inside;
      cp_async(shared_address(shared.v[0]) + token_byte(token, 4 * c + t),
               valid ? from + c * kWindow + t * kChunk : from, valid);
    }
    cp_async_commit();
  } else {
    Incoming<T> values;
    values.load(from, channels);
#pragma unroll
    for (int c = 0; c < kWindows; c++) {
      float x[kChunk];
      values.words[c].expand(x);
      store_token<T>(shared.v, token, c, x);
    }
  }
}

template <class T>
DEVICE void multiply_keys(float (&sum)[4], const uint32_t (&a)[KeysConfig<T>::kTerms][4],
                          const uint32_t (&b)[KeysConfig<T>::kTerms][2]) {
  if constexpr (std::is_same_v<T, float16>)
    mma_f16(sum, a[0], b[0][0], b[0][1]);
  else
    multiply(sum, a, b);
}

// Blocks of threads: slices of h first, then runs, heads, batches.  phi is rounded as the product
// takes it, for z too: the division cancels the rounding.
template <class T, bool kUsual>
__global__ void __launch_bounds__(kThreads) summarise_kernel(const SummariseKeysParams p) {
  using C = KeysConfig<T>;
  auto& shared = shared_storage<KeysStorage<T>>();
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  const int e_slices = kUsual ? 1 : ceil_div(p.E, kSlice);
  const int slices = kUsual ? 1 : ceil_div(p.D, kSlice) * e_slices;
  int rest = static_cast<int>(blockIdx.x);
  const int slice = rest % slices;
  rest /= slices;
  const int runs = ceil_div(p.S, p.run), run = rest % runs;
  rest /= runs;
  const int h = rest % p.H;
  const int b = rest / p.H;
  const int slice_d = kUsual ? 0 : slice / e_slices * kSlice;
  const int slice_e = kUsual ? 0 : slice % e_slices * kSlice;
  const int rows = min(p.D - slice_d, kSlice), columns = min(p.E - slice_e, kSlice);
  const int end = min(p.S, (run + 1) * p.run);
  const int d0 = warp % 4 * 16 * C::kStrips, e0 = warp / 4 * 16 * C::kGroups;

  constexpr uint32_t kOnes = std::is_same_v<T, float16> ? 0x3c003c00u : 0x3f803f80u;
  float sum[C::kStrips][C::kGroups][2][4] = {};  // (16 rows, 16 columns, 8 of them, fragment)
  float ones[C::kStrips][4] = {};
  for (int first = run * p.run; first < end; first += C::kTokens) {
    // phi(K) and V into their tiles, zeros past the last token
    const int token = opaque(static_cast<int>(threadIdx.x)) / 4;  // or addresses wait in registers
    const int64_t s = first + token;
    const bool held = s < end;
    const T* key = static_cast<const T*>(p.k) + b * p.stride_kb + h * p.stride_kh + s * p.stride_ks;
    const T* value =
        static_cast<const T*>(p.v) + b * p.stride_vb + h * p.stride_vh + s * p.stride_vs;
    Incoming<T> keys;
    Features<T, kUsual> features(p.phi, p.D);
    keys.load(key + slice_d, held ? rows : 0);
    if (features.is_one())
      features.measure(keys);
    else
      features.measure(key, held);
    const float factor = held ? reciprocal_approx(features.sum) : 0.0f;
    sync_block();  // the tiles before have been read
    load_values(shared, value + slice_e, token, held ? columns : 0);
    features.map(keys, slice_d, [&](int c, float (&x)[kChunk]) {
#pragma unroll
      for (int e = 0; e < kChunk; e++) x[e] *= factor;
      store_token<T>(shared.phi, token, c, x);
    });
    cp_async_wait<0>();
    sync_block();  // the tiles are whole

    // Both operands lie token by token: ldmatrix transposes them
    const uint32_t phi_at = shared_address(shared.phi), v_at = shared_address(shared.v);
    constexpr uint32_t kTileBytes = C::kTokens * C::kRowBytes;
#pragma unroll 1
    for (int n = 0; n < C::kTokens; n += 16) {
      uint32_t a[C::kStrips][C::kTerms][4];
#pragma unroll
      for (int i = 0; i < C::kStrips; i++)
#pragma unroll
        for (int term = C::kTerms - 1; term >= 0; term--) {
          const int chunk = d0 / 8 + 2 * i + lane / 8 % 2;
          const uint32_t at = token_byte(n + lane / 16 * 8 + lane % 8, chunk);
          ldmatrix_x4_transposed(a[i][term], phi_at + term * kTileBytes + at);
          if (e0 > 0) continue;
          if constexpr (std::is_same_v<T, float16>)
            mma_f16(ones[i], a[i][term], kOnes, kOnes);
          else
            mma_bf16(ones[i], a[i][term], kOnes, kOnes);
        }
#pragma unroll
      for (int j = 0; j < C::kGroups; j++) {
        if (e0 + 16 * j >= columns) continue;
        uint32_t b[2][C::kTerms][2];
#pragma unroll
        for (int term = 0; term < C::kTerms; term++) {
          const uint32_t at = token_byte(n + lane % 16, e0 / 8 + 2 * j + lane / 16);
          uint32_t four[4];
          ldmatrix_x4_transposed(four, v_at + term * kTileBytes + at);
          b[0][term][0] = four[0], b[0][term][1] = four[1];
          b[1][term][0] = four[2], b[1][term][1] = four[3];
        }
#pragma unroll
        for (int i = 0; i < C::kStrips; i++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            if (d0 + 16 * i < rows) multiply_keys<T>(sum[i][j][half], a[i], b[half]);
      }
    }
  }

  // Rows lane / 4 and eight further, columns 2 * (lane % 4) and the next
  const int64_t matrix = (int64_t{b} * runs + run) * p.H + h;
#pragma unroll
  for (int i = 0; i < C::kStrips; i++)
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const int d = d0 + 16 * i + lane / 4 + 8 * below;
      if (d >= rows) continue;
      const int64_t row = matrix * p.D + slice_d + d;
      if (slice_e == 0 && e0 == 0 && lane % 4 == 0) p.z[row] = ones[i][2 * below];
#pragma unroll
      for (int j = 0; j < 2 * C::kGroups; j++) {
        const int e = e0 + 8 * j + lane % 4 * 2;
        if (e >= columns) continue;
        const float* pair = sum[i][j / 2][j % 2] + 2 * below;
        *reinterpret_cast<uint64_t*>(p.h + row * p.E + slice_e + e) =
            uint64_t{bits_of(pair[1])} << 32 | bits_of(pair[0]);
      }
    }
}

// --- Launchers -----------------------------------------------------------------------------------

constexpr int64_t kMost = 0x7fffff00;  // of what is counted in 32 bits
inline bool fits_tiles(int dim) { return dim > 0 && dim <= 256 && dim % 16 == 0; }

inline cudaError_t launch_sum(const SumSummariesParams& p, cudaStream_t stream) {
  const int64_t matrices = int64_t{p.O} * p.B * p.H;
  if (matrices == 0 || (p.code && p.rows == 0)) return cudaSuccess;
  if (!fits_tiles(p.D) || !fits_tiles(p.E) || int64_t{p.H} * p.D * p.E > kMost ||
      int64_t{p.slots} * p.per_slot > kMost)
    return cudaErrorInvalidValue;
  if (!p.code) {
    const int blocks = ceil_div(p.H * p.D * p.E, 128) + ceil_div(p.H * p.D, 128);
    if (p.O * p.B > 65535) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.O * p.B));
    return launch(sum_all_kernel, {grid, kThreads, sizeof(AllStorage)}, stream, p);
  }
  const int columns = ceil_div(p.D * p.E, SomeConfig::kColumns) + 1;
  const int64_t blocks = matrices * columns * ceil_div(p.rows, SomeConfig::kRows);
  if (blocks > kMost) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  return launch(sum_some_kernel, {grid, kThreads, sizeof(SomeStorage)}, stream, p);
}

inline cudaError_t launch_summarise(const SummariseKeysParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.S == 0 || p.H == 0) return cudaSuccess;
  if (!fits_tiles(p.D) || !fits_tiles(p.E) || p.run < 1) return cudaErrorInvalidValue;
  const int slices = ceil_div(p.D, kSlice) * ceil_div(p.E, kSlice);
  const int64_t blocks = int64_t{p.B} * p.H * ceil_div(p.S, p.run) * slices;
  if (blocks > kMost) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  const bool usual = slices == 1 && p.phi == Phi::kSoftmax;
  if (p.dtype == Dtype::kBfloat16)
    return launch(usual ? summarise_kernel<bfloat16, true> : summarise_kernel<bfloat16, false>,
                  {grid, kThreads, sizeof(KeysStorage<bfloat16>)}, stream, p);
  if (p.dtype == Dtype::kFloat16)
    return launch(usual ? summarise_kernel<float16, true> : summarise_kernel<float16, false>,
                  {grid, kThreads, sizeof(KeysStorage<float16>)}, stream, p);
  return launch(summarise_kernel<float, false>, {grid, kThreads, sizeof(KeysStorage<float>)},
                stream, p);
}

}  // namespace sla_sm80
}  // namespace reeltime
