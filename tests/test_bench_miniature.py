# SPDX-License-Identifier: Apache-2.0
"""The miniature's judge: perfect videos reach every target, poor ones miss, nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from reeltime.bench import bench_miniature as bench
from reeltime.bench import miniature_formats
from reeltime.bench.bench_miniature import Actor, Bench, perform, summarise, variants
from reeltime.model.codec import CodecConfig, ConvCodec
from reeltime.model.config import ModelConfig
from reeltime.model.kv_cache import StreamMemory
from reeltime.model.miniature import control, weights
from reeltime.model.transformer import CausalTransformer

CODEC = CodecConfig(frame_channels=2, widths=(8, 8, 8))
TINY = ModelConfig("tiny", 32, 1, 32, 1, CODEC.channels, CODEC.channels, text_dim=48,
                   prediction="x0", chunk=2, window=9)  # fmt: skip
SETTINGS = {
    "people": 1, "seconds": 2.0, "long_frames": 0, "ablation_people": 1, "ablation_seconds": 2.0,
    "shown_people": 1, "speed_chunks": 3, "weights": "tiny",
}  # fmt: skip
SEED = bench.FIRST_SEED + 77


@pytest.fixture(scope="module")
def model() -> tuple[CausalTransformer, ConvCodec]:
    torch.manual_seed(0)
    return CausalTransformer(TINY).eval(), ConvCodec(CODEC).eval()


def ignore(frames: int) -> None:
    pass


def truthful(tokens: torch.Tensor, truth: np.ndarray) -> np.ndarray:
    return truth


def app() -> typer.Typer:
    command = typer.Typer()
    command.command()(bench.main)
    return command


# --- Actors -------------------------------------------------------------------------------------


def test_script_switches_at_chunk_boundaries():
    actor, chunks = Actor(SEED, 400), 400
    starts = [*actor.starts, chunks]
    lengths = np.diff(starts)
    assert lengths.min() >= bench.SWITCH[0]
    assert lengths[:-1].max() <= bench.SWITCH[1]
    assert 1.7 < lengths.mean() * bench.FRAMES / control.FPS < 2.1
    assert set(actor.starts.values()) == set(range(len(control.NAMES)))


def test_chunks_are_one_continuous_track():
    actor = Actor(SEED, 20)
    parts = [actor.next_chunk() for _ in range(20)]
    track, controls, poses = control.Track(), [], []
    for chunk in range(20):
        if chunk in actor.starts:
            track.say(actor.starts[chunk])
        made = track.advance(actor.envelope[8 * chunk : 8 * chunk + 8])
        controls.append(made[0])
        poses.append(made[1])
    heard = np.concatenate([[0], actor.envelope]).astype(np.float32)
    tokens = control.condition_tokens(np.concatenate(controls), heard)
    assert np.array_equal(np.concatenate([p[0] for p in parts]), tokens)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), np.concatenate(poses))
    assert np.array_equal(np.concatenate([p[2] for p in parts]), actor.envelope)


def test_segment_is_what_was_performed():
    actor, poses, judged = Actor(SEED, 24), [], 0
    for _ in range(24):
        poses.append(actor.next_chunk()[1])
        if actor.segment_is_over:
            said, judged = actor.segment, judged + 1
            performed = np.concatenate(poses)[-len(said.envelope) :]
            assert np.array_equal(performed, said.poses(said.instruction))
    assert judged == len(actor.starts)


def test_held_out_seeds_are_apart():
    seeds = (bench.FIRST_SEED, bench.LONG_SEED, bench.SHOWN_SEED, bench.ABLATION_SEED)
    assert min(seeds) >= 5_000_000_000  # training: up to 1e6, codec: from 1e9 up to 2e9
    assert min(np.diff(sorted(seeds))) >= 10**6


# --- Judging ------------------------------------------------------------------------------------


def play(generate, seconds: float = 5.2) -> dict:
    chunks = bench.chunks_of(seconds)
    actors = [Actor(SEED + i, chunks) for i in range(2)]
    judges = perform(generate, actors, chunks, 1, ignore)
    return {"main": [judge.row() for judge in judges]}


def test_truth_reaches_the_targets():
    results = play(truthful)
    row = summarise(results["main"])
    assert row["lip_sync"] > 0.999
    assert row["lip_offset"] == 0
    assert row["instruction_accuracy"] == 1
    assert row["delay_frames"] == 0
    assert row["instructions"] >= 3
    assert row["psnr"] == 100
    assert row["ssim"] > 0.999
    assert row["colour_error"] == 0
    assert row["shape_error"] < 0.02
    assert bench.missed(results) == []
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_frozen_picture_misses_the_targets():
    first: list[np.ndarray] = []

    def frozen(tokens: torch.Tensor, truth: np.ndarray) -> np.ndarray:
        first.append(truth[:, :1])
        return np.repeat(first[0], bench.FRAMES, axis=1)

    assert bench.missed(play(frozen, 4.0)) == ["lip_sync", "instruction_accuracy", "psnr"]


def test_targets_are_compared_the_right_way():
    assert bench.missed({"long": {"drift": -0.4}, "speed": {"fps": 26.0}}) == []
    assert bench.missed({"long": {"drift": -0.6}, "speed": {"fps": 24.0}}) == ["drift", "fps"]
    assert bench.missed({"long": {"drift": float("nan")}}) == ["drift"]
    assert bench.missed({}) == []


# --- Variants -----------------------------------------------------------------------------------


def test_every_variant_plays_and_differs(model, tmp_path):
    made = {}
    everything = {k: v for k, v in variants(TINY).items() if v.tuned}
    shared = new_bench(model, tmp_path)
    for name, variant in everything.items():
        actor = Actor(SEED, 12)
        if variant.sparsity:  # the tiny model has no adapters
            variant = replace(variant, tuned=False)
        stream = bench.open_stream(shared.model_of(variant), variant, [actor])
        for _ in range(6):  # past the window, so that eviction and repositioning count
            frames = stream.next_latents(torch.from_numpy(actor.next_chunk()[0])[None])
        assert frames.isfinite().all()
        made[name] = frames
    names = list(made)
    same = {(a, b) for i, a in enumerate(names) for b in names[i + 1 :]
            if torch.allclose(made[a], made[b], atol=1e-4)}  # fmt: skip
    # The published and the query-side rotation are the same mathematics.
    assert same == {(names[0], "RoPE on the cache")}


def test_noisy_history_reaches_the_last_step(model):
    made = variants(TINY)
    variant = made["TwinCache off: noisy history"]
    stream = bench.open_stream(model, variant, [Actor(SEED, 8)])
    for _ in range(3):
        stream.next_latents(torch.zeros(1, 2, 4, 48))
    plans = stream.memory.make_plans()
    assert torch.equal(plans["final"].block_table, plans["noisy"].block_table) is False
    assert torch.equal(plans["final"].block_table, plans["intermediate"].block_table)
    default = bench.open_stream(model, made["vidu_s1, 3 steps"], [Actor(SEED, 8)])
    for _ in range(3):
        default.next_latents(torch.zeros(1, 2, 4, 48))
    plans = default.memory.make_plans()
    assert not torch.equal(plans["final"].block_table, plans["intermediate"].block_table)


def test_reference_off_keeps_nothing():
    free = variants(TINY)["reference off"].layout
    assert free.capacity("picture") == free.capacity("first_state") == 0
    assert free.window == TINY.window
    assert free.twin


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_format": "int4"}, "kv_format: expected one of 'plain', .*, got 'int4'"),
        ({"kv_format": "int8, v fp8", "rope_on_cache": True}, "rope_on_cache: expected False .*8"),
    ],
    ids=["unknown", "rotated on read"],
)
def test_cache_refuses_a_format_that_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        StreamMemory(TINY, variants(TINY)["longlive"].layout, (4, 4), **options)


# --- Runs ---------------------------------------------------------------------------------------


def new_bench(model, folder: Path) -> Bench:
    return Bench(model, dict(SETTINGS), folder / "out.json", folder / "pictures")


def test_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    """Two groups of one; the second is interrupted, the first is kept and not made again."""
    monkeypatch.setattr(bench, "GROUP", 1)
    made: list[int] = []
    genuine, stop_at = bench.open_stream, [1]

    def open_stream(model, variant, actors):
        if len(made) == stop_at[0]:
            raise KeyboardInterrupt
        made.append(actors[0].seed)
        return genuine(model, variant, actors)

    monkeypatch.setattr(bench, "open_stream", open_stream)
    first = new_bench(model, tmp_path)
    first.settings["people"] = 2
    with pytest.raises(KeyboardInterrupt):
        first.run(["main"])
    second = new_bench(model, tmp_path)
    second.settings["people"], stop_at[0] = 2, 5
    second.resume()
    assert [r["seed"] for r in second.results["main"]] == [bench.FIRST_SEED]
    second.run(["main"])
    assert made == [bench.FIRST_SEED, bench.FIRST_SEED + 1]
    assert [r["seed"] for r in second.results["main"]] == made
    assert len(json.loads((tmp_path / "out.json").read_text())["main"]) == 2


def test_other_weights_start_anew(model, tmp_path):
    first = new_bench(model, tmp_path)
    first.results = {"speed": {"fps": 1.0}}
    first.save()
    second = new_bench(model, tmp_path)
    second.settings["weights"] = "others"
    second.resume()
    assert second.results == {}


def test_long_stream_has_its_curve_and_ends(model, tmp_path):
    run = new_bench(model, tmp_path)
    run.settings["long_frames"] = 240
    run.run(["long"])
    long = run.results["long"]
    assert long["complete"]
    assert long["frames"] == 240
    assert len(long["psnr_per_100_frames"]) == 2
    assert long["drift"] == pytest.approx(long["psnr_last"] - long["psnr_first"])
    assert long["cache_mb"] > 0
    assert long["memory_growth_mb"] < 64
    run.results["long"]["drift"] = "kept"
    run.run(["long"])
    assert run.results["long"]["drift"] == "kept"


def test_formats_are_held_against_the_dense_stream(model, tmp_path, monkeypatch):
    """Frame by frame: the dense format itself loses nothing, INT8 a little; rows are kept."""
    made = bench.formats(TINY)
    low = next(name for name, variant in made.items() if variant.kv_format != "plain")
    some = {"as it is": next(iter(variants(TINY).values())), low: made[low]}
    monkeypatch.setattr(bench, "formats", lambda config: some)
    run = new_bench(model, tmp_path)
    run.settings["long_frames"] = 120
    run.run(["long", "formats"])
    long, rows = run.results["long"], run.results["formats"]
    assert list(rows) == list(some)
    assert rows["as it is"]["psnr_beside_dense"] == 100
    assert set(rows["as it is"]["lost"].values()) == {0.0}
    for row in rows.values():
        assert row["psnr_dense"] == pytest.approx(long["psnr"])  # the long stream is the dense one
        assert row["frames"] == 120
    lost = rows[low]["lost"]
    assert 20 < rows[low]["psnr_beside_dense"] < 100
    assert lost["p05"] < lost["p95"] < lost["p100"]
    assert rows[low]["psnr"] == pytest.approx(long["psnr"] - lost["mean"], abs=0.5)
    assert rows[low]["cache_mb"] < 0.5 * rows["as it is"]["cache_mb"]
    rows[low]["drift"] = 0.25
    run.run(["formats"])
    assert run.results["formats"][low]["drift"] == 0.25

    text = miniature_formats.markdown(long, rows)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| float32, dense", "| as it is", f"| {low}"
    ]  # fmt: skip
    assert "+0.25" in lines[4]
    miniature_formats.draw(tmp_path / "formats.png", rows)
    assert Image.open(tmp_path / "formats.png").width > 600


def test_loss_is_of_each_frame():
    lost = miniature_formats.loss(np.array([4.0, 1.0, 10.0]), np.array([1.0, 1.0, 100.0]))
    assert lost == pytest.approx([6.0206, 0, -10], abs=1e-4)
    spread = miniature_formats.spread(np.arange(101.0))
    assert spread == {f"p{p:02d}": float(p) for p in miniature_formats.LOST} | {"mean": 50.0}


def test_rows_of_other_adapters_are_forgotten(model, tmp_path, monkeypatch):
    """Of the adapter that changed, and of no other; 75% runs with that of 50%."""
    run = new_bench(model, tmp_path)
    run.folder = tmp_path
    for sparsity in (50, 90):
        (tmp_path / f"sla-{sparsity}.safetensors").write_bytes(b"first")
    names = {"ablations": variants(TINY), "formats": bench.formats(TINY)}
    run.results = {part: dict.fromkeys(made, "row") for part, made in names.items()}
    run.forget_other_adapters()  # no adapters were known before
    run.results |= {part: dict.fromkeys(made, "row") for part, made in names.items()}
    run.forget_other_adapters()
    assert {part: list(run.results[part]) for part in names} == {
        part: list(made) for part, made in names.items()
    }
    (tmp_path / "sla-50.safetensors").write_bytes(b"second")
    run.forget_other_adapters()
    gone = {name for part, made in names.items() for name in set(made) - set(run.results[part])}
    assert gone == {"SLA, 50% sparse", "SLA, 75% sparse, adapter of 50%"}


def test_everything_else_runs(model, tmp_path):
    """Speed, codec and the picture, end to end, into tables and pictures."""
    run = new_bench(model, tmp_path)
    run.run(["speed", "codec", "picture"])
    speed = run.results["speed"]
    assert set(speed["p50_ms"]) == {"encode", "denoise", "cache_pass", "decode", "total"}
    assert speed["fps"] == pytest.approx(8000 / speed["p50_ms"]["total"], rel=1.0)
    bench.draw_curves(tmp_path / "curves.png", run.results)
    film = Image.open(tmp_path / "pictures" / "miniature.png")
    assert film.width > len(bench.SHOWN) * 128
    assert film.height > 2 * 128
    assert Image.open(tmp_path / "curves.png").width > 300
    text = bench.markdown(run.results)
    assert "codec alone" in text
    assert "FPS" in text


def test_ablations_are_the_same_people_played_otherwise(model, tmp_path, monkeypatch):
    some = {k: v for k, v in variants(TINY).items() if k in ("vidu_s1, 3 steps", "1 step")}
    monkeypatch.setattr(bench, "variants", lambda config: some)
    run = new_bench(model, tmp_path)
    run.run(["ablations"])
    table = run.results["ablations"]
    assert list(table) == list(some)
    assert {row["seed"] for rows in table.values() for row in rows} == {bench.ABLATION_SEED}
    assert table["1 step"][0]["psnr"] != table["vidu_s1, 3 steps"][0]["psnr"]
    assert "ablation: 1 step" in bench.markdown(run.results)


def test_tables_say_what_was_not_measured():
    row = {"seed": 1, "frames": 100, "lip_sync": 0.5, "lip_offset": 2, "said": 0, "obeyed": 0,
           "delays": [], "confusions": {}, "psnr": 31.0, "ssim": 0.9, "flicker_levels": 0.5,
           "flicker_ratio": None}  # fmt: skip
    text = bench.markdown({"main": [row], "ablations": {"1 step": [row, row]}})
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "not measured" in lines[2]
    assert "31.00" in lines[2]
    assert lines[3].startswith("| ablation: 1 step | 2 x 4 |")


def test_film_shows_frames_where_they_belong(tmp_path):
    rng = np.random.default_rng(0)
    generated, truth = rng.integers(0, 256, (2, 2, 3, 128, 128, 3), dtype=np.uint8)
    bench.draw_film(tmp_path / "film.png", generated, truth, ["a", "b", "c"], [1.0, 2.0, 3.0])
    page = np.asarray(Image.open(tmp_path / "film.png").convert("RGB"))
    for tile in (generated[1, 2], truth[0, 0]):
        found = [
            (y, x)
            for y, x in np.argwhere((page == tile[0, 0]).all(axis=-1))
            if np.array_equal(page[y : y + 128, x : x + 128], tile)
        ]
        assert len(found) == 1


def test_readme_is_rewritten_between_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{bench.MARKERS[0]}\nold\n{bench.MARKERS[1]}\nafter\n")
    for _ in range(2):
        bench.update_readme(page, "new")
    assert page.read_text() == f"before\n{bench.MARKERS[0]}\nnew\n{bench.MARKERS[1]}\nafter\n"
    page.write_text(f"{bench.MARKERS[1]} {bench.MARKERS[0]}")
    with pytest.raises(ValueError, match="readme: expected .*begin.*end"):
        bench.update_readme(page, "new")


# --- The command --------------------------------------------------------------------------------


def command(*arguments: str):
    return CliRunner().invoke(app(), list(arguments))


def test_missed_target_exits_1(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load_miniature", lambda folder: model)
    out = tmp_path / "out.json"
    common = ("--only", "main", "--people", "1", "--seconds", "4", "--pictures", str(tmp_path))
    done = command(*common, "--out", str(out), "--json")
    assert done.exit_code == 1, done.output
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert "psnr" in document["summary"]["missed"]
    assert out.with_suffix(".md").read_text().startswith("| |")


def test_quick_run_judges_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load_miniature", lambda folder: model)
    done = command("--quick", "--only", "codec", "--out", str(tmp_path / "quick.json"))
    assert done.exit_code == 0, done.output
    again = command("--quick", "--only", "speed", "--out", str(tmp_path / "quick.json"))
    assert again.exit_code == 0, again.output
    assert {"codec", "speed"} <= set(json.loads((tmp_path / "quick.json").read_text()))


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing"], ["--checkpoint", "no-such-folder"]], ids=str
)
def test_bad_input_exits_2(arguments, tmp_path):
    done = command(*arguments, "--out", str(tmp_path / "out.json"))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
