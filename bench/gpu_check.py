# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in commands of under ten minutes: make gpu-check OUT=folder.

Builds this checkout for the GPU at hand into build/gpu-check (the environment stays as it is; the
same sources are not built twice), then runs its parts:

    right      tests, checks against float64, graphs, compute-sanitizer, emulator against hardware
    kernels    ceilings of the card, every kernel at the shapes of Wan's transformer
    step       chunks at every quality level, a profile of one, a thousand of them
    memory     what a step holds, beside its plan
    counters   what bounds each kernel, by Nsight Compute
    peers      the kernels again beside everybody else's; docs/gpu.md, docs/peers.md

The first two by default.  Each stage has a time limit and a log in OUT; one that fails stops no
other.  No network is needed; a tree that is none of git's needs --commit for results to be kept.

    python bench/gpu_check.py --out OUT [--part NAME] [--peers FOLDER] [--commit SHA] [--dry-run]

Exit code 0: every stage passed, or its tool is missing; 1: one did not; 2: bad input.
"""

from __future__ import annotations

import fnmatch
import hashlib
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
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Where most of a step's time goes comes first, should there not be time for all of them.
FAMILIES = ("attention", "gemm_w8a8", "sla", "norm", "rope_kv", "quant")
LEVELS = ("bf16", "int8", "fp8", "int8+sla", "fp8+sla")
PARTS = ("right", "kernels", "step", "memory", "counters", "peers")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SITE = Path("build") / "gpu-check"  # where the package is installed
SOURCES = ("csrc", "python", "model", "bench")
SKIPPED = 77  # exit code of a stage that says why it cannot run here, as automake has it
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
    part: str | None = None  # of PARTS; None: comes before any of them
    needs: str | None = None  # a program without which it is missing, not failed
    rescue: tuple[str, ...] | None = None  # run if it fails, so that the rest can be tried
    environment: dict[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()  # behind the build on PYTHONPATH
    mark: tuple[Path, str] | None = None  # written once it has passed; found so, it is not run


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
    root: Path, out: Path, commit: str | None, in_git: bool, peers: Sequence[Path] = ()
) -> list[Stage]:
    """The build; then what is about being right, side by side; then what is timed, alone.

    peers: a folder per set of libraries that import beside each other; none: those installed here.
    """
    keep = (*("--out", str(out)), *(("--commit", commit) if commit else ()))
    kept = keep if commit or in_git else ()
    return [
        *building(root),
        *being_right(root),
        *kernels(kept),
        *whole_step(out, kept),
        counting(out),
        *beside_peers(kept, peers),
    ]


def building(root: Path) -> list[Stage]:
    install = (
        *(sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"),
        *("--no-deps", "--upgrade", "--target", str(SITE), "-C"),
    )
    native = ("cmake.define.REELTIME_CUDA=ON", "-C", "cmake.define.REELTIME_CUDA_ARCHS=native", ".")
    triton = (*install, "cmake.define.REELTIME_CUDA=OFF", ".")
    mark = (root / SITE / "sources.sha256", digest(root))
    return [
        Stage("machine", "machine", (sys.executable, "-c", FACTS), 60),
        Stage("build", "build", (*install, *native), 240, rescue=triton, mark=mark),
    ]


def digest(root: Path) -> str:
    """Of all that the build is made of, and of the Python that it is made for."""
    found = hashlib.sha256(sys.version.encode())
    files = [path for name in SOURCES for path in sorted((root / name).rglob("*"))]
    for path in (root / "CMakeLists.txt", root / "pyproject.toml", *files):
        if path.is_file() and path.suffix != ".pyc":
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def being_right(root: Path) -> list[Stage]:
    python = sys.executable
    pytest = (
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        "--continue-on-collection-errors",
    )
    side_by_side = ("-n", "5") if importlib.util.find_spec("xdist") else ()
    alone = ("tests/test_graph.py", "tests/test_emulator_gpu.py")
    native = sorted(str(p.relative_to(root)) for p in root.glob("tests/test_cuda_*.py"))
    marked = ("-m", "gpu or device", "tests", *(f"--ignore={path}" for path in (*alone, *native)))
    here = ("--no-emulator", "-k", "not device_build")  # what another machine can do as well
    found = [
        Stage("tests", "right", (*pytest, *side_by_side, *marked), 210, "right"),
        Stage("tests-cuda", "right", (*pytest, *side_by_side, *here, *native), 210, "right"),
        Stage("graphs", "right", (*pytest, alone[0]), 150, "right"),
        Stage("emulator", "right", (*pytest, "-rP", alone[1]), 200, "right"),
    ]
    for backend in ("cuda", "triton"):
        check = ("-m", "reeltime", "check", "--backend", backend, "--device", "cuda")
        found.append(Stage(f"check-{backend}", "right", (python, *check), 180, "right"))
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
                "right",
                needs=find_sanitizer(),
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        )
    return found


def timed(name: str, part: str, limit_s: float, *command: str, **more: Any) -> Stage:
    """A module of the package, with nothing beside it."""
    return Stage(name, name, (sys.executable, "-m", *command), limit_s, part, **more)


def benchmark(family: str, kept: Sequence[str]) -> tuple[str, ...]:
    """On a tree without a commit, rows go to the log and to no CSV."""
    shapes = ("--shapes", "dit", "--device", "cuda")
    return ("reeltime", "bench", family, *shapes, *(kept or ("--json",)))


def kernels(kept: Sequence[str]) -> list[Stage]:
    found = [timed("ceilings", "kernels", 40, "reeltime.bench.ceilings", *kept)]
    for family in FAMILIES:
        found.append(timed(f"bench-{family}", "kernels", 100, *benchmark(family, kept)))
    return found


def whole_step(out: Path, kept: Sequence[str]) -> list[Stage]:
    preset = ("--preset", "wan-1.3b-540p")
    soak = ("reeltime.bench.soak", *preset, "--device", "cuda")
    levels = [part for level in LEVELS for part in ("--quality", level)]
    commit = kept[2:]

    def results(name: str) -> tuple[str, ...]:
        return ("--out", str(out / name), *commit) if kept else ()

    return [
        timed("bench-step", "step", 280, *benchmark("step", kept)),
        timed(
            "profile", "step", 130, "reeltime", "profile", *preset, "--target", "vidu-s1",
            "--quality", "int8+sla", "--chunks", "6", "--out", str(out / "profile"),
        ),
        timed(
            "soak", "step", 140, *soak, "--quality", "int8+sla", "--chunks", "1000",
            "--seconds", "110", "--picture", str(out / "soak.png"), *results("soak.json"),
        ),
        timed(
            "memory", "memory", 90, *soak, "--window", "21", "--window", "12", *levels,
            "--chunks", "5", *results("memory.json"),
        ),
    ]  # fmt: skip


def counting(out: Path) -> Stage:
    return timed("counters", "counters", 110, "reeltime.bench.counters", "--out", str(out))


def beside_peers(kept: Sequence[str], folders: Sequence[Path]) -> list[Stage]:
    """Some compile for a minute; a set is a process of its own."""
    found = []
    for family in FAMILIES:
        command = (*benchmark(family, kept), "--against", "peers")
        for folder in folders or (None,):
            name, path = "here", tuple[str, ...]()
            if folder:  # beside it what a .pth file names: none is read from PYTHONPATH
                bundled = folder / "nvidia_cutlass_dsl" / "python_packages"
                name, path = folder.name, (str(folder), str(bundled))
            found.append(timed(f"peers-{name}-{family}", "peers", 120, *command, path=path))
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
    if stage.mark and stage.mark[0].exists() and stage.mark[0].read_text() == stage.mark[1]:
        outcome.status, outcome.last = "passed", "as it was: nothing has changed since"
        return outcome
    if limit <= 1.0:
        outcome.last = "no time was left"
        return outcome
    paths = [str(root / SITE), *stage.path, *filter(None, [os.environ.get("PYTHONPATH")])]
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
    outcome.status = {0: "passed", SKIPPED: "missing", None: "timeout"}.get(outcome.code, "failed")
    if outcome.code == 0 and stage.mark:
        stage.mark[0].write_text(stage.mark[1])
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
    workers = max(1, (os.cpu_count() or 1) - 2)
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


def chosen(plan: Sequence[Stage], parts: Sequence[str], only: Sequence[str]) -> list[Stage]:
    """Stages of these parts and what comes before any; or those that a name or pattern stands for.

    Raises:
        ValueError: of a part or a stage that is not there.
    """
    odd = sorted(set(parts) - set(PARTS))
    if odd:
        raise ValueError(f"part: expected some of {', '.join(PARTS)}, got {', '.join(odd)}")
    names = [stage.name for stage in plan]
    odd = [pattern for pattern in only if not fnmatch.filter(names, pattern)]
    if odd:
        raise ValueError(f"only: expected some of {', '.join(names)}, got {', '.join(odd)}")
    if only:
        return [s for s in plan if any(fnmatch.fnmatch(s.name, pattern) for pattern in only)]
    return [stage for stage in plan if stage.part is None or stage.part in parts]


def main(
    out: Annotated[Path, typer.Option(help="Folder of logs, summary.json and results.")],
    part: Annotated[
        list[str] | None, typer.Option(help="Repeat for several; right and kernels by default.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="One stage, or bench-* for several; no other is run.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="What is measured; asked of git by default.")
    ] = None,
    peers: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of peers for PYTHONPATH; one for each set, each on its own."),
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds for all of it.")] = 580.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan.")] = False,
) -> None:
    """Build for the GPU at hand, and run everything that needs one."""
    root = find_root()
    out = out.resolve()
    in_git = (root / ".git").exists() and shutil.which("git") is not None
    folders = [folder.resolve() for folder in peers or ()]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"peers: expected a folder, got {folder}")
    plan = chosen(stages(root, out, commit, in_git, folders), part or PARTS[:2], only or ())
    console = Console(highlight=False, soft_wrap=dry_run)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 140
    if dry_run:
        for stage in plan:
            line = " ".join(stage.command).replace(FACTS, "...")
            console.print(Text(f"{stage.name} [{stage.group}, {stage.limit_s:.0f} s]: {line}"))
        return
    if not commit and not in_git:
        note = "this tree is none of git's and no --commit was given: rows go to logs alone"
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
