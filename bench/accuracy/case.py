# SPDX-License-Identifier: Apache-2.0
"""One check: an op on an input against float64, and how far it may be off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reeltime.checks import Tolerance

OURS = "ours"
ROUNDED_ONCE = ("int8", "bfloat16", "float16")
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


def rounding_bound(x: Tensor, format: str, sizes: Mapping[int, int] | None = None) -> Tensor:
    """The most that x may move when it is rounded to `format`, 8 bits over the amax of each block.

    INT8: half a step of amax / 127.  e4m3: 2^-4 of the value, half of a 2^-9 step near zero.
    """
    if format == "int8":
        return widest(x, sizes or {}) / 127 / 2
    if format == "fp8":
        return torch.maximum(x.abs() / 16, widest(x, sizes or {}) / 448 * 2**-10)
    info = torch.finfo(getattr(torch, format))
    # Half a unit in the last place; the power of two that x reaches after the float32 before it.
    power = (x.abs() * (1 + 2**-20)).clamp(min=info.tiny).log2().floor().exp2()
    return power * info.eps / 2


def tolerance(
    stated: Mapping[str, Tolerance],
    format: str,
    want: Tensor,
    sizes: Mapping[int, int] | None = None,
    of: Tensor | None = None,
) -> Tolerance:
    """The family's TOLERANCE, or what a correct rounding of this very input can cost, if more.

    A stated tolerance is for blocks whose largest value is a few times the mean.  An outlier
    widens the step for all of its block: no INT8 kernel can do better than half a step, and none
    may do worse: where a result is rounded once, to INT8 or 16 bits, the largest error is judged
    by that rounding alone, whatever is stated, so that truncation shows.  `of` is what is rounded,
    where it is not the result itself.
    """
    bound = spread = rounding_bound(want if of is None else of, format, sizes)
    if not bound.numel():
        return stated[format]
    if format == "fp8":  # of its relative error the statement knows more than the bound
        near_zero = widest(want, sizes or {}) / 448 * 2**-10
        spread = torch.maximum(stated[format].relative_l1 * want.abs(), near_zero)
    slack = 1.01  # the arithmetic before the rounding is float32
    rms = want.square().mean().sqrt().clamp(min=TINY)
    total = want.abs().sum().clamp(min=TINY)
    relative_l1 = float(spread.sum() / total) * (1 if format == "fp8" else slack)
    peak = slack * float(bound.max() / rms)
    return Tolerance(
        max(stated[format].relative_l1, relative_l1),
        peak if format in ROUNDED_ONCE else max(stated[format].peak, peak),
    )


def unblocked(stored: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
    """8-bit values times the scale of their block, in float64; sizes: block length by dimension."""
    y, full = stored.detach().cpu().double(), scale.detach().cpu().double()
    for dim, size in enumerate(sizes):
        index = torch.arange(y.shape[dim]) // size
        full = full.index_select(dim, index)
    return y * full
