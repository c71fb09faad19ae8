# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of sla's linear branch: csrc/sla/summaries.h, csrc/sla/linear.h.

summaries(k, v, phi, run)                 h = phi(K)^T V and z = sum of phi(K), of runs of keys
reach(over, choice, h, z, segments, ...)  H and Z of the query blocks, projected, for linear_into
linear_into(out, q, H, Z, bias, ...)      out = phi(q) H / (phi(q) Z + eps) + bias
branch(q, over, choice, h, z, ...)        both, for sla

H is [O, B, H or H_kv, rows or 1, D, E] float32, or as linear_into reads it [..., terms, D, E]
bfloat16, whose sum over `terms` it is: as many as a query of that dtype is worth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reeltime import native
from reeltime.attention.cuda import aligned, unfit_dims
from reeltime.native import code, code_of, launch, strides, unless
from reeltime.sla import api
from reeltime.sla.arguments import PHI
from reeltime.sla.cuda_mask import Choice, expand

FLOAT32 = torch.float32
TERMS = {torch.bfloat16: 1, torch.float16: 2, FLOAT32: 3}  # kTermsOf of csrc/sla/terms.h

# Which codes the linear branch sums: of a Choice, and of lists that were expanded
COVERED = {"unselected": 0b1100, "marginal": 0b0100}
COVERED_LISTS = {"unselected": 0b0001, "marginal": 0b0010}


def _floats(x: Tensor) -> Tensor:
    """Contiguous float32 on 16 bytes: what caches hold; anything else is copied."""
    x = x.float().contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def summaries(k: Tensor, v: Tensor, phi: str, run: int) -> tuple[Tensor, Tensor]:
    """h [B, ceil(S / run), H, D, E] and z [B, ceil(S / run), H, D] of k, v [B, S, H, D or E]."""
    (B, S, H, D), E = k.shape, v.shape[3]
    k, v, run = aligned(k), aligned(v), min(run, max(S, 1))
    runs = -(-S // run)
    h = k.new_empty((B, runs, H, D, E), dtype=FLOAT32)
    z = k.new_empty((B, runs, H, D), dtype=FLOAT32)
    launch(
        "summarise_keys",
        k.device,
        k=k,
        v=v,
        h=h,
        z=z,
        **{"B": B, "S": S, "H": H, "D": D, "E": E},
        run=run,
        **strides("k", k, "bsh"),
        **strides("v", v, "bsh"),
        phi=PHI.index(phi),
        dtype=code(k.dtype),
    )
    return h, z


def _sum(
    h: Tensor,  # [B, slots, per_slot, H_kv, D, E]
    z: Tensor,  # [B, slots, per_slot, H_kv, D]
    codes: Tensor | None,  # [B, H, rows, n] int8 contiguous; None: all blocks
    covered: int,
    segments: tuple[Tensor, Tensor] | None,
    offsets: int,
    terms: int,
) -> tuple[Tensor, Tensor]:
    B, slots, per_slot, H_kv, D, E = h.shape
    H, rows = (H_kv, 1) if codes is None else codes.shape[1:3]
    table, offset_index = (None, None) if segments is None else segments
    shape = (offsets, B, H, rows)
    if terms:
        sum_h = h.new_empty((*shape, terms, D, E), dtype=torch.bfloat16)
    else:
        sum_h = h.new_empty((*shape, D, E), dtype=FLOAT32)
    sum_z = h.new_empty((*shape, D), dtype=FLOAT32)
    launch(
        "sum_summaries",
        h.device,
        h=_floats(h),
        z=_floats(z),
        code=codes,
        table=table,
        offset_index=offset_index,
        sum_h=sum_h,
        sum_z=sum_z,
        **{"B": B, "slots": slots, "per_slot": per_slot, "H": H_kv, "rows": H // H_kv * rows},
        **{"D": D, "E": E, "T": 1 if table is None else table.shape[0], "O": offsets},
        covered=covered,
        terms=terms,
    )
    return sum_h, sum_z


def project(x: Tensor, weight: Tensor, terms: int = 0) -> Tensor:
    """x [..., D, K] weight^T, weight [N, K], as float32 or so many terms; x contiguous float32."""
    (*lead, D, K), N = x.shape, weight.shape[0]
    if terms:
        out = x.new_empty((*lead, terms, D, N), dtype=torch.bfloat16)
    else:
        out = x.new_empty((*lead, D, N))
    launch(
        "project_sums",
        x.device,
        x=x,
        weight=weight,
        out=out,
        matrices=x.numel() // (D * K),
        **{"D": D, "K": K, "N": N},
        terms=terms,
        **strides("w", weight, "nk"),
        weight_dtype=code(weight.dtype),
        processors=native.processors(x.device),
    )
    return out


def reach(
    over: str,
    choice: Choice,  # with code, unless over="all"
    h: Tensor,  # [B, slots, per_slot, H_kv, D, E]; over="all" does not mind what per_slot is
    z: Tensor,  # [B, slots, per_slot, H_kv, D]
    segments: tuple[Tensor, Tensor] | None,  # table and offset_index, [T] int64 contiguous
    offsets: int,
    dtype: torch.dtype,  # of the query that linear_into will get
    weight: Tensor | None = None,  # [E, E]
) -> tuple[Tensor, Tensor]:
    """H, as linear_into reads it, and Z of the linear branch."""
    terms, codes = TERMS[dtype], None if over == "all" else choice.code
    covered = 0 if over == "all" else COVERED[over]
    total_h, total_z = _sum(h, z, codes, covered, segments, offsets, terms if weight is None else 0)
    return total_h if weight is None else project(total_h, weight, terms), total_z


def linear_into(
    out: Tensor,  # [B, L, H, E] of q's dtype, contiguous
    q: Tensor,  # [O, B, L, H, D]
    h: Tensor,  # [O, B, H or H_kv, rows or 1, terms, D, E]
    z: Tensor,  # [O, B, H or H_kv, rows or 1, D]
    bias: Tensor | None,  # [E]
    block_q: int,
    phi: str,
    eps: float,
    table: Tensor | None = None,  # [T] int64 contiguous
) -> None:
    """phi(q) H / (phi(q) Z + eps) + bias; the bias alone where no block is included, and 0 where
    every entry of the table is absent."""
    q = aligned(q)
    (O, B, L, H, D), E = q.shape, out.shape[3]  # noqa: E741
    assert h.shape[4] == TERMS[q.dtype]
    bias = None if bias is None else bias.contiguous()
    launch(
        "linear_rows",
        q.device,
        q=q,
        h=h,
        z=z,
        bias=bias,
        table=table,
        out=out,
        T=0 if table is None else table.shape[0],
        **{"O": O, "B": B, "L": L, "H": H, "H_sum": h.shape[2], "rows": h.shape[3]},
        **{"D": D, "E": E},
        block_q=min(block_q, max(L, 1)),
        **strides("q", q, "oblh"),
        eps=eps,
        phi=PHI.index(phi),
        dtype=code(q.dtype),
        bias_dtype=code_of(bias),
    )


def branch(
    q: Tensor,  # [O, B, L, H, D]
    over: str,
    choice: Choice,
    h: Tensor,  # as reach() takes them
    z: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    block_q: int,
    phi: str,
    eps: float,
) -> Tensor:
    """The linear branch [B, L, H, E], projected, for attention to add."""
    sums = reach(over, choice, h, z, segments, q.shape[0], q.dtype, weight)
    out = q.new_empty((*q.shape[1:4], h.shape[-1]))
    table = None if segments is None else segments[0]
    linear_into(out, q, *sums, bias, block_q, phi, eps, table)
    return out


def _unfit(q: Tensor, h: Tensor, *_: Any) -> str | None:
    return unfit_dims(*h.shape[3:])


@api.LINEAR_ATTENTION.kernel("cuda", unless=unless(0, 1, 2, check=_unfit))
def linear_attention(
    q: Tensor,
    h: Tensor,
    z: Tensor,
    indptr: Tensor | None,
    indices: Tensor | None,
    over: str,
    block_q: int,
    phi: str,
    eps: float,
) -> Tensor:
    codes, covered = None, 0
    if indptr is not None and indices is not None:
        codes, covered = expand(indptr, indices, h.shape[1]), COVERED_LISTS[over]
    terms = TERMS[q.dtype]
    sums = _sum(h.unsqueeze(1), z.unsqueeze(1), codes, covered, None, 1, terms)
    out = q.new_empty((*q.shape[:3], h.shape[4]))
    linear_into(out, q.unsqueeze(0), *sums, None, block_q, phi, eps)
    return out
