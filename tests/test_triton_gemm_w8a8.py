# SPDX-License-Identifier: Apache-2.0
"""Triton's gemm_w8a8: bit for bit where sums are exact, within TOLERANCE of float64 elsewhere."""

from __future__ import annotations

import pytest
import torch
import triton

from reeltime import arch, backends, checks, gemm_w8a8, quant
from reeltime.arch import UnsupportedArchError
from reeltime.jit import launch as jit

assert backends.load("gemm_w8a8", "triton", "gemm_w8a8")
from reeltime.gemm_w8a8 import triton as kernels  # noqa: E402


@pytest.fixture(autouse=True)
def forget_tiles():
    """Tests change TILES; what was chosen from them is cached."""
    yield
    kernels.tile_config.cache_clear()


FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
OUT = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
SHAPES = {
    "one": (1, 1, 16),
    "single token": (1, 300, 256),
    "ragged": (63, 130, 144),
    "whole tiles": (128, 256, 256),
    "ragged tiles": (130, 7, 400),
    "many tiles": (300, 260, 272),
}
EMPTY = {"no rows": (0, 130, 128), "no columns": (5, 0, 128), "no K": (5, 130, 0)}


def generator(*seed):
    return torch.Generator().manual_seed(sum(seed))


def exact(M, N, K, format, block_rows, device):
    """Operands and scales whose every partial sum float32 holds: small integers, powers of two.

    FP8 takes integers that 14 bits can add up, which is what the narrowest accumulator keeps.
    """
    g = generator(M, N, K)
    limit = 127 if format == "int8" else 8
    blocks = -(-K // 128)
    a, b = (torch.randint(-limit, limit + 1, (n, K), generator=g) for n in (M, N))
    shapes = (-(-M // block_rows), blocks), (-(-N // 128), blocks)
    scales = [2.0 ** torch.randint(-2, 3, s, generator=g) for s in shapes]
    a, b = (x.float().to(FORMATS[format]).to(device) for x in (a, b))
    return a, b, *(s.to(device) for s in scales)


def operands(M, N, K, format, block_rows, device, kind="normal"):
    """What quantize makes of activations and weights."""
    g = generator(M, N, K)
    a, b = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g) / max(K, 1) ** 0.5
    if kind == "outlier channels":
        a[:, 3::16] = 20 + 3 * a[:, 3::16]
    elif kind == "constant":
        a = torch.full_like(a, -2.5)
    elif kind == "zero blocks":
        a[:128, :128], b[:128, 256:] = 0, 0
    aq, a_scale = quant.quantize(a, dtype=FORMATS[format], block_rows=block_rows)
    bq, b_scale = quant.quantize(b, dtype=FORMATS[format], block_rows=128)
    return tuple(x.to(device) for x in (aq, bq, a_scale, b_scale))


def triton_and_reference(arguments, **options):
    return (
        gemm_w8a8.gemm_w8a8(*arguments, **options, backend=backend)
        for backend in ("triton", "reference")
    )


def oracle(arguments, **options):
    options = {name: x.double() if hasattr(x, "double") else x for name, x in options.items()}
    return gemm_w8a8.gemm_w8a8(
        *arguments, **options | {"out_dtype": torch.float64, "backend": "reference"}
    )


def assert_near(got, want, tolerance):
    error = checks.accuracy(got, want)
    assert gemm_w8a8.TOLERANCE[tolerance].accepts(error), error


# --- The product --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_exact_sums_are_the_oracle_bit_for_bit(shape, block_rows, format, device):
    arguments = exact(*SHAPES[shape], format, block_rows, device)
    options = {"block_rows": block_rows, "out_dtype": torch.float32}
    got, want = triton_and_reference(arguments, **options)
    assert torch.equal(got, want)
    assert (got.stride(), got.dtype) == (want.stride(), want.dtype)


@pytest.fixture
def as_sm90(device, monkeypatch):
    """The variant of sm90: INT8 sums converted, each block added one block late."""
    if device.type == "cpu":
        row = next(a for a in arch.ARCHS if a.name == "sm90")
        monkeypatch.setattr(kernels, "arch_of", lambda device: row)
        monkeypatch.setattr(kernels, "TILES", kernels.TILES[:1])


@pytest.mark.parametrize("shape", SHAPES | EMPTY)
@pytest.mark.parametrize("block_rows", [1, 128])
def test_exact_sums_on_sm90(shape, block_rows, device, as_sm90):
    arguments = exact(*(SHAPES | EMPTY)[shape], "int8", block_rows, device)
    got, want = triton_and_reference(arguments, block_rows=block_rows, out_dtype=torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("target", ["default", "sm90"])
def test_int8_holds_the_largest_sums_of_a_block(target, device, request):
    """127 * 127 * 128 and -128 * -128 * 128, preset accumulator or converted."""
    if target == "sm90":
        request.getfixturevalue("as_sm90")
    rows = torch.tensor([127, -127, -128, 1]).to(torch.int8).repeat_interleave(128).view(4, 128)
    ones = torch.ones(4, 1, device=device), torch.ones(1, 1, device=device)
    a = rows.to(device)
    got = gemm_w8a8.gemm_w8a8(a, a, *ones, out_dtype=torch.float32, backend="triton")
    assert torch.equal(got.long().cpu(), rows.long() @ rows.long().t())


@pytest.mark.parametrize("kind", ["normal", "outlier channels", "constant", "zero blocks"])
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_activations_are_within_tolerance(kind, block_rows, format, device):
    arguments = operands(130, 140, 400, format, block_rows, device, kind)
    want = oracle(arguments, block_rows=block_rows)
    for out, dtype in OUT.items():
        options = {"block_rows": block_rows, "out_dtype": dtype}
        got = gemm_w8a8.gemm_w8a8(*arguments, **options, backend="triton")
        assert got.dtype == dtype
        assert_near(got, want, out)


@pytest.mark.parametrize("tile", kernels.TILES, ids=str)
def test_every_tile_computes_the_same(tile, device, monkeypatch):
    arguments = exact(200, 150, 272, "int8", 128, device)
    monkeypatch.setattr(kernels, "TILES", (tile,))
    kernels.tile_config.cache_clear()
    got, want = triton_and_reference(arguments, block_rows=128, out_dtype=torch.float32)
    assert torch.equal(got, want)


def test_strips_of_tiles_cover_every_tile(device):
    """More rows of tiles than a strip is high, and a last strip that is lower."""
    arguments = exact(64 * 17 + 1, 130, 16, "int8", 1, device)
    got, want = triton_and_reference(arguments, out_dtype=torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("format", FORMATS)
def test_operands_and_scales_of_any_strides(format, device):
    a, b, a_scale, b_scale = exact(70, 130, 272, format, 1, device)
    want = gemm_w8a8.gemm_w8a8(a, b, a_scale, b_scale, out_dtype=torch.float32)
    rows = torch.stack([a.float(), 99 - a.float()], 1).flatten(1).to(a.dtype)[:, :272]
    long = torch.cat([b.float(), b.float()], 1).to(b.dtype)[:, :272]
    assert rows.stride(0) == long.stride(0) == 544
    scales = (s.t().contiguous().t() for s in (a_scale, b_scale))
    got = gemm_w8a8.gemm_w8a8(rows, long, *scales, out_dtype=torch.float32, backend="triton")
    assert torch.equal(got, want)


# --- Epilogues ----------------------------------------------------------------------------------


def tail(epilogue, M, N, dtype, device):
    g = generator(M, N)
    bias, residual, gate = (
        torch.randn(s, generator=g).to(dtype).to(device) for s in ((N,), (M, N), (3, N))
    )
    return {
        "bias": {"bias": bias},
        "gelu": {"epilogue": "gelu"},
        "bias, gelu": {"epilogue": "gelu", "bias": bias},
        "residual": {"epilogue": "gated_residual", "residual": residual},
        "bias, gate, residual": {
            "epilogue": "gated_residual",
            "residual": residual,
            "gate": gate,
            "bias": bias,
        },
        "strided": {
            "epilogue": "gated_residual",
            "residual": residual.t().contiguous().t(),
            "gate": gate.t().contiguous().t(),
            "bias": bias[:1].expand(N),
        },
        "one gate": {
            "epilogue": "gated_residual",
            "residual": residual[:1].expand(M, N),
            "gate": gate[:1],
        },
    }[epilogue]


EPILOGUES = [
    "bias",
    "gelu",
    "bias, gelu",
    "residual",
    "bias, gate, residual",
    "strided",
    "one gate",
]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_epilogue(epilogue, dtype, device):
    """Frames of 46 rows: a tile holds several gates."""
    arguments = exact(138, 150, 144, "int8", 1, device)
    arguments = (*arguments[:2], arguments[2] / 256, arguments[3] / 256)
    options = tail(epilogue, 138, 150, dtype, device)
    got = gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=torch.float32, backend="triton")
    assert_near(got, oracle(arguments, **options), "float32")


def test_gelu_far_from_zero(device):
    """Where exp overflows, and where it vanishes."""
    a = torch.tensor([[127], [-127]]).to(torch.int8).expand(2, 16).contiguous().to(device)
    scales = torch.ones(2, 1, device=device), torch.ones(1, 1, device=device)
    options = {"epilogue": "gelu", "out_dtype": torch.float32}
    got, want = triton_and_reference((a, a, *scales), **options)
    assert torch.equal(got, want)
    assert got.max() == 127 * 127 * 16


# --- Requantised --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["single token", "ragged", "whole tiles", "many tiles"])
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_requantised_is_quantize_of_its_own_sums(shape, block_rows, format, device, monkeypatch):
    """One tile for both: float32 sums of FP8 products round differently in another tile."""
    monkeypatch.setattr(kernels, "TILES", kernels.TILES[:1])
    kernels.tile_config.cache_clear()
    M, N, K = SHAPES[shape]
    arguments = operands(M, N, K, format, block_rows, device)
    options = {"epilogue": "gelu", "bias": tail("bias", M, N, torch.float32, device)["bias"]}
    options |= {"block_rows": block_rows, "backend": "triton"}
    y = gemm_w8a8.gemm_w8a8(*arguments, **options, out_dtype=torch.float32)
    for low, dtype in FORMATS.items():
        yq, y_scale = gemm_w8a8.gemm_w8a8(*arguments, **options, requantize=low)
        want, want_scale = quant.quantize(
            y, dtype=dtype, block_rows=block_rows, backend="reference"
        )
        assert torch.equal(y_scale, want_scale)
        assert torch.equal(yq.float(), want.float())
        assert (yq.dtype, yq.stride()) == (dtype, want.stride())
        assert y_scale.stride() == want_scale.stride()


@pytest.mark.parametrize("block_rows", [1, 128])
def test_requantised_zeros_have_scale_one(block_rows, device):
    a, b, a_scale, b_scale = exact(130, 140, 128, "int8", block_rows, device)
    a[:128] = 0
    yq, y_scale = gemm_w8a8.gemm_w8a8(
        a, b, a_scale, b_scale, block_rows=block_rows, requantize="int8", backend="triton"
    )
    assert not yq[:128].any()
    assert (y_scale[: 128 // block_rows] == 1).all()
    assert yq[128:].any()


# --- Edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("requantize", [None, "int8"])
def test_empty(shape, requantize, device):
    M, N, K = EMPTY[shape]
    arguments = exact(M, N, K, "int8", 1, device)
    options = {"bias": torch.arange(N, device=device).float(), "requantize": requantize}
    got, want = triton_and_reference(arguments, **options)
    for g, w in zip(*((x,) if requantize is None else x for x in (got, want)), strict=True):
        assert (g.shape, g.stride(), g.dtype) == (w.shape, w.stride(), w.dtype)
        assert torch.equal(g, w)


@pytest.mark.parametrize("block_rows", [1, 128])
def test_nan_scale_spreads_over_its_block_alone(block_rows, device):
    """The public call raises on a CPU; on a GPU looking would wait, so this is what it gives."""
    a, b, a_scale, b_scale = exact(200, 140, 272, "int8", block_rows, device)
    a_scale[0, 1] = b_scale[1, 2] = torch.nan
    op = backends.OPS["gemm_w8a8"].overload
    rest = (None, None, None, block_rows, "none", torch.float32)
    got = op(a, b, a_scale, b_scale, *rest, "triton")
    assert torch.equal(got.isnan(), op(a, b, a_scale, b_scale, *rest, "reference").isnan())
    assert got.isnan().sum() == block_rows * 128 + 200 * 12
    low = backends.OPS["gemm_w8a8_requantized"].overload
    yq, y_scale = low(a, b, a_scale, b_scale, *rest[:-1], torch.int8, "triton")
    blank = y_scale.isnan()
    assert blank[:, 1].all()
    assert blank[:, 0].tolist() == [True] + [False] * (len(blank) - 1)
    assert not yq[:, 128:].any()
    assert not yq[:block_rows].any()


def test_float64_says_who_serves_it(device):
    arguments = exact(2, 3, 16, "int8", 1, device)
    with pytest.raises(UnsupportedArchError, match="float64 has backend='reference'"):
        gemm_w8a8.gemm_w8a8(*arguments, out_dtype=torch.float64, backend="triton")


# --- Tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", arch.ARCHS, ids=lambda row: row.name)
def test_tiles_fill_the_card(row):
    """Large products take the large tile; small ones the tile that occupies most of the card."""
    with jit.recording(row) as launches:
        for M, N in ((6120, 8960), (6120, 5120), (6120, 13824), (1, 1536), (512, 1536)):
            a, b = (torch.empty(n, 1536, dtype=torch.int8, device="meta") for n in (M, N))
            scales = (torch.empty(n, 12, device="meta") for n in (M, N // 128))
            gemm_w8a8.gemm_w8a8(a, b, *scales, backend="triton")
    tiles = [(x.arguments["BLOCK_M"], x.arguments["BLOCK_N"]) for x in launches]
    assert tiles[:3] == [(128, 128)] * 3
    assert launches[3].grid == (triton.cdiv(1536, 32),)
    assert launches[4].grid[0] >= 48


def test_requantised_tiles_hold_whole_blocks():
    a, b = (torch.empty(n, 256, dtype=torch.int8, device="meta") for n in (1, 256))
    with jit.recording(arch.ARCHS[0]) as launches:
        for block_rows in (1, 128):
            scales = (torch.empty(n, 2, device="meta") for n in (1, 2))
            gemm_w8a8.gemm_w8a8(
                a, b, *scales, block_rows=block_rows, requantize="int8", backend="triton"
            )
    assert [x.arguments["BLOCK_N"] for x in launches] == [128, 128]
    assert launches[1].arguments["BLOCK_M"] == 128
