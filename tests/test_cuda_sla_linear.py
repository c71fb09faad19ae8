# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of sla's linear branch: their own source on the emulator, against the oracle in
float64."""

from __future__ import annotations

import re
import shutil

import emulate
import parameters
import pytest
import torch
from device_build import device_build, needs_nvcc
from emulated import emulated

from reeltime import checks, sla
from reeltime.arch import UnsupportedArchError
from reeltime.rope_kv import reference as rope_kv
from reeltime.sla import cuda_linear, reference
from reeltime.sla.cuda_mask import Choice

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WANTED = {"unselected": (2, 3), "marginal": (2,)}  # codes


def draw(*shape, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(dtype)


def integers(low, high, *shape, dtype=torch.int8):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def close(got, want, name):
    error = checks.accuracy(got.cpu(), want)
    assert sla.TOLERANCE[name].accepts(error), error


def spelled(dtype):
    return str(dtype).removeprefix("torch.")


def on(device, x):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def moved(device, *values):
    return [tuple(moved(device, *x)) if isinstance(x, tuple) else on(device, x) for x in values]


# --- Sums ----------------------------------------------------------------------------------------


def summed(h, z, segments, offsets, codes=None, over="all"):
    """H [O, B, H, rows, D, E] and Z in float64, by index."""
    B, slots, per_slot, H_kv, D, E = h.shape
    table, owner = segments or (torch.zeros(1, dtype=torch.int64),) * 2
    present = (table >= 0) & (table < slots)
    index = torch.where(present, table, 0)
    mine = (torch.arange(offsets)[:, None] == owner) & present
    weight = mine.repeat_interleave(per_slot, 1).double()  # [O, n]
    h, z = (x[:, index].flatten(1, 2).double() for x in (h, z))
    if codes is None:
        include = torch.ones(B, H_kv, 1, weight.shape[1], dtype=torch.float64)
    else:
        include = sum((codes == code) for code in WANTED[over]).double()
        group = codes.shape[1] // H_kv
        h, z = h.repeat_interleave(group, 2), z.repeat_interleave(group, 2)
    total_h = torch.einsum("on,bhin,bnhde->obhide", weight, include, h)
    return total_h, torch.einsum("on,bhin,bnhd->obhid", weight, include, z)


def check_sums(h, z, segments, offsets, codes=None, over="all", dtype=torch.bfloat16, **how):
    want = summed(h, z, segments, offsets, codes, over)
    with emulated("sla", gpu=not how, **how) as runner:
        args = moved(runner.device, h, z, segments)
        choice = Choice(None, on(runner.device, codes), None)
        weight = torch.eye(h.shape[5], device=runner.device)
        exact = cuda_linear.reach(over, choice, *args, offsets, torch.float32)
        rough = cuda_linear.reach(over, choice, *args, offsets, dtype)
        turned = cuda_linear.reach(over, choice, *args, offsets, torch.float32, weight)
    assert exact[0].dtype == rough[0].dtype == torch.bfloat16
    assert rough[0].shape[4] == cuda_linear.TERMS[dtype]
    close(exact[0].double().sum(4), want[0], "float32")
    close(exact[1], want[1], "float32")
    close(rough[0].double().sum(4), want[0], spelled(dtype))
    assert torch.equal(exact[1].cpu(), rough[1].cpu())
    close(turned[0].double().sum(4), want[0], "float32")


def entries(table, owner):
    return torch.tensor(table), torch.tensor(owner)


SEGMENTS = {  # slots, summaries of each, segments, offsets
    "one slot": (1, 70, None, 1),
    "one summary": (1, 1, None, 1),
    "slots of a ring": (4, 5, entries([2, -1, 0, 3], [0, 0, 1, 1]), 2),
    "a sum per slot": (9, 1, entries([8, 1, 2, 3, -4, 5, 9, 7, 0, 6], [0] * 9 + [1]), 2),
    "runs of an offset": (3, 70, entries([2, 0, 1], [1, 0, 1]), 2),
    "a slot twice, an offset without any": (2, 3, entries([1, 1], [0, 2]), 3),
    "all absent": (2, 3, entries([-1, -1], [0, 0]), 1),
}


@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_sums(name, over):
    slots, per_slot, segments, offsets = SEGMENTS[name]
    n = per_slot * (1 if segments is None else len(segments[0]))
    codes = None if over == "all" else integers(0, 4, 2, 4, 3, n)
    h, z = draw(2, slots, per_slot, 2, 16, 48), draw(2, slots, per_slot, 2, 16)
    check_sums(h, z, segments, offsets, codes, over, torch.float16)


@pytest.mark.parametrize("rows", [1, 17, 64, 65, 130])
def test_rows_of_sums(rows):
    """Tiles of 64 rows, strips of 16; D E is no multiple of the columns of a block."""
    h, z = draw(1, 1, 66, 1, 16, 80), draw(1, 1, 66, 1, 16)
    check_sums(h, z, None, 1, integers(1, 4, 1, 1, rows, 66), "unselected")


def test_sums_repeat_bit_for_bit():
    h, z = draw(1, 3, 40, 1, 16, 16), draw(1, 3, 40, 1, 16)
    args = h, z, entries([2, 0, 1], [0, 0, 0]), 1, torch.float32
    runs = []
    for schedule in emulate.SCHEDULES:
        with emulated("sla", schedule=schedule):
            runs.append(cuda_linear.reach("all", Choice(None, None, None), *args))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_channel_of_sums(bad):
    h, z = draw(1, 1, 5, 1, 16, 16), draw(1, 1, 5, 1, 16)
    h[0, 0, 3, 0, 7, 9], z[0, 0, 2, 0, 4] = bad, bad
    codes = torch.full((1, 1, 2, 5), 3, dtype=torch.int8)
    for over, code in (("all", None), ("unselected", codes)):
        with emulated("sla"):
            got_h, got_z = cuda_linear.reach(
                over, Choice(None, code, None), h, z, None, 1, torch.float32
            )
        finite = got_h.float().sum(4).isfinite()
        assert not finite[..., 7, 9].any()
        assert not got_z[..., 4].isfinite().any()
        assert (~finite).sum() == (~got_z.isfinite()).sum() == finite.shape[3]


# --- Projection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("K, N", [(16, 16), (48, 80), (144, 176)])
@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "transposed"])
def test_project(K, N, dtype, turned, monkeypatch):
    """Strips of 128 rows that one block of threads owns in turn, ragged at the end."""
    monkeypatch.setattr(cuda_linear.native, "processors", lambda device: 2)
    x = draw(1, 1, 5, 1, 80, K) if not turned else draw(1, 2, 1, 1, 16, K)
    weight = draw(K, N, dtype=dtype).T if turned else draw(N, K, dtype=dtype)
    want = x.double() @ weight.double().T
    with emulated("sla", gpu=True) as runner:
        args = x.to(runner.device), weight.to(runner.device)
        for terms, name in enumerate(("float32", "bfloat16", "float16", "float32")):
            got = cuda_linear.project(*args, terms)
            assert got.shape == ((*x.shape[:4], terms, *want.shape[4:]) if terms else want.shape)
            close(got.double().sum(4) if terms else got, want, name)


# --- Summaries -----------------------------------------------------------------------------------


def check_summaries(B, S, H, D, E, dtype, run, phi="softmax", **how):
    k, v = draw(B, S, H, D, dtype=dtype, seed=1), draw(B, S, H, E, dtype=dtype, seed=2)
    want = rope_kv.summaries(k.double(), v.double(), phi, run)
    with emulated("sla", gpu=not how, **how) as runner:
        got = cuda_linear.summaries(*moved(runner.device, k, v), phi, run)
    for mine, oracle in zip(got, want, strict=True):
        close(mine, oracle, spelled(dtype))


KEYS = {  # B, S, H, D, E, run
    "one key": (1, 1, 1, 16, 16, 64),
    "ragged, E > D": (2, 70, 2, 16, 48, 64),
    "runs of 100": (1, 230, 1, 48, 32, 100),
    "one run": (1, 130, 2, 64, 64, 1024),
    "D = E = 128": (1, 65, 1, 128, 128, 64),
    "several slices": (1, 66, 1, 208, 144, 128),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", KEYS)
def test_summaries(name, dtype):
    *shape, run = KEYS[name]
    check_summaries(*shape, dtype, run)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("phi", ["elu", "relu"])
def test_feature_maps_of_keys(phi, dtype):
    check_summaries(1, 70, 1, 32, 32, dtype, 64, phi)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_run(bad):
    k, v = draw(1, 130, 1, 16), draw(1, 130, 1, 16, seed=1)
    k[0, 3, 0, 5], v[0, 70, 0, 2] = bad, bad
    with emulated("sla"):
        h, z = cuda_linear.summaries(k, v, "softmax", 64)
    want_h, want_z = rope_kv.summaries(k, v, "softmax", 64)
    assert torch.equal(h.isfinite(), want_h.isfinite())
    assert torch.equal(z.isfinite(), want_z.isfinite())


# --- Linear attention ----------------------------------------------------------------------------


def check_linear(q, h, z, over="all", block_q=128, phi="softmax", eps=1e-5, backend="cuda", **how):
    csr = None
    B, L, H, _ = q.shape
    if over != "all":
        rows, n = -(-L // block_q), h.shape[1]
        mask = integers(0, 2, B, H, rows, n, dtype=torch.bool)
        csr = sla.CSR(*reference.compress(mask, n))
    options = {"over": over, "block_q": block_q, "phi": phi, "eps": eps}
    want = sla.linear_attention(q.double(), h.double(), z.double(), csr, **options)
    with emulated("sla", gpu=not how, **how) as runner:
        args = moved(runner.device, q, h, z)
        lists = csr and sla.CSR(*moved(runner.device, *csr))
        got = sla.linear_attention(*args, lists, **options, backend=backend)
    assert got.is_contiguous()
    assert got.dtype == q.dtype
    close(got, want, spelled(q.dtype))


LINEAR = {  # B, L, H, H_kv, D, E, blocks of keys, queries of a block
    "one query": (1, 1, 1, 1, 16, 16, 1, 128),
    "ragged, GQA, E > D": (2, 70, 4, 2, 16, 48, 3, 32),
    "blocks of 100": (1, 230, 1, 1, 48, 32, 5, 100),
    "D = E = 128": (1, 130, 2, 1, 128, 128, 2, 128),
    "several slices": (1, 40, 1, 1, 208, 144, 2, 128),
    "no queries": (1, 0, 1, 1, 16, 16, 2, 128),
    "no batch": (0, 3, 1, 1, 16, 16, 2, 128),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention(name, over, dtype):
    B, L, H, H_kv, D, E, n, block_q = LINEAR[name]
    h, z = draw(B, n, H_kv, D, E), draw(B, n, H_kv, D).abs() * 64
    check_linear(draw(B, L, H, D, dtype=dtype), h, z, over, block_q)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("phi", ["elu", "relu"])
def test_feature_maps_of_queries(phi, dtype):
    h, z = draw(1, 2, 1, 32, 32), draw(1, 2, 1, 32).abs()
    check_linear(draw(1, 70, 1, 32, dtype=dtype), h, z, phi=phi)


ODD = {
    "every second query": lambda: (draw(1, 10, 2, 80)[:, ::2, :, :32], draw(1, 3, 1, 32, 16)),
    "an odd address": lambda: (draw(1, 5, 2, 40)[..., 3:35], draw(1, 3, 1, 32, 16)),
    "channels apart": lambda: (draw(1, 5, 2, 32, 2)[..., 1], draw(1, 3, 1, 32, 16)),
    "summaries of 16 bits": lambda: (draw(1, 5, 2, 32), draw(1, 3, 1, 32, 16, dtype=torch.float16)),
    "summaries transposed": lambda: (draw(1, 5, 2, 32), draw(1, 3, 1, 16, 32).mT),
    "large": lambda: (1e4 * draw(1, 5, 2, 32), 1e30 * draw(1, 3, 1, 32, 16)),
    "tiny": lambda: (1e-30 * draw(1, 5, 2, 32), 1e-30 * draw(1, 3, 1, 32, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_operands(name):
    q, h = ODD[name]()
    check_linear(q, h, draw(1, 3, 1, 32).abs())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_and_inf_stay_in_their_query(bad, dtype):
    """But for -inf, which softmax takes for a channel that does not count."""
    q, h, z = draw(1, 40, 1, 32, dtype=dtype), draw(1, 2, 1, 32, 16), draw(1, 2, 1, 32).abs()
    q[0, 7, 0, 3], q[0, 9] = bad, -torch.inf
    check_linear(q, h, z)


# --- With segments, projection and bias ----------------------------------------------------------


def check_branch(
    dtype=torch.bfloat16, over="unselected", D=32, E=32, phi="softmax", B=2, H=4, **how
):
    """The linear branch of segment_sla: two offsets, absent slots, a query block that reaches
    nothing, which gets the bias."""
    O, L, H_kv, slots, per_slot, block_q = 2, 150, H // 2, 3, 3, 64  # noqa: E741
    q = draw(O, B, L, H, D, dtype=dtype)
    h, z = draw(B, slots, per_slot, H_kv, D, E), draw(B, slots, per_slot, H_kv, D).abs() * 64
    table, owner = entries([2, -1, 0, 1], [1, 0, 0, 1])
    codes = integers(1, 4, B, H, 3, 12)
    codes[:, :, 1] = 1
    weight, bias = draw(E, E, dtype=dtype), draw(E, dtype=torch.float32)
    include = None
    if over != "all":
        include = sum((codes == code) for code in WANTED[over]).bool()
    index, absent = table.clamp(min=0), (table < 0).repeat_interleave(per_slot)
    mine = (torch.arange(O)[:, None] == owner).repeat_interleave(per_slot, 1) & ~absent
    read = [x[:, index].flatten(1, 2).double().repeat_interleave(H // H_kv, 2) for x in (h, z)]
    rest = reference.linear(q.double(), *read, include, mine, block_q, phi, 1e-5)
    want = reference.project(rest, weight, bias)
    with emulated("sla", gpu=not how, **how) as runner:
        args = moved(runner.device, h, z, (table, owner))
        choice = Choice(None, on(runner.device, codes), None)
        sums = cuda_linear.reach(over, choice, *args, O, dtype, on(runner.device, weight))
        out = torch.full((B, L, H, E), torch.nan, dtype=dtype, device=runner.device)
        rest = moved(runner.device, q, *sums, bias)
        cuda_linear.linear_into(out, *rest, block_q, phi, 1e-5)
    close(out, want, spelled(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("over", ["all", "unselected", "marginal"])
def test_branch_of_segments(over, dtype):
    check_branch(dtype, over)


@pytest.mark.parametrize("phi", ["softmax", "elu"])
def test_branch_of_several_slices(phi):
    check_branch(D=144, E=160, phi=phi, B=1, H=2, over="all")


# --- Refusals ------------------------------------------------------------------------------------


def test_refusals_say_why():
    z = draw(1, 2, 1, 24)
    with emulated("sla"):
        for message, dim, dtype in (
            ("multiples of 16 up to 256, not 24", 24, torch.float32),
            ("float32; float64 has", 16, torch.float64),
        ):
            q, h = draw(1, 4, 1, dim, dtype=dtype), draw(1, 2, 1, dim, dim)
            with pytest.raises(UnsupportedArchError, match=message):
                sla.linear_attention(q, h, z[..., :dim], backend="cuda")


def test_launchers_refuse_what_python_would_not_send():
    x = torch.zeros(64)
    given = {
        "sum_summaries": {"D": 24, "E": 16, "B": 1, "H": 1, "O": 1, "rows": 1},
        "summarise_keys": {"D": 16, "E": 272, "B": 1, "S": 1, "H": 1, "run": 64},
        "project_sums": {"D": 16, "K": 8, "N": 16, "matrices": 1},
        "linear_rows": {"D": 16, "E": 16, "B": 1, "L": 1, "H": 1, "O": 0, "block_q": 1},
    }
    for entry, some in given.items():
        kinds = parameters.fields("sla", parameters.entries("sla")[entry][0])
        every = {name: x if kind in ("input", "output") else 0 for name, kind in kinds.items()}
        with pytest.raises(emulate.EmulationError, match="the launcher refused"):
            parameters.run("sla", entry, every | some)


# --- Races, sanitizers, mistakes -----------------------------------------------------------------

SOURCE = emulate.CSRC / "sla"
TERMS, SUMS, LINEAR_H = "terms.h", "summaries.h", "linear.h"
FILES = {  # what an entry point is made of
    "sum_summaries": (TERMS, SUMS),
    "summarise_keys": (TERMS, SUMS),
    "project_sums": (TERMS, SUMS, LINEAR_H),
    "linear_rows": (TERMS, SUMS, LINEAR_H),
}
LAUNCHES = {  # and, for one type of each, all that is compiled of it
    "sum_summaries": "launch_sum(p, stream)",
    "summarise_keys": "launch_summarise(p, stream)",
    "project_sums": "launch_project_terms<1>(p, stream)",
    "linear_rows": "launch_linear_of<bfloat16, true>(p, stream)",
}


def alone(entry, file="", old="", new=""):
    """sm80.cu with one entry point, all of it in one text, in which `old` becomes `new`."""
    parts = []
    for name in FILES[entry]:
        text = (SOURCE / name).read_text()
        if name == file:
            assert text.count(old) == 1, (text.count(old), old)
            text = text.replace(old, new)
        body, launchers, _ = (*text.partition("// --- Launchers"), "")[:3]
        if launchers:
            rest = text[len(body) :]
            if name == SUMS and entry == "summarise_keys":
                rest = re.sub(r"(?s)  if \(p.dtype == Dtype::kFloat16.*?p\);\n", "", rest, count=1)
                rest = re.sub(r"return launch\(summarise_kernel<float.*?p\);", "return {};", rest)
                rest = rest.replace("usual ? summarise_kernel<bfloat16, true> :", "")
            elif name == SUMS and entry != "sum_summaries":
                rest = rest.partition("inline cudaError_t launch_sum(")[0] + "}\n}\n"
            elif name == SUMS:
                rest = rest.partition("inline cudaError_t launch_summarise(")[0] + "}\n}\n"
            elif entry == "project_sums":
                rest = rest.partition("inline cudaError_t launch_project(")[0] + "}\n}\n"
            else:
                rest = (
                    "template <class T, bool kUsual"
                    + rest.partition("template <class T, bool kUsual")[2].partition(
                        "inline cudaError_t launch_linear("
                    )[0]
                )
                rest += "}\n}\n"
            text = body + rest
        parts.append(re.sub(r'#pragma once|#include "sla/(terms|summaries).h"', "", text))
    parts.append("namespace reeltime {\n")
    for name, (params, *_) in parameters.entries("sla").items():
        code = f"sla_sm80::{LAUNCHES[entry]}" if name == entry else "cudaErrorInvalidValue"
        parts.append(
            f"cudaError_t {name}_sm80(const {params}& p, cudaStream_t stream) "
            f"{{ return {code}; }}\n"
        )
    return [((SOURCE / "sm80.cu").read_text(), "".join(parts) + "}\n")]


def check_all(how):
    """Two offsets and batches, slots absent or out of range."""
    h, z = draw(2, 3, 5, 3, 16, 16), draw(2, 3, 5, 3, 16)
    segments = entries([2, -1, 0, 3, 1, 1], [0, 0, 1, 1, 0, 0])
    with emulated("sla", **how):
        got = cuda_linear.reach("all", Choice(None, None, None), h, z, segments, 2, torch.float32)
    want = summed(h, z, segments, 2)
    close(got[0].double().sum(4), want[0], "float32")
    close(got[1], want[1], "float32")


def check_some(how):
    """Chunks of other offsets and of both, absent slots; tiles of rows, the last one ragged."""
    h, z = draw(1, 3, 44, 1, 16, 16), draw(1, 3, 44, 1, 16)
    segments = entries([2, 1, 0, -1, 1], [0, 0, 1, 1, 0])
    codes = integers(0, 4, 1, 2, 35, 220)
    with emulated("sla", **how):
        choice = Choice(None, codes, None)
        got = cuda_linear.reach("unselected", choice, h, z, segments, 2, torch.float32)
    want = summed(h, z, segments, 2, codes, "unselected")
    close(got[0].double().sum(4), want[0], "float32")
    close(got[1], want[1], "float32")


def check_keys(how):
    check_summaries(1, 170, 2, 48, 80, torch.bfloat16, 100, **how)


def check_projected(how):
    """Four strips, all of one block of threads; then K of two slices, out of range as all else."""
    for K in (48, 144):
        x, weight = draw(1, 1, 25, 1, 16, K), draw(32, K, dtype=torch.bfloat16)
        with emulated("sla", **how):
            got = cuda_linear.project(x, weight, 2)
        close(got.double().sum(4), x.double() @ weight.double().T, "float16")


def check_rows(how):
    """Query blocks of 100, GQA, two offsets; eps counts."""
    O, B, L, H, D, E = 2, 2, 170, 4, 48, 80  # noqa: E741
    q = draw(O, B, L, H, D, dtype=torch.bfloat16)
    h = draw(O, B, 2, 2, 1, D, E, dtype=torch.bfloat16)
    z = draw(O, B, 2, 2, D).abs()
    out = torch.full((B, L, H, E), torch.nan, dtype=torch.bfloat16)
    with emulated("sla", **how):
        cuda_linear.linear_into(out, q, h, z, None, 100, "softmax", 0.5)
    features = rope_kv.feature_map(q.double(), "softmax")
    own_h, own_z = (
        x.double().repeat_interleave(2, 2).repeat_interleave(100, 3)[:, :, :, :L]
        for x in (h.squeeze(4), z)
    )
    above = torch.einsum("oblhd,obhlde->blhe", features, own_h)
    below = torch.einsum("oblhd,obhld->blh", features, own_z)
    close(out, above / (below + 0.5).unsqueeze(-1), "bfloat16")


CHECKS = {
    "all": ("sum_summaries", check_all),
    "some": ("sum_summaries", check_some),
    "keys": ("summarise_keys", check_keys),
    "project": ("project_sums", check_projected),
    "linear": ("linear_rows", check_rows),
}


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("name", CHECKS)
def test_without_races(name, schedule, monkeypatch):
    monkeypatch.setattr(cuda_linear.native, "processors", lambda device: 1)
    entry, check = CHECKS[name]
    check({"flavour": "race", "schedule": schedule, "replace": {"sm80.cu": alone(entry)}})


MISTAKES = {  # check, file, text, what it becomes
    "sums before all warps have theirs": (
        "all", SUMS, "  sync_block();\n  if (warp > 0", "  if (warp > 0",
    ),
    "a slot past the last": ("all", SUMS, "slot < 0 || slot >= p.slots ||", "slot < 0 ||"),
    "blocks of another offset": ("all", SUMS, " || owner != offset", ""),
    "columns past the end": ("all", SUMS, "found >= 0 && column < width", "found >= 0"),
    "summaries of the first batch": ("all", SUMS, " + b * summaries * width + column", " + column"),
    "copies before they have been looked up": (
        "some", SUMS, "    sync_block();  // the next chunk has been looked up\n", "",
    ),
    "a chunk over one in use": ("some", SUMS, "kChunks = 3", "kChunks = 2"),
    "copies that have not landed": (
        "some", SUMS, "cp_async_wait<C::kSteps - 1>", "cp_async_wait<C::kSteps>",
    ),
    "selected blocks": ("some", SUMS, "p.covered >> code[i] & 1", "code[i] & 1"),
    "codes past the end": (
        "some", SUMS, "first_row + row < p.rows && column + i < n", "column + i < n",
    ),
    "absent blocks": ("some", SUMS, "held && found >= 0);", "held);"),
    "tiles over what is being read": (
        "keys", SUMS, "    sync_block();  // the tiles before have been read\n", "",
    ),
    "products before the tiles are whole": (
        "keys", SUMS, "    sync_block();  // the tiles are whole\n", "",
    ),
    "values that have not landed": ("keys", SUMS, "    cp_async_wait<0>();\n", ""),
    "keys past the end": (
        "keys", SUMS,
        "held ? reciprocal_approx(features.sum) : 0.0f",
        "reciprocal_approx(features.sum)",
    ),
    "the sum of another row": ("keys", SUMS, "ones[i][2 * below];", "ones[i][0];"),
    "a tile of W in use": (
        "project", LINEAR_H, "        sync_block();  // the tile before has been read\n", "",
    ),
    "W before it is whole": (
        "project", LINEAR_H, "columns);\n        sync_block();  // the tile is whole\n",
        "columns);\n",
    ),
    "rows past the end": ("project", LINEAR_H, "row < rows ? inside : 0", "inside"),
    "terms of another matrix": (
        "project", LINEAR_H, "(row / p.D * p.terms + term)", "(row / p.D + term)",
    ),
    "channels of W past the end": ("project", LINEAR_H, "      if (k0 + k < p.K)\n", ""),
    "H before it is whole": (
        "linear", LINEAR_H,
        "cp_async_wait<0>();\n      sync_block();  // the tile is whole\n", "cp_async_wait<0>();\n",
    ),
    "H that has not landed": ("linear", LINEAR_H, "      cp_async_wait<0>();\n", ""),
    "H over one in use": ("linear", LINEAR_H, "      sync_block();  // and has been read\n", ""),
    "results before all lanes have theirs": ("linear", LINEAR_H, "  sync_warp();\n", ""),
    "units of the offset before": ("linear", LINEAR_H, "sums[j][e] *= ratio[e / 2];", ";"),
    "eps in other units": ("linear", LINEAR_H, "p.eps * scale[i]", "p.eps"),
    "H of another head": ("linear", LINEAR_H, "own.h / (p.H / p.H_sum)", "own.h % p.H_sum"),
    "queries of the next block": ("linear", LINEAR_H, "row < rows && chunk * kPer", "chunk * kPer"),
    "channels of H past the end": ("linear", LINEAR_H, "valid = d0 + d < D &&", "valid ="),
}  # fmt: skip


def planted(name):
    check, *mistake = MISTAKES[name]
    return alone(CHECKS[check][0], *mistake)


@pytest.fixture(scope="module")
def builds():
    yield from parameters.builds("sla", MISTAKES, planted)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_noticed(name, builds, monkeypatch):
    monkeypatch.setattr(cuda_linear.native, "processors", lambda device: 1)
    builds(name)
    how = {"flavour": "race", "replace": {"sm80.cu": planted(name)}}
    with pytest.raises((AssertionError, emulate.EmulationError)):
        CHECKS[MISTAKES[name][0]][1](how)


def test_under_sanitizers():
    problem = parameters.sanitized(
        "sla",
        f"""
def run(entry, edits, **given):
    parameters.run("sla", entry, given, flavour="sanitize", replace={{"sm80.cu": edits}})
rng = np.random.default_rng(0)
h, z = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 16, 32), (2, 3, 16)))
sum_h, sum_z = np.full((1, 3, 2, 16, 32), 7, np.float32), np.full((1, 3, 2, 16), 7, np.float32)
shared = dict(
    h=h, z=z, table=np.array([1, -1, 0]), offset_index=None, sum_h=sum_h, sum_z=sum_z, B=1, slots=2,
    per_slot=1, H=3, D=16, E=32, T=3, O=1, covered=4, terms=0)
code = np.ones((3, 2, 3), np.int8)
code[:, 1] = 2
run("sum_summaries", {alone("sum_summaries")!r}, **shared, code=code, rows=2)
assert np.abs(sum_h[0, :, 1] - h.sum(0)).max() < 1e-5 and not sum_h[0, :, 0].any()
run("sum_summaries", {alone("sum_summaries")!r}, **shared, code=None, rows=1)
assert np.abs(sum_z.reshape(-1)[:48].reshape(3, 16) - z.sum(0)).max() < 1e-5
q = rng.standard_normal((1, 70, 3, 16)).astype(np.float32).view(np.uint32) >> 16 << 16
terms = h[0].view(np.uint32) >> 16
out = np.zeros((1, 70, 3, 32), np.uint16)
run("linear_rows", {alone("linear_rows")!r},
    q=(q >> 16).astype(np.uint16), h=terms.astype(np.uint16), z=np.abs(z[0]).copy(), bias=None,
    table=None, T=0,
    out=out, O=1, B=1, L=70, H=3, H_sum=3, rows=1, D=16, E=32, block_q=70, stride_qo=0,
    stride_qb=0, stride_ql=48, stride_qh=16, eps=1.0, phi=0, dtype=1, bias_dtype=0)
x = q.view(np.float32)
phi = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
want = np.einsum("blhd,hde->blhe", phi, (terms << 16).astype(np.uint32).view(np.float32))
want /= np.einsum("blhd,hd->blh", phi, np.abs(z[0]))[..., None] + 1
assert np.abs((out.astype(np.uint32) << 16).view(np.float32) - want).max() < 0.02
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


@pytest.mark.parametrize("name", CHECKS)
def test_no_bank_conflicts(name, monkeypatch):
    """Loads by ldmatrix and of what lanes copied themselves; of 128 channels and columns."""
    entry, _ = CHECKS[name]
    how = {"flavour": "race", "count_banks": True, "replace": {"sm80.cu": alone(entry)}}
    if name in ("all", "some"):
        codes = None if name == "all" else integers(1, 4, 1, 1, 16, 16)
        h, z = draw(1, 1, 16, 1, 16, 16), draw(1, 1, 16, 1, 16)
        over = "all" if name == "all" else "unselected"
        with emulated("sla", **how):
            cuda_linear.reach(over, Choice(None, codes, None), h, z, None, 1, torch.float32)
    elif name == "keys":
        check_summaries(1, 64, 1, 128, 128, torch.bfloat16, 64, **how)
    elif name == "project":
        with emulated("sla", **how):
            cuda_linear.project(draw(1, 1, 1, 1, 128, 128), draw(128, 128).bfloat16(), 1)
    else:
        h, z = draw(1, 1, 1, 1, 1, 128, 128).bfloat16(), draw(1, 1, 1, 1, 128)
        out, q = (
            torch.zeros(s, dtype=torch.bfloat16) for s in ((1, 64, 1, 128), (1, 1, 64, 1, 128))
        )
        with emulated("sla", **how):
            cuda_linear.linear_into(out, q, h, z, None, 128, "softmax", 1e-5)
    edits = (("sm80.cu", tuple(alone(entry))),)
    rows = parameters.library("sla", "sm80", "race", edits).banks()
    lost = {r["place"]: r["wavefronts"] - r["ideal"] for r in rows if r["wavefronts"] > r["ideal"]}
    assert rows
    assert not [place for place in lost if "ldmatrix" in place], lost
    if name != "project":  # which stores W^T four banks at a time, once per block of threads
        assert not lost


# --- The device build ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["120a"])
def build(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    source = folder / "sm80.cu"
    source.write_text('#include "sla/linear.h"\n')
    return device_build(source, request.param, folder)


@needs_nvcc
def test_device_build(build):
    """No spills; 16-byte accesses, asynchronous copies, products of bfloat16 from ldmatrix."""
    assert build.spills
    assert all(spill == ("0", "0") for spill in build.spills), build.report
    code = {body.split("\n", 1)[0]: body for body in build.kernels()}
    wanted = {
        "sum_all": ("LDG.E.NA.128", "STG.E.128"),
        "sum_some": ("LDGSTS.E.BYPASS", "LDSM.16.M88.4", "HMMA.16816.F32.BF16", "STG.E.128"),
        "summarise": ("LDSM.16.MT88.4", "HMMA.16816.F32"),
        "project": ("LDSM.16.MT88.4", "HMMA.16816.F32.BF16"),
        "linear": ("LDGSTS.E.BYPASS", "LDSM.16.MT88.4", "HMMA.16816.F32.BF16", "STG.E.128"),
    }
    for kernel, instructions in wanted.items():
        bodies = [body for name, body in code.items() if f"{kernel}_kernel" in name]
        assert bodies, kernel
        for body in bodies:
            assert all(instruction in body for instruction in instructions), kernel
