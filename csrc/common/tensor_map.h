// SPDX-License-Identifier: Apache-2.0
// TensorMap: what TMA knows of a tensor.  Made on the host, passed by value as __grid_constant__.
//
// libcuda is not linked: its encoder is looked up when the first map is made.
#pragma once
#include "common/target.h"

#if !REELTIME_EMULATED
#include <cuda.h>

#include "common/record.h"
#endif

namespace reeltime {

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// A tensor of kRank dimensions, innermost first and contiguous, cut into boxes.
template <int kRank>
struct TensorShape {
  uint64_t size[kRank];        // elements
  uint64_t stride[kRank - 1];  // bytes, of dimensions 1 and up; multiples of 16
  uint32_t box[kRank];         // elements, at most 256 each; box[0] a multiple of 16 bytes
};

// element_bytes 1, 2 or 4; swizzle_bytes 0, 32, 64 or 128.
template <int kRank>
inline cudaError_t make_tensor_map(TensorMap& map, const void* base, int element_bytes,
                                   const TensorShape<kRank>& shape, int swizzle_bytes) {
  static_assert(kRank >= 2 && kRank <= 4, "");
  bool good = reinterpret_cast<uintptr_t>(base) % 16 == 0;
  good &= element_bytes == 1 || element_bytes == 2 || element_bytes == 4;
  good &= shape.box[0] * element_bytes % 16 == 0;
  good &=
      swizzle_bytes == 0 || shape.box[0] * element_bytes <= static_cast<unsigned>(swizzle_bytes);
  for (int i = 0; i < kRank; i++)
    good &= shape.size[i] > 0 && shape.box[i] > 0 && shape.box[i] <= 256;
  for (int i = 0; i < kRank - 1; i++) good &= shape.stride[i] % 16 == 0;
  if (!good) return cudaErrorInvalidValue;

#if REELTIME_EMULATED
  emulator::TensorMapFields fields{};
  static_assert(sizeof fields <= sizeof map, "");
  fields.base = static_cast<const unsigned char*>(base);
  for (int i = 0; i < kRank; i++) {
    fields.size[i] = shape.size[i];
    fields.stride[i] = i ? shape.stride[i - 1] : static_cast<uint64_t>(element_bytes);
    fields.box[i] = shape.box[i];
  }
  fields.rank = kRank;
  fields.element_bytes = static_cast<uint8_t>(element_bytes);
  fields.swizzle_bytes = static_cast<uint8_t>(swizzle_bytes);
  fields.valid = 1;
  memcpy(&map, &fields, sizeof fields);
  return cudaSuccess;
#else
  if (recorded_launches) return cudaSuccess;  // nobody will read it, and there may be no driver
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static void* encode = nullptr;
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess || !encode) return cudaErrorNotSupported;
  }
  const CUtensorMapDataType type = element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const CUtensorMapSwizzle swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint32_t step[kRank];
  for (int i = 0; i < kRank; i++) step[i] = 1;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap), "");
  const CUresult result = reinterpret_cast<Encode>(encode)(
      reinterpret_cast<CUtensorMap*>(&map), type, kRank, const_cast<void*>(base), shape.size,
      shape.stride, shape.box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

}  // namespace reeltime
