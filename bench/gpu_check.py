# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command and under ten minutes: make gpu-check OUT=folder.

Builds this checkout for the GPU at hand into build/gpu-check (the environment stays as it is),
then runs tests, checks against float64, captured graphs, compute-sanitizer and every benchmark.
Each stage has a time limit and a log in OUT; one that fails stops no other.  No network is needed;
a tree that is none of git's needs --commit for its benchmarks to be kept in a CSV.

    python bench/gpu_check.py --out OUT [--only NAME] [--commit SHA] [--against] [--dry-run]

Exit code 0: every stage passed, or its tool is missing; 1: one did not; 2: bad input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

FAMILIES = ("quant", "norm", "rope_kv", "gemm_w8a8", "attention", "sla")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SITE = Path("build") / "gpu-check"  # where the package is installed
GRACE_S = 5.0  # between asking a stage to end and ending it
TAIL = 30  # lines of the log of a stage that failed
FACTS = """
import platform, shutil, subprocess, sys, torch
for tool in (["nvidia-smi"], ["nvcc", "--version"]):
    print(*tool, flush=True)
    subprocess.run(tool, check=False) if shutil.which(tool[0]) else print("not installed")
print(sys.executable, platform.python_version(), torch.__version__, torch.version.cuda)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
"""


@dataclass(frozen=True)
class Stage:
    """One command.  Stages of the same group run beside each other; groups follow each other."""

    name: str
    group: str
    command: tuple[str, ...]
    limit_s: float
    needs: str | None = None  # a program without which it is missing, not failed
    rescue: tuple[str, ...] | None = None  # run if it fails, so that the rest can be tried
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    status: str  # passed, failed, timeout, missing or not run
    seconds: float
    limit_s: float
    code: int | None
    log: str
    command: str
    last: str  # line of its log

    @property
    def good(self) -> bool:
        return self.status in ("passed", "missing")


# --- What is run --------------------------------------------------------------------------------


def stages(
    root: Path, out: Path, commit: str | None, in_git: bool, against: bool = False
) -> list[Stage]:
    """The build; then what is about being right, side by side; then what is timed, alone.

    against: beside every peer that is installed, which compiles for minutes: one family at a time.
    """
    python = sys.executable
    reeltime = (python, "-m", "reeltime")
    pytest = (
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        "--continue-on-collection-errors",
    )
    install = (
        *(python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"),
        *("--upgrade", "--target", str(SITE), "-C"),
    )
    native = ("cmake.define.REELTIME_CUDA=ON", "-C", "cmake.define.REELTIME_CUDA_ARCHS=native", ".")
    triton = (*install, "cmake.define.REELTIME_CUDA=OFF", ".")
    side_by_side = ("-n", "5") if importlib.util.find_spec("xdist") else ()
    graphs = "tests/test_graph.py"
    marked = ("-m", "gpu or device", "tests", f"--ignore={graphs}")
    native_tests = sorted(str(p.relative_to(root)) for p in root.glob("tests/test_cuda_*.py"))
    found = [
        Stage("machine", "machine", (python, "-c", FACTS), 60),
        Stage("build", "build", (*install, *native), 200, rescue=triton),
        Stage("tests", "right", (*pytest, *side_by_side, *marked), 210),
        Stage("tests-cuda", "right", (*pytest, *side_by_side, *native_tests), 210),
        Stage("graphs", "right", (*pytest, graphs), 150),
    ]
    for backend in ("cuda", "triton"):
        checked = (*reeltime, "check", "--backend", backend, "--device", "cuda")
        found.append(Stage(f"check-{backend}", "right", checked, 180))
    script = (python, "-m", "reeltime.bench.sanitize")
    for tool in TOOLS:
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        if tool == "memcheck":  # PyTorch probes for what a driver lacks; our launches raise
            options += ["--report-api-errors", "no"]
        found.append(
            Stage(
                tool,
                "right",
                (find_sanitizer(), *options, *script),
                200,
                needs=find_sanitizer(),
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        )
    kept: tuple[str, ...] = ("--out", str(out)) if commit or in_git else ("--json",)
    kept += ("--commit", commit) if commit else ()
    peers, limit = (("--against", "peers"), 500) if against else ((), 100)
    for family in FAMILIES:
        timed = (*reeltime, "bench", family, "--shapes", "dit", "--device", "cuda", *kept, *peers)
        found.append(Stage(f"bench-{family}", f"bench-{family}", timed, limit))
    timed = (*reeltime, "bench", "step", "--shapes", "tiny", "--device", "cuda", *kept)
    found.append(Stage("bench-step", "bench-step", timed, 100))
    return found


def find_sanitizer() -> str:
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or name


def find_root() -> Path:
    """The checkout.

    Raises:
        ValueError: neither this file nor the working directory lies in one.
    """
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / "pyproject.toml").exists() and (folder / "csrc").is_dir():
            return folder
    raise ValueError("gpu-check: run it in a checkout of reeltime; the package alone has no tests")


# --- How it is run ------------------------------------------------------------------------------


def end(process: subprocess.Popen[bytes]) -> None:
    """A stage and all that it started."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, way)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def execute(
    command: Sequence[str], log: TextIO, limit_s: float, cwd: Path, environment: dict[str, str]
) -> int | None:
    """Exit code, or None: it ran into its limit."""
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    try:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd,
            env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        log.write(f"\nended after its {limit_s:.0f} s\n")
        return None


def run_stage(stage: Stage, out: Path, root: Path, deadline: float) -> Outcome:
    path = out / f"{stage.name}.log"
    limit = min(stage.limit_s, deadline - time.monotonic())
    outcome = Outcome(
        stage.name, "not run", 0.0, stage.limit_s, None, path.name, " ".join(stage.command), ""
    )
    if stage.needs and shutil.which(stage.needs) is None:
        outcome.status, outcome.last = "missing", f"{stage.needs} is not installed"
        return outcome
    if limit <= 1.0:
        outcome.last = "no time was left"
        return outcome
    paths = [str(root / SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= {"COLUMNS": "150", "NO_COLOR": "1", "OMP_NUM_THREADS": "2"} | stage.environment
    begun = time.monotonic()
    with path.open("w") as log:
        outcome.code = execute(stage.command, log, limit, root, environment)
    if outcome.code != 0 and stage.rescue:
        with (out / f"{stage.name}-rescue.log").open("w") as log:
            left = min(stage.limit_s, deadline - time.monotonic())
            execute(stage.rescue, log, max(left, 1.0), root, environment)
    outcome.seconds = time.monotonic() - begun
    outcome.status = {0: "passed", None: "timeout"}.get(outcome.code, "failed")
    lines = tail(path)
    outcome.last = lines[-1] if lines else ""
    return outcome


def tail(path: Path) -> list[str]:
    """The last lines that say something."""
    if not path.exists():
        return []
    lines = [line.rstrip() for line in path.read_text(errors="replace").splitlines()]
    return [line for line in lines if line][-TAIL:]


def run_all(
    plan: Sequence[Stage], out: Path, root: Path, limit_s: float, console: Console
) -> list[Outcome]:
    """Group by group; the summary is written after each, so that an interrupted run has one."""
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    workers = max(1, (os.cpu_count() or 1) // 2)
    for group in dict.fromkeys(stage.group for stage in plan):
        members = [stage for stage in plan if stage.group == group]
        console.print(Text(f"{', '.join(stage.name for stage in members)} ...", style="dim"))
        with ThreadPoolExecutor(min(workers, len(members))) as pool:
            running = [
                pool.submit(run_stage, stage, out, root, begun + limit_s) for stage in members
            ]
            outcomes += [future.result() for future in running]
        document = {
            "passed": len(outcomes) == len(plan) and all(outcome.good for outcome in outcomes),
            "seconds": time.monotonic() - begun,
            "stages": [asdict(outcome) for outcome in outcomes],
        }
        (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n")
    return outcomes


# --- What is shown ------------------------------------------------------------------------------


def draw(console: Console, outcomes: Sequence[Outcome], out: Path) -> None:
    """Logs of what failed, then the table, so that the end of the output has the verdict."""
    for outcome in outcomes:
        if not outcome.good:
            console.print(Text(f"--- {outcome.name}: {outcome.status}", style="bold red"))
            for line in tail(out / outcome.log):
                console.print(Text(line[:300]), soft_wrap=True)
    table = Table(title=f"gpu-check, logs in {out}", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("last line", overflow="ellipsis", no_wrap=True)
    for outcome in outcomes:
        style = {"passed": "green", "missing": "yellow"}.get(outcome.status, "bold red")
        table.add_row(
            outcome.name,
            Text(outcome.status, style=style),
            f"{outcome.seconds:.0f}",
            f"{outcome.limit_s:.0f}",
            Text(outcome.last),
        )
    console.print(table)


def main(
    out: Annotated[Path, typer.Option(help="Folder of logs, summary.json and <gpu>.csv.")],
    only: Annotated[
        list[str] | None, typer.Option(help="One stage: repeat for several; all by default.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="What is measured; asked of git by default.")
    ] = None,
    against: Annotated[
        bool, typer.Option("--against", help="Benchmarks beside peers; with --only, for minutes.")
    ] = False,
    limit: Annotated[float, typer.Option(help="Seconds for all of it.")] = 580.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan.")] = False,
) -> None:
    """Build for the GPU at hand, and run everything that needs one."""
    root = find_root()
    out = out.resolve()
    in_git = (root / ".git").exists() and shutil.which("git") is not None
    plan = stages(root, out, commit, in_git, against)
    known = [stage.name for stage in plan]
    odd = sorted(set(only or ()) - set(known))
    if odd:
        raise ValueError(f"only: expected some of {', '.join(known)}, got {', '.join(odd)}")
    plan = [stage for stage in plan if not only or stage.name in only]
    console = Console(highlight=False, soft_wrap=dry_run)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 140
    if dry_run:
        for stage in plan:
            line = " ".join(stage.command).replace(FACTS, "...")
            console.print(Text(f"{stage.name} [{stage.group}, {stage.limit_s:.0f} s]: {line}"))
        return
    if not commit and not in_git:
        note = "this tree is none of git's and no --commit was given: rows go to logs, to no CSV"
        console.print(Text(note, style="yellow"))
    out.mkdir(parents=True, exist_ok=True)
    (root / SITE).mkdir(parents=True, exist_ok=True)
    outcomes = run_all(plan, out, root, limit, console)
    draw(console, outcomes, out)
    if not all(outcome.good for outcome in outcomes):
        raise typer.Exit(1)


def command_line() -> None:
    """Errors of input in one line, exit code 2."""
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {error}", style="red"))
        sys.exit(2)


if __name__ == "__main__":
    command_line()
