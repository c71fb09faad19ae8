# SPDX-License-Identifier: Apache-2.0
"""rope_kv: queries and keys normed and rotated, keys and values written once into the cache."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reeltime import checks
from reeltime.backends import Op
from reeltime.checks import Tolerance
from reeltime.rope_kv import arguments, reference
from reeltime.rope_kv.arguments import TABLE_DTYPES
from reeltime.rope_kv.reference import BLOCK

FORMATS = ("plain", "int8")
PHI = ("softmax", "elu", "relu")
SUMMARIES = (None, "block", "slot")

# By format of the result against float64: a rotation keeps the norm, so errors are those of one
# rounding, of float32 cosines and, in 8 bits, of half a step of the block's largest value.
# Sums are the summaries h and z: n = 64 terms of magnitude t add at most n t roundings, 64 * 2^-24
# = 4e-6 of n t; terms of both signs leave an RMS of 8 t, and the largest n t is 3 of the mean, so
# that the peak is 4e-6 * 8 * 3.  Mean errors are those of a random walk, far below 4e-6.
# Sums of a slot add those of its blocks, and such errors with them.
TOLERANCE = {
    "float64": Tolerance(1e-7, 1e-6),
    "float32": Tolerance(1e-6, 1e-5),
    "float64 sums": Tolerance(1e-7, 1e-6),
    "float32 sums": Tolerance(4e-6, 1e-4),
    "bfloat16": Tolerance(4e-3, 4e-2),
    "float16": Tolerance(5e-4, 5e-3),
    "int8": Tolerance(0.02, 0.1),
    "fp8": Tolerance(0.04, 0.7),
}


@dataclass
class KVCache:
    """Keys and values of one layer.  One slot is one latent frame of N tokens, in nb = ceil(N / 64)
    blocks.  Every tensor is allocated once and written in place."""

    k: Tensor  # [B, slots, N, H, D]: keys, or in format int8 k - k_mean over k_scale
    v: Tensor  # [B, slots, N, H, D]: values, or in format int8 v over v_scale (fp8 or fp16)
    format: str = "plain"
    phi: str = "softmax"  # feature map of the summaries
    k_scale: Tensor | None = None  # [B, slots, nb, H] float32
    k_mean: Tensor | None = None  # [B, slots, nb, H, D]
    v_scale: Tensor | None = None  # [B, slots, nb, H, D] float32
    h: Tensor | None = None  # [B, slots, nb or 1, H, D, D]: phi(K)^T V, of a block or of the slot
    z: Tensor | None = None  # [B, slots, nb or 1, H, D]: sum of phi(K)

    @property
    def pooled(self) -> Tensor | None:
        """Pooled keys [B, slots, nb, H, D]: the block means, whichever use has asked for them."""
        return self.k_mean

    @property
    def tokens(self) -> int:
        """N, the tokens of one slot."""
        return self.k.shape[2]

    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        parts = (self.k, self.v, self.k_scale, self.k_mean, self.v_scale, self.h, self.z)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def make_cache(
    batch: int,
    slots: int,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    format: str = "plain",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    summaries: str | None = None,
    phi: str = "softmax",
) -> KVCache:
    """Allocate a cache, once, filled with zeros.

    Args:
        batch, slots, tokens, heads, head_dim: B, slots, N, H, D.
        format: "plain", or "int8": keys INT8 around their block mean, values in 8 or 16 bits with
            a scale per block and channel.
        dtype: plain: of keys and values (float32).  int8: of values, float8_e4m3fn (the default)
            or float16.
        summaries: None, or what sla reads is kept too: pooled keys of each block, and h and z of
            each "block" or, which is all that over="all" needs, their sum over each "slot".
        phi: feature map of the summaries: "softmax", "elu" or "relu".
    Returns:
        KVCache.
    Raises:
        ValueError: names the argument, what was expected, what came.
    """
    checks.choice("format", format, FORMATS)
    checks.choice("phi", phi, PHI)
    checks.choice("summaries", summaries, SUMMARIES)
    sizes = {"batch": batch, "slots": slots, "tokens": tokens, "heads": heads}
    for name, size in (sizes | {"head_dim": head_dim}).items():
        checks.at_least(name, size, 1)
    if format == "plain":
        checks.choice("dtype (plain)", dtype or torch.float32, checks.FLOATS)
    else:
        default = torch.float8_e4m3fn
        checks.choice("dtype (int8: of values)", dtype or default, (default, torch.float16))
    shape = (batch, slots, tokens, heads, head_dim)
    per_head = (batch, slots, -(-tokens // BLOCK), heads)
    per_channel = (*per_head, head_dim)
    summed = (batch, slots, 1, heads, head_dim) if summaries == "slot" else per_channel
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    zeros = functools.partial(torch.zeros, device=device)
    quantized = format == "int8"
    return KVCache(
        k=zeros(shape, dtype=torch.int8 if quantized else dtype or torch.float32),
        v=zeros(shape, dtype=dtype or (torch.float8_e4m3fn if quantized else torch.float32)),
        format=format,
        phi=phi,
        k_scale=zeros(per_head, dtype=torch.float32) if quantized else None,
        k_mean=zeros(per_channel, dtype=torch.bfloat16 if quantized else wide)
        if quantized or summaries
        else None,
        v_scale=zeros(per_channel, dtype=torch.float32) if quantized else None,
        h=zeros((*summed, head_dim), dtype=wide) if summaries else None,
        z=zeros(summed, dtype=wide) if summaries else None,
    )


def flops(B: int, L: int, H: int, D: int, *, offsets: int = 1) -> int:
    """RMSNorm (4 per element) and one rotation (3 per element) per offset."""
    return B * L * H * D * (4 + 3 * offsets)


def bytes(
    B: int,
    L: int,
    H: int,
    D: int,
    *,
    op: str = "query",
    offsets: int = 1,
    itemsize: int = 2,
    format: str = "plain",
    summaries: str | None = None,
    slots: int = 1,
) -> int:
    """The fewest bytes of op "query" (offsets outputs), "write" (to so many slots) or
    "rope_on_cache"."""
    element, table = B * L * H * D, L * D * 4
    if op == "query":
        return element * itemsize * (1 + offsets) + offsets * table
    if op == "rope_on_cache":
        return 2 * element * itemsize + table
    channels = B * slots * -(-L // slots // BLOCK) * H * D
    stored = 2 * element * itemsize
    if format == "int8":
        stored = 2 * element + channels * 6 + channels // D * 4
    if summaries:
        summed = B * slots * H * D if summaries == "slot" else channels
        stored += summed * 4 * (D + 1) + (0 if format == "int8" else channels * 4)
    return 2 * element * itemsize + table + stored


QUERY_OPTIONS = "int num_heads, Tensor? norm_weight, float eps, float sm_scale, str backend"


def _fake_query(q: Tensor, table: Tensor | None, heads: int, *_: object) -> Tensor:
    offsets = 1 if table is None else table.shape[0]
    return q.new_empty((offsets, q.shape[0], q.shape[1], heads, q.shape[2] // heads))


def _fake_query_int8(
    q: Tensor, table: Tensor | None, heads: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    rotated = _fake_query(q, table, heads)
    blocks = (*rotated.shape[:2], -(-q.shape[1] // BLOCK), heads)
    scale = q.new_empty(blocks, dtype=torch.float32)
    return rotated, q.new_empty(rotated.shape, dtype=torch.int8), scale


QUERY = Op(
    "rope_kv",
    f"query(Tensor q, Tensor? table, {QUERY_OPTIONS}) -> Tensor",
    reference.query,
    _fake_query,
)
QUERY_INT8 = Op(
    "rope_kv",
    f"query_int8(Tensor q, Tensor? table, {QUERY_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference.query_int8,
    _fake_query_int8,
    differentiable=False,
)
WRITE = Op(
    "rope_kv",
    "write(Tensor k, Tensor v, Tensor slots, Tensor? table, Tensor? norm_weight, int num_heads, "
    "float eps, str phi, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!)? k_scale, "
    "Tensor(d!)? k_mean, Tensor(e!)? v_scale, Tensor(f!)? h, Tensor(g!)? z, str backend) -> ()",
    reference.write,
    lambda *_: None,
    differentiable=False,
)
ROPE_ON_CACHE = Op(
    "rope_kv",
    "rope_on_cache(Tensor k_raw, Tensor table, str backend) -> Tensor",
    reference.rope_on_cache,
    lambda k_raw, table: k_raw.new_empty(k_raw.shape),
)


def rope_table(
    frame_positions: Tensor,
    grid: tuple[int, int],
    head_dim: int,
    theta: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cosines and sines of the 3-D rotary embedding of Wan.

    angle[f, y, x, i] = p * theta ** (-2 i / d)  with p the frame position, y or x, d = t, s or s:
    head_dim splits into t = head_dim - 2 s for time and s = 2 * (head_dim // 6) for each of y and
    x, every axis with its own dimension as denominator.

    Args:
        frame_positions: [..., F] int64 or float64, on the device of the result.
        grid: (h, w), tokens of a latent frame.
        head_dim: D, even.
        dtype: of the result; float64 for oracles.
    Returns:
        [..., F * h * w, D / 2, 2] of dtype: (cos, sin), y before x, contiguous.
    Raises:
        ValueError: names the argument, what was expected, what came.
    Accumulation: angles in float64, so that position 1,000,000 is as exact as position 0.
    Graph-safe: yes.  Source: RoFormer (arXiv 2104.09864); Wan (arXiv 2503.20314).
    """
    checks.at_least("frame_positions (its dimensions)", frame_positions.dim(), 1)
    checks.dtype("frame_positions", frame_positions, (torch.int64, torch.float64, torch.int32))
    checks.at_least("grid", min(grid), 1)
    checks.positive("theta", theta)
    checks.choice("dtype", dtype, TABLE_DTYPES)
    arguments.check_even(head_dim)
    return reference.rope_table(frame_positions, grid, head_dim, theta, dtype)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of x: (a + ib)(cos + i sin).

    Args:
        x: [B, L, H, D] floating point.
        table: [L, D / 2, 2] or [B, L, D / 2, 2], from rope_table.
    Returns:
        [B, L, H, D] of x's dtype.
    Raises:
        ValueError: names the argument, what was expected, what came.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.  Plain PyTorch on every device.
    """
    checks.tensor("x", x, 4, "[B, L, H, D]")
    checks.dtype("x", x, checks.FLOATS)
    arguments.check_even(x.shape[3])
    want: tuple[int, ...] = (x.shape[1], x.shape[3] // 2, 2)
    if table.dim() == 4:
        want = (x.shape[0], *want)
    arguments.check_table(table, want, "[L, D / 2, 2] or [B, L, D / 2, 2]", x)
    return reference.apply_rope(x, table)


def query(
    q: Tensor,
    table: Tensor | None,
    *,
    num_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    sm_scale: float = 1.0,
    quantize: str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """RMSNorm over the full width, split into heads, and one rotation per offset.

    out[o] = rotate(heads(rmsnorm(q) * norm_weight) * sm_scale, table[o])

    Scores depend on position differences only, so a window that moved by D is a query rotated by
    -D: each segment of the window has one offset, and the cache is never touched again.

    Args:
        q: [B, L, C] raw projection, C contiguous, C = H * D.
        table: [O, L, D / 2, 2], one per offset; None: no rotation, O = 1.
        num_heads: H.
        norm_weight: optional [C]; None: no norm.
        sm_scale: folded in, for attention with sm_scale=1.
        quantize: None, or "int8": also the INT8 query with a scale per 64 tokens and head.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [O, B, L, H, D] of q's dtype; quantised: that, q_int8 [O, B, L, H, D] and
        q_scale [O, B, ceil(L / 64), H] float32.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.
    Source: Vidu S1, section 2.3.1 (repositioning); SageAttention (arXiv 2410.02367) for INT8.
    """
    if (
        not isinstance(q, Tensor)
        or len(have := q.shape) != 3
        or q.dtype not in checks.FLOATS
        or not q.is_contiguous()
        or num_heads <= 0
        or have[2] % num_heads
        or not 0 < eps < math.inf
        or not 0 < sm_scale < math.inf
        or norm_weight is not None
        and (norm_weight.shape != (have[2],) or norm_weight.device != q.device)
        or table is not None
        and (
            len(turns := table.shape) != 4
            or turns != (turns[0], have[1], have[2] // num_heads // 2, 2)
            or have[2] // num_heads % 2
            or table.dtype not in TABLE_DTYPES
            or table.device != q.device
        )
    ):
        arguments.check_query(q, table, num_heads, norm_weight, eps, sm_scale)
    if quantize is None:
        return QUERY.run(backend, q.device, q, table, num_heads, norm_weight, eps, sm_scale)
    if quantize != "int8":
        checks.choice("quantize", quantize, (None, "int8"))
    return QUERY_INT8.run(backend, q.device, q, table, num_heads, norm_weight, eps, sm_scale)


def write(
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    slots: Tensor,
    *,
    table: Tensor | None = None,
    norm_weight: Tensor | None = None,
    num_heads: int,
    eps: float = 1e-6,
    backend: str = "auto",
) -> None:
    """Everything that depends on a key or a value alone, once, on write.

    key = rotate(heads(rmsnorm(k) * norm_weight), table);   cache.k[:, slots] = key
    format int8, per block b of 64 tokens: mu_b = mean(key), k = round((key - mu_b) / scale_b);
    q.key = q.(key - mu_b) + q.mu_b exactly, and mu_b survives the append of other blocks.

    Args:
        k, v: [B, F * N, C] raw projections, C = H * D contiguous.
        cache: from make_cache, written in place; its summaries too, if it has them.  Those of a
            slot are made anew: nothing of what it held is subtracted, so nothing drifts.
        slots: [F] int64 on the device of the cache, distinct.  A kernel leaves out the frame of
            a slot that the cache does not have.
        table: [F * N, D / 2, 2]; None stores raw keys, for rope_on_cache.
        norm_weight: optional [C] of the RMSNorm on k; None: no norm.
        num_heads: H.
        backend: "auto", "reference", "triton" or "cuda".
    Raises:
        ValueError: names the argument, what was expected, what came; slots out of range, by the
            reference on the CPU (a GPU would have to wait to look).
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.
    Source: Vidu S1, section 2.3.1; SageAttention (arXiv 2410.02367), with the mean per block.
    """
    if not (isinstance(k, Tensor) and isinstance(v, Tensor) and isinstance(slots, Tensor)):
        arguments.check_write(k, v, cache, slots, table, norm_weight, num_heads, eps)
    keys, frames = cache.k, slots.shape
    batch, _, tokens, heads, dim = keys.shape
    length, device = frames[0] * tokens if frames else 0, keys.device
    want = (batch, length, heads * dim)
    if (
        k.shape != want
        or v.shape != want
        or num_heads != heads
        or k.dtype not in checks.FLOATS
        or v.dtype not in checks.FLOATS
        or slots.dtype != torch.int64
        or len(frames) != 1
        or not 0 < eps < math.inf
        or not k.is_contiguous()
        or not v.is_contiguous()
        or k.device != device
        or v.device != device
        or slots.device != device
        or norm_weight is not None
        and (norm_weight.shape != (want[2],) or norm_weight.device != device)
        or table is not None
        and (
            table.shape != (length, dim // 2, 2)
            or dim % 2
            or table.dtype not in TABLE_DTYPES
            or table.device != device
        )
    ):
        arguments.check_write(k, v, cache, slots, table, norm_weight, num_heads, eps)
    try:
        WRITE.run(
            backend,
            device,
            k,
            v,
            slots,
            table,
            norm_weight,
            num_heads,
            eps,
            cache.phi,
            keys,
            cache.v,
            cache.k_scale,
            cache.k_mean,
            cache.v_scale,
            cache.h,
            cache.z,
        )
    except IndexError as error:
        raise ValueError(
            f"slots: expected values in [0, {cache.k.shape[1]}), got {slots.tolist()}. "
            "A ring index is taken modulo the slots of the cache."
        ) from error


def rope_on_cache(
    k_raw: Tensor, table: Tensor, *, backend: str = "auto", out: Tensor | None = None
) -> Tensor:
    """Rotate raw keys to their slots: the published way, and the oracle of the query-side one.

    out[b, t, n] = rotate(k_raw[b, t, n], table[t * N + n])

    Args:
        k_raw: [B, T, N, H, D] keys written with table=None.
        table: [T * N, D / 2, 2].
        out: optional [B, T, N, H, D], written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [B, T, N, H, D] of k_raw's dtype, or out.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64).  Graph-safe: yes.  Source: Vidu S1, section 2.3.1.
    """
    if not isinstance(k_raw, Tensor) or k_raw.dim() != 5 or k_raw.dtype not in checks.FLOATS:
        checks.tensor("k_raw", k_raw, 5, "[B, T, N, H, D]")
        checks.dtype("k_raw", k_raw, checks.FLOATS)
    _, steps, tokens, _, dim = k_raw.shape
    if dim < 2 or dim % 2:
        arguments.check_even(dim)
    arguments.check_table(table, (steps * tokens, dim // 2, 2), "[T * N, D / 2, 2]", k_raw)
    if out is not None:
        checks.output("out", out, k_raw.shape, k_raw.dtype)
    rotated = ROPE_ON_CACHE.run(backend, k_raw.device, k_raw, table)
    return rotated if out is None else out.copy_(rotated)
