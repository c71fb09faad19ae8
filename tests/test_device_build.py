# SPDX-License-Identifier: Apache-2.0
"""The test kernels and csrc/common as nvcc compiles them, and the emulator's layouts as CUTLASS has
them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulate
import pytest
from device_build import disassembler, needs_nvcc

ROOT = Path(__file__).resolve().parent.parent
CSRC, CUDA = ROOT / "csrc", ROOT / "tests/cuda"

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

EVERY = ("80", "89", "90a", "120a")
# File, targets, and what its machine code must contain: on each of them, or on one.
COMPILED = [
    ("copy_sm80.cu", EVERY, {"": ["LDGSTS.E.BYPASS", "LDS.128", "STG.E.128"]}),
    ("gemm_sm80.cu", EVERY, {"": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS"]}),
    (
        "gemm_sm90.cu",
        ("90a",),
        {"": ["IGMMA.64x64x32.S8.S8", "UTMALDG.2D", "UTMASTG.2D", "SYNCS.*TRYWAIT", "USETMAXREG"]},
    ),
    (
        "fragments_sm90.cu",
        ("90a", "120a"),
        {
            "": ["LDSM.16.MT88.4", "STSM.16.M88.4", "STSM.16.MT88.4", "HMMA.16816.F32.BF16"],
            "120a": ["QMMA.16832.F32.E4M3.E4M3", "QMMA.16832.F16.E4M3.E4M3"],
        },
    ),
    (
        "wgmma_sm90.cu",
        ("90a",),
        {
            "": [
                f"{kind}.64x{n}x{k}"
                for n in range(64, 257, 32)
                for kind, k in (("IGMMA", 32), ("QGMMA", 32), ("HGMMA", 16))
            ]
            + ["QGMMA.64x72x32", "QGMMA.64x136x32"]
        },
    ),
    (
        "boxes_sm90.cu",
        ("90a",),
        {"": ["UTMALDG.4D", "UTMASTG.3D", "UTMALDG.3D.MULTICAST", "UCGABAR"]},
    ),
    ("reduce_rows.cu", EVERY, {"": ["SHFL.BFLY", "VOTE", "BAR.ARV"]}),
    ("split_sm80.cu", ("80",), {"": ["MEMBAR.*GPU", "ATOMG.E.ADD", "LDG.E.128.CONSTANT"]}),
    (
        "convert.cu",
        EVERY,
        {
            "": ["F2FP.BF16", "MUFU.EX2", "PRMT"],
            **{target: ["F2FP.*E4M3"] for target in EVERY[1:]},
        },
    ),
]
HEADERS = [
    path for path in sorted((ROOT / "csrc/common").glob("*.h")) if path.name != "build_info.h"
]


def cubin(source: Path, target: str) -> Path:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{target}", "-cubin", "-Werror=all-warnings"]
    command += ["-Xptxas", "-Werror,-warn-spills"]  # also when wgmma is serialised
    command += [f"-I{CSRC}", str(source)]
    inputs = [version, source, *HEADERS, *sorted(CUDA.glob("*.h"))]
    return emulate.cached(f"{source.stem}-{target}.cubin", inputs, command)


@pytest.fixture(scope="module")
def cubins() -> dict[tuple[str, str], Path]:
    wanted = [(name, target) for name, targets, _ in COMPILED for target in targets]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda pair: cubin(CUDA / pair[0], pair[1]), wanted)
        return dict(zip(wanted, made, strict=True))


@needs_nvcc
@pytest.mark.skipif(not disassembler(), reason="needs nvdisasm")
@pytest.mark.parametrize(
    "name, target", [(name, target) for name, targets, _ in COMPILED for target in targets]
)
def test_device_build_has_the_expected_instructions(cubins, name, target):
    command = [disassembler(), "-c", str(cubins[name, target])]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = next(words for file, _, words in COMPILED if file == name)
    for word in (*expected[""], *expected.get(target, [])):
        assert re.search(word, code), word
    if name.startswith(("gemm", "wgmma")):
        assert not re.search(r"\b(STL|LDL|I2F)\b", code), "spills, or the slow conversion"


@needs_nvcc
def test_ptxas_adds_no_fences_between_products(tmp_path):
    """Without its planted mistakes, which branch between them, wgmma stays as it was written."""
    text = (CUDA / "gemm_sm90.cu").read_text()
    text = re.sub(r"p\.mistake != Mistake::k\w+", "true", text)
    (tmp_path / "clean.cu").write_text(re.sub(r"p\.mistake == Mistake::k\w+", "false", text))
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = ["nvcc", "-std=c++17", target, "-Xptxas=-v", "-c", f"-I{CSRC}", f"-I{CUDA}"]
    command += [str(tmp_path / "clean.cu"), "-o", str(tmp_path / "clean.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " 0 bytes spill stores" in done.stderr
    assert not re.findall(r"\(C75\d\d\).*", done.stderr)


@needs_nvcc
def test_host_side_needs_no_libcuda():
    """The launcher and the tensor map, compiled for the host, call the static runtime alone."""
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = ["nvcc", "-std=c++17", target, "-c", f"-I{CSRC}", str(CUDA / "gemm_sm90.cu")]
    inputs = [CUDA / "gemm_sm90.cu", *HEADERS, *sorted(CUDA.glob("*.h"))]
    made = emulate.cached("gemm_sm90.o", inputs, command)
    names = subprocess.run(["nm", "-u", str(made)], capture_output=True, text=True).stdout
    assert "cudaLaunchKernelEx" in names
    assert not re.findall(r"\bcu[A-Z]\w+", names)


@needs_nvcc
@pytest.mark.parametrize("target", ["80", "86", "89", "90a", "100a", "120a"])
def test_every_header_compiles_for_every_gpu(target, tmp_path):
    source = tmp_path / "headers.cu"
    source.write_text("".join(f'#include "common/{path.name}"\n' for path in HEADERS))
    assert cubin(source, target).stat().st_size > 0


def test_every_header_stands_alone():
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}"]

    def compiled(header: Path) -> Path:
        command = [emulate.compiler()[0], *flags, "-include", str(header), "-c", "-x", "c++"]
        return emulate.cached(f"{header.stem}.o", emulate.headers(), [*command, os.devnull])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert all(path.exists() for path in pool.map(compiled, HEADERS))


@pytest.mark.parametrize(
    "path", [*(ROOT / "csrc").rglob("*.cu"), *CUDA.glob("*.cu")], ids=lambda path: path.name
)
def test_kernels_are_one_source_for_both_compilers(path):
    """No PTX, no preprocessor conditions, nothing of the emulator."""
    text = path.read_text()
    assert not re.search(r"\basm\b|^\s*#\s*if|REELTIME_EMULATED|emulator", text, re.MULTILINE)


@needs_nvcc  # for the CUDA headers that CUTLASS includes
def test_layouts_are_those_of_cutlass():
    spec = importlib.util.find_spec("cutlass_library")
    if not spec or not spec.origin:
        pytest.skip("needs the nvidia-cutlass wheel")
    source = CUDA / "layouts_check.cpp"
    # nvcc as a C++ compiler: it knows where its headers are
    command = ["nvcc", "-std=c++17", "-O0", "-w", "-x", "c++", f"-I{CSRC}"]
    command += [f"-I{Path(spec.origin).parent / 'source/include'}", str(source)]
    program = emulate.cached("layouts.exe", [source, CSRC / "emulator/layouts.h"], command)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    rows = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert len(rows) == 22
    assert set(rows.values()) == {"0"}, rows
