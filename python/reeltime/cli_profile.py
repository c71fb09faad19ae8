# SPDX-License-Identifier: Apache-2.0
"""`reeltime profile`: a step as it runs here, against the frame rate that is wanted.

torch is imported inside the command: --help must not wait for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reeltime.cli_check import find_device, progress
from reeltime.cli_tables import grid, number, report_console

if TYPE_CHECKING:
    import torch

    from reeltime.bench.profile import Profile

SHOWN = 12  # ops in the terminal; the page and --json have more


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(profile)


def profile(
    preset: Annotated[
        str | None,
        typer.Option(
            help="miniature, or wan-1.3b-540p: a geometry with random weights, at 540p, 480p or "
            "the target's size.  By default the miniature on a CPU, wan-1.3b on a GPU.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="vidu-s1, flowact-r1 ...; the miniature has its own: 25 FPS.", show_default=False
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help="bf16 (the model's own dtype), int8, fp8, int8+sla, fp8+sla.  By default bf16 on "
            "a CPU, int8+sla on a GPU.",
            show_default=False,
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks to time.")] = 10,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:1; a GPU if there is one.", show_default=False),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, reference, triton or cuda: whose kernels run.")
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write report.html, profile.png and trace.json (for Perfetto) to this folder, "
            "which is made where it is missing.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Run a step and say where its time goes: phases, ops, floors, gaps, and what each technique
    brings.

    Exit code 1 if the target's frame rate is missed.  Ctrl-C keeps what was finished.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on every trace; read at import
    import torch

    from reeltime import backends, checks
    from reeltime.bench import profile as profiling
    from reeltime.model import quality as qualities

    place = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = place.type == "cuda"
    checks.choice("backend", backend, backends.BACKENDS)
    if backend != "auto":
        for family in backends.FAMILIES:
            backends.resolve(family, backend, place)
    aim = profiling.goal(preset or default_preset(place), target)
    if not gpu and preset not in (None, profiling.MINIATURE.preset):
        checks.fail(
            "preset", "'miniature' on a CPU", repr(preset),
            "A chunk of it would take minutes; `reeltime plan` says what it takes on a GPU.",
        )  # fmt: skip
    level = qualities.named(quality or ("int8+sla" if gpu else "bf16"))
    setting = profiling.Setting(level, backend=backend, captured=gpu)
    if out is not None:
        make_folder(out)
    notes = Console(stderr=True, soft_wrap=True)
    with progress(notes, width=30) as bar:
        task = bar.add_task("", total=profiling.steps(setting, gpu, chunks))
        begun = 0

        def tick(what: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=what[:30] or "chunks")
            begun += 1

        found = profiling.measure(
            aim, setting, place, chunks=chunks, tick=tick,
            note=lambda line: notes.print(Text(str(line), style="yellow")),
        )  # fmt: skip
    console = report_console(as_json)
    draw(console, found)
    if out is not None and found.chunks:
        write(out, found)
        console.print(Text(f"{out / 'report.html'}, profile.png, trace.json"), soft_wrap=True)
    if as_json:
        print(json.dumps(found.document(), allow_nan=False))
    if found.stopped:
        raise typer.Exit(130)
    if found.meets_target is False:
        raise typer.Exit(1)


def default_preset(place: torch.device) -> str:
    return "wan-1.3b-540p" if place.type == "cuda" else "miniature"


def make_folder(out: Path) -> None:
    """Raises ValueError, OSError: no folder, and none can be made there; or one that is closed."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got a file: {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"out: {out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"out: no permission to write to {out}")


def write(out: Path, found: Profile) -> None:
    from reeltime.bench import profile_report, profile_trace

    (out / "report.html").write_text(profile_report.html(found))
    profile_report.draw(found, out / "profile.png")
    if found.trace:
        (out / "trace.json").write_text(json.dumps(profile_trace.document(found.trace)))


# --- Tables -------------------------------------------------------------------------------------


def fill(table: Table, rows: Sequence[Sequence[str]]) -> Table:
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def draw(console: Console, found: Profile) -> None:
    """Phases, ops, the waterfall; the verdict last, where it is seen."""
    from reeltime.bench import profile_report

    console.print(Text(", ".join(profile_report.facts(found))), soft_wrap=True)
    if found.phases:
        columns = ("phase", "ms", "share", "traced ms", "ops", "gaps")
        rows = [
            [x.phase, f"{x.ms:.2f}", f"{x.share:.1%}",
             *(number(y, "{:.2f}") for y in (x.traced_ms, x.ops_ms, x.gap_ms))]
            for x in found.phases
        ]  # fmt: skip
        console.print(fill(grid("a chunk of median time", columns), rows))
    if found.rows:
        columns = ("op, by what would be gained", "calls", "ms", "share", "floor ms", "of floor")
        rows = []
        for op in found.rows[:SHOWN]:
            share = None if op.floor_ms is None else op.floor_ms / op.ms
            row = [op.op, str(op.calls), f"{op.ms:.2f}", f"{op.share:.1%}"]
            rows.append([*row, "-" if share is None else f"{op.floor_ms:.2f}",
                         "-" if share is None else f"{share:.0%}"])  # fmt: skip
        rest = found.rows[SHOWN:]
        if rest:
            ms, share = sum(op.ms for op in rest), sum(op.share for op in rest)
            rows.append([f"{len(rest)} others", "", f"{ms:.2f}", f"{share:.1%}", "", ""])
        gap = [number(found.gap_ms, "{:.2f}"), number(found.gap_share, "{:.1%}")]
        rows.append(["lost between ops", "", *gap, "", ""])
        console.print(fill(grid("one chunk, traced", columns), rows))
    if found.stages:
        heads = ["technique, with those above", "ms / chunk", "saved", "FPS"]
        rows = []
        for x in found.stages:
            saved = "" if x.gained_ms is None else f"{x.gained_ms:+.1f}"
            fps = "" if x.fps is None else f"{x.fps:.1f}"
            planned = "" if x.planned_ms is None else f"{x.planned_ms:.1f}"
            rows.append([x.technique, number(x.chunk_ms), saved, fps, planned])
        if found.gpu:
            heads.append("planned ms")
        rows = [row[: len(heads)] for row in rows]
        console.print(fill(grid("what each technique brings", heads), rows))
        for x in found.stages:
            if x.why:
                console.print(Text(f"{x.technique}: {x.why}", style="dim"), soft_wrap=True)
    if not found.gpu:
        line = "figures of the host: floors are those of a GPU"
        console.print(Text(line, style="dim"), soft_wrap=True)
    if found.stopped:
        console.print(Text("stopped: this is what was finished", style="yellow"), soft_wrap=True)
    style = {True: "green", False: "red", None: ""}[found.meets_target]
    console.print(Text(profile_report.verdict(found), style=f"bold {style}"), soft_wrap=True)
