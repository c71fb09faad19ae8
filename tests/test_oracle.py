# SPDX-License-Identifier: Apache-2.0
"""The transformer against code that is not ours: diffusers' WanTransformer3DModel.

Weights travel through a checkpoint in diffusers' layout, so a wrong name is a wrong output here.
What needs no second implementation is in test_model.py: repositioned = absolute without a
reference, moving the query = rotating the cache (at stream position 0 and 1,000,000), the order of
the ring, the noisy cache.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from reeltime.model.checkpoint import load_checkpoint
from reeltime.model.kv_cache import DenseMemory, StreamMemory
from reeltime.model.layout import Segment, StreamLayout

TOLERANCE = 5e-5  # fp32, two implementations of the same sums in another order
GRID = (2, 3)
TEXT_LEN = 512  # what diffusers' users pad to
CHUNK, HISTORY = 3, 4


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter: Wan's zero-initialised head would make these tests vacuous."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 and p.shape[0] > 1 else p.numel()
            p.copy_(torch.randn(p.shape, generator=g) * fan_in**-0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)


def both(folder, **options):
    """diffusers' model of a tiny geometry, and ours, loaded from what it saved."""
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=options.pop("in_channels", 4),
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=320, num_layers=2, **options,
    ).eval()  # fmt: skip
    randomise(theirs)
    theirs.save_pretrained(folder)
    return theirs, load_checkpoint(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return both(tmp_path_factory.mktemp("t2v"))


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(frames, seed, channels=4, batch=1):
    """[B, F, C, H, W]; diffusers has channels before frames."""
    return random(batch, frames, channels, 2 * GRID[0], 2 * GRID[1], seed=seed)


def text(tokens=7, batch=1):
    """A prompt, and what diffusers' pipelines make of it: zero rows up to 512."""
    prompt = random(batch, tokens, 16, seed=9)
    return prompt[:, None], torch.nn.functional.pad(prompt, (0, 0, 0, TEXT_LEN - tokens))


def assert_equal(got, want):
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def dense(net, x, times, prompt, mask=None, image=None):
    memory = DenseMemory(torch.arange(x.shape[1]), GRID, net.config, mask)
    return net(x, times, net.embed_context(prompt, image=image), memory)


@pytest.mark.parametrize("batch", [1, 2])
def test_dense_forward(pair, batch):
    theirs, net = pair
    x, (prompt, padded) = latents(5, 1, batch=batch), text(batch=batch)
    times = torch.tensor([833.333, 12.5])[:batch]
    with torch.no_grad():
        want = theirs(x.transpose(1, 2), times, padded).sample.transpose(1, 2)
    assert_equal(dense(net, x, times[:, None].expand(batch, 5), prompt), want)


def test_dense_forward_with_a_time_per_latent_frame(pair):
    theirs, net = pair
    x, (prompt, padded) = latents(5, 1), text()
    times = torch.tensor([[0.0, 0.0, 1000.0, 937.5, 625.0]])
    per_token = times.repeat_interleave(GRID[0] * GRID[1], dim=1)
    with torch.no_grad():
        want = theirs(x.transpose(1, 2), per_token, padded).sample.transpose(1, 2)
    assert_equal(dense(net, x, times, prompt), want)


def test_image_to_video(tmp_path):
    """Wan 2.1's: 36 channels in, and a picture's features as a second context."""
    theirs, net = both(tmp_path, in_channels=36, image_dim=40, added_kv_proj_dim=256)
    assert (net.config.in_channels, net.config.image_dim) == (36, 40)
    x, (prompt, padded), image = latents(3, 1, channels=36), text(), random(1, 11, 40, seed=4)
    times = torch.full((1, 3), 700.0)
    with torch.no_grad():
        want = theirs(x.transpose(1, 2), times[:, 0], padded, image).sample.transpose(1, 2)
        assert_equal(dense(net, x, times, prompt, image=image[:, None]), want)
    with pytest.raises(ValueError, match=r"image: .* expected \[B, 1, L, 40\], got None"):
        net.embed_context(prompt)


def test_contexts_that_do_not_fit_are_named(pair):
    _, net = pair
    with pytest.raises(ValueError, match="context: expected at most 512 tokens, got 513"):
        net.embed_context(torch.zeros(1, 1, 513, 16))
    with pytest.raises(ValueError, match=r"image: .* expected None, got \[1, 1, 3, 40\]"):
        net.embed_context(torch.zeros(1, 1, 3, 16), image=torch.zeros(1, 1, 3, 40))


class Masked(WanAttnProcessor):
    """diffusers' own attention, with a mask where its block passes none."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, x, context=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, x, context, self.mask, rotary_emb)


@torch.no_grad()
def masked_dense(theirs, x, times, padded, mask):
    """One dense forward of diffusers' model in which latent frame i sees j where mask[i, j]."""
    tokens = GRID[0] * GRID[1]
    wide = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    for block in theirs.blocks:
        block.attn1.set_processor(Masked(wide))
    try:
        per_token = times.repeat_interleave(tokens, dim=1)
        return theirs(x.transpose(1, 2), per_token, padded).sample.transpose(1, 2)
    finally:
        for block in theirs.blocks:
            block.attn1.set_processor(WanAttnProcessor())


def what_was_seen(frames, kept):
    """mask[i, j]: latent frame i saw j when its chunk was written."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for start in range(0, frames, CHUNK):
        rows = slice(start, start + CHUNK)
        mask[rows, rows] = True
        mask[rows, : min(kept, start)] = True
        mask[rows, max(kept, start - HISTORY) : start] = True
    return mask


@pytest.mark.parametrize("chunks", [2, 6], ids=["filling", "evicting"])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_cached_stream(pair, kept, chunks):
    """Chunks through the rolling cache = one masked dense forward, context frames at t = 0."""
    theirs, net = pair
    segments = (Segment("history", HISTORY, evict="drop"),)
    if kept:
        segments = (Segment("first_state", kept), *segments)
    memory = StreamMemory(net.config, StreamLayout("test", CHUNK, segments), GRID)
    frames = CHUNK * chunks
    x, (prompt, padded) = latents(frames, 2), text()
    times = torch.zeros(1, frames)
    times[:, -CHUNK:] = 833.333
    with torch.no_grad():
        context = net.embed_context(prompt)
        for start in range(0, frames, CHUNK):
            rows = slice(start, start + CHUNK)
            last = start + CHUNK == frames
            memory.plan = memory.make_plans()["final" if last else "cache"]
            got = net(x[:, rows], times[:, rows], context, memory)
            memory.position += CHUNK
    mask = what_was_seen(frames, kept)
    assert bool(mask.all(1).any()) == (chunks == 2)  # with six chunks something was evicted
    assert_equal(got, masked_dense(theirs, x, times, padded, mask)[:, -CHUNK:])
