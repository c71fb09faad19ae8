# SPDX-License-Identifier: Apache-2.0
"""quant: activations to 8 bits and back.  Bound by bytes: one pass in, one pass out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reeltime import quant
from reeltime.bench import harness, peers
from reeltime.bench.case import Case, Draw, Expected, Inputs, Judged
from reeltime.bench.shapes import Sizes
from reeltime.quant.api import FORMATS

EXPECTED = {
    "quantize": Expected(0.90, 0.90, "one pass; a row's 128 columns are reduced in one warp"),
    "dequantize": Expected(0.93, 0.93, "a product per element, nothing to wait for"),
}
TOLERANCE = quant.TOLERANCE
BLOCKS = {1: "1x128", 128: "128x128"}  # rows x columns that share a scale


def cases(sizes: Sizes) -> Iterator[Case]:
    for model in sizes.layers:
        for tokens in sizes.rows:
            size = tokens.total, model.dim
            for format in FORMATS:
                yield quantize(*size, format, 1)
                if tokens == sizes.chunk:
                    yield quantize(*size, format, 128)
                    yield dequantize(*size, format)


def quantize(M: int, K: int, format: str, block_rows: int) -> Case:
    def make(device: torch.device, seed: int) -> Inputs:
        return {"x": Draw(device, seed)(M, K)}

    def run(inputs: Inputs, backend: str) -> Any:
        options: Any = {"dtype": FORMATS[format], "block_rows": block_rows, "backend": backend}
        return quant.quantize(inputs["x"], **options)

    def judge(inputs: Inputs, results: Any) -> Iterator[Judged]:
        yield Judged(
            "x",
            decoded(results[0], results[1], block_rows),
            inputs["x"].double(),
            TOLERANCE[format],
        )

    moved = quant.bytes(M, K, block_rows=block_rows)
    found = Case(
        "quant", "quantize", BLOCKS[block_rows], f"{M}x{K}", format, {"fp32": quant.flops(M, K)},
        moved, EXPECTED["quantize"], make, run, judge, peers.copying(moved),
    )  # fmt: skip
    return peers.beside(found, peers.quant.quantize(FORMATS[format], block_rows))


def dequantize(M: int, K: int, format: str) -> Case:
    def make(device: torch.device, seed: int) -> Inputs:
        x = Draw(device, seed)(M, K)
        xq, x_scale = quant.quantize(x, dtype=FORMATS[format], backend="reference")
        return {"xq": xq, "x_scale": x_scale}

    def run(inputs: Inputs, backend: str) -> Any:
        return quant.dequantize(**inputs, dtype=torch.bfloat16, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        yield Judged("x", result, decoded(**inputs), TOLERANCE["bfloat16"])

    moved = quant.bytes(M, K)  # the same both ways
    found = Case(
        "quant", "dequantize", f"{format} 1x128", f"{M}x{K}", "bf16", {"fp32": M * K}, moved,
        EXPECTED["dequantize"], make, run, judge, peers.copying(moved),
    )  # fmt: skip
    return peers.beside(found, peers.quant.dequantize())


def decoded(xq: torch.Tensor, x_scale: torch.Tensor, block_rows: int = 1) -> torch.Tensor:
    """What 8-bit values stand for, in float64."""
    options: Any = {"dtype": torch.float64, "backend": "reference"}
    return quant.dequantize(xq, x_scale, block_rows=block_rows, **options)


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
