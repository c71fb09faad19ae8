# SPDX-License-Identifier: Apache-2.0
"""quant against a loop over blocks, its bounds, and its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reeltime import checks, quant

INT8, FP8 = torch.int8, torch.float8_e4m3fn
LIMIT = {INT8: 127.0, FP8: 448.0}
FORMATS = {"int8": INT8, "fp8": FP8}


def block_loop(x, dtype, block_rows):
    """The contract, one block at a time in float64 with a float32 scale."""
    M, K = x.shape
    xq = torch.zeros(M, K, dtype=torch.float64)
    scales = torch.ones(-(-M // block_rows), -(-K // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * block_rows, (i + 1) * block_rows), slice(j * 128, (j + 1) * 128)
            amax = x[here].abs().max()
            if amax > 0:
                scales[i, j] = amax / LIMIT[dtype]
            scaled = x[here] / scales[i, j]
            xq[here] = (scaled.round() if dtype == INT8 else scaled.to(FP8)).double()
    return xq, scales


def outliers(M, K):
    x = torch.randn(M, K)
    x[:, ::17] *= 100
    return x


INPUTS = {
    "normal": lambda: torch.randn(130, 300),
    "outlier channels": lambda: outliers(64, 256),
    "constant": lambda: torch.full((3, 128), -2.5),
    "zeros": lambda: torch.zeros(129, 130),
    "one zero block": lambda: torch.cat([torch.zeros(128, 128), torch.randn(128, 128)]),
    "single element": lambda: torch.randn(1, 1),
    "ragged": lambda: torch.randn(63, 1000),
    "strided": lambda: torch.randn(40, 600)[::2, :300],
    "tiny": lambda: torch.randn(4, 128) * 1e-30,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_matches_the_block_loop(kind, block_rows, format):
    torch.manual_seed(0)
    x, dtype = INPUTS[kind](), FORMATS[format]
    xq, scale = quant.quantize(x, dtype=dtype, block_rows=block_rows)
    want_q, want_scale = block_loop(x, dtype, block_rows)
    assert xq.dtype == dtype
    assert scale.dtype == torch.float32
    assert torch.equal(scale, want_scale)
    assert torch.equal(xq.double(), want_q)
    back = quant.dequantize(xq, scale, block_rows=block_rows, dtype=torch.float64)
    spread = scale.double().repeat_interleave(block_rows, 0)[: x.shape[0]]
    spread = spread.repeat_interleave(128, 1)[:, : x.shape[1]]
    assert torch.equal(back, want_q * spread)
    error = checks.accuracy(back, x)
    assert quant.TOLERANCE[format].accepts(error) or kind == "outlier channels", error
    step = spread * (0.5 if format == "int8" else 16)
    assert ((back - x).abs() <= step * 1.0001).all()


@given(
    st.integers(0, 140),
    st.integers(0, 260),
    st.sampled_from([1, 128]),
    st.sampled_from(list(FORMATS)),
    st.floats(-25, 25),
)
@settings(max_examples=40, deadline=None)
def test_bounds_hold_at_any_size_and_magnitude(M, K, block_rows, format, exponent):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M * 1000 + K)) * 10**exponent
    xq, scale = quant.quantize(x, dtype=FORMATS[format], block_rows=block_rows)
    assert xq.shape == x.shape
    assert scale.shape == (-(-M // block_rows), -(-K // 128))
    assert (scale > 0).all()
    back = quant.dequantize(xq, scale, block_rows=block_rows)
    assert back.isfinite().all()
    full = scale.repeat_interleave(block_rows, 0)[:M].repeat_interleave(128, 1)[:, :K]
    assert ((back - x).abs() <= full * (0.5001 if format == "int8" else 16.01)).all()
    again, _ = quant.quantize(back, dtype=FORMATS[format], block_rows=block_rows)
    assert torch.equal(again.float(), xq.float())  # what is stored, stays


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_inf_take_their_block_and_no_other(bad, format):
    x = torch.randn(2, 256)
    x[0, 5] = bad
    xq, scale = quant.quantize(x, dtype=FORMATS[format])
    assert scale.isnan().tolist() == [[True, False], [False, False]]
    assert not xq[0, :128].float().any()
    back = quant.dequantize(xq, scale)
    assert back[0, :128].isnan().all()
    assert back[0, 128:].isfinite().all()
    assert back[1].isfinite().all()


def test_half_rounds_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])
    assert quant.quantize(x)[0].tolist() == [[0, 2, 2, 0, -2, 127]]


def test_out_is_written_in_place():
    x = torch.randn(5, 130)
    xq, scale = quant.quantize(x)
    out = torch.zeros(5, 130, dtype=INT8), torch.zeros(5, 2)
    got = quant.quantize(x, out=out)
    assert got[0] is out[0]
    assert torch.equal(out[0], xq)
    assert torch.equal(out[1], scale)
    y = torch.empty(5, 130)
    assert quant.dequantize(xq, scale, out=y) is y
    assert torch.equal(y, quant.dequantize(xq, scale))


def test_flops_and_bytes():
    assert quant.flops(3, 128) == 4 * 3 * 128
    assert quant.bytes(128, 256) == 128 * 256 * 3 + 4 * 128 * 2
    assert quant.bytes(128, 256, itemsize=4, block_rows=128) == 128 * 256 * 5 + 4 * 2


x, xq, scale = torch.randn(4, 256), torch.zeros(4, 256, dtype=INT8), torch.ones(4, 2)
ERRORS = {
    "x: expected 2 dimensions": lambda: quant.quantize(torch.randn(4)),
    "x: expected a tensor": lambda: quant.quantize([[1.0]]),
    "x: expected dtype": lambda: quant.quantize(xq),
    "x: expected a contiguous": lambda: quant.quantize(x.t()),
    "dtype: expected torch.int8": lambda: quant.quantize(x, dtype=torch.uint8),
    "block_rows: expected 1 or 128, got 64": lambda: quant.quantize(x, block_rows=64),
    r"out\[0\]: expected dtype": lambda: quant.quantize(x, out=(x, scale)),
    r"out\[1\]: expected shape": lambda: quant.quantize(x, out=(xq, x)),
    "xq: expected dtype": lambda: quant.dequantize(x, scale),
    "x_scale: expected shape": lambda: quant.dequantize(xq, scale[:3]),
    "x_scale: expected dtype": lambda: quant.dequantize(xq, scale.double()),
    "x_scale: expected the device": lambda: quant.dequantize(xq, scale.to("meta")),
    "dtype: expected torch.float32": lambda: quant.dequantize(xq, scale, dtype=INT8),
    "out: expected shape": lambda: quant.dequantize(xq, scale, out=x[:3]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_error_names_the_argument(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ERRORS[message]()
