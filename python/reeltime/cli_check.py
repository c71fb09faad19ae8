# SPDX-License-Identifier: Apache-2.0
"""`reeltime check`: every op against float64, as a table, a JSON document and a picture.

torch is imported inside the command: --help must not wait for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from reeltime.cli_stream import check_out
from reeltime.cli_tables import grid, report_console

if TYPE_CHECKING:
    import torch

    from reeltime.bench.accuracy.check import Row


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(check)


def check(
    family: Annotated[
        str | None,
        typer.Argument(
            help="One kernel family, or paths: attention in 8 bits, path by path, to 160k keys; "
            "all families by default."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, reference, triton or cuda: whose kernels are checked.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Same seed, same inputs.")] = 0,
    every: Annotated[
        bool, typer.Option("--all", help="Every input, not only the worst of each recipe.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw error by input, .png.", show_default=False)
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(
            help="Rewrite the tables between the markers of a page such as docs/accuracy.md, and "
            "draw the picture beside it.",
            show_default=False,
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Rows of another backend or device, a document of --json, to show on that page.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model instead, package.module:factory, whose factory returns (module, inputs): "
            "what each of its layers loses if it alone is changed, and which to skip.",
            show_default=False,
        ),
    ] = None,
    linear: Annotated[str, typer.Option(help="With --model: int8, fp8 or none.")] = "int8",
    attention: Annotated[str, typer.Option(help="With --model: int8, fp8 or none.")] = "int8",
    norm: Annotated[str, typer.Option(help="With --model: fused or none.")] = "none",
    budget: Annotated[
        float | None,
        typer.Option(
            help="With --model: relative L1 that its output may differ by; halved by default.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check every op against float64, on inputs that break kernels; or a model, layer by layer.

    Exit code 1 if one of ours is out of tolerance, or a model's --budget is not met.  Published
    recipes (SageAttention, SLA, TurboDiffusion) run on the same inputs; they are shown, not judged.
    """
    if picture is not None:
        check_out(picture, ".png")
    if model is not None:
        for option, value in (("family", family), ("update", update), ("beside", beside)):
            if value is not None:
                raise ValueError(
                    f"{option}: expected none with --model, got {value}. Leave it out."
                )
        from reeltime import cli_sensitivity

        formats = {"linear": linear, "attention": attention, "norm": norm}
        options = {name: None if value == "none" else value for name, value in formats.items()}
        options["backend"] = backend
        cli_sensitivity.run(model, options, budget, every, picture, as_json)
        return
    if budget is not None:
        raise ValueError(f"budget: expected none without --model, got {budget}. Name a model.")
    if update is not None:
        check_out(update, ".md")
        if family is not None:
            raise ValueError("update: expected all families, got one. Leave the family out.")

    from reeltime import backends, checks
    from reeltime.bench.accuracy import check as running

    if family is not None:
        checks.choice("family", family, (*backends.FAMILIES, running.PATHS))
    others = [] if beside is None else running.read(beside)
    place = find_device(device)
    every_family = backends.FAMILIES if update is None else (running.PATHS, *backends.FAMILIES)
    chosen = running.plan((family,) if family else every_family, backend, place)
    notes = Console(stderr=True)
    for name in backends.FAMILIES if family is None else ():
        if name not in chosen:
            notes.print(f"{name}: not checked, no {backend} backend for it here", markup=False)

    rows: list[Row] = []
    refused: Counter[str] = Counter()
    steps = [(name, kind) for name in chosen for kind in running.kinds(name)]
    with progress(notes) as bar:
        task = bar.add_task("", total=len(steps))
        for name, kind in steps:
            bar.update(task, description=f"{name}, {kind.replace('_', ' ')}")
            rows += running.check(
                name, kind, backend=chosen[name], device=place, seed=seed, refused=refused
            )
            bar.advance(task)

    console = report_console(as_json)
    draw(console, rows, every)
    for why, count in refused.items():
        notes.print(f"{count} times left out: {why}", markup=False, highlight=False)
    if update is not None:
        from reeltime.bench.accuracy import pages

        pages.update(update, rows, others)
        picture = picture or update.with_suffix(".png")
    if picture is not None:
        from reeltime.bench.accuracy import picture as drawing

        drawing.draw(rows, picture, others)
    failed = sum(row.passed is False for row in rows)
    if as_json:
        document = {
            "rows": [row.document() for row in rows],
            "backends": chosen,
            "device": str(place),
            "seed": seed,
            "left_out": dict(refused),
            "checked": sum(row.passed is not None for row in rows),
            "failed": failed,
        }
        print(json.dumps(document, allow_nan=False))
    if failed:
        raise typer.Exit(1)


def find_device(name: str) -> torch.device:
    """Raises ValueError: no such device, here or anywhere."""
    import torch

    from reeltime import checks

    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "cuda" and len(here) > 1:
        return torch.device(f"cuda:{torch.cuda.current_device()}")
    checks.choice("device", name, here)
    return torch.device(name)


def progress(console: Console, width: int = 24) -> Progress:
    return Progress(
        TextColumn(f"{{task.description:>{width}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


def draw(console: Console, rows: Sequence[Row], every: bool) -> None:
    """A table per family: each recipe at its worst input, and whatever failed."""
    from reeltime.bench.accuracy import pages

    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        worst = pages.worst(mine)
        shown = [row for row in mine if every or row in worst or row.passed is False]
        order = {(row.op, row.recipe): index for index, row in enumerate(worst)}
        shown.sort(key=lambda row: order[row.op, row.recipe])
        table = grid(f"{family}, {len({row.input for row in mine})} kinds of input")
        table.add_column("op and recipe", overflow="fold", min_width=8)
        table.add_column("input" if every else "worst input", no_wrap=True)
        for name in ("cosine", "L1", "RMSE", "max", "tolerance", ""):
            table.add_column(name, justify="left" if name in ("", "tolerance") else "right")
            table.columns[-1].no_wrap = True
        before = ""
        for row in shown:
            if row.op != before:
                table.add_row(Text(row.op, style="bold"))
            table.add_row(*cells(row))
            before = row.op
        console.print(table)
        for row in mine:
            if row.error:
                line = f"{row.op}, {row.recipe}, {row.input}: {row.error}"
                console.print(Text(" ".join(line.split()), style="red"), soft_wrap=True)
    judged = [row for row in rows if row.passed is not None]
    failed = sum(not row.passed for row in judged)
    line = f"{len(judged)} checks against float64, {failed} failed; "
    line += f"{len(rows) - len(judged)} more shown, not judged"
    console.print(Text(line, style="red" if failed else "green"), soft_wrap=True)
    console.print(
        Text("L1: relative; max: over the RMS of the result; tolerance: of both", style="dim"),
        soft_wrap=True,
    )


def cells(row: Row) -> list[Text]:
    from reeltime.bench.accuracy.check import ours
    from reeltime.bench.accuracy.pages import number, short, verdict

    limits = (row.tolerance_relative_l1, row.tolerance_peak)
    errors = (row.relative_l1, row.rmse, row.peak)
    return [
        Text(f"  {row.recipe}", style="" if ours(row) else "dim italic"),
        Text(row.input.replace("_", " ")),
        Text(f"{row.cosine:.5f}"),
        *(Text(number(error)) for error in errors),
        Text(" ".join(short(limit) for limit in limits if limit is not None)),
        Text(verdict(row), style={True: "green", False: "bold red", None: "dim"}[row.passed]),
    ]
