# SPDX-License-Identifier: Apache-2.0
"""Wan's own video autoencoder behind the interface of `ConvCodec`; needs the extra "wan".

Its convolutions look back in time: a latent frame depends on all frames before it.  A stream
therefore keeps what each convolution last saw, and encodes and decodes group by group with the
same result as the whole video at once.  The first latent frame of a video stands for one frame,
every further one for four.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .codec import to_planes


@dataclass(frozen=True)
class WanVaeConfig:
    """Geometry: 4 x 8 x 8 and 16 channels for Wan 2.1, 4 x 16 x 16 and 48 for Wan 2.2's 5B."""

    frames_per_latent: int = 4
    stride: int = 8
    channels: int = 16


class WanVae(nn.Module):
    """One video at a time, or a batch of them side by side.

    encode       starts a video.      [B, 1 + 4 k, H, W, 3] -> [B, 1 + k, C, H / 8, W / 8] float32
    encode_next  continues it.        [B, 4 k, H, W, 3] -> [B, k, C, H / 8, W / 8] float32
    decode       starts or continues. [B, F, C, h, w] -> [B, 4 F, 8 h, 8 w, 3] float in [0, 1]

    A picture comes as to `ConvCodec`, four times the same frame, becomes one latent frame, and what
    is decoded next continues it.  Without a picture, decode starts a video: its first latent frame
    gives one frame only.  `reset` forgets the video.  Latents have unit variance per channel.

    Args:
        vae: diffusers' AutoencoderKLWan.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae, c = vae.eval(), vae.config
        # scale_factor_spatial counts what the convolutions and the pixel patches do together.
        self.config = WanVaeConfig(c.scale_factor_temporal, c.scale_factor_spatial, c.z_dim)
        self.register_buffer("mean", torch.tensor(c.latents_mean).view(-1, 1, 1, 1), False)
        self.register_buffer("std", torch.tensor(c.latents_std).view(-1, 1, 1, 1), False)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> WanVae:
        """From a folder of diffusers' layout, whole or its vae/.

        Raises:
            ImportError: diffusers is not installed.
            FileNotFoundError: no such folder, or no VAE in it.
        """
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise ImportError(
                "Wan's VAE needs diffusers, which is not installed: pip install 'reeltime[wan]'"
            ) from error
        folder = Path(path)
        if (folder / "vae").is_dir():
            folder = folder / "vae"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"vae: no config.json in {folder}")
        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
        return cls(vae).to(device)

    def reset(self) -> None:
        """Forget the video: the next call starts one."""
        # One entry per causal convolution, filled by diffusers; absent reads as None.
        self._encoded: dict[int, Any] = defaultdict(lambda: None)
        self._decoded: dict[int, Any] = defaultdict(lambda: None)
        self._picture: Tensor | None = None

    def encode(self, frames: Tensor) -> Tensor:
        """Start a video, or put a picture at its start; see the class."""
        self._check_frames(frames)
        n = self.config.frames_per_latent
        still = frames.shape[1] == n
        if still and not torch.equal(frames, frames[:, :1].expand_as(frames)):
            raise ValueError(
                f"frames: expected a picture ({n} equal frames) or 1 + {n} k frames of a video, "
                f"got {n} different ones"
            )
        if not still and frames.shape[1] % n != 1:
            raise ValueError(f"frames: expected 1 + {n} k of them, got {frames.shape[1]}")
        self.reset()
        parts = [frames[:, :1]]
        if not still and frames.shape[1] > 1:
            parts += frames[:, 1:].split(n, dim=1)
        latents = self._encode(parts)
        self._picture = latents if still else None
        return latents

    def encode_next(self, frames: Tensor) -> Tensor:
        """Continue the video that `encode` started; see the class."""
        self._check_frames(frames)
        n = self.config.frames_per_latent
        if not self._encoded:
            raise RuntimeError("WanVae: encode a picture or a video first")
        if frames.shape[1] % n:
            raise ValueError(f"frames: expected a multiple of {n}, got {frames.shape[1]}")
        return self._encode(list(frames.split(n, dim=1)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels; see the class."""
        if latents.ndim != 5 or latents.shape[2] != self.config.channels or not latents.shape[1]:
            raise ValueError(
                f"latents: expected [B, F, {self.config.channels}, h, w], got {list(latents.shape)}"
            )
        if self._picture is not None:
            self._decode(self._picture)
            self._picture = None
        return self._decode(latents)

    def decode_uint8(self, latents: Tensor) -> Tensor:
        """As `decode`, rounded to uint8."""
        return self.decode(latents).mul_(255).round_().to(torch.uint8)

    def _check_frames(self, frames: Tensor) -> None:
        if frames.ndim != 5 or frames.shape[-1] != 3 or not frames.shape[1]:
            raise ValueError(f"frames: expected [B, T, H, W, 3], got {list(frames.shape)}")
        height, width = frames.shape[2:4]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"frames: expected height and width divisible by {self.config.stride}, "
                f"got {height} x {width}"
            )

    def _encode(self, parts: list[Tensor]) -> Tensor:
        patch = self.vae.config.patch_size or 1
        coded = []
        for frames in parts:
            x = to_planes(frames.flatten(0, 1)).to(self.vae.dtype)  # (B T, 3, H, W)
            x = _fold(x, patch).unflatten(0, (frames.shape[0], -1)).transpose(1, 2)
            x = self.vae.encoder(x, feat_cache=self._encoded, feat_idx=[0])
            mean, _ = self.vae.quant_conv(x).chunk(2, dim=1)  # (B, C, 1, h, w)
            coded.append((mean.float() - self.mean) / self.std)
        return torch.cat(coded, dim=2).transpose(1, 2)

    def _decode(self, latents: Tensor) -> Tensor:
        patch = self.vae.config.patch_size or 1
        z = (latents.transpose(1, 2).float() * self.std + self.mean).to(self.vae.dtype)
        decoded = []
        for frame in self.vae.post_quant_conv(z).split(1, dim=2):
            x = self.vae.decoder(
                frame, feat_cache=self._decoded, feat_idx=[0], first_chunk=not self._decoded
            )
            planes = _unfold(x.transpose(1, 2).flatten(0, 1).float(), patch)  # (B T, 3, H, W)
            decoded.append(planes.unflatten(0, (x.shape[0], -1)))
        video = torch.cat(decoded, dim=1).clamp_(-1, 1)
        return video.permute(0, 1, 3, 4, 2).contiguous().add_(1).mul_(0.5)


def _fold(planes: Tensor, patch: int) -> Tensor:
    """[N, C, H, W] -> [N, C q p, H / p, W / q]: columns before rows, as Wan 2.2 does it."""
    x = planes.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # (N, C, h, p, w, q)
    return x.permute(0, 1, 5, 3, 2, 4).flatten(1, 3)


def _unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `_fold`."""
    x = x.unflatten(1, (-1, patch, patch))  # (N, C, q, p, h, w)
    return x.permute(0, 1, 4, 3, 5, 2).flatten(4).flatten(2, 3)
