# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of sla's mask: their own source on the emulator, entry for entry the reference.

Scores are integers, whose sums are exact in any order, so that ties are real and compared exactly;
or random, away from ties.
"""

from __future__ import annotations

import functools
import re
import shutil

import emulate
import parameters
import pytest
import torch
from device_build import device_builds, needs_nvcc
from emulated import emulated

from reeltime import sla
from reeltime.arch import UnsupportedArchError
from reeltime.attention import reference as attention
from reeltime.rope_kv import reference as rope_kv
from reeltime.sla import cuda_mask, reference

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INF, NAN = float("inf"), float("nan")


def draw(*shape, seed=0, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(dtype)


def whole(*shape, seed=0, dtype=torch.float32):
    """Integers from -4 to 4."""
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-4, 5, shape, generator=make).to(dtype)


def coins(*shape, share=0.8):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < share


def on(device, x):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def tensors(result):
    """Of a CSR, or of two."""
    return [part for csr in (result if len(result[0]) == 2 else [result]) for part in csr]


# --- The mask ------------------------------------------------------------------------------------

SCALE = 1 / 16  # exact
MASKS = {
    "one": {"topk": 1},
    "count": {"topk": 3},
    "share": {"topk": 0.1},
    "all": {"topk": 1.0},
    "top p": {"topp": 0.83},
    "all of p": {"topp": 1.0},
    "union": {"topk": 0.05, "topp": 0.37},
    "marginal": {"topk": 0.1, "negligible": 0.3},
    "union, marginal": {"topk": 2, "topp": 0.37, "negligible": 0.55},
}


def check(q, k, wanted=None, how=None, **options):
    """Selected and marginal lists are those of the reference (of `wanted` q and k)."""
    options.setdefault("sm_scale", SCALE)
    want = sla.block_mask(*(wanted or (q, k)), backend="reference", **options)
    with emulated("sla", gpu=not how, **(how or {})) as runner:
        given = {name: on(runner.device, x) for name, x in options.items()}
        got = sla.block_mask(*(on(runner.device, x) for x in (q, k)), backend="cuda", **given)
    if runner.device.type == "cpu":
        assert set(runner.launches) <= {"choose_blocks_sm80", "compress_codes_sm80"}
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a.cpu(), b)
        assert a.dtype == torch.int32
        assert a.is_contiguous()


@pytest.mark.parametrize("n", [1, 3, 64, 670])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_selection(options, n):
    """Few different scores: most thresholds lie among equal blocks."""
    if options.get("topk") == 3 and n == 1:
        options = {"topk": 1}
    check(whole(2, 9, 2, 16), whole(2, n, 1, 16), **options)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_random_scores(options):
    """Against float64: no two scores are as near as float32 cannot tell them apart."""
    q, k = draw(1, 17, 2, 128), draw(1, 300, 2, 128)
    check(q, k, (q.double(), k.double()), sm_scale=0.11, **options)


@pytest.mark.parametrize("options", [MASKS["share"], MASKS["union, marginal"]], ids=str)
def test_long_rows(options):
    """Rows of more scores than shared memory holds."""
    check(whole(1, 3, 1, 32), whole(1, 5000, 1, 32), **options)
    check(torch.ones(1, 2, 1, 8), torch.ones(1, 5000, 1, 8), **options)


def test_scores_in_memory(monkeypatch):
    """All row lengths, and rows of a tile that do not exist."""
    monkeypatch.setattr(cuda_mask, "ROWS_IN_SHARED", 0)
    for rows, n in ((1, 1), (9, 70), (16, 33)):
        check(whole(2, rows, 2, 16), whole(2, n, 2, 16), **MASKS["union, marginal"])


@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp32")], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 128, 256])
def test_formats(dim, dtypes):
    q, k = (DTYPES[name] for name in dtypes)
    check(whole(1, 5, 4, dim, dtype=q), whole(1, 40, 2, dim, dtype=k), **MASKS["union, marginal"])


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batches apart": lambda x: torch.stack([x, -x], 1)[:, 0],
    "an odd address": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]],
    "channels apart": lambda x: torch.stack([x, -x], -1)[..., 0],
    "dim of 5": lambda x: x[..., :5],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    q, k = whole(2, 5, 4, 32, dtype=torch.bfloat16), whole(2, 40, 2, 32, dtype=torch.bfloat16)
    check(LAYOUTS[name](q), LAYOUTS[name](k), **MASKS["union, marginal"])


@pytest.mark.parametrize("name", ["count", "top p", "union, marginal"])
@pytest.mark.parametrize("guards", ["queries", "keys", "both", "no key is like itself"])
def test_guards(guards, name):
    """Unlike queries take every block; unlike keys are taken by everybody, and not ranked."""
    given = {}
    if guards in ("queries", "both"):
        given["similar_q"] = coins(2, 9, 4)
    if guards != "queries":
        given["similar_k"] = coins(2, 70, 2, share=0 if "no" in guards else 0.8)
    check(whole(2, 9, 4, 16), whole(2, 70, 2, 16), **MASKS[name], **given)
    wide = {
        name: guard.transpose(0, 1).contiguous().transpose(0, 1) for name, guard in given.items()
    }
    check(whole(2, 9, 4, 16), whole(2, 70, 2, 16), **MASKS[name], **wide)


ODD = {
    "NaN in a query": lambda q, k: q[0, 2, 0, 3].fill_(NAN),
    "NaN in a key": lambda q, k: k[0, 37, 0, 3].fill_(NAN),
    "infinite queries": lambda q, k: q[0, 1:3].fill_(INF),
    "an infinite key": lambda q, k: k[0, 5, 0, 1].fill_(INF),
    "the lowest key": lambda q, k: (q.abs_(), k[0, 5, 0].fill_(-INF)),
    "only the lowest keys": lambda q, k: (q.fill_(1), k.fill_(-INF)),
    "huge": lambda q, k: (q.mul_(2.0**60), k.mul_(2.0**60)),
    "zeros of both signs": lambda q, k: (q.fill_(1e-30), k.fill_(1e-30)[:, ::2].neg_()),
    "subnormal": lambda q, k: (q.mul_(2.0**-68), k.mul_(2.0**-68)),
    "equal": lambda q, k: (q.fill_(1), k.fill_(1)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_scores(name):
    q, k = whole(1, 5, 1, 32), whole(1, 70, 1, 32)
    ODD[name](q, k)
    for options in (MASKS["count"], MASKS["union"], MASKS["marginal"]):
        check(q, k, **options)


def test_no_queries():
    for batch, rows in ((1, 0), (0, 3)):
        check(torch.ones(batch, rows, 2, 16), torch.ones(batch, 7, 2, 16), topk=2, negligible=0.5)


def test_what_it_refuses():
    with emulated("sla"):
        for q, k in (
            (torch.ones(1, 2, 1, 8).double(), torch.ones(1, 2, 1, 8)),
            (torch.ones(1, 2, 1, 257), torch.ones(1, 2, 1, 257)),
            (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).expand(1, 2**20, 1, 1)),
            (torch.ones(1, 1, 1, 1).expand(1, 2**12, 1, 1), torch.ones(1, 2**19, 1, 1)),
        ):
            with pytest.raises(UnsupportedArchError, match="its kernels"):
                sla.block_mask(q, k, topk=1, backend="cuda")


# --- Segments and lists --------------------------------------------------------------------------

TABLES = {
    "in order": ([0, 1, 2, 3], [0, 0, 0, 0]),
    "mixed, two offsets": ([4, 1, 3, 0], [0, 1, 1, 0]),
    "absent": ([4, -1, 3, -1, 0], [1, 0, 0, 1, 1]),
    "a slot twice": ([2, 2, 0], [0, 1, 1]),
    "all absent": ([-1, -1], [0, 1]),
}


def check_segments(table, offset_index, options, H=4, H_kv=2, per_slot=19, rows=9, how=None):
    """Codes, lists and counts of three forms, of keys in a cache of five slots."""
    offsets = max(offset_index) + 1
    q, k = whole(offsets, 2, rows, H, 32), whole(2, 5, per_slot, H_kv, 32, dtype=torch.bfloat16)
    table, offset_index = torch.tensor(table), torch.tensor(offset_index)
    read = k.index_select(1, table.clamp(min=0)).float().repeat_interleave(H // H_kv, 3)
    score = attention.segment_scores(q.transpose(2, 3) * SCALE, read, offset_index)
    absent = (table < 0).repeat_interleave(per_slot)
    topk, topp = options.get("topk"), options.get("topp")
    lowest = options.get("negligible", 0.0)
    selected, marginal = reference.classify(
        score.unflatten(0, (2, H)), topk, topp, lowest, None, None, absent
    )
    want = (2 + ~marginal * 1).masked_fill(selected, 1).masked_fill(absent, 0)

    with emulated("sla", gpu=not how, **(how or {})) as runner:
        given = (on(runner.device, x) for x in (q, k))
        segments = on(runner.device, table), on(runner.device, offset_index)
        got = cuda_mask.choose(
            *(*given, None, None, segments, topk, topp, lowest, SCALE), want="list code counts"
        )
    lists, code, count = got
    assert torch.equal(code.cpu(), want.to(torch.int8))
    assert torch.equal(count.cpu(), torch.stack([selected.sum(-1), marginal.sum(-1)]).int())
    bounds, blocks = lists.bounds.cpu(), lists.blocks.cpu()
    for b, h, i in selected.sum(-1).nonzero():
        begin, end = bounds[b, h, i].tolist()
        assert blocks[b, h, begin:end].tolist() == selected[b, h, i].nonzero().flatten().tolist()
    assert torch.equal(bounds[..., 1] - bounds[..., 0], selected.sum(-1).int())


@pytest.mark.parametrize("options", [MASKS["count"], MASKS["union, marginal"]], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_segments(name, options):
    check_segments(*TABLES[name], options)


def test_only_what_is_wanted():
    q, k = whole(1, 1, 9, 2, 16), whole(1, 1, 33, 2, 16)
    with emulated("sla"):
        both = cuda_mask.choose(q, k, None, None, None, 4, None, None, 1.0, want="list code")
        for want in ("list", "code"):
            got = cuda_mask.choose(q, k, None, None, None, 4, None, None, 1.0, want=want)
            assert (got.lists is None, got.code is None) == (want == "code", want == "list")
            if got.lists is None:
                assert torch.equal(got.code, both.code)
            else:
                assert all(map(torch.equal, got.lists, both.lists))


def check_expand(how=None):
    q, k = whole(2, 9, 2, 16), whole(2, 70, 2, 16)
    indptr, indices = sla.block_mask(q, k, topp=0.6, sm_scale=SCALE, backend="reference")
    want = reference.expand(indptr, indices, 70).to(torch.int8)
    apart = torch.stack([indptr, indptr], -1)[..., 0], torch.stack([indices, indices], -1)[..., 0]
    with emulated("sla", gpu=not how, **(how or {})) as runner:
        for lists in ((indptr, indices), apart, tuple(x.expand(3, -1, -1, -1)[0] for x in apart)):
            got = cuda_mask.expand(*(on(runner.device, x) for x in lists), 70)
            assert torch.equal(got.cpu(), want)


def test_expand():
    check_expand()


# --- Pool ----------------------------------------------------------------------------------------


def check_pool(x, size, similarity=-1.0, *, low=False, how=None):
    """x [O, B, S, H, D]: means in float64, INT8 codes bit for bit."""
    with emulated("sla", "attention", gpu=not how, **(how or {})) as runner:
        got = cuda_mask.pool(on(runner.device, x), size, similarity, low=low)
    flat = x.flatten(0, 1).double()
    mean, alike = reference.pool(flat, size)
    torch.testing.assert_close(
        got.mean.cpu().double().flatten(0, 1), mean, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    if similarity > -1:
        assert torch.equal(got.similar.cpu().flatten(0, 1), (alike > similarity).to(torch.uint8))
    else:
        assert got.similar is None
    if low:
        code, scale = rope_kv.encode(x.float(), torch.int8)
        assert torch.equal(got.low[0].cpu(), code)
        torch.testing.assert_close(got.low[1].cpu(), scale, rtol=0, atol=0, equal_nan=True)
    else:
        assert got.low is None


@pytest.mark.parametrize("low", [False, True], ids=["means", "and codes"])
@pytest.mark.parametrize("size", [128, 64, 192, 100, 1])
def test_pool(size, low):
    for tokens in (1, 64, 200) if size > 1 else (1, 20):
        check_pool(draw(2, 1, tokens, 2, 32, dtype=torch.bfloat16), size, 0.02, low=low)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_pool_formats(dim, dtype):
    check_pool(draw(1, 2, 130, 2, dim, dtype=dtype), 128, 0.01, low=True)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "dim of 5"])
def test_pool_layouts(name):
    x = LAYOUTS[name](draw(2, 70, 4, 32, dtype=torch.bfloat16))
    check_pool(x.unsqueeze(0), 64, 0.02, low=True)
    check_pool(x.unsqueeze(1), 64, low=True)


def test_pool_of_odd_tokens():
    """Blocks of zeros, of one direction, with NaN and with infinity."""
    x = draw(1, 1, 320, 2, 32)
    x[:, :, :64], x[:, :, 64:128] = 0, torch.arange(1, 65).view(-1, 1, 1) * 0.5
    x[0, 0, 130, 1, 5], x[0, 0, 200, 0, 7], x[0, 0, 256:] = NAN, INF, x[0, 0, 256:] * 1e-30
    check_pool(x, 64, 0.9, low=True)
    check_pool(x, 128, low=True)


# --- Races, memory, mistakes ---------------------------------------------------------------------


def check_pools(**how):
    check_pool(draw(2, 2, 200, 2, 80, dtype=torch.bfloat16), 128, 0.01, low=True, how=how)
    check_pool(draw(1, 1, 70, 1, 128), 64, 0.02, how=how)


def check_choices(**how):
    for name in ("NaN in a key", "zeros of both signs"):
        q, k = whole(1, 5, 1, 32), whole(1, 70, 1, 32)
        ODD[name](q, k)
        check(q, k, how=how, **MASKS["count"])
    guards = {"similar_q": coins(2, 9, 4), "similar_k": coins(2, 300, 2)}
    q, k = whole(2, 9, 4, 20), whole(2, 300, 2, 20)
    check(q, k, how=how, **MASKS["union, marginal"], **guards)
    check_segments(*TABLES["absent"], MASKS["union, marginal"], how=how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_mask, "ROWS_IN_SHARED", 0)
        check_segments(*TABLES["all absent"], MASKS["count"], how=how)
        check_segments(*TABLES["in order"], MASKS["top p"], how=how)


def check_lists(**how):
    check(whole(2, 9, 2, 8), whole(2, 70, 2, 8), how=how, **MASKS["marginal"])
    check_expand(how=how)


CHECKS = {"pool": check_pools, "choose": check_choices, "lists": check_lists}


def test_under_sanitizers():
    problem = parameters.sanitized(
        "sla",
        """
make = np.random.default_rng(0)
O, B, S, H, D, n = 2, 1, 130, 2, 24, 3
x = make.standard_normal((O, B, S, H, 32)).astype(np.float32)
mean, similar = np.zeros((O, B, 2, H, 32), np.float32), np.zeros((O, B, 2, H), np.uint8)
code, scale = np.zeros((O, B, S, H, 32), np.int8), np.zeros((O, B, 3, H), np.float32)
run("pool_blocks", x=x, mean=mean, similar=similar, code=code, scale=scale, O=O, B=B, S=S, H=H,
    D=32, block=128, stride_xo=S * H * 32, stride_xb=S * H * 32, stride_xs=H * 32, stride_xh=32,
    similarity=0.0, dtype=0)
assert np.allclose(mean[:, :, 1], x[:, :, 128:].mean(2), atol=1e-5)
for wide in (0, 1):
    T, per_slot, rows = 3, 30, 9
    n, D = T * per_slot, 24 - 2 * wide
    q = make.integers(-4, 5, (O, B, rows, H, D)).astype(np.float32)
    k = make.integers(-4, 5, (B, 4, per_slot, 1, D)).astype(np.float32)
    table, offset_index = np.array([2, -1, 0]), np.array([0, 0, 1])
    keys = np.zeros((B, H, rows, n), np.uint32) if wide else None
    codes, count = np.full((B, H, rows, n), 9, np.int8), np.zeros((2, B, H, rows), np.int32)
    bounds, blocks = np.zeros((B, H, rows, 2), np.int32), np.zeros((B, H, rows * n), np.int32)
    run("choose_blocks", q=q, k=k, similar_q=None, similar_k=None, table=table,
        offset_index=offset_index, keys=keys, code=codes, bounds=bounds, blocks=blocks, count=count,
        O=O, B=B, rows=rows, H=H, H_kv=1, D=D, T=T, per_slot=per_slot, capacity=n, topk=4, topp=0.4,
        negligible=0.5, sm_scale=0.25, stride_qo=rows * H * D, stride_qb=rows * H * D,
        stride_qn=H * D, stride_qh=D, stride_kb=4 * per_slot * D, stride_ks=per_slot * D,
        stride_kn=D, stride_kh=D, stride_gb=0, stride_gn=0, stride_gh=0, stride_lb=0, stride_ln=0,
        stride_lh=0, q_dtype=0, k_dtype=0)
    assert ((codes == 1).sum(-1) == bounds[..., 1] - bounds[..., 0]).all() and codes.max() == 3
    indptr, indices = np.zeros((B, H, rows + 1), np.int32), np.zeros((B, H, rows * n), np.int32)
    others = np.zeros_like(indptr), np.zeros_like(indices)
    run("compress_codes", code=codes, count=count, selected_indptr=indptr,
        selected_indices=indices, marginal_indptr=others[0], marginal_indices=others[1], heads=H,
        rows=rows, n=n, capacity=n)
    back = np.full_like(codes, 9)
    run("expand_lists", indptr=indptr, indices=indices, code=back, B=B, H=H, rows=rows, n=n,
        room=rows * n, stride_pb=H * (rows + 1), stride_ph=rows + 1, stride_pn=1,
        stride_ib=H * rows * n, stride_ih=rows * n, stride_in=1)
    assert (back == (codes == 1)).all()
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


POOL = {
    "a maximum over one that is read": ("if (s > first) sync_block();", ""),
    "unit vectors over sums that are read": ("sync_block();  // the sums have been read", ""),
    "tokens past the block": ("min(end - s, kScaleRows)", "kScaleRows"),
    "a mean of a whole block": ("static_cast<float>(end - first)", "1.0f * p.block"),
    "scales of the first tokens": ("s / kScaleRows", "first / kScaleRows"),
    "the norm of half a token": (
        "warp_reduce<kChunks>(square, Sum())",
        "warp_reduce<kChunks / 2>(square, Sum())",
    ),
    "the first batch for all": ("ob % p.B * p.stride_xb", "0"),
    "unlike where alike": ("cosine > p.similarity", "cosine <= p.similarity"),
}
CHOOSE = {
    "queries before they are there": (
        "sync_block();\n    for (int column",
        "if (!(MADE)) sync_block();\n    for (int column",
    ),
    "queries replaced while in use": ("if (offset > 0) sync_block();", ""),
    "scores before they are there": ("sync_block();  // rows are whole", ""),
    "digits counted before zeros": ("sync_warp();  // no block is counted before", ""),
    "digits before all are counted": ("sync_warp();  // every block is counted", ""),
    "one equal block more": ("before < equal", "before <= equal"),
    "all equal blocks": ("it > key || (", "(MADE ? it >= key : it > key) || ("),
    "equal blocks of this step alone": ("seen += count_bits(levels);", ""),
    "digits of all blocks": ("if ((key ^ found) & before) continue;", ""),
    "sums of lanes around the end": ("lane + distance < 32 ? higher : 0", "higher"),
    "a share of the first block": ("static_cast<double>(total) * topp", "kOne * topp"),
    "one probable block less": ("(need + mass(key) - 1) / mass(key)", "need / mass(key)"),
    "every offset": ("offset == (slot < 0 ? 0 : columns.offset(column))", "true"),
    "absent blocks are selected": ("taken = held &&", "taken = (MADE ? inside : held) &&"),
    "absent blocks count": ("entries += p.table[i] >= 0;", "entries++;"),
    "unlike keys are ranked": ("held[c] && !columns.unlike(column)", "held[c]"),
    "unlike keys are left out": ("!alike || columns.unlike(column)", "!alike"),
    "every query is like itself": ("const bool alike =\n      ", "const bool alike = MADE ||"),
    "blocks past the end": ("inside = column < n;", "inside = MADE || column < n;"),
    "channels past the end": ("min(p.D - d - t * kChunk, kChunk)", "kChunk"),
    "another head of keys": ("h / (p.H / p.H_kv)", "h % p.H_kv"),
    "zeros in two places": ("bits_of(score + 0.0f)", "bits_of(score)"),
    "NaN last": ("return kHighest;", "return kLowest;"),
    "rows past the end": ("2 * t + r < rows", "true"),
    "lanes exchange the wrong row": ("t & 1 ? low : high", "t & 1 ? high : low"),
    "marginal and negligible exchanged": ("counts ? 2 : 3", "counts ? 3 : 2"),
}
LISTS = {
    "rows begin where they end": ("m < i ? count[m] : 0", "m <= i ? count[m] : 0"),
    "rows end where they begin": ("begin + count[i]", "begin"),
    "counts of the selected for all": ("p.count + item - i", "p.count + row - i"),
    "blocks of one code": ("is_marginal ? 2 : 1", "1"),
    "-1 over blocks": ("max(i * capacity, end)", "i * capacity"),
    "no -1": ("indices[slot] = -1;", ""),
    "blocks over blocks": ("begin += count_bits(found);", ""),
    "zeros after ones": ("sync_warp();  // a zero does not come after a one", ""),
    "the list of the first row": ("h * p.stride_ph + i * p.stride_pn", "h * p.stride_ph"),
    "the list of the first head": ("b * p.stride_ib + h * p.stride_ih", "b * p.stride_ib"),
    "to the end of all lists": ("min(indptr[p.stride_pn], p.room)", "p.room"),
    "neighbours in the list": ("indices[at * p.stride_in]", "indices[at]"),
    "nothing is cleared": ("code[column] = 0;", ""),
}
MISTAKES = {
    f"{kernel}: {name}": (file, *edit)
    for kernel, file, edits in (
        ("pool", "pool.h", POOL),
        ("choose", "mask.h", CHOOSE),
        ("lists", "mask.h", LISTS),
    )
    for name, edit in edits.items()
}


ENTRIES = ("pool_blocks", "choose_blocks", "compress_codes", "expand_lists")


def own_entries() -> list[str]:
    """Of sm80.cu, those of these kernels."""
    main = (emulate.CSRC / "sla/sm80.cu").read_text()
    found = [re.search(rf"^cudaError_t {name}_sm80\(.*?^}}", main, re.M | re.S) for name in ENTRIES]
    return [match[0] for match in found]


def in_namespace(*parts: str) -> str:
    return "\n".join(("namespace reeltime {", *parts, "}\n"))


@functools.cache
def planted() -> str:
    """sm80.cu with all mistakes, of which the environment names one; no other kernel works."""
    files = {name: (emulate.CSRC / "sla" / name).read_text() for name in ("pool.h", "mask.h")}
    for number, (file, old, new) in enumerate(MISTAKES.values(), 1):
        made = f"mistake == {number}"
        if "MADE" in new:
            text = new.replace("MADE", made)
        elif old.endswith(";") or "//" in old:
            text = f"if ({made}) {{ {new}\n }} else {{ {old}\n }}"
        else:
            text = f"({made} ? ({new}) : ({old}))"
        assert files[file].count(old) == 1, old
        files[file] = files[file].replace(old, text)
    kernels = files["pool.h"] + files["mask.h"].replace('#include "sla/pool.h"', "")
    choose = 'stream) {\n  mistake = std::atoi(std::getenv("REELTIME_MISTAKE"));'
    others = [
        f"cudaError_t {entry}_sm80(const {struct}&, cudaStream_t) {{ return {{}}; }}"
        for entry, (struct, *_) in parameters.entries("sla").items()
        if entry not in ENTRIES
    ]
    entries = [part.replace("stream) {", choose) for part in own_entries()]
    return (
        "#include <cstdlib>\nstatic int mistake;\n"
        + kernels.replace("#pragma once", "")
        + in_namespace(*entries, *others)
    )


def with_mistake(number: int, monkeypatch) -> dict:
    """How to run: one build for all, whose first mistake is none."""
    monkeypatch.setenv("REELTIME_MISTAKE", str(number))
    main = (emulate.CSRC / "sla/sm80.cu").read_text()
    return {"flavour": "race", "replace": {"sm80.cu": [(main, planted())]}}


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_without_races(schedule, monkeypatch):
    for run in CHECKS.values():
        run(**with_mistake(0, monkeypatch), schedule=schedule, seed=5)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_noticed(name, monkeypatch):
    how = with_mistake(1 + list(MISTAKES).index(name), monkeypatch)
    with pytest.raises((AssertionError, emulate.EmulationError)) as caught:
        CHECKS[name.split(":")[0]](**how)
    print(name, "|", str(caught.value)[:300])


# --- The device ----------------------------------------------------------------------------------

TARGETS = ("80", "90a")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """Of these kernels alone."""
    folder = tmp_path_factory.mktemp("builds")
    source = folder / "mask.cu"
    source.write_text('#include "sla/mask.h"\n' + in_namespace(*own_entries()))
    return device_builds(source, TARGETS, folder)


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_device_build(cubins, target):
    """No spills, no stack; keys and queries 16 bytes at a time; to count a block is one instruction
    for all lanes with its digit."""
    used = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(used, cubins[target].report) == [("0", "0", "0")] * 9
    choose = [code for code in cubins[target].kernels() if "choose_kernel" in code.split("\n")[0]]
    assert len(choose) == 4
    for code in choose:
        assert {"ATOMS.POPC.INC.32", "LDS.128"} <= set(code.split())
        assert "LDG.E.128.CONSTANT" in code or "3AnyE" in code.split("\n")[0]
