# SPDX-License-Identifier: Apache-2.0
"""Streaming generation: picture in, chunks of video out, for ever, in constant memory.

A chunk is denoised in a few passes over the window, each pass reading the memory as the layout
says; a last pass at t = 0 (the cache pass) writes the clean keys and values that later chunks see,
where they see clean ones.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .codec import ConvCodec
from .kv_cache import StreamMemory
from .layout import StreamLayout
from .sampler import timesteps
from .step import Step
from .transformer import CausalTransformer

PHASES = ("encode", "denoise", "cache_pass", "decode")


class PhaseClock:
    """Milliseconds per chunk and phase, of the most recent chunks (memory stays constant).

    On a GPU they are taken between events of its own: nothing waits for a phase to end.
    """

    def __init__(
        self, device: torch.device, phases: tuple[str, ...] = PHASES, keep: int = 4096
    ) -> None:
        self.device = device
        self._ms: dict[str, deque[float]] = {p: deque(maxlen=keep) for p in phases}
        self._pending: deque[tuple[str, Any, Any]] = deque()  # phases that the GPU may still be at

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._pending.append((name, start, self._now()))
        self._settle(wait=False)

    @property
    def ms(self) -> dict[str, deque[float]]:
        """By phase; waits for those that the GPU is still at."""
        self._settle(wait=True)
        return self._ms

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _settle(self, wait: bool) -> None:
        while self._pending:
            name, start, end = self._pending[0]
            if self.device.type != "cuda":
                ms = 1e3 * (end - start)
            elif wait or end.query():
                end.synchronize()
                ms = start.elapsed_time(end)
            else:
                return
            self._ms[name].append(ms)
            self._pending.popleft()


class Stream:
    """One stream (or a batch of them side by side).

    Args:
        transformer, codec: the model.
        layout: what a pass sees; see `layout.py`.
        steps: denoising steps per chunk, 1 to 4.
        seed: of the noise; same seed, same frames.
        batch: streams side by side.
        rope_on_cache: rotate the whole window on every pass instead of moving the query.
        kv_format: how keys and values are stored, one of `kv_cache.KV_FORMATS`; None: as the
            transformer's quality level says.
        capture: on a GPU, replay captured graphs.
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
        kv_format: str | None = None,
        capture: bool = True,
        backend: str = "auto",
    ) -> None:
        config = transformer.config
        self.transformer, self.codec = transformer.eval(), codec.eval()
        self.layout = replace(layout, steps=steps)
        self.timesteps = timesteps(steps, config.shift)
        self.batch, self.backend, self.rope_on_cache = batch, backend, rope_on_cache
        self.kv_format = kv_format or transformer.quality.kv_format
        self.capture = capture
        weight = transformer.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.noise = torch.Generator(self.device).manual_seed(seed)
        self.clock = PhaseClock(self.device)
        self.memory: StreamMemory | None = None
        self.step: Step | None = None

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
        if latents.shape[0] != self.batch:
            raise ValueError(f"picture: expected a batch of {self.batch}, got {latents.shape[0]}")
        if self.step is None or self.step.size != latents.shape[2:]:
            self._prepare(tuple(latents.shape[2:]))
        memory = self.memory
        assert memory is not None
        memory.position.zero_()
        plans = memory.make_plans(frames=1)
        embedded = self.transformer.embed_context(context.to(self.dtype), self.backend)
        # The picture is history unless it is kept: in every cache then
        kinds = memory.lasting if not memory.shared else memory.lasting[-1:]
        times = torch.zeros(latents.shape[:2], dtype=torch.float64, device=self.device)
        for kind in kinds:
            memory.plan = plans[kind]
            self.transformer(latents, times, embedded, memory, backend=self.backend)
        memory.position += 1

    def _prepare(self, size: tuple[int, int, int]) -> None:
        """Memory and step for latent frames [C, h, w] of this size."""
        config = self.transformer.config
        self.memory = StreamMemory(
            config,
            self.layout,
            (size[1] // config.patch[0], size[2] // config.patch[1]),
            self.batch,
            rope_on_cache=self.rope_on_cache,
            kv_format=self.kv_format,
            backend=self.backend,
            dtype=self.dtype,
            device=self.device,
        )
        self.step = Step(self.transformer, self.memory, size, self.timesteps, backend=self.backend)

    def _noise(self) -> Tensor:
        assert self.step is not None
        shape = self.step.latents.shape
        return torch.randn(shape, generator=self.noise, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def next_latents(self, context: Tensor | None = None) -> Tensor:
        """Generate a chunk.

        Args:
            context: [B, chunk or 1, L, text_dim]; None: as for the chunk before.
        Returns:
            x0 [B, chunk, C, h, w].
        """
        step = self.step
        if step is None:
            raise RuntimeError("Stream: call start() with a picture first")
        with self.clock.phase("denoise"):
            if context is not None:
                step.condition(context)
            if self.capture:
                step.capture()
            step.plan()
            step.latents.copy_(self._noise())
            last = len(self.timesteps) - 1
            for index in range(last):
                step.noise.copy_(self._noise())
                step.run(index)
            step.run(last)
        with self.clock.phase("cache_pass"):
            for index in range(last + 1, len(step.passes)):
                step.run(index)
        return step.latents.to(self.dtype, copy=True)

    @torch.inference_mode()
    def next_frames(self, context: Tensor) -> Tensor:
        """Generate and decode a chunk: [B, frames, H, W, 3] uint8."""
        latents = self.next_latents(context)
        with self.clock.phase("decode"):
            return self.codec.decode_uint8(latents.float())
