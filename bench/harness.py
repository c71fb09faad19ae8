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
from reeltime.bench.case import SEED, Case, Inputs, Judged, Peer, clone, nbytes, poison
from reeltime.bench.ceilings import Ceilings, measured
from reeltime.bench.peers.libraries import Found
from reeltime.bench.rows import Row, ceilings_of, conditions, device_name
from reeltime.bench.sensors import Reading, Sensors
from reeltime.bench.shapes import DIT, TINY, Sizes
from reeltime.bench.timing import Graph, Replays, Times, copies_past_cache, on_host

TIMED = backends.BACKENDS[1:]  # which of them "auto" would take is no property of a kernel
STEP = "step"  # every family at once, on what "auto" takes for each op
LONGEST_ERROR = 400  # characters
Judge = Callable[[Inputs, Any], Iterator[Judged]]


class WrongResultError(RuntimeError):
    """A result is further from its oracle than its tolerance."""

    def __init__(self, message: str, relative_l1: float | None = None) -> None:
        super().__init__(message)
        self.relative_l1 = relative_l1


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


def verify(judged: Iterable[Judged]) -> float:
    """The worst relative L1 of the results.

    Raises:
        WrongResultError: one of them is out of tolerance, or there are none.
    """
    errors: list[float] = []
    for what, got, want, tolerance in judged:
        error = checks.accuracy(got, want)
        errors.append(error.relative_l1)
        if not bool(want.isfinite().all()):
            raise WrongResultError(f"{what}: the oracle itself is not finite")
        if not tolerance.accepts(error):
            raise WrongResultError(
                f"{what}: relative L1 {error.relative_l1:.2e} (at most {tolerance.relative_l1:g}), "
                f"peak {error.peak:.2e} (at most {tolerance.peak:g})",
                error.relative_l1,
            )
    if not errors:
        raise WrongResultError("no result was judged")
    return max(errors)


class Run:
    """One run on one device: its ceilings, and the peers that it has measured so far.

    against: libraries that were asked for; without any, the few of PyTorch that cost no time.
    """

    def __init__(
        self, device: torch.device, note: Callable[[str], object], against: Iterable[Found] = ()
    ) -> None:
        self.device, self.note = device, note
        self.libraries = {found.name for found in against if found.why is None}
        self.away: set[str] = set()  # peers that were asked for and need a GPU
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

    def chosen(self, case: Case) -> list[Peer]:
        """The peers of a case that this run measures."""
        here = [peer for peer in case.peers if not peer.asked or peer.library in self.libraries]
        if self.device.type == "cuda":
            return here
        self.away |= {peer.name for peer in here if peer.gpu}
        return [peer for peer in here if not peer.gpu]

    def rows(self, case: Case, backend: str) -> list[Row]:
        """Of the peers that are new, then ours.

        Raises:
            UnsupportedArchError: the backend refuses the case by design.
        """
        if case.family != STEP:
            backends.OPS[case.op]  # a misspelt op is a mistake in the benchmark
        peers = self.chosen(case)
        with torch.no_grad():
            ours = self.ours(case, backend)
            fresh = [peer for peer in peers if peer.key not in self.peers]
            for peer in fresh:
                self.peers[peer.key] = self.theirs(case, peer)
        best = fastest(self.peers[peer.key] for peer in peers)
        if best is not None:
            ratio = best.p50_us / ours.p50_us if best.p50_us and ours.p50_us else None
            ours = replace(
                ours, best_peer=best.backend, ratio=ratio, peer_relative_l1=best.relative_l1
            )
        return [*(self.peers[peer.key] for peer in fresh), ours]

    def ours(self, case: Case, backend: str) -> Row:
        row = Row(case.family, case.op, case.form, case.shape, case.dtype, backend, self.name)

        def run(inputs: Inputs) -> Any:
            return case.run(inputs, backend)

        row = self.timed(row, case, case.make, run, case.judge)
        if self.card is not None and row.floor_us is not None:
            share = case.expected.share(self.card.name, row.floor_us)
            row = replace(row, expected_share=share)
        return row

    def theirs(self, case: Case, peer: Peer) -> Row:
        row = Row(case.family, case.op, peer.form, case.shape, peer.dtype, peer.name, self.name)

        def make(device: torch.device, seed: int) -> Inputs:
            return peer.prepare(peer.make(device, seed))

        def judge(_: Inputs, results: Any) -> Iterator[Judged]:
            """By inputs made anew: a peer may have written into its own."""
            assert peer.judge is not None
            return peer.judge(peer.make(self.device, SEED), results)

        row = self.timed(row, peer, make, peer.run, judge if peer.judge else None)
        if row.error is not None and row.relative_l1 is not None:
            row = replace(row, error=f"wrong: {row.error}")
        return row

    def timed(
        self,
        row: Row,
        work: Case | Peer,
        make: Callable[[torch.device, int], Inputs],
        call: Callable[[Inputs], Any],
        judge: Judge | None,
    ) -> Row:
        """The row with its time, or with its error."""
        if self.broken:
            return replace(row, error=f"not run: the GPU failed in {self.broken}")
        try:
            captured = isinstance(work, Case) and work.captured
            times, reading, error = self.measure(make, call, judge, captured)
        except UnsupportedArchError:
            raise
        except WrongResultError as wrong:
            return replace(row, relative_l1=wrong.relative_l1, error=str(wrong))
        except Exception as raised:  # noqa: BLE001  whatever a kernel raises is its row's error
            self.look_after(row)
            message = " ".join(f"{type(raised).__name__}: {raised}".split())
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
            relative_l1=error,
            **ceilings_of(flops, self.ceilings),
            **conditions(reading),
        )

    def measure(
        self,
        make: Callable[[torch.device, int], Inputs],
        call: Callable[[Inputs], Any],
        judge: Judge | None,
        captured: bool = False,
    ) -> tuple[Times, Reading, float | None]:
        """Its time, the sensors meanwhile, and its relative L1 if it is judged."""
        inputs = make(self.device, SEED)
        result = call(inputs)
        error: float | None = None
        if judge is not None and (captured or self.device.type != "cuda"):
            error = verify(judge(inputs, result))
        if self.device.type != "cuda":
            return on_host(lambda i: call(inputs)), Reading(), error
        readings: list[Reading] = []
        if captured:
            times = Replays(lambda i: call(inputs), self.device).time(
                lambda: readings.append(self.sensors.read())
            )
            return times, readings[0], error
        size = nbytes(inputs, result)
        del result
        torch.cuda.empty_cache()
        copies = copies_past_cache(size, self.l2, torch.cuda.mem_get_info(self.device)[0])
        sets = [inputs, *(clone(inputs) for _ in range(copies - 1))]
        graph = Graph(lambda i: call(sets[i]), copies, self.device)
        if judge is not None:
            poison(graph.results[0])
            graph.replay()
            error = verify(judge(inputs, graph.results[0]))
        times = graph.time(lambda: readings.append(self.sensors.read()))
        return times, readings[0], error

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


def fastest(rows: Iterable[Row]) -> Row | None:
    """Of those whose result was judged; a ceiling only where nobody computes the same."""
    timed = [row for row in rows if row.p50_us]
    right = [row for row in timed if row.relative_l1 is not None]
    return min(right or timed, key=lambda row: row.p50_us or 0.0, default=None)


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
    inputs = case.make(device, SEED)

    def call() -> Any:
        result = case.run(inputs, "auto")
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        verify(case.judge(inputs, call()))
        benchmark(call)
