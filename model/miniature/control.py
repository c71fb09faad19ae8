# SPDX-License-Identifier: Apache-2.0
"""What the avatar is told, and what it should do about it.

An instruction stays in force until the next one.  The pose follows its target with a first-order
lag, pose[t] = pose[t-1] + rate * (target(instruction, age) - pose[t-1]), so a change takes about
eight frames and the motion is continuous across instructions.  The mouth is the audio envelope.

The model never sees a pose.  It sees tokens (`condition_tokens`): which instruction is in force,
for how long, which came before, and the audio envelope around each video frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .avatar import POSE

FPS = 25
FRAMES_PER_LATENT = 4
_RATE = np.array([0.35, 0.35, 0.35, 0.35, 0.60, 0.35, 0.30, 1.0], dtype=np.float32)
_NOD_PERIOD, _BLINK_PERIOD, _BLINK_FRAMES = 20, 25, 5

# Instruction -> the pose it asks for; the moving ones are completed by `_target`.
INSTRUCTIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "turn left": {"yaw": -1.0},
    "turn right": {"yaw": 1.0},
    "look up": {"pitch": -1.0},
    "look down": {"pitch": 1.0},
    "tilt left": {"roll": -1.0},
    "tilt right": {"roll": 1.0},
    "smile": {"smile": 1.0},
    "frown": {"smile": -1.0},
    "raise brows": {"brows": 1.0},
    "blink": {},
    "close eyes": {"lids": 1.0},
    "raise hand": {"hand": 1.0},
    "nod": {},
    "shake head": {},
}
NAMES = tuple(INSTRUCTIONS)
SETTLED = 1000  # an age, in frames, by which nothing changes any more
TOKEN_DIM = 48
_TABLE = np.zeros((len(NAMES), len(POSE)), dtype=np.float32)
for _row, _pose in enumerate(INSTRUCTIONS.values()):
    for _name, _value in _pose.items():
        _TABLE[_row, POSE.index(_name)] = _value


def instruction_id(text: str) -> int:
    """The index of an instruction, case and spacing ignored.

    Raises:
        ValueError: not in the vocabulary; the message lists it.
    """
    name = " ".join(text.lower().split())
    if name not in INSTRUCTIONS:
        raise ValueError(f"instruction: unknown {text!r}; expected one of: {', '.join(NAMES)}")
    return NAMES.index(name)


def _target(instruction: int, age: int) -> np.ndarray:
    pose = _TABLE[instruction].copy()
    if NAMES[instruction] == "nod":
        pose[POSE.index("pitch")] = 1.3 * np.sin(2 * np.pi * (age + 1) / _NOD_PERIOD)
    elif NAMES[instruction] == "shake head":
        pose[POSE.index("yaw")] = 1.3 * np.sin(2 * np.pi * (age + 1) / _NOD_PERIOD)
    elif NAMES[instruction] == "blink":
        pose[POSE.index("lids")] = float(age % _BLINK_PERIOD < _BLINK_FRAMES)
    return pose


@dataclass
class Track:
    """Instructions in force over consecutive video frames; extended frame by frame, for ever.

    Constant memory: only the instruction in force, the one before, its age and the pose are kept.
    """

    current: int = 0
    previous: int = 0
    age: int = SETTLED
    pose: np.ndarray = field(default_factory=lambda: np.zeros(len(POSE), np.float32))

    def say(self, instruction: int) -> None:
        """Put an instruction in force from the next frame on."""
        self.previous, self.current, self.age = self.current, instruction, 0

    def advance(self, envelope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move on by len(envelope) frames.

        Returns:
            control [T, 3] int64 (current, previous, age), and the ground-truth pose [T, 8] float32.
        """
        control = np.empty((len(envelope), 3), np.int64)
        poses = np.empty((len(envelope), len(POSE)), np.float32)
        for t, mouth in enumerate(envelope):
            target = _target(self.current, self.age)
            target[-1] = mouth
            self.pose = self.pose + _RATE * (target - self.pose)
            control[t], poses[t] = (self.current, self.previous, self.age), self.pose
            self.age += 1
            if self.age >= SETTLED + _NOD_PERIOD * _BLINK_PERIOD:  # keep the phase of both cycles
                self.age = SETTLED
        return control, poses


def condition_tokens(control: np.ndarray, envelope: np.ndarray) -> np.ndarray:
    """The cross-attention context of the miniature, one token per video frame.

    Args:
        control: [T, 3] int64 (current, previous, age), T a multiple of 4.
        envelope: [T + 1] float32, one frame of the past first.
    Returns:
        [T / 4, 4, 48] float32: latent frame, its four video frames, features.
    """
    frames = len(control)
    if frames % FRAMES_PER_LATENT or len(envelope) != frames + 1:
        raise ValueError(
            f"control: expected a multiple of {FRAMES_PER_LATENT} frames and an envelope one "
            f"longer, got {frames} and {len(envelope)}"
        )
    current, previous, age = control.T
    age = age.astype(np.float32)
    one_hot = np.eye(len(NAMES), dtype=np.float32)
    nod, blink = (2 * np.pi * age / p for p in (_NOD_PERIOD, _BLINK_PERIOD))
    ages = [np.exp(-age / 2), np.exp(-age / 5), np.exp(-age / 12)]
    ages += [np.sin(nod), np.cos(nod), np.sin(blink), np.cos(blink)]
    own = np.stack([*ages, envelope[:-1], envelope[1:]], axis=1)  # [T, 9]
    whole = envelope[1:].reshape(-1, FRAMES_PER_LATENT).repeat(FRAMES_PER_LATENT, axis=0)  # [T, 4]
    which = np.tile(np.eye(FRAMES_PER_LATENT), (frames // FRAMES_PER_LATENT, 1))  # [T, 4]
    tokens = np.concatenate([one_hot[current], one_hot[previous], own, whole, which], axis=1)
    tokens = np.pad(tokens, ((0, 0), (0, TOKEN_DIM - tokens.shape[1])))
    return tokens.reshape(-1, FRAMES_PER_LATENT, TOKEN_DIM).astype(np.float32)


def picture_tokens() -> np.ndarray:
    """[1, 4, 48]: the condition of the user's picture: neutral, silent, at rest."""
    control = np.tile(np.array([0, 0, SETTLED]), (FRAMES_PER_LATENT, 1))
    return condition_tokens(control, np.zeros(FRAMES_PER_LATENT + 1, np.float32))


def random_envelope(rng: np.random.Generator, frames: int) -> np.ndarray:
    """[frames] float32 in [0, 1]: syllables at 3 to 6 Hz with pauses, like a speech envelope."""
    out = np.zeros(frames + 16, np.float32)
    t = int(rng.integers(8))
    while t < frames:
        if rng.uniform() < 0.15:
            t += int(rng.integers(5, 30))
            continue
        width = int(rng.integers(3, 9))
        bump = np.sin(np.pi * (np.arange(width) + 0.5) / width) ** rng.uniform(0.5, 1.5)
        out[t : t + width] = np.maximum(out[t : t + width], rng.uniform(0.25, 1.0) * bump)
        t += width - int(rng.integers(3))
    noisy = out[:frames] + rng.normal(0, 0.02, frames) * (out[:frames] > 0.02)
    return np.clip(noisy, 0, 1).astype(np.float32)


def random_clip(
    rng: np.random.Generator, frames: int, *, switch: float = 1 / 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stream from rest under random instructions and a random voice.

    Returns:
        control [frames, 3], envelope [frames + 1] (one silent frame first), poses [frames, 8].
    """
    track, envelope = Track(), random_envelope(rng, frames)
    parts, start = [], 0
    while start < frames:
        length = min(frames - start, 1 + int(rng.geometric(switch)))
        if start or rng.uniform() < 0.5:
            track.say(int(rng.integers(len(NAMES))))
        parts.append(track.advance(envelope[start : start + length]))
        start += length
    control, poses = (np.concatenate(p) for p in zip(*parts, strict=True))
    return control, np.concatenate([[0.0], envelope]).astype(np.float32), poses
