# SPDX-License-Identifier: Apache-2.0
"""What a denoising pass sees, as data.

A stream's memory is a list of segments, each so many latent frames long.  A segment says which
cache its keys come from, where they stand in time as the query sees them, and what happens when
it is full.  The transformer and the kernels never name a system.

    | segment     | filled by                         | when full |
    | picture     | the user's picture, once          | kept      |
    | first_state | the first generated latent frames | kept      |
    | history     | every later latent frame          | dropped   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .config import ModelConfig

SEGMENTS = ("picture", "first_state", "history")


@dataclass(frozen=True)
class Segment:
    """Latent frames of one kind.

    Attributes:
        name: one of `SEGMENTS`.
        capacity: latent frames.
        cache: "clean" (from the cache pass, t = 0), or "twin": noisy keys and values, kept from
            denoising step `noisy_step`, for intermediate steps, clean ones for the last step.
        offset: "absolute" (position in the stream) or "window" (position in the window: the
            query is moved instead of the keys).
        evict: "keep" (never) or "drop" (oldest first).
    """

    name: str
    capacity: int
    cache: str = "clean"
    offset: str = "absolute"
    evict: str = "keep"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("name", SEGMENTS),
            ("cache", ("clean", "twin")),
            ("offset", ("absolute", "window")),
            ("evict", ("keep", "drop")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}: expected one of {', '.join(allowed)}, got {getattr(self, field)!r}"
                )
        if self.capacity < 1:
            raise ValueError(f"capacity: expected at least one latent frame, got {self.capacity}")


@dataclass(frozen=True)
class StreamLayout:
    """The window of one system: its segments, in the order of the window, and its chunk.

    noisy_step is the denoising step whose keys and values become the noisy cache of "twin".
    """

    name: str
    chunk: int
    segments: tuple[Segment, ...]
    noisy_step: int = 1

    def capacity(self, name: str) -> int:
        """Latent frames of a segment; 0 where this layout has none."""
        return sum(s.capacity for s in self.segments if s.name == name)

    @property
    def twin(self) -> bool:
        return any(s.cache == "twin" for s in self.segments)

    @property
    def repositioned(self) -> bool:
        return any(s.offset == "window" for s in self.segments)

    @property
    def window(self) -> int:
        """Latent frames visible in steady state, the current chunk included."""
        return self.chunk + sum(s.capacity for s in self.segments)


def _history(chunk: int, window: int, kept: int, **options: str) -> tuple[Segment, ...]:
    left = window - chunk - kept
    if left < 0:
        raise ValueError(
            f"window: expected at least {chunk + kept} latent frames (chunk and reference), "
            f"got {window}"
        )
    return (Segment("history", left, evict="drop", **options),) if left else ()


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


LAYOUTS: dict[str, Callable[[int, int], StreamLayout]] = {
    "vidu_s1": vidu_s1,
    "self_forcing": self_forcing,
    "longlive": longlive,
}


def layout(name: str, config: ModelConfig) -> StreamLayout:
    """The layout of that name at the model's chunk and window.

    Raises:
        ValueError: unknown name; the message lists the layouts.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name](config.chunk, config.window)
