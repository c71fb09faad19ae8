# SPDX-License-Identifier: Apache-2.0
"""The avatar, its director, and that training sees what streaming will see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from reeltime.model.codec import ConvCodec
from reeltime.model.config import ModelConfig, SparseLinear
from reeltime.model.kv_cache import StreamMemory
from reeltime.model.layout import layout
from reeltime.model.miniature import control, finetune, train, weights
from reeltime.model.miniature.avatar import POSE, SHAPE_RANGE, Identity, random_identity, render
from reeltime.model.miniature.weights import load_miniature
from reeltime.model.transformer import CausalTransformer

REST = np.zeros((1, len(POSE)), np.float32)


def pose(**values: float) -> np.ndarray:
    out = REST.copy()
    for name, value in values.items():
        out[0, POSE.index(name)] = value
    return out


@pytest.mark.parametrize("seed", range(5))
def test_identities_are_seeded_and_in_range(seed):
    who = random_identity(np.random.default_rng(seed))
    again = random_identity(np.random.default_rng(seed))
    np.testing.assert_array_equal(who.to_vector(), again.to_vector())
    assert ((who.shape >= SHAPE_RANGE[:, 0]) & (who.shape <= SHAPE_RANGE[:, 1])).all()
    assert (who.to_vector()[:15] >= 0).all()
    assert (who.to_vector()[:15] <= 1).all()
    np.testing.assert_array_equal(
        render(who, REST), render(Identity.from_vector(who.to_vector()), REST)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((n, v) for n in ("yaw", "pitch", "roll", "smile") for v in (-1.0, 1.0)),
        *((n, 1.0) for n in ("lids", "brows", "hand", "mouth")),
    ],
)
def test_every_pose_shows(name, value):
    """Each pose, both ways, moves enough pixels for a person to see it."""
    who = random_identity(np.random.default_rng(1))
    a, b = (render(who, p)[0].astype(int) for p in (REST, pose(**{name: value})))
    assert (np.abs(a - b).max(-1) > 40).sum() > 20


def test_rendering_is_independent_of_the_batch():
    who = random_identity(np.random.default_rng(2))
    poses = control.random_clip(np.random.default_rng(0), 19)[2]
    together = render(who, poses)
    np.testing.assert_array_equal(together[13:14], render(who, poses[13:14]))
    assert together.shape == (19, 128, 128, 3)
    assert together.dtype == np.uint8
    assert render(who, poses[:0]).shape == (0, 128, 128, 3)
    with pytest.raises(ValueError, match=r"poses: expected shape \[T, 8\], got \[3\]"):
        render(who, np.zeros(3))


def test_half_a_turn_is_a_mirror_image():
    """Yaw left and yaw right mirror each other, hair parting aside: the geometry is symmetric."""
    who = random_identity(np.random.default_rng(3))
    left, right = (render(who, pose(yaw=v))[0].astype(int) for v in (-1.0, 1.0))
    eyes = slice(40, 75)
    difference = np.abs(left[eyes] - right[eyes, ::-1]).mean()
    assert difference < 0.4 * np.abs(left[eyes] - right[eyes]).mean()


@pytest.mark.parametrize("name", control.NAMES)
def test_instructions_reach_their_pose(name):
    track = control.Track()
    track.say(control.instruction_id(name.upper()))
    poses = track.advance(np.zeros(60, np.float32))[1]
    wanted = control.INSTRUCTIONS[name]
    for part, value in wanted.items():
        assert poses[-1, POSE.index(part)] == pytest.approx(value, abs=1e-3)
    if name in ("nod", "shake head", "blink"):  # these go on moving
        assert np.ptp(poses[-25:], axis=0).max() > 0.8
    elif not wanted:
        assert np.abs(poses).max() == 0


def test_a_change_takes_effect_on_the_next_frame():
    track = control.Track()
    track.advance(np.zeros(8, np.float32))
    track.say(control.instruction_id("turn left"))
    rows, poses = track.advance(np.full(8, 0.5, np.float32))
    assert rows[0].tolist() == [1, 0, 0]
    assert poses[0, 0] == pytest.approx(-0.35)
    assert (poses[:, POSE.index("mouth")] == 0.5).all()


def test_a_track_runs_for_ever():
    """The age wraps without a jump in either cycle."""
    track = control.Track()
    track.say(control.instruction_id("nod"))
    rows, poses = track.advance(np.zeros(4000, np.float32))
    assert rows[:, 2].max() < control.SETTLED + 500
    period = poses[-20:, 1]
    np.testing.assert_allclose(poses[2000:2020, 1], period, atol=1e-4)


def test_unknown_instruction_lists_the_vocabulary():
    with pytest.raises(ValueError, match="unknown 'dance'; expected one of: neutral, turn left"):
        control.instruction_id("dance")


def test_tokens_say_everything_about_a_frame():
    rows, envelope, _ = control.random_clip(np.random.default_rng(0), 16)
    tokens = control.condition_tokens(rows, envelope)
    assert tokens.shape == (4, 4, control.TOKEN_DIM)
    changed = envelope.copy()
    changed[7] += 0.1  # frame 6: visible in its own latent frame, and to the next frame as the past
    moved = np.abs(control.condition_tokens(rows, changed) - tokens).max((1, 2)) > 0
    assert moved.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="control: expected a multiple of 4"):
        control.condition_tokens(rows[:5], envelope[:6])
    assert control.picture_tokens().shape == (1, 4, control.TOKEN_DIM)


@pytest.mark.parametrize(
    "grid, sla",
    [
        pytest.param((2, 3), None, id="dense"),
        pytest.param((8, 8), SparseLinear(0.4), id="sla over all"),
        pytest.param((8, 8), SparseLinear(0.4, "unselected", "elu"), id="sla over the rest"),
    ],
)
def test_training_sees_what_the_stream_will_see(grid, sla):
    """The last target chunk of a training window = the same chunk streamed through the cache.

    Sparse: blocks of 64 keys are latent frames of 8 x 8 tokens in both."""
    torch.manual_seed(0)
    config = ModelConfig(
        "tiny", 48, 2, 64, 2, 4, 4, text_dim=8, freq_dim=32, prediction="x0", chunk=2, window=9,
        sla=sla,
    )  # fmt: skip
    net = CausalTransformer(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    frames, size = 9, (2 * grid[0], 2 * grid[1])
    clean, noisy = torch.randn(1, frames, 4, *size), torch.randn(1, 8, 4, *size)
    c = torch.randn(1, frames, 3, 8)
    context_frames = 7  # picture, C0, C1, C2
    whole = torch.cat([clean[:, :context_frames], noisy], dim=1)
    times = torch.zeros(1, 15)
    times[:, context_frames:] = 700.0
    all_c = torch.cat([c[:, :context_frames], c[:, 1:]], dim=1)
    with torch.no_grad():
        dense = net(
            whole, times, net.embed_context(all_c), train.TrainingMemory(config, grid)
        )[:, -2:]  # fmt: skip
        memory = StreamMemory(config, layout("vidu_s1", config), grid)
        for a, b in ((0, 1), (1, 3), (3, 5), (5, 7)):
            memory.plan = memory.make_plans(b - a)["cache"]
            net(clean[:, a:b], torch.zeros(1, b - a), net.embed_context(c[:, a:b]), memory)
            memory.position += b - a
        memory.plan = memory.make_plans()["final"]
        streamed = net(
            noisy[:, -2:], torch.full((1, 2), 700.0), net.embed_context(c[:, 7:]), memory
        )
    assert dense.std() > 0.3
    torch.testing.assert_close(dense, streamed, atol=5e-5, rtol=0)


def test_noise_levels_follow_the_twin_cache():
    """History is at the noisy-cache level or clean; targets at the last step see clean history."""
    config = train.PRESETS["miniature"]
    levels = train.Levels(config, torch.Generator().manual_seed(0))
    target, history = levels.sample(4000)
    assert history.unique().tolist() == pytest.approx([0.0, levels.steps[1]])
    noisy = history[:, 0] > 0
    assert 0.3 < noisy.float().mean() < 0.6
    at_last = (target - levels.steps[-1]).abs() < 1e-6
    assert not at_last[noisy].any()
    assert at_last[~noisy].float().mean() > 0.4


@pytest.fixture(scope="module")
def pool() -> dict[str, torch.Tensor]:
    """Clips of two people through the shipped codec."""
    from reeltime.model.miniature import data

    before, data._codec = data._codec, load_miniature()[1]
    rows = [data.make_clip(seed) for seed in (0, 1)]
    data._codec = before
    pool = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert pool["latents"].shape == (2, 10, 64, 16, 16)
    return pool


def test_training_resumes_where_it_stopped(pool, tmp_path, monkeypatch):
    """A few steps on two people, stopped, resumed: step count and weights go on."""
    torch.manual_seed(0)
    (tmp_path / "shipped").mkdir()
    codec = ConvCodec()
    ticks = iter(range(100_000))
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(ticks)))
    train.train_transformer(codec, pool, 0.05, 0, tmp_path, batch=1)
    first = torch.load(tmp_path / "transformer.ckpt", weights_only=True)
    train.train_transformer(codec, pool, 0.09, 0, tmp_path, batch=1, resume=True)
    second = torch.load(tmp_path / "transformer.ckpt", weights_only=True)
    assert 0 < first["step"] < second["step"]
    transformer, loaded = load_miniature(tmp_path / "shipped")
    assert transformer.config.name == "miniature"
    assert torch.equal(loaded.std, second["averages"]["codec"]["std"].half().float())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: no transformer.safetensors in"):
        load_miniature(tmp_path)
    (tmp_path / "transformer.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_miniature(tmp_path)
    train.save_weights(tmp_path / "transformer.safetensors", {"head.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="does not fit"):
        load_miniature(tmp_path)


# --- Sparse attention ---------------------------------------------------------------------------


def test_an_adapter_is_a_small_change_of_frozen_weights(pool, tmp_path, monkeypatch):
    """A few steps change what is learned and nothing else; the file gives that model back."""
    ticks = iter(range(100_000))
    monkeypatch.setattr(finetune.time, "monotonic", lambda: float(next(ticks)))
    path = tmp_path / "sla-50.safetensors"
    losses = finetune.finetune(50, pool, 0.07, path, batch=1, rank=2)
    assert len(losses) > 2
    assert np.isfinite(losses).all()
    dense, _ = load_miniature()
    before, after = weights.sparse(dense, 50, None), weights.sparse(dense, 50, path)
    changed = {
        name
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    learned = [f"{n}.weight" for n in finetune.PROJECTIONS] + ["proj_l.weight", "proj_l.bias"]
    layers = range(dense.config.num_layers)
    assert changed == {f"blocks.{i}.self_attn.{name}" for i in layers for name in learned}
    change = after.blocks[0].self_attn.q.weight - before.blocks[0].self_attn.q.weight
    assert torch.linalg.matrix_rank(change, tol=1e-4) <= 2


@pytest.mark.parametrize("sparsity", [50, 90])
def test_shipped_adapters_fit(sparsity):
    net, _ = load_miniature(sparsity=sparsity)
    assert net.config.sla == SparseLinear(topk=1 - sparsity / 100)
    assert all(block.self_attn.proj_l.weight.abs().sum() > 0 for block in net.blocks)
    folder = weights.FOLDER.glob("*.safetensors")
    assert sum(path.stat().st_size for path in folder) <= 10e6


def test_every_block_selected_is_dense_attention():
    """All blocks, and a projection of the linear branch that is still zero."""
    dense, _ = load_miniature()
    net = weights.sparse(dense, 50, None)
    net.config = replace(net.config, sla=SparseLinear(topk=1.0))
    x, c = torch.randn(1, 1, 64, 16, 16), torch.randn(1, 1, 4, 48)
    outputs = []
    for model in (dense, net):
        memory = StreamMemory(model.config, layout("vidu_s1", model.config), (8, 8))
        memory.plan = memory.make_plans(1)["cache"]
        with torch.no_grad():
            outputs.append(model(x, torch.zeros(1, 1), model.embed_context(c), memory))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=0)


def test_sparse_errors_name_what_is_wrong(tmp_path):
    dense, _ = load_miniature()
    with pytest.raises(ValueError, match="sparsity: expected a percentage from 1 to 99, got 100"):
        weights.sparse(dense, 100, None)
    with pytest.raises(FileNotFoundError, match="no sla-33.safetensors in .*transformer.safetens"):
        load_miniature(sparsity=33)
    train.save_weights(tmp_path / "a.safetensors", {"blocks.0.lora_C": torch.ones(3)})
    with pytest.raises(ValueError, match="does not fit: unexpected blocks.0.lora_C"):
        weights.sparse(dense, 50, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="topk: expected a share"):
        SparseLinear(topk=0.0)
    config = replace(dense.config, sla=SparseLinear(topk=0.5))
    with pytest.raises(ValueError, match="rope_on_cache: expected False with sparse-linear"):
        StreamMemory(config, layout("vidu_s1", config), (8, 8), rope_on_cache=True)
