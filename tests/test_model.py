# SPDX-License-Identifier: Apache-2.0
"""The streaming transformer against a dense forward of the same weights, and its invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reeltime.model.codec import CodecConfig, ConvCodec
from reeltime.model.config import PRESETS, ModelConfig, SparseLinear, preset
from reeltime.model.kv_cache import DenseMemory, StreamMemory
from reeltime.model.layers import patchify, unpatchify
from reeltime.model.layout import LAYOUTS, Segment, StreamLayout, layout
from reeltime.model.sampler import add_noise, timesteps, to_x0
from reeltime.model.stream import Stream
from reeltime.model.transformer import CausalTransformer

TOLERANCE = 5e-5  # fp32, two implementations of the same sum in another order
CONFIG = ModelConfig(
    "tiny", 48, 2, 64, 3, 4, 4, text_dim=8, freq_dim=32, prediction="x0", chunk=2, window=7
)
GRID = (2, 3)


def randomised(config: ModelConfig, seed: int = 0) -> CausalTransformer:
    """Every parameter random: Wan's zero-initialised head would make these tests vacuous."""
    generator = torch.Generator().manual_seed(seed)
    net = CausalTransformer(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return net


@pytest.fixture(scope="module")
def net() -> CausalTransformer:
    return randomised(CONFIG)


def latents(frames: int, seed: int = 1, batch: int = 1, grid=GRID) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 4, 2 * grid[0], 2 * grid[1], generator=g)


def contexts(frames: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(1, frames, 3, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(net, memory, x, c, kind, t, since=0):
    """One pass; what is older than stream position `since` is hidden (a jump left it stale)."""
    plan = memory.make_plans(frames=x.shape[1])[kind]
    past = int(memory.position) - memory.history + torch.arange(memory.history)
    past = torch.cat([memory._remembered()[0], past])
    plan.block_table[memory.kept : memory.kept + len(past)][past < since] = -1
    memory.plan = plan
    times = torch.full(x.shape[:2], t)
    return net(x, times, net.embed_context(c), memory)


@torch.no_grad()
def stream_last_chunk(net, memory, clean, c, noisy, kind="final"):
    """Write `clean` frame by frame and chunk by chunk, then denoise `noisy` after it."""
    frames = clean.shape[1]
    starts = [0, *range(1, frames, CONFIG.chunk)]
    for a, b in zip(starts, [*starts[1:], frames], strict=True):
        run(net, memory, clean[:, a:b], c[:, a:b], "cache", 0.0)
        memory.position += b - a
    return run(net, memory, noisy, c[:, frames:], kind, 700.0)


def window_mask(frames: int, kept: int, history: int) -> torch.Tensor:
    """What each latent frame saw when it was written; the last chunk is the noisy one."""
    starts = [0, *range(1, frames, CONFIG.chunk)]
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for a, b in zip(starts, [*starts[1:], frames], strict=True):
        mask[a:b, a:b] = True
        mask[a:b, : min(kept, a)] = True
        mask[a:b, max(kept, a - history) : a] = True
    return mask


@pytest.mark.parametrize("name", ["self_forcing", "longlive"])
@pytest.mark.parametrize("chunks", [1, 3, 6])
def test_cached_stream_equals_dense_forward(net, name, chunks):
    memory = StreamMemory(CONFIG, layout(name, CONFIG), GRID)
    frames = 1 + CONFIG.chunk * chunks
    clean, noisy, c = latents(frames), latents(CONFIG.chunk, 5), contexts(frames + CONFIG.chunk)
    got = stream_last_chunk(net, memory, clean, c, noisy)
    whole = torch.cat([clean, noisy], dim=1)
    mask = window_mask(whole.shape[1], memory.kept, memory.history)
    dense = DenseMemory(torch.arange(whole.shape[1]), GRID, CONFIG, mask)
    times = torch.zeros(whole.shape[:2])
    times[:, frames:] = 700.0
    with torch.no_grad():
        want = net(whole, times, net.embed_context(c), dense)[:, frames:]
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def stream_after_jump(net, memory, jump):
    """Picture and first chunk, a jump of `jump` latent frames, three chunks, then a noisy one."""
    clean, c, since = latents(9), contexts(11), 0
    for a, b in ((0, 1), (1, 3), (3, 5), (5, 7), (7, 9)):
        if a == 3 and jump:
            memory.position += jump
            since = int(memory.position)
        run(net, memory, clean[:, a:b], c[:, a:b], "cache", 0.0, since)
        memory.position += b - a
    return run(net, memory, latents(2, 5), c[:, 9:], "final", 700.0, since)


@pytest.mark.parametrize("jump", [0, 1_000_000])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "liveact"])
def test_moving_the_query_equals_rotating_the_cache(net, name, jump):
    a, b = (
        stream_after_jump(
            net, StreamMemory(CONFIG, layout(name, CONFIG), GRID, rope_on_cache=published), jump
        )
        for published in (False, True)
    )
    assert a.std() > 0.3
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_repositioned_equals_absolute_without_a_reference(net):
    history = Segment("history", 5, evict="drop")
    plain = StreamLayout("plain", 2, (history,))
    moved = StreamLayout("moved", 2, (Segment("history", 5, offset="window", evict="drop"),))
    clean, c = latents(9), contexts(11)
    out = [
        stream_last_chunk(net, StreamMemory(CONFIG, each, GRID), clean, c, latents(2, 5))
        for each in (plain, moved)
    ]
    torch.testing.assert_close(out[0], out[1], atol=TOLERANCE, rtol=0)


def test_repositioned_stream_forgets_how_long_it_ran(net):
    """With a reference, the window looks the same after 20 and after 1,000,020 frames."""
    a, b = (
        stream_after_jump(net, StreamMemory(CONFIG, layout("vidu_s1", CONFIG), GRID), jump)
        for jump in (20, 1_000_020)
    )
    absolute = stream_after_jump(net, StreamMemory(CONFIG, layout("longlive", CONFIG), GRID), 20)
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
    assert (a - absolute).abs().max() > 0.01  # the reference does stand elsewhere


@pytest.mark.parametrize("shift", [1, 3])
def test_ring_order_does_not_matter(net, shift):
    """The same history found in other ring slots, at other positions, gives the same result."""
    out = []
    for start in (0, shift):
        memory = StreamMemory(CONFIG, layout("self_forcing", CONFIG), GRID)
        memory.position += start
        clean, c = latents(6), contexts(8)
        for a in range(0, 6, 2):
            run(net, memory, clean[:, a : a + 2], c[:, a : a + 2], "cache", 0.0, start)
            memory.position += 2
        out.append(run(net, memory, latents(2, 5), c[:, 6:], "final", 700.0, start))
    torch.testing.assert_close(out[0], out[1], atol=TOLERANCE, rtol=0)


def test_twin_cache_reads_noisy_history_until_the_last_step():
    memory = StreamMemory(CONFIG, layout("vidu_s1", CONFIG), GRID)
    memory.position += 20
    plans = memory.make_plans()
    history = slice(memory.kept, memory.kept + memory.history)
    noisy = range(memory.noisy_base, memory.noisy_base + memory.ring)
    clean = range(memory.clean_base, memory.clean_base + memory.ring)
    for kind, ring in (
        ("intermediate", noisy),
        ("noisy", noisy),
        ("final", clean),
        ("cache", clean),
    ):
        assert all(int(s) in ring for s in plans[kind].block_table[history]), kind
    assert all(int(s) in noisy for s in plans["noisy"].write_slots)
    assert all(int(s) in clean for s in plans["cache"].write_slots)
    assert all(int(s) >= memory.scratch for s in plans["final"].write_slots)
    for plan in plans.values():  # a pass reads what it writes, and never writes over its history
        assert plan.block_table[-CONFIG.chunk :].tolist() == plan.write_slots.tolist()
        assert not set(plan.block_table[: -CONFIG.chunk].tolist()) & set(plan.write_slots.tolist())


@pytest.mark.parametrize(("steps", "written"), [(1, False), (2, True), (3, True)])
def test_noisy_history_comes_from_an_intermediate_step(net, steps, written):
    """Chunks after the first leave noisy keys behind, other ones than the cache pass leaves."""
    s = stream(net, steps=steps)
    for _ in range(3):
        s.next_latents(contexts(2))
    memory = s.memory
    k = memory.caches[-1].k[0]
    ring = torch.arange(2 * CONFIG.chunk)  # two chunks since the kept one
    noisy, clean = k[memory.noisy_base + ring], k[memory.clean_base + ring]
    assert (noisy.flatten(1).abs().amax(1) > 0).all() == written
    assert (clean.flatten(1).abs().amax(1) > 0).all()
    assert (noisy - clean).abs().max() > 0.1


def test_summaries_of_slots_stream_as_those_of_blocks(monkeypatch):
    """Of two blocks, one of them ragged; each slot is written several times."""
    config, grid, c = replace(CONFIG, sla=SparseLinear(0.3)), (7, 10), contexts(15)
    net, clean, noisy = randomised(config), latents(13, grid=grid), latents(2, 5, grid=grid)
    streams = {}
    for kind, count in (("slot", 1), ("block", 2)):
        monkeypatch.setattr(SparseLinear, "summaries", kind)
        memory = StreamMemory(config, layout("vidu_s1", config), grid)
        assert memory.caches[0].h.shape[2] == count
        streams[kind] = stream_last_chunk(net, memory, clean, c, noisy)
    assert streams["slot"].std() > 0.3
    torch.testing.assert_close(streams["slot"], streams["block"], atol=TOLERANCE, rtol=0)


def test_what_the_linear_branch_sums_is_what_a_cache_keeps():
    kept = [SparseLinear(0.1, over).summaries for over in ("all", "unselected", "marginal")]
    assert kept == ["slot", "block", "block"]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_fill_phase_sees_only_what_was_written(name):
    memory = StreamMemory(CONFIG, layout(name, CONFIG), GRID)
    visible = []
    run_positions = [(1, 0), *((2, 1 + 2 * i) for i in range(5))]
    for frames, _ in run_positions:
        table = memory.make_plans(frames)[memory.kinds[-1]].block_table[:-frames]
        visible.append(int((table >= 0).sum()))
        memory.position += frames
    seen = memory.layout.visible
    assert visible == [seen(start) - CONFIG.chunk for _, start in run_positions]
    assert seen(2) == 2 + CONFIG.chunk
    assert seen(1_000_000) == CONFIG.window


def codec() -> ConvCodec:
    torch.manual_seed(0)
    return ConvCodec(CodecConfig(frame_channels=1, widths=(8, 8, 8))).eval()


def stream(net, name="vidu_s1", **options) -> Stream:
    s = Stream(net, codec(), layout(name, CONFIG), **options)
    picture = torch.randint(
        0, 256, (1, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    s.start(picture, contexts(1))
    return s


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_same_seed_same_frames(net, name, steps):
    c = contexts(2, 9)
    a, b, other = (stream(net, name, steps=steps, seed=seed) for seed in (7, 7, 8))
    for _ in range(3):
        frames = [s.next_frames(c) for s in (a, b, other)]
    assert frames[0].shape == (1, 8, 32, 48, 3)
    assert frames[0].dtype == torch.uint8
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0], frames[2])


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_memory_is_constant_and_cache_never_moves(net, name):
    s = stream(net, name)
    pointers = [c.k.data_ptr() for c in s.memory.caches]
    size = s.memory.nbytes
    for _ in range(12):
        s.next_frames(contexts(2))
    assert [c.k.data_ptr() for c in s.memory.caches] == pointers
    assert s.memory.nbytes == size
    assert int(s.memory.position) == 1 + 12 * CONFIG.chunk


def test_conditions_act_on_the_next_chunk_only(net):
    a, b = stream(net), stream(net)
    same = contexts(2, 4)
    assert torch.equal(a.next_latents(same), b.next_latents(same))
    assert not torch.equal(a.next_latents(same), b.next_latents(contexts(2, 5)))


def test_batch_is_streams_side_by_side(net):
    """Two streams in a batch do not see each other: equal inputs, equal outputs, row by row."""
    s = Stream(net, codec(), layout("vidu_s1", CONFIG), batch=2)
    picture = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    s.start(picture, contexts(1).expand(2, -1, -1, -1))
    c = torch.cat([contexts(2, 4), contexts(2, 5)])
    noise = torch.randn(8, 1, 2, 4, 4, 6)
    draws = iter(noise.expand(8, 2, 2, 4, 4, 6))
    s._noise = lambda: next(draws)
    both = s.next_latents(c)
    for row in range(2):
        one = Stream(net, codec(), layout("vidu_s1", CONFIG))
        one.start(picture[row : row + 1], contexts(1))
        draws_one = iter(noise)
        one._noise = lambda draws_one=draws_one: next(draws_one)
        torch.testing.assert_close(
            one.next_latents(c[row : row + 1]), both[row : row + 1], atol=1e-5, rtol=1e-5
        )


def test_patches_round_trip():
    x = latents(3)
    p, q = 2, 2
    tokens = patchify(x, (p, q))  # channel-major patches in, patch-major patches out
    reordered = tokens.unflatten(-1, (4, p, q)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(reordered, 3, GRID, (p, q)), x)


def test_noise_and_prediction_follow_the_flow():
    """x_t = (1 - sigma) x0 + sigma noise, and a velocity of noise - x0 leads back to x0."""
    x0, noise = latents(2), latents(2, 8)
    x_t = add_noise(x0, noise, 0.25)
    torch.testing.assert_close(x_t, 0.75 * x0 + 0.25 * noise)
    torch.testing.assert_close(to_x0(noise - x0, x_t, 0.25, "velocity"), x0, atol=1e-6, rtol=0)
    assert to_x0(x0, x_t, 0.25, "x0") is x0


def test_schedule_matches_published_lists():
    assert timesteps(4, 5.0) == pytest.approx((1000, 937.5, 833.3333, 625))
    assert timesteps(3, 5.0) == pytest.approx((1000, 909.0909, 714.2857))
    with pytest.raises(ValueError, match="steps: expected one of"):
        timesteps(7, 5.0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wan-1.3b", 1_418_996_800),
        ("wan-5b", 4_999_787_712),
        ("wan-14b", 14_288_491_584),
        ("miniature", 4_022_080),
    ],
)
def test_presets_have_the_public_parameter_counts(name, parameters):
    with torch.device("meta"):
        net = CausalTransformer(PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="layout: expected one of vidu_s1"):
        layout("nonsense", CONFIG)
    with pytest.raises(ValueError, match="preset: expected one of wan-1.3b"):
        preset("wan-2b")
    with pytest.raises(ValueError, match="window: expected at least"):
        LAYOUTS["vidu_s1"](3, 5)
    with pytest.raises(ValueError, match="cache: expected one of"):
        Segment("history", 2, cache="foggy")
    with pytest.raises(ValueError, match="frames: expected"):
        codec().encode(torch.zeros(1, 3, 32, 32, 3))
    with pytest.raises(ValueError, match="divisible by 8"):
        codec().encode(torch.zeros(1, 4, 30, 32, 3))


class _NoHostReads(TorchDispatchMode):
    """Fails on `.item()`, `bool(tensor)`, a shape that depends on data, and the like."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_step_never_reads_the_device_back(net, name):
    """Inside a pass nothing may leave the device: that is what makes it capturable."""
    s = stream(net, name)
    with _NoHostReads():
        s.next_latents(contexts(2))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            int(s.memory.position)
