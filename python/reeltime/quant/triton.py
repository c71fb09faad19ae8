# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of quant: one program per tile of rows x 128 columns, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit import lang
from reeltime.jit.launch import launch, unless
from reeltime.quant import api
from reeltime.quant.reference import BLOCK_K, LIMIT


@triton.jit
def _quantize_kernel(
    x_ptr,  # [M, K]
    xq_ptr,  # [M, K] contiguous
    scale_ptr,  # [ceil(M / bm), ceil(K / 128)] contiguous
    M,
    K,
    stride_xm,
    PER_ROW: tl.constexpr,  # bm = 1; otherwise bm = BLOCK_M, one scale per tile
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column, tile = tl.program_id(0), tl.program_id(1)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_K + tl.arange(0, BLOCK_K)
    held = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], held, other=0.0)
    x = x.to(tl.float32)
    amax = tl.max(lang.magnitude(x), axis=1)
    if PER_ROW:
        scale = lang.block_scale(amax, LIMIT)
        tl.store(scale_ptr + rows * tl.num_programs(0) + column, scale, rows < M)
        scale = scale[:, None]
    else:
        scale = lang.block_scale(tl.max(amax, axis=0), LIMIT)
        tl.store(scale_ptr + tile * tl.num_programs(0) + column, scale)
        scale = tl.full((1, 1), 0.0, tl.float32) + scale
    xq = lang.encode(x, scale, LIMIT, xq_ptr.dtype.element_ty)
    tl.store(xq_ptr + rows[:, None] * K + columns[None, :], xq, held)


@triton.jit
def _dequantize_kernel(
    xq_ptr,  # [M, K]
    scale_ptr,  # [ceil(M / bm), ceil(K / 128)]
    x_ptr,  # [M, K] contiguous
    M,
    K,
    stride_qm,
    stride_qk,
    stride_sm,
    stride_sk,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column, tile = tl.program_id(0), tl.program_id(1)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_K + tl.arange(0, BLOCK_K)
    held = (rows < M)[:, None] & (columns < K)[None, :]
    place = rows[:, None] * stride_qm + columns[None, :] * stride_qk
    xq = tl.load(xq_ptr + place, held, other=0.0)
    row_scale = rows // BLOCK_ROWS * stride_sm + column * stride_sk
    scale = tl.load(scale_ptr + row_scale, rows < M, other=0.0)
    x = xq.to(tl.float32) * scale[:, None]
    tl.store(x_ptr + rows[:, None] * K + columns[None, :], x.to(x_ptr.dtype.element_ty), held)


TILE_ROWS = 32  # 32 x 128 two-byte elements: 8 KiB in flight per program


@api.QUANTIZE.kernel("triton", unless=unless(0, 1))
def quantize(x: Tensor, dtype: torch.dtype, block_rows: int) -> tuple[Tensor, Tensor]:
    (M, K), tile = x.shape, max(block_rows, TILE_ROWS)
    xq = x.new_empty((M, K), dtype=dtype)
    x_scale = x.new_empty(api.scale_shape(M, K, block_rows), dtype=torch.float32)
    launch(
        _quantize_kernel,
        (triton.cdiv(K, BLOCK_K), triton.cdiv(M, tile)),
        *(x, xq, x_scale, M, K, x.stride(0)),
        PER_ROW=block_rows == 1,
        LIMIT=LIMIT[dtype],
        BLOCK_M=tile,
        BLOCK_K=BLOCK_K,
        num_warps=4 if block_rows == 1 else 8,
    )
    return xq, x_scale


@api.DEQUANTIZE.kernel("triton", unless=unless(0, 3))
def dequantize(xq: Tensor, x_scale: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    M, K = xq.shape
    x = xq.new_empty((M, K), dtype=dtype)
    launch(
        _dequantize_kernel,
        (triton.cdiv(K, BLOCK_K), triton.cdiv(M, TILE_ROWS)),
        *(xq, x_scale, x, M, K, *xq.stride(), *x_scale.stride()),
        BLOCK_ROWS=block_rows,
        BLOCK_M=TILE_ROWS,
        BLOCK_K=BLOCK_K,
    )
    return x
