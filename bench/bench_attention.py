# SPDX-License-Identifier: Apache-2.0
"""attention: a chunk against a full window, over plain tensors and over the cache.

What is quantised inside of a call is part of its time: all of q, k and v in the plain form; nothing
over a cache, which holds keys and values in 8 bits and gets the query so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reeltime import attention
from reeltime.bench import cached, harness, peers
from reeltime.bench.case import Case, Draw, Expected, Inputs, Judged
from reeltime.bench.shapes import Sizes
from reeltime.checks import Tolerance

# At D = 128 the exponentials of a tile take as long as both of its 8-bit products on sm90.
EXPECTED = {
    "bf16": Expected(0.70, 0.70, "16-bit products take twice as long as the exponentials"),
    "int8, fp16": Expected(0.60, 0.60, "products, conversions and exponentials share issue slots"),
    "int8, fp8": Expected(0.50, 0.60, "bound by exponentials on sm90, by FP8 products on sm120"),
    "fp8, fp8": Expected(0.50, 0.60, "the same, with no conversion of scores"),
}
QUANTISING = 0.95  # of that, where a call also reads, scales and stores q, k and v
TOLERANCE = attention.TOLERANCE
FORMATS = ((None, None), ("int8", "fp16"), ("int8", "fp8"), ("fp8", "fp8"))  # qk, pv


def cases(sizes: Sizes) -> Iterator[Case]:
    for qk, pv in FORMATS:
        yield plain(sizes, qk, pv)
    for values in (None, "fp16", "fp8"):
        yield segments(sizes, values)


def name(qk: str | None, pv: str | None) -> str:
    return f"{qk}, {pv}" if qk else "bf16"


def halves(flops: float, qk: str | None, pv: str | None) -> dict[str, float]:
    """By dtype, as peaks bound it: half of them in each product."""
    first, second = ({"fp16": "bf16", None: "bf16"}.get(x, x) for x in (qk, pv))
    half = flops / 2
    return {str(first): half, str(second): half} if first != second else {str(first): 2 * half}


def tolerance(qk: str | None, pv: str | None, of: dict[str, Tolerance] = TOLERANCE) -> Tolerance:
    return of["fp8" if "fp8" in (qk, pv) else "int8" if qk else "bfloat16"]


def shape_of(sizes: Sizes) -> tuple[int, int, int, int, int]:
    """B, S_q, S_kv, H, D."""
    heads = sizes.heads
    return 1, sizes.chunk.total, sizes.window.total, heads.num_heads, heads.head_dim


def case(sizes: Sizes, op: str, form: str, qk: str | None, pv: str | None, **parts: Any) -> Case:
    shape = _, S_q, S_kv, H, D = shape_of(sizes)
    expected = EXPECTED[name(qk, pv)]
    if qk and op == "attention":
        expected = expected.times(QUANTISING, launches=2)
    return Case(
        "attention", op, form, f"{S_q}x{S_kv}, {H} heads, D {D}", name(qk, pv),
        halves(attention.flops(*shape), qk, pv), expected=expected,
        peers=peers.scaled_dot_product(*shape), **parts,
    )  # fmt: skip


def plain(sizes: Sizes, qk: str | None, pv: str | None) -> Case:
    B, S_q, S_kv, H, D = shape_of(sizes)

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {"q": draw(B, S_q, H, D), "k": draw(B, S_kv, H, D), "v": draw(B, S_kv, H, D)}

    def run(inputs: Inputs, backend: str) -> Any:
        return attention.attention(**inputs, qk=qk, pv=pv, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        q, k, v = (x.double() for x in inputs.values())
        want = cached.together(
            S_q, lambda rows: attention.attention(q[:, rows], k, v, backend="reference")
        )
        yield Judged("out", result, want, tolerance(qk, pv))

    moved = attention.bytes(B, S_q, S_kv, H, D)
    form = "quantised in the call" if qk else ""
    return case(sizes, "attention", form, qk, pv, bytes=moved, make=make, run=run, judge=judge)


def segments(sizes: Sizes, values: str | None) -> Case:
    B, S_q, S_kv, H, D = shape_of(sizes)
    qk = "int8" if values else None

    def make(device: torch.device, seed: int) -> Inputs:
        return cached.window(device, seed, sizes, values, summaries=None)

    def run(inputs: Inputs, backend: str) -> Any:
        return attention.segment_attention(**inputs, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        q, cache = inputs["q"].double(), cached.wide(inputs["cache"])
        lists = inputs["block_table"], inputs["offset_index"]
        want = cached.together(
            S_q,
            lambda rows: attention.segment_attention(
                q[:, :, rows], cache, *lists, backend="reference"
            ),
        )
        yield Judged("out", result, want, tolerance(qk, values))

    stored = {None: (2, 2), "fp16": (1, 2), "fp8": (1, 1)}[values]  # bytes of a key, of a value
    shape = shape_of(sizes)
    moved = sum(attention.bytes(*shape, kv_itemsize=size, offsets=2) for size in stored) // 2
    if values:  # the query in 8 bits beside the one in 16
        moved += 2 * B * S_q * H * D
    return case(
        sizes, "segment_attention", "cached", qk, values, bytes=moved, make=make, run=run,
        judge=judge,
    )  # fmt: skip


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
