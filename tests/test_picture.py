# SPDX-License-Identifier: Apache-2.0
"""Reading a user's picture: avatars are recognised and used, anything else gets the nearest one."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from reeltime.model.miniature.avatar import (
    COLOURS,
    POSE,
    SHAPE_RANGE,
    Identity,
    random_identity,
    render,
)
from reeltime.model.miniature.picture import fit_identity, load_pixels, natural, psnr, read_picture

REST = np.zeros((1, len(POSE)), np.float32)
SEEDS = range(6_000_000_000, 6_000_000_004)


def person(seed: int) -> Identity:
    return random_identity(np.random.default_rng(seed))


def portrait(seed: int = SEEDS[0], size: int = 128) -> Image.Image:
    return Image.fromarray(render(person(seed), REST, size)[0])


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def saved(image: Image.Image, folder: Path, name: str = "face.png", **options) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


# --- The fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*SEEDS, 6_000_000_008, 6_000_000_016])  # the last: far starts
def test_fit_recovers_the_identity(seed):
    who = person(seed)
    found, match = fit_identity(np.asarray(portrait(seed)))
    assert match > 50
    for name in COLOURS:
        assert np.abs(getattr(found, name) - getattr(who, name)).max() < 1.5 / 255, name
    error = np.abs(found.shape - who.shape) / np.ptp(SHAPE_RANGE, axis=1)
    assert error.max() < 0.15  # the nose: its whole range is half a pixel
    assert error[:-1].max() < 0.02


def test_fit_is_deterministic():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (a, match_a), (b, match_b) = fit_identity(pixels), fit_identity(pixels)
    assert match_a == match_b
    assert np.array_equal(a.to_vector(), b.to_vector())


@pytest.mark.parametrize("shape, dtype", [((64, 48, 3), "uint8"), ((64, 64), "uint8"),
                                          ((64, 64, 3), "float32")], ids=str)  # fmt: skip
def test_fit_names_what_it_expects(shape, dtype):
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[S, S, 3\], got"):
        fit_identity(np.zeros(shape, dtype))


@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_natural_identity_has_the_contrasts_of_training(colour):
    who = natural(Identity.from_vector(np.array([colour] * 15 + list(SHAPE_RANGE.mean(1)))))
    for a, b in (("background", "skin"), ("background", "hair"), ("hair", "skin")):
        assert np.abs(getattr(who, a) - getattr(who, b)).sum() >= 0.35 - 1e-6, (a, b)
    assert who.skin[0] > who.skin[2]  # of no other hue than people have


@pytest.mark.parametrize("seed", SEEDS)
def test_natural_leaves_natural_people_nearly_alone(seed):
    who = person(seed)
    close = natural(who)
    for name in COLOURS:
        assert np.abs(getattr(close, name) - getattr(who, name)).max() < 0.1, name
    assert np.array_equal(close.shape, who.shape)


# --- Avatars pass as they are -------------------------------------------------------------------

EXPORTS = {
    "png": lambda p: p,
    "jpeg 80": lambda p: jpeg(p, 80),
    "jpeg 20": lambda p: jpeg(p, 20),
    "smaller": lambda p: p.resize((64, 64), Image.Resampling.LANCZOS),
    "larger": lambda p: p.resize((300, 300), Image.Resampling.BICUBIC),
    "larger, jpeg 30": lambda p: jpeg(p.resize((512, 512)), 30),
    "palette": lambda p: p.quantize(64),
}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_avatar_is_used_as_it_is(name, seed, tmp_path):
    path = saved(EXPORTS[name](portrait(seed)), tmp_path)
    picture = read_picture(path)
    assert picture.message is None
    assert np.array_equal(picture.pixels, load_pixels(path))
    assert picture.pixels.shape == (128, 128, 3)
    assert psnr(picture.pixels, np.asarray(portrait(seed))) > 25


def test_export_of_any_size_passes(tmp_path):
    picture = read_picture(saved(portrait(size=640), tmp_path))
    assert picture.message is None
    assert psnr(picture.pixels, np.asarray(portrait())) > 34


def test_same_size_is_not_resampled(tmp_path):
    pixels = read_picture(saved(portrait(), tmp_path)).pixels
    assert np.array_equal(pixels, np.asarray(portrait()))


# --- Anything else becomes an avatar ------------------------------------------------------------


def drawing(kind: str) -> Image.Image:
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    image = Image.new("RGB", (128, 128), (120, 180, 240))
    draw = ImageDraw.Draw(image)
    if kind == "photo":
        return Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg"))
    if kind == "noise":
        return noise
    if kind == "blurred noise":  # all but one colour: the highest PSNR of all
        return noise.filter(ImageFilter.GaussianBlur(8))
    if kind == "gradient":
        return Image.linear_gradient("L").convert("RGB")
    if kind == "white":
        return Image.new("RGB", (128, 128), "white")
    if kind == "landscape":
        draw.polygon([(0, 128), (0, 80), (60, 60), (128, 90), (128, 128)], fill=(60, 140, 50))
        draw.ellipse((90, 10, 115, 35), fill=(250, 240, 120))
    if kind == "smiley":
        draw.ellipse((20, 20, 108, 108), fill=(250, 210, 60))
        for x in (45, 73):
            draw.ellipse((x, 45, x + 10, 60), fill=(20, 20, 20))
        draw.arc((40, 50, 88, 95), 20, 160, fill=(120, 20, 20), width=4)
    if kind == "another avatar":
        draw.rectangle((10, 100, 118, 128), fill=(40, 60, 90))
        draw.ellipse((35, 15, 93, 95), fill=(230, 180, 150))
        draw.pieslice((33, 10, 95, 70), 180, 360, fill=(60, 40, 30))
        for x in (47, 73):
            draw.ellipse((x, 48, x + 8, 56), fill=(20, 20, 20))
        draw.line((52, 78, 76, 78), fill=(150, 50, 50), width=3)
    if kind == "turned head":
        turned = REST.copy()
        turned[0, POSE.index("yaw")] = 1
        return Image.fromarray(render(person(SEEDS[1]), turned)[0])
    return image


OTHERS = ("photo", "noise", "blurred noise", "gradient", "white", "landscape", "smiley",
          "another avatar", "turned head")  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_else_becomes_the_nearest_avatar(kind, tmp_path):
    picture = read_picture(saved(drawing(kind), tmp_path, f"{kind}.png"))
    assert picture.message is not None
    assert f"{kind}.png" in picture.message
    assert "reeltime avatar" in picture.message
    assert np.array_equal(picture.pixels, render(picture.identity, REST)[0])
    again = read_picture(saved(Image.fromarray(picture.pixels), tmp_path))
    assert again.message is None


def test_nearest_avatar_takes_the_colours(tmp_path):
    picture = read_picture(saved(drawing("another avatar"), tmp_path))
    who = picture.identity
    assert who.background[2] > who.background[0]  # the sky behind
    assert np.abs(who.skin * 255 - (230, 180, 150)).max() < 40
    assert who.hair.mean() < who.skin.mean() - 0.2
    assert who.shirt[2] > who.shirt[0]


# --- File formats -------------------------------------------------------------------------------


def test_wide_picture_loses_its_sides(tmp_path):
    padded = ImageOps.expand(portrait(), (40, 0), "red")
    assert np.array_equal(load_pixels(saved(padded, tmp_path)), np.asarray(portrait()))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 20)], ids=str)
def test_odd_sizes_are_read(size, tmp_path):
    pixels = load_pixels(saved(Image.new("RGB", size, (10, 200, 30)), tmp_path))
    assert pixels.shape == (128, 128, 3)
    assert np.abs(pixels - np.array([10.0, 200, 30])).max() <= 1


def test_shrinking_antialiases(tmp_path):
    checks = (np.indices((1024, 1024)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = load_pixels(saved(Image.fromarray(checks), tmp_path))
    assert np.abs(pixels[4:-4, 4:-4].astype(int) - 127).max() <= 2


def test_transparency_is_laid_on_white(tmp_path):
    image = portrait().convert("RGBA")
    image.putalpha(128)
    half = (np.asarray(portrait()).astype(float) * 128 + 255 * 127) / 255
    assert np.abs(load_pixels(saved(image, tmp_path)) - half).max() <= 1
    blank = Image.new("P", (8, 8), 0)
    pixels = load_pixels(saved(blank, tmp_path, "palette.png", transparency=0))
    assert (pixels == 255).all()


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    lying = portrait().transpose(Image.Transpose.ROTATE_90)
    picture = read_picture(saved(lying, tmp_path, "phone.jpg", exif=exif, quality=95))
    assert picture.message is None
    assert psnr(picture.pixels, np.asarray(portrait())) > 30


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "I;16", "P", "RGBA"])
def test_every_mode_is_read(mode, tmp_path):
    grey = portrait().convert("L")
    image = portrait().convert(mode) if mode != "I;16" else None
    if image is None:
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    pixels = load_pixels(saved(image, tmp_path, "face.jpg" if mode == "CMYK" else "face.png"))
    assert pixels.shape == (128, 128, 3)
    assert abs(float(pixels.mean()) - float(np.mean(np.asarray(portrait())))) < 8
    if mode in ("L", "LA", "I;16"):
        assert np.array_equal(pixels[..., 1], np.asarray(grey))


# --- Files that cannot be read ------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be enormous."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def png_bytes(kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    portrait().save(stream, kind)
    return stream.getvalue()


BROKEN = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello, I am no picture\n" * 20, "not a picture"),
    "truncated PNG": (lambda: png_bytes()[:900], "cannot be read"),
    "truncated JPEG": (lambda: png_bytes("JPEG")[:900], "cannot be read"),
    "header only": (lambda: png_bytes()[:8], "cannot be read"),
    "bit rot": (lambda: png_bytes()[:60] + bytes(500) + png_bytes()[560:], "cannot be read"),
    "bomb": (lambda: bomb(100_000, 100_000), "at most 100 megapixels"),
    "large": (lambda: bomb(12_000, 10_000), "at most 100 megapixels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_unreadable_file_is_named(kind, tmp_path):
    make, reason = BROKEN[kind]
    path = tmp_path / "broken.png"
    path.write_bytes(make())
    with pytest.raises(ValueError, match="image: expected") as caught:
        read_picture(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="image: expected a PNG or JPEG file.*is a directory"):
        read_picture(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: expected .*nobody\.png does not exist"):
        read_picture(tmp_path / "nobody.png")
