# SPDX-License-Identifier: Apache-2.0
"""A window of cached segments, filled by the op under test, and in float64 what it stands for.

Slots lie in any order, one entry is absent, and the reference is scored by a query of its own
rotation: what a step of a stream sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime import rope_kv
from reeltime.bench.accuracy.inputs import DTYPES, Inputs, exact

HEADS, DIM, THETA, EPS = 2, 64, 10000.0, 1e-6
GRIDS = {"single_token": (1, 1), "ragged": (7, 10), "long": (16, 32)}
GRIDS |= {"160k_keys": (32, 64), "constant": (8, 16), "zero_block": (8, 16)}
FRAMES = {"single_token": 1, "long": 8, "160k_keys": 80}
FIRST = {"long": 1_000_000}  # position of the oldest frame in the stream
GAP, MOVED = 5, 3  # frames


def angles(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """[F] -> [F * h * w, D / 2]: pair by pair, from the definition."""
    height, width = grid
    spatial = 2 * (DIM // 6)
    pairs = [("t", i, DIM - 2 * spatial) for i in range((DIM - 2 * spatial) // 2)]
    pairs += [(axis, i, spatial) for axis in "yx" for i in range(spatial // 2)]
    place = torch.cartesian_prod(
        positions.double(), torch.arange(height).double(), torch.arange(width).double()
    ).reshape(-1, 3)
    columns = [place[:, "tyx".index(axis)] / THETA ** (2 * i / size) for axis, i, size in pairs]
    return torch.stack(columns, -1)


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """[B, L, H, D] by [L, D / 2]: each pair (a, b) turned by its angle."""
    a, b, angle = x[..., 0::2], x[..., 1::2], angle.unsqueeze(1)
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.stack(turned, -1).flatten(-2)


def heads(x: Tensor, weight: Tensor | None) -> Tensor:
    """[B, L, C] -> [B, L, H, D], RMSNorm over the full width."""
    y = x if weight is None else F.rms_norm(x, x.shape[-1:], eps=EPS) * weight
    return y.unflatten(-1, (HEADS, DIM))


class Window:
    """Frames in a cache, the first of them the reference; `lists` is what one query block sees."""

    def __init__(
        self,
        inputs: Inputs,
        format: str = "plain",
        dtype: str = "float32",
        *,
        summaries: str | None = None,
    ) -> None:
        self.inputs, self.format = inputs, format
        self.grid = GRIDS.get(inputs.kind, (8, 8))
        self.frames = FRAMES.get(inputs.kind, 4)
        self.tokens = self.grid[0] * self.grid[1]
        first = FIRST.get(inputs.kind, 0)
        # The reference, a gap of frames that left the window, and the rest.
        self.positions = torch.arange(self.frames) + first + GAP * (torch.arange(self.frames) > 0)
        self.storage = dtype if format == "plain" else "float32"  # of projections and queries
        channels, length = HEADS * DIM, self.frames * self.tokens
        put = self.put
        self.k, self.v = (put(inputs.draw(n, 1, length, channels)) for n in "kv")
        self.q = put(inputs.draw("q", 1, self.tokens, channels))
        self.weight = put(1 + 0.1 * inputs.normal("norm_weight", channels))
        self.slots = torch.randperm(
            self.frames + 2, generator=torch.Generator().manual_seed(inputs.seed)
        )[: self.frames].to(inputs.device)
        stored = {"float16": "float16", "fp16": "float16"}.get(dtype, dtype)
        self.cache = rope_kv.make_cache(
            1,
            self.frames + 2,
            self.tokens,
            HEADS,
            DIM,
            format=format,
            dtype=torch.float8_e4m3fn if stored == "fp8" else DTYPES[stored],
            device=inputs.device,
            summaries=summaries,
        )
        self.table = rope_kv.rope_table(
            self.positions.to(inputs.device), self.grid, DIM, dtype=self.wide
        )
        # The newest frame asks; the reference has moved closer to it, the others have not.
        self.asks = self.positions[-1:] - torch.tensor([[0], [MOVED]])
        absent = torch.tensor([-1], device=inputs.device)
        self.block_table = torch.cat([self.slots[:1], absent, self.slots[1:]])
        self.offset_index = torch.tensor([1] + [0] * self.frames, device=inputs.device)
        self.lists = (self.block_table, self.offset_index)
        rope_kv.write(
            self.k,
            self.v,
            self.cache,
            self.slots,
            table=self.table,
            norm_weight=self.weight,
            num_heads=HEADS,
            backend=inputs.backend,
        )

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.storage == "float64" else torch.float32

    def put(self, x: Tensor) -> Tensor:
        return self.inputs.put(x, self.storage)

    def queries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated once per offset; also in INT8 with its scale."""
        table = rope_kv.rope_table(
            self.asks.to(self.inputs.device), self.grid, DIM, dtype=self.wide
        )
        options = {"num_heads": HEADS, "norm_weight": self.weight, "backend": self.inputs.backend}
        return rope_kv.query(self.q, table, quantize="int8", **options)

    # --- In float64 -----------------------------------------------------------------------------

    def keys(self) -> Tensor:
        """[1, F * N, H, D]: normed and rotated to where they were written."""
        return rotated(heads(exact(self.k), exact(self.weight)), angles(self.positions, self.grid))

    def values(self) -> Tensor:
        return heads(exact(self.v), None)

    def asked(self) -> Tensor:
        """[2, N, H, D]: the query for each of the two offsets."""
        query = heads(exact(self.q), exact(self.weight))
        return torch.cat([rotated(query, angles(at, self.grid)) for at in self.asks])

    def equation(self) -> tuple[Tensor, Tensor, Tensor]:
        """One query [1, N, H, D] and the keys and values that it sees: the reference's keys are
        rotated to where its offset puts them, which is the published way."""
        moved = self.positions.clone()
        moved[0] += MOVED
        keys = rotated(heads(exact(self.k), exact(self.weight)), angles(moved, self.grid))
        return self.asked()[:1], keys, self.values()
