# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of norm: their own source on the emulator, against the oracle in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import emulate
import parameters
import pytest
import torch
from device_build import device_builds, needs_nvcc
from emulated import emulated

from reeltime import checks, native, norm, quant
from reeltime.arch import UnsupportedArchError
from reeltime.quant.api import FORMATS

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("layer", "rms")


def draw(*shape, dtype=torch.float32, device="cpu", seed=7):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(dtype).to(device)


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def by_oracle(x, **options):
    return norm.norm(x.double(), **{name: exact(value) for name, value in options.items()})


def close(got, want, dtype, slack=1):
    limit = norm.TOLERANCE[str(dtype).removeprefix("torch.")]
    error = checks.accuracy(got, want)
    assert checks.Tolerance(limit.relative_l1 * slack, limit.peak * slack).accepts(error), error


@contextlib.contextmanager
def hardware(shared_limit=None, processors=None):
    """As if the GPU had this much shared memory, or as many SMs: without the one, rows take two
    kernels; with few of the other, warps take several rows."""
    before = native.arch_of, native.processors
    if shared_limit is not None:
        native.arch_of = lambda device: dataclasses.replace(
            before[0](device), shared_limit=shared_limit
        )
    if processors is not None:
        native.processors = lambda device: processors
    try:
        yield
    finally:
        native.arch_of, native.processors = before


@contextlib.contextmanager
def counted():
    """How many kernels each launch takes: the first of two leaves statistics."""
    run, seen = native.emulator, []

    def counting(entry, fields):
        run(entry, fields)
        seen.append(1 if fields["statistics"].isnan().all() else 2)

    native.emulator = counting
    try:
        yield seen
    finally:
        native.emulator = run


@pytest.fixture(params=["one kernel", "statistics and tiles"])
def path(request):
    with hardware(shared_limit=None if request.param == "one kernel" else 0):
        yield request.param


# --- Rows -----------------------------------------------------------------------------------------

# Warps and pieces of every kind; the odd ones are not whole pieces of 16 bytes.
WIDTHS = (1, 8, 63, 128, 200, 512, 1000, 1001, 1536, 1544, 3072, 5120)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind, dtype):
    with emulated("norm", gpu=True) as runner:
        for C in WIDTHS:
            x = draw(1, 3, C, dtype=dtype, device=runner.device)
            close(norm.norm(x, kind=kind, backend="cuda"), by_oracle(x, kind=kind), dtype)


@pytest.mark.parametrize(
    "C, dtype, modulated, kernels",
    [
        (13824, "bf16", False, 1),
        (13824, "bf16", True, 1),  # 108 KiB of shared memory: sm80, sm90 and sm100 have it
        (15360, "fp16", False, 1),
        (15368, "bf16", True, 2),
        (7680, "fp32", True, 1),
        (7684, "fp32", True, 2),
        (1001, "bf16", True, 2),
    ],
)
def test_long_rows_need_two_kernels(C, dtype, modulated, kernels):
    dtype = DTYPES[dtype]
    with emulated("norm", gpu=True) as runner:
        x, h = (draw(1, 2, C, dtype=dtype, device=runner.device, seed=s) for s in (1, 2))
        names = ("scale", "shift") if modulated else ()
        options = {name: draw(1, 1, C, device=runner.device) for name in names}
        with counted() if runner.device.type == "cpu" else contextlib.nullcontext([kernels]) as n:
            x_new, y = norm.gated_residual_norm(x, h, **options, backend="cuda")
        close(x_new, x.double() + h.double(), dtype)
        close(y, by_oracle(x_new, **options), dtype)
        assert n == [kernels]


INPUTS = {
    "far from zero": lambda: draw(1, 4, 256) + 100,
    "constant": lambda: torch.full((1, 3, 384), 1.625),
    "zeros": lambda: torch.zeros(1, 2, 128),
    "batch and tokens exchanged": lambda: draw(6, 2, 200).transpose(0, 1),
    "a gap after every row": lambda: draw(2, 10, 300)[:, ::2, :200],
    "rows at odd addresses": lambda: draw(2, 10, 300)[..., 1:201],
    "empty": lambda: draw(2, 0, 64),
    "no channels": lambda: draw(2, 3, 0),
}


@pytest.mark.parametrize("name", INPUTS)
def test_adversarial_inputs(name, path):
    with emulated("norm", gpu=True) as runner:
        x = INPUTS[name]().to(runner.device)
        for kind in KINDS:
            y = norm.norm(x, kind=kind, backend="cuda")
            # The mean of values near 100 costs two digits of the difference.
            slack = 100 if name == "far from zero" else 1
            close(y, by_oracle(x, kind=kind), x.dtype, slack)
            assert y.is_contiguous()


def options_of(names, device, B, L, C, aligned):
    """Every tensor with frames and a dtype of its own; if not `aligned`, with odd strides too."""
    wide, make = C if aligned else C + 3, {}
    for i, name in enumerate(("weight", "bias", "scale", "shift", "gate")):
        dtype, seed = list(DTYPES.values())[i % 3], i
        if name in ("weight", "bias"):
            make[name] = draw(wide, dtype=dtype, device=device, seed=seed)[-C:]
        else:
            frames = {"scale": 3, "shift": 1, "gate": L}[name]
            make[name] = draw(B, frames, wide, dtype=dtype, device=device, seed=seed)[..., -C:]
    if not aligned:
        make["weight"] = draw(C, 2, device=device)[:, 1]
        make["shift"] = draw(B, C, 2, device=device).transpose(1, 2)
    return {name: make[name] for name in names}


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd strides"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_modulation(dtype, aligned, path):
    everything = ("weight", "bias", "scale", "shift")
    with emulated("norm", gpu=True) as runner:
        for names in (*((name,) for name in everything), everything):
            for kind in KINDS:
                x = (3 * draw(2, 6, 200, device=runner.device) + 1).to(dtype)
                options = options_of(names, runner.device, *x.shape, aligned)
                y = norm.norm(x, kind=kind, eps=1e-5, **options, backend="cuda")
                close(y, by_oracle(x, kind=kind, eps=1e-5, **options), dtype)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd strides"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gate", ["no gate", "a gate per token", "a gate per frame"])
def test_gated_residual(gate, dtype, aligned, path):
    with emulated("norm", gpu=True) as runner:
        device = runner.device
        x = draw(6, 2, 200, dtype=dtype, device=device).transpose(0, 1)
        h = draw(2, 6, 304, dtype=dtype, device=device, seed=8)[..., 0 if aligned else 1 :][
            ..., :200
        ]
        options = options_of(("scale", "shift", "gate"), device, *x.shape, aligned)
        per_token, per_frame = options.pop("gate"), options["scale"]
        g = {"a gate per token": per_token, "a gate per frame": per_frame}.get(gate)
        before = x.clone()
        x_new, y = norm.gated_residual_norm(x, h, g, **options, backend="cuda")
        spread = 1.0 if g is None else g.repeat_interleave(6 // g.shape[1], 1).double()
        close(x_new, x.double() + spread * h.double(), dtype)
        close(y, by_oracle(x_new, **options), dtype)  # of x_new as it was stored
        assert torch.equal(x, before)


@pytest.mark.parametrize("C", [64, 200, 1544])
@pytest.mark.parametrize("frames", [(1, 1), (3, 2), (12, 4)], ids=str)
def test_warps_that_take_several_rows(frames, C):
    """48 rows on one SM: runs of up to eight, which end where a frame does."""
    with emulated("norm", gpu=True) as runner, hardware(processors=1):
        device = runner.device
        x, h = (draw(2, 24, C, device=device, seed=s) for s in (1, 2))
        gate, scale = (draw(2, F, C, device=device, seed=F) for F in frames)
        x_new, y = norm.gated_residual_norm(x, h, gate, scale=scale, backend="cuda")
        want = x.double() + gate.repeat_interleave(24 // frames[0], 1).double() * h.double()
        close(x_new, want, x.dtype)
        close(y, by_oracle(x_new, scale=scale), x.dtype)


def test_two_kernels_have_the_bits_of_one():
    """Whatever the path, y is the same: the tiles of a 128 x 128 scale may be compared to it."""
    with emulated("norm", gpu=True) as runner:
        x = draw(2, 66, 200, device=runner.device) + 1
        everything = ("weight", "bias", "scale", "shift")
        options = options_of(everything, runner.device, *x.shape, aligned=True)
        one = norm.norm(x, **options, backend="cuda")
        with hardware(shared_limit=0):
            assert torch.equal(norm.norm(x, **options, backend="cuda"), one)


# --- 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows, C", [(1, 40), (1, 200), (1, 384), (128, 200), (128, 201)])
@pytest.mark.parametrize("format", FORMATS)
def test_8_bits_are_quant_of_its_own_result(format, block_rows, C, path):
    """In float32, y is what the kernel quantises."""
    B, L = 2, 6 if block_rows == 1 else 66  # 128 tokens then cross frames and the batch; 4 are left
    with emulated("norm", gpu=True) as runner:
        device = runner.device
        x, h = draw(B, L, C, device=device), draw(B, L, C, device=device, seed=8)
        names = ("weight", "bias", "scale", "shift", "gate")
        options = options_of(names, device, B, L, C, aligned=C % 4 == 0)
        options |= {"gate": options["gate"][:, :6] if L == 6 else None, "backend": "cuda"}
        x[0, 5] = h[0, 5] = 0.0
        x_new, y = norm.gated_residual_norm(x, h, **options)
        rows = {"quantize": format, "block_rows": block_rows}
        got = norm.gated_residual_norm(x, h, **options, **rows)
        want = quant.quantize(
            y.flatten(0, 1), dtype=FORMATS[format], block_rows=block_rows, backend="reference"
        )
        assert torch.equal(got[0], x_new)
        assert torch.equal(got[1].flatten(0, 1).float(), want[0].float())
        assert torch.equal(got[2], want[1])
        del options["gate"]
        alone = norm.norm(x_new, **options, **rows)
        assert torch.equal(alone[0].float(), got[1].float())
        assert torch.equal(alone[1], got[2])


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_8_bits_of_16(dtype, format, block_rows):
    """A code may differ from the oracle's only where rounding was a toss-up."""
    rows = 8 if block_rows == 1 else 140
    with emulated("norm", gpu=True) as runner:
        x = draw(1, rows, 256, dtype=DTYPES[dtype], device=runner.device)
        how = {"quantize": format, "block_rows": block_rows}
        yq, scale = norm.norm(x, **how, backend="cuda")
        y = by_oracle(x).flatten(0, 1)
        want = quant.quantize(y.float(), dtype=FORMATS[format], block_rows=block_rows)[1]
        torch.testing.assert_close(scale, want, rtol=2e-6, atol=0)
        spread = scale.double().repeat_interleave(block_rows, 0)[:rows].repeat_interleave(128, 1)
        near = [
            quant.reference.store(y * (1 + slip), spread, FORMATS[format]).float()
            for slip in (-3e-6, 3e-6)
        ]
        code = yq.flatten(0, 1).float()
        assert ((code == near[0]) | (code == near[1])).all()


@pytest.mark.parametrize("format", FORMATS)
def test_tiny_scales(format):
    """Below 2^-60 the quotients are lifted, below the normal numbers they are clamped."""
    with emulated("norm", gpu=True) as runner:
        x = draw(1, 9, 256, device=runner.device)
        for factor in (1e-20, 1e-38, 3e-43, 1e-45):
            weight = torch.full((256,), factor, device=runner.device)
            y = norm.norm(x, weight=weight, backend="cuda")
            got = norm.norm(x, weight=weight, quantize=format, backend="cuda")
            want = quant.quantize(y[0], dtype=FORMATS[format], backend="reference")
            assert torch.equal(got[1], want[1])
            assert torch.equal(got[0][0].float(), want[0].float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay_in_their_token(kind, bad, path):
    with emulated("norm", gpu=True) as runner:
        for C, dtype in ((200, torch.float32), (1536, torch.bfloat16), (201, torch.float16)):
            x = draw(1, 3, C, dtype=dtype, device=runner.device)
            x[0, 1, 150] = bad
            y = norm.norm(x, kind=kind, backend="cuda")
            want = norm.norm(x, kind=kind, backend="reference")
            assert torch.equal(y.isnan(), want.isnan())
            assert y[0, [0, 2]].isfinite().all()
            for rows in (1, 128):
                how = {"kind": kind, "quantize": "int8", "block_rows": rows}
                yq, scale = norm.norm(x, **how, backend="cuda")
                wants = norm.norm(x, **how, backend="reference")
                assert torch.equal(scale.isnan(), wants[1].isnan())
                assert torch.equal(yq[0, 1], wants[0][0, 1])
                if rows == 128:
                    assert not yq[..., 128:].any() or kind == "rms"


@pytest.mark.parametrize("block_rows", [1, 128])
def test_constant_tokens_quantise_to_zero(block_rows):
    with emulated("norm", gpu=True) as runner:
        x = torch.full((1, 5, 200), 2.5, device=runner.device)
        yq, scale = norm.norm(x, quantize="int8", block_rows=block_rows, backend="cuda")
        assert not yq.any()
        assert (scale == 1).all()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda x: norm.norm(x.double(), backend="cuda"), "float64 has backend='reference'"),
        (lambda x: norm.norm(x, weight=x[0, 0].double(), backend="cuda"), "not torch.float64"),
        (lambda x: norm.gated_residual_norm(x, x.half(), backend="cuda"), "h must have the dtype"),
    ],
    ids=["x", "weight", "h"],
)
def test_what_it_does_not_read_is_refused(call, why):
    with emulated("norm", gpu=True) as runner:
        with pytest.raises(UnsupportedArchError, match=why):
            call(draw(1, 2, 8, device=runner.device))


# --- The emulator's checks ------------------------------------------------------------------------

# Only float32: a third of the code to compile.
FLOAT_ONLY = [
    (f"return norm_sm80::normalise<{name}>(p, stream);", "return cudaErrorInvalidValue;")
    for name in ("bfloat16", "float16")
]


def check_all():
    """Every kernel in float32, in results that are compared bit for bit where that is possible."""
    x, h = draw(2, 75, 200) + 30, draw(2, 75, 200, seed=8)
    gate, scale, shift = (draw(2, F, 200, seed=F) for F in (1, 3, 5))
    with hardware(processors=1):
        for kind in KINDS:
            options = {"kind": kind, "scale": scale, "shift": shift, "backend": "cuda"}
            y = {}
            for limit in (None, 0):
                with hardware(shared_limit=limit):
                    x_new, y[limit] = norm.gated_residual_norm(x, h, gate, **options)
                close(x_new, x.double() + gate.double() * h.double(), x.dtype, 100)
                close(y[limit], by_oracle(x_new, kind=kind, scale=scale, shift=shift), x.dtype, 30)
            assert torch.equal(y[None], y[0])
            view = torch.cat([x_new, x_new + 9], 1)[:, :75]  # another step from batch to batch
            for rows in (1, 128):
                eight_bits_of(y[0], norm.norm(view, **options, quantize="int8", block_rows=rows))
            wide = draw(1, 11, 1532) + 30  # several warps and pieces to a row
            y_wide = norm.norm(wide, kind=kind, backend="cuda")
            eight_bits_of(y_wide, norm.norm(wide, kind=kind, quantize="int8", backend="cuda"))
            for view in (wide, wide[..., 1:]):  # the second by long_rows_kernel
                got, want = norm.norm(view, kind=kind, backend="cuda"), by_oracle(view, kind=kind)
                close(got, want, x.dtype, 30)
                x_new, y_new = norm.gated_residual_norm(view, view, kind=kind, backend="cuda")
                close(y_new, by_oracle(x_new, kind=kind), x.dtype, 30)


def eight_bits_of(y, got):
    """Bit for bit quant of y, per token or per block."""
    rows = 1 if got[1].shape[0] == y.shape[0] * y.shape[1] else 128
    want = quant.quantize(y.flatten(0, 1), block_rows=rows, backend="reference")
    assert torch.equal(got[0].flatten(0, 1), want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_without_races(schedule):
    with emulated("norm", flavour="race", schedule=schedule, seed=3):
        check_all()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_under_every_schedule(schedule, seed):
    with emulated("norm", flavour="plain", schedule=schedule, seed=seed):
        check_all()


def test_under_sanitizers():
    """All three kernels, one column to a piece and four."""
    problem = parameters.sanitized(
        "norm",
        f"""
def normalise(x, C, y_scale, block_rows, shared_limit):
    B, L, wide = x.shape
    pointers = dict.fromkeys(parameters.fields("norm", "NormParams"), 0)
    y = np.full((B, L, C), 77, np.int8 if y_scale is not None else np.float32)
    mod = np.random.default_rng(1).standard_normal((B, 2, C)).astype(np.float32)
    statistics, x_new = np.zeros((B * L, 2), np.float32), np.zeros((B, L, C), np.float32)
    given = pointers | dict(
        x=x, h=x, gate=mod, weight=mod, bias=None, scale=mod, shift=mod, x_new=x_new, y=y,
        y_scale=y_scale, statistics=statistics, B=B, L=L, C=C, block_rows=block_rows,
        gate_rows=L // 2, scale_rows=L // 2, shift_rows=L // 2, segment_rows=L // 2,
        stride_xb=L * wide, stride_xl=wide, stride_hb=L * wide, stride_hl=wide, stride_wc=1,
        eps=1e-6, y_dtype=0 if y_scale is None else 3, processors=1, shared_limit=shared_limit,
    )
    for name in "gcs":
        given |= {{f"stride_{{name}}b": 2 * C, f"stride_{{name}}f": C, f"stride_{{name}}c": 1}}
    edits = {{"sm80.cu": {FLOAT_ONLY}}}
    parameters.run("norm", "normalise", given, flavour="sanitize", replace=edits)
    norm = (x_new - x_new.mean(-1, keepdims=True)) / x_new.std(-1, keepdims=True)
    frame = mod.repeat(L // 2, 1)
    want = norm * mod.reshape(-1)[:C] * (1 + frame) + frame
    if y_scale is not None:
        y = y * y_scale.repeat(block_rows, 0)[: B * L].repeat(128, 1)[:, :C].reshape(y.shape)
    assert np.abs(y - want).max() < (1e-3 if y_scale is None else 0.51 * y_scale.max())
x = np.random.default_rng(0).standard_normal((2, 66, 204)).astype(np.float32)
for C in (200, 201):
    for limit in (10**5, 0):
        normalise(x[..., :C], C, None, 1, limit)
        for rows in (1, 128):
            normalise(x[..., :C], C, np.zeros((-(-132 // rows), 2), np.float32), rows, limit)
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


def test_no_bank_is_asked_twice():
    with emulated("norm", flavour="race", count_banks=True):
        library = parameters.library("norm", "sm80", "race", ())
        x, mod = draw(1, 130, 384, dtype=torch.bfloat16), draw(1, 2, 384)
        norm.gated_residual_norm(x, x, mod, scale=mod, shift=mod, backend="cuda")
        rows = library.banks()
        norm.norm(x, scale=mod, quantize="int8", block_rows=128, backend="cuda")
        rows += library.banks()
    assert sum(row["requests"] for row in rows) > 1000
    assert [row for row in rows if row["wavefronts"] > row["ideal"]] == []


MUTATIONS = {
    # Synchronisation
    "sums are read before they are there": ("  sync_block();\n  value = 0.0f;", "  value = 0.0f;"),
    "both sums of a row in one array": ("shared.partial[layer ? 0 : row & 1]", "shared.partial[1]"),
    "the same array for row after row": ("partial[layer ? 0 : row & 1]", "partial[0]"),
    "both sums of a long row in one array": (
        "row_sum(squares, shared.partial[1]",
        "row_sum(squares, shared.partial[0]",
    ),
    "warps of a tile do not meet": ("block_reduce<Tile::kThreads / 32>(", "block_reduce<1>("),
    # Rows
    "the first warp's sum for all": ("warp < warps; warp++", "warp < 1; warp++"),
    "every warp for itself": (
        "row_sum(squares, shared.partial[layer ? 0 : row & 1], plan.warps)",
        "row_sum(squares, shared.partial[0], 1)",
    ),
    "the same row twice": ("load_row(row + 1);", "load_row(row);"),
    "a row too many is loaded": ("if (row + 1 < last) load_row", "load_row"),
    "a run goes on past its segment": (
        "= min(first + plan.rows, segment + p.segment_rows)",
        "= first + plan.rows",
    ),
    "warps without rows": ("if (run >= p.B * p.L / p.segment_rows * runs) return;", ""),
    "idle lanes count": ("subtract(v[i], mean, inside(i))", "subtract(v[i], mean, true)"),
    "columns past the end": ("last_inside = column(kPieces - 1) < p.C", "last_inside = true"),
    "gains where the gate is": ("gains = p.gate ? kPieces * kFours : 0", "gains = 0"),
    "offsets where gains are": ("offsets = gains + kPieces * kFours", "offsets = gains"),
    "a table too small": (
        "launch_rows<T>(whole, plan, shared_bytes(folded)",
        "launch_rows<T>(whole, plan, shared_bytes(1)",
    ),
    "half of the lanes of a scale": (
        "warp_reduce<kLanes>(amax_of",
        "warp_reduce<kLanes / 2>(amax_of",
    ),
    "the scale of another piece": (
        "shuffle(mine.inverse, leader + i)",
        "shuffle(mine.inverse, leader)",
    ),
    "the place of a scale": ("block = column(lane) / kBlockK", "block = lane"),
    "variance for 1 / sigma": (
        "p.statistics)[row] = {mean, inverse}",
        "p.statistics)[row] = {mean, variance}",
    ),
    # Long rows
    "squares of x, not of x_new": (
        "if (p.h) x_row = static_cast",
        "if (false) x_row = static_cast",
    ),
    "squares not centred": ("subtract(v, mean, true)", "subtract(v, 0.0f, true)"),
    # Tiles
    "rows past the end are read": ("held = first + i * Tile::kStep < M", "held = true"),
    "rows past the end are measured": (
        "inside = first + i * Tile::kStep < M && column(j) < p.C",
        "inside = column(j) < p.C",
    ),
    "rows past the end are stored": (
        "if (row < M && column(j) < p.C) store_codes",
        "if (column(j) < p.C) store_codes",
    ),
    "columns past the end are stored": (
        "if (row < M && column(j) < p.C) store_codes",
        "if (row < M) store_codes",
    ),
    "another batch's rows": ("x_row += p.stride_xb - p.L * p.stride_xl;", ";"),
    "two frames for a row": (
        "if (row < begin || row >= end) continue;",
        "if (row < begin) continue;",
    ),
    "the place of a tile's scale": (
        "p.y_scale[int64_t{tile_m} * tiles_n + tile_n]",
        "p.y_scale[tile_m + tile_n]",
    ),
    "tiles of x, not of x_new": ("p.x = p.x_new;", ""),
}


@pytest.fixture(scope="module")
def mutated():
    """All of them compiled, side by side."""
    source = parameters.CSRC / "norm/sm80.cu"
    edits = [(*FLOAT_ONLY, mutation) for mutation in MUTATIONS.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda edit: emulate.compile_one(source, "race", edit), edits))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_noticed(name, mutated):
    edits = {"sm80.cu": [*FLOAT_ONLY, MUTATIONS[name]]}
    with emulated("norm", flavour="race", replace=edits):
        with pytest.raises((AssertionError, emulate.EmulationError)):
            check_all()


# --- The device build -----------------------------------------------------------------------------

TARGETS = ("80", "90a", "120a")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    return device_builds(
        emulate.CSRC / "norm/sm80.cu", list(TARGETS), tmp_path_factory.mktemp("builds")
    )


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_device_build(cubins, target):
    """No spills, no stack; 16 bytes per access to x, to y and to the table in shared memory; one
    instruction for the maximum that keeps NaN."""
    used = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(used, cubins[target].report) == [("0", "0", "0")] * 21
    kernels = cubins[target].kernels()
    rows = [kernel for kernel in kernels if "11rows_kernelI" in kernel.split("\n")[0]]
    assert len(rows) == 9
    for kernel in rows:
        accesses = set(re.findall(r"\b(LDG\S*NA\S*|STG\S*|LDS\S*|STS\S*)\s", kernel))
        assert {"LDS.128", "STS.128", "STG.E.128"} <= accesses
        assert all(name.endswith(".128") for name in accesses if name.startswith("LDG"))
        assert "FMNMX.NAN" in kernel or "FMNMX3.NAN" in kernel
