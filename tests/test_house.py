# SPDX-License-Identifier: Apache-2.0
"""The house: build facts, the command line's manners, fast imports, poisoned memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reeltime
from reeltime import _C, arch, backends, cli

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    """stdout of a fresh interpreter that sees no GPU."""
    script = f"import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reeltime", *arguments], capture_output=True, text=True
    )


def run_main(monkeypatch: pytest.MonkeyPatch, failure: BaseException, *arguments: str) -> int:
    """The exit code of `reeltime kernels` when the matrix raises `failure`."""

    def fail() -> None:
        raise failure

    monkeypatch.setattr(backends, "support_matrix", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["kernels", *arguments])
    return stop.value.code if isinstance(stop.value.code, int) else 0


# --- Build facts --------------------------------------------------------------------------------


def test_build_facts_agree():
    assert _C.version == reeltime.__version__
    assert _C.has_cuda == bool(_C.cuda_families) == bool(_C.archs)
    assert (_C.cuda_version is None) == (not _C.has_cuda)
    assert set(_C.cuda_families) <= set(backends.FAMILIES)
    assert set(_C.archs) <= {row.target for row in arch.ARCHS}
    assert re.search(r"\d", _C.compiler)
    assert _C.build_type == "Release"


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_extension_links_neither_torch_nor_driver():
    linked = subprocess.run(["ldd", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert not re.findall(r"lib(?:torch|c10|cuda)\w*\.so", linked)


def test_every_arch_is_compiled_for():
    """A row of arch.py without an nvcc target could never get a kernel, and the reverse."""
    lines = re.findall(r"set\(NVCC_TARGETS_sm\d+ ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    targets = [target for line in lines for target in line.replace("-real", "").split()]
    assert sorted(targets) == sorted(row.target for row in arch.ARCHS)


def test_lookup_knows_its_rows_and_names_them_otherwise():
    assert [arch.lookup(row.capability) for row in arch.ARCHS] == list(arch.ARCHS)
    with pytest.raises(arch.UnsupportedArchError, match=r"7\.5.*sm80.*sm120"):
        arch.lookup((7, 5))


# --- Imports ------------------------------------------------------------------------------------


def test_import_is_light_and_fast():
    """`import reeltime` loads nothing heavy; 0.1 s leaves room for a busy machine."""
    code = """
import sys, time
before = time.perf_counter(); import reeltime; seconds = time.perf_counter() - before
heavy = {"torch", "numpy", "rich", "typer", "matplotlib", "av"} & set(sys.modules)
print(seconds, *sorted(heavy))
"""
    runs = [python(code).split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.1


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["stream", "--help"]], ids=str)
def test_version_and_help_do_not_import_torch(arguments):
    code = f"""
import sys
from reeltime.cli import main
try: main({arguments!r})
except SystemExit as stop: assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    assert python(code)


def test_imports_without_a_gpu():
    modules = ", ".join(f"reeltime.{family}" for family in backends.FAMILIES)
    assert python(f"import reeltime._C, reeltime.model, reeltime.bench, {modules}\nprint('ok')")


# --- The command line ---------------------------------------------------------------------------


def test_version_is_one_line():
    done = command("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"reeltime {reeltime.__version__}: ")
    assert done.stdout.count("\n") == 1
    assert ("no CUDA kernels" in done.stdout) == (not _C.has_cuda)
    assert (_C.nvcc or "without nvcc") in done.stdout


def test_kernels_json_is_one_document():
    done = command("kernels", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["build"]["version"] == reeltime.__version__
    assert {row["family"] for row in document["rows"]} == set(backends.FAMILIES)
    assert all(row["why"] for row in document["rows"])
    assert all(row["available"] for row in document["rows"] if row["backend"] == "reference")


def test_kernels_table_names_every_family(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["kernels"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert all(name in shown for name in backends.FAMILIES)
    assert all(row.name in shown for row in arch.ARCHS)


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["no-such-command"]], ids=str)
def test_wrong_usage_exits_2(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("steps: expected 1 to 8,\n got 9"),
        FileNotFoundError(2, "No such file or directory", "face.png"),
        PermissionError(13, "Permission denied", "talk.mp4"),
        arch.UnsupportedArchError("no entry for [bold]7.5"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_bad_input_is_one_line_and_exit_2(failure, monkeypatch, capsys):
    assert run_main(monkeypatch, failure) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"error: {' '.join(str(failure).split())}\n"


def test_bug_is_reported_without_traceback(monkeypatch, capsys):
    assert run_main(monkeypatch, KeyError("shape")) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("error: KeyError: 'shape' (a bug")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("failure", [ValueError("x"), KeyError("x")], ids=repr)
def test_debug_shows_the_traceback(failure, monkeypatch):
    with pytest.raises(type(failure)):
        run_main(monkeypatch, failure, "--debug")


def test_keyboard_interrupt_exits_130(monkeypatch):
    assert run_main(monkeypatch, KeyboardInterrupt()) == 130


# --- Poisoned memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_empty_is_poisoned(dtype):
    like = torch.zeros(3, 5, dtype=dtype)
    made = [
        torch.empty(3, 5, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((3, 5), (5, 1), dtype=dtype),
        like.new_empty(3, 5),
        like.new_empty_strided((3, 5), (5, 1)),
    ]
    assert all(tensor.float().isnan().all() for tensor in made)
    assert torch.empty(4, dtype=torch.int8).shape == (4,)
    assert torch.empty(0, dtype=dtype).numel() == 0
    assert torch.empty(2, requires_grad=True).requires_grad
