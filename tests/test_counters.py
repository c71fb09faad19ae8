# SPDX-License-Identifier: Apache-2.0
"""Counters of Nsight Compute: what is asked for, what is kept, and when it is skipped aloud."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest

from reeltime.bench import counters

NVTX = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
TIME, SM = "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed"
STALL = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
PIPE = "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"
PAGE = f"""\
==PROF== Connected to process 1
"ID","Process ID","Kernel Name","{NVTX}","{TIME}","{SM}","{STALL}","{PIPE}","odd__metric.max"
"","","","","ns","%","inst","%","x"
"0","9","attention_sm90","<default>:reeltime: cuda, op 6120x42840, D 128:none","1000","80","0.5","70","1"
"1","9","void at::fill","","200","5","0","0","1"
"""  # noqa: E501


@pytest.fixture
def run(tmp_path):
    """The module with this in place of ncu: what it prints when it profiles, and its exit code."""

    def go(said="", code=0, installed=True):
        (tmp_path / "page.csv").write_text(PAGE)
        script = (
            "import pathlib, sys\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "with (here / 'asked').open('a') as file: file.write(' '.join(sys.argv[1:]) + '\\n')\n"
            "if '--import' in sys.argv: print((here / 'page.csv').read_text()); raise SystemExit\n"
            f"print({said!r}); code = {code}\n"
            "if not code: pathlib.Path(sys.argv[sys.argv.index('-o') + 1] + '.ncu-rep').touch()\n"
            "raise SystemExit(code)\n"
        )
        if installed:
            (tmp_path / "ncu.py").write_text(
                script
            )  # whose interpreter may have a space in its path
            call = f"exec '{sys.executable}' '{tmp_path / 'ncu.py'}' \"$@\""
            (tmp_path / "ncu").write_text(f"#!/bin/sh\n{call}\n")
            (tmp_path / "ncu").chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-m", "reeltime.bench.counters", "--out", str(tmp_path)],
            capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)},
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return go


def test_a_line_per_kernel_with_what_bounds_it(run, tmp_path):
    code, said = run()
    assert code == 0, said
    with (tmp_path / "counters.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "called": "cuda, op 6120x42840, D 128",
        "kernel": "attention_sm90",
        "time ns": "1000",
        "sm %": "80",
        "stalled_barrier inst": "0.5",
        "sm__inst_executed_pipe_tensor %": "70",
    }
    assert (second["called"], second["kernel"]) == ("", "void at::fill")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--clock-control none" in asked[0]  # the card is left as it is
    assert asked[0].endswith("-m reeltime.bench.counters --launch")


@pytest.mark.parametrize(
    "given, code, why",
    [
        ({"said": "==ERROR== ERR_NVGPUCTRPERM - no permission", "code": 1}, 77, "ERR_NVGPUCTRPERM"),
        ({"said": "kernel failed", "code": 3}, 1, "kernel failed"),
    ],
)
def test_what_is_not_permitted_is_skipped_and_what_fails_is_not(run, given, code, why):
    got, said = run(**given)
    assert (got, "skipped" in said) == (code, code == 77)
    assert why in said


def test_without_ncu_it_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    with pytest.raises(counters.typer.Exit) as stop:
        counters.main(tmp_path)
    assert stop.value.exit_code == counters.SKIPPED
    assert "skipped: ncu is not installed" in capsys.readouterr().out


def test_a_page_without_a_table_is_told():
    with pytest.raises(ValueError, match="expected a table that begins with ID"):
        list(counters.rows("==WARNING== no kernels were profiled"))


@pytest.mark.gpu
def test_main_kernels_are_launched():
    counters.launch()
