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
from reeltime.rope_kv.reference import BLOCK

if TYPE_CHECKING:
    from reeltime.rope_kv import KVCache

CAUSAL = {None: None, False: None, True: "bottom_right"} | {
    name: name for name in ("top_left", "bottom_right")
}

QK, PV, SMOOTH = (None, "int8", "fp8"), (None, "fp8", "fp16"), (None, "block", "sequence")

# By format against float64: softmax averages, so float32 errors stay near one rounding.
# 8 bits: the roundings of q and k move a score by d = sqrt(step_q^2 k^2 + step_k^2 q^2) / sqrt(12),
# and the output by d of itself, as do those of P and V: errors of keys add up as the output does.
# INT8, amax = 4 r: d = 0.013; 0.026 where 1 channel in 16 of k - mean is 3 times the others.
# e4m3: 0.026 per rounded operand; q, k, P and V make 0.052, 0.058 with those channels.
# A deviation, not the mean error (0.8 of it), is the limit: kernels round more than these.
# The peak is of the row that hangs on the fewest keys: d p (1 - p) (v1 - v2) between two of them,
# six times that for the largest of many.  It depends on the input: `reeltime check` derives it for
# each, and L1; what is said here is for rows that spread their weight over some ten keys or more.
TOLERANCE = {
    "float64": Tolerance(1e-12, 1e-10),
    "float32": Tolerance(2e-6, 5e-5),
    "bfloat16": Tolerance(1e-2, 1e-1),
    "float16": Tolerance(2e-3, 2e-2),
    "int8": Tolerance(0.03, 0.5),
    "fp8": Tolerance(0.075, 1.0),
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
            The gradient passes straight through qk and pv.
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
    check_formats(qk, pv, smooth)
    if mask is not None:
        _check_mask(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q)
    scale = checks.softmax_scale(sm_scale, q.shape[3])
    options = (scale, CAUSAL[causal], qk, pv, smooth, return_lse)
    y, lse = ATTENTION.run(backend, q.device, q, k, v, mask, *options)
    return _result(y, lse, return_lse, out)


def check_formats(qk: str | None, pv: str | None, smooth: str | None) -> None:
    if qk not in QK or pv not in PV or smooth not in SMOOTH:
        checks.choice("qk", qk, QK)
        checks.choice("pv", pv, PV)
        checks.choice("smooth", smooth, SMOOTH)


def _check_mask(mask: Tensor, want: tuple[int, ...], q: Tensor) -> None:
    if mask.dtype != torch.bool:
        checks.dtype("mask", mask, (torch.bool, *checks.FLOATS))
    if mask.device != q.device:
        checks.device("mask", mask, q, "q")
    if mask.shape == want or mask.shape == want[2:]:
        return
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
    if q_int8 is not None or q_scale is not None:
        _check_low_query(q_int8, q_scale, q, cache)
    y, lse = SEGMENT_ATTENTION.run(
        backend,
        q.device,
        *(q, q_int8, q_scale, cache.k, cache.v, cache.k_scale, _mean(cache), cache.v_scale),
        *(block_table, offset_index, checks.softmax_scale(sm_scale, q.shape[4]), return_lse),
    )
    return _result(y, lse, return_lse, out)


def _check_low_query(
    q_int8: Tensor | None, q_scale: Tensor | None, q: Tensor, cache: KVCache
) -> None:
    """Both, as rope_kv.query leaves them beside q, and an int8 cache to meet them."""
    if q_int8 is None or q_scale is None or cache.format != "int8":
        given = [name for name, x in (("q_int8", q_int8), ("q_scale", q_scale)) if x is not None]
        checks.fail(
            "q_int8, q_scale",
            "both or neither, and an int8 cache",
            f"{' and '.join(given)} and format {cache.format!r}",
            'Pass what rope_kv.query(quantize="int8") returns, or leave both out.',
        )
    offsets, batch, length, heads, _ = q.shape
    want = (offsets, batch, -(-length // BLOCK), heads)
    if (
        q_int8.shape != q.shape
        or q_int8.dtype != torch.int8
        or q_scale.shape != want
        or q_scale.dtype != torch.float32
        or not q_int8.device == q.device == q_scale.device
    ):
        checks.shape("q_int8", q_int8, q.shape, "[O, B, L, H, D] of q")
        checks.dtype("q_int8", q_int8, (torch.int8,))
        checks.device("q_int8", q_int8, q, "q")
        checks.shape("q_scale", q_scale, want, "[O, B, ceil(L / 64), H]")
        checks.dtype("q_scale", q_scale, (torch.float32,))
        checks.device("q_scale", q_scale, q, "q")


def _mean(cache: KVCache) -> Tensor | None:
    """A plain cache with summaries keeps pooled keys that attention has no use for."""
    return cache.k_mean if cache.format == "int8" else None
