# SPDX-License-Identifier: Apache-2.0
"""One check: an op on an input against float64, and how far it may be off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reeltime.checks import Tolerance

OURS = "ours"
TINY = torch.finfo(torch.float64).tiny


class Case(NamedTuple):
    """`run` gives what the op computed; `want` is float64.  No tolerance: shown, not judged."""

    op: str
    recipe: str
    run: Callable[[], Tensor]
    want: Tensor
    tolerance: Tolerance | None = None
    source: str = OURS  # or whose recipe it is


def widest(x: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """At each element, the largest magnitude of its block; sizes: {dimension: block length}."""
    y = x.abs()
    for dim, size in sizes.items():
        if size > 1 and y.numel():
            parts = y.split(size, dim)
            y = torch.cat([part.amax(dim, keepdim=True).expand_as(part) for part in parts], dim)
    return y


def rounding_bound(x: Tensor, format: str, sizes: Mapping[int, int]) -> Tensor:
    """The most that x may move when each block is stored in 8 bits over its amax.

    INT8: half a step of amax / 127.  e4m3: 2^-4 of the value, half of 2^-9 steps near zero.
    """
    amax = widest(x, sizes)
    if format == "int8":
        return amax / 127 / 2
    return torch.maximum(x.abs() / 16, amax / 448 * 2**-10)


def widened(
    tolerance: Tolerance, want: Tensor, bound: Tensor
) -> Tolerance:
    """`tolerance`, or what a correct rounding of this input can cost if that is more.

    TOLERANCE is stated for blocks whose largest value is a few times the mean.  An outlier widens
    the step for all of its block, and no INT8 kernel can do better than half a step.
    """
    slack = 1.001  # scales are float32
    rms = want.square().mean().sqrt().clamp(min=TINY)
    total = want.abs().sum().clamp(min=TINY)
    return Tolerance(
        max(tolerance.relative_l1, slack * float(bound.sum() / total)),
        max(tolerance.peak, slack * float(bound.max() / rms) if bound.numel() else 0.0),
    )


def unblocked(stored: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
    """8-bit values times the scale of their block, in float64; sizes: block length by dimension."""
    y, full = stored.detach().cpu().double(), scale.detach().cpu().double()
    for dim, size in enumerate(sizes):
        index = torch.arange(y.shape[dim]) // size
        full = full.index_select(dim, index)
    return y * full
