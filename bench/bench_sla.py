# SPDX-License-Identifier: Apache-2.0
"""sla: mask, both branches, and all of it fused; beside dense attention, which it stands in for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reeltime import attention, sla
from reeltime.bench import cached, harness, peers
from reeltime.bench.bench_attention import FORMATS, halves, name, shape_of, tolerance
from reeltime.bench.case import Case, Draw, Expected, Inputs, Judged
from reeltime.bench.shapes import Sizes
from reeltime.checks import Tolerance
from reeltime.rope_kv.reference import block_mean, per_token
from reeltime.sla import BLOCK_K, BLOCK_Q
from reeltime.sla.reference import expand

EXPECTED = {
    "block_mask": Expected(0.30, 0.30, "a ranking in each row: latency, not bytes", launches=3),
    "sparse_attention": Expected(0.50, 0.55, "as dense attention, with gaps between key blocks"),
    "linear_attention": Expected(0.60, 0.60, "sums of all blocks, then a product", launches=2),
    "sla": Expected(0.35, 0.40, "pooling and summaries read keys and values twice", launches=6),
    "segment_sla": Expected(0.45, 0.45, "pooling, mask, sums and both branches", launches=5),
}
TOLERANCE = sla.TOLERANCE
SHARES = {"tiny": (0.5,), "dit": (0.05, 0.1)}
EXACT = Tolerance(0.0, 0.0)
# Of that, where a call also reads, scales and stores q, k and v, of which it attends to a few.
QUANTISING = 0.7
TIE = 1e-4  # of the RMS of the scores: two blocks closer than that may be ranked either way


def cases(sizes: Sizes) -> Iterator[Case]:
    shares = SHARES[sizes.name]
    yield block_mask(sizes, shares[0])
    for formats in FORMATS:
        yield sparse_attention(sizes, shares[0], *formats)
    for over in ("all", "unselected"):
        yield linear_attention(sizes, shares[0], over)
    for share in shares:
        for formats in FORMATS:
            yield plain(sizes, share, *formats)
        for values in (None, "fp16", "fp8") if share == shares[-1] else ("fp8",):
            yield segments(sizes, share, values)


def counts(sizes: Sizes) -> tuple[int, int]:
    """Query blocks and key blocks of plain tensors."""
    _, S_q, S_kv, _, _ = shape_of(sizes)
    return -(-S_q // BLOCK_Q), -(-S_kv // BLOCK_K)


def selected(share: float, blocks: int) -> int:
    return max(1, int(share * blocks))


def case(
    sizes: Sizes, op: str, form: str, dtype: str, *, quantising: bool = False, **parts: Any
) -> Case:
    _, S_q, S_kv, H, D = shape_of(sizes)
    expected = EXPECTED[op]
    if quantising:
        expected = expected.times(QUANTISING, launches=expected.launches + 1)
    return Case(
        "sla", op, form, f"{S_q}x{S_kv}, {H} heads, D {D}", dtype, expected=expected, **parts
    )


def qkv(device: torch.device, seed: int, sizes: Sizes) -> Inputs:
    B, S_q, S_kv, H, D = shape_of(sizes)
    draw = Draw(device, seed)
    return {"q": draw(B, S_q, H, D), "k": draw(B, S_kv, H, D), "v": draw(B, S_kv, H, D)}


def projection(device: torch.device, seed: int, D: int) -> Inputs:
    """Of the linear branch, whose mean over all keys is small: large enough that an error in
    either branch shows in their sum."""
    draw = Draw(device, seed + 1)
    return {"proj_weight": draw(D, D) * (4 * D**-0.5), "proj_bias": 0.02 * draw(D)}


# --- The branches -------------------------------------------------------------------------------


def block_mask(sizes: Sizes, share: float) -> Case:
    B, _, _, H, D = shape_of(sizes)
    rows, columns = counts(sizes)

    def make(device: torch.device, seed: int) -> Inputs:
        inputs = qkv(device, seed, sizes)
        pooled_q, _ = sla.pool(inputs["q"], block=BLOCK_Q)
        return {"pooled_q": pooled_q, "pooled_k": sla.pool(inputs["k"], block=BLOCK_K)[0]}

    def run(inputs: Inputs, backend: str) -> Any:
        return sla.block_mask(**inputs, topk=share, backend=backend)

    def judge(inputs: Inputs, csr: Any) -> Iterator[Judged]:
        """How many blocks a row has and what they score: of equals, any may be chosen."""
        q, k = (x.double() for x in inputs.values())
        score = D**-0.5 * torch.einsum("bqhd,bkhd->bhqk", q, k)
        best = score.topk(selected(share, columns), dim=-1).values
        listed = expand(csr[0], csr[1], columns)
        want = torch.full_like(best[..., 0], selected(share, columns))
        yield Judged("count", listed.sum(-1), want, EXACT)
        got = (score.exp() * listed).sum(-1)
        yield Judged("score", got, best.exp().sum(-1), TOLERANCE["float32"])

    capacity = selected(share, columns)
    lists = 2 * (rows + 1) + rows * (capacity + columns)  # selected and marginal
    found = case(
        sizes, "block_mask", f"top {share:.0%}", "fp32",
        flops={"fp32": 2 * B * H * rows * columns * D},
        bytes=4 * B * H * ((rows + columns) * D + lists), make=make, run=run, judge=judge,
    )  # fmt: skip
    return peers.beside(found, peers.sla.mask_adapters(capacity))


def sparse_attention(sizes: Sizes, share: float, qk: str | None, pv: str | None) -> Case:
    shape = B, S_q, S_kv, H, D = shape_of(sizes)
    rows, columns = counts(sizes)

    def make(device: torch.device, seed: int) -> Inputs:
        inputs = qkv(device, seed, sizes)
        pooled = (sla.pool(inputs[n], block=b)[0] for n, b in (("q", BLOCK_Q), ("k", BLOCK_K)))
        return inputs | {"csr": sla.block_mask(*pooled, topk=share, backend="reference")}

    def run(inputs: Inputs, backend: str) -> Any:
        return sla.sparse_attention(**inputs, qk=qk, pv=pv, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        q, k, v = (inputs[name].double() for name in "qkv")
        listed = expand(inputs["csr"].indptr, inputs["csr"].indices, columns)

        def oracle(piece: slice) -> Tensor:
            blocks = per_token(listed, S_q, 2, BLOCK_Q)[:, :, piece]
            seen = per_token(blocks, S_kv, 3, BLOCK_K)
            return attention.attention(q[:, piece], k, v, mask=seen, backend="reference")

        yield Judged("out", result, cached.together(S_q, oracle), tolerance(qk, pv, TOLERANCE))

    part = min(1.0, selected(share, columns) * BLOCK_K / S_kv)
    lists = 4 * B * H * (rows + 1 + rows * selected(share, columns))
    found = case(
        sizes, "sparse_attention", f"top {share:.0%}", name(qk, pv), quantising=qk is not None,
        flops=halves(attention.flops(*shape) * part, qk, pv),
        bytes=attention.bytes(*shape) + lists, make=make, run=run, judge=judge,
        peers=peers.scaled_dot_product(*shape),
    )  # fmt: skip
    return peers.beside(found, peers.sla.sparse_adapters())


def linear_attention(sizes: Sizes, share: float, over: str) -> Case:
    B, S_q, _, H, D = shape_of(sizes)
    rows, columns = counts(sizes)

    def make(device: torch.device, seed: int) -> Inputs:
        inputs = qkv(device, seed, sizes)
        h, z = sla.summaries(inputs["k"], inputs["v"])
        found = {"q": inputs["q"], "h": h, "z": z}
        if over == "all":
            return found
        pooled = (sla.pool(inputs[n], block=b)[0] for n, b in (("q", BLOCK_Q), ("k", BLOCK_K)))
        return found | {"csr": sla.block_mask(*pooled, topk=share, backend="reference")}

    def run(inputs: Inputs, backend: str) -> Any:
        return sla.linear_attention(**inputs, over=over, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        q, h, z = (inputs[name].double() for name in "qhz")
        if over == "all":
            total = h.sum(1, keepdim=True), z.sum(1, keepdim=True)
            want = sla.linear_attention(q, *total, backend="reference")
        else:
            want = sla.linear_attention(q, h, z, inputs["csr"], over=over, backend="reference")
        yield Judged("out", result, want, TOLERANCE["bfloat16"])

    moved = 2 * 2 * B * S_q * H * D + 4 * B * columns * H * D * (D + 1)
    if over != "all":
        moved += 4 * B * H * (rows + 1 + rows * selected(share, columns))
    found = case(
        sizes, "linear_attention", f"{over} blocks", "bf16",
        flops={"bf16": 2 * B * H * S_q * D * (D + 1)}, bytes=moved, make=make, run=run,
        judge=judge, peers=peers.copying(moved),
    )  # fmt: skip
    return peers.beside(found, peers.sla.linear_adapters()) if over == "all" else found


# --- All of it ----------------------------------------------------------------------------------


def settled(score: Tensor, count: int, length: int) -> Tensor:
    """[1, L, H] bool: the tokens of query blocks whose choice does not hang on a near tie.

    score: [1, H, nQ, nK] float64.
    """
    if count >= score.shape[3]:
        gap = torch.ones_like(score[..., 0])
    else:
        ordered = score.sort(-1, descending=True).values
        gap = ordered[..., count - 1] - ordered[..., count]
    clear = gap > TIE * score.square().mean().sqrt()
    return per_token(clear, length, 2, BLOCK_Q).transpose(1, 2)


def judged(result: Tensor, want: Tensor, clear: Tensor, tolerance: Tolerance) -> Iterator[Judged]:
    if clear.double().mean() < 0.5:
        raise harness.WrongResultError("most rows hang on near ties: nothing would be judged")
    yield Judged("out", result[clear], want[clear], tolerance)


def work(sizes: Sizes, count: int, qk: str | None, pv: str | None) -> dict[str, float]:
    """FLOPs by dtype of the selected blocks, and of the linear branch."""
    shape = B, S_q, S_kv, H, D = shape_of(sizes)
    share = min(1.0, count * BLOCK_K / S_kv)
    sparse = 4 * B * H * S_q * S_kv * D * share
    found = halves(sparse, qk, pv)
    return found | {"bf16": found.get("bf16", 0.0) + sla.flops(*shape, share=share) - sparse}


def plain(sizes: Sizes, share: float, qk: str | None, pv: str | None) -> Case:
    shape = _, S_q, S_kv, _, D = shape_of(sizes)
    count = selected(share, counts(sizes)[1])

    def make(device: torch.device, seed: int) -> Inputs:
        return qkv(device, seed, sizes) | projection(device, seed, D)

    def run(inputs: Inputs, backend: str) -> Any:
        return sla.sla(**inputs, topk=share, qk=qk, pv=pv, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        wide = {name: x.double() for name, x in inputs.items()}
        q = wide.pop("q")
        want = cached.together(
            S_q, lambda rows: sla.sla(q[:, rows], **wide, topk=share, backend="reference")
        )
        score = torch.einsum("bqhd,bkhd->bhqk", block_mean(q, BLOCK_Q), block_mean(wide["k"]))
        clear = settled(score, count, S_q)
        yield from judged(result, want, clear, tolerance(qk, pv, TOLERANCE))

    part = min(1.0, count * BLOCK_K / S_kv)
    found = case(
        sizes, "sla", f"top {share:.0%}", name(qk, pv), quantising=qk is not None,
        flops=work(sizes, count, qk, pv), bytes=sla.bytes(*shape, share=part), make=make, run=run,
        judge=judge,
        peers=peers.scaled_dot_product(*shape),
    )  # fmt: skip
    return peers.beside(found, peers.sla.sla_adapters(count))


def segments(sizes: Sizes, share: float, values: str | None) -> Case:
    shape = _, S_q, S_kv, _, D = shape_of(sizes)
    qk = "int8" if values else None
    count = selected(share, sizes.window.frames * -(-sizes.window.per_frame // BLOCK_K))

    def make(device: torch.device, seed: int) -> Inputs:
        inputs = cached.window(device, seed, sizes, values, summaries="slot")
        kept = ("q", "cache", "block_table", "offset_index")
        return {name: inputs[name] for name in kept} | projection(device, seed, D)

    def run(inputs: Inputs, backend: str) -> Any:
        return sla.segment_sla(**inputs, topk=share, backend=backend)

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        q, cache = inputs["q"].double(), cached.wide(inputs["cache"])
        lists = {name: inputs[name] for name in ("block_table", "offset_index")}
        branch = {name: inputs[name].double() for name in ("proj_weight", "proj_bias")}
        options: Any = lists | branch | {"topk": share, "backend": "reference"}
        want = cached.together(S_q, lambda rows: sla.segment_sla(q[:, :, rows], cache, **options))
        assert cache.k_mean is not None
        asks = block_mean(q, BLOCK_Q)[inputs["offset_index"]]  # [T, 1, nQ, H, D]
        means = cache.k_mean[:, inputs["block_table"]]
        score = torch.einsum("tbqhd,btkhd->bhqtk", asks, means).flatten(3)
        clear = settled(score, count, S_q)
        yield from judged(result, want, clear, tolerance(qk, values, TOLERANCE))

    part = min(1.0, count * BLOCK_K / S_kv)
    stored = {None: (2, 2), "fp16": (1, 2), "fp8": (1, 1)}[values]  # bytes of a key, of a value
    options: Any = {"share": part, "summaries": "slot", "slots": sizes.window.frames}
    moved = sum(sla.bytes(*shape, **options, kv_itemsize=size) for size in stored) // 2
    return case(
        sizes, "segment_sla", f"top {share:.0%}, cached", name(qk, values),
        flops=work(sizes, count, qk, values), bytes=moved, make=make, run=run, judge=judge,
        peers=peers.scaled_dot_product(*shape),
    )  # fmt: skip


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
