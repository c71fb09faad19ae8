// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

#include "gemm_w8a8/gemm_w8a8.h"

namespace reeltime {

void register_gemm_w8a8(py::module_& m) {
  using G = GemmParams;
  bind<G>(m, "gemm_w8a8", {{80, gemm_w8a8_sm80}, {90, gemm_w8a8_sm90}}, field("a", &G::a),
          field("b", &G::b), field("a_scale", &G::a_scale), field("b_scale", &G::b_scale),
          field("bias", &G::bias), field("residual", &G::residual), field("gate", &G::gate),
          field("out", &G::out), field("out_scale", &G::out_scale), field("M", &G::M),
          field("N", &G::N), field("K", &G::K), field("block_rows", &G::block_rows),
          field("frame_rows", &G::frame_rows), field("stride_a", &G::stride_a),
          field("stride_b", &G::stride_b), field("stride_am", &G::stride_am),
          field("stride_ak", &G::stride_ak), field("stride_bn", &G::stride_bn),
          field("stride_bk", &G::stride_bk), field("stride_bias", &G::stride_bias),
          field("stride_rm", &G::stride_rm), field("stride_rn", &G::stride_rn),
          field("stride_gf", &G::stride_gf), field("stride_gn", &G::stride_gn),
          field("dtype", &G::dtype), field("bias_dtype", &G::bias_dtype),
          field("residual_dtype", &G::residual_dtype), field("gate_dtype", &G::gate_dtype),
          field("out_dtype", &G::out_dtype), field("epilogue", &G::epilogue),
          field("processors", &G::processors));
}

}  // namespace reeltime
