# SPDX-License-Identifier: Apache-2.0
"""What the arguments of rope_kv must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reeltime import checks

if TYPE_CHECKING:
    from reeltime.rope_kv.api import KVCache

TABLE_DTYPES = (torch.float32, torch.float64)


def check_projection(name: str, x: Tensor, num_heads: int, norm_weight: Tensor | None) -> None:
    checks.activation(name, x, 3, "[B, L, C]")
    if num_heads <= 0 or x.shape[2] % num_heads:
        checks.divides("num_heads", num_heads, x.shape[2], f"C of {name}")
    if norm_weight is not None and (
        norm_weight.shape != (x.shape[2],) or norm_weight.device != x.device
    ):
        checks.shape("norm_weight", norm_weight, x.shape[-1:], "[C]")
        checks.device("norm_weight", norm_weight, x, name)


def check_table(table: Tensor, want: tuple[int, ...], layout: str, x: Tensor) -> None:
    if table.shape != want or table.dtype not in TABLE_DTYPES or table.device != x.device:
        checks.shape("table", table, want, layout)
        checks.dtype("table", table, TABLE_DTYPES)
        checks.device("table", table, x, "the tensor it rotates")


def check_even(dim: int) -> None:
    if dim < 2 or dim % 2:
        checks.fail("head_dim", "an even number >= 2", dim, "Pairs are rotated: pad D to even.")


def check_query(
    q: Tensor,
    table: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
    sm_scale: float,
) -> None:
    check_projection("q", q, num_heads, norm_weight)
    checks.positive("eps", eps)
    checks.positive("sm_scale", sm_scale)
    if table is not None:
        checks.tensor("table", table, 4, "[O, L, D / 2, 2]")
        dim = q.shape[2] // num_heads
        check_even(dim)
        want = (table.shape[0], q.shape[1], dim // 2, 2)
        check_table(table, want, "[O, L, D / 2, 2]", q)


def check_write(
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    slots: Tensor,
    table: Tensor | None,
    norm_weight: Tensor | None,
    num_heads: int,
    eps: float,
) -> None:
    check_projection("k", k, num_heads, norm_weight)
    checks.tensor("v", v, 3, "[B, F * N, C]")
    checks.positive("eps", eps)
    checks.tensor("slots", slots, 1, "[F]")
    checks.dtype("slots", slots, (torch.int64,))
    checks.device("slots", slots, k, "k")
    checks.device("cache", cache.k, k, "k")
    batch, _, tokens, heads, dim = cache.k.shape
    if num_heads != heads:
        checks.choice("num_heads", num_heads, (heads,))
    want = (batch, slots.shape[0] * tokens, heads * dim)
    checks.shape("k", k, want, "[B, F * N, C]")
    checks.shape("v", v, want, "[B, F * N, C]")
    checks.dtype("v", v, checks.FLOATS)
    checks.device("v", v, k, "k")
    checks.dense_last("v", v)
    if table is not None:
        check_even(dim)
        check_table(table, (want[1], dim // 2, 2), "[F * N, D / 2, 2]", k)
