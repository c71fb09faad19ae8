# SPDX-License-Identifier: Apache-2.0
"""The attention kernel for Hopper, its own source on the emulator, against the equations in float64
with the kernel's roundings of probabilities: bit for bit where scores are powers of two."""

from __future__ import annotations

import functools
import math
import re
import shutil
from dataclasses import dataclass, replace
from typing import Any

import emulate
import parameters
import pytest
import torch
from device_build import device_build, needs_nvcc
from emulated import emulated
from torch import Tensor

from reeltime import attention as api
from reeltime import checks, native
from reeltime.attention import reference

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

SOURCES = [
    emulate.CSRC / f"attention/{name}"
    for name in ("sm90.cu", "sm90_producer.h", "sm90_tile.h", "sm90_values.h")
]
KEYS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
VALUES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
TOP = {"fp16": 1.0, "fp8": 448.0}  # the largest probability
SMOOTH = (None, "block", "sequence")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LN_2 = math.log(2)


@dataclass(frozen=True)
class Case:
    """One call; the defaults are plain tensors."""

    values: str = "fp16"
    keys: str = "int8"
    L: int = 70
    N: int = 100
    D: int = 128
    B: int = 1
    H: int = 1
    H_kv: int = 1
    smooth: str | None = "block"
    dtype: torch.dtype = torch.bfloat16  # of q, the mean keys and the result
    out: torch.dtype = torch.float32
    causal: int | None = None  # first_last
    slots: int = 1
    table: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = ()
    lists: float | None = None  # share of the blocks of keys that 128 queries see
    splits: int = 1
    added: bool = False
    sharp: float = 1.0  # scores in units of their usual size
    seed: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.N // 64)


def lists(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    """Some lists are empty, some name blocks of absent entries; what is not theirs is no block."""
    c, entries = case, 1 if case.table is None else len(case.table)
    heads, tiles, blocks = (c.B, c.H), -(-c.L // 128), entries * c.blocks
    seen = torch.rand(*heads, tiles, blocks, generator=g) < c.lists
    seen[0, -1, 0] = tiles * c.H == 1
    counts = seen.sum(-1).flatten(0, 1)
    bounds = torch.cat([counts.new_zeros(c.B * c.H, 1), counts.cumsum(1)], 1) + c.seed % 3
    room = int(bounds.max())
    named = torch.full((c.B * c.H, room), 1 << 29, dtype=torch.int32)
    for row, first, chosen in zip(named, bounds[:, 0].tolist(), seen.flatten(0, 1), strict=True):
        of_all = chosen.nonzero()[:, 1].to(torch.int32)
        row[first : first + len(of_all)] = of_all
    if c.seed % 2:
        bounds = torch.stack([bounds[:, :-1], bounds[:, 1:]], -1)
    return dict(
        list_bounds=bounds.to(torch.int32).view(*heads, *bounds.shape[1:]),
        list_blocks=named.view(*heads, room),
        seen=seen,
    )


def numbers(case: Case) -> dict[str, Any]:
    """Codes and scales as they come: nothing is encoded."""
    g = torch.Generator().manual_seed(case.seed)
    c, count = case, 1 + max(case.offsets[:-1], default=0)  # the last entry's is of none
    offsets = c.offsets or (0,) * len(c.table or ())

    def codes(*shape):
        if c.keys == "fp8":
            return (torch.randn(shape, generator=g) * 70).to(KEYS["fp8"])
        return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)

    def scales(*shape, size):
        return size * (0.5 + torch.rand(shape, generator=g))

    heads, per_slot = (c.B, c.slots, c.N, c.H_kv, c.D), (c.B, c.slots, c.blocks, c.H_kv)
    v = torch.randn(heads, generator=g)
    means = {"block": per_slot, "sequence": (c.B, c.H_kv)}.get(c.smooth)
    mean_type = torch.float32 if c.smooth == "sequence" else c.dtype
    return dict(
        q=torch.randn(count, c.B, c.L, c.H, c.D, generator=g).to(c.dtype),
        q_code=codes(count, c.B, c.L, c.H, c.D),
        q_scale=scales(count, c.B, -(-c.L // 64), c.H, size=0.02 * c.sharp),
        k=codes(*heads),
        v=(v * 100 if c.values == "fp8" else v.clamp(-4, 4) / 4).to(VALUES[c.values]),
        k_scale=scales(*per_slot, size=0.02),
        k_mean=means and torch.randn((*means, c.D), generator=g).to(mean_type) * c.sharp,
        v_scale=scales(*per_slot, c.D, size=1.0 if c.values == "fp16" else 0.01),
        table=None if c.table is None else torch.tensor(c.table, dtype=torch.int64),
        offset_index=None if c.table is None else torch.tensor(offsets, dtype=torch.int64),
        added=torch.randn(c.B, c.L, c.H, c.D, generator=g).to(c.out) if c.added else None,
        **(dict(list_bounds=None, list_blocks=None) if c.lists is None else lists(c, g)),
    )


def launch(
    case: Case, x: dict[str, Any], sm_scale: float, mistake: int = 0, **how: Any
) -> tuple[Tensor, Tensor]:
    """out [splits, B, L, H, D] and lse [splits, B, H, L], poisoned before."""
    c, bounds = case, x["list_bounds"]
    x = {name: y for name, y in x.items() if name != "seen"}
    with emulated("attention", sm=90, gpu=HOPPER and not how, **how) as runner:
        x = {n: y.to(runner.device) if isinstance(y, Tensor) else y for n, y in x.items()}
        shape = (c.splits, c.B, c.L, c.H, c.D)
        out = torch.full(shape, torch.nan, dtype=c.out, device=runner.device)
        lse = torch.full((c.splits, c.B, c.H, c.L), torch.nan, device=runner.device)
        native.launch(
            "attention",
            runner.device,
            **x,
            mask=None,
            out=out,
            lse=lse,
            **dict(B=c.B, L=c.L, N=c.N, H=c.H, H_kv=c.H_kv, D=c.D, E=c.D, slots=c.slots),
            T=1 if c.table is None else len(c.table),
            splits=c.splits,
            room=0 if bounds is None else x["list_blocks"].shape[2],
            stride_list_head=0 if bounds is None else bounds.stride(1),
            stride_list_row=0 if bounds is None else bounds.stride(2),
            pv_skip=math.inf,
            causal=int(c.causal is not None),
            first_last=c.causal or 0,
            **{f"stride_q{n}": s for n, s in zip("oblh", x["q"].stride(), strict=False)},
            **{f"stride_k{n}": s for n, s in zip("bsnh", x["k"].stride(), strict=False)},
            **{f"stride_v{n}": s for n, s in zip("bsnh", x["v"].stride(), strict=False)},
            **{f"stride_m{n}": 0 for n in "bhln"},
            sm_scale=sm_scale,
            smooth=SMOOTH.index(c.smooth),
            q_dtype=native.code(x["q"].dtype),
            mean_dtype=native.code_of(x["k_mean"]),
            mask_dtype=mistake,
            qk_dtype=native.code(x["k"].dtype),
            v_dtype=native.code(x["v"].dtype),
            out_dtype=native.code(c.out),
        )
    return out.cpu(), lse.cpu()


@dataclass
class Sums:
    """Before the division; float64 [B, H, L, D] and [B, H, L]."""

    out: Tensor
    total: Tensor
    largest: Tensor  # score in log2 units
    shift: Tensor  # of lse


def seen(case: Case, x: dict[str, Any], t: int, j: int, split: int) -> Tensor:
    """[B, H, L] which queries see block j of entry t, of a share of their keys."""
    c, first = case, torch.arange(case.L) // 128 * 128
    if c.lists is not None:
        return x["seen"][..., t * c.blocks + j].repeat_interleave(128, 2)[..., : c.L]
    blocks = torch.full((c.L,), c.blocks)
    if c.causal is not None:
        blocks = (-(-(first + c.causal + 128) // 64)).clamp(0, c.blocks)
    present = [s >= 0 for s in c.table or (0,)]
    at, steps = sum(present[:t]) * blocks + j, sum(present) * blocks
    low, high = (steps * s // c.splits for s in (split, split + 1))
    return ((j < blocks) & (low <= at) & (at < high)).expand(c.B, c.H, c.L)


def oracle(case: Case, x: dict[str, Any], sm_scale: float, split: int = 0) -> Sums:
    """In float64, 64 keys at a time, with probabilities rounded as the kernel stores them."""
    c, group, top = case, case.H // case.H_kv, TOP[case.values]

    def by_head(y, dim):  # of keys, for every query head
        return y.double().repeat_interleave(group, dim)

    largest = torch.full((c.B, c.H, c.L), -torch.inf, dtype=torch.float64)
    total, shift = torch.zeros_like(largest), torch.zeros_like(largest)
    out = torch.zeros(c.B, c.H, c.L, c.D, dtype=torch.float64)
    if c.smooth == "sequence":
        means = by_head(x["k_mean"], 1)
        shift = torch.einsum("blhd,bhd->bhl", x["q"][0].double(), means) * sm_scale
    offsets = [0] if c.table is None else x["offset_index"].tolist()
    for t, (slot, o) in enumerate(zip((0,) if c.table is None else c.table, offsets, strict=True)):
        if slot < 0:
            continue
        step = x["q_scale"][o].double().repeat_interleave(64, 1)[:, : c.L]  # [B, L, H]
        q = (x["q_code"][o].double() * step.unsqueeze(-1)).transpose(1, 2)
        for j in range(c.blocks):
            keys = slice(64 * j, min(64 * j + 64, c.N))
            k = by_head(x["k"][:, slot, keys], 2).transpose(1, 2)
            s = q @ k.mT * by_head(x["k_scale"][:, slot, j], 1)[..., None, None]
            if c.smooth == "block":
                mean = by_head(x["k_mean"][:, slot, j], 1)
                s = s + torch.einsum("blhd,bhd->bhl", x["q"][o].double(), mean).unsqueeze(-1)
            s = s * (sm_scale / LN_2)
            if c.causal is not None:
                last = torch.arange(c.L).unsqueeze(1) + c.causal
                s = torch.where(torch.arange(c.N)[keys] <= last, s, -torch.inf)
            s = s.masked_fill(~seen(c, x, t, j, split).unsqueeze(-1), -torch.inf)
            above = torch.maximum(largest, s.amax(-1))
            finite = above.masked_fill(above == -torch.inf, 0.0)
            past = (largest - finite).exp2()
            p = (s - finite.unsqueeze(-1)).exp2() * top
            stored = p.float().to(VALUES[c.values]).double()
            v = by_head(x["v"][:, slot, keys], 2).transpose(1, 2)
            v_scale = by_head(x["v_scale"][:, slot, j], 1).unsqueeze(2)
            out = out * past.unsqueeze(-1) + stored @ v * v_scale
            total = total * past + (stored if c.values == "fp8" else p).sum(-1)
            largest = above
    return Sums(out, total, largest, shift)


def assert_near(got: Tensor, want: Tensor, limits: tuple[float, float], size: Tensor) -> None:
    """Typical and worst error, in units of `size`."""
    known = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~known & ~want.isnan()].double(), want[~known & ~want.isnan()])
    error = ((got.double() - want)[known] / size).abs()
    if error.numel():
        typical, worst = float(error.square().mean().sqrt()), float(error.max())
        assert typical <= limits[0], (typical, worst)
        assert worst <= limits[1], (typical, worst)


def check(case: Case, x: dict[str, Any] | None = None, sm_scale=0.125, **how: Any) -> None:
    """float16: float32 rounds a score of hundreds of steps by 1e-4, and probabilities round alike.
    e4m3: now and then a probability lies so near to the middle of two neighbours, 1 / 16 apart,
    that float32 decides otherwise.  A wrong scale, row or key is off by 1."""
    x = x or numbers(case)
    for split, (got, got_lse) in enumerate(zip(*launch(case, x, sm_scale, **how), strict=True)):
        check_split(case, x, sm_scale, split, got, got_lse)


def check_split(
    case: Case, x: dict[str, Any], sm_scale: float, split: int, got: Tensor, got_lse: Tensor
) -> None:
    sums = oracle(case, x, sm_scale, split)
    blind = sums.total == 0
    want = torch.where(blind.unsqueeze(-1), 0.0, sums.out / sums.total.unsqueeze(-1))
    want = want.transpose(1, 2)
    if case.added:
        want = want + x["added"].double()
    lse = (sums.largest + (sums.total / TOP[case.values]).log2()) * LN_2 + sums.shift
    size = want.nan_to_num().square().mean().sqrt().clamp_min(1e-30)
    low = case.values == "fp8"
    rounding = {torch.float32: 0, torch.bfloat16: 2**-9, torch.float16: 2**-12}[case.out]
    limits = (2e-3, 0.05) if low else (2e-4, 2e-3)
    limits = tuple(limit * max(1.0, case.sharp / 5) for limit in limits)
    assert_near(got_lse, lse.masked_fill(blind, -torch.inf), limits, torch.ones(()))
    limits = (3e-3, 0.25) if low else (3e-4, 4e-3)
    assert_near(got, want, (limits[0] + rounding, limits[1] + 16 * rounding), size)


# --- Bit for bit ----------------------------------------------------------------------------------


def unit_scale() -> float:
    """sm_scale that makes the kernel's log2 units exactly 1."""
    log2e, one = torch.tensor(1.4426950408889634), torch.tensor(LN_2)
    for x in (one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)):
        if x * log2e == 1:
            return float(x)
    raise AssertionError("no float32 is 1 / log2(e) to the last bit")


def small_integers(case: Case) -> dict[str, Any]:
    """Scores and shifts are integers near zero, so that probabilities are powers of two, which any
    format stores; values and the scales of theirs are small: every sum is exact."""
    g = torch.Generator().manual_seed(case.seed + 1)
    x = numbers(case)

    def sparse(shape, count):  # `count` numbers 1 or -1 per row
        y = torch.zeros(shape).flatten(0, -2)
        where = torch.rand(y.shape, generator=g).topk(count, -1).indices
        signs = 1.0 - 2 * torch.randint(2, where.shape, generator=g)
        return y.scatter(-1, where, signs).view(shape)

    def within(low, high, like):
        return torch.randint(low, high + 1, like.shape, generator=g).to(like.dtype)

    # Small scales: the bias of softmax.h, 12582912 * scale, takes log2(448) in without much loss
    x["q_scale"], x["k_scale"] = torch.ones_like(x["q_scale"]), 2.0 ** within(-6, -5, x["k_scale"])
    x["q_code"] = (64 * sparse(x["q_code"].shape, 2)).to(x["q_code"].dtype)
    x["k"] = within(-1, 1, x["k"].float()).to(x["k"].dtype)
    x["v"] = within(-2, 2, x["v"].float()).to(x["v"].dtype)
    x["v_scale"] = 2.0 ** within(0, 1, x["v_scale"])
    x["q"] = sparse(x["q"].shape, 1).to(case.dtype)
    if x["added"] is not None:
        x["added"] = within(-8, 8, x["added"])
    if x["k_mean"] is not None:
        x["k_mean"] = within(-1, 1, x["k_mean"])
    return x


def check_exactly(case: Case, **how: Any) -> None:
    x, sm_scale = small_integers(case), unit_scale()
    for split, got in enumerate(launch(case, x, sm_scale, **how)[0]):
        sums = oracle(case, x, LN_2, split)
        assert bool((sums.out.float() == sums.out).all()), "not what this test wants"
        factor = torch.where(sums.total == 0, 0.0, 1 / sums.total.float())
        want = (sums.out.float() * factor.unsqueeze(-1)).transpose(1, 2)
        want = (want + x["added"] if case.added else want).to(case.out)
        # ex2.approx is exact on the emulator alone
        assert float((got - want).abs().max()) <= (2e-6 if HOPPER and not how else 0.0)


SEGMENTS = dict(
    L=130, N=100, slots=3, table=(2, -1, 0, 0, 1, 2, 1, -3), offsets=(1, 1, 0, 0, 1, 0, 0, 9)
)
SHORT: dict[str, Any] = dict(
    L=40, N=30, slots=9, table=(*range(8, -1, -1), 3, -1, 5), offsets=(0, 1) * 6
)
EXACT = {
    "ragged": Case(L=70, N=100),
    "heads": Case(B=2, H=4, H_kv=2, L=130, N=130),
    "a ring and a group": Case(L=64, N=1100),
    "segments": Case(**SEGMENTS),
    "causal": Case(L=200, N=200, causal=0),
    "lists": Case(B=2, H=4, H_kv=2, L=300, N=700, lists=0.4),
    "listed segments": Case(**SEGMENTS | dict(L=260), lists=0.5, added=True, seed=1),
    "splits": Case(**SEGMENTS, splits=3),
    "causal splits": Case(L=200, N=400, causal=150, splits=3),
}


@pytest.mark.parametrize(
    ("keys", "values", "D"),
    [
        *((keys, values, 128) for keys in KEYS for values in VALUES),
        *(("int8", "fp16", 64), ("fp8", "fp8", 64)),
    ],
)
@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit(name, keys, values, D):
    for smooth in SMOOTH if EXACT[name].table is None else SMOOTH[:2]:
        check_exactly(replace(EXACT[name], keys=keys, values=values, D=D, smooth=smooth))


@pytest.mark.parametrize("values", VALUES)
def test_agrees_with_the_reference(values):
    """The oracle of the op itself, on the same codes: no rounding of probabilities there, and here
    none that matters."""
    for case in (Case(values, **SEGMENTS, B=2), Case(values, N=200, table=(0,))):
        x = small_integers(case)
        got, got_lse = (y[0] for y in launch(case, x, unit_scale()))
        x["q"] = x["q"].double()
        want, lse = reference.segment_attention(
            *(x[name] for name in ("q", "q_code", "q_scale", "k", "v")),
            *(x[name] for name in ("k_scale", "k_mean", "v_scale", "table")),
            *(x["offset_index"].clamp(max=len(x["q"]) - 1), LN_2, True),
        )
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)
        assert torch.allclose(got_lse.double(), lse, rtol=1e-5, atol=1e-5)


# --- Near -----------------------------------------------------------------------------------------

NEAR = {
    "one query, one key": Case(L=1, N=1),
    "heads": Case(B=2, H=4, H_kv=2, L=130, N=190, smooth="sequence"),
    "a ring and a group": Case(L=64, N=1100, out=torch.bfloat16),
    "sharp": Case(L=70, N=300, sharp=20.0),
    "segments": Case(**SEGMENTS, B=2, out=torch.bfloat16),
    "short segments": Case(**SHORT),
    "all absent": Case(slots=2, table=(-1, -2)),
    "no entries": Case(slots=2, table=()),
    "no keys": Case(N=0, smooth=None),
    "causal": Case(L=200, N=200, causal=0, out=torch.float16, dtype=torch.float16),
    "causal, more keys": Case(L=140, N=200, causal=60, smooth="sequence"),
    "causal, blind rows": Case(L=200, N=100, causal=-90),
    "lists": Case(L=130, N=1500, lists=0.9, added=True, out=torch.bfloat16),
    "listed segments": Case(**SEGMENTS, B=2, H=2, H_kv=1, lists=0.4, added=True, seed=3),
    "nothing is listed": Case(L=130, N=100, lists=0.0, added=True),
    "splits": Case(N=1000, splits=3, smooth="sequence"),
    "more splits than blocks": Case(**SEGMENTS, splits=16),
    "causal splits": Case(L=200, N=300, causal=20, splits=3),
    "splits of nothing": Case(slots=2, table=(-1, -2), splits=2),
}


@pytest.mark.parametrize(("keys", "values"), [("int8", "fp16"), ("int8", "fp8"), ("fp8", "fp8")])
@pytest.mark.parametrize("name", NEAR)
def test_near_float64(name, keys, values):
    check(replace(NEAR[name], keys=keys, values=values, D=64 if "segments" in name else 128))


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("keys", KEYS)
def test_the_op(keys, values, smooth):
    """From tensors of a model to its result: encoded by sm80's kernel, attended by sm90's."""
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).bfloat16() for n in (100, 150, 150))
    options = dict(qk=keys, pv=values, smooth=smooth, causal=True, return_lse=True)
    with emulated("attention", sm=90) as runner:
        got, lse = api.attention(q, k, v, **options, backend="cuda")
    assert runner.launches == ["encode_qkv_sm80", "attention_sm90"]
    want, wide = api.attention(q.double(), k.double(), v.double(), causal=True, return_lse=True)
    tolerance = api.TOLERANCE["fp8" if "fp8" in (keys, values) else "int8"]
    assert tolerance.accepts(checks.accuracy(got, want)), checks.accuracy(got, want)
    assert torch.allclose(lse.double(), wide, atol=0.05)


def test_the_op_in_splits():
    """Few queries, many keys: the parts of this kernel, combined by sm80's."""
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, n, 1, 64, generator=g).bfloat16() for n in (100, 1500, 1500))
    with emulated("attention", sm=90) as runner:
        got, lse = api.attention(q, k, v, qk="int8", pv="fp8", return_lse=True, backend="cuda")
    assert runner.launches == ["encode_qkv_sm80", "attention_sm90", "combine_parts_sm80"]
    want, wide = api.attention(q.double(), k.double(), v.double(), return_lse=True)
    assert api.TOLERANCE["fp8"].accepts(checks.accuracy(got, want)), checks.accuracy(got, want)
    assert torch.allclose(lse.double(), wide, atol=0.05)


@pytest.mark.parametrize("values", VALUES)
def test_strides(values):
    """Caches padded between heads, keys and slots; queries that are views."""
    case = Case(values, B=2, H=2, H_kv=2, slots=2, table=(1, 0), N=70)
    x = numbers(case)
    for name in "kv":
        padded = torch.zeros(2, 2, 80, 3, 128 + 16, dtype=x[name].dtype)
        padded[:, :, :70, :2, :128].copy_(x[name])
        x[name] = padded[:, :, :70, :2, :128]
    x["q"] = x["q"].transpose(2, 3).contiguous().transpose(2, 3)
    check(case, x)


@pytest.mark.parametrize("values", VALUES)
def test_nan_spreads_as_far_as_it_is_seen(values):
    """Of a query: its row.  Of a key: the rows that see its block.  Of a value: its channel."""
    case = Case(values, "int8" if values == "fp16" else "fp8", L=200, N=200, causal=0)
    for name, place in (("q", (0, 0, 100)), ("k_scale", (0, 0, 2)), ("k_mean", (0, 0, 1))):
        x = numbers(case)
        x[name][place] = torch.nan
        check(case, x)
    x = numbers(replace(case, causal=None))
    x["v_scale"][0, 0, 1, 0, 5] = torch.nan
    check(replace(case, causal=None), x)


def test_what_it_leaves_to_sm80():
    """Other head dimensions, 32-bit queries with means, caches that four dimensions do not tell;
    to nobody, triangles of lists, and splits of what is rounded or added to."""
    cases = [(case, numbers(case)) for case in (Case(D=96), Case(D=256), Case(dtype=torch.float32))]
    case = Case(B=2, slots=2, table=(0, 1))
    x = numbers(case)
    cases.append((case, x | {"k": torch.cat([x["k"], x["k"]], 1)[:, :2]}))
    cases.append((Case(), numbers(Case()) | {"k_mean": torch.zeros(1, 1, 2, 1, 128).half()}))
    for case in (
        Case(lists=1.0, causal=0),
        Case(lists=1.0, splits=2),
        Case(splits=2, added=True),
        Case(splits=2, out=torch.bfloat16),
        Case(splits=0),
    ):
        cases.append((case, numbers(case)))
    for case, x in cases:
        with pytest.raises(emulate.EmulationError, match="refused"):
            launch(case, x, 0.125, schedule="forward")  # never on a GPU, where sm80 would serve


# --- Every order ----------------------------------------------------------------------------------


def check_all(**how: Any) -> None:
    """Rings go round, of groups too; offsets change; the last block of a slot and the diagonal;
    lists whose groups end at either."""
    check_exactly(Case("fp8", **SEGMENTS), **how)
    check_exactly(Case("fp8", **SHORT), **how)
    check_exactly(Case("fp8", L=64, N=1100, causal=1030, splits=2, seed=1), **how)
    check_exactly(Case("fp8", **SEGMENTS, lists=0.7, added=True, seed=1), **how)


@pytest.mark.parametrize("landing", emulate.LANDINGS)
@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_every_schedule(schedule, landing):
    for seed in (1, 2):
        check_all(schedule=schedule, landing=landing, seed=seed)
    for case in (Case("fp16", **SEGMENTS), Case("fp16", "fp8", **SEGMENTS, lists=0.5)):
        check_exactly(case, schedule=schedule, landing=landing)


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
def test_without_races(schedule):
    check_all(flavour="race", schedule=schedule, seed=3)
    check_exactly(Case("fp16", **SEGMENTS), flavour="race", schedule=schedule)
    check_exactly(Case("fp16", "fp8", **SEGMENTS, lists=0.5), flavour="race", schedule=schedule)
    check_exactly(Case("fp16", L=130, N=200, D=64), flavour="race", schedule=schedule)
    check_exactly(Case("fp8", "fp8", L=130, N=200, D=64), flavour="race", schedule=schedule)


# Edits of either file: of statements, or of expressions, which do not end in a semicolon.
MUTATIONS = {
    "keys before they have landed": ("shared.k_full[next.at].wait(next.parity);", ""),
    "values before they are transposed": ("ready[ring.at].wait(ring.parity);", ""),
    "transposed before they have landed": ("shared.v_full[ring.at].wait(ring.parity);", ""),
    "transposed values are not fenced": ("      fence_async_proxy();", ""),
    "one warp has transposed for all": (
        "if (lane == 0) shared.turned[ring.at].arrive();",
        "if (warp == 0 && lane < 4) shared.turned[ring.at].arrive();",
    ),
    "no ones": ("0x38383838u", "0u"),
    "a stage is released while in use": (
        "      turn.pass(false);",
        "turn.pass(false); if (lane == 0) empty.arrive();",
    ),
    "a stage is filled while in use": ("shared.empty[ring.at].wait(ring.parity ^ 1);", ""),
    "released while other lanes read scales": (
        "sync_warp();  // all lanes have read their scales",
        "",
    ),
    "no other parity in the next round": ("parity ^= 1;", ""),
    "products before they are done": ("      wgmma_wait<1>();", "wgmma_wait<2>();"),
    "scores before they are done": (
        "      wgmma_wait<0>();\n      tie_registers(x);",
        "wgmma_wait<1>(); tie_registers(x);",
    ),
    "registers are not fenced": ("      turn.take();\n      wgmma_fence();", "turn.take();"),
    "nobody has the first turn": ("    turn.begin();", ""),
    "means before they have landed": ("shared.group_full[groups.at].wait(groups.parity);", ""),
    "means are replaced while in use": (
        "shared.group_empty[groups.at].wait(groups.parity ^ 1);",
        "",
    ),
    "shifts over those still read": ("sync_warp();  // the group before has been read", ""),
    "queries before they have landed": (
        "    cp_async_wait<0>();\n    sync_warp();",
        "sync_warp();",
    ),
    "means of the group before they have landed": (
        "      cp_async_wait<0>();\n      sync_warp();",
        "sync_warp();",
    ),
    "means of one lane for all": (
        "      cp_async_wait<0>();\n      sync_warp();",
        "cp_async_wait<0>();",
    ),
    "one offset for all": ("group.offset != offset", "false"),
    "one offset for all of a group": ("slot >= 0 && wanted == offset", "slot >= 0"),
    "absent entries in a group": ("slot >= 0 && wanted == offset", "wanted == offset"),
    "nobody asks for the next group": ("block % kGroup == 0", "false"),
    "the lists of other queries": ("tile.first / kQueries * p.stride_list_row", "0"),
    "read ahead past the list": ("place < end ? list[place] : 0", "list[place]"),
    "the end for consumers alone": ("v_full.arrive();", ""),
    "a share without its last block": ("(split + 1) * steps", "(split + 1) * steps - 1"),
    "all splits to one place": ("static_cast<int>(blockIdx.y) * p.B + b", "b"),
    "nothing is added": ("if (p.added)", "if (p.added && !(MADE))"),
    "another order of keys": (
        "byte_permute(r[0], r[1], 0x6420)",
        "byte_permute(r[1], r[0], 0x6420)",
    ),
    "a channel twice": (
        "byte_permute(r[2], r[3], 0x7531)",
        "byte_permute(r[2], r[3], 0x6420)",
    ),
    "scales of other keys": (
        "{scale_row(walk.entry, walk.j)}",
        "{scale_row(walk.entry, MADE ? 0 : walk.j)}",
    ),
    "scales of other values": ("scale_row(entry, j)}", "scale_row(entry, j + (MADE))}"),
    "scales of other channels": ("scale[1] = four.at[2]", "scale[1] = four.at[MADE ? 1 : 2]"),
    "keys past the end count": ("j >= tile.free", "j > tile.free"),
    "the diagonal is not seen": ("8 * r + p.first_last + 1", "8 * r + p.first_last"),
    "maxima of every other key": ("2 * r + i % 2", "2 * r"),
    "maxima of coarse scores keep their bias": (
        "scale < kCoarse ? Soft",
        "MADE || scale < kCoarse ? Soft",
    ),
    "a new maximum changes nothing": ("!same", "false"),
    "rows past the end are stored": ("if (mine >= p.L) continue;", ""),
}


# All kernels but one, for the sake of time.
LEFT_OUT = {
    "  if (p.D == 64) return launch_attention<Config<Key, T, 64>>(p, stream);\n": "",
    "  if (p.v_dtype == Dtype::kFloat16) return launch_types<Key, float16>(p, stream);\n": "",
    "  return attend_sm90::launch_keys<e4m3>(p, stream);\n": "  return cudaErrorInvalidValue;\n",
}


@functools.cache
def planted() -> dict[str, list[tuple[str, str]]]:
    """All of them in one source, of one kernel; the field mask_dtype, for which this kernel has no
    use, says which is made."""
    files = [path.read_text() for path in SOURCES]
    for number, (old, new) in enumerate(MUTATIONS.values(), 1):
        made = f"mistake == {number}"
        if "MADE" in new:
            text = new.replace("MADE", made)
        elif old.endswith(";") or "//" in old:
            text = f"if ({made}) {{ {new}\n }} else {{ {old}\n }}"
        else:
            text = f"({made} ? ({new}) : ({old}))"
        assert sum(file.count(old) for file in files) == 1, old
        files = [file.replace(old, text) for file in files]
    include = '#include "attention/sm90_{}.h"\n'.format
    for name in ("producer", "tile", "values"):
        files = [file.replace(include(name), "") for file in files]
    kernel, *others = (file.replace("#pragma once", "") for file in files)
    first = '#include "attention/attention.h"\n'
    edits = {
        first: "\n".join([first, "static int mistake;", *reversed(others)]),
        "if (!attention_sm90_serves(p))": "mistake = static_cast<int>(p.mask_dtype);\n"
        "if (!attention_sm90_serves(p))",
        **LEFT_OUT,
    }
    for old, new in edits.items():
        assert kernel.count(old) == 1, old
        kernel = kernel.replace(old, new)
    return {"sm90.cu": [(SOURCES[0].read_text(), kernel)]}


@pytest.mark.parametrize("name", ["none", *MUTATIONS])
def test_mistake_is_noticed(name):
    how = dict(flavour="race", replace=planted(), mistake=["none", *MUTATIONS].index(name))
    if name == "none":
        check_all(**how)
        return
    with pytest.raises((AssertionError, emulate.EmulationError)) as caught:
        check_all(**how)
    print(name, "|", str(caught.value)[:300])


def test_under_sanitizers():
    """The kernel for e4m3, with rows and keys past the end and an absent entry."""
    problem = parameters.sanitized(
        "attention",
        f"LEFT_OUT = {list(LEFT_OUT.items())}"
        """
L, N, D = 70, 100, 128
rng = np.random.default_rng(0)
q = rng.integers(-8, 9, (1, 1, L, 1, D)).astype(np.int8)
k, v = (rng.integers(0, 64, (1, 2, N, 1, D)).astype(np.int8) for _ in "kv")
out, lse = np.full((1, L, 1, D), np.nan, np.float32), np.full((1, 1, L), np.nan, np.float32)
ones = np.ones((1, 2, 2, 1, D), np.float32)
strides = {f"stride_{x}{n}": 0 for x, names in (("q", "oblh"), ("m", "bhln")) for n in names}
strides |= {f"stride_{x}{n}": s for x in "kv" for n, s in zip("bsnh", (2 * N * D, N * D, D, D))}
replace = {"sm90.cu": LEFT_OUT}
for bounds, blocks, added in (
    (None, None, None),
    (np.array([0, 5], np.int32), np.arange(5, dtype=np.int32), np.ones_like(out)),
):
  parameters.run("attention", "attention", dict(
    q=None, q_code=q, q_scale=np.full((1, 1, 2, 1), 2**-6, np.float32), k=k, v=v,
    k_scale=np.full((1, 2, 2, 1), 2**-6, np.float32), k_mean=None, v_scale=ones, mask=None,
    table=np.array([1, -1, 0]), offset_index=np.zeros(3, np.int64), out=out, lse=lse, B=1, L=L, N=N,
    list_bounds=bounds, list_blocks=blocks, added=added, splits=1, room=5, stride_list_head=2,
    stride_list_row=1, pv_skip=0.0, H=1, H_kv=1, D=D, E=D, slots=2, T=3, causal=int(bounds is None),
    first_last=N - L, **strides, sm_scale=0.5, smooth=0, q_dtype=0, mean_dtype=0, mask_dtype=0,
    qk_dtype=3, v_dtype=4, out_dtype=0), sm="sm90", flavour="sanitize", replace=replace)
assert np.isfinite(out).all() and np.isfinite(lse).all()
""",
        sm="sm90",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


def test_no_bank_conflicts():
    """Tiles of values on their way through the transposition, scales, shifts: each in as few
    wavefronts as its bytes take."""
    check_exactly(Case("fp8", **SEGMENTS), flavour="race", count_banks=True)
    rows = parameters.library("attention", "sm90", "race", ()).banks()
    assert all(row["wavefronts"] == row["ideal"] > 0 for row in rows), rows


# --- The device build -----------------------------------------------------------------------------


@needs_nvcc
def test_device_build(tmp_path):
    """No spills, and no word of serialised products (C7510 and its like) or of an ignored
    setmaxnreg.  Products in three places: the first scores, the loop, the last values."""
    build = device_build(SOURCES[0], "90a", tmp_path)
    assert build.spills == [("0", "0")] * 8
    assert not re.search(r"C7\d\d\d|warning", build.report)
    kernels = build.kernels()
    for kernel in kernels:
        int8, half, size = re.search(r"ConfigI(a)?.*?(float16)?E?Li(\d+)", kernel).groups()
        D = int(size)
        keys, scores = D // 32, "IGMMA.64x64x32.S8.S8" if int8 else "QGMMA.64x64x32.F32.E4M3"
        values = 4 if half else 2
        name = f"HGMMA.64x{D}x16.F32" if half else f"QGMMA.64x{D + 8}x32.F32.E4M3"
        assert kernel.count(scores) == 2 * keys
        assert kernel.count(name) == 2 * values
        assert kernel.count("GMMA.64x") == 2 * (keys + values)
        words = ["UTMALDG.4D", "LDGSTS", "SYNCS.ARRIVE", "BAR.ARV", "MUFU.EX2"]
        words += ["VIMNMX3"] if int8 else []
        words += [] if half else ["LDSM.16.MT88.4", "STSM.16.M88.4"]
        assert not [word for word in words if word not in kernel]
        assert {"0x38", "0xe0"} == set(re.findall(r"USETMAXREG.*(0x\w+) ;", kernel))
    assert len(kernels) == 8
