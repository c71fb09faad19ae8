# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of gemm_w8a8: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.norm.reference import wide
from reeltime.quant import reference as quant
from reeltime.quant.reference import BLOCK_K

BLOCK_N = 128


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_rows: int) -> Tensor:
    """sum over K blocks of scales times a block product; float64 scales make it the oracle.

    In INT8 a block product is exact in float32: 128 * 128 * 128 = 2^21 < 2^24.
    """
    M, N, K = a.shape[0], b.shape[0], a.shape[1]
    dtype = a_scale.dtype
    rows = a_scale.repeat_interleave(block_rows, 0)[:M]  # [M, Kb]
    columns = b_scale.repeat_interleave(BLOCK_N, 0)[:N]  # [N, Kb]
    total = torch.zeros(M, N, dtype=dtype, device=a.device)
    for block, start in enumerate(range(0, K, BLOCK_K)):
        k = slice(start, start + BLOCK_K)
        partial = a[:, k].to(dtype) @ b[:, k].to(dtype).t()
        scale = rows[:, block, None] * columns[None, :, block]
        total = torch.addcmul(total, scale, partial)
    return total


def epilogue(
    y: Tensor, bias: Tensor | None, kind: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    if kind == "gelu":
        return F.gelu(y, approximate="tanh")
    if kind == "gated_residual" and residual is not None:
        if gate is not None:
            frames = gate.shape[0]
            framed = y.unflatten(0, (frames, y.shape[0] // frames))  # [F, M / F, N]
            y = (framed * gate.to(y.dtype).unsqueeze(1)).flatten(0, 1)
        return residual.to(y.dtype) + y
    return y


def wide_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    block_rows: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    if dtype == torch.float64:
        a_scale, b_scale = a_scale.double(), b_scale.double()
    return epilogue(product(a, b, a_scale, b_scale, block_rows), bias, kind, residual, gate)


def gemm(*arguments: object) -> Tensor:
    """The last argument is the dtype of the result."""
    return wide_gemm(*arguments).to(arguments[-1])  # type: ignore[arg-type]


def gemm_requantized(*arguments: object) -> tuple[Tensor, Tensor]:
    """The last argument is the 8-bit dtype; blocks of the result are those of a."""
    block_rows, dtype = arguments[7], arguments[9]
    y = wide(wide_gemm(*arguments))  # type: ignore[arg-type]
    return quant.quantize(y, dtype, block_rows)  # type: ignore[arg-type]
