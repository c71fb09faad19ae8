// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

#include "rope_kv/rope_kv.h"

namespace reeltime {

void register_rope_kv(py::module_& m) {
  using R = RotateRowsParams;
  bind<R>(m, "rotate_rows", {{80, rotate_rows_sm80}}, field("x", &R::x),
          field("weight", &R::weight), field("table", &R::table), field("out", &R::out),
          field("B", &R::B), field("T", &R::T), field("N", &R::N), field("H", &R::H),
          field("D", &R::D), field("O", &R::O), field("stride_xb", &R::stride_xb),
          field("stride_xt", &R::stride_xt), field("stride_xn", &R::stride_xn),
          field("stride_xh", &R::stride_xh), field("stride_xd", &R::stride_xd),
          field("stride_to", &R::stride_to), field("stride_tl", &R::stride_tl),
          field("eps", &R::eps), field("sm_scale", &R::sm_scale), field("dtype", &R::dtype),
          field("weight_dtype", &R::weight_dtype));

  using Q = QueryInt8Params;
  bind<Q>(m, "query_int8", {{80, query_int8_sm80}}, field("q", &Q::q), field("weight", &Q::weight),
          field("table", &Q::table), field("inverse", &Q::inverse), field("out", &Q::out),
          field("code", &Q::code), field("scale", &Q::scale), field("B", &Q::B), field("L", &Q::L),
          field("H", &Q::H), field("D", &Q::D), field("O", &Q::O),
          field("stride_qb", &Q::stride_qb), field("stride_ql", &Q::stride_ql),
          field("stride_to", &Q::stride_to), field("stride_tl", &Q::stride_tl),
          field("eps", &Q::eps), field("sm_scale", &Q::sm_scale), field("dtype", &Q::dtype),
          field("weight_dtype", &Q::weight_dtype), field("processors", &Q::processors));

  using W = WriteCacheParams;
  bind<W>(m, "write_cache", {{80, write_cache_sm80}}, field("k", &W::k), field("v", &W::v),
          field("weight", &W::weight), field("table", &W::table), field("slots", &W::slots),
          field("inverse", &W::inverse), field("cache_k", &W::cache_k),
          field("cache_v", &W::cache_v), field("k_scale", &W::k_scale), field("k_mean", &W::k_mean),
          field("v_scale", &W::v_scale), field("h", &W::h), field("z", &W::z),
          field("slot_h", &W::slot_h), field("slot_z", &W::slot_z), field("B", &W::B),
          field("F", &W::F), field("N", &W::N), field("H", &W::H), field("D", &W::D),
          field("S", &W::S), field("stride_kb", &W::stride_kb), field("stride_kl", &W::stride_kl),
          field("stride_vb", &W::stride_vb), field("stride_vl", &W::stride_vl),
          field("stride_tl", &W::stride_tl), field("stride_s", &W::stride_s), field("eps", &W::eps),
          field("phi", &W::phi), field("k_dtype", &W::k_dtype), field("v_dtype", &W::v_dtype),
          field("weight_dtype", &W::weight_dtype), field("cache_k_dtype", &W::cache_k_dtype),
          field("cache_v_dtype", &W::cache_v_dtype), field("mean_dtype", &W::mean_dtype),
          field("processors", &W::processors));
}

}  // namespace reeltime
