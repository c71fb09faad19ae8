# SPDX-License-Identifier: Apache-2.0
"""Wan's VAE group by group against the whole video at once, as diffusers does it."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import AutoencoderKLWan

from reeltime.model.config import ModelConfig
from reeltime.model.layout import layout
from reeltime.model.stream import Stream
from reeltime.model.transformer import CausalTransformer
from reeltime.model.wan_vae import WanVae

TOLERANCE = 5e-5
SIZE = (16, 32)
SHARED = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0],
}  # fmt: skip
WAN_21 = SHARED | {"scale_factor_spatial": 8}
WAN_22 = SHARED | {
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "decoder_base_dim": 4, "scale_factor_spatial": 16, "temperal_downsample": [False, True, True],
}  # fmt: skip


@pytest.fixture(scope="module", params=[WAN_21, WAN_22], ids=["Wan 2.1", "Wan 2.2"])
def theirs(request):
    torch.manual_seed(0)
    return AutoencoderKLWan(**request.param).eval()


def video(frames, seed=1, batch=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, *SIZE, 3), dtype=torch.uint8, generator=g)


@torch.no_grad()
def encoded_at_once(theirs, frames):
    x = (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    z = theirs.encode(x).latent_dist.mode()
    mean, std = (torch.tensor(SHARED[n]).view(-1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    return ((z - mean) / std).transpose(1, 2)


@torch.no_grad()
def decoded_at_once(theirs, latents):
    mean, std = (torch.tensor(SHARED[n]).view(-1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    x = theirs.decode(latents.transpose(1, 2) * std + mean).sample
    return (x.permute(0, 2, 3, 4, 1) + 1) / 2


@torch.no_grad()
def test_encoding_in_pieces(theirs):
    vae, frames = WanVae(theirs), video(13, batch=2)
    pieces = (vae.encode(frames[:, :5]), vae.encode_next(frames[:, 5:9]))
    got = torch.cat([*pieces, vae.encode_next(frames[:, 9:])], dim=1)
    want = encoded_at_once(theirs, frames)
    assert got.shape == (2, 4, 4, *(side // vae.config.stride for side in SIZE))
    assert (want[:, 0] - want[:, -1]).std() > 0.01
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_decoding_in_pieces(theirs):
    vae = WanVae(theirs)
    latents = encoded_at_once(theirs, video(13))
    for _ in range(2):  # reset forgets
        got = torch.cat([vae.decode(part) for part in latents.split((1, 2, 1), dim=1)], dim=1)
        vae.reset()
        assert got.shape == (1, 13, *SIZE, 3)
        assert got.std() > 0.005
        torch.testing.assert_close(got, decoded_at_once(theirs, latents), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_what_follows_a_picture(theirs):
    """A picture is the first latent frame: all others give four frames, and look back at it."""
    vae, frames = WanVae(theirs), video(9)
    picture = vae.encode(frames[:, :1].expand(-1, 4, -1, -1, -1))
    following = vae.encode_next(frames[:, 1:])
    latents = torch.cat([picture, following], dim=1)
    torch.testing.assert_close(latents, encoded_at_once(theirs, frames), atol=TOLERANCE, rtol=0)
    got = torch.cat([vae.decode(part) for part in following.split(1, dim=1)], dim=1)
    want = decoded_at_once(theirs, latents)[:, 1:]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    bytes_ = vae.decode_uint8(following[:, :1])
    assert (bytes_.dtype, bytes_.shape) == (torch.uint8, (1, 4, *SIZE, 3))


def test_stream_with_wan_s_vae(theirs):
    """Behind the interface of the miniature's codec: pictures in, chunks of 4 F frames out."""
    vae = WanVae(theirs)
    config = ModelConfig("tiny", 48, 2, 64, 1, 4, 4, text_dim=8, freq_dim=32, chunk=2, window=7,
                         patch=(1, 1))  # fmt: skip
    torch.manual_seed(0)
    stream = Stream(CausalTransformer(config), vae, layout("vidu_s1", config))
    for _ in range(2):  # a second picture starts over
        stream.start(video(1)[:, 0], torch.zeros(1, 1, 3, 8))
        chunks = [stream.next_frames(torch.zeros(1, 1, 3, 8)) for _ in range(2)]
        assert [tuple(c.shape) for c in chunks] == [(1, 8, *SIZE, 3)] * 2


def test_folders(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "vae")
    for path in (tmp_path, str(tmp_path / "vae")):
        vae = WanVae.from_pretrained(path)
        assert vae.config.frames_per_latent == 4
        frames = video(1)
        torch.testing.assert_close(
            vae.encode(frames), encoded_at_once(theirs, frames), atol=TOLERANCE, rtol=0
        )
    with pytest.raises(FileNotFoundError, match="vae: no config.json in"):
        WanVae.from_pretrained(tmp_path / "nowhere")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers.* pip install 'reeltime\[wan\]'"):
        WanVae.from_pretrained("anywhere")


def test_bad_values_are_named(theirs):
    vae = WanVae(theirs)
    stride = vae.config.stride
    with pytest.raises(RuntimeError, match="encode a picture or a video first"):
        vae.encode_next(video(4))
    with pytest.raises(ValueError, match=r"frames: expected \[B, T, H, W, 3\], got \[1, 3, 3, 16"):
        vae.encode(video(3).movedim(-1, 1))
    with pytest.raises(ValueError, match=f"divisible by {stride}, got 14 x 32"):
        vae.encode(video(1)[:, :, :14])
    with pytest.raises(ValueError, match=r"frames: expected 1 \+ 4 k of them, got 7"):
        vae.encode(video(7))
    with pytest.raises(ValueError, match=r"frames: expected a picture \(4 equal frames\)"):
        vae.encode(video(4))
    vae.encode(video(1))
    with pytest.raises(ValueError, match="frames: expected a multiple of 4, got 5"):
        vae.encode_next(video(5))
    with pytest.raises(ValueError, match=r"latents: expected \[B, F, 4, h, w\], got \[1, 2, 16"):
        vae.decode(torch.zeros(1, 2, 16, 4, 6))
