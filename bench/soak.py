# SPDX-License-Identifier: Apache-2.0
"""A stream for a long time: is its last chunk as fast as the first, and in the same memory?

    python -m reeltime.bench.soak --chunks 1000 --out out/soak.json --picture out/soak.png
    python -m reeltime.bench.soak --preset wan-1.3b-540p --quality int8+sla --chunks 1000 ...
    python -m reeltime.bench.soak --preset wan-1.3b-540p --preset wan-1.3b-480p \\
        --window 21 --window 12 --quality bf16 --quality int8 --chunks 5 --out out/memory.json

Each combination is a row: time per chunk, the memory that PyTorch had at most beside the plan of
model/memory_plan.py, and what a process grew by.  By default the miniature on a CPU, wan-1.3b with
random weights on a GPU, where every pass is a replay of a captured graph (--eager: is not).

Exit code 1 if memory grew, the last fifth of the chunks is slower than the second, or a combination
did not run; 2: bad input.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from reeltime import checks
from reeltime.bench import profile, rows
from reeltime.bench.plan import Target
from reeltime.bench.profile import CHUNK, Rig, Setting, clocked
from reeltime.bench.sensors import Sensors
from reeltime.bench.timing import quantiles
from reeltime.model.quality import Quality, named
from reeltime.model.step import CAPTURES

DRIFT = 1.1  # of the time per chunk, last fifth over second
GROWTH = 16 * 2**20  # bytes of the process, which Python and the driver may take for themselves
LOOKS = 50  # at memory, over all chunks
CPU_PRESET, GPU_PRESET = profile.MINIATURE.preset, "wan-1.3b-540p"


@dataclass
class Row:
    """One stream.  Bytes; None: not measured here."""

    device: str
    preset: str
    width: int
    height: int
    window: int
    quality: str
    captured: bool
    chunks: int
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    worst_ms: float | None = None
    fps: float | None = None
    drift: float | None = None  # time of the last fifth over that of the second
    planned: int | None = None  # weights, caches, buffers and workspace
    measured: int | None = None  # the same, as PyTorch's allocator counted it
    reserved: int | None = None  # what the allocator had of the device, graphs included
    device_growth: int | None = None  # of what it had, over the last four fifths
    host_growth: int | None = None  # of the process
    steady: bool | None = None
    error: str | None = None
    clocks: dict[str, Any] = field(default_factory=dict)
    ms: list[float] = field(default_factory=list)  # of every chunk
    memory: list[dict[str, Any]] = field(default_factory=list)  # chunk, host, device

    @property
    def label(self) -> str:
        how = "captured" if self.captured else "eager"
        size = f"{self.width} x {self.height}, window {self.window}"
        return f"{self.preset}, {size}, {self.quality}, {how}"


def resident() -> int | None:
    """Bytes of this process in memory; None where the system has no /proc."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return None
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(values: Sequence[int | None]) -> int | None:
    """From the end of the first fifth to the last value."""
    first, last = values[len(values) // 5], values[-1]
    return None if first is None or last is None else last - first


def settle(row: Row, frames: int) -> None:
    """What the chunks say, once they are over."""
    fifth = max(1, len(row.ms) // 5)
    times = quantiles(row.ms)
    row.p50_ms, row.p20_ms, row.p80_ms = times.p50, times.p20, times.p80
    row.worst_ms, row.fps = max(row.ms), 1e3 * frames / times.p50
    row.drift = median(row.ms[-fifth:]) / median(row.ms[fifth : 2 * fifth] or row.ms)
    row.host_growth = grown([look["host"] for look in row.memory])
    row.device_growth = grown([look["device"] for look in row.memory])
    row.steady = (
        row.drift <= DRIFT and (row.host_growth or 0) <= GROWTH and not (row.device_growth or 0)
    )


def soak(
    target: Target,
    setting: Setting,
    device: torch.device,
    chunks: int,
    seconds: float = math.inf,
) -> Row:
    """Run it, no longer than that.  Whatever it raises is the row's error."""
    width, height = target.size
    name = rows.device_name(device) or "host"
    row = Row(
        name, target.preset, width, height, target.window, setting.level.name, setting.captured,
        chunks,
    )  # fmt: skip
    try:
        run(row, target, setting, device, time.monotonic() + seconds)
    except Exception as error:  # noqa: BLE001  the other rows are still worth having
        row.error = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return row


def untimed(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def run(row: Row, target: Target, setting: Setting, device: torch.device, deadline: float) -> None:
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    rig = Rig(target, setting, device)
    row.planned = rig.step.memory_plan().peak
    if gpu:
        row.measured = most_allocated(rig) - before
    every = max(1, row.chunks // LOOKS)
    for chunk in range(row.chunks):
        times: list[dict[str, float]] = []
        clocked(rig, 1, times)
        row.ms.append(times[0][CHUNK])
        last = chunk == row.chunks - 1 or time.monotonic() > deadline
        if chunk % every == 0 or last:
            held = torch.cuda.memory_reserved(device) if gpu else None
            row.memory.append({"chunk": chunk, "host": resident(), "device": held})
        if last:
            break
    row.chunks = len(row.ms)
    row.reserved = row.memory[-1]["device"]
    rig.chunk(untimed)  # and the sensors while it runs
    read = asdict(Sensors(device).read())
    row.clocks = {name: value for name, value in read.items() if value is not None}
    settle(row, target.frames)


def most_allocated(rig: Rig) -> int:
    """Of a chunk run eagerly, which allocates what the graphs hold in a pool of their own."""
    graphs, rig.step.graphs = rig.step.graphs, {}
    torch.cuda.reset_peak_memory_stats(rig.device)
    rig.chunk(untimed)
    torch.cuda.synchronize(rig.device)
    rig.step.graphs = graphs
    return torch.cuda.max_memory_allocated(rig.device)


# --- What is shown ------------------------------------------------------------------------------


def line(row: Row) -> str:
    if row.error is not None:
        return f"{row.label}: {row.error}"

    def mb(size: int | None) -> str:
        return "not measured" if size is None else f"{size / 1e6:.1f} MB"

    return (
        f"{row.label}, {row.chunks} chunks: {row.p50_ms:.2f} ms each, {row.fps:.1f} FPS; at worst "
        f"{row.worst_ms:.2f} ms, the end {row.drift:.3f} of the beginning; planned "
        f"{mb(row.planned)}, measured {mb(row.measured)}; grew on the device by "
        f"{mb(row.device_growth)}, on the host by {mb(row.host_growth)}"
    )


def draw(found: Sequence[Row], out: Path) -> None:
    """Time per chunk, and memory below it, over the chunks of every stream."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in found if row.ms]
    figure = Figure(figsize=(9, 1 + 3.4 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 * len(shown), 1, squeeze=False, height_ratios=[2, 1] * len(shown))
    for row, (above, below) in zip(shown, panels.reshape(-1, 2), strict=True):
        above.plot(row.ms, ".", markersize=2, color="#1b6ca8")
        above.set_ylim(0, 1.3 * quantiles(row.ms).p80)
        above.set_ylabel("ms per chunk")
        above.set_title(f"{row.label}, {row.device}", loc="left", fontsize=9)
        at = [look["chunk"] for look in row.memory]
        for name, color in (("host", "#8a5fbf"), ("device", "#2a9d4a")):
            sizes = [look[name] for look in row.memory]
            if None not in sizes:
                below.plot(at, [size / 1e9 for size in sizes], color=color, label=name)
        below.set_ylim(0, 1.3 * below.dataLim.y1 if below.lines else 1)
        below.set_ylabel("GB")
        below.set_xlabel("chunk")
        if below.lines:
            below.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def main(
    preset: Annotated[
        list[str] | None, typer.Option(help="As in `reeltime profile`; several times.")
    ] = None,
    window: Annotated[
        list[int] | None, typer.Option(help="Latent frames that a pass sees; the target's.")
    ] = None,
    quality: Annotated[list[str] | None, typer.Option(help="bf16, int8, fp8+sla ...")] = None,
    chunks: Annotated[int, typer.Option(min=1)] = 1000,
    seconds: Annotated[
        float, typer.Option(help="End a stream then, with fewer chunks.")
    ] = math.inf,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, triton or cuda.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="Without graphs.")] = False,
    out: Annotated[Path | None, typer.Option(help="A JSON file of all rows.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="What is measured; asked of git by default.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Time and memory over chunks, .png.")] = None,
) -> None:
    """Chunk after chunk, in constant time and constant memory."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    commit = commit or rows.find_commit(Path.cwd())
    if out is not None and not commit:
        checks.fail("commit", "what git calls this tree", "nothing", "Pass --commit.")
    captured = place.type in CAPTURES and not eager
    usual = (GPU_PRESET, "int8+sla") if place.type == "cuda" else (CPU_PRESET, "bf16")
    aims = [profile.goal(name, None) for name in preset or usual[:1]]
    levels: list[Quality] = [named(name) for name in quality or usual[1:]]
    found: list[Row] = []
    where = asdict(rows.environment(commit, Sensors(place)))
    for aim, frames, level in itertools.product(aims, window or (None,), levels):
        target = aim if frames is None else replace(aim, window=frames)
        setting = Setting(level, backend=backend, captured=captured)
        found.append(soak(target, setting, place, chunks, seconds))
        if place.type == "cuda":
            torch.cuda.empty_cache()
        print(line(found[-1]), flush=True)
        if out is not None:  # after each, so that an interrupted run keeps what it has
            document = {**where, "rows": [asdict(row) for row in found]}
            out.write_text(json.dumps(document) + "\n")
        if picture is not None:
            draw(found, picture)
    if not all(row.steady for row in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
