# SPDX-License-Identifier: Apache-2.0
"""Triton's quant against the oracle, bit for bit."""

from __future__ import annotations

import pytest
import torch

from reeltime import quant
from reeltime.arch import UnsupportedArchError

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def outliers(g):
    x = torch.randn(64, 256, generator=g)
    x[:, 3::16] = 20 + 3 * x[:, 3::16]
    return x


def poisoned(g):
    x = torch.randn(4, 300, generator=g)
    x[1, 130], x[2, 5], x[3, 299] = torch.nan, torch.inf, -torch.inf
    return x


INPUTS = {
    "normal": lambda g: torch.randn(130, 300, generator=g),
    "outlier channels": outliers,
    "constant": lambda g: torch.full((3, 128), -2.5),
    "one zero block": lambda g: torch.randn(256, 128, generator=g).index_fill(
        0, torch.arange(128), 0.0
    ),
    "single token": lambda g: torch.randn(1, 1000, generator=g),
    "single element": lambda g: torch.randn(1, 1, generator=g),
    "ragged": lambda g: torch.randn(63, 129, generator=g),
    "strided": lambda g: torch.randn(40, 600, generator=g)[::2, :300],
    "heavy tails": lambda g: torch.randn(40, 256, generator=g) ** 9,
    "subnormal": lambda g: torch.randn(8, 128, generator=g) * 1e-38,
    "smallest": lambda g: torch.full((1, 128), 1.4e-45),
    "huge": lambda g: torch.randn(8, 128, generator=g) * 1e37,
    "not finite": poisoned,
    "empty": lambda g: torch.empty(0, 256),
    "no columns": lambda g: torch.empty(3, 0),
}


def bits(xq):
    return xq.float().cpu()  # as numbers: -0 is 0


def draw(kind, dtype, device):
    return INPUTS[kind](torch.Generator().manual_seed(7)).to(dtype).to(device)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_is_the_oracle(kind, block_rows, format, device):
    for dtype in DTYPES if kind in ("normal", "strided") else (torch.float32,):
        x = draw(kind, dtype, device)
        options = {"dtype": FORMATS[format], "block_rows": block_rows}
        xq, scale = quant.quantize(x, **options, backend="triton")
        want_q, want_scale = quant.quantize(x, **options, backend="reference")
        torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(bits(xq), bits(want_q))
        assert (xq.stride(), scale.stride()) == (want_q.stride(), want_scale.stride())


@pytest.mark.parametrize("kind", ["normal", "ragged", "strided", "not finite", "empty"])
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_is_the_oracle(kind, block_rows, format, device):
    x = draw(kind, torch.float32, device)
    xq, scale = quant.quantize(x, dtype=FORMATS[format], block_rows=block_rows)
    for dtype in DTYPES:
        options = {"block_rows": block_rows, "dtype": dtype}
        got = quant.dequantize(xq, scale, **options, backend="triton")
        want = quant.dequantize(xq, scale, **options, backend="reference")
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert got.stride() == want.stride()


def test_dequantize_reads_any_strides(device):
    xq, scale = quant.quantize(draw("normal", torch.float32, device))
    wide = torch.stack([xq.t().contiguous(), xq.t().contiguous()], 2)[..., 0].t()
    step = scale.t().contiguous().t()
    assert torch.equal(quant.dequantize(wide, step, backend="triton"), quant.dequantize(xq, scale))


def test_float64_says_who_serves_it(device):
    with pytest.raises(UnsupportedArchError, match="float64 has backend='reference'"):
        quant.quantize(torch.randn(2, 128, device=device).double(), backend="triton")
