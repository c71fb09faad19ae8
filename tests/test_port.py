# SPDX-License-Identifier: Apache-2.0
"""reeltime port: the whole table's invariants, and that each verdict can be reached."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from reeltime import _C, arch
from reeltime.backends import FAMILIES, OPS

ROOT = Path(__file__).resolve().parent.parent
for name in FAMILIES:
    importlib.import_module(f"reeltime.{name}")  # which registers its ops
# Triton before 3.8 has no int8 products in tensor memory: IMMA serves them on Blackwell.
WARP_INT8 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


# One of each kind of tensor core; sm86 compiles as sm80 does, and sm100 takes longest.
QUICK = ("sm_80", "sm_89", "sm_90", "sm_120")


def run_port(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: compiling and interpreting exclude each other."""
    command = [sys.executable, "-c", "from reeltime.cli import main; main()", "port", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def table(request, tmp_path_factory) -> tuple[list[dict], Path]:
    """Every kernel on every architecture (four of them without --slow), and the page of it."""
    folder = tmp_path_factory.mktemp("port")
    chosen = [] if request.config.getoption("--slow") else [f"--arch={name}" for name in QUICK]
    done = run_port("--json", "--html", "port.html", *chosen, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["rows"], folder


def cuda_kernels_in_source(name: str) -> set[str]:
    """Every kernel that a GPU is served by: of the file of its own name, and of sm80.cu where there
    is none or that is its FALLBACK."""
    lines = re.findall(r"^add_family\((\w+) (.*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M)
    names = set()
    for family, files in lines:
        used = {name} & set(files.split()) or {"sm80"}
        used |= {"sm80"} if "FALLBACK" in files else set()
        folder = ROOT / "csrc" / family
        paths = [*folder.glob("*.h"), *(folder / f"{sm}.cu" for sm in used)]
        text = "".join(path.read_text() for path in paths)
        names |= set(re.findall(r"\b(\w+)_kernel\(const \w+Params", text))
    return names


def kernels_in_source() -> set[str]:
    """Every kernel that a family's Triton files define."""
    names = set()
    for family in FAMILIES:
        for path in (ROOT / "python/reeltime" / family).glob("triton*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                    names.add(node.name.strip("_").removesuffix("_kernel"))
    return names


# --- The table ----------------------------------------------------------------------------------


def test_every_kernel_is_compiled_for_every_gpu(table, request):
    rows, _ = table
    found: dict[str, set[str]] = {row["arch"]: set() for row in rows}
    for row in rows:
        if row["backend"] == "triton":
            found[row["arch"]].add(row["kernel"])
    every = {row.name for row in arch.ARCHS}
    quick = {name.replace("_", "") for name in QUICK}
    assert set(found) == (every if request.config.getoption("--slow") else quick)
    for name, kernels in found.items():
        assert kernels - {""} == kernels_in_source(), name


@pytest.mark.skipif(not _C.has_cuda, reason="this build has no CUDA kernels")
def test_every_cuda_kernel_was_built_and_is_read(table):
    targets = {row.name: row.target for row in arch.ARCHS}
    for name in {row["arch"] for row in table[0]}:
        if targets[name] not in _C.archs:
            continue
        mine = [row for row in table[0] if (row["arch"], row["backend"]) == (name, "cuda")]
        assert {row["kernel"] for row in mine} - {""} == cuda_kernels_in_source(name), name
        assert {row["family"] for row in mine} == set(_C.cuda_families)
        assert not [row for row in mine if row["spill_bytes"]]


def test_loops_do_not_spill_and_everything_fits(table):
    for row in table[0]:
        if row["verdict"] == "not offered" and "CUDA kernels for" in row["why"]:
            continue
        if row["verdict"] == "not offered":
            if row["family"] in ("attention", "sla") and row["why"].startswith("its kernels "):
                assert "backend='" in row["why"], row
            elif row["arch"] == "sm100":
                assert "needs tcgen05" in row["why"], row
                assert row["backend"] == "cuda"
            else:
                assert "sm89 or newer" in row["why"], row
                assert row["arch"] in ("sm80", "sm86")
            continue
        assert row["verdict"] != "spills", row
        assert row["spill_bytes"] or not row["hot_spills"], row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["blocks_per_sm"] >= 1, row
        assert 0 < row["occupancy"] <= 1, row


def test_slow_paths_are_the_known_ones(table):
    slow = [row for row in table[0] if row["verdict"] not in ("ok", "not offered")]
    for row in slow:
        assert row["verdict"] == "slow path", row
        assert row["arch"] == "sm100", row
        assert WARP_INT8, row
        assert re.match("int8: expected UTCIMMA, found .*IMMA", row["why"]), row


def test_products_run_on_tensor_cores(table):
    expected = {"sm80": "IMMA", "sm89": "IMMA QMMA", "sm90": "IGMMA QGMMA", "sm120": "IMMA QMMA"}
    for name, instructions in expected.items():
        rows = [row for row in table[0] if row["arch"] == name]
        for family in ("gemm_w8a8", "attention", "sla"):
            used = {
                part.split(" ")[0]
                for row in rows
                if row["family"] == family
                for part in row["tensor_core"].split(", ")
            }
            # sla multiplies values as fp16: FP8 has no product in it.
            wanted = instructions.split(" ")[: 1 if family == "sla" else 2]
            assert used >= set(wanted), (name, family)


def test_page_shows_every_call(table):
    rows, folder = table
    page = (folder / "port.html").read_text()
    assert page.startswith("<!doctype html>")
    assert all(row["case"].replace("&", "&amp;") in page for row in rows)


def test_every_op_is_a_specimen(table):
    """An op that no specimen calls would never be compiled."""
    cases = " ".join(f"{row['family']} {row['case']}" for row in table[0])
    words = {
        "quantize": "quantize int8",
        "dequantize": "dequantize int8",
        "norm": "norm layer, modulated",
        "norm_quantized": "norm layer, modulated, int8",
        "gated_residual_norm": "gated, modulated, C",
        "gated_residual_norm_quantized": "gated, modulated, int8",
        "query": "query",
        "query_int8": "query int8",
        "write": "write int8",
        "rope_on_cache": "rope_on_cache",
        "gemm_w8a8": "bias",
        "gemm_w8a8_requantized": "requantised",
        "attention": "plain, bf16",
        "segment_attention": "segments, qk int8",
        "block_mask": "block_mask",
        "sparse_attention": "sla sparse_attention",
        "linear_attention": "sla linear_attention",
        "sla": "sla sla, bf16",
        "segment_sla": "sla segments",
    }
    assert set(words) == set(OPS)
    assert not [op for op, word in words.items() if word not in cases]


# --- The parts ----------------------------------------------------------------------------------

SNIPPET = '''
import dataclasses, json
from reeltime import _C, arch
from reeltime.bench.port import report, specimens
from reeltime.bench.port.compile import Compiled, program
SASS = """
.text.kernel:
        /*0000*/                   LDG.E R0, [R2] ;
.L_x_2:
        /*0010*/              @!P0 ISETP.NE.AND P0, PT, R0, RZ, PT ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R0, R2, R4 ;
        /*0030*/                   LDL R1, [R1] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
.L_x_4:
""".replace("LDG.E", "LDG").replace("ISETP.NE.AND", "ISETP").replace("HMMA.16816.F32", "HMMA")
sm = {row.name: row for row in arch.ARCHS}
MiB = 1 << 20
good = Compiled(
    128, hot_instructions=300, shared_bytes=4096, operands=("int8",),
    instructions={"IGMMA.64x128x32.S8.S8": 4},
)
swap = dataclasses.replace
print(json.dumps({
    "ok": report.judge(good, sm["sm90"]),
    "slow": report.judge(good, sm["sm80"]),
    "fma": report.judge(swap(good, instructions={}), sm["sm90"]),
    "fp8": report.judge(swap(good, operands=("fp8",), instructions={"HMMA.1": 2}), sm["sm90"]),
    "cold": report.judge(swap(good, spill_bytes=8), sm["sm90"]),
    "warm": report.judge(swap(good, spill_bytes=8, hot_spills=3), sm["sm90"]),
    "spills": report.judge(swap(good, spill_bytes=8, hot_spills=4), sm["sm90"]),
    "shared": report.judge(swap(good, shared_bytes=MiB), sm["sm90"]),
    "failed": report.judge(swap(good, error="CompilationError: no"), sm["sm90"]),
    "loops": program(SASS),
    "blocks": [
        report.blocks_per_sm(sm[name], warps, registers, shared)
        for name, warps, registers, shared in (
            ("sm90", 8, 128, 0), ("sm90", 8, 128, 120 * 1024), ("sm90", 4, 64, 0),
            ("sm90", 1, 16, 0), ("sm86", 1, 16, 0), ("sm120", 8, 168, 0), ("sm80", 4, 255, 0),
        )
    ],
    "next": [
        dataclasses.asdict(row)
        for row in report.measure(
            [swap(sm["sm120"], name="sm121", capability=(12, 1), target="121a"),
             swap(sm["sm100"], name="sm103", capability=(10, 3), target="103a")],
            ["quant"], workers=1,
        )
    ] if __name__ == "__main__" else [],
}) if __name__ == "__main__" else "")
'''


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    script = tmp_path_factory.mktemp("parts") / "parts.py"
    script.write_text(SNIPPET)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    if "Cannot decode architecture" in done.stderr:  # that of a card which is not in the table
        pytest.skip("the nvdisasm that this Triton brings does not know SM121")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_each_verdict_has_its_reason(parts):
    assert parts["ok"] == ["ok", ""]
    assert parts["slow"] == ["slow path", "int8: expected IMMA, found IGMMA"]
    assert parts["fma"] == ["slow path", "int8: expected IGMMA, found FMA"]
    assert parts["fp8"] == ["slow path", "fp8: expected QGMMA, found HMMA"]
    loops = "300 instructions of the innermost loops"
    assert parts["cold"] == ["ok", f"spills 8 bytes, none of {loops}"]
    assert parts["warm"] == ["ok", f"spills 8 bytes, 3 of {loops}"]
    assert parts["spills"] == ["spills", f"spills 8 bytes, 4 of {loops}"]
    assert parts["shared"] == ["too much shared memory", "1048576 of 232448 bytes"]
    assert parts["failed"] == ["failed", "CompilationError: no"]


def test_innermost_loops_are_found_in_sass(parts):
    """Two loops around one, a jump forwards, and the jump to itself that ends every program."""
    assert parts["loops"] == [["LDG", "ISETP", "HMMA", "LDL", "BRA", "BRA", "BRA", "BRA"], [[2, 4]]]


def test_occupancy_is_that_of_the_data_sheets(parts):
    """65536 registers: 8 warps of 128 fit twice; 255 rounds to 256; small blocks hit the limit."""
    assert parts["blocks"] == [2, 1, 8, 32, 16, 1, 2]


def test_a_card_that_the_table_lacks_is_one_row(parts):
    rows = parts["next"]
    assert {row["arch"] for row in rows} == {"sm121", "sm103"}
    assert {row["verdict"] for row in rows if row["backend"] == "triton"} == {"ok"}
    assert [row["backend"] for row in rows].count("triton") == 12


# --- The command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arch", "sm_75"], "arch: expected one of sm80, .* got 'sm_75'.*docs/porting.md"),
        (["--family", "norms"], "family: expected 'quant' or .* got 'norms'"),
        (["--html", "port.txt"], "out: expected a name that ends in .html"),
        (["--update", "page.md", "--arch", "sm_80"], "update: expected all of it"),
        (["--html", "nowhere/port.html"], "out: no such folder"),
    ],
)
def test_bad_input_is_named(options, message, tmp_path):
    done = run_port(*options, folder=tmp_path)
    assert done.returncode == 2
    assert re.search(message, " ".join(done.stderr.split()))


def test_one_arch_and_family_as_a_table(tmp_path):
    done = run_port("--arch", "sm_90a", "--family", "quant", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantize int8 1x128: triton quantize" in done.stdout
    assert "6 ok" in done.stdout
    assert "sm80" not in done.stdout


def test_porting_page_holds_todays_families():
    page = (ROOT / "docs/porting.md").read_text()
    inside = page.split("<!-- port:begin -->")[1].split("<!-- port:end -->")[0]
    for family in FAMILIES:
        assert re.search(rf"^\| {family} \(triton\) \| .*ok", inside, re.M)
    assert all(row.name in inside for row in arch.ARCHS)
