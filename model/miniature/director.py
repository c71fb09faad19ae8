# SPDX-License-Identifier: Apache-2.0
"""Who says what when: timed instructions, typed ones and the voice, fed to a stream in chunks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..media import RATE, AudioReader
from .audio import levels, normalise
from .control import FPS, Track, condition_tokens, instruction_id

SAMPLES = RATE // FPS  # of sound per video frame


@dataclass(frozen=True)
class Cue:
    """An instruction and the video frame from which it is in force."""

    frame: int
    instruction: int


def parse_cue(text: str, seconds: float = math.inf) -> Cue:
    """ "turn left@2" -> turn left from second 2 on; without a time, from the start.

    Args:
        text: an instruction, or instruction@seconds.
        seconds: the length of the stream.
    Raises:
        ValueError: not in the vocabulary, or a time that is no number or outside the stream.
    """
    name, at, when = text.rpartition("@")
    instruction = instruction_id(name if at else text)
    if not at:
        return Cue(0, instruction)
    try:
        time = float(when)
    except ValueError:
        time = math.nan
    if not 0 <= time < seconds or math.isinf(time):
        limit = "" if math.isinf(seconds) else f", below the length {seconds:g}"
        raise ValueError(
            f"say: expected a time in seconds from 0 on{limit}, got {when.strip()!r} in {text!r}"
        )
    return Cue(int(time * FPS + 0.5), instruction)


class Director:
    """Turns cues, typed instructions and the envelope into the condition of chunk after chunk.

    Constant memory: a cue is dropped when it has acted.
    """

    def __init__(self, cues: Iterable[Cue] = ()) -> None:
        self.frame = 0  # the next one
        self._cues = deque(sorted(cues, key=lambda cue: cue.frame))
        self._typed: int | None = None
        self._track = Track()
        self._past = 0.0

    def say(self, text: str) -> int:
        """Put an instruction in force from the next chunk on: returns that chunk's first frame.

        Of several before one chunk, the last one counts.

        Raises:
            ValueError: not in the vocabulary.
        """
        self._typed = instruction_id(text)
        return self.frame

    def next_chunk(self, envelope: np.ndarray) -> np.ndarray:
        """The condition of the next len(envelope) video frames: [T / 4, 4, 48] float32."""
        end = self.frame + len(envelope)
        due = {}
        if self._typed is not None:
            due[self.frame], self._typed = self._typed, None
        while self._cues and self._cues[0].frame < end:
            cue = self._cues.popleft()
            due[cue.frame] = cue.instruction  # of several at one frame, the last one counts
        stops = [*sorted(due), end]
        parts = [self._track.advance(envelope[: stops[0] - self.frame])[0]]
        for start, stop in zip(stops, stops[1:], strict=False):
            self._track.say(due[start])
            first, last = start - self.frame, stop - self.frame
            parts.append(self._track.advance(envelope[first:last])[0])
        heard = np.concatenate([[self._past], envelope]).astype(np.float32)
        self.frame, self._past = end, heard[-1]
        return condition_tokens(np.concatenate(parts), heard)


class Voice:
    """A sound file as a stream hears it: envelope and samples, video frame by video frame.

    The file is read twice, block by block: at once for the loudness of the whole, and again while
    the stream runs.  What comes after its end is silence.

    Args:
        path: the sound file.
        loop: start again at the end instead.
    Raises:
        FileNotFoundError, ValueError: as `AudioReader`.
    """

    def __init__(self, path: str | Path, *, loop: bool = False) -> None:
        self.path, self.loop = Path(path), loop
        with AudioReader(path, RATE) as reader:
            level = [levels(block, RATE) for block in reader.blocks(RATE)]
        self.envelope = normalise(np.concatenate([np.zeros(0, np.float32), *level]))
        self.frame = 0
        self._samples = self._play()

    @property
    def seconds(self) -> float:
        """Length in whole video frames."""
        return len(self.envelope) / FPS

    def _play(self) -> Iterator[np.ndarray]:
        """The samples of every video frame, for ever."""
        while len(self.envelope):
            with AudioReader(self.path, RATE) as reader:
                for block in reader.blocks(SAMPLES):
                    yield np.pad(block, (0, SAMPLES - len(block)))
            if not self.loop:
                break
        while True:
            yield np.zeros(SAMPLES, np.float32)

    def next_chunk(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Envelope [frames] and samples [frames * 1920] of the next video frames."""
        at = np.arange(self.frame, self.frame + frames)
        self.frame += frames
        heard = np.zeros(frames, np.float32)
        if self.loop and len(self.envelope):
            heard[:] = self.envelope[at % len(self.envelope)]
        else:
            known = at[at < len(self.envelope)]
            heard[: len(known)] = self.envelope[known]
        return heard, np.concatenate([next(self._samples) for _ in range(frames)])
