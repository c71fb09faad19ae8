# SPDX-License-Identifier: Apache-2.0
"""README's tables of kernels: made of results files alone, which are refused if anything is odd."""

from __future__ import annotations

import csv
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from reeltime.bench import floors, hardware, rows, tables
from reeltime.bench.rows import Environment, Row

ROOT = Path(__file__).resolve().parent.parent
H200 = hardware.lookup("H200")
ROW = Row(
    "gemm_w8a8", "gemm_w8a8_requantized", "GELU, requantised, 1x128", "6120x8960x1536", "int8",
    "cuda", "NVIDIA H200", p50_us=120.0, p20_us=119.0, p80_us=121.5, tflops=1404.0, gbps=560.0,
    floor_us=90.0, share_of_floor=0.75, best_peer="torch._int_mm 2.11", ratio=1.25,
    ceiling_gbps=4200.0, ceiling_tflops=1872.0, sm_mhz=1830, memory_mhz=3201, power_w=688.4,
    temperature_c=61, throttle="power cap",
)  # fmt: skip
NORM = replace(
    ROW, family="norm", op="norm", form="RMSNorm", shape="64x128", dtype="bf16", backend="triton",
    tflops=2.0, gbps=3990.0, ceiling_tflops=60.0, best_peer=None, ratio=None, sm_mhz=1980,
    throttle="none",
)  # fmt: skip
PEER = replace(ROW, form="", backend="torch._int_mm 2.11", p50_us=150.0, p20_us=None, p80_us=None)
WHERE = Environment(
    "abc123", "2026-11-20T10:00:00Z", "2.11.0", "3.6", "13.0", "13.0", "580", "3.12"
)


def write(folder, *found, where=WHERE, name=H200.file):
    rows.append(folder / name, found, where)
    return folder / name


def cells(text, name):
    """Of the lines whose first cell has the name."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if name in line[0]]


def tables_command(*arguments):
    app = Typer()
    app.command()(tables.main)
    done = CliRunner().invoke(app, [str(x) for x in arguments])
    return done.exit_code, done.output


# --- README -------------------------------------------------------------------------------------


def test_readme_is_what_the_command_writes():
    """From the results that are committed: nobody types a figure."""
    assert not tables.stale(ROOT / "README.md", ROOT / "bench/results")


def test_a_page_is_rewritten_between_its_markers_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{tables.MARKERS[0]}\ntyped by hand\n{tables.MARKERS[1]}\nbelow\n")
    write(tmp_path, ROW)
    options = ("--results", tmp_path)
    code, said = tables_command("--check", page, *options)
    assert code == 1
    assert "is stale: python -m reeltime.bench.tables --update" in said
    assert tables_command("--update", page, *options) == (0, "")
    assert tables_command("--check", page, *options) == (0, "")
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith(f"\n{tables.MARKERS[1]}\nbelow\n")
    assert "typed by hand" not in text
    assert "**120.0**" in text
    page.write_text(text.replace("**120.0**", "**110.0**"))
    assert tables_command("--check", page, *options)[0] == 1


@pytest.mark.parametrize("text", ["none", "{1} {0}", "{0} {0} {1}", "{0}"])
def test_a_page_without_markers_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text.format(*tables.MARKERS))
    code, said = tables_command("--update", page, "--results", tmp_path)
    assert code == 2
    assert "once each and in order" in said


def test_arguments_are_checked(tmp_path):
    for arguments in ((), ("--update", "a.md", "--check", "a.md")):
        code, said = tables_command(*arguments)
        assert code == 2
        assert "expected either --update or --check" in said
    code, said = tables_command("--check", "a.md", "--results", tmp_path / "none")
    assert code == 2
    assert "no such folder" in said


# --- What is shown ------------------------------------------------------------------------------


def test_without_results_each_family_has_a_floor_and_no_time(tmp_path):
    text = tables.markdown(tmp_path)
    lines = cells(text, "`")
    assert len(lines) == len(tables.MAIN) == len({case.family for case in tables.main_cases()})
    assert {line[-1] for line in lines} == {"not measured"}
    (found,) = cells(text, "`gemm_w8a8_requantized`")
    planned = [floors.floor(tables.main_cases()[3], hardware.lookup(n)) for n in floors.PLANNED]
    assert found[2:6] == [
        cell for one in planned for cell in (f"{one.floor_us:.1f}", f"{one.expected_share:.0%}")
    ]


def test_a_card_has_its_measurements_and_what_is_missing(tmp_path):
    write(tmp_path, PEER, ROW, NORM)
    text = tables.markdown(tmp_path)
    assert cells(text, "`gemm_w8a8_requantized`") == [[
        "`gemm_w8a8_requantized` int8, GELU, requantised, 1x128, cuda", "6120x8960x1536",
        "**120.0** (119.0-121.5)", "1404 TFLOPS", "90.0", "75%", "torch._int_mm 2.11", "1.25x",
    ]]  # fmt: skip
    assert cells(text, "`norm`") == [[
        "`norm` bf16, RMSNorm, triton", "64x128", "**120.0** (119.0-121.5)", "3990 GB/s", "90.0",
        "75%", "not measured", "not measured",
    ]]  # fmt: skip
    (attention,) = cells(text, "`segment_attention`")
    assert attention[2:4] == attention[5:7] == ["not measured"] * 2
    assert attention[4] == "814.0 by data sheet"
    assert text.startswith(
        "**NVIDIA H200**, 1830-1980 MHz, 3201 MHz memory, 688 W, 61 C, throttled by power cap, "
        "2026-11-20, commit abc123, torch 2.11.0:\n"
    )
    assert "<summary>1 more measurements</summary>" in text
    assert "No GPU" not in text


def test_the_newest_run_counts(tmp_path):
    """Of each kernel and backend; wherever in the file it stands."""
    later = replace(WHERE, commit="def456", date="2026-11-21T10:00:00Z")
    write(tmp_path, replace(ROW, p50_us=120.5), where=later)
    write(tmp_path, ROW, replace(ROW, backend="triton", p50_us=121.0))
    text = tables.markdown(tmp_path)
    times = {line[0].rpartition(" ")[2]: line[2] for line in cells(text, "`gemm_w8a8_requ")}
    assert times == {"cuda": "**120.5** (119.0-121.5)", "triton": "**121.0** (119.0-121.5)"}
    assert "2026-11-20 to 2026-11-21, commit def456, abc123" in text


def test_failures_and_losses_are_shown(tmp_path):
    broken = replace(
        ROW, p50_us=None, p20_us=None, p80_us=None, tflops=None, gbps=None, share_of_floor=None,
        ratio=None, error="WrongResultError: relative L1 3",
    )  # fmt: skip
    write(tmp_path, broken, replace(ROW, backend="triton", ratio=0.8))
    failed, slow = cells(tables.markdown(tmp_path), "`gemm_w8a8_requ")
    assert failed[2:4] == ["failed", "not measured"]
    assert slow[-1] == "0.80x"


def test_a_host_is_no_card(tmp_path):
    """Its figures are folded and bear its name; the cards are still not measured."""
    host = replace(ROW, device="host: EPYC, 2 threads", backend="reference")
    for name in ("floor_us", "share_of_floor", "ceiling_gbps", "ceiling_tflops", "sm_mhz",
                 "memory_mhz", "power_w", "temperature_c", "throttle"):  # fmt: skip
        host = replace(host, **{name: None})
    write(tmp_path, host, name=rows.HOST_FILE)
    text = tables.markdown(tmp_path)
    assert text.startswith("No GPU has been measured.")
    assert "nothing of a GPU: EPYC, 2 threads, clocks and power not measured, 2026-11-20" in text
    assert cells(text, "reference")[0][4:6] == ["not measured", "not measured"]


# --- What is refused ----------------------------------------------------------------------------


BAD = {
    "commit": ("", "a name, got 'nothing'. It cannot be repeated: measure again, with --commit"),
    "device": ("", "a name, got 'nothing'"),
    "family": ("gemm", "one of quant, norm, .*, ceiling, got 'gemm'"),
    "op": ("", "a name"),
    "date": ("yesterday", "2026-01-31T12:00:00Z or so, got 'yesterday'"),
    "p50_us": ("fast", "a number >= 0, or nothing, got 'fast'"),
    "p80_us": ("1.0", "p20 <= p50 <= p80"),
    "tflops": ("nan", "a number"),
    "gbps": ("inf", "a number"),
    "ratio": ("-1", "a number"),
    "sm_mhz": ("1830.5", "a whole number"),
    "error": ("failed", "none beside a time"),
}


@pytest.mark.parametrize("column", BAD)
def test_a_bad_cell_is_named_with_file_line_and_column(tmp_path, column):
    path = write(tmp_path, ROW, NORM)
    assert len(tables.read(path)) == 2
    cell, message = BAD[column]
    lines = list(csv.reader(path.open(newline="")))
    lines[2][rows.COLUMNS.index(column)] = cell
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    named = "p50_us" if column == "p80_us" else column
    with pytest.raises(
        ValueError, match=rf"{H200.file}, line 3, column {named}: expected {message}"
    ):
        tables.markdown(tmp_path)


def test_a_row_of_another_card_is_refused(tmp_path):
    path = write(tmp_path, replace(ROW, device="NVIDIA GeForce RTX 5090"))
    with pytest.raises(ValueError, match="line 2, column device: expected 'NVIDIA H200', got"):
        tables.read(path)
    path = write(tmp_path, ROW, name=rows.HOST_FILE)
    with pytest.raises(ValueError, match="column device: expected a host's name"):
        tables.read(path)


def test_the_file_of_an_unknown_card_is_refused(tmp_path):
    write(tmp_path, replace(ROW, device="GTX 1080"), name="gtx-1080.csv")
    with pytest.raises(ValueError, match=r"gtx-1080.csv: .* \(.*h200.csv.* bench/hardware"):
        tables.markdown(tmp_path)


@pytest.mark.parametrize("change", [
    (lambda text: text.replace("p50_us", "microseconds", 1), r"line 1: .*\(microseconds, p50_us\)"),
    (lambda text: "", r"line 1: its header is another's"),
    (lambda text: text + "gemm_w8a8,cut", r"line 3: expected \d+ cells, got 2"),
    (lambda text: text + "\n", r"line 3: expected \d+ cells, got 0"),
    (lambda text: text + '"', "not a CSV file"),
    (lambda text: text + "\udcff", "not a CSV file"),
], ids=["header", "empty", "cut", "blank", "quote", "bytes"])  # fmt: skip
def test_what_is_no_results_file_is_refused(tmp_path, change):
    path = write(tmp_path, ROW)
    text = change[0](path.read_text())
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{path.name}.*{change[1]}"):
        tables.markdown(tmp_path)


def test_every_column_comes_back_as_it_was_written(tmp_path):
    """Those too that are added to rows.py some day."""
    (found,) = tables.read(write(tmp_path, ROW))
    for field in fields(Row):
        want, got = getattr(ROW, field.name), getattr(found.row, field.name)
        assert type(got) is type(want)
        assert got == want or math.isclose(got, want, rel_tol=1e-5)
    assert found.where == WHERE


def test_ceilings_stand_above_what_they_bound(tmp_path):
    copied = replace(ROW, family="ceiling", op="copy", form="", shape="2048 MiB", dtype="uint8",
                     backend="torch", tflops=None, gbps=4301.0)  # fmt: skip
    product = replace(copied, op="product", form="fast sums", dtype="fp8", tflops=1402.0, gbps=None)
    write(tmp_path, ROW, copied, product)
    text = tables.markdown(tmp_path)
    assert "products: 4301 GB/s copied, 1402 TFLOPS fp8 (fast sums)." in text
    assert "more measurements" not in text  # nor are they kernels of ours
