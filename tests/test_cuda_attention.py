# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of attention for sm80 and all that follow it, their own source on the emulator: the
8-bit operands bit for bit, attention against float64 on the same operands."""

from __future__ import annotations

import functools
import math
import re
import shutil
from unittest import mock

import emulate
import parameters
import pytest
import torch
import torch.nn.functional as F
from device_build import device_builds, needs_nvcc
from emulated import emulated

from reeltime import checks, native, rope_kv
from reeltime.arch import ARCHS, UnsupportedArchError
from reeltime.attention import TOLERANCE, attention, cuda, segment_attention
from reeltime.attention.reference import STORED
from reeltime.rope_kv import reference
from reeltime.sla import reference as sla

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
VALUES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
BITS = {"float32": 24, "bfloat16": 8, "float16": 11}
SMOOTH = (None, "block", "sequence")


# Some of the file's kernels, in part of the time: those of up to 64 channels with INT8 scores.
SMALL = (
    (
        "  if (channels <= 128) return launch_attention<Config<128, K, V>>(p, stream);\n"
        "  return launch_attention<Config<256, K, V>>(p, stream);",
        "  return cudaErrorInvalidValue;",
    ),
    (
        "  if (channels <= 128) return attend_sm80::launch_encode<16>(p, stream);\n"
        "  return attend_sm80::launch_encode<32>(p, stream);",
        "  return cudaErrorInvalidValue;",
    ),
    ("  if (half) return attend_sm80::attend<e4m3, float16>(p, stream);\n", ""),
    (
        "  return attend_sm80::attend<e4m3, e4m3>(p, stream);\n",
        "  return cudaErrorInvalidValue;\n",
    ),
)
# Of those the ones with float16 values.
ALONE = (*SMALL, ("  if (integer) return attend_sm80::attend<int8_t, e4m3>(p, stream);\n", ""))


def draw(*shape, kind="normal", seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=g)
    if kind == "outlier channels":
        x[..., 3::16] = 20 + 3 * x[..., 3::16]
    if kind == "zero block":
        x[:, :64] = 0.0
    if kind == "constant":
        x = x[:, :1].expand(shape).clone()
    return torch.zeros(shape) if kind == "zeros" else x


def qkv(S_q, S_kv, *, B=1, H=2, H_kv=None, D=64, E=None, kind="normal", dtype=torch.float32):
    H_kv = H_kv or H
    q, k = draw(B, S_q, H, D, seed=1), draw(B, S_kv, H_kv, D, kind=kind, seed=2)
    v = draw(B, S_kv, H_kv, E or D, kind=kind, seed=3)
    return tuple(x.to(dtype) for x in (q, k, v))


def per_token(scale, tokens, dim):
    return reference.per_token(scale.double(), tokens, dim)


def scores_and_values(q, low, smooth):
    """[B, H, L, N] and [B, N, H, E] in float64 of q and what encode() made of q, k and v."""
    q_code, q_scale, k_code, k_scale, mean, v_code, v_scale = low
    L, H, N, H_kv = *q.shape[1:3], *k_code.shape[1:3]

    def wide(x):  # a head per query head
        return x.double().repeat_interleave(H // H_kv, 2)

    k = wide(k_code) * per_token(k_scale.repeat_interleave(H // H_kv, 2), N, 1).unsqueeze(-1)
    v = wide(v_code) * per_token(v_scale.repeat_interleave(H // H_kv, 2), N, 1)
    low_q = q_code.double() * per_token(q_scale, L, 1).unsqueeze(-1)
    score = torch.einsum("blhd,bnhd->bhln", low_q, k)
    if smooth is not None:
        mean = mean.unsqueeze(1) if smooth == "sequence" else mean
        shift = torch.einsum("blhd,bnhd->bhln", q.double(), wide(mean))
        score += shift if smooth == "sequence" else per_token(shift, N, -1)
    return score, v


def exact(q, low, smooth, *, seen=None, added=None, sm_scale=None):
    """out and lse in float64 of q and what encode() made of q, k and v."""
    score, v = scores_and_values(q, low, smooth)
    score *= q.shape[3] ** -0.5 if sm_scale is None else sm_scale
    if added is not None:
        score = score + added.double()
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bhln,bnhd->blhd", score.softmax(-1).nan_to_num(0.0), v)
    return out, score.logsumexp(-1)


def step_of(q_scale, k_scale, sm_scale, D):
    """The largest score that a product of two codes of 1 stands for."""
    q_step, k_step = (x[x.isfinite()].max().item() for x in (q_scale, k_scale))
    return q_step * k_step * (D**-0.5 if sm_scale is None else sm_scale)


def assert_near(got, want, step, dtype):
    """Probabilities lose all but 11 bits; scores of 64 keys share an error of up to 1.5 steps."""
    rounding = 2.0 ** -BITS[str(dtype).removeprefix("torch.")]
    out = checks.accuracy(got[0], want[0])
    assert out.relative_l1 < 5e-4 + rounding + 1.5 * step, (out, step)
    assert out.peak < 5e-3 + 8 * rounding + 4 * step, (out, step)
    assert torch.equal(got[1].isfinite(), want[1].isfinite())
    lse = (got[1] - want[1]).nan_to_num().abs().max() if got[1].numel() else 0.0
    assert lse < 1e-5 + 1.5 * step, (lse, step)


def check(q, k, v, pv="fp16", smooth="block", *, qk="int8", seen=None, added=None, **options):
    """Against float64 on the same codes; returns what the kernel gave."""
    got = attention(
        q, k, v, qk=qk, pv=pv, smooth=smooth, return_lse=True, backend="cuda", **options
    )
    low = cuda.encode(q, k, v, qk, pv, smooth)
    assert got[0].dtype == q.dtype
    assert got[0].is_contiguous()
    step = 0.0 if qk == "fp8" else step_of(low.q_scale, low.k_scale, None, q.shape[3])
    assert_near(got, exact(q, low, smooth, seen=seen, added=added), step, q.dtype)
    return got


# --- Operands -----------------------------------------------------------------------------------


def check_operands(q, k, v, pv, smooth, qk="int8"):
    q_code, q_scale, k_code, k_scale, mean, v_code, v_scale = cuda.encode(q, k, v, qk, pv, smooth)
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    if smooth == "block":
        assert mean.dtype == k.dtype
        want = reference.block_mean(wide_k).to(k.dtype)
        bits = BITS[str(k.dtype).removeprefix("torch.")]
        torch.testing.assert_close(mean, want, rtol=4 * 2.0**-bits, atol=1e-6, equal_nan=True)
        wide_k = wide_k - reference.per_token(mean.float(), k.shape[1], -3)
    elif smooth == "sequence":
        torch.testing.assert_close(mean, wide_k.mean(1), rtol=1e-5, atol=1e-6, equal_nan=True)
        wide_k = wide_k - mean.unsqueeze(1)
    for (code, scale), want in (
        ((q_code, q_scale), reference.encode(wide_q, STORED[qk])),
        ((k_code, k_scale), reference.encode(wide_k, STORED[qk])),
        ((v_code, v_scale), reference.encode_values(wide_v, STORED[pv])),
    ):
        torch.testing.assert_close(scale, want[1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(code.float(), want[0].float())  # -0 may have become 0


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("pv", VALUES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_operands_bit_for_bit(dtype, pv, smooth):
    with emulated("attention") as runner:
        for D, E, S, kind in (
            (64, 64, 130, "outlier channels"),
            (16, 48, 64, "zero block"),
            (128, 96, 70, "normal"),
            (256, 16, 65, "constant"),
        ):
            x = qkv(S, S + 7, B=2, H=4, H_kv=2, D=D, E=E, kind=kind, dtype=dtype)
            for qk in ("int8", "fp8"):
                check_operands(*(y.to(runner.device) for y in x), pv, smooth, qk)


def test_operands_of_long_sequences():
    """More than one partial sum."""
    with emulated("attention") as runner:
        check_operands(*(x.to(runner.device) for x in qkv(1, 2300, H=1)), "fp16", "sequence")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_operands_of_views(dtype):
    """Head-major, fused, one channel or one element off what 16 bytes are aligned to."""
    whole = draw(1, 70, 3, 200).to(dtype)
    with emulated("attention") as runner:
        whole = whole.to(runner.device)
        for view in (whole[..., 1:65], whole[..., 8:72], whole.transpose(1, 2)[:, :, :, 3:67]):
            check_operands(view, view, view, "fp16", "block")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_operands_of_blocks_that_are_not_finite(value):
    q, k, v = qkv(70, 130)
    for x in (q, k, v):
        x[0, 66, 1, 5] = value
    with emulated("attention") as runner:
        for smooth in (None, "block"):
            for qk in ("int8", "fp8"):
                check_operands(*(x.to(runner.device) for x in (q, k, v)), "fp8", smooth, qk)


# --- Plain tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("pv", VALUES)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (70, 7), (200, 300), (128, 128)], ids=str)
def test_lengths(lengths, pv):
    with emulated("attention") as runner:
        check(*qkv(*lengths), pv)
    assert runner.launches == ["encode_qkv_sm80", "attention_sm80"] + ["encode_qkv_sm80"]


@pytest.mark.parametrize("pv", VALUES)
@pytest.mark.parametrize(
    "D, E", [(16, 64), (64, 16), (96, 96), (128, 128), (144, 32), (256, 256)], ids=str
)
def test_head_dimensions(D, E, pv):
    with emulated("attention"):
        check(*qkv(40, 100, D=D, E=E), pv)


@pytest.mark.parametrize("pv", VALUES)
@pytest.mark.parametrize("sizes", [(70, 150, 16), (130, 64, 128), (20, 100, 256)], ids=str)
def test_e4m3_scores(sizes, pv):
    """Of every form that the products have; against the reference, too."""
    S_q, S_kv, D = sizes
    q, k, v = qkv(S_q, S_kv, D=D)
    with emulated("attention"):
        for smooth in SMOOTH:
            got = check(q, k, v, pv, smooth, qk="fp8")
    want = attention(q, k, v, qk="fp8", pv=pv, smooth=None, return_lse=True, backend="reference")
    for g, w in zip(got, want, strict=True):
        assert TOLERANCE["fp8"].accepts(checks.accuracy(g, w))


@pytest.mark.parametrize("kind", ["outlier channels", "zero block", "constant", "zeros"])
def test_e4m3_inputs(kind):
    seen = torch.arange(150) <= torch.arange(70).unsqueeze(1) + 80
    with emulated("attention"):
        x = qkv(70, 150, H=1, kind=kind, dtype=torch.bfloat16)
        check(*x, qk="fp8", seen=seen, causal="bottom_right")


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["normal", "outlier channels", "zero block", "constant", "zeros"])
def test_inputs(kind, dtype, smooth):
    q, k, v = qkv(70, 150, H=1, kind=kind, dtype=dtype)
    with emulated("attention"):
        got = check(q, k, v, "fp16", smooth)
    if smooth is not None or kind != "outlier channels":  # which cost what they cost
        want = attention(q.double(), k.double(), v.double(), return_lse=True)
        for g, w in zip(got, want, strict=True):
            assert TOLERANCE["int8"].accepts(checks.accuracy(g, w))


@pytest.mark.parametrize("pv", VALUES)
def test_sums_in_float16(pv):
    """As GPUs have them whose float16 sums are the faster ones."""
    edits = {"sm80.cu": [("kHalfSums = kFastHalfSums", "kHalfSums = true"), *SMALL]}
    with emulated("attention", replace=edits):
        for kind in ("normal", "constant"):  # constant: the largest sums there are
            check(*qkv(70, 150, kind=kind), pv)


@pytest.mark.parametrize("H_kv", [4, 2, 1], ids="H_kv={}".format)
def test_grouped_heads(H_kv):
    with emulated("attention"):
        check(*qkv(20, 70, B=2, H=4, H_kv=H_kv))


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(150, 150), (200, 70), (70, 300), (1, 65)], ids=str)
def test_causal(lengths, causal):
    S_q, S_kv = lengths
    shift = S_kv - S_q if causal == "bottom_right" else 0
    seen = torch.arange(S_kv) <= torch.arange(S_q).unsqueeze(1) + shift
    with emulated("attention"):
        out, lse = check(*qkv(*lengths, H=1), seen=seen, causal=causal)
    blind = ~seen.any(1)
    assert not out[:, blind].any()
    assert (lse[..., blind] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES.values()], ids=["bool", *DTYPES])
@pytest.mark.parametrize(
    "shape", [(1, 140), (66, 1), (2, 1, 66, 140), (3, 1, 140), (2, 3, 66, 140)], ids=str
)
def test_masks_broadcast(shape, dtype):
    x = draw(*shape)
    x[..., :1, :] = -5.0
    mask = x > -1 if dtype == torch.bool else x.masked_fill(x < -1, -torch.inf).to(dtype)
    options = {"seen": mask} if dtype == torch.bool else {"added": mask}
    with emulated("attention"):
        check(*qkv(66, 140, B=2, H=3, D=16), mask=mask, **options)


def test_mask_meets_causal():
    mask = draw(70, 90) > -0.5
    seen = mask & (torch.arange(90) <= torch.arange(70).unsqueeze(1) + 20)
    with emulated("attention"):
        check(*qkv(70, 90, dtype=torch.bfloat16), mask=mask, causal=True, seen=seen)


def test_a_mask_of_the_most_negative_number_is_finite():
    """All keys equally hidden is all keys equally seen, as softmax has it."""
    q, k, v = qkv(3, 40, D=16)
    mask = torch.full((3, 40), torch.finfo(torch.float32).min)
    with emulated("attention"):
        out = attention(q, k, v, mask=mask, qk="int8", pv="fp16", backend="cuda")
    assert TOLERANCE["int8"].accepts(checks.accuracy(out, attention(q, k, v, mask=mask)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(dtype):
    """Head-major storage, fused projections, broadcast batches, rows that are not aligned."""
    q, k, v = qkv(40, 70, B=2, H=3, D=16, dtype=dtype)
    fused = torch.stack([k, v, k], 3)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = fused[:, :, :, 0], fused[:, :, :, 1][:1].expand(2, -1, -1, -1)
    wide = torch.cat([q, q], -1)
    with emulated("attention"):
        check(q, k, v)
        check(wide[..., 3:19], k, v)


def test_empty():
    with emulated("attention"):
        for smooth in SMOOTH:
            options = {"qk": "int8", "pv": "fp8", "smooth": smooth, "backend": "cuda"}
            out, lse = attention(*qkv(3, 0), return_lse=True, **options)
            assert not out.any()
            assert (lse == -torch.inf).all()
            assert attention(*qkv(0, 4), **options).shape == (1, 0, 2, 64)
            assert attention(*qkv(2, 3, B=0), **options).shape == (0, 2, 2, 64)


@pytest.mark.parametrize("pv", VALUES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_goes_where_the_reference_says(value, which, pv):
    tensors = dict(zip("qkv", qkv(5, 70, D=16), strict=True))
    tensors[which][0, 1, 1, 3] = value
    for smooth in SMOOTH:
        options = {"qk": "int8", "pv": pv, "smooth": smooth, "return_lse": True}
        with emulated("attention"):
            got = attention(*tensors.values(), backend="cuda", **options)
        want = attention(*tensors.values(), backend="reference", **options)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.isnan(), w.isnan())


def test_a_row_that_sees_nothing_is_zero_whatever_the_values_hold():
    q, k, v = qkv(5, 70, D=16)
    v[0, 3] = torch.nan
    mask = torch.arange(5).unsqueeze(1) != 2
    with emulated("attention"):
        out, lse = attention(
            q, k, v, mask=mask, qk="int8", pv="fp16", return_lse=True, backend="cuda"
        )
    assert not out[:, 2].any()
    assert (lse[..., 2] == -torch.inf).all()
    assert out[:, [0, 1, 3, 4]].isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qk": None}, "qk=None with pv='fp16', which backend='triton' has"),
        ({"qk": "fp8", "pv": None}, "qk='fp8' with pv=None"),
        ({"pv": None}, "qk='int8' with pv=None, which backend='triton' has"),
        ({"D": 40}, "multiples of 16 up to 256, not 40, which backend='triton' has"),
        ({"E": 272}, "not 64 and 272"),
        ({"dtype": torch.float64}, "float64 has backend='reference'"),
        ({"B": 65536}, "up to 65535 batches and heads"),
    ],
    ids=str,
)
def test_what_is_refused(change, message):
    sizes = {"D": 64, "H": 1} | {k: v for k, v in change.items() if k not in ("qk", "pv")}
    x = qkv(1, 1, **sizes)
    options = {"qk": "int8", "pv": "fp16"} | {k: v for k, v in change.items() if k in ("qk", "pv")}
    with emulated("attention"):
        with pytest.raises(UnsupportedArchError, match=re.escape(message)):
            attention(*x, backend="cuda", **options)


@pytest.mark.parametrize(
    "sm, change, message",
    [
        ("sm80", {}, "need sm89 or newer; here backend='reference' has it"),
        ("sm86", {}, "need sm89 or newer"),
        ("sm89", {"D": 96, "E": 32, "mask": True}, None),
        ("sm90", {}, None),
        ("sm90", {"D": 96}, "take q, k and v of 64 or 128 channels"),
        ("sm90", {"D": 96}, "not 96 and 96 channels"),
        ("sm90", {"E": 128}, "not 64 and 128 channels"),
        ("sm90", {"mask": True}, "and a mask; qk='int8' and backend='triton' have more"),
        ("sm90", {"dtype": torch.float32}, "of torch.float32 with strides (256, 64, 64, 1)"),
        ("sm90", {"dtype": torch.float32, "smooth": "sequence"}, None),
        ("sm90", {"wide": 68}, "with strides (272, 68, 68, 1)"),
        ("sm90", {"wide": 72}, None),
        ("sm100", {}, "no products of e4m3 on sm100; backend='triton' has qk='fp8'"),
        ("sm120", {}, None),
    ],
    ids=str,
)
def test_who_has_products_of_e4m3(sm, change, message):
    """Asked before anything is encoded: on sm90 nothing else serves what its own file refuses."""
    D, like = change.get("D", 64), {"dtype": change.get("dtype", torch.bfloat16), "device": "meta"}
    widths = change.get("wide", D), D, change.get("E", D)
    q, k, v = (torch.empty(1, 4, 1, width, **like) for width in widths)
    x = q[..., :D], k, v
    mask = torch.ones(4, 4, device="meta") if "mask" in change else None
    options = (mask, 1.0, None, "fp8", "fp16", change.get("smooth", "block"), False)
    with native.recording(next(row for row in ARCHS if row.name == sm)):
        why = cuda.refuses(*x, *options)
        assert cuda.refuses(*x, None, 1.0, None, "int8", *options[4:]) is None
    assert why is None if message is None else message in why
    assert why is None or why.startswith("its kernels ")


# --- Cached segments ----------------------------------------------------------------------------

PARTS = ("k", "v", "k_scale", "k_mean", "v_scale")


@functools.cache
def stored(N, values, D, B, H, slots):
    """A cache written by the reference, as it is before any test touches it."""
    g = torch.Generator().manual_seed(N + D)
    cache = rope_kv.make_cache(B, slots, N, H, D, format="int8", dtype=values)
    k, v = (torch.randn(B, slots * N, H * D, generator=g) for _ in range(2))
    k[..., 5::16] += 6.0
    rope_kv.write(k, v, cache, torch.randperm(slots, generator=g), num_heads=H, backend="reference")
    return cache


def filled(N, values="fp16", *, named=(), D=32, B=1, H=2, slots=6):
    """That cache with every slot that is not named poisoned."""
    source = stored(N, VALUES[values], D, B, H, slots)
    parts = {name: getattr(source, name).clone() for name in PARTS}
    for part in parts.values():
        for slot in set(range(slots)) - set(named):
            part[:, slot] = 100 if part.dtype == torch.int8 else torch.nan
    return rope_kv.KVCache(parts["k"], parts["v"], "int8", **{n: parts[n] for n in PARTS[2:]})


def query(L, *, O=2, B=1, H=2, D=32, dtype=torch.float32):  # noqa: E741
    g = torch.Generator().manual_seed(L)
    return torch.randn(O, B, L, H, D, generator=g).to(dtype)


LISTS = {
    "all in ring order": ([4, 5, 0, 1, 2, 3], [1, 0, 0, 0, 0, 0]),
    "absent": ([-1, 3, -1, 1], [0, 0, 1, 1]),
    "absent last": ([5, 2, -1], [1, 0, 0]),
    "one": ([-1, -1, 2, -1], [1, 1, 1, 1]),
    "twice": ([2, 2, 4], [0, 1, 1]),
}


def check_segments(q, cache, table, offsets, **options):
    """Against the oracle on the same 8 bits: what is left is the rounding of p."""
    lists = torch.tensor(table, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64)
    options |= {"return_lse": True}
    got = segment_attention(q, cache, *lists, backend="cuda", **options)
    want = segment_attention(q, cache, *lists, backend="reference", **options)
    assert got[0].dtype == q.dtype
    q_scale = options.get("q_scale", q.float().abs().max() / 127)
    step = step_of(q_scale, cache.k_scale, options.get("sm_scale"), q.shape[4])
    assert_near(got, want, step, q.dtype)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("values", VALUES)
def test_segments(values, name):
    table, offsets = LISTS[name]
    batch = 2 if name == "absent" else 1
    named = {slot for slot in table if slot >= 0}
    with emulated("attention"):
        cache = filled(70, values, named=named, B=batch)
        check_segments(query(67, B=batch), cache, table, offsets)


@pytest.mark.parametrize("N", [1, 63, 64, 200], ids="N={}".format)
@pytest.mark.parametrize("L", [1, 130], ids="L={}".format)
def test_segments_of_any_length(L, N):
    with emulated("attention"):
        check_segments(query(L), filled(N, named={1, 3}), *LISTS["absent"])


def test_a_segment_of_more_than_sixteen_blocks():
    """The product q.mu is made sixteen blocks at a time."""
    with emulated("attention"):
        cache = filled(64 * 17 + 3, named={1, 3}, H=1, slots=4)
        check_segments(query(20, H=1), cache, *LISTS["absent"])


@pytest.mark.parametrize("D", [64, 128], ids="D={}".format)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_queries_of_every_dtype(dtype, D):
    """Mean keys are bfloat16 whatever the query is."""
    with emulated("attention"):
        cache = filled(100, "fp8", named={2, 5}, D=D)
        check_segments(query(66, D=D, dtype=dtype), cache, *LISTS["absent last"], sm_scale=0.3)


def test_a_given_int8_query():
    raw = query(130, O=1)[0].flatten(2)
    q, low, scale = rope_kv.query(raw, None, num_heads=2, quantize="int8", backend="reference")
    scale = scale * 1.25  # as nobody else would have made it
    with emulated("attention") as runner:
        cache = filled(70, named=(1, 3))
        check_segments(q, cache, [-1, 3, 1], [0, 0, 0], q_int8=low, q_scale=scale)
    assert runner.launches == ["attention_sm80"]


def test_slots_that_the_cache_lacks_and_lists_of_nothing():
    q, cache = query(5), filled(30, named={2})
    with emulated("attention"):
        lists = torch.tensor([2, 6, 1 << 20, -1]), torch.tensor([1, 0, 0, 0])
        got = segment_attention(q, cache, *lists, backend="cuda")
        want = segment_attention(q, cache, *(x[:1] for x in lists), backend="reference")
        assert checks.accuracy(got, want).relative_l1 < 1e-3
        for table in ([], [-1, -1]):
            lists = (torch.tensor(table, dtype=torch.int64),) * 2
            out, lse = segment_attention(q, cache, *lists, return_lse=True, backend="cuda")
            assert not out.any()
            assert (lse == -torch.inf).all()


def test_a_cache_that_is_not_aligned():
    cache = filled(40, named={0, 1, 2, 3, 4, 5})
    wide = torch.empty(1, 6, 40, 2, 33, dtype=torch.int8)
    wide[..., 1:] = cache.k
    cache.k = wide[..., 1:]
    with emulated("attention"):
        check_segments(query(5), cache, *LISTS["one"])


def test_plain_caches_are_refused():
    cache = rope_kv.make_cache(1, 2, 10, 1, 64, dtype=torch.bfloat16)
    table = torch.tensor([0, 1])
    with emulated("attention"):
        with pytest.raises(UnsupportedArchError, match="'plain' has backend='triton'"):
            segment_attention(query(3, H=1, D=64), cache, table, table, backend="cuda")


# --- Lists of blocks ----------------------------------------------------------------------------


def lists_of(chosen, paired):
    """[B, H, nQ, blocks] bool as the kernel reads it, with numbers around them that it may not."""
    indptr, indices = sla.compress(chosen, chosen.shape[3])
    if not paired:
        return cuda.Lists(indptr, indices.masked_fill(indices < 0, 0))
    bounds = torch.stack([indptr[..., :-1], indptr[..., 1:]], -1) + 1
    return cuda.Lists(bounds.contiguous(), F.pad(indices, (1, 0)).contiguous())


def segments_of(cache, q):
    code, scale = cuda.encode_query(q.flatten(0, 1))
    return cuda.Operands(code, scale, *(getattr(cache, n) for n in ("k", "k_scale", "k_mean")),
                         cache.v, cache.v_scale)  # fmt: skip


def plain(q, k, v, pv="fp16", smooth="block"):
    return cuda.encode(q, k, v, "int8", pv, smooth).as_segment()


def exact_lists(q, low, chosen, table=(0,), offsets=(0,), smooth="block"):
    """out and lse in float64, with the scores of what no list names masked."""
    offsets_of_q, _, L, _, D = q.shape
    held = low[2:]
    if low.k_scale.dim() == 3:  # of plain tensors
        held = (x if x is None or x.dim() > 4 else x.unsqueeze(1) for x in held)
    held = tuple(held)
    q_code, q_scale = low.q_code.view(q.shape), low.q_scale.unflatten(0, (offsets_of_q, -1))
    found, some = [], max(table)  # absent ones are masked, but not of NaN
    for slot, offset in zip(table, offsets, strict=True):
        mine = (x if x is None else x[:, slot if slot >= 0 else some] for x in held)
        operands = q_code[offset], q_scale[offset], *mine
        found.append(scores_and_values(q[offset], operands, smooth))
    N = low.k_code.shape[2]
    blocks = chosen.unflatten(3, (len(table), -1))
    blocks = blocks & (torch.tensor(table) >= 0).unsqueeze(1)
    rows = reference.per_token(blocks, L, 2, 128)  # [B, H, L, T, blocks of N]
    seen = reference.per_token(rows, N, 4).flatten(3)
    score = torch.cat([score for score, _ in found], -1) * D**-0.5
    score = score.masked_fill(~seen, -torch.inf)
    v = torch.cat([v for _, v in found], 1)
    out = torch.einsum("bhln,bnhd->blhd", score.softmax(-1).nan_to_num(0.0), v)
    return out, score.logsumexp(-1)


def drawn_lists(*shape, share=0.4):
    """An empty list, one of one block, one of all."""
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < share
    flat = chosen.flatten(0, 2)
    flat[0], flat[-1] = False, True
    if len(flat) > 2:
        flat[1] = torch.arange(shape[3]) == shape[3] // 2
    return chosen


def run_lists(q, low, chosen, table=None, offsets=None, paired=False, smooth="block", **options):
    if table is not None:
        options |= {"table": torch.tensor(table), "offset_index": torch.tensor(offsets)}
    if chosen is not None:
        options |= {"lists": lists_of(chosen, paired)}
    return cuda.run(q, low, sm_scale=q.shape[4] ** -0.5, smooth=smooth, want_lse=True, **options)


def check_lists(q, low, chosen, table=(0,), offsets=(0,), smooth="block", **options):
    got = run_lists(q, low, chosen, table, offsets, smooth=smooth, **options)
    want = exact_lists(q, low, chosen, table, offsets, smooth)
    step = step_of(low.q_scale, low.k_scale, None, q.shape[4])
    assert_near(got, want, step, q.dtype)
    blind = want[1] == -torch.inf
    assert not got[0].transpose(1, 2)[blind].any()
    return got


@pytest.mark.parametrize("paired", [False, True], ids=["csr", "pairs"])
@pytest.mark.parametrize("values", VALUES)
def test_lists_of_segments(values, paired):
    """Ragged queries and keys, absent entries that lists name, two offsets."""
    table, offsets = LISTS["absent"]
    with emulated("attention"):
        q = query(200, B=2)
        low = segments_of(filled(100, values, named={1, 3}, B=2), q)
        check_lists(q, low, drawn_lists(2, 2, 2, 8), table, offsets, paired=paired)


@pytest.mark.parametrize("smooth", [None, "block"])
def test_lists_of_plain_tensors(smooth):
    q, k, v = qkv(130, 64 * 9 + 5, B=2, H=4, H_kv=2, D=48, E=16, dtype=torch.bfloat16)
    with emulated("attention"):
        check_lists(q.unsqueeze(0), plain(q, k, v, "fp8", smooth), drawn_lists(2, 4, 2, 10),
                    smooth=smooth)  # fmt: skip


def test_long_lists():
    """Means are gathered sixteen at a time, across entries of one offset, until the next offset."""
    table, offsets = [4, 0, -1, 2, 3, 1], [0, 0, 0, 0, 1, 0]
    with emulated("attention"):
        q = query(20, H=1)
        low = segments_of(filled(64 * 9 + 3, named={0, 1, 2, 3, 4}, H=1), q)
        check_lists(q, low, drawn_lists(1, 1, 1, 60, share=0.5), table, offsets)
        check_lists(q, low, torch.arange(60).view(1, 1, 1, 60) % 3 > 0, table, offsets)


@pytest.mark.parametrize("D", [64, 128, 256], ids="D={}".format)
def test_all_blocks_listed_is_dense(D):
    """Bit for bit."""
    table, offsets = LISTS["absent"]
    with emulated("attention"):
        q = query(40, D=D, H=1)
        low = segments_of(filled(70, named={1, 3}, D=D, H=1), q)
        every = torch.ones(1, 1, 1, 8, dtype=torch.bool)
        for paired in (False, True):
            got = run_lists(q, low, every, table, offsets, paired)
            for g, w in zip(got, run_lists(q, low, None, table, offsets), strict=True):
                assert torch.equal(g, w)


def test_lists_that_name_what_is_not_there():
    q, k, v = qkv(5, 130, H=1)
    with emulated("attention"):
        low, every = plain(q, k, v), torch.ones(1, 1, 1, 3, dtype=torch.bool)
        want = run_lists(q.unsqueeze(0), low, every)
        bounds = torch.tensor([[[-2, 50]]], dtype=torch.int32)
        blocks = torch.tensor([[[-7, -1, 0, 1, 2, 3, 1 << 30]]], dtype=torch.int32)
        got = cuda.run(q.unsqueeze(0), low, lists=cuda.Lists(bounds, blocks), sm_scale=0.125,
                       smooth="block", want_lse=True)  # fmt: skip
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_products_left_out():
    """By permission only, and by no more than it allows."""
    q, k, v = qkv(256, 64 * 8, H=1, D=64)
    q, k[:, 64:128], k[:, 320:448] = 12 * q.unsqueeze(0), 0.1 * k[:, 64:128], 0.0
    with emulated("attention"):
        low, chosen = plain(q[0], k, v), drawn_lists(1, 1, 2, 8, share=0.8)
        want = run_lists(q, low, chosen)
        for skip in (1e6, torch.inf):
            got = run_lists(q, low, chosen, pv_skip=skip)
            assert all(map(torch.equal, got, want))
        out, lse = run_lists(q, low, chosen, pv_skip=4.0)
    assert torch.equal(lse, want[1])
    off = (out - want[0]).abs().max()
    assert 0 < off < 8 * 64 * math.exp(-4.0) * v.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_added(dtype):
    """In float32, before the one rounding; to rows that see nothing, too."""
    q, k, v = qkv(130, 100, B=2, D=16, E=48)
    added = draw(2, 130, 2, 48).to(dtype)
    with emulated("attention"):
        low, chosen = plain(q, k, v, smooth=None), drawn_lists(2, 2, 2, 2)
        for lists in (chosen, None):
            alone, _ = run_lists(q.unsqueeze(0), low, lists, smooth=None)
            got, _ = run_lists(q.to(dtype).unsqueeze(0), low, lists, smooth=None, added=added)
            assert torch.equal(got, (alone + added.float()).to(dtype))


# --- Keys split between blocks of threads -------------------------------------------------------


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_few_queries_and_many_keys(dtype, smooth):
    with emulated("attention") as runner:
        check(*qkv(20, 64 * 40 + 3, H=1, D=32, dtype=dtype), smooth=smooth)
    assert runner.launches[1:3] == ["attention_sm80", "combine_parts_sm80"]


@pytest.mark.parametrize("splits", [2, 5, 16], ids="{} splits".format)
@pytest.mark.parametrize("lengths", [(130, 300), (200, 70), (1, 65)], ids=str)
def test_causal_and_split(lengths, splits, monkeypatch):
    """Shares of nothing among them."""
    monkeypatch.setattr(cuda, "splits_of", lambda *_: splits)
    seen = torch.arange(lengths[1]) <= torch.arange(lengths[0]).unsqueeze(1) + (
        lengths[1] - lengths[0]
    )
    with emulated("attention"):
        out, lse = check(*qkv(*lengths, H=1), seen=seen, causal="bottom_right")
    blind = ~seen.any(1)
    assert not out[:, blind].any()
    assert (lse[..., blind] == -torch.inf).all()


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("splits", [2, 7], ids="{} splits".format)
def test_segments_and_split(name, splits, monkeypatch):
    monkeypatch.setattr(cuda, "splits_of", lambda *_: splits)
    table, offsets = LISTS[name]
    with emulated("attention"):
        cache = filled(64 * 17 + 3, named={t for t in table if t >= 0}, H=1)
        check_segments(query(67, H=1), cache, table, offsets)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_of_a_split(which, monkeypatch):
    monkeypatch.setattr(cuda, "splits_of", lambda *_: 3)
    tensors = dict(zip("qkv", qkv(5, 200, D=16), strict=True))
    tensors[which][0, 1, 1, 3] = torch.nan
    options = {"qk": "int8", "pv": "fp16", "return_lse": True}
    with emulated("attention"):
        got = attention(*tensors.values(), backend="cuda", **options)
    want = attention(*tensors.values(), backend="reference", **options)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isnan(), w.isnan())


def combine(part, part_lse, dtype=torch.float32, want_lse=True):
    splits, B, L, H, E = part.shape
    out, lse = part.new_full((B, L, H, E), 91.0).to(dtype), part.new_full((B, H, L), 91.0)
    fields = {"part": part, "part_lse": part_lse, "out": out, "lse": lse if want_lse else None}
    sizes = {"B": B, "L": L, "H": H, "E": E, "splits": splits}
    native.launch("combine_parts", part.device, **fields, **sizes, out_dtype=native.code(dtype))
    return out, lse


@pytest.mark.parametrize("splits", [1, 2, 7, 16], ids="{} splits".format)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_combining(dtype, splits):
    g = torch.Generator().manual_seed(splits)
    part = torch.randn(splits, 2, 37, 3, 48, generator=g)
    lse = 20 * torch.randn(splits, 2, 3, 37, generator=g)
    absent = torch.rand(lse.shape, generator=g) < 0.3
    absent[..., 5], absent[0, 0, 0, 9] = True, False
    lse[absent] = -torch.inf
    part[absent.permute(0, 1, 3, 2)] = 0.0  # as nothing attended is stored
    lse[0, 0, 0, 7], part[0, 0, 9, 0, 3] = torch.nan, torch.nan
    weight = (lse.double() - lse.double().logsumexp(0)).exp().permute(0, 1, 3, 2).unsqueeze(-1)
    want = (weight * part.double()).sum(0).masked_fill(absent.all(0).mT.unsqueeze(-1), 0.0)
    with emulated("attention"):
        out, got_lse = combine(part, lse, dtype)
        again, untouched = combine(part, lse, dtype, want_lse=False)
    bits = BITS[str(dtype).removeprefix("torch.")]
    near = {"rtol": 2.0**-bits, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(out.double(), want, **near)
    torch.testing.assert_close(got_lse, lse.logsumexp(0), rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(again.nan_to_num(), out.nan_to_num())
    assert (untouched == 91.0).all()


def test_how_many_splits():
    """None where blocks of threads fill the GPU, or keys are few; else as many as fill it."""
    assert cuda.splits_of(tiles=264, steps=1000, slots=264) == 1
    assert cuda.splits_of(tiles=10_000, steps=1000, slots=264) == 1
    assert cuda.splits_of(tiles=1, steps=0, slots=264) == cuda.splits_of(1, 4, 264) == 1
    assert cuda.splits_of(tiles=24, steps=700, slots=264) == 11
    assert cuda.splits_of(tiles=1, steps=10_000, slots=264) == 16
    counts = [cuda.splits_of(tiles, 700, 264) for tiles in (1, 16, 32, 64, 128, 264)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1 < counts[0]


# --- Schedules, sanitizers, mistakes ------------------------------------------------------------


def check_all():
    """Small, and every part once: segments, offsets, two groups of means, masks, the diagonal."""
    check_segments(query(70, D=64), filled(100, named={2, 4}, D=64), *LISTS["twice"])
    seen = torch.arange(140) <= torch.arange(130).unsqueeze(1) + 10
    check(*qkv(130, 140, H=1), smooth="sequence", causal="bottom_right", seen=seen)
    mask = draw(40, 1050) > -0.5
    check(*qkv(40, 1050, H=1), mask=mask, seen=mask)
    for D in (64, 48):
        check_operands(*qkv(70, 130, D=D, dtype=torch.bfloat16), "fp16", "block")
    check_operands(*qkv(3, 1100, H=1, D=32), "fp16", "sequence")


def check_walks():
    """Lists across entries and offsets, more than a group of them; shares of keys, some of nothing;
    what is left out, where one row of a warp would not have it."""
    table, offsets = [4, -1, 2, 3], [0, 0, 0, 1]
    cache = filled(64 * 5 + 3, named={2, 3, 4}, D=64)
    q = query(70, D=64)
    chosen = drawn_lists(1, 2, 1, 24, share=0.8)
    chosen[0, 1, 0, 3] = False
    check_lists(q, segments_of(cache, q), chosen, table, offsets)
    low, every = segments_of(cache, q), torch.ones(1, 2, 1, 24, dtype=torch.bool)
    alone, more = (run_lists(q, low, every, table, offsets, added=x)[0]
                   for x in (None, draw(1, 70, 2, 64)))  # fmt: skip
    assert torch.equal(alone + draw(1, 70, 2, 64), more)
    with mock.patch.object(cuda, "splits_of", return_value=3):
        check_segments(q, cache, table, offsets)
        seen = torch.arange(100) <= torch.arange(130).unsqueeze(1) - 30
        check(*qkv(130, 100, H=1), causal="bottom_right", seen=seen)
    q, k, v = qkv(32, 128, H=1)
    q, k[:, 64:] = 12 * q.unsqueeze(0), 0.0
    q[..., 13, :, :] = 0.0
    low, every = plain(q[0], k, v), torch.ones(1, 1, 1, 2, dtype=torch.bool)
    got = (run_lists(q, low, every, pv_skip=skip)[0] for skip in (4.0, math.inf))
    assert torch.equal(*got)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_without_races(schedule):
    with emulated("attention", flavour="race", schedule=schedule, seed=3):
        check_all()
        check_walks()
        check(*qkv(40, 70, H=1, D=128), "fp8")


def test_under_sanitizers():
    problem = parameters.sanitized(
        "attention",
        f"""
def run(entry, **given):
    how = dict(flavour="sanitize", replace={{"sm80.cu": {ALONE!r}}})
    parameters.run("attention", entry, given, **how)
"""
        """
B, L, N, H, D, E = 1, 70, 100, 1, 48, 64
r = np.random.default_rng(0)
shapes = (B, L, H, D), (B, N, H, D), (B, N, H, E)
q, k, v = (r.standard_normal(shape).astype(np.float32) for shape in shapes)
empty = lambda *shape, dtype=np.float32: np.full(shape, 91, dtype)
low = dict(q_code=empty(B, L, H, D, dtype=np.int8), q_scale=empty(B, 2, H), k_scale=empty(B, 2, H),
           k_mean=empty(B, 2, H, D), v_scale=empty(B, 2, H, E))
k_code, v_code = empty(B, N, H, D, dtype=np.int8), empty(B, N, H, E, dtype=np.float16)
strides = lambda name, letters, *steps: {f"stride_{name}{x}": s for x, s in zip(letters, steps)}
sizes = dict(B=B, H=H, H_kv=H, D=D, E=E, smooth=1)
run("encode_qkv", q=q, k=k, v=v, **low, k_code=k_code, v_code=v_code, partial=None, S_q=L, S_kv=N,
    **sizes, **strides("q", "bsh", L * D, D, D), **strides("k", "bsh", N * D, D, D),
    **strides("v", "bsh", N * E, E, E), x_dtype=0, qk_dtype=3, v_dtype=2)
out, lse = empty(B, L, H, E), empty(B, H, L)
given = dict(q=q, k=k_code, v=v_code, **low, mask=None, table=None, offset_index=None, added=None,
    L=L, N=N, **sizes, slots=1, T=1, splits=1, sm_scale=D**-0.5,
    **strides("q", "oblh", 0, L * D, D, D), **strides("k", "bsnh", N * D, N * D, D, D),
    **strides("v", "bsnh", N * E, N * E, E, E), **strides("m", "bhln", 0, 0, 0, 0),
    q_dtype=0, mean_dtype=0, mask_dtype=0, qk_dtype=3, v_dtype=2, out_dtype=0, pv_skip=np.inf)
dense = dict(list_bounds=None, list_blocks=None, room=0, stride_list_head=0, stride_list_row=0)
lists = dict(list_bounds=np.array([0, 2], np.int32), list_blocks=np.array([0, 1], np.int32), room=2,
             stride_list_head=2, stride_list_row=1)
all_of, all_lse, out, lse = empty(B, L, H, E), empty(B, H, L), empty(B, L, H, E), empty(B, H, L)
run("attention", **given, **lists, out=all_of, lse=all_lse, causal=0, first_last=0)
run("attention", **given, **dense, out=out, lse=lse, causal=0, first_last=0)
assert (out == all_of).all() and (lse == all_lse).all()
parts, part_lse = empty(2, B, L, H, E), empty(2, B, H, L)
run("attention", **given | dict(splits=2), **dense, out=parts, lse=part_lse, causal=1,
    first_last=N - L)
run("combine_parts", part=parts, part_lse=part_lse, out=out, lse=lse, B=B, L=L, H=H, E=E, splits=2,
    out_dtype=0)
s = np.einsum("lhd,nhd->hln", q[0], k[0]) * D**-0.5
s[:, np.arange(N) > np.arange(L)[:, None] + N - L] = -np.inf
p = np.exp(s - s.max(-1, keepdims=True))
want = np.einsum("hln,nhd->lhd", p / p.sum(-1, keepdims=True), v[0])
assert np.abs(out[0] - want).mean() < 0.02 * np.abs(want).mean()
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


def planted(header, old, new):
    """An edit of sm80.cu with the same effect as one of a header: its text in place of its name."""
    together = ("sm80_tiles.h", "sm80_walk.h")  # of which one includes the other
    names = together if header in together else (header,)
    texts = {name: (emulate.CSRC / f"attention/{name}").read_text() for name in names}
    assert texts[header].count(old) == 1, f"{header}: {old!r} {texts[header].count(old)} times"
    texts[header] = texts[header].replace(old, new)
    includes = "".join(f'#include "attention/{name}"\n' for name in names)
    text = "".join(texts.values()).replace("#pragma once\n", "")
    return includes, text.replace('#include "attention/sm80_tiles.h"\n', "")


OVER_VALUES = "rows are staged over values"  # which they reach where D > 128
LANDED = "      cp_async_wait<0>();\n      sync_block();\n"
MUTATIONS = {
    "nobody waits for keys": (
        LANDED + "      fetch_values",
        "      sync_block();\n      fetch_values",
    ),
    "values may come too early": (
        LANDED + "      fetch_values",
        "      cp_async_wait<0>();\n      fetch_values",
    ),
    "nobody waits for values": (
        LANDED + "      if (next.at < next.end)",
        "      sync_block();\n      if (next.at < next.end)",
    ),
    "keys may come too early": (
        LANDED + "      if (next.at < next.end)",
        "      cp_async_wait<0>();\n      if (next.at < next.end)",
    ),
    "values are not committed": (
        "fetch_values(shared, p, next);\n      cp_async_commit();",
        "fetch_values(shared, p, next);",
    ),
    "nobody waits for queries": ("  cp_async_wait<0>();\n}\n", "}\n"),
    "corrections are read before they are there": (
        "kLog2E * d[e];\n  }\n  sync_warp();\n",
        "kLog2E * d[e];\n  }\n",
    ),
    OVER_VALUES: ("    sync_block();  // v has been read\n", ""),
    "rows are staged over rows": ("  sync_warp();  // the rows before have been read\n", ""),
    "means of sixteen blocks serve on": ("(next.at >= own(shared.group).end)", "(next.j == 0)"),
    "offsets are not looked at": ("if (wanted != group.offset)", "if (group.offset < 0)"),
    "scale of the wrong queries": ("row / kScaleRows) * p.H + h;", "0) * p.H + h;"),
    "scale of the keys before": (
        "        k_scale = p.k_scale[next.scales(p, shared.h_kv)];\n      }\n"
        "      cp_async_commit();\n      if",
        "      }\n      cp_async_commit();\n      if",
    ),
    "keys past the end count": (
        "const bool free = first_key + kBlockN <= p.N &&",
        "const bool free =",
    ),
    "the diagonal is free": (
        "first_key + kBlockN <= row + p.first_last + 1",
        "first_key <= row + p.first_last + 1",
    ),
    "rows past the end are stored": ("if (row + r >= p.L || channel", "if (channel"),
    "acc is not rescaled": ("acc[i][n][e] *= past[e / 2]", "acc[i][n][e] *= past[0]"),
    "keys past the end are read": planted("sm80_tiles.h", "? rows - row : 0", "? kBlockN : 0"),
    "channels of the scale": planted("sm80_tiles.h", "2 * t + e % 2 : 4", "2 * t : 4"),
    "means of half of the warps": planted(
        "encode.h", "distance = kChunks; distance < 32", "distance = kChunks; distance < 16"
    ),
    "means before all warps are there": planted(
        "encode.h", "y[e];\n  sync_block();\n", "y[e];\n"
    ),
    "scales before they are there": planted(
        "encode.h",
        "    shared.channel[channel] = step;\n  }\n  sync_block();\n",
        "    shared.channel[channel] = step;\n  }\n",
    ),
    "tokens past the end are read": planted("encode.h", "if (!holds(i)) continue;\n", "\n"),
    "a mean of 64 tokens": planted("encode.h", "Sum()) / k.from.count", "Sum()) / kScaleRows"),
}  # fmt: skip
WALKS = {
    "absent entries are seen": planted(
        "sm80_walk.h", "static_cast<int>(slot) : -1", "static_cast<int>(slot) : 0"
    ),
    "means of another offset": planted("sm80_walk.h", "p.offset_index[it.t] != offset", "false"),
    "means are listed too late": planted(
        "sm80_walk.h", "at + count;\n    }\n    sync_warp();\n", "at + count;\n    }\n"
    ),
    "means are listed too early": planted(
        "sm80_walk.h", "    sync_warp();  // the group before has been read\n", ""
    ),
    "means of the neighbours": planted("sm80_walk.h", "found ? it.scales(p, h_kv) : -1", "mean"),
    "a head before it is known": ("    sync_block();\n\n    SoftmaxRows", "\n    SoftmaxRows"),
    "a list never ends": planted("sm80_walk.h", "end = min(bounds[1], p.room)", "end = p.room"),
    "one list for all heads": planted(
        "sm80_walk.h", "p.H + blockIdx.y) * p.room", "p.H) * p.room"
    ),
    "a share begins with an entry": planted("sm80_walk.h", "j = at % blocks", "j = 0"),
    "a share of absent entries": planted(
        "sm80_walk.h", "before -= slot_of(p, t) >= 0", "before--"
    ),
    "all shares in one place": (
        "int64_t batch = int64_t{split_of(p)} * p.B + blockIdx.z;",
        "int64_t batch = blockIdx.z;",
    ),
    "one row is far enough": ("ballot(far) != kFullWarp", "ballot(far) == 0"),
    "lanes decide alone": ("heard = ballot(far) != kFullWarp", "heard = !far"),
    "shares of nothing": planted("combine.h", "- finite));", "- largest));"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistake_is_noticed(name):
    wide = name == OVER_VALUES
    edits = {"sm80.cu": [MUTATIONS[name], *(() if wide else ALONE)]}
    with emulated("attention", flavour="race", replace=edits):
        with pytest.raises((AssertionError, emulate.EmulationError)):
            check(*qkv(128, 70, H=1, D=256)) if wide else check_all()


@pytest.mark.parametrize("name", WALKS)
def test_mistake_of_a_walk_is_noticed(name):
    edits = {"sm80.cu": [WALKS[name], *ALONE]}
    with emulated("attention", flavour="race", replace=edits):
        with pytest.raises((AssertionError, emulate.EmulationError)):
            check_walks()


def test_no_bank_conflicts():
    """Reading codes, scales of values and corrections."""
    for D in (64, 128):
        for pv in VALUES:
            with emulated("attention", flavour="race", count_banks=True):
                attention(*qkv(70, 130, H=1, D=D), qk="int8", pv=pv, backend="cuda")
            rows = parameters.library("attention", "sm80", "race", ()).banks()
            read = [r for r in rows if "sm80_tiles.h" in r["place"]]
            assert {r["place"].split()[0] for r in read} == {"ldmatrix", "load"}
            assert all(r["wavefronts"] == r["ideal"] > 0 for r in read), read


# --- The device build ---------------------------------------------------------------------------

# The instructions of q.k, of int8 and of e4m3 where it has one, and of p v.
TARGETS = {
    "80": ("IMMA.16832.S8.S8", None, "HMMA.16816.F32 "),
    "120a": ("IMMA.16832.S8.S8", "QMMA.16832.F32.E4M3.E4M3", "HMMA.16816.F16 "),
}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    return device_builds(
        emulate.CSRC / "attention/sm80.cu", list(TARGETS), tmp_path_factory.mktemp("builds")
    )


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_device_build(cubins, target):
    """No spills; the products of 64 keys, each once, and no integer converted by the slow way."""
    spills = cubins[target].spills
    assert len(spills) == 12 + 3 + 3 + 1 + 1
    assert set(spills) == {("0", "0")}
    kernels = cubins[target].kernels()
    int8, e4m3, values = TARGETS[target]
    for D, products in ((64, (32, 64)), (128, (64, 128)), (256, (64, 128))):
        for qk, key in ((int8, "a"), (e4m3, "NS_4e4m3E")):
            named = f"attention_kernelINS0_6ConfigILi{D}E{key}"
            mine = [k for k in kernels if named in k.split("\n")[0]]
            assert len(mine) == 2
            for kernel in mine:
                if qk is None:  # left empty
                    assert "MMA" not in kernel
                    continue
                more = kernel.count("HMMA.16816.F32.BF16") if target == "80" else 0  # for q.mu
                assert kernel.count(qk) == products[0]
                assert kernel.count(values) == products[1] + more
                assert not any("I2F" in part for part in kernel.split("BAR.SYNC")[1:-1])
