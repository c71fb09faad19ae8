# SPDX-License-Identifier: Apache-2.0
"""Triton's attention against the oracle in float64: plain tensors, 8 bits, cached segments."""

from __future__ import annotations

import functools

import pytest
import torch

from reeltime import arch, checks, rope_kv
from reeltime.attention import TOLERANCE, attention, segment_attention
from reeltime.attention import triton as kernels
from reeltime.attention.reference import STORED, rounded, rounded_values
from reeltime.attention.triton_encode import encode, sequence_mean

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@pytest.fixture(params=["sm80", "sm89", "sm100"])
def card(request, monkeypatch, device):
    """Each way to multiply values: fp16, fp16 summed in fp16, e4m3."""
    if device.type == "cpu":
        row = next(row for row in arch.ARCHS if row.name == request.param)
        monkeypatch.setattr(kernels, "arch_of", lambda _: row)
    elif request.param != "sm80":
        pytest.skip("a GPU has its own way")
    return request.param


def draw(kind, name, *shape, seed=0):
    """[B, S, H, D] with the adversity of `kind` in tensor `name`."""
    g = torch.Generator().manual_seed(seed + 17 * ord(name))
    x = torch.randn(shape, generator=g)
    if kind == "outlier channels" and name != "q":
        x[..., 3::16] = 20 + 3 * x[..., 3::16]
    if kind == "constant":
        x = (16 * x[:, :1]).round().div(16).expand(shape).clone()
    if kind == "zero block":
        x[:, :64] = 0.0
    if kind == "zeros":
        x.zero_()
    if kind == "large scores" and name != "v":
        x *= 8.0
    return x


def qkv(kind, S_q, S_kv, *, B=1, H=2, H_kv=None, D=64, E=None, dtype=torch.float32, device="cpu"):
    H_kv = H_kv or H
    q = draw(kind, "q", B, S_q, H, D)
    k, v = draw(kind, "k", B, S_kv, H_kv, D), draw(kind, "v", B, S_kv, H_kv, E or D)
    return tuple(x.to(dtype).to(device) for x in (q, k, v))


def wide(*tensors):
    return tuple(x.double() for x in tensors)


def assert_close(got, want, format):
    """out and lse: dtype, strides, what is finite, and distance from float64."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.stride() == torch.empty(theirs.shape).stride()
        error = checks.accuracy(ours, theirs)
        assert TOLERANCE[format].accepts(error), (format, error)


# --- Plain tensors, full precision --------------------------------------------------------------

LENGTHS = [(1, 1), (1, 130), (70, 7), (130, 200), (64, 128)]


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_plain_is_the_oracle(lengths, format, device):
    q, k, v = qkv("normal", *lengths, dtype=DTYPES[format], device=device)
    got = attention(q, k, v, return_lse=True, backend="triton")
    assert got[0].dtype == q.dtype
    assert got[1].dtype == torch.float32
    assert_close(got, attention(*wide(q, k, v), return_lse=True), format)
    alone = attention(q, k, v, backend="triton")
    assert torch.equal(alone, got[0])


@pytest.mark.parametrize("kind", ["outlier channels", "constant", "zeros", "large scores"])
def test_plain_on_adversarial_inputs(kind, device):
    q, k, v = qkv(kind, 33, 140, device=device)
    got = attention(q, k, v, return_lse=True, backend="triton")
    want = attention(*wide(q, k, v), return_lse=True)
    # A score of 1000 has an ulp of 6e-5 in float32, for the reference as for the kernel.
    format = "float16" if kind in ("outlier channels", "large scores") else "float32"
    assert_close(got, want, format)


@pytest.mark.parametrize("D, E", [(8, 8), (40, 64), (64, 24), (96, 96), (128, 128), (256, 32)])
def test_head_dimensions(D, E, device):
    q, k, v = qkv("normal", 17, 80, D=D, E=E, dtype=torch.float16, device=device)
    got = attention(q, k, v, return_lse=True, backend="triton")
    assert_close(got, attention(*wide(q, k, v), return_lse=True), "float16")


@pytest.mark.parametrize("H_kv", [4, 2, 1], ids="H_kv={}".format)
@pytest.mark.parametrize("qk, pv", [(None, None), ("int8", "fp16")])
def test_grouped_heads(H_kv, qk, pv, device):
    q, k, v = qkv("normal", 20, 70, B=2, H=4, H_kv=H_kv, D=16, device=device)
    got = attention(q, k, v, qk=qk, pv=pv, return_lse=True, backend="triton")
    want = attention(*wide(q, k, v), return_lse=True)
    assert_close(got, want, "int8" if qk else "float32")


@pytest.mark.parametrize("qk", [None, "int8"])
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(150, 150), (130, 70), (70, 200), (1, 65)], ids=str)
def test_causal(lengths, causal, qk, device):
    q, k, v = qkv("normal", *lengths, H=1, D=32, device=device)
    got = attention(q, k, v, causal=causal, qk=qk, return_lse=True, backend="triton")
    want = attention(*wide(q, k, v), causal=causal, qk=qk, return_lse=True)
    assert_close(got, want, "bfloat16" if qk else "float32")


def masks(kind, shape, device):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=g)
    if kind == "bool":
        mask = x > -0.5
        mask[..., :1, :] = False
    else:
        mask = x.masked_fill(x < -1, -torch.inf)
    return mask.to(device)


SHAPES = [(1, 140), (66, 1), (2, 1, 66, 140), (3, 1, 140), (2, 3, 66, 140)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_broadcast(shape, kind, device):
    q, k, v = qkv("normal", 66, 140, B=2, H=3, D=16, device=device)
    mask = masks(kind, shape, device)
    got = attention(q, k, v, mask=mask, return_lse=True, backend="triton")
    assert_close(got, attention(*wide(q, k, v), mask=mask, return_lse=True), "float32")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mask_meets_causal_and_8_bits(dtype, device):
    q, k, v = qkv("normal", 70, 90, D=32, dtype=dtype, device=device)
    mask = masks("additive", (70, 90), device).to(dtype)
    options = {"mask": mask, "causal": True, "return_lse": True}
    got = attention(q, k, v, qk="int8", backend="triton", **options)
    assert_close(got, attention(*wide(q, k, v), **options), "int8")


def test_a_mask_of_the_most_negative_number_is_finite(device):
    """All keys equally hidden is all keys equally seen, as softmax has it."""
    q, k, v = qkv("normal", 3, 40, D=16, device=device)
    mask = torch.full((3, 40), torch.finfo(torch.float32).min, device=device)
    got = attention(q, k, v, mask=mask, backend="triton")
    assert_close([got], [attention(q, k, v, mask=mask, backend="reference")], "float32")


def test_strided_views(device):
    """Head-major storage, fused projections, broadcast batches."""
    q, k, v = qkv("normal", 40, 70, B=2, H=3, D=16, device=device)
    fused = torch.stack([k, v, k], 3)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = fused[:, :, :, 0], fused[:, :, :, 1][:1].expand(2, -1, -1, -1)
    for qk, pv in ((None, None), ("int8", "fp16")):
        got = attention(q, k, v, qk=qk, pv=pv, return_lse=True, backend="triton")
        want = attention(*wide(q, k, v), return_lse=True)
        assert_close(got, want, "int8" if qk else "float32")


@pytest.mark.parametrize("qk, pv", [(None, None), ("int8", "fp8")])
def test_empty_inputs(qk, pv, device):
    options = {"qk": qk, "pv": pv, "return_lse": True, "backend": "triton"}
    out, lse = attention(*qkv("normal", 3, 0, device=device), **options)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert attention(*qkv("normal", 0, 4, device=device), **options)[0].shape == (1, 0, 2, 64)
    assert attention(*qkv("normal", 2, 3, B=0, device=device), **options)[0].shape == (0, 2, 2, 64)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_goes_where_the_docstring_says(which, value, device):
    tensors = dict(zip("qkv", qkv("normal", 5, 70, D=16, device=device), strict=True))
    tensors[which][0, 1, 1, 3] = value
    for qk, pv in ((None, None), ("int8", "fp16"), ("fp8", "fp8")):
        got = attention(*tensors.values(), qk=qk, pv=pv, backend="triton")
        want = attention(*tensors.values(), qk=qk, pv=pv, backend="reference")
        assert torch.equal(got.isnan(), want.isnan())


# --- Plain tensors, 8 bits ----------------------------------------------------------------------

KINDS = ["normal", "outlier channels", "constant", "zero block", "zeros"]
RECIPES = [("int8", "fp8", "block"), ("int8", None, "sequence"), ("fp8", "fp8", "sequence")]
RECIPES += [("fp8", None, "block"), ("int8", "fp16", None), (None, "fp8", None)]


def tolerance_of(*formats):
    return "fp8" if "fp8" in formats else "int8"


def check_8_bits(qk, pv, smooth, kind, device, E=32):
    q, k, v = qkv(kind, 70, 150, H=1, D=32, E=E, device=device)
    options = {"qk": qk, "pv": pv, "smooth": smooth, "return_lse": True}
    got = attention(q, k, v, backend="triton", **options)
    if smooth is not None or kind != "outlier channels":  # which cost what they cost
        assert_close(got, attention(*wide(q, k, v), return_lse=True), tolerance_of(qk, pv))
    # Closer still to the oracle that rounds as the kernel does.
    near = attention(q, k, v, backend="reference", **options)
    assert checks.accuracy(got[0], near[0]).relative_l1 < (2e-3 if pv != "fp8" else 0.04)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk, pv, smooth", RECIPES, ids=str)
def test_8_bits_stay_within_tolerance(qk, pv, smooth, kind, device):
    check_8_bits(qk, pv, smooth, kind, device)


@pytest.mark.parametrize("kind", ["normal", "constant", "outlier channels"])
@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_values_on_every_card(pv, kind, card, device):
    check_8_bits("int8", pv, "block", kind, device, E=72)  # two halves, the second ragged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_8_bits_of_16(dtype, device):
    q, k, v = qkv("outlier channels", 70, 150, D=40, dtype=dtype, device=device)
    for smooth in ("block", "sequence"):
        options = {"qk": "int8", "pv": "fp16", "smooth": smooth, "return_lse": True}
        got = attention(q, k, v, backend="triton", **options)
        assert_close(got, attention(*wide(q, k, v), return_lse=True), "int8")


@pytest.mark.parametrize("smooth", [None, "block", "sequence"])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_operands_are_the_oracles(format, smooth, device):
    """What the kernel rounds to is what the reference rounds to, token by token."""
    _, k, v = qkv("outlier channels", 1, 150, H=3, D=24, device=device)
    mean, whole = None, torch.zeros_like(k)
    if smooth == "block":
        mean = k.new_empty((1, 3, 3, 24))
    elif smooth == "sequence":
        mean = sequence_mean(k)
        torch.testing.assert_close(mean, k.mean(1), rtol=1e-6, atol=1e-6)
        whole = mean.unsqueeze(1)
    low, scale = encode(k, STORED[format], mean)
    if smooth == "block":
        torch.testing.assert_close(mean, rope_kv.reference.block_mean(k), rtol=1e-6, atol=1e-6)
        whole = rope_kv.reference.per_token(mean, 150, -3)
    token = torch.arange(150, device=device) // 64
    got = low.float() * scale[:, token].unsqueeze(-1)
    assert torch.equal(got, rounded(k - whole, format))
    low, scale = encode(v, STORED[format], None, per_channel=True)
    if format == "fp8":
        assert torch.equal(low.float() * scale[:, token], rounded_values(v, format))


def test_the_mean_is_subtracted_as_it_is_stored(device):
    """q.(k - mu) + q.mu is exact for a mu of 16 bits, too."""
    _, k, _ = qkv("outlier channels", 1, 100, dtype=torch.bfloat16, device=device)
    mean = k.new_empty((1, 2, 2, 64))
    low, scale = encode(k, torch.int8, mean)
    token = torch.arange(100, device=device) // 64
    want = rounded(k.float() - mean[:, token].float(), "int8")
    assert torch.equal(low.float() * scale[:, token].unsqueeze(-1), want)


def test_a_row_that_sees_nothing_is_zero_whatever_the_values_hold(device):
    q, k, v = qkv("normal", 5, 70, D=16, device=device)
    v[0, 3] = torch.nan
    mask = torch.arange(5, device=device).unsqueeze(1) != 2
    out, lse = attention(q, k, v, mask=mask, return_lse=True, backend="triton")
    assert not out[:, 2].any()
    assert (lse[..., 2] == -torch.inf).all()
    assert out[:, [0, 1, 3, 4]].isnan().all()


# --- Cached segments ----------------------------------------------------------------------------


@functools.cache
def stored(N, format, dtype, D, B=1, H=2, slots=6):
    """A cache written by the reference, as it is before any test touches it."""
    g = torch.Generator().manual_seed(N + D)
    cache = rope_kv.make_cache(B, slots, N, H, D, format=format, dtype=dtype)
    k, v = (torch.randn(B, slots * N, H * D, generator=g) for _ in range(2))
    k[..., 5::16] += 6.0
    rope_kv.write(k, v, cache, torch.randperm(slots, generator=g), num_heads=H, backend="reference")
    return cache


PARTS = ("k", "v", "k_scale", "k_mean", "v_scale")


def filled(N, format="int8", dtype=None, *, named=(), D=32, device="cpu", **sizes):
    """That cache with every slot that is not named poisoned."""
    source = stored(N, format, dtype, D, **sizes)
    parts = {}
    for name in PARTS:
        part = getattr(source, name)
        if part is not None:
            part = part.clone().to(device)
            for slot in set(range(part.shape[1])) - set(named):
                part[:, slot] = 100 if part.dtype == torch.int8 else torch.nan
        parts[name] = part
    return rope_kv.KVCache(parts["k"], parts["v"], format, **{n: parts[n] for n in PARTS[2:]})


def query(L, *, O=2, B=1, H=2, D=32, dtype=torch.float32, device="cpu"):  # noqa: E741
    g = torch.Generator().manual_seed(L)
    return torch.randn(O, B, L, H, D, generator=g).to(dtype).to(device)


LISTS = {
    "all in ring order": ([4, 5, 0, 1, 2, 3], [1, 0, 0, 0, 0, 0]),
    "absent": ([-1, 3, -1, 1], [0, 0, 1, 1]),
    "absent last": ([5, 2, -1], [1, 0, 0]),
    "one": ([-1, -1, 2, -1], [1, 1, 1, 1]),
    "twice": ([2, 2, 4], [0, 1, 1]),
}
STORES = [("int8", None), ("int8", torch.float16), ("plain", torch.float32)]
STORES += [("plain", torch.bfloat16), ("plain", torch.float16)]


def lists(name, device):
    table, offsets = LISTS[name]
    return torch.tensor(table, device=device), torch.tensor(offsets, device=device)


def agree(got, want, q, cache):
    """Against the oracle on the same 8 bits: what is left is the rounding of p and of q.mu."""
    format = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    dtypes = {q.dtype, cache.v.dtype} if cache.format == "plain" else {q.dtype, torch.float16}
    narrow = [d for d in (torch.bfloat16, torch.float16) if d in dtypes]
    assert_close(got, want, format[narrow[0]] if narrow else "float32")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("format, dtype", STORES, ids=str)
def test_segments_are_the_oracle(format, dtype, name, device):
    table, offsets = lists(name, device)
    named = {slot for slot in table.tolist() if slot >= 0}
    batch = 2 if name == "absent" else 1
    cache = filled(70, format, dtype, named=named, device=device, B=batch)
    q = query(67, B=batch, device=device)
    got = segment_attention(q, cache, table, offsets, return_lse=True, backend="triton")
    want = segment_attention(q, cache, table, offsets, return_lse=True, backend="reference")
    agree(got, want, q, cache)


@pytest.mark.parametrize("N", [1, 63, 64, 128, 200], ids="N={}".format)
@pytest.mark.parametrize("L", [1, 64, 130], ids="L={}".format)
def test_segments_of_any_length(L, N, device):
    table, offsets = lists("absent", device)
    cache = filled(N, named={1, 3}, device=device)
    q = query(L, device=device)
    got = segment_attention(q, cache, table, offsets, return_lse=True, backend="triton")
    want = segment_attention(q, cache, table, offsets, return_lse=True, backend="reference")
    agree(got, want, q, cache)


def test_a_segment_of_more_than_sixteen_blocks(device):
    """The product q.mu is made sixteen blocks at a time."""
    cache = filled(64 * 17 + 3, named={1, 3}, device=device, H=1, slots=4)
    q, (table, offsets) = query(20, H=1, device=device), lists("absent", device)
    got = segment_attention(q, cache, table, offsets, return_lse=True, backend="triton")
    want = segment_attention(q, cache, table, offsets, return_lse=True, backend="reference")
    agree(got, want, q, cache)


def check_query(format, stored_as, dtype, device):
    table, offsets = lists("absent last", device)
    cache = filled(100, format, stored_as, named={2, 5}, device=device)
    q = query(66, dtype=dtype, device=device)
    options = {"sm_scale": 0.3, "return_lse": True}
    got = segment_attention(q, cache, table, offsets, backend="triton", **options)
    return got, segment_attention(q, cache, table, offsets, backend="reference", **options), cache


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format, stored_as", STORES[:4], ids=str)
def test_queries_of_every_dtype(format, stored_as, dtype, device):
    got, want, cache = check_query(format, stored_as, dtype, device)
    agree(got, want, got[0], cache)


def test_cached_values_on_every_card(card, device):
    got, want, cache = check_query("int8", None, torch.bfloat16, device)
    if card == "sm100":
        assert_close(got, want, "fp8")
    else:
        agree(got, want, got[0], cache)


def test_a_given_int8_query(device):
    table, offsets = lists("absent", device)
    cache = filled(70, named=(1, 3), device=device)
    raw = query(130, O=1, device=device)[0].flatten(2)
    angle = torch.rand(2, 130, 16, generator=torch.Generator().manual_seed(0)).to(device)
    turn = torch.stack([angle.cos(), angle.sin()], -1)
    rotated, q_int8, q_scale = rope_kv.query(
        raw, turn, num_heads=2, quantize="int8", backend="reference"
    )
    given = {"q_int8": q_int8, "q_scale": q_scale}
    alone = segment_attention(rotated, cache, table, offsets, backend="triton")
    got = segment_attention(rotated, cache, table, offsets, backend="triton", **given)
    assert torch.equal(alone, got)
    want = segment_attention(rotated, cache, table, offsets, backend="reference", **given)
    agree([got], [want], rotated, cache)
    doubled = given | {"q_scale": q_scale * 2}
    want = segment_attention(rotated, cache, table, offsets, backend="reference", **doubled)
    got = segment_attention(rotated, cache, table, offsets, backend="triton", **doubled)
    agree([got], [want], rotated, cache)


@pytest.mark.parametrize("format", ["plain", "int8"])
@pytest.mark.parametrize("table", [[-1, -1], []], ids=str)
def test_no_slot_at_all_gives_zeros(table, format, device):
    cache = filled(6, format, torch.float16, device=device)
    table = torch.tensor(table, dtype=torch.int64, device=device)
    offsets = torch.zeros_like(table)
    q = query(12, device=device)
    out, lse = segment_attention(q, cache, table, offsets, return_lse=True, backend="triton")
    assert out.shape == q.shape[1:]
    assert not out.any()
    assert lse.shape == (1, 2, 12)
    assert (lse == -torch.inf).all()


def test_views_of_a_cache(device):
    """A cache of every second slot, and a query whose last dimension is not dense."""
    cache, (table, offsets) = filled(70, named=range(6), device=device), lists("absent", device)
    doubled = {n: torch.stack([getattr(cache, n)] * 2, 2).flatten(1, 2)[:, ::2] for n in PARTS}
    view = rope_kv.KVCache(doubled["k"], doubled["v"], "int8", **{n: doubled[n] for n in PARTS[2:]})
    q = query(20, device=device)
    want = segment_attention(q, cache, table, offsets, backend="triton")
    wide_q = torch.stack([q, q], -1)[..., 0]
    assert torch.equal(segment_attention(wide_q, view, table, offsets, backend="triton"), want)


def test_nan_in_the_cache_reaches_the_rows_that_see_it(device):
    cache, (table, offsets) = filled(70, named=range(6), device=device), lists("one", device)
    for part in ("k_scale", "v_scale", "k_mean"):
        before = getattr(cache, part).clone()
        getattr(cache, part)[0, 2, 1, 1] = torch.nan
        q = query(5, device=device)
        got = segment_attention(q, cache, table, offsets, backend="triton")
        want = segment_attention(q, cache, table, offsets, backend="reference")
        assert want.isnan().any()
        assert torch.equal(got.isnan(), want.isnan())
        getattr(cache, part).copy_(before)


# --- Who cannot be served -----------------------------------------------------------------------


def test_float64_says_who_serves_it(device):
    q, k, v = qkv("normal", 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(arch.UnsupportedArchError, match="float64 has backend='reference'"):
        attention(q, k, v, backend="triton")
    cache = rope_kv.make_cache(1, 2, 3, 2, 64, dtype=torch.float64, device=device)
    where = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(arch.UnsupportedArchError, match="float64 has backend='reference'"):
        segment_attention(q.unsqueeze(0), cache, where, where, backend="triton")


@pytest.mark.parametrize("options", [{"qk": "fp8"}, {"pv": "fp8"}], ids=str)
def test_fp8_before_sm89_says_who_serves_it(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    names = ("mask", "sm_scale", "causal", "qk", "pv", "smooth", "want_lse")
    given = dict.fromkeys(names) | options
    q = torch.empty(1, 1, 1, 16)
    refuses = kernels.api.ATTENTION.unless["triton"]
    why = refuses(torch.device("cuda"), q, q, q, *given.values())
    assert "needs sm89 or newer" in why
    assert "reference" in why
    assert refuses(torch.device("cpu"), q, q, q, *given.values()) is None
