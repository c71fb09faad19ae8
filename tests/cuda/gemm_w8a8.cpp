// SPDX-License-Identifier: Apache-2.0
#include "gemm_w8a8/gemm_w8a8.h"

#include "emulator/library.h"

using namespace reeltime;
EMULATED(gemm_w8a8_sm80, GemmParams)
