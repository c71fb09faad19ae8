# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says: one flat row per kernel and shape, and where it was measured.

Rows are appended to results/<gpu>.csv; a file whose header is another's, a card without a row in
hardware.py and a tree without a commit are refused before anything is measured.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from reeltime import _C
from reeltime.bench import hardware
from reeltime.bench.ceilings import Ceilings
from reeltime.bench.sensors import Reading, Sensors

HOST_FILE = "host.csv"


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.  None: not measured.  error: why it has no time.

    A peer is a row of its own, `backend` its name and version; best_peer, its relative L1 and the
    ratio of its time to ours stand in ours.  The ceilings and the floor are those of this run.
    """

    family: str
    op: str
    form: str
    shape: str
    dtype: str
    backend: str
    device: str
    p50_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    floor_us: float | None = None
    share_of_floor: float | None = None
    expected_share: float | None = None  # stated before it was measured
    best_peer: str | None = None
    ratio: float | None = None
    peer_relative_l1: float | None = None
    relative_l1: float | None = None  # to float64, the worst of its results; None: not judged
    error: str | None = None
    ceiling_gbps: float | None = None
    ceiling_tflops: float | None = None  # of the dtypes of its matrix products, in its proportions
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle: str | None = None

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.op, self.dtype, self.form, self.shape) if part)


@dataclass(frozen=True)
class Environment:
    """Where and by what a row was measured."""

    commit: str | None
    date: str  # of the run's beginning, UTC
    torch: str
    triton: str
    cuda: str  # that torch was built with
    nvcc: str  # that our kernels were built with
    driver: str
    python: str


COLUMNS = tuple(field.name for kind in (Row, Environment) for field in fields(kind))


def environment(commit: str | None, sensors: Sensors) -> Environment:
    return Environment(
        commit=commit,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda or "",
        nvcc=_C.cuda_version or "",
        driver=sensors.driver,
        python=platform.python_version(),
    )


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def find_commit(folder: Path) -> str | None:
    """What git calls the tree at `folder`, "-dirty" if it was changed; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def host_name() -> str:
    """The processor, so that its figures are never taken for a GPU's; "" if it is not known."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"host: {cpu}, {torch.get_num_threads()} threads" if cpu else ""


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else host_name()


# --- The file -----------------------------------------------------------------------------------


def results_file(folder: Path, device: torch.device, commit: str | None) -> Path:
    """Where rows of this device go, once it is certain that they may.

    Raises:
        ValueError: no commit, no row in hardware.py, no name of the host, or a foreign header.
        FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"out: no such folder: {folder}")
    if not commit:
        raise ValueError(
            "commit: a result without one cannot be repeated, and this tree is none of git's. "
            "Pass --commit."
        )
    name = device_name(device)
    if not name:
        raise ValueError("hardware: this host does not name its processor. Leave --out out.")
    path = folder / (hardware.lookup(name).file if device.type == "cuda" else HOST_FILE)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != COLUMNS:
            odd = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
            raise ValueError(f"{path}: its header differs ({', '.join(odd)}). Move it away first.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"out: no permission to write {path}")
    return path


def append(path: Path, rows: Sequence[Row], where: Environment) -> None:
    """Add rows, at once, so that an interrupted run keeps what it has measured."""
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(v) for name, v in document(row, where).items()})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(value.split()) if isinstance(value, str) else value


def document(row: Row, where: Environment) -> dict[str, Any]:
    """A row for JSON, which has no infinity: null."""
    values = asdict(row) | asdict(where)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def ceilings_of(flops: dict[str, float], ceilings: Ceilings | None) -> dict[str, float | None]:
    """The columns that say what a row was held to."""
    if ceilings is None:
        return {}
    compute = ceilings.compute_us(flops) if flops else None
    rate = sum(flops.values()) / compute / 1e6 if compute else None
    return {"ceiling_gbps": ceilings.gbps, "ceiling_tflops": rate}


def conditions(reading: Reading) -> dict[str, Any]:
    return asdict(reading)
