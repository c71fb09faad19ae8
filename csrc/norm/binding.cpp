// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

#include "norm/norm.h"

namespace reeltime {

void register_norm(py::module_& m) {
  using N = NormParams;
  bind<N>(m, "normalise", {{80, normalise_sm80}}, field("x", &N::x), field("h", &N::h),
          field("gate", &N::gate), field("weight", &N::weight), field("bias", &N::bias),
          field("scale", &N::scale), field("shift", &N::shift), field("x_new", &N::x_new),
          field("y", &N::y), field("y_scale", &N::y_scale), field("statistics", &N::statistics),
          field("B", &N::B), field("L", &N::L), field("C", &N::C),
          field("block_rows", &N::block_rows), field("gate_rows", &N::gate_rows),
          field("scale_rows", &N::scale_rows), field("shift_rows", &N::shift_rows),
          field("segment_rows", &N::segment_rows), field("stride_xb", &N::stride_xb),
          field("stride_xl", &N::stride_xl), field("stride_hb", &N::stride_hb),
          field("stride_hl", &N::stride_hl), field("stride_wc", &N::stride_wc),
          field("stride_bc", &N::stride_bc), field("stride_gb", &N::stride_gb),
          field("stride_gf", &N::stride_gf), field("stride_gc", &N::stride_gc),
          field("stride_cb", &N::stride_cb), field("stride_cf", &N::stride_cf),
          field("stride_cc", &N::stride_cc), field("stride_sb", &N::stride_sb),
          field("stride_sf", &N::stride_sf), field("stride_sc", &N::stride_sc),
          field("eps", &N::eps), field("kind", &N::kind), field("x_dtype", &N::x_dtype),
          field("gate_dtype", &N::gate_dtype), field("weight_dtype", &N::weight_dtype),
          field("bias_dtype", &N::bias_dtype), field("scale_dtype", &N::scale_dtype),
          field("shift_dtype", &N::shift_dtype), field("y_dtype", &N::y_dtype),
          field("processors", &N::processors), field("shared_limit", &N::shared_limit));
}

}  // namespace reeltime
