# SPDX-License-Identifier: Apache-2.0
"""attention: full precision, every 8-bit recipe, and cached segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reeltime import attention, rope_kv
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import Case
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact
from reeltime.bench.accuracy.segments import Window

KINDS = ("normal", "outlier_k", "outlier_v", "constant_k", "constant_v", "zero_block",
         "single_token", "ragged", "long", "strided")  # fmt: skip
HEADS, DIM = 2, 64
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


def eight_bits(
    inputs: Inputs,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
    given: tuple[Tensor, ...],
    want: Tensor,
) -> Iterator[Case]:
    recipe = f"qk {qk} {SMOOTH[smooth]}" if qk else "qk full"
    limit = attention.TOLERANCE[tolerance_of(qk, pv)]
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
        yield from over_cache(inputs, format, dtype)


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
