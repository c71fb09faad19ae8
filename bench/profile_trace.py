# SPDX-License-Identifier: Apache-2.0
"""What a trace of one chunk says: every op in every phase, and the gaps between them.

The trace is that of torch.profiler, as chrome://tracing and Perfetto read it.  On a CPU an op is
the outermost call inside a phase; what no op covers is Python.  On a GPU it is the kernels that
such a call launches; what no kernel covers is the GPU waiting.  Kernels of a replayed graph were
launched by no call: they bear the names of the same chunk run eagerly, kernel by kernel.

    chunk = sum over phases of (ops + gaps), phase "other" being what lies between the others
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reeltime import backends

CHUNK, OTHER = "chunk", "other"
HOST = ("cpu_op", "user_annotation")
LAUNCHES = ("cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
VARIANTS = ("_quantized", "_requantized", "_int8")  # of one op, by the format of its result
Event = dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """What ran at a time.  No two overlap: one that begins early counts from the other's end."""

    op: str  # "norm", "rope_kv.write", "linear 192 -> 768"
    kernel: str  # on a GPU
    call: int  # kernels of one call have one number
    start_us: float  # since the chunk began
    us: float


@dataclass(frozen=True)
class Run:
    """One run of a phase; of OTHER, all that is in none."""

    phase: str
    start_us: float
    us: float
    slices: tuple[Slice, ...]

    @property
    def ops_us(self) -> float:
        return sum(x.us for x in self.slices)

    @property
    def gap_us(self) -> float:
        return self.us - self.ops_us

    def gaps(self) -> Iterator[tuple[float, float]]:
        """(start, microseconds) of each."""
        end = self.start_us
        for x in self.slices:
            if x.start_us > end:
                yield end, x.start_us - end
            end = x.start_us + x.us
        if self.start_us + self.us > end:
            yield end, self.start_us + self.us - end


def op_name(event: Event) -> str:
    """A matrix product also bears its sizes: each has a floor of its own."""
    name = event["name"].removeprefix("aten::")
    if name.startswith("reeltime::"):  # a kernel of ours behind its registered op
        name = name.removeprefix("reeltime::")
        name = f"{backends.OPS[name].family}.{name}"
    for ending in VARIANTS:
        name = name.removesuffix(ending)
    room, _, op = name.partition(".")
    if room == op:  # "norm.norm"
        name = op
    dims = event.get("args", {}).get("Input Dims", [])
    if name in ("linear", "gemm_w8a8") and len(dims) > 1 and len(dims[1]) == 2:
        rows, columns = dims[1]  # of the weight
        name += f" {columns} -> {rows}"
    return name


def family(op: str) -> str:
    """Of ours, "gemm" for PyTorch's linear layers, or "torch"."""
    found = op.replace(" ", ".").partition(".")[0]
    if found in backends.FAMILIES:
        return found
    return "gemm" if op.startswith("linear") else "torch"


def end(event: Event) -> float:
    return event["ts"] + event["dur"]


def chunk_of(events: Iterable[Event]) -> Event:
    """The last one's range on the host."""
    found = [e for e in events if e["name"] == CHUNK and e.get("cat") == "user_annotation"]
    if not found:
        raise ValueError("trace: expected a range named 'chunk', found none")
    return max(found, key=end)


def read(events: Iterable[Event], phases: Sequence[str], gpu: bool) -> list[Run]:
    """Runs of phases in their order, OTHER last.

    Raises:
        ValueError: no range "chunk" in the trace, or nothing in it.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    complete.sort(key=lambda e: (e["ts"], -e["dur"]))
    chunk = chunk_of(complete)
    opened, calls, busy = [], [], chunk["ts"]
    for e in complete:
        if e.get("cat") not in HOST or e["tid"] != chunk["tid"] or e is chunk:
            continue
        if e["ts"] < chunk["ts"] or e["ts"] >= end(chunk):
            continue
        if e["cat"] == "user_annotation" and e["name"] in phases:
            opened.append(e)
        elif e["ts"] >= busy:  # or it is part of the call before
            calls.append(e)
            busy = end(e)
    if gpu:
        return on_device(complete, chunk, opened, calls)
    found = [(place(opened, e["ts"]), op_name(e), "", n, e["ts"], e["dur"])
             for n, e in enumerate(calls)]  # fmt: skip
    windows = [(e["ts"], end(e)) for e in opened]
    return gathered(found, [e["name"] for e in opened], windows, (chunk["ts"], end(chunk)))


def place(ranges: Sequence[Event], ts: float) -> int:
    """Which of the ranges, one after another, holds this time; -1: none."""
    index = bisect_right(ranges, ts, key=lambda e: e["ts"]) - 1
    return index if index >= 0 and ts < end(ranges[index]) else -1


Found = tuple[int, str, str, int, float, float]  # run, op, kernel, call, start, microseconds


def on_device(
    complete: Sequence[Event], chunk: Event, opened: Sequence[Event], calls: Sequence[Event]
) -> list[Run]:
    """Of kernels: each belongs to the call that launched it."""
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in complete
        if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    found: list[Found] = []
    for e in complete:
        at = launched.get(e.get("args", {}).get("correlation"))
        if e.get("cat") not in DEVICE or at is None or not chunk["ts"] <= at < end(chunk):
            continue
        call = place(calls, at)
        op = op_name(calls[call]) if call >= 0 else ""
        found.append((place(opened, at), op, e["name"], call, e["ts"], e["dur"]))
    if not found:
        raise ValueError("trace: expected kernels of a GPU, found none")
    windows = []
    for index in range(len(opened)):
        mine = [(start, start + us) for run, *_, start, us in found if run == index]
        times = mine or [(found[0][4], found[0][4])]
        windows.append((min(a for a, _ in times), max(b for _, b in times)))
    whole = (found[0][4], max(start + us for *_, start, us in found))
    return gathered(found, [e["name"] for e in opened], windows, whole)


def gathered(
    found: Sequence[Found],
    names: Sequence[str],
    windows: Sequence[tuple[float, float]],
    whole: tuple[float, float],
) -> list[Run]:
    zero = busy = whole[0]
    slices: dict[int, list[Slice]] = {}
    for run, op, kernel, call, start, us in found:
        begin, stop = max(start, busy), max(start + us, busy)
        slices.setdefault(run, []).append(Slice(op, kernel, call, begin - zero, stop - begin))
        busy = stop
    runs = [
        Run(name, a - zero, b - a, tuple(slices.get(index, ())))
        for index, (name, (a, b)) in enumerate(zip(names, windows, strict=True))
    ]
    rest = whole[1] - whole[0] - sum(run.us for run in runs)
    return [*runs, Run(OTHER, 0.0, rest, tuple(slices.get(-1, ())))]


def named_by(replayed: Sequence[Run], eager: Sequence[Run]) -> list[Run]:
    """Replayed kernels with the ops of the eager run.

    A run whose kernels are not the same ones in the same order keeps their own names.
    """
    found = []
    for run, like in zip(replayed, eager, strict=True):
        pairs = list(zip(run.slices, like.slices, strict=False))
        same = len(run.slices) == len(like.slices) and all(a.kernel == b.kernel for a, b in pairs)
        if same:
            slices = tuple(replace(a, op=b.op or b.kernel, call=b.call) for a, b in pairs)
        else:
            slices = tuple(replace(a, op=a.op or a.kernel, call=n)
                           for n, a in enumerate(run.slices))  # fmt: skip
        found.append(replace(run, slices=slices))
    return found


def document(events: Iterable[Event]) -> dict[str, Any]:
    """The last chunk alone, from time 0, without the machine's name and folders."""
    events = list(events)
    chunk = chunk_of(events)
    kept = [
        {**e, "ts": round(e["ts"] - chunk["ts"], 3)}
        for e in events
        if e.get("ph") in ("X", "s", "f") and e["ts"] >= chunk["ts"] and e.get("cat") != "Trace"
    ]
    names = [e for e in events if e.get("ph") == "M"]
    return {"traceEvents": names + kept, "displayTimeUnit": "ms"}
