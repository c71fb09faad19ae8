# SPDX-License-Identifier: Apache-2.0
"""Model geometry: the one place where a number of the architecture is written down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparseLinear:
    """Sparse-linear attention in place of dense self-attention (SLA, arXiv 2509.24006).

    Attributes:
        topk: share of a full window's key blocks that a block of queries attends to, at least one.
        over: which blocks the linear branch sums: "all", "unselected" or "marginal".
        phi: its feature map: "softmax", "elu" or "relu".
    """

    topk: float
    over: str = "all"
    phi: str = "softmax"

    def __post_init__(self) -> None:
        if not 0 < self.topk <= 1:
            raise ValueError(f"topk: expected a share in (0, 1], got {self.topk}")

    @property
    def summaries(self) -> str:
        """What of them a cache keeps: over all blocks their sum in each latent frame will do."""
        return "slot" if self.over == "all" else "block"


@dataclass(frozen=True)
class ModelConfig:
    """Wan's diffusion transformer.

    Attributes:
        dim, num_heads, ffn_dim, num_layers: width, heads, hidden width of the MLP, depth.
        in_channels, out_channels: channels of a latent frame.
        patch: latent rows and columns per token (time is never patched).
        text_dim: width of the cross-attention context before its embedding.
        text_len: rows that a context is padded to with zeros before its embedding, as Wan was
            trained (an embedded zero row is not zero, and is attended to); 0 pads nothing.
        image_dim: width of the picture's CLIP features, a second context of Wan 2.1's
            image-to-video checkpoints; 0 where there is none.
        freq_dim: width of the sinusoidal timestep embedding.
        prediction: "velocity" (noise - x0, Wan) or "x0" (the miniature: a token of clean data has
            far fewer degrees of freedom than one of noise; Li and He, arXiv 2511.13720).
        shift: flow-matching shift of the denoising schedule.
        chunk, window: latent frames generated together, and visible in all (current included).
        sla: sparse-linear self-attention, with a projection of its own per layer; None: dense.
    """

    name: str
    dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int] = (2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    prediction: str = "velocity"
    shift: float = 5.0
    chunk: int = 3
    window: int = 21
    text_len: int = 0
    image_dim: int = 0
    sla: SparseLinear | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads: expected a divisor of dim {self.dim} with an even head width, "
                f"got {self.num_heads}"
            )
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction: expected 'velocity' or 'x0', got {self.prediction!r}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


PRESETS = {
    c.name: c
    for c in (
        ModelConfig("wan-1.3b", 1536, 12, 8960, 30, 16, 16, text_len=512),
        ModelConfig("wan-5b", 3072, 24, 14336, 30, 48, 48, text_len=512),
        ModelConfig("wan-14b", 5120, 40, 13824, 40, 16, 16, text_len=512),
        ModelConfig(
            "miniature", 192, 3, 768, 6, 64, 64,
            text_dim=48, prediction="x0", chunk=2, window=9,
        ),
    )
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset of that name.

    Raises:
        ValueError: unknown name; the message lists the presets.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
