# SPDX-License-Identifier: Apache-2.0
"""Every 8-bit path of attention beside the published recipes, to 160k keys; no family of its own.

What differs between ours and theirs: keys lose the mean of their block of 64, which later blocks
never change, where the recipes subtract the mean of the whole sequence; and one scale serves 64
tokens and a head, where SageAttention 2 has one per thread of its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from reeltime import attention, sla
from reeltime.bench.accuracy import attention as plain
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy import sla as sparse
from reeltime.bench.accuracy.case import Case
from reeltime.bench.accuracy.inputs import Inputs, exact
from reeltime.bench.accuracy.segments import Window
from reeltime.bench.accuracy.sla import Rule
from reeltime.checks import Tolerance

KINDS = ("normal", "outlier_k", "outlier_v", "constant_v", "ragged", "160k_keys")
HEADS, DIM = plain.HEADS, plain.DIM
SCALE = DIM**-0.5
QUERIES, KEYS = 128, 64  # of a block of sparse attention
TOP = Rule(topk=0.5)
# What each path is compared with, of the same format for values.
PEERS = {
    ("attention", "qk int8 block mean, pv fp16"): (
        "qk int8 sequence mean, pv fp16",
        "Sage int8 per block, pv fp16",
        "Sage2 int8 per thread, pv fp16",
    ),
    ("attention", "qk int8 block mean, pv fp8"): (
        "qk int8 sequence mean, pv fp8",
        "Sage2 int8 per warp, pv fp8",
        "Sage2 int8 per thread, pv fp8",
    ),
    ("attention", "qk fp8 block mean, pv fp8"): ("qk fp8 sequence mean, pv fp8",),
    ("segment_attention", "int8 cache, v fp16"): (
        "Sage int8 per block, pv fp16",
        "Sage2 int8 per thread, pv fp16",
    ),
    ("segment_attention", "int8 cache, v fp8"): (
        "Sage2 int8 per warp, pv fp8",
        "Sage2 int8 per thread, pv fp8",
    ),
    ("sla", "qk int8 block mean, pv fp16, top 50%"): ("SageSLA int8, pv fp16, top 50%",),
    ("sla", "qk int8 block mean, pv fp8, top 50%"): ("SageSLA int8, pv fp8 fp16-acc, top 50%",),
}
FORMATS = (("int8", "fp16"), ("int8", "fp8"), ("fp8", "fp8"))
VALUES = ("fp16", "fp8")


def cases(inputs: Inputs) -> Iterator[Case]:
    queries, keys = inputs.lengths
    q = inputs.put(inputs.draw("q", 1, queries, HEADS, DIM))
    k, v = (inputs.put(inputs.draw(name, 1, keys, HEADS, DIM)) for name in "kv")
    yield from dense(inputs, q, k, v)
    yield from selected(inputs, q, k, v)
    for values in VALUES:
        yield from inputs.offered(cached(inputs, values))


def limit(family: Any, *formats: str) -> Tolerance:
    """What the family states; `attention` is held to what each input costs, not here."""
    return family.TOLERANCE["fp8" if "fp8" in formats else "int8"]


def published(op: str, want: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    for recipe in recipes.ATTENTION:
        run = lambda r=recipe: r.apply(q, k, v, SCALE)  # noqa: E731
        yield Case(op, recipe.name, run, want, None, recipe.source)


def dense(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    low = (exact(q), exact(k), exact(v))
    want, _ = plain.equation(*low)
    for smooth in ("block", "sequence"):
        for qk, pv in FORMATS:
            yield Case(
                "attention",
                f"qk {qk} {plain.SMOOTH[smooth]}, pv {pv}",
                lambda qk=qk, pv=pv, smooth=smooth: attention.attention(
                    q, k, v, qk=qk, pv=pv, smooth=smooth, backend=inputs.backend
                ),
                want,
                limit(attention, qk, pv),
            )
    yield from published("attention", want, *low)


def selected(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    """Sparse-linear attention on plain tensors, half of the blocks."""
    low = (exact(q), exact(k), exact(v))
    keys, values = (list(x.split(KEYS, 1)) for x in low[1:])
    parts = sparse.equation([low[0]], keys, values, [0] * len(keys), TOP, block_q=QUERIES)
    want = parts.sparse + parts.linear
    blocks: dict[str, Any] = {"block_q": QUERIES, "block_k": KEYS}
    for qk, pv in FORMATS:
        yield Case(
            "sla",
            f"qk {qk} block mean, pv {pv}, top 50%",
            lambda qk=qk, pv=pv: sla.sla(
                q, k, v, topk=TOP.topk, qk=qk, pv=pv, backend=inputs.backend, **blocks
            ),
            want,
            limit(sla, qk, pv),
        )
    for name, pv in (("pv fp16", "fp16"), ("pv fp8 fp16-acc", "narrow")):
        yield Case(
            "sla",
            f"SageSLA int8, {name}, top 50%",
            lambda pv=pv: recipes.turbodiffusion_sla(*low, SCALE, ratio=0.5, pv=pv, **blocks),
            want,
            None,
            recipes.SLA,
        )


def cached(inputs: Inputs, values: str) -> Iterator[Case]:
    """Keys and values written once, by a window of segments, dense and half of the blocks.

    The reference leaves P as it is, which is up to kernels; the recipes round it.
    """
    window = Window(inputs, "int8", values, summaries="slot")
    q = window.queries()[0][:, :, :QUERIES]
    asked, *keys_values = window.equation()
    low = (asked[:, :QUERIES], *keys_values)
    want, _ = plain.equation(*low)
    name = f"int8 cache, v {values}"
    yield Case(
        "segment_attention",
        name,
        lambda: attention.segment_attention(q, window.cache, *window.lists, backend=inputs.backend),
        want,
        limit(attention, "int8", values),
    )
    if values == VALUES[0]:
        yield from published("segment_attention", want, *low)
    yield Case(
        "segment_sla",
        f"{name}, top 50%",
        lambda: sla.segment_sla(
            q, window.cache, *window.lists, topk=TOP.topk, block_q=QUERIES, backend=inputs.backend
        ),
        sparse.segment_equation(window, q, TOP, QUERIES),
        limit(sla, "int8", values),
    )
