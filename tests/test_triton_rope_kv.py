# SPDX-License-Identifier: Apache-2.0
"""Triton's rope_kv against the oracle in float64; its 8 bits against its own 32."""

from __future__ import annotations

import pytest
import torch

from reeltime import checks, rope_kv, sla
from reeltime.arch import UnsupportedArchError
from reeltime.rope_kv import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
PARTS = ("k", "v", "k_scale", "k_mean", "v_scale", "h", "z")


def draw(*shape, dtype=torch.float32, device="cpu", seed=7):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(dtype).to(device)


def turns(*shape, device="cpu"):
    """A table of arbitrary angles [..., D / 2, 2]."""
    angle = draw(*shape, device=device)
    return torch.stack([angle.cos(), angle.sin()], -1)


def close(got, want, name, of=rope_kv):
    error = checks.accuracy(got, want)
    assert of.TOLERANCE[name].accepts(error), error


def exact(x):
    return x.double() if isinstance(x, torch.Tensor) else x


# --- Query --------------------------------------------------------------------------------------

SHAPES = {  # heads, head_dim, tokens
    "D=8": (2, 8, 5),
    "D=6": (3, 6, 3),
    "D=96": (3, 96, 3),
    "two blocks": (2, 8, 66),
    "D=128, 5 heads": (5, 128, 2),
    "single pair": (1, 2, 1),
}


@pytest.mark.parametrize("options", ["norm and table", "norm", "table", "neither"])
@pytest.mark.parametrize("shape", SHAPES)
def test_query(shape, options, device):
    H, D, L = SHAPES[shape]
    for dtype in DTYPES if shape == "D=8" else DTYPES[1:2]:
        q = draw(2, L, H * D, dtype=dtype, device=device)
        table = turns(2, L, D // 2, device=device) if "table" in options else None
        weight = draw(H * D, dtype=dtype, device=device) if "norm" in options else None
        asked = {"num_heads": H, "sm_scale": 0.3}
        got = rope_kv.query(q, table, norm_weight=weight, **asked, backend="triton")
        want = rope_kv.query(q.double(), exact(table), norm_weight=exact(weight), **asked)
        assert got.is_contiguous()
        assert got.dtype == dtype
        close(got, want, NAMES[dtype])
        rotated, low, scale = rope_kv.query(
            q, table, norm_weight=weight, **asked, quantize="int8", backend="triton"
        )
        close(rotated, want, NAMES[dtype])
        encoded = reference.encode(rotated.float(), torch.int8)
        assert torch.equal(low, encoded[0])
        assert torch.equal(scale, encoded[1])


def outlier_heads(device):
    q = draw(1, 70, 32, device=device)
    q[..., 3::16] = 20 + 3 * q[..., 3::16]
    return q


QUERIES = {
    "outlier channels": outlier_heads,
    "constant": lambda device: torch.full((1, 3, 32), 1.625, device=device),
    "zeros": lambda device: torch.zeros(1, 66, 32, device=device),
    "one zero block": lambda device: torch.cat(
        [torch.zeros(1, 64, 32, device=device), draw(1, 2, 32, device=device)], 1
    ),
    "batch and tokens exchanged": lambda device: draw(5, 2, 32, device=device).transpose(0, 1),
    "a gap after every row": lambda device: draw(2, 10, 80, device=device)[:, ::2, :32],
    "no tokens": lambda device: draw(2, 0, 32, device=device),
    "no batch": lambda device: draw(0, 3, 32, device=device),
}


@pytest.mark.parametrize("name", QUERIES)
def test_adversarial_queries(name, device):
    q = QUERIES[name](device)
    table, weight = turns(3, q.shape[1], 8, device=device), draw(32, device=device)
    options = {"num_heads": 2, "norm_weight": weight}
    want = rope_kv.query(q.double(), table.double(), num_heads=2, norm_weight=weight.double())
    close(rope_kv.query(q, table, **options, backend="triton"), want, "float32")
    got = rope_kv.query(q, table, **options, quantize="int8", backend="triton")
    close(got[0], want, "float32")
    encoded = reference.encode(got[0], torch.int8)
    assert torch.equal(got[1], encoded[0])
    assert torch.equal(got[2], encoded[1])


@pytest.mark.parametrize("table", ["float64", "pairs apart", "one for all offsets"])
def test_tables(table, device):
    q, turn = draw(1, 5, 32, device=device), turns(2, 5, 8, device=device)
    given = {
        "float64": turn.double(),
        "pairs apart": turn.transpose(2, 3).contiguous().transpose(2, 3),
        "one for all offsets": turn[:1].expand(2, -1, -1, -1),
    }[table]
    for quantize in (None, "int8"):
        got = rope_kv.query(q, given, num_heads=2, quantize=quantize, backend="triton")
        got = got if quantize is None else got[0]
        want = rope_kv.query(q.double(), given.contiguous().double(), num_heads=2)
        close(got, want, "float32")


def test_row_wider_than_a_program(device, monkeypatch):
    from reeltime.rope_kv import triton

    monkeypatch.setattr(triton, "WHOLE", 64)
    q, weight = draw(2, 3, 144, device=device), draw(144, device=device)
    table = turns(2, 3, 12, device=device)
    got = rope_kv.query(q, table, num_heads=6, norm_weight=weight, backend="triton")
    want = rope_kv.query(q.double(), table.double(), num_heads=6, norm_weight=weight.double())
    close(got, want, "float32")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_token_and_block(bad, device):
    q, table = draw(1, 70, 32, device=device), turns(1, 70, 8, device=device)
    q[0, 66, 3] = bad
    got = rope_kv.query(q, table, num_heads=2, quantize="int8", backend="triton")
    want = rope_kv.query(q, table, num_heads=2, quantize="int8", backend="reference")
    assert torch.equal(got[0].isfinite(), want[0].isfinite())
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2].isnan(), want[2].isnan())


# --- Rope on cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("layout", ["dense", "slots of a ring", "heads first", "channels apart"])
def test_rope_on_cache(layout, dtype, device):
    B, T, N, H, D = 2, 2, 3, 2, 24
    raw = {
        "dense": lambda: draw(B, T, N, H, D, dtype=dtype, device=device),
        "slots of a ring": lambda: draw(B, 5, N, H, D, dtype=dtype, device=device)[:, 1:5:2],
        "heads first": lambda: draw(H, B, T, N, D, dtype=dtype, device=device).movedim(0, 3),
        "channels apart": lambda: draw(B, T, N, H, D, 2, dtype=dtype, device=device)[..., 1],
    }[layout]()
    table = turns(T * N, D // 2, device=device)
    got = rope_kv.rope_on_cache(raw, table, backend="triton")
    assert got.is_contiguous()
    close(got, rope_kv.rope_on_cache(raw.double(), table.double()), NAMES[dtype])


# --- Write --------------------------------------------------------------------------------------


def written(backend, k, v, slots, N, H, device, *, format, dtype, summaries, phi="softmax", **o):
    """A cache of 5 slots after one write; what was there before is 2."""
    D = k.shape[2] // H
    options = {"format": format, "dtype": dtype, "summaries": summaries, "phi": phi}
    cache = rope_kv.make_cache(k.shape[0], 5, N, H, D, **options, device=device)
    for part in PARTS:
        if getattr(cache, part) is not None:
            getattr(cache, part).copy_(torch.tensor(2.0))
    rope_kv.write(k, v, cache, slots, num_heads=H, backend=backend, **o)
    return cache


def blocks_of(x, N):
    return x.unflatten(1, (-1, N))


CACHES = {
    "plain float32": ("plain", torch.float32, "block"),
    "plain bfloat16": ("plain", torch.bfloat16, "block"),
    "plain, no summaries": ("plain", torch.float32, None),
    "int8, v fp8": ("int8", None, "block"),
    "int8, v fp16": ("int8", torch.float16, "block"),
    "int8, no summaries": ("int8", None, None),
    "int8, summaries of slots": ("int8", None, "slot"),
}
WRITES = {  # tokens of a slot, heads, head_dim
    "N=1": (1, 3, 8),
    "N=64": (64, 2, 24),
    "N=70, 3 heads": (70, 3, 24),
    "D=96": (5, 2, 96),
}


def check_write(cache, keys, values, slots, phi="softmax", mine=None):
    """Every part of a cache against its definition; `keys` and `values` [B, F, N, H, D] exact."""
    int8, N = cache.format == "int8", keys.shape[2]
    own = {p: None if (t := getattr(cache, p)) is None else of(t, slots) for p in PARTS}
    if not int8:
        close(own["k"], keys, str(cache.k.dtype).removeprefix("torch."))
        assert torch.equal(own["v"].double(), values.to(cache.v.dtype).double())
    else:
        mean = reference.per_token(own["k_mean"].float(), N, -3)
        k_int8, k_scale = reference.encode(mine - mean, torch.int8)
        assert torch.equal(own["k"], k_int8)
        assert torch.equal(own["k_scale"], k_scale)
        low, v_scale = reference.encode_values(values.float(), cache.v.dtype)
        assert torch.equal(own["v"].float(), low.float())
        assert torch.equal(own["v_scale"], v_scale)
    if cache.k_mean is not None:
        name = str(cache.k_mean.dtype).removeprefix("torch.")
        close(own["k_mean"], reference.block_mean(keys), name)
    if cache.h is not None:
        h, z = reference.summaries(keys, values, phi)
        if cache.h.shape[2] == 1:
            h, z = h.sum(2, keepdim=True), z.sum(2, keepdim=True)
        close(own["h"], h, "float32", of=sla)
        close(own["z"], z, "float32")


def of(part, slots):
    """Its slots, in the order they were written."""
    return (
        part.view(torch.uint8)[:, slots].view(part.dtype) if part.itemsize == 1 else part[:, slots]
    )


@pytest.mark.parametrize("shape", WRITES)
@pytest.mark.parametrize("kind", CACHES)
def test_write(kind, shape, device):
    N, H, D = WRITES[shape]
    format, dtype, summaries = CACHES[kind]
    slots = torch.tensor([3, 1], device=device)
    k, v = (draw(2, 2 * N, H * D, dtype=torch.bfloat16, device=device, seed=s) for s in (1, 2))
    v.view(2, 2 * N, H, D)[..., 0, 1] = 0.0
    options = {"norm_weight": draw(H * D, device=device), "table": turns(2 * N, D // 2).to(device)}
    cache = written(
        "triton", k, v, slots, N, H, device, format=format, dtype=dtype, summaries=summaries,
        **options,
    )  # fmt: skip
    plain = {"format": "plain", "dtype": torch.float32, "summaries": None}
    mine = written("triton", k, v, slots, N, H, device, **plain, **options)
    heads = reference.heads_of(k.double(), options["norm_weight"].double(), H, 1e-6)
    keys = blocks_of(reference.rotate(heads, options["table"].double()), N)
    values = blocks_of(v.double().unflatten(2, (H, D)), N)
    check_write(cache, keys, values, slots, mine=of(mine.k, slots))
    for part in PARTS:  # slots that were not asked for are as they were
        if getattr(cache, part) is not None:
            others = torch.tensor([0, 2, 4], device=device)
            assert (of(getattr(cache, part), others).float() == 2).all(), part


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("phi", rope_kv.api.PHI)
def test_summaries_of_every_feature_map(phi, dtype, device):
    k, v = (draw(1, 70, 48, dtype=dtype, device=device, seed=s) for s in (1, 2))
    slots = torch.tensor([0], device=device)
    options = {"format": "plain", "dtype": torch.float32, "summaries": "block", "phi": phi}
    cache = written("triton", k, v, slots, 70, 3, device, **options)
    keys, values = (blocks_of(x.double().unflatten(2, (3, 16)), 70) for x in (k, v))
    check_write(cache, keys, values, slots, phi=phi)


def test_summaries_of_a_slot_replace_what_it_held(device):
    """Ten blocks, the last of them ragged; what was written before leaves no trace."""
    k, v = (draw(2, 1160, 16, device=device, seed=s) for s in (1, 2))
    slots = torch.tensor([3, 1], device=device)
    options = {"format": "plain", "dtype": torch.float32, "summaries": "slot"}
    cache = written("triton", k, v, slots, 580, 2, device, **options)
    keys, values = (blocks_of(x.double().unflatten(2, (2, 8)), 580) for x in (k, v))
    check_write(cache, keys, values, slots)
    assert (cache.h[:, [0, 2, 4]] == 2).all()
    rope_kv.write(1e6 * v, k, cache, slots.flip(0), num_heads=2, backend="triton")
    rope_kv.write(k, v, cache, slots, num_heads=2, backend="triton")
    fresh = written("triton", k, v, slots, 580, 2, device, **options)
    assert torch.equal(cache.h, fresh.h)
    assert torch.equal(cache.z, fresh.z)


def outliers(device):
    k = draw(1, 70, 32, device=device)
    k[..., 3::16] = 20 + 3 * k[..., 3::16]
    return k


KEYS = {
    "outlier channels": outliers,
    "constant": lambda device: torch.full((1, 70, 32), 1.625, device=device),
    "zeros": lambda device: torch.zeros(1, 70, 32, device=device),
    "strided": lambda device: draw(70, 1, 80, device=device).transpose(0, 1)[..., :32],
}


@pytest.mark.parametrize("name", KEYS)
def test_adversarial_keys(name, device):
    k, slots = KEYS[name](device), torch.tensor([2], device=device)
    cache = written(
        "triton", k, k, slots, 70, 2, device, format="int8", dtype=None, summaries="block"
    )
    keys = blocks_of(k.double().unflatten(2, (2, 16)), 70)
    check_write(cache, keys, keys, slots, mine=keys.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["plain", "int8"])
def test_nan_and_inf_stay_in_their_block(format, bad, device):
    k, v = (draw(1, 70, 32, device=device, seed=s) for s in (1, 2))
    k[0, 3, 5] = bad
    v[0, 67, 20] = bad
    slots = torch.tensor([2], device=device)
    dtype, summaries = (torch.float32, "block") if format == "plain" else (None, "slot")
    options = {"format": format, "dtype": dtype, "summaries": summaries}
    got, want = (
        written(backend, k, v, slots, 70, 2, device, **options)
        for backend in ("triton", "reference")
    )
    for part in PARTS:
        mine, oracle = getattr(got, part), getattr(want, part)
        if mine is not None:
            assert torch.equal(mine.float().isfinite(), oracle.float().isfinite()), part
    if format == "int8":
        assert torch.equal(got.k, want.k)
        assert torch.equal(got.v.float(), want.v.float())


@pytest.mark.parametrize("N, summaries", [(3, "block"), (65, "slot")])
def test_slot_out_of_range_is_not_written(N, summaries, device):
    """A GPU cannot look at slots without waiting: it leaves such frames out."""
    k, slots = draw(1, 3 * N, 16, device=device), torch.tensor([5, 1, -1], device=device)
    options = {"format": "int8", "dtype": None, "summaries": summaries}
    cache = written("triton", k, k, slots, N, 2, device, **options)
    second = k[:, N : 2 * N]
    alone = written("triton", second, second, slots[1:2], N, 2, device, **options)
    for part in PARTS:
        assert torch.equal(getattr(cache, part).float(), getattr(alone, part).float()), part


def test_write_of_no_frames(device):
    k, slots = draw(1, 0, 16, device=device), torch.empty(0, dtype=torch.int64, device=device)
    cache = written(
        "triton", k, k, slots, 3, 2, device, format="plain", dtype=None, summaries="block"
    )
    assert (cache.k == 2).all()


# --- Refusals -----------------------------------------------------------------------------------


def transposed(cache):
    cache.k = cache.k.transpose(2, 3).contiguous().transpose(2, 3)
    return cache


def test_refusals_say_who_serves_it(device):
    q, slots = draw(1, 4, 16, device=device), torch.tensor([0], device=device)
    small = {"device": device}
    writes = {
        "float64 has backend='reference'": rope_kv.make_cache(
            1, 1, 4, 2, 8, dtype=torch.float64, **small
        ),
        "backend='reference' writes any other": transposed(
            rope_kv.make_cache(1, 1, 4, 2, 8, **small)
        ),
    }
    for message, cache in writes.items():
        with pytest.raises(UnsupportedArchError, match=message):
            rope_kv.write(q, q, cache, slots, num_heads=2, backend="triton")
    with pytest.raises(UnsupportedArchError, match="float64 has backend='reference'"):
        rope_kv.query(q.double(), None, num_heads=2, backend="triton")
