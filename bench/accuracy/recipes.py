# SPDX-License-Identifier: Apache-2.0
"""Published recipes, where they differ from ours, so that they meet ours on the same inputs.

Written here in plain PyTorch from the papers and from what the repositories do; no code is theirs.
Everything is float64 except what a recipe stores: a row shows what its formats and scales lose,
not its accumulators (but for SageAttention 2++, whose FP16 accumulator is the recipe).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.bench.accuracy.case import widest

SAGE = "SageAttention 2 (arXiv 2411.10958, github.com/thu-ml/SageAttention)"
SAGE_1 = "SageAttention (arXiv 2410.02367, github.com/thu-ml/SageAttention)"
SAGE_PP = "SageAttention 2++ (arXiv 2505.21136, github.com/thu-ml/SageAttention)"
SLA = "SLA (arXiv 2509.24006, github.com/thu-ml/SLA)"
TURBO = "TurboDiffusion (arXiv 2512.16093, github.com/thu-ml/TurboDiffusion)"
TURBO_AV = "TurboT2AV (github.com/thu-ml/TurboDiffusion)"
FP16_P_LIMIT, FP8_P_LIMIT, NARROW_V = 1.0, 448.0, 2.25


class Recipe(NamedTuple):
    name: str
    source: str
    apply: Callable[..., Tensor]


# --- Linear layers ------------------------------------------------------------------------------


def blocks_of_128(x: Tensor) -> Tensor:
    """INT8, 128 x 128 blocks, scale amax / 128 (1e-8 at least): the block's positive maximum would
    be 128 and saturates at 127."""
    step = widest(x, {0: 128, 1: 128}).clamp(min=1e-8) / 128
    return (x / step).round().clamp(-128, 127) * step


def whole_rows(x: Tensor) -> Tensor:
    """INT8, one scale per row of the full width: per token, and per output channel of a weight."""
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-4) / 127
    return (x / step).round().clamp(-128, 127) * step


QUANT = (
    Recipe("TurboDiffusion int8 128x128", TURBO, blocks_of_128),
    Recipe("TurboT2AV int8 per row", TURBO_AV, whole_rows),
)


# --- Attention ----------------------------------------------------------------------------------


def away_from_zero(x: Tensor) -> Tensor:
    return (x.abs() + 0.5).floor().copysign(x)


def int8(x: Tensor, group: Tensor, *, eps: float = 1e-7) -> Tensor:
    """x [B, S, H, D] through INT8, one scale per head and group of tokens; group [S]."""
    top = x.abs().amax(3)
    index = group.unique(return_inverse=True)[1].view(1, -1, 1).expand_as(top)
    step = torch.zeros_like(top).scatter_reduce(1, index, top, "amax") / 127 + eps
    step = step.gather(1, index).unsqueeze(-1)
    return away_from_zero(x / step) * step


def query_groups(length: int, granularity: str) -> Tensor:
    """Which queries share a scale: a block of 128, a warp's 32 rows, or every eighth of those."""
    row = torch.arange(length)
    if granularity == "block":
        return row // 128
    return row // 32 if granularity == "warp" else row // 32 * 8 + row % 8


def key_groups(length: int, granularity: str) -> Tensor:
    """Keys share a scale per 64; per thread, those of an MMA fragment's column pair do."""
    row = torch.arange(length)
    return row // 64 * 4 + row % 8 // 2 if granularity == "thread" else row // 64


def channels_fp8(v: Tensor, limit: float = FP8_P_LIMIT) -> Tensor:
    """V in e4m3, one scale per head and channel over the whole sequence."""
    step = v.abs().amax(1, keepdim=True) / limit
    step = torch.where(step > 0, step, 1.0)
    return (v / step).to(torch.float8_e4m3fn).double() * step


def weighted(score: Tensor, v: Tensor, pv: str) -> Tensor:
    """softmax(score) v: score [B, H, S_q, S_kv], v [B, S_kv, H, D].

    FP8: P in e4m3 at a static 448, the row's sum from P before rounding.  FP16: P as it is.
    "narrow": V up to 2.25 and 64 keys summed in FP16, one rounding per MMA of 32 keys.
    The maximum is that of the row; the kernels round against a running one.
    """
    p = (score - score.amax(-1, keepdim=True)).exp()
    total = p.sum(-1).transpose(1, 2).unsqueeze(-1)
    if pv == "fp16":
        p = p.half().double()
        return torch.einsum("bhlm,bmhd->blhd", p, v.half().double()) / total
    p = (p * FP8_P_LIMIT).to(torch.float8_e4m3fn).double()
    if pv == "fp8":
        return torch.einsum("bhlm,bmhd->blhd", p, channels_fp8(v)) / total / FP8_P_LIMIT
    step = v.abs().amax(1, keepdim=True) / NARROW_V
    step = torch.where(step > 0, step, 1.0)
    low = channels_fp8(v, NARROW_V) / step
    out = torch.zeros_like(v[:, :1]).expand(-1, p.shape[2], -1, -1).clone()
    for keys in torch.arange(p.shape[3]).split(64):
        partial = torch.zeros_like(out)
        for few in keys.split(32):
            added = torch.einsum("bhlm,bmhd->blhd", p[..., few], low[:, few])
            partial = (partial + added).half().double()
        out += partial * step
    return out / total / FP8_P_LIMIT


def sage_scores(q: Tensor, k: Tensor, sm_scale: float, granularity: str) -> Tensor:
    """q k^T with q and k - mean(k over the sequence) in INT8; the shift that the mean would add is
    the same for all keys of a query, so softmax does not see it."""
    low_q = int8(q, query_groups(q.shape[1], granularity))
    low_k = int8(k - k.mean(1, keepdim=True), key_groups(k.shape[1], granularity))
    return sm_scale * torch.einsum("blhd,bmhd->bhlm", low_q, low_k)


def sage_attention(
    q: Tensor, k: Tensor, v: Tensor, sm_scale: float, *, granularity: str, pv: str
) -> Tensor:
    """q [B, S_q, H, D], k and v [B, S_kv, H, D] -> [B, S_q, H, D]."""
    return weighted(sage_scores(q, k, sm_scale, granularity), v, pv)


def _sage(name: str, source: str, granularity: str, pv: str) -> Recipe:
    def apply(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
        return sage_attention(q, k, v, sm_scale, granularity=granularity, pv=pv)

    return Recipe(name, source, apply)


ATTENTION = (
    _sage("Sage int8 per block, pv fp16", SAGE_1, "block", "fp16"),
    _sage("Sage2 int8 per thread, pv fp16", SAGE, "thread", "fp16"),
    _sage("Sage2 int8 per warp, pv fp8", SAGE, "warp", "fp8"),
    _sage("Sage2 int8 per thread, pv fp8", SAGE, "thread", "fp8"),
    _sage("Sage2++ int8 per thread, pv fp8 fp16-acc", SAGE_PP, "thread", "narrow"),
)


def sage_keys(k: Tensor) -> Tensor:
    """The keys that per-block INT8 around the sequence's mean stands for."""
    mean = k.mean(1, keepdim=True)
    return int8(k - mean, key_groups(k.shape[1], "block")) + mean


# --- Sparse-linear attention --------------------------------------------------------------------


def sla_mask(q: Tensor, k: Tensor, ratio: float, block_q: int, block_k: int) -> Tensor:
    """[B, H, nQ, nK]: the int(ratio * nK) best blocks by pooled q . pooled (k - mean k).

    Not at least one: with a short sequence it is none.  Ties go to the lower block, as with us.
    """
    smooth = k - k.mean(1, keepdim=True)
    pooled_q, pooled_k = (
        torch.stack([part.mean(1) for part in x.split(size, 1)], 1)
        for x, size in ((q, block_q), (smooth, block_k))
    )
    score = torch.einsum("bqhd,bkhd->bhqk", pooled_q, pooled_k)
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    best = order[..., : int(ratio * score.shape[-1])]
    return torch.zeros_like(score).scatter(-1, best, 1.0).bool()


def turbodiffusion_sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sm_scale: float,
    *,
    ratio: float,
    block_q: int,
    block_k: int,
    pv: str | None = None,
) -> Tensor:
    """The formula of the released weights, without its projection: block-sparse softmax attention
    plus linear attention over all tokens, phi the softmax over channels.

    pv: SageSLA, the sparse branch in INT8 per block and "fp16", or "narrow" for FP8 up to 2.25.
    """
    mask = sla_mask(q, k, ratio, block_q, block_k)
    mask = mask.repeat_interleave(block_q, 2)[:, :, : q.shape[1]]
    mask = mask.repeat_interleave(block_k, 3)[..., : k.shape[1]]
    if pv is not None:
        score = sage_scores(q, k, sm_scale, "block").masked_fill(~mask, -torch.inf)
        sparse = weighted(score, v, pv)
    else:
        score = sm_scale * torch.einsum("blhd,bmhd->bhlm", q, k)
        p = score.masked_fill(~mask, -torch.inf).softmax(-1)
        sparse = torch.einsum("bhlm,bmhd->blhd", p, v)
    phi_q, phi_k = F.softmax(q, -1), F.softmax(k, -1)
    above = torch.einsum("blhd,bmhd,bmhe->blhe", phi_q, phi_k, v)
    below = torch.einsum("blhd,bmhd->blh", phi_q, phi_k)
    return sparse + above / (below + 1e-5).unsqueeze(-1)
