# SPDX-License-Identifier: Apache-2.0
"""What SASS says of a kernel, with no GPU and no driver: of Triton kernels, compiled here ahead of
time, and of the CUDA kernels in the extension, as they were built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reeltime import _C
from reeltime.arch import Arch
from reeltime.jit.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# Element types of tt.dot operands, as MLIR spells them.
OPERANDS = {"i8": "int8", "f8E4M3FN": "fp8", "bf16": "bfloat16", "f16": "float16"}
MATRIX = re.compile(r"^(?:UTC)?[A-Z]*(?:MMA|GMMA)\b")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture."""

    registers: int = 0
    spill_bytes: int = 0  # local memory that the compiler used, per thread
    hot_spills: int = 0  # loads and stores of it in the innermost loops
    hot_instructions: int = 0  # of those loops in all
    shared_bytes: int = 0
    operands: tuple[str, ...] = ()  # dtypes of its matrix products
    instructions: dict[str, int] = field(default_factory=dict)  # matrix instructions in the SASS
    compile_s: float = 0.0
    error: str = ""


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """(type by parameter, constants, parameters divisible by 16), as a launch would specialise."""
    types, constants, divisible = {}, {}, []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments.get(parameter.name)
        fixed = value is None or (type(value) is int and value == 1)
        if parameter.is_constexpr or fixed:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, bool):
            types[name] = "i1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            types[name] = "fp32"
    return types, constants, divisible


def identity(launch: Launch) -> str:
    """Equal for launches that share one compilation."""
    types, constants, divisible = signature(launch)
    parts = launch.kernel.__name__, types, constants, divisible, launch.options
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile(launch: Launch, arch: Arch) -> Compiled:
    """Compile for `arch` and read the cubin; what the compiler refuses is in `error`."""
    types, constants, divisible = signature(launch)
    place = {name: (index,) for index, name in enumerate(types)}
    source = ASTSource(
        fn=launch.kernel,
        signature=types,
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    start = time.perf_counter()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            target = GPUTarget("cuda", arch.sm, 32)
            kernel = triton.compile(source, target=target, options=launch.options)
    except Exception as error:  # noqa: BLE001  Triton raises whatever its passes raise
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return Compiled(error=f"{type(error).__name__}: {lines[-1].strip()}")
    seconds = time.perf_counter() - start
    products = re.findall(r"tt\.dot.*?tensor<[0-9x]+x(\w+)>", kernel.asm["ttir"])
    operands = tuple(sorted({OPERANDS[p] for p in products if p in OPERANDS}))
    (found,) = inspect(kernel.asm["cubin"]).values()
    return Compiled(
        **found,
        shared_bytes=kernel.metadata.shared,
        operands=operands,
        compile_s=seconds,
    )


def inspect(cubin: bytes) -> dict[str, dict[str, Any]]:
    """Registers, spills and matrix instructions of each kernel of a cubin, by symbol; remembered by
    the cubin's contents."""
    kept = remembered(hashlib.sha256(cubin).hexdigest())
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    found = {
        symbol: read(resources, sections(sass)[symbol])
        for symbol, resources in re.findall(r"Function (\S+):\s+(REG:.*)", usage)
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as whole:
        whole.write(json.dumps(found).encode())
    os.replace(whole.name, kept)  # at once: another process may look for it
    return found


def sections(sass: str) -> dict[str, str]:
    """The SASS of each kernel of a cubin."""
    parts = re.split(r"^\.text\.(\S+):$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def read(usage: str, sass: str) -> dict[str, Any]:
    """What one kernel's resource line and its SASS say."""
    resources = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    names, loops = program(sass)
    counted: dict[str, int] = {}
    for name in names:
        if MATRIX.match(name):
            counted[name] = counted.get(name, 0) + 1
    spills = [index for index, name in enumerate(names) if name.startswith(("STL", "LDL"))]
    hot = [index for index in spills if any(start <= index <= end for start, end in loops)]
    return {
        "registers": resources.get("REG", 0),
        "spill_bytes": max(resources.get("STACK", 0), resources.get("LOCAL", 0)) if spills else 0,
        "hot_spills": len(hot) if loops else len(spills),
        "hot_instructions": sum(end - start + 1 for start, end in loops) or len(names),
        "instructions": counted,
    }


@functools.cache
def extension(target: str) -> dict[str, dict[str, Any]]:
    """Every CUDA kernel that reeltime._C holds for an nvcc target such as 90a, by symbol."""
    found: dict[str, dict[str, Any]] = {}
    listed = re.findall(r"ELF file\s+\d+: (\S+)", tool("cuobjdump", "--list-elf", _C.__file__))
    # cuobjdump before CUDA 13 does not say the letter of 90a; no target is built both ways.
    ends = f".sm_{target}.cubin", f".sm_{target.rstrip('a')}.cubin"
    with tempfile.TemporaryDirectory() as folder:
        for name in {name for name in listed if name.endswith(ends)}:
            tool("cuobjdump", "--extract-elf", name, _C.__file__, cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            found.update(inspect(cubin.read_bytes()))
    return found


def built(symbol: str, shared_bytes: int, operands: tuple[str, ...], arch: Arch) -> Compiled:
    """One kernel of the extension, as a launch recorded it."""
    kernel = extension(arch.target).get(symbol)
    if kernel is None:
        return Compiled(error=f"the extension has no code of {symbol or 'it'} for {arch.target}")
    used = operands if kernel["instructions"] else ()
    return Compiled(**kernel, shared_bytes=shared_bytes, operands=used)


INSTRUCTION = re.compile(r"\s+(?:/\*\w+\*/)?\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)(.*)")
LABEL = re.compile(r"(\.L_\w+):")


def program(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions in order, and where the innermost loops begin and end: of those that hold
    matrix instructions, if there are any.  A loop is a branch backwards."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: set[tuple[int, int]] = set()
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(names)
        elif found := INSTRUCTION.match(line):
            names.append(found.group(1))
            aim = re.search(r"`\((\.L_\w+)\)", found.group(2))
            if found.group(1).startswith("BRA") and aim and aim.group(1) in labels:
                loops.add((labels[aim.group(1)], len(names) - 1))
    # The last instruction of a program branches to itself, which is no loop.
    loops = {(start, end) for start, end in loops if end > start}
    busy = {
        loop for loop in loops if any(MATRIX.match(n) for n in names[loop[0] : loop[1] + 1])
    } or loops
    inner = [
        (start, end)
        for start, end in busy
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in busy)
    ]
    return names, sorted(inner)


def remembered(digest: str) -> Path:
    """Where what was read of a cubin is kept, beside Triton's own cache of it."""
    return Path(triton.knobs.cache.dir) / "reeltime-port-4" / f"{digest}.json"


def tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    """Run one of the binary tools that Triton's wheel brings."""
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, env=environment, cwd=cwd
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
