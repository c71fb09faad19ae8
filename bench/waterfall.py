# SPDX-License-Identifier: Apache-2.0
"""What each technique brings: milliseconds of a chunk as bars, frames per second beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reeltime.bench.plan import Plan

BAR, SAVED, WANTED = "#1b6ca8", "#d9e6f2", "#d1495b"


def draw(plans: Sequence[Plan], out: Path) -> None:
    """A panel per plan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tall = [len(one.stages) for one in plans]
    figure = Figure(figsize=(9, 0.8 + sum(0.3 * n + 0.75 for n in tall)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(plans), 1, squeeze=False, height_ratios=tall)
    for axes, one in zip(panels.flat, plans, strict=True):
        panel(axes, one)
    panels.flat[-1].set_xlabel("milliseconds per chunk, planned; pale: what the technique saves")
    figure.savefig(out, dpi=110, metadata={"Software": None})


def panel(axes: Any, one: Plan) -> None:
    places = range(len(one.stages))
    taken = [stage.chunk_ms for stage in one.stages]
    saved = [max(stage.gained_ms, 0.0) for stage in one.stages]
    axes.barh(places, taken, color=BAR)
    axes.barh(places, saved, left=taken, color=SAVED)
    for at, stage in zip(places, one.stages, strict=True):
        end = stage.chunk_ms + max(stage.gained_ms, 0.0)
        axes.annotate(f" {stage.fps:.1f} FPS", (end, at), va="center", fontsize=7.5)
    title = f"{one.target} on {one.gpus} x {one.gpu}, {one.preset}"
    if one.target_fps is not None:
        frames = one.stages[0].fps * one.stages[0].chunk_ms / 1e3
        budget = 1e3 * frames / one.target_fps
        axes.axvline(budget, color=WANTED, linewidth=1)
        title += f"  (line: {one.target_fps:g} FPS)"
    axes.set_yticks(places, [stage.name for stage in one.stages], fontsize=7.5)
    axes.set_ylim(len(one.stages) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(a + b for a, b in zip(taken, saved, strict=True)))
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
