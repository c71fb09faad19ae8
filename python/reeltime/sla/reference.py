# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of sla: the oracle, differentiable, on every device.

Scores are [B, H, S_q, n, size]: n key blocks of `size`, ragged tails marked by `held` [n, size].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.attention import reference as attention
from reeltime.norm.reference import wide
from reeltime.rope_kv import reference as rope_kv


def pool(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] -> mean [B, n, H, D] and self-similarity [B, n, H] of each block.

    Self-similarity is the mean cosine of all pairs of a block: |mean of the unit vectors|^2.
    """
    x = wide(x)
    unit = F.normalize(x, dim=-1)
    return rope_kv.block_mean(x, size), rope_kv.block_mean(unit, size).square().sum(-1)


def block_scores(pooled_q: Tensor, pooled_k: Tensor, sm_scale: float) -> Tensor:
    """[B, nQ, H, D], [B, nK, H_kv, D] -> [B, H, nQ, nK]."""
    group = pooled_q.shape[2] // pooled_k.shape[2]
    keys = wide(pooled_k).repeat_interleave(group, 2)
    return (wide(pooled_q) * sm_scale).transpose(1, 2) @ keys.permute(0, 2, 3, 1)


def classify(
    score: Tensor,
    topk: int | None,
    topp: float | None,
    negligible: float,
    similar_q: Tensor | None,
    similar_k: Tensor | None,
    absent: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """score [B, H, nQ, nK] -> selected and marginal, bool; ties go to the lower block."""
    gone = torch.zeros(score.shape[-1:], dtype=torch.bool, device=score.device)
    if absent is not None:
        gone = absent
        score = score.masked_fill(absent, -torch.inf)
    if (
        similar_k is not None
    ):  # a block unlike itself is badly pooled: out of the ranking, always in
        outside = ~similar_k.transpose(1, 2).unsqueeze(2)  # [B, H, 1, nK]
        score = score.masked_fill(outside, -torch.inf)
    ordered, order = torch.sort(score, dim=-1, descending=True, stable=True)
    position = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(-1, order, position)
    selected = rank < (1 if topk is None else topk)
    if topp is not None:
        share = ordered.softmax(-1)
        inside = (share.cumsum(-1) - share) < topp
        selected = selected | torch.zeros_like(inside).scatter_(-1, order, inside)
    if similar_k is not None:
        selected = selected | outside
    if similar_q is not None:
        selected = selected | ~similar_q.transpose(1, 2).unsqueeze(-1)
    selected = selected & ~gone
    present = (~gone).sum()
    lowest = rank >= present - (present * negligible).floor()
    return selected, ~selected & ~lowest & ~gone


def compress(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """bool [B, H, nQ, nK] -> indptr [B, H, nQ + 1], indices [B, H, nQ * capacity], int32.

    No size depends on the mask, so nothing waits for it: what lies past indptr[..., -1] is -1.
    """
    count = mask.sum(-1)
    indptr = F.pad(count.cumsum(-1), (1, 0))
    room = mask.shape[2] * capacity
    rank = mask.cumsum(-1) - 1
    place = torch.where(mask, indptr[..., :-1, None] + rank, room).flatten(2)
    column = torch.arange(mask.shape[3], device=mask.device).expand_as(mask).flatten(2)
    indices = mask.new_full((*mask.shape[:2], room + 1), -1, dtype=torch.int64)
    indices = indices.scatter(2, place, column)[..., :room]
    return indptr.int(), indices.int()


def expand(indptr: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The inverse of compress: bool [B, H, nQ, nK]."""
    rows = indptr.shape[2] - 1
    slot = torch.arange(indices.shape[2], device=indices.device).expand(indices.shape)
    row = torch.searchsorted(indptr.contiguous(), slot.int().contiguous(), right=True) - 1
    room = rows * columns
    place = torch.where(slot < indptr[..., -1:], row * columns + indices, room)
    mask = indices.new_zeros((*indices.shape[:2], room + 1), dtype=torch.bool)
    return mask.scatter(2, place, True)[..., :room].unflatten(2, (rows, columns))


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
    score = block_scores(pooled_q, pooled_k, sm_scale)
    if similar_k is not None:
        similar_k = similar_k.repeat_interleave(score.shape[1] // similar_k.shape[2], 2)
    selected, marginal = classify(score, topk, topp, negligible, similar_q, similar_k, None)
    return *compress(selected, capacity), *compress(marginal, pooled_k.shape[1])


def attend(
    score: Tensor,
    values: Tensor,
    chosen: Tensor,
    held: Tensor,
    block_q: int,
    pv_skip: float,
    pv: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen blocks: score [B, H, S_q, n, size], values [B, n, size, H, D]."""
    rows = rope_kv.per_token(chosen, score.shape[2], 2, block_q)  # [B, H, S_q, n]
    seen = rows.unsqueeze(-1) & held
    dead = ~seen.flatten(3).any(-1)[..., None, None]
    score = score.masked_fill(~(seen | dead), -torch.inf).masked_fill(dead, 0.0)
    lse = score.flatten(3).logsumexp(-1)
    if pv is None:
        p = (score - lse[..., None, None]).exp()
    else:
        stored = attention.stored_probabilities(score.flatten(3), pv)
        p = (stored / stored.sum(-1, keepdim=True)).view_as(score)
    if pv_skip < torch.inf:
        p = p * keep_pv(score, block_q, pv_skip).unsqueeze(-1)
    out = torch.einsum("bhlns,bnshd->blhd", p.masked_fill(dead, 0.0), values)
    return out, lse.masked_fill(dead[..., 0, 0], -torch.inf)


def keep_pv(score: Tensor, block_q: int, pv_skip: float) -> Tensor:
    """[B, H, S_q, n]: False where no row of a query block came within pv_skip of its running max.

    Blocks are visited in ascending order; a skipped one still counts in the softmax's sum.
    """
    local = score.detach().amax(-1)
    gap = (local - local.cummax(-1).values).nan_to_num(nan=-torch.inf)
    length = score.shape[2]
    padded = F.pad(gap, (0, 0, 0, -length % block_q), value=-torch.inf)
    nearest = padded.unflatten(2, (padded.shape[2] // block_q, block_q)).amax(3)
    return rope_kv.per_token(nearest > -pv_skip, length, 2, block_q)


def plain_scores(
    q: Tensor, k: Tensor, size: int, qk: str | None = None, smooth: str | None = None
) -> Tensor:
    """wide, scaled q [B, S_q, H, D], k [B, S_kv, H, D] -> [B, H, S_q, n, size]."""
    if qk is None:
        return torch.einsum("blhd,bnshd->bhlns", q, rope_kv.blocks(k, size))
    score = attention.scores(q, k, qk, smooth)
    return F.pad(score, (0, -k.shape[1] % size)).unflatten(-1, (-1, size))


def grouped(x: Tensor, heads: int) -> Tensor:
    """wide [B, S, H_kv, ...] -> [B, S, H, ...]."""
    return wide(x).repeat_interleave(heads // x.shape[2], 2)


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
    qk: str | None = None,
    pv: str | None = None,
    smooth: str | None = None,
) -> tuple[Tensor, Tensor]:
    heads = q.shape[2]
    score = plain_scores(wide(q) * sm_scale, grouped(k, heads), block_k, qk, smooth)
    held = rope_kv.held(k.shape[1], k.device, block_k)
    chosen = expand(indptr, indices, held.shape[0])
    values = rope_kv.blocks(attention.rounded_values(grouped(v, heads), pv), block_k)
    out, lse = attend(score, values, chosen, held, block_q, pv_skip, pv)
    return out.to(q.dtype).contiguous(), lse


def linear(
    q: Tensor,
    h: Tensor,
    z: Tensor,
    include: Tensor | None,
    owner: Tensor,
    block_q: int,
    phi: str,
    eps: float,
) -> Tensor:
    """phi(q) H / (phi(q) Z + eps), H and Z summed over the included blocks.

    wide q [O, B, S_q, H, D], h [B, n, H, D, E], z [B, n, H, D], include [B, H, nQ, n] or None: all;
    owner [O, n] is 1 for the offset whose query scores a block.  No block included: 0.
    """
    length = q.shape[2]
    features = rope_kv.blocks(rope_kv.feature_map(q, phi), block_q)  # [O, B, nQ, block_q, H, D]
    rows = features.shape[2]
    if include is None:
        include = torch.ones(1, 1, 1, h.shape[1], dtype=torch.bool, device=h.device)
    include = include.to(h.dtype).expand(h.shape[0], h.shape[2], rows, h.shape[1])
    weight = include * owner.to(h.dtype)[:, None, None, None, :]  # [O, B, H, nQ, n]
    total_h = torch.einsum("obhqn,bnhde->obqhde", weight, h)
    total_z = torch.einsum("obhqn,bnhd->obqhd", weight, z)
    above = torch.einsum("obqthd,obqhde->bqthe", features, total_h)
    below = torch.einsum("obqthd,obqhd->bqth", features, total_z)
    return (above / (below + eps).unsqueeze(-1)).flatten(1, 2)[:, :length]


def covered(over: str, selected: Tensor, marginal: Tensor) -> Tensor | None:
    """The blocks that the linear branch sums."""
    return {"all": None, "unselected": ~selected, "marginal": marginal}[over]


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
    include = None
    if indptr is not None and indices is not None:
        listed = expand(indptr, indices, h.shape[1])
        include = covered(over, listed, listed)
    heads = q.shape[2]
    owner = torch.ones(1, h.shape[1], device=h.device)
    out = linear(
        wide(q).unsqueeze(0),
        grouped(h, heads),
        grouped(z, heads),
        include,
        owner,
        block_q,
        phi,
        eps,
    )
    return out.to(q.dtype).contiguous()


def project(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return out
    return F.linear(out, weight.to(out.dtype), None if bias is None else bias.to(out.dtype))


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
    qk: str | None = None,
    pv: str | None = None,
    smooth: str | None = None,
) -> Tensor:
    heads = q.shape[2]
    wide_q, keys, values = wide(q), grouped(k, heads), grouped(v, heads)
    with torch.no_grad():
        pooled_q, close_q = pool(wide_q, block_q)
        pooled_k, close_k = pool(keys, block_k)
        guard_q = close_q > similarity if similarity > -1 else None
        guard_k = close_k > similarity if similarity > -1 else None
        ranking = block_scores(pooled_q, pooled_k, sm_scale)
        selected, marginal = classify(ranking, topk, topp, negligible, guard_q, guard_k, None)
    held = rope_kv.held(k.shape[1], k.device, block_k)
    score = plain_scores(wide_q * sm_scale, keys, block_k, qk, smooth)
    blocked = rope_kv.blocks(attention.rounded_values(values, pv), block_k)
    sparse, _ = attend(score, blocked, selected, held, block_q, pv_skip, pv)
    h, z = rope_kv.summaries(keys, values, phi, block_k)
    owner = torch.ones(1, h.shape[1], device=h.device)
    include = covered(over, selected, marginal)
    rest = linear(wide_q.unsqueeze(0), h, z, include, owner, block_q, phi, eps)
    return (sparse + project(rest, proj_weight, proj_bias)).to(q.dtype).contiguous()


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
    """sla over cached segments: the mask from pooled keys, the linear branch from summaries."""
    offsets, batch, length, heads, _ = q.shape
    steps, tokens, per_slot = block_table.shape[0], k.shape[2], k_mean.shape[2]
    wide_q = wide(q)
    index, _, dead = attention.locate(block_table, wide_q.dtype)
    absent = (block_table < 0).repeat_interleave(per_slot)
    head_major = (wide_q * sm_scale).transpose(2, 3).contiguous()  # [O, B, H, L, D]
    with torch.no_grad():
        pooled = rope_kv.block_mean(wide_q * sm_scale, block_q).transpose(2, 3).contiguous()
        mean = attention.read(k_mean, index, wide_q.dtype)  # [B, T, nb, H, D]
        ranking = attention.segment_scores(pooled, mean, offset_index)
        ranking = ranking.unflatten(0, (batch, heads))  # [B, H, nQ, T * nb]
        selected, marginal = classify(ranking, topk, topp, negligible, None, None, absent)
    low = None if k_scale is None else attention.low_query(q, None, None, sm_scale)
    cached = (k, v, k_scale, k_mean, v_scale)
    score, values = attention.window(head_major, low, cached, index, offset_index)
    score = score.unflatten(0, (batch, heads)).unflatten(-1, (steps, tokens))
    tail = -tokens % rope_kv.BLOCK
    score = F.pad(score, (0, tail)).unflatten(-1, (per_slot, rope_kv.BLOCK)).flatten(3, 4)
    held = rope_kv.held(tokens, k.device).repeat(steps, 1)  # [T * nb, 64]
    sparse, _ = attend(
        score, rope_kv.blocks(values).flatten(1, 2), selected, held, block_q, pv_skip
    )
    owner = torch.arange(offsets, device=q.device).unsqueeze(1) == offset_index
    owner &= block_table >= 0
    owner = owner.repeat_interleave(h.shape[2], 1)  # [O, T * nb], or [O, T]
    read_h, read_z = (x.index_select(1, index).flatten(1, 2).to(wide_q.dtype) for x in (h, z))
    include = covered(over, selected, marginal)
    rest = linear(wide_q, read_h, read_z, include, owner, block_q, phi, eps)
    out = (sparse + project(rest, proj_weight, proj_bias)).masked_fill(dead, 0.0)
    return out.to(q.dtype).contiguous()
