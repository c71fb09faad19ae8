# SPDX-License-Identifier: Apache-2.0
"""sla on Triton: its ops, and which kernels each is made of.

block_mask        score, select, compress, compress                          (triton_mask)
sparse_attention  attend                                                     (triton_attend)
linear_attention  sum | expand, cover; linear           (triton_summaries, triton_attend)
sla               pool, keys, score, select, sum | cover, (project), attend
segment_sla       pool, score, select, sum | cover, (project), attend: keys are in the cache
gradients         the forward's statistics again, then dq, dkv, dh            (triton_backward)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reeltime.attention.reference import STORED
from reeltime.attention.triton_encode import encode
from reeltime.jit.launch import arch_of, dense, refuses, unless, width
from reeltime.rope_kv.reference import BLOCK
from reeltime.sla import api
from reeltime.sla import triton_backward as triton_backward  # adds the gradients
from reeltime.sla.triton_attend import attend, by_head, lists_of
from reeltime.sla.triton_linear import FLOAT32, linear_into
from reeltime.sla.triton_mask import choose, compress, pool
from reeltime.sla.triton_summaries import parts_of, project, reach, sums_of

INFINITY = float("inf")  # pv_skip: nothing is skipped


@api.BLOCK_MASK.kernel("triton", unless=unless(0, 1))
def block_mask(
    pooled_q: Tensor,
    pooled_k: Tensor,
    similar_q: Tensor | None,
    similar_k: Tensor | None,
    topk: int | None,
    topp: float | None,
    negligible: float,
    sm_scale: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    guard_q = None if similar_q is None else similar_q.view(torch.uint8)
    guard_k = None if similar_k is None else similar_k.view(torch.uint8)
    queries, keys = dense(pooled_q).unsqueeze(0), dense(pooled_k).unsqueeze(1)
    choice = choose(
        queries, keys, guard_q, guard_k, None, topk, topp, negligible, sm_scale, want="code"
    )
    code, bounds = choice.code, choice.bounds
    assert code is not None
    selected = compress(code, bounds[..., 1], bounds[..., 0], 1, capacity)
    return *selected, *compress(code, bounds[..., 3], None, 2, pooled_k.shape[1])


def _skips(
    device: torch.device, q: Tensor, E: int, pv_skip: float, block_q: int, block_k: int
) -> str | None:
    """pv_skip looks at a whole query block and a whole key block at once."""
    rows, keys = width(min(block_q, max(q.shape[-3], 1))), width(block_k)
    room = q.itemsize * (rows * width(q.shape[-1]) + keys * (width(q.shape[-1]) + width(E)))
    if rows > 256 or keys > 128 or room > arch_of(device).shared_limit:
        return (
            f"with pv_skip one program holds a whole query block, and {block_q} x {block_k} tokens "
            f"of {q.dtype} are too many; smaller blocks, or backend='reference' at any size"
        )
    return None


# Keys and values have the query's dtype: the api has looked.
_of_query, _of_query_and_values = unless(0), unless(0, 2)


def _unserved(
    device: torch.device,
    q: Tensor,
    formats: tuple[str | None, str | None, str | None],
    block_k: int,
) -> str | None:
    qk, pv, smooth = formats
    if qk is None and pv is None:
        return None
    if qk != "int8" or pv is None or smooth == "sequence":
        return (
            "its kernels are those of qk='int8' with pv='fp16' or 'fp8' and the means of blocks or "
            f"none, and of no 8 bits at all, not of qk={qk!r}, pv={pv!r} and smooth={smooth!r}; "
            "backend='reference' has every combination"
        )
    if block_k != BLOCK:
        return (
            f"in 8 bits its kernels walk the blocks that share scales, block_k={BLOCK}, not "
            f"{block_k}; backend='reference' has any"
        )
    return refuses(device, q, STORED[pv])


def _unless_sparse(device: torch.device, *args: Any) -> str | None:
    why = _of_query(device, *args) or _unserved(device, args[0], args[9:12], args[6])
    if why or args[8] == INFINITY:
        return why
    return _skips(device, args[0], args[2].shape[3], args[8], args[5], args[6])


def _unless_sla(device: torch.device, *args: Any) -> str | None:
    why = _of_query(device, *args) or _unserved(device, args[0], args[16:19], args[12])
    if why or args[10] == INFINITY:
        return why
    return _skips(device, args[0], args[2].shape[3], args[10], args[11], args[12])


def _operands(
    q: Tensor, k: Tensor, v: Tensor, qk: str | None, pv: str | None, smooth: str | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...] | None]:
    """q, k and v as attend reads them, one segment, and what belongs to 8 bits."""
    low = None
    if qk is not None and pv is not None:
        mean = None
        if smooth is not None:
            mean = k.new_empty((k.shape[0], -(-k.shape[1] // BLOCK), *k.shape[2:]))
        k, k_scale = encode(k, STORED[qk], mean)
        v, v_scale = encode(v, STORED[pv], None, per_channel=True)
        low = (*encode(q, STORED[qk], None), k_scale, mean, v_scale)
    return (q.unsqueeze(0), k.unsqueeze(1), v.unsqueeze(1)), low


def _unless_segments(device: torch.device, *args: Any) -> str | None:
    why = _of_query_and_values(device, *args)
    if why or args[16] == INFINITY:
        return why
    return _skips(device, args[0], args[0].shape[4], args[16], args[17], BLOCK)


@api.SPARSE_ATTENTION.kernel("triton", unless=_unless_sparse)
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indptr: Tensor,
    indices: Tensor,
    block_q: int,
    block_k: int,
    sm_scale: float,
    pv_skip: float,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    out = q.new_empty((B, L, H, v.shape[3]))
    lse = q.new_empty((B, H, L), dtype=FLOAT32)
    lists = (by_head(indices), by_head(indptr), 1)
    window, low = _operands(q, k, v, qk, pv, smooth)
    attend(*window, lists, (block_q, block_k), sm_scale, pv_skip, low=low, out=out, lse=lse)
    return out, lse


@api.LINEAR_ATTENTION.kernel("triton", unless=unless(0, 1, 2))
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
    sums = sums_of(h, z, indptr, indices, over)
    out = q.new_empty((*q.shape[:3], h.shape[4]))
    linear_into(out, dense(q).unsqueeze(0), *sums, block_q, phi, eps)
    return out


@api.SLA.kernel("triton", unless=_unless_sla)
def sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    topk: int | None,
    topp: float | None,
    negligible: float,
    over: str,
    similarity: float,
    pv_skip: float,
    block_q: int,
    block_k: int,
    phi: str,
    sm_scale: float,
    eps: float,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
) -> Tensor:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    options = (topk, topp, negligible, over, similarity, block_q, block_k, phi, sm_scale)
    choice, h, z, _ = parts_of(q, k, v, proj_weight, *options)
    window, low = _operands(q, k, v, qk, pv, smooth)
    attend(
        *(*window, lists_of(choice), (block_q, block_k), sm_scale, pv_skip),
        low=low,
        linear=(h, z, proj_bias, phi, eps),
        out=out,
    )
    return out


@api.SEGMENT_SLA.kernel("triton", unless=_unless_segments)
def segment_sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_mean: Tensor,
    v_scale: Tensor | None,
    h: Tensor,
    z: Tensor,
    block_table: Tensor,
    offset_index: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    topk: int | None,
    topp: float | None,
    negligible: float,
    over: str,
    pv_skip: float,
    block_q: int,
    phi: str,
    sm_scale: float,
    eps: float,
) -> Tensor:
    q, segments, offsets = dense(q), (block_table, offset_index), q.shape[0]
    pooled, _, encoded = pool(q, block_q, low=k_scale is not None)
    assert pooled is not None
    choice = choose(
        *(pooled, dense(k_mean), None, None, segments, topk, topp),
        *(negligible if over == "marginal" else None, sm_scale),
        parts=1 if pv_skip < float("inf") else offsets,
        want="list" if over == "all" else "code list",
    )
    total_h, total_z = reach(over, choice, h, z, segments, offsets)
    if proj_weight is not None:
        total_h = project(total_h, proj_weight)
    out = q.new_empty(q.shape[1:])
    low = None
    if k_scale is not None and v_scale is not None and encoded is not None:
        low = (*encoded, *(x.contiguous() for x in (k_scale, k_mean, v_scale)))
    attend(
        *(q, dense(k), dense(v), lists_of(choice), (block_q, BLOCK), sm_scale, pv_skip),
        low=low,
        segments=segments,
        linear=(total_h, total_z, proj_bias, phi, eps),
        out=out,
    )
    return out
