# SPDX-License-Identifier: Apache-2.0
"""The parts of a Wan block.  Parameter names are those of the public checkpoints.

A block speaks to `Linear` and to `Linear8` in the same words, so that what a quality level changes
is which of the two a layer is, and nothing of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reeltime import attention, norm, quant, rope_kv
from reeltime.gemm_w8a8 import gemm_w8a8
from reeltime.quant.api import FORMATS, scale_shape

from .config import ModelConfig

# In the model's dtype; or in 8 bits: codes [B, L, C] and their scales [B * L, ceil(C / 128)].
Activation: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
Update: TypeAlias = "tuple[Tensor, Tensor | None]"  # (h, gate): what is still to be added, gate * h


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[..., dim] float64: cos then sin of t * 10000^(-i / (dim / 2)), as Wan computes it."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timesteps.device)
    angles = timesteps.double()[..., None] * torch.pow(10000.0, -index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Linear(nn.Linear):
    """A linear layer of a block in the model's dtype."""

    takes: str | None = None  # the 8-bit format that it wants its input in

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor, backend: str, takes: str | None) -> Activation:
        """GELU of its result."""
        return F.gelu(self(x), approximate="tanh")

    def add(
        self, x: Tensor, h: Tensor, gate: Tensor | None, backend: str
    ) -> tuple[Tensor, Update | None]:
        """x + gate * self(h), left to the norm that follows: it reads x anyway."""
        return x, (self(h), gate)


class Linear8(nn.Module):
    """A linear layer in W8A8.  Weights have a scale per 128 x 128, inputs one per token and 128
    channels; an input that a norm or the layer before has not quantised is quantised here.

    Args:
        parts: the layers of the checkpoint that stand in it, one below the other.
        sizes: inputs, outputs of all parts.
        format: "int8" or "fp8".
        dtype: of the bias, and of results.
    """

    weight: Tensor  # [N, K]
    weight_scale: Tensor  # [ceil(N / 128), ceil(K / 128)] float32

    def __init__(
        self,
        parts: tuple[str, ...],
        sizes: tuple[int, int],
        format: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.parts, self.takes = parts, format
        inputs, outputs = sizes
        scales = scale_shape(outputs, inputs, 128)
        made: dict[str, Any] = {"device": device}
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=FORMATS[format], **made))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32, **made))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, **made))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8:
        """.to(dtype) is for the bias: codes and scales only move."""
        kept = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        self.weight, self.weight_scale = (x.to(self.bias.device) for x in kept)
        return self

    def forward(self, x: Activation, backend: str = "auto", **epilogue: Any) -> Any:
        if isinstance(x, Tensor):
            rows, scale = quant.quantize(
                x.flatten(0, -2), dtype=FORMATS[self.takes], backend=backend
            )
            lead = x.shape[:-1]
        else:
            lead, rows, scale = x[0].shape[:-1], x[0].flatten(0, -2), x[1]
        y = gemm_w8a8(
            rows, self.weight, scale, self.weight_scale, bias=self.bias, backend=backend,
            out_dtype=self.bias.dtype, **epilogue,
        )  # fmt: skip
        if isinstance(y, Tensor):
            return y.unflatten(0, lead)
        return y[0].unflatten(0, lead), y[1]

    def gelu(self, x: Activation, backend: str, takes: str | None) -> Activation:
        """GELU of its result, in the format that the layer behind it takes."""
        return self(x, backend, epilogue="gelu", requantize=takes)

    def add(
        self, x: Tensor, h: Activation, gate: Tensor | None, backend: str
    ) -> tuple[Tensor, Update | None]:
        """x + gate * self(h), by the epilogue of the product; nothing is left to add."""
        total = self(
            h, backend, epilogue="gated_residual", residual=x.flatten(0, 1),
            gate=None if gate is None else gate.flatten(0, 1),
        )  # fmt: skip
        return total, None


def add_norm(x: Tensor, update: Update | None, **options: Any) -> tuple[Tensor, Activation]:
    """x with its update added, and the norm of that, in 8 bits with `quantize`."""
    if update is None:
        return x, norm.norm(x, **options)
    x, *y = norm.gated_residual_norm(x, *update, **options)
    return x, y[0] if len(y) == 1 else (y[0], y[1])


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
        self.q, self.k, self.v, self.o = (Linear(d, d) for _ in range(4))
        self.qkv: Linear8 | None = None  # in 8 bits: the three of them in one product
        self.norm_q, self.norm_k = RMSNormWeight(d), RMSNormWeight(d)
        self.proj_l: nn.Linear | None = None
        if sparse:
            self.add_projection(config.head_dim)

    def add_projection(self, head_dim: int, **where: Any) -> None:
        self.proj_l = nn.Linear(head_dim, head_dim, **where)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    @property
    def takes(self) -> str | None:
        return None if self.qkv is None else self.qkv.takes

    def project(self, y: Activation, backend: str) -> tuple[Tensor, ...]:
        """Raw q, k, v [B, L, C] of the normed tokens."""
        if self.qkv is None:
            return self.q(y), self.k(y), self.v(y)
        return self.qkv(y, backend).chunk(3, -1)

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
            self.k_img, self.v_img = (Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = RMSNormWeight(config.dim)

    @property
    def takes(self) -> str | None:
        return self.q.takes

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
            to_k(context, backend), None, num_heads=self.num_heads, norm_weight=norm.weight,
            eps=self.eps, backend=backend,
        )[0]  # fmt: skip
        return k, to_v(context, backend).unflatten(-1, (self.num_heads, -1))

    def add(
        self, x: Tensor, y: Activation, keys_values: tuple[Tensor, ...], backend: str
    ) -> tuple[Tensor, Update | None]:
        """x plus what its normed tokens y find in the context."""
        q = rope_kv.query(
            self.q(y, backend), None, num_heads=self.num_heads, norm_weight=self.norm_q.weight,
            eps=self.eps, backend=backend,
        )[0]  # (B, L, H, D)  # fmt: skip
        k, v, *image = keys_values
        out = self._attend(q, k, v, backend)
        if image:
            out = out + self._attend(q, image[0], image[1], backend)
        return self.o.add(x, out.reshape(x.shape), None, backend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        rows = q.reshape(k.shape[0], -1, *q.shape[2:])  # one row per context
        out = attention.attention(rows, k.to(q.dtype), v.to(q.dtype), backend=backend)
        return cast(Tensor, out).reshape(q.shape)  # no lse was asked for


class FeedForward(nn.Sequential):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(
            Linear(inputs, hidden), nn.GELU(approximate="tanh"), Linear(hidden, outputs)
        )

    @property
    def takes(self) -> str | None:
        return self[0].takes

    def add(
        self, x: Tensor, y: Activation, gate: Tensor, backend: str
    ) -> tuple[Tensor, Update | None]:
        """x + gate * mlp(y)."""
        up, _, down = self
        return down.add(x, up.gelu(y, backend, down.takes), gate, backend)


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
