# SPDX-License-Identifier: Apache-2.0
"""make gpu-check: its plan, and that no stage stops another or goes unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from reeltime.backends import FAMILIES
from reeltime.bench import gpu_check
from reeltime.bench.gpu_check import Stage

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments, cwd=ROOT, script=ROOT / "bench/gpu_check.py"):
    """The file itself, as make runs it: before anything is built."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd, capture_output=True, text=True, env=environment,
    )  # fmt: skip


def python(name, code, group="one", limit_s=60.0, **more):
    return Stage(name, group, (sys.executable, "-c", code), limit_s, **more)


def check(monkeypatch, out, *plan, **options):
    """Exit code and summary of a run of these stages."""
    monkeypatch.setattr(gpu_check, "stages", lambda *_: list(plan))
    monkeypatch.setattr(gpu_check, "SITE", Path(out) / "site")
    code = 0
    try:
        gpu_check.main(out, **{"only": None, "commit": "abc", "limit": 100.0, "dry_run": False}
                       | options)  # fmt: skip
    except typer.Exit as stop:
        code = stop.exit_code
    return code, json.loads((out / "summary.json").read_text())


def statuses(summary):
    return {stage["name"]: stage["status"] for stage in summary["stages"]}


# --- The plan -----------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path):
    done = command("--out", str(tmp_path / "out"), "--dry-run", "--commit", "abc123")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line.split(" ")[0] for line in lines]
    right = ["tests", "tests-cuda", "graphs", "check-cuda", "check-triton", *gpu_check.TOOLS]
    timed = [f"bench-{family}" for family in (*FAMILIES, "step")]
    assert names == ["machine", "build", *right, *timed]
    plan = dict(zip(names, lines, strict=True))
    assert "REELTIME_CUDA_ARCHS=native" in plan["build"]
    assert "--no-build-isolation --no-deps" in plan["build"]
    assert '-m "gpu or device"' in plan["tests"] or "-m gpu or device" in plan["tests"]
    assert "tests/test_cuda_quant.py" in plan["tests-cuda"]
    assert "--backend triton --device cuda" in plan["check-triton"]
    assert "--tool racecheck" in plan["racecheck"]
    assert "reeltime.bench.sanitize" in plan["initcheck"]
    assert f"--out {tmp_path / 'out'} --commit abc123" in plan["bench-sla"]
    assert "bench step --shapes tiny" in plan["bench-step"]
    assert not (tmp_path / "out").exists()


def test_peers_are_measured_only_when_asked_for():
    plain, beside = (gpu_check.stages(ROOT, Path("/out"), "a", True, asked) for asked in (0, 1))
    assert not any("--against" in stage.command for stage in plain)
    found = [stage for stage in beside if stage.command[-2:] == ("--against", "peers")]
    assert [stage.name for stage in found] == [f"bench-{family}" for family in FAMILIES]
    assert sum(stage.limit_s for stage in plain) < sum(stage.limit_s for stage in beside)


def test_plan_runs_what_is_timed_alone():
    plan = gpu_check.stages(ROOT, Path("/out"), None, False)
    groups = [stage.group for stage in plan]
    assert groups == sorted(groups, key=groups.index)  # members stand together
    for stage in plan:
        if stage.name.startswith("bench"):
            assert groups.count(stage.group) == 1
            assert "--json" in stage.command  # no commit: no CSV, but no row is lost
    assert groups.index("build") < groups.index("right") < groups.index("bench-quant")


def test_what_the_plan_runs_is_there():
    for stage in gpu_check.stages(ROOT, Path("/out"), "abc", True):
        for part in stage.command:
            if part.startswith("tests/"):
                assert (ROOT / part).exists(), part
    assert gpu_check.FAMILIES == FAMILIES


@pytest.mark.parametrize(
    "arguments, message",
    [(["--only", "bulid"], "only: expected some of machine, build"), ([], "out")],
)
def test_bad_input_is_exit_2(arguments, message, tmp_path):
    out = ["--out", str(tmp_path)] if arguments else []
    done = command(*out, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_of_a_checkout_is_exit_2(tmp_path):
    script = shutil.copy(ROOT / "bench/gpu_check.py", tmp_path)
    done = command("--out", str(tmp_path / "out"), cwd=tmp_path, script=script)
    assert done.returncode == 2
    assert "run it in a checkout" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_passes_out_and_commit_on():
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "OUT=/tmp/x", "COMMIT=abc",
         "PYTHON=python9", "ARGS=--dry-run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = " ".join(done.stdout.replace("\\\n", "").split())
    assert line == "python9 bench/gpu_check.py --out /tmp/x --commit abc --dry-run"


# --- Running ------------------------------------------------------------------------------------


def test_a_failing_stage_stops_no_other(monkeypatch, tmp_path, capsys):
    code, summary = check(
        monkeypatch, tmp_path,
        python("first", "print('well')"),
        python("second", "print('the reason'); raise SystemExit(3)", "two"),
        python("third", "print('also well')", "three"),
    )  # fmt: skip
    assert code == 1
    assert summary["passed"] is False
    assert statuses(summary) == {"first": "passed", "second": "failed", "third": "passed"}
    second = summary["stages"][1]
    assert (second["code"], second["last"]) == (3, "the reason")
    assert "the reason" in (tmp_path / "second.log").read_text()
    shown = capsys.readouterr().out
    assert shown.index("--- second: failed") < shown.index("gpu-check, logs in")
    assert "also well" in shown


def test_all_well_is_exit_0(monkeypatch, tmp_path):
    stages = (python("first", ""), python("second", "", "two"))
    code, summary = check(monkeypatch, tmp_path, *stages)
    assert (code, summary["passed"]) == (0, True)
    code, summary = check(monkeypatch, tmp_path, *stages, only=["second"])
    assert statuses(summary) == {"second": "passed"}


def test_a_missing_tool_is_told_and_no_failure(monkeypatch, tmp_path):
    code, summary = check(monkeypatch, tmp_path, python("memcheck", "", needs="no-such-tool"))
    assert code == 0
    assert statuses(summary) == {"memcheck": "missing"}
    assert "no-such-tool is not installed" in summary["stages"][0]["last"]


def test_a_command_that_is_not_there_is_a_failure(monkeypatch, tmp_path):
    code, summary = check(monkeypatch, tmp_path, Stage("x", "x", ("/no/such/program",), 10))
    assert (code, statuses(summary)) == (1, {"x": "failed"})


def test_a_stage_ends_at_its_limit_with_all_that_it_started(monkeypatch, tmp_path):
    """Children too: a test process must not hold the GPU while kernels are timed."""
    child = "import time; time.sleep(60)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(child.pid, flush=True)
time.sleep(60)
"""
    begun = time.monotonic()
    exit_code, summary = check(
        monkeypatch, tmp_path, python("slow", code, limit_s=2), python("next", "", "two")
    )
    assert time.monotonic() - begun < 20
    assert exit_code == 1
    assert statuses(summary) == {"slow": "timeout", "next": "passed"}
    log = (tmp_path / "slow.log").read_text()
    assert "ended after its 2 s" in log
    pid = int(next(line for line in log.splitlines() if line.isdigit()))
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_no_stage_begins_after_the_whole_limit(monkeypatch, tmp_path):
    code, summary = check(
        monkeypatch, tmp_path,
        python("long", "import time; time.sleep(30)"), python("late", "", "two"), limit=2.0,
    )  # fmt: skip
    assert code == 1
    assert statuses(summary) == {"long": "timeout", "late": "not run"}
    assert summary["stages"][1]["last"] == "no time was left"


def test_a_build_that_fails_is_rescued_and_still_a_failure(monkeypatch, tmp_path):
    mark = tmp_path / "rescued"
    rescue = (sys.executable, "-c", f"open({str(mark)!r}, 'w')")
    build = python("build", "raise SystemExit(1)", rescue=rescue)
    code, summary = check(monkeypatch, tmp_path, build)
    assert (code, statuses(summary)) == (1, {"build": "failed"})
    assert mark.exists()


def test_stages_of_a_group_run_beside_each_other(monkeypatch, tmp_path):
    """Each waits for the other's file."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    code = """
import pathlib, time
pathlib.Path({mine!r}).touch()
while not pathlib.Path({theirs!r}).exists(): time.sleep(0.01)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    exit_code, summary = check(
        monkeypatch, tmp_path,
        python("a", code.format(mine=a, theirs=b), limit_s=20),
        python("b", code.format(mine=b, theirs=a), limit_s=20),
    )  # fmt: skip
    assert exit_code == 0, summary


def test_stages_see_the_build_first(monkeypatch, tmp_path):
    code = "import sys; print(sys.path[1])"
    _, summary = check(monkeypatch, tmp_path, python("path", code))
    assert summary["stages"][0]["last"] == str(ROOT / tmp_path / "site")


# --- What a machine with a GPU may lack ---------------------------------------------------------


@pytest.mark.slow
def test_tests_for_a_gpu_are_chosen_without_av_and_diffusers(tmp_path):
    """Their files are left out by name, everything else is collected."""
    (tmp_path / "lacking.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "gone = ('av', 'diffusers')\n"
        "importlib.util.find_spec = lambda n, *a: None if n in gone else find(n, *a)\n"
        "for name in gone: sys.modules[name] = None\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "lacking", "-p", "no:cacheprovider",
         "--collect-only", "-m", "gpu or device", "tests"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "without av, not collected: test_director.py" in done.stdout
    for name in ("test_triton_quant.py", "test_triton_sla.py", "test_graph.py"):
        assert name in done.stdout
    assert "test_house.py" not in done.stdout
