# SPDX-License-Identifier: Apache-2.0
"""norm: LayerNorm or RMSNorm with per-frame modulation, fused with the gated residual before it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reeltime import checks
from reeltime.backends import Op
from reeltime.checks import Tolerance
from reeltime.norm import reference
from reeltime.quant.api import BLOCK_ROWS, FORMATS, scale_shape

KINDS = ("layer", "rms")

# By format of x (or of the quantised y) against float64: a few roundings of the output; statistics
# are float32 whatever the input.  The peak of the 8-bit formats is a step of the largest block.
TOLERANCE = {
    "float64": Tolerance(1e-13, 1e-11),
    "float32": Tolerance(1e-6, 2e-5),
    "bfloat16": Tolerance(4e-3, 4e-2),
    "float16": Tolerance(5e-4, 5e-3),
    "int8": Tolerance(0.02, 0.1),
    "fp8": Tolerance(0.04, 0.7),
}


def flops(B: int, L: int, C: int, *, gated: bool = False) -> int:
    """Two for each statistic, two to normalise, two to modulate; two more for the residual."""
    return B * L * C * (10 if gated else 8)


def bytes(
    B: int,
    L: int,
    C: int,
    *,
    frames: int = 1,
    itemsize: int = 2,
    gated: bool = False,
    quantize: str | None = None,
    block_rows: int = 1,
) -> int:
    """x in, y out; gated: h in and x_new out as well.  Modulation is read once per frame."""
    tokens = B * L * C
    moved = tokens * itemsize * (3 if gated else 1) + B * frames * C * itemsize * (2 + gated)
    if quantize is None:
        return moved + tokens * itemsize
    rows, columns = scale_shape(B * L, C, block_rows)
    return moved + tokens + 4 * rows * columns


OPTIONS = (
    "str kind, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, str backend"
)


def _fake_quantized(x: Tensor, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    scale = scale_shape(x.shape[0] * x.shape[1], x.shape[2], rows)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(scale, dtype=torch.float32)


NORM = Op(
    "norm",
    f"norm(Tensor x, {OPTIONS}) -> Tensor",
    reference.norm,
    lambda x, *_: x.new_empty(x.shape),
)
NORM_QUANTIZED = Op(
    "norm",
    f"norm_quantized(Tensor x, ScalarType dtype, int block_rows, {OPTIONS}) -> (Tensor, Tensor)",
    reference.norm_quantized,
    lambda x, dtype, rows, *_: _fake_quantized(x, dtype, rows),
    differentiable=False,
)
GATED = Op(
    "norm",
    f"gated_residual_norm(Tensor x, Tensor h, Tensor? gate, {OPTIONS}) -> (Tensor, Tensor)",
    reference.gated_residual_norm,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
GATED_QUANTIZED = Op(
    "norm",
    "gated_residual_norm_quantized(Tensor x, Tensor h, Tensor? gate, ScalarType dtype, "
    f"int block_rows, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference.gated_residual_norm_quantized,
    lambda x, h, gate, dtype, rows, *_: (x.new_empty(x.shape), *_fake_quantized(x, dtype, rows)),
    differentiable=False,
)


def _check_per_frame(name: str, value: Tensor, x: Tensor) -> None:
    """[B, F, C] with L % F == 0."""
    have, (batch, length, channels) = value.shape, x.shape
    if len(have) != 3 or have != (batch, have[1], channels) or not have[1] or length % have[1]:
        checks.tensor(name, value, 3, "[B, F, C]")
        checks.shape(name, value, (batch, have[1], channels), "[B, F, C]")
        checks.divides(f"{name} (its frames F)", have[1], length, "L of x")
    if value.device != x.device:
        checks.device(name, value, x, "x")


def _check_vector(name: str, value: Tensor, x: Tensor) -> None:
    checks.shape(name, value, x.shape[2:], "[C]")
    checks.device(name, value, x, "x")


def _check(
    x: Tensor,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    quantize: str | None,
    block_rows: int,
) -> None:
    checks.activation("x", x, 3, "[B, L, C]")
    device, vector = x.device, (x.shape[2],)
    if kind not in KINDS:
        checks.choice("kind", kind, KINDS)
    if not 0 < eps < math.inf:
        checks.positive("eps", eps)
    if weight is not None and (weight.shape != vector or weight.device != device):
        _check_vector("weight", weight, x)
    if bias is not None and (bias.shape != vector or bias.device != device):
        _check_vector("bias", bias, x)
    if scale is not None:
        _check_per_frame("scale", scale, x)
    if shift is not None and (scale is None or shift.shape != scale.shape):
        _check_per_frame("shift", shift, x)
    elif shift is not None and shift.device != device:
        checks.device("shift", shift, x, "x")
    if quantize is not None and (quantize not in FORMATS or block_rows not in BLOCK_ROWS):
        checks.choice("quantize", quantize, tuple(FORMATS))
        checks.choice("block_rows", block_rows, BLOCK_ROWS)


def _results(results: Any, out: Any) -> Any:
    """The results themselves, or copied into `out` (one tensor, or as many as there are)."""
    if out is None:
        return results
    if isinstance(results, Tensor):
        checks.output("out", out, results.shape, results.dtype)
        return out.copy_(results)
    if len(out) != len(results):
        checks.fail("out", f"{len(results)} tensors", len(out), "Pass one per result.")
    for index, (target, result) in enumerate(zip(out, results, strict=True)):
        checks.output(f"out[{index}]", target, result.shape, result.dtype)
    return tuple(target.copy_(result) for target, result in zip(out, results, strict=True))


def norm(
    x: Tensor,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    quantize: str | None = None,
    block_rows: int = 1,
    backend: str = "auto",
    out: Any = None,
) -> Any:
    """LayerNorm or RMSNorm with per-frame modulation, optionally quantised.

    y = norm(x) * (1 + scale[frame]) + shift[frame]
    norm(x) = (x - mean) / sqrt(var + eps) * weight + bias       kind "layer"
    norm(x) = x / sqrt(mean(x^2) + eps) * weight + bias          kind "rms"

    Args:
        x: [B, L, C] floating point, C contiguous.
        weight, bias: optional [C].
        scale, shift: optional [B, F, C], L % F == 0: token l is of frame l // (L / F).
        quantize: None, "int8" or "fp8": return y per block in 8 bits instead, as quant.quantize
            of y [B * L, C] with block_rows (1 or 128).
        out: optional y, or (yq, y_scale), written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        y [B, L, C] of x's dtype; quantised: yq [B, L, C], y_scale [ceil(B L / bm), ceil(C / 128)].
        NaN or Inf in a token makes that token NaN (RMSNorm of Inf: NaN where Inf, 0 elsewhere).
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64), rounded once at the end.  Graph-safe: yes.
    Source: Peebles and Xie, Scalable Diffusion Models with Transformers (adaLN).
    """
    _check(x, kind, weight, bias, scale, shift, eps, quantize, block_rows)
    if quantize is None:
        y = NORM.run(backend, x.device, x, kind, weight, bias, scale, shift, eps)
    else:
        options = (FORMATS[quantize], block_rows, kind, weight, bias, scale, shift, eps)
        y = NORM_QUANTIZED.run(backend, x.device, x, *options)
    return y if out is None else _results(y, out)


def gated_residual_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None = None,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    quantize: str | None = None,
    block_rows: int = 1,
    backend: str = "auto",
    out: Any = None,
) -> Any:
    """The residual of one layer and the norm of the next in one pass.

    x_new = x + gate[frame] * h
    y = norm(x_new) * (1 + scale[frame]) + shift[frame], of x_new as stored (rounded to its dtype)

    Args:
        x, h: [B, L, C] floating point, C contiguous.
        gate: optional [B, F, C]; None is 1.
        out: optional (x_new, y), or (x_new, yq, y_scale), written in place; x_new may be x.
        The rest as in norm.
    Returns:
        x_new [B, L, C], y [B, L, C]; quantised: x_new, yq, y_scale.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 for float64), rounded once per result.  Graph-safe: yes.
    Source: Wan (arXiv 2503.20314), block order; Vidu S1, section 2.3.2 (fusion).
    """
    _check(x, kind, weight, bias, scale, shift, eps, quantize, block_rows)
    if h.shape != x.shape or h.device != x.device:
        checks.shape("h", h, x.shape, "the shape of x [B, L, C]")
        checks.device("h", h, x, "x")
    # A gate like the scale is as good as the scale.
    if gate is not None and (
        scale is None or gate.shape != scale.shape or gate.device != scale.device
    ):
        _check_per_frame("gate", gate, x)
    options = (kind, weight, bias, scale, shift, eps)
    if quantize is None:
        results = GATED.run(backend, x.device, x, h, gate, *options)
    else:
        results = GATED_QUANTIZED.run(
            backend, x.device, x, h, gate, FORMATS[quantize], block_rows, *options
        )
    return results if out is None else _results(results, out)
