# SPDX-License-Identifier: Apache-2.0
"""Judge the miniature: quality against the renderer, a long stream, ablations, speed.

    python -m reeltime.bench.bench_miniature                  # 20 minutes on two CPU cores, and
                                                              # 25 of one for `formats`
    python -m reeltime.bench.bench_miniature --quick          # a minute, too short to judge
    python -m reeltime.bench.bench_miniature --resume --update-readme

People, voices and scripts come from seeds that training never sees.  Every person is told
something from the whole vocabulary about every two seconds, at a chunk boundary, and speaks
meanwhile; several people are generated as one batch.  Each finished part is written at once, so
an interrupted run goes on with --resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from reeltime.bench import miniature_formats
from reeltime.model.codec import ConvCodec
from reeltime.model.layout import Segment as LayoutSegment
from reeltime.model.layout import StreamLayout, layout
from reeltime.model.miniature import weights
from reeltime.model.miniature.avatar import POSE, random_identity, render
from reeltime.model.miniature.control import (
    FPS,
    NAMES,
    Track,
    condition_tokens,
    instruction_id,
    picture_tokens,
    random_envelope,
)
from reeltime.model.miniature.metrics import (
    IdentityScore,
    InstructionScore,
    Segment,
    VideoScore,
    decibels,
    drift,
    frame_mse,
)
from reeltime.model.stream import PHASES, Stream
from reeltime.model.transformer import CausalTransformer

# Name, the least it may be, and how it is shown.
TARGETS = {
    "lip_sync": 0.95,
    "instruction_accuracy": 0.97,
    "psnr": 30.0,
    "drift": -0.5,  # dB that the last 1,000 of 10,000 frames may lose
    "fps": 25.0,
}
FIRST_SEED = 5_000_000_000  # training uses seeds below 1e6 and from 1e9 to 2e9
LONG_SEED, SHOWN_SEED, ABLATION_SEED = (FIRST_SEED + k * 10**6 for k in (1, 2, 3))
GROUP = 4  # people per batch: measured fastest on two cores
FRAMES = 8  # video frames per chunk
SWITCH = (5, 7)  # chunks between instructions, 1.6 to 2.2 s
EXPERIMENTS = ("speed", "main", "codec", "picture", "long", "formats", "ablations")
SHOWN = ("neutral", "turn left", "turn right", "look up", "tilt left", "smile", "close eyes",
         "raise brows", "raise hand", "nod")  # fmt: skip
MARKERS = ("<!-- miniature:begin -->", "<!-- miniature:end -->")
console = Console(stderr=True)


# --- People under direction ---------------------------------------------------------------------


class Actor:
    """One held-out person, voice and script, chunk by chunk."""

    def __init__(self, seed: int, chunks: int, script: dict[int, int] | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.seed, self.who = seed, random_identity(rng)
        self.picture = render(self.who, np.zeros((1, len(POSE)), np.float32))[0]
        self.envelope = random_envelope(rng, FRAMES * chunks)
        self.track, self.chunk = Track(), 0
        self.starts = self._improvise(rng, chunks) if script is None else script
        self.ends = {*list(self.starts)[1:], chunks}  # a segment ends where the next begins
        self.segment: Segment | None = None

    @staticmethod
    def _improvise(rng: np.random.Generator, chunks: int) -> dict[int, int]:
        """First chunk of each segment -> instruction; no segment is too short to be judged."""
        script: dict[int, int] = {}
        deck: list[int] = []
        at = int(rng.integers(2, 4))
        while at + SWITCH[0] <= chunks:
            deck = deck or rng.permutation(len(NAMES)).tolist()  # the whole vocabulary evenly
            script[at] = deck.pop()
            at += int(rng.integers(SWITCH[0], SWITCH[1] + 1))
        return script

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [2, 4, 48], true poses [8, 8] and voice [8] of the next chunk."""
        first = FRAMES * self.chunk
        if self.chunk in self.starts:
            end = FRAMES * min(e for e in self.ends if e > self.chunk)
            word = self.starts[self.chunk]
            self.segment = Segment(word, replace(self.track), self.envelope[first:end])
            self.track.say(word)
        voice = self.envelope[first : first + FRAMES]
        heard = np.concatenate([self.envelope[first - 1 : first] if first else [0.0], voice])
        control, poses = self.track.advance(voice)
        self.chunk += 1
        return condition_tokens(control, heard.astype(np.float32)), poses, voice

    @property
    def segment_is_over(self) -> bool:
        return self.segment is not None and self.chunk in self.ends


class Judge:
    """All scores of one actor's video; constant memory but for a few numbers per frame."""

    def __init__(self, actor: Actor, chunks: int, portraits: int) -> None:
        self.actor = actor
        self.video, self.said = VideoScore(actor.who), InstructionScore()
        self.identity = IdentityScore()
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []
        self.portraits = {chunks * (2 * i + 1) // (2 * portraits) for i in range(portraits)}

    def update(
        self, frames: np.ndarray, truth: np.ndarray, poses: np.ndarray, voice: np.ndarray
    ) -> None:
        actor = self.actor
        self.video.update(frames, truth, poses, voice)
        if actor.chunk - 1 in self.portraits:
            self.identity.update(frames[0], truth[0], actor.who, poses[0])
        if actor.segment is not None:
            self.pending.append((frames, truth))
        if actor.segment_is_over and actor.segment is not None:
            a, b = (np.concatenate(v) for v in zip(*self.pending, strict=True))
            self.said.update(a, b, actor.who, actor.segment)
            self.pending.clear()

    def row(self) -> dict[str, Any]:
        lips, ratio = self.video.lips, self.video.flicker.ratio
        row = {
            "seed": self.actor.seed,
            "frames": self.video.frames,
            "lip_sync": lips.correlation,
            "lip_offset": lips.offset,
            "said": len(self.said.said),
            "obeyed": int(np.equal(self.said.said, self.said.recognised).sum()),
            "delays": [int(d) for d in self.said.delays],
            "confusions": self.said.confusions(),
            "psnr": min(self.video.psnr, 100.0),  # identical frames: finite, for JSON
            "ssim": self.video.ssim,
            "flicker_levels": self.video.flicker.levels,
            "flicker_ratio": ratio if math.isfinite(ratio) else None,
        }
        if self.identity.colours:
            row["colour_error"] = self.identity.colour_error
            row["colour_errors"] = self.identity.colour_errors()
            row["shape_error"] = self.identity.shape_error
        return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over people; instructions are counted one by one."""
    out: dict[str, Any] = {"people": len(rows), "frames": sum(r["frames"] for r in rows)}
    for name in ("lip_sync", "lip_offset", "psnr", "ssim", "flicker_levels", "flicker_ratio",
                 "colour_error", "shape_error"):  # fmt: skip
        values = [r[name] for r in rows if r.get(name) is not None]
        out[name] = float(np.mean(values)) if values else None
    out["worst_lip_sync"] = min(r["lip_sync"] for r in rows)
    out["worst_psnr"] = min(r["psnr"] for r in rows)
    said, delays = sum(r["said"] for r in rows), [d for r in rows for d in r["delays"]]
    out["instructions"] = said
    out["instruction_accuracy"] = sum(r["obeyed"] for r in rows) / said if said else None
    out["delay_frames"] = float(np.mean(delays)) if delays else None
    confusions: dict[str, int] = {}
    for row in rows:
        for pair, count in row["confusions"].items():
            confusions[pair] = confusions.get(pair, 0) + count
    out["confusions"] = confusions
    return out


# Tokens [B, 2, 4, 48] and truth [B, 8, S, S, 3] -> frames [B, 8, S, S, 3].
Generate = Callable[[torch.Tensor, np.ndarray], np.ndarray]


def perform(
    generate: Generate,
    actors: list[Actor],
    chunks: int,
    portraits: int,
    tick: Callable[[int], None],
    watch: Callable[[int, list[Judge], np.ndarray, np.ndarray], None] | None = None,
) -> list[Judge]:
    """Play and judge a group of actors; `watch` sees every chunk of frames and truth."""
    judges = [Judge(actor, chunks, portraits) for actor in actors]
    for chunk in range(chunks):
        acts = [actor.next_chunk() for actor in actors]
        truth = np.stack([render(a.who, act[1]) for a, act in zip(actors, acts, strict=True)])
        tokens = torch.from_numpy(np.stack([act[0] for act in acts]))
        frames = generate(tokens, truth)
        for judge, made, true, act in zip(judges, frames, truth, acts, strict=True):
            judge.update(made, true, *act[1:])
        if watch:
            watch(chunk, judges, frames, truth)
        tick(FRAMES * len(actors))
    return judges


# --- What plays ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to run the same weights, or those of a sparse adapter over them."""

    layout: StreamLayout
    steps: int = 3
    rope_on_cache: bool = False
    kv_format: str = "plain"  # of the cache; 8-bit keys are scored by an 8-bit query
    sparsity: int = 0  # percent of key blocks left to the linear branch of sparse attention
    tuned: bool = True  # with an adapter
    adapter: int = 0  # the sparsity that it was trained for, where it is another
    noisy_only: bool = False  # the last step reads the noisy cache too


def variants(config: Any) -> dict[str, Variant]:
    """The default first, then one change each."""
    base = layout("vidu_s1", config)
    clean = replace(base, segments=tuple(replace(s, cache="clean") for s in base.segments))
    free = StreamLayout(
        "history_only",
        config.chunk,
        (LayoutSegment("history", config.window - config.chunk, cache="twin", evict="drop"),),
    )
    return {
        "vidu_s1, 3 steps": Variant(base),
        "TwinCache off: clean history": Variant(clean),
        "TwinCache off: noisy history": Variant(base, noisy_only=True),
        "reference off": Variant(free),
        "longlive": Variant(layout("longlive", config)),
        "self_forcing": Variant(layout("self_forcing", config)),
        "RoPE on the cache": Variant(base, rope_on_cache=True),
        "4 steps": Variant(base, steps=4),
        "2 steps": Variant(base, steps=2),
        "1 step": Variant(base, steps=1),
        "SLA, 50% sparse": Variant(base, sparsity=50),
        "SLA, 50% sparse, not fine-tuned": Variant(base, sparsity=50, tuned=False),
        "SLA, 90% sparse": Variant(base, sparsity=90),
        "SLA, 90% sparse, not fine-tuned": Variant(base, sparsity=90, tuned=False),
    }


def formats(config: Any) -> dict[str, Variant]:
    """The default again, its attention otherwise."""
    base = layout("vidu_s1", config)
    return {
        "INT8 QK, FP16 values": Variant(base, kv_format="int8, v fp16"),
        "INT8 QK, FP8 values": Variant(base, kv_format="int8, v fp8"),
        "SLA, 50% sparse": Variant(base, sparsity=50),
        "SLA, 75% sparse, adapter of 50%": Variant(base, sparsity=75, adapter=50),
        "SLA, 90% sparse": Variant(base, sparsity=90),
    }


def open_stream(
    model: tuple[CausalTransformer, ConvCodec], variant: Variant, actors: list[Actor]
) -> Stream:
    """A stream that has seen every actor's picture."""
    stream = Stream(
        *model,
        variant.layout,
        steps=variant.steps,
        seed=actors[0].seed % 2**31,
        batch=len(actors),
        rope_on_cache=variant.rope_on_cache,
        kv_format=variant.kv_format,
    )
    rest = torch.from_numpy(picture_tokens()).expand(len(actors), -1, -1, -1)
    stream.start(torch.from_numpy(np.stack([a.picture for a in actors])), rest)
    if variant.noisy_only and stream.memory is not None:
        make = stream.memory.make_plans

        def plans(frames: int | None = None) -> dict[str, Any]:
            made = make(frames)
            return {**made, "final": made["intermediate"]}

        stream.memory.make_plans = plans
    return stream


def playing(stream: Stream) -> Generate:
    return lambda tokens, truth: stream.next_frames(tokens).numpy()


def codec_only(codec: ConvCodec) -> Generate:
    """The ceiling: what a perfect transformer would reach."""

    @torch.inference_mode()
    def generate(tokens: torch.Tensor, truth: np.ndarray) -> np.ndarray:
        return codec.decode_uint8(codec.encode(torch.from_numpy(truth))).numpy()

    return generate


# --- Experiments --------------------------------------------------------------------------------


@dataclass
class Bench:
    """Settings, the model, and results that are saved part by part."""

    model: tuple[CausalTransformer, ConvCodec]
    settings: dict[str, Any]
    out: Path
    pictures: Path
    results: dict[str, Any] = field(default_factory=dict)
    folder: Path = weights.FOLDER

    def model_of(self, variant: Variant) -> tuple[CausalTransformer, ConvCodec]:
        """The model, or the sparse one that `variant` asks for."""
        if not variant.sparsity:
            return self.model
        transformer, codec = self.model
        name = f"sla-{variant.adapter or variant.sparsity}.safetensors"
        adapter = self.folder / name if variant.tuned else None
        return weights.sparse(transformer, variant.sparsity, adapter), codec

    def save(self) -> None:
        document = {"settings": self.settings, "machine": machine(), **self.results}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(self.out)

    def resume(self) -> None:
        """Take over what an earlier run of the same settings and weights has finished."""
        if not self.out.exists():
            return
        try:
            found = json.loads(self.out.read_text())
        except ValueError as error:
            raise ValueError(f"resume: {self.out} is not JSON ({error})") from error
        if found.get("settings") == self.settings:
            self.results = {k: v for k, v in found.items() if k not in ("settings", "machine")}
        else:
            console.print(f"{self.out} has other settings or weights: starting anew")

    def run(self, names: Iterable[str]) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(),
                   TextColumn("{task.completed:.0f}/{task.total:.0f} frames"),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console, refresh_per_second=2) as bar:
            for name in names:
                getattr(self, name)(bar)
                self.save()

    def group(
        self,
        bar: Progress,
        name: str,
        seeds: list[int],
        chunks: int,
        make: Callable[[list[Actor]], Generate],
        portraits: int,
        done: list[dict[str, Any]],
    ) -> None:
        """Append a row for every seed that has none yet, a batch at a time."""
        missing = [s for s in seeds if s not in {r["seed"] for r in done}]
        task = bar.add_task(name, total=FRAMES * chunks * len(missing))
        for i in range(0, len(missing), GROUP):
            actors = [Actor(seed, chunks) for seed in missing[i : i + GROUP]]
            judges = perform(
                make(actors), actors, chunks, portraits, lambda n: bar.advance(task, n)
            )
            done.extend(judge.row() for judge in judges)
            self.save()

    def main(self, bar: Progress) -> None:
        variant = variants(self.model[0].config)["vidu_s1, 3 steps"]
        seeds = [FIRST_SEED + i for i in range(self.settings["people"])]
        self.group(bar, "main table", seeds, chunks_of(self.settings["seconds"]),
                   lambda actors: playing(open_stream(self.model, variant, actors)), 3,
                   self.results.setdefault("main", []))  # fmt: skip

    def codec(self, bar: Progress) -> None:
        seeds = [ABLATION_SEED + i for i in range(self.settings["ablation_people"])]
        self.group(bar, "codec alone", seeds, chunks_of(self.settings["ablation_seconds"]),
                   lambda actors: codec_only(self.model[1]), 1,
                   self.results.setdefault("codec", []))  # fmt: skip

    def forget_other_adapters(self) -> None:
        """Rows of other adapters than those in the folder do not count."""
        found = {path.stem: fingerprint(self.folder, path.stem)
                 for path in sorted(self.folder.glob("sla-*.safetensors"))}  # fmt: skip
        known, self.results["adapter_weights"] = self.results.get("adapter_weights", {}), found
        config = self.model[0].config
        for part, made in (("ablations", variants(config)), ("formats", formats(config))):
            for name, variant in made.items():
                adapter = f"sla-{variant.adapter or variant.sparsity}"
                if variant.tuned and known.get(adapter) != found.get(adapter):
                    self.results.get(part, {}).pop(name, None)

    def ablations(self, bar: Progress) -> None:
        seeds = [ABLATION_SEED + i for i in range(self.settings["ablation_people"])]
        table = self.results.setdefault("ablations", {})
        everything = variants(self.model[0].config)
        self.forget_other_adapters()
        for name, variant in everything.items():
            model = self.model_of(variant)

            def make(
                actors: list[Actor], variant: Variant = variant, model: Any = model
            ) -> Generate:
                return playing(open_stream(model, variant, actors))

            chunks = chunks_of(self.settings["ablation_seconds"])
            self.group(bar, name, seeds, chunks, make, 1, table.setdefault(name, []))

    def long(self, bar: Progress) -> None:
        """One stream, thousands of frames: PSNR over time and peak memory."""
        chunks = self.settings["long_frames"] // FRAMES
        if not chunks or self.results.get("long", {}).get("complete"):
            return
        actor = Actor(LONG_SEED, chunks)
        stream = open_stream(self.model, next(iter(variants(self.model[0].config).values())),
                             [actor])  # fmt: skip
        task = bar.add_task("long stream", total=FRAMES * chunks)
        memory: list[float] = []
        warmup, span = ends(FRAMES * chunks)

        def result(judge: Judge, complete: bool) -> dict[str, Any]:
            mse = judge.video.mse
            out = {
                "complete": complete,
                "frames": len(mse),
                "psnr_per_100_frames": [round(decibels(m), 3) for m in per_100(mse)],
                "peak_memory_mb": [round(m, 1) for m in memory],
                "cache_mb": stream.memory.nbytes / 1e6 if stream.memory else None,
            }
            if complete:
                out |= judge.row()
                out["psnr_first"] = decibels(mse[warmup : warmup + span])
                out["psnr_last"] = decibels(mse[-span:])
                out["drift"] = drift(mse, warmup, span)
                out["memory_growth_mb"] = memory[-1] - memory[len(memory) // 5]
            return out

        def watch(chunk: int, judges: list[Judge], *_: np.ndarray) -> None:
            if chunk % max(1, chunks // 20) == 0 or chunk == chunks - 1:
                memory.append(peak_memory())
                self.results["long"] = result(judges[0], complete=False)
                self.save()

        judges = perform(playing(stream), [actor], chunks, 3, lambda n: bar.advance(task, n), watch)
        self.results["long"] = result(judges[0], complete=True)

    def formats(self, bar: Progress) -> None:
        """The long stream with its attention otherwise, frame by frame beside the dense one."""
        chunks = self.settings["long_frames"] // FRAMES
        table = self.results.setdefault("formats", {})
        self.forget_other_adapters()
        config = self.model[0].config
        missing = {k: v for k, v in formats(config).items() if k not in table}
        if not chunks or not missing:
            return
        actor = Actor(LONG_SEED, chunks)
        stream = open_stream(self.model, next(iter(variants(config).values())), [actor])
        task = bar.add_task("dense float32", total=FRAMES * chunks)
        dense = []
        for _ in range(chunks):
            tokens = torch.from_numpy(actor.next_chunk()[0])[None]
            dense.append(stream.next_frames(tokens).numpy()[0])
            bar.advance(task, FRAMES)
        for name, variant in missing.items():
            table[name] = self.beside(bar, name, variant, dense)
            self.save()

    def beside(
        self, bar: Progress, name: str, variant: Variant, dense: list[np.ndarray]
    ) -> dict[str, Any]:
        """A whole stream of `variant`, and what each frame of it loses against the dense one's."""
        actor = Actor(LONG_SEED, len(dense))
        stream = open_stream(self.model_of(variant), variant, [actor])
        moved, right = [], []  # squared error of these frames from dense ones, of those from truth

        def watch(chunk: int, _: list[Judge], frames: np.ndarray, truth: np.ndarray) -> None:
            moved.append(frame_mse(frames[0], dense[chunk]))
            right.append(frame_mse(dense[chunk], truth[0]))

        task = bar.add_task(name, total=FRAMES * len(dense))
        judge = perform(
            playing(stream), [actor], len(dense), 3, lambda n: bar.advance(task, n), watch
        )[0]
        mse, moved_by, of_dense = judge.video.mse, np.concatenate(moved), np.concatenate(right)
        lost = miniature_formats.loss(mse, of_dense)
        warmup, span = ends(len(mse))
        return {
            **judge.row(),
            "psnr_dense": decibels(of_dense),
            "psnr_beside_dense": min(decibels(moved_by), 100.0),
            "drift": drift(mse, warmup, span),
            "lost": miniature_formats.spread(lost),
            "lost_per_100_frames": [round(float(x), 3) for x in per_100(lost)],
            "cache_mb": stream.memory.nbytes / 1e6 if stream.memory else None,
        }

    def speed(self, bar: Progress) -> None:
        """One stream and nothing else: milliseconds per chunk, by phase."""
        if "speed" in self.results:
            return
        chunks, warmup = self.settings["speed_chunks"], 8
        actor = Actor(FIRST_SEED, chunks + warmup)
        tokens = [torch.from_numpy(actor.next_chunk()[0])[None] for _ in range(chunks + warmup)]
        variant = next(iter(variants(self.model[0].config).values()))
        open_stream(self.model, variant, [actor]).next_frames(tokens[0])
        task = bar.add_task("speed", total=FRAMES * len(tokens))
        stream = open_stream(self.model, variant, [actor])
        for token in tokens:
            stream.next_frames(token)
            bar.advance(task, FRAMES)
        ms = {phase: np.array(stream.clock.ms[phase])[-chunks:] for phase in PHASES}
        first = sum(stream.clock.ms[phase][0] for phase in PHASES)
        total = np.sum([ms[phase] for phase in PHASES if phase != "encode"], axis=0)
        rows = {**ms, "total": total}
        self.results["speed"] = {
            "fps": float(1000 * FRAMES / total.mean()),
            "first_frame_ms": float(first),
            "chunks": chunks,
            "threads": torch.get_num_threads(),
            "cpu": machine()["cpu"],
            "p50_ms": {k: float(np.median(v)) for k, v in rows.items()},
            "p95_ms": {k: float(np.percentile(v, 95)) for k, v in rows.items()},
        }

    def picture(self, bar: Progress) -> None:
        """A few people through the same script: the frames of docs/miniature.png."""
        chunks = 2 + SWITCH[0] * len(SHOWN)
        script = {2 + SWITCH[0] * k: instruction_id(word) for k, word in enumerate(SHOWN)}
        seeds = range(SHOWN_SEED, SHOWN_SEED + self.settings["shown_people"])
        actors = [Actor(seed, chunks, script) for seed in seeds]
        shown: list[tuple[np.ndarray, np.ndarray]] = []
        picked = {2 + SWITCH[0] * (k + 1) - 1 for k in range(len(SHOWN))}

        def watch(chunk: int, _: list[Judge], frames: np.ndarray, truth: np.ndarray) -> None:
            if chunk in picked:  # the frame of the widest mouth, so that one sees it speak
                spoken = [a.envelope[FRAMES * chunk : FRAMES * (chunk + 1)] for a in actors]
                best = np.argmax(spoken, axis=1)
                who = np.arange(len(actors))
                shown.append((frames[who, best], truth[who, best]))

        stream = open_stream(self.model, next(iter(variants(self.model[0].config).values())),
                             actors)  # fmt: skip
        task = bar.add_task("picture", total=FRAMES * chunks * len(actors))
        judges = perform(playing(stream), actors, chunks, 1, lambda n: bar.advance(task, n), watch)
        video = judges[0].video
        self.results["curves"] = {
            "opening": [round(float(v), 4) for v in video.opening[: 8 * FPS]],
            "envelope": [round(float(v), 4) for v in video.envelope[: 8 * FPS]],
        }
        times = [FRAMES * c / FPS for c in sorted(picked)]
        generated, truth = (np.stack(v, axis=1) for v in zip(*shown, strict=True))
        draw_film(self.pictures / "miniature.png", generated, truth, SHOWN, times)


def ends(frames: int) -> tuple[int, int]:
    """Frames before the beginning of a stream counts, and frames of its beginning and its end."""
    warmup = min(100, frames // 10)  # a short run has a short beginning and end
    return warmup, min(1000, (frames - warmup) // 2)


def per_100(values: np.ndarray) -> np.ndarray:
    """Means of every hundred values; what is left over is not counted."""
    return values[: len(values) // 100 * 100].reshape(-1, 100).mean(axis=1)


def chunks_of(seconds: float) -> int:
    return max(1, round(seconds * FPS / FRAMES))


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [v for v in info.read_text().splitlines() if v.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def peak_memory() -> float:
    """The most this process has ever held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def fingerprint(folder: Path, *names: str) -> str:
    """Of weights, by file name, so that results of other weights are never mixed in."""
    digest = hashlib.sha256()
    for name in names:
        for path in sorted(folder.glob(f"{name}.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- What is said about it ----------------------------------------------------------------------


def measured(results: dict[str, Any]) -> dict[str, float | None]:
    """The figures that have targets; None where nothing was measured."""
    main = summarise(results["main"]) if results.get("main") else {}
    return {
        "lip_sync": main.get("lip_sync"),
        "instruction_accuracy": main.get("instruction_accuracy"),
        "psnr": main.get("psnr"),
        "drift": results.get("long", {}).get("drift"),
        "fps": results.get("speed", {}).get("fps"),
    }


def missed(results: dict[str, Any]) -> list[str]:
    """The targets that were measured and not reached."""
    values = measured(results)
    return [k for k, least in TARGETS.items() if (v := values[k]) is not None and not v >= least]


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "people x s": lambda r: f"{r['people']} x {r['frames'] / r['people'] / FPS:.0f}",
    "lip-sync": lambda r: f"{r['lip_sync']:.3f}",
    "offset": lambda r: f"{r['lip_offset']:+.1f}",
    "instructions": lambda r: f"{100 * r['instruction_accuracy']:.1f}%",
    "delay": lambda r: f"{r['delay_frames']:+.1f}",
    "PSNR dB": lambda r: f"{r['psnr']:.2f}",
    "SSIM": lambda r: f"{r['ssim']:.3f}",
    "colour": lambda r: f"{r['colour_error']:.1f}",
    "shape": lambda r: f"{100 * r['shape_error']:.0f}%",
    "flicker": lambda r: f"{r['flicker_levels']:.2f}",
}


def table_rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Name and cells of every row of the quality table."""
    parts = {
        "**miniature**": results.get("main"),
        "codec alone (the ceiling)": results.get("codec"),
    }
    parts |= {f"ablation: {k}": v for k, v in results.get("ablations", {}).items()}
    rows = []
    for name, people in parts.items():
        if people:
            row, cells = summarise(people), []
            for cell in COLUMNS.values():
                try:
                    cells.append(cell(row))
                except TypeError:  # None: this part does not measure it
                    cells.append("not measured")
            rows.append((name, cells))
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The tables for README.md."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in table_rows(results)]
    lines += [
        "",
        "Lip-sync: correlation of the mouth, read from pixels, with the voice. Offset and delay "
        "in frames of 40 ms. Colour: mean error of five regions in levels of 0..255. Shape: mean "
        "error of the proportions, as a part of the range over which people differ. Flicker: "
        "change, in levels, where the renderer's picture stands still.",
    ]
    if (long := results.get("long", {})).get("complete"):
        lines += [
            "",
            f"One stream of {long['frames']:,} frames: {long['psnr_first']:.2f} dB at its "
            f"beginning, {long['psnr_last']:.2f} dB at its end ({long['drift']:+.2f} dB); peak "
            f"memory grew by {long['memory_growth_mb']:.0f} MB over the last four fifths.",
        ]
    if speed := results.get("speed"):
        names = [k for k in speed["p50_ms"] if k != "encode"]
        lines += [
            "",
            f"| ms per chunk of {FRAMES} frames | {' | '.join(names)} | FPS | first frame |",
            "|---" * (len(names) + 3) + "|",
            f"| {speed['cpu']}, {speed['threads']} threads: p50 (p95) | "
            + " | ".join(f"{speed['p50_ms'][k]:.0f} ({speed['p95_ms'][k]:.0f})" for k in names)
            + f" | **{speed['fps']:.0f}** | {speed['first_frame_ms']:.0f} ms |",
        ]
    return "\n".join(lines)


def update_readme(readme: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: the markers are not there, or not in order.
    """
    page = readme.read_text()
    begin, end = (page.find(marker) for marker in markers)
    if begin < 0 or end < begin:
        raise ValueError(f"readme: expected {' ... '.join(markers)} in {readme}")
    readme.write_text(f"{page[: begin + len(markers[0])]}\n{text}\n{page[end:]}")


def show(results: dict[str, Any], judged: bool) -> None:
    """Tables for people, on stderr; wide ones where nobody's terminal is in the way."""
    wide = console if console.is_terminal else Console(stderr=True, width=146)
    table = Table("", *COLUMNS, title="The miniature")
    table.columns[0].no_wrap = True
    for name, cells in table_rows(results):
        table.add_row(name.strip("*"), *cells)
    wide.print(table)
    table = Table("target", "at least", "measured", "", title="Targets")
    for name, value in measured(results).items():
        verdict = "" if value is None else "reached" if value >= TARGETS[name] else "MISSED"
        shown = "not measured" if value is None else f"{value:.3f}"
        table.add_row(
            name, f"{TARGETS[name]:g}", shown, verdict if judged else "too short to judge"
        )
    wide.print(table)


# --- Pictures -----------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_film(
    path: Path,
    generated: np.ndarray,
    truth: np.ndarray,
    labels: Iterable[str],
    times: Iterable[float],
) -> None:
    """People [P, K, S, S, 3] over time, the renderer's frame above the generated one."""
    plt = _pyplot()
    people, columns, size = generated.shape[:3]
    gap, between, left, top = 4, 14, 108, 44
    height = top + people * (2 * size + gap) + (people - 1) * between + 8
    width = left + columns * (size + gap) + 4
    page = np.full((height, width, 3), 255, np.uint8)
    dpi = 100
    figure = plt.figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    for p in range(people):
        y = top + p * (2 * size + gap + between)
        for video, name in ((truth, "renderer"), (generated, "generated")):
            for k in range(columns):
                x = left + k * (size + gap)
                page[y : y + size, x : x + size] = video[p, k]
            figure.text((left - 10) / width, 1 - (y + size / 2) / height, name, ha="right",
                        va="center", fontsize=11, color="#111" if name == "generated" else "#888",
                        weight="bold" if name == "generated" else "normal")  # fmt: skip
            y += size + gap
    for k, (label, second) in enumerate(zip(labels, times, strict=True)):
        x = (left + k * (size + gap) + size / 2) / width
        figure.text(x, 1 - 15 / height, f"“{label}”", ha="center", va="center", fontsize=11)
        figure.text(x, 1 - 32 / height, f"{second:.1f} s", ha="center", va="center", fontsize=9,
                    color="#888")  # fmt: skip
    axis = figure.add_axes((0, 0, 1, 1), zorder=-1)
    axis.imshow(page, interpolation="nearest", aspect="auto")
    axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw_curves(path: Path, results: dict[str, Any]) -> None:
    """PSNR over the long stream; mouth and voice; ablations.  What is missing is left out."""
    plt = _pyplot()
    ablations = {k: summarise(v) for k, v in results.get("ablations", {}).items() if v}
    curve: list[float] = results.get("long", {}).get("psnr_per_100_frames") or []
    lips: dict[str, list[float]] = results.get("curves") or {}
    panels = [p for p, data in (("long", curve), ("lips", lips), ("ablations", ablations)) if data]
    if not panels:
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.3), layout="constrained", squeeze=False
    )
    blue, orange, grey = "#2563a8", "#e07b39", "#9aa3ad"
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel == "long":
            x = 100 * np.arange(len(curve)) + 50
            axis.plot(x, curve, color=blue, lw=1.3)
            axis.axhline(TARGETS["psnr"], color=grey, lw=1, ls="--")
            axis.text(x[-1], TARGETS["psnr"], "target", color=grey, ha="right", va="bottom")
            low = min([*curve, TARGETS["psnr"]])
            axis.set(title="One stream, chunk after chunk", xlabel="video frame", ylabel="PSNR, dB",
                     ylim=(low - 2, max(curve) + 2))  # fmt: skip
        elif panel == "lips":
            t = np.arange(len(lips["opening"])) / FPS
            axis.fill_between(t, lips["envelope"], color=orange, alpha=0.35, lw=0, label="voice")
            axis.plot(t, lips["opening"], color=blue, lw=1.3, label="mouth, read from pixels")
            axis.set(title="The mouth follows the voice", xlabel="seconds", ylim=(0, 1.15))
            axis.legend(frameon=False, ncols=2, loc="upper left")
        else:
            names, values = list(ablations), [r["psnr"] for r in ablations.values()]
            y = np.arange(len(names))
            axis.barh(y, values, color=[blue, *[grey] * (len(names) - 1)], height=0.7)
            for k, row in enumerate(ablations.values()):
                obeyed = row["instruction_accuracy"]
                share = "" if obeyed is None else f", {100 * obeyed:.0f}%"
                axis.text(values[k], k, f" {values[k]:.1f}{share}", va="center", fontsize=8)
            axis.set(title="One thing changed at a time", yticks=y, yticklabels=names,
                     xlabel="PSNR, dB (and instructions obeyed)",
                     xlim=(0, 1.3 * max(values)))  # fmt: skip
            axis.invert_yaxis()
        if panel != "ablations":
            axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- The command --------------------------------------------------------------------------------


def main(
    people: Annotated[int, typer.Option(min=1, help="Held-out people in the main table.")] = 20,
    seconds: Annotated[float, typer.Option(min=4, help="Seconds each.")] = 40.0,
    long_frames: Annotated[int, typer.Option(min=0, help="Frames of the long stream.")] = 10_000,
    quick: Annotated[bool, typer.Option(help="A minute in all, too short to judge.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of weights; default: the shipped ones.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(EXPERIMENTS)}.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")] = 0,
    resume: Annotated[bool, typer.Option(help="Keep what an earlier run has finished.")] = False,
    update_page: Annotated[
        bool,
        typer.Option(
            "--update-readme", help="Rewrite the tables in README.md and docs/miniature.md."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results on stdout.")] = False,
) -> None:
    """Judge the miniature.  Exit 1 if a target is missed, 2 on bad input."""
    settings: dict[str, Any] = {
        "people": people, "seconds": seconds, "long_frames": long_frames,
        "ablation_people": 4, "ablation_seconds": 20.0, "shown_people": 4, "speed_chunks": 100,
    }  # fmt: skip
    if quick:
        settings = {
            "people": 2, "seconds": 6.0, "long_frames": 400,
            "ablation_people": 1, "ablation_seconds": 3.2, "shown_people": 2, "speed_chunks": 20,
        }  # fmt: skip
    results_folder = Path("bench/results")
    out = out or results_folder / ("miniature-quick.json" if quick else "miniature.json")
    pictures = pictures or (out.parent if quick else Path("docs"))
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)
    try:
        if only is not None and only not in EXPERIMENTS:
            raise ValueError(f"only: expected one of {', '.join(EXPERIMENTS)}, got {only!r}")
        folder = checkpoint or weights.FOLDER
        model = weights.load_miniature(folder)
        settings["weights"] = fingerprint(folder, "codec", "transformer")
        bench = Bench(model, settings, out, pictures, folder=folder)
        if resume or only:
            bench.resume()
        if only and not resume:  # measure this part again, keep the others
            bench.results.pop(only, None)
        try:
            bench.run([only] if only else EXPERIMENTS)
        except KeyboardInterrupt:
            bench.save()
            console.print(f"stopped; finished parts are in {out}, go on with --resume")
            raise typer.Exit(130) from None
        bench.results["summary"] = {
            "main": summarise(bench.results["main"]) if bench.results.get("main") else None,
            "measured": measured(bench.results),
            "targets": TARGETS,
            "missed": missed(bench.results),
        }
        bench.save()
        draw_curves(pictures / "miniature_curves.png", bench.results)
        text = markdown(bench.results)
        out.with_suffix(".md").write_text(text + "\n")
        done = bench.results.get("formats", {})
        rows = {name: done[name] for name in formats(model[0].config) if name in done}
        if rows:
            miniature_formats.draw(pictures / "miniature_formats.png", rows)
        if update_page:
            update_readme(Path("README.md"), text)
            if rows and bench.results.get("long", {}).get("complete"):
                table = miniature_formats.markdown(bench.results["long"], rows)
                update_readme(Path("docs/miniature.md"), table, miniature_formats.MARKERS)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    show(bench.results, judged=not quick)
    console.print(f"results in {out}, tables in {out.with_suffix('.md')}, pictures in {pictures}")
    if as_json:
        print(out.read_text(), end="")
    if bench.results["summary"]["missed"] and not quick:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
