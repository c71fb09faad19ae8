# SPDX-License-Identifier: Apache-2.0
"""A call of somebody else's kernel as a peer: our inputs in, a result like ours out.

Its layout and its weights in 8 bits are made beforehand, as ours are; whatever else it needs to
reach the result (activations that it quantises, a copy that keeps it from writing into ours) is
part of the call, and so of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from reeltime.bench.case import Case, Inputs, Judged, Peer, unchanged
from reeltime.bench.peers import libraries
from reeltime.checks import Tolerance

GENEROUS = 2.0  # times the tolerance of our kernels, and only the mean error: beyond it is wrong


@dataclass(frozen=True)
class Adapter:
    """`call` gets what `prepare` returns as keywords."""

    library: str
    name: str
    call: Callable[..., Any]
    dtype: str = ""  # of its products; by default that of the case
    prepare: Callable[[Inputs], Inputs] = unchanged
    asked: bool = True
    gpu: bool = True

    @property
    def title(self) -> str:
        if self.library == "torch":  # whose version every row has
            return self.name
        return f"{self.library} {libraries.version(self.library) or '?'}, {self.name}"

    def peer(
        self,
        key: str,
        dtype: str,
        flops: Mapping[str, float],
        moved: int,
        make: Callable[[torch.device, int], Inputs],
        judge: Callable[[Inputs, Any], Iterator[Judged]] | None,
        form: str = "",
    ) -> Peer:
        def prepare(inputs: Inputs) -> Inputs:
            if self.asked:
                torch.compiler.reset()  # past a few shapes dynamo gives up on a function
            return self.prepare(inputs)

        def run(inputs: Inputs) -> Any:
            return self.call(**inputs)

        return Peer(
            self.title, f"{self.library} {self.name} {key}", self.dtype or dtype, flops, moved,
            make, run, judge, prepare, form, self.library, self.asked, self.gpu,
        )  # fmt: skip


def generous(tolerance: Tolerance) -> Tolerance:
    return Tolerance(GENEROUS * tolerance.relative_l1, math.inf)


def beside(case: Case, adapters: Iterable[Adapter]) -> Case:
    """The case with peers that take its inputs and are judged as it is."""

    def judge(inputs: Inputs, results: Any) -> Iterator[Judged]:
        for one in case.judge(inputs, results):
            yield one._replace(tolerance=generous(one.tolerance))

    def peer(adapter: Adapter) -> Peer:
        dtype = adapter.dtype or case.dtype
        key = f"{case.op} {dtype} {case.form} {case.shape}"
        return adapter.peer(key, dtype, case.flops, case.bytes, case.make, judge, case.form)

    return replace(case, peers=(*case.peers, *map(peer, adapters)))


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best, and never silently the function as it stands: `fullgraph`."""
    made: Callable[..., Any] | None = None

    def run(*args: Any, **inputs: Any) -> Any:
        nonlocal made
        if made is None:
            options: Any = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
            made = torch.compile(call, fullgraph=True, **options)
        return made(*args, **inputs)

    return run
