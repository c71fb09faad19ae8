# SPDX-License-Identifier: Apache-2.0
"""What a denoising pass sees, as data.

A stream's memory is a list of segments, each so many latent frames long.  A segment says which
cache its keys come from, where they stand in time as the query sees them, and what happens when
it is full.  The transformer and the kernels never name a system.

    | segment     | filled by                         | when full                              |
    | picture     | the user's picture, once          | kept                                   |
    | first_state | the first generated latent frames | kept                                   |
    | memory      | what leaves the history           | dropped, or compressed into itself     |
    | history     | every later latent frame          | dropped, promoted or compressed        |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import ModelConfig

SEGMENTS = ("picture", "first_state", "memory", "history")
CACHES = ("clean", "twin", "step")


@dataclass(frozen=True)
class Segment:
    """Latent frames of one kind.

    Attributes:
        name: one of `SEGMENTS`.
        capacity: latent frames.
        cache: "clean" (from the cache pass, t = 0); "twin": noisy keys and values, kept from
            denoising step `noisy_step`, for intermediate steps, clean ones for the last step; or
            "step": a cache for each denoising step, of keys as noisy as the query.
        offset: "absolute" (position in the stream) or "window" (position in the window: the
            query is moved instead of the keys).
        evict: "keep" (never), "drop" (oldest first), "promote" (the last of `every` latent frames
            that leave moves into memory, the others are dropped) or "compress" (each `every` of
            memory and of what leaves become one, which is memory's).
        every: of "promote" and "compress".
    """

    name: str
    capacity: int
    cache: str = "clean"
    offset: str = "absolute"
    evict: str = "keep"
    every: int = 1

    def __post_init__(self) -> None:
        for field, allowed in (
            ("name", SEGMENTS),
            ("cache", CACHES),
            ("offset", ("absolute", "window")),
            ("evict", ("keep", "drop", "promote", "compress")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}: expected one of {', '.join(allowed)}, got {getattr(self, field)!r}"
                )
        if self.evict in ("promote", "compress") and self.every < 2:
            raise ValueError(f"every: expected at least 2 to {self.evict}, got {self.every}")
        if self.capacity < 1:
            raise ValueError(f"capacity: expected at least one latent frame, got {self.capacity}")


@dataclass(frozen=True)
class StreamLayout:
    """The window of one system: its segments, in the order of the window, and its chunk.

    noisy_step is the denoising step whose keys and values become the noisy cache of "twin"; steps,
    how many denoising steps have a cache of their own in "step".
    """

    name: str
    chunk: int
    segments: tuple[Segment, ...]
    noisy_step: int = 1
    steps: int = 3

    def __post_init__(self) -> None:
        memory = self.capacity("memory")
        order = [SEGMENTS.index(s.name) for s in self.segments]
        if order != sorted(set(order)):
            raise ValueError(
                f"segments: expected {', '.join(SEGMENTS)}, each at most once and in this order, "
                f"got {', '.join(s.name for s in self.segments)}"
            )
        if (memory > 0) != (self.evict in ("promote", "compress")):
            raise ValueError(
                "segments: expected memory and a history that is promoted or compressed into it, "
                f"got memory of {memory} and a history with evict {self.evict!r}"
            )
        if self.compressed and (memory * self.every != memory + self.chunk or self.every < memory):
            raise ValueError(
                f"every: expected {memory} * every = {memory} + {self.chunk}, memory and a chunk, "
                f"and at least {memory}, got {self.every}"
            )

    def capacity(self, *names: str) -> int:
        """Latent frames of these segments; 0 where this layout has none."""
        return sum(s.capacity for s in self.segments if s.name in names)

    @property
    def twin(self) -> bool:
        return any(s.cache == "twin" for s in self.segments)

    @property
    def stepped(self) -> bool:
        """A cache per denoising step, and no cache pass."""
        return any(s.cache == "step" for s in self.segments)

    @property
    def repositioned(self) -> bool:
        return any(s.offset == "window" for s in self.segments)

    @property
    def evict(self) -> str:
        """What becomes of latent frames that leave the history."""
        return next((s.evict for s in self.segments if s.name == "history"), "drop")

    @property
    def compressed(self) -> bool:
        """Keys are merged: they are stored raw, and rotated when read."""
        return self.evict == "compress"

    @property
    def every(self) -> int:
        return next((s.every for s in self.segments if s.name == "history"), 1)

    @property
    def window(self) -> int:
        """Latent frames visible in steady state, the current chunk included."""
        return self.chunk + sum(s.capacity for s in self.segments)

    def visible(self, position: int) -> int:
        """Latent frames that a pass sees, its own included, when `position` came before."""
        kept, history = self.capacity("picture", "first_state"), self.capacity("history")
        left = max(position - kept - history, 0)
        memory = -(-left // self.every) if self.compressed else left // self.every
        return self.chunk + min(position, kept + history) + min(memory, self.capacity("memory"))


def _history(chunk: int, window: int, kept: int, **options: Any) -> tuple[Segment, ...]:
    left, needed = window - chunk - kept, options.get("evict", "drop") != "drop"
    if left < needed:
        raise ValueError(
            f"window: expected at least {chunk + kept + needed} latent frames (chunk, reference "
            f"and memory), got {window}"
        )
    return (Segment("history", left, **{"evict": "drop", **options}),) if left else ()


def vidu_s1(chunk: int, window: int) -> StreamLayout:
    """Picture and first state as persistent reference, repositioned; TwinCache history."""
    kept = (Segment("picture", 1, offset="window"), Segment("first_state", chunk, offset="window"))
    return StreamLayout("vidu_s1", chunk, kept + _history(chunk, window, 1 + chunk, cache="twin"))


def self_forcing(chunk: int, window: int) -> StreamLayout:
    """A plain sliding window over clean history, absolute positions, nothing kept."""
    return StreamLayout("self_forcing", chunk, _history(chunk, window, 0))


def longlive(chunk: int, window: int) -> StreamLayout:
    """A sliding window over clean history behind a frame sink of one chunk, absolute positions."""
    kept = (Segment("first_state", chunk),)
    return StreamLayout("longlive", chunk, kept + _history(chunk, window, chunk))


def flowact_r1(chunk: int, window: int) -> StreamLayout:
    """Reference picture, three long-term latent frames, short-term memory (arXiv 2601.10103, 2.1).

    Short-term memory is what the window leaves, one latent frame as published where it is chunk +
    5.  The long-term queue takes the last latent frame of each chunk once it leaves short-term
    memory, and stays where it was in time; the paper does not say which of a chunk.

    The fake-causal mask (2.2) is half a layout: keys are written from clean latents, which have
    seen older memory and their own chunk and never what is denoised after them.  But the paper's
    stream denoises three chunks together, each noisier than the one before and all of them visible
    to each other.  Here a pass has one chunk and one timestep, so the two ahead are not there.
    Memory refinement (2.5) is not built: neither noise level, steps nor interval are published.
    """
    segments = (Segment("picture", 1, offset="window"), Segment("memory", 3, evict="drop"))
    history = _history(chunk, window, 4, evict="promote", every=max(chunk, 2))
    return StreamLayout("flowact_r1", chunk, segments + history)


def liveact(chunk: int, window: int) -> StreamLayout:
    """Neighbor Forcing, ConvKV memory and RoPE reset (SoulX-LiveAct, arXiv 2603.11746).

    Every denoising step has a cache of its own, so that a query sees keys of its own noise level,
    and no cache pass is needed; the picture has no noise, and its clean keys are seen by all.  Two
    latent frames are kept, the rest of what leaves the history is compressed with memory into
    memory, at chunk 8 five frames to one as published (two frames of memory; one where the chunk is
    odd).  All stand in the window's first positions, whatever the stream's.

    ConvKV without its trained weights is their initial value, the mean.  It is taken over time, in
    place; the released convolution runs along the flattened tokens, over neighbours in a row.
    """
    memory = math.gcd(chunk, 2)
    options: dict[str, Any] = {"cache": "step", "offset": "window", "evict": "compress"}
    options["every"] = 1 + chunk // memory
    kept = (Segment("picture", 1), Segment("first_state", 1, cache="step", offset="window"))
    history = _history(chunk, window, 2 + memory, **options)
    return StreamLayout("liveact", chunk, (*kept, Segment("memory", memory, **options), *history))


LAYOUTS: dict[str, Callable[[int, int], StreamLayout]] = {
    "vidu_s1": vidu_s1,
    "self_forcing": self_forcing,
    "longlive": longlive,
    "flowact_r1": flowact_r1,
    "liveact": liveact,
}


def layout(name: str, config: ModelConfig) -> StreamLayout:
    """The layout of that name at the model's chunk and window.

    Raises:
        ValueError: unknown name; the message lists the layouts.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name](config.chunk, config.window)
