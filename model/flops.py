# SPDX-License-Identifier: Apache-2.0
"""Work of a stream: operations and the fewest bytes, of one pass and of a whole chunk.

Built from the families' own `flops` and `bytes`, op by op as `transformer.py` runs them, so that a
floor for the step is the sum of the floors of its kernels.  Matrix products that are not quantised
read both operands and write the result once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from reeltime import attention, gemm_w8a8, norm, quant, rope_kv, sla

from .config import ModelConfig, SparseLinear
from .kv_cache import StreamMemory
from .layout import StreamLayout

QUANTIZE = (None, "int8", "fp8")
CACHES = ("plain", "int8")
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes of an element


@dataclass(frozen=True)
class Work:
    """All calls of one op: what it is, the family that runs it, and how much that is."""

    name: str
    family: str
    calls: int
    flops: int
    bytes: int

    def times(self, count: int) -> Work:
        return replace(
            self,
            calls=count * self.calls,
            flops=count * self.flops,
            bytes=count * self.bytes,
        )


def flops(works: Iterable[Work], *families: str) -> int:
    """Operations in all, or of these families only."""
    return sum(w.flops for w in works if not families or w.family in families)


def bytes(works: Iterable[Work], *families: str) -> int:
    """Bytes in all, or of these families only."""
    return sum(w.bytes for w in works if not families or w.family in families)


@dataclass(frozen=True)
class Workload:
    """A stream whose work is counted.

    Attributes:
        config, layout: the model and what its passes see.
        size: rows and columns of a latent frame (68 x 120 for 960 x 544 pixels).
        batch: streams side by side.
        position: latent frames generated so far; None is the steady state of a full window.
        context_tokens: of the cross-attention context; None is the model's text_len.
        contexts: 1 if all latent frames of a chunk share one, or one for each of them.
        share: of the blocks of keys that sparse-linear attention selects; None attends to all.
        quantize: format of the blocks' linear layers, "int8" or "fp8"; None is `itemsize` bytes.
        cache: "plain", or "int8": keys and values of one byte.
        itemsize: bytes of an activation, a weight and a plain key.
    """

    config: ModelConfig
    layout: StreamLayout
    size: tuple[int, int]
    batch: int = 1
    position: int | None = None
    context_tokens: int | None = None
    contexts: int = 1
    share: float | None = None
    quantize: str | None = None
    cache: str = "plain"
    itemsize: int = 2

    def __post_init__(self) -> None:
        (p, q), (rows, columns) = self.config.patch, self.size
        if rows < 1 or columns < 1 or rows % p or columns % q:
            raise ValueError(
                f"size: expected rows and columns in whole patches of {p} x {q}, "
                f"got {rows} x {columns}"
            )
        if self.contexts not in (1, self.layout.chunk):
            raise ValueError(f"contexts: expected 1 or {self.layout.chunk}, got {self.contexts}")
        for name, low in (("batch", 1), ("position", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        if self.itemsize not in DTYPES:
            raise ValueError(f"itemsize: expected 2, 4 or 8, got {self.itemsize}")
        if self._context_tokens < 1:
            raise ValueError(f"context_tokens: expected at least 1, got {self.context_tokens}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {self.share}")
        if self.quantize not in QUANTIZE:
            raise ValueError(f"quantize: expected one of {QUANTIZE}, got {self.quantize!r}")
        if self.cache not in CACHES:
            raise ValueError(f"cache: expected one of {CACHES}, got {self.cache!r}")
        if self.layout.compressed and (self.cache != "plain" or self.share is not None):
            raise ValueError(
                f"layout: {self.layout.name} merges raw keys: expected a plain cache and no share, "
                f"got cache {self.cache!r} and share {self.share}"
            )

    @property
    def _context_tokens(self) -> int:
        return self.config.text_len if self.context_tokens is None else self.context_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per latent frame, (rows, columns)."""
        return self.size[0] // self.config.patch[0], self.size[1] // self.config.patch[1]

    @property
    def tokens(self) -> int:
        """Tokens of a chunk: the queries of a pass."""
        return self.layout.chunk * self.grid[0] * self.grid[1]

    @property
    def visible_tokens(self) -> int:
        """Tokens that a query sees: the keys of a pass."""
        return self.visible_frames * self.grid[0] * self.grid[1]

    @property
    def visible_frames(self) -> int:
        """Latent frames that a query sees."""
        layout, position = self.layout, self.position
        return layout.window if position is None else layout.visible(position)

    @property
    def window_bytes(self) -> int:
        """Keys and values that a pass reads, of all layers."""
        item = 1 if self.cache == "int8" else self.itemsize
        return (
            2 * self.config.num_layers * self.batch * self.visible_tokens * self.config.dim * item
        )

    @property
    def cache_bytes(self) -> int:
        """The plain cache of a stream, every region of it, as it is allocated."""
        memory = StreamMemory(
            self.config,
            self.layout,
            self.grid,
            self.batch,
            dtype=DTYPES[self.itemsize],
            device="meta",
        )
        return memory.nbytes

    def denoising_pass(self) -> list[Work]:
        """One pass over a chunk: a denoising step, or the cache pass."""
        c, item, batch, tokens = self.config, self.itemsize, self.batch, self.tokens
        d, heads, layers, chunk = c.dim, c.num_heads, c.num_layers, self.layout.chunk
        offsets = 2 if self.layout.repositioned and not self.layout.compressed else 1
        kv_item = 1 if self.cache == "int8" else item
        row = (batch, tokens, heads, c.head_dim)
        seen = (batch, tokens, self.visible_tokens, heads, c.head_dim)
        read = (batch * self.contexts, tokens // self.contexts, self._context_tokens)
        cross = (*read, heads, c.head_dim)
        per_patch = c.patch[0] * c.patch[1]
        summaries = None if self.share is None else (c.sla or SparseLinear(self.share)).summaries
        if self.share is None:
            self_attention = Work(
                "self_attention",
                "attention",
                layers,
                layers * attention.flops(*seen),
                layers
                * attention.bytes(*seen, itemsize=item, kv_itemsize=kv_item, offsets=offsets),
            )
        else:
            self_attention = Work(
                "self_attention",
                "sla",
                layers,
                layers * sla.flops(*seen, share=self.share),
                layers
                * sla.bytes(
                    *seen,
                    share=self.share,
                    itemsize=item,
                    kv_itemsize=kv_item,
                    summaries=summaries,
                    slots=self.visible_frames,
                ),
            )
        works = [
            self._linear("patch_embedding", batch * tokens, d, c.in_channels * per_patch),
            self._linear("time_embedding", batch * chunk, d, c.freq_dim),
            self._linear("time_embedding", batch * chunk, d, d),
            self._linear("time_projection", batch * chunk, 6 * d, d),
            self._norm("norm", 1, gated=False),
            # Three per block and one before the head, less the first, which has no residual to add.
            self._norm("gated_residual_norm", 3 * layers, gated=True),
            self._quantised("qkv", 3 * d, d),
            Work(
                "write",
                "rope_kv",
                layers,
                layers * rope_kv.flops(*row),
                layers
                * rope_kv.bytes(
                    *row,
                    op="write",
                    itemsize=item,
                    format=self.cache,
                    summaries=summaries,
                    slots=chunk,
                ),
            ),
            Work(
                "query",
                "rope_kv",
                layers,
                layers * rope_kv.flops(*row, offsets=offsets),
                layers * rope_kv.bytes(*row, offsets=offsets, itemsize=item),
            ),
            *([self.rotation()] if self.layout.compressed else []),
            self_attention,
            *self._requantise(),
            self._quantised("self_out", d, d),
            self._quantised("cross_query", d, d),
            self._unrotated("cross_norm", layers, *row),
            Work(
                "cross_attention",
                "attention",
                layers,
                layers * attention.flops(*cross),
                layers * attention.bytes(*cross, itemsize=item, kv_itemsize=item),
            ),
            *self._requantise(),
            self._quantised("cross_out", d, d),
            self._quantised("fc1", c.ffn_dim, d, requantize=self.quantize),
            self._quantised("fc2", d, c.ffn_dim),
            self._linear("head", batch * tokens, per_patch * c.out_channels, d),
        ]
        return works

    def rotation(self) -> Work:
        """A pass's window of keys, rotated when it is read."""
        c = self.config
        row = (self.batch, self.visible_tokens, c.num_heads, c.head_dim)
        moved = rope_kv.bytes(*row, op="rope_on_cache", itemsize=self.itemsize)
        count = rope_kv.flops(*row) - 4 * self.visible_tokens * self.batch * c.dim  # no norm
        return Work("rope_on_cache", "rope_kv", 1, count, moved).times(c.num_layers)

    def compression(self) -> list[Work]:
        """What a chunk adds to memory: keys and values of all caches, some frames made of more."""
        layout, c = self.layout, self.config
        if not layout.compressed:
            return []
        memory = layout.capacity("memory")
        frame = 2 * self.batch * self.grid[0] * self.grid[1] * c.dim  # elements
        read, written = (n * layout.steps * frame for n in (memory * layout.every, memory))
        work = Work("compress", "rope_kv", 1, 2 * read, (read + written) * self.itemsize)
        return [work.times(c.num_layers)]

    def conditioning(self) -> list[Work]:
        """What a new context costs: its embedding, and its keys and values in every layer."""
        c, d, layers = self.config, self.config.dim, self.config.num_layers
        rows = self.batch * self.contexts
        tokens = rows * self._context_tokens
        row = (rows, self._context_tokens, c.num_heads, c.head_dim)
        return [
            self._linear("text_embedding", tokens, d, c.text_dim),
            self._linear("text_embedding", tokens, d, d),
            self._linear("cross_key_value", tokens, 2 * d, d).times(layers),
            self._unrotated("context_norm", layers, *row),
        ]

    def chunk(self, steps: int, *, cache_pass: bool = True, new_context: bool = True) -> list[Work]:
        """A whole chunk, without the codec: denoising steps, cache pass, conditioning."""
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        works = [w.times(steps + cache_pass) for w in self.denoising_pass()]
        return works + self.compression() + (self.conditioning() if new_context else [])

    def _linear(self, name: str, m: int, n: int, k: int) -> Work:
        """A matrix product in `itemsize` bytes."""
        moved = (m * k + n * k + m * n) * self.itemsize
        return Work(name, "gemm", 1, gemm_w8a8.flops(m, n, k), moved)

    def _quantised(self, name: str, n: int, k: int, requantize: str | None = None) -> Work:
        """A linear layer of the blocks, in 8 bits where they are quantised."""
        m, layers = self.batch * self.tokens, self.config.num_layers
        if self.quantize is None:
            return self._linear(name, m, n, k).times(layers)
        moved = gemm_w8a8.bytes(m, n, k, itemsize=self.itemsize, requantize=requantize)
        return Work(name, "gemm_w8a8", layers, gemm_w8a8.flops(m, n, k) * layers, moved * layers)

    def _norm(self, name: str, calls: int, *, gated: bool) -> Work:
        """A norm over the residual stream, which also quantises for the linear layer behind it."""
        size = (self.batch, self.tokens, self.config.dim)
        moved = norm.bytes(
            *size,
            frames=self.layout.chunk,
            itemsize=self.itemsize,
            gated=gated,
            quantize=self.quantize,
        )
        return Work(name, "norm", calls, calls * norm.flops(*size, gated=gated), calls * moved)

    def _requantise(self) -> list[Work]:
        """What attention returned, quantised for the projection behind it."""
        if self.quantize is None:
            return []
        m, d = self.batch * self.tokens, self.config.dim
        work = Work(
            "quantize", "quant", 1, quant.flops(m, d), quant.bytes(m, d, itemsize=self.itemsize)
        )
        return [work.times(self.config.num_layers)]

    def _unrotated(self, name: str, layers: int, B: int, L: int, H: int, D: int) -> Work:
        """RMSNorm of cross-attention's queries or keys: rope_kv without a rotation."""
        moved = 2 * B * L * H * D * self.itemsize
        count = rope_kv.flops(B, L, H, D, offsets=0)
        return Work(name, "rope_kv", layers, layers * count, layers * moved)
