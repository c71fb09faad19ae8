# SPDX-License-Identifier: Apache-2.0
"""csrc/common on the CPU: exact conversions and layouts, and every planted mistake is reported."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulate
import numpy as np
import pytest
import torch
from emulate import EmulationError, Library

ROOT = Path(__file__).resolve().parent.parent
CSRC, CUDA = ROOT / "csrc", ROOT / "tests/cuda"

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

SOURCES = (CUDA / "kernels.cpp", *sorted(CUDA.glob("*.cu")))
MISTAKES = re.findall(r"^  k(\w+),", (CUDA / "mistakes.h").read_text(), re.MULTILINE)
RUNS = [
    dict(schedule=schedule, landing=landing, seed=seed)
    for schedule, landing in itertools.product(emulate.SCHEDULES, emulate.LANDINGS)
    for seed in ((1, 2) if "random" in (schedule, landing) else (1,))
]


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    """All test kernels in every flavour, compiled side by side."""
    with ThreadPoolExecutor(len(emulate.FLAVOURS)) as pool:
        built = pool.map(functools.partial(emulate.build, SOURCES), emulate.FLAVOURS)
        return dict(zip(emulate.FLAVOURS, built, strict=True))


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# --- Kernels, each checked against numpy --------------------------------------------------------


def copy(library: Library, mistake: int = 0, **how: object) -> None:
    x = random_bytes(20, 128, 16)
    y = np.zeros_like(x)
    library.run("copy_sm80", dict(x=x, y=y, tiles=20, mistake=mistake), ["y"], **how)
    np.testing.assert_array_equal(y, x[:, ::-1])


def gemm(name: str, library: Library, mistake: int = 0, K: int = 400, **how: object) -> None:
    M, N = 100, 72
    a, b = random_bytes(M, K).view(np.int8), random_bytes(N, K, seed=1).view(np.int8)
    out = np.full((M, N), -7, np.int32)
    fields = dict(a=a, b=b, out=out, M=M, N=N, K=K, mistake=mistake)
    library.run(name, fields, ["out"], **how)
    np.testing.assert_array_equal(out, a.astype(np.int32) @ b.astype(np.int32).T)


def reduce_rows(library: Library, mistake: int = 0, **how: object) -> None:
    M, N = 3, 300
    x = np.random.default_rng(0).standard_normal((M, N)).astype(np.float32)
    outputs = dict(
        sum=np.full(M, np.nan, np.float32),
        largest=np.full(M, np.nan, np.float32),
        positive=np.full((M, 2), -1, np.int32),
        histogram=np.full((M, 4), -1, np.int32),
        totals=np.zeros(4, np.int32),
    )
    fields = dict(x=x, **outputs, M=M, N=N, mistake=mistake)
    library.run("reduce_rows", fields, list(outputs), **how)
    np.testing.assert_allclose(outputs["sum"], x.sum(1), atol=1e-4)  # 300 fp32 sums near 1
    np.testing.assert_array_equal(outputs["largest"], abs(x).max(1))
    np.testing.assert_array_equal(outputs["positive"].sum(1), (x > 0).sum(1))
    bins = [np.histogram(row, [-np.inf, -1, 0, 1, np.inf])[0] for row in x]
    np.testing.assert_array_equal(outputs["histogram"], bins)
    np.testing.assert_array_equal(outputs["totals"], np.sum(bins, 0))


def multicast(library: Library, mistake: int = 0, **how: object) -> None:
    x = random_bytes(5, 64, 128)
    out = np.zeros((2, 5, 64, 128), np.uint8)
    library.run("multicast_sm90", dict(x=x, out=out, steps=5, mistake=mistake), ["out"], **how)
    np.testing.assert_array_equal(out, np.stack([x, x]))


def split(library: Library, mistake: int = 0, way: int = 2, **how: object) -> None:
    S, M, N = 4, 3, 256
    x = np.random.default_rng(0).integers(-1000, 1000, (S, M, N)).astype(np.int32)
    outputs = dict(
        partial=np.zeros_like(x),
        count=np.zeros(M + 1, np.int32),
        out=np.full((M, N), -1, np.int32),
        total=np.full(N, -1, np.int32),
        begun=np.zeros(M, np.int32),
    )
    fields = dict(x=x, **outputs, M=M, S=S, way=way, mistake=mistake)
    library.run("split_sm80", fields, list(outputs), **how)
    np.testing.assert_array_equal(outputs["out"], x.sum(0))
    np.testing.assert_array_equal(outputs["total"], x.sum((0, 1)))
    np.testing.assert_array_equal(outputs["begun"], 1)
    assert not outputs["partial"].any()
    assert not outputs["count"].any()


def in_place(library: Library, mistake: int = 0, **how: object) -> None:
    x = random_bytes(4, 32, 32).astype(np.int32)
    outputs = dict(y=x.copy(), note=np.zeros(4, np.int32), neighbour=np.zeros(4, np.int32))
    library.run("in_place_sm90", dict(**outputs, tiles=4, mistake=mistake), list(outputs), **how)
    np.testing.assert_array_equal(outputs["y"], x + 1)
    np.testing.assert_array_equal(outputs["neighbour"], [1, 0, 3, 2])


def exchange(library: Library, mistake: int = 0, **how: object) -> None:
    x = np.arange(4 * 512, dtype=np.float32).reshape(4, 512)
    out = np.full_like(x, np.nan)
    library.run("exchange_sm90", dict(x=x, out=out, mistake=mistake), ["out"], **how)
    np.testing.assert_array_equal(out, np.roll(np.roll(x, 1, 0), -4, 1))


KERNELS = {
    "copy_sm80": copy,
    "gemm_sm80": functools.partial(gemm, "gemm_sm80"),
    "gemm_sm90": functools.partial(gemm, "gemm_sm90"),
    "reduce_rows": reduce_rows,
    "multicast_sm90": multicast,
    "split_sm80": split,
    "in_place_sm90": in_place,
    "exchange_sm90": exchange,
}


@pytest.mark.parametrize("flavour", ["plain", "race"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_correct_kernel_is_exact_under_every_schedule(libraries, kernel, flavour):
    for how in RUNS:
        KERNELS[kernel](libraries[flavour], **how)


# --- Planted mistakes ---------------------------------------------------------------------------

THREAD = r"block \(\d+,\d+,0\) thread \(\d+,0,0\)( of rank \d)?: "
BYTE = r"shared byte \d+"
OTHER = r"block \(\d+,\d+,0\) thread \(\d+,0,0\)"
UNFENCED = rf"after a \w+ by {OTHER} .*that no atomic between fence_device\(\) orders before it"
# What the report must say, beside kernel, block, thread and line.
PLANTED = [
    ("copy_sm80", "MissingBarrier", rf"load reads {BYTE}, which nobody has written|load .*{BYTE}"),
    ("copy_sm80", "MissingWait", rf"load \(read\) of {BYTE}, which an asynchronous copy .* wait"),
    ("copy_sm80", "ShallowWait", rf"load \(read\) of {BYTE}, which an asynchronous copy .* wait"),
    ("copy_sm80", "SharedOverrun", "cp.async: shared bytes 6144 to 6159 are outside .* 6144"),
    ("copy_sm80", "SharedOverrunPlain", r"load of 16 bytes at shared byte \d+, outside .* 6144"),
    ("copy_sm80", "GlobalOverrun", r"cp.async \(read\) of 16 .* byte -?\d+ of x, .* 4096"),
    ("copy_sm80", "GlobalOverrunPlain", r"store \(write\) of 1 .* byte 40962 of y, .* 40960"),
    ("copy_sm80", "WriteToInput", r"store writes byte \d+ of x, which is an input"),
    ("copy_sm80", "Misaligned", rf"cp.async: {BYTE} is not aligned to 16"),
    ("gemm_sm80", "MissingBarrier", rf"ldmatrix .*{BYTE}"),
    ("gemm_sm80", "MissingWait", rf"ldmatrix \(read\) of {BYTE}, which an asynchronous copy"),
    ("gemm_sm80", "ShallowWait", rf"ldmatrix \(read\) of {BYTE}, which an asynchronous copy"),
    ("gemm_sm80", "Misaligned", rf"ldmatrix: {BYTE} is not aligned to 16"),
    ("gemm_sm80", "Uninitialised", rf"ldmatrix reads {BYTE}, which nobody has written"),
    ("gemm_sm80", "GlobalOverrunPlain", rf"store .* of out, (which has 28800|{UNFENCED})"),
    ("gemm_sm90", "MissingBarrier", rf"no (mbarrier at|barrier orders).*|{BYTE}"),
    ("gemm_sm90", "MissingWait", rf"wgmma .*{BYTE}"),
    ("gemm_sm90", "WrongPhase", rf"(wgmma .*|try_wait at ){BYTE}"),
    ("gemm_sm90", "MissingEmptyWait", rf"(more arrivals|TMA load \(write\) of {BYTE})"),
    ("gemm_sm90", "MissingRelease", rf"deadlock: .*try_wait at {BYTE}, parity 0"),
    ("gemm_sm90", "ExtraRelease", rf"TMA load .* of {BYTE}, after a read by thread|more arr"),
    ("gemm_sm90", "HalfRelease", rf"TMA load \(write\) of {BYTE}, after a read by thread \(192"),
    ("gemm_sm90", "MissingProductWait", rf"{BYTE}, which an asynchronous operation may still read"),
    ("gemm_sm90", "MissingProductFence", "wgmma without wgmma.fence"),
    ("gemm_sm90", "MissingProxyFence", rf"TMA store of {BYTE}, written by .* without fence.proxy"),
    ("gemm_sm90", "MissingStoreWait", "exits while a TMA store may still read shared memory"),
    ("gemm_sm90", "Deadlock", rf"deadlock: .*try_wait at {BYTE}, parity 0"),
    ("reduce_rows", "MissingBarrier", rf"load .*{BYTE}"),
    ("reduce_rows", "EarlyReuse", rf"store \(write\) of {BYTE}, after a read by thread"),
    ("reduce_rows", "DivergentCollective", r"divergent collective: .* of lanes ffffffff"),
    ("reduce_rows", "DivergentBarrier", "divergent collective: .*__sync"),
    ("reduce_rows", "Deadlock", r"deadlock: .* 63 more wait in bar.sync 1, 128"),
    ("multicast_sm90", "MissingBarrier", r"no (mbarrier at|barrier orders)"),
    ("multicast_sm90", "HalfRelease", rf"deadlock|more arrivals|TMA load .*{BYTE}"),
    ("split_sm80", "MissingBarrier", rf"cp.async \(read\) of byte \d+ of partial, {UNFENCED}"),
    ("split_sm80", "MissingFence", rf"cp.async \(read\) of byte \d+ of partial, {UNFENCED}"),
    ("split_sm80", "MissingSecondFence", rf"\(read\) of byte \d+ of partial, {UNFENCED}"),
    ("split_sm80", "EarlyReset", rf"atom.add \(write\) of byte \d+ of count, {UNFENCED}"),
    ("split_sm80", "Overlap", rf"store \(write\) of byte \d+ of partial, {UNFENCED}"),
    ("split_sm80", "SameValue", rf"store \(write\) of byte \d+ of begun, {UNFENCED}"),
    ("split_sm80", "LateRead", rf"store \(write\) of byte \d+ of out, {UNFENCED}"),
    ("split_sm80", "StaleCache", rf"byte \d+ of partial, which is not constant: .* by {OTHER}"),
    ("split_sm80", "EarlyReuse", rf"store .* of partial, which .* {OTHER} .* may still read"),
    ("in_place_sm90", "MissingBarrier", rf"of byte \d+ of note, after a \w+ by {OTHER} .* barrier"),
    ("in_place_sm90", "EarlyRead", rf"of byte \d+ of note, after a \w+ by {OTHER} .* barrier"),
    ("in_place_sm90", "MissingWait", r"store .* of y, (after a read by a TMA load|which an async)"),
    (
        "in_place_sm90",
        "MissingProxyFence",
        rf"TMA load of byte \d+ of y, written by {OTHER}.* fence",
    ),
    ("in_place_sm90", "ReadBack", rf"load .* of y, after a write by {OTHER} .*, a TMA store"),
    ("exchange_sm90", "EarlyReuse", rf"{BYTE}, after a (read|write) by thread .* of rank \d"),
    ("exchange_sm90", "MissingBarrier", rf"{BYTE}, after a (read|write) by thread .* of rank \d"),
    ("exchange_sm90", "WrongRank", "mapa: rank 4 of a cluster of 4"),
    ("exchange_sm90", "Misaligned", rf"st.shared::cluster: {BYTE} is not aligned to 16"),
    ("exchange_sm90", "SharedOverrun", r"st.shared::cluster: shared bytes \d+ to \d+ are .* 4096"),
    (
        "exchange_sm90",
        "EarlyExit",
        r"exits, after an access to its .* of rank \d|in the block of rank \d, which has exited",
    ),
    ("in_place_sm90", "Overlap", r"TMA \w+ .* of y, after a (write|read) by .*block \(\d,0,0\)"),
]


@pytest.mark.parametrize("kernel, mistake, words", PLANTED, ids=lambda value: str(value)[:24])
def test_planted_mistake_is_reported_under_every_schedule(libraries, kernel, mistake, words):
    source = next(p.name for p in CUDA.glob("*.cu") if f"cudaError_t {kernel}(" in p.read_text())
    for how in RUNS:
        with pytest.raises(EmulationError) as caught:
            KERNELS[kernel](libraries["race"], MISTAKES.index(mistake), **how)
        report = str(caught.value)
        assert re.search(words, report), (how, report)
        assert re.search(THREAD if "deadlock" not in report else "thread", report), (how, report)
        if shutil.which("addr2line"):
            assert re.match(r"\w+_kernel(<.*>)?: ", report), report
            assert re.search(rf" at {source}:\d+", report), (how, report)


def test_every_mistake_is_planted_and_expected():
    made = {
        (kernel, mistake)
        for path in CUDA.glob("*.cu")
        for kernel in re.findall(r"^cudaError_t (\w+)\(const", path.read_text(), re.MULTILINE)
        for mistake in re.findall(r"Mistake::k(\w+)", path.read_text())
        if kernel in KERNELS and (kernel != "multicast_sm90" or mistake in path.read_text())
    }
    expected = {(kernel, mistake) for kernel, mistake, _ in PLANTED}
    assert made - expected == {("reduce_rows", "LocalOverrun")}  # sanitizers
    assert {mistake for _, mistake in made} == set(MISTAKES) - {"None"}


@pytest.mark.parametrize("way", [0, 1, 2], ids=["plain", "streaming", "cp.async"])
@pytest.mark.parametrize("mistake", ["MissingFence", "MissingSecondFence", None])
def test_order_between_blocks_whatever_reads(libraries, mistake, way):
    for how in RUNS:
        if mistake is None:
            split(libraries["race"], way=way, **how)
            continue
        with pytest.raises(EmulationError, match=rf"\(read\) of byte \d+ of partial, {UNFENCED}"):
            split(libraries["race"], MISTAKES.index(mistake), way, **how)


def test_accumulator_read_before_the_wait_is_reported(libraries):
    """With one step of K nothing else betrays the missing wait."""
    for how in RUNS:
        with pytest.raises(EmulationError, match="of byte .* of an accumulator .* not waited for"):
            gemm("gemm_sm90", libraries["race"], MISTAKES.index("MissingProductWait"), 128, **how)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fibers_without_assembly(libraries, kernel):
    KERNELS[kernel](libraries["ucontext"])


def test_margins_betray_a_write_that_nothing_instruments(libraries):
    with pytest.raises(EmulationError, match="somebody wrote byte 40962 of y, of 40960"):
        copy(libraries["plain"], MISTAKES.index("GlobalOverrunPlain"))


def test_views_are_run_in_place(libraries):
    """Strided rows of a larger tensor, in and out; the gaps between them stay."""
    x = torch.from_numpy(random_bytes(20, 2048))
    whole = torch.full((20, 4096), 7, dtype=torch.uint8)
    fields = dict(x=x, y=whole[:, :2048], tiles=1, mistake=0)
    libraries["plain"].run("copy_sm80", fields, ["y"])
    assert (whole[1:] == 7).all()
    assert (whole[:, 2048:] == 7).all()
    expected = x[0].view(128, 16).flip(0).reshape(-1)
    assert torch.equal(whole[0, :2048], expected)


def test_mutated_source_is_another_library(libraries):
    """What a kernel's own tests do: remove a line, and see the checker notice."""
    edits = {"copy_sm80.cu": [("!= Mistake::kMissingBarrier) sync_block();", "!= p.mistake) {}")]}
    with pytest.raises(EmulationError, match="load"):
        copy(emulate.build(SOURCES, "race", edits))
    with pytest.raises(ValueError, match="expected 'nonsense' once"):
        emulate.build(SOURCES, "race", {"copy_sm80.cu": [("nonsense", "")]})


@pytest.mark.skipif(sys.platform != "linux", reason="needs a preloaded AddressSanitizer")
@pytest.mark.parametrize("kernel", [*KERNELS, "LocalOverrun"])
def test_sanitizers(libraries, kernel):
    """Correct kernels pass; an overrun of a thread's own array, seen by nothing else, does not."""
    mistake = kernel == "LocalOverrun"
    done = sanitized("reduce_rows" if mistake else kernel, MISTAKES.index("LocalOverrun") * mistake)
    if mistake:
        assert done.returncode != 0
        assert re.search(
            r"reduce_rows.cu:\d+.*(out of bounds|overflow|insufficient space)", done.stderr
        ), done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr[-3000:]


def sanitized(kernel: str, mistake: int) -> subprocess.CompletedProcess[str]:
    """One run in a process of its own: AddressSanitizer must be loaded before anything else."""
    script = f"""
import sys; sys.path.insert(0, {str(CUDA)!r})
sys.modules["torch"] = sys.modules["pytest"] = __import__("unittest.mock").mock.MagicMock()
import runpy, emulate
test = runpy.run_path({__file__!r})
test["KERNELS"][{kernel!r}](emulate.build(test["SOURCES"], "sanitize"), {mistake})
print("exact")
"""
    return emulate.run_sanitized(script) or pytest.skip("needs libasan.so and libubsan.so")


# --- Conversions --------------------------------------------------------------------------------


def floats() -> np.ndarray:
    """Every float16 and bfloat16, all ties of e4m3 and float16, their neighbours, random bits."""
    halves = np.arange(65536, dtype=np.uint16)
    of_float16 = halves.view(np.float16).astype(np.float32)
    of_bfloat16 = (halves.astype(np.uint32) << 16).view(np.float32)
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    ordered = np.sort(e4m3[np.isfinite(e4m3)])
    ties = (ordered[1:] + ordered[:-1]) / 2
    halfway = [np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)]
    finite = of_float16[:0x7C00]
    ties16 = (finite[1:] + finite[:-1]) / 2
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 18, dtype=np.uint32).view(np.float32)
    parts = [of_float16, of_bfloat16, e4m3, ties, *halfway, ties16, -ties16, bits]
    parts.append(np.linspace(-127, 0, 100_001))
    x = np.concatenate([np.asarray(part, np.float32) for part in parts])
    return x[: len(x) // 4 * 4].copy()


@pytest.fixture(scope="module")
def converted(libraries) -> dict[str, np.ndarray]:
    """x, and what every conversion made of it."""
    x = floats()
    n = len(x)
    kinds = dict(to_e4m3=np.uint8, to_float16=np.uint16, to_bfloat16=np.uint16, to_int8=np.int8)
    outputs = {key: np.zeros(n, kind) for key, kind in kinds.items()}
    for key, count in dict(four_e4m3=4, four_int8=4, two_float16=2, two_bfloat16=2).items():
        outputs[key] = np.zeros(n // count, np.uint32)
    outputs |= {key: np.zeros(n, np.float32) for key in ("exp2", "exp2_by_fma")}
    for key in ("of_e4m3", "of_float16", "of_bfloat16", "of_sum"):
        outputs[key] = np.zeros(65536, np.float32)
    libraries["plain"].run("convert", dict(x=x, **outputs, n=n), list(outputs))
    return dict(x=x, **outputs)


def bits_or_minus_one(x: torch.Tensor, integer: torch.dtype) -> np.ndarray:
    mask = 2 ** (8 * x.element_size()) - 1
    return np.where(x.float().isnan(), -1, x.view(integer).numpy().astype(np.int64) & mask)


def test_narrowing_is_that_of_the_hardware(converted):
    """Bit for bit torch's, but for the NaN, which is the one that cvt makes, and saturation."""
    x = torch.from_numpy(converted["x"])
    saturated = x.clamp(-448, 448).to(torch.float8_e4m3fn)  # torch makes NaN of what is larger
    for found, expected, nan in (
        (converted["to_float16"], bits_or_minus_one(x.half(), torch.int16), 0x7FFF),
        (converted["to_bfloat16"], bits_or_minus_one(x.bfloat16(), torch.int16), 0x7FFF),
        (converted["to_e4m3"], bits_or_minus_one(saturated, torch.uint8), 0x7F),
    ):
        np.testing.assert_array_equal(found, np.where(expected < 0, nan, expected))
    integers = np.rint(np.nan_to_num(converted["x"]).clip(-128, 127))
    np.testing.assert_array_equal(converted["to_int8"], integers.astype(np.int8))


def test_packing_agrees_with_single_conversions(converted):
    for packed, single in (
        ("four_e4m3", "to_e4m3"),
        ("two_float16", "to_float16"),
        ("two_bfloat16", "to_bfloat16"),
    ):
        single_bits = converted[single]
        np.testing.assert_array_equal(converted[packed].view(single_bits.dtype), single_bits)
    inside = np.abs(converted["x"]) <= 127
    int8 = converted["four_int8"].view(np.int8)
    np.testing.assert_array_equal(int8[inside], converted["to_int8"][inside])


def test_widening_of_every_pattern(converted):
    every = torch.arange(65536, dtype=torch.int32)
    bytes_ = (every & 255).to(torch.uint8)
    for found, wide in (
        (converted["of_e4m3"], bytes_.view(torch.float8_e4m3fn).float()),
        (converted["of_float16"], every.to(torch.uint16).view(torch.float16).float()),
        (converted["of_bfloat16"], every.to(torch.uint16).view(torch.bfloat16).float()),
        (converted["of_sum"], (64 * every - 2**21).float()),
    ):
        np.testing.assert_array_equal(found, wide.numpy())
        number = ~np.isnan(found)
        np.testing.assert_array_equal(
            np.signbit(found)[number], torch.signbit(wide).numpy()[number]
        )


def test_exponentials_keep_their_bounds(converted):
    exact = np.exp2(np.nan_to_num(converted["x"], nan=0).clip(-126, 0).astype(np.float64))
    assert np.abs(converted["exp2"] / exact - 1).max() < 2**-22
    assert np.abs(converted["exp2_by_fma"] / exact - 1).max() < 1.1e-4
    assert (converted["exp2_by_fma"][converted["x"] >= 0] == 1).all()


# --- Fragments ----------------------------------------------------------------------------------

NUMBERS = {
    "int8": (0, torch.int8),
    "e4m3": (1, torch.float8_e4m3fn),
    "float16": (2, torch.float16),
    "bfloat16": (3, torch.bfloat16),
}


HALF_SUMS = 4  # e4m3 with float16 sums


def operand(rows: int, row_bytes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = row_bytes // torch.zeros(0, dtype=dtype).element_size()
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), generator=generator).to(dtype)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def check_product(d: np.ndarray, a: torch.Tensor, b: torch.Tensor) -> None:
    exact = (a.double() @ b.double().T).numpy()
    if a.dtype == torch.int8:
        np.testing.assert_array_equal(d.view(np.int32), exact)
    else:  # the emulator rounds to fp32 once per instruction
        np.testing.assert_allclose(d.view(np.float32), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("flavour", ["plain", "race"])
@pytest.mark.parametrize("name", NUMBERS)
def test_mma_and_matrix_moves(libraries, name, flavour):
    number, dtype = NUMBERS[name]
    a, b = operand(16, 32, dtype, 0), operand(8, 32, dtype, 1)
    d = np.zeros((16, 8), np.uint32)
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    transposed, again = np.zeros_like(matrices), np.zeros_like(matrices)
    fields = dict(a=a, b=b, d=d, matrices=matrices, transposed=transposed, again=again, type=number)
    libraries[flavour].run("fragments_sm90", fields, ["d", "transposed", "again"])
    check_product(d, a, b)
    if name == "e4m3":
        fields["type"] = HALF_SUMS
        libraries[flavour].run("fragments_sm90", fields, ["d", "transposed", "again"])
        rounded = (a.double() @ b.double().T).half().float()
        np.testing.assert_array_equal(d.view(np.float32), rounded.numpy())
    np.testing.assert_array_equal(transposed, matrices.transpose(0, 2, 1))
    np.testing.assert_array_equal(again[2:], matrices[2:])
    np.testing.assert_array_equal(again[:2], matrices[:2])


@pytest.mark.parametrize(
    "name, N",
    [*itertools.product(NUMBERS, range(64, 257, 32)), ("e4m3", 72), ("e4m3", 136)],
)
def test_wgmma(libraries, name, N):
    number, dtype = NUMBERS[name]
    a, b = operand(64, 128, dtype, 0), operand(N, 128, dtype, 1)
    for registers, columns in itertools.product((0, 1), (0, 1)):
        if columns and name in ("int8", "e4m3"):
            continue
        stored = b.T.contiguous() if columns else b
        d = np.zeros((64, N), np.uint32)
        fields = dict(a=a, b=stored, d=d, N=N, type=number, registers=registers, columns=columns)
        libraries["race" if N < 128 else "plain"].run("wgmma_sm90", fields, ["d"])
        check_product(d, a, b)


@pytest.mark.parametrize("flavour", ["plain", "race"])
@pytest.mark.parametrize("size", [(40, 7), (24, 11, 4), (16, 6, 5, 3)], ids=str)
def test_boxes_of_any_rank_fill_and_cut_at_the_edges(libraries, size, flavour):
    x = np.random.default_rng(0).integers(0, 1 << 16, size[::-1]).astype(np.uint16)
    y = np.zeros_like(x)
    sizes = (ctypes.c_int32 * 4)(*size, *[1] * (4 - len(size)))
    libraries[flavour].run("boxes_sm90", dict(x=x, y=y, size=sizes, rank=len(size)), ["y"])
    np.testing.assert_array_equal(y, x)


def test_swizzled_tiles_have_no_bank_conflicts(libraries):
    gemm("gemm_sm80", libraries["race"], count_banks=True)
    rows = [row for row in libraries["race"].banks() if row["place"].startswith("ldmatrix")]
    assert len(rows) == 2
    assert all(row["requests"] > 0 and row["wavefronts"] == row["ideal"] for row in rows), rows


def test_conflicting_stores_are_counted_at_their_line(libraries):
    """The int32 tile of gemm_sm90 is stored row-major: eight rows in the same banks."""
    gemm("gemm_sm90", libraries["race"], count_banks=True)
    rows = [row for row in libraries["race"].banks() if row["place"].startswith("load or store")]
    worst = max(rows, key=lambda row: row["wavefronts"])
    line = int(re.search(r"gemm_sm90.cu:(\d+)", worst["place"])[1])
    assert "shared.out[row]" in (CUDA / "gemm_sm90.cu").read_text().splitlines()[line - 1]
    assert worst["wavefronts"] == 8 * worst["ideal"], worst


def test_launcher_errors_are_reported(libraries):
    a, b, out = random_bytes(64, 100), random_bytes(64, 100), np.zeros((64, 64), np.int32)
    fields = dict(a=a, b=b, out=out, M=64, N=64, K=100, mistake=0)
    with pytest.raises(EmulationError, match="the launcher refused"):  # TMA needs K % 16 == 0
        libraries["plain"].run("gemm_sm90", fields, ["out"])
