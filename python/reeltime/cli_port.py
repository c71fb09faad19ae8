# SPDX-License-Identifier: Apache-2.0
"""`reeltime port`: every kernel compiled for every GPU, on a machine that has none.

torch and Triton are imported inside the command: --help must not wait for them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reeltime.arch import ARCHS, Arch
from reeltime.cli_check import progress
from reeltime.cli_stream import check_out
from reeltime.cli_tables import report_console

if TYPE_CHECKING:
    from reeltime.bench.port.report import Row

STYLES = {"ok": "green", "slow path": "yellow", "not offered": "dim"}  # the rest is red


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(port)


def port(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_90, ...: repeat for several; all by default."),
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Kernel family: repeat for several; all by default.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with every number, .html.", show_default=False)
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(
            help="Rewrite the tables between the markers of a page such as docs/porting.md.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compile every kernel for every GPU, without one, and say what fits, spills or is slow.

    Kernels are compiled at the shapes of Wan's transformer and read back from their SASS.  Exit
    code 1 if one fails to compile, spills registers or asks for more shared memory than there is.
    """
    if html is not None:
        check_out(html, ".html")
    if update is not None:
        check_out(update, ".md")
        if arch or family:
            raise ValueError("update: expected all of it. Leave --arch and --family out.")
    archs = [find_arch(name) for name in arch or ()] or list(ARCHS)
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError("triton: not installed. Run pip install 'reeltime[triton]'.")
    os.environ.pop("TRITON_INTERPRET", None)  # decided at import: compiling needs the compiler

    from reeltime import backends, checks
    from reeltime.bench.port import report

    for name in family or ():
        checks.choice("family", name, backends.FAMILIES)
    notes = Console(stderr=True)
    with progress(notes, width=40) as bar:
        task = bar.add_task("recording launches", total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what[:40])

        rows = report.measure(archs, family or backends.FAMILIES, advance)

    console = report_console(as_json)
    draw(console, rows)
    if html is not None:
        names = ", ".join(one.name for one in archs)
        html.write_text(report.html(rows, f"reeltime kernels on {names}"))
    if update is not None:
        report.rewrite(update, rows)
    if as_json:
        print(json.dumps({"rows": report.as_dicts(rows)}, allow_nan=False))
    if any(row.verdict in (report.FAILED, report.SPILLS, report.SHARED) for row in rows):
        raise typer.Exit(1)


def find_arch(name: str) -> Arch:
    """The row of the GPU table that sm_90, sm90, sm_90a or 90 names.

    Raises:
        ValueError: no such row; the message says how one is added.
    """
    digits = name.lower().removeprefix("sm").removeprefix("_").rstrip("af")
    for one in ARCHS:
        if one.name == f"sm{digits}":
            return one
    known = ", ".join(one.name for one in ARCHS)
    raise ValueError(
        f"arch: expected one of {known}, got {name!r}. A new GPU is one row in reeltime/arch.py: "
        "see docs/porting.md."
    )


# Name, width and justification; the last two take what is left.
COLUMNS = (
    ("arch", 7, "left"),
    ("regs", 4, "right"),
    ("spill", 5, "right"),
    ("shared KiB", 10, "right"),
    ("blocks", 6, "right"),
    ("occ.", 4, "right"),
    ("s", 4, "right"),
    ("tensor cores", None, "left"),
    ("verdict", None, "left"),
)


def grid(header: bool) -> Table:
    """Columns of fixed widths, so that one table per kernel stands like one table."""
    table = Table(box=None, padding=(0, 1), show_header=header, expand=True)
    for name, width, justify in COLUMNS:
        table.add_column(name, width=width, justify=justify, overflow="fold")  # type: ignore
        table.columns[-1].ratio = None if width else 1
    return table


def draw(console: Console, rows: Sequence[Row]) -> None:
    """Each kernel on every architecture; then families by architecture."""
    from reeltime.bench.port import report

    for family in dict.fromkeys(row.family for row in rows):
        console.print(Text(f"\n{family}", style="bold reverse"))
        console.print(grid(header=True))
        kernels: dict[str, list[Row]] = {}
        for row in rows:
            if row.family == family and row.kernel:
                kernels.setdefault(f"{row.case}: {row.backend} {row.kernel}", []).append(row)
        for title, mine in kernels.items():
            console.print(Text(title, style="bold"), soft_wrap=True)
            table = grid(header=False)
            for row in mine:
                table.add_row(*cells(row))
            console.print(table)
    cell = report.summary(rows)
    archs = list(dict.fromkeys(row.arch for row in rows))
    table = Table("family", *archs, title="Kernels by verdict", title_justify="left")
    for family in dict.fromkeys(family for family, _ in cell):
        table.add_row(family, *(Text(cell.get((family, arch), "-")) for arch in archs))
    console.print(table)
    for why in dict.fromkeys(f"{row.arch}: {row.why}" for row in rows if not row.kernel):
        console.print(Text(f"not offered on {why}", style="dim"), soft_wrap=True)


def cells(row: Row) -> list[Text]:
    verdict = f"{row.verdict}: {row.why}" if row.why else row.verdict
    return [
        Text(f"  {row.arch}"),
        Text(str(row.registers)),
        Text(str(row.spill_bytes)),
        Text(f"{row.shared_bytes / 1024:.1f}/{row.shared_limit // 1024}"),
        Text(str(row.blocks_per_sm)),
        Text(f"{row.occupancy:.0%}"),
        Text(f"{row.compile_s:.1f}"),
        Text(row.tensor_core or "-"),
        Text(verdict, style=STYLES.get(row.verdict, "bold red")),
    ]
