# SPDX-License-Identifier: Apache-2.0
"""quant: what 8 bits cost, by format and by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reeltime import quant
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import Case, tolerance, unblocked, widest
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact
from reeltime.checks import Tolerance
from reeltime.quant.api import FORMATS

KINDS = ("normal", "outlier", "constant", "zero_block", "single_token", "ragged", "long", "strided")
SCALES = Tolerance(1e-6, 1e-6)  # float32, by a division or by a product with 1 / limit
BLOCKS = {1: "1x128", 128: "128x128"}  # rows x columns that share a scale


def cases(inputs: Inputs) -> Iterator[Case]:
    columns = 300 if inputs.kind == "ragged" else 256
    master = inputs.draw("x", inputs.lengths[1], columns, tokens=0)
    for format in FORMATS:
        for rows in BLOCKS:
            yield from round_trip(inputs, inputs.put(master), format, rows)
        yield from round_trip(inputs, inputs.put(master, "bfloat16"), format, 1)
    x = exact(inputs.put(master))
    for published in recipes.QUANT:
        yield Case(
            "quantize", published.name, lambda r=published: r.apply(x), x, None, published.source
        )


def round_trip(inputs: Inputs, x: Tensor, format: str, rows: int) -> Iterator[Case]:
    options = {"block_rows": rows, "backend": inputs.backend}
    want = exact(x)
    recipe = f"{format} {BLOCKS[rows]}"
    low, scale = quant.quantize(x, dtype=FORMATS[format], block_rows=rows, backend="reference")

    def decoded() -> Tensor:
        return unblocked(*quant.quantize(x, dtype=FORMATS[format], **options), (rows, 128))

    limit = tolerance(quant.TOLERANCE, format, want, {0: rows, 1: 128})
    given = "" if x.element_size() == 4 else ", bfloat16 in"
    yield Case("quantize", recipe + given, decoded, want, limit)
    if given:
        return
    # The reference's own scales are not asked: blocks of zeros have scale 1.
    amax = widest(want, {0: rows, 1: 128})[::rows, ::128]
    scales = torch.where(amax > 0, amax / {"int8": 127.0, "fp8": 448.0}[format], 1.0)
    run = lambda: quant.quantize(x, dtype=FORMATS[format], **options)[1]  # noqa: E731
    yield Case("quantize", f"{recipe}, scales", run, scales, SCALES)
    product = unblocked(low, scale, (rows, 128))
    for name in ("float64", "bfloat16"):
        yield Case(
            "dequantize",
            f"{recipe}, {name} out",
            lambda name=name: quant.dequantize(low, scale, dtype=DTYPES[name], **options),
            product,
            tolerance(quant.TOLERANCE, name, product),
        )
