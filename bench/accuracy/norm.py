# SPDX-License-Identifier: Apache-2.0
"""norm: statistics, modulation, gated residual, 8-bit output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime import norm
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import Case, tolerance, unblocked
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact
from reeltime.bench.accuracy.quant import BLOCKS
from reeltime.quant.api import FORMATS

KINDS = ("normal", "outlier", "constant", "zero_block", "single_token", "ragged", "long", "strided")
EPS = 1e-6
Tensors = dict[str, Tensor]


def by_frame(value: Tensor, tokens: int) -> Tensor:
    """[B, F, C] -> [B, L, C]: token l is of frame l // (L / F)."""
    return value[:, torch.arange(tokens) // (tokens // value.shape[1])]


def equation(x: Tensor, kind: str, options: Tensors) -> Tensor:
    """norm(x) * weight + bias, then * (1 + scale[frame]) + shift[frame], in float64."""
    shape = x.shape[-1:]
    y = F.layer_norm(x, shape, eps=EPS) if kind == "layer" else F.rms_norm(x, shape, eps=EPS)
    y = y * options.get("weight", 1.0) + options.get("bias", 0.0)
    if "scale" in options:
        y = y * (1 + by_frame(options["scale"], x.shape[1]))
    return y + by_frame(options["shift"], x.shape[1]) if "shift" in options else y


def cases(inputs: Inputs) -> Iterator[Case]:
    batch, channels = (2, 200) if inputs.kind == "ragged" else (1, 256)
    tokens = inputs.lengths[1]
    frames = next(f for f in (4, 7, 1) if tokens % f == 0)
    masters = {name: inputs.draw(name, batch, tokens, channels) for name in "xh"}
    if inputs.kind == "constant":  # no variance at all
        masters["x"].fill_(1.625)
    masters |= {name: inputs.normal(name, channels) for name in ("weight", "bias")}
    for name in ("scale", "shift", "gate"):
        masters[name] = inputs.normal(name, batch, frames, channels)
    for dtype in DTYPES:
        given = {name: inputs.put(x, dtype) for name, x in masters.items()}
        modulation = {name: given[name] for name in ("scale", "shift")}
        affine = {name: given[name] for name in ("weight", "bias")}
        yield from plain(inputs, dtype, "layer", given, modulation)
        yield from gated(inputs, dtype, "layer", given, modulation)
        if dtype in ("float32", "bfloat16"):
            yield from plain(inputs, dtype, "layer", given, affine)
            yield from plain(inputs, dtype, "rms", given, modulation | affine)
            yield from gated(inputs, dtype, "rms", given, affine)
    given = {name: inputs.put(x) for name, x in masters.items()}
    modulation = {name: given[name] for name in ("scale", "shift")}
    for format in FORMATS:
        for rows in BLOCKS:
            yield from eight_bits(inputs, format, rows, given, modulation)


def label(kind: str, options: Tensors) -> str:
    name = {"layer": "LayerNorm", "rms": "RMSNorm"}[kind]
    parts = [name, *(["affine"] if "weight" in options else [])]
    return " ".join([*parts, *(["modulated"] if "scale" in options else [])])


def plain(
    inputs: Inputs, dtype: str, kind: str, given: Tensors, options: Tensors
) -> Iterator[Case]:
    arguments: dict[str, Any] = {"kind": kind, "backend": inputs.backend, **options}
    want = equation(exact(given["x"]), kind, {name: exact(x) for name, x in options.items()})
    recipe = f"{dtype} {label(kind, options)}"
    limit = tolerance(norm.TOLERANCE, dtype, want)
    yield Case("norm", recipe, lambda: norm.norm(given["x"], **arguments), want, limit)


def gated(
    inputs: Inputs, dtype: str, kind: str, given: Tensors, options: Tensors
) -> Iterator[Case]:
    x, h, gate = (given[name] for name in ("x", "h", "gate"))
    arguments: dict[str, Any] = {"kind": kind, "backend": inputs.backend, **options}
    residual = exact(x) + by_frame(exact(gate), x.shape[1]) * exact(h)
    stored = residual.to(DTYPES[dtype]).double()  # y is the norm of x_new as it was rounded
    want = equation(stored, kind, {name: exact(value) for name, value in options.items()})
    recipe = f"{dtype} {label(kind, options)}"

    def run(index: int) -> Tensor:
        return norm.gated_residual_norm(x, h, gate, **arguments)[index]

    for index, (name, value) in enumerate({"x": residual, "y": want}.items()):
        yield Case(
            "gated_residual_norm",
            f"{recipe}, {name}",
            lambda i=index: run(i),
            value,
            tolerance(norm.TOLERANCE, dtype, value),
        )


def eight_bits(
    inputs: Inputs, format: str, rows: int, given: Tensors, options: Tensors
) -> Iterator[Case]:
    x, h, gate = (given[name] for name in ("x", "h", "gate"))
    exact_options = {name: exact(value) for name, value in options.items()}
    common: dict[str, Any] = {"quantize": format, "block_rows": rows, "backend": inputs.backend}

    def decoded(low: Tensor, scale: Tensor) -> Tensor:
        return unblocked(low.flatten(0, 1), scale, (rows, 128))

    def judged(op: str, run: Any, y: Tensor) -> Iterator[Case]:
        want = y.flatten(0, 1)
        limit = tolerance(norm.TOLERANCE, format, want, {0: rows, 1: 128})
        yield Case(op, f"{format} {BLOCKS[rows]}", run, want, limit)
        if op == "norm" and (format, rows) == ("int8", 128):
            for recipe in recipes.QUANT:
                run = lambda r=recipe: r.apply(want)  # noqa: E731
                yield Case(op, recipe.name, run, want, None, recipe.source)

    y = equation(exact(x), "layer", exact_options)
    yield from judged("norm", lambda: decoded(*norm.norm(x, **options, **common)), y)
    residual = (exact(x) + by_frame(exact(gate), x.shape[1]) * exact(h)).float().double()
    yield from judged(
        "gated_residual_norm",
        lambda: decoded(*norm.gated_residual_norm(x, h, gate, **options, **common)[1:]),
        equation(residual, "layer", exact_options),
    )
