# SPDX-License-Identifier: Apache-2.0
"""gemm_w8a8 against exact integer products, each epilogue against its equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reeltime import checks, gemm_w8a8, quant
from reeltime.gemm_w8a8 import reference

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
OUT = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def operands(M, N, K, format="int8", block_rows=1):
    torch.manual_seed(M + N + K)
    a = torch.randn(M, K)
    a[:, ::37] *= 30
    aq = quant.quantize(a, dtype=FORMATS[format], block_rows=block_rows)
    bq = quant.quantize(torch.randn(N, K) / K**0.5, dtype=FORMATS[format], block_rows=128)
    return aq[0], bq[0], aq[1], bq[1]


def dequantised(a, b, a_scale, b_scale, block_rows):
    """The same product from dequantised operands, in float64."""
    wide = quant.dequantize(a, a_scale, block_rows=block_rows, dtype=torch.float64)
    return wide @ quant.dequantize(b, b_scale, block_rows=128, dtype=torch.float64).t()


SHAPES = [(1, 1, 16), (63, 130, 144), (128, 128, 128), (130, 7, 400), (5, 300, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out", OUT)
def test_matches_the_dequantised_product(shape, block_rows, format, out):
    arguments = operands(*shape, format, block_rows)
    got = gemm_w8a8.gemm_w8a8(*arguments, block_rows=block_rows, out_dtype=OUT[out])
    assert got.dtype == OUT[out]
    error = checks.accuracy(got, dequantised(*arguments, block_rows))
    assert gemm_w8a8.TOLERANCE[out].accepts(error), error


def test_int8_products_are_exact_bit_for_bit():
    """The largest sums a K block can hold, and random ones, against int64."""
    full = torch.full((2, 128), -128, dtype=torch.int8)
    random = torch.randint(-127, 128, (3, 128), dtype=torch.int8)
    a, b = torch.cat([full, random]), torch.cat([random, full])
    ones = torch.ones(5, 1), torch.ones(1, 1)
    got = gemm_w8a8.gemm_w8a8(a, b, *ones, out_dtype=torch.float32)
    assert torch.equal(got.long(), a.long() @ b.long().t())
    assert got.abs().max() > 2**20


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "gated_residual", "residual"])
def test_epilogues(epilogue, bias):
    arguments = operands(12, 20, 48)
    b = torch.randn(20) if bias else None
    y = dequantised(*arguments, 1) + (0 if b is None else b.double())
    options = {"bias": b, "epilogue": epilogue}
    if epilogue == "gelu":
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    if "residual" in epilogue:
        residual, gate = torch.randn(12, 20), torch.randn(3, 20)
        options |= {"epilogue": "gated_residual", "residual": residual}
        if epilogue == "gated_residual":
            options["gate"] = gate
            y = y * gate.double().repeat_interleave(4, 0)
        y = residual.double() + y
    got = gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=torch.float32)
    error = checks.accuracy(got, y)
    assert gemm_w8a8.TOLERANCE["float32"].accepts(error), error


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_requantised_result_feeds_the_next_product(format, block_rows):
    """fc1 -> GELU -> fc2 never leaves 8 bits."""
    fc1 = operands(130, 256, 144, format, block_rows)
    y = gemm_w8a8.gemm_w8a8(*fc1, epilogue="gelu", block_rows=block_rows, out_dtype=torch.float32)
    yq, y_scale = gemm_w8a8.gemm_w8a8(
        *fc1, epilogue="gelu", block_rows=block_rows, requantize=format
    )
    want = quant.quantize(y, dtype=FORMATS[format], block_rows=block_rows)
    assert torch.equal(yq.float(), want[0].float())
    assert torch.equal(y_scale, want[1])
    back = quant.dequantize(yq, y_scale, block_rows=block_rows)
    error = checks.accuracy(back, F.gelu(dequantised(*fc1, block_rows), approximate="tanh"))
    assert gemm_w8a8.TOLERANCE[format].accepts(error), error
    _, w, _, w_scale = operands(1, 20, 256, format, block_rows)
    out = gemm_w8a8.gemm_w8a8(yq, w, y_scale, w_scale, block_rows=block_rows)
    assert out.shape == (130, 20)


@given(
    st.integers(0, 140),
    st.integers(0, 140),
    st.integers(0, 20),
    st.sampled_from([1, 128]),
    st.floats(0.1, 10),
)
@settings(max_examples=25, deadline=None)
def test_linear_in_its_scales_at_any_size(M, N, K16, block_rows, factor):
    a, b, a_scale, b_scale = operands(M, N, 16 * K16, "int8", block_rows)
    options = {"block_rows": block_rows, "out_dtype": torch.float64}
    y = gemm_w8a8.gemm_w8a8(a, b, a_scale, b_scale, **options)
    assert y.shape == (M, N)
    assert torch.allclose(y, dequantised(a, b, a_scale, b_scale, block_rows), rtol=1e-9, atol=1e-12)
    doubled = gemm_w8a8.gemm_w8a8(a, b, a_scale * 2, b_scale, **options)
    assert torch.equal(doubled, 2 * y)


def test_zero_block_adds_nothing():
    a = torch.randn(4, 256)
    a[:, 128:] = 0
    b = quant.quantize(torch.randn(5, 256), block_rows=128)
    aq = quant.quantize(a)
    half = quant.quantize(a[:, :128])
    got = gemm_w8a8.gemm_w8a8(aq[0], b[0], aq[1], b[1], out_dtype=torch.float32)
    b_half = b[0][:, :128].contiguous(), b[1][:, :1].contiguous()
    want = gemm_w8a8.gemm_w8a8(half[0], b_half[0], half[1], b_half[1], out_dtype=torch.float32)
    assert torch.equal(got, want)


def test_nan_scale_raises_on_the_cpu_and_spreads_elsewhere():
    a, b, a_scale, b_scale = operands(4, 5, 16)
    a_scale[2] = torch.nan
    with pytest.raises(ValueError, match="^a_scale: expected finite scales"):
        gemm_w8a8.gemm_w8a8(a, b, a_scale, b_scale)
    # What a GPU, which would have to wait to look, returns: NaN in the rows of that scale.
    y = reference.gemm(a, b, a_scale, b_scale, None, None, None, 1, "none", torch.float32)
    assert y.isnan().all(1).tolist() == [False, False, True, False]
    assert y.isnan().any(1).tolist() == [False, False, True, False]


def test_out_is_written_in_place():
    arguments = operands(4, 5, 16)
    out = torch.empty(4, 5, dtype=torch.bfloat16)
    assert gemm_w8a8.gemm_w8a8(*arguments, out=out) is out
    assert torch.equal(out, gemm_w8a8.gemm_w8a8(*arguments))
    yq, scale = torch.zeros(4, 5, dtype=torch.int8), torch.empty(4, 1)
    gemm_w8a8.gemm_w8a8(*arguments, requantize="int8", out=(yq, scale))
    assert torch.equal(yq, gemm_w8a8.gemm_w8a8(*arguments, requantize="int8")[0])


def test_gradient_of_the_epilogue():
    arguments = operands(4, 5, 16)
    bias, gate = torch.randn(5).double().requires_grad_(), torch.randn(2, 5).double()
    residual = torch.randn(4, 5).double().requires_grad_()

    def call(bias, residual, gate):
        return gemm_w8a8.gemm_w8a8(
            *arguments,
            bias=bias,
            epilogue="gated_residual",
            residual=residual,
            gate=gate,
            out_dtype=torch.float64,
        )

    assert torch.autograd.gradcheck(call, (bias, residual, gate.requires_grad_()))


def test_flops_and_bytes():
    assert gemm_w8a8.flops(3, 5, 7) == 210
    assert gemm_w8a8.bytes(128, 256, 384) == 384 * 384 + 4 * 3 * (128 + 2) + 128 * 256 * 2
    low = gemm_w8a8.bytes(128, 256, 384, block_rows=128, requantize="int8")
    assert low == 384 * 384 + 4 * 3 * 3 + 128 * 256 + 4 * 2
    more = gemm_w8a8.bytes(128, 256, 384, epilogue="gated_residual")
    assert more - gemm_w8a8.bytes(128, 256, 384) == 128 * 256 * 2


ARGS = operands(4, 5, 32)


def call(*, swap=None, **options):
    arguments = list(ARGS)
    for index, value in (swap or {}).items():
        arguments[index] = value
    return gemm_w8a8.gemm_w8a8(*arguments, **options)


res = torch.randn(4, 5)
ERRORS = {
    "a: expected 2 dim": lambda: call(swap={0: ARGS[0][0]}),
    "a: expected dtype": lambda: call(swap={0: torch.randn(4, 32)}),
    "a: expected a contiguous": lambda: call(swap={0: ARGS[0].t().contiguous().t()}),
    "b: expected dtype torch.int8, got": lambda: call(swap={1: ARGS[1].to(torch.float8_e4m3fn)}),
    "b: expected shape": lambda: call(swap={1: ARGS[1][:, :16]}),
    "b_scale: expected the device": lambda: call(swap={3: ARGS[3].to("meta")}),
    "b_scale: expected finite scales": lambda: call(swap={3: ARGS[3] - torch.inf}),
    "b: expected the device": lambda: call(swap={1: ARGS[1].to("meta")}),
    "K: expected a multiple of 16, got 24": lambda: call(
        swap={0: ARGS[0][:, :24], 1: ARGS[1][:, :24]}
    ),
    "a_scale: expected shape": lambda: call(block_rows=128),
    "a_scale: expected dtype": lambda: call(swap={2: ARGS[2].half()}),
    "b_scale: expected shape": lambda: call(swap={3: ARGS[3][:0]}),
    "b_scale: expected finite": lambda: call(swap={3: ARGS[3] / 0}),
    "block_rows: expected 1 or 128, got 2": lambda: call(block_rows=2),
    "bias: expected shape": lambda: call(bias=torch.ones(4)),
    "epilogue: expected 'none'": lambda: call(epilogue="relu"),
    "residual: expected a tensor": lambda: call(epilogue="gated_residual"),
    "residual: expected .* one with": lambda: call(residual=res),
    "residual: expected shape": lambda: call(epilogue="gated_residual", residual=res[:3]),
    "gate: expected None": lambda: call(gate=res),
    "gate .its frames F.: expected a divisor of M = 4": lambda: call(
        epilogue="gated_residual", residual=res, gate=torch.ones(3, 5)
    ),
    "out_dtype: expected": lambda: call(out_dtype=torch.int8),
    "requantize: expected": lambda: call(requantize="int4"),
    "out: expected dtype": lambda: call(out=res),
}


@pytest.mark.parametrize("message", ERRORS)
def test_error_names_the_argument(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ERRORS[message]()
