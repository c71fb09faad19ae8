# SPDX-License-Identifier: Apache-2.0
"""rope_kv: tables and rotations, the query, and everything that a write leaves in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reeltime import rope_kv
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import Case, tolerance, unblocked
from reeltime.bench.accuracy.inputs import Inputs, exact
from reeltime.bench.accuracy.segments import DIM, EPS, HEADS, Window, angles, heads, rotated

KINDS = ("normal", "outlier", "constant", "zero_block", "single_token", "ragged", "long", "strided")
BLOCK = 64
TOKENS, CHANNELS = {-3: BLOCK, -1: DIM}, {-3: BLOCK}  # who shares a scale of [..., N, H, D]


def cases(inputs: Inputs) -> Iterator[Case]:
    for dtype in ("float64", "float32", "bfloat16"):
        yield from inputs.offered(rotations(inputs, dtype))
        yield from inputs.offered(written(inputs, dtype))
    for stored in ("fp16", "fp8"):
        yield from inputs.offered(written_in_8_bits(inputs, stored))


def rotations(inputs: Inputs, dtype: str) -> Iterator[Case]:
    window = Window(inputs, "plain", dtype)
    angle = angles(window.positions, window.grid)
    if dtype != "bfloat16":
        yield Case(
            "rope_table",
            dtype,
            lambda: rope_kv.rope_table(
                window.positions.to(inputs.device), window.grid, DIM, dtype=window.wide
            ),
            torch.stack([angle.cos(), angle.sin()], -1),
            rope_kv.TOLERANCE[dtype],
        )
    x = heads(window.k, None)
    turned = rotated(exact(x), angle)
    limit = tolerance(rope_kv.TOLERANCE, dtype, turned)
    yield Case("apply_rope", dtype, lambda: rope_kv.apply_rope(x, window.table), turned, limit)
    raw = x.unflatten(1, (window.frames, window.tokens))
    yield Case(
        "rope_on_cache",
        dtype,
        lambda: rope_kv.rope_on_cache(raw, window.table, backend=inputs.backend),
        turned.view(raw.shape),
        limit,
    )
    want = window.asked().unsqueeze(1)
    limit = tolerance(rope_kv.TOLERANCE, dtype, want)
    yield Case("query", dtype, lambda: query(window), want, limit)
    if dtype == "float32":
        yield Case(
            "query",
            "int8 per 64 tokens and head",
            lambda: decoded(*window.queries()[1:]),
            want,
            tolerance(rope_kv.TOLERANCE, "int8", want, TOKENS),
        )


def query(window: Window) -> Tensor:
    """The plain query: another op than the quantised one, which `queries` asks."""
    device = window.inputs.device
    table = rope_kv.rope_table(window.asks.to(device), window.grid, DIM, dtype=window.wide)
    return rope_kv.query(
        window.q,
        table,
        num_heads=HEADS,
        norm_weight=window.weight,
        eps=EPS,
        backend=window.inputs.backend,
    )


def decoded(low: Tensor, scale: Tensor) -> Tensor:
    """[..., N, H, D] with a scale [..., nb, H] per block and head, or [..., nb, H, D]."""
    scale = scale if scale.dim() == low.dim() else scale.unsqueeze(-1).expand(*scale.shape, DIM)
    sizes = [BLOCK if dim == low.dim() - 3 else 1 for dim in range(low.dim())]
    return unblocked(low, scale, sizes)


def stored(window: Window, part: Tensor | None) -> Tensor:
    """The written slots of one tensor of the cache, in the order of the frames."""
    assert part is not None
    # index_select has no float8 kernel: bytes are bytes.
    raw = part.view(torch.uint8).index_select(1, window.slots) if part.itemsize == 1 else part
    return raw.view(part.dtype) if part.itemsize == 1 else part.index_select(1, window.slots)


def by_slot(x: Tensor, window: Window) -> Tensor:
    """[1, F * N, H, D] -> [1, F, N, H, D]."""
    return x.unflatten(1, (window.frames, window.tokens))


def written(inputs: Inputs, dtype: str) -> Iterator[Case]:
    def fresh() -> Window:
        return Window(inputs, "plain", dtype, summaries="block")

    window = fresh()
    keys, values = by_slot(window.keys(), window), by_slot(window.values(), window)
    wants = {"k": keys, "v": values, "k_mean": torch.stack(means(keys), 2)}
    features = keys.softmax(-1)
    parts = [(f, v) for f, v in zip(features.split(BLOCK, 2), values.split(BLOCK, 2), strict=True)]
    wants["h"] = torch.stack([torch.einsum("btnhd,btnhe->bthde", f, v) for f, v in parts], 2)
    wants["z"] = torch.stack([f.sum(2) for f, _ in parts], 2)
    for part, want in wants.items():
        kept = "float32" if part in ("h", "z", "k_mean") and dtype == "bfloat16" else dtype
        limit = tolerance(rope_kv.TOLERANCE, kept, want)
        if part in ("h", "z"):
            limit = rope_kv.TOLERANCE[f"{kept} sums"]
        yield Case(
            "write",
            f"plain {dtype}, {part}",
            lambda p=part: stored(w := fresh(), getattr(w.cache, p)),
            want,
            limit,
        )


def means(keys: Tensor) -> list[Tensor]:
    return [block.mean(2) for block in keys.split(BLOCK, 2)]


def written_in_8_bits(inputs: Inputs, v_format: str) -> Iterator[Case]:
    def fresh() -> Window:
        return Window(inputs, "int8", v_format)

    def mean(window: Window) -> Tensor:
        block = torch.arange(window.tokens) // BLOCK
        return exact(stored(window, window.cache.k_mean)).index_select(2, block)

    def read_keys() -> Tensor:
        window = fresh()
        low, scale = (stored(window, x) for x in (window.cache.k, window.cache.k_scale))
        return decoded(low, scale) + mean(window)

    def read_values() -> Tensor:
        window = fresh()
        return decoded(*(stored(window, x) for x in (window.cache.v, window.cache.v_scale)))

    window = fresh()
    keys, values = by_slot(window.keys(), window), by_slot(window.values(), window)
    if v_format == "fp8":
        limit = tolerance(rope_kv.TOLERANCE, "int8", keys, TOKENS, of=keys - mean(window))
        yield Case("write", "k int8 around the block mean", read_keys, keys, limit)
        yield Case(
            "write",
            "k_mean bfloat16",
            lambda: stored(w := fresh(), w.cache.k_mean),
            torch.stack(means(keys), 2),
            rope_kv.TOLERANCE["bfloat16"],
        )
        flat, whole = keys.flatten(1, 2), values.flatten(1, 2)
        yield Case(
            "write",
            "Sage k int8 around the sequence mean",
            lambda: recipes.sage_keys(flat),
            flat,
            None,
            recipes.SAGE,
        )
        yield Case(
            "write",
            "Sage2 v fp8 per channel",
            lambda: recipes.channels_fp8(whole),
            whole,
            None,
            recipes.SAGE,
        )
    format = "fp8" if v_format == "fp8" else "float16"
    limit = tolerance(rope_kv.TOLERANCE, format, values, CHANNELS)
    yield Case("write", f"v {v_format} per block and channel", read_values, values, limit)
