# SPDX-License-Identifier: Apache-2.0
"""Triton's sla against the oracle in float64: the mask exactly, the rest within TOLERANCE.

Scores are away from thresholds unless a test says otherwise: sums in another order may differ in
their last bit, and a tie that only rounding decides is no error.  Equal inputs give equal scores,
so real ties are compared exactly.
"""

from __future__ import annotations

import functools

import pytest
import torch

from reeltime import checks, rope_kv, sla
from reeltime.arch import UnsupportedArchError
from reeltime.sla import api

INF = float("inf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OVER = ("all", "unselected", "marginal")
BLOCKS = {"block_q": 8, "block_k": 4}


def qkv(device, S_q=19, S_kv=30, *, B=1, H=4, H_kv=2, D=20, E=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, S_q, H, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, E or D)
    return [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def close(got, want, format="float32"):
    error = checks.accuracy(got.cpu(), want.cpu())
    assert api.TOLERANCE[format].accepts(error), error
    assert got.is_contiguous()


def both(function, *args, format="float32", **options):
    """The kernel's result is within tolerance of the oracle's in float64."""
    got = function(*args, **options, backend="triton")
    want = function(
        *map(wide, args), **{k: wide(x) for k, x in options.items()}, backend="reference"
    )
    if isinstance(got, tuple):
        for a, b in zip(got, want, strict=True):
            close(a, b, format)
    else:
        close(got, want, format)
    return got


def mask_of(q, k, block_q, block_k, **options):
    pooled = sla.pool(q, block=block_q)[0], sla.pool(k, block=block_k)[0]
    return sla.block_mask(*pooled, **options, backend="reference")


# --- The mask -----------------------------------------------------------------------------------

MASKS = {
    "one": {"topk": 1},
    "count": {"topk": 3},
    "share": {"topk": 0.5},
    "top p": {"topp": 0.6},
    "all of p": {"topp": 1.0},
    "union": {"topk": 2, "topp": 0.5},
    "marginal": {"topk": 3, "negligible": 0.25},
    "union, marginal": {"topk": 2, "topp": 0.5, "negligible": 0.3},
}


def same_lists(pooled_q, pooled_k, **options):
    """Selected and marginal lists, entry for entry."""
    got, want = (
        sla.block_mask(pooled_q, pooled_k, **options, backend=backend)
        for backend in ("triton", "reference")
    )
    pairs = zip(got, want, strict=True) if "negligible" in options else [(got, want)]
    for a, b in pairs:
        assert torch.equal(a.indptr, b.indptr)
        assert torch.equal(a.indices, b.indices)
        assert a.indices.dtype == a.indptr.dtype == torch.int32
        assert a.indices.is_contiguous()
    return got


def pooled(device, rows, n, H=2, H_kv=1, D=20, B=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(s, generator=g) for s in ((B, rows, H, D), (B, n, H_kv, D)))
    return q.to(device), k.to(device)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_mask(options, device):
    same_lists(*pooled(device, 3, 13), **options)


@pytest.mark.parametrize("options", [MASKS["count"], MASKS["union, marginal"]], ids=str)
def test_ties_go_to_the_lower_block(options, device):
    """Integers: many scores are equal, and sums in any order are exact."""
    q, k = pooled(device, 3, 20, H_kv=2, D=3)
    same_lists(q.round(), k.round(), **options)
    same_lists(torch.ones_like(q), torch.ones_like(k), **options)


@pytest.mark.parametrize("options", [MASKS["count"], MASKS["union, marginal"]], ids=str)
def test_guards(options, device):
    q, k = pooled(device, 3, 13, H=4, H_kv=2)
    g = torch.Generator().manual_seed(1)
    similar_q = (torch.rand(4, 1, 3, generator=g) > 0.3).to(device).permute(1, 2, 0)
    similar_k = (torch.rand(1, 13, 2, generator=g) > 0.3).to(device)
    same_lists(q, k, similar_q=similar_q, similar_k=similar_k, **options)
    same_lists(q, k, similar_k=torch.zeros_like(similar_k), **options)  # nothing is ranked


def test_mask_of_what_is_not_finite(device):
    q, k = pooled(device, 3, 9, H_kv=2)
    q[0, 1], k[0, 2, 0], k[0, 3, 1] = torch.nan, torch.inf, -torch.inf
    for options in (MASKS["count"], MASKS["union, marginal"]):
        same_lists(q, k, **options)


def test_mask_reads_any_strides_and_16_bits(device):
    q, k = (x.to(torch.bfloat16) for x in pooled(device, 17, 70, B=2))
    q = q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    k = torch.stack([k, k], 3)[:, :, :, 0]
    same_lists(q[:, ::6], k, topk=0.1)
    same_lists(q[:, :0], k, topk=0.1)


def test_mask_of_a_window(device):
    same_lists(*pooled(device, 2, 670, H=1, D=128), topk=0.1, negligible=0.1)


# --- The sparse branch --------------------------------------------------------------------------


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("blocks", [(8, 4), (7, 40)], ids=str)
def test_sparse(format, blocks, device):
    q, k, v = qkv(device, dtype=DTYPES[format])
    csr = mask_of(q, k, *blocks, topk=0.4)
    both(
        sla.sparse_attention, q, k, v, csr, block_q=blocks[0], block_k=blocks[1], return_lse=True,
        format=format,
    )  # fmt: skip


@pytest.mark.parametrize(
    "lengths, blocks, heads, dims",
    [
        ((1, 1), (128, 64), (1, 1), (16, 16)),
        ((150, 150), (150, 100), (1, 1), (16, 16)),  # blocks larger than a tile of either
        ((40, 70), (16, 16), (4, 1), (8, 36)),  # E != D
        ((33, 65), (32, 32), (2, 2), (96, 96)),
    ],
    ids=str,
)
def test_sparse_shapes(lengths, blocks, heads, dims, device):
    q, k, v = qkv(device, *lengths, H=heads[0], H_kv=heads[1], D=dims[0], E=dims[1])
    csr = mask_of(q, k, *blocks, topk=2)
    options = {"block_q": blocks[0], "block_k": blocks[1], "sm_scale": 0.3}
    both(sla.sparse_attention, q, k, v, csr, **options, return_lse=True)


@pytest.mark.parametrize("smooth", ["block", None])
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_sparse_in_8_bits(pv, smooth, device):
    q, k, v = qkv(device, 70, 300, B=2, D=32, E=48)
    csr = mask_of(q, k, 32, 64, topk=2)
    options = {"block_q": 32, "pv_skip": 9.0, "return_lse": True}
    low = {"qk": "int8", "pv": pv, "smooth": smooth}
    # Probabilities of fp8 values stay in float16 here
    near = "float16" if pv == "fp16" else "fp8"
    got = both(sla.sparse_attention, q, k, v, csr, **options, **low, format=near)
    exact = sla.sparse_attention(q, k, v, csr, **options)
    close(got[0], exact[0], "int8" if pv == "fp16" else "fp8")
    assert not torch.equal(got[0], exact[0])


def test_8_bits_that_are_not_served(device):
    q, k, v = qkv(device, 8, 64)
    with pytest.raises(UnsupportedArchError, match="qk='fp8', pv='fp8'.*'reference' has every"):
        sla.sla(q, k, v, qk="fp8", pv="fp8", backend="triton")
    with pytest.raises(UnsupportedArchError, match="block_k=64, not 32"):
        sla.sla(q, k, v, qk="int8", pv="fp8", block_k=32, backend="triton")


def test_sparse_reads_any_strides(device):
    q, k, v = qkv(device, B=2, H=2)
    csr = mask_of(q, k, 8, 4, topk=2)
    views = [torch.cat([x, x], 3).transpose(0, 1)[..., : x.shape[3]] for x in (q, k, v)]
    views = [x.contiguous().transpose(0, 1) for x in views]
    csr = sla.CSR(*(torch.stack([x, x], -1)[..., 0] for x in csr))
    both(sla.sparse_attention, *views, csr, **BLOCKS)


def test_rows_without_blocks_are_zero(device):
    q, k, v = qkv(device, 16, 8, H=1, H_kv=1)
    lists = torch.tensor([[[0, 0, 1]]]).int(), torch.tensor([[[1, -1]]]).int()
    csr = sla.CSR(*(x.to(device) for x in lists))
    out, lse = both(sla.sparse_attention, q, k, v, csr, **BLOCKS, return_lse=True)
    assert not out[:, :8].any()
    assert (lse[..., :8] == -INF).all()


def test_nothing_is_computed_of_nothing(device):
    q, k, v = qkv(device, 0, 8)
    csr = mask_of(q, k, 8, 4, topk=1)
    assert sla.sparse_attention(q, k, v, csr, **BLOCKS, backend="triton").shape == q.shape
    assert sla.sla(q, k, v, **BLOCKS, backend="triton").shape == q.shape


@pytest.mark.parametrize("skip", [0.5, 2.0, 6.0])
def test_pv_skip(skip, device):
    """Blocks in ascending order, the best of them in the middle; one near row keeps a block."""
    q, k, v = qkv(device, 19, 30, H=2)
    csr = mask_of(q, k, 8, 4, topk=5)
    k *= 4
    options = {**BLOCKS, "sm_scale": 1.0, "pv_skip": skip}
    out = both(sla.sparse_attention, q, k, v, csr, **options)
    exact = sla.sparse_attention(q, k, v, csr, **BLOCKS, sm_scale=1.0)
    assert not torch.allclose(out, exact) or skip == 6.0


# --- The linear branch --------------------------------------------------------------------------


@pytest.mark.parametrize("phi", api.PHI)
@pytest.mark.parametrize("over", OVER)
def test_linear(over, phi, device):
    q, k, v = qkv(device, E=24)
    h, z = sla.summaries(k, v, block_k=4, phi=phi)
    selected, marginal = mask_of(q, k, 8, 4, topk=2, negligible=0.3)
    csr = {"all": None, "unselected": selected, "marginal": marginal}[over]
    both(sla.linear_attention, q, h, z, csr, over=over, block_q=8, phi=phi)


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_linear_in_16_bits(format, device):
    q, k, v = qkv(device, 19, 300, dtype=DTYPES[format])
    h, z = sla.summaries(k, v, block_k=4)
    csr = mask_of(q, k, 8, 4, topk=2)
    both(sla.linear_attention, q, h, z, csr, over="unselected", block_q=8, format=format)
    both(sla.linear_attention, q, h, z, format=format)


def test_linear_reads_any_strides(device):
    q, k, v = qkv(device)
    h, z = sla.summaries(k, v, block_k=4)
    q, h, z = (x.transpose(-1, 1).contiguous().transpose(-1, 1) for x in (q, h, z))
    both(sla.linear_attention, q, h, z)
    both(sla.linear_attention, q, h, z, mask_of(q, k, 8, 4, topk=1), over="unselected", block_q=8)


def test_what_is_left_is_summed_not_subtracted(device):
    """The selected blocks outweigh the rest by 2^30: total - selected would have no bit of it."""
    q, k, v = qkv(device, 8, 12, H=1, H_kv=1)
    h, z = sla.summaries(k, v, block_k=4)
    h[:, 1] *= 2.0**30
    lists = torch.tensor([[[0, 1]]]).int(), torch.tensor([[[1]]]).int()
    csr = sla.CSR(*(x.to(device) for x in lists))
    both(sla.linear_attention, q, h, z, csr, over="unselected", block_q=8)


def test_linear_over_nothing_is_zero(device):
    q, k, v = qkv(device, 8, 8)
    h, z = sla.summaries(k, v, block_k=4)
    csr = mask_of(q, k, 8, 4, topk=1.0)
    options = {"over": "unselected", "block_q": 8, "backend": "triton"}
    assert not sla.linear_attention(q, h, z, csr, **options).any()
    assert not sla.linear_attention(q, h[:, :0], z[:, :0], backend="triton").any()


# --- Fused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("similarity", [-1.0, 0.3])
def test_fused(over, similarity, device):
    q, k, v = qkv(device)
    weight, bias = (torch.randn(s).to(device) for s in ((20, 20), (20,)))
    options = {"topk": 2, "topp": 0.3, "negligible": 0.3, "over": over, "similarity": similarity}
    phi = {"all": "softmax", "unselected": "elu", "marginal": "relu"}[over]
    both(sla.sla, q, k, v, **options, **BLOCKS, phi=phi, proj_weight=weight.t(), proj_bias=bias)


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_fused_in_16_bits(format, device):
    q, k, v = qkv(device, 30, 50, H=2, dtype=DTYPES[format])
    both(sla.sla, q, k, v, topk=2, block_q=16, block_k=16, format=format)
    both(sla.sla, q, k, v, topk=2, over="unselected", block_q=16, block_k=16, format=format)


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_fused_in_8_bits(pv, device):
    q, k, v = qkv(device, 140, 200, H=2, D=32, dtype=torch.bfloat16)
    both(sla.sla, q, k, v, topk=2, qk="int8", pv=pv, format="bfloat16" if pv == "fp16" else "fp8")
    got = sla.sla(q, k, v, topk=2, qk="int8", pv=pv, backend="triton")
    close(got, sla.sla(*map(wide, (q, k, v)), topk=2), "int8" if pv == "fp16" else "fp8")


def test_fused_at_its_default_blocks(device):
    q, k, v = qkv(device, 200, 300, H=1, H_kv=1)
    both(sla.sla, q, k, v, topk=0.5)
    q, k, v = qkv(device, 9, 1100, H=1, H_kv=1)
    both(sla.sla, q, k, v, pv_skip=1.0)  # more than one program sums the keys


def test_fused_with_wide_heads(device):
    """D = 136 is a tile of 256, whose h is shared by programs of 64 channels each."""
    q, k, v = qkv(device, 8, 12, H=1, H_kv=1, D=136)
    both(sla.sla, q, k, v, topk=1, over="unselected", **BLOCKS)
    both(sla.sla, q, k, v, topk=1, similarity=0.1, **BLOCKS)
    same_gradients(functools.partial(sla.sla, topk=1, **BLOCKS), q, k, v)


def outliers(q, k, v):
    k[..., 3::16] = 3 * k[..., 3::16] + 20


def zeros(q, k, v):
    q[:, :8], k[:, :8], v[:, 8:12] = 0, 0, 0


def constants(q, k, v):
    q[:], k[:], v[:] = (x[:, :1].mul(16).round().div(16).clone() for x in (q, k, v))


@pytest.mark.parametrize("spoil", [outliers, zeros, constants])
@pytest.mark.parametrize("over", ["all", "unselected"])
def test_fused_on_hard_inputs(spoil, over, device):
    q, k, v = qkv(device, H=2)
    spoil(q, k, v)
    both(sla.sla, q, k, v, topk=3, topp=0.4, similarity=0.1, over=over, **BLOCKS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_a_value_stays_in_its_head(bad, device):
    q, k, v = qkv(device, 12, 22, B=2)
    v[0, 3, 1, 2] = bad
    out = sla.sla(q, k, v, **BLOCKS, topk=3, over="unselected", backend="triton")
    assert not out[0, :, 2:, 2].isfinite().any()
    assert out[0, :, :2].isfinite().all()
    assert out[1].isfinite().all()


def test_nan_in_a_query_reaches_its_block_alone(device):
    q, k, v = qkv(device)
    q[0, 2, 1, 3] = torch.nan
    out = sla.sla(q, k, v, **BLOCKS, topk=3, backend="triton")
    assert out[0, 2, 1].isnan().all()
    out[0, 2, 1] = 0
    assert out.isfinite().all()


def test_out_is_written_in_place(device):
    q, k, v = qkv(device, H=2)
    out = torch.empty_like(q)
    assert sla.sla(q, k, v, **BLOCKS, out=out, backend="triton") is out
    assert torch.equal(out, sla.sla(q, k, v, **BLOCKS, backend="triton"))  # and deterministic


# --- Cached segments ----------------------------------------------------------------------------


def stream(device, N, *, O=2, T=5, L=20, H=2, D=20, format="plain", phi="softmax", **options):  # noqa: E741
    g = torch.Generator().manual_seed(N)
    options = {"format": format, "phi": phi, "device": device, "summaries": "block"} | options
    cache = rope_kv.make_cache(1, T, N, H, D, **options)
    k, v = (torch.randn(1, T * N, H * D, generator=g).to(device) for _ in range(2))
    rope_kv.write(k, v, cache, torch.arange(T, device=device), num_heads=H, backend="reference")
    return torch.randn(O, 1, L, H, D, generator=g).to(device), cache


def doubled(cache):
    """The same numbers in float64, but for what the format stores."""
    fields = {
        name: x.double() if torch.is_tensor(x) and x.dtype in DTYPES.values() else x
        for name, x in vars(cache).items()
    }
    if cache.format == "int8":
        fields["v"] = cache.v
    return rope_kv.KVCache(**fields)


def both_streams(q, cache, table, offsets, format="float32", **options):
    got = sla.segment_sla(q, cache, table, offsets, **options, backend="triton")
    options |= {k: wide(x) for k, x in options.items() if torch.is_tensor(x)}
    kept = q.float() if cache.format == "int8" else q.double()  # its 8 bits are of float32
    source = cache if cache.format == "int8" else doubled(cache)
    want = sla.segment_sla(kept, source, table, offsets, **options, backend="reference")
    close(got, want, format)
    return got


def lists(device, table, offsets):
    return torch.tensor(table, device=device), torch.tensor(offsets, device=device)


@pytest.mark.parametrize("over, phi", list(zip(OVER, ("elu", "softmax", "relu"), strict=True)))
def test_segments(over, phi, device):
    """Two offsets, interleaved, a ragged tail and an absent entry."""
    q, cache = stream(device, 70, phi=phi)
    where = lists(device, [3, -1, 0, 2], [1, 0, 0, 1])
    both_streams(q, cache, *where, topk=2, negligible=0.34, block_q=20, over=over)


def test_segments_with_summaries_of_slots(device):
    """More of them than are added at a time."""
    q, cache = stream(device, 70, T=11, summaries="slot")
    table = [3, -1, 0, 2, 10, 5, 4, 9, 1, 8, 7]
    where = lists(device, table, [1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1])
    assert cache.h.shape[2] == 1
    both_streams(q, cache, *where, topk=2, block_q=20)


@pytest.mark.parametrize("value", ["fp8", "float16"])
@pytest.mark.parametrize("block_q", [8, 64])
def test_segments_in_8_bits(value, block_q, device):
    dtype = torch.float8_e4m3fn if value == "fp8" else torch.float16
    q, cache = stream(device, 70, L=70 if block_q == 64 else 20, H=1, format="int8", dtype=dtype)
    where = lists(device, [3, -1, 0, 2], [1, 0, 0, 1])
    both_streams(
        q, cache, *where, topk=3, block_q=block_q, format="fp8" if value == "fp8" else "float16"
    )


def test_8_bits_keep_every_bit_of_the_integer_product(device):
    """What is left of the error is float16 of p and v: the scores are those of the oracle."""
    q, cache = stream(device, 64, O=1, L=64, format="int8", dtype=torch.float16)
    q *= 4
    where = lists(device, [3, 0], [0, 0])
    both_streams(q, cache, *where, topk=2, over="unselected", format="float16")


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_segments_in_16_bits(format, device):
    q, cache = stream(device, 70, dtype=DTYPES[format])
    where = lists(device, [3, -1, 0, 2], [0, 0, 1, 1])
    both_streams(q.to(DTYPES[format]), cache, *where, topk=3, block_q=16, format=format)
    both_streams(q, cache, *where, topk=3, block_q=16)  # float32 queries of a 16-bit cache


def test_more_blocks_than_one_correction(device):
    """17 selected blocks and more: the products q.mu come in groups of 16."""
    q, cache = stream(device, 300, O=1, L=16, H=1, format="int8", dtype=torch.float16)
    where = lists(device, [4, 1, 0, 2, 3], [0] * 5)
    both_streams(q, cache, *where, topk=21, block_q=16, format="float16")


def test_pv_skip_visits_segments_in_order(device):
    q, cache = stream(device, 70)
    where = lists(device, [3, -1, 0, 2], [1, 0, 0, 1])
    both_streams(3 * q, cache, *where, topk=5, pv_skip=1.0, block_q=8, sm_scale=1.0)


def test_segments_project(device):
    q, cache = stream(device, 70)
    where = lists(device, [3, 1, 0, 2], [1, 0, 0, 1])
    weight, bias = (torch.randn(s).to(device) for s in ((20, 20), (20,)))
    options = {"proj_weight": weight, "proj_bias": bias, "block_q": 16}
    both_streams(q, cache, *where, **options, topp=0.5, topk=None)
    nothing = lists(device, [-1, -1], [0, 1])
    assert not sla.segment_sla(q, cache, *nothing, **options, backend="triton").any()


@pytest.mark.parametrize(
    "format, over, summaries",
    [("plain", "all", "block"), ("plain", "all", "slot"), ("int8", "unselected", "block")],
)
def test_absent_slots_are_never_read(format, over, summaries, device):
    dtype = torch.float16 if format == "int8" else torch.float32
    q, cache = stream(device, 70, format=format, dtype=dtype, summaries=summaries)
    where = lists(device, [3, -1, 0, -1], [0, 1, 1, 1])
    options = {"topk": 2, "over": over, "block_q": 16, "backend": "triton"}
    before = sla.segment_sla(q, cache, *where, **options)
    for part in (cache.v, cache.k_scale, cache.k_mean, cache.v_scale, cache.h, cache.z):
        if part is not None:
            part[:, [1, 2, 4]] = torch.nan
    assert torch.equal(before, sla.segment_sla(q, cache, *where, **options))
    assert before.isfinite().all()


# --- Gradients ----------------------------------------------------------------------------------


def gradients(function, tensors, backend, seed=5):
    """Of a random projection of every output, for those tensors that ask."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if backend == "reference":
        leaves = [x.detach().double().requires_grad_() for x in leaves]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=g).to(y.device) for y in outputs]
    sum((y * w.to(y.dtype)).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    return [x.grad for x in leaves]


def same_gradients(function, *tensors, limit=1e-5):
    got, want = (gradients(function, tensors, name) for name in ("triton", "reference"))
    for x, a, b in zip(tensors, got, want, strict=True):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        error = checks.accuracy(a.cpu(), b.cpu())
        assert error.relative_l1 < limit, error
        assert error.peak < 100 * limit, error


@pytest.mark.parametrize("blocks", [(8, 4), (40, 5), (7, 40)], ids=str)
@pytest.mark.parametrize("skip", [INF, 1.0])
def test_gradient_of_sparse_attention(blocks, skip, device):
    """Of out and lse; lengths are ragged, heads grouped; scores wide enough to skip something."""
    q, k, v = qkv(device, E=24)
    k *= 3
    csr = mask_of(q, k, *blocks, topk=3)
    options = {"block_q": blocks[0], "block_k": blocks[1], "pv_skip": skip, "return_lse": True}
    same_gradients(functools.partial(sla.sparse_attention, csr=csr, **options), q, k, v)


@pytest.mark.parametrize("over, phi", list(zip(OVER, api.PHI, strict=True)))
def test_gradient_of_linear_attention(over, phi, device):
    q, k, v = qkv(device, E=24)
    selected, marginal = mask_of(q, k, 8, 4, topk=2, negligible=0.3)
    csr = {"all": None, "unselected": selected, "marginal": marginal}[over]
    options = {"csr": csr, "over": over, "block_q": 8, "phi": phi}
    h, z = sla.summaries(k, v, block_k=4, phi=phi)
    same_gradients(functools.partial(sla.linear_attention, **options), q, h, z)


@pytest.mark.parametrize("over, phi", list(zip(OVER, ("elu", "relu", "softmax"), strict=True)))
def test_gradient_of_all_of_it(over, phi, device):
    q, k, v = qkv(device, 12, 22, H=2, H_kv=1)
    weight, bias = (torch.randn(s).to(device) for s in ((20, 20), (20,)))
    options = {"topk": 3, "negligible": 0.25, "over": over, "phi": phi, **BLOCKS}

    def call(q, k, v, proj_weight, proj_bias, backend):
        projection = {"proj_weight": proj_weight, "proj_bias": proj_bias}
        return sla.sla(q, k, v, **options, **projection, backend=backend)

    same_gradients(call, q, k, v, weight, bias)


def test_gradient_without_projection_and_with_guards(device):
    q, k, v = qkv(device, 40, 30, H=1, H_kv=1, E=24)
    options = {"topk": 2, "topp": 0.3, "similarity": 0.1, "block_q": 20, "block_k": 7}
    same_gradients(functools.partial(sla.sla, **options, over="unselected"), q, k, v)
    same_gradients(functools.partial(sla.sla, **options, pv_skip=1.0), q, k, v)


def test_gradient_in_16_bits_and_of_some(device):
    q, k, v = qkv(device, 30, 50, H=1, H_kv=1, dtype=torch.bfloat16)
    options = {"topk": 2, "block_q": 16, "block_k": 16}
    same_gradients(functools.partial(sla.sla, **options), q, k, v, limit=2e-2)
    same_gradients(
        lambda q, backend: sla.sla(q, *(x.to(q.dtype) for x in (k, v)), **options, backend=backend),
        q,
        limit=2e-2,
    )


def test_gradient_is_deterministic(device):
    q, k, v = qkv(device, H=2)
    call = functools.partial(sla.sla, topk=2, over="unselected", **BLOCKS)
    first, second = (gradients(call, (q, k, v), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- What is refused ----------------------------------------------------------------------------


def test_refusals_say_who_serves(device):
    q, k, v = qkv(device, H=2)
    csr = mask_of(q, k, 8, 4, topk=1)
    doubles = [x.double() for x in (q, k, v)]
    with pytest.raises(UnsupportedArchError, match="float64 has backend='reference'"):
        sla.sla(*doubles, backend="triton")
    long = qkv(device, 300, 30, H=2)
    with pytest.raises(UnsupportedArchError, match="smaller blocks, or backend='reference'"):
        sla.sla(*long, pv_skip=3.0, block_q=512, backend="triton")
    with pytest.raises(UnsupportedArchError, match="float64"):
        sla.sparse_attention(*doubles, csr, **BLOCKS, backend="triton")
