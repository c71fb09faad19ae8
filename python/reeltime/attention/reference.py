# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of attention: the oracle, differentiable, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from reeltime.norm.reference import wide
from reeltime.quant.reference import LIMIT
from reeltime.rope_kv import reference as rope_kv

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp16": torch.float16}


def straight(x: Tensor, y: Tensor) -> Tensor:
    """y, with the gradient of x: rounding has none of its own."""
    return y.detach() + (x - x.detach()) if x.requires_grad else y


def rounded(x: Tensor, kind: str | None) -> Tensor:
    """wide x [..., S, H, D] through 8 bits and back, a scale per 64 tokens and head."""
    if kind is None:
        return x
    stored, scale = rope_kv.encode(x, STORED[kind])
    y = stored.to(x.dtype) * rope_kv.per_token(scale, x.shape[-3], -2).unsqueeze(-1)
    return straight(x, y)


def rounded_values(v: Tensor, kind: str | None) -> Tensor:
    """wide v [..., S, H, D] through its storage and back, a scale per 64 tokens and channel."""
    if kind is None:
        return v
    stored, scale = rope_kv.encode_values(v, STORED[kind])
    return straight(v, stored.to(v.dtype) * rope_kv.per_token(scale, v.shape[-3], -3))


def stored_probabilities(score: Tensor, pv: str) -> Tensor:
    """exp(score - max) over the last dimension in the format, whose whole range they take."""
    p = (score - score.detach().amax(-1, keepdim=True)).exp() * LIMIT[STORED[pv]]
    return straight(p, p.float().to(STORED[pv]).to(score.dtype))


def weighted(score: Tensor, v: Tensor, pv: str | None) -> Tensor:
    """softmax(score) v; with `pv`, probabilities are stored in that format and so is their sum."""
    if pv is None:
        return score.softmax(-1) @ v
    p = stored_probabilities(score, pv)
    return (p @ v) / p.sum(-1, keepdim=True)


def visible(q: Tensor, k: Tensor, causal: str | None, mask: Tensor | None) -> Tensor | None:
    """Which keys each query sees, broadcastable to [B, H, S_q, S_kv], or None: all of them."""
    seen = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    if causal is not None:
        shift = k.shape[1] - q.shape[1] if causal == "bottom_right" else 0
        row = torch.arange(q.shape[1], device=q.device).unsqueeze(1) + shift
        triangle = torch.arange(k.shape[1], device=q.device) <= row
        seen = triangle if seen is None else seen & triangle
    return seen


def scores(q: Tensor, k: Tensor, qk: str | None, smooth: str | None) -> Tensor:
    """wide q [B, S_q, H, D], k [B, S_kv, H, D] -> [B, H, S_q, S_kv], in 8 bits with `qk`."""
    head_major = q.transpose(1, 2)  # [B, H, S_q, D]
    if qk is None:
        return head_major @ k.permute(0, 2, 3, 1)
    low = rounded(q, qk).transpose(1, 2)
    if smooth is None:
        return low @ rounded(k, qk).permute(0, 2, 3, 1)
    if smooth == "sequence":  # the same for every key of a query: softmax does not see it
        mean = k.mean(1, keepdim=True)
        return low @ rounded(k - mean, qk).permute(0, 2, 3, 1) + head_major @ mean.permute(
            0, 2, 3, 1
        )
    mean = rope_kv.per_token(rope_kv.block_mean(k), k.shape[1], -3)
    correction = head_major @ mean.permute(0, 2, 3, 1)
    return low @ rounded(k - mean, qk).permute(0, 2, 3, 1) + correction


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sm_scale: float,
    causal: str | None,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] -> out [B, S_q, H, D], lse [B, H, S_q] (empty unless wanted)."""
    batch, length, heads, _ = q.shape
    wide_q, wide_k, wide_v = wide(q) * sm_scale, wide(k), wide(v)
    no_lse = wide_q.new_zeros(0)
    if k.shape[1] == 0:
        lse = wide_q.new_full((batch, heads, length), -torch.inf) if want_lse else no_lse
        return q.new_zeros(batch, length, heads, v.shape[3]), lse
    group = heads // k.shape[2]
    score = scores(wide_q, wide_k.repeat_interleave(group, 2), qk, smooth)
    values = rounded_values(wide_v, pv).repeat_interleave(group, 2).transpose(1, 2)
    if mask is not None and mask.dtype != torch.bool:
        score = score + mask.to(score.dtype)
    seen = visible(q, k, causal, mask)
    if seen is None:
        out = weighted(score, values, pv)
        lse = score.logsumexp(-1) if want_lse else no_lse
    else:
        # A row that sees nothing keeps finite scores, so that no gradient meets inf - inf.
        dead = ~seen.any(-1, keepdim=True)
        score = score.masked_fill(~(seen | dead), -torch.inf).masked_fill(dead, 0.0)
        out = weighted(score, values, pv).masked_fill(dead, 0.0)
        lse = score.logsumexp(-1) if want_lse else no_lse
        lse = lse.masked_fill(dead.squeeze(-1), -torch.inf) if want_lse else no_lse
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def locate(block_table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Slots to read [T], bias [T] (-inf: absent), and whether every entry is absent.

    An absent entry reads a slot that is present: 0 * NaN of a slot never written would be NaN.
    """
    absent = block_table < 0
    newest = block_table.max()
    dead = newest < 0
    bias = torch.zeros(absent.shape, dtype=dtype, device=absent.device)
    bias = bias.masked_fill(absent & ~dead, -torch.inf)
    return torch.where(absent, newest, block_table).clamp(min=0), bias, dead


def segment_scores(q: Tensor, keys: Tensor, offset_index: Tensor) -> Tensor:
    """q [O, B, H, L, D], keys [B, T, n, H, D] -> [B * H, L, T * n], each slot by its query."""
    offsets, batch, heads, length, dim = q.shape
    if offsets == 1:
        flat = keys.flatten(1, 2).permute(0, 2, 3, 1).flatten(0, 1)  # [B * H, D, T * n]
        return torch.bmm(q[0].flatten(0, 1), flat)
    steps, count = keys.shape[1], keys.shape[2]
    chosen = q.index_select(0, offset_index).flatten(0, 2)  # [T * B * H, L, D]
    score = torch.bmm(chosen, keys.permute(1, 0, 3, 4, 2).flatten(0, 2))
    score = score.view(steps, batch * heads, length, count).permute(1, 2, 0, 3)
    return score.reshape(batch * heads, length, steps * count)


def read(cached: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The slots `index` of a cache tensor; float8 has no gather kernel, bytes have."""
    if cached.dtype == torch.float8_e4m3fn:
        return cached.view(torch.uint8).index_select(1, index).view(cached.dtype).to(dtype)
    return cached.index_select(1, index).to(dtype)


def low_query(q: Tensor, q_int8: Tensor | None, q_scale: Tensor | None, sm_scale: float) -> Tensor:
    """The INT8 query as the numbers that it stands for, wide [O, B, H, L, D], times sm_scale."""
    if q_int8 is None or q_scale is None:
        q_int8, q_scale = rope_kv.encode(wide(q), torch.int8)
    step = rope_kv.per_token(q_scale * sm_scale, q.shape[2], 2).unsqueeze(-1)
    return (q_int8.to(step.dtype) * step).transpose(2, 3).contiguous()


def window(
    q: Tensor,
    low: Tensor | None,
    cached: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    index: Tensor,
    offset_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores [B * H, L, T * N] and wide values [B, T, N, H, D] of the slots `index`.

    q [O, B, H, L, D] is scaled; an int8 cache is scored by `low` plus the exact q.mu per block.
    """
    k, v, k_scale, k_mean, v_scale = cached
    keys, values = read(k, index, q.dtype), read(v, index, q.dtype)
    if low is None or k_scale is None or k_mean is None or v_scale is None:
        return segment_scores(q, keys, offset_index), values
    tokens = k.shape[2]
    step = rope_kv.per_token(k_scale.index_select(1, index), tokens, 2).unsqueeze(-1)
    score = segment_scores(low.to(q.dtype), keys * step, offset_index)
    correction = segment_scores(q, read(k_mean, index, q.dtype), offset_index)
    correction = correction.unflatten(-1, (index.shape[0], k_mean.shape[2]))
    step = rope_kv.per_token(v_scale.index_select(1, index), tokens, 2)
    return score + rope_kv.per_token(correction, tokens, -1).flatten(-2), values * step


def segment_attention(
    q: Tensor,
    q_int8: Tensor | None,
    q_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_mean: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    offset_index: Tensor,
    sm_scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q [O, B, L, H, D], k and v [B, slots, N, H, D] -> out [B, L, H, D], lse [B, H, L]."""
    batch, length, heads = q.shape[1:4]
    steps, tokens = block_table.shape[0], k.shape[2]
    head_major = (wide(q) * sm_scale).transpose(2, 3).contiguous()  # [O, B, H, L, D]
    if steps == 0:
        lse = head_major.new_full((batch, heads, length), -torch.inf)
        return torch.zeros_like(q[0]), lse if want_lse else head_major.new_zeros(0)
    index, bias, dead = locate(block_table, head_major.dtype)
    low = None if k_scale is None else low_query(q, q_int8, q_scale, sm_scale)
    cached = (k, v, k_scale, k_mean, v_scale)
    score, values = window(head_major, low, cached, index, offset_index)
    bias = bias.repeat_interleave(tokens)
    score.add_(bias)
    values = values.flatten(1, 2).transpose(1, 2).flatten(0, 1)  # [B * H, T * N, D]
    out = torch.bmm(score.softmax(-1), values).masked_fill(dead, 0.0)
    out = out.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype).contiguous()
    if not want_lse:
        return out, head_major.new_zeros(0)
    lse = score.logsumexp(-1).masked_fill(dead, -torch.inf)
    return out, lse.unflatten(0, (batch, heads))
