# SPDX-License-Identifier: Apache-2.0
"""A user's picture: read it, and find the avatar in it.

The renderer paints each region in one colour, so for fixed proportions u a neutral picture is
linear in the five colours: picture = A(u) C + b(u), with coverages A [pixels, 5] and constant parts
b (lips, pupils, the white of the eye).  The nearest avatar is a separable least-squares problem
(variable projection, Golub and Pereyra, 1973): C is solved for in closed form, and only the seven
proportions are searched.

    min over u of  | A(u) C(u) + b(u) - picture |^2,   C(u) = argmin over C
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .avatar import _HAIRS, _SKINS, POSE, SHAPE, SHAPE_RANGE, SIZE, Identity, render

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 100_000_000
# Measured over 30 people: exported avatars keep 25 dB and a likeness of 0.88 down to JPEG quality
# 10 or 48 pixels.  Photos, noise, landscapes and other drawings reach 20 dB and 0.69; a flat or
# smooth picture can be matched to 26 dB, but has no face: a likeness of 0.28 at most.
MATCH_PSNR, MATCH_LIKENESS = 24.0, 0.8
_FACE = ((0.31, 0.72), (0.28, 0.72))  # rows, columns, as parts of the picture
_REST = np.zeros((1, len(POSE)), np.float32)


@dataclass(frozen=True)
class Picture:
    """What the stream starts from.

    Attributes:
        pixels: [128, 128, 3] uint8: the user's own where they show an avatar, else a rendering.
        identity: the avatar in them.
        message: what the user should know, or None.
    """

    pixels: np.ndarray
    identity: Identity
    message: str | None


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(255^2 / mean squared error) of two uint8 pictures, in dB; identical ones: inf."""
    error = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# --- The nearest avatar -------------------------------------------------------------------------


def _shape(u: np.ndarray) -> np.ndarray:
    lo, hi = SHAPE_RANGE.T
    return lo + u * (hi - lo)


def _draw(shape: np.ndarray, colours: np.ndarray, pose: np.ndarray, size: int) -> np.ndarray:
    """[S * S, 3] in [0, 1] for colours [5, 3] and proportions [7]."""
    who = Identity.from_vector(np.concatenate([colours.reshape(-1), shape]))
    return render(who, pose, size).reshape(-1, 3).astype(np.float64) / 255


def coverage(shape: np.ndarray, pose: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel each colour paints: picture = coverage @ colours + constant.

    Args:
        shape: [7] proportions.
        pose: [1, 8].
    Returns:
        coverage [S * S, 5] and constant [S * S, 3], in [0, 1].
    """
    # Three colours at a time: each region is given a channel of its own.
    one_hot = np.zeros((2, 6, 3))
    for k in range(6):
        one_hot[k // 3, k, k % 3] = 1
    constant = _draw(shape, np.zeros((5, 3)), pose, size)
    parts = [_draw(shape, c[:5], pose, size) - constant for c in one_hot]
    return np.concatenate(parts, axis=1)[:, :5], constant


class _Fit:
    """Variable projection on a picture in a known pose; u [7]: proportions scaled to [0, 1]."""

    def __init__(self, pixels: np.ndarray, pose: np.ndarray) -> None:
        self.size, self.pose = pixels.shape[0], pose
        self.target = pixels.reshape(-1, 3).astype(np.float64) / 255

    def draw(self, u: np.ndarray, colours: np.ndarray) -> np.ndarray:
        return _draw(_shape(u), colours, self.pose, self.size)

    def solve(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coverages [S * S, 5], the best colours [5, 3] in [0, 1], residual [S * S, 3]."""
        painted, constant = coverage(_shape(u), self.pose, self.size)
        gram = painted.T @ painted + 1e-6 * np.eye(5)  # a region may be hidden
        colours = np.linalg.solve(gram, painted.T @ (self.target - constant)).clip(0, 1)
        return painted, colours, painted @ colours + constant - self.target

    def error(self, u: np.ndarray) -> float:
        return float(np.mean(self.solve(u)[2] ** 2))

    def sweep(self, u: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
        """One round of coordinate search over a coarse grid."""
        for k in range(len(u)):
            candidates = np.tile(u, (len(values), 1))
            candidates[:, k] = values
            u = candidates[int(np.argmin([self.error(c) for c in candidates]))]
        return u

    def descend(self, u: np.ndarray, steps: int) -> np.ndarray:
        """Levenberg-Marquardt on the projected residual (Kaufman, 1975)."""
        damping, (painted, colours, residual) = 1e-2, self.solve(u)
        best = np.mean(residual**2)
        for _ in range(steps):
            drawn = self.draw(u, colours)
            columns = []
            for k in range(len(u)):
                moved = u.copy()
                moved[k] += 0.2 if u[k] < 0.5 else -0.2  # wide: eight-bit drawings, thin edges
                columns.append((self.draw(moved, colours) - drawn) / (moved[k] - u[k]))
            jacobian = np.stack(columns, axis=2)  # [S * S, 3, 7]
            flat = jacobian.reshape(len(jacobian), -1)
            flat = flat - painted @ np.linalg.lstsq(painted, flat, rcond=None)[0]
            jacobian = flat.reshape(-1, len(u))
            normal, slope = jacobian.T @ jacobian, jacobian.T @ residual.reshape(-1)
            for _ in range(4):
                lift = damping * np.diag(np.diag(normal) + 1e-6)
                trial = np.clip(u - np.linalg.solve(normal + lift, slope), 0, 1)
                solved = self.solve(trial)
                if (error := np.mean(solved[2] ** 2)) < best:
                    break
                damping *= 5
            else:
                return u
            gain, best, u = best - error, error, trial
            painted, colours, residual = solved
            damping = max(damping / 5, 1e-4)
            if gain < 1e-3 * best:
                break
        return u


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))


def fit_identity(pixels: np.ndarray, pose: np.ndarray = _REST) -> tuple[Identity, float]:
    """The avatar nearest to a picture.  Deterministic; about half a second.

    Args:
        pixels: [S, S, 3] uint8.
        pose: [1, 8], the pose it is in: neutral unless known to be another.
    Returns:
        The identity, and the PSNR in dB of its rendering against the picture.
    Raises:
        ValueError: pixels are not [S, S, 3] uint8.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (len(pixels),) * 2 + (3,):
        raise ValueError(
            f"pixels: expected uint8 [S, S, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    u = np.full(len(SHAPE), 0.5)
    u = _Fit(_resize(pixels, 32), pose).sweep(u, (0.1, 0.3, 0.5, 0.7, 0.9))
    u = _Fit(_resize(pixels, 64), pose).descend(u, 10)
    fit = _Fit(pixels, pose)
    u = fit.descend(u, 8)
    who = Identity.from_vector(np.concatenate([fit.solve(u)[1].reshape(-1), _shape(u)]))
    return who, psnr(render(who, pose, len(pixels))[0], pixels)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two pictures over eyes, nose and mouth, each channel's mean removed.

    Unlike PSNR it isn't won by a smooth background.  In [-1, 1]; 0 where either is flat.
    """
    size = len(a)
    rows, columns = (slice(round(lo * size), round(hi * size)) for lo, hi in _FACE)
    x, y = (p[rows, columns].astype(np.float64) for p in (a, b))
    x, y = x - x.mean((0, 1)), y - y.mean((0, 1))
    power = float(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y)) / power**0.5 if power > 0 else 0.0


# --- An avatar that could have been drawn -------------------------------------------------------


def _hsv_grid(saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """[N, 3] RGB: every hue, at the saturations and values that `random_identity` draws from."""
    axes = (
        np.linspace(0, 1, 48, endpoint=False),
        np.linspace(*saturation, 8),
        np.linspace(*value, 8),
    )
    h, s, v = (x.reshape(-1, 1) for x in np.meshgrid(*axes))
    k = (np.array([5.0, 3.0, 1.0]) + 6 * h) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def _mixtures(palette: np.ndarray) -> np.ndarray:
    """[N, 3] RGB on the segments between any two colours of a palette."""
    w = np.linspace(0, 1, 11)[:, None, None, None]
    return (palette[:, None] * w + palette[None] * (1 - w)).reshape(-1, 3) / 255


def natural(who: Identity) -> Identity:
    """The nearest identity that `random_identity` could have drawn: tones and contrasts as there.

    A skin of the sky's blue, or hair of the background's colour, was never seen in training.
    """

    def nearest(colour: np.ndarray, allowed: np.ndarray, *others: np.ndarray) -> np.ndarray:
        for other in others:
            allowed = allowed[np.abs(allowed - other).sum(1) >= 0.35]
        return allowed[np.argmin(np.sum((allowed - colour) ** 2, axis=1))].astype(np.float32)

    skin = nearest(who.skin, _mixtures(_SKINS))
    hairs = np.concatenate([_mixtures(_HAIRS), _hsv_grid((0.4, 0.9), (0.35, 0.9))])
    hair = nearest(who.hair, hairs, skin)
    background = nearest(who.background, _hsv_grid((0.1, 0.55), (0.45, 0.95)), skin, hair)
    eye = nearest(who.eye, _hsv_grid((0.4, 0.9), (0.35, 0.75)))
    shirt = nearest(who.shirt, _hsv_grid((0.3, 0.9), (0.3, 0.9)))
    return Identity(background, skin, hair, eye, shirt, who.shape)


# --- Files --------------------------------------------------------------------------------------


def load_pixels(path: str | Path, size: int = SIZE) -> np.ndarray:
    """[size, size, 3] uint8: the middle square of a picture, upright, on white where transparent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file, not a picture, damaged, or too large to be one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image: expected a PNG or JPEG file, but {path} does not exist")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise ValueError(f"image: expected a PNG or JPEG file, but {path} is {kind}")
    if path.stat().st_size == 0:
        raise ValueError(f"image: expected a PNG or JPEG file, but {path} is empty")
    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS below
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return _to_square(image, size)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image: expected at most {MAX_PIXELS // 10**6} megapixels, {path} claims more"
        ) from error
    except broken as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(
            f"image: expected a PNG or JPEG file, but {path} cannot be read ({reason})"
        ) from error


def _to_square(image: Image.Image, size: int) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; converting would clip it
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).copy()


def read_picture(path: str | Path) -> Picture:
    """A user's picture, ready to stream from.

    Args:
        path: a picture of any size; a PNG or JPEG of an avatar at rest is used as it is, anything
            else is replaced by the avatar nearest to it.
    Raises:
        FileNotFoundError, ValueError: see `load_pixels`.
    """
    pixels = load_pixels(path)
    who, match = fit_identity(pixels)
    drawn = render(who, _REST)[0]
    if match >= MATCH_PSNR and likeness(drawn, pixels) >= MATCH_LIKENESS:
        return Picture(pixels, who, None)
    who = natural(who)
    return Picture(
        render(who, _REST)[0],
        who,
        f"image: {Path(path).name} does not show an avatar of this style, upright and at rest; "
        "streaming the nearest one, in its colours (`reeltime avatar` exports some that fit)",
    )
