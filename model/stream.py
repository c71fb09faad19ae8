# SPDX-License-Identifier: Apache-2.0
"""Streaming generation: picture in, chunks of video out, for ever, in constant memory.

A chunk is denoised in a few passes over the window, each pass reading the memory as the layout
says; a last pass at t = 0 (the cache pass) writes the clean keys and values that later chunks see.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .codec import ConvCodec
from .kv_cache import Plan, StreamMemory
from .layout import StreamLayout
from .sampler import add_noise, timesteps, to_x0
from .transformer import CausalTransformer, Context

PHASES = ("encode", "denoise", "cache_pass", "decode")


@dataclass
class PhaseClock:
    """Milliseconds per chunk and phase, of the most recent chunks (memory stays constant)."""

    keep: int = 4096
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.ms: dict[str, deque[float]] = {p: deque(maxlen=self.keep) for p in PHASES}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.ms[name].append(1e3 * (self._now() - start))

    def _now(self) -> float:
        if self.device.type == "cuda":  # between passes, never inside one
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Stream:
    """One stream (or a batch of them side by side).

    Args:
        transformer, codec: the model.
        layout: what a pass sees; see `layout.py`.
        steps: denoising steps per chunk, 1 to 4.
        seed: of the noise; same seed, same frames.
        batch: streams side by side.
        rope_on_cache: rotate the whole window on every pass instead of moving the query.
        backend: kernel backend.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        codec: ConvCodec,
        layout: StreamLayout,
        *,
        steps: int = 3,
        seed: int = 0,
        batch: int = 1,
        rope_on_cache: bool = False,
        backend: str = "auto",
    ) -> None:
        config = transformer.config
        self.transformer, self.codec, self.layout = transformer.eval(), codec.eval(), layout
        self.timesteps = timesteps(steps, config.shift)
        self.batch, self.backend, self.rope_on_cache = batch, backend, rope_on_cache
        weight = transformer.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.noise = torch.Generator(self.device).manual_seed(seed)
        self.clock = PhaseClock(device=self.device)
        self.memory: StreamMemory | None = None
        # The noisy cache comes from an intermediate step, so it is never the last one.
        self.noisy_step = min(layout.noisy_step, steps - 2)

    @torch.inference_mode()
    def start(self, picture: Tensor, context: Tensor) -> None:
        """Put the picture in the memory.

        Args:
            picture: [B, H, W, 3] uint8.
            context: [B, 1, L, text_dim], the condition of the picture.
        """
        with self.clock.phase("encode"):
            still = picture[:, None].expand(-1, self.codec.config.frames_per_latent, -1, -1, -1)
            latents = self.codec.encode(still).to(self.dtype)  # (B, 1, C, h, w)
            self.start_from_latents(latents, context)

    @torch.inference_mode()
    def start_from_latents(self, latents: Tensor, context: Tensor) -> None:
        """As `start`, from the picture's latents [B, 1, C, h, w]."""
        config = self.transformer.config
        if latents.shape[0] != self.batch:
            raise ValueError(f"picture: expected a batch of {self.batch}, got {latents.shape[0]}")
        self.shape = latents.shape[2:]
        grid = (self.shape[1] // config.patch[0], self.shape[2] // config.patch[1])
        self.memory = StreamMemory(
            config,
            self.layout,
            grid,
            self.batch,
            rope_on_cache=self.rope_on_cache,
            backend=self.backend,
            dtype=self.dtype,
            device=self.device,
        )
        plans = self.memory.make_plans(frames=1)
        embedded = self.transformer.embed_context(context.to(self.dtype), self.backend)
        kinds = ["cache"]
        if self.layout.twin and not self.memory.kept:  # the picture is history: both caches
            kinds = ["noisy", "cache"]
        for kind in kinds:
            self._forward(latents, 0.0, embedded, plans[kind])
        self.memory.position += 1

    def _forward(self, x: Tensor, t: float, context: Context, plan: Plan) -> Tensor:
        assert self.memory is not None
        self.memory.plan = plan
        times = torch.full(x.shape[:2], t, dtype=torch.float64, device=self.device)
        return self.transformer(x, times, context, self.memory, backend=self.backend)

    def _noise(self) -> Tensor:
        shape = (self.batch, self.layout.chunk, *self.shape)
        return torch.randn(shape, generator=self.noise, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def next_latents(self, context: Tensor) -> Tensor:
        """Generate a chunk: context [B, chunk or 1, L, text_dim] -> x0 [B, chunk, C, h, w]."""
        if self.memory is None:
            raise RuntimeError("Stream: call start() with a picture first")
        config = self.transformer.config
        with self.clock.phase("denoise"):
            embedded = self.transformer.embed_context(context.to(self.dtype), self.backend)
            plans = self.memory.make_plans()
            x = self._noise()
            last = len(self.timesteps) - 1
            for i, t in enumerate(self.timesteps):
                kind = "noisy" if i == self.noisy_step else "intermediate"
                output = self._forward(x, t, embedded, plans["final" if i == last else kind])
                x = to_x0(output, x, t / 1000, config.prediction)
                if i < last:
                    x = add_noise(x, self._noise(), self.timesteps[i + 1] / 1000)
        with self.clock.phase("cache_pass"):
            self._forward(x, 0.0, embedded, plans["cache"])
            self.memory.position += self.layout.chunk
        return x

    @torch.inference_mode()
    def next_frames(self, context: Tensor) -> Tensor:
        """Generate and decode a chunk: [B, frames, H, W, 3] uint8."""
        latents = self.next_latents(context)
        with self.clock.phase("decode"):
            return self.codec.decode_uint8(latents.float())
