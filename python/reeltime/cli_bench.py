# SPDX-License-Identifier: Apache-2.0
"""`reeltime bench`: every kernel timed beside its floor and its peers, or the floors alone.

torch is imported inside the command: --help must not wait for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from reeltime.cli_check import find_device, progress
from reeltime.cli_stream import check_out
from reeltime.cli_tables import grid, number, report_console

if TYPE_CHECKING:
    from reeltime.bench.floors import Floor
    from reeltime.bench.rows import Row
    from reeltime.bench.shapes import Sizes


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(bench)


def bench(
    families: Annotated[
        list[str] | None,
        typer.Argument(
            help="Kernel families, all of them by default; or step: blocks and chunks of a model.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="dit: Wan's transformer; tiny: seconds on a laptop.  By default dit on a GPU.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="reference, triton or cuda.  By default the last two on a GPU, and the "
            "reference on a CPU.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:1; a GPU if there is one.", show_default=False),
    ] = None,
    floors: Annotated[
        bool, typer.Option("--floors", help="Floors on an H200 and an RTX 5090; no GPU needed.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Append to <gpu>.csv in this folder.", show_default=False),
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(help="What was measured; asked of git by default.", show_default=False),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="peers: every library that is installed, or the name of one; several times.  By "
            "default PyTorch's own kernels, not compiled.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw shares of the floor, with --against ratios to the best peer, .png.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Time every kernel: oracle first, then a captured graph past L2, beside floor and peers.

    Exit code 1 if one of ours misses its tolerance or fails.  On a CPU the reference is timed at
    tiny shapes: figures of the host, which say nothing about a GPU.
    """
    if picture is not None:
        check_out(picture, ".png")
    import torch

    from reeltime import backends, checks
    from reeltime.bench import harness
    from reeltime.bench import shapes as known

    timed = (*backends.FAMILIES, harness.STEP)
    for name in families or ():
        checks.choice("family", name, timed)
    if shapes is not None:
        checks.choice("shapes", shapes, tuple(known.SIZES))
    chosen = [name for name in timed if name in (families or backends.FAMILIES)]
    console = report_console(as_json, wider=20)
    if floors:
        measured = {"out": out, "backend": backend, "device": device, "against": against or None}
        for option, value in measured.items():
            if value is not None:
                checks.fail(option, "none with --floors", value, "Nothing is measured there.")
        show_floors(console, chosen, known.SIZES[shapes or "dit"], picture, as_json)
        return
    place = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = known.SIZES[shapes or ("dit" if place.type == "cuda" else "tiny")]
    run_all(console, chosen, sizes, backend, place, out, commit, against or [], picture, as_json)


def run_all(
    console: Console,
    chosen: Sequence[str],
    sizes: Sizes,
    backend: str | None,
    place: Any,
    out: Path | None,
    commit: str | None,
    against: Sequence[str],
    picture: Path | None,
    as_json: bool,
) -> None:
    """Measure, append as it goes, then show."""
    from reeltime.arch import UnsupportedArchError
    from reeltime.bench import harness, rows
    from reeltime.bench.peers import libraries

    libraries_here = libraries.find(against, place)
    served = harness.plan(chosen, backend, place)
    commit = commit or rows.find_commit(Path.cwd())
    path = None if out is None else rows.results_file(out, place, commit)
    notes = Console(stderr=True, soft_wrap=True)

    def note(line: str) -> None:
        notes.print(Text(" ".join(line.split()), style="yellow"))

    for name in chosen:
        for one in (backend,) if backend else harness.wanted(place, name):
            if one not in served.get(name, ()):
                note(f"{name}: not measured on {one}, which this build lacks for it on {place}")
    for library in libraries_here:
        if library.why:
            note(f"peers: {library.name} {library.version or ''}: {library.why}")
    found: list[Row] = []
    left_out: Counter[str] = Counter()
    # Backends one after another, so that a kernel that breaks the GPU spares those before it.
    order = [
        (name, one, case)
        for name in served
        for one in served[name]
        for case in harness.cases(name, sizes)
    ]
    order.sort(key=lambda step: step[1] == "cuda")
    with progress(notes, width=40) as bar:
        task = bar.add_task("ceilings", total=len(order))
        run = harness.Run(place, note, libraries_here if against else ())
        where = rows.environment(commit, run.sensors)
        for name, one, case in order:
            bar.update(task, description=f"{one}, {case.op} {case.shape}"[:40])
            try:
                fresh = run.rows(case, one)
            except UnsupportedArchError as error:
                left_out[f"{name}, {one}: {error.why}"] += 1
                fresh = []
            found += fresh
            if path is not None and fresh:
                rows.append(path, fresh, where)
            bar.advance(task)

    mine = [row for row in found if ours(row)]
    draw(console, found, run)
    for why, count in left_out.items():
        note(f"{count} times left out: {why}")
    if run.away:
        note(f"peers that need a GPU: {'; '.join(sorted(run.away))}")
    for row in found:
        if row.error:
            style = "red" if ours(row) else "dim"
            line = f"{row.backend}, {row.label}: {row.error}"
            notes.print(Text(" ".join(line.split()), style=style))
    if picture is not None:
        from reeltime.bench import bars, ratios

        draw_rows = ratios.draw if against else bars.draw
        draw_rows(mine, picture, f"{run.name}, {sizes.name} shapes")
    failed = sum(row.error is not None for row in mine)
    if as_json:
        document = {
            "rows": [rows.document(row, where) for row in found],
            "device": run.name,
            "shapes": sizes.name,
            "ceilings": run.ceilings and {"gbps": run.ceilings.gbps, **run.ceilings.tflops},
            "left_out": dict(left_out),
            "peers": [asdict(library) for library in libraries_here],
            "out": str(path) if path else None,
            "failed": failed,
        }
        print(json.dumps(document, allow_nan=False))
    if failed:
        raise typer.Exit(1)


def ours(row: Row) -> bool:
    from reeltime.bench.harness import STEP, TIMED

    return row.family == STEP or row.backend in TIMED


def show_floors(
    console: Console, chosen: Sequence[str], sizes: Sizes, picture: Path | None, as_json: bool
) -> None:
    from reeltime.bench import bars
    from reeltime.bench import floors as lower

    found = lower.floors(chosen, sizes)
    if picture is not None:
        bars.draw(lower.as_rows(found), picture, f"{sizes.name} shapes, nothing measured")
    if as_json:
        print(json.dumps({"rows": lower.documents(found), "shapes": sizes.name}, allow_nan=False))
    draw_floors(console, found)


# --- Tables -------------------------------------------------------------------------------------


def draw(console: Console, found: Sequence[Row], run: Any) -> None:
    """A table per family; peers stand below the first of ours that they were measured for."""
    for family in dict.fromkeys(row.family for row in found):
        table = grid(f"{family} on {run.name}")
        table.add_column("kernel", overflow="fold", min_width=24)
        columns = ("us", "p20-p80", "rel. L1", "TFLOPS", "GB/s", "floor us", "% floor", "expected")
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("best peer", overflow="fold")
        table.add_column("ratio", justify="right", no_wrap=True)
        for row in found:
            if row.family != family or (row.error and row.relative_l1 is None and not ours(row)):
                continue  # a peer that is wrong is shown, one that refuses is not
            table.add_row(*cells(row), style="" if ours(row) else "dim")
        console.print(table)
    if run.ceilings is None:
        console.print(
            Text("figures of the host: floor and share are those of a GPU", style="dim"),
            soft_wrap=True,
        )
        return
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in run.ceilings.tflops.items())
    line = f"ceilings of this run: {run.ceilings.gbps:.0f} GB/s copied; TFLOPS: {rates}"
    console.print(Text(line, style="dim"), soft_wrap=True)


def cells(row: Row) -> list[Text]:
    spread = number(row.p20_us, "{:.1f}")
    if row.p80_us is not None:
        spread += f"-{row.p80_us:.1f}"
    failed = row.error is not None
    word = "failed" if row.relative_l1 is None else "wrong"
    return [
        Text(f"{row.label}  {row.backend}", style="red" if failed else ""),
        Text(word if failed else number(row.p50_us), style="bold red" if failed else ""),
        Text("-" if failed else spread),
        Text("-" if row.relative_l1 is None else f"{row.relative_l1:.1e}"),
        Text("-" if row.tflops is None else f"{row.tflops:.2f}"),
        Text("-" if row.gbps is None else f"{row.gbps:.0f}"),
        Text(number(row.floor_us, "{:.2f}")),
        Text(number(row.share_of_floor, "{:.0%}")),
        Text("-" if row.expected_share is None else f"{row.expected_share:.0%}"),
        Text(row.best_peer or "-"),
        Text("-" if row.ratio is None else f"{row.ratio:.2f}x"),
    ]


def draw_floors(console: Console, found: Sequence[Floor]) -> None:
    """A line per kernel, the cards beside each other."""
    cards = list(dict.fromkeys(floor.card for floor in found))
    for family in dict.fromkeys(floor.family for floor in found):
        table = grid(f"{family}: floors by the data sheet; expected, not measured")
        table.add_column("kernel", overflow="fold", min_width=24)
        table.add_column("GFLOP", justify="right")
        table.add_column("MB", justify="right")
        for card in cards:
            for name in (f"{card} us", "bound by", "expected"):
                table.add_column(name, justify="left" if name == "bound by" else "right")
        lines: dict[str, list[Floor]] = {}
        for floor in found:
            if floor.family == family:
                lines.setdefault(floor.label, []).append(floor)
        for label, mine in lines.items():
            row = [label, f"{mine[0].gflop:.2f}", f"{mine[0].mbytes:.1f}"]
            for floor in mine:
                share = floor.expected_share
                row += ["-" if floor.floor_us is None else f"{floor.floor_us:.1f}", floor.bound]
                row += ["-" if share is None else f"{share:.0%}"]
            table.add_row(*map(Text, row))
        console.print(table)
    line = "expected: share of the floor by ceilings measured in that run, a little above this one"
    console.print(Text(line, style="dim"), soft_wrap=True)
