# SPDX-License-Identifier: Apache-2.0
"""`reeltime stream` and `reeltime avatar`, from arguments to files, messages and exit codes.

The weights are random: what is tested is the stream, not what it shows.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reeltime import cli, cli_stream
from reeltime.model.codec import ConvCodec
from reeltime.model.config import preset
from reeltime.model.layout import LAYOUTS
from reeltime.model.miniature import control, picture
from reeltime.model.transformer import CausalTransformer

EXAMPLES = Path(control.__file__).parent / "examples"
PICTURES = sorted(EXAMPLES.glob("avatar-*.png"))
KEYS = {"out", "frames", "seconds", "fps", "target_fps", "ttff_ms", "chunk_ms_p50"}
KEYS |= {"chunk_ms_p95", "phases", "peak_memory_mb"}


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the form in which the trained ones ship."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, module in (
        ("transformer", CausalTransformer(preset("miniature"))),
        ("codec", ConvCodec()),
    ):
        state = {key: value.half() for key, value in module.state_dict().items()}
        # Nothing may stay at zero: a condition that changes nothing could not be tested.
        state = {k: v + 0.02 * torch.randn_like(v) for k, v in state.items()}
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Command:
    """Run reeltime in this process, in an empty folder; a stream gets the random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picture, "read_picture", read_once)

    def run(name: str, *arguments: str, seconds: float | None = 0.5) -> Ended:
        threads = torch.get_num_threads()
        capsys.readouterr()
        line = [name]
        if name == "stream":
            line += ["--checkpoint", str(checkpoint), "--threads", "1"]
            line += ["--seconds", str(seconds)] if seconds else []
        with pytest.raises(SystemExit) as stop:
            cli.main([*line, *arguments])
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        code = stop.value.code
        return Ended(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


read_once = functools.lru_cache(picture.read_picture)  # fitting an avatar takes half a second


@pytest.fixture
def started(checkpoint: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a stream in a process of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "reeltime", "stream", "--checkpoint", str(checkpoint)]
        line += ["--threads", "1", "--json", "--out", str(out), *arguments]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start
    for process in processes:
        with process:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def playable(path: Path) -> int:
    """Frames that can be decoded from a file that may be cut off anywhere."""
    frames = 0
    try:
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                frames += 1
    except (av.FFmpegError, OSError):
        pass
    return frames


def contents(path: Path) -> tuple[int, float, np.ndarray]:
    """Frames, seconds of sound, and its samples."""
    with av.open(str(path)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    with av.open(str(path)) as container:
        samples = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    return frames, len(samples) / 48000, samples


def write_wav(path: Path, rate: int, channels: int, seconds: float) -> Path:
    tone = 12000 * np.sin(2 * np.pi * 220 * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.repeat(tone.astype("<i2")[:, None], channels, axis=1).tobytes())
    return path


# --- A stream -----------------------------------------------------------------------------------


def test_defaults_make_a_clip_and_one_table(command):
    done = command("stream")
    assert done.code == 0, done.err
    frames, seconds, samples = contents(Path("reeltime.mp4"))
    assert frames == 13  # half a second, rounded up; a chunk has eight
    assert seconds == pytest.approx(13 / 25, abs=0.03)
    assert np.abs(samples).max() > 0.1  # the bundled voice
    assert done.out.count("time to first frame") == 1
    for label in ("denoise", "cache pass", "decode", "total", "FPS", "target 25", "peak memory"):
        assert label in done.out
    assert "13/13 frames" in done.err


def test_json_is_one_document(command):
    done = command("stream", "--json", "--out", "a.mp4", "--seconds", "1", "--target-fps", "0.1")
    assert done.code == 0, done.err
    document = done.document
    assert done.out.count("\n") == 1
    assert KEYS <= set(document)
    assert document["frames"] == 25
    assert document["seconds"] == 1
    assert document["target_fps"] == 0.1
    assert document["meets_target"]
    assert document["layout"] == "vidu_s1"
    assert document["fps"] > 0
    assert document["ttff_ms"] > document["phases"]["encode"]["p50_ms"] > 0
    passes = [document["phases"][name]["p50_ms"] for name in ("denoise", "cache_pass", "decode")]
    assert document["chunk_ms_p50"] == pytest.approx(sum(passes), rel=0.5)
    assert document["chunk_ms_p95"] >= document["chunk_ms_p50"] > max(passes)
    assert document["peak_memory_mb"] > 50
    assert "time to first frame" in done.err


def test_same_seed_same_frames(command):
    def digest(*arguments: str) -> str:
        done = command("stream", "--json", "--frames-hash", "--say", "nod", *arguments)
        assert done.code == 0, done.err
        return done.document["frames_hash"]

    base = digest()
    assert len(base) == 64
    assert digest() == base
    changed = [
        digest("--seed", "1"),
        digest("--steps", "2"),
        digest("--say", "smile@0.2"),
        digest("--layout", "longlive"),
        digest("--image", str(PICTURES[0])),
        digest("--audio", str(write_wav(Path("a.wav"), 8000, 1, 1))),
    ]
    assert len({base, *changed}) == 7


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_and_step_count(command, layout, steps):
    done = command("stream", "--json", "--layout", layout, "--steps", str(steps))
    assert done.code == 0, done.err
    assert done.document["frames"] == 13


@pytest.mark.parametrize(
    "rate, channels", [(8000, 1), (44100, 2), (96000, 6)], ids=["8k", "44k1-stereo", "96k-6ch"]
)
def test_any_wav_sets_the_length(command, rate, channels):
    write_wav(Path("a.wav"), rate, channels, 0.7)
    done = command("stream", "--json", "--audio", "a.wav", seconds=None)
    assert done.code == 0, done.err
    assert done.document["frames"] == 18
    samples = contents(Path("reeltime.mp4"))[2]
    assert np.abs(samples[5000:30000]).max() == pytest.approx(0.366, abs=0.05)


@pytest.mark.parametrize("loop", [False, True], ids=["silence", "loop"])
def test_after_the_voice_comes_silence_or_the_voice(command, loop):
    write_wav(Path("a.wav"), 48000, 1, 0.2)
    loops = ["--loop-audio"] if loop else []
    done = command("stream", "--audio", "a.wav", "--json", *loops)
    assert done.code == 0, done.err
    rest = contents(Path("reeltime.mp4"))[2][14000:24000]
    assert (np.abs(rest).max() > 0.2) == loop


def test_empty_audio_is_silence_with_a_note(command):
    write_wav(Path("a.wav"), 16000, 1, 0)
    done = command("stream", "--audio", "a.wav", "--json")
    assert done.code == 0
    assert "audio: no samples in a.wav: the stream is silent" in done.err
    assert done.document["frames"] == 13
    assert np.abs(contents(Path("reeltime.mp4"))[2]).max() < 1e-3


def test_a_photo_gets_a_message_and_the_nearest_avatar(command):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save("photo.png")
    done = command("stream", "--image", "photo.png", "--json")
    assert done.code == 0, done.err
    assert done.err.startswith("image: photo.png ")


def test_only_a_given_target_fails_when_missed(command, monkeypatch):
    monkeypatch.setattr(cli_stream.Run, "fps", lambda self: 12.0)
    missed, plain = command("stream", "--target-fps", "12.5"), command("stream")
    assert (missed.code, plain.code) == (1, 0)
    assert "target 12.5 missed" in missed.out
    assert "target 25 missed" in plain.out
    assert command("stream", "--target-fps", "12").code == 0


@pytest.mark.parametrize("seconds", [0.04, 0.32, 0.64, 0.68])
def test_a_short_stream_has_a_frame_rate_too(command, seconds):
    done = command("stream", "--target-fps", "0.1", "--steps", "1", "--json", seconds=seconds)
    assert done.code == 0, done.err
    assert done.document["frames"] == round(seconds * 25)


@pytest.mark.slow
def test_memory_does_not_grow_with_length(started, tmp_path):
    peaks = []
    for seconds in ("4", "120"):
        process = started(tmp_path / "a.mp4", "--seconds", seconds)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        peaks.append(json.loads(out)["peak_memory_mb"])
    assert peaks[1] - peaks[0] < 15  # 2,900 frames more are 143 MB


# --- Ended early --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_stream_reports_and_leaves_a_whole_file(started, tmp_path, number):
    out = tmp_path / "a.mp4"
    process = started(out, "--seconds", "inf")
    wait_for(lambda: size(out) > 1000, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number, stderr
    document = json.loads(stdout)
    frames, seconds, _ = contents(out)
    assert frames == document["frames"] >= 25
    assert seconds == pytest.approx(frames / 25, abs=0.03)
    assert "time to first frame" in stderr
    assert "Traceback" not in stderr


def test_killed_stream_leaves_a_playable_file(started, tmp_path):
    out = tmp_path / "a.mp4"
    process = started(out, "--seconds", "inf")
    wait_for(lambda: playable(out) >= 25, process)
    process.kill()
    process.communicate(timeout=300)
    assert playable(out) >= 25


# --- Interactive --------------------------------------------------------------------------------


@pytest.mark.clock
def test_typed_lines_act_and_are_timed(started, tmp_path):
    process = started(tmp_path / "a.mp4", "--interactive")
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write("Turn  Left\ndance\n")
    process.stdin.flush()
    first, second = process.stderr.readline(), process.stderr.readline()
    process.stdin.write("smile\n")
    process.stdin.flush()
    third = process.stderr.readline()
    process.stdin.write("quit\n")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert first.startswith("instruction: unknown 'dance'; expected one of: neutral, turn left")
    assert second.startswith("Turn  Left: frame 0, ")
    assert third.startswith("smile: frame ")
    assert int(third.split()[2].rstrip(",")) % 8 == 0
    document = json.loads(out)
    assert 0 < document["latency_ms_p50"]
    assert document["frames"] < 60 * 25


@pytest.mark.clock
def test_interactive_runs_in_real_time_and_past_the_end_of_stdin(command, monkeypatch):
    ahead, keep_pace = [], cli_stream.Run._keep_pace

    def spy(run: cli_stream.Run, start: float) -> None:
        keep_pace(run, start)
        ahead.append(start + run.writer.frames / 25 - time.perf_counter())

    reading, writing = os.pipe()
    os.write(writing, b"nod")  # no newline, then the end of the input
    os.close(writing)
    monkeypatch.setattr(cli_stream.Run, "_keep_pace", spy)
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        done = command("stream", "--interactive", "--steps", "1", "--json", seconds=1)
    assert done.code == 0, done.err
    assert "nod: frame 0, " in done.err
    assert done.document["frames"] == 25
    assert len(ahead) == 4
    assert max(ahead) < 0.01  # a chunk starts when the ones before it have been shown


def test_pace_is_kept_by_waiting(monkeypatch):
    now = [100.0]
    run = object.__new__(cli_stream.Run)
    run.writer = type("Writer", (), {"frames": 50})()
    run._since = 100.0
    waits: list[float] = []

    class Event:
        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            now[0] += seconds

    run.ending = type("Ending", (), {"event": Event()})()
    monkeypatch.setattr(cli_stream.time, "perf_counter", lambda: now[0])
    run._keep_pace(start=99.0)  # one second in, two seconds made: one ahead
    run._keep_pace(start=97.0)  # three and a bit in: behind
    assert waits == [pytest.approx(1.0)]
    assert run._since == pytest.approx(101.0)  # the wait is not charged to the frame rate


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--say", "dance@1"], "instruction: unknown 'dance'.*turn left.*shake head"),
        (["--say", "smile@0.5"], "say: expected a time .* below the length 0.5, got '0.5'"),
        (["--say", "smile@-1"], "say: expected a time in seconds from 0 on, .* got '-1'"),
        (["--say", "smile@soon"], "say: expected a time in seconds .* got 'soon'"),
        (["--image", "no.png"], r"image: .*no\.png"),
        (["--image", "text.png"], r"image: .*text\.png"),
        (["--audio", "no.wav"], r"audio: no such file: no\.wav"),
        (["--audio", "text.wav"], r"audio: cannot read text\.wav: Invalid data"),
        (["--audio", str(PICTURES[0])], r"audio: no sound in .*avatar-"),
        (["--out", "no/talk.mp4"], "out: no such folder: no"),
        (["--out", "talk.avi"], r"out: expected a name that ends in \.mp4, got 'talk\.avi'"),
        (["--out", "talk"], r"out: expected a name that ends in \.mp4, got 'talk'"),
        (["--out", "folder.mp4"], r"out: folder\.mp4 is a folder"),
        (["--out", "in.mp4", "--audio", "in.mp4"], r"out: in\.mp4 is also an input"),
        (["--seconds", "0"], "seconds: expected a length above 0, got 0"),
        (["--seconds", "-3"], "seconds: expected a length above 0, got -3"),
        (["--seconds", "nan"], "seconds: expected a length above 0, got nan"),
        (["--target-fps", "0"], "target-fps: expected frames per second above 0, got 0"),
        (["--target-fps", "nan"], "target-fps: expected frames per second above 0, got nan"),
        (["--layout", "wan"], f"layout: expected one of {', '.join(LAYOUTS)}, got 'wan'"),
        (["--checkpoint", "no"], "checkpoint: no transformer.safetensors in no"),
        (["--checkpoint", "broken"], "checkpoint: .*is not a safetensors file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(command, arguments, message):
    Path("text.png").write_text("not a picture")
    Path("text.wav").write_text("not a sound")
    Path("in.mp4").write_bytes(b"kept")
    Path("folder.mp4").mkdir()
    Path("broken").mkdir()
    Path("broken/transformer.safetensors").write_text("not weights")
    before = sorted(Path().rglob("*"))
    done = command("stream", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert re.search(message, done.err), done.err
    assert sorted(Path().rglob("*")) == before
    assert Path("in.mp4").read_bytes() == b"kept"


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--steps", "5"], ["--seed", "-1"], ["--threads", "0"]], ids=str
)
def test_option_out_of_range(command, arguments):
    done = command("stream", *arguments)
    assert done.code == 2
    assert arguments[0] in done.err


def test_read_only_folder(command, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    done = command("stream")
    assert done.code == 2
    assert "out: no permission to write reeltime.mp4" in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_clear_line(command):
    Path("full.mp4").symlink_to("/dev/full")
    done = command("stream", "--out", "full.mp4", "--json")
    assert done.code == 2
    assert done.out == ""
    assert "error: out: cannot write full.mp4: No space left on device" in done.err


def test_interactive_without_stdin(command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    done = command("stream", "--interactive")
    assert done.code == 2
    assert "interactive: there is no standard input" in done.err


# --- Avatars ------------------------------------------------------------------------------------


def test_avatars_are_deterministic_and_differ(command):
    assert command("avatar", "--seed", "7", "--out", "face.png").out == "face.png\n"
    done = command("avatar", "--seed", "7", "--count", "3", "--out", "face.png", "--json")
    assert [row["out"] for row in done.document["rows"]] == [f"face-{n}.png" for n in (7, 8, 9)]
    assert Path("face.png").read_bytes() == Path("face-7.png").read_bytes()
    pictures = [np.asarray(Image.open(row["out"])) for row in done.document["rows"]]
    assert {p.shape for p in pictures} == {(128, 128, 3)}
    assert not np.array_equal(pictures[0], pictures[1])


def test_avatar_size_and_pose(command):
    command("avatar", "--out", "a.png")
    command("avatar", "--out", "b.png", "--size", "256")
    assert Image.open("b.png").size == (256, 256)
    shrunk = np.asarray(Image.open("b.png").resize((128, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - np.asarray(Image.open("a.png"))).mean() < 2
    shown = set()
    for name in control.NAMES:
        assert command("avatar", "--out", "c.png", "--say", name).code == 0
        shown.add(np.asarray(Image.open("c.png")).tobytes())
    assert len(shown) == len(control.NAMES)


def test_avatar_is_taken_as_it_is_and_none_is_from_training(command):
    from reeltime.model.miniature.avatar import random_identity

    command("avatar", "--seed", "7", "--out", "a.png")
    taken = read_once(Path("a.png").absolute())
    assert taken.message is None
    trained = random_identity(np.random.default_rng(7))
    assert np.abs(taken.identity.to_vector() - trained.to_vector()).max() > 0.1


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_bundled_picture_is_what_its_command_makes(command, path):
    command("avatar", "--seed", path.stem.partition("-")[2], "--out", "a.png")
    made, bundled = (np.asarray(Image.open(p)).astype(int) for p in ("a.png", path))
    assert np.abs(made - bundled).max() <= 1  # another libm may round another way


def test_the_examples_are_there_and_named():
    text = (EXAMPLES / "README.md").read_text()
    assert len(PICTURES) == 3
    assert (EXAMPLES / "voice.wav").exists()
    for path in EXAMPLES.glob("*.[!m]*"):
        assert path.name in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "no/a.png"], "out: no such folder: no"),
        (["--out", "a.jpg"], r"out: expected a name that ends in \.png, got 'a\.jpg'"),
        (["--pose", "dance"], "instruction: unknown 'dance'"),
        (["--count", "0"], "--count"),
        (["--size", "3"], "--size"),
    ],
    ids=str,
)
def test_avatar_bad_input(command, arguments, message):
    done = command("avatar", *arguments)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert not list(Path().iterdir())
