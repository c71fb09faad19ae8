# SPDX-License-Identifier: Apache-2.0
"""What the arguments of sla must be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reeltime import checks

if TYPE_CHECKING:
    from reeltime.sla.api import CSR

OVER = ("all", "unselected", "marginal")
PHI = ("softmax", "elu", "relu")


def selection(
    topk: float | None, topp: float | None, negligible: float, blocks: int
) -> tuple[int | None, float | None, float]:
    """topk as a count of key blocks, at least one."""
    if topk is None and topp is None:
        checks.fail("topk, topp", "at least one of them", "neither", "Pass topk=0.1, for example.")
    if topk is not None:
        if not 0 < topk < math.inf:
            checks.positive("topk", topk)
        if isinstance(topk, float) and topk > 1:
            checks.fail("topk", "a share <= 1.0 or a count (int)", topk, "Pass an int for a count.")
        count = int(topk * blocks) if isinstance(topk, float) else topk
        topk = min(max(count, 1), max(blocks, 1))
    if topp is not None and not 0 < topp <= 1:
        checks.fail("topp", "a probability in (0, 1]", topp, "Pass topp=0.9, for example.")
    if not 0 <= negligible < 1:
        checks.fail("negligible", "a share in [0, 1)", negligible, "Pass 0.1, for example.")
    return topk, topp, negligible


def check_pooled(pooled_q: Tensor, pooled_k: Tensor) -> None:
    checks.tensor("pooled_q", pooled_q, 4, "[B, nQ, H, D]")
    checks.tensor("pooled_k", pooled_k, 4, "[B, nK, H_kv, D]")
    (batch, _, heads, dim), (_, columns, kv_heads, _) = pooled_q.shape, pooled_k.shape
    checks.dtype("pooled_q", pooled_q, checks.FLOATS)
    checks.dtype("pooled_k", pooled_k, checks.FLOATS)
    checks.divides("pooled_k (its heads H_kv)", kv_heads, heads, "H of pooled_q")
    checks.shape("pooled_k", pooled_k, (batch, columns, kv_heads, dim), "[B, nK, H_kv, D]")
    checks.at_least("pooled_k (its blocks nK)", columns, 1)
    checks.device("pooled_k", pooled_k, pooled_q, "pooled_q")


def check_guard(name: str, guard: Tensor, want: tuple[int, ...], q: Tensor) -> None:
    if guard.shape != want or guard.dtype != torch.bool or guard.device != q.device:
        checks.shape(name, guard, want, "[B, n, H]")
        checks.dtype(name, guard, (torch.bool,))
        checks.device(name, guard, q, "pooled_q")


def check_csr(csr: CSR, q: Tensor, block_q: int) -> None:
    """The lists of the query blocks of q [B, S_q, H, D], on its device."""
    indptr, indices = csr
    batch, length, heads, _ = q.shape
    rows = -(-length // block_q)
    if (
        indptr.shape == (batch, heads, rows + 1)
        and len(listed := indices.shape) == 3
        and listed == (batch, heads, listed[2])
        and indptr.dtype == torch.int32 == indices.dtype
        and indptr.device == q.device == indices.device
    ):
        return
    checks.shape("csr.indptr", csr.indptr, (batch, heads, rows + 1), "[B, H, nQ + 1]")
    capacity = (batch, heads, csr.indices.shape[-1])
    checks.shape("csr.indices", csr.indices, capacity, "[B, H, nQ * capacity]")
    checks.dtype("csr.indptr", csr.indptr, (torch.int32,))
    checks.dtype("csr.indices", csr.indices, (torch.int32,))
    checks.device("csr.indptr", csr.indptr, q, "q")
    checks.device("csr.indices", csr.indices, q, "q")


def check_summaries(q: Tensor, h: Tensor, z: Tensor) -> None:
    checks.tensor("q", q, 4, "[B, S_q, H, D]")
    checks.dtype("q", q, checks.FLOATS)
    checks.tensor("h", h, 5, "[B, n, H_kv, D, E]")
    checks.divides("h (its heads H_kv)", h.shape[2], q.shape[2], "H of q")
    want = (q.shape[0], h.shape[1], h.shape[2], q.shape[3], h.shape[4])
    checks.shape("h", h, want, "[B, n, H_kv, D, E]")
    checks.shape("z", z, want[:4], "[B, n, H_kv, D]")
    checks.device("h", h, q, "q")
    checks.device("z", z, q, "q")


def check_branch(
    over: str,
    phi: str,
    eps: float,
    block_q: int,
    pv_skip: float,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    v: Tensor,
) -> None:
    """The options of the linear branch; v [..., D] is what it projects."""
    if (
        over not in OVER
        or phi not in PHI
        or not 0 < eps < math.inf
        or block_q < 1
        or not pv_skip > 0
    ):
        checks.choice("over", over, OVER)
        checks.choice("phi", phi, PHI)
        checks.positive("eps", eps)
        checks.at_least("block_q", block_q, 1)
        checks.fail("pv_skip", "a distance > 0", pv_skip, "Leave it out to skip nothing.")
    dim, device = v.shape[-1], v.device
    if proj_weight is not None and (
        proj_weight.shape != (dim, dim) or proj_weight.device != device
    ):
        checks.shape("proj_weight", proj_weight, (dim, dim), "[D, D]")
        checks.device("proj_weight", proj_weight, v, "q")
    if proj_bias is not None:
        if proj_weight is None:
            checks.fail("proj_bias", "None without proj_weight", "a tensor", "Pass both.")
        if proj_bias.shape != (dim,) or proj_bias.device != device:
            checks.shape("proj_bias", proj_bias, (dim,), "[D]")
            checks.device("proj_bias", proj_bias, v, "q")
