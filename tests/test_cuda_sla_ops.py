# SPDX-License-Identifier: Apache-2.0
"""sla's ops on CUDA, whole, through the emulator: mask, linear branch and attention over lists."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulated import emulated

from reeltime import backends, checks, rope_kv, sla
from reeltime.arch import UnsupportedArchError
from reeltime.sla import api

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

OVER = ("all", "unselected", "marginal")
VALUES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}
SMS = (80, 90)


def draw(*shapes, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def qkv(S_q=150, S_kv=300, *, B=1, H=2, H_kv=1, D=64, **options):
    return draw((B, S_q, H, D), (B, S_kv, H_kv, D), (B, S_kv, H_kv, D), **options)


def wide(*tensors):
    return [x.double() for x in tensors]


def close(got, want, format):
    error = checks.accuracy(got, want)
    assert api.TOLERANCE[format].accepts(error), error
    assert got.is_contiguous()


def stream(*, N=150, O=2, T=4, L=150, H=2, D=64, values="fp8", summaries="block", phi="softmax"):  # noqa: E741
    """A query of each offset, and a cache of T slots."""
    options = {"format": "int8", "dtype": VALUES[values], "summaries": summaries, "phi": phi}
    cache = rope_kv.make_cache(1, T, N, H, D, **options)
    q, k, v = draw((O, 1, L, H, D), (1, T * N, H * D), (1, T * N, H * D), dtype=torch.float32)
    rope_kv.write(k, v, cache, torch.arange(T), num_heads=H)
    return q.bfloat16(), cache


def where(table, offsets):
    return torch.tensor(table), torch.tensor(offsets)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("qk, pv, smooth", [("int8", "fp16", "block"), ("fp8", "fp8", "sequence")])
def test_sparse_attention(qk, pv, smooth, sm):
    q, k, v = qkv()
    pooled = sla.pool(q, block=128)[0], sla.pool(k, block=64)[0]
    csr = sla.block_mask(*pooled, topk=2)
    low = {"qk": qk, "pv": pv, "smooth": smooth, "return_lse": True}
    with emulated("attention", "sla", sm=sm) as run:
        out, lse = sla.sparse_attention(q, k, v, csr, **low, backend="cuda")
    want, want_lse = sla.sparse_attention(*wide(q, k, v), csr, **low, backend="reference")
    close(out, want, "bfloat16" if pv == "fp16" else "fp8")
    assert (lse - want_lse).abs().max() < 0.01
    assert run.launches == ["encode_qkv_sm80", f"attention_sm{sm}"]


def test_a_row_without_blocks_is_zero():
    q, k, v = qkv(200, 64, H=1)
    csr = sla.CSR(torch.tensor([[[0, 0, 1]]]).int(), torch.tensor([[[0, -1]]]).int())
    with emulated("attention", "sla"):
        out, lse = sla.sparse_attention(
            q, k, v, csr, qk="int8", pv="fp16", return_lse=True, backend="cuda"
        )
    assert not out[:, :128].any()
    assert (lse[..., :128] == -torch.inf).all()
    assert out[:, 128:].abs().amin(-1).all()


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("projected", [False, True])
def test_fused(over, projected):
    q, k, v = qkv(B=2)
    options = {"topk": 2, "negligible": 0.3, "over": over, "similarity": 0.0}
    low = {"qk": "int8", "pv": "fp16"}
    weight, bias = draw((64, 64), (64,), dtype=torch.float32, seed=1)
    proj = {"proj_weight": weight / 8, "proj_bias": bias} if projected else {}
    with emulated("attention", "sla") as run:
        got = sla.sla(q, k, v, **options, **low, **proj, backend="cuda")
    proj = {name: x.double() for name, x in proj.items()}
    close(got, sla.sla(*wide(q, k, v), **options, **low, **proj), "bfloat16")
    assert len(run.launches) == 8 + projected


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    "over, phi", [("all", "softmax"), ("unselected", "elu"), ("marginal", "relu")]
)
def test_segments(over, phi, values, sm):
    """Two offsets, interleaved, a ragged tail and an absent entry."""
    q, cache = stream(values=values, phi=phi)
    at = where([3, -1, 0, 2], [1, 0, 0, 1])
    weight, bias = draw((64, 64), (64,), dtype=torch.float32, seed=1)
    options = {"topk": 3, "negligible": 0.34, "over": over}
    proj = {"proj_weight": weight / 8, "proj_bias": bias}
    with emulated("attention", "sla", sm=sm) as run:
        got = sla.segment_sla(q, cache, *at, **options, **proj, backend="cuda")
    want = sla.segment_sla(q.float(), cache, *at, **options, **proj, backend="reference")
    close(got, want, "bfloat16" if values == "fp16" else "fp8")
    assert run.launches[-1] == f"attention_sm{sm}"
    assert "pool_blocks_sm80" in run.launches


def test_segments_with_summaries_of_slots():
    q, cache = stream(summaries="slot", O=1)
    at = where([3, -1, 0, 2], [0, 0, 0, 0])
    with emulated("attention", "sla"):
        got = sla.segment_sla(q, cache, *at, topk=2, backend="cuda")
    close(got, sla.segment_sla(q.float(), cache, *at, topk=2, backend="reference"), "fp8")


def test_nothing_is_there_yet():
    """Every entry absent: zeros, the projection's bias included."""
    q, cache = stream()
    bias = torch.ones(64)
    with emulated("attention", "sla"):
        out = sla.segment_sla(
            *(q, cache, *where([-1, -1], [0, 1])), proj_weight=torch.eye(64), proj_bias=bias,
            backend="cuda",
        )  # fmt: skip
    assert not out.any()


def test_values_of_far_blocks_may_be_left_out():
    q, cache = stream(O=1)
    q = 4 * q
    at = where([3, 0, 2], [0, 0, 0])
    with emulated("attention", "sla"):
        exact = sla.segment_sla(q, cache, *at, topk=1.0, backend="cuda")
        near = sla.segment_sla(q, cache, *at, topk=1.0, pv_skip=12.0, backend="cuda")
    close(near, exact.double(), "bfloat16")


def test_gradient_is_that_of_triton():
    pytest.importorskip("triton")
    backends.load("sla", "cuda", "sla")
    q, k, v = (x.float().requires_grad_() for x in qkv(20, 70, D=16, H=1))
    op = backends.OPS["sparse_attention"]
    csr = sla.CSR(torch.tensor([[[0, 1]]]).int(), torch.tensor([[[1, -1]]]).int())
    args = (q.detach(), k.detach(), v.detach(), *csr, 128, 64, 0.25, float("inf"))
    grads = torch.ones_like(q), None
    got = op.gradients["cuda"]((*args, "int8", "fp16", "block"), grads, (True,) * 3 + (False,) * 9)
    out, _ = op.reference(q, k, v, *args[3:])
    want = torch.autograd.grad(out.sum(), (q, k, v))
    assert len(got) == 12
    for a, b in zip(got[:3], want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


REFUSALS = {
    "qk=None with pv=None.*backend='triton'": {},
    "lists of 128 queries and 64 keys, not of 64 and 64": {"block_q": 64},
    "not of 128 and 32": {"block_k": 32},
}


@pytest.mark.parametrize("said, options", REFUSALS.items())
def test_what_is_not_served_is_said(said, options):
    q, k, v = qkv()
    low = {"qk": "int8", "pv": "fp8"} if options else {}
    with emulated("attention", "sla"), pytest.raises(UnsupportedArchError, match=said):
        sla.sla(q, k, v, **low, **options, backend="cuda")
