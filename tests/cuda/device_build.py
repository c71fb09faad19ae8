# SPDX-License-Identifier: Apache-2.0
"""Kernel files compiled for a GPU: what ptxas says of them, and their SASS."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import emulate
import pytest

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@dataclass(frozen=True)
class DeviceBuild:
    """One file for one target."""

    cubin: Path
    report: str  # of ptxas

    @property
    def spills(self) -> list[tuple[str, ...]]:
        """Bytes stored and loaded, of each kernel."""
        return re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self.report)

    def kernels(self) -> list[str]:
        """SASS of each kernel, its symbol in the first line; the test is skipped without a tool."""
        tool = disassembler() or pytest.skip("needs nvdisasm")
        command = [tool, "-c", str(self.cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.split(r"(?m)^\.text\.", code)[1:]


def disassembler() -> str | None:
    """From the CUDA toolkit or from Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    wheel = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which("nvdisasm") or (wheel and shutil.which("nvdisasm", path=str(wheel)))


def device_build(source: Path, target: str, folder: Path) -> DeviceBuild:
    """`source` by nvcc for a target such as 90a."""
    made = folder / f"{source.stem}-{target}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-gencode=arch=compute_{target}"]
    command[-1] += f",code=sm_{target}"
    command += ["-Xptxas=-v", f"-I{emulate.CSRC}", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return DeviceBuild(made, done.stderr)


def device_builds(source: Path, targets: Sequence[str], folder: Path) -> dict[str, DeviceBuild]:
    """By target, side by side."""
    with ThreadPoolExecutor(len(targets)) as pool:
        made = pool.map(lambda target: device_build(source, target, folder), targets)
        return dict(zip(targets, made, strict=True))
