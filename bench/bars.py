# SPDX-License-Identifier: Apache-2.0
"""Share of the floor per kernel: what was measured filled, what was expected an outline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reeltime.bench.rows import Row

COLORS = {"cuda": "#1b6ca8", "triton": "#2a9d4a", "reference": "#8a5fbf"}
EXPECTED = "#444444"


def draw(rows: Sequence[Row], out: Path, title: str) -> None:
    """A panel per family; rows without a time leave the outline of their expectation alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = {name: [r for r in rows if r.family == name] for name in dict.fromkeys(
        row.family for row in rows)}  # fmt: skip
    tall = [len(mine) for mine in families.values()]
    figure = Figure(figsize=(11, 1.6 + 0.24 * sum(tall) + 0.5 * len(tall)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(families), 1, squeeze=False, height_ratios=tall)
    for axes, (family, mine) in zip(panels.flat, families.items(), strict=True):
        panel(axes, family, mine)
    panels.flat[-1].set_xlabel("share of the floor")
    figure.suptitle(title)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def panel(axes: Any, family: str, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    shares = [row.share_of_floor or 0.0 for row in rows]
    expected = [row.expected_share or 0.0 for row in rows]
    axes.barh(places, shares, color=[COLORS.get(row.backend, "#999999") for row in rows])
    axes.barh(places, expected, fill=False, edgecolor=EXPECTED, linewidth=0.8)
    for at, row, share in zip(places, rows, shares, strict=True):
        note = f"{share:.0%}" if row.share_of_floor is not None else row.error or "not measured"
        end = max(share, expected[at]) + 0.01
        axes.annotate(note[:60], (end, at), va="center", fontsize=6.5)
    axes.set_yticks(places, [f"{row.label}  {row.backend}" for row in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first on top, no margins
    axes.set_xlim(0, max([1.1, *shares]) + 0.15)
    axes.axvline(1.0, color="#d1495b", linewidth=0.8)
    axes.set_title(f"{family}  (outline: expected, stated before)", loc="left", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
