# SPDX-License-Identifier: Apache-2.0
"""attention: full precision, every 8-bit recipe, and cached segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reeltime import attention, rope_kv
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import TINY, Case, widest
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact
from reeltime.bench.accuracy.segments import Window
from reeltime.checks import Tolerance

KINDS = ("normal", "outlier_k", "outlier_v", "constant_k", "constant_v", "zero_block",
         "single_token", "ragged", "long", "strided")  # fmt: skip
HEADS, DIM = 2, 64
ONE_VALUE = ("constant_v", "single_token")  # stored exactly, and weights that sum to one return it
SMOOTH = {"block": "block mean", "sequence": "sequence mean", None: "no mean"}
LOW: list[tuple[str | None, ...]] = [
    ("int8", pv, smooth) for pv in (None, "fp16", "fp8") for smooth in SMOOTH
]
LOW += [("fp8", "fp8", smooth) for smooth in SMOOTH] + [
    (None, pv, "block") for pv in ("fp16", "fp8")
]


def equation(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt d) v and its log-sum-exp in float64; q [B, S, H, D], grouped heads."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    score = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[3] ** 0.5
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhlm,bmhd->blhd", score.softmax(-1), v), score.logsumexp(-1)


def tolerance_of(*formats: str | None) -> str:
    return "fp8" if "fp8" in formats else "int8" if "int8" in formats else "float16"


def cases(inputs: Inputs) -> Iterator[Case]:
    queries, keys = inputs.lengths
    q = inputs.draw("q", 1, queries, HEADS, DIM)
    k, v = (inputs.draw(name, 1, keys, HEADS, DIM) for name in "kv")
    for dtype in DTYPES:
        yield from full(inputs, dtype, *(inputs.put(x, dtype) for x in (q, k, v)))
    given = tuple(inputs.put(x) for x in (q, k, v))
    low = tuple(exact(x) for x in given)
    want, _ = equation(*low)
    for qk, pv, smooth in LOW:
        yield from eight_bits(inputs, qk, pv, smooth, given, want)
    for recipe in recipes.ATTENTION:
        yield Case(
            "attention",
            recipe.name,
            lambda r=recipe: r.apply(*low, DIM**-0.5),
            want,
            None,
            recipe.source,
        )
    yield from segments(inputs)


def full(inputs: Inputs, dtype: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    tolerance = attention.TOLERANCE[dtype]
    exact_qkv = (exact(q), exact(k), exact(v))
    rows, columns = q.shape[1], k.shape[1]
    causal = torch.arange(columns) <= torch.arange(rows).unsqueeze(1) + columns - rows
    mask = inputs.normal("mask", 1, HEADS, rows, columns) > 0
    mask[..., 0] = True  # a row that sees nothing has no float64 answer; the tests cover it
    options: dict[str, Any] = {"backend": inputs.backend}

    def run(**more: Any) -> Tensor:
        return attention.attention(q, k, v, **options, **more)

    want, lse = equation(*exact_qkv)
    yield Case("attention", dtype, run, want, tolerance)
    if dtype not in ("float32", "bfloat16"):
        return
    last = lambda: attention.attention(q, k, v, return_lse=True, **options)[1]  # noqa: E731
    yield Case("attention", f"{dtype} lse", last, lse, tolerance)
    seen, _ = equation(*exact_qkv, causal) if rows <= columns else (want, lse)
    yield Case("attention", f"{dtype} causal", lambda: run(causal="bottom_right"), seen, tolerance)
    some, _ = equation(*exact_qkv, mask)
    yield Case("attention", f"{dtype} mask", lambda: run(mask=mask.to(q.device)), some, tolerance)
    shared, _ = equation(exact_qkv[0], *(x[:, :, :1] for x in exact_qkv[1:]))
    yield Case(
        "attention",
        f"{dtype} one key head",
        lambda: attention.attention(q, k[:, :, :1], v[:, :, :1], **options),
        shared,
        tolerance,
    )


def variance(x: Tensor, format: str | None, sizes: dict[int, int]) -> Tensor:
    """Of the rounding of x [B, S, H, D] to a format: its step squared over 12, evenly spread."""
    if format is None:
        return torch.zeros_like(x)
    top = widest(x, sizes)
    if format == "int8":
        return (top / 127).square() / 12
    step = {"fp8": 2**-3, "fp16": 2**-10}[format]
    power = x.abs().clamp(min=TINY).log2().floor().exp2()
    return torch.maximum(step * power, top / 448 * 2**-9).square() / 12


def limit_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    want: Tensor,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
) -> Tolerance:
    """What correct roundings of this very input cost, to first order.

    With p the probabilities, s the scores, and all roundings independent of each other:
    var(out) = sum_j p_j^2 (v_j - out)^2 (var s_j + var p_j / p_j^2) + p_j^2 var v_j
    var s_j = scale^2 sum_d var q_d k_jd^2 + q_d^2 var k_jd, k less its mean
    Relative L1 may be one deviation, where Gaussian errors cost 0.8 of it and truncation 1.1 or
    more.  The largest error may be six; a row whose weight lies on few keys decides it.
    """
    centred = k
    if smooth == "sequence":
        centred = k - k.mean(1, keepdim=True)
    elif smooth == "block":
        parts = k.split(64, 1)
        centred = torch.cat([part - part.mean(1, keepdim=True) for part in parts], 1)
    per_head, per_channel = {1: 64, 3: DIM}, {1: 64}
    var_q, var_k = variance(q, qk, per_head), variance(centred, qk, per_head)
    var_v = variance(v, pv, per_channel)
    score = torch.einsum("blhd,bmhd->bhlm", q, k) * DIM**-0.5
    p = score.softmax(-1)
    var_s = torch.einsum("blhd,bmhd->bhlm", var_q, centred.square())
    var_s = (var_s + torch.einsum("blhd,bmhd->bhlm", q.square(), var_k)) / DIM
    relative = p / p.amax(-1, keepdim=True)
    var_p = variance(relative, pv, {3: relative.shape[3]}) / relative.clamp(min=TINY).square()
    weight = p.square() * (var_s + var_p)
    sums = [torch.einsum("bhlm,bmhd->blhd", weight, x) for x in (v.square(), v, torch.ones_like(v))]
    total = sums[0] - 2 * want * sums[1] + want.square() * sums[2]
    total += torch.einsum("bhlm,bmhd->blhd", p.square(), var_v)
    deviation = total.clamp(min=0).sqrt()
    rms = want.square().mean().sqrt().clamp(min=TINY)
    magnitude = want.abs().sum().clamp(min=TINY)
    least = attention.TOLERANCE["float32"]  # of the arithmetic, where nothing is rounded
    return Tolerance(
        max(least.relative_l1, float(deviation.sum() / magnitude)),
        max(least.peak, 6 * float(deviation.max() / rms)),
    )


def eight_bits(
    inputs: Inputs,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
    given: tuple[Tensor, ...],
    want: Tensor,
) -> Iterator[Case]:
    recipe = f"qk {qk} {SMOOTH[smooth]}" if qk else "qk full"
    limit = attention.TOLERANCE["float32"]
    if inputs.kind not in ONE_VALUE:
        q, k, v = (exact(x) for x in given)
        limit = limit_of(q, k, v, want, qk, pv, smooth)
    yield Case(
        "attention",
        f"{recipe}, pv {pv or 'full'}",
        lambda: attention.attention(*given, qk=qk, pv=pv, smooth=smooth, backend=inputs.backend),
        want,
        # Without smoothing, outlier keys cost what they cost: that is shown, and no pass or fail.
        None if smooth is None and inputs.kind == "outlier_k" else limit,
    )


def segments(inputs: Inputs) -> Iterator[Case]:
    for format, dtype in (("plain", "float64"), ("plain", "float32"), ("plain", "bfloat16"),
                          ("int8", "fp16"), ("int8", "fp8")):  # fmt: skip
        yield from inputs.offered(over_cache(inputs, format, dtype))


def over_cache(inputs: Inputs, format: str, dtype: str) -> Iterator[Case]:
    window = Window(inputs, format, dtype)
    q, q_int8, q_scale = window.queries()
    want, lse = equation(*window.equation())
    recipe = dtype if format == "plain" else f"int8 block mean, v {dtype}"
    tolerance = attention.TOLERANCE["int8" if (format, dtype) == ("int8", "fp16") else dtype]
    if dtype == "float64":  # the window was rotated, and angles at position 1,000,000 are not exact
        tolerance = rope_kv.TOLERANCE[dtype]

    def run(**options: Any) -> Any:
        return attention.segment_attention(
            q, window.cache, *window.lists, backend=inputs.backend, **options
        )

    yield Case("segment_attention", recipe, run, want, tolerance)
    second = lambda: run(return_lse=True)[1]  # noqa: E731
    yield Case("segment_attention", f"{recipe}, lse", second, lse, tolerance)
    if format == "plain":
        return
    given = lambda: run(q_int8=q_int8, q_scale=q_scale)  # noqa: E731
    yield Case("segment_attention", f"{recipe}, q int8 given", given, want, tolerance)
    if (
        dtype == "fp16"
    ):  # with fp8 they would round P as well, which the reference leaves to kernels
        for published in recipes.ATTENTION:
            if "pv fp16" in published.name:
                yield Case(
                    "segment_attention",
                    published.name,
                    lambda r=published: r.apply(*window.equation(), DIM**-0.5),
                    want,
                    None,
                    published.source,
                )
