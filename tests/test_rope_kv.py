# SPDX-License-Identifier: Apache-2.0
"""rope_kv: the rotary table of Wan, repositioning, and the cache that is written once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reeltime import attention, checks, rope_kv

D64 = torch.float64


def draw(*shape, dtype=D64):
    return torch.randn(shape, dtype=dtype)


def table_loop(positions, grid, D, theta=10000.0):
    """Angles one by one, with Python floats."""
    s = 2 * (D // 6)
    t = D - 2 * s
    rows = []
    for frame in positions:
        for y in range(grid[0]):
            for x in range(grid[1]):
                angles = [frame * theta ** (-2 * i / t) for i in range(t // 2)]
                angles += [y * theta ** (-2 * i / s) for i in range(s // 2)]
                angles += [x * theta ** (-2 * i / s) for i in range(s // 2)]
                rows.append([(math.cos(a), math.sin(a)) for a in angles])
    return torch.tensor(rows, dtype=D64)


# --- Table and rotation -------------------------------------------------------------------------


@pytest.mark.parametrize("D", [4, 8, 64, 128])
@pytest.mark.parametrize("start", [0, 1_000_000, 1_000_000.3])
def test_table_is_wans_at_any_position(D, start):
    positions = [start, start + 1, start + 7]
    dtype = D64 if isinstance(start, float) else torch.int64
    got = rope_kv.rope_table(torch.tensor(positions, dtype=dtype), (2, 3), D)
    assert got.shape == (18, D // 2, 2)
    assert got.dtype == torch.float32
    assert (got - table_loop(positions, (2, 3), D)).abs().max() < 1e-7
    exact = rope_kv.rope_table(torch.tensor(positions, dtype=D64), (2, 3), D, dtype=D64)
    assert (exact - table_loop(positions, (2, 3), D)).abs().max() < 1e-9


def test_head_of_128_splits_into_44_42_42():
    table = rope_kv.rope_table(torch.tensor([5]), (2, 2), 128, dtype=D64)
    turned = (table[:, :, 1].abs() > 0).sum(1).tolist()
    assert turned == [22, 22 + 21, 22 + 21, 22 + 42]  # tokens (y, x) = 00, 01, 10, 11


def test_table_keeps_leading_dimensions():
    positions = torch.tensor([[3, 4], [-9, 10]])
    both = rope_kv.rope_table(positions, (1, 2), 8)
    assert both.shape == (2, 4, 4, 2)
    assert torch.equal(both[1], rope_kv.rope_table(positions[1], (1, 2), 8))


def test_rotation_is_of_adjacent_pairs():
    x, angle = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=D64).view(1, 1, 1, 4), torch.tensor(0.3)
    table = torch.tensor([[[math.cos(0.3), math.sin(0.3)]] * 2], dtype=D64)
    want = [math.cos(0.3), math.sin(0.3), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    got = rope_kv.apply_rope(x, table).flatten()
    assert torch.allclose(got, torch.tensor(want, dtype=D64)), angle


@given(st.integers(-(10**6), 10**6), st.integers(1, 3), st.sampled_from([2, 6, 10, 64]))
@settings(max_examples=30, deadline=None)
def test_rotation_composed_with_its_inverse_is_the_identity(position, batch, D):
    x = draw(batch, 6, 2, D)
    table = rope_kv.rope_table(torch.tensor([position]), (2, 3), D, dtype=D64)
    inverse = table * torch.tensor([1.0, -1.0])
    there = rope_kv.apply_rope(x, table)
    assert torch.allclose(rope_kv.apply_rope(there, inverse), x, atol=1e-12)
    assert torch.allclose(there.norm(dim=-1), x.norm(dim=-1))
    per_batch = table.expand(batch, *table.shape)
    assert torch.equal(rope_kv.apply_rope(x, per_batch), there)


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-(10**6), 10**6))
@settings(max_examples=30, deadline=None)
def test_scores_depend_on_position_differences_only(a, b, moved):
    q, k = draw(1, 4, 1, 16), draw(1, 4, 1, 16)

    def score(at_q, at_k):
        tables = rope_kv.rope_table(torch.tensor([[at_q], [at_k]]), (2, 2), 16, dtype=D64)
        rotated = rope_kv.apply_rope(q, tables[0]), rope_kv.apply_rope(k, tables[1])
        return torch.einsum("blhd,bmhd->lm", *rotated)

    assert torch.allclose(score(a, b), score(a + moved, b + moved), atol=1e-9)


# --- Query --------------------------------------------------------------------------------------


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("format", ["float64", "float32", "bfloat16"])
def test_query_is_norm_split_and_one_rotation_per_offset(format):
    dtype = getattr(torch, format)
    q, weight = draw(2, 12, 32).to(dtype), draw(32).to(dtype)
    table = rope_kv.rope_table(torch.tensor([[9, 10], [2, 3], [0, 1]]), (2, 3), 16, dtype=D64)
    got = rope_kv.query(q, table, num_heads=2, norm_weight=weight, sm_scale=0.25)
    assert got.shape == (3, 2, 12, 2, 16)
    assert got.dtype == dtype
    normed = rms(q.double(), weight.double()).unflatten(2, (2, 16)) * 0.25
    want = torch.stack([rope_kv.apply_rope(normed, t) for t in table])
    error = checks.accuracy(got, want)
    assert rope_kv.TOLERANCE[format].accepts(error), error


def test_norm_is_over_the_full_width_not_per_head():
    q = torch.cat([torch.full((1, 1, 8), 3.0), torch.zeros(1, 1, 8)], -1)
    got = rope_kv.query(q, None, num_heads=2, norm_weight=torch.ones(16))
    assert got.shape == (1, 1, 1, 2, 8)
    assert torch.allclose(got[0, 0, 0, 0], torch.full((8,), 2**0.5))


def test_query_does_not_alias_its_argument():
    q = torch.randn(1, 2, 8)
    got = rope_kv.query(q, None, num_heads=2)
    assert torch.equal(got.flatten(), q.flatten())
    assert got.data_ptr() != q.data_ptr()


def test_int8_query_has_a_scale_per_64_tokens_and_head():
    q = draw(1, 130, 32, dtype=torch.float32)
    rotated, low, scale = rope_kv.query(q, None, num_heads=2, quantize="int8")
    assert scale.shape == (1, 1, 3, 2)
    assert torch.equal(rotated, rope_kv.query(q, None, num_heads=2))
    for block in range(3):
        rows = slice(64 * block, 64 * block + 64)
        amax = rotated[0, 0, rows].abs().amax((0, 2))
        assert torch.equal(scale[0, 0, block], amax / 127)
        back = low[0, 0, rows].float() * scale[0, 0, block][:, None]
        assert torch.equal(low[0, 0, rows], (rotated[0, 0, rows] / (amax / 127)[:, None]).round())
        assert rope_kv.TOLERANCE["int8"].accepts(checks.accuracy(back, rotated[0, 0, rows]))


# --- The cache ----------------------------------------------------------------------------------


def filled(N, format="plain", frames=3, slots=5, B=2, H=2, D=8, **options):
    """A cache with frames written to slots 4, 3, ..., and the keys and values it should hold."""
    options = {"summaries": "block"} | options
    cache = rope_kv.make_cache(B, slots, N, H, D, format=format, **options)
    k, v, weight = draw(B, frames * N, H * D), draw(B, frames * N, H * D), draw(H * D)
    table = torch.stack([draw(frames * N, D // 2)] * 2, -1)
    table = torch.stack([table[..., 0].cos(), table[..., 0].sin()], -1)
    where = torch.arange(slots - 1, slots - 1 - frames, -1)
    rope_kv.write(k, v, cache, where, table=table, norm_weight=weight, num_heads=H)
    keys = rope_kv.apply_rope(rms(k, weight).unflatten(2, (H, D)), table)
    return cache, where, keys.unflatten(1, (frames, N)), v.view(B, frames, N, H, D)


@pytest.mark.parametrize("N", [1, 6, 64, 100])
def test_plain_write_goes_to_its_slots_and_nowhere_else(N):
    cache, where, keys, values = filled(N, dtype=D64)
    assert torch.allclose(cache.k[:, where], keys, atol=1e-12)
    assert torch.equal(cache.v[:, where], values)
    assert not cache.k[:, :2].any()
    assert not cache.v[:, :2].any()


@pytest.mark.parametrize("format", ["plain", "int8"])
@pytest.mark.parametrize("N", [1, 64, 100])
def test_summaries_and_pooled_keys_per_block(N, format):
    cache, where, keys, values = filled(N, format)
    for block, start in enumerate(range(0, N, 64)):
        rows = slice(start, min(start + 64, N))
        k, v = keys[:, :, rows], values[:, :, rows]
        pooled = cache.pooled[:, where, block].double()
        assert (pooled - k.mean(2)).abs().max() < (0.02 if format == "int8" else 1e-6)
        phi = k.softmax(-1)
        h = torch.einsum("bfnhd,bfnhe->bfhde", phi, v)
        assert torch.allclose(cache.h[:, where, block].double(), h, atol=1e-4)
        assert torch.allclose(cache.z[:, where, block].double(), phi.sum(2), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16], ids=["v fp8", "v fp16"])
@pytest.mark.parametrize("N", [1, 64, 100])
def test_int8_write_stores_keys_around_their_block_mean(N, dtype):
    cache, where, keys, values = filled(N, "int8", dtype=dtype)
    for block, start in enumerate(range(0, N, 64)):
        rows = slice(start, min(start + 64, N))
        mean = cache.k_mean[:, where, block].double()
        centred = keys[:, :, rows] - mean[:, :, None]
        amax = centred.abs().amax((2, 4))
        scale = cache.k_scale[:, where, block].double()
        assert torch.allclose(scale[amax > 1e-6], amax[amax > 1e-6] / 127, rtol=1e-5)
        stored = cache.k[:, where][:, :, rows].double() * scale[:, :, None, :, None]
        assert ((stored - centred).abs() <= 0.501 * scale[:, :, None, :, None]).all()
        v_scale = cache.v_scale[:, where, block].double()
        limit = 448 if dtype == torch.float8_e4m3fn else 1
        v_amax = values[:, :, rows].abs().amax(2)
        assert torch.allclose(v_scale, v_amax / limit, rtol=1e-5)
        back = cache.v.double()[:, where][:, :, rows] * v_scale[:, :, None]
        bound = 16 * v_scale if limit == 448 else v_scale * 2.0**-11
        assert ((back - values[:, :, rows]).abs() <= bound[:, :, None] * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float32, D64], ids=["float32", "float64"])
@pytest.mark.parametrize("N", [1, 64, 200])
def test_summaries_of_a_slot_are_the_sums_of_its_blocks(N, dtype):
    """Whose order is free: three additions, each of them rounded."""
    caches = []
    for kind in ("block", "slot"):
        torch.manual_seed(N)
        caches.append(filled(N, dtype=dtype, summaries=kind)[0])
    blocks, whole = caches
    assert whole.h.shape == (2, 5, 1, 2, 8, 8)
    assert whole.z.shape == (2, 5, 1, 2, 8)
    for got, parts in ((whole.h, blocks.h), (whole.z, blocks.z)):
        error = (got - parts.sum(2, keepdim=True)).abs()
        assert (error <= 3 * torch.finfo(dtype).eps * parts.abs().sum(2, keepdim=True)).all()
    for part in ("k", "v", "k_mean"):
        assert torch.equal(getattr(whole, part), getattr(blocks, part)), part


def test_append_leaves_other_slots_untouched():
    """A block mean survives what is appended: the reason for it."""
    cache, _, _, _ = filled(70, "int8")
    parts = (cache.k, cache.v, cache.k_scale, cache.k_mean, cache.v_scale, cache.h, cache.z)
    before = [part[:, 2:].clone() for part in parts]
    rope_kv.write(draw(2, 70, 16), draw(2, 70, 16), cache, torch.tensor([0]), num_heads=2)
    assert all(torch.equal(a.float(), b[:, 2:].float()) for a, b in zip(before, parts, strict=True))


def test_zero_keys_have_scale_one():
    cache = rope_kv.make_cache(1, 1, 64, 1, 8, format="int8")
    rope_kv.write(
        torch.zeros(1, 64, 8), torch.zeros(1, 64, 8), cache, torch.tensor([0]), num_heads=1
    )
    assert (cache.k_scale == 1).all()
    assert (cache.v_scale == 1).all()
    assert not cache.k.any()


@pytest.mark.parametrize("base", [0, 1_000_000])
def test_query_side_equals_rope_on_cache(base):
    """Rotating the query by the distance moved is rotating every key to its new slot."""
    grid, N, H, D, T = (2, 3), 6, 2, 24, 5
    raw, v = draw(1, T * N, H * D), draw(1, T * N, H * D)
    q = draw(1, N, H * D)
    slots = torch.arange(T)
    exact = lambda positions: rope_kv.rope_table(positions, grid, D, dtype=D64)  # noqa: E731
    stored = rope_kv.make_cache(1, T, N, H, D, dtype=D64)
    written_at = torch.arange(T) + base  # rotated once, where they were generated
    rope_kv.write(raw, v, stored, slots, table=exact(written_at), num_heads=H)
    # The window restarts at 0; slot 0 is the reference, whose distance to the query differs.
    new = torch.tensor([0, 1, 2, 3, 4])
    query_at = torch.tensor([[5 + base], [7 + base]])  # history, reference
    query = rope_kv.query(q, exact(query_at), num_heads=H)
    once = attention.segment_attention(query, stored, slots, torch.tensor([1, 0, 0, 0, 0]))

    keys = rope_kv.make_cache(1, T, N, H, D, dtype=D64)
    rope_kv.write(raw, v, keys, slots, num_heads=H)
    moved = new - torch.tensor([2, 0, 0, 0, 0])  # the reference is 2 further away
    rotated = rope_kv.rope_on_cache(keys.k, exact(moved))
    single = rope_kv.query(q, exact(torch.tensor([[5]])), num_heads=H)[0]
    published = attention.attention(single, rotated.flatten(1, 2), keys.v.flatten(1, 2))
    assert (once - published).abs().max() < (1e-12 if base == 0 else 1e-9)


def test_rope_on_cache_out():
    raw, table = torch.randn(1, 2, 3, 1, 4), rope_kv.rope_table(torch.arange(2), (1, 3), 4)
    out = torch.empty_like(raw)
    assert rope_kv.rope_on_cache(raw, table, out=out) is out
    assert torch.equal(out.flatten(1, 2), rope_kv.apply_rope(raw.flatten(1, 2), table))


def test_bytes_of_a_cache():
    plain = rope_kv.make_cache(1, 2, 128, 3, 16, dtype=torch.bfloat16)
    assert plain.nbytes() == 2 * 2 * 128 * 48 * 2
    low = rope_kv.make_cache(1, 2, 128, 3, 16, format="int8")
    written = rope_kv.bytes(1, 128, 3, 16, op="write", format="int8")
    assert low.nbytes() == 2 * (written - 2 * 128 * 48 * 2 - 128 * 16 * 4)
    for summaries in ("block", "slot"):
        full = rope_kv.make_cache(1, 2, 100, 3, 16, format="int8", summaries=summaries)
        kinds = {"format": "int8", "summaries": summaries, "slots": 2}
        written = rope_kv.bytes(1, 200, 3, 16, op="write", **kinds)
        assert full.nbytes() == written - 2 * 200 * 48 * 2 - 200 * 16 * 4
    assert rope_kv.bytes(1, 64, 3, 16, offsets=2) == 64 * 48 * 2 * 3 + 2 * 64 * 16 * 4
    assert rope_kv.bytes(1, 64, 3, 16, op="rope_on_cache") == 2 * 64 * 48 * 2 + 64 * 16 * 4
    assert rope_kv.flops(1, 64, 3, 16, offsets=2) == 64 * 48 * 10


def test_gradient_flows_through_query():
    q, w = draw(1, 4, 8).requires_grad_(), draw(8).requires_grad_()
    table = rope_kv.rope_table(torch.tensor([[1], [2]]), (2, 2), 4, dtype=D64)
    call = lambda q, w: rope_kv.query(q, table, num_heads=2, norm_weight=w)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, w))


x, t = torch.randn(1, 4, 16), rope_kv.rope_table(torch.arange(1), (2, 2), 8)
c, zero = rope_kv.make_cache(1, 3, 4, 2, 8), torch.tensor([0])
pos = torch.arange(2)


def write(k=x, v=x, slots=zero, **options):
    rope_kv.write(k, v, c, slots, **({"num_heads": 2} | options))


ERRORS = {
    "frame_positions: expected dtype": lambda: rope_kv.rope_table(pos.half(), (1, 1), 8),
    "grid: expected at least 1": lambda: rope_kv.rope_table(pos, (0, 1), 8),
    "head_dim: expected an even number": lambda: rope_kv.rope_table(pos, (1, 1), 7),
    "theta: expected a finite": lambda: rope_kv.rope_table(pos, (1, 1), 8, theta=math.inf),
    "dtype: expected torch.float32": lambda: rope_kv.rope_table(pos, (1, 1), 8, dtype=torch.half),
    "x: expected 4 dimensions": lambda: rope_kv.apply_rope(x, t),
    "table: expected shape .L, D / 2": lambda: rope_kv.apply_rope(x.view(1, 2, 4, 8), t),
    "q: expected 3 dimensions": lambda: rope_kv.query(x[0], None, num_heads=2),
    "num_heads: expected a divisor of C of q = 16, got 3": lambda: rope_kv.query(
        x, None, num_heads=3
    ),
    "norm_weight: expected shape": lambda: rope_kv.query(
        x, None, num_heads=2, norm_weight=torch.ones(8)
    ),
    "table: expected 4 dimensions": lambda: rope_kv.query(x, t, num_heads=2),
    "table: expected shape .O, L": lambda: rope_kv.query(x, t[None, :3], num_heads=2),
    "sm_scale: expected a finite": lambda: rope_kv.query(x, None, num_heads=2, sm_scale=math.nan),
    "quantize: expected None or 'int8'": lambda: rope_kv.query(
        x, None, num_heads=2, quantize="fp4"
    ),
    "slots: expected 1 dim": lambda: write(slots=torch.tensor(0)),
    "slots: expected dtype": lambda: write(slots=zero.int()),
    r"slots: expected values in \[0, 3\), got \[3\]": lambda: write(slots=zero + 3),
    "num_heads: expected 2": lambda: write(num_heads=4),
    "k: expected shape": lambda: write(k=x[:, :3]),
    "v: expected shape": lambda: write(v=x[:, :3]),
    "v: expected dtype": lambda: write(v=x.int()),
    "v: expected the device": lambda: write(v=x.to("meta")),
    "v: expected a contiguous": lambda: write(v=x.mT.contiguous().mT),
    "v: expected a tensor": lambda: write(v=None),
    "slots: expected the device": lambda: write(slots=zero.to("meta")),
    "eps: expected a finite": lambda: write(eps=math.nan),
    "table: expected the device": lambda: write(table=t.to("meta")),
    "table: expected shape .F . N": lambda: write(table=t[:3]),
    "table: expected dtype": lambda: write(table=t.half()),
    "k_raw: expected 5": lambda: rope_kv.rope_on_cache(x, t),
    "table: expected shape .T . N": lambda: rope_kv.rope_on_cache(c.k, t),
    "out: expected shape": lambda: rope_kv.rope_on_cache(c.k[:, :1], t, out=c.k),
    "format: expected 'plain'": lambda: rope_kv.make_cache(1, 1, 1, 1, 8, format="int4"),
    "dtype .plain.: expected": lambda: rope_kv.make_cache(1, 1, 1, 1, 8, dtype=torch.int8),
    "dtype .int8: of values.: expected": lambda: rope_kv.make_cache(
        1, 1, 1, 1, 8, format="int8", dtype=torch.bfloat16
    ),
    "tokens: expected at least 1, got 0": lambda: rope_kv.make_cache(1, 1, 0, 1, 8),
    "phi: expected 'softmax'": lambda: rope_kv.make_cache(1, 1, 1, 1, 8, phi="exp"),
    "summaries: expected None or 'block' or 'slot', got True": lambda: rope_kv.make_cache(
        1, 1, 1, 1, 8, summaries=True
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_error_names_the_argument(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ERRORS[message]()
