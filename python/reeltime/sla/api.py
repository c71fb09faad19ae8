# SPDX-License-Identifier: Apache-2.0
"""sla: block-sparse attention over the blocks that matter, linear attention over the rest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from reeltime import checks
from reeltime.attention.api import check_formats
from reeltime.backends import Op
from reeltime.checks import Tolerance
from reeltime.sla import arguments, reference
from reeltime.sla.arguments import OVER, PHI

if TYPE_CHECKING:
    from reeltime.rope_kv import KVCache

BLOCK_Q, BLOCK_K = 128, 64

# By format against float64 with the same block mask, which is exact: as attention.  fp8 is an INT8
# cache with e4m3 values: QK 0.013 (0.026 with outlier channels), P and V 0.026 each, makes 0.045.
TOLERANCE = {
    "float64": Tolerance(1e-11, 1e-9),
    "float32": Tolerance(5e-6, 1e-4),
    "bfloat16": Tolerance(1e-2, 1e-1),
    "float16": Tolerance(2e-3, 2e-2),
    "int8": Tolerance(0.03, 0.5),
    "fp8": Tolerance(0.05, 0.6),
}


class CSR(NamedTuple):
    """Blocks that each query block attends to: those of row i are
    indices[b, h, indptr[b, h, i] : indptr[b, h, i + 1]], ascending; past the last of them is -1."""

    indptr: Tensor  # [B, H, nQ + 1] int32
    indices: Tensor  # [B, H, nQ * capacity] int32, capacity: the most blocks that a row can have


def flops(
    B: int, S_q: int, S_kv: int, H: int, D: int, *, share: float, block_k: int = BLOCK_K
) -> int:
    """The selected share of attention, and the linear branch: phi(q) H per token, h per key."""
    sparse = int(4 * B * H * S_q * S_kv * D * share)
    return sparse + 2 * B * H * (S_q + S_kv) * D * (D + 1)


def bytes(
    B: int,
    S_q: int,
    S_kv: int,
    H: int,
    D: int,
    *,
    share: float,
    itemsize: int = 2,
    kv_itemsize: int = 2,
    block_k: int = BLOCK_K,
    summaries: str | None = None,
    slots: int = 1,
) -> int:
    """q in, out out; keys and values once, but no more than what all rows select together; pooled
    keys, and summaries of each "block" or of so many "slot"s, where a cache has them."""
    rows = -(-S_q // BLOCK_Q)
    reach = min(1.0, share * rows)
    kv = int(2 * B * S_kv * H * D * kv_itemsize * (reach if summaries else 1))
    blocks = slots * -(-S_kv // slots // block_k)
    summed = {None: 0, "block": blocks, "slot": slots}[summaries]
    cached = 4 * B * H * D * (blocks + summed * (D + 1)) if summaries else 0
    return 2 * B * S_q * H * D * itemsize + kv + cached


def _fake_block_mask(
    pooled_q: Tensor, pooled_k: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, heads, _ = pooled_q.shape

    def integers(size: int) -> Tensor:
        return pooled_q.new_empty((batch, heads, size), dtype=torch.int32)

    indptr, other = integers(rows + 1), integers(rows + 1)
    return indptr, integers(rows * rest[-1]), other, integers(rows * pooled_k.shape[1])


def _fake_sparse(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


MASK = "int? topk, float? topp, float negligible"
FORMAT = "str? qk, str? pv, str? smooth"
BLOCK_MASK = Op(
    "sla",
    "block_mask(Tensor pooled_q, Tensor pooled_k, Tensor? similar_q, Tensor? similar_k, "
    f"{MASK}, float sm_scale, int capacity, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.block_mask,
    _fake_block_mask,
    differentiable=False,
)
SPARSE_ATTENTION = Op(
    "sla",
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indptr, Tensor indices, int block_q, "
    f"int block_k, float sm_scale, float pv_skip, {FORMAT}, str backend) -> (Tensor, Tensor)",
    reference.sparse_attention,
    _fake_sparse,
)
LINEAR_ATTENTION = Op(
    "sla",
    "linear_attention(Tensor q, Tensor h, Tensor z, Tensor? indptr, Tensor? indices, str over, "
    "int block_q, str phi, float eps, str backend) -> Tensor",
    reference.linear_attention,
    lambda q, h, *_: q.new_empty((*q.shape[:3], h.shape[4])),
)
SLA = Op(
    "sla",
    f"sla(Tensor q, Tensor k, Tensor v, Tensor? proj_weight, Tensor? proj_bias, {MASK}, str over, "
    "float similarity, float pv_skip, int block_q, int block_k, str phi, float sm_scale, "
    f"float eps, {FORMAT}, str backend) -> Tensor",
    reference.sla,
    lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
)
SEGMENT_SLA = Op(
    "sla",
    "segment_sla(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor k_mean, Tensor? v_scale, "
    "Tensor h, Tensor z, Tensor block_table, Tensor offset_index, Tensor? proj_weight, "
    f"Tensor? proj_bias, {MASK}, str over, float pv_skip, int block_q, str phi, float sm_scale, "
    "float eps, str backend) -> Tensor",
    reference.segment_sla,
    lambda q, *_: q.new_empty(q.shape[1:]),
)


def pool(x: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """Mean and self-similarity of each block of tokens.

    pooled = mean(x_i);   similarity = mean over pairs of cos(x_i, x_j), 1 if all point the same way

    Args:
        x: [B, S, H, D] floating point.
        block: tokens per block; the last may be ragged.
    Returns:
        pooled [B, ceil(S / block), H, D] and similarity [B, ceil(S / block), H], float32 (float64).
    Raises:
        ValueError: names the argument, what was expected, what came.
    Accumulation: float32.  Graph-safe: yes.  Source: SpargeAttention (arXiv 2502.18137).
    """
    checks.tensor("x", x, 4, "[B, S, H, D]")
    checks.dtype("x", x, checks.FLOATS)
    checks.at_least("block", block, 1)
    return reference.pool(x, block)


def summaries(
    k: Tensor, v: Tensor, *, block_k: int = BLOCK_K, phi: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """What linear attention needs of each key block: h = phi(K)^T V and z = sum of phi(K).

    Args:
        k, v: [B, S, H, D], [B, S, H, E] floating point.
        block_k: tokens per block; the last may be ragged.
        phi: "softmax" over D, "elu" (elu + 1) or "relu".
    Returns:
        h [B, n, H, D, E], z [B, n, H, D], float32 (float64).
    Raises:
        ValueError: names the argument, what was expected, what came.
    Accumulation: float32.  Graph-safe: yes.  Source: SLA (arXiv 2509.24006).
    """
    checks.tensor("k", k, 4, "[B, S, H, D]")
    checks.dtype("k", k, checks.FLOATS)
    checks.shape("v", v, (*k.shape[:3], v.shape[-1]), "[B, S, H, E] of k")
    checks.at_least("block_k", block_k, 1)
    checks.choice("phi", phi, PHI)
    return reference.rope_kv.summaries(reference.wide(k), reference.wide(v), phi, block_k)


def block_mask(
    pooled_q: Tensor,
    pooled_k: Tensor,
    *,
    topk: float | None = None,
    topp: float | None = None,
    similar_q: Tensor | None = None,
    similar_k: Tensor | None = None,
    negligible: float | None = None,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> CSR | tuple[CSR, CSR]:
    """Which key blocks each query block attends to, on the device, without a sync.

    selected[i] = the topk blocks of score[i] = sm_scale * pooled_q[i] . pooled_k, united with the
    fewest blocks whose softmax(score[i]) sums to topp; at least one, ties to the lower block.

    Args:
        pooled_q: [B, nQ, H, D].
        pooled_k: [B, nK, H_kv, D], H % H_kv == 0.
        topk: a count (int) or a share of nK (float in (0, 1]), rounded down to at least one.
        topp: a probability in (0, 1].  One of topk and topp must be given; both: their union.
        similar_q: optional [B, nQ, H] bool; a query block that is False attends to every block.
        similar_k: optional [B, nK, H_kv] bool; a key block that is False is always attended to.
        negligible: also return the marginal blocks, neither selected nor in this lowest share.
        sm_scale: default 1 / sqrt(D); matters to topp only.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        CSR of the selected blocks; with negligible, (selected, marginal).
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32.  Deterministic.  Graph-safe: yes.
    Source: SLA (arXiv 2509.24006); SpargeAttention (2502.18137) and 2 (2602.13515, the union).
    """
    if (
        not isinstance(pooled_q, Tensor)
        or not isinstance(pooled_k, Tensor)
        or len(asked := pooled_q.shape) != 4
        or len(held := pooled_k.shape) != 4
        or held != (asked[0], held[1], held[2], asked[3])
        or not held[1]
        or not held[2]
        or asked[2] % held[2]
        or pooled_q.dtype not in checks.FLOATS
        or pooled_k.dtype not in checks.FLOATS
        or pooled_k.device != pooled_q.device
    ):
        arguments.check_pooled(pooled_q, pooled_k)
    (batch, rows, heads, dim), (_, columns, kv_heads, _) = pooled_q.shape, pooled_k.shape
    if similar_q is not None:
        arguments.check_guard("similar_q", similar_q, (batch, rows, heads), pooled_q)
    if similar_k is not None:
        arguments.check_guard("similar_k", similar_k, (batch, columns, kv_heads), pooled_q)
    selection = arguments.selection(topk, topp, negligible or 0.0, columns)
    bounded = topp is None and similar_q is None and similar_k is None
    capacity = selection[0] if bounded and selection[0] is not None else columns
    scale = checks.softmax_scale(sm_scale, dim)
    both = BLOCK_MASK.run(
        backend,
        pooled_q.device,
        *(pooled_q, pooled_k, similar_q, similar_k, *selection, scale, capacity),
    )
    selected, marginal = CSR(*both[:2]), CSR(*both[2:])
    return selected if negligible is None else (selected, marginal)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    csr: CSR,
    *,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    sm_scale: float | None = None,
    pv_skip: float = float("inf"),
    qk: str | None = None,
    pv: str | None = None,
    smooth: str | None = "block",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query block over its listed key blocks alone.

    out_i = softmax(sm_scale * q_i k_J^T) v_J, J = the keys of the blocks that csr lists for i

    Args:
        q: [B, S_q, H, D] floating point.   k, v: [B, S_kv, H_kv, D], of q's dtype; any lengths.
        csr: of block_mask, for ceil(S_q / block_q) rows.
        pv_skip: values of a block all of whose scores lie this far (natural log) below the running
            maximum of their rows may be left out; it still counts in the sum.  Infinity: never.
            A kernel may decide for as few as 16 rows by themselves.
        qk, pv, smooth: 8 bits, as in attention.attention; the gradient passes straight through.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [B, S_q, H, D] of q's dtype; with return_lse also lse [B, H, S_q] float32 (float64).
        A row with no blocks is 0 and its lse -inf.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.
    Source: SpargeAttention (arXiv 2502.18137).
    """
    checks.qkv(q, k, v)
    if block_q < 1 or block_k < 1:
        checks.at_least("block_q", block_q, 1)
        checks.at_least("block_k", block_k, 1)
    arguments.check_csr(csr, q, block_q)
    if not pv_skip > 0:
        checks.fail("pv_skip", "a distance > 0", pv_skip, "Leave it out to skip nothing.")
    check_formats(qk, pv, smooth)
    scale = checks.softmax_scale(sm_scale, q.shape[3])
    out, lse = SPARSE_ATTENTION.run(
        backend,
        q.device,
        *(q, k, v, csr[0], csr[1], block_q, block_k, scale, pv_skip, qk, pv, smooth),
    )
    return (out, lse) if return_lse else out


def linear_attention(
    q: Tensor,
    h: Tensor,
    z: Tensor,
    csr: CSR | None = None,
    *,
    over: str = "all",
    block_q: int = BLOCK_Q,
    phi: str = "softmax",
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Linear attention from the summaries of key blocks.

    out_i = phi(q_i) H / (phi(q_i) Z + eps),   H = sum_j h_j,  Z = sum_j z_j, with j over
    "all" blocks, those "unselected" (not in csr), or the "marginal" ones (csr lists them).

    Args:
        q: [B, S_q, H, D] floating point.
        h: [B, n, H_kv, D, E].   z: [B, n, H_kv, D], from summaries or a cache.
        csr: None for "all"; of the selected blocks for "unselected"; of the marginal ones for
            "marginal" (block_mask with negligible gives both).
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [B, S_q, H, E] of q's dtype; 0 where no block is included.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.
    Source: SLA (arXiv 2509.24006); "all" and eps as in TurboDiffusion (arXiv 2512.16093).
    """
    if (
        not isinstance(q, Tensor)
        or not isinstance(h, Tensor)
        or len(asked := q.shape) != 4
        or len(held := h.shape) != 5
        or held[0] != asked[0]
        or held[3] != asked[3]
        or z.shape != (held[0], held[1], held[2], held[3])
        or not held[2]
        or asked[2] % held[2]
        or q.dtype not in checks.FLOATS
        or not h.device == q.device == z.device
    ):
        arguments.check_summaries(q, h, z)
    if over not in OVER or phi not in PHI or block_q < 1 or not 0 < eps < math.inf:
        checks.choice("over", over, OVER)
        checks.choice("phi", phi, PHI)
        checks.at_least("block_q", block_q, 1)
        checks.positive("eps", eps)
    if (over == "all") != (csr is None):
        checks.fail(
            "csr",
            "None for over='all', and the list of blocks otherwise",
            f"{'None' if csr is None else 'a CSR'} with over={over!r}",
            "Pass what block_mask returns.",
        )
    if csr is not None:
        arguments.check_csr(csr, q, block_q)
    indptr, indices = (None, None) if csr is None else csr
    return LINEAR_ATTENTION.run(
        backend, q.device, q, h, z, indptr, indices, over, block_q, phi, eps
    )


def sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: float | None = 0.1,
    topp: float | None = None,
    negligible: float = 0.1,
    over: str = "all",
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    similarity: float = -1.0,
    pv_skip: float = float("inf"),
    qk: str | None = None,
    pv: str | None = None,
    smooth: str | None = "block",
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    phi: str = "softmax",
    sm_scale: float | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Sparse-linear attention in one call.

    out = sparse_attention(q, k, v, selected) + proj(linear_attention(q, h, z, over))

    Args:
        q: [B, S_q, H, D] floating point.   k, v: [B, S_kv, H_kv, D], of q's dtype; any lengths.
        topk, topp: which blocks are selected, as in block_mask.
        over: "all" (released TurboDiffusion weights), "unselected" or "marginal" (the SLA paper,
            with negligible the lowest share of blocks that is dropped).
        proj_weight, proj_bias: optional [D, D] and [D], as in torch.nn.Linear; None: no projection.
        similarity: blocks whose mean cosine is at most this are not ranked by their mean but
            attended to (keys) or attend to everything (queries); -1: no guard.
        pv_skip: as in sparse_attention.
        qk, pv, smooth: of the sparse branch, as in sparse_attention.
        out: optional [B, S_q, H, D], written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [B, S_q, H, D] of q's dtype, or out.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.
    Source: SLA (arXiv 2509.24006); SpargeAttention (arXiv 2502.18137).
    """
    checks.qkv(q, k, v)
    if not k.shape[1] or block_k < 1:
        checks.at_least("k (its length S_kv)", k.shape[1], 1)
        checks.at_least("block_k", block_k, 1)
    arguments.check_branch(over, phi, eps, block_q, pv_skip, proj_weight, proj_bias, v)
    check_formats(qk, pv, smooth)
    count, mass, dropped = arguments.selection(topk, topp, negligible, -(-k.shape[1] // block_k))
    scale = q.shape[3] ** -0.5 if sm_scale is None else checks.softmax_scale(sm_scale, 1)
    # fmt: off
    y = SLA.run(
        backend, q.device, q, k, v, proj_weight, proj_bias, count, mass, dropped, over, similarity,
        pv_skip, block_q, block_k, phi, scale, eps, qk, pv, smooth,
    )
    # fmt: on
    if out is None:
        return y
    checks.output("out", out, y.shape, y.dtype)
    return out.copy_(y)


def segment_sla(
    q: Tensor,
    cache: KVCache,
    block_table: Tensor,
    offset_index: Tensor,
    *,
    topk: float | None = 0.1,
    topp: float | None = None,
    negligible: float = 0.1,
    over: str = "all",
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    pv_skip: float = float("inf"),
    block_q: int = BLOCK_Q,
    sm_scale: float | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """sla over the cached segments of a stream: nothing that depends on keys alone is recomputed.

    The mask ranks the cached pooled keys, each scored by the query rotated for its segment; the
    linear branch sums the cached h and z, phi of each rotation over its own segments.

    Args:
        q, block_table, offset_index: as in attention.segment_attention.
        cache: of rope_kv.make_cache, plain or int8, phi included, with summaries of each "block"
            or, for over="all", of each "slot".
        The rest as in sla; key blocks are the 64-token blocks of the cache.
    Returns:
        [B, L, H, D] of q's dtype, or out; zeros if every entry of block_table is absent.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.  Source: SLA (arXiv 2509.24006).
    """
    if cache.k_mean is None or cache.h is None or cache.z is None:
        checks.fail(
            "cache", "a cache with summaries", "one without", "Allocate it with summaries='slot'."
        )
    if over != "all" and cache.h.shape[2] != cache.k_mean.shape[2]:
        checks.fail(
            "over",
            "'all' with a cache whose summaries are of whole slots",
            repr(over),
            "Allocate the cache with summaries='block'.",
        )
    checks.segments(q, cache.k, block_table, offset_index)
    steps = block_table.shape[0]
    if not steps:
        checks.at_least("block_table (its length T)", steps, 1)
    arguments.check_branch(over, cache.phi, eps, block_q, pv_skip, proj_weight, proj_bias, q)
    blocks = steps * cache.k_mean.shape[2]
    selection = arguments.selection(topk, topp, negligible, blocks)
    y = SEGMENT_SLA.run(
        backend,
        q.device,
        *(q, cache.k, cache.v, cache.k_scale, cache.k_mean, cache.v_scale, cache.h, cache.z),
        *(block_table, offset_index, proj_weight, proj_bias, *selection, over, pv_skip),
        *(block_q, cache.phi, checks.softmax_scale(sm_scale, q.shape[4]), eps),
    )
    if out is None:
        return y
    checks.output("out", out, y.shape, y.dtype)
    return out.copy_(y)
