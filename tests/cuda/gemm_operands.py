# SPDX-License-Identifier: Apache-2.0
"""Operands of gemm_w8a8 for the tests of its CUDA kernels, and what they are judged by."""

from __future__ import annotations

import torch

from reeltime import checks, gemm_w8a8, quant

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
OUT = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def integers(M, N, K, format="int8", block_rows=1, exponents=(0, 1), seed=0):
    """Operands and scales whose every partial sum float32 holds: integers and powers of two.  Small
    integers where scales differ; in FP8, so that 14 bits, the narrowest accumulator, hold sums."""
    g = torch.Generator().manual_seed(M + N + K + seed)
    limit = 127 if format == "int8" and exponents == (0, 1) else 8
    a, b = (torch.randint(-limit, limit + 1, (n, K), generator=g) for n in (M, N))
    shapes = (-(-M // block_rows), -(-K // 128)), (-(-N // 128), -(-K // 128))
    scales = [2.0 ** torch.randint(*exponents, s, generator=g) for s in shapes]
    return a.float().to(FORMATS[format]), b.float().to(FORMATS[format]), *scales


def activations(M, N, K, format, block_rows):
    """What quantize makes of activations with outlier channels, a block of zeros, and weights."""
    g = torch.Generator().manual_seed(M + N + K)
    a, b = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g) / K**0.5
    a[:, 3::16] *= 20
    a[:64, :128] = 0
    aq, a_scale = quant.quantize(a, dtype=FORMATS[format], block_rows=block_rows)
    bq, b_scale = quant.quantize(b, dtype=FORMATS[format], block_rows=128)
    return aq, bq, a_scale, b_scale


def oracle(arguments, **options):
    options = {name: x.double() if hasattr(x, "double") else x for name, x in options.items()}
    wide = {"out_dtype": torch.float64, "backend": "reference"}
    return gemm_w8a8.gemm_w8a8(*arguments, **options | wide)


def assert_near(got, want, tolerance):
    error = checks.accuracy(got, want)
    assert gemm_w8a8.TOLERANCE[tolerance].accepts(error), error
