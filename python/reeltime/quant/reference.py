# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of quant: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest magnitude that a format stores: scale = amax / LIMIT.
LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float16: 1.0}
BLOCK_K = 128


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """amax / limit in float32: 1 for a block of zeros, NaN for one that holds NaN or Inf."""
    scale = amax.float() / LIMIT[dtype]
    scale = torch.where(scale > 0, scale, torch.where(scale == 0, 1.0, torch.nan))
    return torch.where(scale.isinf(), torch.nan, scale)


def store(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale rounded to nearest even into `dtype`; where the scale is NaN, zero."""
    y = (x / scale).nan_to_num(0.0)
    limit = LIMIT[dtype]
    y = y.clamp(-limit, limit)
    return (y.round() if dtype == torch.int8 else y.float()).to(dtype)


def spread(scale: Tensor, rows: int, columns: int, block_rows: int) -> Tensor:
    """One scale per block [Mb, Kb] -> one per element [rows, columns]."""
    full = scale.repeat_interleave(block_rows, 0)[:rows] if block_rows > 1 else scale
    return full.repeat_interleave(BLOCK_K, 1)[:, :columns]


def quantize(x: Tensor, dtype: torch.dtype, block_rows: int) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    pad = F.pad(wide, (0, -columns % BLOCK_K, 0, -rows % block_rows))
    blocks = pad.unflatten(1, (pad.shape[1] // BLOCK_K, BLOCK_K))
    blocks = blocks.unflatten(0, (pad.shape[0] // block_rows, block_rows))  # [Mb, bm, Kb, 128]
    scale = scale_of(blocks.abs().amax((1, 3)), dtype)
    return store(wide, spread(scale, rows, columns, block_rows), dtype), scale


def dequantize(xq: Tensor, x_scale: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = spread(x_scale, xq.shape[0], xq.shape[1], block_rows)
    return (xq.to(wide) * full.to(wide)).to(dtype)
