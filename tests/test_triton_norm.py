# SPDX-License-Identifier: Apache-2.0
"""Triton's norm against the oracle in float64; its 8 bits against quant of its own result."""

from __future__ import annotations

import pytest
import torch

from reeltime import checks, norm, quant
from reeltime.arch import UnsupportedArchError
from reeltime.quant.api import FORMATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def draw(*shape, dtype=torch.float32, device="cpu", seed=7):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(dtype).to(device)


def outliers():
    x = draw(1, 12, 256)
    x[..., 3::16] = 20 + 3 * x[..., 3::16]
    return x


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def close(got, want, dtype, slack=1):
    limit = norm.TOLERANCE[NAMES[dtype]]
    error = checks.accuracy(got, want)
    assert checks.Tolerance(limit.relative_l1 * slack, limit.peak * slack).accepts(error), error


def by_oracle(x, **options):
    return norm.norm(x.double(), **{name: exact(value) for name, value in options.items()})


INPUTS = {
    "outlier channels": outliers,
    "far from zero": lambda: draw(1, 4, 256) + 100,
    "constant": lambda: torch.full((1, 3, 384), 1.625),
    "zeros": lambda: torch.zeros(1, 2, 128),
    "single token": lambda: draw(1, 1, 7),
    "one channel": lambda: draw(2, 5, 1),
    "odd width": lambda: draw(2, 3, 1001),
    "a head and a tail": lambda: draw(2, 9, 384),
    "batch and tokens exchanged": lambda: draw(6, 2, 200).transpose(0, 1),
    "a gap after every row": lambda: draw(2, 10, 300)[:, ::2, :200],
    "empty": lambda: draw(2, 0, 64),
    "no channels": lambda: draw(2, 3, 0),
}


@pytest.fixture(params=["one pass", "two kernels"])
def path(request, monkeypatch):
    """Rows wider than WHOLE take statistics first and tiles then: so do all when it is 0."""
    from reeltime.norm import triton

    if request.param == "two kernels":
        monkeypatch.setattr(triton, "WHOLE", 0)
    return request.param


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("name", INPUTS)
def test_adversarial_inputs(name, kind, path, device):
    x = INPUTS[name]().to(device)
    got = norm.norm(x, kind=kind, backend="triton")
    assert (got.dtype, got.stride()) == (x.dtype, x.new_empty(x.shape).stride())
    # The mean of values near 100 costs two digits of the difference, and no formula brings it back.
    close(got, by_oracle(x, kind=kind), x.dtype, slack=100 if name == "far from zero" else 1)


OPTIONS = {
    "weight": ("weight",),
    "bias": ("bias",),
    "scale": ("scale",),
    "shift": ("shift",),
    "everything": ("weight", "bias", "scale", "shift"),
}


def options_of(names, dtype, device, B, L, C):
    """Every per-frame tensor with frames of its own; the weight is a strided column."""
    make = {
        "weight": lambda: draw(C, 2, dtype=dtype, device=device)[:, 1],
        "bias": lambda: draw(C, device=device),  # float32 beside any x
        "scale": lambda: draw(B, 3, C, dtype=dtype, device=device, seed=1),
        "shift": lambda: draw(2, B, C, dtype=dtype, device=device, seed=2).transpose(0, 1),
        "gate": lambda: draw(B, C, L, dtype=dtype, device=device, seed=3).transpose(1, 2),
    }
    return {name: make[name]() for name in names}


@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_modulation(kind, names, path, device):
    for dtype in DTYPES if names == "everything" else DTYPES[:1]:
        x = (3 * draw(2, 6, 200, device=device) + 1).to(dtype)
        options = {"kind": kind, "eps": 1e-5} | options_of(OPTIONS[names], dtype, device, *x.shape)
        close(norm.norm(x, **options, backend="triton"), by_oracle(x, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("gate", ["no gate", "a gate per token", "a gate per frame"])
def test_gated_residual(gate, dtype, path, device):
    x, wide = draw(6, 2, 200, dtype=dtype, device=device).transpose(0, 1), 300
    h = draw(2, 6, wide, dtype=dtype, device=device)[..., :200]
    options = options_of(("scale", "shift", "gate"), dtype, device, *x.shape)
    g = {"no gate": None, "a gate per token": options["gate"], "a gate per frame": options["scale"]}
    g = g[gate]
    del options["gate"]
    before = x.clone()
    x_new, y = norm.gated_residual_norm(x, h, g, **options, backend="triton")
    spread = 1.0 if g is None else g.repeat_interleave(6 // g.shape[1], 1).double()
    close(x_new, x.double() + spread * h.double(), dtype)
    close(y, by_oracle(x_new, **options), dtype)  # of x_new as it was stored
    assert torch.equal(x, before)
    assert x_new.is_contiguous()
    assert y.is_contiguous()


def test_norm_is_of_the_residual_as_stored(path, device):
    """Near 100, bfloat16 keeps halves: the norm of the sum before rounding is another."""
    x, h = (draw(1, 3, 200, dtype=torch.bfloat16, device=device, seed=s) for s in (1, 2))
    x_new, y = norm.gated_residual_norm(x + 100, h, backend="triton")
    close(y, by_oracle(x_new), x.dtype)


@pytest.mark.parametrize("block_rows, C", [(1, 40), (1, 200), (1, 384), (128, 200)])
@pytest.mark.parametrize("format", FORMATS)
def test_8_bits_are_quant_of_its_own_result(format, block_rows, C, device, monkeypatch):
    """In float32, y is what the kernel would quantise: the same kernel, by the same statistics."""
    from reeltime.norm import triton

    B = 2
    L = 6 if block_rows == 1 else 66  # 128 tokens then cross frames and the batch; 4 are left
    x, h = draw(B, L, C, device=device), draw(B, L, C, device=device, seed=8)
    options = options_of(("weight", "bias", "scale", "shift"), torch.float32, device, B, L, C)
    gate = draw(B, 6, C, device=device)
    x[0, 5] = 0.0
    if block_rows == 128:
        monkeypatch.setattr(triton, "WHOLE", 0)
    x_new, y = norm.gated_residual_norm(x, h, gate, **options, backend="triton")
    got = norm.gated_residual_norm(
        x, h, gate, **options, quantize=format, block_rows=block_rows, backend="triton"
    )
    want = quant.quantize(
        y.flatten(0, 1), dtype=FORMATS[format], block_rows=block_rows, backend="reference"
    )
    assert torch.equal(got[0], x_new)
    assert torch.equal(got[1].flatten(0, 1).float(), want[0].float())
    assert torch.equal(got[2], want[1])
    assert got[1].is_contiguous()
    assert got[2].is_contiguous()
    alone = norm.norm(x_new, **options, quantize=format, block_rows=block_rows, backend="triton")
    assert torch.equal(alone[0].float(), got[1].float())
    assert torch.equal(alone[1], got[2])


@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_8_bits_of_16(format, block_rows, device):
    """A code may differ from the oracle's only where rounding was a toss-up."""
    rows = 8 if block_rows == 1 else 140
    x = draw(1, rows, 256, dtype=torch.bfloat16, device=device)
    options = {"quantize": format, "block_rows": block_rows}
    yq, scale = norm.norm(x, **options, backend="triton")
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


@pytest.mark.parametrize("block_rows", [1, 128])
def test_constant_tokens_quantise_to_zero(block_rows, device):
    x = torch.full((1, 5, 200), 2.5, device=device)
    yq, scale = norm.norm(x, quantize="int8", block_rows=block_rows, backend="triton")
    assert not yq.any()
    assert (scale == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_nan_and_inf_stay_in_their_token(kind, bad, path, device):
    x = draw(1, 3, 200, device=device)
    x[0, 1, 150] = bad
    y = norm.norm(x, kind=kind, backend="triton")
    want = norm.norm(x, kind=kind, backend="reference")
    assert torch.equal(y.isnan(), want.isnan())
    assert y[0, [0, 2]].isfinite().all()
    rows = 1 if path == "one pass" else 128
    yq, scale = norm.norm(x, kind=kind, quantize="int8", block_rows=rows, backend="triton")
    wants = norm.norm(x, kind=kind, quantize="int8", block_rows=rows, backend="reference")
    assert torch.equal(scale.isnan(), wants[1].isnan())
    assert torch.equal(yq[0, 1], wants[0][0, 1])


@pytest.mark.parametrize("format", FORMATS)
def test_empty_in_8_bits(format, device):
    for shape in ((2, 0, 64), (2, 3, 0)):
        yq, scale = norm.norm(draw(*shape, device=device), quantize=format, backend="triton")
        assert yq.shape == shape
        assert scale.shape == (shape[0] * shape[1], -(-shape[2] // 128))


def test_wide_rows_need_no_switch(device):
    x = draw(1, 2, 9000, device=device)
    close(norm.norm(x, backend="triton"), by_oracle(x), x.dtype)


def test_gradient_is_the_oracles(device):
    x, mod = draw(1, 4, 40, device=device), draw(1, 2, 40, device=device)
    grads = {}
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        norm.norm(leaf, scale=mod, shift=mod, backend=backend).square().sum().backward()
        grads[backend] = leaf.grad
    torch.testing.assert_close(grads["triton"], grads["reference"])


def test_float64_says_who_serves_it(device):
    with pytest.raises(UnsupportedArchError, match="float64 has backend='reference'"):
        norm.norm(draw(1, 2, 8, device=device).double(), backend="triton")
