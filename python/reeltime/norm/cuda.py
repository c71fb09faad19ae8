# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of norm: csrc/norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reeltime import native
from reeltime.native import code, code_of, launch, strides, unless
from reeltime.norm import api

FLOATS = native.DTYPES[:3]
KINDS = {"layer": 0, "rms": 1}
MOST_TOKENS = 1 << 30


def refuses(x: Tensor, *rest: Any) -> str | None:
    """The modulation may have another dtype than x, but not every one."""
    if x.shape[0] * x.shape[1] > MOST_TOKENS:
        return f"its kernels count up to {MOST_TOKENS} tokens"
    for value in rest:
        if isinstance(value, Tensor) and value.dtype not in FLOATS:
            return f"its kernels read float32, bfloat16 and float16, not {value.dtype}"
    return None


def refuses_gated(x: Tensor, h: Tensor, *rest: Any) -> str | None:
    if h.dtype != x.dtype:
        return f"h must have the dtype of x, {x.dtype}, not {h.dtype}"
    return refuses(x, *rest)


def tokens(value: Tensor | None, L: int) -> int:
    """Of a frame."""
    return L if value is None else L // value.shape[1]


def run(
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
    x_new = None if h is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape, dtype=dtype or x.dtype)
    y_scale = None
    if dtype is not None:
        y_scale = x.new_empty(api.scale_shape(B * L, C, block_rows), dtype=torch.float32)
    if not x.numel():
        return x_new, y, y_scale
    frames = tokens(gate, L), tokens(scale, L), tokens(shift, L)
    launch(
        "normalise",
        x.device,
        x=x,
        h=h,
        gate=gate,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        x_new=x_new,
        y=y,
        y_scale=y_scale,
        # Only some shapes use it; which, the launcher knows, and asking costs more than allocating.
        statistics=x.new_empty((B * L, 2), dtype=torch.float32),
        B=B,
        L=L,
        C=C,
        block_rows=block_rows,
        gate_rows=frames[0],
        scale_rows=frames[1],
        shift_rows=frames[2],
        segment_rows=math.gcd(*frames),
        **strides("x", x, "bl"),
        **strides("h", h, "bl"),
        **strides("w", weight, "c"),
        **strides("b", bias, "c"),
        **strides("g", gate, "bfc"),
        **strides("c", scale, "bfc"),
        **strides("s", shift, "bfc"),
        eps=eps,
        kind=KINDS[kind],
        x_dtype=code(x.dtype),
        gate_dtype=code_of(gate),
        weight_dtype=code_of(weight),
        bias_dtype=code_of(bias),
        scale_dtype=code_of(scale),
        shift_dtype=code_of(shift),
        y_dtype=code(y.dtype),
        processors=native.processors(x.device),
        shared_limit=native.arch_of(x.device).shared_limit,
    )
    return x_new, y, y_scale


@api.NORM.kernel("cuda", unless=unless(0, check=refuses))
def norm(x: Tensor, *options: Any) -> Tensor:
    return run(x, None, None, None, 1, *options)[1]


@api.NORM_QUANTIZED.kernel("cuda", unless=unless(0, check=refuses))
def norm_quantized(
    x: Tensor, dtype: torch.dtype, block_rows: int, *options: Any
) -> tuple[Tensor, Tensor]:
    return run(x, None, None, dtype, block_rows, *options)[1:]


@api.GATED.kernel("cuda", unless=unless(0, check=refuses_gated))
def gated_residual_norm(
    x: Tensor, h: Tensor, gate: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return run(x, h, gate, None, 1, *options)[:2]


@api.GATED_QUANTIZED.kernel("cuda", unless=unless(0, check=refuses_gated))
def gated_residual_norm_quantized(
    x: Tensor, h: Tensor, gate: Tensor | None, dtype: torch.dtype, block_rows: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return run(x, h, gate, dtype, block_rows, *options)
