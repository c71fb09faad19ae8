# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of quant: csrc/quant."""

from __future__ import annotations

import torch
from torch import Tensor

from reeltime.native import code, launch, strides, unless
from reeltime.quant import api


@api.QUANTIZE.kernel("cuda", unless=unless(0))
def quantize(x: Tensor, dtype: torch.dtype, block_rows: int) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    xq = x.new_empty((M, K), dtype=dtype)
    x_scale = x.new_empty(api.scale_shape(M, K, block_rows), dtype=torch.float32)
    launch(
        "quantize",
        x.device,
        x=x,
        xq=xq,
        x_scale=x_scale,
        M=M,
        K=K,
        **strides("x", x, "m"),
        block_rows=block_rows,
        x_dtype=code(x.dtype),
        dtype=code(dtype),
    )
    return xq, x_scale


@api.DEQUANTIZE.kernel("cuda", unless=unless(3))
def dequantize(xq: Tensor, x_scale: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    M, K = xq.shape
    x = xq.new_empty((M, K), dtype=dtype)
    launch(
        "dequantize",
        xq.device,
        xq=xq,
        x_scale=x_scale,
        x=x,
        M=M,
        K=K,
        **strides("q", xq, "mk"),
        **strides("s", x_scale, "mk"),
        block_rows=block_rows,
        dtype=code(xq.dtype),
        x_dtype=code(dtype),
    )
    return x
