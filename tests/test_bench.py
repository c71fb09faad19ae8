# SPDX-License-Identifier: Apache-2.0
"""reeltime bench: floors by hand, cases that cover every op, a file that refuses what it must."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from reeltime import arch, backends, cli
from reeltime.arch import UnsupportedArchError
from reeltime.bench import bars, floors, hardware, harness, rows, sanitize
from reeltime.bench.case import Expected
from reeltime.bench.ceilings import Ceilings, shared
from reeltime.bench.sensors import Sensors
from reeltime.bench.shapes import DIT, TINY

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUANTIZE = harness.cases("quant", TINY)[0]
H200, RTX_5090 = (hardware.lookup(name) for name in ("H200", "RTX 5090"))


def run(capsys, *arguments):
    """Exit code, stdout, stderr of `reeltime bench`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


def quantize(**changes):
    """A case that takes no time."""
    return replace(QUANTIZE, **changes)


def find(family, op, *, sizes=DIT, **fields):
    """The first case of an op whose fields are these."""
    for one in harness.cases(family, sizes):
        if one.op == op and all(getattr(one, name) == value for name, value in fields.items()):
            return one
    raise AssertionError((family, op, fields))


# --- Cards and floors ---------------------------------------------------------------------------


def test_every_card_is_of_a_known_architecture():
    assert {card.name for card in hardware.CARDS} >= {"A100", "H100", "H200", "B200", "RTX 5090"}
    for card in hardware.CARDS:
        assert card.arch in {row.name for row in arch.ARCHS}
        assert hardware.find(card.device) is hardware.find(card.name) is card
    assert hardware.lookup("NVIDIA GeForce RTX 5090").file == "rtx-5090.csv"
    assert hardware.find("NVIDIA GeForce RTX 5090 Laptop GPU") is None


def test_unknown_card_says_where_it_is_added():
    with pytest.raises(ValueError, match=r"hardware: expected one of .*H200.*bench/hardware.py"):
        hardware.lookup("NVIDIA L40S")


@pytest.mark.parametrize(
    "card, family, op, fields, want",
    [
        # Bytes: 6120 * 1536 * (2 + 1) + 4 * 6120 * 12 = 28494720.
        (H200, "quant", "quantize", {"shape": "6120x1536"}, 28494720 / 4.8e6),
        (RTX_5090, "quant", "quantize", {"shape": "6120x1536"}, 28494720 / 1.792e6),
        # 2 * 6120 * 1536 * 1536 = 28877783040 operations; its bytes take 6.4 us.
        (H200, "gemm_w8a8", "gemm_w8a8", {"shape": "6120x1536x1536"}, 28877783040 / 1978.9e6),
        (RTX_5090, "gemm_w8a8", "gemm_w8a8",
         {"shape": "6120x1536x1536", "dtype": "fp8"}, 28877783040 / 419e6),
        # Two products of 2 * 12 * 6120 * 42840 * 128 operations, in two formats.
        (RTX_5090, "attention", "segment_attention", {"dtype": "int8, fp8"},
         805419417600 / 838e6 + 805419417600 / 419e6),
        (H200, "attention", "attention", {"dtype": "bf16"}, 2 * 805419417600 / 989.4e6),
        # Keys of 21 frames of 2040 tokens in bf16 twice, and 64 cosines and sines of each token.
        (H200, "rope_kv", "rope_on_cache", {}, (4 * 42840 * 1536 + 42840 * 128 * 4) / 4.8e6),
    ],
)  # fmt: skip
def test_floor_is_what_a_hand_computes(card, family, op, fields, want):
    one = find(family, op, **fields)
    floor = Ceilings.promised(card).floor_us(one.flops, one.bytes)
    assert floor == pytest.approx(want, rel=1e-9)


def test_floor_needs_a_peak_of_every_format():
    a100 = Ceilings.promised(hardware.lookup("A100"))
    assert a100.floor_us({"fp8": 1e9}, 1) is None
    assert a100.bound({"fp8": 1e9}, 1) == ""
    assert a100.floor_us({"int8": 624e6}, 1) == pytest.approx(1.0)
    assert a100.bound({"int8": 624e6}, 1) == "int8"
    assert a100.floor_us({"int8": 1}, 2039 * 1000) == pytest.approx(1.0)
    assert a100.bound({"int8": 1}, 2039 * 1000) == "memory"
    assert a100.floor_us({}, 2039 * 1000) == pytest.approx(1.0)


def test_formats_of_one_peak_share_the_best_rate():
    """A poor INT8 product of a library is no ceiling where FP8 shows what the units can do."""
    rates = {"bf16": 700.0, "int8": 900.0, "fp8": 1400.0}
    assert shared(rates, H200.tflops) == {**H200.tflops, **rates, "int8": 1400.0}
    assert shared(rates, RTX_5090.tflops)["int8"] == 900.0  # twice the rate of FP8 there
    assert shared(rates, {}) == rates


def test_expected_share_leaves_room_for_a_launch():
    expected = Expected(0.8, 0.5, "", launches=2)
    assert expected.share("H200", 8.0) == pytest.approx(8 / (8 / 0.8 + 4))
    assert expected.share("RTX 5090", 8.0) == pytest.approx(8 / (16 + 4))
    assert expected.share("A100", 8.0) is None


@pytest.mark.parametrize("sizes", [TINY, DIT], ids=lambda sizes: sizes.name)
def test_cases_cover_every_op_and_are_told_apart(sizes):
    found = [one for family in backends.FAMILIES for one in harness.cases(family, sizes)]
    assert {one.op for one in found} == set(backends.OPS)
    labels = [one.label for one in found]
    assert len(set(labels)) == len(labels)
    assert all(one.bytes > 0 and one.peers for one in found if one.op != "block_mask")


def test_floors_of_the_planned_cards_are_all_there():
    found = floors.floors(backends.FAMILIES, DIT)
    assert {floor.card for floor in found} == {"H200", "RTX 5090"}
    for floor in found:
        assert floor.floor_us > 0
        assert floor.bound
        assert 0 < floor.expected_share < 1
        assert floor.why


def test_flops_are_those_of_the_api():
    """The dtypes of a case share out what api.flops says."""
    from reeltime import attention, gemm_w8a8

    one = find("attention", "attention", dtype="int8, fp16")
    assert sum(one.flops.values()) == attention.flops(1, 6120, 42840, 12, 128)
    one = find("gemm_w8a8", "gemm_w8a8_requantized")
    assert sum(one.flops.values()) == gemm_w8a8.flops(1560, 8960, 1536)
    one = find("sla", "segment_sla", form="top 5%, cached", dtype="int8, fp8")
    count = int(0.05 * 21 * 32) * 64
    assert one.flops["int8"] == one.flops["fp8"] == 2 * 12 * 6120 * count * 128


# --- The file -----------------------------------------------------------------------------------


@pytest.fixture
def one_row():
    return harness.Run(CPU, print).rows(quantize(), "reference")[-1]


def environment(commit="abc123"):
    return rows.environment(commit, Sensors(CPU))


def test_rows_are_appended_under_one_header(tmp_path, one_row):
    path = rows.results_file(tmp_path, CPU, "abc123")
    assert path == tmp_path / "host.csv"
    rows.append(path, [one_row], environment())
    path = rows.results_file(tmp_path, CPU, "def456")
    broken = replace(one_row, p50_us=None, error="two\nlines")
    rows.append(path, [one_row, broken], environment("def456"))
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(path.read_text().splitlines()) == 4
    assert [row["commit"] for row in found] == ["abc123", "def456", "def456"]
    assert tuple(found[0]) == rows.COLUMNS
    assert float(found[0]["p50_us"]) == pytest.approx(one_row.p50_us, rel=1e-5)
    assert found[0]["floor_us"] == found[2]["p50_us"] == ""
    assert found[2]["error"] == "two lines"
    assert found[0]["torch"] == torch.__version__


def test_columns_are_those_of_the_contract():
    wanted = "family shape dtype backend device p50_us p20_us p80_us tflops gbps floor_us "
    wanted += "share_of_floor best_peer ratio relative_l1 error commit sm_mhz power_w "
    wanted += "temperature_c throttle"
    assert set(wanted.split()) <= set(rows.COLUMNS)


@pytest.mark.parametrize("commit", [None, ""])
def test_a_row_without_a_commit_is_refused(commit, tmp_path):
    with pytest.raises(ValueError, match="commit: .*--commit"):
        rows.results_file(tmp_path, CPU, commit)
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "host_name", lambda: "")
    with pytest.raises(ValueError, match="hardware: "):
        rows.results_file(tmp_path, CPU, "abc123")


def test_a_foreign_header_is_refused(tmp_path):
    path = tmp_path / "host.csv"
    path.write_text("family,shape,microseconds\nquant,64,1\n")
    with pytest.raises(ValueError, match=r"host.csv: its header differs .*microseconds"):
        rows.results_file(tmp_path, CPU, "abc123")
    path.write_text(",".join(reversed(rows.COLUMNS)) + "\n")
    with pytest.raises(ValueError, match="their order"):
        rows.results_file(tmp_path, CPU, "abc123")
    path.write_text("")
    assert rows.results_file(tmp_path, CPU, "abc123") == path


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        rows.results_file(tmp_path / "nowhere", CPU, "abc123")


def test_a_folder_that_is_none_of_gits_has_no_commit(tmp_path):
    assert rows.find_commit(tmp_path) is None


# --- The command --------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """One case per family, so that a test of the command takes no time."""
    real = harness.cases
    monkeypatch.setattr(harness, "cases", lambda family, sizes: real(family, sizes)[:1])


def test_every_family_is_timed_at_tiny_shapes(capsys):
    code, out, err = run(capsys, "--json")
    document = json.loads(out)
    assert code == document["failed"] == 0, err
    mine = [row for row in document["rows"] if row["backend"] == "reference"]
    assert {row["op"] for row in mine} == set(backends.OPS)
    assert all(row["p50_us"] > 0 and row["share_of_floor"] is None for row in mine)
    assert all(row["device"].startswith("host: ") for row in document["rows"])
    assert document["ceilings"] is None
    assert document["shapes"] == "tiny"
    peers = {"torch._scaled_mm tensor-wise", "torch.mm", "torch copy_", "torch sdpa flash"}
    assert peers <= {row["backend"] for row in document["rows"]}
    assert [one["name"] for one in document["peers"]] == ["torch"]
    assert "not measured" in err  # the table's columns of a GPU


def test_rows_go_to_a_file_only_when_asked(capsys, tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "quant")[0] == 0
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run(capsys, "quant", "--out", str(tmp_path), "--commit", "abc123", "--json")
    assert code == 0
    assert json.loads(out)["out"] == str(tmp_path / "host.csv")
    assert len((tmp_path / "host.csv").read_text().splitlines()) == 3  # header, peer, ours


def test_a_wrong_kernel_is_exit_1_and_a_row_without_a_time(capsys, monkeypatch, tmp_path):
    right = quantize()

    def coarse(inputs, backend):
        xq, x_scale = right.run(inputs, backend)
        return xq, 2 * x_scale

    bad = quantize(run=coarse, peers=())
    monkeypatch.setattr(harness, "cases", lambda *_: [bad, quantize(form="right", peers=())])
    code, out, err = run(
        capsys, "quant", "--json", "--out", str(tmp_path), "--commit", "a", "--picture",
        str(tmp_path / "bars.png"),
    )  # fmt: skip
    first, second = json.loads(out)["rows"]
    assert code == 1
    assert first["p50_us"] is None
    assert second["p50_us"] > 0
    assert "relative L1" in first["error"]
    assert "relative L1" in err
    with (tmp_path / "host.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [bool(row["p50_us"]) for row in written] == [False, True]
    assert Image.open(tmp_path / "bars.png").size[0] > 400


def test_what_a_backend_refuses_is_told_and_no_failure(capsys, monkeypatch):
    def refuse(inputs, backend):
        raise UnsupportedArchError("quant: no", "float8 needs sm89")

    both = [quantize(run=refuse), quantize()]
    monkeypatch.setattr(harness, "cases", lambda *_: both)
    code, out, err = run(capsys, "quant", "--json")
    assert code == 0
    assert json.loads(out)["left_out"] == {"quant, reference: float8 needs sm89": 1}
    assert "1 times left out: quant, reference: float8 needs sm89" in " ".join(err.split())


def test_floors_need_no_gpu(capsys, tmp_path):
    code, out, err = run(
        capsys, "quant", "attention", "--floors", "--json", "--picture", str(tmp_path / "f.png")
    )
    document = json.loads(out)
    assert code == 0
    assert {row["family"] for row in document["rows"]} == {"quant", "attention"}
    assert {row["card"] for row in document["rows"]} == {"H200", "RTX 5090"}
    assert "H200 us" in err
    assert Image.open(tmp_path / "f.png").size[0] > 400


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quantt"], "family: expected 'quant' or"),
        (["--shapes", "huge"], "shapes: expected 'tiny' or 'dit'"),
        (["--backend", "triton", "--device", "cpu"], "It only interprets there"),
        (["--backend", "auto"], "backend: expected 'reference' or 'triton' or 'cuda'"),
        (["--device", "tpu"], "device: expected"),
        (["--floors", "--out", "."], "out: expected none with --floors"),
        (["--floors", "--against", "peers"], "against: expected none with --floors"),
        (["--against", "sage"], "against: expected 'peers' or 'torch' or 'sageattention'"),
        (["--picture", "x.pdf"], "ends in .png"),
        (["--out", "nowhere", "--commit", "a"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_out_without_a_commit_is_exit_2_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "Run", None)
    code, _, err = run(capsys, "--out", str(tmp_path))
    assert code == 2
    assert "commit: " in err


def test_pictures_show_what_was_measured_and_what_was_not(tmp_path, one_row):
    measured = replace(one_row, share_of_floor=0.7, expected_share=0.8)
    bars.draw([measured, one_row], tmp_path / "bars.png", "title")
    assert Image.open(tmp_path / "bars.png").size[1] > 100


def test_a_bench_file_is_a_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-disable", "bench/bench_rope_kv.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(harness.cases('rope_kv', TINY))} passed" in done.stdout


# --- compute-sanitizer's script -----------------------------------------------------------------


def test_sanitize_launches_every_op(capsys):
    sanitize.main(None, "reference", "cpu")
    shown = capsys.readouterr().out
    assert f"of {len(backends.OPS)} ops; not launched: []" in shown


def test_sanitize_without_a_kernel_is_a_failure(capsys):
    with pytest.raises(typer.Exit) as stop:
        sanitize.main(["quant"], "cuda", "cpu")
    assert stop.value.exit_code == 1
    assert "refused: quantize int8 1x128 77x208" in capsys.readouterr().out
