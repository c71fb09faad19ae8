# SPDX-License-Identifier: Apache-2.0
"""sla: the choice of blocks, both branches, all of it fused, and over cached segments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime import rope_kv, sla
from reeltime.bench.accuracy import recipes
from reeltime.bench.accuracy.case import Case
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact
from reeltime.bench.accuracy.segments import Window

KINDS = ("normal", "outlier_k", "outlier_v", "constant_k", "constant_v", "zero_block",
         "single_token", "ragged", "long", "strided")  # fmt: skip
HEADS, DIM, EPS, BLOCK = 2, 64, 1e-5, 32
SCALE = DIM**-0.5
BLOCKS = {"block_q": BLOCK, "block_k": BLOCK}
PHI = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}


# --- In float64, one query block at a time ------------------------------------------------------


class Rule(NamedTuple):
    """Which blocks a query block attends to, and what the linear branch covers."""

    topk: float | None = None  # share of the key blocks
    topp: float | None = None
    negligible: float = 0.0
    similarity: float = -1.0
    over: str = "all"
    phi: str = "softmax"


def mean_cosine(block: Tensor) -> float:
    """Over all pairs of the tokens [n, D] of a block."""
    unit = F.normalize(block, dim=-1)
    return float((unit @ unit.T).mean())


def choose(
    q: list[Tensor],
    keys: list[Tensor],
    pooled: list[Tensor],
    owner: list[int],
    rule: Rule,
    room: int,
) -> tuple[list[int], list[int]]:
    """One query block [n, D] per offset against key blocks: those selected, and the marginal ones.

    room: how many blocks a share is of; absent ones count.
    """
    every = set(range(len(keys)))
    outside = {j for j in every if rule.similarity > -1 and mean_cosine(keys[j]) <= rule.similarity}
    score = {j: float(SCALE * q[owner[j]].mean(0) @ pooled[j]) for j in every - outside}
    ranked = sorted(score, key=lambda j: (-score[j], j))
    selected = set(ranked[: 1 if rule.topk is None else max(1, int(rule.topk * room))])
    if rule.topp is not None and ranked:
        share = torch.tensor([score[j] for j in ranked], dtype=torch.float64).softmax(0)
        before = share.cumsum(0) - share
        selected |= {j for j, below in zip(ranked, before, strict=True) if below < rule.topp}
    selected |= outside
    if rule.similarity > -1 and mean_cosine(q[0]) <= rule.similarity:
        selected = every
    order = [*ranked, *sorted(outside)]  # a block outside of the ranking comes last
    lowest = order[len(every) - int(rule.negligible * len(every)) :]
    return sorted(selected), sorted(every - selected - set(lowest))


class Parts(NamedTuple):
    """Every branch of one call; masks are [B, H, nQ, nK] as 0 and 1."""

    selected: Tensor
    marginal: Tensor
    score: Tensor  # of each block
    sparse: Tensor  # [B, S_q, H, D]
    linear: Tensor


def equation(
    queries: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    owner: list[int],
    rule: Rule,
    ranking: tuple[list[Tensor], list[Tensor]] | None = None,
    room: int | None = None,
    block_q: int = BLOCK,
) -> Parts:
    """queries [B, S_q, H, D] per offset; blocks [B, n, H, D], each scored by its owner's query.

    ranking: the queries, and the pooled key [B, H, D] of each block, that blocks are chosen by,
    where storage has rounded them: a near tie that falls otherwise is no error of the op.
    """
    q, phi, count = queries[0], PHI[rule.phi], len(keys)
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q), count)
    selected, marginal, score = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    sparse, linear = torch.zeros_like(q), torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in shape[:3])).tolist():
        rows = slice(i * block_q, min(i * block_q + block_q, q.shape[1]))
        part = [x[b, rows, h] for x in queries]
        k, v = [x[b, :, h] for x in keys], [x[b, :, h] for x in values]
        asks, means = part, [x.mean(0) for x in k]
        if ranking is not None:
            asks = [x[b, rows, h] for x in ranking[0]]
            means = [x[b, h] for x in ranking[1]]
        chosen, rest = choose(asks, k, means, owner, rule, room or count)
        selected[b, h, i, chosen] = 1
        marginal[b, h, i, rest] = 1
        scores = [SCALE * part[owner[j]] @ k[j].T for j in chosen]
        pairs = [asks[owner[j]].mean(0) @ means[j] for j in range(count)]
        score[b, h, i] = SCALE * torch.stack(pairs)
        sparse[b, rows, h] = torch.cat(scores, -1).softmax(-1) @ torch.cat([v[j] for j in chosen])
        others = [j for j in range(count) if j not in chosen]
        covered = {"all": list(range(count)), "unselected": others, "marginal": rest}[rule.over]
        weights = [phi(part[owner[j]]) @ phi(k[j]).T for j in covered]
        above = sum((w @ v[j] for w, j in zip(weights, covered, strict=True)), torch.zeros(1))
        below = sum((w.sum(-1, keepdim=True) for w in weights), torch.zeros(1))
        linear[b, rows, h] = above / (below + EPS)
    return Parts(selected, marginal, score, sparse, linear)


def plain(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Parts:
    keys, values = list(k.split(BLOCK, 1)), list(v.split(BLOCK, 1))
    return equation([q], keys, values, [0] * len(keys), rule)


# --- Cases --------------------------------------------------------------------------------------


def cases(inputs: Inputs) -> Iterator[Case]:
    queries, keys = inputs.lengths
    if inputs.kind == "long":
        keys = 2048
    q = inputs.draw("q", 1, queries, HEADS, DIM)
    k, v = (inputs.draw(name, 1, keys, HEADS, DIM) for name in "kv")
    for dtype in DTYPES:
        given = (inputs.put(x, dtype) for x in (q, k, v))
        yield from inputs.offered(branches(inputs, dtype, *given))
    yield from published(inputs, *(inputs.put(x) for x in (q, k, v)))
    for format, dtype in (("plain", "float32"), ("plain", "bfloat16"), ("int8", "fp8")):
        yield from inputs.offered(over_cache(inputs, format, dtype))


def branches(inputs: Inputs, dtype: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    tolerance = sla.TOLERANCE[dtype]
    options: dict[str, Any] = {"backend": inputs.backend}
    wide = sla.TOLERANCE["float64" if dtype == "float64" else "float32"]  # of statistics
    low = (exact(q), exact(k), exact(v))
    blocks: dict[str, Any] = BLOCKS
    rule = Rule(topk=0.5, negligible=0.25)
    want = plain(*low, rule)

    pools = [(x.mean(1), mean_cosine_of(x)) for x in low[1].split(32, 1)]
    for index, name in enumerate(("mean", "self-similarity")):
        pooled = torch.stack([pair[index] for pair in pools], 1)
        run = lambda i=index: sla.pool(k, block=32)[i]  # noqa: E731
        yield Case("pool", f"{dtype} {name}", run, pooled, wide)
    phi_k = low[1].softmax(-1).split(32, 1)
    h = torch.stack(
        [
            torch.einsum("bnhd,bnhe->bhde", f, x)
            for f, x in zip(phi_k, low[2].split(32, 1), strict=True)
        ],
        1,
    )
    z = torch.stack([f.sum(1) for f in phi_k], 1)
    for index, (name, total) in enumerate({"h": h, "z": z}.items()):
        run = lambda i=index: sla.summaries(k, v, block_k=32)[i]  # noqa: E731
        yield Case("summaries", f"{dtype} {name}", run, total, wide)

    def masks(**more: Any) -> tuple[sla.CSR, sla.CSR]:
        pooled_q, pooled_k = (sla.pool(x, block=32)[0] for x in (q, k))
        return sla.block_mask(pooled_q, pooled_k, **more, **options)

    # What was selected is compared by its score, so that another order of equals is no error.
    for name, more, chosen in (
        ("top 50%", {"topk": 0.5}, rule),
        ("top p 0.7", {"topp": 0.7}, Rule(topp=0.7, negligible=0.25)),
    ):
        parts = plain(*low, chosen)
        for index, mask in enumerate((parts.selected, parts.marginal)):
            yield Case(
                "block_mask",
                f"{dtype} {name}, {('selected', 'marginal')[index]}",
                lambda m=more, i=index, s=parts.score: summary(
                    listed(masks(**m, negligible=0.25)[i], s), s
                ),
                summary(mask, parts.score),
                wide,
            )

    csr, rest = masks(topk=0.5, negligible=0.25)
    for name, skip in (("", float("inf")), (", pv skip 25", 25.0)):
        run = lambda s=skip: sla.sparse_attention(q, k, v, csr, pv_skip=s, **blocks, **options)  # noqa: E731
        yield Case("sparse_attention", f"{dtype}{name}", run, want.sparse, tolerance)
    sums = sla.summaries(k, v, block_k=32)
    for over, lists in (("all", None), ("unselected", csr), ("marginal", rest)):
        parts = plain(*low, rule._replace(over=over))
        run = partial(sla.linear_attention, q, *sums, lists, over=over, block_q=32, **options)
        yield Case("linear_attention", f"{dtype} over {over}", run, parts.linear, tolerance)

    weight, bias = (inputs.put(inputs.normal(n, *s), dtype) for n, s in PROJECTION)
    for name, chosen in RULES:
        if dtype != "float32" and name not in ("top 10%", "top 50%, unselected"):
            continue
        parts = plain(*low, chosen)
        given: dict[str, Any] = {
            "topk": chosen.topk,
            "topp": chosen.topp,
            "negligible": chosen.negligible,
        }
        given |= {"over": chosen.over, "similarity": chosen.similarity, "phi": chosen.phi}
        far = parts.linear
        if "projected" in name:
            given |= {"proj_weight": weight, "proj_bias": bias}
            far = far @ exact(weight).T + exact(bias)
        run = lambda g=given: sla.sla(q, k, v, **g, **blocks, **options)  # noqa: E731
        yield Case("sla", f"{dtype} {name}", run, parts.sparse + far, tolerance)


PROJECTION = (("proj_weight", (DIM, DIM)), ("proj_bias", (DIM,)))
RULES = (
    ("top 10%", Rule(topk=0.1)),
    ("top 50%, unselected", Rule(topk=0.5, over="unselected")),
    ("top 25%, marginal", Rule(topk=0.25, negligible=0.25, over="marginal")),
    ("top 25% or p 0.5, projected", Rule(topk=0.25, topp=0.5)),
    ("top 25%, similar alone", Rule(topk=0.25, similarity=0.3)),
    ("top 25%, elu", Rule(topk=0.25, phi="elu")),
    ("top 25%, relu", Rule(topk=0.25, phi="relu")),
)


def mean_cosine_of(block: Tensor) -> Tensor:
    """[B, n, H, D] -> [B, H]."""
    unit = F.normalize(block, dim=-1)
    return torch.einsum("bnhd,bmhd->bhnm", unit, unit).mean((-1, -2))


def listed(csr: sla.CSR, like: Tensor) -> Tensor:
    """A CSR as [B, H, nQ, nK] of 0 and 1, walked entry by entry."""
    mask, indptr, indices = torch.zeros_like(like), csr.indptr.cpu(), csr.indices.cpu()
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in like.shape[:3])).tolist():
        first, end = indptr[b, h, i : i + 2].tolist()
        mask[b, h, i, indices[b, h, first:end].long()] = 1
    return mask


def summary(mask: Tensor, score: Tensor) -> Tensor:
    """Per query block: how many blocks are listed, and the sum of what they score."""
    return torch.stack([mask.sum(-1), (mask * score.exp()).sum(-1)])


def published(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    low = (exact(q), exact(k), exact(v))
    for ratio in (0.1, 0.5):
        want = plain(*low, Rule(topk=ratio))
        yield Case(
            "sla",
            f"TurboDiffusion SLA, top {ratio:.0%}",
            lambda r=ratio: recipes.turbodiffusion_sla(*low, SCALE, ratio=r, **BLOCKS),
            want.sparse + want.linear,
            None,
            recipes.TURBO,
        )
    # In 8 bits ours is the cache: one segment, nothing normed or rotated, so that both see q, k, v.
    batch, tokens, heads, dim = k.shape
    options = {"format": "int8", "dtype": torch.float16, "device": k.device, "summaries": "slot"}
    cache = rope_kv.make_cache(batch, 1, tokens, heads, dim, **options)
    slot = torch.zeros(1, dtype=torch.int64, device=k.device)
    rope_kv.write(k.flatten(2), v.flatten(2), cache, slot, num_heads=heads, backend=inputs.backend)
    keys, values = (list(x.split(64, 1)) for x in low[1:])
    assert cache.k_mean is not None
    ranking = [low[0]], list(exact(cache.k_mean[:, 0]).unbind(1))
    want = equation([low[0]], keys, values, [0] * len(keys), Rule(topk=0.5), ranking)
    yield Case(
        "segment_sla",
        "int8 block mean, v fp16, unrotated, top 50%",
        lambda: sla.segment_sla(
            q.unsqueeze(0), cache, slot, slot, topk=0.5, block_q=BLOCK, backend=inputs.backend
        ),
        want.sparse + want.linear,
        sla.TOLERANCE["int8"],
    )
    for name, pv in (("pv fp16", "fp16"), ("pv fp8 fp16-acc", "narrow")):
        yield Case(
            "segment_sla",
            f"SageSLA int8, {name}, top 50%",
            lambda pv=pv: recipes.turbodiffusion_sla(
                *low, SCALE, ratio=0.5, block_q=BLOCK, block_k=64, pv=pv
            ),
            want.sparse + want.linear,
            None,
            recipes.SLA,
        )


def over_cache(inputs: Inputs, format: str, dtype: str) -> Iterator[Case]:
    window = Window(inputs, format, dtype, summaries="block")
    q = window.queries()[0]
    recipe = dtype if format == "plain" else f"int8 block mean, v {dtype}"
    for topk, over in ((0.1, "all"), (0.5, "unselected")):
        yield Case(
            "segment_sla",
            f"{recipe}, top {topk:.0%}, {over}",
            lambda t=topk, o=over: sla.segment_sla(
                q, window.cache, *window.lists, topk=t, over=o, block_q=32, backend=inputs.backend
            ),
            segment_equation(window, q, Rule(topk=topk, over=over)),
            sla.TOLERANCE[dtype],
        )


def segment_equation(window: Window, q: Tensor, rule: Rule, block_q: int = BLOCK) -> Tensor:
    """Blocks in the order of the block table, chosen by the query q [O, B, L, H, D] and the means
    as stored; L may be less than what the window asks."""
    by_frame = [x.split(window.tokens, 1) for x in (window.keys(), window.values())]
    keys, values = ([b for frame in x for b in frame.split(64, 1)] for x in by_frame)
    per_frame = len(keys) // window.frames
    owner = [1] * per_frame + [0] * (len(keys) - per_frame)
    assert window.cache.k_mean is not None
    means = exact(window.cache.k_mean.index_select(1, window.slots)).flatten(1, 2)
    ranking = list(exact(q).unbind(0)), list(means.unbind(1))
    room = per_frame * len(window.block_table)
    asked = list(window.asked()[:, : q.shape[2]].split(1))
    parts = equation(asked, keys, values, owner, rule, ranking, room, block_q)
    return parts.sparse + parts.linear
