// SPDX-License-Identifier: Apache-2.0
// The test kernels as one library for Python.
#include "boxes.h"
#include "convert.h"
#include "copy_sm80.h"
#include "emulator/library.h"
#include "exchange_sm90.h"
#include "fragments.h"
#include "gemm.h"
#include "in_place_sm90.h"
#include "reduce_rows.h"
#include "split_sm80.h"

using namespace reeltime;
EMULATED(copy_sm80, CopyParams)
EMULATED(gemm_sm80, GemmParams)
EMULATED(gemm_sm90, GemmParams)
EMULATED(reduce_rows, ReduceParams)
EMULATED(split_sm80, SplitParams)
EMULATED(in_place_sm90, InPlaceParams)
EMULATED(exchange_sm90, ExchangeParams)
EMULATED(fragments_sm90, FragmentParams)
EMULATED(wgmma_sm90, WgmmaParams)
EMULATED(boxes_sm90, BoxParams)
EMULATED(multicast_sm90, MulticastParams)
EMULATED(convert, ConvertParams)
