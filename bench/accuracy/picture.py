# SPDX-License-Identifier: Apache-2.0
"""Error by input kind: one panel per family, ours filled, published recipes hollow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from reeltime.bench.accuracy.check import Row, kinds, ours

# What a panel shows: (op, recipe, label).  The rest is in the table and in the JSON document.
SERIES = {
    "paths": [
        ("attention", "qk int8 block mean, pv fp16", "INT8, PV FP16"),
        ("attention", "qk int8 block mean, pv fp8", "INT8, PV FP8"),
        ("attention", "qk fp8 block mean, pv fp8", "FP8, PV FP8"),
        ("segment_attention", "int8 cache, v fp16", "INT8 cache, V FP16"),
        ("segment_attention", "int8 cache, v fp8", "INT8 cache, V FP8"),
        ("attention", "Sage2 int8 per thread, pv fp16", "Sage2 per thread, PV FP16"),
        ("attention", "Sage2 int8 per thread, pv fp8", "Sage2 per thread, PV FP8"),
    ],
    "quant": [
        ("quantize", "int8 1x128", "INT8 1x128"),
        ("quantize", "int8 128x128", "INT8 128x128"),
        ("quantize", "fp8 1x128", "FP8 1x128"),
        ("quantize", "fp8 128x128", "FP8 128x128"),
        ("quantize", "TurboDiffusion int8 128x128", "TurboDiffusion INT8"),
        ("quantize", "TurboT2AV int8 per row", "TurboT2AV INT8 per row"),
    ],
    "norm": [
        ("norm", "float32 LayerNorm modulated", "float32"),
        ("norm", "bfloat16 LayerNorm modulated", "bfloat16"),
        ("norm", "int8 1x128", "INT8 1x128"),
        ("norm", "fp8 1x128", "FP8 1x128"),
        ("norm", "TurboDiffusion int8 128x128", "TurboDiffusion INT8"),
    ],
    "rope_kv": [
        ("query", "float32", "query, float32"),
        ("query", "int8 per 64 tokens and head", "query, INT8"),
        ("write", "k int8 around the block mean", "keys, INT8, block mean"),
        ("write", "v fp8 per block and channel", "values, FP8"),
        ("write", "Sage k int8 around the sequence mean", "Sage keys, sequence mean"),
        ("write", "Sage2 v fp8 per channel", "Sage2 values"),
    ],
    "gemm_w8a8": [
        ("gemm_w8a8", "int8 1x128, float32 out", "INT8 operands given"),
        ("gemm_w8a8", "int8 1x128, from float32", "INT8 1x128"),
        ("gemm_w8a8", "int8 128x128, from float32", "INT8 128x128"),
        ("gemm_w8a8", "fp8 1x128, from float32", "FP8 1x128"),
        ("gemm_w8a8", "TurboDiffusion int8 128x128, from float32", "TurboDiffusion INT8"),
        ("gemm_w8a8", "TurboT2AV int8 per row, from float32", "TurboT2AV INT8 per row"),
    ],
    "attention": [
        ("attention", "float32", "float32"),
        ("attention", "qk int8 block mean, pv fp16", "INT8 block mean, PV FP16"),
        ("attention", "qk int8 no mean, pv fp16", "INT8 no mean, PV FP16"),
        ("attention", "qk int8 block mean, pv fp8", "INT8 block mean, PV FP8"),
        ("attention", "qk fp8 block mean, pv fp8", "FP8 block mean, PV FP8"),
        ("attention", "Sage int8 per block, pv fp16", "Sage per block, PV FP16"),
        ("attention", "Sage2 int8 per thread, pv fp8", "Sage2 per thread, PV FP8"),
    ],
    "sla": [
        ("sla", "float32 top 10%", "float32, top 10%"),
        ("segment_sla", "int8 block mean, v fp16, unrotated, top 50%", "INT8 block mean, top 50%"),
        ("segment_sla", "SageSLA int8, pv fp16, top 50%", "SageSLA INT8, top 50%"),
        ("sla", "TurboDiffusion SLA, top 10%", "TurboDiffusion SLA, top 10%"),
    ],
}  # fmt: skip
OURS = ("#1b6ca8", "#d1495b", "#2a9d4a", "#8a5fbf", "#e08e0b")
THEIRS = ("#444444", "#999999")
MARKS = "os^Dv"
FLOOR = 1e-9  # exact results are drawn here


def draw(rows: Sequence[Row], out: Path, beside: Sequence[Row] = ()) -> None:
    """One panel per family in `rows`; rows of other backends are crosses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row.family for row in rows))
    wide = min(2, len(families))
    tall = -(-len(families) // wide)
    figure = Figure(figsize=(7.2 * wide, 4.3 * tall), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, family in zip(
        figure.subplots(tall, wide, squeeze=False).flat, families, strict=False
    ):
        mine, others = ([row for row in r if row.family == family] for r in (rows, beside))
        panel(axes, family, mine, others)
    for axes in list(figure.axes)[len(families) :]:
        axes.remove()
    figure.suptitle(
        "Error against float64 by input.  Filled: ours.  Hollow: published recipes.  "
        "Bars: tolerance.  Crosses: CUDA kernels, emulated.  Exact results at the bottom."
    )
    figure.savefig(out, dpi=110, metadata={"Software": None})


def panel(axes: Any, family: str, rows: Sequence[Row], beside: Sequence[Row]) -> None:
    """A mark per input and recipe; the bar of its colour above it is its tolerance."""
    columns, series = kinds(family), SERIES[family]
    errors = [row.relative_l1 for row in rows if math.isfinite(row.relative_l1)]
    ceiling = 3 * max([1e-2, *errors])
    styles = {
        True: cycle(zip(OURS, MARKS, strict=True)),
        False: cycle(zip(THEIRS, "sD", strict=True)),
    }
    lowest = ceiling
    for index, (op, recipe, label) in enumerate(series):
        found = [row for row in rows if (row.op, row.recipe) == (op, recipe)]
        mine = all(ours(row) for row in found)
        color, mark = next(styles[mine])
        fill = color if mine else "none"
        shift = 0.8 * ((index + 0.5) / len(series) - 0.5)
        places = [columns.index(row.input) + shift for row in found]
        heights = [min(max(row.relative_l1, FLOOR), ceiling) for row in found]
        lowest = min([lowest, *heights])
        axes.plot(
            places,
            heights,
            linestyle="none",
            marker=mark,
            markersize=5,
            color=color,
            markerfacecolor=fill,
            label=label,
        )
        others = [row for row in beside if (row.op, row.recipe) == (op, recipe)]
        axes.plot(
            [columns.index(row.input) + shift for row in others],
            [min(max(row.relative_l1, FLOOR), ceiling) for row in others],
            linestyle="none",
            marker="x",
            markersize=7,
            color=color,
        )
        for at, row in zip(places, found, strict=True):
            if row.tolerance_relative_l1 is not None:
                axes.plot(at, row.tolerance_relative_l1, marker="_", color=color, markersize=7)
            if not math.isfinite(row.relative_l1):
                axes.annotate("NaN", (at, ceiling), (0, 4), textcoords="offset points",
                              ha="center", fontsize=6)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(lowest / 3, 5 * ceiling)
    names = [kind.replace("_", "\n", 1) for kind in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    for edge in range(1, len(columns)):
        axes.axvline(edge - 0.5, color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.set_ylabel("relative L1", fontsize=8)
    axes.set_title(family, loc="left", fontsize=11)
    axes.legend(
        fontsize=7.5, ncols=3, loc="upper left", bbox_to_anchor=(-0.01, -0.12), frameon=False
    )
