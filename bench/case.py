# SPDX-License-Identifier: Apache-2.0
"""One benchmark: an op at a shape, what it must compute, and what stands beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reeltime.checks import Tolerance

Inputs = dict[str, Any]  # tensors by name, or what holds tensors
POISON = 91  # of integers; of floating point, NaN
SEED = 0  # of every input that is judged


class Judged(NamedTuple):
    """One result of an op beside the float64 that it stands for."""

    what: str
    got: Tensor
    want: Tensor
    tolerance: Tolerance


@dataclass(frozen=True)
class Expected:
    """What share of the floor a kernel should reach, written down before it was measured.

    A floor of microseconds is never met: each launch also waits for the last one to drain, for its
    own first loads and for its last stores.
    """

    h200: float
    rtx_5090: float
    why: str
    launches: int = 1

    LATENCY_US = 2.0

    def share(self, card: str, floor_us: float) -> float | None:
        """Of a floor on the card of that name; None of a card that nothing was said about."""
        limit = {"H200": self.h200, "RTX 5090": self.rtx_5090}.get(card)
        if limit is None:
            return None
        return floor_us / (floor_us / limit + self.launches * self.LATENCY_US)

    def times(self, part: float, launches: int = 1) -> Expected:
        """Of a kernel that does something more."""
        return Expected(self.h200 * part, self.rtx_5090 * part, self.why, launches)


def unchanged(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernel for the same work, or one that moves the same bytes.

    Equal keys are measured once in a run.  `prepare` is not timed: weights and lists in a format
    and layout of its own.  Without `judge` it computes nothing that could be judged: a ceiling.
    """

    name: str
    key: str
    dtype: str
    flops: Mapping[str, float]
    bytes: int
    make: Callable[[torch.device, int], Inputs]
    run: Callable[[Inputs], Any]  # of what `prepare` makes of the inputs
    judge: Callable[[Inputs, Any], Iterator[Judged]] | None = None  # of what `make` gives
    prepare: Callable[[Inputs], Inputs] = unchanged
    form: str = ""  # of its case, if it computes exactly that
    library: str = "torch"
    asked: bool = False  # measured only where peers were asked for
    gpu: bool = False  # runs on nothing else


@dataclass(frozen=True)
class Case:
    """An op through the public API."""

    family: str
    op: str  # as it is registered: a key of backends.OPS
    form: str  # which of its forms: blocks, epilogue, sparsity
    shape: str
    dtype: str  # of its matrix products, otherwise of its results
    flops: Mapping[str, float]  # by the dtype whose peak bounds them
    bytes: int  # the fewest that must move
    expected: Expected
    make: Callable[[torch.device, int], Inputs]  # (device, seed)
    run: Callable[[Inputs, str], Any]  # (inputs, backend); what it writes in place is its result
    judge: Callable[[Inputs, Any], Iterator[Judged]]  # (inputs, results)
    peers: tuple[Peer, ...] = ()
    captured: bool = False  # `run` replays graphs of its own, on a working set past any cache

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.op, self.dtype, self.form, self.shape) if part)


class Draw:
    """Independent Gaussians: the same seed and order give the same numbers."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)


# --- What inputs and results hold ---------------------------------------------------------------


def mapped(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(held, Tensor):
        return change(held)
    if isinstance(held, dict):
        return {name: mapped(value, change) for name, value in held.items()}
    if isinstance(held, tuple):
        parts = [mapped(value, change) for value in held]
        return type(held)(*parts) if hasattr(held, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(held) and not isinstance(held, type):
        names = [field.name for field in dataclasses.fields(held)]
        return dataclasses.replace(held, **{n: mapped(getattr(held, n), change) for n in names})
    return held


def tensors(held: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(held, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def clone(inputs: Inputs) -> Inputs:
    return mapped(inputs, Tensor.clone)


def nbytes(*held: Any) -> int:
    """Of distinct memory: what an op writes in place is input and result."""
    sizes = {x.data_ptr(): x.numel() * x.element_size() for part in held for x in tensors(part)}
    return sum(sizes.values())


def poison(held: Any) -> None:
    """NaN into every floating-point tensor, POISON into the others: a result must be written."""
    for x in tensors(held):
        if x.dtype == torch.float8_e4m3fn:
            x.view(torch.uint8).fill_(0x7F)  # NaN; float8 has no fill kernel everywhere
        else:
            x.fill_(float("nan") if x.is_floating_point() else POISON)
