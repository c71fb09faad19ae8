# SPDX-License-Identifier: Apache-2.0
"""What attention in 8 bits, or sparse, costs the miniature over a long stream: table and picture.

A frame loses the PSNR of the float32 dense stream's frame less its own, both against the renderer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DENSE = "float32, dense"
LOST = (5, 25, 50, 75, 95, 100)  # percentiles of what a frame loses
MARKERS = ("<!-- formats:begin -->", "<!-- formats:end -->")

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "PSNR dB": lambda r: f"{r['psnr']:.2f}",
    "a frame loses": lambda r: f"{r['lost']['mean']:+.3f}",
    "5% lose more than": lambda r: f"{r['lost']['p95']:+.2f}",
    "most": lambda r: f"{r['lost']['p100']:+.2f}",
    "beside dense dB": lambda r: f"{r['psnr_beside_dense']:.1f}",
    "drift dB": lambda r: f"{r['drift']:+.2f}",
    "lip-sync": lambda r: f"{r['lip_sync']:.3f}",
    "instructions": lambda r: f"{r['obeyed']} of {r['said']}",
    "SSIM": lambda r: f"{r['ssim']:.3f}",
    "colour": lambda r: f"{r['colour_error']:.1f}",
    "shape": lambda r: f"{100 * r['shape_error']:.0f}%",
    "flicker": lambda r: f"{r['flicker_levels']:.2f}",
    "cache MB": lambda r: f"{r['cache_mb']:.1f}",
}


def loss(mse: np.ndarray, of_dense: np.ndarray) -> np.ndarray:
    """Of each frame, in dB."""
    return 10 * np.log10(mse / of_dense)


def spread(lost: np.ndarray) -> dict[str, float]:
    """Its mean and percentiles."""
    found = {f"p{p:02d}": float(np.percentile(lost, p)) for p in LOST}
    return found | {"mean": float(lost.mean())}


def markdown(dense: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """The dense stream first; it loses nothing."""
    lines = [
        f"| {dense['frames']:,} frames | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in {DENSE: dense, **rows}.items():
        cells = [cell(row) if _has(row, cell) else "" for cell in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "PSNR is against the renderer. A frame loses the PSNR of the dense stream's frame less its "
        "own, in dB; beside dense: PSNR of the pictures against those of the dense stream. Drift: "
        "the last thousand frames less the first. The rest as in README.md.",
    ]
    return "\n".join(lines)


def _has(row: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> bool:
    try:
        cell(row)
    except KeyError:
        return False
    return True


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """What frames lose over the stream, and how that is spread over frames."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (time, boxes) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
    colours = ("#2563a8", "#5aa0d8", "#2a9d4a", "#e07b39", "#d1495b")
    for (name, row), colour in zip(rows.items(), colours, strict=False):
        curve = row["lost_per_100_frames"]
        time.plot(100 * np.arange(len(curve)) + 50, curve, color=colour, lw=1, label=name)
    time.axhline(0, color="#9aa3ad", lw=0.8)
    time.set(title="Lost against the dense stream, means of 100 frames", xlabel="video frame",
             ylabel="PSNR, dB")  # fmt: skip
    time.set_yscale("symlog", linthresh=0.1)  # 8 bits lose hundredths, sparse attention units
    time.grid(alpha=0.25)
    stats = []
    for row in rows.values():
        p = row["lost"]
        stats.append({"med": p["p50"], "q1": p["p25"], "q3": p["p75"], "whislo": p["p05"],
                      "whishi": p["p95"], "fliers": [p["p100"]]})  # fmt: skip
    drawn = boxes.bxp(stats, orientation="horizontal", patch_artist=True, widths=0.6,
                      flierprops={"marker": "x", "markersize": 4})  # fmt: skip
    for box, colour in zip(drawn["boxes"], colours, strict=False):
        box.set(facecolor=colour, alpha=0.6)
    boxes.axvline(0, color="#9aa3ad", lw=0.8)
    boxes.set(title="Lost by a frame: 5, 25, 50, 75, 95%, and the most", xlabel="PSNR, dB",
              yticklabels=list(rows))  # fmt: skip
    boxes.set_xscale("symlog", linthresh=0.1)
    boxes.invert_yaxis()
    boxes.grid(alpha=0.25, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
