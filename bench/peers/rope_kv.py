# SPDX-License-Identifier: Apache-2.0
"""Rotations: of the query after its norm, and of every key of the window.

Pairs are (2i, 2i + 1), as in Wan; a library that rotates halves computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.bench.case import Inputs
from reeltime.bench.peers.adapter import Adapter, compiled

EPS = 1e-6
BLOCK = 64  # tokens that share a scale


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """float32 [..., L, H, D] by [..., L, D / 2, 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unsqueeze(-3).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def normed_and_rotated(q: Tensor, table: Tensor, norm_weight: Tensor) -> Tensor:
    """[1, L, C], two tables [2, L, D / 2, 2] -> [2, 1, L, H, D]."""
    y = F.rms_norm(q.float(), q.shape[-1:], norm_weight.float(), EPS)
    heads = y.unflatten(-1, (-1, 2 * table.shape[-2]))
    return rotated(heads, table.unsqueeze(1)).to(q.dtype)


def in_int8(q: Tensor, table: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and in INT8 with a scale [2, 1, nb, H] for each head of BLOCK tokens."""
    y = normed_and_rotated(q, table, norm_weight)
    tiles = F.pad(y.float(), (0, 0, 0, 0, 0, -y.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))
    scale = tiles.abs().amax((3, 5), keepdim=True) / 127  # [2, 1, nb, 1, H, 1]
    low = (tiles / scale).round().to(torch.int8).flatten(2, 3)[:, :, : y.shape[2]]
    return y, low, scale[:, :, :, 0, :, 0]


def keys(k_raw: Tensor, table: Tensor) -> Tensor:
    """[1, T, N, H, D], [T N, D / 2, 2]."""
    flat = rotated(k_raw.flatten(1, 2).float(), table)
    return flat.to(k_raw.dtype).view(k_raw.shape)


def two_tables(inputs: Inputs) -> Inputs:
    """Its cosines and sines have the dtype of the keys."""
    k = inputs["k_raw"]
    cos, sin = (x.to(k.dtype).contiguous() for x in inputs["table"].unbind(-1))
    return {"k_raw": k, "cos": cos, "sin": sin}


def fla(k_raw: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from fla.modules.rotary import rotary_embedding

    flat = rotary_embedding(k_raw.flatten(1, 2), cos, sin, interleaved=True)
    return flat.view(k_raw.shape)


def adapters(op: str) -> Iterator[Adapter]:
    if op == "query":
        yield Adapter("torch", "torch norm and rotation, compiled", compiled(normed_and_rotated))
    if op == "query_int8":
        yield Adapter("torch", "torch norm, rotation and INT8, compiled", compiled(in_int8))
    if op == "rope_on_cache":
        yield Adapter("torch", "torch rotation, compiled", compiled(keys))
        yield Adapter("fla-core", "rotary_embedding", fla, prepare=two_tables)
