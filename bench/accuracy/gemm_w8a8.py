# SPDX-License-Identifier: Apache-2.0
"""gemm_w8a8: the product of given 8-bit operands, and of float32 ones quantised first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime import gemm_w8a8, quant
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import Case, tolerance, unblocked
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact
from reeltime.bench.accuracy.quant import BLOCKS
from reeltime.gemm_w8a8 import gemm_w8a8 as gemm
from reeltime.quant.api import FORMATS

KINDS = ("normal", "outlier", "constant", "zero_block", "single_token", "ragged", "long", "strided")
SIZES = {"ragged": (150, 208), "long": (192, 4096)}  # N, K


def equation(y: Tensor, epilogue: str, extras: dict[str, Tensor]) -> Tensor:
    """The epilogue of a product y [M, N], in float64."""
    y = y + exact(extras["bias"]) if "bias" in extras else y
    if epilogue == "gelu":
        return F.gelu(y, approximate="tanh")
    if epilogue == "gated_residual":
        gate = exact(extras["gate"])
        frame = torch.arange(y.shape[0]) // (y.shape[0] // gate.shape[0])
        return exact(extras["residual"]) + gate[frame] * y
    return y


def cases(inputs: Inputs) -> Iterator[Case]:
    rows = 64 if inputs.kind == "long" else inputs.lengths[1]
    columns, inner = SIZES.get(inputs.kind, (192, 256))
    x = inputs.draw("x", rows, inner, tokens=0)
    w = inputs.normal("w", columns, inner) / inner**0.5
    frames = next(f for f in (4, 7, 1) if rows % f == 0)
    extras = {
        "bias": inputs.normal("bias", columns),
        "residual": inputs.normal("residual", rows, columns),
        "gate": inputs.normal("gate", frames, columns),
    }
    for format in FORMATS:
        for block in BLOCKS:
            yield from product(inputs, format, block, x, w, extras)
    low, dense = x.float().double(), x.float().double() @ w.float().double().T
    for recipe in recipes.QUANT:
        yield Case(
            "gemm_w8a8",
            f"{recipe.name}, from float32",
            lambda r=recipe: r.apply(low) @ r.apply(w.float().double()).T,
            dense,
            None,
            recipe.source,
        )


def product(
    inputs: Inputs, format: str, block: int, x: Tensor, w: Tensor, extras: dict[str, Tensor]
) -> Iterator[Case]:
    operands = {}
    for name, master, size in (("a", x, block), ("b", w, 128)):
        low, scale = quant.quantize(
            inputs.put(master), dtype=FORMATS[format], block_rows=size, backend="reference"
        )
        if inputs.kind == "strided":
            low = torch.cat([low, low], 1)[:, : low.shape[1]]  # a gap after every row
        operands[name], operands[f"{name}_scale"] = low, scale
    a = unblocked(operands["a"], operands["a_scale"], (block, 128))
    b = unblocked(operands["b"], operands["b_scale"], (128, 128))
    y, recipe = a @ b.T, f"{format} {BLOCKS[block]}"
    common: dict[str, Any] = {"block_rows": block, "backend": inputs.backend, **operands}
    float32 = {"out_dtype": torch.float32, **common}

    def judged(name: str, want: Tensor, **options: Any) -> Case:
        limit = tolerance(gemm_w8a8.TOLERANCE, name.split()[0], want)
        run = lambda: gemm(**common | options)  # noqa: E731
        return Case("gemm_w8a8", f"{recipe}, {name}", run, want, limit)

    for name, dtype in DTYPES.items():
        yield judged(f"{name} out", y, out_dtype=dtype)
    for epilogue in gemm_w8a8.api.EPILOGUES:
        used = {"bias"} if epilogue != "gated_residual" else set(extras)
        given = {n: inputs.put(e) for n, e in extras.items() if n in used}
        want = equation(y, epilogue, given)
        options = {"epilogue": epilogue, "out_dtype": torch.float32, **given}
        yield judged(f"float32 {epilogue} + bias", want, **options)
        for stored in FORMATS if epilogue == "gelu" else ():
            yield Case(
                "gemm_w8a8",
                f"{recipe}, gelu requantised to {stored}",
                lambda s=stored, o=options: unblocked(
                    *gemm(**common | o | {"requantize": s}), (block, 128)
                ),
                want,
                tolerance(gemm_w8a8.TOLERANCE, stored, want, {0: block, 1: 128}),
            )
    given_x, given_w = (exact(inputs.put(t)) for t in (x, w))
    yield Case(
        "gemm_w8a8", f"{recipe}, from float32", lambda: gemm(**float32), given_x @ given_w.T, None
    )
