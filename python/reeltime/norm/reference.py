# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of norm: the oracle, differentiable, on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.quant import reference as quant


def wide(x: Tensor) -> Tensor:
    """The dtype of statistics: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def per_frame(x: Tensor, frames: int) -> Tensor:
    """[B, L, C] -> [B, F, L / F, C]: the tokens of a frame are contiguous."""
    return x.unflatten(1, (frames, x.shape[1] // frames))


def normalise(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm or RMSNorm of a wide x, affine if weight or bias are given."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def modulate(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """y * (1 + scale[frame]) + shift[frame] of a wide y."""
    if scale is not None:
        gain = (1 + scale.to(y.dtype)).unsqueeze(2)  # [B, F, 1, C]
        if shift is not None and shift.shape == scale.shape:
            framed = per_frame(y, scale.shape[1])
            return torch.addcmul(shift.to(y.dtype).unsqueeze(2), framed, gain).flatten(1, 2)
        y = (per_frame(y, scale.shape[1]) * gain).flatten(1, 2)
    if shift is not None:
        y = (per_frame(y, shift.shape[1]) + shift.to(y.dtype).unsqueeze(2)).flatten(1, 2)
    return y


def wide_norm(
    x: Tensor,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    return modulate(normalise(wide(x), kind, weight, bias, eps), scale, shift)


def norm(x: Tensor, *options: object) -> Tensor:
    y = wide_norm(x, *options).to(x.dtype)  # type: ignore[arg-type]
    return y.contiguous()


def norm_quantized(
    x: Tensor, dtype: torch.dtype, block_rows: int, *options: object
) -> tuple[Tensor, Tensor]:
    y = wide_norm(x, *options)  # type: ignore[arg-type]
    yq, y_scale = quant.quantize(y.flatten(0, 1), dtype, block_rows)
    return yq.view(x.shape), y_scale


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate[frame] * h, summed wide and rounded once."""
    wide_x = wide(x)
    if gate is None:
        return (wide_x + h.to(wide_x.dtype)).to(x.dtype).contiguous()
    frames = gate.shape[1]
    terms = per_frame(wide_x, frames), per_frame(h.to(wide_x.dtype), frames)
    total = torch.addcmul(*terms, gate.to(wide_x.dtype).unsqueeze(2))
    return total.flatten(1, 2).to(x.dtype)


def gated_residual_norm(
    x: Tensor, h: Tensor, gate: Tensor | None, *options: object
) -> tuple[Tensor, Tensor]:
    x_new = gated_residual(x, h, gate)
    return x_new, norm(x_new, *options)


def gated_residual_norm_quantized(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    dtype: torch.dtype,
    block_rows: int,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    x_new = gated_residual(x, h, gate)
    return x_new, *norm_quantized(x_new, dtype, block_rows, *options)
