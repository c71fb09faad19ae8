# SPDX-License-Identifier: Apache-2.0
"""attention against PyTorch's own, segments against a gathered dense call, 8 bits against both."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reeltime import checks, rope_kv
from reeltime.attention import TOLERANCE, attention, bytes, flops, segment_attention

D64 = torch.float64
DTYPES = {n: getattr(torch, n) for n in ("float64", "float32", "bfloat16", "float16")}


def qkv(S_q, S_kv, *, B=2, H=4, H_kv=4, D=16, dtype=D64):
    torch.manual_seed(S_q * 31 + S_kv)
    shapes = (B, S_q, H, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, D)
    return tuple(torch.randn(shape, dtype=D64).to(dtype) for shape in shapes)


def sdpa(q, k, v, **options):
    """PyTorch's own, in float64, on our layout."""
    group = q.shape[2] // k.shape[2]
    wide = (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    out = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in wide), **options)
    return out.transpose(1, 2)


# --- Plain tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("H_kv", [4, 2, 1], ids="H_kv={}".format)
@pytest.mark.parametrize("lengths", [(1, 1), (5, 63), (64, 64), (70, 7), (3, 1000)], ids=str)
def test_matches_pytorch(lengths, H_kv, format):
    q, k, v = qkv(*lengths, H_kv=H_kv, dtype=DTYPES[format])
    out, lse = attention(q, k, v, sm_scale=0.3, return_lse=True)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    error = checks.accuracy(out, sdpa(q, k, v, scale=0.3))
    assert TOLERANCE[format].accepts(error), error
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double().repeat_interleave(4 // H_kv, 2))
    assert TOLERANCE[format].accepts(checks.accuracy(lse, (0.3 * scores).logsumexp(-1)))
    assert torch.equal(out, attention(q, k, v, sm_scale=0.3))


def test_default_scale_is_one_over_root_d():
    q, k, v = qkv(5, 6)
    assert torch.allclose(attention(q, k, v), sdpa(q, k, v))


@pytest.mark.parametrize("lengths", [(4, 4), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("causal", ["top_left", "bottom_right", True, False])
def test_causal_corners(causal, lengths):
    S_q, S_kv = lengths
    q, k, v = qkv(S_q, S_kv)
    shift = S_kv - S_q if causal in (True, "bottom_right") else 0
    seen = [[not causal or j <= i + shift for j in range(S_kv)] for i in range(S_q)]
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    want = sdpa(q, k, v, attn_mask=torch.tensor(seen)).nan_to_num(0.0)
    assert torch.allclose(out, want)
    blind = ~torch.tensor(seen).any(1)
    assert (lse[..., blind] == -torch.inf).all()
    assert lse[..., ~blind].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 9), (1, 9), (2, 1, 5, 9), (4, 5, 1), (2, 4, 5, 9)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_broadcast(shape, kind):
    q, k, v = qkv(5, 9)
    mask = torch.randn(shape, dtype=D64)
    mask = mask > 0 if kind == "bool" else mask.masked_fill(mask < -1, -torch.inf)
    out, lse = attention(q, k, v, mask=mask, return_lse=True)
    bias = torch.zeros(shape, dtype=D64).masked_fill(~mask, -torch.inf) if kind == "bool" else mask
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 4 + bias
    want = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1).nan_to_num(0.0), v)
    assert torch.allclose(out, want)
    assert torch.allclose(lse, scores.logsumexp(-1))


def test_mask_and_causal_meet():
    q, k, v = qkv(4, 4)
    mask = torch.rand(4, 4) > 0.4
    both = mask & torch.ones(4, 4).tril().bool()
    assert torch.equal(
        attention(q, k, v, mask=mask, causal="top_left"), attention(q, k, v, mask=both)
    )


@pytest.mark.parametrize("return_lse", [False, True])
def test_blind_rows_are_zero_and_so_is_their_gradient(return_lse):
    q, k, v = (x.requires_grad_() for x in qkv(3, 4))
    mask = torch.ones(3, 4).bool()
    mask[1] = False
    out, lse = attention(q, k, v, mask=mask, return_lse=True)
    assert not out[:, 1].any()
    assert (lse[..., 1] == -torch.inf).all()
    (out.sum() + (lse[..., [0, 2]].sum() if return_lse else 0)).backward()
    assert not q.grad[:, 1].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_empty_inputs():
    q, k, v = qkv(3, 0)
    out, lse = attention(q, k, v, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert attention(*qkv(0, 4)).shape == (2, 0, 4, 16)
    assert attention(*qkv(2, 3, B=0)).shape == (0, 2, 4, 16)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_goes_where_the_docstring_says(which):
    tensors = dict(zip("qkv", qkv(3, 5), strict=True))
    tensors[which][0, 1, 2, 3] = torch.nan
    out = attention(*tensors.values())
    touched = out.isnan().any(-1)  # [B, S_q, H]
    want = torch.zeros_like(touched)
    want[0, 1 if which == "q" else slice(None), 2] = True
    assert torch.equal(touched, want)


sizes = st.integers(1, 40)


@given(sizes, sizes, st.sampled_from([1, 2, 4]), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_properties(S_q, S_kv, H_kv, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(S_q, S_kv, H_kv=H_kv)
    out, lse = attention(q, k, v, return_lse=True)
    ones = attention(q, k, torch.ones_like(v))
    assert torch.allclose(ones, torch.ones_like(ones))  # weights of a row sum to one
    shift = torch.randn(2, 1, H_kv, 16, dtype=D64)
    moved, moved_lse = attention(q, k + shift, v, return_lse=True)
    assert torch.allclose(moved, out)  # softmax does not see what all keys share
    along = torch.einsum("blhd,bhd->bhl", q, shift[:, 0].repeat_interleave(4 // H_kv, 1)) / 4
    assert torch.allclose(moved_lse, lse + along)
    order = torch.randperm(S_kv)
    assert torch.allclose(attention(q, k[:, order], v[:, order]), out)
    assert (out.amax(1) <= v.amax(1).repeat_interleave(4 // H_kv, 1) + 1e-9).all()


def outlier_keys():
    q, k, v = qkv(65, 200)
    k[..., ::5] += 8 * torch.randn(1, 1, 4, 4, dtype=D64)
    return q, k, v


INPUTS = {
    "normal": lambda: qkv(65, 200),
    "outlier channels": outlier_keys,
    "constant": lambda: tuple(torch.ones_like(x) for x in qkv(3, 70)),
    "zeros": lambda: tuple(torch.zeros_like(x) for x in qkv(3, 70)),
    "single token": lambda: qkv(1, 1),
    "ragged": lambda: qkv(63, 129),
}


@pytest.mark.parametrize("pv", [None, "fp8", "fp16"])
@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("kind", INPUTS)
def test_eight_bits_stay_within_tolerance(kind, qk, pv):
    q, k, v = INPUTS[kind]()
    out = attention(q, k, v, qk=qk, pv=pv)
    error = checks.accuracy(out, attention(q, k, v))
    assert TOLERANCE["fp8" if "fp8" in (qk, pv) else "int8"].accepts(error), error


def test_smoothing_is_what_it_is_for():
    """With outlier channels that all keys of a block share, subtracting the mean pays."""
    q, k, v = outlier_keys()
    exact = attention(q, k, v)
    errors = {
        smooth: checks.accuracy(attention(q, k, v, qk="int8", smooth=smooth), exact).rmse
        for smooth in (None, "sequence", "block")
    }
    assert errors["block"] < 0.5 * errors[None], errors
    assert errors["sequence"] < 0.5 * errors[None], errors


# --- Cached segments ----------------------------------------------------------------------------


def segments(N, *, O=2, T=4, L=12, B=2, H=3, D=8, format="plain", dtype=D64):  # noqa: E741
    torch.manual_seed(N)
    options = {"dtype": dtype} if format == "plain" else {}
    cache = rope_kv.make_cache(B, T + 2, N, H, D, format=format, **options)
    k, v = (torch.randn(B, (T + 2) * N, H * D, dtype=D64) for _ in range(2))
    rope_kv.write(k, v, cache, torch.arange(T + 2), num_heads=H)
    q = torch.randn(O, B, L, H, D, dtype=D64)
    shape = (B, T + 2, N, H, D)
    return q, cache, k.view(shape), v.view(shape)


def dense(q, k, v, block_table, offset_index, sm_scale):
    """One slot at a time, no gather, no bias: (out, lse) in float64."""
    scores, values = [], []
    for slot, offset in zip(block_table.tolist(), offset_index.tolist(), strict=True):
        if slot >= 0:
            scores.append(torch.einsum("blhd,bnhd->bhln", q[offset], k[:, slot]) * sm_scale)
            values.append(v[:, slot])
    score = torch.cat(scores, -1)
    out = torch.einsum("bhln,bnhd->blhd", score.softmax(-1), torch.cat(values, 1))
    return out, score.logsumexp(-1)


TABLES = {
    "all": ([0, 1, 2, 3], [1, 0, 0, 0]),
    "ring order": ([4, 5, 0, 2], [1, 1, 0, 1]),
    "absent": ([-1, 3, -1, 1], [0, 0, 1, 1]),
    "one": ([-1, -1, 2, -1], [1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("O", [1, 2, 3], ids="O={}".format)
@pytest.mark.parametrize("N", [1, 6, 64, 100], ids="N={}".format)
def test_segments_match_the_dense_call(N, O, name):  # noqa: E741
    q, cache, k, v = segments(N, O=O)
    table, offsets = (torch.tensor(x) for x in TABLES[name])
    offsets = offsets.clamp(max=O - 1)
    out, lse = segment_attention(q, cache, table, offsets, sm_scale=0.4, return_lse=True)
    want, want_lse = dense(q, k, v, table, offsets, 0.4)
    assert torch.allclose(out, want, atol=1e-12)
    assert torch.allclose(lse, want_lse)
    assert torch.equal(segment_attention(q, cache, table, offsets, sm_scale=0.4), out)


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
@pytest.mark.parametrize("O", [1, 2], ids="O={}".format)
def test_segments_in_low_precision(O, format):  # noqa: E741
    q, cache, _, _ = segments(64, O=O, dtype=DTYPES[format])
    q = q.to(DTYPES[format])
    table, offsets = torch.tensor([3, -1, 0, 5]), torch.tensor([0, 0, O - 1, 0])
    out = segment_attention(q, cache, table, offsets)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    want, _ = dense(q.double(), cache.k.double(), cache.v.double(), table, offsets, 8**-0.5)
    error = checks.accuracy(out, want)
    assert TOLERANCE[format].accepts(error), error


@pytest.mark.parametrize("format", ["plain", "int8"])
@pytest.mark.parametrize("O", [1, 2], ids="O={}".format)
def test_slots_not_named_are_never_read(O, format):  # noqa: E741
    q, cache, _, _ = segments(70, O=O, format=format)
    table, offsets = torch.tensor([4, -1, 2]), torch.tensor([0, O - 1, O - 1])
    before = segment_attention(q, cache, table, offsets, return_lse=True)
    for part in (cache.k, cache.v, cache.k_scale, cache.k_mean, cache.v_scale):
        if part is not None:
            part[:, [0, 1, 3, 5]] = 100 if part.dtype == torch.int8 else torch.nan
    after = segment_attention(q, cache, table, offsets, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert after[0].isfinite().all()


@pytest.mark.parametrize("format", ["plain", "int8"])
@pytest.mark.parametrize("table", [[-1, -1], []], ids=str)
def test_no_slot_at_all_gives_zeros(table, format):
    q, cache, _, _ = segments(6, format=format)
    cache.k[:, 0] = 100 if format == "int8" else torch.nan  # what an empty list must not read
    table = torch.tensor(table, dtype=torch.int64)
    out, lse = segment_attention(q, cache, table, torch.zeros_like(table), return_lse=True)
    assert out.shape == q.shape[1:]
    assert not out.any()
    assert lse.shape == (2, 3, 12)
    assert (lse == -torch.inf).all()


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_block_order_does_not_matter(order, count, gaps):
    q, cache, _, _ = segments(5)
    table = torch.tensor(order[:count])
    offsets = table % 2
    out = segment_attention(q, cache, table, offsets)
    shuffled = torch.randperm(count + gaps)
    padded = torch.cat([table, torch.full((gaps,), -1)])[shuffled]
    padded_offsets = torch.cat([offsets, torch.zeros(gaps, dtype=torch.int64)])[shuffled]
    again = segment_attention(q, cache, padded, padded_offsets)
    assert torch.allclose(out, again, atol=1e-12)


@pytest.mark.parametrize("N", [1, 64, 100], ids="N={}".format)
@pytest.mark.parametrize("O", [1, 2], ids="O={}".format)
def test_int8_segments_are_the_decoded_cache(N, O):  # noqa: E741
    """The same numbers as a dense call on what the INT8 cache and query stand for."""
    q, cache, k, v = segments(N, O=O, format="int8")
    table, offsets = torch.tensor([3, -1, 0, 5]), torch.tensor([0, 0, O - 1, 0])
    out, lse = segment_attention(q, cache, table, offsets, return_lse=True)
    token = torch.arange(N) // 64
    mean = cache.k_mean.double()[:, :, token]
    low_k = cache.k.double() * cache.k_scale.double()[:, :, token].unsqueeze(-1)
    low_v = cache.v.double() * cache.v_scale.double()[:, :, token]
    _, q_int8, q_scale = rope_kv.query(
        q.permute(0, 1, 2, 3, 4).reshape(O * 2, 12, 24), None, num_heads=3, quantize="int8"
    )
    low_q = q_int8.double() * q_scale.double()[:, :, [0] * 12].unsqueeze(-1)
    low_q = low_q.view(O, 2, 12, 3, 8)
    # q8.(k - mu)8 + q.mu, as one dot product of twice the width
    both_q = torch.cat([low_q, q], -1)
    both_k = torch.cat([low_k, mean], -1)
    want, want_lse = dense(both_q, both_k, low_v, table, offsets, 8**-0.5)
    assert torch.allclose(out, want, atol=1e-7)
    assert torch.allclose(lse, want_lse, atol=1e-7)
    exact, _ = dense(q, k, v, table, offsets, 8**-0.5)
    error = checks.accuracy(out, exact)
    assert TOLERANCE["fp8"].accepts(error), error


def test_a_given_int8_query_is_the_same_as_none():
    q, cache, _, _ = segments(70, O=1, format="int8")
    rotated, q_int8, q_scale = rope_kv.query(q[0].flatten(2), None, num_heads=3, quantize="int8")
    where = torch.tensor([1, 2]), torch.tensor([0, 0])
    alone = segment_attention(rotated, cache, *where)
    given_query = segment_attention(rotated, cache, *where, q_int8=q_int8, q_scale=q_scale)
    assert torch.equal(alone, given_query)
    doubled = segment_attention(rotated, cache, *where, q_int8=q_int8, q_scale=q_scale * 2)
    assert not torch.equal(alone, doubled)


@pytest.mark.parametrize("O", [1, 2], ids="O={}".format)
def test_gradients_match_finite_differences(O):  # noqa: E741
    q, cache, _, _ = segments(2, O=O, T=2, L=3, B=1, H=2, D=4)
    table, offsets = torch.tensor([3, -1, 0]), torch.tensor([0, 0, O - 1])

    def call(q, k, v):
        return segment_attention(q, rope_kv.KVCache(k, v), table, offsets, return_lse=True)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, cache.k, cache.v)])


def test_out_is_written_in_place():
    q, k, v = qkv(3, 4)
    out = torch.empty_like(q)
    assert attention(q, k, v, out=out) is out
    assert torch.equal(out, attention(q, k, v))
    q, cache, _, _ = segments(4)
    out, where = torch.empty_like(q[0]), (torch.tensor([1]), torch.tensor([0]))
    assert segment_attention(q, cache, *where, out=out) is out
    assert torch.equal(out, segment_attention(q, cache, *where))


def test_flops_and_bytes():
    assert flops(1, 6120, 42840, 12, 128) == 4 * 12 * 6120 * 42840 * 128
    assert flops(1, 4, 4, 2, 8, causal=True) == 4 * 2 * 16 * 8 // 2
    assert bytes(1, 4, 10, 2, 8) == (4 * 16 * 2 + 2 * 10 * 16) * 2
    assert bytes(1, 4, 10, 2, 8, H_kv=1, kv_itemsize=1, offsets=2) == 4 * 16 * 2 * 3 + 160


q, k, v = qkv(3, 4)
sq, cache, _, _ = segments(4)
at = torch.tensor([0, 1])


def segment(q=sq, table=at, offsets=at, **options):
    return segment_attention(q, cache, table, offsets, **options)


ERRORS = {
    "q: expected 4 dim": lambda: attention(q[0], k, v),
    "k: expected dtype torch.float64, got": lambda: attention(q, k.float(), v),
    "q: expected dtype": lambda: attention(q.int(), k, v),
    "v: expected a contiguous": lambda: attention(q, k, v.transpose(2, 3).contiguous().mT),
    "k .its heads H_kv.: expected a divisor of H of q = 4, got 3": lambda: attention(
        q, k[:, :, :3], v[:, :, :3]
    ),
    "k: expected shape": lambda: attention(q, k[..., :8], v),
    "v: expected shape": lambda: attention(q, k, v[:, :3]),
    "k: expected the device": lambda: attention(q, k.to("meta"), v),
    "causal: expected None or": lambda: attention(q, k, v, causal="left"),
    "sm_scale: expected a finite number > 0, got nan": lambda: attention(
        q, k, v, sm_scale=math.nan
    ),
    "mask: expected broadcastable": lambda: attention(q, k, v, mask=torch.ones(3, 5).bool()),
    "mask: expected dtype": lambda: attention(q, k, v, mask=torch.ones(3, 4).int()),
    "qk: expected None or 'int8'": lambda: attention(q, k, v, qk="int4"),
    "pv: expected None or 'fp8'": lambda: attention(q, k, v, pv="int8"),
    "smooth: expected None or 'block'": lambda: attention(q, k, v, smooth="token"),
    "out: expected shape": lambda: attention(q, k, v, out=k),
    "q: expected 5 dim": lambda: segment(q=sq[0]),
    "q: expected shape .O, B": lambda: segment(q=sq[..., :4]),
    "q .its offsets O.: expected at least 1": lambda: segment(q=sq[:0]),
    "block_table: expected 1 dim": lambda: segment(table=at[0]),
    "block_table: expected dtype": lambda: segment(table=at.int()),
    "offset_index: expected shape": lambda: segment(offsets=at[:1]),
    "block_table: expected the device": lambda: segment(table=at.to("meta")),
    "mask: expected the device": lambda: attention(q, k, v, mask=torch.ones(3, 4).to("meta")),
    "v: expected the device": lambda: attention(q, k, v.to("meta")),
    "q: expected a tensor": lambda: attention([q], k, v),
    "q_int8, q_scale: expected both": lambda: segment(q_int8=sq.to(torch.int8)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_error_names_the_argument(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ERRORS[message]()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x, s: (x[:, :, :3], s), "q_int8: expected shape"),
        (lambda x, s: (x.int(), s), "q_int8: expected dtype torch.int8"),
        (lambda x, s: (x, s[..., :1]), "q_scale: expected shape .O, B, ceil"),
        (lambda x, s: (x, s.half()), "q_scale: expected dtype torch.float32"),
        (lambda x, s: (x, s.to("meta")), "q_scale: expected the device"),
        (lambda x, s: (x, None), "q_int8, q_scale: expected both .* got q_int8 and format 'int8'"),
    ],
)
def test_query_in_8_bits_is_that_of_q(wrong, message):
    low = rope_kv.make_cache(1, 2, 4, 2, 8, format="int8", dtype=torch.float16)
    wide, x, scale = rope_kv.query(torch.randn(1, 4, 16), None, num_heads=2, quantize="int8")
    x, scale = wrong(x, scale)
    with pytest.raises(ValueError, match=f"^{message}"):
        segment_attention(wide, low, at, at * 0, q_int8=x, q_scale=scale)
