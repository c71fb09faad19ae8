// SPDX-License-Identifier: Apache-2.0
// What this build was made with.  CMakeLists.txt defines every REELTIME_ macro read here.
#pragma once

namespace reeltime::build_info {

constexpr const char* kVersion = REELTIME_VERSION;
constexpr const char* kCompiler = REELTIME_COMPILER;
constexpr const char* kBuildType = REELTIME_BUILD_TYPE;
constexpr const char* kNvcc = REELTIME_NVCC;                   // "" if none was found
constexpr const char* kCudaFamilies = REELTIME_CUDA_FAMILIES;  // "norm,quant", "" if none
constexpr const char* kCudaArchs = REELTIME_CUDA_ARCHS;        // "80,86,90a", "" if none

}  // namespace reeltime::build_info
