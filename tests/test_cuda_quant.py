# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of quant: their own source on the emulator, bit for bit the reference."""

from __future__ import annotations

import shutil

import emulate
import parameters
import pytest
import torch
from emulated import emulated

from reeltime import quant

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, 16), (3, 1), (130, 128), (7, 300), (257, 272), (129, 1000)]


def sample(rows, columns, dtype, seed=0):
    """Magnitudes over eight orders; a block of zeros, one with NaN, one with Inf, one of tiny."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, (rows, 1), generator=generator).float())
    if rows > 6:
        x[1], x[2, 0], x[3, -1], x[4] = 0, float("nan"), float("inf"), x[4] * 1e-38
    return x.to(dtype)


def check(x, dtype, block_rows):
    """Codes, scales and the way back, bit for bit."""
    results = [
        quant.quantize(x, dtype=dtype, block_rows=block_rows, backend=backend)
        for backend in ("cuda", "reference")
    ]
    (xq, scale), (want_xq, want_scale) = results
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(xq.float(), want_xq.float())  # -0 may have become 0
    for out in DTYPES.values():
        y, want = (
            quant.dequantize(xq, scale, block_rows=block_rows, dtype=out, backend=backend)
            for backend in ("cuda", "reference")
        )
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("source", DTYPES.values(), ids=DTYPES)
def test_bit_for_bit(source, dtype, block_rows):
    with emulated("quant", gpu=True) as runner:
        for seed, shape in enumerate(SHAPES):
            check(sample(*shape, source, seed).to(runner.device), dtype, block_rows)
    if runner.device.type == "cpu":
        assert set(runner.launches) == {"quantize_sm80", "dequantize_sm80"}


@pytest.mark.parametrize("block_rows", [1, 128])
def test_strided_rows_and_codes(block_rows):
    """Rows of a wider matrix, at addresses that are no multiple of 16; transposed codes."""
    with emulated("quant", gpu=True) as runner:
        whole = sample(40, 400, torch.bfloat16).to(runner.device)
        for view in (whole[:, 8:280], whole[::2, 3:300], whole[5:6]):
            check(view, torch.int8, block_rows)
        xq, scale = quant.quantize(whole, block_rows=block_rows, backend="reference")
        turned = xq.new_empty(400, 40).t().copy_(xq)
        wide = scale.new_empty(scale.shape[1], scale.shape[0]).t().copy_(scale)
        got = quant.dequantize(turned, wide, block_rows=block_rows, backend="cuda")
        torch.testing.assert_close(
            got,
            quant.dequantize(xq, scale, block_rows=block_rows, backend="reference"),
            equal_nan=True,
        )


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)])
def test_empty(shape):
    with emulated("quant", gpu=True) as runner:
        xq, scale = quant.quantize(torch.empty(shape, device=runner.device), backend="cuda")
        assert xq.shape == shape
        assert quant.dequantize(xq, scale, backend="cuda").shape == shape


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_without_races(schedule):
    with emulated("quant", flavour="race", schedule=schedule, seed=3):
        for block_rows in (1, 128):
            check(sample(131, 300, torch.bfloat16), torch.int8, block_rows)


def test_under_sanitizers():
    problem = parameters.sanitized(
        "quant",
        """
x = np.random.default_rng(0).standard_normal((131, 300)).astype(np.float32)
for rows, scales in ((1, 131), (128, 2)):
    xq, scale = np.zeros((131, 300), np.int8), np.zeros((scales, 3), np.float32)
    run("quantize", x=x, xq=xq, x_scale=scale, M=131, K=300, stride_xm=300, block_rows=rows,
        x_dtype=0, dtype=3)
    assert np.abs(xq.astype(int)).max() == 127
    y = np.zeros_like(x)
    run("dequantize", xq=xq, x_scale=scale, x=y, M=131, K=300, stride_qm=300, stride_qk=1,
        stride_sm=3, stride_sk=1, block_rows=rows, dtype=3, x_dtype=0)
    assert np.abs(y - x).max() < 0.05
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


MUTATIONS = {
    "rows past the end are read": ("x[i] = row < p.M\n", "x[i] = true\n"),
    "columns past the end are read": ("if (column + i < K) x.at[i]", "x.at[i]"),
    "rows past the end are stored": ("if (row < p.M && start < p.K)", "if (start < p.K)"),
    "columns past the end are stored": ("if (row < p.M && start < p.K)", "if (row < p.M)"),
    "the scale of the first row for all": ("amax[kPerRow ? i : 0]", "amax[0]"),
    "a row's maximum not over all lanes": ("warp_reduce<C::kLanes>(", "warp_reduce<8>("),
    "warps do not meet": ("block_reduce<8>(amax[0],", "block_reduce<1>(amax[0],"),
    "lanes exchange the wrong row": ("odd ? even_row : odd_row", "odd ? odd_row : even_row"),
    "halves swapped": ("taken[r][w] = odd ? theirs : even_row", "taken[r][w] = even_row"),
    "scale block": ("column / kBlockK * p.stride_sk", "column / 64 * p.stride_sk"),
    "row scale": ("row / p.block_rows * p.stride_sm", "row * p.stride_sm"),
    "codes past the end are read": ("if (column + c < p.K) code.at[c]", "code.at[c]"),
}  # fmt: skip


def check_all():
    for block_rows in (1, 128):
        for shape in ((131, 272), (9, 300)):
            check(sample(*shape, torch.bfloat16), torch.int8, block_rows)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_noticed(name):
    old, new = MUTATIONS[name]
    flavour = "race" if "are read" in name else "plain"  # race looks at every access
    with emulated("quant", flavour=flavour, replace={"sm80.cu": [(old, new)]}):
        with pytest.raises((AssertionError, emulate.EmulationError)):
            check_all()
