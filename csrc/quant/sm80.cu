// SPDX-License-Identifier: Apache-2.0
// quant on every architecture: one read of x, one write of codes and scales.
//
//   x [M, K] float32, bfloat16 or float16    xq [M, K] int8 or e4m3    x_scale [M / bm, K / 128]
//
// A row's 128 columns belong to 16 neighbouring lanes (32 in float32), 16 bytes each.  bm = 1: such
// a group of lanes owns four rows, whose loads are in flight together, and needs no other.  bm =
// 128: a block of threads owns 128 x 128 in registers and meets once, for its largest magnitude.
// Floor: M K (itemsize + 1) + 4 bytes per scale, over the memory bandwidth.
#include "common/encode.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/shared.h"
#include "common/vector.h"
#include "quant/quant.h"

namespace reeltime {
namespace quant_sm80 {

constexpr int kBlockK = 128;  // columns under one scale
constexpr int kBlockM = 128;  // rows under one, where not every row has its own

template <class X, bool kPerRow>
struct Config {
  static constexpr int kThreads = 256;
  static constexpr int kSize = Vector<X>::kSize;     // columns of a lane
  static constexpr int kLanes = kBlockK / kSize;     // of a group: 16 or 32
  static constexpr int kGroups = kThreads / kLanes;  // 16 or 8
  static constexpr int kRows = kPerRow ? 4 : kBlockM / kGroups;
  static_assert(kLanes <= 32, "a group lies in one warp");
  static_assert(kRows % 4 == 0, "rows are exchanged between up to four lanes");
};

struct SharedStorage {
  float amax[8];  // of each warp
};

// The columns of one lane, zeros outside of the row.
template <class X>
DEVICE Vector<X> load_columns(const X* row, int column, int K, bool aligned) {
  Vector<X> x{};
  if (aligned && column + Vector<X>::kSize <= K) return load_streaming(row + column);
#pragma unroll
  for (int i = 0; i < Vector<X>::kSize; i++)
    if (column + i < K) x.at[i] = row[column + i];
  return x;
}

// Lanes exchange rows for columns, until each holds 16 bytes of one row instead of kWords * 4 of
// several: in a step, one of two lanes takes the even rows of both, the other the odd ones.
template <int kRows, int kWords, int kDistance = 1>
DEVICE void gather_sixteen_bytes(uint32_t (&word)[kRows][4]) {
  if constexpr (kWords < 4) {
    const bool odd = lane_index() & kDistance;
    uint32_t taken[kRows / 2][4];
#pragma unroll
    for (int r = 0; r < kRows / 2; r++) {
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        const uint32_t even_row = word[2 * r][w], odd_row = word[2 * r + 1][w];
        const uint32_t theirs = shuffle_xor(odd ? even_row : odd_row, kDistance);
        taken[r][w] = odd ? theirs : even_row;
        taken[r][kWords + w] = odd ? odd_row : theirs;
      }
    }
    gather_sixteen_bytes<kRows / 2, 2 * kWords, 2 * kDistance>(taken);
#pragma unroll
    for (int r = 0; r < kRows / 2; r++)
#pragma unroll
      for (int w = 0; w < 4; w++) word[r][w] = taken[r][w];
  }
}

// --- Quantise ------------------------------------------------------------------------------------

template <class X, class Q, bool kPerRow>
__global__ void __launch_bounds__(256) quantize_kernel(const QuantizeParams p) {
  using C = Config<X, kPerRow>;
  const int group = static_cast<int>(threadIdx.x) / C::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % C::kLanes;
  const int blocks_k = ceil_div(p.K, kBlockK);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.stride_xm % C::kSize == 0;

  // Which rows and columns: row(i) = first + i * step
  const int64_t item =
      kPerRow ? static_cast<int64_t>(blockIdx.x) * C::kGroups + group : int64_t{blockIdx.x};
  const int block = static_cast<int>(item % blocks_k);
  const int64_t tile = item / blocks_k;
  const int64_t first = kPerRow ? tile * C::kRows : tile * kBlockM + group;
  const int step = kPerRow ? 1 : C::kGroups;
  const int column = block * kBlockK + lane * C::kSize;

  // Load: every row before the first is used
  Vector<X> x[C::kRows];
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    const int64_t row = first + i * step;
    x[i] = row < p.M
               ? load_columns(static_cast<const X*>(p.x) + row * p.stride_xm, column, p.K, aligned)
               : Vector<X>{};
  }

  // Largest magnitudes
  float amax[C::kRows];
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    amax[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < C::kSize; c++) amax[i] = max(amax[i], magnitude(to_float(x[i].at[c])));
  }
  if constexpr (kPerRow) {
#pragma unroll
    for (int i = 0; i < C::kRows; i++) amax[i] = warp_reduce<C::kLanes>(amax[i], Max());
  } else {
#pragma unroll
    for (int i = 1; i < C::kRows; i++) amax[0] = max(amax[0], amax[i]);
    amax[0] = block_reduce<8>(amax[0], shared_storage<SharedStorage>().amax, Max());
  }

  // Encode
  uint32_t word[C::kRows][4];
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    const float scale = block_scale(amax[kPerRow ? i : 0], kLimit<Q>);
    const Divisor by(scale);
#pragma unroll
    for (int w = 0; w < C::kSize / 4; w++)
      word[i][w] = pack4<Q>(
          by.encode<Q>(to_float(x[i].at[4 * w])), by.encode<Q>(to_float(x[i].at[4 * w + 1])),
          by.encode<Q>(to_float(x[i].at[4 * w + 2])), by.encode<Q>(to_float(x[i].at[4 * w + 3])));
    const bool mine = lane == 0 && (kPerRow || (group == 0 && i == 0));
    if (mine && first + i * step < p.M)
      p.x_scale[(kPerRow ? first + i : tile) * blocks_k + block] = scale;
  }

  // Store, 16 bytes of a row at a time where rows are aligned
  unsigned char* out = static_cast<unsigned char*>(p.xq);
  if (p.K % 16 == 0) {
    gather_sixteen_bytes<C::kRows, C::kSize / 4>(word);
    constexpr int kSharing = 16 / C::kSize;  // lanes that shared their rows: 2 or 4
    const int start = block * kBlockK + lane / kSharing * 16;
#pragma unroll
    for (int i = 0; i < C::kRows / kSharing; i++) {
      const int64_t row = first + (i * kSharing + lane % kSharing) * step;
      Vector<uint32_t> code;
#pragma unroll
      for (int w = 0; w < 4; w++) code.at[w] = word[i][w];
      if (row < p.M && start < p.K)
        store_vector(reinterpret_cast<uint32_t*>(out + row * p.K + start), code);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    const int64_t row = first + i * step;
#pragma unroll
    for (int c = 0; c < C::kSize; c++)
      if (row < p.M && column + c < p.K)
        out[row * p.K + column + c] = static_cast<unsigned char>(word[i][c / 4] >> 8 * (c % 4));
  }
}

// --- And back ------------------------------------------------------------------------------------

// A thread owns 16 columns of one row, which share a scale.
template <class Q, class X>
__global__ void __launch_bounds__(256) dequantize_kernel(const DequantizeParams p) {
  constexpr int kColumns = 16, kSize = Vector<X>::kSize;
  const int pieces = ceil_div(p.K, kColumns);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t row = item / pieces;
  const int column = static_cast<int>(item % pieces) * kColumns;
  if (row >= p.M) return;

  // Codes and their scale
  const Q* source = static_cast<const Q*>(p.xq) + row * p.stride_qm + column * p.stride_qk;
  const bool dense = p.stride_qk == 1 && column + kColumns <= p.K;
  Vector<Q> code{};
  if (dense && reinterpret_cast<uintptr_t>(source) % 16 == 0)
    code = load_streaming(source);
  else
#pragma unroll
    for (int c = 0; c < kColumns; c++)
      if (column + c < p.K) code.at[c] = source[c * p.stride_qk];
  const float scale = p.x_scale[row / p.block_rows * p.stride_sm + column / kBlockK * p.stride_sk];

  // Products
  X* out = static_cast<X*>(p.x) + row * p.K + column;
  if (p.K % kColumns == 0) {
#pragma unroll
    for (int start = 0; start < kColumns; start += kSize) {
      Vector<X> x;
#pragma unroll
      for (int c = 0; c < kSize; c++) x.at[c] = from_float<X>(to_float(code.at[start + c]) * scale);
      store_vector(out + start, x);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; c++)
    if (column + c < p.K) out[c] = from_float<X>(to_float(code.at[c]) * scale);
}

// --- Launchers -----------------------------------------------------------------------------------

template <class X, class Q, bool kPerRow>
cudaError_t launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
  using C = Config<X, kPerRow>;
  const int64_t rows = kPerRow ? C::kRows : kBlockM, groups = kPerRow ? C::kGroups : 1;
  const int64_t items = (p.M + rows - 1) / rows * ceil_div(p.K, kBlockK);
  const dim3 grid(static_cast<unsigned>((items + groups - 1) / groups));
  return launch(quantize_kernel<X, Q, kPerRow>, {grid, C::kThreads, sizeof(SharedStorage)}, stream,
                p);
}

template <class X>
cudaError_t quantize_from(const QuantizeParams& p, cudaStream_t stream) {
  const bool per_row = p.block_rows == 1;
  if (p.dtype == Dtype::kInt8)
    return per_row ? launch_quantize<X, int8_t, true>(p, stream)
                   : launch_quantize<X, int8_t, false>(p, stream);
  return per_row ? launch_quantize<X, e4m3, true>(p, stream)
                 : launch_quantize<X, e4m3, false>(p, stream);
}

template <class Q>
cudaError_t dequantize_from(const DequantizeParams& p, cudaStream_t stream) {
  const int64_t items = int64_t{p.M} * ceil_div(p.K, 16);
  const Launch how{dim3(static_cast<unsigned>((items + 255) / 256)), 256};
  switch (p.x_dtype) {
    case Dtype::kFloat32:
      return launch(dequantize_kernel<Q, float>, how, stream, p);
    case Dtype::kBfloat16:
      return launch(dequantize_kernel<Q, bfloat16>, how, stream, p);
    case Dtype::kFloat16:
      return launch(dequantize_kernel<Q, float16>, how, stream, p);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace quant_sm80

cudaError_t quantize_sm80(const QuantizeParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.K == 0) return cudaSuccess;
  if (size_of(p.dtype) != 1 || (p.block_rows != 1 && p.block_rows != quant_sm80::kBlockM))
    return cudaErrorInvalidValue;
  switch (p.x_dtype) {
    case Dtype::kFloat32:
      return quant_sm80::quantize_from<float>(p, stream);
    case Dtype::kBfloat16:
      return quant_sm80::quantize_from<bfloat16>(p, stream);
    case Dtype::kFloat16:
      return quant_sm80::quantize_from<float16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t dequantize_sm80(const DequantizeParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.K == 0) return cudaSuccess;
  if (p.dtype == Dtype::kInt8) return quant_sm80::dequantize_from<int8_t>(p, stream);
  if (p.dtype == Dtype::kE4m3) return quant_sm80::dequantize_from<e4m3>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace reeltime
