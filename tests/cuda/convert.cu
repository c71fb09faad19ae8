// SPDX-License-Identifier: Apache-2.0
// Numbers in and out of every format: on a GPU its instructions, on the host their twins.
#include "common/approx.h"
#include "common/convert.h"
#include "common/launch.h"
#include "convert.h"

namespace reeltime {
namespace {

__global__ void __launch_bounds__(256) narrow_kernel(const ConvertParams p) {
  const int group = static_cast<int>(blockIdx.x * 256 + threadIdx.x), i = group * 4;
  if (i >= p.n) return;
  const float* x = p.x + i;
  for (int j = 0; j < 4; j++) {
    p.to_e4m3[i + j] = from_float<e4m3>(x[j]).bits;
    p.to_float16[i + j] = from_float<float16>(x[j]).bits;
    p.to_bfloat16[i + j] = from_float<bfloat16>(x[j]).bits;
    p.to_int8[i + j] = from_float<int8_t>(x[j]);
    const float exponent = x[j] > 0 || x[j] != x[j] ? 0.0f : max(x[j], -126.0f);
    p.exp2[i + j] = exp2_approx(exponent);
    p.exp2_by_fma[i + j] = exp2_fma(exponent);
  }
  p.four_e4m3[group] = pack4<e4m3>(x[0], x[1], x[2], x[3]);
  p.four_int8[group] = pack4<int8_t>(x[0], x[1], x[2], x[3]);
  for (int j = 0; j < 2; j++) {
    p.two_float16[group * 2 + j] = pack2<float16>(x[2 * j], x[2 * j + 1]);
    p.two_bfloat16[group * 2 + j] = pack2<bfloat16>(x[2 * j], x[2 * j + 1]);
  }
}

__global__ void __launch_bounds__(256) widen_kernel(const ConvertParams p) {
  const uint32_t i = blockIdx.x * 256 + threadIdx.x;  // all of 16 bits
  p.of_e4m3[i] = unpack<e4m3>(i << 24, 3);
  p.of_float16[i] = unpack<float16>(i << 16, 1);
  p.of_bfloat16[i] = unpack<bfloat16>(i, 0);
  p.of_sum[i] = biased_to_float(kIntBias + 64 * static_cast<int32_t>(i) - (1 << 21));
}

}  // namespace

cudaError_t convert(const ConvertParams& p, cudaStream_t stream) {
  const cudaError_t error = launch(narrow_kernel, {dim3(ceil_div(p.n, 1024)), 256}, stream, p);
  return error == cudaSuccess ? launch(widen_kernel, {dim3(256), 256}, stream, p) : error;
}

}  // namespace reeltime
