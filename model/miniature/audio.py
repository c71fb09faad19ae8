# SPDX-License-Identifier: Apache-2.0
"""How far the mouth opens: the loudness of a voice, one value per video frame.

    level[t]    = RMS of the samples of video frame t
    gate        = the loudest level that still counts as silence
    loud        = the 95th percentile of the levels above silence
    envelope[t] = clip((level[t] - gate) / (loud - gate), 0, 1) ^ 0.7

Only `gate` and `loud` need the whole voice: levels can be taken block by block, 25 numbers for a
second of sound, and normalised at the end.
"""

from __future__ import annotations

import numpy as np

from .control import FPS

SILENCE = 1e-3  # -60 dB of full scale: the noise of a quiet room on a cheap microphone
_GAMMA = 0.7  # unstressed syllables are several times quieter, and should still be seen


def levels(samples: np.ndarray, rate: int, fps: int = FPS) -> np.ndarray:
    """[ceil(len(samples) * fps / rate)] float32: RMS of each video frame; not finite counts as 0.

    Raises:
        ValueError: samples is not one-dimensional, or rate is below fps.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ValueError(f"samples: expected mono, shape [T], got {list(samples.shape)}")
    if rate < fps:
        raise ValueError(f"rate: expected at least one sample per video frame ({fps}), got {rate}")
    frames = -(-len(samples) * fps // rate)
    if not frames:
        return np.zeros(0, np.float32)
    starts = np.arange(frames, dtype=np.int64) * rate // fps
    squares = np.nan_to_num(samples.astype(np.float64), posinf=0.0, neginf=0.0) ** 2
    counts = np.diff(starts, append=len(samples))
    return np.sqrt(np.add.reduceat(squares, starts) / counts).astype(np.float32)


def normalise(level: np.ndarray) -> np.ndarray:
    """Levels to [0, 1]: silence is 0, a stressed syllable is 1, however loud the recording is."""
    level = np.asarray(level, np.float32)
    audible = level[level > SILENCE]
    if not len(audible):
        return np.zeros(len(level), np.float32)
    loud = float(np.percentile(audible, 95))
    # The pauses tell the noise floor; a voice without pauses must not gate itself away.
    floor = min(1.5 * float(np.percentile(level, 10)), 0.15 * loud)
    gate = max(SILENCE, floor, 0.05 * loud)
    if loud <= gate:
        return np.zeros(len(level), np.float32)
    return (np.clip((level - gate) / (loud - gate), 0, 1) ** _GAMMA).astype(np.float32)


def envelope(samples: np.ndarray, rate: int, fps: int = FPS) -> np.ndarray:
    """[T] float32 in [0, 1], one value per video frame of mono samples.  Raises as `levels`."""
    return normalise(levels(samples, rate, fps))
