# SPDX-License-Identifier: Apache-2.0
"""How well a generated video does what the renderer would have drawn.

The renderer is exact ground truth: identity, pose and voice of every frame are known.  So nothing
here needs a trained judge.  Each measure is read from pixels and, on the ground truth itself, has
a known answer (tests/test_metrics.py): correlation 1, accuracy 1, delay 0, errors 0.

    lip-sync      correlation of the mouth opening, read from pixels, with the audio envelope
    instruction   which of all instructions explains a segment best; when it began to show
    identity      colours of five regions, and proportions, re-estimated from generated frames
    fidelity      PSNR and SSIM against the renderer; drift: PSNR of the last frames minus the first
    flicker       change between frames where the truth stands still

Frames are uint8 [T, S, S, 3] everywhere.  A video may be endless: what is kept per frame is a few
floats (`VideoScore`), what is kept per instruction one small record (`InstructionScore`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .avatar import COLOURS, POSE, SHAPE, SHAPE_RANGE, Identity, render
from .control import NAMES, Track
from .picture import coverage, fit_identity

BLOCK = 32  # frames held in floating point at a time
SETTLE, STRIDE = 16, 3  # of a segment, frames 16, 19, 22, ... are compared with the hypotheses
ONSET = 16  # frames within which a new instruction must show
REACH = 10  # frames that picture and voice may be apart, either way
STATIC = 2  # of 255: the truth stands still where no channel changes by more
SSIM_STRIDE = 4


def _blocks(length: int) -> Iterator[slice]:
    return (slice(i, min(i + BLOCK, length)) for i in range(0, length, BLOCK))


def _same_shape(frames: np.ndarray, truth: np.ndarray) -> None:
    if frames.shape != truth.shape or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames: expected [T, S, S, 3] as the truth, {list(truth.shape)}, "
            f"got {list(frames.shape)}"
        )
    if frames.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"frames: expected uint8, got {frames.dtype} and {truth.dtype}")


# --- Fidelity -----------------------------------------------------------------------------------


def frame_mse(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[T] mean squared error of each frame, in squared levels of 0..255."""
    _same_shape(frames, truth)
    out = np.empty(len(frames))
    for part in _blocks(len(frames)):
        error = frames[part].astype(np.int16) - truth[part]
        out[part] = np.square(error, dtype=np.int32).mean(axis=(1, 2, 3))
    return out


def decibels(mse: np.ndarray | float) -> float:
    """PSNR = 10 log10(255^2 / mean of mse): pooled over frames, so bad frames count in full."""
    mean = float(np.mean(mse))
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def drift(mse: np.ndarray, warmup: int = 100, span: int = 1000) -> float:
    """PSNR of the last `span` frames minus that of `span` frames after the warm-up, in dB.

    Raises:
        ValueError: too few frames for two spans that do not overlap.
    """
    if len(mse) < warmup + 2 * span:
        raise ValueError(f"mse: expected at least {warmup + 2 * span} frames, got {len(mse)}")
    return decibels(mse[-span:]) - decibels(mse[warmup : warmup + span])


def ssim(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[T] structural similarity of luma (Wang et al., 2004): 11 x 11 Gaussian, sigma 1.5.

    (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sxx + syy + c2)), averaged over the picture.
    """
    _same_shape(frames, truth)
    tap = torch.exp(-((torch.arange(11, dtype=torch.float32) - 5) ** 2) / (2 * 1.5**2))
    tap = tap / tap.sum()
    out = np.empty(len(frames))
    for part in _blocks(len(frames)):
        x, y = (_luma(video[part]) for video in (frames, truth))
        maps = torch.stack([x, y, x * x, y * y, x * y], dim=1).flatten(0, 1)[:, None]
        maps = F.conv2d(F.conv2d(maps, tap[None, None, :, None]), tap[None, None, None])
        mx, my, xx, yy, xy = maps.unflatten(0, (-1, 5))[:, :, 0].unbind(1)  # (T, S', S') each
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        sxx, syy, sxy = xx - mx * mx, yy - my * my, xy - mx * my
        score = (2 * mx * my + c1) * (2 * sxy + c2)
        score = score / ((mx * mx + my * my + c1) * (sxx + syy + c2))
        out[part] = score.mean(dim=(1, 2)).numpy()
    return out


def _luma(frames: np.ndarray) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114])
    return torch.from_numpy(np.ascontiguousarray(frames)).float() @ weights


@dataclass
class Flicker:
    """Temporal change where the truth stands still, as energy and relative to the truth's motion.

    ratio = mean over still pixels of |g[t] - g[t-1]|^2 / mean over all pixels of |x[t] - x[t-1]|^2
    """

    still_energy: float = 0.0
    still_values: int = 0
    motion_energy: float = 0.0
    motion_values: int = 0
    last: tuple[np.ndarray, np.ndarray] | None = None

    def update(self, frames: np.ndarray, truth: np.ndarray) -> None:
        """Go on by [T, S, S, 3] generated and true frames."""
        _same_shape(frames, truth)
        for part in _blocks(len(frames)):
            pair = frames[part], truth[part]
            if self.last is not None:
                a, b = zip(self.last, pair, strict=True)
                pair = np.concatenate(a), np.concatenate(b)
            generated, moved = (np.diff(v.astype(np.int16), axis=0) for v in pair)
            still = (np.abs(moved) <= STATIC).all(axis=-1)  # (T, S, S)
            self.still_energy += float(np.square(generated[still], dtype=np.int64).sum())
            self.still_values += 3 * int(still.sum())
            self.motion_energy += float(np.square(moved, dtype=np.int64).sum())
            self.motion_values += moved.size
            self.last = frames[part][-1:], truth[part][-1:]

    @property
    def levels(self) -> float:
        """Root mean square change at still pixels, in levels of 0..255."""
        return float(np.sqrt(self.still_energy / max(self.still_values, 1)))

    @property
    def ratio(self) -> float:
        motion = self.motion_energy / max(self.motion_values, 1)
        return float(self.levels**2 / motion) if motion > 0 else float("nan")


# --- Lip-sync -----------------------------------------------------------------------------------


class MouthReader:
    """Mouth opening from pixels.

    The mouth region is sampled in the head's own coordinates, which the true pose gives: there the
    mouth always looks upright and unsmiling.  The opening is where, among `LEVELS` drawings of this
    person's mouth, the sampled region fits best (a parabola through the three nearest).
    """

    LEVELS = 33

    def __init__(self, who: Identity) -> None:
        rows, columns = np.meshgrid(np.linspace(-0.12, 0.25, 26), np.linspace(-0.19, 0.19, 26))
        self.x, self.y = columns.reshape(1, -1), rows.reshape(1, -1)  # (1, P)
        poses = np.zeros((self.LEVELS, len(POSE)), np.float32)
        poses[:, POSE.index("mouth")] = np.linspace(0, 1, self.LEVELS)
        self.drawings = self._sample(render(who, poses), poses)  # (K, 3 P)

    def _sample(self, frames: np.ndarray, poses: np.ndarray) -> Tensor:
        yaw, pitch, roll, smile = poses[:, :4].T[:, :, None].astype(np.float64)
        # The inverse of the renderer's head and mouth frames.
        width = 1 + 0.035 / 0.150 * smile
        hx = self.x * width + 0.11 * yaw
        hy = self.y + 0.285 + 0.06 * pitch + 0.015 * smile - 1.9 * smile * (self.x * width) ** 2
        hx, hy = hx + 0.05 * yaw, hy - 0.60 + 0.04 * pitch
        c, s = np.cos(0.32 * roll), np.sin(0.32 * roll)
        where = np.stack([c * hx - s * hy, s * hx + c * hy + 0.5], axis=-1)  # (T, P, 2)
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        grid = torch.from_numpy(where[:, :, None].astype(np.float32))
        return F.grid_sample(video, grid, padding_mode="border", align_corners=False).flatten(1)

    def read(self, frames: np.ndarray, poses: np.ndarray) -> np.ndarray:
        """Openings [T] in [0, 1] of frames [T, S, S, 3] whose true poses are [T, 8]."""
        out = np.empty(len(frames))
        for part in _blocks(len(frames)):
            distance = torch.cdist(self._sample(frames[part], poses[part]), self.drawings) ** 2
            best = distance.argmin(dim=1).clamp(1, self.LEVELS - 2)[:, None]
            low, mid, high = distance.gather(1, best + torch.tensor([-1, 0, 1])).T
            bend = (low - 2 * mid + high).clamp(min=1e-6)
            shift = ((low - high) / (2 * bend)).clamp(-1, 1)
            out[part] = ((best[:, 0] + shift) / (self.LEVELS - 1)).numpy()
        return out.clip(0, 1)


@dataclass(frozen=True)
class LipSync:
    """Correlation with no offset, the best correlation, and the offset it needs.

    offset: frames by which the mouth comes after the voice (negative: before it).
    """

    correlation: float
    best: float
    offset: int


def lip_sync(opening: np.ndarray, envelope: np.ndarray) -> LipSync:
    """Compare mouth openings [T] with the audio envelope [T] of the same frames.

    Raises:
        ValueError: lengths differ, or there are too few frames to search offsets in.
    """
    frames = len(envelope)
    if opening.shape != envelope.shape or frames < 4 * REACH:
        raise ValueError(
            f"opening: expected [T] as the envelope, T >= {4 * REACH}, "
            f"got {list(opening.shape)} and {list(envelope.shape)}"
        )

    def correlation(offset: int) -> float:
        a = opening[max(offset, 0) : frames + min(offset, 0)].astype(np.float64)
        b = envelope[max(-offset, 0) : frames + min(-offset, 0)].astype(np.float64)
        a, b = a - a.mean(), b - b.mean()
        power = np.sqrt(np.sum(a * a) * np.sum(b * b))
        return float(np.sum(a * b) / power) if power > 0 else 0.0

    offsets = sorted(range(-REACH, REACH + 1), key=abs)  # of equals, the smallest
    scores = [correlation(o) for o in offsets]
    best = int(np.argmax(scores))
    return LipSync(scores[0], scores[best], offsets[best])


# --- Instructions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """What happens between two instructions.

    Attributes:
        instruction: what was said at its first frame.
        before: the track just before it was said.
        envelope: [L] the voice during the segment.
    """

    instruction: int
    before: Track
    envelope: np.ndarray

    def poses(self, instruction: int | None, frames: int | None = None) -> np.ndarray:
        """[L, 8] had another instruction been said, or none."""
        track = replace(self.before)
        if instruction is not None:
            track.say(instruction)
        return track.advance(self.envelope[:frames])[1]


def _halve(frames: np.ndarray) -> np.ndarray:
    """[T, S, S, 3] uint8 -> [T, S/2, S/2, 3] float32, means of 2 x 2 pixels."""
    t, size = frames.shape[:2]
    return frames.reshape(t, size // 2, 2, size // 2, 2, 3).mean(axis=(2, 4), dtype=np.float32)


def recognise(frames: np.ndarray, who: Identity, segment: Segment) -> np.ndarray:
    """Mean squared error of a segment's settled frames under each instruction of the vocabulary.

    Every hypothesis is drawn with the same person, voice and prior pose, at half the size.

    Args:
        frames: [L, S, S, 3] uint8, the segment.
    Returns:
        [len(NAMES)] float64; the smallest is the instruction that was understood.
    Raises:
        ValueError: the segment is too short to settle, or of another length than its voice.
    """
    length = len(segment.envelope)
    if len(frames) != length or length <= SETTLE:
        raise ValueError(
            f"frames: expected a segment of {length} frames, more than {SETTLE}, got {len(frames)}"
        )
    picked = slice(SETTLE, None, STRIDE)
    seen = _halve(frames[picked])
    scores = np.empty(len(NAMES))
    for k in range(len(NAMES)):
        drawn = render(who, segment.poses(k)[picked], frames.shape[1] // 2)
        scores[k] = np.mean((seen - drawn) ** 2, dtype=np.float64)
    return scores


def onset(frames: np.ndarray, truth: np.ndarray, old: np.ndarray) -> int | None:
    """The first frame that is nearer to the truth than to the old instruction going on.

    Args:
        frames, truth, old: [T, S, S, 3] uint8, from the frame at which the instruction was said.
    Returns:
        That frame, T where there is none, or None where truth and old never differ.
    """
    if (truth == old).all():
        return None
    nearer = frame_mse(frames, truth) < frame_mse(frames, old)
    return int(nearer.argmax()) if nearer.any() else len(frames)


@dataclass
class InstructionScore:
    """Instructions said, recognised, and how many frames late they show."""

    said: list[int] = field(default_factory=list)
    recognised: list[int] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)

    def update(
        self, frames: np.ndarray, truth: np.ndarray, who: Identity, segment: Segment
    ) -> None:
        """Judge one whole segment: generated and true frames [L, S, S, 3]."""
        _same_shape(frames, truth)
        self.said.append(segment.instruction)
        self.recognised.append(int(recognise(frames, who, segment).argmin()))
        old = render(who, segment.poses(None, ONSET), frames.shape[1])
        first = onset(frames[:ONSET], truth[:ONSET], old)
        exact = onset(truth[:ONSET], truth[:ONSET], old)
        if first is not None and exact is not None:
            self.delays.append(first - exact)

    @property
    def accuracy(self) -> float:
        return float(np.mean(np.equal(self.said, self.recognised))) if self.said else float("nan")

    @property
    def delay(self) -> float:
        """Mean, in frames."""
        return float(np.mean(self.delays)) if self.delays else float("nan")

    def confusions(self) -> dict[str, int]:
        """ "said -> recognised": how often, for those that differ."""
        out: dict[str, int] = {}
        for a, b in zip(self.said, self.recognised, strict=True):
            if a != b:
                key = f"{NAMES[a]} -> {NAMES[b]}"
                out[key] = out.get(key, 0) + 1
        return out


# --- Identity -----------------------------------------------------------------------------------


@dataclass
class IdentityScore:
    """Errors of colours (levels of 0..255, by region) and of proportions, over sampled frames."""

    colours: list[np.ndarray] = field(default_factory=list)  # [5] each, in the order of COLOURS
    shapes: list[np.ndarray] = field(default_factory=list)  # [7] each

    def update(self, frame: np.ndarray, truth: np.ndarray, who: Identity, pose: np.ndarray) -> None:
        """Judge one frame [S, S, 3] whose true pose is [8]."""
        _same_shape(frame[None], truth[None])
        painted = coverage(who.shape, pose[None], len(frame))[0]
        error = np.full(len(COLOURS), np.nan)
        for k in range(len(COLOURS)):
            region = painted[:, k] > 0.5
            if region.any():
                # The median: a head one pixel off changes the edge of a region, not its colour.
                a, b = (np.median(v.reshape(-1, 3)[region], axis=0) for v in (frame, truth))
                error[k] = np.abs(a - b).mean()
        self.colours.append(error)
        # Fitted from scratch: started at the truth, the search would flatter a featureless frame.
        fitted = fit_identity(frame, pose[None])[0]
        self.shapes.append(np.abs(fitted.shape - who.shape) / np.ptp(SHAPE_RANGE, axis=1))

    def colour_errors(self) -> dict[str, float]:
        """By region, of those that were seen: closed eyes have no colour."""
        errors = np.stack(self.colours)
        seen = ~np.isnan(errors).all(axis=0)
        return {n: float(np.nanmean(errors[:, k])) for k, n in enumerate(COLOURS) if seen[k]}

    @property
    def colour_error(self) -> float:
        """Mean over regions, in levels of 0..255."""
        return float(np.nanmean(self.colours))

    @property
    def shape_error(self) -> float:
        """Mean over proportions, as a part of the range over which people differ.

        The nose is left out: its whole range is half a pixel.
        """
        shown = [i for i, name in enumerate(SHAPE) if name != "nose"]
        return float(np.mean(np.stack(self.shapes)[:, shown]))


# --- A whole video ------------------------------------------------------------------------------


class VideoScore:
    """Running scores of one person's video: feed it chunk by chunk, of any length."""

    def __init__(self, who: Identity) -> None:
        self.who, self.mouth, self.flicker = who, MouthReader(who), Flicker()
        self._mse: list[np.ndarray] = []
        self._ssim: list[np.ndarray] = []
        self._opening: list[np.ndarray] = []
        self._envelope: list[np.ndarray] = []
        self.frames = 0

    def update(
        self, frames: np.ndarray, truth: np.ndarray, poses: np.ndarray, envelope: np.ndarray
    ) -> None:
        """Go on by T frames.

        Args:
            frames, truth: [T, S, S, 3] uint8.
            poses: [T, 8], the true ones.
            envelope: [T].
        """
        self._mse.append(frame_mse(frames, truth))
        picked = slice(-self.frames % SSIM_STRIDE, None, SSIM_STRIDE)
        if len(frames[picked]):
            self._ssim.append(ssim(frames[picked], truth[picked]))
        self.flicker.update(frames, truth)
        self._opening.append(self.mouth.read(frames, poses))
        self._envelope.append(np.asarray(envelope))
        self.frames += len(frames)

    @property
    def mse(self) -> np.ndarray:
        return np.concatenate(self._mse)

    @property
    def opening(self) -> np.ndarray:
        return np.concatenate(self._opening)

    @property
    def envelope(self) -> np.ndarray:
        return np.concatenate(self._envelope)

    @property
    def psnr(self) -> float:
        return decibels(self.mse)

    @property
    def ssim(self) -> float:
        return float(np.concatenate(self._ssim).mean())

    @property
    def lips(self) -> LipSync:
        return lip_sync(self.opening, self.envelope)
