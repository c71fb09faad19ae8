// SPDX-License-Identifier: Apache-2.0
// The two compilers of a kernel file: nvcc for a GPU, g++ or clang++ for the emulator.  A third
// reads only the parameters of a family: the host compiler of binding.cpp.
//
// Each wrapper in this folder is one function with two bodies: the PTX instruction, and a call of
// its model in csrc/emulator.  Kernels include these headers and nothing else, and have no #if.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#define REELTIME_EMULATED 0
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(REELTIME_BINDING)
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#define REELTIME_EMULATED 0
#define HOST_DEVICE inline
#define DEVICE inline
#else
#include "emulator/device.h"
#endif

namespace reeltime {

constexpr unsigned kFullWarp = 0xffffffffu;

HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

#if !defined(REELTIME_BINDING)
// x, of which the compiler no longer knows where it comes from: what depends on it is computed
// where it is used, instead of before a loop, to wait in registers.
DEVICE int opaque(int x) {
#if !REELTIME_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

DEVICE unsigned lane_index() { return threadIdx.x % 32; }  // blocks are one-dimensional
DEVICE unsigned warp_index() { return threadIdx.x / 32; }
#endif

}  // namespace reeltime
