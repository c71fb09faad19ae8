# SPDX-License-Identifier: Apache-2.0
"""Each metric knows the ground truth from a video that is wrong in the way it measures."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from reeltime.model.miniature import metrics
from reeltime.model.miniature.avatar import COLOURS, POSE, Identity, random_identity, render
from reeltime.model.miniature.control import NAMES, Track, random_envelope
from reeltime.model.miniature.metrics import (
    Flicker,
    IdentityScore,
    InstructionScore,
    MouthReader,
    Segment,
    VideoScore,
    decibels,
    drift,
    frame_mse,
    lip_sync,
    onset,
    recognise,
    ssim,
)

LENGTH = 48


@dataclass
class Act:
    """A person under direction: the whole vocabulary, each instruction for 48 frames."""

    who: Identity
    segments: list[Segment]
    poses: np.ndarray
    envelope: np.ndarray
    truth: np.ndarray

    def pieces(self, frames):
        return zip(np.split(frames, len(self.segments)), self.segments, strict=True)


def perform(seed: int, words: list[int]) -> Act:
    rng = np.random.default_rng(seed)
    who, envelope, track = random_identity(rng), random_envelope(rng, LENGTH * len(words)), Track()
    segments, poses = [], []
    for word, voice in zip(words, np.split(envelope, len(words)), strict=True):
        segments.append(Segment(word, replace(track), voice))
        track.say(word)
        poses.append(track.advance(voice)[1])
    poses = np.concatenate(poses)
    return Act(who, segments, poses, envelope, render(who, poses))


@pytest.fixture(scope="module")
def act() -> Act:
    order = np.random.default_rng(4).permutation(len(NAMES))
    return perform(6_500_000_001, order.tolist())


def blurred(frames: np.ndarray, radius: float) -> np.ndarray:
    filtered = (Image.fromarray(f).filter(ImageFilter.GaussianBlur(radius)) for f in frames)
    return np.stack([np.asarray(f) for f in filtered])


def noisy(frames: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def late(frames: np.ndarray, by: int) -> np.ndarray:
    return np.concatenate([np.repeat(frames[:1], by, axis=0), frames[:-by]])


def lips(act: Act, frames: np.ndarray) -> metrics.LipSync:
    t = len(frames)
    return lip_sync(MouthReader(act.who).read(frames, act.poses[:t]), act.envelope[:t])


# --- Lip-sync -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pose", [p for p in POSE if p != "mouth"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_mouth_is_read_in_every_pose(pose, sign, act):
    poses = np.zeros((12, len(POSE)), np.float32)
    poses[:, POSE.index(pose)] = sign if pose in POSE[:4] else 1
    poses[:, POSE.index("mouth")] = np.linspace(0, 1, 12)
    read = MouthReader(act.who).read(render(act.who, poses), poses)
    assert np.abs(read - np.linspace(0, 1, 12)).max() < 0.03


def test_truth_is_in_sync(act):
    found = lips(act, act.truth)
    assert found.correlation > 0.999
    assert found.offset == 0


def test_blurred_noisy_truth_is_in_sync(act):
    found = lips(act, noisy(blurred(act.truth[:200], 1.0), 6))
    assert found.correlation > 0.98
    assert found.offset == 0


def test_shuffled_frames_are_not_in_sync(act):
    order = np.random.default_rng(1).permutation(len(act.truth))
    assert abs(lips(act, act.truth[order]).best) < 0.3


def test_another_voice_is_not_in_sync(act):
    """Head and face obey; only the mouth is wrong."""
    poses = act.poses[:400].copy()
    poses[:, POSE.index("mouth")] = random_envelope(np.random.default_rng(9), len(poses))
    assert abs(lips(act, render(act.who, poses)).best) < 0.5
    poses = poses[:200]
    poses[:, POSE.index("mouth")] = 0.3
    assert abs(lips(act, render(act.who, poses)).best) < 0.4


@pytest.mark.parametrize("by", [1, 3, 8])
def test_late_and_early_mouths_have_their_offset(by, act):
    opening = act.poses[:, POSE.index("mouth")]
    shifted = lip_sync(late(opening, by), act.envelope)
    assert shifted.offset == by
    assert shifted.best > 0.99 > shifted.correlation
    assert lip_sync(opening, late(act.envelope, by)).offset == -by
    assert lips(act, late(act.truth[:200], 2)).offset == 2


def test_silent_mouth_has_no_correlation(act):
    assert lip_sync(np.zeros(100), act.envelope[:100]).correlation == 0


@pytest.mark.parametrize("frames, voice", [(100, 101), (20, 20)], ids=str)
def test_lip_sync_names_what_it_expects(frames, voice):
    with pytest.raises(ValueError, match="opening: expected .*got"):
        lip_sync(np.zeros(frames), np.zeros(voice))


# --- Instructions -------------------------------------------------------------------------------


def test_every_instruction_is_recognised_in_the_truth(act):
    score = InstructionScore()
    for frames, segment in act.pieces(act.truth):
        score.update(frames, frames, act.who, segment)
    assert score.accuracy == 1
    assert score.confusions() == {}
    assert score.delay == 0
    assert len(score.delays) >= len(NAMES) - 2  # all whose beginning can be seen


def test_every_instruction_is_recognised_in_a_poor_video(act):
    poor = act.truth.copy()
    for start in range(0, len(poor), LENGTH):  # of the frames that are looked at
        part = slice(start + metrics.SETTLE, start + LENGTH, metrics.STRIDE)
        poor[part] = noisy(blurred(poor[part], 1.5), 8)
    found = [int(recognise(f, act.who, s).argmin()) for f, s in act.pieces(poor)]
    assert found == [s.instruction for s in act.segments]


def test_another_instruction_is_recognised_for_what_it_is(act):
    rng, score = np.random.default_rng(2), InstructionScore()
    for frames, segment in list(act.pieces(act.truth))[::3]:
        shown = int((segment.instruction + rng.integers(1, len(NAMES))) % len(NAMES))
        wrong = render(act.who, segment.poses(shown))
        assert recognise(wrong, act.who, segment).argmin() == shown
        score.update(wrong, frames, act.who, segment)
    assert score.accuracy == 0
    assert sum(score.confusions().values()) == len(score.said)


def test_deaf_avatar_follows_nothing(act):
    """It speaks, but goes on doing what it was told before."""
    score = InstructionScore()
    for frames, segment in list(act.pieces(act.truth))[1::3]:
        score.update(render(act.who, segment.poses(None)), frames, act.who, segment)
    assert score.accuracy == 0
    assert score.recognised == [s.before.current for s in act.segments[1::3]]
    assert set(score.delays) == {metrics.ONSET}


@pytest.mark.parametrize("by", [2, 4])
def test_late_instruction_is_late(by, act):
    """Late by `by` frames: nearer to the new than to the old one between then and half a rise."""
    told = {"turn left", "raise hand", "close eyes", "tilt right"}
    score = InstructionScore()
    parts = list(act.pieces(late(act.truth, by)))
    for i, (frames, segment) in enumerate(parts):
        if NAMES[segment.instruction] in told:
            truth = act.truth[LENGTH * i : LENGTH * (i + 1)]
            old = render(act.who, segment.poses(None, metrics.ONSET))
            found = onset(frames[: metrics.ONSET], truth[: metrics.ONSET], old)
            score.delays.append(found)
    assert len(score.delays) == len(told)
    assert by - 1 <= score.delay <= by + 2


def test_onset_of_what_never_comes(act):
    truth, old = act.truth[:8], np.zeros_like(act.truth[:8])
    assert onset(old, truth, old) == 8
    assert onset(truth, truth, old) == 0
    assert onset(old, truth, truth) is None


def test_segment_leaves_the_track_alone(act):
    segment = act.segments[2]
    before = replace(segment.before)
    assert np.array_equal(segment.poses(3), segment.poses(3))
    assert np.array_equal(segment.before.pose, before.pose)
    assert (segment.before.current, segment.before.age) == (before.current, before.age)


@pytest.mark.parametrize("frames, voice", [(40, 48), (10, 10)], ids=str)
def test_recognise_names_what_it_expects(frames, voice, act):
    segment = Segment(0, Track(), np.zeros(voice, np.float32))
    with pytest.raises(ValueError, match="frames: expected a segment of .*got"):
        recognise(act.truth[:frames], act.who, segment)


# --- Fidelity -----------------------------------------------------------------------------------


def test_psnr_is_what_it_says():
    truth = np.full((40, 16, 16, 3), 100, np.uint8)
    frames = truth.copy()
    frames[::2] += 10
    assert np.array_equal(frame_mse(frames, truth)[:2], [100, 0])
    assert np.isclose(decibels(frame_mse(frames, truth)), 10 * np.log10(255**2 / 50))
    assert decibels(frame_mse(truth, truth)) == float("inf")
    assert frame_mse(np.zeros_like(truth), truth + 155).max() == 255**2  # no overflow


def test_psnr_of_a_wrong_video_is_low(act):
    order = np.random.default_rng(1).permutation(len(act.truth))
    assert decibels(frame_mse(act.truth[order], act.truth)) < 22
    part = act.truth[:100]
    assert abs(decibels(frame_mse(noisy(part, 8), part)) - 30.1) < 0.3


def window_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, on one 11 x 11 window, in float64."""
    tap = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(tap, tap) / tap.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    sxx, syy, sxy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), 0.0
    sxy = (w * (x - mx) * (y - my)).sum()
    c1, c2 = 6.5025, 58.5225
    top = (2 * mx * my + c1) * (2 * sxy + c2)
    return top / ((mx**2 + my**2 + c1) * (sxx + syy + c2))


def test_ssim_matches_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 13, 12), dtype=np.uint8)
    y = (0.6 * x + 0.4 * y).astype(np.uint8)
    windows = [window_ssim(x[i : i + 11, j : j + 11].astype(float), y[i : i + 11, j : j + 11])
               for i in range(3) for j in range(2)]  # fmt: skip
    x, y = (np.repeat(v[None, ..., None], 3, axis=-1) for v in (x, y))
    assert np.isclose(ssim(x, y)[0], np.mean(windows), atol=2e-4)


def test_ssim_orders_videos(act):
    part = act.truth[:LENGTH:4]
    assert np.allclose(ssim(part, part), 1)
    other = render(random_identity(np.random.default_rng(5)), act.poses[:LENGTH:4])
    scores = [ssim(v, part).mean() for v in (blurred(part, 0.7), blurred(part, 1.5), other)]
    assert 1 > scores[0] > scores[1] > scores[2]


def test_drift_compares_the_ends():
    mse = np.full(3000, 10.0)
    mse[:100] = 1e4  # the warm-up is not judged
    assert drift(mse) == 0
    mse[-1000:] = 20.0
    assert np.isclose(drift(mse), -10 * np.log10(2))
    with pytest.raises(ValueError, match="mse: expected at least 2100 frames, got 2099"):
        drift(mse[:2099])


def test_flicker_is_still_on_truth_and_frozen_frames(act):
    for frames in (act.truth, np.repeat(act.truth[:1], len(act.truth), axis=0)):
        score = Flicker()
        score.update(frames, act.truth)
        assert score.levels < 0.2
        assert score.ratio < 1e-3


def test_flicker_measures_noise(act):
    score = Flicker()
    score.update(noisy(act.truth[:48], 3), act.truth[:48])
    assert abs(score.levels - 3 * 2**0.5) < 0.1
    slight = Flicker()
    slight.update(noisy(act.truth[:48], 1), act.truth[:48])
    assert 0.02 < slight.ratio < score.ratio / 5


@pytest.mark.parametrize("measure", [frame_mse, ssim, lambda a, b: Flicker().update(a, b)])
def test_shapes_and_types_are_checked(measure):
    good = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"frames: expected \[T, S, S, 3\].*got \[3, 16"):
        measure(good[:3], good)
    with pytest.raises(ValueError, match="frames: expected uint8, got float32"):
        measure(good.astype(np.float32), good)


# --- Identity -----------------------------------------------------------------------------------


def judge(act: Act, frames: np.ndarray, at: tuple[int, ...] = (20, 200, 500)) -> IdentityScore:
    score = IdentityScore()
    for t in at:
        score.update(frames[t], act.truth[t], act.who, act.poses[t])
    return score


def test_truth_has_its_own_identity(act):
    score = judge(act, act.truth)
    assert score.colour_error == 0
    assert score.shape_error < 0.01


@pytest.mark.parametrize("region", ["background", "skin", "hair", "shirt"])
def test_colour_error_is_found_where_it_is(region, act):
    colour = getattr(act.who, region)
    moved = replace(act.who, **{region: np.where(colour < 0.5, colour + 0.2, colour - 0.2)})
    frame, t = render(moved, act.poses[:1]), 0
    score = IdentityScore()
    score.update(frame[0], act.truth[t], act.who, act.poses[t])
    errors = score.colour_errors()
    assert 30 < errors.pop(region) < 53
    assert max(errors.values()) < 8
    assert set(errors) < set(COLOURS)


def test_shape_error_of_another_shape(act):
    other = replace(act.who, shape=random_identity(np.random.default_rng(77)).shape)
    score = judge(act, render(other, act.poses[:201]), at=(20, 200))
    assert score.shape_error > 0.15


def test_closed_eyes_have_no_colour(act):
    pose = np.zeros(len(POSE), np.float32)
    pose[POSE.index("lids")] = 1
    frame, score = render(act.who, pose[None])[0], IdentityScore()
    score.update(frame, frame, act.who, pose)
    assert set(score.colour_errors()) == set(COLOURS) - {"eye"}
    assert score.colour_error == 0


def test_another_person_is_noticed(act):
    other = random_identity(np.random.default_rng(5))
    score = judge(act, render(other, act.poses[:21]), at=(20,))
    assert score.colour_error > 20
    assert score.shape_error > 0.1


# --- A whole video ------------------------------------------------------------------------------


def fed(act: Act, frames: np.ndarray, chunk: int) -> VideoScore:
    score = VideoScore(act.who)
    for i in range(0, len(frames), chunk):
        part = slice(i, i + chunk)
        score.update(frames[part], act.truth[: len(frames)][part], act.poses[part],
                     act.envelope[part])  # fmt: skip
    return score


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_change_nothing(chunk, act):
    frames = noisy(act.truth[:100], 4)
    whole, parts = fed(act, frames, 100), fed(act, frames, chunk)
    assert np.allclose(parts.mse, whole.mse)
    assert np.allclose(parts.opening, whole.opening, atol=1e-4)
    assert np.isclose(parts.ssim, whole.ssim)
    assert np.isclose(parts.flicker.levels, whole.flicker.levels)
    assert np.isclose(parts.flicker.ratio, whole.flicker.ratio)
    assert parts.frames == 100


def test_long_videos_are_never_whole_in_memory(act):
    """1,000 frames are 49 MB of bytes and 590 MB in float32 twice over."""
    frames = np.broadcast_to(act.truth[:1], (1000, *act.truth.shape[1:]))
    truth = np.broadcast_to(act.truth[5:6], frames.shape)
    tracemalloc.start()
    frame_mse(frames, truth)
    Flicker().update(frames, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
