# SPDX-License-Identifier: Apache-2.0
"""LayerNorm modulated per frame, RMSNorm with a weight, after a gated residual or not, in 8 bits or
not: the whole of it is compiled; what has a kernel elsewhere is RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reeltime.bench.case import Inputs
from reeltime.bench.peers.adapter import Adapter, compiled
from reeltime.bench.peers.quant import rounded
from reeltime.quant.api import FORMATS

EPS = 1e-6


def per_frame(x: Tensor, frames: int) -> Tensor:
    return x.unflatten(1, (frames, -1))


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = per_frame(F.layer_norm(x, x.shape[-1:], eps=EPS), scale.shape[1])
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def eager(kind: str, gated: bool, inputs: Inputs) -> Any:
    """In bf16 throughout, a kernel for each step."""
    x = inputs["x"]
    if gated:
        h = per_frame(inputs["h"], inputs["gate"].shape[1])
        x = x + (h * inputs["gate"].unsqueeze(2)).flatten(1, 2)
    if kind == "rms":
        y = F.rms_norm(x, x.shape[-1:], inputs["weight"], EPS)
    else:
        y = modulated(x, inputs["scale"], inputs["shift"])
    return (x, y) if gated else y


def whole(kind: str, gated: bool, quantize: str | None, block_rows: int, inputs: Inputs) -> Any:
    """In float32 between load and store, for the compiler to fuse; in 8 bits too."""
    low = inputs["x"].dtype
    wide = {name: x.float() for name, x in inputs.items()}
    x = wide["x"]
    if gated:
        h = per_frame(wide["h"], wide["gate"].shape[1])
        x = (x + (h * wide["gate"].unsqueeze(2)).flatten(1, 2)).to(low)
    stored, y = (x,) if gated else (), x.float()
    if kind == "rms":
        y = F.rms_norm(y, y.shape[-1:], wide["weight"], EPS)
    else:
        y = modulated(y, wide["scale"], wide["shift"])
    if quantize is None:
        return (*stored, y.to(low)) if gated else y.to(low)
    yq, y_scale = rounded(y.flatten(0, 1), FORMATS[quantize], block_rows)
    return (*stored, yq.view(y.shape), y_scale)


# --- RMSNorm of others --------------------------------------------------------------------------


def liger(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def fla(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    from fla.modules.norm.layernorm import rms_norm

    return rms_norm(x, weight, None, eps=EPS)


def flashinfer(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    from flashinfer.norm import rmsnorm

    return rmsnorm(x[0], weight, EPS)[None]


def quack(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    from quack import rmsnorm

    return rmsnorm(x, weight, eps=EPS)


def fastvideo(x: Tensor, weight: Tensor, **_: Tensor) -> Tensor:
    from fastvideo_kernel.turbodiffusion_ops import rmsnorm

    return rmsnorm(x, weight, EPS)[0]


# --- All of them --------------------------------------------------------------------------------


def adapters(kind: str, gated: bool, quantize: str | None, block_rows: int) -> Iterator[Adapter]:
    name = {"layer": "layer_norm", "rms": "rms_norm"}[kind]

    def steps(**inputs: Tensor) -> Any:
        return eager(kind, gated, inputs)

    @compiled
    def fused(**inputs: Tensor) -> Any:
        return whole(kind, gated, quantize, block_rows, inputs)

    yield Adapter("torch", f"torch F.{name} and the rest, compiled", fused)
    if quantize is not None:
        return
    yield Adapter("torch", f"torch F.{name}, eager", steps, gpu=False)
    if kind == "rms" and not gated:
        yield Adapter("liger-kernel", "RMSNorm", liger)
        yield Adapter("fla-core", "rms_norm", fla)
        yield Adapter("flashinfer-python", "rmsnorm", flashinfer)
        yield Adapter("quack-kernels", "rmsnorm", quack)
        yield Adapter("fastvideo-kernel", "rmsnorm", fastvideo)
