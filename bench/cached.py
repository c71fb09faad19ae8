# SPDX-License-Identifier: Apache-2.0
"""A window of a stream in a cache, the query that sees it, and both in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from reeltime import rope_kv
from reeltime.bench.case import Draw, Inputs
from reeltime.bench.shapes import Sizes, Tokens
from reeltime.model.config import ModelConfig
from reeltime.rope_kv import KVCache
from reeltime.rope_kv.reference import per_token

VALUES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}
MOVED = 3  # latent frames by which the reference is closer than its position says
ROWS = 256  # queries that an oracle takes at once: float64 scores are large


def table(device: torch.device, tokens: Tokens, D: int, *first: int) -> Tensor:
    """[len(first), L, D / 2, 2]: cosines and sines of frames from each position on."""
    starts = torch.tensor(first, device=device).unsqueeze(1)
    return rope_kv.rope_table(starts + torch.arange(tokens.frames, device=device), tokens.grid, D)


def empty(
    device: torch.device,
    tokens: Tokens,
    model: ModelConfig,
    values: str | None,
    summaries: str | None,
) -> KVCache:
    """A slot per frame.  values: None for bf16 keys and values, otherwise INT8 keys and these."""
    return rope_kv.make_cache(
        1, tokens.frames, tokens.per_frame, model.num_heads, model.head_dim,
        format="int8" if values else "plain", dtype=VALUES[values] if values else torch.bfloat16,
        device=device, summaries=summaries,
    )  # fmt: skip


def projections(draw: Draw, tokens: Tokens, model: ModelConfig) -> Inputs:
    """What the layers before a write hand over; slots in any order."""
    D = model.head_dim
    slots = torch.arange(tokens.frames, device=draw.device).roll(1)
    return {
        "k": draw(1, tokens.total, model.dim),
        "v": draw(1, tokens.total, model.dim),
        "slots": slots,
        "table": table(draw.device, tokens, D, 0)[0],
        "norm_weight": 1 + 0.1 * draw(model.dim),
    }


def window(
    device: torch.device, seed: int, sizes: Sizes, values: str | None, summaries: str | None
) -> Inputs:
    """A full cache, two rotations of a chunk's query, and the lists that say who sees what."""
    draw, model = Draw(device, seed), sizes.heads
    written = projections(draw, sizes.window, model)
    cache = empty(device, sizes.window, model, values, summaries)
    options: Any = {"num_heads": model.num_heads, "backend": "reference"}
    rope_kv.write(written.pop("k"), written.pop("v"), cache, **written, **options)
    newest = sizes.window.frames - sizes.chunk.frames
    turns = table(device, sizes.chunk, model.head_dim, newest, newest - MOVED)
    q = draw(1, sizes.chunk.total, model.dim)
    weight = written["norm_weight"]
    rotated, q_int8, q_scale = rope_kv.query(
        q, turns, norm_weight=weight, quantize="int8", **options
    )
    offset_index = torch.zeros_like(written["slots"])
    offset_index[0] = 1  # the reference
    inputs = {"q": rotated, "cache": cache, "block_table": written["slots"]}
    inputs["offset_index"] = offset_index
    return inputs | ({"q_int8": q_int8, "q_scale": q_scale} if values else {})


def wide(cache: KVCache) -> KVCache:
    """The numbers that a cache stands for, in float64 and plain."""
    k, v = cache.k.double(), cache.v.double()
    mean = None if cache.k_mean is None else cache.k_mean.double()
    if cache.k_scale is not None and cache.v_scale is not None and mean is not None:
        tokens = cache.tokens
        k *= per_token(cache.k_scale.double(), tokens, 2).unsqueeze(-1)
        k += per_token(mean, tokens, 2)
        v *= per_token(cache.v_scale.double(), tokens, 2)
    sums = (None if x is None else x.double() for x in (cache.h, cache.z))
    return KVCache(k, v, "plain", cache.phi, None, mean, None, *sums)


def by_rows(length: int, oracle: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """The oracle of rows of queries, one piece at a time."""
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        yield rows, oracle(rows)


def together(length: int, oracle: Callable[[slice], Tensor]) -> Tensor:
    """[1, L, H, D] of oracles of [1, rows, H, D]."""
    return torch.cat([part for _, part in by_rows(length, oracle)], 1)
