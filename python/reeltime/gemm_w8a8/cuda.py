# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of gemm_w8a8: csrc/gemm_w8a8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reeltime import native
from reeltime.gemm_w8a8 import api
from reeltime.native import code, code_of, launch, strides, unless

PRODUCTS = ("QMMA", "QGMMA")  # of e4m3, that these kernels have


def refuses(a: Tensor, b: Tensor, *rest: Any) -> str | None:
    """What of a and b no kernel takes; the emulator has products of every type."""
    if a.dtype == torch.float8_e4m3fn and a.device.type != "cpu":
        arch = native.arch_of(a.device)
        if arch.capability < (8, 9):
            return "float8_e4m3fn needs sm89 or newer; here backend='reference' has it"
        if arch.tensor_core["fp8"] not in PRODUCTS:
            return f"float8_e4m3fn on {arch.name} needs tcgen05, which backend='triton' uses"
    if a.shape[1] and (a.storage_offset() | b.storage_offset() | a.stride(0) | b.stride(0)) % 16:
        return "its kernels copy 16 bytes at a time: rows of a and b must start at multiples of 16"
    return None


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
    launch(
        "gemm_w8a8",
        a.device,
        a=a,
        b=b,
        a_scale=a_scale,
        b_scale=b_scale,
        bias=bias,
        residual=residual,
        gate=gate,
        out=out,
        out_scale=out_scale,
        M=M,
        N=N,
        K=K,
        block_rows=block_rows,
        frame_rows=M if gate is None else M // gate.shape[0],
        stride_a=a.stride(0),
        stride_b=b.stride(0),
        **strides("a", a_scale, "mk"),
        **strides("b", b_scale, "nk"),
        stride_bias=0 if bias is None else bias.stride(0),
        **strides("r", residual, "mn"),
        **strides("g", gate, "fn"),
        dtype=code(a.dtype),
        bias_dtype=code_of(bias),
        residual_dtype=code_of(residual),
        gate_dtype=code_of(gate),
        out_dtype=code(out.dtype),
        epilogue=api.EPILOGUES.index(epilogue),
        processors=native.processors(a.device),
    )


@api.GEMM.kernel("cuda", unless=unless(9, check=refuses))
def gemm(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=rest[-1])
    run(out, None, a, b, *rest[:-1])
    return out


@api.GEMM_REQUANTIZED.kernel("cuda", unless=unless(check=refuses))
def gemm_requantized(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=rest[-1])
    scale_shape = api.scale_shape(out.shape[0], out.shape[1], rest[-3])
    out_scale = a.new_empty(scale_shape, dtype=torch.float32)
    run(out, out_scale, a, b, *rest[:-1])
    return out, out_scale
