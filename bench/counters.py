# SPDX-License-Identifier: Apache-2.0
"""What bounds each kernel: Nsight Compute's counters of the kernels that a step is made of, at the
shapes of Wan's transformer.

    python -m reeltime.bench.counters --out OUT

OUT/counters.csv has a line per kernel: what was called, how long it took, how busy the SMs, the
memory and the pipes were, what warps waited for.  OUT/counters.ncu-rep is for Nsight Compute.
Clocks are left alone.  Times are of one launch from cold caches: `reeltime bench` has better ones.

Exit code 77: ncu is not installed, or its counters are not permitted to this user here.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

SKIPPED = 77  # as automake has it
MARK = "reeltime: "  # of the ranges that name what was called
SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)
# Columns of ncu's page of raw metrics, and what they are called here; a card has those of its own.
KEPT = {
    r"gpu__time_duration\.sum": "time",
    r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed": "sm",
    r"(gpu__)?dram__throughput\.avg\.pct_of_peak_sustained_elapsed": "dram",
    r"lts__t_sector_hit_rate\.pct": "l2_hits",
    r"l1tex__throughput\.avg\.pct_of_peak_sustained_active": "l1",
    r"sm__inst_issued\.avg\.pct_of_peak_sustained_active": "issue_slots",
    r"(sm__(?:inst_executed_)?pipe_\w+)\.avg\.pct_of_peak_sustained_active": r"\1",
    r"smsp__warps_eligible\.avg\.per_cycle_active": "eligible_warps",
    r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio": r"stalled_\1",
    r"sm__warps_active\.avg\.pct_of_peak_sustained_active": "occupancy",
    r"launch__registers_per_thread": "registers",
    r"launch__grid_size": "blocks",
    r"launch__block_size": "threads",
    r"launch__waves_per_multiprocessor": "waves",
}
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "driver resource was unavailable")


# --- The process that is profiled ---------------------------------------------------------------


def launch() -> None:
    """Every main kernel, on every backend that serves it, in a range of its own."""
    import torch

    from reeltime import backends
    from reeltime.arch import UnsupportedArchError
    from reeltime.bench.case import SEED
    from reeltime.bench.tables import main_cases

    place = torch.device("cuda")
    for case in main_cases():
        inputs = case.make(place, SEED)
        for backend in ("cuda", "triton"):
            try:
                backends.resolve(case.family, backend, place)
                with torch.no_grad():
                    case.run(inputs, backend)  # compiles, and loads
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    with torch.cuda.nvtx.range(f"{MARK}{backend}, {case.label}"):
                        case.run(inputs, backend)
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
            except UnsupportedArchError:
                continue
        del inputs
        torch.cuda.empty_cache()


# --- What ncu says ------------------------------------------------------------------------------


def find_ncu() -> str | None:
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def command(ncu: str, report: Path) -> list[str]:
    sections = [part for name in SECTIONS for part in ("--section", name)]
    return [
        *(ncu, "--profile-from-start", "off", "--clock-control", "none", "--nvtx", "-f"),
        *(*sections, "-o", str(report.with_suffix(""))),
        *(sys.executable, "-m", "reeltime.bench.counters", "--launch"),
    ]


def kept(header: Iterable[str]) -> dict[str, str]:
    """Columns that are kept -> their short names."""
    found = {}
    for column in header:
        for pattern, name in KEPT.items():
            if match := re.fullmatch(pattern, column):
                found[column] = match.expand(name)
    return found


def rows(text: str) -> Iterator[dict[str, str]]:
    """Of `ncu --import ... --page raw --csv`, whose second line has the units.

    Raises:
        ValueError: no such table in it.
    """
    begin = re.search(r'^"ID",', text, re.M)
    if begin is None:
        raise ValueError("ncu: expected a table that begins with ID, got " + repr(text[:200]))
    lines = csv.DictReader(io.StringIO(text[begin.start() :]))
    columns = kept(lines.fieldnames or ())
    units = next(lines, {})
    for line in lines:
        ranges = [cell for cell in line.values() if isinstance(cell, str) and MARK in cell]
        called = re.search(rf'{MARK}([^":]*)', ranges[0]) if ranges else None
        yield {
            "called": called[1].strip() if called else "",
            "kernel": line.get("Kernel Name", ""),
            **{f"{name} {units[c]}".strip(): line[c] for c, name in columns.items()},
        }


def skip(why: str) -> None:
    print(f"skipped: {why}")
    raise typer.Exit(SKIPPED)


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of counters.csv and .ncu-rep.")] = None,
    only_launch: Annotated[bool, typer.Option("--launch", help="What ncu runs.")] = False,
) -> None:
    """Counters of every main kernel."""
    if only_launch:
        launch()
        return
    if out is None or not out.is_dir():
        print(f"error: out: expected a folder, got {out}", file=sys.stderr)
        raise typer.Exit(2)
    ncu = find_ncu()
    if ncu is None:
        skip("ncu is not installed")
        return
    report = out / "counters.ncu-rep"
    done = subprocess.run(command(ncu, report), capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    print(said)
    for refusal in REFUSED:
        if refusal in said:
            skip(f"ncu may not read counters here ({refusal})")
    if done.returncode or not report.exists():
        raise typer.Exit(1)
    asked = [ncu, "--import", str(report), "--page", "raw", "--csv", "--print-units", "base"]
    found = list(rows(subprocess.run(asked, capture_output=True, text=True, check=True).stdout))
    with (out / "counters.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]) if found else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(f"{len(found)} kernels in {out / 'counters.csv'}")
    if not found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
