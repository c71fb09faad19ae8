# SPDX-License-Identifier: Apache-2.0
"""Device functions of attention, with the softmax online and in base 2.

A tile of M rows keeps three running values: `m` [M], the largest score so far in log2 units;
`total` [M], the sum of probabilities; `acc` [M, E], the weighted values.  Per tile of N keys:

    x = int8_products(q, k)  or  products(q, k)                       [M, N]
    p, m, alpha = probabilities(x, scale, bias, m, top(v.dtype))      x = -inf where a key is unseen
    acc, total = weighted(p, v, v_scale, acc, total, alpha)
    out, lse = finish(acc, total, m, top(v.dtype))                    once

A score is scale * x + bias with one positive scale [M] and one bias [M] per tile and row, so the
maximum is taken over x, and one multiply-add per element leads from x to the exponent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reeltime.jit import lang

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def int8_products(q, k):
    """INT8 q [M, D] times k [D, N], exact, in float32.

    The accumulator starts at the bits of 1.5 * 2^23, so that what it ends with is a float: int to
    float runs on the pipe of exp2, which attention has none of to spare.  127^2 D < 2^22 up to
    D = 256.
    """
    if q.shape[1] > 256:
        x = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
    else:
        start = tl.full((q.shape[0], k.shape[1]), lang.ROUNDER_BITS, tl.int32)
        x = tl.dot(q, k, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - lang.ROUNDER
    return x


@triton.jit
def products(q, k):
    """q [M, D] times k [D, N] of one dtype, in float32: INT8 exactly, float32 without TF32."""
    if q.dtype == tl.int8:
        x = int8_products(q, k)
    else:
        x = tl.dot(q, k, input_precision="ieee")
    return x


@triton.jit
def column(table, j):
    """Column j of table [M, G]."""
    chosen = tl.arange(0, table.shape[1])[None, :] == j
    return tl.sum(tl.where(chosen, table, 0.0), 1)


@triton.constexpr_function
def top(dtype):
    """log2 of what the largest probability is stored as: e4m3 uses its whole range."""
    return 8.807354922057604 if dtype == tl.float8e4nv else 0.0


@triton.jit
def probabilities(x, scale, bias, m, TOP: tl.constexpr):
    """2^(scale x + bias - max + TOP) [M, N], the new maximum [M], and the factor of the past [M].

    NaN anywhere in a row makes its probabilities NaN; a row of nothing but -inf has none.
    """
    m_new = tl.maximum(m, scale * tl.max(x, 1) + bias)
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * scale[:, None] + (bias - finite + TOP)[:, None])
    return p, m_new, tl.exp2(m - finite)


@triton.jit
def weighted(p, v, v_scale, acc, total, alpha, PARTIAL: tl.constexpr = tl.float32):
    """acc * alpha + (p v) * v_scale [M, E], and total * alpha + the sum of p [M].

    p is stored in v's dtype; in e4m3 it is summed as stored, so that the division by `total`
    cancels its rounding.  With v_scale [E] the products of one tile are summed, in PARTIAL, before
    the scale reaches them: a second level of accumulation.  float16 sums 64 keys of p <= 1 and
    |v| <= 448 without overflow, at twice the rate of float32 on cards other than sm80, 90, 100.
    """
    stored = p.to(v.dtype)
    if v_scale is None:
        acc = tl.dot(stored, v, acc * alpha[:, None], input_precision="ieee")
    else:
        part = tl.dot(stored, v, out_dtype=PARTIAL).to(tl.float32)
        acc = acc * alpha[:, None] + part * v_scale[None, :]
    if v.dtype == tl.float8e4nv:
        p = stored.to(tl.float32)
    return acc, total * alpha + tl.sum(p, 1)


@triton.jit
def finish(acc, total, m, TOP: tl.constexpr):
    """acc / total [M, E] and the natural log-sum-exp [M]; a row that saw nothing: 0 and -inf."""
    blind = total == 0.0
    out = tl.where(blind[:, None], 0.0, acc / tl.where(blind, 1.0, total)[:, None])
    return out, tl.where(blind, float("-inf"), (m + tl.log2(total) - TOP) * LN_2)
