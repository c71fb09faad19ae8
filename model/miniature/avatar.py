# SPDX-License-Identifier: Apache-2.0
"""The procedural avatar: unlimited video with exact ground truth.

A frame is a pure function of an identity (who: colours and proportions) and a pose (how: head
angles, face, hand, mouth).  Every part is an ellipse, a capsule or a half plane, painted back to
front with a one-pixel soft edge, so the picture is differentiable in spirit and sharp to the eye.

Units: the picture spans [-1, 1] in x (right) and y (down).  Poses are unit-free in [-1, 1] or
[0, 1]; see `POSE`.  All drawing is vectorised over frames.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

SIZE = 128
POSE = ("yaw", "pitch", "roll", "smile", "lids", "brows", "hand", "mouth")
COLOURS = ("background", "skin", "hair", "eye", "shirt")
SHAPE = ("face_width", "face_height", "eye_spacing", "eye_size", "hair_length", "fringe", "nose")
SHAPE_RANGE = np.array(
    [[0.40, 0.48], [0.50, 0.58], [0.165, 0.215], [0.085, 0.11], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]],
    dtype=np.float32,
)
_SKINS = np.array(
    [[255, 224, 196], [241, 194, 160], [224, 172, 125], [198, 134, 90], [141, 85, 52], [96, 60, 42]]
)
_HAIRS = np.array(
    [[38, 28, 24], [92, 58, 36], [150, 98, 50], [222, 184, 108], [170, 62, 40], [128, 128, 140]]
)
_LIP = np.array([176, 62, 66], dtype=np.float32) / 255
_INSIDE = np.array([70, 16, 26], dtype=np.float32) / 255
_TONGUE = np.array([214, 96, 100], dtype=np.float32) / 255
_TEETH = np.array([250, 248, 240], dtype=np.float32) / 255
_WHITE = np.array([250, 250, 250], dtype=np.float32) / 255
_PUPIL = np.array([20, 18, 22], dtype=np.float32) / 255


@dataclass(frozen=True)
class Identity:
    """Who is drawn: five RGB colours in [0, 1] and seven proportions (see `SHAPE_RANGE`)."""

    background: np.ndarray
    skin: np.ndarray
    hair: np.ndarray
    eye: np.ndarray
    shirt: np.ndarray
    shape: np.ndarray

    def __getattr__(self, name: str) -> float:
        if name in SHAPE:
            return float(self.shape[SHAPE.index(name)])
        raise AttributeError(name)

    def to_vector(self) -> np.ndarray:
        """[22] float32: colours then shape, the inverse of `from_vector`."""
        return np.concatenate([np.asarray(getattr(self, f.name)) for f in fields(self)]).astype(
            np.float32
        )

    @staticmethod
    def from_vector(vector: np.ndarray) -> Identity:
        background, skin, hair, eye, shirt, shape = np.split(
            np.asarray(vector, dtype=np.float32), (3, 6, 9, 12, 15)
        )
        return Identity(background, skin, hair, eye, shirt, shape)


def random_identity(rng: np.random.Generator) -> Identity:
    """A person drawn from natural skin and hair tones and free background, eye, shirt colours."""

    def mix(palette: np.ndarray) -> np.ndarray:
        a, b = palette[rng.integers(len(palette), size=2)]
        w = rng.uniform(0, 0.5)
        return np.clip((a * (1 - w) + b * w) / 255 + rng.normal(0, 0.02, 3), 0, 1)

    def hsv(s_lo: float, s_hi: float, v_lo: float, v_hi: float) -> np.ndarray:
        return np.array(
            colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(s_lo, s_hi), rng.uniform(v_lo, v_hi))
        )

    skin = mix(_SKINS)
    hair = mix(_HAIRS) if rng.uniform() < 0.75 else hsv(0.4, 0.9, 0.35, 0.9)
    background = hsv(0.1, 0.55, 0.55, 0.95)
    # A face one cannot tell from its background or hair is no use to anyone: draw again.
    while np.abs(background - skin).sum() < 0.35 or np.abs(background - hair).sum() < 0.35:
        background = hsv(0.1, 0.55, 0.45, 0.95)
    while np.abs(hair - skin).sum() < 0.35:
        hair = mix(_HAIRS)
    lo, hi = SHAPE_RANGE.T
    colours = [background, skin, hair, hsv(0.4, 0.9, 0.35, 0.75), hsv(0.3, 0.9, 0.3, 0.9)]
    return Identity.from_vector(np.concatenate([*colours, rng.uniform(lo, hi)]))


class _Canvas:
    """Frames being painted: planes [T, 3, S, S] and the grid of pixel centres."""

    def __init__(self, frames: int, size: int) -> None:
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.pixel = np.float32(2 / size)
        self.image = np.empty((frames, 3, size, size), np.float32)
        self.size = size

    def box(self, x0: float, x1: float, y0: float, y1: float) -> _Canvas:
        """A view of the part of the canvas that a feature can ever touch: less to paint."""
        part = object.__new__(_Canvas)
        a, b, c, d = (int(np.clip((v + 1) / 2, 0, 1) * self.size) for v in (x0, x1, y0, y1))
        part.x, part.y = self.x[:, :, a:b], self.y[:, c:d]
        part.image, part.pixel, part.size = self.image[..., c:d, a:b], self.pixel, self.size
        return part

    def alpha(self, distance: np.ndarray) -> np.ndarray:
        """Coverage from a signed distance (negative inside): a soft edge 1.5 pixels wide."""
        return np.clip(0.5 - distance / (1.5 * self.pixel), 0, 1)

    def paint(self, alpha: np.ndarray, colour: np.ndarray) -> None:
        colour = np.asarray(colour, np.float32)[:, None, None]
        self.image += alpha[:, None] * (colour - self.image)


Length = np.ndarray | float


def _ellipse(x: np.ndarray, y: np.ndarray, rx: Length, ry: Length) -> np.ndarray:
    """First-order signed distance to an ellipse: (f - 1) * f / |grad f|, f the scaled radius."""
    u, v = x / rx, y / ry
    f = np.sqrt(u * u + v * v) + 1e-6
    gx, gy = u / rx, v / ry
    return (f - 1) * f / (np.sqrt(gx * gx + gy * gy) + 1e-6)


def _capsule(
    x: np.ndarray, y: np.ndarray, ax: Length, ay: Length, bx: Length, by: Length, radius: float
) -> np.ndarray:
    """Signed distance to the segment a-b thickened by radius."""
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    return np.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2) - radius


def render(identity: Identity, poses: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Draw frames.

    Args:
        identity: who.
        poses: [T, 8] in the order of `POSE`; yaw, pitch, roll, smile in [-1, 1] (positive: to the
            viewer's right, down, clockwise, smiling), the others in [0, 1].
        size: pixels per side.
    Returns:
        [T, size, size, 3] uint8.
    Raises:
        ValueError: poses is not [T, 8].
    """
    poses = np.asarray(poses, dtype=np.float32)
    if poses.ndim != 2 or poses.shape[1] != len(POSE):
        raise ValueError(f"poses: expected shape [T, {len(POSE)}], got {list(poses.shape)}")
    out = np.empty((len(poses), size, size, 3), np.uint8)
    for start in range(0, len(poses), 8):  # eight frames at a time stay in the cache
        image = _paint(identity, poses[start : start + 8], size)
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        out[start : start + 8] = image.transpose(0, 2, 3, 1)
    return out


def _paint(who: Identity, poses: np.ndarray, size: int) -> np.ndarray:
    yaw, pitch, roll, smile, lids, brows, hand, mouth = (p[:, None, None] for p in poses.T)
    canvas = _Canvas(len(poses), size)
    shade = 1.0 - 0.22 * (canvas.y + 1) / 2
    canvas.image[:] = who.background[:, None, None] * shade[:, None]

    # Head frame: roll about the neck, then shift; features shift further than the skull (parallax).
    def head(part: _Canvas) -> tuple[np.ndarray, np.ndarray]:
        c, s = np.cos(0.32 * roll), np.sin(0.32 * roll)
        px, py = part.x, part.y - 0.5
        x, y = c * px + s * py, -s * px + c * py + 0.5
        return x - 0.05 * yaw, y + 0.10 - 0.04 * pitch

    w, h = who.face_width, who.face_height
    x, y = head(canvas)
    back = np.minimum(
        _ellipse(x + 0.05 * yaw, y + 0.08, w + 0.11, h + 0.08),
        _capsule(x + 0.05 * yaw, y, -w + 0.1, 0, -w + 0.06, 0.2 + 0.55 * who.hair_length, 0.17),
    )
    back = np.minimum(
        back, _capsule(x + 0.05 * yaw, y, w - 0.1, 0, w - 0.06, 0.2 + 0.55 * who.hair_length, 0.17)
    )
    canvas.paint(canvas.alpha(back), who.hair * 0.82)

    torso = canvas.box(-1, 1, 0.3, 1)
    torso.paint(torso.alpha(_ellipse(torso.x, torso.y - 1.2, 0.82, 0.52)), who.shirt)
    neck = canvas.box(-0.4, 0.4, 0.1, 1)
    neck.paint(
        neck.alpha(_capsule(neck.x, neck.y, 0.02 * yaw, 0.3, 0, 0.72, 0.15)), who.skin * 0.84
    )

    face = canvas.box(-0.85, 0.85, -0.95, 0.85)
    x, y = head(face)
    skull = face.alpha(_ellipse(x, y, w, h))
    face.paint(skull, who.skin)
    fringe = y + 0.30 - 0.14 * who.fringe + 0.35 * (x - 0.12 * yaw + 0.1) ** 2 - 0.05 * pitch
    crown = face.alpha(_ellipse(x, y + 0.01, w + 0.02, h + 0.02))
    face.paint(crown * face.alpha(fringe), who.hair)

    _paint_face(who, canvas, head, yaw, pitch, smile, lids, brows, mouth)
    if float(poses[:, 6].max()) > 0.02:
        _paint_hand(who, canvas.box(0.2, 1, -0.4, 1), hand)
    return canvas.image


def _paint_face(
    who: Identity,
    canvas: _Canvas,
    head: Callable[[_Canvas], tuple[np.ndarray, np.ndarray]],
    yaw: np.ndarray,
    pitch: np.ndarray,
    smile: np.ndarray,
    lids: np.ndarray,
    brows: np.ndarray,
    mouth: np.ndarray,
) -> None:
    upper = canvas.box(-0.8, 0.8, -0.75, 0.45)
    hx, hy = head(upper)
    x, y = hx - 0.11 * yaw, hy + 0.06 - 0.07 * pitch
    size, opening = who.eye_size, np.clip(1 - lids, 0, 1)
    for side in (-1, 1):
        ex = x - side * who.eye_spacing
        lens = _ellipse(ex, y, size, size * 1.05 * opening + 0.004)
        white = upper.alpha(lens)
        upper.paint(white, _WHITE)
        iris = np.hypot(ex - 0.02 * yaw, y - 0.015 * pitch)
        upper.paint(white * upper.alpha(iris - size * 0.66), who.eye)
        upper.paint(white * upper.alpha(iris - size * 0.34), _PUPIL)
        # The lash line closes into one stroke; the disc keeps it from running across the face.
        lid = np.maximum(np.abs(lens) - 0.012, np.hypot(ex, y) - size * 1.08)
        upper.paint(upper.alpha(lid) * np.clip(1.35 - opening, 0, 1), who.skin * 0.3)
        lift = 0.06 * brows + 0.02 * smile
        by = y + 0.175 + lift
        frown = 0.045 * np.clip(-smile, 0, 1)
        brow = _capsule(ex, by, -side * 0.085, frown, side * 0.085, -frown, 0.022)
        upper.paint(upper.alpha(brow), who.hair * 0.6)
    middle = canvas.box(-0.45, 0.45, -0.4, 0.5)
    hx, hy = head(middle)
    nose = _ellipse(hx - 0.15 * yaw, hy - 0.10 - 0.09 * pitch, 0.032 + 0.02 * who.nose, 0.045)
    middle.paint(middle.alpha(nose), who.skin * 0.86)

    lower = canvas.box(-0.6, 0.6, -0.1, 0.85)
    hx, hy = head(lower)
    mx = hx - 0.11 * yaw
    my = hy - 0.285 - 0.06 * pitch + 1.9 * smile * mx * mx - 0.015 * smile
    half, gap = 0.150 + 0.035 * smile - 0.02 * mouth, 0.012 + 0.145 * mouth
    lips = lower.alpha(_ellipse(mx, my - 0.4 * gap, half + 0.022, gap + 0.022))
    inside = lower.alpha(_ellipse(mx, my - 0.4 * gap, half, gap))
    lower.paint(lips, _LIP)
    lower.paint(inside, _INSIDE)
    shown = np.clip(mouth * 3 - 0.3, 0, 1)
    tongue = lower.alpha(_ellipse(mx, my - 1.25 * gap, half * 0.62, gap * 0.55))
    lower.paint(inside * tongue * shown, _TONGUE)
    lower.paint(inside * lower.alpha(my + 0.22 * gap) * shown, _TEETH)


def _paint_hand(who: Identity, part: _Canvas, hand: np.ndarray) -> None:
    x, y = part.x - 0.66, part.y - (1.55 - 1.3 * hand)
    part.paint(part.alpha(_capsule(x, y, 0.05, 0.30, 0.12, 1.0, 0.11)), who.shirt * 0.85)
    for k, reach in enumerate((0.13, 0.19, 0.20, 0.15)):
        fx = -0.105 + 0.07 * k
        finger = _capsule(x, y, fx, 0, fx * 1.35, -0.06 - reach, 0.032)
        part.paint(part.alpha(finger), who.skin * 0.95)
    part.paint(part.alpha(_capsule(x, y, -0.08, 0.02, -0.19, -0.06, 0.034)), who.skin * 0.95)
    part.paint(part.alpha(_ellipse(x, y - 0.05, 0.135, 0.15)), who.skin)
