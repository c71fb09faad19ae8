# SPDX-License-Identifier: Apache-2.0
"""Sound in, video out: every WAV, sync, playable after a kill, bounded memory, full disks."""

from __future__ import annotations

import errno
import shutil
import threading
import time
import tracemalloc
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from reeltime.model import media

SAMPLES = media.RATE // media.FPS
FULL = Path("/dev/full")


def write_wav(
    path: Path, rate: int, channels: int, *, seconds: float = 0.5, width: int = 2
) -> np.ndarray:
    """A 220 Hz tone at half of full scale in every channel: what reading it should give."""
    tone = 0.5 * np.sin(2 * np.pi * 220 * np.arange(int(rate * seconds)) / rate)
    if width == 1:
        stored = np.rint(tone * 127 + 128).astype("u1")
    else:
        stored = np.rint(tone * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(stored[:, None], channels, axis=1).tobytes())
    return tone.astype(np.float32)


def pictures(frames: int, value: int = 128, size: int = 32) -> np.ndarray:
    return np.full((frames, size, size, 3), value, np.uint8)


def silence(frames: int) -> np.ndarray:
    return np.zeros(frames * SAMPLES, np.float32)


def decoded_video(path: Path) -> list[tuple[float, float]]:
    """(time, mean brightness) of every frame."""
    with av.open(str(path)) as container:
        return [(f.time, f.to_ndarray(format="gray").mean()) for f in container.decode(video=0)]


# --- Sound in -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, channels, width",
    [(8000, 1, 2), (44100, 2, 2), (96000, 6, 2), (11025, 3, 1), (192000, 1, 4), (48000, 24, 2)],
    ids=str,
)
def test_wav_of_any_rate_and_channels(tmp_path, rate, channels, width):
    tone = write_wav(tmp_path / "a.wav", rate, channels, width=width)
    samples, came = media.read_audio(tmp_path / "a.wav")
    assert came == rate
    assert samples.dtype == np.float32
    assert samples.shape == tone.shape
    assert np.abs(samples - tone).max() < 1.5 / 2 ** (8 * min(width, 2) - 1)


def test_channels_are_averaged(tmp_path):
    left = np.linspace(-20000, 20000, 4800).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 0, "NONE", ""))
        file.writeframes(np.stack([left, np.zeros_like(left)], axis=1).tobytes())
    samples, _ = media.read_audio(tmp_path / "a.wav")
    assert np.abs(samples - left / 65536).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_blocks_are_resampled_and_complete(tmp_path, rate):
    write_wav(tmp_path / "a.wav", rate, 2, seconds=1.25)
    with media.AudioReader(tmp_path / "a.wav", media.RATE) as reader:
        sizes = [len(block) for block in reader.blocks(SAMPLES)]
        assert set(sizes[:-1]) == {SAMPLES}
        assert abs(sum(sizes) - 1.25 * media.RATE) <= 16
    with media.AudioReader(tmp_path / "a.wav", media.RATE) as reader:
        samples = np.concatenate(list(reader.blocks(1000)))
    want = 0.5 * np.sin(2 * np.pi * 220 * np.arange(len(samples)) / media.RATE)
    assert np.abs(samples - want)[100:-100].max() < 5e-3  # nothing lost or doubled between blocks


def test_reading_holds_one_block_not_the_file(tmp_path):
    write_wav(tmp_path / "a.wav", 48000, 2, seconds=60)
    with media.AudioReader(tmp_path / "a.wav", media.RATE) as reader:
        tracemalloc.start()
        total = sum(len(block) for block in reader.blocks(media.RATE))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == 60 * media.RATE
    assert peak < 2e6  # the file holds 11.5 MB


def test_no_samples_is_an_empty_array(tmp_path):
    write_wav(tmp_path / "a.wav", 8000, 1, seconds=0)
    samples, rate = media.read_audio(tmp_path / "a.wav")
    assert samples.shape == (0,)
    assert rate == 8000


def test_not_finite_samples_become_silence(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=8000, layout="mono")
        values = np.array([[0.25, np.nan, np.inf, -np.inf, 0.25]], np.float32)
        frame = av.AudioFrame.from_ndarray(values, format="flt", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    assert media.read_audio(tmp_path / "a.wav")[0].tolist() == [0.25, 0, 0, 0, 0.25]


def test_unreadable_sound_is_named(tmp_path):
    missing, text, mute = tmp_path / "no.wav", tmp_path / "text.wav", tmp_path / "mute.mp4"
    text.write_text("not a sound")
    with av.open(str(mute), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures(1)[0])))
        container.mux(stream.encode())
    with pytest.raises(FileNotFoundError, match=r"audio: no such file: .*no\.wav"):
        media.read_audio(missing)
    with pytest.raises(ValueError, match=r"audio: cannot read .*text\.wav: Invalid data"):
        media.read_audio(text)
    with pytest.raises(ValueError, match=r"audio: cannot read .*: Is a directory"):
        media.read_audio(tmp_path)
    with pytest.raises(ValueError, match=r"audio: no sound in .*mute\.mp4"):
        media.read_audio(mute)


# --- Video out ----------------------------------------------------------------------------------


def test_flash_and_click_are_in_sync(tmp_path):
    path, flash = tmp_path / "a.mp4", 30
    click = 0.8 * np.sin(np.arange(50 * SAMPLES) * 0.3).astype(np.float32)
    click[: flash * SAMPLES] = 0
    with media.VideoWriter(path, 32, 32) as writer:
        for start in range(0, 50, 5):
            frames = pictures(5, 255 if start >= flash else 0)
            writer.write(frames, click[start * SAMPLES : (start + 5) * SAMPLES])
    seen = decoded_video(path)
    assert [round(time * media.FPS, 3) for time, _ in seen] == list(range(50))
    flashed = next(time for time, brightness in seen if brightness > 100)
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            loud = np.abs(frame.to_ndarray()[0]) > 0.3
            if loud.any():
                clicked = frame.time + loud.argmax() / media.RATE
                break
        assert container.duration == pytest.approx(2e6, abs=5e4)
    assert flashed == pytest.approx(flash / media.FPS, abs=1e-3)
    assert clicked == pytest.approx(flashed, abs=5e-3)


def test_frames_look_as_written(tmp_path):
    ramp = np.linspace(40, 210, 32).astype(np.uint8)
    frames = np.tile(ramp[None, :, None, None], (4, 1, 32, 3))
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32) as writer:
        writer.write(frames, silence(4))
    with av.open(str(tmp_path / "a.mp4")) as container:
        for frame in container.decode(video=0):
            error = frame.to_ndarray(format="rgb24").astype(int) - frames[0]
            assert np.abs(error).mean() < 3


def test_finished_file_is_an_ordinary_mp4(tmp_path):
    """Not a fragmented one: every player shows its length and can seek in it."""
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32) as writer:
        writer.write(pictures(60), silence(60))
    data, boxes = (tmp_path / "a.mp4").read_bytes(), []
    while data:
        boxes.append(data[4:8])
        data = data[int.from_bytes(data[:4], "big") :]
    assert boxes[0] == b"ftyp"
    assert boxes.count(b"moov") == 1
    assert b"moof" not in boxes
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 60


def test_what_a_killed_process_leaves_is_playable(tmp_path):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    with media.VideoWriter(path, 32, 32) as writer:
        for _ in range(20):
            writer.write(noise, silence(8))
        end = time.monotonic() + 20
        while len(writer.ms) < 20 and time.monotonic() < end:
            time.sleep(0.01)
        shutil.copy(path, tmp_path / "cut.mp4")
    times = [time for time, _ in decoded_video(tmp_path / "cut.mp4")]
    assert len(times) >= 100  # of 160: the encoder looks ahead, and a fragment has to be complete
    assert times == pytest.approx(np.arange(len(times)) / media.FPS)
    assert len(decoded_video(path)) == 160


def test_slow_disk_makes_write_wait(tmp_path, monkeypatch):
    """The queue is bounded: frames never pile up in memory."""
    held, opened = threading.Event(), av.open

    def slow(*args, **kwargs):
        held.wait(20)
        return opened(*args, **kwargs)

    monkeypatch.setattr(media.av, "open", slow)
    writer = media.VideoWriter(tmp_path / "a.mp4", 32, 32)

    def fill() -> None:
        for _ in range(12):
            writer.write(pictures(1), silence(1))

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert writer.frames <= 6
    held.set()
    thread.join(20)
    writer.close()
    monkeypatch.undo()
    assert len(decoded_video(tmp_path / "a.mp4")) == 12


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_full_disk_raises_and_does_not_hang():
    writer = media.VideoWriter(FULL, 32, 32)

    def fill() -> None:
        for _ in range(200):
            writer.write(pictures(8), silence(8))

    with pytest.raises(OSError, match="out: cannot write /dev/full: No space left on device"):
        fill()
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_error_after_the_last_write_surfaces_in_close(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media.av, "open", full)
    writer = media.VideoWriter(tmp_path / "a.mp4", 32, 32)
    writer.write(pictures(1), silence(1))
    with pytest.raises(OSError, match=r"out: cannot write .*a\.mp4: No space left on device"):
        writer.close()


def test_the_first_error_is_the_one_that_is_reported(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail() -> None:
        with media.VideoWriter(tmp_path / "a.mp4", 32, 32) as writer:
            writer.write(pictures(1), silence(1))
            raise KeyError("first")

    monkeypatch.setattr(media.av, "open", full)
    with pytest.raises(KeyError, match="first"):
        fail()


def test_no_frames_no_file(tmp_path):
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32):
        pass
    assert not (tmp_path / "a.mp4").exists()


def test_writer_checks_its_arguments(tmp_path):
    with pytest.raises(ValueError, match="even width"):
        media.VideoWriter(tmp_path / "a.mp4", 33, 32)
    with pytest.raises(ValueError, match="rate: expected a multiple of fps 25, got 44101"):
        media.VideoWriter(tmp_path / "a.mp4", 32, 32, rate=44101)
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32) as writer:
        with pytest.raises(ValueError, match=r"frames: expected uint8 \[T, 32, 32, 3\]"):
            writer.write(pictures(1).astype(np.float32), silence(1))
        with pytest.raises(ValueError, match=r"samples: expected \[3840\], got \[1920\]"):
            writer.write(pictures(2), silence(1))
