# SPDX-License-Identifier: Apache-2.0
"""quant: dynamic per-block quantisation to INT8 or FP8, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from reeltime import checks
from reeltime.backends import Op
from reeltime.checks import Tolerance
from reeltime.quant import reference
from reeltime.quant.reference import BLOCK_K

BLOCK_ROWS = (1, 128)
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# Error of dequantize(quantize(x)) by format, where the largest value of a block is a few times the
# root mean square r of all: 2.8 r in a row of 128 Gaussians, 4 r in 128 x 128.
# INT8 rounds by at most amax / 254 and on average by half of that, mean |x| = 0.8 r: up to
# amax = 6.35 r the peak is 6.35 / 254, up to 5 r relative L1 is 5 / 508 / 0.8.  Truncation costs
# twice as much.
# e4m3 rounds by at most 16 / 448 of amax (2^-4 of the value below) and on average by 2^-5 of the
# value over its mantissa in [1, 2): 0.0225.  Up to amax = 7 r the peak is 7 * 16 / 448.
# An outlier that is more widens the step of all its block: then the bound is amax / 254 itself.
# The other formats are results of dequantize: one product, rounded once.
TOLERANCE = {
    "float64": Tolerance(1e-15, 1e-14),
    "bfloat16": Tolerance(4e-3, 4e-2),
    "int8": Tolerance(0.0125, 0.025),
    "fp8": Tolerance(0.03, 0.25),
}


def scale_shape(rows: int, columns: int, block_rows: int) -> tuple[int, int]:
    """[ceil(M / bm), ceil(K / 128)]."""
    return -(-rows // block_rows), -(-columns // BLOCK_K)


def flops(M: int, K: int) -> int:
    """abs, max, divide and round, per element."""
    return 4 * M * K


def bytes(M: int, K: int, *, itemsize: int = 2, block_rows: int = 1) -> int:
    """Read x once, write xq and its scales once."""
    blocks, columns = scale_shape(M, K, block_rows)
    return M * K * (itemsize + 1) + 4 * blocks * columns


def check_scale(
    name: str, scale: Tensor, block_rows: int, x_name: str, x: Tensor, layout: str
) -> None:
    """`scale` is that of an 8-bit x [M, K] in blocks of block_rows x 128."""
    rows, columns = x.shape
    if (
        not isinstance(scale, Tensor)
        or scale.shape != (-(-rows // block_rows), -(-columns // BLOCK_K))
        or scale.dtype != torch.float32
        or scale.device != x.device
    ):
        checks.tensor(name, scale, 2, layout)
        checks.shape(name, scale, scale_shape(rows, columns, block_rows), layout)
        checks.dtype(name, scale, (torch.float32,))
        checks.device(name, scale, x, x_name)


def _fake_quantize(x: Tensor, dtype: torch.dtype, block_rows: int) -> tuple[Tensor, Tensor]:
    scale = scale_shape(x.shape[0], x.shape[1], block_rows)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(scale, dtype=torch.float32)


def _fake_dequantize(xq: Tensor, x_scale: Tensor, block_rows: int, dtype: torch.dtype) -> Tensor:
    return xq.new_empty(xq.shape, dtype=dtype)


QUANTIZE = Op(
    "quant",
    "quantize(Tensor x, ScalarType dtype, int block_rows, str backend) -> (Tensor, Tensor)",
    reference.quantize,
    _fake_quantize,
    differentiable=False,
)
DEQUANTIZE = Op(
    "quant",
    "dequantize(Tensor xq, Tensor x_scale, int block_rows, ScalarType dtype, str backend) "
    "-> Tensor",
    reference.dequantize,
    _fake_dequantize,
)


def quantize(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    block_rows: int = 1,
    backend: str = "auto",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dynamic per-block quantisation.

    x_scale[i, j] = amax(block i, j of x) / limit;   xq = round(x / x_scale)
    with blocks of block_rows x 128 and limit = 127 (INT8) or 448 (e4m3fn), ragged at the edges.

    Args:
        x: [M, K] floating point, K contiguous.
        dtype: torch.int8 or torch.float8_e4m3fn.
        block_rows: 1 (per token) or 128 (per block).
        out: optional (xq, x_scale), written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        xq [M, K] of dtype, x_scale [ceil(M / block_rows), ceil(K / 128)] float32.
        A block of zeros has scale 1 and stores zeros.  A block that holds NaN or Inf has scale NaN
        and stores zeros, so that all of it is NaN again once dequantised.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (division in float64 for float64).  Rounding: to nearest even.
    Graph-safe: yes.  Source: Vidu S1, section 2.3.2.
    """
    checks.activation("x", x, 2, "[M, K]")
    if dtype not in checks.INT8_OR_FP8 or block_rows not in BLOCK_ROWS:
        checks.choice("dtype", dtype, checks.INT8_OR_FP8)
        checks.choice("block_rows", block_rows, BLOCK_ROWS)
    if out is not None:
        checks.output("out[0]", out[0], x.shape, dtype)
        checks.output(
            "out[1]", out[1], scale_shape(x.shape[0], x.shape[1], block_rows), torch.float32
        )
    xq, x_scale = QUANTIZE.run(backend, x.device, x, dtype, block_rows)
    if out is None:
        return xq, x_scale
    return out[0].copy_(xq), out[1].copy_(x_scale)


def dequantize(
    xq: Tensor,
    x_scale: Tensor,
    *,
    block_rows: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """xq * x_scale, block by block: the inverse of quantize up to rounding.

    Args:
        xq: [M, K] int8 or float8_e4m3fn.
        x_scale: [ceil(M / block_rows), ceil(K / 128)] float32, finite.
        block_rows: as given to quantize.
        dtype: of the result, floating point.
        out: optional [M, K] of dtype, written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [M, K] of dtype, or out.  A NaN scale gives a block of NaN.
    Raises:
        ValueError: names the argument, what was expected, what came.
        UnsupportedArchError: lists what this build can run.
    Accumulation: float32 (float64 if dtype is).  Graph-safe: yes.
    """
    if (
        not isinstance(xq, Tensor)
        or xq.dim() != 2
        or xq.dtype not in checks.INT8_OR_FP8
        or block_rows not in BLOCK_ROWS
        or dtype not in checks.FLOATS
    ):
        checks.tensor("xq", xq, 2, "[M, K]")
        checks.dtype("xq", xq, checks.INT8_OR_FP8)
        checks.choice("block_rows", block_rows, BLOCK_ROWS)
        checks.choice("dtype", dtype, checks.FLOATS)
    check_scale("x_scale", x_scale, block_rows, "xq", xq, "[ceil(M / bm), ceil(K / 128)]")
    if out is not None:
        checks.output("out", out, xq.shape, dtype)
    x = DEQUANTIZE.run(backend, xq.device, xq, x_scale, block_rows, dtype)
    return x if out is None else out.copy_(x)


@torch.no_grad()
def quantize_weight(weight: Tensor, *, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Of a layer, [N, K], in blocks of 128 x 128: quantize, one row of blocks after the other.

    float32 of a whole layer, which the reference makes, would be several times the layer; and the
    reference it is, so that a layer's codes do not depend on the device that it was loaded on.

    Returns:
        codes [N, K] of dtype, scales [ceil(N / 128), ceil(K / 128)] float32.
    """
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(
        scale_shape(weight.shape[0], weight.shape[1], 128),
        dtype=torch.float32,
        device=weight.device,
    )
    strips = zip(weight.split(128), codes.split(128), scales.split(1), strict=True)
    for rows, *out in strips:
        quantize(
            rows.contiguous(), dtype=dtype, block_rows=128, out=(out[0], out[1]),
            backend="reference",
        )  # fmt: skip
    return codes, scales
