// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

#include "quant/quant.h"

namespace reeltime {

void register_quant(py::module_& m) {
  using Q = QuantizeParams;
  bind<Q>(m, "quantize", {{80, quantize_sm80}}, field("x", &Q::x), field("xq", &Q::xq),
          field("x_scale", &Q::x_scale), field("M", &Q::M), field("K", &Q::K),
          field("stride_xm", &Q::stride_xm), field("block_rows", &Q::block_rows),
          field("x_dtype", &Q::x_dtype), field("dtype", &Q::dtype));

  using D = DequantizeParams;
  bind<D>(m, "dequantize", {{80, dequantize_sm80}}, field("xq", &D::xq),
          field("x_scale", &D::x_scale), field("x", &D::x), field("M", &D::M), field("K", &D::K),
          field("stride_qm", &D::stride_qm), field("stride_qk", &D::stride_qk),
          field("stride_sm", &D::stride_sm), field("stride_sk", &D::stride_sk),
          field("block_rows", &D::block_rows), field("dtype", &D::dtype),
          field("x_dtype", &D::x_dtype));
}

}  // namespace reeltime
