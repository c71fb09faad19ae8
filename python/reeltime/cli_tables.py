# SPDX-License-Identifier: Apache-2.0
"""Where the commands print, and tables of one look."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 120  # of tables that no terminal shows
UNMEASURED = "not measured"


def report_console(as_json: bool, wider: int = 0) -> Console:
    """For tables: on stdout, which with --json is left to the document.

    wider: columns more than PIPED_WIDTH, where no terminal says how many there are.
    """
    console = Console(stderr=as_json)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH + wider
    return console


def grid(title: str, columns: Sequence[str] = ()) -> Table:
    """A table with these columns: the first to the left and folding, the others to the right."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box parts columns by a space of its own
        show_edge=False,
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    return table


def number(value: float | None, form: str = "{:.1f}") -> str:
    return UNMEASURED if value is None else form.format(value)
