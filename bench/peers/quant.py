# SPDX-License-Identifier: Apache-2.0
"""Rounding to 8 bits in blocks, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.bench.peers.adapter import Adapter, compiled

LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rounded(x: Tensor, dtype: torch.dtype, block_rows: int) -> tuple[Tensor, Tensor]:
    """[M, K] -> [M, K] of dtype, and a scale of each block_rows x 128."""
    M, K = x.shape
    padded = F.pad(x.float(), (0, -K % 128, 0, -M % block_rows))
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, block_rows))  # [m, rows, k, 128]
    scale = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-30) / LIMIT[dtype]
    low = tiles / scale
    low = (low.round() if dtype == torch.int8 else low).to(dtype)
    return low.flatten(2).flatten(0, 1)[:M, :K], scale[:, 0, :, 0]


def dequantized(xq: Tensor, x_scale: Tensor) -> Tensor:
    scale = x_scale.repeat_interleave(128, 1)[:, : xq.shape[1]]
    return (xq.float() * scale).bfloat16()


def fbgemm_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_group

    return quantize_fp8_group(x, 128)


def fbgemm_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_block

    return quantize_fp8_block(x, 128, 128)


def torchao_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    from torchao.kernel.blockwise_quantization import fp8_blockwise_act_quant

    return fp8_blockwise_act_quant(x)


def fastvideo(x: Tensor) -> tuple[Tensor, Tensor]:
    from fastvideo_kernel import int8_quant

    return int8_quant(x)


def quantize(dtype: torch.dtype, block_rows: int) -> Iterator[Adapter]:
    @compiled
    def torch_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        return rounded(x, dtype, block_rows)

    yield Adapter("torch", "torch amax and cast, compiled", torch_rounded)
    if dtype == torch.int8 and block_rows == 128:
        yield Adapter("fastvideo-kernel", "int8_quant", fastvideo)
    if dtype == torch.float8_e4m3fn:
        call = fbgemm_blocks if block_rows == 128 else fbgemm_rows
        yield Adapter("fbgemm-gpu-genai", "Triton", call)
        if block_rows == 1:
            yield Adapter("torchao", "Triton", torchao_rows)


def dequantize() -> Iterator[Adapter]:
    yield Adapter("torch", "torch product, compiled", compiled(dequantized))
