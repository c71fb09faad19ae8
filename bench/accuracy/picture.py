# SPDX-License-Identifier: Apache-2.0
"""Error by input kind: one panel per family, ours filled, published recipes hollow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reeltime.bench.accuracy.check import Row, kinds, ours

# What a panel shows: (op, recipe, label).  The rest is in the table and in the JSON document.
SERIES = {
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
FLOOR = 1e-9  # what is exact is drawn here


def draw(rows: Sequence[Row], out: Path) -> None:
    """One panel per family in `rows`."""
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
        panel(axes, family, [row for row in rows if row.family == family])
    for axes in list(figure.axes)[len(families) :]:
        axes.remove()
    figure.suptitle("Error against float64, by input")
    figure.savefig(out, dpi=110, metadata={"Software": None})


def panel(axes: Any, family: str, rows: Sequence[Row]) -> None:
    columns = kinds(family)
    axes.set_yscale("log")
    own = their = 0
    limits: dict[float, str] = {}
    series = SERIES[family]
    ceiling = 1.0
    for index, (op, recipe, label) in enumerate(series):
        found = {row.input: row for row in rows if (row.op, row.recipe) == (op, recipe)}
        if not found:
            continue
        first = next(iter(found.values()))
        if ours(first):
            style = {"color": OURS[own % len(OURS)], "marker": MARKS[own % len(MARKS)]}
            own += 1
            stated = next(row.tolerance_relative_l1 for row in found.values())
            if stated:
                limits.setdefault(stated, style["color"])
        else:
            color = THEIRS[their % len(THEIRS)]
            style = {"color": color, "marker": "sD"[their % 2], "markerfacecolor": "none"}
            their += 1
        shift = (index - (len(series) - 1) / 2) * 0.11
        errors = [found[kind].relative_l1 for kind in columns if kind in found]
        places = [at + shift for at, kind in enumerate(columns) if kind in found]
        shown = [min(max(e, FLOOR), ceiling) for e in errors]
        axes.plot(places, shown, linestyle="none", markersize=6, label=label, **style)
        for at, error in zip(places, errors, strict=True):
            if not math.isfinite(error):
                axes.annotate(
                    "NaN", (at, ceiling), ha="center", va="bottom", fontsize=6, rotation=90
                )
    for limit, color in limits.items():
        axes.axhline(limit, color=color, linestyle="--", linewidth=0.8, zorder=0)
    axes.set_xticks(
        range(len(columns)),
        [kind.replace("_", "\n", 1) for kind in columns],
        fontsize=8,
    )
    axes.set_ylim(FLOOR / 2, 6 * ceiling)
    axes.set_ylabel("relative L1 (exact: at the bottom)", fontsize=8)
    axes.set_title(f"{family}   (- - tolerance)", loc="left", fontsize=10)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, ncols=2, loc="lower left", framealpha=0.9)
