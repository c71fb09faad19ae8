# SPDX-License-Identifier: Apache-2.0
"""The gemm_w8a8 kernel for Hopper, its own source on the emulator: bit for bit where sums are
exact, within TOLERANCE of float64 elsewhere, by every tile, alone and in clusters."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import shutil
from pathlib import Path

import emulate
import parameters
import pytest
import torch
from device_build import device_build, needs_nvcc
from emulated import emulated
from gemm_operands import FORMATS, OUT, activations, assert_near, integers, oracle

from reeltime import backends, gemm_w8a8, native, quant

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

SOURCES = [emulate.CSRC / f"gemm_w8a8/{name}" for name in ("sm90.cu", "choice.h", "fragments.h")]

# Shape, processors, and the choice that follows: rows and columns of a tile, tiles of a cluster
# downwards and sideways, parts of K.  Sizes are ragged, rings go round, blocks have several tiles;
# of some clusters, the second block's last tile lies outside of the result.
CASES = {
    "128 x 128": ((250, 72, 1040), 1, (128, 128, 1, 1, 1)),
    "128 x 160": ((70, 630, 272), 1, (128, 160, 1, 1, 1)),
    "128 x 192": ((250, 380, 656), 1, (128, 192, 1, 1, 1)),
    "192 x 128": ((380, 72, 656), 1, (192, 128, 1, 1, 1)),
    "128 x 128, one below": ((300, 72, 1040), 4, (128, 128, 2, 1, 1)),
    "128 x 160, one below": ((200, 150, 272), 2, (128, 160, 2, 1, 1)),
    "128 x 192, one below": ((200, 330, 272), 2, (128, 192, 2, 1, 1)),
    "128 x 160, one beside": ((70, 610, 272), 2, (128, 160, 1, 2, 1)),
    "192 x 128, one beside": ((380, 200, 656), 2, (192, 128, 1, 2, 1)),
    "more blocks than tiles": ((140, 200, 144), 132, (128, 128, 2, 1, 1)),
    "halves of K": ((200, 72, 1040), 6, (128, 128, 1, 1, 2)),
    "quarters of K": ((70, 72, 1808), 6, (128, 128, 1, 1, 4)),
}


# Processors 64 or more are a choice in themselves, one tile for each cluster.
CHOOSE = "choose(p.M, p.N, p.K, p.processors, p.out_scale ? p.block_rows : 0);"
FORCED = (
    CHOOSE,
    "p.processors < 64 ? "
    + CHOOSE.replace(";", " : Choice{2, p.processors / 64, ")
    + "static_cast<Multicast>(p.processors / 8 % 8), p.processors % 8};",
)
INT8 = ("return gemm_sm90::launch_type<e4m3>(p, stream);", "return cudaErrorInvalidValue;")


def forced(columns, parts, multicast=0):
    return columns * 64 + multicast * 8 + parts


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def shape(request, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: request.param[1])
    return request.param[0]


@pytest.fixture
def four(monkeypatch):
    """Two clusters of two blocks, where tiles are two high."""
    monkeypatch.setattr(native, "processors", lambda device: 4)


def on(device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def cuda(arguments, out_dtype=torch.float32, *, how=None, **options):
    """The kernel's result, on the CPU."""
    with emulated("gemm_w8a8", sm=90, gpu=not how, **(how or {})) as runner:
        arguments = [on(runner.device, x) for x in arguments]
        options = {name: on(runner.device, x) for name, x in options.items()}
        got = gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=out_dtype, backend="cuda")
    assert runner.device.type == "cuda" or runner.launches in ([], ["gemm_w8a8_sm90"])
    return tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()


# --- Which tile ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen():
    library = emulate.build([Path(emulate.__file__).parent / "gemm_w8a8_sm90.cpp"])

    def ask(M, N, K, processors, block_rows=0):
        choice = (ctypes.c_int32 * 5)()
        library.loaded.chosen(M, N, K, processors, block_rows, choice)
        return tuple(choice)

    return ask


@pytest.mark.parametrize("case", CASES)
def test_cases_have_the_tiles_they_are_named_for(case, chosen):
    (M, N, K), processors, choice = CASES[case]
    assert chosen(M, N, K, processors) == choice
    assert chosen(M, N, K, processors, 1)[1] == 128
    assert chosen(M, N, K, processors, 128)[:2] == (128, 128)


# Of Wan's transformers on 132 SMs: the choice, and its tiles in percent of what its waves have room
# for, before 128 x 160, before tiles beside each other and before parts of K, and now.
DIT = {
    (1560, 1536, 1536): ((128, 160, 1, 2, 1), 79, 98),
    (1560, 1536, 8960): ((128, 160, 1, 2, 1), 79, 98),
    (1560, 8960, 1536): ((128, 192, 2, 1, 1), 93, 93),
    (1560, 5120, 5120): ((128, 192, 2, 1, 1), 89, 89),
    (1560, 13824, 5120): ((128, 160, 1, 2, 1), 89, 95),
    (4680, 1536, 1536): ((128, 160, 2, 1, 1), 75, 93),
    (4680, 5120, 5120): ((128, 160, 1, 2, 1), 93, 100),
    (6120, 1536, 8960): ((128, 192, 2, 1, 1), 97, 97),
    (12240, 13824, 5120): ((128, 192, 2, 1, 1), 99, 99),
    (512, 1536, 4096): ((128, 128, 1, 1, 2), 36, 73),
    (512, 1536, 1536): ((128, 128, 1, 1, 2), 36, 73),
    (512, 5120, 4096): ((128, 160, 2, 1, 1), 82, 97),
    (257, 1536, 1280): ((128, 128, 1, 1, 2), 27, 55),
    (1, 1536, 1536): ((128, 128, 1, 1, 2), 9, 18),
    (1, 1536, 8960): ((128, 128, 1, 1, 4), 9, 36),
}


def fill(M, N, choice, processors=132):
    rows, columns, high, wide, parts = choice
    tiles = -(-M // rows) * -(-N // columns)
    clusters = -(-M // (rows * high)) * -(-N // (columns * wide))
    waves = -(-clusters // (processors // (high * wide * parts)))
    return round(100 * tiles * parts / (waves * processors))


@pytest.mark.parametrize("size", DIT, ids=str)
def test_products_of_the_transformers(size, chosen):
    choice, before, now = DIT[size]
    assert chosen(*size, 132) == choice
    assert fill(*size[:2], choice) == now >= before


def test_tile_that_ends_first(chosen):
    """24 x 8 pairs of 128 x 192 are three waves of 66; 24 x 12 of 128 x 128 five, which take more.
    A result of 128 columns has no use for 192, nor has one row; one with scales of its own needs
    128 columns, maybe rows.  Parts of K share no more blocks than there are."""
    assert chosen(6120, 1536, 1536, 132) == (128, 192, 2, 1, 1)
    assert chosen(6120, 8960, 1536, 132, 1) == (192, 128, 1, 2, 1)
    assert chosen(6120, 8960, 1536, 132, 128)[:2] == (128, 128)
    assert chosen(6120, 128, 1536, 132)[1] == chosen(1, 1536, 256, 132)[1] == 128
    sizes = itertools.product((1, 128, 700), (1, 192, 1000), (0, 400, 5000), (1, 2, 3, 78, 132))
    for M, N, K, processors in sizes:
        for block_rows in (0, 1, 128):
            rows, columns, high, wide, parts = chosen(M, N, K, processors, block_rows)
            assert 1 in (high * wide, parts)
            assert 1 <= high * wide * parts <= min(processors, 4)
            if parts > 1:
                assert -(-M // rows) * -(-N // columns) * parts <= processors
                assert parts <= -(-K // 128)


# --- The product --------------------------------------------------------------------------------


def test_int8_sums_are_exact(shape):
    """All scales 1, K of at most four blocks: float32 sums are integers below 2^24."""
    M, N, K = shape
    a, b, *ones = integers(M, N, min(K, 400))
    assert torch.equal(cuda((a, b, *ones)).long(), a.long() @ b.long().t())


def test_int8_holds_the_largest_sums_of_a_block():
    a = torch.tensor([127, -127, -128, 1]).to(torch.int8).repeat_interleave(128).view(4, 128)
    got = cuda((a, a, torch.ones(4, 1), torch.ones(1, 1)))
    assert torch.equal(got.long(), a.long() @ a.long().t())


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_scales_reach_their_blocks(format, block_rows, shape):
    """Powers of two, each block its own: sums stay exact.  Tiles of 192 columns have a part in two
    blocks of scales, and begin in the middle of one."""
    arguments = integers(*shape, format, block_rows, (-2, 3))
    want = oracle(arguments, block_rows=block_rows)
    assert torch.equal(cuda(arguments, block_rows=block_rows).double(), want)


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_activations_are_within_tolerance(format, block_rows, shape):
    arguments = activations(*shape, format, block_rows)
    want = oracle(arguments, block_rows=block_rows)
    for name, dtype in OUT.items():
        got = cuda(arguments, dtype, block_rows=block_rows)
        assert got.dtype == dtype
        assert_near(got, want, name)


SMALL = [(1, 1, 16), (1, 8, 128), (63, 130, 144), (65, 192, 128), (129, 193, 16), (2, 3, 2064)]


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("processors", [1, 2, 3])
def test_any_size(size, processors, monkeypatch):
    """Results in rows that TMA stores, and in rows that it cannot."""
    monkeypatch.setattr(native, "processors", lambda device: processors)
    arguments = integers(*size, "fp8", 1, (-2, 3))
    want = oracle(arguments)
    for name, dtype in OUT.items():
        assert_near(cuda(arguments, dtype), want, name)


@pytest.mark.parametrize("processors", [3, 8])
def test_strips_of_tiles_cover_every_tile(processors, monkeypatch):
    """More rows of tiles than a strip is high, and a last strip that is lower."""
    monkeypatch.setattr(native, "processors", lambda device: processors)
    arguments = integers(128 * 18 + 1, 260, 16)
    assert torch.equal(cuda(arguments).double(), oracle(arguments))


@pytest.mark.parametrize("size", [(0, 130, 128), (5, 0, 128), (5, 130, 0)], ids=str)
@pytest.mark.parametrize("requantize", [None, "int8"])
def test_empty(size, requantize):
    """Without K the sums are zero, and the epilogue is not."""
    arguments = integers(*size)
    options = {"bias": torch.arange(size[1]).float(), "requantize": requantize}
    got = cuda(arguments, **options)
    want = gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=torch.float32, backend="reference")
    for g, w in zip(*((x,) if requantize is None else x for x in (got, want)), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert torch.equal(g, w)


@pytest.mark.parametrize("block_rows", [1, 128])
def test_nan_scale_spreads_over_its_block_alone(block_rows, four):
    """The public call raises on a CPU; on a GPU looking would wait, so this is what it gives."""
    a, b, a_scale, b_scale = integers(200, 140, 272, block_rows=block_rows)
    a_scale[0, 1] = b_scale[1, 2] = torch.nan
    op, low = (backends.OPS[name].overload for name in ("gemm_w8a8", "gemm_w8a8_requantized"))
    rest = (None, None, None, block_rows, "none")
    with emulated("gemm_w8a8", sm=90) as runner:
        arguments = [x.to(runner.device) for x in (a, b, a_scale, b_scale)]
        got = op(*arguments, *rest, torch.float32, "cuda").cpu()
        yq, y_scale = (x.cpu() for x in low(*arguments, *rest, torch.int8, "cuda"))
    assert got[:block_rows].isnan().all()
    assert got[:, 128:].isnan().all()
    assert not got[block_rows:, :128].isnan().any()
    assert y_scale[:, 1].isnan().all()
    assert y_scale[:, 0].isnan().tolist() == [True] + [False] * (len(y_scale) - 1)
    assert not yq[:, 128:].any()
    assert not yq[:block_rows].any()


# --- Parts of K ---------------------------------------------------------------------------------


def check_parts(how, columns):
    """Parts of one length, of several, and none; K ragged, and longer than the ring; every path to
    the result, for two slabs that end in different blocks and in one."""
    for M, N, K in ((70, 2 * columns + 10, 400), (130, 24, 1808), (3, 29, 144)):
        arguments = integers(M, N, K, "int8", 1, (-2, 3))
        assert torch.equal(cuda(arguments, how=how).double(), oracle(arguments))
    arguments = integers(130, 264, 272)
    options = tail("residual", 130, 264, torch.float32)
    got = cuda(arguments, torch.bfloat16, how=how, **options)
    assert_near(got, oracle(arguments, **options), "bfloat16")
    for block_rows in (1, 128) if columns == 128 else ():
        arguments = integers(130, 264, 272, "int8", block_rows)
        check_requantised(arguments, "int8", block_rows, how=how, **options)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("columns", [128, 160, 192])
def test_sums_of_parts_meet(columns, parts, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: forced(columns, parts))
    for schedule in emulate.SCHEDULES if columns == 160 else ["random"]:
        how = dict(flavour="race", replace=edited(FORCED, INT8), schedule=schedule)
        check_parts(how, columns)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_order_of_parts_is_the_same_each_time(parts, monkeypatch):
    """Sums that float32 rounds, whichever block comes first; and as exact as those of one block."""
    monkeypatch.setattr(native, "processors", lambda device: forced(160, parts))
    arguments = activations(70, 170, 656, "int8", 1)
    edits = edited(FORCED, INT8)
    first, *others = (
        cuda(arguments, how=dict(flavour="race", replace=edits, schedule=schedule))
        for schedule in emulate.SCHEDULES
    )
    assert_near(first, oracle(arguments), "float32")
    assert all(torch.equal(first, other) for other in others)


# --- Epilogues ----------------------------------------------------------------------------------


def tail(name, M, N, dtype):
    g = torch.Generator().manual_seed(M + N)
    bias, residual, gate = (torch.randn(s, generator=g).to(dtype) for s in ((N,), (M, N), (3, N)))
    gated = {"epilogue": "gated_residual", "residual": residual}
    each_row = torch.randn(M, N, generator=g).to(dtype)
    return {
        "bias": {"bias": bias},
        "bias, gelu": {"epilogue": "gelu", "bias": bias},
        "residual": gated,
        "bias, gate, residual": gated | {"gate": gate, "bias": bias},
        "gate of each row": gated | {"gate": each_row},
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
    "bias, gelu",
    "residual",
    "bias, gate, residual",
    "strided",
    "shared rows",
    "unaligned rows",
]


@pytest.mark.parametrize("epilogue", TAILS)
@pytest.mark.parametrize("out", OUT)
def test_epilogue(epilogue, out, four):
    """Tiles of 192 in a cluster and of 128 alone; pairs of columns, and odd ones; frames of 46
    rows, so that a warpgroup has several gates; operands of every dtype."""
    for M, N in ((138, 200), (3, 157)):
        a, b, a_scale, b_scale = integers(M, N, 144)
        arguments = (a, b, a_scale / 256, b_scale / 256)
        for dtype in OUT.values():
            options = tail(epilogue, M, N, dtype)
            assert_near(cuda(arguments, OUT[out], **options), oracle(arguments, **options), out)


def test_gate_of_each_row(four):
    arguments = integers(70, 136, 128)
    options = tail("gate of each row", 70, 136, torch.float32)
    assert_near(cuda(arguments, **options), oracle(arguments, **options), "float32")


def test_scales_of_any_strides(four):
    a, b, a_scale, b_scale = integers(150, 257, 400, exponents=(-2, 3))
    turned = (s.t().contiguous().t() for s in (a_scale, b_scale))
    apart = torch.stack([a_scale, a_scale * 3], 2).flatten(1)[:, ::2]
    want = oracle((a, b, a_scale, b_scale))
    assert torch.equal(cuda((a, b, *turned)).double(), want)
    assert torch.equal(cuda((a, b, apart, b_scale)).double(), want)
    one = (a, b, a_scale[:1].expand_as(a_scale), b_scale)
    assert torch.equal(cuda(one).double(), oracle(one))


# --- Requantised --------------------------------------------------------------------------------


def check_requantised(arguments, low, block_rows, how=None, **options):
    """Bit for bit what quantize makes of the kernel's own float32 result."""
    y = cuda(arguments, how=how, block_rows=block_rows, **options)
    yq, y_scale = cuda(arguments, how=how, block_rows=block_rows, requantize=low, **options)
    want, want_scale = quant.quantize(
        y, dtype=FORMATS[low], block_rows=block_rows, backend="reference"
    )
    assert torch.equal(y_scale, want_scale)
    assert torch.equal(yq.float(), want.float())
    assert yq.dtype == FORMATS[low]


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("low", FORMATS)
def test_requantised_is_quantize_of_its_own_sums(low, block_rows, shape):
    M, N, K = shape
    arguments = activations(M, N, min(K, 400), low, block_rows)
    for epilogue in ("bias, gelu", "bias, gate, residual"):
        options = tail(epilogue, M, N, torch.bfloat16)
        if M % 3:
            options.pop("gate", None)
        check_requantised(arguments, low, block_rows, **options)


@pytest.mark.parametrize("N", [136, 157])
@pytest.mark.parametrize("block_rows", [1, 128])
def test_requantised_zeros_have_scale_one(block_rows, N, four):
    a, b, a_scale, b_scale = integers(130, N, 128, block_rows=block_rows)
    a[:128] = 0
    yq, y_scale = cuda((a, b, a_scale, b_scale), block_rows=block_rows, requantize="int8")
    assert not yq[:128].any()
    assert (y_scale[: 128 // block_rows] == 1).all()
    assert yq[128:].any()


@pytest.mark.parametrize("block_rows", [1, 128])
def test_rows_past_the_end_do_not_count(block_rows, four):
    """Large biases in the rows and columns of the tile that the result does not have."""
    arguments = integers(1, 8, 16, block_rows=block_rows)
    bias, residual = torch.full((8,), 1e6), torch.full((1, 8), -1e6)
    options = {"epilogue": "gated_residual", "bias": bias, "residual": residual}
    _, y_scale = cuda(arguments, block_rows=block_rows, requantize="int8", **options)
    y = cuda(arguments, block_rows=block_rows, **options)
    assert torch.equal(y_scale[0], y.abs().amax(1) / 127)


# --- Who is served ------------------------------------------------------------------------------


def given(M, N, K):
    a, b, a_scale, b_scale = integers(M, N, K)
    nothing = dict.fromkeys(("bias", "residual", "gate", "out_scale"))
    strides = dict.fromkeys(
        [f"stride_{name}" for name in ("am", "bn", "bias", "rm", "rn", "gf", "gn")], 0
    )
    numbers = dict(M=M, N=N, K=K, block_rows=1, frame_rows=M, stride_ak=1, stride_bk=1)
    numbers |= dict(stride_a=K, stride_b=K)
    dtypes = dict(dtype=3, bias_dtype=0, residual_dtype=0, gate_dtype=0, out_dtype=0)
    tensors = dict(a=a, b=b, a_scale=a_scale, b_scale=b_scale, out=torch.zeros(M, N))
    return tensors | nothing | strides | numbers | dtypes | dict(epilogue=0, processors=1)


REFUSED = {
    "K": dict(K=24),
    "address": dict(a=torch.zeros(3 * 32 + 1, dtype=torch.int8)[1:]),
    "dtype": dict(dtype=1),
    "no scale": dict(out_dtype=3),
    "no processor": dict(processors=0),
    "block_rows": dict(block_rows=64),
}


@pytest.mark.parametrize("what", REFUSED)
def test_launcher_refuses(what):
    with pytest.raises(emulate.EmulationError, match="the launcher refused"):
        parameters.run("gemm_w8a8", "gemm_w8a8", given(3, 4, 32) | REFUSED[what], sm="sm90")


# --- Synchronisation ----------------------------------------------------------------------------


def check_all(how=None):
    """Every path that synchronises: rings that go round, several tiles of each block, shared
    memory of columns and of the result used again, clusters and a block with no tile left."""
    for M, N in ((300, 72), (250, 380), (380, 200)):
        arguments = integers(M, N, 400, "int8", 1, (-2, 3))
        assert torch.equal(cuda(arguments, how=how).double(), oracle(arguments))
    M, N = 130, 264
    for block_rows in (1, 128):
        arguments = integers(M, N, 144, "int8", block_rows)
        options = {"block_rows": block_rows, **tail("residual", M, N, torch.float32)}
        # Past the last row there is no gate to make the bias small
        options |= {"gate": torch.randn(2, N) / 100, "bias": torch.randn(N) * 1e6}
        y = cuda(arguments, torch.bfloat16, how=how, **options)
        assert_near(y, oracle(arguments, **options), "bfloat16")
        check_requantised(arguments, "int8", how=how, **options)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("landing", emulate.LANDINGS)
@pytest.mark.parametrize("processors", [1, 2, 4])
def test_every_schedule(schedule, landing, processors, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: processors)
    check_all(dict(schedule=schedule, landing=landing, seed=processors))


@pytest.mark.parametrize(
    "schedule, processors", [("random", 1), ("forward", 2), ("backward", 4), ("random", 4)]
)
def test_without_races(schedule, processors, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: processors)
    check_all(dict(flavour="race", schedule=schedule, seed=3))


def test_fp8_and_odd_rows_without_races(four):
    for N in (190, 197):
        arguments = integers(150, N, 272, "fp8", 1, (-2, 3))
        for dtype in OUT.values():
            got = cuda(arguments, dtype, how=dict(flavour="race"))
            assert_near(got, oracle(arguments), str(dtype).split(".")[1])


# Edits of either file, and the processors that show them: with two, blocks are in clusters.
MUTATIONS = {
    "products before the stage has landed": (1, "shared.full[s].wait(ring.parity);", ""),
    "a group passes the one before it": (
        1,
        "if (group > 0) shared.left[group - 1][s].wait(ring.parity);",
        "",
    ),
    "a stage is filled while in use": (
        1,
        "shared.left[Tiles::kGroups - 1][s].wait(ring.parity ^ 1);",
        "",
    ),
    "no other parity in the next round": (1, "parity ^= 1;", ""),
    "sums before the products are done": (1, "wgmma_wait<0>();", "wgmma_wait<1>();"),
    "registers are not fenced": (1, "    wgmma_fence();\n", ""),
    "a group never leaves": (1, "if (!last && slab.lane() == 0)", "if (false)"),
    "one warp leaves for all": (
        1,
        "if (!last && slab.lane() == 0) shared",
        "if (!last && slab.warp() == 0 && slab.lane() < 4) shared",
    ),
    "fewer bytes land than expected": (1, "_expect(sizeof stage);", "_expect(sizeof stage + 16);"),
    "each block gets its half alone": (
        2,
        "row + mine}, 3);",
        "row + mine}, 1 << cluster_rank());",
    ),
    "stages are given back to one block": (2, "slab.lane() < plan.pair())", "slab.lane() < 1)"),
    "barriers before they are made": (
        2,
        "  sync_cluster();\n\n  // Roles",
        "  sync_block();\n\n  // Roles",
    ),
    "the result is staged over its store": (
        1,
        "    if (slab.thread() == 0) tma_store_wait_read<0>();\n",
        "",
    ),
    "the result is not fenced": (1, "    fence_async_proxy();\n", ""),
    "the result is stored before it is whole": (
        1,
        "    fence_async_proxy();\n    slab.sync();\n",
        "    fence_async_proxy();\n",
    ),
    "blocks exit before their stores": (
        1,
        "  if (threadIdx.x % Slab::kThreads == 0) tma_store_wait_read<0>();\n}",
        "}",
    ),
    "warpgroups do not meet for the scale": (
        1,
        "    named_barrier_sync(kPairBarrier, 2 * Slab::kThreads);\n",
        "",
    ),
    "magnitudes over those of the last tile": (1, "shared.amax[turn];", "shared.amax[0];"),
    "columns over those still read": (
        1,
        "    slab.sync();  // nobody reads",
        "    // nobody reads",
    ),
    "columns before they are shared": (
        1,
        "mine[i];\n    }\n    slab.sync();\n",
        "mine[i];\n    }\n",
    ),
    "the scale of another block": (1, "column >= second)", "column > second)"),
    "rows past the end count": (
        1,
        "if (slab.row(i) >= p.M || slab.column(i) >= p.N)",
        "if (slab.column(i) >= p.N)",
    ),
    "rows past the end are stored": (
        1,
        "if (m < p.M && n < p.N)\n      static_cast<Out*>",
        "if (n < p.N)\n      static_cast<Out*>",
    ),
    "the same scales in every tile of 160": (
        forced(160, 1),
        "second = kTileColumns - slab.n0 % kTileColumns",
        "second = kTileColumns",
    ),
    "the other block's half of 160": (
        forced(160, 1, 2),
        "{k, row + mine}, 3);",
        "{k, row + rows / 2 - mine}, 3);",
    ),
    "blocks leave while stages are given back": (
        2,
        "  sync_cluster();  // the other block may",
        "  // the other block may",
    ),
    "a part past the end of K": (forced(128, 4), "min(first + share, blocks)", "first + share"),
    "scales of the first part": (forced(128, 2), "int64_t{blocks.first} * p.stride_bk", "0"),
    "stages are given back to rank 0": (forced(128, 2), "(rank ^ slab.lane())", "(slab.lane())"),
    "sums over stages in use": (
        forced(128, 2),
        "  sync_cluster();  // nobody needs",
        "  // nobody needs",
        "  sync_cluster();\n  for (int round = 0; 1 << round",
        "  for (int round = 0; 1 << round",
    ),
    "sums before they have arrived": (
        forced(128, 2),
        "    sync_cluster();  // what was given",
        "    // what was given",
        "1 << round < parts; round++) sync_cluster();",
        "1 << round < parts; round++) {}",
    ),
    "sums to another block": (forced(128, 4), "thread()]), rank ^ bit)", "thread()]), rank ^ 1)"),
    "sums of the second round over the first's": (forced(128, 4), "received[round]", "received[0]"),
    "slabs of a block of scales end apart": (
        forced(128, 2),
        "plan.apart = !(p.out_scale && p.block_rows == kTileColumns);",
        "plan.apart = 1;",
    ),
}  # fmt: skip

# One kernel of eight, in an eighth of the time.
TABLE = re.search(r"kChoices\[\] = (.*?);", SOURCES[1].read_text(), re.S)[1]
TILES = re.search(r"  if \(choice.groups == 3\).*?, stream\);\n}", SOURCES[0].read_text(), re.S)[0]
INCLUDED = '#include "gemm_w8a8/choice.h"\n#include "gemm_w8a8/fragments.h"\n'


def edited(*edits):
    """Edits of sm90.cu that are edits of it and of the headers that it includes."""
    texts = {path: path.read_text().replace("#pragma once\n", "") for path in SOURCES[1:]}
    own = []
    for old, new in edits:
        found = [path for path, text in texts.items() if old in text]
        if not found:
            own.append((old, new))
        for path in found:
            assert texts[path].count(old) == 1, old
            texts[path] = texts[path].replace(old, new)
    choice, fragments = texts.values()
    body = fragments + choice.replace(INCLUDED.splitlines(keepends=True)[1], "")
    return {"sm90.cu": [*own, (INCLUDED, body)]}


def alone(columns):
    """Tiles of 128 x `columns` for int8, in pairs where there are two blocks."""
    pairs = f"{{2, {columns}, kB, 1}}, " if columns == 128 else ""
    return (
        FORCED,
        INT8,
        (TILES, f"  return launch_tiles<T, 2, {columns}>(p, choice, stream);\n}}"),
        (TABLE, f"{{{pairs}{{2, {columns}, kNone, 1}}}}"),
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_noticed(name, monkeypatch):
    processors, *mistake = MUTATIONS[name]
    monkeypatch.setattr(native, "processors", lambda device: processors)
    columns = {"the scale of another block": 192}.get(name, max(processors // 64, 128))
    edits = zip(mistake[::2], mistake[1::2], strict=True)
    how = dict(flavour="race", replace=edited(*edits, *alone(columns)))
    check = check_all if processors < 64 else functools.partial(check_parts, columns=columns)
    with pytest.raises((AssertionError, emulate.EmulationError)):
        check(how)


def test_under_sanitizers():
    problem = parameters.sanitized(
        "gemm_w8a8",
        """
import functools, parameters
run = functools.partial(parameters.run, "gemm_w8a8", sm="sm90", flavour="sanitize", replace=EDITS)
M, N, K = 130, 200, 272
a = np.random.default_rng(0).integers(-127, 128, (M, K)).astype(np.int8)
b = np.random.default_rng(1).integers(-127, 128, (N, K)).astype(np.int8)
y = np.ones((M, N), np.float32)
for rows, scales, processors in ((1, M, 2), (128, 2, 1), (1, M, PARTS), (128, 2, PARTS)):
    ones, few = np.ones((scales, 3), np.float32), np.ones((2, 3), np.float32)
    for codes in (0, 1):
        out = np.zeros((M, N), np.int8 if codes else np.float32)
        out_scale = np.zeros((scales, 2), np.float32)
        run("gemm_w8a8", dict(
            a=a, b=b, a_scale=ones, b_scale=few, bias=y[0], residual=y, gate=y[:2], out=out,
            out_scale=out_scale if codes else None, M=M, N=N, K=K, block_rows=rows, frame_rows=65,
            stride_a=K, stride_b=K, stride_am=3, stride_ak=1, stride_bn=3, stride_bk=1,
            stride_bias=1, stride_rm=N,
            stride_rn=1, stride_gf=N, stride_gn=1, dtype=3, bias_dtype=0, residual_dtype=0,
            gate_dtype=0, out_dtype=3 if codes else 0, epilogue=2, processors=processors))
        want = a.astype(int) @ b.astype(int).T + 2
        scale = np.repeat(np.repeat(out_scale, rows, 0)[:M], 128, 1)[:, :N]
        assert np.abs((out * scale if codes else out) - want).max() <= codes * scale.max() * 0.501
""".replace("EDITS", repr(edited(*alone(128)))).replace("PARTS", str(forced(128, 4))),
        sm="sm90",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


def test_no_bank_conflicts(four):
    """Staging the result in 16 bits: eight rows of 16 bytes at once, in different banks."""
    for N in (200, 100):
        cuda(integers(150, N, 272), torch.bfloat16, how=dict(flavour="race", count_banks=True))
    rows = parameters.library("gemm_w8a8", "sm90", "race", ()).banks()
    staged = [row for row in rows if row["place"].startswith("stmatrix")]
    assert staged
    assert all(row["wavefronts"] == row["ideal"] > 0 for row in staged), staged


# --- The device build ---------------------------------------------------------------------------


@needs_nvcc
def test_device_build(tmp_path):
    """No spills, and no word of serialised products (C7510 and its like) or of an ignored
    setmaxnreg.  Four products per K block, for they are issued in one place, and a conversion per
    sum of int8 alone; no fence of the whole device in the loop.  Sums of parts leave in 16 bytes,
    where there are two groups."""
    build = device_build(SOURCES[0], "90a", tmp_path)
    assert build.spills == [("0", "0")] * 8
    assert not re.search(r"C7\d\d\d|warning", build.report)
    kernels = build.kernels()
    found = set()
    for kernel in kernels:
        low, groups, columns = re.search(r"gemm_kernelI(a|\w*e4m3E)Li(\d)ELi(\d+)", kernel).groups()
        name = f"IGMMA.64x{columns}x32.S8.S8" if low == "a" else f"QGMMA.64x{columns}x32.F32.E4M3"
        assert kernel.count("GMMA.64x") == kernel.count(name) == 4
        assert kernel.count("I2FP.F32.S32") == (int(columns) // 2 if low == "a" else 0)
        for word in ("UTMALDG.2D.MULTICAST", "UTMASTG.2D", "STSM.16.M88.4", "SYNCS.ARRIVE"):
            assert word in kernel
        registers = {"2": "0xf0", "3": "0xa0"}[groups]
        assert {"0x18", registers} == set(re.findall(r"USETMAXREG.*(0x\w+) ;", kernel))
        assert kernel.count("ST.E.128") == (int(columns) // 8 if groups == "2" else 0)
        loop = kernel.split("GMMA.64x")[4].split("FFMA")[0]
        assert "MEMBAR" not in loop
        found.add((groups, name))
    assert len(found) == 8
