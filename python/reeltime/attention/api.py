# SPDX-License-Identifier: Apache-2.0
"""attention: over plain tensors, and over the cached segments of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reeltime import checks
from reeltime.attention import reference
from reeltime.backends import Op
from reeltime.checks import Tolerance

if TYPE_CHECKING:
    from reeltime.rope_kv import KVCache

CAUSAL = {None: None, False: None, True: "bottom_right"} | {
    name: name for name in ("top_left", "bottom_right")
}

# By format against float64: softmax averages, so float32 errors stay near one rounding; 8-bit QK
# moves a score by about a step of |q| |k - mean|, and outlier channels set the peak.
TOLERANCE = {
    "float64": Tolerance(1e-12, 1e-10),
    "float32": Tolerance(2e-6, 5e-5),
    "bfloat16": Tolerance(1e-2, 1e-1),
    "float16": Tolerance(2e-3, 2e-2),
    "int8": Tolerance(0.05, 0.5),
    "fp8": Tolerance(0.1, 1.0),
}


def flops(B: int, S_q: int, S_kv: int, H: int, D: int, *, causal: bool = False) -> int:
    """2 D per score and 2 D per weighted value; causal halves both."""
    return 4 * B * H * S_q * S_kv * D // (2 if causal else 1)


def bytes(
    B: int,
    S_q: int,
    S_kv: int,
    H: int,
    D: int,
    *,
    H_kv: int | None = None,
    itemsize: int = 2,
    kv_itemsize: int = 2,
    offsets: int = 1,
) -> int:
    """q (per offset), k, v read once, out written once."""
    kv = 2 * B * S_kv * (H if H_kv is None else H_kv) * D * kv_itemsize
    return B * S_q * H * D * itemsize * (offsets + 1) + kv


def _fake_lse(q: Tensor, batch: int, length: int, heads: int, want_lse: bool) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((batch, heads, length) if want_lse else (0,), dtype=wide)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: object
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3]))
    return out, _fake_lse(q, batch, length, heads, bool(options[-1]))


def _fake_segment_attention(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    _, batch, length, heads, _ = q.shape
    return q.new_empty(q.shape[1:]), _fake_lse(q, batch, length, heads, bool(rest[-1]))


ATTENTION = Op(
    "attention",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float sm_scale, str? causal, str? qk, "
    "str? pv, str? smooth, bool want_lse, str backend) -> (Tensor, Tensor)",
    reference.attention,
    _fake_attention,
)
SEGMENT_ATTENTION = Op(
    "attention",
    "segment_attention(Tensor q, Tensor? q_int8, Tensor? q_scale, Tensor k, Tensor v, "
    "Tensor? k_scale, Tensor? k_mean, Tensor? v_scale, Tensor block_table, Tensor offset_index, "
    "float sm_scale, bool want_lse, str backend) -> (Tensor, Tensor)",
    reference.segment_attention,
    _fake_segment_attention,
)


def _result(
    y: Tensor, lse: Tensor, return_lse: bool, out: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    if out is not None:
        checks.output("out", out, y.shape, y.dtype)
        y = out.copy_(y)
    return (y, lse) if return_lse else y


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sm_scale: float | None = None,
    causal: str | bool | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
    qk: str | None = None,
    pv: str | None = None,
    smooth: str | None = "block",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on plain tensors, in full or 8-bit precision.

    out = softmax(sm_scale * q k^T + mask) v;   lse = log(sum(exp(sm_scale * q k^T + mask)))
    qk "int8": q k^T = q8 (k - mu)8^T + q mu^T with mu the mean key of each 64 (smooth="block").

    Args:
        q: [B, S_q, H, D] floating point, D contiguous.
        k, v: [B, S_kv, H_kv, D], H % H_kv == 0, of q's dtype.
        sm_scale: default 1 / sqrt(D).
        causal: None or False; "top_left": key j <= query i; "bottom_right" or True: the last query
            sees every key, j <= i + S_kv - S_q.
        mask: broadcastable to [B, H, S_q, S_kv]: bool (True is seen) or added to the scores.
        qk: None, "int8" or "fp8": of q and k, a scale per 64 tokens and head.
        pv: None, "fp8" or "fp16": of probabilities, and of v with a scale per 64 keys and channel.
        smooth: which mean key is subtracted with qk: "block", "sequence" (SageAttention) or None.
        out: optional [B, S_q, H, D], written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [B, S_q, H, D] of q's dtype, or out; with return_lse also lse [B, H, S_q] float32 (float64).
        A row that sees no key is 0 and its lse -inf.  NaN in a query row makes that row NaN; NaN
        in a key or value makes NaN of every row of that head that sees it.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.
    Source: SageAttention 2 (arXiv 2411.10958), the mean per block instead of per sequence.
    """
    checks.qkv(q, k, v)
    if causal not in CAUSAL:
        checks.choice("causal", causal, tuple(CAUSAL))
    checks.choice("qk", qk, (None, "int8", "fp8"))
    checks.choice("pv", pv, (None, "fp8", "fp16"))
    checks.choice("smooth", smooth, (None, "block", "sequence"))
    if mask is not None:
        _check_mask(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q)
    scale = checks.softmax_scale(sm_scale, q.shape[3])
    options = (scale, CAUSAL[causal], qk, pv, smooth, return_lse)
    y, lse = ATTENTION.run(backend, q.device, q, k, v, mask, *options)
    return _result(y, lse, return_lse, out)


def _check_mask(mask: Tensor, want: tuple[int, ...], q: Tensor) -> None:
    checks.dtype("mask", mask, (torch.bool, *checks.FLOATS))
    checks.device("mask", mask, q, "q")
    sizes = zip(reversed(mask.shape), reversed(want), strict=False)
    if mask.dim() > 4 or any(have not in (1, full) for have, full in sizes):
        checks.fail(
            "mask",
            f"broadcastable to [B, H, S_q, S_kv] = {list(want)}",
            list(mask.shape),
            "Insert dimensions of 1 with unsqueeze.",
        )


def segment_attention(
    q: Tensor,
    cache: KVCache,
    block_table: Tensor,
    offset_index: Tensor,
    *,
    sm_scale: float | None = None,
    q_int8: Tensor | None = None,
    q_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the cached segments of a stream.

    out = softmax over t, n of sm_scale * q[offset_index[t]] . k[block_table[t], n], times v
    int8 cache: q.k = q8 (k - mu)8 + q.mu per block of 64 keys, v = v8 * v_scale.

    Args:
        q: [O, B, L, H, D] rotated once per offset, from rope_kv.query.
        cache: of rope_kv.make_cache, format plain or int8.
        block_table: [T] int64 on the device: the slots to attend, in any order; a negative entry
            is absent, so that fill phase and steady state are one graph.
        offset_index: [T] int64 in [0, O): which rotation of the query scores that slot.
        sm_scale: default 1 / sqrt(D); 1 if it is folded into the query.
        q_int8, q_scale: optional, from rope_kv.query(quantize="int8"); int8 caches only.
        out: optional [B, L, H, D], written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [B, L, H, D] of q's dtype, or out; with return_lse also lse [B, H, L] float32 (float64).
        If every entry is absent: zeros, and lse -inf.  Slots that are not named are never read.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes, no host sync.
    Source: Vidu S1, section 2.3.1; SageAttention 2 (arXiv 2411.10958) for 8 bits.
    """
    checks.segments(q, cache.k, block_table, offset_index)
    if (q_int8 is None) != (q_scale is None) or (q_int8 is not None and cache.format != "int8"):
        checks.fail(
            "q_int8, q_scale",
            "both or neither, and an int8 cache",
            f"a {cache.format} cache",
            'Pass what rope_kv.query(quantize="int8") returns, or leave both out.',
        )
    y, lse = SEGMENT_ATTENTION.run(
        backend,
        q.device,
        *(q, q_int8, q_scale, cache.k, cache.v, cache.k_scale, _mean(cache), cache.v_scale),
        *(block_table, offset_index, checks.softmax_scale(sm_scale, q.shape[4]), return_lse),
    )
    return _result(y, lse, return_lse, out)


def _mean(cache: KVCache) -> Tensor | None:
    """A plain cache with summaries keeps pooled keys that attention has no use for."""
    return cache.k_mean if cache.format == "int8" else None
