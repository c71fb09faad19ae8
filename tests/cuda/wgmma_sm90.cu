// SPDX-License-Identifier: Apache-2.0
// One product of every type, width and operand source that Wgmma offers.
#include <type_traits>

#include "common/launch.h"
#include "common/ldmatrix.h"
#include "common/swizzle.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "fragments.h"

namespace reeltime {
namespace {

template <int N>
struct SharedStorage {
  static constexpr int kColumnBoxes = ceil_div(N, 64);  // the last may overhang
  alignas(1024) uint8_t a[64][128];
  alignas(1024) uint8_t b[kColumnBoxes * 64 * 128];  // [N][128 bytes] or [boxes][64][128 bytes]
  Mbarrier full;
};

DEVICE uint32_t word_of(int32_t x) { return static_cast<uint32_t>(x); }
DEVICE uint32_t word_of(float x) { return bits_of(x); }

template <class T, class Sum, int N>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const WgmmaParams p, const __grid_constant__ TensorMap a_map,
                 const __grid_constant__ TensorMap b_map) {
  constexpr int kColumnBoxes = SharedStorage<N>::kColumnBoxes;
  auto& shared = shared_storage<SharedStorage<N>>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    shared.full.init(1);
    fence_mbarrier_init();
  }
  sync_block();
  if (thread == 0) {
    shared.full.arrive_expect((64 + (p.transposed_b ? kColumnBoxes * 64 : N)) * 128);
    tma_load(shared.a, a_map, shared.full, {0, 0});
    if (p.transposed_b)
      for (int i = 0; i < kColumnBoxes; i++)
        tma_load(shared.b + i * 64 * 128, b_map, shared.full, {i * 64, 0});
    else
      tma_load(shared.b, b_map, shared.full, {0, 0});
  }
  shared.full.wait(0);

  // A as registers: each warp its 16 rows, as for mma.sync
  const int lane = thread % 32, row = thread / 32 * 16 + lane % 16;
  const uint32_t a = shared_address(shared.a), b = shared_address(shared.b);
  uint32_t registers[4][4];
#pragma unroll
  for (int k = 0; k < 4; k++)
    ldmatrix_x4(registers[k], a + Swizzle<128>::chunk(row, k * 2 + lane / 16));

  Sum d[N / 2];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const bool accumulate = k > 0;
    if constexpr (sizeof(T) == 2) {
      const uint64_t b_columns = wgmma_descriptor_transposed(b + k * 16 * 128, 64 * 128);
      if (p.transposed_b && p.a_in_registers)
        Wgmma<T, N, true>::rs(d, registers[k], b_columns, accumulate);
      else if (p.transposed_b)
        Wgmma<T, N, true>::ss(d, wgmma_descriptor<128>(a + k * 32), b_columns, accumulate);
    }
    const uint64_t b_rows = wgmma_descriptor<128>(b + k * 32);
    if (!p.transposed_b && p.a_in_registers)
      Wgmma<T, N>::rs(d, registers[k], b_rows, accumulate);
    else if (!p.transposed_b)
      Wgmma<T, N>::ss(d, wgmma_descriptor<128>(a + k * 32), b_rows, accumulate);
  }
  wgmma_commit();
  wgmma_wait<0>();
  tie_registers(d);
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const int m = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
    p.d[m * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = word_of(d[i]);
  }
}

template <class T, class Sum, int N>
cudaError_t launch_one(const WgmmaParams& p, cudaStream_t stream) {
  constexpr uint64_t kColumns = 128 / sizeof(T);
  TensorMap a_map, b_map;
  const TensorShape<2> a{{kColumns, 64}, {128}, {kColumns, 64}};
  const TensorShape<2> rows{{kColumns, N}, {128}, {kColumns, N}};
  const TensorShape<2> columns{{N, 64}, {N * 2}, {64, 64}};
  const int bytes = static_cast<int>(sizeof(T));
  cudaError_t error = make_tensor_map(a_map, p.a, bytes, a, 128);
  if (error == cudaSuccess)
    error = make_tensor_map(b_map, p.b, bytes, p.transposed_b ? columns : rows, 128);
  if (error != cudaSuccess) return error;
  return launch(wgmma_kernel<T, Sum, N>, {dim3(1), 128, sizeof(SharedStorage<N>)}, stream, p, a_map,
                b_map);
}

template <class T, class Sum>
cudaError_t launch_type(const WgmmaParams& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, e4m3>) {
    if (p.N == 72) return launch_one<T, Sum, 72>(p, stream);
    if (p.N == 136) return launch_one<T, Sum, 136>(p, stream);
  }
  switch (p.N) {
    case 64:
      return launch_one<T, Sum, 64>(p, stream);
    case 96:
      return launch_one<T, Sum, 96>(p, stream);
    case 128:
      return launch_one<T, Sum, 128>(p, stream);
    case 160:
      return launch_one<T, Sum, 160>(p, stream);
    case 192:
      return launch_one<T, Sum, 192>(p, stream);
    case 224:
      return launch_one<T, Sum, 224>(p, stream);
    case 256:
      return launch_one<T, Sum, 256>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t wgmma_sm90(const WgmmaParams& p, cudaStream_t stream) {
  switch (p.type) {
    case Number::kInt8:
      return launch_type<int8_t, int32_t>(p, stream);
    case Number::kE4m3:
      return launch_type<e4m3, float>(p, stream);
    case Number::kFloat16:
      return launch_type<float16, float>(p, stream);
    case Number::kBfloat16:
      return launch_type<bfloat16, float>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace reeltime
