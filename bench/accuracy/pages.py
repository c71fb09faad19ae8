# SPDX-License-Identifier: Apache-2.0
"""Rows as tables: what docs/accuracy.md holds between its markers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from reeltime.bench.accuracy.check import PATHS, Row, kinds, ours
from reeltime.bench.accuracy.paths import PEERS
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


def markdown(rows: Sequence[Row], beside: Sequence[Row] = ()) -> str:
    """Attention's paths, then per family: recipes by input, and every op and recipe at its worst.

    beside: rows of other backends or devices, which are shown with the paths.
    """
    return "\n".join(_lines(rows, beside))


def _lines(rows: Sequence[Row], beside: Sequence[Row]) -> Iterator[str]:
    paths = [row for row in rows if row.family == PATHS]
    if paths:
        yield from _paths(paths, [row for row in beside if row.family == PATHS])
    for family in dict.fromkeys(row.family for row in rows if row.family != PATHS):
        mine = [row for row in rows if row.family == family]
        columns = kinds(family)
        yield f"\n### {family}: relative L1 by input\n"
        yield from _header("recipe", columns)
        for op, recipe, label in SERIES[family]:
            found = {row.input: row for row in mine if (row.op, row.recipe) == (op, recipe)}
            name = f"**{label}**" if all(ours(row) for row in found.values()) else label
            cells = " | ".join(number(found[kind].relative_l1) for kind in columns)
            yield f"| {name} | {cells} |"
        yield f"\n<details><summary>{family}: every op at its worst input</summary>\n"
        yield from _details(worst(mine), "worst input")


def _header(first: str, columns: Sequence[str]) -> Iterator[str]:
    yield f"| {first} | " + " | ".join(kind.replace("_", " ") for kind in columns) + " |"
    yield "|---|" + "---|" * len(columns)


def _details(rows: Sequence[Row], column: str) -> Iterator[str]:
    errors = "cosine | relative L1 | RMSE | max / RMS"
    yield f"| op | recipe | {column} | {errors} | tolerance | verdict |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        limits = (row.tolerance_relative_l1, row.tolerance_peak)
        yield (
            f"| {row.op} | {row.recipe} | {row.input.replace('_', ' ')} | {row.cosine:.6f} "
            f"| {number(row.relative_l1)} | {number(row.rmse)} | {number(row.peak)} "
            f"| {', '.join(short(limit) for limit in limits if limit is not None)} "
            f"| {verdict(row)} |"
        )
    yield "\n</details>"


# --- Attention, path by path --------------------------------------------------------------------


def _place(row: Row) -> str:
    return f"{row.backend}, {row.device}"


def _paths(rows: Sequence[Row], beside: Sequence[Row]) -> Iterator[str]:
    columns = kinds(PATHS)
    errors: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in (*rows, *beside):
        place = "" if row in rows else _place(row)
        errors.setdefault((row.op, row.recipe, place), {})[row.input] = row.relative_l1
    mine = {(row.op, row.recipe) for row in rows if ours(row)}

    yield "\n### attention, path by path: relative L1 by input\n"
    yield from _header("path", columns)
    for op, recipe in dict.fromkeys((row.op, row.recipe) for row in rows):
        for (other_op, other, place), found in errors.items():
            if (other_op, other) != (op, recipe):
                continue
            name = place or (f"**{op}, {recipe}**" if (op, recipe) in mine else f"{op}, {recipe}")
            yield f"| {name} | " + " | ".join(number(found.get(k)) for k in columns) + " |"

    yield "\nThe error of a path as a multiple of its peer's: below 1, ours is the more accurate.\n"
    yield from _header("path over peer", columns)
    ratios: dict[str, dict[float, str]] = {}  # of each peer: ratio -> where
    for (op, recipe, place), found in errors.items():
        for peer in PEERS.get((op, recipe), ()):
            theirs = errors.get((op, peer, place)) or errors[op, peer, ""]
            over = {k: found[k] / theirs[k] for k in columns if k in found and theirs.get(k)}
            label = f"{op}, {recipe}" + (f" ({place})" if place else "")
            yield f"| {label} / {peer} | " + " | ".join(ratio(over.get(k)) for k in columns) + " |"
            seen = ratios.setdefault(peer, {})
            seen |= {value: f"{label}, {kind.replace('_', ' ')}" for kind, value in over.items()}
    every = [value for seen in ratios.values() for value in seen]
    better = sum(value <= 1.005 for value in every)
    share = f"{better} of {len(every)} comparisons"
    yield f"\nAt least as accurate, to half a percent, in {share}; against\n"
    for peer, seen in ratios.items():
        most = max(seen)
        yield f"- {peer}: {ratio(min(seen))} to {ratio(most)} times its error, most in {seen[most]}"
    yield "\n<details><summary>every path on every input</summary>\n"
    yield from _details(rows, "input")


def ratio(value: float | None) -> str:
    return "" if value is None else "< 0.01" if value < 0.01 else f"{value:.2f}"


def update(page: Path, rows: Sequence[Row], beside: Sequence[Row] = ()) -> None:
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
    page.write_text(f"{head}\n{markdown(rows, beside)}\n{text[end:]}")
