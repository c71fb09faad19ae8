# SPDX-License-Identifier: Apache-2.0
"""norm: what stands between two layers of the transformer.  Bound by bytes: every token once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reeltime import norm
from reeltime.bench import harness, peers
from reeltime.bench.bench_quant import BLOCKS, decoded
from reeltime.bench.case import Case, Draw, Expected, Inputs, Judged
from reeltime.bench.shapes import Sizes, Tokens

EXPECTED = {
    "norm": Expected(0.88, 0.88, "a row is reduced between its only load and its only store"),
    "norm_quantized": Expected(0.85, 0.85, "a second reduction, of each 128 columns"),
    "gated_residual_norm": Expected(0.90, 0.90, "four streams hide the reduction better than two"),
    "gated_residual_norm_quantized": Expected(0.87, 0.87, "the same, and the second reduction"),
}
TOLERANCE = norm.TOLERANCE


def cases(sizes: Sizes) -> Iterator[Case]:
    for model in sizes.layers:
        for tokens in sizes.rows:
            for gated in (False, True):
                yield one(tokens, model.dim, gated=gated)
                yield one(tokens, model.dim, gated=gated, quantize="int8")
            if tokens == sizes.chunk:
                yield one(tokens, model.dim, kind="rms")
                for gated in (False, True):
                    yield one(tokens, model.dim, gated=gated, quantize="fp8")
                yield one(tokens, model.dim, gated=True, quantize="int8", block_rows=128)


def one(
    tokens: Tokens,
    C: int,
    *,
    kind: str = "layer",
    gated: bool = False,
    quantize: str | None = None,
    block_rows: int = 1,
) -> Case:
    """LayerNorm modulated per frame, or RMSNorm with a weight; after the gated residual or not."""
    options: Any = {"kind": kind, "quantize": quantize, "block_rows": block_rows}
    modulated = ("scale", "shift") if kind == "layer" else ("weight",)

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        inputs = {name: draw(1, tokens.total, C) for name in ("x", "h")[: 1 + gated]}
        frames = ("scale", "shift", "gate")[: 2 + gated]
        inputs |= {name: 0.1 * draw(1, tokens.frames, C) for name in frames}
        return inputs | {"weight": 1 + 0.1 * draw(C)}

    def call(inputs: Inputs, x: torch.Tensor, h: Any, backend: str, **more: Any) -> Any:
        more |= {name: inputs[name] for name in modulated} | {"backend": backend}
        if h is None:
            return norm.norm(x, **options | more)
        return norm.gated_residual_norm(x, h, inputs["gate"], **options | more)

    def run(inputs: Inputs, backend: str) -> Any:
        return call(inputs, inputs["x"], inputs.get("h"), backend)

    def judge(inputs: Inputs, results: Any) -> Iterator[Judged]:
        wide = {name: x.double() for name, x in inputs.items()}
        x, parts = wide["x"], results if isinstance(results, tuple) else (results,)
        if gated:
            total = x + wide["gate"].repeat_interleave(tokens.per_frame, 1) * wide["h"]
            yield Judged("x", parts[0], total, TOLERANCE["bfloat16"])
            x, parts = parts[0].double(), parts[1:]  # y is the norm of x as it was stored
        y = call(wide, x, None, "reference", quantize=None)
        if quantize is None:
            yield Judged("y", parts[0], y, TOLERANCE["bfloat16"])
        else:
            low = decoded(parts[0].flatten(0, 1), parts[1], block_rows)
            yield Judged("y", low, y.flatten(0, 1), TOLERANCE[quantize])

    op = ("gated_residual_norm" if gated else "norm") + ("_quantized" if quantize else "")
    size = (1, tokens.total, C)
    moved = norm.bytes(
        *size, frames=tokens.frames, gated=gated, quantize=quantize, block_rows=block_rows
    )
    form = {"layer": "LayerNorm, modulated", "rms": "RMSNorm, weight"}[kind]
    if quantize:
        form += f", {BLOCKS[block_rows]}"
    found = Case(
        "norm", op, form, f"{tokens.total}x{C}", quantize or "bf16",
        {"fp32": norm.flops(*size, gated=gated)}, moved, EXPECTED[op], make, run, judge,
        peers.copying(moved),
    )  # fmt: skip
    return peers.beside(found, peers.norm.adapters(kind, gated, quantize, block_rows))


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
