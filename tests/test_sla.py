# SPDX-License-Identifier: Apache-2.0
"""sla against loops over blocks: the mask, the sparse branch, the linear branch, and the cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from reeltime import checks, rope_kv, sla
from reeltime.attention import attention, segment_attention

D64 = torch.float64
BLOCKS = {"block_q": 8, "block_k": 4}


def qkv(S_q=19, S_kv=30, *, B=2, H=4, H_kv=2, D=8, dtype=D64):
    torch.manual_seed(S_q * 31 + S_kv)
    shapes = (B, S_q, H, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, D)
    return tuple(torch.randn(shape, dtype=D64).to(dtype) for shape in shapes)


def lists(csr):
    """csr as lists of blocks [b][h][row], by its definition."""
    indptr, indices = csr.indptr.tolist(), csr.indices.tolist()
    return [
        [
            [where[start:stop] for start, stop in zip(at[:-1], at[1:], strict=True)]
            for at, where in zip(per_batch, blocks, strict=True)
        ]
        for per_batch, blocks in zip(indptr, indices, strict=True)
    ]


def chosen_by_hand(scores, topk, topp):
    """One row: the topk best, and the fewest whose softmax sums to topp; ties to the lower."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    best = set(order[: topk or 1])
    if topp is not None:
        weights = [math.exp(s - max(scores)) for s in scores]
        total = 0.0
        for j in order:
            best.add(j)
            total += weights[j] / sum(weights)
            if total >= topp:
                break
    return sorted(best)


# --- The mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("topk, topp", [(1, None), (3, None), (None, 0.6), (2, 0.5), (None, 1.0)])
@pytest.mark.parametrize("H_kv", [1, 2])
def test_mask_is_chosen_by_hand(topk, topp, H_kv):
    torch.manual_seed(3)
    q, k = torch.randn(2, 5, 2, 8, dtype=D64) * 3, torch.randn(2, 7, H_kv, 8, dtype=D64)
    found = lists(sla.block_mask(q, k, topk=topk, topp=topp, sm_scale=0.4))
    for b in range(2):
        for h in range(2):
            for i in range(5):
                scores = (0.4 * q[b, i, h] @ k[b, :, h * H_kv // 2].T).tolist()
                assert found[b][h][i] == chosen_by_hand(scores, topk, topp)


def test_share_is_rounded_down_to_at_least_one():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 9, 1, 8)
    for topk, count in ((0.01, 1), (0.34, 3), (1.0, 9), (5, 5), (100, 9)):
        assert sla.block_mask(q, k, topk=topk).indptr.tolist() == [[[0, count, 2 * count]]]


def test_ties_go_to_the_lower_block_and_the_rest_is_minus_one():
    csr = sla.block_mask(torch.ones(1, 1, 1, 4), torch.ones(1, 6, 1, 4), topk=2, topp=0.3)
    assert csr.indptr.dtype == csr.indices.dtype == torch.int32
    assert csr.indptr.tolist() == [[[0, 2]]]
    assert csr.indices.tolist() == [[[0, 1, -1, -1, -1, -1]]]


def test_similarity_guards():
    """A query block unlike itself sees everything; a key block unlike itself is seen by all."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 3, 1, 8), torch.randn(1, 5, 1, 8)
    similar_q = torch.tensor([True, False, True]).view(1, 3, 1)
    similar_k = torch.tensor([True, True, False, True, True]).view(1, 5, 1)
    found = lists(sla.block_mask(q, k, topk=1, similar_q=similar_q, similar_k=similar_k))[0][0]
    assert found[1] == [0, 1, 2, 3, 4]
    for row in (0, 2):
        scores = (q[0, row, 0] @ k[0, :, 0].T).tolist()
        scores[2] = -math.inf
        assert found[row] == sorted({2, scores.index(max(scores))})


def test_marginal_is_neither_selected_nor_negligible():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 2, 8), torch.randn(2, 10, 2, 8)
    selected, marginal = sla.block_mask(q, k, topk=3, negligible=0.25)
    for b in range(2):
        for h in range(2):
            for i in range(3):
                scores = (q[b, i, h] @ k[b, :, h].T).tolist()
                order = sorted(range(10), key=lambda j: -scores[j])
                assert lists(selected)[b][h][i] == sorted(order[:3])
                assert lists(marginal)[b][h][i] == sorted(order[3:8])


def test_pool():
    x = torch.randn(1, 10, 2, 8, dtype=D64)
    x[0, 4:8, 0] = x[0, 4, 0]  # one block all alike
    pooled, similarity = sla.pool(x, block=4)
    assert pooled.shape == (1, 3, 2, 8)
    for block, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
        assert torch.allclose(pooled[:, block], x[:, rows].mean(1))
        unit = x[0, rows] / x[0, rows].norm(dim=-1, keepdim=True)
        cosines = torch.einsum("ihd,jhd->ijh", unit, unit)
        assert torch.allclose(similarity[0, block], cosines.mean((0, 1)))
    assert similarity[0, 1, 0] == pytest.approx(1.0)


# --- The sparse branch --------------------------------------------------------------------------


def token_mask(csr, S_q, S_kv, block_q, block_k):
    found = lists(csr)
    mask = torch.zeros(len(found), len(found[0]), S_q, S_kv, dtype=torch.bool)
    for b, heads in enumerate(found):
        for h, rows in enumerate(heads):
            for i, blocks in enumerate(rows):
                for j in blocks:
                    here = slice(i * block_q, (i + 1) * block_q)
                    mask[b, h, here, j * block_k : (j + 1) * block_k] = True
    return mask


def mask_of(q, k, block_q, block_k, **options):
    pooled = sla.pool(q, block=block_q)[0], sla.pool(k, block=block_k)[0]
    return sla.block_mask(*pooled, **options)


@pytest.mark.parametrize("lengths", [(19, 30), (8, 4), (1, 1), (16, 64), (5, 7)], ids=str)
@pytest.mark.parametrize("topk, topp", [(2, None), (1, 0.7), (99, None)])
def test_sparse_is_dense_under_its_mask(lengths, topk, topp):
    q, k, v = qkv(*lengths)
    csr = mask_of(q, k, 8, 4, topk=topk, topp=topp)
    out, lse = sla.sparse_attention(q, k, v, csr, **BLOCKS, return_lse=True)
    mask = token_mask(csr, *lengths, 8, 4)
    want, want_lse = attention(q, k, v, mask=mask, return_lse=True)
    assert torch.allclose(out, want)
    assert torch.allclose(lse, want_lse)
    if topk == 99:
        assert torch.allclose(out, attention(q, k, v))


FORMATS = [("int8", "fp16", "block"), ("int8", "fp8", None), ("fp8", "fp8", "sequence")]


@pytest.mark.parametrize("qk, pv, smooth", FORMATS)
def test_8_bits_are_those_of_attention(qk, pv, smooth):
    q, k, v = qkv(19, 150, D=32)
    csr, low = mask_of(q, k, 8, 4, topk=0.3), {"qk": qk, "pv": pv, "smooth": smooth}
    out, lse = sla.sparse_attention(q, k, v, csr, **BLOCKS, **low, return_lse=True)
    mask = token_mask(csr, 19, 150, 8, 4)
    want, want_lse = attention(q, k, v, mask=mask, **low, return_lse=True)
    assert torch.allclose(out, want, atol=1e-12)
    assert torch.allclose(lse, want_lse)
    exact = sla.sparse_attention(q, k, v, csr, **BLOCKS)
    assert sla.TOLERANCE["fp8" if pv == "fp8" else "int8"].accepts(checks.accuracy(out, exact))
    fused, plain = (sla.sla(q, k, v, **BLOCKS, topk=0.3, **of) for of in (low, {}))
    assert torch.allclose(fused - plain, out - exact, atol=1e-12)  # the linear branch as it was


@pytest.mark.parametrize("qk, pv, smooth", FORMATS)
def test_gradients_pass_straight_through_8_bits(qk, pv, smooth):
    got, want = (
        torch.autograd.grad(sla.sla(*x, **BLOCKS, topk=3, **low).square().sum(), x)
        for low in ({"qk": qk, "pv": pv, "smooth": smooth}, {})
        for x in [[y.requires_grad_() for y in qkv(19, 70, D=32)]]
    )
    for a, b in zip(got, want, strict=True):
        assert cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99


def test_row_without_blocks_is_zero():
    q, k, v = qkv(16, 8, H=1, H_kv=1, B=1)
    csr = sla.CSR(torch.tensor([[[0, 0, 1]]]).int(), torch.tensor([[[1, -1]]]).int())
    out, lse = sla.sparse_attention(q, k, v, csr, **BLOCKS, return_lse=True)
    assert not out[:, :8].any()
    assert (lse[..., :8] == -torch.inf).all()
    assert torch.allclose(out[:, 8:], attention(q[:, 8:], k[:, 4:], v[:, 4:]))


@given(st.integers(0, 2**20), st.integers(1, 25), st.integers(1, 25), st.floats(0.05, 1))
@settings(max_examples=25, deadline=None)
def test_permuting_key_blocks_permutes_nothing_else(seed, S_q, blocks, share):
    torch.manual_seed(seed)
    q, k, v = qkv(S_q, blocks * 4)
    order = torch.randperm(blocks)
    moved = [x.unflatten(1, (blocks, 4))[:, order].flatten(1, 2) for x in (k, v)]
    options = BLOCKS | {"topk": share, "over": "unselected"}
    assert torch.allclose(sla.sla(q, k, v, **options), sla.sla(q, *moved, **options))


def test_pv_skip_leaves_out_far_blocks_but_counts_them():
    """Three blocks, the last far below the first: its values go, its weight in the sum stays."""
    q = torch.ones(1, 2, 1, 1, dtype=D64)
    k = torch.tensor([0.0, 1.0, -4.0], dtype=D64).view(1, 3, 1, 1)
    v = torch.tensor([1.0, 2.0, 1000.0], dtype=D64).view(1, 3, 1, 1)
    csr = sla.block_mask(q[:, :1], k, topk=3)
    weights = k.flatten().softmax(0)
    blocks = {"block_q": 3, "block_k": 1, "sm_scale": 1.0}  # a ragged query block
    kept = sla.sparse_attention(q, k, v, csr, **blocks, pv_skip=5.1)
    assert torch.allclose(kept, (weights @ v.flatten()).expand_as(kept))
    skipped = sla.sparse_attention(q, k, v, csr, **blocks, pv_skip=4.9)
    assert torch.allclose(skipped, (weights[:2] @ v.flatten()[:2]).expand_as(skipped))
    # One row of the query block that comes near keeps the block for all of them.
    q = torch.tensor([1.0, 0.1], dtype=D64).view(1, 2, 1, 1)
    out = sla.sparse_attention(q, k, v, csr, **blocks, pv_skip=4.9)
    assert torch.allclose(out, attention(q, k, v, sm_scale=1.0))


# --- The linear branch --------------------------------------------------------------------------

PHI = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
}


def linear_by_token(q, k, v, mask, phi, eps):
    """phi(q) sum phi(k)^T v / (phi(q) sum phi(k) + eps) over the tokens of mask."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    weight = torch.einsum("blhd,bmhd->bhlm", PHI[phi](q), PHI[phi](k)) * mask
    return torch.einsum("bhlm,bmhd->blhd", weight / (weight.sum(-1, keepdim=True) + eps), v)


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
@pytest.mark.parametrize("lengths", [(19, 30), (8, 64), (1, 9)], ids=str)
def test_linear_branch_by_token(lengths, over, phi):
    q, k, v = qkv(*lengths)
    h, z = sla.summaries(k, v, block_k=4, phi=phi)
    selected, marginal = mask_of(q, k, 8, 4, topk=2, negligible=0.3)
    csr = {"all": None, "unselected": selected, "marginal": marginal}[over]
    out = sla.linear_attention(q, h, z, csr, over=over, block_q=8, phi=phi)
    mask = torch.ones(())
    if csr is not None:
        mask = token_mask(csr, *lengths, 8, 4)
        mask = ~mask if over == "unselected" else mask
    assert torch.allclose(out, linear_by_token(q, k, v, mask, phi, 1e-5))


def test_linear_branch_over_nothing_is_zero():
    q, k, v = qkv(8, 8)
    h, z = sla.summaries(k, v, block_k=4)
    csr = mask_of(q, k, 8, 4, topk=1.0)
    assert not sla.linear_attention(q, h, z, csr, over="unselected", block_q=8).any()


def test_weights_of_the_linear_branch_sum_to_one():
    q, k, v = qkv()
    h, z = sla.summaries(k, torch.ones_like(v), block_k=4)
    out = sla.linear_attention(q, h, z, eps=1e-12)
    assert torch.allclose(out, torch.ones_like(out))


# --- Fused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("proj", [False, True], ids=["no proj", "proj"])
@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
@pytest.mark.parametrize("similarity", [-1.0, 0.3])
def test_fused_is_its_parts(over, similarity, proj):
    q, k, v = qkv()
    weight, bias = (torch.randn(8, 8, dtype=D64), torch.randn(8, dtype=D64)) if proj else [None] * 2
    options = {"topk": 2, "topp": 0.3, "negligible": 0.3}
    got = sla.sla(
        q, k, v, **options, over=over, similarity=similarity, proj_weight=weight, proj_bias=bias,
        **BLOCKS,
    )  # fmt: skip
    (pooled_q, alike_q), (pooled_k, alike_k) = sla.pool(q, block=8), sla.pool(k, block=4)
    if similarity > -1:
        options |= {"similar_q": alike_q > similarity, "similar_k": alike_k > similarity}
        assert 0 < int((alike_k > similarity).sum()) < alike_k.numel()
    selected, marginal = sla.block_mask(pooled_q, pooled_k, **options)
    h, z = sla.summaries(k, v, block_k=4)
    csr = {"all": None, "unselected": selected, "marginal": marginal}[over]
    rest = sla.linear_attention(q, h, z, csr, over=over, block_q=8)
    rest = rest if weight is None else rest @ weight.T + bias
    assert torch.allclose(got, sla.sparse_attention(q, k, v, selected, **BLOCKS) + rest)


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_low_precision(format):
    """The mask is taken from the float32 run: a tie broken otherwise is not an error."""
    q, k, v = qkv(dtype=getattr(torch, format))
    wide = [x.double() for x in (q, k, v)]
    csr = mask_of(q, k, 8, 4, topk=3)
    error = checks.accuracy(
        sla.sparse_attention(q, k, v, csr, **BLOCKS),
        sla.sparse_attention(*wide, csr, **BLOCKS),
    )
    assert sla.TOLERANCE[format].accepts(error), error
    summaries = sla.summaries(k, v, block_k=4), sla.summaries(*wide[1:], block_k=4)
    linear = [
        sla.linear_attention(x, *hz, csr, over="unselected", block_q=8)
        for x, hz in zip((q, wide[0]), summaries, strict=True)
    ]
    error = checks.accuracy(*linear)
    assert sla.TOLERANCE[format].accepts(error), error


@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
def test_gradients_match_finite_differences(over):
    """Of everything but the choice of blocks, which is a step function."""
    q, k, v = (x.requires_grad_() for x in qkv(5, 7, B=1, H=2, H_kv=1, D=3))
    weight, bias = (torch.randn(s, dtype=D64).requires_grad_() for s in ((3, 3), (3,)))

    def call(q, k, v, weight, bias):
        return sla.sla(
            q, k, v, topk=2, over=over, negligible=0.3, proj_weight=weight, proj_bias=bias,
            block_q=4, block_k=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, weight, bias))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_a_value_stays_in_its_head(bad):
    q, k, v = qkv()
    v[0, 3, 1, 2] = bad
    out = sla.sla(q, k, v, **BLOCKS, topk=3, over="unselected")
    assert not out[0, :, 2:, 2].isfinite().any()
    assert out[0, :, :2].isfinite().all()
    assert out[1].isfinite().all()


# --- Cached segments ----------------------------------------------------------------------------


def segments(N, *, O=2, T=5, L=20, B=2, H=2, D=8, format="plain", **options):  # noqa: E741
    torch.manual_seed(N)
    dtype = D64 if format == "plain" else torch.float16
    options = {"format": format, "dtype": dtype, "summaries": "block"} | options
    cache = rope_kv.make_cache(B, T, N, H, D, **options)
    k, v = (torch.randn(B, T * N, H * D, dtype=D64) for _ in range(2))
    rope_kv.write(k, v, cache, torch.arange(T), num_heads=H)
    return torch.randn(O, B, L, H, D, dtype=D64), cache


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
def test_one_offset_is_plain_sla(over, phi):
    """N = 64: the blocks of the cache are those of the gathered keys."""
    q, cache = segments(64, O=1, phi=phi)
    table = torch.tensor([3, 0, 4, 2])
    options = {"topk": 2, "negligible": 0.3, "over": over, "block_q": 8}
    got = sla.segment_sla(q, cache, table, torch.zeros(4, dtype=torch.int64), **options)
    k, v = cache.k[:, table].flatten(1, 2), cache.v[:, table].flatten(1, 2)
    assert torch.allclose(got, sla.sla(q[0], k, v, phi=phi, **options))


@pytest.mark.parametrize("format", ["plain", "int8"])
@pytest.mark.parametrize("N", [6, 70])
@pytest.mark.parametrize("O", [1, 2], ids="O={}".format)
def test_every_block_selected_is_segment_attention(O, N, format):  # noqa: E741
    """Over "unselected" nothing is left for the linear branch."""
    q, cache = segments(N, O=O, format=format)
    table, offsets = torch.tensor([3, -1, 0, 2]), torch.tensor([0, 0, O - 1, 0])
    got = sla.segment_sla(q, cache, table, offsets, topk=1.0, over="unselected", block_q=8)
    assert torch.allclose(got, segment_attention(q, cache, table, offsets), atol=1e-9)


@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
def test_each_segment_is_scored_by_its_query(over):
    """Two offsets, block by block, with a ragged tail and an absent entry."""
    q, cache = segments(70)
    table, offsets = torch.tensor([3, -1, 0, 2]), torch.tensor([0, 0, 1, 1])
    options = {"topk": 2, "negligible": 0.34, "block_q": 20}
    got = sla.segment_sla(q, cache, table, offsets, over=over, **options)
    blocks = [(s, o, b) for s, o in ((3, 0), (0, 1), (2, 1)) for b in range(2)]
    for batch in range(2):
        for head in range(2):
            rows = q[:, batch, :, head]
            rank = [float(rows[o].mean(0) @ cache.pooled[batch, s, b, head]) for s, o, b in blocks]
            order = sorted(range(6), key=lambda j: -rank[j])
            kept, rest = sorted(order[:2]), sorted(order[2:])
            covered = {"all": range(6), "unselected": rest, "marginal": sorted(order[2:4])}[over]
            scores, values, above, below = [], [], 0, 1e-5
            for j, (s, o, b) in enumerate(blocks):
                here = slice(b * 64, b * 64 + 64)
                k, v = cache.k[batch, s, here, head], cache.v[batch, s, here, head]
                if j in kept:
                    scores.append(rows[o] @ k.T / 8**0.5)
                    values.append(v)
                if j in covered:
                    weight = rows[o].softmax(-1) @ k.softmax(-1).T
                    above, below = above + weight @ v, below + weight.sum(1, keepdim=True)
            want = torch.cat(scores, 1).softmax(1) @ torch.cat(values) + above / below
            assert torch.allclose(got[batch, :, head], want)


@pytest.mark.parametrize("format", ["plain", "int8"])
def test_over_all_summaries_of_slots_will_do(format):
    """Results differ by roundings of sums: of float64, or of float32 in an 8-bit cache."""
    (q, blocks), (_, slots) = (segments(150, format=format, summaries=s) for s in ("block", "slot"))
    assert (blocks.h.shape[2], slots.h.shape[2]) == (3, 1)
    where = torch.tensor([3, -1, 0, 2]), torch.tensor([0, 0, 1, 0])
    want, got = (sla.segment_sla(q, cache, *where, topk=2) for cache in (blocks, slots))
    assert torch.allclose(got, want, rtol=0, atol=1e-12 if format == "plain" else 1e-6)
    assert not torch.allclose(got, sla.segment_sla(q, slots, *where, topk=2, eps=1.0))


@pytest.mark.parametrize("summaries", ["block", "slot"])
@pytest.mark.parametrize("format", ["plain", "int8"])
def test_absent_slots_are_never_read(format, summaries):
    q, cache = segments(70, format=format, summaries=summaries)
    table, offsets = torch.tensor([3, -1, 0, -1]), torch.tensor([0, 1, 1, 1])
    before = sla.segment_sla(q, cache, table, offsets, topk=2)
    for part in (cache.v, cache.k_scale, cache.k_mean, cache.v_scale, cache.h, cache.z):
        if part is not None:
            part[:, [1, 2, 4]] = torch.nan
    assert torch.equal(before, sla.segment_sla(q, cache, table, offsets, topk=2))
    assert before.isfinite().all()
    nothing = sla.segment_sla(q, cache, table.clamp(max=-1), offsets, topk=2)
    assert not nothing.any()


def test_out_is_written_in_place():
    q, k, v = qkv()
    out = torch.empty_like(q)
    assert sla.sla(q, k, v, out=out) is out
    assert torch.equal(out, sla.sla(q, k, v))
    q, cache = segments(6)
    where, out = (torch.tensor([1]), torch.tensor([0])), torch.empty_like(q[0])
    assert sla.segment_sla(q, cache, *where, out=out) is out
    assert torch.equal(out, sla.segment_sla(q, cache, *where))


def test_flops_and_bytes():
    dense, tenth = (sla.flops(1, 128, 640, 2, 8, share=s) for s in (1.0, 0.1))
    linear = 2 * 2 * 768 * 8 * 9
    assert dense - linear == 10 * (tenth - linear) == 4 * 2 * 128 * 640 * 8
    plain = sla.bytes(1, 128, 640, 2, 8, share=0.1)
    assert plain == (2 * 128 + 2 * 640) * 16 * 2
    cached = sla.bytes(1, 128, 640, 2, 8, share=0.1, kv_itemsize=1, summaries="block")
    read = 2 * 128 * 16 * 2 + 2 * 64 * 16
    assert cached == read + 10 * 16 * 4 * 10
    kinds = {"share": 0.1, "kv_itemsize": 1, "summaries": "slot", "slots": 4}  # of 160 tokens
    assert sla.bytes(1, 128, 640, 2, 8, **kinds) == read + 4 * 16 * 4 * (3 + 9)


q, k, v = qkv()
pq, pk = torch.randn(2, 3, 4, 8, dtype=D64), torch.randn(2, 8, 2, 8, dtype=D64)
csr = mask_of(q, k, 8, 4, topk=2)
h, z = sla.summaries(k, v, block_k=4)
sq, cache = segments(4)
at = torch.tensor([0, 1])
bare = rope_kv.make_cache(2, 5, 4, 2, 8, dtype=D64)
whole = segments(65, summaries="slot")[1]

ERRORS = {
    "pooled_q: expected 4 dim": lambda: sla.block_mask(pq[0], pk, topk=1),
    "pooled_k: expected shape": lambda: sla.block_mask(pq, pk[:1], topk=1),
    "pooled_k .its heads H_kv.: expected a divisor": lambda: sla.block_mask(
        pq, pk.repeat(1, 1, 4, 1)[:, :, :3], topk=1
    ),
    "pooled_k .its blocks nK.: expected at least 1": lambda: sla.block_mask(pq, pk[:, :0], topk=1),
    "topk, topp: expected at least one": lambda: sla.block_mask(pq, pk),
    "topk: expected a finite number > 0, got 0": lambda: sla.block_mask(pq, pk, topk=0),
    "topk: expected a share <= 1.0": lambda: sla.block_mask(pq, pk, topk=1.5),
    "topp: expected a probability": lambda: sla.block_mask(pq, pk, topp=math.nan),
    "negligible: expected a share": lambda: sla.block_mask(pq, pk, topk=1, negligible=1.0),
    "similar_q: expected dtype torch.bool": lambda: sla.block_mask(
        pq, pk, topk=1, similar_q=torch.ones(2, 3, 4)
    ),
    "similar_k: expected shape": lambda: sla.block_mask(
        pq, pk, topk=1, similar_k=torch.ones(2, 3, 4).bool()
    ),
    "block: expected at least 1": lambda: sla.pool(q, block=0),
    "phi: expected 'softmax'": lambda: sla.summaries(k, v, phi="exp"),
    "v: expected shape .B, S, H, E. of k": lambda: sla.summaries(k, v[:, :3]),
    "csr.indptr: expected shape": lambda: sla.sparse_attention(q, k, v, csr),
    "csr.indices: expected dtype torch.int32": lambda: sla.sparse_attention(
        q, k, v, sla.CSR(csr.indptr, csr.indices.long()), **BLOCKS
    ),
    "csr.indptr: expected the device": lambda: sla.sparse_attention(
        q, k, v, sla.CSR(csr.indptr.to("meta"), csr.indices), **BLOCKS
    ),
    "similar_q: expected the device": lambda: sla.block_mask(
        pq, pk, topk=1, similar_q=torch.ones(2, 3, 4).bool().to("meta")
    ),
    "z: expected the device": lambda: sla.linear_attention(q, h, z.to("meta")),
    "proj_weight: expected the device": lambda: sla.sla(
        q, k, v, proj_weight=torch.eye(8).to("meta")
    ),
    "pv_skip: expected a distance > 0, got nan": lambda: sla.sla(q, k, v, pv_skip=math.nan),
    "pv_skip: expected a distance > 0": lambda: sla.sparse_attention(
        q, k, v, csr, **BLOCKS, pv_skip=-1
    ),
    "block_k: expected at least 1": lambda: sla.sparse_attention(q, k, v, csr, block_k=0),
    "k: expected shape": lambda: sla.sla(q, k[:1], v),
    "k .its length S_kv.: expected at least 1": lambda: sla.sla(q, k[:, :0], v[:, :0]),
    "h: expected 5 dim": lambda: sla.linear_attention(q, h[0], z),
    "h: expected shape": lambda: sla.linear_attention(q, h[..., :4, :], z),
    "z: expected shape": lambda: sla.linear_attention(q, h, z[:, :2]),
    "over: expected 'all'": lambda: sla.linear_attention(q, h, z, over="none"),
    "csr: expected None": lambda: sla.linear_attention(q, h, z, csr),
    "csr: expected .* got None with over='marginal'": lambda: sla.linear_attention(
        q, h, z, over="marginal"
    ),
    "eps: expected a finite": lambda: sla.linear_attention(q, h, z, eps=0),
    "proj_weight: expected shape": lambda: sla.sla(q, k, v, proj_weight=torch.eye(4)),
    "proj_bias: expected None": lambda: sla.sla(q, k, v, proj_bias=torch.ones(8)),
    "cache: expected a cache with summaries": lambda: sla.segment_sla(sq, bare, at, at),
    "over: expected 'all' with a cache whose summaries are of whole slots, got 'marginal'": (
        lambda: sla.segment_sla(sq, whole, at, at, over="marginal")
    ),
    "block_table .its length T.: expected": lambda: sla.segment_sla(sq, cache, at[:0], at[:0]),
    "offset_index: expected shape": lambda: sla.segment_sla(sq, cache, at, at[:1]),
    "out: expected shape": lambda: sla.sla(q, k, v, out=k),
}


@pytest.mark.parametrize("message", ERRORS)
def test_error_names_the_argument(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ERRORS[message]()
