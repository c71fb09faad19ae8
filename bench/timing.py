# SPDX-License-Identifier: Apache-2.0
"""How long a call takes.

On a GPU: a captured graph of many calls, replayed, between CUDA events.  The calls go round several
copies of inputs and outputs, more than twice the L2 cache in all, so that each finds its data in
memory, as in a model; nothing is flushed, since a flush would have to be timed as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[int], object]  # on copy i; returns its result

LEAST_GRAPH_US = 2000.0  # beside the few that it takes to launch a graph
MOST_CALLS = 1024  # of a graph
WARM_UP_US = 20_000.0  # until the clocks have come up
BUDGET_US = 80_000.0
SAMPLES = (12, 100)  # at least, at most
COPIES = 512  # at most


class Times(NamedTuple):
    """Microseconds per call."""

    p50: float
    p20: float
    p80: float


def quantiles(samples: list[float]) -> Times:
    """Of at least one sample; between two samples, linearly."""
    ordered = torch.tensor(samples, dtype=torch.float64)
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Times(*ordered.quantile(points).tolist())


def on_host(call: Call, *, budget_s: float = 0.05, least: int = 5) -> Times:
    """Few repetitions on a CPU: what a kernel costs there is no claim, only a check of the path."""
    call(0)
    samples: list[float] = []
    while len(samples) < least or (sum(samples) < budget_s * 1e6 and len(samples) < SAMPLES[1]):
        before = time.perf_counter()
        call(0)
        samples.append((time.perf_counter() - before) * 1e6)
    return quantiles(samples)


def copies_past_cache(bytes_per_call: int, l2_bytes: int, free_bytes: int) -> int:
    """How many copies of inputs and outputs are more than twice the L2, and fit."""
    size = max(bytes_per_call, 1)
    fitting = max(1, free_bytes // 3 // size)  # results are held as well, and others need room
    return min(max(2, 2 * l2_bytes // size + 1), fitting, COPIES)


class Graph:
    """Calls captured on a stream of their own; `results` are those of the last round.

    The result of a call is held until its copy comes round again, so that outputs take turns in
    memory as the inputs do.
    """

    def __init__(self, call: Call, copies: int, device: torch.device) -> None:
        self.call, self.copies, self.device = call, copies, device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # the first compiles, the second has what the first one cached
                call(0)
        self.stream.synchronize()
        self.capture(copies)

    def capture(self, calls: int) -> None:
        self.calls = calls
        self.results: list[object] = [None] * self.copies
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for n in range(calls):
                self.results[n % self.copies] = self.call(n % self.copies)

    def once(self) -> None:
        self.graph.replay()

    def replay(self, times: int = 1) -> float:
        """Microseconds per replay, after whatever the current stream has been given."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(times):
                self.once()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / times

    def time(self, meanwhile: Callable[[], object] | None = None) -> Times:
        """p50, p20 and p80 over replays; `meanwhile` runs while the GPU is at work."""
        one = self.replay()
        if one < LEAST_GRAPH_US and self.calls < MOST_CALLS:
            rounds = math.ceil(LEAST_GRAPH_US / max(one, 1.0))
            most = max(1, MOST_CALLS // self.copies)
            self.capture(self.copies * min(rounds, most))
            one = self.replay()
        self.replay(max(2, math.ceil(WARM_UP_US / max(one, 1.0))))
        count = min(max(SAMPLES[0], math.ceil(BUDGET_US / max(one, 1.0))), SAMPLES[1])
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        with torch.cuda.stream(self.stream):
            marks[0].record()
            for mark in marks[1:]:
                self.once()
                mark.record()
        if meanwhile is not None:
            meanwhile()
        marks[-1].synchronize()
        pairs = zip(marks, marks[1:], strict=False)
        return quantiles([a.elapsed_time(b) * 1e3 / self.calls for a, b in pairs])


class Replays(Graph):
    """Calls that replay graphs of their own, one after another, as a stream does."""

    def __init__(self, call: Call, device: torch.device) -> None:
        super().__init__(call, 1, device)

    def capture(self, calls: int) -> None:
        self.calls = calls

    def once(self) -> None:
        for _ in range(self.calls):
            self.call(0)
