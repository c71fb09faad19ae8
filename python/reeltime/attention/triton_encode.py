# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that make the 8-bit operands of attention from plain tensors.

`_encode_kernel`: a program owns 64 tokens of one head and reads them once.  It subtracts their
mean, finds their scale, or one per channel, and stores both beside what is left.
`_sum_kernel`: the mean of a whole sequence, which smooth="sequence" subtracts, in two passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit import lang
from reeltime.jit.launch import launch
from reeltime.quant.reference import LIMIT
from reeltime.rope_kv.reference import BLOCK


@triton.jit
def _encode_kernel(
    x_ptr,  # [B, S, H, D]
    low_ptr,  # [B, S, H, D] contiguous
    scale_ptr,  # [B, ceil(S / 64), H] contiguous; PER_CHANNEL: and D
    mean_ptr,  # [B, ceil(S / 64), H, D] contiguous, written; SEQUENCE: [B, H, D], read; or None
    S,
    H,
    stride_xb,
    stride_xs,
    stride_xh,
    D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SEQUENCE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Heads first: together they read whole rows of memory
    blocks = tl.cdiv(S, BLOCK)
    h, block = tl.program_id(0) % H, tl.program_id(0) // H % blocks
    b = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    held = (rows < S)[:, None] & (columns < D)[None, :]
    x_at = x_ptr + b * stride_xb + rows[:, None].to(tl.int64) * stride_xs + h * stride_xh
    x = tl.load(x_at + columns[None, :], held, other=0.0).to(tl.float32)
    first = (b * blocks + block) * H + h
    if mean_ptr is not None:
        # Subtracted as stored, so that q.(k - mu) + q.mu is exact
        if SEQUENCE:
            mean = tl.load(mean_ptr + (b * H + h) * D + columns, columns < D, other=0.0)
        else:
            count = tl.minimum(S - block * BLOCK, BLOCK).to(tl.float32)
            mean = (tl.sum(x, 0) / count).to(mean_ptr.dtype.element_ty)
            tl.store(mean_ptr + first * D + columns, mean, columns < D)
        x = tl.where(held, x - mean.to(tl.float32)[None, :], 0.0)
    amax = tl.max(lang.magnitude(x), axis=0)
    if PER_CHANNEL:
        scale = lang.block_scale(amax, LIMIT)
        tl.store(scale_ptr + first * D + columns, scale, columns < D)
        scale = scale[None, :]
    else:
        scale = lang.block_scale(tl.max(amax, axis=0), LIMIT)
        tl.store(scale_ptr + first, scale)
        scale = tl.full((1, 1), 0.0, tl.float32) + scale
    low_at = low_ptr + ((b * S + rows)[:, None] * H + h) * D + columns[None, :]
    tl.store(low_at, lang.encode(x, scale, LIMIT, low_ptr.dtype.element_ty), held)


@triton.jit
def _sum_kernel(
    x_ptr,  # [B, S, H, D]
    sum_ptr,  # [B, parts, H, D] contiguous: the sum of this program's rows, over `count`
    S,
    H,
    parts,
    rows_each,
    count,
    stride_xb,
    stride_xs,
    stride_xh,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    h, part = tl.program_id(0) % H, tl.program_id(0) // H % parts
    b = (tl.program_id(0) // (H * parts)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    x_at = x_ptr + b * stride_xb + h * stride_xh + columns[None, :]
    for start in range(part * rows_each, tl.minimum((part + 1) * rows_each, S), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        held = (rows < S)[:, None] & (columns < D)[None, :]
        x = tl.load(x_at + rows[:, None].to(tl.int64) * stride_xs, held, other=0.0)
        total += x.to(tl.float32)
    place = sum_ptr + ((b * parts + part) * H + h) * D + columns
    tl.store(place, tl.sum(total, 0) / count, columns < D)


ROWS_EACH = 1024  # of one program of _sum_kernel: enough programs to fill a GPU, few partial sums


def encode(
    x: Tensor, dtype: torch.dtype, mean: Tensor | None, *, per_channel: bool = False
) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] around `mean` in 8 bits, or fp16 per channel; a mean per block is written."""
    B, S, H, D = x.shape
    low = x.new_empty(x.shape, dtype=dtype)
    blocks = triton.cdiv(S, BLOCK)
    scale = x.new_empty((B, blocks, H, D) if per_channel else (B, blocks, H), dtype=torch.float32)
    launch(
        _encode_kernel,
        (blocks * B * H,),
        *(x, low, scale, mean, S, H, *x.stride()[:3]),
        D=D,
        PER_CHANNEL=per_channel,
        SEQUENCE=mean is not None and mean.dim() == 3,
        LIMIT=LIMIT[dtype],
        BLOCK=BLOCK,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=4 if D <= 128 else 8,
    )
    return low, scale


def sequence_mean(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, D] float32, in two passes of sums."""
    B, S, H, D = x.shape
    parts = triton.cdiv(S, ROWS_EACH)
    sums = x.new_empty((B, parts, H, D), dtype=torch.float32)
    mean = x.new_empty((B, 1, H, D), dtype=torch.float32)
    for source, rows, each, count, target in (
        (x, S, ROWS_EACH, 1.0, sums),
        (sums, parts, parts, float(S), mean),
    ):
        launch(
            _sum_kernel,
            (target.shape[1] * B * H,),
            *(source, target, rows, H, target.shape[1], each, count, *source.stride()[:3]),
            D=D,
            BLOCK=32,
            BLOCK_D=triton.next_power_of_2(D),
        )
    return mean[:, 0]
