// SPDX-License-Identifier: Apache-2.0
// sla's linear branch: H projected, H W^T, and phi(q) H / (phi(q) Z + eps).
//
// A block of threads owns 128 rows of matrices H, or 64 queries of one head, and up to 128 columns;
// a warp owns 16 of the rows, which it reads from memory into registers as mma wants them.  The
// other operand is a tile in shared memory, [128 channels][128 columns] of each term.
//
// Projecting H costs 2 E^2 flops per channel of it, projecting the result as much per query: H has
// D channels and serves all queries, or a block of them.
//
// Softmax is divided by its sum at the end, together with the denominator: sums over several
// offsets are kept in units of the newest one's.
//
// Floors: project matrices D (4 K + itemsize N) bytes; linear O B L H D itemsize + B L H E itemsize
// bytes, or its 2 O L D E flops per head and product of terms: one product for bfloat16, three for
// float16, six for float32.
#pragma once
#include "common/convert.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/ldmatrix.h"
#include "common/shared.h"
#include "sla/summaries.h"

namespace reeltime {
namespace sla_sm80 {

struct LinearConfig {
  static constexpr int kLinearWarps = 4, kLinearThreads = 32 * kLinearWarps;
  static constexpr int kProjectRows = 16 * kWarps, kLinearRows = 16 * kLinearWarps;
  static constexpr int kRowBytes = 2 * kSlice, kTileBytes = kSlice * kRowBytes;
};

template <int kTerms>
struct LinearStorage {
  unsigned char tile[kTerms][LinearConfig::kTileBytes];
  float z[kSlice];
};

using Sums = float[kSlice / 8][4];  // a warp's 16 x 128, by 8 columns and fragment

// Byte of a 16-byte chunk of a channel.  The eight channels of a matrix are 8 i and 8 i + 1 of a
// window, i = 0 ... 3, or the same further on: each of them has another key.
DEVICE uint32_t channel_byte(uint32_t channel, uint32_t chunk) {
  const uint32_t key = channel % 2 + channel / 8 % 4 * 2;
  return channel * LinearConfig::kRowBytes + ((chunk ^ key) << 4);
}

// --- A warp's 16 rows ----------------------------------------------------------------------------

// A lane's part of a window: of row lane / 4 and eight further.  Of one term they are packed at
// once, half the registers.
template <int kTerms>
struct Window {
  float x[2][kChunk];

  DEVICE void put(int row, const float (&from)[kChunk]) {
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[row][e] = from[e];
  }
  DEVICE float value(int row, int e) const { return x[row][e]; }
  DEVICE void fragment(uint32_t (&a)[kTerms][4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* pair = x[i % 2] + 4 * step + i / 2 * 2;
      float x0 = pair[0], x1 = pair[1];
#pragma unroll
      for (int term = 0; term < kTerms; term++) a[term][i] = take_term(x0, x1);
    }
  }
};

template <>
struct Window<1> {
  uint32_t pair[2][kChunk / 2];

  DEVICE void put(int row, const float (&from)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++)
      pair[row][i] = pack2<bfloat16>(from[2 * i], from[2 * i + 1]);
  }
  DEVICE float value(int row, int e) const {  // as products take it
    return unpack<bfloat16>(pair[row][e / 2], e % 2);
  }
  DEVICE void fragment(uint32_t (&a)[1][4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[0][i] = pair[i % 2][2 * step + i / 2];
  }
};

// sums += rows x tile, of the channels of a window and columns that exist.
template <int kA, int kB>
DEVICE void multiply_window(Sums& sums, const Window<kA>& rows,
                            const unsigned char (&tile)[kB][LinearConfig::kTileBytes], int window,
                            int columns) {
  // Row lane % 8 of matrix lane / 8; neither windows, steps nor groups of columns change its key
  const uint32_t lane = static_cast<uint32_t>(opaque(static_cast<int>(lane_index())));
  const uint32_t matrix = lane / 8, row = lane % 8 / 2 * 8 + matrix % 2 * 2 + lane % 2;
  const uint32_t first = shared_address(tile) + channel_byte(row, matrix / 2) +
                         static_cast<uint32_t>(window * kWindow * LinearConfig::kRowBytes);
#pragma unroll
  for (int step = 0; step < 2; step++) {
    uint32_t a[kA][4];
    rows.fragment(a, step);
#pragma unroll
    for (int j = 0; j < kSlice / 16; j++) {
      if (16 * j >= columns) continue;
      uint32_t b[2][kB][2];
#pragma unroll
      for (int term = 0; term < kB; term++) {
        uint32_t four[4];
        const uint32_t at = (first ^ static_cast<uint32_t>(j % 4 * 32)) + j / 4 * 128;
        ldmatrix_x4_transposed(
            four, at + term * LinearConfig::kTileBytes + step * 4 * LinearConfig::kRowBytes);
        b[0][term][0] = four[0], b[0][term][1] = four[1];
        b[1][term][0] = four[2], b[1][term][1] = four[3];
      }
      multiply(sums[2 * j], a, b[0]);
      multiply(sums[2 * j + 1], a, b[1]);
    }
  }
}

// --- Project -------------------------------------------------------------------------------------

// W^T, of channels from k0 and columns from n0 on, as terms; zeros past the last channel.
template <int kTerms>
DEVICE void load_weight(LinearStorage<kTerms>& shared, const ProjectSumsParams& p, int k0, int n0,
                        int columns) {
  const int channels = min(ceil_div(p.K - k0, kWindow) * kWindow, kSlice);
  for (int i = static_cast<int>(threadIdx.x); i < channels * columns / 2; i += kThreads) {
    const int k = i % channels, n = i / channels * 2;
    float pair[2] = {};
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (k0 + k < p.K)
        pair[e] = load_float(p.weight, p.weight_dtype,
                             (n0 + n + e) * p.stride_wn + (k0 + k) * p.stride_wk);
#pragma unroll
    for (int term = 0; term < kTerms; term++)
      *reinterpret_cast<uint32_t*>(shared.tile[term] + channel_byte(k, n / 8) + n % 8 * 2) =
          take_term(pair[0], pair[1]);
  }
}

// Blocks of threads: pieces of `width` columns first, then 128 rows, every `strips`-th of them.
template <int kWeightTerms>
__global__ void __launch_bounds__(kThreads, 1)
    project_kernel(const ProjectSumsParams p, const int width, const int strips) {
  using C = LinearConfig;
  auto& shared = shared_storage<LinearStorage<kWeightTerms>>();
  const int lane = static_cast<int>(lane_index()), pieces = ceil_div(p.N, width);
  const int n0 = static_cast<int>(blockIdx.x) % pieces * width, columns = min(width, p.N - n0);
  const int64_t rows = int64_t{p.matrices} * p.D;
  for (int64_t strip = blockIdx.x / pieces; strip * C::kProjectRows < rows; strip += strips) {
    const int64_t first = strip * C::kProjectRows + 16 * warp_index() + lane / 4;
    Sums sums = {};
#pragma unroll 1
    for (int k0 = 0; k0 < p.K; k0 += kSlice) {
      // W, if it is not there already
      if (p.K > kSlice || strip < strips) {
        sync_block();  // the tile before has been read
        load_weight(shared, p, k0, n0, columns);
        sync_block();  // the tile is whole
      }
#pragma unroll 1
      for (int c = 0; c < kWindows && k0 + c * kWindow < p.K; c++) {
        const int k = k0 + c * kWindow, inside = from_lane_on(p.K - k);
        Window<3> x;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int64_t row = first + 8 * i;
          Words<float> words;
          words.load(p.x + row * p.K + k + lane % 4 * kChunk, row < rows ? inside : 0);
          words.expand(x.x[i]);
        }
        multiply_window(sums, x, shared.tile, c, columns);
      }
    }

    // Pairs of columns 8 j + 2 (lane % 4) of rows first and first + 8
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t row = first + 8 * i;
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < kSlice / 8; j++) {
        if (8 * j >= columns) continue;
        float x0 = sums[j][2 * i], x1 = sums[j][2 * i + 1];
        const int n = n0 + 8 * j + lane % 4 * 2;
        if (p.terms == 0)
          *reinterpret_cast<uint64_t*>(static_cast<float*>(p.out) + row * p.N + n) =
              uint64_t{bits_of(x1)} << 32 | bits_of(x0);
        bfloat16* to = static_cast<bfloat16*>(p.out);
        for (int term = 0; term < p.terms; term++) {
          const int64_t place = (row / p.D * p.terms + term) * p.D + row % p.D;
          *reinterpret_cast<uint32_t*>(to + place * p.N + n) = take_term(x0, x1);
        }
      }
    }
  }
}

// --- Linear --------------------------------------------------------------------------------------

// A piece of H and Z on its way; zeros past its last channel and column.
template <int kTerms>
DEVICE void copy_sums(LinearStorage<kTerms>& shared, const bfloat16* h, const float* z, int D,
                      int E, int d0, int e0) {
  const int channels = min(ceil_div(D - d0, kWindow) * kWindow, kSlice);
  const int thread = opaque(static_cast<int>(threadIdx.x));  // or addresses wait in registers
  const int chunk = thread % 16;
#pragma unroll 2
  for (int d = thread / 16; d < channels; d += LinearConfig::kLinearThreads / 16) {
    const bool valid = d0 + d < D && e0 + chunk * 8 < E;
    const bfloat16* from = valid ? h + int64_t{d0 + d} * E + e0 + chunk * 8 : h;
    const uint32_t to = shared_address(shared.tile) + channel_byte(d, chunk);
#pragma unroll
    for (int term = 0; term < kTerms; term++)
      cp_async(to + term * LinearConfig::kTileBytes, from + int64_t{term} * D * E, valid);
  }
  if (thread < kSlice / 4) {
    const int d = d0 + thread * 4;
    cp_async(shared_address(shared.z + thread * 4), d < D ? z + d : z, d < D);
  }
  cp_async_commit();
}

// Sums of a warp as rows of T: through shared memory, so that a lane stores 16 bytes.  `to` is the
// first row's, `stride` from one to the next.
template <class T>
DEVICE void store_sums(unsigned char* tile, const Sums& sums, T* to, int64_t stride, int rows,
                       int columns) {
  constexpr int kPer = 16 / sizeof(T), kChunks = kSlice / kPer;
  unsigned char* mine = tile + warp_index() * 16 * kSlice * sizeof(T);
  auto place = [&](int row, int chunk) { return mine + (row * kChunks + (chunk ^ row % 8)) * 16; };
  const int lane = static_cast<int>(lane_index());
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < kSlice / 8; j++) {
      const int column = 8 * j + lane % 4 * 2;
      unsigned char* pair =
          place(lane / 4 + 8 * i, column / kPer) + column % kPer * static_cast<int>(sizeof(T));
      const float x0 = sums[j][2 * i], x1 = sums[j][2 * i + 1];
      if constexpr (sizeof(T) == 2)
        *reinterpret_cast<uint32_t*>(pair) = pack2<T>(x0, x1);
      else
        *reinterpret_cast<uint64_t*>(pair) = uint64_t{bits_of(x1)} << 32 | bits_of(x0);
    }
  sync_warp();
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (row < rows && chunk * kPer < columns)
      store_vector(reinterpret_cast<uint32_t*>(to + row * stride + chunk * kPer),
                   *reinterpret_cast<const Vector<uint32_t>*>(place(row, chunk)));
  }
}

// What a warp owns: `count` queries, if positive, from `first` on, and columns from e0 on.  Blocks
// of threads: pieces of the columns first, then 64 queries of a query block, query blocks, heads,
// batches.
struct Owned {
  int e0, first, count, block, h, b;

  template <bool kUsual>
  DEVICE static Owned at(const LinearParams& p, int size) {
    const int pieces = kUsual ? 1 : ceil_div(p.E, kSlice);
    const int tiles = ceil_div(size, LinearConfig::kLinearRows), blocks = ceil_div(p.L, size);
    // NOTE: opaque, or it is not looked up again, but waits in registers
    const int piece = opaque(static_cast<int>(blockIdx.x)), tile = piece / pieces;
    const int block = tile / tiles, head = block / blocks;
    const int start =
        tile % tiles * LinearConfig::kLinearRows + 16 * static_cast<int>(warp_index());
    const int first = block % blocks * size + start;
    return {piece % pieces * kSlice, first,      min(size - start, p.L - first),
            block % blocks,          head % p.H, head / p.H};
  }
};

template <class T, bool kUsual>
__global__ void __launch_bounds__(LinearConfig::kLinearThreads, kUsual ? 3 : 2)
    linear_kernel(const LinearParams p, const int size) {
  constexpr int kTerms = kTermsOf<T>;
  auto& shared = shared_storage<LinearStorage<kTerms>>();
  const int lane = static_cast<int>(lane_index());

  Sums sums = {};
  float below[2] = {}, scale[2];
#pragma unroll 1
  for (int o = 0; o < p.O; o++) {
    const Owned own = Owned::at<kUsual>(p, size);
    const int matrix = ((o * p.B + own.b) * p.H_sum + own.h / (p.H / p.H_sum)) * p.rows +
                       (p.rows > 1 ? own.block : 0);
    const bfloat16* from = static_cast<const bfloat16*>(p.h) + int64_t{matrix} * kTerms * p.D * p.E;
    const T* q = static_cast<const T*>(p.q) + o * p.stride_qo + own.b * p.stride_qb +
                 own.h * p.stride_qh + (own.first + lane / 4) * p.stride_ql;
    Features<T, kUsual> features[2] = {{p.phi, p.D}, {p.phi, p.D}};
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (!features[i].is_one())
        features[i].measure(q + 8 * i * p.stride_ql, lane / 4 + 8 * i < own.count);
#pragma unroll 1
    for (int d0 = 0; d0 < (kUsual ? 1 : p.D); d0 += kSlice) {
      copy_sums(shared, from, p.z + int64_t{matrix} * p.D, p.D, p.E, d0, own.e0);

      // phi of two rows, while H is on its way
      Window<kTerms> held[kWindows];
      Incoming<T> slices[2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        slices[i].load(q + d0 + 8 * i * p.stride_ql, lane / 4 + 8 * i < own.count ? p.D - d0 : 0);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        auto hold = [&](int c, const float (&x)[kChunk]) { held[c].put(i, x); };
        if (features[i].is_one())
          features[i].map_first(slices[i], hold);
        else
          features[i].map(slices[i], d0, hold);
      }

      // In units of this offset's sums
      if (d0 == 0) {
        float ratio[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          ratio[i] = o == 0 ? 1.0f : features[i].sum * reciprocal_approx(scale[i]);
          scale[i] = features[i].sum;
          below[i] *= ratio[i];
        }
        if (o > 0 && (kUsual || p.phi == Phi::kSoftmax))
#pragma unroll
          for (int j = 0; j < kSlice / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[j][e] *= ratio[e / 2];
      }

      cp_async_wait<0>();
      sync_block();  // the tile is whole
#pragma unroll
      for (int c = 0; c < kWindows; c++)
#pragma unroll
        for (int e = 0; e < kChunk; e++)
#pragma unroll
          for (int i = 0; i < 2; i++)  // the lane's part of phi(q) Z
            below[i] =
                fmaf(held[c].value(i, e), shared.z[c * kWindow + lane % 4 * kChunk + e], below[i]);
#pragma unroll
      for (int c = 0; c < kWindows; c++)
        if (c * kWindow < p.D - d0) multiply_window(sums, held[c], shared.tile, c, p.E - own.e0);
      sync_block();  // and has been read
    }
  }

  // One over the denominator; bias, unless there is nothing to attend to
  const Owned own = Owned::at<kUsual>(p, size);
  bool any = !p.table;
  for (int t = lane; t < p.T && p.table; t += 32) any |= p.table[t] >= 0;
  const bool biased = p.bias && ballot(any);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float inverse = 1.0f / (warp_reduce<4>(below[i], Sum()) + p.eps * scale[i]);
#pragma unroll
    for (int j = 0; j < kSlice / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = sums[j][2 * i + e];
        const int column = own.e0 + 8 * j + lane % 4 * 2 + e;
        x *= inverse;
        if (biased && column < p.E) x += load_float(p.bias, p.bias_dtype, column);
      }
  }
  T* out = static_cast<T*>(p.out) + ((int64_t{own.b} * p.L + own.first) * p.H + own.h) * p.E;
  store_sums(shared.tile[0], sums, out + own.e0, int64_t{p.H} * p.E, own.count, p.E - own.e0);
}

// --- Launchers -----------------------------------------------------------------------------------

template <int kWeightTerms>
cudaError_t launch_project_terms(const ProjectSumsParams& p, cudaStream_t stream) {
  // Rows are many or few: whole pieces of W for strips that follow each other, or narrow pieces, so
  // that all SMs have one
  const int64_t most =
      (int64_t{p.matrices} * p.D + LinearConfig::kProjectRows - 1) / LinearConfig::kProjectRows;
  const int processors = p.processors > 0 ? p.processors : 1;
  const int width = most >= processors ? kSlice : kWindow, pieces = ceil_div(p.N, width);
  const int strips = static_cast<int>(most < processors ? most : processors);
  const dim3 grid(static_cast<unsigned>(strips * pieces));
  return launch(project_kernel<kWeightTerms>, {grid, kThreads, sizeof(LinearStorage<kWeightTerms>)},
                stream, p, width, strips);
}

inline cudaError_t launch_project(const ProjectSumsParams& p, cudaStream_t stream) {
  if (p.matrices == 0) return cudaSuccess;
  if (!fits_tiles(p.D) || !fits_tiles(p.K) || !fits_tiles(p.N)) return cudaErrorInvalidValue;
  if (p.weight_dtype == Dtype::kBfloat16) return launch_project_terms<1>(p, stream);
  if (p.weight_dtype == Dtype::kFloat16) return launch_project_terms<2>(p, stream);
  return launch_project_terms<3>(p, stream);
}

template <class T, bool kUsual = false>
cudaError_t launch_linear_of(const LinearParams& p, cudaStream_t stream) {
  const int size = p.rows > 1 ? p.block_q : p.L;
  const int tiles = ceil_div(size, LinearConfig::kLinearRows), pieces = ceil_div(p.E, kSlice);
  const int64_t blocks = int64_t{p.B} * p.H * ceil_div(p.L, size) * tiles * pieces;
  if (blocks > kMost) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  return launch(linear_kernel<T, kUsual>,
                {grid, LinearConfig::kLinearThreads, sizeof(LinearStorage<kTermsOf<T>>)}, stream, p,
                size);
}

inline cudaError_t launch_linear(const LinearParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0 || p.H == 0) return cudaSuccess;
  const int64_t matrices = int64_t{p.O} * p.B * p.H_sum * p.rows;
  if (!fits_tiles(p.D) || !fits_tiles(p.E) || p.O < 1 || p.block_q < 1 || matrices > kMost)
    return cudaErrorInvalidValue;
  const bool usual = p.D <= kSlice && p.E <= kSlice && p.phi == Phi::kSoftmax;
  if (p.dtype == Dtype::kBfloat16)
    return usual ? launch_linear_of<bfloat16, true>(p, stream)
                 : launch_linear_of<bfloat16>(p, stream);
  if (p.dtype == Dtype::kFloat16) return launch_linear_of<float16>(p, stream);
  return launch_linear_of<float>(p, stream);
}

}  // namespace sla_sm80
}  // namespace reeltime
