# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of gemm_w8a8 for sm80 and all that follow it, their own source on the emulator: bit
for bit where sums are exact, within TOLERANCE of float64 elsewhere."""

from __future__ import annotations

import re
import shutil

import emulate
import parameters
import pytest
import torch
from device_build import device_builds, needs_nvcc
from emulated import emulated
from gemm_operands import FORMATS, OUT, activations, assert_near, integers, oracle

from reeltime import arch, backends, gemm_w8a8, native, quant

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

# One processor takes the tile that is cheaper per product, many the one that ends first.
TILES = {"tiles of 128": 1, "tiles of 64": 1000}
SHAPES = [(70, 136, 144), (1, 8, 16), (130, 257, 400), (250, 128, 256)]


@pytest.fixture(params=TILES.values(), ids=TILES.keys())
def tiles(request, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: request.param)


def cuda(arguments, out_dtype=torch.float32, **options):
    return gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=out_dtype, backend="cuda")


# --- The product --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (260, 300, 512)], ids=str)
def test_int8_sums_are_exact(shape, tiles):
    """All scales 1, K of four blocks: float32 sums are integers below 2^24."""
    a, b, *ones = integers(*shape)
    with emulated("gemm_w8a8") as runner:
        got = cuda((a, b, *ones))
    assert torch.equal(got.long(), a.long() @ b.long().t())
    assert runner.launches == ["gemm_w8a8_sm80"]


def test_int8_holds_the_largest_sums_of_a_block(tiles):
    """127 * 127 * 128 and -128 * -128 * 128 fit the preset accumulator."""
    a = torch.tensor([127, -127, -128, 1]).to(torch.int8).repeat_interleave(128).view(4, 128)
    with emulated("gemm_w8a8"):
        got = cuda((a, a, torch.ones(4, 1), torch.ones(1, 1)))
    assert torch.equal(got.long(), a.long() @ a.long().t())


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_scales_reach_their_blocks(format, block_rows, tiles):
    """Powers of two, each block its own: sums stay exact."""
    with emulated("gemm_w8a8"):
        for shape in SHAPES:
            arguments = integers(*shape, format, block_rows, (-2, 3))
            want = oracle(arguments, block_rows=block_rows)
            assert torch.equal(cuda(arguments, block_rows=block_rows).double(), want)


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_activations_are_within_tolerance(format, block_rows, tiles):
    with emulated("gemm_w8a8"):
        for shape in SHAPES:
            arguments = activations(*shape, format, block_rows)
            want = oracle(arguments, block_rows=block_rows)
            for name, dtype in OUT.items():
                got = cuda(arguments, dtype, block_rows=block_rows)
                assert got.dtype == dtype
                assert_near(got, want, name)


def test_strips_of_tiles_cover_every_tile(tiles):
    """More rows of tiles than a strip is high, and a last strip that is lower."""
    arguments = integers(128 * 9, 260, 16)
    with emulated("gemm_w8a8"):
        assert torch.equal(cuda(arguments).double(), oracle(arguments))


@pytest.mark.parametrize("shape", [(0, 130, 128), (5, 0, 128), (5, 130, 0)], ids=str)
@pytest.mark.parametrize("requantize", [None, "int8"])
def test_empty(shape, requantize):
    arguments = integers(*shape)
    options = {"bias": torch.arange(shape[1]).float(), "requantize": requantize}
    with emulated("gemm_w8a8"):
        got = cuda(arguments, **options)
    want = gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=torch.float32, backend="reference")
    for g, w in zip(*((x,) if requantize is None else x for x in (got, want)), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert torch.equal(g, w)


@pytest.mark.parametrize("block_rows", [1, 128])
def test_nan_scale_spreads_over_its_block_alone(block_rows, tiles):
    """The public call raises on a CPU; on a GPU looking would wait, so this is what it gives."""
    a, b, a_scale, b_scale = integers(200, 140, 272, block_rows=block_rows)
    a_scale[0, 1] = b_scale[1, 2] = torch.nan
    op, low = (backends.OPS[name].overload for name in ("gemm_w8a8", "gemm_w8a8_requantized"))
    rest = (None, None, None, block_rows, "none")
    with emulated("gemm_w8a8"):
        got = op(a, b, a_scale, b_scale, *rest, torch.float32, "cuda")
        yq, y_scale = low(a, b, a_scale, b_scale, *rest, torch.int8, "cuda")
    assert got[:block_rows].isnan().all()
    assert got[:, 128:].isnan().all()
    assert not got[block_rows:, :128].isnan().any()
    assert y_scale[:, 1].isnan().all()
    assert y_scale[:, 0].isnan().tolist() == [True] + [False] * (len(y_scale) - 1)
    assert not yq[:, 128:].any()
    assert not yq[:block_rows].any()


# --- Epilogues ----------------------------------------------------------------------------------


def tail(name, M, N, dtype):
    g = torch.Generator().manual_seed(M + N)
    bias, residual, gate = (torch.randn(s, generator=g).to(dtype) for s in ((N,), (M, N), (3, N)))
    gated = {"epilogue": "gated_residual", "residual": residual}
    return {
        "bias": {"bias": bias},
        "gelu": {"epilogue": "gelu"},
        "bias, gelu": {"epilogue": "gelu", "bias": bias},
        "residual": gated,
        "bias, gate, residual": gated | {"gate": gate, "bias": bias},
        "strided": gated
        | {
            "residual": residual.t().contiguous().t(),
            "gate": gate.t().contiguous().t(),
            "bias": bias[:1].expand(N),
        },
        "shared rows": gated | {"residual": residual[:1].expand(M, N), "gate": gate[:1]},
        "unaligned rows": gated
        | {"residual": torch.cat([residual, residual], 1)[:, 1 : N + 1], "gate": gate},
    }[name]


TAILS = [
    "bias",
    "gelu",
    "bias, gelu",
    "residual",
    "bias, gate, residual",
    "strided",
    "shared rows",
    "unaligned rows",
]


@pytest.mark.parametrize("epilogue", TAILS)
@pytest.mark.parametrize("out", OUT)
def test_epilogue(epilogue, out, tiles):
    """Columns in vectors of eight, and not; frames of 46 rows, so that a tile holds several gates;
    operands of every dtype."""
    with emulated("gemm_w8a8"):
        for M, N in ((138, 136), (3, 157)):
            a, b, a_scale, b_scale = integers(M, N, 144)
            arguments = (a, b, a_scale / 256, b_scale / 256)
            for dtype in OUT.values():
                options = tail(epilogue, M, N, dtype)
                assert_near(cuda(arguments, OUT[out], **options), oracle(arguments, **options), out)


def test_gelu_far_from_zero():
    """Where exp overflows, and where it vanishes."""
    a = torch.tensor([[127], [-127]]).to(torch.int8).expand(2, 16).contiguous()
    with emulated("gemm_w8a8"):
        got = cuda((a, a, torch.ones(2, 1), torch.ones(1, 1)), epilogue="gelu")
    assert torch.equal(got, torch.tensor([[1.0, -0.0], [-0.0, 1.0]]) * 127 * 127 * 16)


def test_scales_of_any_strides(tiles):
    a, b, a_scale, b_scale = integers(150, 257, 400, exponents=(-2, 3))
    turned = (s.t().contiguous().t() for s in (a_scale, b_scale))
    apart = torch.stack([a_scale, a_scale * 3], 2).flatten(1)[:, ::2]
    with emulated("gemm_w8a8"):
        want = oracle((a, b, a_scale, b_scale))
        assert torch.equal(cuda((a, b, *turned)).double(), want)
        assert torch.equal(cuda((a, b, apart, b_scale)).double(), want)
        one = (a, b, a_scale[:1].expand_as(a_scale), b_scale)
        assert torch.equal(cuda(one).double(), oracle(one))


# --- Requantised --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_requantised_is_quantize_of_its_own_sums(format, block_rows, tiles):
    with emulated("gemm_w8a8"):
        for M, N, K in SHAPES:
            arguments = activations(M, N, K, format, block_rows)
            for epilogue in ("bias, gelu", "bias, gate, residual"):
                if M % 3 and "gate" in epilogue:
                    continue
                options = {"block_rows": block_rows, **tail(epilogue, M, N, torch.bfloat16)}
                y = cuda(arguments, **options)
                for low, dtype in FORMATS.items():
                    yq, y_scale = cuda(arguments, **options, requantize=low)
                    want, want_scale = quant.quantize(
                        y, dtype=dtype, block_rows=block_rows, backend="reference"
                    )
                    assert torch.equal(y_scale, want_scale)
                    assert torch.equal(yq.float(), want.float())
                    assert yq.dtype == dtype


@pytest.mark.parametrize("block_rows", [1, 128])
def test_requantised_zeros_have_scale_one(block_rows, tiles):
    a, b, a_scale, b_scale = integers(130, 140, 128, block_rows=block_rows)
    a[:128] = 0
    with emulated("gemm_w8a8"):
        yq, y_scale = cuda((a, b, a_scale, b_scale), block_rows=block_rows, requantize="int8")
    assert not yq[:128].any()
    assert (y_scale[: 128 // block_rows] == 1).all()
    assert yq[128:].any()


@pytest.mark.parametrize("block_rows", [1, 128])
def test_rows_past_the_end_do_not_count(block_rows):
    """Large biases in the rows of the tile that the result does not have."""
    a, b, a_scale, b_scale = integers(1, 8, 16, block_rows=block_rows)
    bias, residual = torch.full((8,), 1e6), torch.full((1, 8), -1e6)
    options = {"epilogue": "gated_residual", "bias": bias, "residual": residual}
    with emulated("gemm_w8a8"):
        _, y_scale = cuda(
            (a, b, a_scale, b_scale), block_rows=block_rows, requantize="int8", **options
        )
        y = cuda((a, b, a_scale, b_scale), block_rows=block_rows, **options)
    assert torch.equal(y_scale[0], y.abs().amax(1) / 127)


# --- Who is served ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", arch.ARCHS, ids=lambda row: row.name)
def test_fp8_needs_products_of_it(row):
    from reeltime.gemm_w8a8 import cuda as kernels

    a, b, *_ = integers(2, 3, 16, "fp8")
    with native.recording(row):
        refused = kernels.refuses(a.to("meta"), b.to("meta"))
    assert (refused is not None) == (row.name in ("sm80", "sm86", "sm100"))
    assert kernels.refuses(a.to(torch.int8), b.to(torch.int8)) is None


@pytest.mark.parametrize("sm", [80, 90])
def test_rows_of_wider_matrices(sm):
    """a and b as columns 32 to 175 of matrices of 208 and 240; other strides are refused."""
    a, b, *scales = integers(70, 72, 144)
    wide = [torch.full((70, 208), 99, dtype=torch.int8), torch.full((72, 240), 99).to(torch.int8)]
    views = [whole[:, 32:176].copy_(x) for whole, x in zip(wide, (a, b), strict=True)]
    with emulated("gemm_w8a8", sm=sm):
        assert torch.equal(cuda((*views, *scales)).long(), a.long() @ b.long().t())
        odd = torch.zeros(70, 200, dtype=torch.int8)[:, :144]
        with pytest.raises(arch.UnsupportedArchError, match="multiples of 16"):
            cuda((odd, b, *scales))


def test_addresses_are_aligned():
    a, b, a_scale, b_scale = integers(2, 3, 16)
    shifted = torch.cat([torch.zeros(1, dtype=torch.int8), a.flatten()])[1:].view(2, 16)
    with emulated("gemm_w8a8"):
        with pytest.raises(arch.UnsupportedArchError, match="multiples of 16"):
            cuda((shifted, b, a_scale, b_scale))


# --- Synchronisation ----------------------------------------------------------------------------


def check_all():
    """Every path that synchronises, on ragged tiles: five K blocks go round a ring of three."""
    for block_rows in (1, 128):
        arguments = integers(70, 136, 528, "int8", block_rows, (-2, 3))
        options = {"block_rows": block_rows, **tail("bias, gate, residual", 70, 136, torch.float32)}
        options["gate"] = options["gate"][:2]
        y = cuda(arguments, **options)
        assert_near(y, oracle(arguments, **options), "float32")
        yq, y_scale = cuda(arguments, **options, requantize="int8")
        want, want_scale = quant.quantize(y, block_rows=block_rows, backend="reference")
        assert torch.equal(y_scale, want_scale)
        assert torch.equal(yq, want)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("landing", emulate.LANDINGS)
def test_every_schedule(schedule, landing, tiles):
    for seed in (1, 2):
        with emulated("gemm_w8a8", schedule=schedule, landing=landing, seed=seed):
            check_all()


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_without_races(schedule, tiles):
    with emulated("gemm_w8a8", flavour="race", schedule=schedule, seed=3):
        check_all()
        arguments = integers(5, 30, 48, "fp8")
        assert torch.equal(cuda(arguments).double(), oracle(arguments))


# One kernel of four, in a fraction of the time.
LARGE_INT8_ALONE = [
    ("return launch(gemm_kernel<Config, e4m3>, with, stream, p);", "return cudaErrorInvalidValue;"),
    ("return launch_tiles<Small>(p, stream);", "return cudaErrorInvalidValue;"),
]


def test_under_sanitizers():
    problem = parameters.sanitized(
        "gemm_w8a8",
        f"""
edits = {{"sm80.cu": {LARGE_INT8_ALONE!r}}}
def run(entry, **given):
    parameters.run("gemm_w8a8", entry, given, flavour="sanitize", replace=edits)
M, N, K = 70, 37, 272
a = np.random.default_rng(0).integers(-127, 128, (M, K)).astype(np.int8)
b = np.random.default_rng(1).integers(-127, 128, (N, K)).astype(np.int8)
y = np.ones((M, N), np.float32)
for rows, scales in ((1, M), (128, 1)):
    ones, few = np.ones((scales, 3), np.float32), np.ones((1, 3), np.float32)
    for codes in (0, 1):
        out = np.zeros((M, N), np.int8 if codes else np.float32)
        out_scale = np.zeros((scales, 1), np.float32)
        run("gemm_w8a8", a=a, b=b, a_scale=ones, b_scale=few, bias=y[0], residual=y, gate=y[:2],
            out=out, out_scale=out_scale if codes else None, M=M, N=N, K=K, block_rows=rows,
            frame_rows=35, stride_a=K, stride_b=K, stride_am=3, stride_ak=1, stride_bn=3,
            stride_bk=1, stride_bias=1,
            stride_rm=N, stride_rn=1, stride_gf=N, stride_gn=1, dtype=3, bias_dtype=0,
            residual_dtype=0, gate_dtype=0, out_dtype=3 if codes else 0, epilogue=2, processors=1)
        want = a.astype(int) @ b.astype(int).T + 2
        got = out * np.repeat(out_scale, rows, 0)[:M] if codes else out
        assert np.abs(got - want).max() <= codes * np.abs(want).max() / 254 * 1.001
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


MUTATIONS = {
    "a K block is read before it landed": (
        "cp_async_wait<kStages - 2>()",
        "cp_async_wait<kStages - 1>()",
    ),
    "nobody waits for the others' copies": (
        "      sync_block();                  // of everyone's",
        "      // of everyone's",
    ),
    "the stage in use is fetched into": ("empty = kStages - 1;", "empty = kStages - 2;"),
    "no group for K blocks past the end": (
        "loader.fetch(shared.stage[empty]);\n      cp_async_commit();",
        "loader.fetch(shared.stage[empty]), cp_async_commit();",
    ),
    "sums overwrite the ring in use": ("    sync_block();  // the ring has been read\n", ""),
    "rows are finished before they are whole": (
        "    sync_block();\n    float* strip",
        "    float* strip",
    ),
    "warps do not meet for the scale": ("block_reduce<Config::kWarps>(", "block_reduce<1>("),
    "rows past the end are read": ("i < rows && k < K", "k < K"),
    "K past the end is read": ("i < rows && k < K", "i < rows"),
    "scales of a K block too late": (
        "promote<T>(total[1], scale, d[1]);  // of the K block before\n\n      scales.take(scale);",
        "scales.take(scale);\n      promote<T>(total[1], scale, d[1]);",
    ),
    "the last half is forgotten": ("    promote<T>(total[1], scale, d[1]);\n\n", "\n"),
    "scales past the end are read": ("if (step + 1 < steps) scales.load()", "scales.load()"),
    "scale of the wrong rows": ("int64_t{8} * p.stride_am", "int64_t{4} * p.stride_am"),
    "scale of the wrong columns": ("n / kTileColumns} * p.stride_bn", "n / 64} * p.stride_bn"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_noticed(name, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: 1)
    edits = {"sm80.cu": [MUTATIONS[name], *LARGE_INT8_ALONE]}
    with emulated("gemm_w8a8", flavour="race", replace=edits):
        with pytest.raises((AssertionError, emulate.EmulationError)):
            check_all()


def test_no_bank_conflicts():
    """Reading a and b, which are swizzled, and whole rows of the staged sums."""
    with emulated("gemm_w8a8", flavour="race", count_banks=True):
        cuda(integers(150, 136, 272))
    rows = parameters.library("gemm_w8a8", "sm80", "race", ()).banks()
    source = (emulate.CSRC / "gemm_w8a8/epilogue.h").read_text().splitlines()
    staged = [i for i, line in enumerate(source, 1) if "= *staged_chunk(" in line]
    read = [r for r in rows if re.match(rf"ldmatrix|.*epilogue.h:{staged[0]}$", r["place"])]
    assert {r["place"].split()[0] for r in read} == {"ldmatrix", "load"}
    assert all(r["wavefronts"] == r["ideal"] > 0 for r in read), read


# --- The device build ---------------------------------------------------------------------------

# Tensor-core instructions by operand type.
TARGETS = {
    "80": {"int8": "IMMA.16832.S8.S8"},
    "89": {"int8": "IMMA.16832.S8.S8", "fp8": "QMMA.16832.F32.E4M3.E4M3"},
    "120a": {"int8": "IMMA.16832.S8.S8", "fp8": "QMMA.16832.F32.E4M3.E4M3"},
}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    return device_builds(
        emulate.CSRC / "gemm_w8a8/sm80.cu", list(TARGETS), tmp_path_factory.mktemp("builds")
    )


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_device_build(cubins, target):
    """No spills; 64 products per K block, in a loop without conversions; without products of
    e4m3, its kernels are empty."""
    spills = cubins[target].spills
    assert spills == [("0", "0")] * 4
    kernels = cubins[target].kernels()
    for name in FORMATS:
        mine = [k for k in kernels if ("e4m3" in k.split("\n")[0]) == (name == "fp8")]
        assert len(mine) == 2
        for kernel in mine:
            instruction = TARGETS[target].get(name, "none")
            assert kernel.count("MMA") == kernel.count(instruction)
            assert kernel.count(instruction) == (64 if name in TARGETS[target] else 0)
            loop = kernel.split("BAR.SYNC")[1:2]
            assert not any("I2F" in part for part in loop)
