# SPDX-License-Identifier: Apache-2.0
"""Which place of which model ran what, how often.

A place that was changed calls an op of `torch.ops.reeltime` with its number; the op's
implementation counts when it runs, so that what is counted has run: in eager mode, in a compiled
graph and in an exported one alike.  A CUDA graph is counted when it is captured, not when it is
replayed.

Blocks of a model that are compiled one by one share one graph only if nothing in them differs:
there a place gives the number of its model instead of its own.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch

_numbers = itertools.count(1)
_lock = threading.Lock()
PROCESS = secrets.randbits(30) + 1 << 32  # a graph that is exported may run in another


@dataclass(eq=False)
class Site:
    """One place of a model, or a model as a whole.

    Attributes:
        path: name of the module, "" for the model.
        kind: "linear", "attention", "norm" or "model".
        calls: {what ran: how often}: a backend, or "left: why" where PyTorch's own code ran.
    """

    path: str
    kind: str
    number: int = field(default_factory=lambda: next(_numbers))
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        _sites[self.number] = self

    def __reduce__(self) -> tuple[type[Site], tuple[str, str]]:
        """A copy of a model counts for itself: a new number, nothing counted."""
        return Site, (self.path, self.kind)


_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Place:
    """A site and the model that it stands in."""

    site: Site
    model: Site

    @property
    def number(self) -> int:
        if exporting():
            return self.model.number + PROCESS
        return self.model.number if torch.compiler.is_compiling() else self.site.number


def count(number: int, kind: str, what: str) -> None:
    """One call.  A number of another process, as an exported graph may hold, is nobody's."""
    site = _sites.get(number - PROCESS if number >> 32 else number)
    if site is not None:
        with _lock:
            site.calls[what if site.kind == kind else f"{kind}: {what}"] += 1


def exporting() -> bool:
    """Whether a graph is being exported.  PyTorch's own answer is yes in every compiled function
    before 2.12, so its flag is read, at the making of the graph."""
    return torch.compiler._is_exporting_flag


def tangents() -> bool:
    """Whether forward-mode derivatives may be wanted, also under no_grad: no op of ours has one,
    and PyTorch would drop them in silence.  Compiled graphs are guarded by this level."""
    return torch.autograd.forward_ad._current_level >= 0


# As torch.compiler.assume_constant_result does, which would import dynamo, for a second
tangents._dynamo_marked_constant = True  # type: ignore[attr-defined]
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
