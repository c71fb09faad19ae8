# SPDX-License-Identifier: Apache-2.0
"""rope_kv: the query of a pass, and keys and values written once.  Bound by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reeltime import rope_kv
from reeltime.bench import cached, harness, peers
from reeltime.bench.case import Case, Draw, Expected, Inputs, Judged
from reeltime.bench.shapes import Sizes, Tokens
from reeltime.model.config import ModelConfig
from reeltime.rope_kv.reference import per_token

EXPECTED = {
    "query": Expected(0.85, 0.85, "RMSNorm over the full width before the first store"),
    "query_int8": Expected(0.80, 0.80, "and a maximum over 64 tokens of a head"),
    "write": Expected(0.80, 0.80, "statistics of 64 tokens before the first store"),
    "write, block": Expected(0.65, 0.60, "a product of 64 tokens per head, stored in float32"),
    "write, slot": Expected(0.25, 0.25, "those of blocks written, and read again", launches=2),
    "rope_on_cache": Expected(0.92, 0.92, "a rotation in registers, nothing to reduce"),
}
TOLERANCE = rope_kv.TOLERANCE


def cases(sizes: Sizes) -> Iterator[Case]:
    model = sizes.heads
    for tokens in sizes.rows:
        yield query(tokens, model, None)
        yield query(tokens, model, "int8")
        yield write(tokens, model, None)
        yield write(tokens, model, "fp8")
        yield write(tokens, model, "fp8", "slot")
        if tokens == sizes.chunk:
            yield write(tokens, model, None, "slot")
            yield write(tokens, model, "fp8", "block")
            yield write(tokens, model, "fp16")
    yield rope_on_cache(sizes.window, model)


def case(op: str, form: str, tokens: Tokens, dtype: str, **parts: Any) -> Case:
    kept = [word for word in ("block", "slot") if word in form]
    expected = EXPECTED[", ".join([op, *kept])]
    moved = parts["bytes"]
    found = Case(
        "rope_kv", op, form, dtype=dtype, expected=expected, peers=peers.copying(moved), **parts
    )
    return peers.beside(found, peers.rope_kv.adapters(op))


def query(tokens: Tokens, model: ModelConfig, quantize: str | None) -> Case:
    """Two rotations: the history's, and the reference's."""
    L, H, D = tokens.total, model.num_heads, model.head_dim

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        weight = 1 + 0.1 * draw(model.dim)
        turns = cached.table(device, tokens, D, 18, 15)
        return {"q": draw(1, L, model.dim), "table": turns, "norm_weight": weight}

    def run(inputs: Inputs, backend: str) -> Any:
        return rope_kv.query(**inputs, num_heads=H, quantize=quantize, backend=backend)

    def judge(inputs: Inputs, results: Any) -> Iterator[Judged]:
        wide = {name: x.double() for name, x in inputs.items()}
        want = rope_kv.query(**wide, num_heads=H, backend="reference")
        if quantize is None:
            yield Judged("q", results, want, TOLERANCE["bfloat16"])
            return
        rotated, low, scale = results
        yield Judged("q", rotated, want, TOLERANCE["bfloat16"])
        got = low.double() * per_token(scale.double(), L, 2).unsqueeze(-1)
        yield Judged("q int8", got, want, TOLERANCE["int8"])

    moved = rope_kv.bytes(1, L, H, D, op="query", offsets=2)
    if quantize:
        moved += 2 * L * H * D + 2 * 4 * -(-L // 64) * H
    return case(
        "query_int8" if quantize else "query", "2 rotations", tokens, quantize or "bf16",
        shape=f"{L}x{model.dim}", flops={"fp32": rope_kv.flops(1, L, H, D, offsets=2)},
        bytes=moved, make=make, run=run, judge=judge,
    )  # fmt: skip


def write(
    tokens: Tokens, model: ModelConfig, values: str | None, summaries: str | None = None
) -> Case:
    L, H, D = tokens.total, model.num_heads, model.head_dim
    format = "int8" if values else "plain"

    def make(device: torch.device, seed: int) -> Inputs:
        inputs = cached.projections(Draw(device, seed), tokens, model)
        return inputs | {"cache": cached.empty(device, tokens, model, values, summaries)}

    def run(inputs: Inputs, backend: str) -> Any:
        rope_kv.write(**inputs, num_heads=H, backend=backend)
        return inputs["cache"]

    def judge(inputs: Inputs, cache: Any) -> Iterator[Judged]:
        given = {n: x.double() for n, x in inputs.items() if n not in ("cache", "slots")}
        oracle = rope_kv.make_cache(
            1, tokens.frames, tokens.per_frame, H, D, dtype=torch.float64,
            device=cache.k.device, summaries=summaries or "block",
        )  # fmt: skip
        options: Any = {"num_heads": H, "backend": "reference"}
        rope_kv.write(**given, cache=oracle, slots=inputs["slots"], **options)
        got = cached.wide(cache)
        stored = {"fp16": "float16", None: "bfloat16"}.get(values, values)
        yield Judged("k", got.k, oracle.k, TOLERANCE["int8" if values else "bfloat16"])
        yield Judged("v", got.v, oracle.v, TOLERANCE[str(stored)])
        means = "bfloat16" if values else "float32"
        for name, kept in (("k_mean", means), ("h", "float32 sums"), ("z", "float32 sums")):
            part, want = getattr(got, name), getattr(oracle, name)
            if part is not None:
                yield Judged(name, part, want, TOLERANCE[kept])

    flops: dict[str, float] = {"fp32": rope_kv.flops(1, L, H, D)}
    if summaries:
        flops["bf16"] = 2 * L * H * D * D
    forms = [f"v {values}"] * bool(values) + [f"summaries per {summaries}"] * bool(summaries)
    return case(
        "write", ", ".join(forms), tokens, format if values else "bf16",
        shape=f"{L}x{model.dim}", flops=flops,
        bytes=rope_kv.bytes(
            1, L, H, D, op="write", format=format, summaries=summaries, slots=tokens.frames
        ),
        make=make, run=run, judge=judge,
    )  # fmt: skip


def rope_on_cache(window: Tokens, model: ModelConfig) -> Case:
    """The published way: every key of the window, for every chunk."""
    H, D = model.num_heads, model.head_dim
    shape = (1, window.frames, window.per_frame, H, D)

    def make(device: torch.device, seed: int) -> Inputs:
        turns = cached.table(device, window, D, 0)[0]
        return {"k_raw": Draw(device, seed)(*shape), "table": turns}

    def run(inputs: Inputs, backend: str) -> Tensor:
        return rope_kv.rope_on_cache(**inputs, backend=backend)

    def judge(inputs: Inputs, result: Tensor) -> Iterator[Judged]:
        wide = {name: x.double() for name, x in inputs.items()}
        yield Judged("k", result, run(wide, "reference"), TOLERANCE["bfloat16"])

    return case(
        "rope_on_cache", "", window, "bf16", shape=f"{window.total}x{model.dim}",
        flops={"fp32": 3 * window.total * H * D},
        bytes=rope_kv.bytes(1, window.total, H, D, op="rope_on_cache"),
        make=make, run=run, judge=judge,
    )  # fmt: skip


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
