# SPDX-License-Identifier: Apache-2.0
"""Sound in, video out, both block by block: nothing is ever held as a whole."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np

FPS = 25
RATE = 48_000  # of the sound in a video: 1920 samples a frame at 25 FPS


# --- Sound in -----------------------------------------------------------------------------------


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the demuxer and the decoder in one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"audio: no such file: {path}") from error
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"audio: cannot read {path}: {reason}") from error


def _mono(frame: av.AudioFrame) -> np.ndarray:
    packed = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    return np.nan_to_num(packed.mean(axis=1), posinf=0.0, neginf=0.0)


class AudioReader:
    """Mono samples of anything FFmpeg can read: any rate, channel count and sample format.

    Args:
        path: a sound file, or a video with sound.
        rate: samples per second to convert to; the file's own by default.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable as sound.
    """

    def __init__(self, path: str | Path, rate: int | None = None) -> None:
        self.path = Path(path)
        with _naming(self.path):
            self._container = av.open(str(self.path))
        if not self._container.streams.audio:
            self._container.close()
            raise ValueError(f"audio: no sound in {self.path}")
        self._stream = self._container.streams.audio[0]
        self.rate = rate or self._stream.rate

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _decoded(self) -> Iterator[np.ndarray]:
        """Each decoded frame as [samples] float32."""
        # Channels are averaged here: FFmpeg's own mixer refuses counts it has no name for.  Packed
        # samples, one plane: PyAV reads past the eight planes of a frame with more channels.
        resampler = av.AudioResampler(format="flt", rate=self.rate)
        with _naming(self.path):
            for frame in self._container.decode(self._stream):
                yield from map(_mono, resampler.resample(frame))
            yield from map(_mono, resampler.resample(None))

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All samples from the start, once: [size] float32 each, the last one may be shorter."""
        parts: list[np.ndarray] = []
        held = 0
        for samples in self._decoded():
            parts.append(samples)
            held += len(samples)
            if held < size:
                continue
            joined = np.concatenate(parts)
            full = held - held % size
            yield from joined[:full].reshape(-1, size)
            parts, held = [joined[full:]], held - full
        if held:
            yield np.concatenate(parts)


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """A whole sound file: [samples] float32 mono, and its rate.  Errors as `AudioReader`."""
    with AudioReader(path) as reader:
        blocks = list(reader.blocks(reader.rate))
        return np.concatenate([np.zeros(0, np.float32), *blocks]), reader.rate


# --- Video out ----------------------------------------------------------------------------------


class VideoWriter:
    """H.264 and AAC in an mp4, encoded by a thread of its own behind a bounded queue.

    The file is written in fragments of one second, so even a killed process leaves what it wrote
    playable; `close` then turns it into an ordinary mp4.  The file appears with the first frames.
    Only the index of that mp4 grows while it is written: 5 kB a second, 16 MB an hour.

    Args:
        path: where to.
        width, height: of the frames, even.
        fps: frames per second.
        rate: samples per second of the sound, a multiple of fps.
    """

    def __init__(
        self, path: str | Path, width: int, height: int, *, fps: int = FPS, rate: int = RATE
    ) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"frames: expected an even width and height, got {width} x {height}")
        if rate % fps:
            raise ValueError(f"rate: expected a multiple of fps {fps}, got {rate}")
        self.path, self.width, self.height = Path(path), width, height
        self.fps, self.rate, self.frames = fps, rate, 0
        self.ms: deque[float] = deque(maxlen=4096)  # encoding and writing, of each `write`
        self._queue: queue.Queue[tuple[np.ndarray, np.ndarray] | None] = queue.Queue(maxsize=4)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # the first error is the one to report
                raise

    def write(self, frames: np.ndarray, samples: np.ndarray) -> None:
        """Append frames and their sound; waits only while the queue is full.

        Args:
            frames: [T, height, width, 3] uint8, not to be changed afterwards.
            samples: [T * rate / fps] float32 in [-1, 1].
        Raises:
            ValueError: shapes or dtypes do not fit.
            OSError: the file cannot be written (noticed some frames late).
        """
        if frames.shape[1:] != (self.height, self.width, 3) or frames.dtype != np.uint8:
            raise ValueError(
                f"frames: expected uint8 [T, {self.height}, {self.width}, 3], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        if samples.shape != (len(frames) * self.rate // self.fps,):
            raise ValueError(
                f"samples: expected [{len(frames) * self.rate // self.fps}], "
                f"got {list(samples.shape)}"
            )
        self._raise_error()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="video writer", daemon=True)
            self._thread.start()
        self._queue.put((frames, samples))
        self.frames += len(frames)

    def close(self) -> None:
        """Write what is queued and finish the file.  Raises OSError as `write` does."""
        if self._thread is not None:
            if self._thread.is_alive():
                self._queue.put(None)
            self._thread.join()
        self._raise_error()

    def _raise_error(self) -> None:
        if isinstance(self._error, OSError):
            reason = self._error.strerror or self._error
            raise OSError(f"out: cannot write {self.path}: {reason}") from self._error
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._encode()
        except Exception as error:  # noqa: BLE001  raised again by the next write or close
            self._error = error
            while self._queue.get() is not None:  # nobody waits for a queue that nobody empties
                pass

    def _encode(self) -> None:
        # delay_moov: else the 1024 samples that AAC encoders start with shift the video by 21 ms.
        # flush_packets: else a quarter of a megabyte is held back, ten seconds of this video.
        movflags = "hybrid_fragmented+frag_keyframe+delay_moov"
        options = {"movflags": movflags, "flush_packets": "1"}
        with av.open(str(self.path), "w", format="mp4", options=options) as container:
            video = container.add_stream("libx264", rate=self.fps)
            video.width, video.height, video.pix_fmt = self.width, self.height, "yuv420p"
            # One thread: frames this small gain nothing from more, and the model wants the cores.
            # A key frame every second and nowhere else: each begins a fragment.  No B-frames:
            # frames leave in the order they came.
            video.codec_context.thread_count = 1
            keys = {"g": str(self.fps), "sc_threshold": "0", "bf": "0"}
            video.options = {"preset": "veryfast", "crf": "18", **keys}
            audio = container.add_stream("aac", rate=self.rate, layout="mono")
            audio.bit_rate = 96_000
            shown = heard = 0
            while (item := self._queue.get()) is not None:
                start = time.perf_counter()
                frames, samples = item
                for pixels in frames:
                    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    picture.pts, picture.time_base = shown, Fraction(1, self.fps)
                    container.mux(video.encode(picture))
                    shown += 1
                sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
                sound.sample_rate, sound.pts = self.rate, heard
                sound.time_base = Fraction(1, self.rate)
                container.mux(audio.encode(sound))
                heard += len(samples)
                self.ms.append(1e3 * (time.perf_counter() - start))
            container.mux(video.encode())
            container.mux(audio.encode())
