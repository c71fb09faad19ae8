# SPDX-License-Identifier: Apache-2.0
"""Wan's diffusion transformer, made causal: the same block, read through a memory.

For tokens x of a chunk, timestep embedding e (six vectors per latent frame) and context c:

    x = x + e2 * self_attention(LN(x) * (1 + e1) + e0)     keys and values go through the memory
    x = x + cross_attention(LN_affine(x), c)
    x = x + e5 * mlp(LN(x) * (1 + e4) + e3)

Each residual addition is fused with what stands beside it: with the norm that follows, or, behind a
layer in 8 bits, with the product before.  The memory decides what self-attention sees: a dense
sequence (training, oracle) or the stream's cache.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import (
    CrossAttention,
    FeedForward,
    ImageEmbedding,
    SelfAttention,
    Update,
    add_norm,
    linear_patches,
    patchify,
    sinusoid,
    unpatchify,
)
from .quality import QUALITIES

Context = list[tuple[Tensor, ...]]  # cross-attention keys and values of every layer


class Memory(Protocol):
    """What self-attention attends to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attn: SelfAttention) -> Tensor:
        """Raw projections q, k, v [B, L, C] -> attention output [B, L, C] before projection."""
        ...


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config, sparse=config.sla is not None)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)  # affine, before cross-attention
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim)

    def forward(
        self,
        x: Tensor,  # [B, L, C] residual stream
        update: Update | None,  # what the previous block left to add
        e: Tensor,  # [B, F, 6, C]
        context: tuple[Tensor, ...],
        memory: Memory,
        layer: int,
        backend: str,
    ) -> tuple[Tensor, Update | None]:
        e0, e1, e2, e3, e4, e5 = (self.modulation[:, None] + e).unbind(2)  # (B, F, C) each
        attn, cross, ffn = self.self_attn, self.cross_attn, self.ffn
        common: dict[str, Any] = {"eps": self.eps, "backend": backend}
        x, y = add_norm(x, update, scale=e1, shift=e0, quantize=attn.takes, **common)
        q, k, v = attn.project(y, backend)
        x, update = attn.o.add(x, memory.attend(layer, q, k, v, attn), e2, backend)
        affine = {"weight": self.norm3.weight, "bias": self.norm3.bias}
        x, y = add_norm(x, update, quantize=cross.takes, **affine, **common)
        x, update = cross.add(x, y, context, backend)
        x, y = add_norm(x, update, scale=e4, shift=e3, quantize=ffn.takes, **common)
        return ffn.add(x, y, e5, backend)


class Head(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        p, q = config.patch
        self.head = nn.Linear(config.dim, p * q * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class CausalTransformer(nn.Module):
    """Wan's geometry from 4M to 14B parameters; see `ModelConfig`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, d = config, config.dim
        self.quality = QUALITIES["bf16"]  # quality.quantize and load_checkpoint bring it to others
        self.patch_embedding = nn.Conv3d(
            config.in_channels, d, (1, *config.patch), (1, *config.patch)
        )
        self.text_embedding = FeedForward(config.text_dim, d, d)
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def embed_context(
        self, context: Tensor, backend: str = "auto", *, image: Tensor | None = None
    ) -> Context:
        """Cross-attention keys and values of every layer, computed once per chunk.

        Args:
            context: [B, F or 1, L, text_dim], tokens per latent frame or shared by all of them.
            image: [B, 1, L', image_dim], features of a picture, for checkpoints that have them.
        Raises:
            ValueError: more tokens than text_len, or an image too many or missing.
        """
        config = self.config
        if config.text_len:
            missing = config.text_len - context.shape[-2]
            if missing < 0:
                raise ValueError(
                    f"context: expected at most {config.text_len} tokens, got {context.shape[-2]}"
                )
            context = F.pad(context, (0, 0, 0, missing))
        if (image is None) != (config.image_dim == 0):
            expected = f"[B, 1, L, {config.image_dim}]" if config.image_dim else "None"
            got = None if image is None else list(image.shape)
            raise ValueError(f"image: {config.name} expected {expected}, got {got}")
        context = self.text_embedding(context)
        image = None if image is None else self.img_emb(image)
        return [b.cross_attn.keys_values(context, backend, image) for b in self.blocks]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Context,
        memory: Memory,
        *,
        backend: str = "auto",
    ) -> Tensor:
        """One denoising pass.

        Args:
            latents: [B, F, C, H, W], noisy latent frames.
            timesteps: [B, F] in [0, 1000], one per latent frame.
            context: from `embed_context`.
            memory: where keys and values go and what queries see.
            backend: kernel backend of every family.
        Returns:
            [B, F, C_out, H, W]: velocity or x0, as `config.prediction` says.
        """
        config = self.config
        frames, (p, q) = latents.shape[1], config.patch
        grid = (latents.shape[3] // p, latents.shape[4] // q)
        dtype = self.patch_embedding.weight.dtype
        x = linear_patches(
            self.patch_embedding.weight,
            self.patch_embedding.bias,
            patchify(latents.to(dtype), config.patch),
        )  # (B, L, d)
        embedded = self.time_embedding(sinusoid(timesteps, config.freq_dim).to(dtype))  # (B, F, d)
        e = self.time_projection(embedded).unflatten(-1, (6, -1))  # (B, F, 6, d)
        update: Update | None = None
        for layer, block in enumerate(self.blocks):
            x, update = block(x, update, e, context[layer], memory, layer, backend)
        shift, scale = (self.head.modulation[:, None] + embedded[:, :, None]).unbind(2)
        _, y = add_norm(x, update, scale=scale, shift=shift, eps=config.eps, backend=backend)
        return unpatchify(
            F.linear(y, self.head.head.weight, self.head.head.bias), frames, grid, config.patch
        )
