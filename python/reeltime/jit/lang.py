# SPDX-License-Identifier: Apache-2.0
"""Device functions of more than one family: 8-bit scales, exact division, rounding, rotation."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest even integer.
ROUNDER, ROUNDER_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
SMALL, LIFT = tl.constexpr(2.0**-60), tl.constexpr(2.0**80)


@triton.jit
def magnitude(x):
    """|x| in float32; NaN becomes Inf, which a maximum cannot lose."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def block_scale(amax, LIMIT: tl.constexpr):
    """amax / LIMIT: 1 for a block of zeros, NaN for one that held NaN or Inf."""
    scale = tl.div_rn(amax, LIMIT + tl.zeros_like(amax))
    scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def divide(x, scale):
    """x / scale, correctly rounded, at one division per scale instead of one per element.

    One Newton step from the rounded reciprocal gives the rounded quotient (Markstein, IBM Journal
    of Research and Development 34(1), 1990).  Lifting keeps the reciprocal of tiny scales finite.
    """
    lift = tl.where(scale < SMALL, LIFT, 1.0)
    step = scale * lift
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    x = x * lift
    y = x * inverse
    return tl.fma(tl.fma(-y, step, x), inverse, y)


@triton.jit
def store_as(y, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """float32 y rounded to nearest even into `dtype`, saturated at LIMIT; NaN becomes 0."""
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    if dtype == tl.int8:
        y = (y + ROUNDER) - ROUNDER
    return y.to(dtype)


@triton.jit
def encode(x, scale, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """x / scale in `dtype`; a NaN scale stores zeros."""
    return store_as(divide(x, scale), LIMIT, dtype)


@triton.jit
def rotate(x, table):
    """Pairs (2i, 2i + 1) of float32 x [M, W], turned as complex numbers by table [M, W], whose
    pairs are (cos, sin)."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (M, W // 2, 2)))
    cos, sin = tl.split(tl.reshape(table, (M, W // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (M, W))
