# SPDX-License-Identifier: Apache-2.0
"""README's tables of kernels: made of bench/results/<gpu>.csv, and of nothing else.

    python -m reeltime.bench.tables --update README.md
    python -m reeltime.bench.tables --check README.md     # exit 1 if it says something else

Of every kernel and shape the newest run counts.  A file is read whole or refused: a figure whose
card or commit nobody knows is none.  What was not measured says so, beside its floor.
"""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer

from reeltime import backends, checks
from reeltime.bench import ceilings, floors, hardware, harness
from reeltime.bench.case import Case
from reeltime.bench.hardware import CARDS, Card
from reeltime.bench.rows import COLUMNS, HOST_FILE, Environment, Row
from reeltime.bench.shapes import DIT

RESULTS = Path(__file__).parent / "results"
MARKERS = ("<!-- bench:begin -->", "<!-- bench:end -->")
UNMEASURED = "not measured"
REQUIRED = ("family", "op", "shape", "dtype", "backend", "device", "commit", "date")
DATE = "%Y-%m-%dT%H:%M:%SZ"  # as rows.environment writes it

# A kernel per family as a chunk of Wan's transformer calls it: always shown, the others folded.
MAIN = (
    ("quantize", "1x128", "6120x1536", "int8"),
    ("gated_residual_norm_quantized", "LayerNorm, modulated, 1x128", "6120x1536", "int8"),
    ("write", "v fp8", "6120x1536", "int8"),
    ("gemm_w8a8_requantized", "GELU, requantised, 1x128", "6120x8960x1536", "int8"),
    ("segment_attention", "cached", "6120x42840, 12 heads, D 128", "int8, fp8"),
    ("segment_sla", "top 10%, cached", "6120x42840, 12 heads, D 128", "int8, fp8"),
)


# --- The files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A row of a file: what was measured, and where."""

    row: Row
    where: Environment

    @property
    def key(self) -> tuple[str, ...]:
        """Two results of one key are two runs of one thing."""
        row = self.row
        return (row.family, row.op, row.form, row.shape, row.dtype, row.backend)

    @property
    def kernel(self) -> tuple[str, ...]:
        return (self.row.op, self.row.form, self.row.shape, self.row.dtype)


def read(path: Path) -> list[Result]:
    """A file of results, every cell checked.

    Raises:
        ValueError: names file, line and column, what was expected, and what would work.
    """
    card = next((card for card in CARDS if card.file == path.name), None)
    if card is None and path.name != HOST_FILE:
        known = ", ".join(card.file for card in CARDS)
        raise ValueError(
            f"{path}: expected the file of a known card ({known}) or {HOST_FILE}. A new card is "
            "one row in bench/hardware.py; what is no result of `reeltime bench` goes elsewhere."
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(_results(path, csv.reader(file, strict=True), card))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({error}). Measure again.") from error


def _results(path: Path, lines: Any, card: Card | None) -> Iterator[Result]:
    header = tuple(next(lines, ()))
    if header != COLUMNS:
        odd = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
        raise ValueError(
            f"{path}, line 1: its header is another's ({', '.join(odd)}). Move it away and "
            "measure again with `reeltime bench --out`."
        )
    types = get_type_hints(Row) | get_type_hints(Environment)
    for cells in lines:
        where = f"{path}, line {lines.line_num}"
        if len(cells) != len(COLUMNS):
            raise ValueError(
                f"{where}: expected {len(COLUMNS)} cells, got {len(cells)}. Remove the line: an "
                "interrupted run leaves such."
            )
        found = dict(zip(COLUMNS, cells, strict=True))
        values = {name: _value(where, name, cell, types[name]) for name, cell in found.items()}
        _check(where, values, card)
        row, place = (
            kind(**{field.name: values[field.name] for field in fields(kind)})
            for kind in (Row, Environment)
        )
        yield Result(row, place)


def _value(where: str, column: str, cell: str, hint: Any) -> Any:
    """A cell as its column's type.  Empty: None, or "" where that is a value."""
    kinds = get_args(hint) or (hint,)
    if str in kinds:
        return cell or (None if type(None) in kinds else "")
    if not cell:
        return None
    kind, expected = (int, "a whole number") if int in kinds else (float, "a number")
    try:
        value = kind(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        refuse(where, column, f"{expected} >= 0, or nothing", cell, "Measure again.")
    return value


def _check(where: str, values: dict[str, Any], card: Card | None) -> None:
    for column in REQUIRED:
        if not values[column]:
            fix = "It cannot be repeated: measure again, with --commit outside of git."
            if column != "commit":
                fix = "Remove the line, or measure again."
            refuse(where, column, "a name", "nothing", fix)
    device, again = values["device"], "Each card has a file of its own: see bench/hardware.py."
    if card is None and not device.startswith("host: "):
        refuse(where, "device", f"a host's name in {HOST_FILE}", device, again)
    if card is not None and hardware.find(device) is not card:
        refuse(where, "device", repr(card.device), device, again)
    families = (*backends.FAMILIES, harness.STEP, ceilings.FAMILY)
    if values["family"] not in families:
        refuse(where, "family", f"one of {', '.join(families)}", values["family"], "Measure again.")
    try:
        datetime.datetime.strptime(values["date"], DATE)
    except ValueError:
        refuse(where, "date", "2026-01-31T12:00:00Z or so", values["date"], "Measure again.")
    times = [values[column] for column in ("p20_us", "p50_us", "p80_us")]
    if None not in times and times != sorted(times):
        refuse(where, "p50_us", "p20 <= p50 <= p80", times, "Measure again.")
    if times[1] is not None and values["error"]:
        refuse(where, "error", "none beside a time", values["error"], "Measure again.")


def refuse(where: str, column: str, expected: str, got: object, fix: str) -> NoReturn:
    checks.fail(f"{where}, column {column}", expected, repr(got), fix)


def newest(results: Iterable[Result]) -> list[Result]:
    """Of every key the run that began last; of two lines of one run the later one."""
    found: dict[tuple[str, ...], Result] = {}
    for one in results:
        before = found.get(one.key)
        if before is None or one.where.date >= before.where.date:
            found[one.key] = one
    return list(found.values())


# --- The tables ---------------------------------------------------------------------------------

HEAD = (
    *("kernel", "shape", "p50 us (p20-p80)", "rate", "floor us", "% of floor"),
    *("best peer", "ratio"),
)


def markdown(folder: Path = RESULTS) -> str:
    """All of it: a table per card that was measured, then the host's; of no card, expectations."""
    files = {path.name: newest(read(path)) for path in sorted(folder.glob("*.csv"))}
    order = [card for card in CARDS if files.get(card.file)]
    parts = [of_card(card, files[card.file]) for card in order]
    if not parts:
        parts.append(of_nobody())
    if files.get(HOST_FILE):
        parts += [of_host(mine) for mine in by_device(files[HOST_FILE])]
    return "\n\n".join(parts)


def by_device(results: Iterable[Result]) -> list[list[Result]]:
    found: dict[str, list[Result]] = {}
    for one in results:
        found.setdefault(one.row.device, []).append(one)
    return list(found.values())


def ours(result: Result) -> bool:
    return result.row.family == harness.STEP or result.row.backend in harness.TIMED


def of_nobody() -> str:
    """No card was measured: what the planned ones cannot beat, and should reach of it."""
    columns = [f"{name} {what}" for name in floors.PLANNED for what in ("floor us", "expected")]
    lines = []
    for case in main_cases():
        parts = [named(case.op, case.dtype, case.form), case.shape]
        for name in floors.PLANNED:
            least = floors.floor(case, hardware.lookup(name))
            parts += [number(least.floor_us, "{:.1f}"), number(least.expected_share, "{:.0%}")]
        lines.append(cells(*parts, UNMEASURED))
    said = "No GPU has been measured. Floors by the data sheet, and the share that is expected:"
    return f"{said}\n\n{table(('kernel', 'shape', *columns, 'p50 us'), lines)}"


def of_card(card: Card, results: Sequence[Result]) -> str:
    """The main kernels, measured or not, and folded below them whatever else was measured."""
    mine = [one for one in results if ours(one)]
    lines, shown = [], []
    for case in main_cases():
        found = [one for one in mine if one.kernel == (case.op, case.form, case.shape, case.dtype)]
        lines += [line(one.row) for one in found] or [expected(case, card)]
        shown += found
    parts = [f"**{card.device}**, {conditions(results)}:", table(HEAD, lines)]
    if best := ceilings_line(results):
        parts.append(best)
    rest = [one for one in mine if one not in shown]
    return "\n\n".join([*parts, *folded(rest)])


def of_host(results: Sequence[Result]) -> str:
    """A processor has no floors, and its tiny shapes are nobody's: all of it folded."""
    name = results[0].row.device.removeprefix("host: ")
    line = f"**Figures of the host**, which say nothing of a GPU: {name}, {conditions(results)}"
    return "\n\n".join([line, *folded([one for one in results if ours(one)])])


def main_cases() -> list[Case]:
    every = {
        (case.op, case.form, case.shape, case.dtype): case
        for family in backends.FAMILIES
        for case in harness.cases(family, DIT)
    }
    return [every[key] for key in MAIN]


def table(head: Sequence[str], lines: Sequence[str]) -> str:
    """Two columns to the left, figures to the right."""
    rule = "|---|---|" + "---:|" * (len(head) - 2)
    return "\n".join([cells(*head), rule, *lines])


def folded(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    summary = f"<details><summary>{len(results)} more measurements</summary>"
    return [summary, table(HEAD, [line(one.row) for one in results]), "</details>"]


def cells(*parts: str) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


def named(op: str, dtype: str, form: str, backend: str = "") -> str:
    said = ", ".join(part for part in (dtype, form, backend) if part)
    return f"`{op}` {said}"


def number(value: float | None, form: str) -> str:
    return UNMEASURED if value is None else form.format(value)


def line(row: Row) -> str:
    """One kernel of ours as it was measured."""
    time = number(row.p50_us, "{:.1f}")
    if row.error:
        time = "failed"
    elif row.p20_us is not None and row.p80_us is not None:
        time = f"**{time}** ({row.p20_us:.1f}-{row.p80_us:.1f})"
    return cells(
        named(row.op, row.dtype, row.form, row.backend),
        row.shape,
        time,
        rate(row),
        number(row.floor_us, "{:.1f}"),
        number(row.share_of_floor, "{:.0%}"),
        row.best_peer or UNMEASURED,
        number(row.ratio, "{:.2f}x"),
    )


def rate(row: Row) -> str:
    """Whichever of the two is nearer to its ceiling; the other says nothing."""
    if row.tflops is None or row.gbps is None:
        return number(row.gbps, "{:.0f} GB/s") if row.tflops is None else f"{row.tflops:.2f} TFLOPS"
    compute = row.tflops / row.ceiling_tflops if row.ceiling_tflops else math.inf
    moved = row.gbps / row.ceiling_gbps if row.ceiling_gbps else 0.0
    return f"{row.tflops:.0f} TFLOPS" if compute >= moved else f"{row.gbps:.0f} GB/s"


def ceilings_line(results: Sequence[Result]) -> str:
    """What the card itself was seen to do, whoever's kernel it was."""
    rows = [one.row for one in results if one.row.family == ceilings.FAMILY and one.row.p50_us]
    parts = [
        f"{row.gbps:.0f} GB/s copied" if row.gbps is not None
        else f"{row.tflops or 0:.0f} TFLOPS {row.dtype}{row.form and f' ({row.form})'}"
        for row in rows
    ]  # fmt: skip
    return f"Ceilings by PyTorch's own copy and products: {', '.join(parts)}." if parts else ""


def expected(case: Case, card: Card) -> str:
    """One that nobody measured on the card: its floor by the data sheet."""
    least = floors.floor(case, card).floor_us
    sheet = "no such format" if least is None else f"{least:.1f} by data sheet"
    name = named(case.op, case.dtype, case.form)
    return cells(name, case.shape, UNMEASURED, UNMEASURED, sheet, *[UNMEASURED] * 3)


def conditions(results: Sequence[Result]) -> str:
    """Clocks, power, dates and commits of all of them, in a line."""

    def span(read: Callable[[Row], float | None], unit: str) -> str:
        values = sorted(value for one in results if (value := read(one.row)) is not None)
        if not values:
            return ""
        ends = dict.fromkeys(f"{value:.0f}" for value in (values[0], values[-1]))
        return f"{'-'.join(ends)} {unit}"

    clocks = [
        span(lambda row: row.sm_mhz, "MHz"),
        span(lambda row: row.memory_mhz, "MHz memory"),
        span(lambda row: row.power_w, "W"),
        span(lambda row: row.temperature_c, "C"),
    ]
    found = [part for part in clocks if part] or [f"clocks and power {UNMEASURED}"]
    reasons = {one.row.throttle for one in results} - {None, "none"}
    if reasons:
        found.append(f"throttled by {', '.join(sorted(map(str, reasons)))}")
    days = sorted({one.where.date.partition("T")[0] for one in results})
    found.append(" to ".join(dict.fromkeys((days[0], days[-1]))))
    found.append("commit " + ", ".join(dict.fromkeys(str(one.where.commit) for one in results)))
    found += dict.fromkeys(f"torch {one.where.torch}" for one in results if one.where.torch)
    return ", ".join(found)


# --- The page -----------------------------------------------------------------------------------


def split(page: Path) -> tuple[str, str, str]:
    """The page before, between and behind the markers.

    Raises:
        ValueError: they are not there once each, in order.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(MARKERS[0])
    inside, end, tail = rest.partition(MARKERS[1])
    if not end or any(text.count(marker) != 1 for marker in MARKERS):
        raise ValueError(f"{page}: expected {' and '.join(MARKERS)} in it, once each and in order")
    return head + begin, inside, end + tail


def rewrite(page: Path, folder: Path = RESULTS) -> None:
    """Put the tables of that folder between the markers."""
    head, _, tail = split(page)
    page.write_text(f"{head}\n{markdown(folder)}\n{tail}", encoding="utf-8")


def stale(page: Path, folder: Path = RESULTS) -> bool:
    return split(page)[1] != f"\n{markdown(folder)}\n"


def main(
    update: Annotated[
        Path | None, typer.Option(help="The page to rewrite: README.md.", show_default=False)
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="The page to compare: exit code 1 if it is stale.", show_default=False),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of <gpu>.csv.")] = RESULTS,
) -> None:
    """Write README's tables of kernels from the results that are committed."""
    try:
        if (update is None) == (check is None):
            raise ValueError("expected either --update or --check, and a page")
        if not results.is_dir():
            raise FileNotFoundError(f"results: no such folder: {results}")
        if update is not None:
            rewrite(update, results)
        elif check is not None and stale(check, results):
            update_it = f"python -m reeltime.bench.tables --update {check}"
            typer.echo(f"{check} is stale: {update_it}", err=True)
            raise typer.Exit(1)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
