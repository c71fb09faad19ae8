# SPDX-License-Identifier: Apache-2.0
"""Beside the best peer: its time over ours, and what both lose, kernel by kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reeltime.bench.bars import COLORS
from reeltime.bench.rows import Row

PEER = "#e08e45"
SMALLEST = 1e-5  # of a relative error: left of it is exact


def draw(rows: Sequence[Row], out: Path, title: str) -> None:
    """Two panels per family: speed and accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = {name: [r for r in rows if r.family == name] for name in dict.fromkeys(
        row.family for row in rows)}  # fmt: skip
    tall = [len(mine) for mine in families.values()]
    figure = Figure(figsize=(14, 1.6 + 0.24 * sum(tall) + 0.5 * len(tall)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(families), 2, squeeze=False, height_ratios=tall, width_ratios=(3, 2), sharey="row"
    )
    for (left, right), (family, mine) in zip(panels, families.items(), strict=True):
        speed(left, family, mine)
        accuracy(right, mine)
        left.set_ylim(len(mine) - 0.4, -0.6)  # the first on top, no margins
    panels[-1, 0].set_xlabel("time of the best peer over ours: right of 1 ours is faster")
    panels[-1, 1].set_xlabel("relative L1 to float64")
    figure.suptitle(title)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def speed(axes: Any, family: str, rows: Sequence[Row]) -> None:
    shown = [math.log2(row.ratio) if row.ratio else 0.0 for row in rows]
    places = range(len(rows))
    axes.barh(places, shown, color=[COLORS.get(row.backend, "#999999") for row in rows])
    for at, row, end in zip(places, rows, shown, strict=True):
        note = row.error or "not measured"
        if row.ratio is not None:
            note = f"{row.ratio:.2f}x  {row.best_peer}"
        elif row.p50_us is not None:
            note = "no peer"
        axes.annotate(note[:60], (max(end, 0.0) + 0.03, at), va="center", fontsize=6.5)
    low, high = math.floor(min(shown, default=0.0)), math.ceil(max(shown, default=0.0))
    ticks = range(low, high + 2)
    axes.set_xticks(ticks, [f"{2**t}x" if t >= 0 else f"1/{2**-t}" for t in ticks], fontsize=8)
    axes.set_xlim(low - 0.1, high + 1.0 + 0.3 * (high - low))  # with room for names
    axes.set_yticks(places, [f"{row.label}  {row.backend}" for row in rows], fontsize=6.5)
    axes.axvline(0.0, color="#d1495b", linewidth=0.8)
    axes.set_title(f"{family}: beside the best peer", loc="left", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)


def accuracy(axes: Any, rows: Sequence[Row]) -> None:
    for name, marker, color, errors in (
        ("ours", "o", COLORS["cuda"], [row.relative_l1 for row in rows]),
        ("the best peer", "D", PEER, [row.peer_relative_l1 for row in rows]),
    ):
        points = [(max(x, SMALLEST), at) for at, x in enumerate(errors) if x is not None]
        points = [point for point in points if math.isfinite(point[0])]
        axes.scatter(
            [x for x, _ in points], [y for _, y in points], s=16, marker=marker, color=color,
            label=name, alpha=0.85,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(SMALLEST / 2, 1.0)
    axes.legend(loc="lower right", fontsize=6.5)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
