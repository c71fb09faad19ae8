// SPDX-License-Identifier: Apache-2.0
// What a kernel file sees of the emulator: CUDA's keywords, and one function per instruction.
//
// A kernel file compiled by g++ includes this in place of CUDA's headers (common/target.h picks).
// The functions are defined in the other files of this folder, which no sanitizer instruments; the
// wrappers in csrc/common are inlined into the kernel, so the return address that each function
// takes is the line of the kernel that called, and reports can name it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define REELTIME_EMULATED 1
#define DEVICE __attribute__((always_inline)) inline
#define HOST_DEVICE __attribute__((always_inline)) inline
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

// --- CUDA's own names ------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

namespace reeltime::emulator {

// --- The running thread ----------------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};
struct Thread {
  Index thread, block, block_dim, grid_dim;
  unsigned char* shared;  // this block's window
  unsigned cluster_rank, cluster_size;
};
extern const Thread* current;  // one OS thread runs all fibers

struct LaunchShape {
  dim3 grid, block;
  unsigned cluster_size;
  size_t shared_bytes;
};
cudaError_t launch(const LaunchShape& shape, const void* kernel, void (*body)(const void*),
                   const void* arguments, size_t argument_bytes);

// --- Addresses -------------------------------------------------------------------------------

uint32_t shared_address(const void* pointer);
// Fails unless [pointer, pointer + bytes) lies in one range that the host registered.
void check_global(const void* pointer, size_t bytes, size_t alignment, bool write, const char* op);
// The same for a read of what no thread may write during the launch.
void check_constant(const void* pointer, size_t bytes, size_t alignment, const char* op);

// Applies update(pointer, value) to global or shared memory, as one access that races with no
// other.
void atomic(void* pointer, size_t bytes, void* before, const char* op,
            void (*update)(void* pointer, const void* value), const void* value);

// --- Collectives of a warp -------------------------------------------------------------------

void sync_warp(unsigned mask);
void shuffle(const char* op, unsigned mask, void* value, size_t bytes, unsigned source_lane);
unsigned ballot(unsigned mask, bool predicate);
void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t row);
void stmatrix(const uint32_t* registers, int matrices, bool transposed, uint32_t row);

enum class Element { kS8, kE4m3, kF16, kBf16 };
void mma(Element type, void* d, const uint32_t* a, const uint32_t* b);
void mma_half(Element type, uint32_t* d, const uint32_t* a, const uint32_t* b);

// --- Barriers and fences ---------------------------------------------------------------------

void barrier(unsigned id, unsigned threads, bool wait);  // threads 0: the whole block
void cluster_barrier();
void fence_async_proxy();
void fence_device();
void mbarrier_init(uint32_t address, uint32_t arrivals);
void mbarrier_arrive(uint32_t address, uint32_t arrivals, uint32_t transaction_bytes);
void mbarrier_wait(uint32_t address, uint32_t parity);
bool mbarrier_test(uint32_t address, uint32_t parity);
uint32_t map_to_rank(uint32_t address, unsigned rank);
void store_in_cluster(uint32_t address, const void* value, size_t bytes);

// --- Asynchronous copies ---------------------------------------------------------------------

void cp_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t valid_bytes);
void cp_async_commit();
void cp_async_wait(uint32_t pending_groups);

// Shares its 128 bytes with CUtensorMap; filled by make_tensor_map (common/tensor_map.h).
struct TensorMapFields {
  const unsigned char* base;
  uint64_t size[5], stride[5];  // elements; bytes
  uint32_t box[5];
  uint8_t rank, element_bytes, swizzle_bytes, valid;
};
void tma_load(uint32_t destination, const void* map, uint32_t barrier, const int* coordinates,
              int rank, uint32_t cluster_mask);
void tma_store(const void* map, uint32_t source, const int* coordinates, int rank);
void bulk_commit();
void bulk_wait(uint32_t pending_groups, bool read_only);

// --- Warpgroup products ----------------------------------------------------------------------

struct WgmmaOperands {
  Element type;
  int n;
  void* d;
  const uint32_t* a_registers;  // null: A comes from shared memory
  uint64_t a, b;
  bool accumulate, b_transposed;
};
void wgmma_fence();
void wgmma(const WgmmaOperands& operands);
void wgmma_commit();
void wgmma_wait(uint32_t pending_groups);

}  // namespace reeltime::emulator

#define threadIdx (::reeltime::emulator::current->thread)
#define blockIdx (::reeltime::emulator::current->block)
#define blockDim (::reeltime::emulator::current->block_dim)
#define gridDim (::reeltime::emulator::current->grid_dim)
