# SPDX-License-Identifier: Apache-2.0
"""Builds CUDA kernel files for the CPU, and runs them on numpy arrays or torch tensors.

    library = build([ROOT / "tests/cuda/kernels.cpp", ROOT / "tests/cuda/copy_sm80.cu"], "race")
    library.run("copy_sm80", dict(x=x, y=y, tiles=8, mistake=0), outputs=("y",))

Needs g++ >= 11 or clang++ and nothing of CUDA.  The fields of the parameter struct are given in its
order: arrays become pointers, int is int32, float is float32; anything else as a ctypes value.
Raises EmulationError with kernel, block, thread, byte and line of whatever goes wrong.  Builds are
kept under the system's temporary folder, by a hash of sources, flags and compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
RUNTIME = tuple(sorted((CSRC / "emulator").glob("*.cpp")))
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", f"-I{CSRC}")
# -O1 keeps the order of a kernel's lines, -g1 their numbers; plain is for speed.
FLAVOURS = {
    "plain": ("-O2", "-g1"),
    "ucontext": ("-O2", "-g1"),  # plain, with the fibers of processors other than x86-64
    "race": ("-O1", "-g1", "-fsanitize=thread"),
    "sanitize": (
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ),
}
SCHEDULES = ("random", "forward", "backward")
LANDINGS = ("random", "issue", "wait")


class EmulationError(RuntimeError):
    """A kernel did what a GPU would not survive, or not always."""


def refuse() -> None:
    """Called before anything is built; pytest's --no-emulator has its own, which skips the test."""


# --- Building -----------------------------------------------------------------------------------


@functools.cache
def compiler() -> tuple[str, str]:
    """The C++ compiler and its version."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
            return name, done.stdout.splitlines()[0]
    raise FileNotFoundError("emulator: expected g++ or clang++, found neither")


def flags_of(flavour: str) -> tuple[str, ...]:
    flags = COMMON_FLAGS + FLAVOURS[flavour]
    if flavour == "race":
        if "clang" in compiler()[1]:
            return (*flags, "-mllvm", "-tsan-instrument-func-entry-exit=0")
        return (*flags, "--param", "tsan-instrument-func-entry-exit=0")
    return flags


LOCKS: dict[Path, threading.Lock] = defaultdict(threading.Lock)


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"reeltime-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def cached(name: str, inputs: Iterable[Path | str], command: Sequence[str]) -> Path:
    """The file that `command` + ["-o", file] makes, once for the same command and inputs."""
    digest = hashlib.sha256(repr((compiler(), list(command))).encode())
    for item in inputs:
        digest.update(item.read_bytes() if isinstance(item, Path) else item.encode())
    path = cache_folder() / f"{digest.hexdigest()[:16]}-{name}"
    with LOCKS[path]:  # other threads may want the same; other processes make their own
        if not path.exists():
            partial = path.with_name(f"{os.getpid()}-{path.name}")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            partial.replace(path)
    return path


def headers() -> list[Path]:
    return sorted(CSRC.glob("*/*.h"))


def compile_one(source: Path, flavour: str, replace: Sequence[tuple[str, str]] = ()) -> Path:
    """One object file; `replace` edits the text first, which plants a mistake."""
    text = source.read_text()
    for old, new in replace:
        if (count := text.count(old)) != 1:
            raise ValueError(f"replace: expected {old!r} once in {source.name}, not {count}")
        text = text.replace(old, new)
    flags = flags_of(flavour)
    if source in RUNTIME:  # never instrumented
        fibers = ("-DREELTIME_UCONTEXT",) * (flavour == "ucontext")
        flags = (*flags_of("plain"), "-O3", *fibers)  # its loops are the tensor cores
    command = [compiler()[0], *flags, "-Wno-unknown-pragmas", "-c", "-x", "c++"]
    inputs = [text, *headers(), *sorted(source.parent.glob("*.h"))]
    name = f"{source.stem}.o"
    if not replace:
        return cached(name, inputs, [*command, str(source)])
    edited = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{source.name}"
    edited.write_text(f'#line 1 "{source}"\n{text}')  # messages name the true file
    return cached(name, inputs, [*command, f"-I{source.parent}", str(edited)])


def build(
    sources: Sequence[Path],
    flavour: str = "plain",
    replace: dict[str, Sequence[tuple[str, str]]] | None = None,
) -> Library:
    """A library of kernels; `replace` maps a source's name to edits of its text."""
    refuse()
    edits = replace or {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(
                lambda source: compile_one(source, flavour, edits.get(source.name, ())),
                (*sources, *RUNTIME),
            )
        )
    names = [str(path) for path in objects]
    link = [compiler()[0], "-shared", "-g1", *names, "-ldl"]
    if flavour == "sanitize":
        link.append("-fsanitize=address,undefined")
    return Library(cached(f"{sources[0].stem}-{flavour}.so", names, link), flavour)


def run_sanitized(script: str) -> subprocess.CompletedProcess[str] | None:
    """`script` in a process of its own, for AddressSanitizer must be loaded before anything else;
    None where the compiler has no sanitizers.  The script must not import torch."""
    refuse()
    names = ("libasan.so", "libubsan.so")
    command = [compiler()[0], "-print-file-name="]
    found = [
        subprocess.run([command[0], command[1] + name], capture_output=True, text=True).stdout
        for name in names
    ]
    if not all(Path(path.strip()).is_absolute() for path in found):
        return None
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )


# --- Running ------------------------------------------------------------------------------------


class Options(ctypes.Structure):
    """Mirrors emulator::Options (csrc/emulator/block.h)."""

    _fields_ = [
        ("schedule", ctypes.c_int32),
        ("landing", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("check_races", ctypes.c_int32),
        ("count_banks", ctypes.c_int32),
    ]


class Guarded:
    """A copy of an array for the kernel, between margins that nobody may write.

    Views keep their strides, and the address its alignment up to 256 bytes.
    """

    def __init__(self, array: Any) -> None:
        self.array = array
        self.is_torch = hasattr(array, "data_ptr")
        if self.is_torch:
            address, item, strides = array.data_ptr(), array.element_size(), array.stride()
        else:
            address, item = array.ctypes.data, array.itemsize
            strides = [stride // item for stride in array.strides]
        steps = zip(array.shape, strides, strict=True)
        empty = 0 in array.shape
        self.strides = tuple(strides)
        self.bytes = 0 if empty else (sum((n - 1) * step for n, step in steps) + 1) * item
        margin = 4096 + self.bytes
        self.memory = np.full(2 * margin + self.bytes + 512, 0xA5, np.uint8)
        base = self.memory.ctypes.data + margin
        self.start = margin + (address - base) % 256
        self.address = self.memory.ctypes.data + self.start
        self.span = self.memory[self.start : self.start + self.bytes]
        ctypes.memmove(self.address, address, self.bytes)

    def check(self, name: str) -> None:
        """Raises if a byte of the margins has changed."""
        for part, shift in (
            (self.memory[: self.start], -self.start),
            (self.memory[self.start + self.bytes :], self.bytes),
        ):
            if (changed := np.flatnonzero(part != 0xA5)).size:
                byte = int(changed[0]) + shift
                raise EmulationError(f"somebody wrote byte {byte} of {name}, of {self.bytes}")

    def copy_back(self) -> None:
        """What the kernel wrote, into the array itself."""
        if self.bytes == 0:
            return
        if self.is_torch:
            import torch  # not on the top: processes under a sanitizer do without

            flat = torch.from_numpy(self.span).view(self.array.dtype)
            self.array.copy_(flat.as_strided(self.array.shape, self.strides))
        else:
            flat = self.span.view(self.array.dtype)
            steps = [stride * flat.itemsize for stride in self.strides]
            self.array[...] = np.lib.stride_tricks.as_strided(flat, self.array.shape, steps)


def is_array(value: Any) -> bool:
    return hasattr(value, "data_ptr") or hasattr(value, "ctypes")


def parameter(value: Any) -> Any:
    """The ctypes value of one field."""
    if isinstance(value, Guarded):
        return ctypes.c_void_p(value.address)
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return value


@functools.cache
def symbols(library: Path, offset: str) -> list[str]:
    """Function and file:line, in turn, of the innermost inlined call at an offset and outwards."""
    if not shutil.which("addr2line"):
        return []
    command = ["addr2line", "-e", str(library), "-i", "-f", "-C", offset]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


class Library:
    """A shared library of kernels, each exported by EMULATED (csrc/emulator/library.h)."""

    stacks: ctypes.c_void_p | None = None  # of the first one that was loaded; one runs at a time

    def __init__(self, path: Path, flavour: str) -> None:
        self.path, self.flavour = path, flavour

    @functools.cached_property
    def loaded(self) -> ctypes.CDLL:
        loaded = ctypes.CDLL(str(self.path))
        loaded.emulator_banks.restype = ctypes.c_char_p
        loaded.emulator_stacks.restype = ctypes.c_void_p
        if Library.stacks is None:
            Library.stacks = ctypes.c_void_p(loaded.emulator_stacks())
        loaded.emulator_share_stacks(Library.stacks)
        return loaded

    def run(
        self,
        name: str,
        fields: dict[str, Any],
        outputs: Sequence[str],
        *,
        schedule: str = "random",
        landing: str = "random",
        seed: int = 1,
        count_banks: bool = False,
    ) -> None:
        """Launches; only the arrays among `fields` may be accessed, and only `outputs` written."""
        options = Options(
            SCHEDULES.index(schedule),
            LANDINGS.index(landing),
            seed,
            self.flavour == "race",
            count_banks,
        )
        self.loaded.emulator_options(ctypes.byref(options))
        self.loaded.emulator_clear_ranges()
        guarded = {key: Guarded(value) for key, value in fields.items() if is_array(value)}
        for key, copy in guarded.items():
            base, size = ctypes.c_void_p(copy.address), ctypes.c_size_t(copy.bytes)
            self.loaded.emulator_range(base, size, key.encode(), key in outputs)
        values = [parameter(guarded.get(key, value)) for key, value in fields.items()]
        members = [(key, type(value)) for key, value in zip(fields, values, strict=True)]
        params = type("Params", (ctypes.Structure,), {"_fields_": members})(*values)
        launch = getattr(self.loaded, f"run_{name}")
        launch.restype = ctypes.c_char_p
        report = launch(ctypes.byref(params)).decode()
        if report:
            raise EmulationError(self.with_lines(report))
        for key, copy in guarded.items():
            copy.check(key)
            if key in outputs:
                copy.copy_back()

    def banks(self) -> list[dict[str, Any]]:
        """Per line of the kernel: requests to shared memory, wavefronts taken, and at best."""
        rows = []
        text = self.with_lines(self.loaded.emulator_banks().decode())
        for line in text.splitlines():
            place, counts = line.rsplit(":", 1)
            requests, wavefronts, ideal = map(int, re.findall(r"\d+", counts))
            rows.append(dict(place=place, requests=requests, wavefronts=wavefronts, ideal=ideal))
        return rows

    def with_lines(self, report: str) -> str:
        """The report with file:line for [+0x1234] and the kernel's name for {+0x1234}."""
        report = re.sub(r"\[\+(0x[0-9a-f]+)\]", lambda m: self.line_of(m[1]), report)
        return re.sub(r"\{\+(0x[0-9a-f]+)\}", lambda m: self.kernel_at(m[1]), report)

    def line_of(self, offset: str) -> str:
        """The kernel's own line: the first, from inside out, that is not one of a wrapper."""
        lines = [
            re.sub(r" \(discriminator.*", "", line) for line in symbols(self.path, offset)[1::2]
        ]
        wrappers = (str(CSRC / "common"), str(CSRC / "emulator"))
        own = [line for line in lines if not os.path.normpath(line).startswith(wrappers)]
        found = (own or lines or [""])[0]
        return f"at {os.path.basename(found)}" if ":" in found else f"at {offset}"

    def kernel_at(self, offset: str) -> str:
        names = symbols(self.path, offset)[::2]
        plain = names[-1].replace("(anonymous namespace)::", "") if names else offset
        return plain.split("(")[0].removeprefix("reeltime::")
