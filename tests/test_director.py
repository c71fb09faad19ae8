# SPDX-License-Identifier: Apache-2.0
"""Cues, typed instructions and the voice: what is said when, and how far the mouth opens."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import pytest

from reeltime.model.media import RATE, read_audio
from reeltime.model.miniature import control
from reeltime.model.miniature.audio import envelope, levels, normalise
from reeltime.model.miniature.director import SAMPLES, Cue, Director, Voice, parse_cue

VOICE = Path(control.__file__).parent / "examples" / "voice.wav"
NEUTRAL, SMILE, NOD = (control.instruction_id(name) for name in ("neutral", "smile", "nod"))
QUIET = np.zeros(8, np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
    return path


def speech(opening: np.ndarray, rate: int = 16000, noise: float = 0.0) -> np.ndarray:
    """Noise whose loudness follows `opening`, one value per video frame."""
    rng = np.random.default_rng(0)
    gain = np.repeat(opening, rate // 25)
    return 0.2 * gain * rng.normal(size=len(gain)) + noise * rng.normal(size=len(gain))


# --- Cues ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, frame, name",
    [
        ("turn left@2", 50, "turn left"),
        ("  Turn   LEFT @ 2.0 ", 50, "turn left"),
        ("smile@4.5", 113, "smile"),
        ("smile@0", 0, "smile"),
        ("nod", 0, "nod"),
        ("nod@9.999", 250, "nod"),
    ],
)
def test_cue(text, frame, name):
    assert parse_cue(text, 10) == Cue(frame, control.instruction_id(name))


def test_cue_of_an_endless_stream_may_be_late():
    assert parse_cue("nod@1e5").frame == 2_500_000


@pytest.mark.parametrize("when", ["10", "11", "-1", "nan", "inf", "-0.01", "two", "", "1:30"])
def test_cue_out_of_range(when):
    with pytest.raises(ValueError, match="say: expected a time in seconds from 0 on, below.* 10"):
        parse_cue(f"smile@{when}", 10)


@pytest.mark.parametrize("text", ["dance@2", "dance@99", "@2", "", "smile@nod@2", "turn@1"])
def test_unknown_instruction_lists_the_vocabulary(text):
    with pytest.raises(ValueError, match="unknown") as caught:
        parse_cue(text, 10)
    assert all(name in str(caught.value) for name in control.NAMES)


# --- The timeline -------------------------------------------------------------------------------


def want(cues: list[tuple[int, int]], heard: np.ndarray) -> np.ndarray:
    """Tokens of a whole stream, said frame by frame."""
    track, rows = control.Track(), []
    for frame, value in enumerate(heard):
        for at, instruction in cues:
            if at == frame:
                track.say(instruction)
        rows.append(track.advance(np.array([value]))[0])
    return control.condition_tokens(np.concatenate(rows), np.concatenate([[0], heard]))


@pytest.mark.parametrize("chunk", [4, 8, 12])
@pytest.mark.parametrize(
    "cues", [[], [(0, SMILE)], [(3, SMILE), (5, NOD)], [(8, NOD)], [(7, SMILE), (23, NEUTRAL)]]
)
def test_cues_act_at_their_frame_wherever_chunks_end(cues, chunk):
    heard = np.random.default_rng(1).uniform(size=24).astype(np.float32)
    director = Director([Cue(*cue) for cue in reversed(cues)])
    parts = [director.next_chunk(heard[at : at + chunk]) for at in range(0, 24, chunk)]
    assert np.array_equal(np.concatenate(parts), want(cues, heard))


def test_of_two_cues_at_one_frame_the_last_counts():
    got = Director([Cue(2, SMILE), Cue(2, NOD)]).next_chunk(QUIET)
    assert np.array_equal(got, want([(2, NOD)], QUIET))


def test_typed_instruction_acts_from_the_next_chunk_on():
    director, heard = Director([Cue(20, NEUTRAL)]), np.zeros(24, np.float32)
    parts = [director.next_chunk(QUIET)]
    assert director.say("smile") == 8
    assert director.say(" NOD ") == 8  # before the same chunk: replaces the smile
    parts += [director.next_chunk(QUIET), director.next_chunk(QUIET)]
    assert np.array_equal(np.concatenate(parts), want([(8, NOD), (20, NEUTRAL)], heard))


def test_typed_nonsense_changes_nothing():
    director = Director()
    with pytest.raises(ValueError, match="unknown 'jump'"):
        director.say("jump")
    assert np.array_equal(director.next_chunk(QUIET), want([], QUIET))


# --- The envelope -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11025, 16012, 22050, 44110, 96000])
def test_levels_are_the_rms_of_each_frame(rate):
    seconds = 1.01
    tone = np.sin(2 * np.pi * 1000 * np.arange(int(rate * seconds)) / rate)
    tone[: rate // 5] = 0
    got = levels(tone, rate)
    assert got.shape == (math.ceil(len(tone) * 25 / rate),) == (26,)
    assert (got[:5] < 0.05).all()
    assert np.abs(got[5:25] - math.sqrt(0.5)).max() < 0.02


def test_levels_do_not_drift_where_frames_are_no_whole_number_of_samples():
    assert levels(np.arange(49) == 24, 49).argmax() == 12


def test_levels_can_be_taken_block_by_block():
    samples = np.random.default_rng(0).normal(size=RATE + 700)
    parts = [levels(samples[at : at + RATE], RATE) for at in (0, RATE)]
    assert np.array_equal(np.concatenate(parts), levels(samples, RATE))


def test_levels_check_their_arguments():
    with pytest.raises(ValueError, match="mono"):
        levels(np.zeros((2, 100)), 8000)
    with pytest.raises(ValueError, match=r"at least one sample per video frame \(25\), got 24"):
        levels(np.zeros(100), 24)
    assert levels(np.array([np.nan, np.inf, 0.5, -0.5]), 50).tolist() == [0, 0.5]


@pytest.mark.parametrize("noise", [0, 0.002, 0.02])
def test_envelope_follows_the_voice_and_rests_between_words(noise):
    opening = control.random_envelope(np.random.default_rng(3), 500)
    got = envelope(speech(opening, noise=noise), 16000)
    assert np.corrcoef(got, opening)[0, 1] > 0.95
    assert (got[opening == 0] == 0).mean() > 0.95
    assert got.min() == 0
    assert got.max() == 1


@pytest.mark.parametrize("gain", [0.1, 0.3, 5.0])
def test_envelope_does_not_depend_on_the_recording_level(gain):
    voice = speech(control.random_envelope(np.random.default_rng(3), 500))
    assert np.abs(envelope(gain * voice, 16000) - envelope(voice, 16000)).max() < 0.1


def test_one_click_does_not_close_the_mouth():
    voice = speech(control.random_envelope(np.random.default_rng(3), 500))
    clicked = voice.copy()
    clicked[5000:5050] = 20
    assert np.abs(envelope(clicked, 16000) - envelope(voice, 16000))[20:].mean() < 0.05


def test_a_long_pause_does_not_count_as_voice():
    voice = speech(control.random_envelope(np.random.default_rng(3), 500))
    noise = 1e-4 * np.random.default_rng(1).normal(size=20 * len(voice))
    got = envelope(np.concatenate([voice, noise]), 16000)
    assert np.abs(got[:500] - envelope(voice, 16000)).max() < 0.1
    assert not got[500:].any()


def test_normalise_is_the_documented_curve():
    level = np.array([0.0] * 10 + [0.1] * 60 + [0.03, 0.06], np.float32)
    gate = 0.05 * 0.1
    want = [((value - gate) / (0.1 - gate)) ** 0.7 for value in (0.03, 0.06)]
    assert normalise(level)[-2:] == pytest.approx(want, rel=1e-4)
    assert normalise(level / 20)[-2] == pytest.approx((0.5 / 4) ** 0.7, rel=1e-4)  # -60 dB rules


def test_a_voice_without_pauses_still_opens_the_mouth():
    tone = np.sin(np.arange(32000) * 0.1)
    assert envelope(tone, 16000).min() > 0.9


@pytest.mark.parametrize("level", [0.0, 1e-5, 5e-4])
def test_silence_keeps_the_mouth_closed(level):
    noise = level * np.random.default_rng(0).normal(size=16000)
    assert envelope(noise, 16000).tolist() == [0] * 25
    assert normalise(np.zeros(0)).shape == (0,)


def test_the_bundled_voice_spans_the_range():
    samples, rate = read_audio(VOICE)
    got = envelope(samples, rate)
    assert 8 < len(got) / 25 < 13
    assert (got == 0).mean() > 0.05
    assert (got > 0.9).mean() > 0.05
    assert ((got > 0.25) & (got < 0.75)).mean() > 0.25


# --- The voice ----------------------------------------------------------------------------------


@pytest.fixture
def ten_frames(tmp_path) -> Path:
    """Nine and a half video frames of sound: ten when they are counted."""
    samples = 0.5 * np.sin(np.arange(int(9.5 * SAMPLES)) * 0.05)
    return write_wav(tmp_path / "a.wav", samples)


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_voice_gives_envelope_and_samples_frame_by_frame(ten_frames, chunk):
    voice = Voice(ten_frames)
    assert voice.seconds == 0.4
    parts = [voice.next_chunk(chunk) for _ in range(16 // chunk)]
    heard, samples = (np.concatenate(part) for part in zip(*parts, strict=True))
    whole, _ = read_audio(ten_frames)
    assert np.array_equal(heard, np.pad(envelope(whole, RATE), (0, 6)))
    assert np.array_equal(samples, np.pad(whole, (0, 16 * SAMPLES - len(whole))))


def test_looped_voice_starts_again(ten_frames):
    voice, once = Voice(ten_frames, loop=True), Voice(ten_frames)
    heard, samples = voice.next_chunk(30)
    first_heard, first_samples = once.next_chunk(10)
    assert np.array_equal(heard, np.tile(first_heard, 3))
    assert np.array_equal(samples, np.tile(first_samples, 3))


@pytest.mark.parametrize("loop", [False, True])
def test_voice_without_samples_is_silent(tmp_path, loop):
    voice = Voice(write_wav(tmp_path / "a.wav", np.zeros(0)), loop=loop)
    heard, samples = voice.next_chunk(8)
    assert voice.seconds == 0
    assert not heard.any()
    assert samples.shape == (8 * SAMPLES,)
    assert not samples.any()
