# SPDX-License-Identifier: Apache-2.0
"""A long stream: its rows, and that what drifts or grows is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import typer
from PIL import Image

from reeltime.bench import soak
from reeltime.bench.bench_step import TINY
from reeltime.bench.plan import Target
from reeltime.bench.profile import Rig, Setting
from reeltime.model.config import PRESETS
from reeltime.model.quality import QUALITIES

CPU = torch.device("cpu")
TARGET = Target(
    "tiny", (64, 48), "vidu_s1", 2, 7, 3, True, "tiny", (8, 4), "none", 0, ""
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(soak, "DRIFT", 100.0)  # others use this machine


@pytest.mark.parametrize("level", ["bf16", "int8+sla"])
def test_a_row_has_time_and_memory(level):
    row = soak.soak(TARGET, Setting(QUALITIES[level]), CPU, 6)
    assert row.error is None
    assert row.chunks == len(row.ms) == 6
    assert row.p20_ms <= row.p50_ms <= row.p80_ms <= row.worst_ms
    assert row.fps == pytest.approx(1e3 * TARGET.frames / row.p50_ms)
    assert [look["chunk"] for look in row.memory] == list(range(6))
    assert row.planned > 0
    assert row.measured is row.reserved is row.device_growth is None  # of a GPU
    if row.host_growth is not None:
        assert row.steady == (row.host_growth <= soak.GROWTH)


def test_it_ends_in_time():
    row = soak.soak(TARGET, Setting(), CPU, 10**6, seconds=0.5)
    assert row.error is None
    assert row.chunks == len(row.ms) < 10**5
    assert row.memory[-1]["chunk"] == row.chunks - 1


@pytest.mark.skipif(soak.resident() is None, reason="needs /proc")
def test_a_leak_is_noticed(monkeypatch):
    kept, chunk = [], Rig.chunk

    def leaking(rig, around):
        kept.append(torch.ones(2**22))  # 16 MB
        chunk(rig, around)

    monkeypatch.setattr(Rig, "chunk", leaking)
    row = soak.soak(TARGET, Setting(), CPU, 6)
    assert row.host_growth > 3 * 2**24
    assert row.steady is False


def test_memory_is_that_of_an_eager_chunk(monkeypatch):
    """A graph's memory is the pool's, which no counter of allocations sees."""
    rig, seen = Rig(TARGET, Setting(), CPU), []
    rig.step.graphs = {"pass": "a graph"}
    monkeypatch.setattr(rig, "chunk", lambda around: seen.append(rig.step.graphs))
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, n=name: seen.append(n) or 7)
    assert soak.most_allocated(rig) == 7
    assert seen == ["reset_peak_memory_stats", {}, "synchronize", "max_memory_allocated"]
    assert rig.step.graphs == {"pass": "a graph"}


def row_of(ms, *, device=None):
    made = soak.Row("gpu", "tiny", 64, 48, 7, "bf16", True, len(ms), ms=ms)
    made.memory = [{"chunk": i, "host": 0, "device": device and device[i]} for i in range(len(ms))]
    soak.settle(made, 12)
    return made


def test_what_becomes_slow_or_large_is_not_steady(monkeypatch):
    monkeypatch.setattr(soak, "DRIFT", 1.1)
    assert row_of([9.0, 9.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]).steady
    slow = row_of([1.0] * 8 + [1.2] * 2)
    assert (slow.drift, slow.steady) == (pytest.approx(1.2), False)
    assert row_of([1.0] * 5, device=[3, 4, 4, 4, 4]).steady
    large = row_of([1.0] * 5, device=[3, 4, 4, 4, 5])
    assert (large.device_growth, large.steady) == (1, False)


def test_what_does_not_run_is_a_row_with_its_reason(monkeypatch):
    def fail(rig, around):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Rig, "chunk", fail)
    row = soak.soak(TARGET, Setting(), CPU, 3)
    assert (row.error, row.steady) == ("RuntimeError: out of memory", None)
    assert "out of memory" in soak.line(row)


def test_every_combination_is_a_row_and_a_panel(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(soak.profile, "goal", lambda preset, target: TARGET)
    out, picture = tmp_path / "soak.json", tmp_path / "soak.png"
    soak.main(
        preset=["tiny"], window=[6, 7], quality=["bf16", "int8"], chunks=3, device="cpu",
        out=out, commit="abc", picture=picture,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["commit"] == "abc"
    kinds = [(row["window"], row["quality"]) for row in found["rows"]]
    assert kinds == [(6, "bf16"), (6, "int8"), (7, "bf16"), (7, "int8")]
    assert found["rows"][0]["planned"] < found["rows"][2]["planned"]
    assert Image.open(picture).height > Image.open(picture).width
    assert capsys.readouterr().out.count("planned") == 4


def test_exit_codes(monkeypatch, tmp_path):
    monkeypatch.setattr(soak.profile, "goal", lambda preset, target: TARGET)
    monkeypatch.setattr(soak, "DRIFT", 0.0)
    with pytest.raises(typer.Exit) as stop:
        soak.main(chunks=5, device="cpu", commit="abc")
    assert stop.value.exit_code == 1
    monkeypatch.setattr(soak.rows, "find_commit", lambda folder: None)
    with pytest.raises(ValueError, match=r"commit: expected what git calls this tree.*--commit"):
        soak.main(out=tmp_path / "soak.json", device="cpu")
    done = subprocess.run(
        [sys.executable, "-m", "reeltime.bench.soak", "--quality", "int4"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "int4" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_plan_is_what_it_takes():
    """PyTorch rounds each tensor up, and cuBLAS has a workspace that is no part of the plan."""
    row = soak.soak(
        replace(TARGET, window=14), Setting(QUALITIES["bf16"], captured=True),
        torch.device("cuda"), 20,
    )  # fmt: skip
    assert row.error is None
    assert row.planned < row.measured < row.planned + 2**27
    assert row.device_growth == 0
