# SPDX-License-Identifier: Apache-2.0
"""Pixels to latents and back, chunk by chunk.

A codec turns groups of `frames_per_latent` video frames into one latent frame and back.  It is
causal by construction: a latent frame depends on its own video frames and on nothing else, so
encoding and decoding a stream needs no cache and no look-ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CodecConfig:
    """Geometry of `ConvCodec`: 4 x 8 x 8 compression as Wan 2.1's VAE, 16 channels per frame."""

    frames_per_latent: int = 4
    stride: int = 8
    frame_channels: int = 16
    widths: tuple[int, int, int] = (64, 32, 24)  # at 1/8, 1/4 and 1/2 of the resolution

    @property
    def channels(self) -> int:
        """Channels of a latent frame."""
        return self.frames_per_latent * self.frame_channels


def _gelu() -> nn.Module:
    return nn.GELU(approximate="tanh")


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _gelu(),
            nn.Conv2d(width, width, 3, padding=1),
            _gelu(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvCodec(nn.Module):
    """A convolutional autoencoder of single frames; a latent frame stacks the latents of four.

    A mouth moves within a latent frame: coding each video frame on its own keeps it readable,
    which one code for all four did not.  Latents have unit variance per channel.

    encode: uint8 or float [B, T, H, W, 3] -> [B, T / 4, C, H / 8, W / 8] float32
    decode: [B, F, C, h, w] -> [B, 4 F, 8 h, 8 w, 3] float in [0, 1]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CodecConfig()
        low, middle, high = c.widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, high, 3, padding=1),
            _Residual(high),
            nn.Conv2d(high, middle, 4, stride=2, padding=1),
            _Residual(middle),
            nn.Conv2d(middle, low, 4, stride=2, padding=1),
            _Residual(low),
            nn.Conv2d(low, c.frame_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c.frame_channels, low, 3, padding=1),
            _Residual(low),
            _Residual(low),
            nn.Conv2d(low, 4 * middle, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(middle),
            nn.Conv2d(middle, 4 * high, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(high),
            nn.Conv2d(high, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(c.frame_channels))
        self.register_buffer("std", torch.ones(c.frame_channels))

    def encode(self, frames: Tensor) -> Tensor:
        n = self.config.frames_per_latent
        if frames.ndim != 5 or frames.shape[1] % n or frames.shape[-1] != 3:
            raise ValueError(
                f"frames: expected [B, T, H, W, 3] with T a multiple of {n}, "
                f"got {list(frames.shape)}"
            )
        batch, height, width = frames.shape[0], frames.shape[2], frames.shape[3]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"frames: expected height and width divisible by {self.config.stride}, "
                f"got {height} x {width}"
            )
        z = self.encoder(to_planes(frames.flatten(0, 1))).float()  # (B T, 16, h, w)
        z = (z - self.mean[:, None, None]) / self.std[:, None, None]
        return z.unflatten(0, (batch, -1, n)).flatten(2, 3)

    def decode(self, latents: Tensor) -> Tensor:
        batch, n = latents.shape[0], self.config.frames_per_latent
        z = latents.unflatten(2, (n, -1)).flatten(0, 2)  # (B F 4, 16, h, w)
        z = z * self.std[:, None, None] + self.mean[:, None, None]
        x = self.decoder(z.contiguous(memory_format=torch.channels_last)).float()
        return (x.permute(0, 2, 3, 1) + 1).mul_(0.5).unflatten(0, (batch, -1))

    def decode_uint8(self, latents: Tensor) -> Tensor:
        """As `decode`, rounded: [B, 4 F, H, W, 3] uint8."""
        return self.decode(latents).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def to_planes(frames: Tensor) -> Tensor:
    """[N, H, W, 3] uint8 or float in [0, 1] -> [N, 3, H, W] in [-1, 1], channels last."""
    if not frames.is_floating_point():
        frames = frames.float() / 255
    return (frames * 2 - 1).permute(0, 3, 1, 2)
