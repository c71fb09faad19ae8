// SPDX-License-Identifier: Apache-2.0
// Which tile gemm_w8a8 takes on Hopper, for Python.
#include "gemm_w8a8/choice.h"

using namespace reeltime::gemm_sm90;

// Rows, columns, tiles of a cluster downwards and sideways, parts; and the tiles' share of what the
// waves have room for, in percent.
extern "C" __attribute__((visibility("default"))) void chosen(int M, int N, int K, int processors,
                                                              int block_rows, int* tile) {
  const Choice choice = choose(M, N, K, processors, block_rows);
  tile[0] = choice.rows();
  tile[1] = choice.columns;
  tile[2] = choice.high();
  tile[3] = choice.wide();
  tile[4] = choice.parts;
}
