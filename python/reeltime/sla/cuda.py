# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of sla: csrc/sla, and those of attention in 8 bits, which read its lists.

block_mask        choose, compress                                               (cuda_mask)
sparse_attention  encode; attend
linear_attention  sum | expand, sum; linear                                      (cuda_linear)
sla               pool, pool, choose; summarise, sum, (project), linear; encode; attend
segment_sla       pool, choose; sum, (project), linear; attend: keys are in the cache

The linear branch comes first and attention adds it to its result: 2 L E itemsize bytes more per
head, which fit in L2, and neither kernel holds the other's accumulators.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reeltime.attention import cuda as attention
from reeltime.attention.cuda import QUERIES, Lists, Operands, aligned
from reeltime.backends import Op
from reeltime.native import dense, unless
from reeltime.rope_kv.reference import BLOCK
from reeltime.sla import api
from reeltime.sla.cuda_linear import branch, summaries
from reeltime.sla.cuda_mask import choose, compress, pool, unfit

RUN = 16 * BLOCK  # keys of one summary where only the sum of all is wanted


def _unfit_mask(q: Tensor, k: Tensor, *_: Any) -> str | None:
    return unfit(q.shape[1], k.shape[1], q.shape[3])


@api.BLOCK_MASK.kernel("cuda", unless=unless(0, 1, check=_unfit_mask))
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
    choice = choose(
        *(pooled_q.unsqueeze(0), pooled_k.unsqueeze(1), guard_q, guard_k, None),
        *(topk, topp, negligible, sm_scale),
        want="code counts",
    )
    return compress(choice, capacity)


# --- What attention walks -----------------------------------------------------------------------


def unfit_blocks(length: int, block_q: int, block_k: int) -> str | None:
    """Which blocks its lists cannot be of; the only block of a short query may be as long."""
    if block_k == BLOCK and (block_q == QUERIES or length <= min(block_q, QUERIES)):
        return None
    return (
        f"its kernels walk lists of {QUERIES} queries and {BLOCK} keys, not of {block_q} and "
        f"{block_k}, which backend='triton' has"
    )


def _unfit_sparse(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    block_q, block_k, _, _, *formats = rest[2:]
    return attention.refuses(q, k, v, None, 1.0, None, *formats) or unfit_blocks(
        q.shape[1], block_q, block_k
    )


@api.SPARSE_ATTENTION.kernel("cuda", unless=unless(0, check=_unfit_sparse))
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
    qk: str,
    pv: str,
    smooth: str | None,
) -> tuple[Tensor, Tensor]:
    return attention.run(
        q.unsqueeze(0),
        attention.encode(q, k, v, qk, pv, smooth).as_segment(),
        sm_scale=sm_scale,
        smooth=smooth,
        want_lse=True,
        lists=Lists(indptr.contiguous(), indices.contiguous()),
        pv_skip=pv_skip,
    )


# --- Both branches ------------------------------------------------------------------------------


def _choice(over: str, negligible: float) -> dict[str, Any]:
    """What to choose: lists for attention, codes where the linear branch goes by them."""
    return {
        "negligible": negligible if over == "marginal" else None,
        "want": "list" if over == "all" else "list code",
    }


def _unfit_sla(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    block_q, block_k, *_ = rest[8:]
    rows, n = (-(-x.shape[1] // BLOCK) for x in (q, k))
    return (
        attention.refuses(q, k, v, None, 1.0, None, *rest[-3:])
        or unfit_blocks(q.shape[1], block_q, block_k)
        or unfit(rows, n, q.shape[3])
    )


@api.SLA.kernel("cuda", unless=unless(0, check=_unfit_sla))
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
    qk: str,
    pv: str,
    smooth: str | None,
) -> Tensor:
    queries, keys = q.unsqueeze(0), k.unsqueeze(0)
    pooled_q, pooled_k = pool(queries, block_q, similarity), pool(keys, block_k, similarity)
    assert pooled_q.mean is not None
    assert pooled_k.mean is not None
    similar_q, similar_k = (
        None if x.similar is None else x.similar[0] for x in (pooled_q, pooled_k)
    )
    choice = choose(
        *(pooled_q.mean, pooled_k.mean.transpose(0, 1), similar_q, similar_k, None, topk, topp),
        sm_scale=sm_scale,
        **_choice(over, negligible),
    )
    h, z = (x.unsqueeze(1) for x in summaries(k, v, phi, RUN if over == "all" else block_k))
    added = branch(queries, over, choice, h, z, None, proj_weight, proj_bias, block_q, phi, eps)
    return attention.run(
        queries,
        attention.encode(q, k, v, qk, pv, smooth).as_segment(),
        sm_scale=sm_scale,
        smooth=smooth,
        want_lse=False,
        lists=choice.lists,
        added=added,
        pv_skip=pv_skip,
    )[0]


def _unfit_segments(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    k_scale, _, v_scale, _, _, block_table = rest[:6]
    block_q = rest[14]
    L, N = q.shape[2], k.shape[2]
    return (
        attention.refuses_segments(q, None, None, k, v, k_scale, None, v_scale)
        or unfit_blocks(L, block_q, BLOCK)
        or unfit(-(-L // BLOCK), block_table.shape[0] * -(-N // BLOCK), q.shape[4])
    )


@api.SEGMENT_SLA.kernel("cuda", unless=unless(0, check=_unfit_segments))
def segment_sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    k_mean: Tensor,
    v_scale: Tensor,
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
    q, segments = dense(q), (block_table.contiguous(), offset_index.contiguous())
    pooled = pool(q, block_q, low=True)
    assert pooled.mean is not None
    assert pooled.low is not None
    choice = choose(
        *(pooled.mean, k_mean, None, None, segments, topk, topp),
        sm_scale=sm_scale,
        **_choice(over, negligible),
    )
    added = branch(q, over, choice, h, z, segments, proj_weight, proj_bias, block_q, phi, eps)
    return attention.run(
        q,
        Operands(
            *pooled.low,
            aligned(k),
            k_scale.contiguous(),
            k_mean.contiguous(),
            aligned(v),
            aligned(v_scale.contiguous()),
        ),
        table=segments[0],
        offset_index=segments[1],
        sm_scale=sm_scale,
        smooth="block",
        want_lse=False,
        lists=choice.lists,
        added=added,
        pv_skip=pv_skip,
    )[0]


# --- Gradients ----------------------------------------------------------------------------------


def _borrow(op: Op) -> None:
    """The gradient of Triton's kernels, which 8 bits let through as it is."""

    @op.gradient("cuda")
    def gradient(args: tuple[Any, ...], grads: tuple[Any, ...], needed: Sequence[bool]) -> Any:
        from reeltime.sla import triton_backward  # noqa: F401

        return op.gradients["triton"](args, grads, needed)


if importlib.util.find_spec("triton") is not None:  # otherwise that of the reference
    for _op in (api.SPARSE_ATTENTION, api.LINEAR_ATTENTION, api.SLA):
        _borrow(_op)
