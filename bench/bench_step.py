# SPDX-License-Identifier: Apache-2.0
"""step: a chunk, one pass of it, and one block, at every quality level.  Bound by the tensor cores.

Weights are random, the window is full, and what is judged is the capture: a replay must leave the
bits that the same regions leave when they run eagerly; eagerly they are timed as well, and must
leave them twice.  (Kernels are judged by the benchmarks of their families, levels by
tests/test_quality.py.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reeltime.bench import harness
from reeltime.bench.case import Case, Expected, Inputs, Judged
from reeltime.bench.shapes import CHUNK, RAGGED, Sizes
from reeltime.checks import Tolerance
from reeltime.model.config import ModelConfig, SparseLinear, preset
from reeltime.model.flops import Work, Workload
from reeltime.model.kv_cache import KV_FORMATS, StreamMemory
from reeltime.model.layout import layout
from reeltime.model.quality import QUALITIES, Quality, quantize
from reeltime.model.sampler import timesteps
from reeltime.model.step import Step
from reeltime.model.transformer import CausalTransformer

STEPS = 3  # denoising steps of a chunk
LAYOUT = "vidu_s1"  # two rotations of the query, two rings: the most that a layout asks for
EXACT = Tolerance(0.0, 0.0)
# Of floors of 290 and 92 frames per second on an H200, 168 and 55 are wanted.
EXPECTED = Expected(0.58, 0.58, "every family at its own share, launches hidden in a graph")
# What of a pass is no part of a block.
OUTSIDE = ("patch_embedding", "time_embedding", "time_projection", "norm", "head")


@dataclass(frozen=True)
class Geometry:
    """A model at a resolution: rows and columns of a latent frame, in patches of 2 x 2."""

    config: ModelConfig
    grid: tuple[int, int]

    @property
    def size(self) -> tuple[int, int, int]:
        p, q = self.config.patch
        return self.config.in_channels, self.grid[0] * p, self.grid[1] * q


SMALL = (30, 52)  # of 832 x 480 pixels; 960 x 544 is CHUNK's
SHORT = 12  # latent frames: a window that forgets sooner
TINY = ModelConfig(
    "tiny", 256, 2, 336, 2, 16, 16, text_dim=64, freq_dim=32, chunk=2, window=7, text_len=16
)
WAN = preset("wan-1.3b")
GEOMETRIES = {
    "dit": (
        *(Geometry(WAN, grid) for grid in (CHUNK.grid, SMALL)),
        *(Geometry(replace(WAN, window=SHORT), grid) for grid in (CHUNK.grid, SMALL)),
        Geometry(preset("wan-14b"), SMALL),
    ),
    "tiny": (Geometry(TINY, RAGGED),),
}


def cases(sizes: Sizes) -> Iterator[Case]:
    """What takes longest to know first: a run that is cut short has the chunks.

    Of a model larger than 1.3B only a block; of a window shorter than the model's no more than
    chunks.
    """
    places = GEOMETRIES[sizes.name]
    levels = QUALITIES.values()
    for place in places:
        if place.config.dim <= WAN.dim:
            for level in levels:
                yield case("chunk", place, level)
                yield case("chunk", place, level, eager=True)
                if place.config.window != SHORT:
                    yield case("pass", place, level)
    for place in places:
        if place.config.window != SHORT:
            for level in levels:
                one = replace(place, config=replace(place.config, num_layers=1))
                yield case("block", one, level)


class Scene:
    """A stream whose window is full."""

    def __init__(self, device: torch.device, seed: int, place: Geometry, level: Quality) -> None:
        config = place.config
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            net = CausalTransformer(config).to(torch.bfloat16)
        self.draw = torch.Generator(device).manual_seed(seed)
        self.memory = StreamMemory(
            quantize(net, level).config, layout(LAYOUT, config), place.grid,
            kv_format=level.kv_format, dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        times = timesteps(STEPS, config.shift)
        self.step = Step(net, self.memory, place.size, times)
        self.context = self.normal(1, 1, config.text_len, config.text_dim)
        self.start = self.normal(*self.step.latents.shape).float()
        self.backend = ""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(
            shape, generator=self.draw, device=self.step.device, dtype=torch.bfloat16
        )

    def ready(self, backend: str) -> Scene:
        """Filled and captured, on this backend."""
        if self.backend != backend:
            self.step.backend = self.memory.backend = backend
            self.step.condition(self.context)
            frames = self.memory.layout.chunk
            for _ in range(-(-self.memory.layout.window // frames)):
                self.chunk()
            self.step.plan()
            self.step.capture()
            self.backend = backend  # now: what fails before is tried again by the next case
        return self

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Inside, regions run as they are written."""
        graphs, self.step.graphs = self.step.graphs, {}
        try:
            yield
        finally:
            self.step.graphs = graphs

    def one_pass(self) -> Tensor:
        self.step.latents.copy_(self.start)
        self.step.run(0)
        return self.step.latents

    def chunk(self) -> Tensor:
        """As `Stream.next_latents` does it; the conditions stay."""
        step = self.step
        step.plan()
        step.latents.copy_(self.start)
        for index in range(len(step.passes)):
            step.noise.normal_(generator=self.draw.manual_seed(index))
            step.run(index)
        return step.latents

    def block(self, x: Tensor, e: Tensor) -> Any:
        """The first block, in the first pass of the next chunk."""
        step = self.step
        self.memory.plan = step.plan_of(torch.zeros(1, dtype=torch.int64, device=x.device))
        block = step.transformer.blocks[0]
        return block(x, None, e, step.context[0], self.memory, 0, self.backend)


@functools.lru_cache(maxsize=1)
def scene(device: torch.device, seed: int, place: Geometry, level: Quality) -> Scene:
    """One for all cases of a geometry and level that follow each other."""
    return Scene(device, seed, place, level)


def case(op: str, place: Geometry, level: Quality, *, eager: bool = False) -> Case:
    """`eager`: without the graphs."""
    config, grid = place.config, place.grid
    tokens, window = (n * grid[0] * grid[1] for n in (config.chunk, config.window))

    def make(device: torch.device, seed: int) -> Inputs:
        played = scene(device, seed, place, level)
        found: Inputs = {"scene": played}
        if op == "block":
            found["x"] = played.normal(1, tokens, config.dim)
            found["e"] = 0.1 * played.normal(1, config.chunk, 6, config.dim)
        return found

    def run(inputs: Inputs, backend: str) -> Any:
        played = inputs["scene"].ready(backend)
        if op == "block":
            x, update = played.block(inputs["x"], inputs["e"])
            return (x,) if update is None else (x, *update)
        with played.eagerly() if eager else nullcontext():
            return played.one_pass() if op == "pass" else played.chunk()

    def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
        played = inputs["scene"]
        got = [x.clone() for x in ((result,) if isinstance(result, Tensor) else result)]
        if op == "chunk":  # as if it had not been: its own slots are no part of what it saw
            played.memory.position.sub_(config.chunk)
        with played.eagerly():
            again = run(inputs, played.backend)
        for index, x in enumerate((again,) if isinstance(again, Tensor) else again):
            what = f"{op}, {'again' if eager else 'replayed'}, result {index}"
            yield Judged(what, got[index], x.double(), EXACT)

    works = work(op, place, level)
    return Case(
        harness.STEP, op, f"{config.name}, {level.name}{', eager' * eager}",
        f"{tokens} x {window}",
        level.linear or "bf16", by_dtype(works, level), sum(w.bytes for w in works), EXPECTED,
        make, run, judge, captured=op != "block",
    )  # fmt: skip


# --- Work ---------------------------------------------------------------------------------------


def work(op: str, place: Geometry, level: Quality) -> list[Work]:
    config = place.config
    if level.topk is not None:
        config = replace(config, sla=SparseLinear(level.topk))
    load = Workload(
        config, layout(LAYOUT, config), place.size[1:], share=level.topk, quantize=level.linear,
        cache=KV_FORMATS[level.kv_format][0],
    )  # fmt: skip
    if op == "chunk":
        return load.chunk(STEPS, new_context=False)
    found = load.denoising_pass()
    return found if op == "pass" else [w for w in found if w.name not in OUTSIDE]


def by_dtype(works: Iterable[Work], level: Quality) -> dict[str, float]:
    """FLOPs by the format whose peak bounds them; cached attention is half keys, half values."""
    format, values = KV_FORMATS[level.kv_format]
    halves = ["bf16", "bf16"]  # FP16 has the peak of bf16
    if format == "int8":
        halves = ["int8", "fp8" if values == torch.float8_e4m3fn else "bf16"]
    flops: dict[str, float] = {}
    for one in works:
        dtypes = ["fp32"]
        if one.name == "self_attention":
            dtypes = halves
        elif one.family in ("gemm", "attention"):
            dtypes = ["bf16"]
        elif one.family == "gemm_w8a8":
            dtypes = [str(level.linear)]
        for dtype in dtypes:
            flops[dtype] = flops.get(dtype, 0.0) + one.flops / len(dtypes)
    return flops


def test_speed(benchmark: Any, case: Case) -> None:
    harness.with_pytest(benchmark, case)
