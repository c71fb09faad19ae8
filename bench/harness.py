# SPDX-License-Identifier: Apache-2.0
"""Measure kernels: check against the oracle first, then time, beside peers and the floor.

On a GPU what is judged is what a replayed graph has left in poisoned outputs: a kernel that was not
captured, or writes too little, has no time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from reeltime import arch, backends, checks
from reeltime.arch import UnsupportedArchError
from reeltime.bench import hardware
from reeltime.bench.case import Case, Inputs, Judged, Peer, clone, nbytes, poison
from reeltime.bench.ceilings import Ceilings, measured
from reeltime.bench.rows import Row, ceilings_of, conditions, device_name
from reeltime.bench.sensors import Reading, Sensors
from reeltime.bench.shapes import DIT, TINY, Sizes
from reeltime.bench.timing import Graph, Replays, Times, copies_past_cache, on_host

TIMED = backends.BACKENDS[1:]  # which of them "auto" would take is no property of a kernel
STEP = "step"  # every family at once, on what "auto" takes for each op
LONGEST_ERROR = 400  # characters
Judge = Callable[[Inputs, Any], Iterator[Judged]]


class WrongResultError(RuntimeError):
    """A result is further from its oracle than the family's TOLERANCE."""


def cases(family: str, sizes: Sizes) -> list[Case]:
    """Every benchmark of a family."""
    return list(import_module(f"reeltime.bench.bench_{family}").cases(sizes))


def wanted(device: torch.device, family: str = "") -> tuple[str, ...]:
    """What is timed by default: kernels of ours, and where none runs the reference."""
    if device.type != "cuda":
        return ("reference",)
    return ("auto",) if family == STEP else ("triton", "cuda")


def plan(
    families: Iterable[str], backend: str | None, device: torch.device
) -> dict[str, list[str]]:
    """{family: backends to time}.  None: wanted(device), as far as this build has them.

    Raises:
        ValueError: an unknown backend, or Triton's interpreter, whose time says nothing.
        UnsupportedArchError: none of the families can be served.
    """
    if backend is not None:
        checks.choice("backend", backend, TIMED)
    if backend == "triton" and device.type == "cpu":
        checks.fail("backend", "'reference' on a CPU", "'triton'", "It only interprets there.")
    served: dict[str, list[str]] = {}
    refused = []
    for family in families:
        for name in wanted(device, family) if backend is None else (backend,):
            try:
                if family != STEP:
                    backends.resolve(family, name, device)
                served.setdefault(family, []).append(name)
            except UnsupportedArchError as error:
                refused.append(error)
    if not served:
        raise refused[0]
    return served


def verify(judged: Iterable[Judged]) -> None:
    """Raises WrongResultError: one of the results is out of tolerance, or there are none."""
    count = 0
    for what, got, want, tolerance in judged:
        count += 1
        error = checks.accuracy(got, want)
        if not bool(want.isfinite().all()):
            raise WrongResultError(f"{what}: the oracle itself is not finite")
        if not tolerance.accepts(error):
            raise WrongResultError(
                f"{what}: relative L1 {error.relative_l1:.2e} (at most {tolerance.relative_l1:g}), "
                f"peak {error.peak:.2e} (at most {tolerance.peak:g})"
            )
    if not count:
        raise WrongResultError("no result was judged")


class Run:
    """One run on one device: its ceilings, and the peers that it has measured so far."""

    def __init__(self, device: torch.device, note: Callable[[str], object]) -> None:
        self.device, self.note = device, note
        self.name = device_name(device)
        self.sensors = Sensors(device)
        self.peers: dict[str, Row] = {}
        self.broken: str | None = None  # the call after which the GPU serves nobody any more
        self.card: hardware.Card | None = None
        self.ceilings: Ceilings | None = None
        if device.type == "cuda":
            gc.freeze()  # each capture collects garbage: what was imported is none
            self.card = hardware.find(self.name)
            self.l2 = torch.cuda.get_device_properties(device).L2_cache_size
            with torch.no_grad():
                self.ceilings = measured(device, self.promised(), note)
            if self.sensors.missing:
                note(f"clocks are not recorded: {self.sensors.missing}")

    def promised(self) -> dict[str, float]:
        """Of this card, or of the one that stands for its architecture."""
        if self.card is not None:
            return dict(self.card.tflops)
        try:
            return dict(arch.lookup(torch.cuda.get_device_capability(self.device)).tflops)
        except UnsupportedArchError:
            return {}

    def rows(self, case: Case, backend: str) -> list[Row]:
        """Of the peers that are new, then ours.

        Raises:
            UnsupportedArchError: the backend refuses the case by design.
        """
        if case.family != STEP:
            backends.OPS[case.op]  # a misspelt op is a mistake in the benchmark
        with torch.no_grad():
            ours = self.ours(case, backend)
            fresh = [peer for peer in case.peers if peer.key not in self.peers]
            for peer in fresh:
                self.peers[peer.key] = self.theirs(case, peer)
        best = min(
            (row for peer in case.peers if (row := self.peers[peer.key]).p50_us),
            key=lambda row: row.p50_us or 0.0,
            default=None,
        )
        if best is not None:
            ratio = best.p50_us / ours.p50_us if best.p50_us and ours.p50_us else None
            ours = replace(ours, best_peer=best.backend, ratio=ratio)
        return [*(self.peers[peer.key] for peer in fresh), ours]

    def ours(self, case: Case, backend: str) -> Row:
        row = Row(case.family, case.op, case.form, case.shape, case.dtype, backend, self.name)
        row = self.timed(row, case, lambda inputs: case.run(inputs, backend), case.judge)
        if self.card is not None and row.floor_us is not None:
            share = case.expected.share(self.card.name, row.floor_us)
            row = replace(row, expected_share=share)
        return row

    def theirs(self, case: Case, peer: Peer) -> Row:
        row = Row(case.family, case.op, "", case.shape, peer.dtype, peer.name, self.name)
        return self.timed(row, peer, peer.run, None)

    def timed(
        self, row: Row, work: Case | Peer, call: Callable[[Inputs], Any], judge: Judge | None
    ) -> Row:
        """The row with its time, or with its error."""
        if self.broken:
            return replace(row, error=f"not run: the GPU failed in {self.broken}")
        try:
            captured = isinstance(work, Case) and work.captured
            times, reading = self.measure(work.make, call, judge, captured)
        except UnsupportedArchError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a kernel raises is its row's error
            self.look_after(row)
            message = " ".join(f"{type(error).__name__}: {error}".split())
            return replace(row, error=message[:LONGEST_ERROR])
        flops = dict(work.flops)
        floor = self.ceilings.floor_us(flops, work.bytes) if self.ceilings else None
        return replace(
            row,
            p50_us=times.p50,
            p20_us=times.p20,
            p80_us=times.p80,
            tflops=sum(flops.values()) / times.p50 / 1e6 if flops else None,
            gbps=work.bytes / times.p50 / 1e3,
            floor_us=floor,
            share_of_floor=None if floor is None else floor / times.p50,
            **ceilings_of(flops, self.ceilings),
            **conditions(reading),
        )

    def measure(
        self,
        make: Callable[[torch.device, int], Inputs],
        call: Callable[[Inputs], Any],
        judge: Judge | None,
        captured: bool = False,
    ) -> tuple[Times, Reading]:
        inputs = make(self.device, 0)
        result = call(inputs)
        if self.device.type != "cuda":
            if judge is not None:
                verify(judge(inputs, result))
            return on_host(lambda i: call(inputs)), Reading()
        readings: list[Reading] = []
        if captured:
            if judge is not None:
                verify(judge(inputs, result))
            times = Replays(lambda i: call(inputs), self.device).time(
                lambda: readings.append(self.sensors.read())
            )
            return times, readings[0]
        size = nbytes(inputs, result)
        del result
        torch.cuda.empty_cache()
        copies = copies_past_cache(size, self.l2, torch.cuda.mem_get_info(self.device)[0])
        sets = [inputs, *(clone(inputs) for _ in range(copies - 1))]
        graph = Graph(lambda i: call(sets[i]), copies, self.device)
        if judge is not None:
            poison(graph.results[0])
            graph.replay()
            verify(judge(inputs, graph.results[0]))
        times = graph.time(lambda: readings.append(self.sensors.read()))
        return times, readings[0]

    def look_after(self, row: Row) -> None:
        """An illegal access takes the whole context with it: then nothing more can be measured."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.broken = row.label
            self.note(f"{row.backend}, {row.label}: {error}")


# --- pytest-benchmark ---------------------------------------------------------------------------


def here() -> tuple[torch.device, Sizes]:
    """A GPU with the sizes of the transformer, or the CPU with tiny ones."""
    gpu = torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu"), DIT if gpu else TINY


def with_pytest(benchmark: Any, case: Case) -> None:
    """`pytest bench/bench_<family>.py`: host time of one call, which ends when the device is done.

    `reeltime bench` is what figures come from: no launch and no warm cache is in its times.
    """
    device, _ = here()
    inputs = case.make(device, 0)

    def call() -> Any:
        result = case.run(inputs, "auto")
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        verify(case.judge(inputs, call()))
        benchmark(call)
