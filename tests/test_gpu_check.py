# SPDX-License-Identifier: Apache-2.0
"""make gpu-check: its plan, and that no stage stops another or goes unnoticed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from reeltime.backends import FAMILIES
from reeltime.bench import counters, gpu_check
from reeltime.bench.gpu_check import Stage
from reeltime.model.quality import QUALITIES

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
        gpu_check.main(out, **{"commit": "abc", "limit": 100.0} | options)
    except typer.Exit as stop:
        code = stop.exit_code
    return code, json.loads((out / "summary.json").read_text())


def statuses(summary):
    return {stage["name"]: stage["status"] for stage in summary["stages"]}


# --- The plan -----------------------------------------------------------------------------------


def dry(*arguments):
    """{name of a stage: its line}, in order."""
    done = command("--dry-run", "--commit", "abc123", *arguments)
    assert done.returncode == 0, done.stderr
    return {line.split(" ")[0]: line for line in done.stdout.splitlines()}


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path):
    plan = dry("--out", str(tmp_path / "out"))
    right = ["tests", "tests-cuda", "graphs", "emulator", "check-cuda", "check-triton"]
    timed = ["ceilings", *(f"bench-{family}" for family in gpu_check.FAMILIES)]
    assert list(plan) == ["machine", "build", *right, *gpu_check.TOOLS, *timed]
    assert "REELTIME_CUDA_ARCHS=native" in plan["build"]
    assert "--no-build-isolation --no-deps" in plan["build"]
    assert '-m "gpu or device"' in plan["tests"] or "-m gpu or device" in plan["tests"]
    assert "tests/test_cuda_quant.py" in plan["tests-cuda"]
    assert "--backend triton --device cuda" in plan["check-triton"]
    assert "--tool racecheck" in plan["racecheck"]
    assert "reeltime.bench.sanitize" in plan["initcheck"]
    assert f"--out {tmp_path / 'out'} --commit abc123" in plan["bench-sla"]
    assert "test_emulator_gpu.py" in plan["emulator"]
    assert "--ignore=tests/test_emulator_gpu.py" in plan["tests"]
    assert "reeltime.bench.ceilings --out" in plan["ceilings"]
    assert not (tmp_path / "out").exists()


def test_parts_are_run_behind_the_build(tmp_path):
    out = ("--out", str(tmp_path / "out"))
    assert list(dry(*out, "--part", "step")) == [
        "machine",
        "build",
        "bench-step",
        "profile",
        "soak",
    ]
    plan = dry(*out, "--part", "memory", "--part", "counters")
    assert list(plan) == ["machine", "build", "memory", "counters"]
    assert plan["memory"].count("--quality") == len(QUALITIES)
    assert f"--out {tmp_path / 'out' / 'memory.json'} --commit abc123" in plan["memory"]
    every = [part for name in gpu_check.PARTS for part in ("--part", name)]
    assert set(dry(*out, *every)) > {"racecheck", "bench-norm", "soak", "peers-here-norm"}
    assert list(dry(*out, "--only", "bench-q*", "--only", "soak")) == ["bench-quant", "soak"]


def test_a_part_ends_in_time():
    """Without what runs side by side, which is as long as its longest, and is cut by --limit."""
    plan = gpu_check.stages(ROOT, Path("/out"), "abc", True)
    for part in ("step", "memory", "counters"):
        alone = [stage.limit_s for stage in plan if stage.part == part]
        assert sum(alone) <= 580 - 20  # machine, and a build that is there


def test_options_of_the_plan_are_known():
    """Each command's own options: a misspelt one would be seen on the day, and cost it."""
    for stage in gpu_check.stages(ROOT, Path("/out"), "abc", True, [Path("/a")]):
        if stage.part in (None, "right") or stage.name == "counters":
            continue
        module, *rest = stage.command[2:]
        name = [module, *rest[:1]] if module == "reeltime" else [module]
        options = {part for part in rest if part.startswith("--")}
        assert options <= known_options(*name), stage.name


@functools.cache
def known_options(module, command=None):
    argv = [sys.executable, "-m", module, *([command] if command else []), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    return set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run on the GPU")
def test_no_time_goes_into_emulating():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-emulator",
         "tests/test_cuda_quant.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.search(r"\n\d+ skipped in", done.stdout)  # and none passed


def test_every_set_of_peers_is_a_process_of_its_own(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    plan = gpu_check.stages(ROOT, Path("/out"), "abc", True, folders)
    found = [stage for stage in plan if stage.part == "peers"]
    names = [f"peers-{name}-{family}" for family in gpu_check.FAMILIES for name in "ab"]
    assert [stage.name for stage in found] == names
    assert all(stage.command[-2:] == ("--against", "peers") for stage in found)
    assert found[-1].path[0] == str(folders[1])
    assert not any("--against" in stage.command for stage in plan if stage.part != "peers")
    done = command("--out", str(tmp_path / "out"), "--peers", str(tmp_path / "none"))
    assert (done.returncode, "peers: expected a folder" in done.stderr) == (2, True)


def test_plan_runs_what_is_timed_alone():
    plan = gpu_check.stages(ROOT, Path("/out"), None, False)
    groups = [stage.group for stage in plan]
    assert groups == sorted(groups, key=groups.index)  # members stand together
    for stage in plan:
        if stage.part not in (None, "right"):
            assert groups.count(stage.group) == 1
        if stage.name.startswith("bench"):
            assert "--json" in stage.command  # no commit: no CSV, but no row is lost
        assert "--commit" not in stage.command
    order = ["build", "right", "ceilings", "bench-quant", "bench-step", "memory", "counters"]
    assert sorted(order, key=groups.index) == order


def test_what_the_plan_runs_is_there():
    for stage in gpu_check.stages(ROOT, Path("/out"), "abc", True):
        for part in stage.command:
            if part.startswith("tests/"):
                assert (ROOT / part).exists(), part
    assert sorted(gpu_check.FAMILIES) == sorted(FAMILIES)
    assert set(gpu_check.LEVELS) == set(QUALITIES)
    assert gpu_check.SKIPPED == counters.SKIPPED


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "bulid"], "only: expected some of machine, build"),
        (["--part", "speed"], "part: expected some of right, kernels"),
        ([], "out"),
    ],
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


def test_what_says_that_it_cannot_run_here_is_no_failure(monkeypatch, tmp_path):
    code = "print('skipped: counters are not permitted'); raise SystemExit(77)"
    exit_code, summary = check(monkeypatch, tmp_path, python("counters", code))
    assert (exit_code, statuses(summary)) == (0, {"counters": "missing"})
    assert summary["stages"][0]["last"] == "skipped: counters are not permitted"


def test_the_same_sources_are_built_once(monkeypatch, tmp_path):
    built = tmp_path / "built"
    code = f"open({str(built)!r}, 'a').write('x')"
    for text, times in (("abc", 1), ("abc", 1), ("other", 2)):
        stage = python("build", code, mark=(tmp_path / "mark", text))
        assert check(monkeypatch, tmp_path, stage)[0] == 0
        assert len(built.read_text()) == times
    failing = python("build", "raise SystemExit(1)", mark=(tmp_path / "mark", "more"))
    assert check(monkeypatch, tmp_path, failing)[0] == 1
    assert (tmp_path / "mark").read_text() == "other"


def test_sources_are_what_the_build_is_made_of(tmp_path):
    for name in ("csrc/a/a.cu", "python/reeltime/x.py", "tests/test_x.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = gpu_check.digest(tmp_path)
    (tmp_path / "tests/test_x.py").write_text("changed")
    assert gpu_check.digest(tmp_path) == before
    for name in ("csrc/a/a.cu", "python/reeltime/x.py"):
        (tmp_path / name).write_text("changed")
        assert gpu_check.digest(tmp_path) != before
        before = gpu_check.digest(tmp_path)


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
    _, summary = check(monkeypatch, tmp_path, python("path", "import sys; print(sys.path[2])",
                                                     path=("/peers",)))  # fmt: skip
    assert summary["stages"][0]["last"] == "/peers"


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
