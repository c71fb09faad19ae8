# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of gemm_w8a8: one program per tile of the result, one K block of 128 at a time.

A program owns [BLOCK_M, BLOCK_N] of out, which lies in one block of b_scale and, with block_rows
128, in one of a_scale.  It keeps two accumulators: the tensor cores' own, inside a K block, and a
float32 one across K blocks, to which each block is added times its scales.  The epilogue runs on
the float32 tile, and so does requantisation: the tile then holds whole blocks of the result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.gemm_w8a8 import api
from reeltime.gemm_w8a8.reference import BLOCK_K, BLOCK_N
from reeltime.jit import lang
from reeltime.jit.launch import Config, arch_of, config, launch, unless
from reeltime.quant.reference import LIMIT

SCALE_BLOCK = tl.constexpr(128)  # rows of a (block_rows 128) or of b under one scale
GELU_STEP = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) log2(e)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def _tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles in strips GROUP_M high: programs that run together share rows of a and of b in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    strip = program // (GROUP_M * tiles_n)
    first = strip * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    place = program - first * tiles_n
    return first + place % height, place // height


@triton.jit
def _block_product(a, b, PRESET: tl.constexpr):
    """a [BLOCK_M, BLOCK_K] times b [BLOCK_N, BLOCK_K] transposed, in float32.

    INT8: a sum of 128 products is below 2^22 in magnitude, so that an int32 accumulator preset to
    the bits of 1.5 * 2^23 ends at the bits of 1.5 * 2^23 + sum: one exact subtraction instead of a
    conversion.  mma.sync reads its first addend from any registers, so the preset is free.  wgmma
    adds in place: 64 moves per thread and block, more than the conversions they would save.
    FP8: one K block is all that the tensor cores' short accumulators ever hold.
    """
    if a.dtype == tl.int8 and PRESET:
        start = tl.full((a.shape[0], b.shape[0]), lang.ROUNDER_BITS, tl.int32)
        bits = tl.dot(a, tl.trans(b), start, out_dtype=tl.int32)
        product = bits.to(tl.float32, bitcast=True) - lang.ROUNDER
    else:
        product = tl.dot(a, tl.trans(b)).to(tl.float32)
    return product


@triton.jit
def _epilogue(
    y,  # [rows, columns]
    rows,
    columns,
    M,
    N,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    frame_rows,
    stride_bias,
    stride_rm,
    stride_rn,
    stride_gf,
    stride_gn,
    GELU: tl.constexpr,
):
    """residual + gate * gelu(y + bias) in float32, each part where there is one."""
    near, n = tl.minimum(rows, M - 1), tl.minimum(columns, N - 1).to(tl.int64)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n * stride_bias).to(tl.float32)[None, :]
    if GELU:
        y = y / (1.0 + tl.exp2((y + y * y * y * GELU_CUBE) * GELU_STEP))
    if gate_ptr is not None:
        frames = (near // frame_rows).to(tl.int64)
        gate = tl.load(gate_ptr + frames[:, None] * stride_gf + n[None, :] * stride_gn)
        y *= gate.to(tl.float32)
    if residual_ptr is not None:
        m = near.to(tl.int64)
        residual = tl.load(residual_ptr + m[:, None] * stride_rm + n[None, :] * stride_rn)
        y += residual.to(tl.float32)
    return y


@triton.jit
def _gemm_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    a_scale_ptr,  # [ceil(M / bm), ceil(K / 128)]
    b_scale_ptr,  # [ceil(N / 128), ceil(K / 128)]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    gate_ptr,  # [F, N] or None
    out_ptr,  # [M, N] contiguous
    out_scale_ptr,  # [ceil(M / bm), ceil(N / 128)] contiguous, or None: not requantised
    M,
    N,
    K,
    frame_rows,  # M / F
    stride_am,
    stride_bn,
    stride_asm,
    stride_ask,
    stride_bsn,
    stride_bsk,
    stride_bias,
    stride_rm,
    stride_rn,
    stride_gf,
    stride_gn,
    PER_ROW: tl.constexpr,  # bm = 1; otherwise bm = 128
    WHOLE_K: tl.constexpr,  # K % BLOCK_K == 0
    GELU: tl.constexpr,
    LIMIT: tl.constexpr,  # of the requantised format
    PRESET: tl.constexpr,  # see _block_product
    LAG: tl.constexpr,  # add a block while the tensor cores multiply the next
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Place of the tile
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the edge the last row and column are repeated: loads need no mask for it, and the
    # largest magnitude of a block stays what it is.
    m, n = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(columns, N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * stride_am + k[None, :]
    b_ptrs = b_ptr + n[:, None] * stride_bn + k[None, :]
    if PER_ROW:
        a_scale_ptrs = a_scale_ptr + m * stride_asm
    else:
        a_scale_ptrs = a_scale_ptr + (tile_m * BLOCK_M // SCALE_BLOCK).to(tl.int64) * stride_asm
    b_scale_ptr += (tile_n * BLOCK_N // SCALE_BLOCK).to(tl.int64) * stride_bsn

    # Sum over K blocks
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last, last_scale = total, tl.zeros((BLOCK_M if PER_ROW else 1, 1), tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            held = (k < K - start)[None, :]
            a = tl.load(a_ptrs, held, other=0.0)
            b = tl.load(b_ptrs, held, other=0.0)
        # Before the product, which hides the latency.
        scale = tl.load(a_scale_ptrs) * tl.load(b_scale_ptr)
        scale = scale[:, None] if PER_ROW else tl.zeros((1, 1), tl.float32) + scale
        product = _block_product(a, b, PRESET)
        if LAG:
            total += last_scale * last
            last, last_scale = product, scale
        else:
            total += scale * product
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
        a_scale_ptrs += stride_ask
        b_scale_ptr += stride_bsk
    if LAG:
        total += last_scale * last

    # Epilogue by halves: the operands of one fit into registers beside the sums
    halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
    left_columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    right_columns = left_columns + BLOCK_N // 2
    left = _epilogue(
        *(left, rows, left_columns, M, N, bias_ptr, residual_ptr, gate_ptr, frame_rows),
        *(stride_bias, stride_rm, stride_rn, stride_gf, stride_gn, GELU),
    )
    right = _epilogue(
        *(right, rows, right_columns, M, N, bias_ptr, residual_ptr, gate_ptr, frame_rows),
        *(stride_bias, stride_rm, stride_rn, stride_gf, stride_gn, GELU),
    )

    # Scales of the requantised result
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if out_scale_ptr is not None:
        tl.static_assert(BLOCK_N == SCALE_BLOCK and (PER_ROW or BLOCK_M == SCALE_BLOCK))
        amax = tl.max(tl.maximum(lang.magnitude(left), lang.magnitude(right)), axis=1)
        blocks = tl.cdiv(N, BLOCK_N)
        if PER_ROW:
            scale = lang.block_scale(amax, LIMIT)
            tl.store(out_scale_ptr + rows.to(tl.int64) * blocks + tile_n, scale, rows < M)
            scale = scale[:, None]
        else:
            scale = lang.block_scale(tl.max(amax, axis=0), LIMIT)
            tl.store(out_scale_ptr + tile_m * blocks + tile_n, scale)
            scale = tl.full((1, 1), 0.0, tl.float32) + scale
        left = lang.encode(left, scale, LIMIT, dtype)
        right = lang.encode(right, scale, LIMIT, dtype)

    # Result
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N
    held = (rows < M)[:, None]
    tl.store(out_ptrs + left_columns[None, :], left.to(dtype), held & (left_columns < N)[None, :])
    tl.store(
        out_ptrs + right_columns[None, :], right.to(dtype), held & (right_columns < N)[None, :]
    )


# Tiles and the share of the tensor rate that each can feed: a smaller one reads more per product.
TILES = (((128, 128), 1.0), ((64, 128), 0.8), ((64, 64), 0.6), ((64, 32), 0.4))


@functools.lru_cache(maxsize=4096)
def tile_config(processors: int, M: int, N: int, block_rows: int, requantized: bool) -> Config:
    """The tile that ends first: whole waves of it, over its share of the tensor rate."""
    best, least = TILES[0][0], float("inf")
    for (rows, columns), share in TILES:
        tiles = triton.cdiv(M, rows) * triton.cdiv(N, columns)
        cost = triton.cdiv(tiles, processors) * rows * columns / share
        fits = not requantized or (columns == BLOCK_N and rows >= block_rows)
        if fits and cost < least:
            best, least = (rows, columns), cost
    return {
        "BLOCK_M": best[0],
        "BLOCK_N": best[1],
        "GROUP_M": 8,
        "num_warps": 8 if best == (128, 128) else 4,
        "num_stages": 4,
    }


def run(
    out: Tensor,
    out_scale: Tensor | None,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    block_rows: int,
    epilogue: str,
) -> None:
    M, N, K = a.shape[0], b.shape[0], a.shape[1]
    name = "gemm_w8a8" if out_scale is None else f"gemm_w8a8_requantized_{block_rows}"
    target = arch_of(a.device)
    default = tile_config(target.processors, M, N, block_rows, out_scale is not None)
    chosen = config(name, a.device, default, M=M, N=N, K=K)
    tiles = triton.cdiv(M, chosen["BLOCK_M"]) * triton.cdiv(N, chosen["BLOCK_N"])
    launch(
        _gemm_kernel,
        (tiles,),
        *(a, b, a_scale, b_scale, bias, residual, gate, out, out_scale, M, N, K),
        M if gate is None else M // gate.shape[0],
        *(a.stride(0), b.stride(0), *a_scale.stride(), *b_scale.stride()),
        0 if bias is None else bias.stride(0),
        *((0, 0) if residual is None else residual.stride()),
        *((0, 0) if gate is None else gate.stride()),
        PER_ROW=block_rows == 1,
        WHOLE_K=K % BLOCK_K == 0,
        GELU=epilogue == "gelu",
        LIMIT=0.0 if out_scale is None else LIMIT[out.dtype],
        PRESET=target.tensor_core["int8"] == "IMMA",
        # wgmma runs beside its warps.  FP8 gains nothing: its sums would be copied to wait.
        LAG=target.tensor_core["int8"] == "IGMMA"
        and a.dtype == torch.int8
        and chosen["BLOCK_N"] == BLOCK_N,
        BLOCK_K=BLOCK_K,
        **chosen,
    )


@api.GEMM.kernel("triton", unless=unless(0, 9))
def gemm(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=rest[-1])
    run(out, None, a, b, *rest[:-1])
    return out


@api.GEMM_REQUANTIZED.kernel("triton", unless=unless(0, 9))
def gemm_requantized(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=rest[-1])
    scale_shape = api.scale_shape(out.shape[0], out.shape[1], rest[-3])
    out_scale = a.new_empty(scale_shape, dtype=torch.float32)
    run(out, out_scale, a, b, *rest[:-1])
    return out, out_scale
