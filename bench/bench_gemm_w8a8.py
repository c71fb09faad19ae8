# SPDX-License-Identifier: Apache-2.0
"""gemm_w8a8: the products of the transformer, at their epilogues.  Bound by the tensor cores.

The kernel is judged by the operands in 8 bits that it was given; its format, as those of peers are,
by the operands in bf16 that they were rounded from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reeltime import quant
from reeltime.bench import harness, peers
from reeltime.bench.bench_quant import BLOCKS, decoded
from reeltime.bench.case import SEED, Case, Draw, Expected, Inputs, Judged
from reeltime.bench.peers.gemm_w8a8 import bound
from reeltime.bench.shapes import Sizes
from reeltime.gemm_w8a8 import TOLERANCE, bytes, flops, gemm_w8a8
from reeltime.quant.api import FORMATS

EXPECTED = {
    "int8": Expected(0.75, 0.65, "a conversion and a product per sum and K block; sm120: mma.sync"),
    "fp8": Expected(0.80, 0.80, "no conversion; on sm120 half the rate leaves issue slots free"),
}
REQUANTIZED = 0.95  # of that share: the tile is reduced once more before it is stored


def cases(sizes: Sizes) -> Iterator[Case]:
    """The projections of attention, fc1 with GELU in 8 bits, fc2 into the gated residual; of the
    larger model, fc1 and fc2 for a chunk and for the tallest."""
    for index, model in enumerate(sizes.layers):
        C, F = model.dim, model.ffn_dim
        for tokens in sizes.rows:
            if index and tokens not in (sizes.chunk, sizes.rows[-1]):
                continue
            M, frames = tokens.total, tokens.frames
            for format in FORMATS:
                yield product(M, C, C, format)
                yield product(M, F, C, format, epilogue="gelu")
                yield product(M, C, F, format, epilogue="gated_residual", frames=frames)
                if tokens == sizes.chunk and not index:
                    yield product(M, C, C, format, block_rows=128)


def operands(draw: Draw, M: int, N: int, K: int) -> Inputs:
    """x and w in bf16, which a and b are rounded from; the first that is drawn."""
    return {"x": draw(M, K), "w": draw(N, K) * K**-0.5}


def product(
    M: int,
    N: int,
    K: int,
    format: str,
    *,
    epilogue: str = "none",
    block_rows: int = 1,
    frames: int = 1,
) -> Case:
    """With bias; GELU goes on in 8 bits, since fc2 reads them."""
    requantize = format if epilogue == "gelu" else None
    options: Any = {"epilogue": epilogue, "block_rows": block_rows}

    def make(device: torch.device, seed: int) -> Inputs:
        draw, inputs = Draw(device, seed), {}
        wide = operands(draw, M, N, K)
        for name, x, block in (("a", wide["x"], block_rows), ("b", wide["w"], 128)):
            low = quant.quantize(x, dtype=FORMATS[format], block_rows=block, backend="reference")
            inputs[name], inputs[f"{name}_scale"] = low
        inputs["bias"] = draw(N)
        if epilogue == "gated_residual":
            inputs |= {"residual": draw(M, N), "gate": draw(frames, N)}
        return inputs

    def run(inputs: Inputs, backend: str) -> Any:
        return gemm_w8a8(**inputs, **options, requantize=requantize, backend=backend)

    def judge(inputs: Inputs, results: Any) -> Iterator[Judged]:
        oracle: Any = {"out_dtype": torch.float64, "backend": "reference"}
        want = gemm_w8a8(**inputs, **options, **oracle)
        if requantize is None:
            yield Judged("y", results, want, TOLERANCE["bfloat16"])
        else:
            yield Judged(
                "y", decoded(results[0], results[1], block_rows), want, TOLERANCE[requantize]
            )
        x, w = (x.double() for x in operands(Draw(want.device, SEED), M, N, K).values())
        stored = [inputs[name] for name in ("a", "b", "a_scale", "b_scale")]
        eight = gemm_w8a8(*stored, block_rows=block_rows, **oracle)
        yield Judged("a b^T", eight, x @ w.t(), bound(format))

    form = {"none": "bias", "gelu": "GELU, requantised", "gated_residual": "gated residual"}
    moved = bytes(M, N, K, block_rows=block_rows, epilogue=epilogue, requantize=requantize)
    expected = EXPECTED[format]
    if requantize:
        expected = expected.times(REQUANTIZED)
    return Case(
        "gemm_w8a8", "gemm_w8a8_requantized" if requantize else "gemm_w8a8",
        f"{form[epilogue]}, {BLOCKS[block_rows]}", f"{M}x{N}x{K}", format,
        {format: flops(M, N, K)}, moved, expected, make, run, judge,
        peers.products(M, N, K, lambda device, seed: operands(Draw(device, seed), M, N, K)),
    )  # fmt: skip


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
