# SPDX-License-Identifier: Apache-2.0
"""sla: block-sparse attention over the blocks that matter, linear attention over the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from reeltime import checks
from reeltime.backends import Op
from reeltime.checks import Tolerance
from reeltime.sla import reference

if TYPE_CHECKING:
    from reeltime.rope_kv import KVCache

BLOCK_Q, BLOCK_K = 128, 64
OVER = ("all", "unselected", "marginal")
PHI = ("softmax", "elu", "relu")

# By format against float64 with the same block mask, which is exact: as attention.
TOLERANCE = {
    "float64": Tolerance(1e-11, 1e-9),
    "float32": Tolerance(5e-6, 1e-4),
    "bfloat16": Tolerance(1e-2, 1e-1),
    "float16": Tolerance(2e-3, 2e-2),
    "int8": Tolerance(0.05, 0.5),
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
    cached_summaries: bool = False,
) -> int:
    """q in, out out; keys and values once, but no more than what all rows select together; pooled
    keys and summaries, where they are cached."""
    rows = -(-S_q // BLOCK_Q)
    reach = min(1.0, share * rows)
    kv = int(2 * B * S_kv * H * D * kv_itemsize * (reach if cached_summaries else 1))
    blocks = B * -(-S_kv // block_k) * H * D
    summaries = blocks * 4 * (D + 2) if cached_summaries else 0
    return 2 * B * S_q * H * D * itemsize + kv + summaries


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
    "int block_k, float sm_scale, float pv_skip, str backend) -> (Tensor, Tensor)",
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
    "float eps, str backend) -> Tensor",
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


def _selection(
    topk: float | None, topp: float | None, negligible: float, blocks: int
) -> tuple[int | None, float | None, float]:
    """topk as a count of key blocks, at least one."""
    if topk is None and topp is None:
        checks.fail("topk, topp", "at least one of them", "neither", "Pass topk=0.1, for example.")
    if topk is not None:
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
    checks.tensor("pooled_q", pooled_q, 4, "[B, nQ, H, D]")
    checks.tensor("pooled_k", pooled_k, 4, "[B, nK, H_kv, D]")
    (batch, rows, heads, dim), (_, columns, kv_heads, _) = pooled_q.shape, pooled_k.shape
    checks.dtype("pooled_q", pooled_q, checks.FLOATS)
    checks.divides("pooled_k (its heads H_kv)", kv_heads, heads, "H of pooled_q")
    checks.shape("pooled_k", pooled_k, (batch, columns, kv_heads, dim), "[B, nK, H_kv, D]")
    checks.at_least("pooled_k (its blocks nK)", columns, 1)
    checks.device("pooled_k", pooled_k, pooled_q, "pooled_q")
    guards = (("similar_q", similar_q, (batch, rows, heads)),)
    for name, guard, want in (*guards, ("similar_k", similar_k, (batch, columns, kv_heads))):
        if guard is not None:
            checks.shape(name, guard, want, "[B, n, H]")
            checks.dtype(name, guard, (torch.bool,))
    selection = _selection(topk, topp, negligible or 0.0, columns)
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


def _check_csr(csr: CSR, batch: int, heads: int, rows: int) -> None:
    checks.shape("csr.indptr", csr.indptr, (batch, heads, rows + 1), "[B, H, nQ + 1]")
    capacity = (batch, heads, csr.indices.shape[-1])
    checks.shape("csr.indices", csr.indices, capacity, "[B, H, nQ * capacity]")
    checks.dtype("csr.indptr", csr.indptr, (torch.int32,))
    checks.dtype("csr.indices", csr.indices, (torch.int32,))


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
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query block over its listed key blocks alone.

    out_i = softmax(sm_scale * q_i k_J^T) v_J, J = the keys of the blocks that csr lists for i

    Args:
        q: [B, S_q, H, D] floating point.   k, v: [B, S_kv, H_kv, D], of q's dtype; any lengths.
        csr: of block_mask, for ceil(S_q / block_q) rows.
        pv_skip: leave out the values of a block all of whose scores lie this far (natural log)
            below the running maximum of their rows; it still counts in the sum.  Infinity: never.
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
    checks.at_least("block_q", block_q, 1)
    checks.at_least("block_k", block_k, 1)
    _check_csr(csr, q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    if not pv_skip > 0:
        checks.fail("pv_skip", "a distance > 0", pv_skip, "Leave it out to skip nothing.")
    scale = checks.softmax_scale(sm_scale, q.shape[3])
    options = (*csr, block_q, block_k, scale, pv_skip)
    out, lse = SPARSE_ATTENTION.run(backend, q.device, q, k, v, *options)
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
    checks.tensor("q", q, 4, "[B, S_q, H, D]")
    checks.dtype("q", q, checks.FLOATS)
    checks.tensor("h", h, 5, "[B, n, H_kv, D, E]")
    checks.divides("h (its heads H_kv)", h.shape[2], q.shape[2], "H of q")
    want = (q.shape[0], h.shape[1], h.shape[2], q.shape[3], h.shape[4])
    checks.shape("h", h, want, "[B, n, H_kv, D, E]")
    checks.shape("z", z, want[:4], "[B, n, H_kv, D]")
    checks.device("h", h, q, "q")
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
        _check_csr(csr, q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    lists = (None, None) if csr is None else csr
    return LINEAR_ATTENTION.run(backend, q.device, q, h, z, *lists, over, block_q, phi, eps)


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
    checks.at_least("k (its length S_kv)", k.shape[1], 1)
    checks.at_least("block_k", block_k, 1)
    _check_branch(over, phi, eps, block_q, pv_skip, proj_weight, proj_bias, v.shape[3])
    selection = _selection(topk, topp, negligible, -(-k.shape[1] // block_k))
    y = SLA.run(
        backend,
        q.device,
        *(q, k, v, proj_weight, proj_bias, *selection, over, similarity, pv_skip),
        *(block_q, block_k, phi, checks.softmax_scale(sm_scale, q.shape[3]), eps),
    )
    checks.output("out", out, y.shape, y.dtype)
    return y if out is None else out.copy_(y)


def _check_branch(
    over: str,
    phi: str,
    eps: float,
    block_q: int,
    pv_skip: float,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    dim: int,
) -> None:
    checks.choice("over", over, OVER)
    checks.choice("phi", phi, PHI)
    checks.positive("eps", eps)
    checks.at_least("block_q", block_q, 1)
    if not pv_skip > 0:
        checks.fail("pv_skip", "a distance > 0", pv_skip, "Leave it out to skip nothing.")
    if proj_weight is not None:
        checks.shape("proj_weight", proj_weight, (dim, dim), "[D, D]")
    if proj_bias is not None:
        if proj_weight is None:
            checks.fail("proj_bias", "None without proj_weight", "a tensor", "Pass both.")
        checks.shape("proj_bias", proj_bias, (dim,), "[D]")


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
        cache: of rope_kv.make_cache(summaries=True), plain or int8, phi included.
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
            "cache", "a cache with summaries", "one without", "Allocate it with summaries=True."
        )
    checks.segments(q, cache.k, block_table, offset_index)
    dim = q.shape[4]
    checks.at_least("block_table (its length T)", block_table.shape[0], 1)
    _check_branch(over, cache.phi, eps, block_q, pv_skip, proj_weight, proj_bias, dim)
    blocks = block_table.shape[0] * cache.k_mean.shape[2]
    selection = _selection(topk, topp, negligible, blocks)
    y = SEGMENT_SLA.run(
        backend,
        q.device,
        *(q, cache.k, cache.v, cache.k_scale, cache.k_mean, cache.v_scale, cache.h, cache.z),
        *(block_table, offset_index, proj_weight, proj_bias, *selection, over, pv_skip),
        *(block_q, cache.phi, checks.softmax_scale(sm_scale, dim), eps),
    )
    checks.output("out", out, y.shape, y.dtype)
    return y if out is None else out.copy_(y)
