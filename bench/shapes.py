# SPDX-License-Identifier: Apache-2.0
"""The sizes that kernels are measured at: Wan's transformer, and tiny ones for a laptop."""

from __future__ import annotations

from dataclasses import dataclass

from reeltime.model.config import ModelConfig, preset


@dataclass(frozen=True)
class Tokens:
    """Latent frames of grid[0] x grid[1] tokens."""

    frames: int
    grid: tuple[int, int]

    @property
    def per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def total(self) -> int:
        return self.frames * self.per_frame


@dataclass(frozen=True)
class Sizes:
    name: str
    rows: tuple[Tokens, ...]  # M of norms, products and cache writes
    chunk: Tokens  # the queries of a pass; one of `rows`
    window: Tokens  # the keys that they see
    layers: tuple[ModelConfig, ...]  # widths of norms and products
    heads: ModelConfig  # heads and head width of cache and attention


GRID = (34, 60)  # of a latent frame of 960 x 544 pixels
CHUNK = Tokens(3, GRID)

# One latent frame of 832 x 480 pixels; a chunk; two of them, where a cache pass rides along with
# the next chunk's first step; four.
DIT = Sizes(
    "dit",
    rows=(Tokens(1, (30, 52)), CHUNK, Tokens(6, GRID), Tokens(12, GRID)),
    chunk=CHUNK,
    window=Tokens(preset("wan-1.3b").window, GRID),
    layers=(preset("wan-1.3b"), preset("wan-14b")),
    heads=preset("wan-1.3b"),
)

# No tile divides these: every kernel also runs its tails.
RAGGED = (7, 11)
TINY = Sizes(
    "tiny",
    rows=(Tokens(1, RAGGED), Tokens(2, RAGGED)),
    chunk=Tokens(2, RAGGED),
    window=Tokens(4, RAGGED),
    layers=(ModelConfig("tiny", 208, 2, 336, 1, 16, 16),),
    heads=ModelConfig("tiny", 256, 2, 336, 1, 16, 16),
)

SIZES = {sizes.name: sizes for sizes in (TINY, DIT)}
