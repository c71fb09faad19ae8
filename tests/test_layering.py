# SPDX-License-Identifier: Apache-2.0
"""The flow of the house: families -> model -> bench -> cli.  Nothing imports upward.

Also its size and its words: a kernel file is read in one sitting, no name hides what a thing is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"python/reeltime": "reeltime", "model": "reeltime.model", "bench": "reeltime.bench"}

FAMILIES = ("quant", "norm", "rope_kv", "gemm_w8a8", "attention", "sla")
# attention and sla read the cache that rope_kv writes: its type is the contract between them.  The
# sparse branch of sla in 8 bits is attention over lists: its formats, its encoding, its kernel.
READS = {"attention": {"rope_kv"}, "sla": {"rope_kv", "attention"}}
LAYERS = ("foundation", "family", "model", "bench", "cli")  # may import itself and those before it
MAX_KERNEL_LINES = 500
FORBIDDEN = {"util", "utils", "helper", "helpers", "misc", "manager", "v2"}  # as a word of a name


# --- Imports ------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Module name as installed -> its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def layer(module: str) -> str:
    room = (module.split(".") + [""])[1]
    if room in FAMILIES:
        return "family"
    if room in ("model", "plugins"):
        return "model"
    if room == "bench":
        return "bench"
    if room.startswith("cli") or room == "__main__":
        return "cli"
    return "foundation"


def imports(module: str, source: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, imported name) of every import, also inside functions, `from a import b` as a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            origin = [*base, node.module] if node.level else [node.module]
            prefix = ".".join(part for part in origin if part)
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports against the flow, one sentence each."""
    found = []
    mine = "cli" if module == "reeltime" else layer(module)  # the package's door shows all rooms
    for line, name in imports(module, source, is_package):
        where = f"{module}:{line} imports {name}"
        if name.split(".")[0] in ("model", "bench"):
            found.append(f"{where}: write reeltime.{name}, the installed name")
        if name.split(".")[0] != "reeltime":
            continue
        theirs = layer(name)
        if LAYERS.index(theirs) > LAYERS.index(mine):
            found.append(f"{where}: {mine} must not import {theirs}")
        if mine == theirs == "family" and not may_share(module, name):
            found.append(f"{where}: families meet in quant and in what READS grants")
    return found


def may_share(module: str, name: str) -> bool:
    """A family may import itself, quant and what READS grants; the oracle of a fused op is made of
    the oracles it fuses, so a reference may import a reference."""
    (_, mine, *my_file), (_, theirs, *their_file) = module.split("."), name.split(".")
    granted = {mine, "quant"} | READS.get(mine, set())
    return theirs in granted or my_file[:1] == their_file[:1] == ["reference"]


@pytest.mark.parametrize("module, path", modules().items(), ids=lambda value: str(value))
def test_imports_follow_the_flow(module, path):
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("reeltime.checks", "from reeltime.norm import norm"),
        ("reeltime.norm.api", "import reeltime.model"),
        ("reeltime.norm.api", "from ..model import layers"),
        ("reeltime.norm.api", "from reeltime import attention"),
        ("reeltime.norm.api", "from reeltime.attention.reference import attention"),
        ("reeltime.model.layers", "def f():\n    from reeltime import bench"),
        ("reeltime.model.layers", "from bench import harness"),
        ("reeltime.model.layers", "import reeltime.cli_stream"),
        ("reeltime.bench.report", "from reeltime.cli import app"),
    ],
)
def test_upward_import_is_noticed(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("reeltime.norm.api", "from . import reference\nfrom reeltime import checks, quant"),
        ("reeltime.sla.reference", "from reeltime.attention import reference\nimport torch"),
        ("reeltime.attention.api", "from reeltime.rope_kv import KVCache"),
        ("reeltime.sla.reference", "from reeltime.attention.reference import softmax"),
        ("reeltime.model.step", "from reeltime.norm import norm\nfrom .layers import Block"),
        ("reeltime.bench.report", "from reeltime import arch, model"),
        ("reeltime.cli", "from reeltime import _C, bench, cli_stream"),
    ],
)
def test_downward_import_is_allowed(module, source):
    assert violations(module, source) == []


def test_csrc_includes_no_torch():
    for path in kernel_files():
        if path.suffix != ".py":
            assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path


# --- Size and words -----------------------------------------------------------------------------


def kernel_files() -> list[Path]:
    folders = [ROOT / "csrc", *(ROOT / "python/reeltime" / family for family in FAMILIES)]
    endings = (".py", ".cpp", ".h", ".cu", ".cuh")
    return [p for folder in folders for p in sorted(folder.rglob("*.*")) if p.suffix in endings]


def source_files() -> list[Path]:
    folders = [ROOT / folder for folder in ("csrc", *PACKAGES, "tests")]
    endings = (".py", ".cpp", ".h", ".cu", ".cuh")
    return [p for folder in folders for p in sorted(folder.rglob("*.*")) if p.suffix in endings]


def words(name: str) -> set[str]:
    """KeyValueCache_v2 -> {key, value, cache, v2}."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def hides_its_meaning(name: str) -> bool:
    return bool(words(name) & FORBIDDEN) or name.lower() == "core"


def test_kernel_files_fit_one_sitting():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in kernel_files()}
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MAX_KERNEL_LINES} == {}


@pytest.mark.parametrize(
    "path", source_files(), ids=lambda path: str(path.relative_to(ROOT)) if path else ""
)
def test_source_file_is_signed_and_well_named(path):
    text = path.read_text()
    assert not text or "SPDX-License-Identifier: Apache-2.0" in "".join(text.splitlines()[:2])
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    if path.suffix == ".py":
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        names += [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert [name for name in names if hides_its_meaning(name)] == []


@pytest.mark.parametrize("name", ["utils", "shape_helper", "CacheManager", "core", "attention_v2"])
def test_forbidden_word_is_noticed(name):
    assert hides_its_meaning(name)


@pytest.mark.parametrize("name", ["tensor_core", "score", "utilisation", "KVCache", "sm80"])
def test_ordinary_word_is_allowed(name):
    assert not hides_its_meaning(name)
