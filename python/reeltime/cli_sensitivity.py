# SPDX-License-Identifier: Apache-2.0
"""`reeltime check --model`: what every layer of a model loses in 8 bits, and which to leave out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from reeltime.cli_tables import grid, report_console

if TYPE_CHECKING:
    from reeltime.bench.sensitivity import Layer, Together

SHOWN = 25  # layers of the table; --all shows every one


def run(
    spec: str,
    options: dict[str, Any],
    budget: float | None,
    every: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Exit code 1 if Ctrl-C ended it early, or a budget is not met by what was suggested: measured
    above it, or met only by changing nothing that this input reaches."""
    from reeltime import checks
    from reeltime.bench import sensitivity
    from reeltime.cli_check import progress

    if budget is not None and not budget > 0:
        checks.fail("budget", "a relative error > 0", budget, "Pass 0.01 for one percent.")
    subject = sensitivity.load(spec)
    want = sensitivity.reference(subject)
    report = sensitivity.survey(subject, **options)
    found: list[Layer] = []
    levels: list[Together] = []
    suggested: list[str] = []
    interrupted = False
    notes = Console(stderr=True, soft_wrap=True)
    try:
        with progress(notes, width=40) as bar:
            task = bar.add_task("", total=len(report.changes) + 3)
            for layer in sensitivity.layers(subject, report, want):
                bar.update(task, description=layer.path[-40:], advance=1)
                found.append(layer)
            suggested = sensitivity.suggest(found, budget)
            for level in sensitivity.levels(subject, want, found, suggested, **options):
                bar.update(task, description=level.name, advance=1)
                levels.append(level)
    except KeyboardInterrupt:
        interrupted = True
        notes.print(f"interrupted: {len(found)} of {len(report.changes)} places were measured")

    ranked = sensitivity.shared(found)
    console = report_console(as_json)
    draw(console, ranked if every else ranked[:SHOWN], len(ranked), suggested, levels)
    for place in report.left:
        console.print(Text(f"left: {place.path or spec}: {place.why}", style="dim"), soft_wrap=True)
    if picture is not None:
        sensitivity.draw(found, suggested, picture, f"{spec}: {describe(options)}")
    last = next((level for level in levels if level.name == "suggested skip"), None)
    reached = last or (levels[0] if levels else None)
    changed = any(layer.calls and layer.path not in suggested for layer in found)
    missed = budget is not None and not (changed and reached and reached.relative_l1 <= budget)
    if as_json:
        document = {
            "model": spec,
            **options,
            "budget": budget,
            "layers": [layer.document() for layer in ranked],
            "left": [place._asdict() for place in report.left],
            "levels": [vars(level) for level in levels],
            "suggested_skip": suggested,
            "interrupted": interrupted,
            "budget_met": None if budget is None else not missed,
        }
        print(json.dumps(document, allow_nan=False))
    if missed or interrupted:
        raise typer.Exit(1)


def describe(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def draw(
    console: Console,
    layers: Sequence[Layer],
    total: int,
    suggested: Sequence[str],
    levels: Sequence[Together],
) -> None:
    table = grid(f"{total} places, each changed alone", ("place", "relative L1", "share", "cosine"))
    table.add_column("what", overflow="fold")
    for layer in layers:
        skipped = layer.path in suggested
        ran = layer.what if layer.calls else f"{layer.what}: not reached by this input"
        table.add_row(
            Text(layer.path, style="bold" if skipped else ""),
            Text(f"{layer.relative_l1:.2e}"),
            Text(f"{layer.share:.0%}"),
            Text(f"{layer.cosine:.6f}"),
            Text(ran + ("  <- skip" if skipped else "")),
        )
    console.print(table)
    if len(layers) < total:
        console.print(Text(f"{total - len(layers)} more: --all", style="dim"))
    if levels:
        summary = grid(
            "all at once, measured", ("skip", "places", "relative L1", "predicted", "cosine")
        )
        for level in levels:
            expected = "-" if level.predicted is None else f"{level.predicted:.2e}"
            summary.add_row(
                level.name,
                str(level.places),
                f"{level.relative_l1:.2e}",
                expected,
                f"{level.cosine:.6f}",
            )
        console.print(summary)
    if suggested:
        console.print(Text(f"skip={list(suggested)!r}"), soft_wrap=True)
