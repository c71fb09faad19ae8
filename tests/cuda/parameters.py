# SPDX-License-Identifier: Apache-2.0
"""Entry points of the families, read from csrc/<family>/<family>.h: fields in order, their types,
and what is written (pointers to what is not const).  Runs them by name on numpy arrays or tensors.

    run("quant", "quantize", dict(x=x, xq=xq, ...), schedule="forward")
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emulate

CUDA = Path(__file__).resolve().parent
CSRC = emulate.CSRC
NUMBERS = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
Edits = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@functools.cache
def entries(family: str) -> dict[str, tuple[str, ...]]:
    """Entry point -> name of its parameter struct and the files that have it, sm80 and so on."""
    text = (CSRC / family / f"{family}.h").read_text()
    found: dict[str, tuple[str, ...]] = {}
    for entry, sm, struct in re.findall(r"^cudaError_t (\w+)_(sm\d+)\(const (\w+)&", text, re.M):
        found[entry] = (struct, *found.get(entry, ())[1:], sm)
    return found


@functools.cache
def fields(family: str, struct: str) -> dict[str, Any]:
    """Field -> "input", "output" or the ctypes type of a number."""
    text = (CSRC / family / f"{family}.h").read_text()
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", text, re.M | re.S)
    assert body, f"{family}.h: no struct {struct}"
    found: dict[str, Any] = {}
    for statement in re.sub(r"//.*", "", body[1]).split(";"):
        if not (statement := " ".join(statement.split())):
            continue
        if pointer := re.fullmatch(r"(const )?\w+ ?\* ?(\w+)", statement):
            found[pointer[2]] = "input" if pointer[1] else "output"
            continue
        kind, names = statement.split(" ", 1)
        for name in names.split(","):
            found[name.strip()] = NUMBERS.get(kind, ctypes.c_int32)  # enums are 32 bits wide
    return found


@functools.cache
def library(family: str, sm: str, flavour: str, edits: Edits = ()) -> emulate.Library:
    """One file of a family; `edits` plant a mistake."""
    names = [entry for entry, (_, *files) in entries(family).items() if sm in files]
    exported = "\n".join(f"EMULATED({entry}_{sm}, {entries(family)[entry][0]})" for entry in names)
    text = (
        f'#include "{family}/{family}.h"\n#include "emulator/library.h"\n'
        f"using namespace reeltime;\n{exported}\n"
    )
    exports = emulate.cache_folder() / f"{family}_{sm}.cpp"
    if not exports.exists() or exports.read_text() != text:
        exports.write_text(text)
    replace = {name: list(pairs) for name, pairs in edits}
    return emulate.build([exports, CSRC / family / f"{sm}.cu"], flavour, replace)


def builds(
    family: str, names: Iterable[str], planted: Callable[[str], Iterable[tuple[str, str]]]
) -> Iterator[Callable[[str], None]]:
    """A fixture's generator of wait_for(name): every mistake that is planted in sm80.cu being
    compiled, two at a time, while the first are tried."""
    pool = ThreadPoolExecutor(2)
    started: dict[str, Future] = {}

    def start(name: str) -> Future:
        edits = (("sm80.cu", tuple(planted(name))),)
        return pool.submit(library, family, "sm80", "race", edits)

    def wait_for(name: str) -> None:
        if not started:
            started.update({each: start(each) for each in names})
        started[name].result()

    yield wait_for
    pool.shutdown(cancel_futures=True)


def run(
    family: str,
    entry: str,
    given: dict[str, Any],
    *,
    sm: str = "sm80",
    flavour: str = "plain",
    replace: dict[str, Sequence[tuple[str, str]]] | None = None,
    **how: Any,
) -> None:
    """Launch; arrays behind non-const pointers are written in place."""
    kinds = fields(family, entries(family)[entry][0])
    assert set(kinds) == set(given), f"{entry}: {sorted(set(kinds) ^ set(given))}"
    ordered = {
        name: given[name] if kind in ("input", "output") else kind(given[name])
        for name, kind in kinds.items()
    }
    outputs = [name for name, kind in kinds.items() if kind == "output"]
    edits = tuple((name, tuple(pairs)) for name, pairs in (replace or {}).items())
    library(family, sm, flavour, edits).run(f"{entry}_{sm}", ordered, outputs, **how)


def sanitized(family: str, body: str, sm: str = "sm80") -> str | None:
    """What goes wrong when `body` runs under sanitizers, "" if nothing does, None without them.
    It sees numpy as np and run(entry, **fields)."""
    script = f"""
import sys; sys.path.insert(0, {str(CUDA)!r})
import numpy as np, parameters
def run(entry, **given): parameters.run({family!r}, entry, given, sm={sm!r}, flavour="sanitize")
{body}
print("passed")
"""
    done = emulate.run_sanitized(script)
    if done is None:
        return None
    return "" if (done.returncode, done.stdout) == (0, "passed\n") else done.stderr[-3000:]
