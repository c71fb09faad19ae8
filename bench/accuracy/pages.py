# SPDX-License-Identifier: Apache-2.0
"""Rows as tables: what docs/accuracy.md holds between its markers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from reeltime.bench.accuracy.check import Row, kinds, ours
from reeltime.bench.accuracy.picture import SERIES

MARKERS = ("<!-- accuracy:begin -->", "<!-- accuracy:end -->")


def number(value: float | None) -> str:
    """Two digits, as short as a table wants them."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN"
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def short(limit: float) -> str:
    return f"{limit:.2g}".replace("e-0", "e-")


def worst(rows: Sequence[Row]) -> list[Row]:
    """Of each op and recipe the input that comes nearest to its tolerance, and the worst of those
    that have none."""
    groups: dict[tuple[str, str, str, bool], list[Row]] = {}
    for row in rows:
        key = (row.family, row.op, row.recipe, row.passed is None)
        groups.setdefault(key, []).append(row)
    found = [max(group, key=nearness) for group in groups.values()]
    ops = list(dict.fromkeys((row.family, row.op) for row in rows))
    return sorted(found, key=lambda row: ops.index((row.family, row.op)))


def nearness(row: Row) -> tuple[bool, float]:
    return (row.passed is False, row.share)


def verdict(row: Row) -> str:
    return {True: "pass", False: "FAIL", None: "shown"}[row.passed]


def markdown(rows: Sequence[Row]) -> str:
    """Per family: recipes by input, then every op and recipe at its worst input."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        columns = kinds(family)
        yield f"\n### {family}: relative L1 by input\n"
        yield "| recipe | " + " | ".join(kind.replace("_", " ") for kind in columns) + " |"
        yield "|---|" + "---|" * len(columns)
        for op, recipe, label in SERIES[family]:
            found = {row.input: row for row in mine if (row.op, row.recipe) == (op, recipe)}
            name = f"**{label}**" if all(ours(row) for row in found.values()) else label
            cells = " | ".join(number(found[kind].relative_l1) for kind in columns)
            yield f"| {name} | {cells} |"
        yield f"\n<details><summary>{family}: every op at its worst input</summary>\n"
        yield (
            "| op | recipe | worst input | cosine | relative L1 | RMSE | max / RMS | tolerance "
            "| verdict |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in worst(mine):
            limits = (row.tolerance_relative_l1, row.tolerance_peak)
            yield (
                f"| {row.op} | {row.recipe} | {row.input.replace('_', ' ')} | {row.cosine:.6f} "
                f"| {number(row.relative_l1)} | {number(row.rmse)} | {number(row.peak)} "
                f"| {', '.join(short(limit) for limit in limits if limit is not None)} "
                f"| {verdict(row)} |"
            )
        yield "\n</details>"


def update(page: Path, rows: Sequence[Row]) -> None:
    """Rewrite what is between the markers.

    Raises:
        ValueError: the page has no markers.
        FileNotFoundError: there is no page.
    """
    text = page.read_text()
    begin, end = (text.find(marker) for marker in MARKERS)
    if begin < 0 or end < begin:
        raise ValueError(f"update: expected {' ... '.join(MARKERS)} in {page}")
    head = text[: begin + len(MARKERS[0])]
    page.write_text(f"{head}\n{markdown(rows)}\n{text[end:]}")
