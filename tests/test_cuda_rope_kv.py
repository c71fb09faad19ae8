# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of rope_kv: their own source on the emulator, against the oracle in float64; their 8
bits against their own 32."""

from __future__ import annotations

import re
import shutil

import emulate
import parameters
import pytest
import torch
from device_build import device_builds, needs_nvcc
from emulated import emulated

from reeltime import checks, native, rope_kv
from reeltime.arch import UnsupportedArchError
from reeltime.rope_kv import reference

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("k", "v", "k_scale", "k_mean", "v_scale", "h", "z")


def draw(*shape, dtype=torch.float32, seed=7):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(dtype)


def turns(*shape):
    """A table of arbitrary angles [..., D / 2, 2]."""
    angle = draw(*shape)
    return torch.stack([angle.cos(), angle.sin()], -1)


def on(device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def exact(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def close(got, want, name):
    error = checks.accuracy(got.cpu(), want)
    assert rope_kv.TOLERANCE[name].accepts(error), error


def spelled(dtype):
    return str(dtype).removeprefix("torch.")


# --- Query --------------------------------------------------------------------------------------


def check_query(q, H, table=None, weight=None, sm_scale=0.3, **how):
    """Rotated queries against float64; codes and scales are those of what was stored."""
    options = {"num_heads": H, "norm_weight": weight, "sm_scale": sm_scale}
    want = rope_kv.query(
        q.double(), exact(table), **{name: exact(value) for name, value in options.items()}
    )
    with emulated("rope_kv", gpu=not how, **how) as runner:
        options["norm_weight"] = on(runner.device, weight)
        args = on(runner.device, q), on(runner.device, table)
        got = rope_kv.query(*args, **options, backend="cuda")
        both = rope_kv.query(*args, **options, quantize="int8", backend="cuda")
    assert got.is_contiguous()
    assert got.dtype == q.dtype
    for rotated in (got, both[0]):
        close(rotated, want, spelled(q.dtype))
    rotated, low, scale = (part.cpu() for part in both)
    encoded = reference.encode(rotated.float(), torch.int8)
    assert torch.equal(low, encoded[0])
    torch.testing.assert_close(scale, encoded[1], rtol=0, atol=0, equal_nan=True)


SHAPES = {  # heads, head_dim, tokens
    "D=2, one token": (1, 2, 1),
    "D=6": (3, 6, 67),
    "D=8": (2, 8, 5),
    "D=64": (3, 64, 66),
    "D=96": (2, 96, 3),
    "D=128": (2, 128, 65),
    "D=136": (1, 136, 2),
    "D=256": (2, 256, 65),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_query(shape, dtype):
    H, D, L = SHAPES[shape]
    weight = draw(H * D, dtype=dtype if H > 2 else torch.float32)
    check_query(draw(2, L, H * D, dtype=dtype), H, turns(2, L, D // 2), weight)


@pytest.mark.parametrize("options", ["norm", "table", "neither"])
def test_query_options(options):
    table = turns(3, 9, 12) if "table" in options else None
    weight = draw(48, dtype=torch.float16) if "norm" in options else None
    check_query(draw(2, 9, 48, dtype=torch.bfloat16), 2, table, weight)
    if table is None:  # then nothing asks for pairs
        check_query(draw(1, 66, 15), 5, None, weight if weight is None else weight[:15])


@pytest.mark.parametrize(
    "heads, head_dim", [(24, 128), (40, 128), (34, 96), (50, 128), (100, 62)], ids=str
)
def test_row_of_several_warps(heads, head_dim):
    """Two and four warps; 6400 and 6200 channels are more than registers hold."""
    C = heads * head_dim
    q, weight = draw(2, 3, C, dtype=torch.bfloat16), draw(C)
    check_query(q, heads, turns(1, 3, head_dim // 2), weight)


def test_block_of_several_heads(monkeypatch):
    """Few SMs: a block owns many heads, and what it keeps of one is not read with the next."""
    monkeypatch.setattr(native, "processors", lambda device: 1)
    check_query(draw(1, 130, 240, dtype=torch.bfloat16), 5, turns(2, 130, 24), draw(240))


def outliers(*shape):
    x = draw(*shape)
    x[..., 3::16] = 20 + 3 * x[..., 3::16]
    return x


QUERIES = {
    "outlier channels": lambda: outliers(1, 70, 32),
    "constant": lambda: torch.full((1, 3, 32), 1.625),
    "zeros": lambda: torch.zeros(1, 66, 32),
    "one zero block": lambda: torch.cat([torch.zeros(1, 64, 32), draw(1, 2, 32)], 1),
    "batch and tokens exchanged": lambda: draw(5, 2, 32).transpose(0, 1),
    "rows of 80, every second": lambda: draw(2, 10, 80, dtype=torch.bfloat16)[:, ::2, :32],
    "rows of 70": lambda: draw(2, 5, 70, dtype=torch.bfloat16)[..., :32],
    "an odd address": lambda: draw(2, 5, 40, dtype=torch.bfloat16)[..., 3:35],
    "no tokens": lambda: draw(2, 0, 32),
    "no batch": lambda: draw(0, 3, 32),
}


@pytest.mark.parametrize("name", QUERIES)
def test_adversarial_queries(name):
    q = QUERIES[name]()
    check_query(q, 2, turns(3, q.shape[1], 8), draw(32))


def test_tiny_queries_are_encoded_as_the_reference_does():
    for size in (1e-30, 1e-38, 3e-42):
        check_query(draw(1, 66, 32) * size, 2, sm_scale=1.0)


@pytest.mark.parametrize("table", ["float64", "pairs apart", "one for all offsets", "strided"])
def test_tables(table):
    turn = turns(2, 5, 8)
    given = {
        "float64": turn.double(),
        "pairs apart": turn.transpose(2, 3).contiguous().transpose(2, 3),
        "one for all offsets": turn[:1].expand(2, -1, -1, -1),
        "strided": torch.cat([turn, turn], 1)[:, ::2].transpose(0, 1).contiguous().transpose(0, 1),
    }[table]
    check_query(draw(1, 5, 32), 2, given, draw(64)[::2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_token_and_block(bad):
    q, table = draw(1, 70, 32), turns(1, 70, 8)
    q[0, 66, 3] = bad
    want = rope_kv.query(q, table, num_heads=2, quantize="int8")
    with emulated("rope_kv", gpu=True) as runner:
        args = on(runner.device, q), on(runner.device, table)
        got = rope_kv.query(*args, num_heads=2, quantize="int8", backend="cuda")
    assert torch.equal(got[0].cpu().isfinite(), want[0].isfinite())
    assert torch.equal(got[1].cpu(), want[1])
    assert torch.equal(got[2].cpu().isnan(), want[2].isnan())


# --- Rope on cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["dense", "slots of a ring", "heads first", "channels apart"])
def test_rope_on_cache(layout, dtype):
    B, T, N, H, D = 2, 2, 3, 2, 24
    raw = {
        "dense": lambda: draw(B, T, N, H, D, dtype=dtype),
        "slots of a ring": lambda: draw(B, 5, N, H, D, dtype=dtype)[:, 1:5:2],
        "heads first": lambda: draw(H, B, T, N, D, dtype=dtype).movedim(0, 3),
        "channels apart": lambda: draw(B, T, N, H, D, 2, dtype=dtype)[..., 1],
    }[layout]()
    table = turns(T * N, D // 2)
    with emulated("rope_kv", gpu=True) as runner:
        args = on(runner.device, raw), on(runner.device, table)
        got = rope_kv.rope_on_cache(*args, backend="cuda")
    assert got.is_contiguous()
    close(got, rope_kv.rope_on_cache(raw.double(), table.double()), spelled(dtype))


# --- Write --------------------------------------------------------------------------------------


def of(part, slots):
    """Its slots, in the order they were written; bytes are bytes."""
    if part.itemsize == 1:
        return part.view(torch.uint8)[:, slots].view(part.dtype)
    return part[:, slots]


def guarded(part):
    """As large, full of 2, and a slot away from other memory: a planted mistake may write there."""
    rim = -(-part.stride(1) // 64) * 64
    room = torch.empty(part.numel() + 2 * rim, dtype=part.dtype, device=part.device)
    room.copy_(torch.tensor(2.0))
    return room[rim : rim + part.numel()].view(part.shape)


def written(k, v, slots, N, H, options, *, backend="cuda", phi="softmax", how=None, **given):
    """A cache of 5 slots after one write, on the CPU; what was there before is 2."""
    format, dtype, summaries = options
    D = k.shape[2] // H
    kinds = {"format": format, "dtype": dtype, "summaries": summaries, "phi": phi}
    with emulated("rope_kv", gpu=not how, **(how or {})) as runner:
        cache = rope_kv.make_cache(k.shape[0], 5, N, H, D, **kinds, device=runner.device)
        for part in PARTS:
            if getattr(cache, part) is not None:
                setattr(cache, part, guarded(getattr(cache, part)))
        args = [on(runner.device, x) for x in (k, v, slots)]
        given = {name: on(runner.device, x) for name, x in given.items()}
        rope_kv.write(*args[:2], cache, args[2], num_heads=H, backend=backend, **given)
    for part in PARTS:
        setattr(cache, part, on("cpu", getattr(cache, part)))
    return cache


PLAIN = ("plain", torch.float32, None)
CACHES = {
    "plain fp32": ("plain", torch.float32, "block"),
    "plain bf16": ("plain", torch.bfloat16, "block"),
    "plain, no summaries": PLAIN,
    "int8, v fp8": ("int8", None, "block"),
    "int8, v fp16": ("int8", torch.float16, "block"),
    "int8, no summaries": ("int8", None, None),
    "int8, summaries of slots": ("int8", None, "slot"),
}


def check_write(k, v, N, H, options, phi="softmax", slots=(3, 1), how=None, **given):
    """Every part of a cache against its definition; the other slots are as they were."""
    slots = torch.tensor(slots)
    D = k.shape[2] // H
    cache = written(k, v, slots, N, H, options, phi=phi, how=how, **given)
    weight, table = (exact(given.get(name)) for name in ("norm_weight", "table"))
    keys = reference.heads_of(k.double(), weight, H, 1e-6)
    if table is not None:
        keys = reference.rotate(keys, table)
    keys, values = (x.unflatten(1, (-1, N)) for x in (keys, v.double().unflatten(2, (H, D))))
    own = {p: None if (t := getattr(cache, p)) is None else of(t, slots) for p in PARTS}
    if cache.format == "int8":
        mine = of(written(k, v, slots, N, H, PLAIN, how=how, **given).k, slots)
        mean = reference.per_token(own["k_mean"].float(), N, -3)
        k_int8, k_scale = reference.encode(mine - mean, torch.int8)
        assert torch.equal(own["k"], k_int8)
        assert torch.equal(own["k_scale"], k_scale)
        low, v_scale = reference.encode_values(values.float(), cache.v.dtype)
        assert torch.equal(own["v"].float(), low.float())
        assert torch.equal(own["v_scale"], v_scale)
    else:
        close(own["k"], keys, spelled(cache.k.dtype))
        assert torch.equal(own["v"].double(), values.to(cache.v.dtype).double())
    if cache.k_mean is not None:
        close(own["k_mean"], reference.block_mean(keys), spelled(cache.k_mean.dtype))
    if cache.h is not None:
        h, z = reference.summaries(keys, values, phi)
        if cache.h.shape[2] == 1:
            h, z = h.sum(2, keepdim=True), z.sum(2, keepdim=True)
        close(own["h"], h, "float32 sums")
        close(own["z"], z, "float32 sums")
    others = torch.tensor([slot for slot in range(5) if slot not in slots])
    for part in PARTS:
        if getattr(cache, part) is not None:
            assert (of(getattr(cache, part), others).float() == 2).all(), part


def sample(B, F, N, H, D, *dtypes):
    """k and v, and what else a write takes."""
    k, v = (
        draw(B, F * N, H * D, dtype=d, seed=s) for s, d in enumerate(dtypes or [torch.bfloat16] * 2)
    )
    v.view(B, F * N, H, D)[..., 0, 1] = 0.0
    return k, v, {"norm_weight": draw(H * D), "table": turns(F * N, D // 2)}


WRITES = {  # tokens of a slot, heads, head_dim
    "N=1": (1, 3, 8),
    "D=6": (3, 2, 6),
    "D=24": (5, 2, 24),
    "D=64": (70, 2, 64),
    "D=96": (65, 1, 96),
    "D=128": (66, 1, 128),
    "D=136": (5, 1, 136),
    "D=256": (64, 1, 256),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("shape", WRITES)
def test_write(shape, kind):
    N, H, D = WRITES[shape]
    k, v, given = sample(1, 2, N, H, D)
    check_write(k, v, N, H, CACHES[kind], **given)


@pytest.mark.parametrize("k_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES.values(), ids=DTYPES)
def test_write_from_every_dtype(k_dtype, v_dtype):
    k, v, given = sample(2, 1, 66, 1, 72, k_dtype, v_dtype)
    check_write(k, v, 66, 1, CACHES["int8, v fp8"], slots=(4,), **given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("phi", rope_kv.api.PHI)
def test_summaries_of_every_feature_map(phi, dtype):
    """Of raw keys, too: without norm and table."""
    k, v, _ = sample(1, 1, 70, 3, 16, dtype, dtype)
    check_write(k, v, 70, 3, CACHES["plain fp32"], phi=phi, slots=(0,))
    if phi == "elu":  # D=256 has four slices of h
        k, v, _ = sample(1, 1, 17, 1, 250, dtype, dtype)
        check_write(k, v, 17, 1, CACHES["plain fp32"], phi=phi, slots=(0,))


@pytest.mark.parametrize("N, H, D", [(580, 1, 8), (130, 1, 6), (65, 1, 136)])
def test_summaries_of_slots(N, H, D):
    """Of ten blocks; of a width that 16 bytes do not divide; of a head in slices."""
    k, v, given = sample(2, 2, N, H, D)
    check_write(k, v, N, H, ("plain", torch.float32, "slot"), slots=(4, 0), **given)


def test_summaries_of_a_slot_replace_what_it_held():
    k, v = draw(1, 140, 16, seed=1), draw(1, 140, 16, seed=2)
    slots, options = torch.tensor([3, 1]), {"num_heads": 2, "backend": "cuda"}
    with emulated("rope_kv", gpu=True) as runner:
        k, v, slots = (x.to(runner.device) for x in (k, v, slots))
        fresh, used = (
            rope_kv.make_cache(1, 5, 70, 2, 8, summaries="slot", device=runner.device)
            for _ in range(2)
        )
        rope_kv.write(1e6 * v, k, used, slots.flip(0), **options)
        for cache in (fresh, used):
            rope_kv.write(k, v, cache, slots, **options)
    assert torch.equal(used.h, fresh.h)
    assert torch.equal(used.z, fresh.z)


def test_block_of_several_written_heads(monkeypatch):
    """As test_block_of_several_heads; batches, frames and blocks besides."""
    monkeypatch.setattr(native, "processors", lambda device: 1)
    k, v, given = sample(2, 2, 70, 5, 40)
    for kind in ("int8, v fp8", "plain bf16", "int8, no summaries"):
        check_write(k, v, 70, 5, CACHES[kind], slots=(4, 0), **given)


KEYS = {
    "outlier channels": lambda: outliers(1, 70, 32),
    "constant": lambda: torch.full((1, 70, 32), 1.625),
    "zeros": lambda: torch.zeros(1, 70, 32),
    "tiny": lambda: draw(1, 70, 32) * torch.tensor([1e-30, 1e-38, 3e-42, 1.0]).repeat(8),
    "strided": lambda: draw(70, 1, 80).transpose(0, 1)[..., :32],
    "an odd address": lambda: draw(1, 70, 40, dtype=torch.bfloat16)[..., 5:37],
}


@pytest.mark.parametrize("name", KEYS)
def test_adversarial_keys(name):
    k = KEYS[name]()
    check_write(k, k, 70, 2, CACHES["int8, v fp8"], slots=(2,))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["plain fp32", "int8, v fp8", "int8, v fp16"])
def test_nan_and_inf_stay_in_their_written_block(kind, bad):
    k, v = draw(1, 70, 32, seed=1), draw(1, 70, 32, seed=2)
    k[0, 3, 5], v[0, 67, 20] = bad, bad
    args = k, v, torch.tensor([2]), 70, 2, CACHES[kind]
    got, want = written(*args), written(*args, backend="reference")
    for part in PARTS:
        mine, oracle = getattr(got, part), getattr(want, part)
        if mine is not None:
            assert torch.equal(mine.float().isfinite(), oracle.float().isfinite()), part
    if "int8" in kind:
        assert torch.equal(got.k, want.k)
        assert torch.equal(got.v.float(), want.v.float())


def test_slots_out_of_range_and_apart():
    """A GPU cannot look at slots without waiting: it leaves such frames out."""
    k, slots = draw(1, 12, 16), torch.tensor([5, 9, 1, 9, -1, 9, 1 << 40, 9])[::2]
    options = CACHES["int8, v fp8"]
    cache = written(k, k, slots, 3, 2, options)
    alone = written(k[:, 3:6], k[:, 3:6], slots[1:2], 3, 2, options)
    for part in PARTS:
        assert torch.equal(getattr(cache, part).float(), getattr(alone, part).float()), part


def test_write_of_no_frames():
    nothing = torch.empty(0, dtype=torch.int64)
    cache = written(draw(1, 0, 16), draw(1, 0, 16), nothing, 3, 2, CACHES["plain fp32"])
    assert (cache.k == 2).all()


# --- Refusals -----------------------------------------------------------------------------------


def test_refusals_say_why():
    q, slots = draw(1, 4, 16), torch.tensor([0])
    double = rope_kv.make_cache(1, 1, 4, 2, 8, dtype=torch.float64)
    turned = rope_kv.make_cache(1, 1, 4, 2, 8)
    turned.k = turned.k.transpose(2, 3).contiguous().transpose(2, 3)
    wide = rope_kv.make_cache(1, 1, 4, 1, 258)
    x = draw(1, 4, 258)
    wanted = {"num_heads": 2, "backend": "cuda"}
    with emulated("rope_kv"):
        for message, call in {
            "float64 has": lambda: rope_kv.write(q, q, double, slots, **wanted),
            "the strides that make_cache": lambda: rope_kv.write(q, q, turned, slots, **wanted),
            "head_dim <= 256, got 258": lambda: rope_kv.write(
                x, x, wide, slots, num_heads=1, backend="cuda"
            ),
            "hold head_dim <= 256": lambda: rope_kv.query(
                x, None, num_heads=1, quantize="int8", backend="cuda"
            ),
            "float32; float64 has": lambda: rope_kv.query(q.double(), None, **wanted),
        }.items():
            with pytest.raises(UnsupportedArchError, match=message):
                call()
        rope_kv.query(x, None, num_heads=1, backend="cuda")  # a row may be as wide as it likes


def test_launcher_refuses_what_python_would_not_send():
    q, parts = torch.zeros(1, 2, 16), dict.fromkeys(("weight", "table", "inverse"))
    fields = dict(
        q=q, **parts, out=q.clone(), code=q.to(torch.int8), scale=torch.zeros(1),
        B=1, L=2, H=1, D=16, O=1, stride_qb=32, stride_ql=16, stride_to=0, stride_tl=0,
        eps=1.0, sm_scale=1.0, dtype=0, weight_dtype=0, processors=1,
    )  # fmt: skip
    for change in ({"D": 258}, {"stride_ql": 1 << 27}):
        with pytest.raises(emulate.EmulationError, match="the launcher refused"):
            parameters.run("rope_kv", "query_int8", fields | change)


# --- Races, sanitizers, mistakes ----------------------------------------------------------------

SOURCE = emulate.CSRC / "rope_kv"
ENTRIES = {  # and where it launches
    "rotate_rows": "launch(rotate_rows_kernel<decltype(type)>, how, stream, p, warps)",
    "query_int8": "launch(query_int8_kernel<kLanes, T>, how, stream, p, group)",
    "write_cache": "launch(write_cache_kernel<kLanes, T>, how, stream, p, group)",
}


def alone(entry, types="bfloat16"):
    """Edits that leave one entry point, for one type and D <= 64: most of the compile time."""
    text = (SOURCE / "sm80.cu").read_text()
    chosen = re.search(
        r"  if \(!wide\) return launch_of\(Any{}\);.*?launch_of\(float{}\);", text, re.S
    )
    inverse = re.search(r"return wide \? (launch\(inverse.*?p\)).*?p\);", text, re.S)
    kinds = {
        "bfloat16": "return launch_of(bfloat16{});",
        "float": "return wide ? launch_of(float{}) : launch_of(Any{});",
    }
    edits = [(chosen[0], kinds[types])]
    if types == "bfloat16":
        edits.append((inverse[0], f"return {inverse[1]};"))
        for name in ("query", "write"):
            tall = f"p.D <= 64 ? launch_{name}<8, T>(p, stream) : launch_{name}<16, T>(p, stream)"
            edits.append((tall, f"launch_{name}<8, T>(p, stream)"))
    others = [call for name, call in ENTRIES.items() if name != entry.split(",")[0]]
    return [*edits, *((call, "cudaErrorInvalidValue") for call in others)]


def check_rows(how):
    """Rows of two warps, two to a block; heads that no warp holds whole; batches."""
    bfloat = torch.bfloat16
    for B, L, H, D in ((2, 3, 20, 96), (1, 5, 3, 40)):
        q, table, weight = draw(B, L, H * D, dtype=bfloat), turns(2, L, D // 2), draw(H * D)
        want = rope_kv.query(q.double(), table.double(), num_heads=H, norm_weight=weight.double())
        with emulated("rope_kv", **how):
            got = rope_kv.query(q, table, num_heads=H, norm_weight=weight, backend="cuda")
        close(got, want, "bfloat16")


def check_encoded(how):
    """Five heads of one block of threads, a ragged block, batches."""
    q, table, weight = draw(2, 70, 200, dtype=torch.bfloat16), turns(2, 70, 20), draw(200)
    q *= torch.exp2(torch.arange(70) % 7).view(70, 1)
    want = rope_kv.query(
        q.double(), table.double(), num_heads=5, norm_weight=weight.double(), sm_scale=0.5
    )
    with emulated("rope_kv", **how):
        rotated, low, scale = rope_kv.query(
            q, table, num_heads=5, norm_weight=weight, sm_scale=0.5, quantize="int8", backend="cuda"
        )
    close(rotated, want, "bfloat16")
    encoded = reference.encode(rotated.float(), torch.int8)
    assert torch.equal(low, encoded[0])
    assert torch.equal(scale, encoded[1])


def check_written(how):
    """Three heads of one block of threads, ragged blocks, keys far from zero, a slot that the cache
    lacks."""
    k, v, given = sample(1, 2, 70, 3, 40)
    k += 4
    given["table"] = torch.tensor([1.0, 0.0]).expand(140, 20, 2).contiguous()
    v *= torch.exp2(torch.arange(140) % 7).view(140, 1)
    check_write(k, v, 70, 3, CACHES["int8, v fp8"], slots=(4, 0), how=how, **given)
    slots = torch.tensor([3, 5])
    written(k, v, slots, 70, 3, CACHES["int8, v fp8"], how=how, **given)


def check_slots(how):
    """Batches of frames of three blocks, and a slot that the cache lacks."""
    k, v, given = sample(2, 2, 130, 1, 40)
    kind = CACHES["int8, summaries of slots"]
    check_write(k, v, 130, 1, kind, slots=(4, 0), how=how, **given)
    written(k, v, torch.tensor([3, 5]), 130, 1, kind, how=how, **given)


CHECKS = {
    "rotate_rows": check_rows,
    "query_int8": check_encoded,
    "write_cache": check_written,
    "write_cache, slots": check_slots,
}


@pytest.mark.parametrize("schedule", emulate.SCHEDULES)
@pytest.mark.parametrize("entry", CHECKS)
def test_without_races(entry, schedule, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: 1)
    for seed in (1, 2) if schedule == "random" else (1,):
        how = {"flavour": "race", "schedule": schedule, "seed": seed}
        CHECKS[entry](how | {"replace": {"sm80.cu": alone(entry)}})


def test_general_kernels_without_races():
    k, v, given = sample(1, 1, 5, 1, 130)
    check_write(k, v, 5, 1, CACHES["int8, v fp8"], slots=(4,), how={"flavour": "race"}, **given)
    check_query(draw(1, 5, 130), 1, turns(1, 5, 65), draw(130), flavour="race")


def test_under_sanitizers():
    problem = parameters.sanitized(
        "rope_kv",
        f"""
edits = {{"sm80.cu": {alone("write_cache", "float")!r}}}
def run(**given):
    parameters.run("rope_kv", "write_cache", given, flavour="sanitize", replace=edits)
for D, stride in ((16, 32), (10, 21)):  # in 16-byte pieces, and in general
    x = np.random.default_rng(0).standard_normal((70, stride)).astype(np.float32)
    weight, table = np.ones(2 * D, np.float32), np.tile(np.float32([1, 0]), (70, D // 2))
    cache = lambda *shape: np.full(shape, 7, np.float32)
    k, v, k_scale, v_scale = cache(70, 2, D), cache(70, 2, D), cache(2, 2), cache(2, 2, D)
    mean, h, z = cache(2, 2, D), cache(2, 2, D, D), cache(2, 2, D)
    shared = dict(
        k=x, v=x, weight=weight, slots=np.zeros(1, np.int64), inverse=cache(70),
        cache_v=v, k_mean=mean, h=h, z=z, B=1, F=1, N=70, H=2, D=D, S=1, stride_kb=0,
        stride_kl=stride, stride_vb=0, stride_vl=stride, stride_tl=D, stride_s=1, eps=1e-6, phi=0,
        k_dtype=0, v_dtype=0, weight_dtype=0, cache_v_dtype=0, mean_dtype=0, processors=1)
    plain = dict(table=None, cache_k=k, k_scale=None, v_scale=None, cache_k_dtype=0)
    run(**shared, **plain, slot_h=None, slot_z=None)
    y = x[:, : 2 * D]
    y = (y / np.sqrt((y * y).mean(1, keepdims=True) + 1e-6)).reshape(70, 2, D)
    phi = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    assert np.abs(k - y).max() < 1e-5
    assert np.abs(h[0] - np.einsum("nhd,nhe->hde", phi[:64], v[:64])).max() < 1e-4
    assert np.abs(z[1] - phi[64:].sum(0)).max() < 1e-5
    sums = cache(2, D, D), cache(2, D)
    run(**shared, **plain, slot_h=sums[0], slot_z=sums[1])
    assert np.array_equal(sums[0], h[0] + h[1]) and np.array_equal(sums[1], z[0] + z[1])
    code, eight = np.zeros((70, 2, D), np.int8), np.zeros((70, 2, D), np.float16)
    run(**(shared | dict(cache_v=eight, cache_v_dtype=2)), table=table, cache_k=code,
        k_scale=k_scale, v_scale=v_scale, cache_k_dtype=3, slot_h=None, slot_z=None)
    assert np.abs(code[:64]).max() == 127
""",
    )
    if problem is None:
        pytest.skip("needs the compiler's sanitizers")
    assert problem == ""


ROWS, BLOCK, SLOTS, MAIN = "rows.h", "block.h", "slots.h", "sm80.cu"
MISTAKES = {  # entry point, file, text, what it becomes
    # rotate_rows_kernel
    "rows past the end are read": ("rotate_rows", ROWS, "min(own, rows - 1)", "own"),
    "sums are read before they are there": ("rotate_rows", ROWS, "      sync_block();\n", ""),
    "sums of another row": ("rotate_rows", ROWS, "warp / warps * warps + i", "i"),
    "cosines of another channel": (
        "rotate_rows", ROWS, "(i == 0 || kStride % p.D != 0)", "i == 0",
    ),
    "cosines of the first offset": ("rotate_rows", ROWS, "p.table + o * p.stride_to", "p.table"),
    "weights past the end are read": (
        "rotate_rows", ROWS,
        "(weight, from + i * kStride, inside - i * kStride)", "(weight, from + i * kStride, 8)",
    ),
    # inverse_kernel
    "a token past the end": ("query_int8", ROWS, "  if (row >= p.rows) return;\n", ""),
    "squares of one lane": ("query_int8", ROWS, "squares = warp_reduce(squares, Sum());", ""),
    "channels past the end": ("query_int8", ROWS, "p.C - first - i * kStride", "8"),
    "the mean over tokens": ("query_int8", ROWS, "static_cast<float>(p.C)", "float(p.L)"),
    "tokens of the first batch": ("query_int8", ROWS, "row / p.L * p.stride_xb + ", ""),
    # query_int8_kernel
    "two heads in one place": ("query_int8", MAIN, "shared.peak[head % 2]", "shared.peak[0]"),
    "the peak of a warp": (
        "query_int8", MAIN,
        "<C::kWarps>(peak, shared.peak[head % 2],", "<1>(peak, shared.peak[head % 2],",
    ),
    "tokens past the end are read": (
        "query_int8", MAIN, "count = min(kTokens, p.L - start)", "count = kTokens",
    ),
    "codes of what was not rounded": (
        "query_int8", MAIN, "x[j] = to_float(from_float<X>(x[j]));", "x[j] += 0.0f;",
    ),
    "scales transposed": (
        "query_int8", MAIN,
        "* blocks + block) * p.H + head] = scale", "* p.H + head) * blocks + block] = scale",
    ),
    "the norm of another token": (
        "query_int8", MAIN, "p.inverse[b * p.L + start + token]", "p.inverse[b * p.L + start]",
    ),
    # write_cache_kernel
    "statistics before all have left theirs": (
        "write_cache", MAIN, "sync_block();  // every warp has", "// every warp has",
    ),
    "statistics before they are finished": (
        "write_cache", MAIN, "sync_block();  // and every channel", "// and every channel",
    ),
    "products before the tiles are whole": (
        "write_cache", MAIN, "sync_block();  // the tiles are whole", "// the tiles are whole",
    ),
    "the next head over tiles in use": (
        "write_cache", MAIN, "sync_block();  // the next head's", "// the next head's",
    ),
    "tiles over statistics in use": (
        "write_cache", MAIN, "<C::kWarps>(peak, shared.peak,", "<1>(peak, shared.peak,",
    ),
    "a slot that the cache lacks": (
        "write_cache", MAIN, "if (slot < 0 || slot >= p.S) return;", "",
    ),
    "the mean of 64": ("write_cache", MAIN, "static_cast<float>(count)", "64.0f"),
    "the mean before rounding": (
        "write_cache", MAIN,
        "statistics.mean[slot] = to_float(mean)", "statistics.mean[slot] = sum / float(count)",
    ),
    "keys past the end count": (
        "write_cache", MAIN, "if (me.token(j / kChunk) < me.count) peak", "peak",
    ),
    "features past the end": (
        "write_cache", BLOCK, "me.token(i) < me.count ? x[e] : 0.0f", "x[e]",
    ),
    "half of the tokens": ("write_cache", BLOCK, "distance < 32;", "distance < 16;"),
    "columns exchanged": (
        "write_cache", BLOCK,
        "left[2 * below + 1], right[2 * below]", "right[2 * below], left[2 * below + 1]",
    ),
    "products of other terms left out": (
        "write_cache", BLOCK, "other = kTerms - 1 - term", "other = 0",
    ),
    # add_blocks_kernel
    "two blocks left in one place": (
        "write_cache, slots", MAIN, "p.slot_h ? int64_t{unit}", "p.slot_h ? int64_t{unit / 2 * 2}",
    ),
    "all but the first block": (
        "write_cache, slots", SLOTS,
        "n = 0; n < nb; n++) {\n      const Vector", "n = 1; n < nb; n++) {\n      const Vector",
    ),
    "added to what the slot held": (
        "write_cache, slots", SLOTS, "total{};", "total = load_streaming(sum + first);",
    ),
    "z past its end": (
        "write_cache, slots", SLOTS, "else if (own - h_end < z_width)", "else",
    ),
    "frames of all batches in one": (
        "write_cache, slots", SLOTS, "frame / p.F * p.S + slot", "slot",
    ),
    "slots past the last": ("write_cache, slots", SLOTS, "p.slots[frame % p.F", "p.slots[frame"),
    "the sum of a slot that the cache lacks": (
        "write_cache, slots", SLOTS, "if (slot < 0 || slot >= p.S) return;", "",
    ),
}  # fmt: skip


def planted(name):
    """Edits of sm80.cu; of a header, its text in the place of its inclusion."""
    entry, file, old, new = MISTAKES[name]
    edits = dict(alone(entry))
    if file == MAIN:
        for kept in list(edits):
            assert old not in kept
        return [(old, new), *edits.items()]
    text = (SOURCE / file).read_text()
    assert text.count(old) == 1, name
    text = text.replace(old, new).replace("#pragma once\n", "")
    return [(f'#include "rope_kv/{file}"\n', text), *edits.items()]


@pytest.fixture(scope="module")
def builds():
    yield from parameters.builds("rope_kv", MISTAKES, planted)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_noticed(name, builds, monkeypatch):
    monkeypatch.setattr(native, "processors", lambda device: 1)
    builds(name)
    how = {"flavour": "race", "replace": {"sm80.cu": planted(name)}}
    with pytest.raises((AssertionError, emulate.EmulationError)):
        CHECKS[MISTAKES[name][0]](how)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_bank_conflicts(head_dim):
    """Reading tiles, and writing those of the values, in the order that products want."""
    k, v, given = sample(1, 1, 64, 1, head_dim)
    how = {"flavour": "race", "count_banks": True}
    written(k, v, torch.tensor([0]), 64, 1, CACHES["int8, v fp8"], how=how, **given)
    rows = parameters.library("rope_kv", "sm80", "race", ()).banks()
    source = (SOURCE / BLOCK).read_text().splitlines()
    stores = [i for i, line in enumerate(source, 1) if "uint64_t*>(tiles.v" in line]
    mine = [r for r in rows if re.match(rf"ldmatrix|.*{BLOCK}:{stores[0]}$", r["place"])]
    assert {r["place"].split()[0] for r in mine} == {"ldmatrix", "load"}
    assert all(r["wavefronts"] == r["ideal"] > 0 for r in mine), mine


# --- The device build ---------------------------------------------------------------------------

TARGETS = ("80", "120a")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    return device_builds(SOURCE / MAIN, list(TARGETS), folder)


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_device_build(cubins, target):
    """No spills; 16-byte accesses, and where h is made products of bfloat16 from ldmatrix."""
    spills = cubins[target].spills
    assert spills == [("0", "0")] * (2 + 4 + 6 + 6 + 2)
    kernels = cubins[target].kernels()
    for kernel in kernels:
        name = kernel.split(":")[0]
        assert ("HMMA.16816.F32.BF16" in kernel) == ("write_cache" in name)
        assert ("LDSM.16.MT88.4" in kernel) == ("write_cache" in name)
        if "Any" not in name and "inverse" not in name and "add_blocks_kernelILb0" not in name:
            assert "LDG.E.NA.128" in kernel, name
            assert "STG.E.128" in kernel, name
