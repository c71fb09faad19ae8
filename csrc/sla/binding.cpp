// SPDX-License-Identifier: Apache-2.0
#include "binding.h"

#include "sla/sla.h"

namespace reeltime {

void register_sla(py::module_& m) {
  using P = PoolBlocksParams;
  bind<P>(m, "pool_blocks", {{80, pool_blocks_sm80}}, field("x", &P::x), field("mean", &P::mean),
          field("similar", &P::similar), field("code", &P::code), field("scale", &P::scale),
          field("O", &P::O), field("B", &P::B), field("S", &P::S), field("H", &P::H),
          field("D", &P::D), field("block", &P::block), field("stride_xo", &P::stride_xo),
          field("stride_xb", &P::stride_xb), field("stride_xs", &P::stride_xs),
          field("stride_xh", &P::stride_xh), field("similarity", &P::similarity),
          field("dtype", &P::dtype));

  using C = ChooseBlocksParams;
  bind<C>(m, "choose_blocks", {{80, choose_blocks_sm80}}, field("q", &C::q), field("k", &C::k),
          field("similar_q", &C::similar_q), field("similar_k", &C::similar_k),
          field("table", &C::table), field("offset_index", &C::offset_index),
          field("keys", &C::keys), field("code", &C::code), field("bounds", &C::bounds),
          field("blocks", &C::blocks), field("count", &C::count), field("O", &C::O),
          field("B", &C::B), field("rows", &C::rows), field("H", &C::H), field("H_kv", &C::H_kv),
          field("D", &C::D), field("T", &C::T), field("per_slot", &C::per_slot),
          field("capacity", &C::capacity), field("topk", &C::topk), field("topp", &C::topp),
          field("negligible", &C::negligible), field("sm_scale", &C::sm_scale),
          field("stride_qo", &C::stride_qo), field("stride_qb", &C::stride_qb),
          field("stride_qn", &C::stride_qn), field("stride_qh", &C::stride_qh),
          field("stride_kb", &C::stride_kb), field("stride_ks", &C::stride_ks),
          field("stride_kn", &C::stride_kn), field("stride_kh", &C::stride_kh),
          field("stride_gb", &C::stride_gb), field("stride_gn", &C::stride_gn),
          field("stride_gh", &C::stride_gh), field("stride_lb", &C::stride_lb),
          field("stride_ln", &C::stride_ln), field("stride_lh", &C::stride_lh),
          field("q_dtype", &C::q_dtype), field("k_dtype", &C::k_dtype));

  using S = CompressCodesParams;
  bind<S>(m, "compress_codes", {{80, compress_codes_sm80}}, field("code", &S::code),
          field("count", &S::count), field("selected_indptr", &S::selected_indptr),
          field("selected_indices", &S::selected_indices),
          field("marginal_indptr", &S::marginal_indptr),
          field("marginal_indices", &S::marginal_indices), field("heads", &S::heads),
          field("rows", &S::rows), field("n", &S::n), field("capacity", &S::capacity));

  using E = ExpandListsParams;
  bind<E>(m, "expand_lists", {{80, expand_lists_sm80}}, field("indptr", &E::indptr),
          field("indices", &E::indices), field("code", &E::code), field("B", &E::B),
          field("H", &E::H), field("rows", &E::rows), field("n", &E::n), field("room", &E::room),
          field("stride_pb", &E::stride_pb), field("stride_ph", &E::stride_ph),
          field("stride_pn", &E::stride_pn), field("stride_ib", &E::stride_ib),
          field("stride_ih", &E::stride_ih), field("stride_in", &E::stride_in));

  using H = SumSummariesParams;
  bind<H>(m, "sum_summaries", {{80, sum_summaries_sm80}}, field("h", &H::h), field("z", &H::z),
          field("code", &H::code), field("table", &H::table),
          field("offset_index", &H::offset_index), field("sum_h", &H::sum_h),
          field("sum_z", &H::sum_z), field("B", &H::B), field("slots", &H::slots),
          field("per_slot", &H::per_slot), field("H", &H::H), field("rows", &H::rows),
          field("D", &H::D), field("E", &H::E), field("T", &H::T), field("O", &H::O),
          field("covered", &H::covered), field("terms", &H::terms));

  using K = SummariseKeysParams;
  bind<K>(m, "summarise_keys", {{80, summarise_keys_sm80}}, field("k", &K::k), field("v", &K::v),
          field("h", &K::h), field("z", &K::z), field("B", &K::B), field("S", &K::S),
          field("H", &K::H), field("D", &K::D), field("E", &K::E), field("run", &K::run),
          field("stride_kb", &K::stride_kb), field("stride_ks", &K::stride_ks),
          field("stride_kh", &K::stride_kh), field("stride_vb", &K::stride_vb),
          field("stride_vs", &K::stride_vs), field("stride_vh", &K::stride_vh),
          field("phi", &K::phi), field("dtype", &K::dtype));

  using W = ProjectSumsParams;
  bind<W>(m, "project_sums", {{80, project_sums_sm80}}, field("x", &W::x),
          field("weight", &W::weight), field("out", &W::out), field("matrices", &W::matrices),
          field("D", &W::D), field("K", &W::K), field("N", &W::N), field("terms", &W::terms),
          field("stride_wn", &W::stride_wn), field("stride_wk", &W::stride_wk),
          field("weight_dtype", &W::weight_dtype), field("processors", &W::processors));

  using L = LinearParams;
  bind<L>(m, "linear_rows", {{80, linear_rows_sm80}}, field("q", &L::q), field("h", &L::h),
          field("z", &L::z), field("bias", &L::bias), field("table", &L::table),
          field("out", &L::out), field("T", &L::T), field("O", &L::O), field("B", &L::B),
          field("L", &L::L), field("H", &L::H), field("H_sum", &L::H_sum), field("rows", &L::rows),
          field("D", &L::D), field("E", &L::E), field("block_q", &L::block_q),
          field("stride_qo", &L::stride_qo), field("stride_qb", &L::stride_qb),
          field("stride_ql", &L::stride_ql), field("stride_qh", &L::stride_qh),
          field("eps", &L::eps), field("phi", &L::phi), field("dtype", &L::dtype),
          field("bias_dtype", &L::bias_dtype));
}

}  // namespace reeltime
