# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of norm: rows in registers, one pass over memory.

A program of `_norm_kernel` owns ROWS tokens of one frame, one after the other, each a whole row in
registers: x is read once and statistics are two passes over registers.  What the frame shares
(gate, scale, shift, weight, bias) all rows but the first find in L1; kept in registers it would
leave room for one program per SM.  A row lies in two pieces, HEAD and TAIL columns wide, both
powers of two: 1536 = 1024 + 512, 3072 = 2048 + 1024 and 5120 = 4096 + 1024 idle no lane, where one
piece would idle a third of them.

A 128 x 128 block has one scale, so its rows are normalised before its largest value is known, and
128 rows fit no register file.  `_statistics_kernel` reads x (gated: writes x_new) and leaves mean
and 1 / sigma, 8 bytes per token; `_tile_kernel` reads x (x_new) again, last rows first: they are
what the L2 cache still holds.  Rows wider than WHOLE go the same way, whatever their result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit import lang
from reeltime.jit.launch import config, launch, unless
from reeltime.norm import api
from reeltime.quant.reference import BLOCK_K, LIMIT

# --- Pieces of the kernels: `x` etc. are (pointer, strides ..., tokens of a frame) ---------------


@triton.jit
def _vector(vector, columns, inside):
    """[C] -> float32."""
    return tl.load(vector[0] + columns * vector[1], inside, other=0.0).to(tl.float32)


@triton.jit
def _per_frame(value, batch, token, columns, inside):
    """[B, F, C] -> float32, the row of one token or, if `token` is [M, 1], of as many."""
    row = value[0] + batch * value[1] + (token // value[4]) * value[2]
    return tl.load(row + columns * value[3], inside, other=0.0).to(tl.float32)


@triton.jit
def _modulated(y, weight, bias, scale, shift, batch, token, columns, inside):
    """(y * weight + bias) * (1 + scale[frame]) + shift[frame]."""
    if weight[0] is not None:
        y *= _vector(weight, columns, inside)
    if bias[0] is not None:
        y += _vector(bias, columns, inside)
    if scale[0] is not None:
        y *= 1.0 + _per_frame(scale, batch, token, columns, inside)
    if shift[0] is not None:
        y += _per_frame(shift, batch, token, columns, inside)
    return y


@triton.jit
def _residual(x_row, h_row, gate, new_row, batch, token, columns, inside):
    """x in float32; with h: x + gate * h as stored, which it stores.

    Neither is read again: they make way in L1 for what the frame shares.
    """
    x = tl.load(x_row + columns, inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if h_row is not None:
        h = tl.load(h_row + columns, inside, other=0.0, eviction_policy="evict_first")
        h = h.to(tl.float32)
        if gate[0] is not None:
            h *= _per_frame(gate, batch, token, columns, inside)
        new = (x + h).to(new_row.dtype.element_ty)
        tl.store(new_row + columns, new, inside)
        x = new.to(tl.float32)
    return x


@triton.jit
def _put_row(y, y_ptr, y_scale_ptr, row, start, C, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Store y from column `start`; if there is a LIMIT, with a scale per BLOCK columns."""
    WIDTH: tl.constexpr = y.shape[0]
    columns = start + tl.arange(0, WIDTH)
    inside, place = columns < C, y_ptr + row * C + columns
    if LIMIT == 0:
        tl.store(place, y.to(y_ptr.dtype.element_ty), inside)
    else:
        blocks = tl.reshape(y, (WIDTH // BLOCK, BLOCK))  # 0 outside
        scale = lang.block_scale(tl.max(lang.magnitude(blocks), axis=1), LIMIT)
        yq = lang.encode(blocks, scale[:, None], LIMIT, y_ptr.dtype.element_ty)
        tl.store(place, tl.reshape(yq, (WIDTH,)), inside)
        block = start // BLOCK + tl.arange(0, WIDTH // BLOCK)
        count = tl.cdiv(C, BLOCK)
        tl.store(y_scale_ptr + row * count + block, scale, block < count)


# --- Kernels ------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    x_ptr,  # [B, L, C]
    h_ptr,  # [B, L, C] or None
    gate_ptr,  # [B, F, C] or None, as scale and shift
    new_ptr,  # [B, L, C] contiguous, or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,
    shift_ptr,
    y_ptr,  # [B, L, C] contiguous
    y_scale_ptr,  # [B * L, ceil(C / 128)] contiguous, or None
    L,
    segment,  # tokens that share every frame; divides L
    eps,
    stride_xb, stride_xl,
    stride_hb, stride_hl,
    stride_gb, stride_gf, stride_gc, gate_tokens,
    stride_wc, stride_bc,
    stride_cb, stride_cf, stride_cc, scale_tokens,
    stride_sb, stride_sf, stride_sc, shift_tokens,
    C: tl.constexpr,
    LAYER: tl.constexpr,  # LayerNorm; otherwise RMSNorm
    LIMIT: tl.constexpr,  # of the 8-bit format; 0: y in its own dtype
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,  # 0: there is none
):  # fmt: skip
    gate = (gate_ptr, stride_gb, stride_gf, stride_gc, gate_tokens)
    weight, bias = (weight_ptr, stride_wc), (bias_ptr, stride_bc)
    scale = (scale_ptr, stride_cb, stride_cf, stride_cc, scale_tokens)
    shift = (shift_ptr, stride_sb, stride_sf, stride_sc, shift_tokens)
    BLOCK: tl.constexpr = min(HEAD, 128)

    # Rows of one segment
    tiles = tl.cdiv(segment, ROWS)
    start = tl.program_id(0) // tiles * segment
    first = tl.program_id(0) % tiles * ROWS
    batch, token = (start // L).to(tl.int64), start % L

    head_at = tl.arange(0, HEAD)
    head_in = head_at < C
    if TAIL > 0:
        tail_at = HEAD + tl.arange(0, TAIL)
        tail_in = tail_at < C

    for step in range(first, tl.minimum(first + ROWS, segment)):
        row = (start + step).to(tl.int64)
        index = (token + step).to(tl.int64)
        x_row = x_ptr + batch * stride_xb + index * stride_xl
        h_row, new_row = h_ptr, new_ptr
        if h_ptr is not None:
            h_row += batch * stride_hb + index * stride_hl
            new_row += row * C

        # Load and add
        head = _residual(x_row, h_row, gate, new_row, batch, token, head_at, head_in)
        total = tl.sum(head)
        if TAIL > 0:
            tail = _residual(x_row, h_row, gate, new_row, batch, token, tail_at, tail_in)
            total += tl.sum(tail)

        # Mean, then centred squares
        mean = total / C if LAYER else total * 0.0
        if LAYER:
            head = tl.where(head_in, head - mean, 0.0)
        squares = tl.sum(head * head)
        if TAIL > 0:
            if LAYER:
                tail = tl.where(tail_in, tail - mean, 0.0)
            squares += tl.sum(tail * tail)
        inverse = tl.rsqrt(squares / C + eps)

        # Modulate and store
        head *= inverse
        head = _modulated(head, weight, bias, scale, shift, batch, token, head_at, head_in)
        _put_row(head, y_ptr, y_scale_ptr, row, 0, C, LIMIT, BLOCK)
        if TAIL > 0:
            tail *= inverse
            tail = _modulated(tail, weight, bias, scale, shift, batch, token, tail_at, tail_in)
            _put_row(tail, y_ptr, y_scale_ptr, row, HEAD, C, LIMIT, BLOCK)


@triton.jit
def _statistics_kernel(
    x_ptr, h_ptr, gate_ptr, new_ptr,  # as in _norm_kernel
    mean_ptr,  # [B * L] float32; None: RMSNorm
    inverse_ptr,  # [B * L] float32: 1 / sigma
    L, segment, eps,
    stride_xb, stride_xl,
    stride_hb, stride_hl,
    stride_gb, stride_gf, stride_gc, gate_tokens,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    gate = (gate_ptr, stride_gb, stride_gf, stride_gc, gate_tokens)
    tiles = tl.cdiv(segment, ROWS)
    start = tl.program_id(0) // tiles * segment
    first = tl.program_id(0) % tiles * ROWS
    batch, token = (start // L).to(tl.int64), start % L
    lane = tl.arange(0, CHUNK)

    for step in range(first, tl.minimum(first + ROWS, segment)):
        row = (start + step).to(tl.int64)
        index = (token + step).to(tl.int64)
        x_row = x_ptr + batch * stride_xb + index * stride_xl
        h_row, new_row = h_ptr, new_ptr
        if h_ptr is not None:
            h_row += batch * stride_hb + index * stride_hl
            new_row += row * C

        # Mean and squares per lane
        mean = tl.zeros((CHUNK,), tl.float32)
        squares = tl.zeros((CHUNK,), tl.float32)  # around the lane's own mean (Welford)
        for left in range(0, C, CHUNK):
            at = left + lane
            inside = at < C
            x = _residual(x_row, h_row, gate, new_row, batch, token, at, inside)
            if mean_ptr is not None:
                gap = tl.where(inside, x - mean, 0.0)
                mean += gap * (1.0 / (left // CHUNK + 1))
                squares += gap * tl.where(inside, x - mean, 0.0)
            else:
                squares += x * x

        # Merge the lanes
        if mean_ptr is not None:
            count = ((C - lane + CHUNK - 1) // CHUNK).to(tl.float32)  # what a lane has seen
            centre = tl.sum(mean * count) / C
            gap = mean - centre
            squares += gap * gap * count
            tl.store(mean_ptr + row, centre)
        tl.store(inverse_ptr + row, tl.rsqrt(tl.sum(squares) / C + eps))


@triton.jit
def _tile_kernel(
    x_ptr, mean_ptr, inverse_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    y_ptr, y_scale_ptr,  # [B, L, C] and [ceil(B * L / bm), ceil(C / 128)] contiguous
    M, L,
    stride_xb, stride_xl,
    stride_wc, stride_bc,
    stride_cb, stride_cf, stride_cc, scale_tokens,
    stride_sb, stride_sf, stride_sc, shift_tokens,
    C: tl.constexpr,
    LIMIT: tl.constexpr,
    PER_ROW: tl.constexpr,  # bm = 1; otherwise bm = BLOCK_M, one scale per tile
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    weight, bias = (weight_ptr, stride_wc), (bias_ptr, stride_bc)
    scale = (scale_ptr, stride_cb, stride_cf, stride_cc, scale_tokens)
    shift = (shift_ptr, stride_sb, stride_sf, stride_sc, shift_tokens)
    column, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = column * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    here, inside = row < M, columns < C
    held = here & inside

    # Normalise and modulate
    last = tl.minimum(row, M - 1)  # a row out of bounds reads the frame of the last one
    batch, token = last // L, last % L
    place = x_ptr + batch * stride_xb + token * stride_xl + columns
    y = tl.load(place, held, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        y -= tl.load(mean_ptr + last)
    y *= tl.load(inverse_ptr + last)
    y = _modulated(y, weight, bias, scale, shift, batch, token, columns, inside)
    y = tl.where(held, y, 0.0)

    # Store in its format
    place = y_ptr + row * C + columns
    if LIMIT == 0:
        tl.store(place, y.to(y_ptr.dtype.element_ty), held)
    else:
        amax = tl.max(lang.magnitude(y), axis=1, keep_dims=True)
        if PER_ROW:
            y_scale = lang.block_scale(amax, LIMIT)
            tl.store(y_scale_ptr + row * tl.num_programs(0) + column, y_scale, here)
        else:
            y_scale = lang.block_scale(tl.max(amax, axis=0, keep_dims=True), LIMIT)
            at = tile * tl.num_programs(0) + column + tl.zeros((1, 1), tl.int32)
            tl.store(y_scale_ptr + at, y_scale)
        tl.store(place, lang.encode(y, y_scale, LIMIT, y_ptr.dtype.element_ty), held)


# --- Launchers ----------------------------------------------------------------------------------

WHOLE = 8192  # the widest row that one program holds: 16 float32 per thread of 16 warps


def _power(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << n.bit_length() - 1


def _halves(C: int) -> tuple[int, int]:
    """HEAD and TAIL of a row; blocks of 128 columns never straddle them."""
    if C <= BLOCK_K:
        return triton.next_power_of_2(C), 0
    head = _power(C)
    return head, max(BLOCK_K, triton.next_power_of_2(C - head)) if C > head else 0


def _framed(value: Tensor | None, length: int) -> tuple[Any, ...]:
    """A per-frame tensor as a kernel takes it: its strides, and the tokens of a frame."""
    return (0, 0, 0, 1) if value is None else (*value.stride(), length // value.shape[1])


def _stride(value: Tensor | None) -> int:
    return 0 if value is None else value.stride(0)


def _norm(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype | None,
    block_rows: int,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """x_new, y and the scale of y, each where it exists."""
    B, L, C = x.shape
    M, layer = B * L, kind == "layer"
    new = None if h is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape, dtype=dtype or x.dtype)
    y_scale = None
    if dtype is not None:
        y_scale = x.new_empty(api.scale_shape(M, C, block_rows), dtype=torch.float32)
    if not x.numel():
        return new, y, y_scale
    frames = [L // value.shape[1] for value in (gate, scale, shift) if value is not None]
    segment = math.gcd(L, *frames)
    rows_of_x = x.stride()[:2], (0, 0) if h is None else h.stride()[:2], _framed(gate, L)
    strides = [stride for part in rows_of_x for stride in part]
    modulation = (
        *(_stride(weight), _stride(bias)),
        *(*_framed(scale, L), *_framed(shift, L)),
    )
    limit = 0.0 if dtype is None else LIMIT[dtype]
    rows = min(4, _power(max(1, M // 1024)))  # as many as leave programs for every SM
    if C <= WHOLE and (dtype is None or block_rows == 1):
        head, tail = _halves(C)
        tile = {"ROWS": rows, "num_warps": min(16, max(1, head // 256))}
        tile = config("norm", x.device, tile, C=C)
        launch(
            _norm_kernel,
            (M // segment * triton.cdiv(segment, tile["ROWS"]),),
            *(x, h, gate, new, weight, bias, scale, shift, y, y_scale),
            *(L, segment, eps, *strides, *modulation),
            **{"C": C, "LAYER": layer, "LIMIT": limit, "HEAD": head, "TAIL": tail, **tile},
        )
        return new, y, y_scale
    mean = x.new_empty(M, dtype=torch.float32) if layer else None
    inverse = x.new_empty(M, dtype=torch.float32)
    chunk = min(512, triton.next_power_of_2(C))
    tile = {"ROWS": rows, "num_warps": max(1, chunk // 256)}
    tile = config("norm_statistics", x.device, tile, C=C)
    launch(
        _statistics_kernel,
        (M // segment * triton.cdiv(segment, tile["ROWS"]),),
        *(x, h, gate, new, mean, inverse, L, segment, eps, *strides),
        **{"C": C, "CHUNK": chunk, **tile},
    )
    source = x if new is None else new
    tall = max(block_rows, 32)
    launch(
        _tile_kernel,
        (triton.cdiv(C, BLOCK_K), triton.cdiv(M, tall)),
        *(source, mean, inverse, weight, bias, scale, shift, y, y_scale, M, L),
        *(*source.stride()[:2], *modulation),
        **{"C": C, "LIMIT": limit, "PER_ROW": block_rows == 1},
        **{"BLOCK_M": tall, "BLOCK_K": BLOCK_K, "num_warps": tall // 8},
    )
    return new, y, y_scale


@api.NORM.kernel("triton", unless=unless(0))
def norm(x: Tensor, *options: Any) -> Tensor:
    return _norm(x, None, None, None, 1, *options)[1]


@api.NORM_QUANTIZED.kernel("triton", unless=unless(0, 1))
def norm_quantized(
    x: Tensor, dtype: torch.dtype, block_rows: int, *options: Any
) -> tuple[Tensor, Tensor]:
    return _norm(x, None, None, dtype, block_rows, *options)[1:]


@api.GATED.kernel("triton", unless=unless(0))
def gated_residual_norm(
    x: Tensor, h: Tensor, gate: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _norm(x, h, gate, None, 1, *options)[:2]


@api.GATED_QUANTIZED.kernel("triton", unless=unless(0, 3))
def gated_residual_norm_quantized(
    x: Tensor, h: Tensor, gate: Tensor | None, dtype: torch.dtype, block_rows: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(x, h, gate, dtype, block_rows, *options)
