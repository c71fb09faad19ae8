# SPDX-License-Identifier: Apache-2.0
"""The stream's memory: keys and values of past latent frames, written in place, never moved.

Every layer owns `rope_kv.KVCache` slots, one per latent frame, in four regions:

    | kept       | first latent frames of the stream (picture, first state), for ever      |
    | clean ring | history from the cache pass (t = 0)                                     |
    | noisy ring | history from denoising step `noisy_step` (TwinCache), at no extra pass  |
    | scratch    | the chunk being denoised, where no ring wants it                        |

Latent frame p of the stream (the picture is frame 0) lives in slot p while p < kept, and in ring
slot (p - kept) % ring after that.  Keys carry the rotation of p; where the layout repositions, the
query is rotated once more for the kept slots, to where it stands in the window:
q.k depends on the difference only.  All of this is computed on the device from one counter, so
filling and steady state are the same operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from reeltime import attention, rope_kv, sla

from .config import ModelConfig
from .layers import SelfAttention
from .layout import StreamLayout

PASSES = ("intermediate", "noisy", "final", "cache")

# How keys and values are stored: the format of rope_kv.make_cache, and the dtype of values in it.
KV_FORMATS: dict[str, tuple[str, torch.dtype | None]] = {
    "plain": ("plain", None),
    "int8, v fp16": ("int8", torch.float16),
    "int8, v fp8": ("int8", torch.float8_e4m3fn),
}


@dataclass
class Plan:
    """Where one pass writes and what it reads; everything a tensor on the device."""

    write_slots: Tensor  # [F] int64
    block_table: Tensor  # [T] int64, -1 where there is nothing yet
    offset_index: Tensor  # [T] int64, which rotation of the query scores that slot
    key_table: Tensor | None  # [F * N, D / 2, 2], None: keys are stored raw
    query_table: Tensor  # [O, F * N, D / 2, 2]
    cache_table: Tensor | None  # [T * N, D / 2, 2]: rotation on read (rope_on_cache)


class StreamMemory:
    """Ring cache of all layers, and the plan of each pass.  Implements `transformer.Memory`.

    Args:
        config, layout: geometry and what is visible.
        grid: tokens per latent frame, (rows, columns).
        batch: streams side by side.
        rope_on_cache: store raw keys and rotate the whole window on every pass (the published
            way) instead of moving the query.
        kv_format: one of `KV_FORMATS`; "plain" stores keys and values as `dtype`.
        backend: kernel backend of rope_kv and attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: StreamLayout,
        grid: tuple[int, int],
        batch: int = 1,
        *,
        rope_on_cache: bool = False,
        kv_format: str = "plain",
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.layout, self.grid, self.backend = config, layout, grid, backend
        self.rope_on_cache = rope_on_cache
        if rope_on_cache and config.sla is not None:
            raise ValueError(
                "rope_on_cache: expected False with sparse-linear attention, got True. Summaries "
                "of rotated keys are cached, so the query is moved instead."
            )
        if kv_format not in KV_FORMATS:
            raise ValueError(
                f"kv_format: expected one of {', '.join(map(repr, KV_FORMATS))}, got {kv_format!r}"
            )
        self.kv_format = kv_format
        format, values = KV_FORMATS[kv_format]
        if rope_on_cache and format != "plain":
            raise ValueError(
                f"rope_on_cache: expected False with kv_format {kv_format!r}, got True. Keys in 8 "
                "bits are scored as they are stored, so the query is moved instead."
            )
        self.kept = layout.window - layout.chunk - layout.capacity("history")
        self.history = layout.capacity("history")
        self.ring = self.history + layout.chunk
        self.clean_base = self.kept
        self.noisy_base = self.clean_base + self.ring
        self.scratch = self.noisy_base + (self.ring if layout.twin else 0)
        tokens = grid[0] * grid[1]
        self.caches = [
            rope_kv.make_cache(
                batch,
                self.scratch + layout.chunk,
                tokens,
                config.num_heads,
                config.head_dim,
                format=format,
                dtype=dtype if values is None else values,
                device=device,
                summaries=config.sla.summaries if config.sla else None,
                phi=config.sla.phi if config.sla else "softmax",
            )
            for _ in range(config.num_layers)
        ]
        self.device = torch.device(device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)  # next latent frame
        self.plan: Plan | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, constant over a stream of any length."""
        return sum(c.nbytes() for c in self.caches)

    def _slot(self, p: Tensor, base: int) -> Tensor:
        """The slot of latent frame p, its history in the ring that starts at base."""
        return torch.where(p < self.kept, p, base + (p - self.kept) % self.ring)

    def make_plans(self, frames: int | None = None) -> dict[str, Plan]:
        """The plan of every kind of pass (see `PASSES`) over the next `frames` latent frames.

        No host synchronisation: `position` stays on the device.
        """
        frames = self.layout.chunk if frames is None else frames
        step = torch.arange(frames, device=self.device)
        current = self.position + step  # (F,) positions in the stream
        kept = torch.arange(self.kept, device=self.device)
        past = self.position - self.history + torch.arange(self.history, device=self.device)
        kept_slots = torch.where(kept < self.position, kept, -1)
        old = past >= self.kept
        clean = torch.where(old, self._slot(past, self.clean_base), -1)
        own_clean, own_scratch = self._slot(current, self.clean_base), self.scratch + step
        noisy, own_noisy = clean, own_scratch
        if self.layout.twin:
            noisy = torch.where(old, self._slot(past, self.noisy_base), -1)
            ring = self._slot(current, self.noisy_base)
            own_noisy = torch.where(current < self.kept, own_scratch, ring)

        # In the window the chunk stands at most behind kept frames and history: what lies
        # between those two in the stream has been forgotten.
        shift = (self.position - self.kept - self.history).clamp(min=0)
        if not self.layout.repositioned:
            shift = torch.zeros_like(shift)
        key_table = cache_table = None
        if self.rope_on_cache:
            query_table = self._table(current - shift)[None]
            cache_table = self._table(torch.cat([kept, past - shift, current - shift]))
        elif self.layout.repositioned:
            query_table = self._table(torch.stack([current, current - shift]))
            key_table = query_table[0]
        else:
            query_table = self._table(current)[None]
            key_table = query_table[0]
        offset_index = torch.zeros(
            self.kept + self.history + frames, dtype=torch.int64, device=self.device
        )
        if query_table.shape[0] > 1:
            offset_index[: self.kept] = 1
        seen = {
            "intermediate": (noisy, own_scratch),
            "noisy": (noisy, own_noisy),
            "final": (clean, own_scratch),
            "cache": (clean, own_clean),
        }
        return {
            kind: Plan(
                own,
                torch.cat([kept_slots, history, own]),
                offset_index,
                key_table,
                query_table,
                cache_table,
            )
            for kind, (history, own) in seen.items()
        }

    def _table(self, positions: Tensor) -> Tensor:
        return rope_kv.rope_table(
            positions, self.grid, self.config.head_dim, self.config.rope_theta
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attn: SelfAttention) -> Tensor:
        plan, cache = self.plan, self.caches[layer]
        if plan is None:
            raise RuntimeError("StreamMemory: set `plan` before a forward pass")
        common: dict[str, Any] = {
            "num_heads": attn.num_heads,
            "eps": attn.eps,
            "backend": self.backend,
        }
        rope_kv.write(
            k, v, cache, plan.write_slots, table=plan.key_table, norm_weight=attn.norm_k.weight,
            **common,
        )  # fmt: skip
        sparse = self.config.sla
        low = cache.format == "int8" and sparse is None  # segment_sla rounds its query itself
        query = rope_kv.query(
            q, plan.query_table, norm_weight=attn.norm_q.weight,
            quantize="int8" if low else None, **common,
        )  # fmt: skip
        rotated, q_int8, q_scale = query if low else (query, None, None)
        table = plan.block_table
        if plan.cache_table is not None:
            cache, table = self._rotate_window(cache, plan)
        where = (rotated, cache, table, plan.offset_index)
        if sparse is not None:
            return sla.segment_sla(
                *where, topk=sparse.topk, over=sparse.over, backend=self.backend, **attn.projection
            ).flatten(2)
        out = attention.segment_attention(
            *where, q_int8=q_int8, q_scale=q_scale, backend=self.backend
        )
        return cast(Tensor, out).flatten(2)  # no lse was asked for

    def _rotate_window(self, cache: rope_kv.KVCache, plan: Plan) -> tuple[rope_kv.KVCache, Tensor]:
        """The window's raw keys rotated to where they stand now: T slots in window order."""
        index = plan.block_table.clamp(min=0)
        keys = cache.k.index_select(1, index)
        keys = rope_kv.rope_on_cache(keys, plan.cache_table, backend=self.backend)
        order = torch.arange(index.shape[0], device=index.device)
        table = torch.where(plan.block_table < 0, -1, order)
        return replace(cache, k=keys, v=cache.v.index_select(1, index)), table


class DenseMemory:
    """A whole sequence at once, nothing kept: offline generation, and the oracle of the stream.

    Args:
        positions: [F] int64, where each latent frame stands in time.
        grid: tokens per latent frame, (rows, columns).
        config: geometry.
        mask: [F, F] bool, mask[i, j] = frame i sees frame j; None sees all.
    """

    def __init__(
        self,
        positions: Tensor,
        grid: tuple[int, int],
        config: ModelConfig,
        mask: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        self.table = rope_kv.rope_table(
            positions, grid, config.head_dim, config.rope_theta, dtype=dtype
        )[None]
        self.backend, tokens = backend, grid[0] * grid[1]
        self.mask = None
        if mask is not None:
            self.mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attn: SelfAttention) -> Tensor:
        q, k = (
            rope_kv.query(
                x, self.table, num_heads=attn.num_heads, norm_weight=w.weight, eps=attn.eps,
                backend=self.backend,
            )[0]
            for x, w in ((q, attn.norm_q), (k, attn.norm_k))
        )  # fmt: skip
        v = v.unflatten(-1, (attn.num_heads, -1))
        out = attention.attention(q, k, v, mask=self.mask, backend=self.backend)
        return cast(Tensor, out).flatten(2)
