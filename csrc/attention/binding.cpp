// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

#include "attention/attention.h"

namespace reeltime {

// On Hopper: its own kernel, where that serves the call; the other has no products of e4m3 there.
static cudaError_t attention_on_sm90(const AttentionParams& params, cudaStream_t stream) {
  if (attention_sm90_serves(params)) return attention_sm90(params, stream);
  return params.qk_dtype == Dtype::kInt8 ? attention_sm80(params, stream) : cudaErrorInvalidValue;
}

void register_attention(py::module_& m) {
  using E = EncodeQkvParams;
  bind<E>(m, "encode_qkv", {{80, encode_qkv_sm80}}, field("q", &E::q), field("k", &E::k),
          field("v", &E::v), field("q_code", &E::q_code), field("q_scale", &E::q_scale),
          field("k_code", &E::k_code), field("k_scale", &E::k_scale), field("k_mean", &E::k_mean),
          field("partial", &E::partial), field("v_code", &E::v_code), field("v_scale", &E::v_scale),
          field("B", &E::B), field("S_q", &E::S_q), field("S_kv", &E::S_kv), field("H", &E::H),
          field("H_kv", &E::H_kv), field("D", &E::D), field("E", &E::E),
          field("stride_qb", &E::stride_qb), field("stride_qs", &E::stride_qs),
          field("stride_qh", &E::stride_qh), field("stride_kb", &E::stride_kb),
          field("stride_ks", &E::stride_ks), field("stride_kh", &E::stride_kh),
          field("stride_vb", &E::stride_vb), field("stride_vs", &E::stride_vs),
          field("stride_vh", &E::stride_vh), field("smooth", &E::smooth),
          field("x_dtype", &E::x_dtype), field("qk_dtype", &E::qk_dtype),
          field("v_dtype", &E::v_dtype));

  using A = AttentionParams;
  bind<A>(m, "attention", {{80, attention_sm80}, {90, attention_on_sm90}}, field("q", &A::q),
          field("q_code", &A::q_code), field("q_scale", &A::q_scale), field("k", &A::k),
          field("v", &A::v), field("k_scale", &A::k_scale), field("k_mean", &A::k_mean),
          field("v_scale", &A::v_scale), field("mask", &A::mask), field("table", &A::table),
          field("offset_index", &A::offset_index), field("list_bounds", &A::list_bounds),
          field("list_blocks", &A::list_blocks), field("added", &A::added), field("out", &A::out),
          field("lse", &A::lse), field("B", &A::B), field("L", &A::L), field("N", &A::N),
          field("H", &A::H), field("H_kv", &A::H_kv), field("D", &A::D), field("E", &A::E),
          field("slots", &A::slots), field("T", &A::T), field("splits", &A::splits),
          field("room", &A::room), field("stride_list_head", &A::stride_list_head),
          field("stride_list_row", &A::stride_list_row), field("causal", &A::causal),
          field("first_last", &A::first_last), field("stride_qo", &A::stride_qo),
          field("stride_qb", &A::stride_qb), field("stride_ql", &A::stride_ql),
          field("stride_qh", &A::stride_qh), field("stride_kb", &A::stride_kb),
          field("stride_ks", &A::stride_ks), field("stride_kn", &A::stride_kn),
          field("stride_kh", &A::stride_kh), field("stride_vb", &A::stride_vb),
          field("stride_vs", &A::stride_vs), field("stride_vn", &A::stride_vn),
          field("stride_vh", &A::stride_vh), field("stride_mb", &A::stride_mb),
          field("stride_mh", &A::stride_mh), field("stride_ml", &A::stride_ml),
          field("stride_mn", &A::stride_mn), field("sm_scale", &A::sm_scale),
          field("pv_skip", &A::pv_skip), field("smooth", &A::smooth), field("q_dtype", &A::q_dtype),
          field("mean_dtype", &A::mean_dtype), field("mask_dtype", &A::mask_dtype),
          field("qk_dtype", &A::qk_dtype), field("v_dtype", &A::v_dtype),
          field("out_dtype", &A::out_dtype));

  using C = CombineParams;
  bind<C>(m, "combine_parts", {{80, combine_parts_sm80}}, field("part", &C::part),
          field("part_lse", &C::part_lse), field("out", &C::out), field("lse", &C::lse),
          field("B", &C::B), field("L", &C::L), field("H", &C::H), field("E", &C::E),
          field("splits", &C::splits), field("out_dtype", &C::out_dtype));
}

}  // namespace reeltime
