# SPDX-License-Identifier: Apache-2.0
"""A profile as one page that asks nothing of the network, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from reeltime.bench.profile import Profile
from reeltime.bench.profile_ops import Op
from reeltime.bench.profile_trace import OTHER, family

SHOWN = 14  # ops by name; the others are one line
# By family, light and dark alike: Okabe and Ito's palette, told apart by every kind of eye.
COLORS = {
    "attention": "#0072b2",
    "sla": "#56b4e9",
    "gemm": "#e69f00",
    "gemm_w8a8": "#e69f00",
    "norm": "#009e73",
    "rope_kv": "#cc79a7",
    "quant": "#d55e00",
    "torch": "#8a8f98",
}
GAP = "#d1495b"


class Mark(NamedTuple):
    """Something in a timeline, in percent of its width."""

    left: float
    width: float
    color: str
    title: str


class Lane(NamedTuple):
    phase: str
    us: float
    ops: list[Mark]
    gaps: list[Mark]


def lanes(profile: Profile, least: float = 0.02) -> list[Lane]:
    """A lane per run of a phase, all on one scale; what is narrower than `least` percent is left
    out."""
    runs = [run for run in profile.runs if run.phase != OTHER]
    scale = 100 / max((run.us for run in runs), default=1.0)
    found = []
    for run in runs:
        ops = [
            Mark(scale * (x.start_us - run.start_us), scale * x.us, COLORS[family(x.op)],
                 f"{x.op}: {x.us:.1f} us")
            for x in run.slices if scale * x.us >= least
        ]  # fmt: skip
        gaps = [
            Mark(scale * (start - run.start_us), scale * us, GAP, f"gap: {us:.1f} us")
            for start, us in run.gaps() if scale * us >= least
        ]  # fmt: skip
        found.append(Lane(run.phase, run.us, ops, gaps))
    return found


def shown(profile: Profile) -> tuple[list[Op], list[Op]]:
    """Ops with a line of their own, and the others."""
    return profile.rows[:SHOWN], profile.rows[SHOWN:]


# --- Roofline -----------------------------------------------------------------------------------


class Dot(NamedTuple):
    """An op under the roof, in percent of the plot."""

    x: float
    y: float
    op: Op
    color: str
    title: str


class Roofline(NamedTuple):
    roofs: list[tuple[str, float, float]]  # dtypes and TFLOPS, x of its corner, y of its top
    dots: list[Dot]
    slope: tuple[float, float, float, float]  # the bandwidth's line: x1, y1, x2, y2
    ticks: list[tuple[float, str]]  # FLOPs per byte


def roofline(profile: Profile) -> Roofline | None:
    """Ops that have a floor: FLOPs per byte, and what they reached.  Both axes are logarithms."""
    ops = [op for op in profile.rows if op.floor_ms and op.gflop and op.mbytes]
    if not ops or profile.ceilings is None:
        return None
    gbps = profile.ceilings["gbps"]
    peaks = {name: rate for name, rate in profile.ceilings.items() if name != "gbps"}
    equal = {rate: [name for name in peaks if peaks[name] == rate] for rate in peaks.values()}

    def reached(op: Op) -> tuple[float, float]:
        """FLOPs per byte, TFLOPS."""
        return 1e3 * (op.gflop or 0.0) / (op.mbytes or 1.0), (op.gflop or 0.0) / op.ms

    points = [reached(op) for op in ops]
    low = math.floor(math.log10(min(x for x, _ in points)))
    high = math.ceil(math.log10(max([*(x for x, _ in points), *(1e3 * p / gbps
                                     for p in peaks.values())])))  # fmt: skip
    top = math.log10(max(peaks.values())) + 0.2
    bottom = math.log10(min(min(y for _, y in points), 10**low * gbps / 1e3)) - 0.2

    def x(value: float) -> float:
        return 100 * (math.log10(value) - low) / (high - low)

    def y(value: float) -> float:
        return 100 * (top - math.log10(value)) / (top - bottom)

    best = max(peaks.values())
    return Roofline(
        [(f"{', '.join(names)} {rate:.0f}", x(1e3 * rate / gbps), y(rate))
         for rate, names in equal.items()],
        [Dot(x(a), y(b), op, COLORS[op.family], f"{op.op}: {b:.1f} TFLOPS at {a:.0f} per byte")
         for (a, b), op in zip(points, ops, strict=True)],
        (0.0, y(10**low * gbps / 1e3), x(1e3 * best / gbps), y(best)),
        [(x(10.0**n), f"{10**n:g}") for n in range(low, high + 1)],
    )  # fmt: skip


# --- The page -----------------------------------------------------------------------------------


def verdict(profile: Profile) -> str:
    if profile.fps is None:
        return "stopped before a chunk was timed"
    now = f"{profile.fps:.1f} FPS"
    if profile.target_fps is None:
        return f"{now}; {profile.target} states no frame rate"
    met = "met" if profile.meets_target else "missed"
    return f"{now}, {profile.target_fps:g} wanted: {met}"


def facts(profile: Profile) -> Iterator[str]:
    """What was run, where."""
    width, height = profile.size
    yield f"{profile.preset} at {width} x {height}"
    yield f"quality {profile.quality} in {profile.dtype}"
    yield f"{profile.frames} frames in {profile.passes} passes"
    yield "captured graphs" if profile.captured else "eager"
    yield profile.device
    for name, value in profile.clocks.items():
        yield f"{name.replace('_', ' ')} {value}"


def html(profile: Profile) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    mine, others = shown(profile)
    measured = [stage.chunk_ms or 0.0 for stage in profile.stages]
    planned = [stage.planned_ms or 0.0 for stage in profile.stages]
    budget = 1e3 * profile.frames / profile.target_fps if profile.target_fps else None
    page = environment.get_template("profile_page.html")
    return page.render(
        p=profile, verdict=verdict(profile), facts=list(facts(profile)), ops=mine, others=others,
        others_ms=sum(op.ms for op in others), lanes=lanes(profile), roofline=roofline(profile),
        colors=COLORS, gap=GAP, used=sorted({op.family for op in profile.rows}), budget=budget,
        widest=max([*measured, *planned, budget or 0.0, 1e-9]),
        slowest=max((op.ms for op in profile.rows), default=1.0),
    ).lstrip()  # fmt: skip


# --- The picture --------------------------------------------------------------------------------


def draw(profile: Profile, out: Path) -> None:
    """Waterfall, ops and the timeline of one chunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ops = profile.rows[:10]
    tall = [max(len(profile.stages), 1), max(len(ops), 1), max(len(profile.runs), 2)]
    figure = Figure(figsize=(9, 1.6 + 0.27 * sum(tall)), layout="constrained")
    FigureCanvasAgg(figure)
    fall, slow, line = figure.subplots(3, 1, height_ratios=tall)
    figure.suptitle(f"{', '.join(list(facts(profile))[:4])}: {verdict(profile)}", fontsize=10)

    ms = [stage.chunk_ms or 0.0 for stage in profile.stages]
    fall.barh(range(len(ms)), ms, color=COLORS["attention"])
    for at, stage in enumerate(profile.stages):
        note = f" {stage.fps:.1f} FPS" if stage.fps else f" not measured: {stage.why}"
        fall.annotate(note, (ms[at], at), va="center", fontsize=7)
    title, widest = "milliseconds per chunk", max([*ms, 1e-9])
    if profile.target_fps:
        budget = 1e3 * profile.frames / profile.target_fps
        fall.axvline(budget, color=GAP, linewidth=1)
        title, widest = f"{title}; line: {profile.target_fps:g} FPS", max(widest, budget)
    fall.set_xlim(0, 1.2 * widest)
    label(fall, [stage.technique for stage in profile.stages], title)

    slow.barh(range(len(ops)), [op.ms for op in ops], color=[COLORS[op.family] for op in ops])
    floors = [op.floor_ms or 0.0 for op in ops]
    slow.barh(range(len(ops)), floors, fill=False, edgecolor="#222222")
    for at, op in enumerate(ops):
        slow.annotate(f" {op.share:.1%}, {op.calls} calls", (op.ms, at), va="center", fontsize=7)
    slow.set_xlim(0, 1.2 * max((op.ms for op in ops), default=1.0))
    outline = "; outline: the floor" if profile.gpu else ", on the host"
    label(slow, [op.op for op in ops], f"milliseconds of the traced chunk{outline}")

    found = lanes(profile)
    for at, lane in enumerate(found):
        scale = max(x.us for x in found) / 1e5
        line.barh(at, lane.us / 1e3, color=GAP)
        for mark in lane.ops:
            line.barh(at, scale * mark.width, left=scale * mark.left, color=mark.color)
    line.set_xlim(0, 1.25e-3 * max((lane.us for lane in found), default=1.0))
    used = sorted({op.family for op in profile.rows})
    marks = [Patch(color=COLORS[name], label=name) for name in used]
    if marks:
        line.legend(handles=[*marks, Patch(color=GAP, label="gap")], fontsize=7, loc="lower right")
    label(line, [lane.phase for lane in found], "milliseconds in a phase of that chunk")
    figure.savefig(out, dpi=110, metadata={"Software": None})


def label(axes: Any, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=7.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
