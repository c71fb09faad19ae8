# SPDX-License-Identifier: Apache-2.0
"""The stream's memory: keys and values of past latent frames, written in place, never moved.

Every layer owns `rope_kv.KVCache` slots, one per latent frame, in four regions:

    | kept       | first latent frames of the stream (picture, first state), for ever      |
    | clean ring | history from the cache pass (t = 0)                                     |
    | noisy ring | history from denoising step `noisy_step` (TwinCache), at no extra pass  |
    | scratch    | the chunk being denoised, where no ring wants it                        |

or, where every denoising step has a cache of its own, the kept frames that all of them share, and a
region for each step: its kept frames, its ring and its memory.

Latent frame p of the stream (the picture is frame 0) lives in slot p while p < kept, and in ring
slot (p - kept) % ring after that.  A frame that will be promoted is known when it is written: it
has a longer ring from the start, so that promoting it moves nothing.  Keys carry the rotation of p;
where the layout repositions, the query is rotated once more for the kept slots, to where it stands
in the window: q.k depends on the difference only.  All of this is computed on the device from one
counter, so filling and steady state are the same operations.

Keys that are merged with others (`compress`) are raw, and rotated on read: a mean of rotated keys
is no rotated mean.
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

PASSES = ("intermediate", "noisy", "final", "cache")  # or a kind for each step with its own cache

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
        self.rope_on_cache = rope_on_cache or layout.compressed
        if layout.compressed and (config.sla is not None or kv_format != "plain"):
            what = f"kv_format {kv_format!r}" if config.sla is None else "sparse-linear attention"
            raise ValueError(
                f"layout: expected none that compresses with {what}, got {layout.name!r}. Merged "
                "keys are raw and rotated on read: kv_format 'plain' and dense attention work."
            )
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
        self.kept = layout.capacity("picture", "first_state")
        self.memory, self.history = layout.capacity("memory"), layout.capacity("history")
        self.shared = self.kept - sum(
            s.capacity for s in layout.segments if s.evict == "keep" and s.cache == "step"
        )
        # In the order of a region: kept frames, the ring of those that will be promoted, that of
        # all others, and memory twice: the frames that are merged and those that come of it.
        live, every = self.history + layout.chunk, layout.every
        self.promoted = self.memory + -(-live // every) if layout.evict == "promote" else 0
        self.ring = live - live // every if self.promoted else live
        merged = 2 * self.memory if layout.compressed else 0
        self.region = self.kept - self.shared + self.promoted + self.ring + merged
        count = layout.steps if layout.stepped else 1 + layout.twin
        self.bases = [self.shared + i * self.region for i in range(count)]
        self.clean_base, self.noisy_base = self.bases[0], self.bases[-1]
        self.scratch = self.shared + count * self.region
        slots = self.scratch + (0 if layout.stepped else layout.chunk)
        self.kinds = tuple(f"step {i}" for i in range(count)) if layout.stepped else PASSES
        tokens = grid[0] * grid[1]
        self.caches = [
            rope_kv.make_cache(
                batch,
                slots,
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

    @property
    def lasting(self) -> tuple[str, ...]:
        """Kinds of passes whose keys and values are history."""
        if self.layout.stepped:
            return self.kinds
        return ("noisy", "cache") if self.layout.twin else ("cache",)

    def _slot(self, p: Tensor, base: int) -> Tensor:
        """The slot of latent frame p in the region that starts at base."""
        ring, since = base + self.kept - self.shared, p - self.kept
        slot = ring + self.promoted
        if self.promoted:
            turn = (since + 1) // self.layout.every  # the promoted ones up to p
            last = (since + 1) % self.layout.every == 0
            slot = torch.where(
                last, ring + (turn - 1) % self.promoted, slot + (since - turn) % self.ring
            )
        else:
            slot = slot + since % self.ring
        return torch.where(p < self.kept, torch.where(p < self.shared, p, ring + since), slot)

    def _merged(self, base: int, before: int = 0) -> Tensor:
        """Slots of the memory that was merged for this chunk, or for one before."""
        turn = (self.position // self.layout.chunk - before) % 2
        index = torch.arange(self.memory, device=self.device)
        return base + self.region + (turn - 2) * self.memory + index

    def _remembered(self) -> tuple[Tensor, Tensor]:
        """Where memory's latent frames stand in the stream, and which of them there are."""
        layout, age = self.layout, torch.arange(self.memory, device=self.device).flip(0)
        left = self.position - self.kept - self.history  # the history, so far
        if layout.compressed:  # as if each were one frame, right behind the history
            return self.position - self.history - 1 - age, age * layout.every < left
        turn = left // layout.every - age
        return self.kept + turn * layout.every - 1, turn > 0

    def make_plans(self, frames: int | None = None) -> dict[str, Plan]:
        """The plan of every kind of pass (see `kinds`) over the next `frames` latent frames.

        No host synchronisation: `position` stays on the device.
        """
        frames = self.layout.chunk if frames is None else frames
        step = torch.arange(frames, device=self.device)
        current = self.position + step  # (F,) positions in the stream
        kept = torch.arange(self.kept, device=self.device)
        past = self.position - self.history + torch.arange(self.history, device=self.device)
        memory, there = self._remembered()

        def behind(base: int) -> Tensor:
            old = self._merged(base) if self.layout.compressed else self._slot(memory, base)
            parts = (self._slot(kept, base), old, self._slot(past, base))
            exist = torch.cat([kept < self.position, there, past >= self.kept])
            return torch.where(exist, torch.cat(parts), -1)

        if self.layout.stepped:
            seen = {
                kind: (behind(base), self._slot(current, base))
                for kind, base in zip(self.kinds, self.bases, strict=True)
            }
        else:
            clean, own_scratch = behind(self.clean_base), self.scratch + step
            noisy, own_noisy = clean, own_scratch
            if self.layout.twin:
                noisy, ring = behind(self.noisy_base), self._slot(current, self.noisy_base)
                own_noisy = torch.where(current < self.kept, own_scratch, ring)
            seen = {
                "intermediate": (noisy, own_scratch),
                "noisy": (noisy, own_noisy),
                "final": (clean, own_scratch),
                "cache": (clean, self._slot(current, self.clean_base)),
            }

        # In the window the chunk stands at most behind kept frames, memory and history: what lies
        # between the first and the others in the stream has been forgotten.
        apart = self.layout.every if self.promoted else 1
        shift = (self.position - self.kept - apart * self.memory - self.history).clamp(min=0)
        if not self.layout.repositioned:
            shift = torch.zeros_like(shift)
        key_table = cache_table = None
        if self.rope_on_cache:
            query_table = self._table(current - shift)[None]
            window = torch.cat([memory, past, current]) - shift
            cache_table = self._table(torch.cat([kept, window]))
        elif self.layout.repositioned:
            query_table = self._table(torch.stack([current, current - shift]))
            key_table = query_table[0]
        else:
            query_table = self._table(current)[None]
            key_table = query_table[0]
        offset_index = torch.zeros(
            self.kept + self.memory + self.history + frames, dtype=torch.int64, device=self.device
        )
        if query_table.shape[0] > 1:
            offset_index[: self.kept] = 1
        return {
            kind: Plan(
                own, torch.cat([old, own]), offset_index, key_table, query_table, cache_table
            )
            for kind, (old, own) in seen.items()
        }

    def compress(self) -> None:
        """Before a chunk's passes: memory and what has left the history become memory, in every
        layer and region.  Each new frame is the mean over time of `every` old ones, of those there
        are.  It is written beside them, so that doing this twice is doing it once.
        """
        if not self.layout.compressed:
            return
        chunk, every = self.layout.chunk, self.layout.every
        leaving = self.position - self.history - chunk + torch.arange(chunk, device=self.device)
        before = self.position - chunk - self.kept - self.history  # had left, a chunk ago
        age = torch.arange(self.memory, device=self.device).flip(0)
        there = torch.cat([age * every < before, leaving >= self.kept])
        there = there.float().view(self.memory, every, 1, 1, 1)
        leaving, count = leaving.clamp(min=0), there.sum(1).clamp(min=1)
        old = [x for b in self.bases for x in (self._merged(b, before=1), self._slot(leaving, b))]
        new = [self._merged(b) for b in self.bases]
        read, write = torch.cat(old), torch.cat(new)
        for cache in self.caches:
            for x in (cache.k, cache.v):
                frames = x.index_select(1, read).unflatten(1, (-1, self.memory, every))
                mean = (frames * there).sum(3) / count
                x.index_copy_(1, write, mean.flatten(1, 2).to(x.dtype))

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
