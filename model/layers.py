# SPDX-License-Identifier: Apache-2.0
"""The parts of a Wan block.  Parameter names are those of the public checkpoints."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reeltime import attention, rope_kv

from .config import ModelConfig


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[..., dim] float64: cos then sin of t * 10000^(-i / (dim / 2)), as Wan computes it."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timesteps.device)
    angles = timesteps.double()[..., None] * torch.pow(10000.0, -index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNormWeight(nn.Module):
    """Holds `weight` under the name checkpoints use; the kernels do the normalising."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class SelfAttention(nn.Module):
    """Projections of self-attention; what is attended to belongs to the memory.

    With sparse-linear attention, `proj_l` of all heads projects the linear branch; it starts as
    zero, so that the sparse branch alone is the model before any training.
    """

    def __init__(self, config: ModelConfig, sparse: bool = False) -> None:
        super().__init__()
        d = config.dim
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm_q, self.norm_k = RMSNormWeight(d), RMSNormWeight(d)
        self.proj_l = nn.Linear(config.head_dim, config.head_dim) if sparse else None
        if self.proj_l is not None:
            nn.init.zeros_(self.proj_l.weight)
            nn.init.zeros_(self.proj_l.bias)

    @property
    def projection(self) -> dict[str, Any]:
        """The arguments of sla that are weights."""
        p = self.proj_l
        return {} if p is None else {"proj_weight": p.weight, "proj_bias": p.bias}


class CrossAttention(SelfAttention):
    """Attention to a context of text, instruction or audio tokens.

    The context may differ per latent frame ([B, F, L, C]) or be shared by all ([B, 1, L, C]).
    Image-to-video checkpoints attend to a picture as well, with the same queries.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.image_dim:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = RMSNormWeight(config.dim)

    def keys_values(
        self, context: Tensor, backend: str, image: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """context [B, F or 1, L, C] -> k, v [B * (F or 1), L, H, D]; once per chunk.

        An image [B, 1, L', C] adds its own pair.
        """
        pairs = self._pair(context, self.k, self.v, self.norm_k, backend)
        if image is not None:
            pairs += self._pair(image, self.k_img, self.v_img, self.norm_k_img, backend)
        return pairs

    def _pair(
        self, context: Tensor, to_k: nn.Module, to_v: nn.Module, norm: RMSNormWeight, backend: str
    ) -> tuple[Tensor, ...]:
        context = context.flatten(0, 1)
        k = rope_kv.query(
            to_k(context), None, num_heads=self.num_heads, norm_weight=norm.weight,
            eps=self.eps, backend=backend,
        )[0]  # fmt: skip
        return k, to_v(context).unflatten(-1, (self.num_heads, -1))

    def forward(self, y: Tensor, keys_values: tuple[Tensor, ...], backend: str) -> Tensor:
        batch, tokens, dim = y.shape
        q = rope_kv.query(
            self.q(y), None, num_heads=self.num_heads, norm_weight=self.norm_q.weight,
            eps=self.eps, backend=backend,
        )[0]  # (B, L, H, D)  # fmt: skip
        k, v, *image = keys_values
        out = self._attend(q, k, v, backend)
        if image:
            out = out + self._attend(q, image[0], image[1], backend)
        return self.o(out.reshape(batch, tokens, dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        rows = q.reshape(k.shape[0], -1, *q.shape[2:])  # one row per context
        out = attention.attention(rows, k.to(q.dtype), v.to(q.dtype), backend=backend)
        return cast(Tensor, out).reshape(q.shape)  # no lse was asked for


class FeedForward(nn.Sequential):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, outputs)
        )


class ImageEmbedding(nn.Module):
    """CLIP features of a picture [B, L, image_dim] -> [B, L, C]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inputs, d = config.image_dim, config.dim
        self.proj = nn.Sequential(
            nn.LayerNorm(inputs),
            nn.Linear(inputs, inputs),
            nn.GELU(),
            nn.Linear(inputs, d),
            nn.LayerNorm(d),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


def patchify(latents: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, F, C, H, W] -> [B, F * (H / p) * (W / q), C * p * q], the order of Wan's Conv3d."""
    p, q = patch
    x = latents.unflatten(-1, (-1, q)).unflatten(-3, (-1, p))  # (B, F, C, h, p, w, q)
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(
    tokens: Tensor, frames: int, grid: tuple[int, int], patch: tuple[int, int]
) -> Tensor:
    """[B, F * h * w, p * q * C] -> [B, F, C, h * p, w * q], the order of Wan's head."""
    x = tokens.unflatten(-1, (*patch, -1)).unflatten(1, (frames, *grid))  # (B, F, h, w, p, q, C)
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def linear_patches(weight: Tensor, bias: Tensor, patches: Tensor) -> Tensor:
    """A stride = kernel Conv3d as the matrix product that it is."""
    return F.linear(patches, weight.flatten(1), bias)
