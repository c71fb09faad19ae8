# SPDX-License-Identifier: Apache-2.0
"""What a step should take on a card that is not here: the work of model/flops.py over the card's
data sheet, at the share of it that our kernels were measured to reach, or are expected to.

    time of an op    = max(FLOPs / peak, bytes / bandwidth) / share + launches * latency
    time of a chunk  = all ops of its passes, but no less than what the host takes to launch them
                       where nothing is captured; plus what Ulysses exchanges

The waterfall begins with what people run: bf16 in PyTorch, keys rotated again in every pass.  The
codec is not in it.  Nothing here is measured, unless a share says so.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from reeltime import arch, rope_kv
from reeltime.bench import bench_attention, bench_gemm_w8a8, bench_norm, bench_quant, bench_rope_kv
from reeltime.bench.case import Expected
from reeltime.bench.ceilings import Ceilings
from reeltime.bench.hardware import CARDS, Card
from reeltime.model import flops
from reeltime.model.config import PRESETS, ModelConfig
from reeltime.model.flops import Work, Workload
from reeltime.model.layout import LAYOUTS, StreamLayout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
HOST_US = 8.0  # of a CPU per operator that is launched eagerly, Python and dispatcher
RESOLUTIONS = {"540p": (960, 544), "480p": (832, 480)}
LINK_SHARE = 0.8  # of a link's data sheet, that exchanges of megabytes reach


# --- Targets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A published system, as bench/targets.toml describes it."""

    name: str
    size: tuple[int, int]
    layout: str
    chunk: int
    window: int
    steps: int
    cache_pass: bool
    preset: str
    stride: tuple[int, int]
    hardware: str
    gpus: int
    source: str
    fps: float | None = None
    first_frame_s: float | None = None
    tflop_per_frame: float | None = None

    def at(self, preset: str) -> Target:
        """With another geometry: "wan-1.3b", or "wan-1.3b-480p" at a resolution of its own.

        Raises:
            ValueError: no such preset.
        """
        base, _, last = preset.rpartition("-")
        name, size = (base, RESOLUTIONS[last]) if last in RESOLUTIONS else (preset, self.size)
        if name not in PRESETS:
            raise ValueError(
                f"preset: expected one of {', '.join(PRESETS)}, or one of them with "
                f"{' or '.join(f'-{known}' for known in RESOLUTIONS)} behind it, got {preset!r}"
            )
        return replace(self, preset=name, size=size)

    def model(self) -> ModelConfig:
        return replace(PRESETS[self.preset], chunk=self.chunk, window=self.window)

    def workload(self, config: ModelConfig, **options: Any) -> Workload:
        space = self.stride[0]
        size = (self.size[1] // space, self.size[0] // space)
        return Workload(config, self.stream_layout(), size, **options)

    def stream_layout(self, name: str | None = None) -> StreamLayout:
        """What its passes see, or would with the layout of another system."""
        made = LAYOUTS[name or self.layout](self.chunk, self.window)
        return replace(made, steps=self.steps)

    @property
    def frames(self) -> int:
        """Of video, in a chunk."""
        return self.chunk * self.stride[1]

    @property
    def passes(self) -> int:
        return self.steps + self.cache_pass


def targets() -> dict[str, Target]:
    with (HERE / "targets.toml").open("rb") as file:
        entries = tomllib.load(file)
    known = {field.name for field in fields(Target)}
    found = {}
    for name, entry in entries.items():
        odd = set(entry) - known
        if odd:
            raise ValueError(f"targets.toml, {name}: unknown {', '.join(sorted(odd))}")
        pairs = {key: tuple(entry[key]) for key in ("size", "stride")}
        found[name] = Target(name=name, **{**entry, **pairs})
    return found


# --- Shares -------------------------------------------------------------------------------------

# Of what has no benchmark of ours: PyTorch's 16-bit products.
BF16_GEMM = Expected(0.75, 0.75, "cuBLAS at the shapes of the transformer")
SLA = Expected(0.45, 0.50, "attention over few blocks; pooling, mask and sums beside it")


@dataclass(frozen=True)
class Share:
    """Of the floor that the kernels of one kind reach on a card."""

    value: float
    source: str  # "expected" or "measured"


def expected(card: Card, kind: Expected) -> Share:
    """A card that nothing was said about is as the one with its kind of tensor core."""
    warpgroups = card.arch in ("sm90", "sm100")
    return Share(kind.h200 if warpgroups else kind.rtx_5090, "expected")


def kinds() -> dict[str, tuple[str, str, Expected]]:
    """What work is called here: family, dtype of its products in results, expectation."""
    return {
        "gemm": ("", "bf16", BF16_GEMM),
        "gemm_w8a8": ("gemm_w8a8", "int8", bench_gemm_w8a8.EXPECTED["int8"]),
        "attention": ("attention", "bf16", bench_attention.EXPECTED["bf16"]),
        "attention, 8 bits": ("attention", "int8, fp8", bench_attention.EXPECTED["int8, fp8"]),
        "sla": ("sla", "int8, fp8", SLA),
        "norm": ("norm", "", bench_norm.EXPECTED["gated_residual_norm"]),
        "quant": ("quant", "", bench_quant.EXPECTED["quantize"]),
        "rope_kv": ("rope_kv", "", bench_rope_kv.EXPECTED["write"]),
    }


def shares(card: Card, folder: Path = HERE / "results") -> dict[str, Share]:
    """Measured where the card's file has rows: the geometric mean of the best backend's shares."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    path = folder / card.file
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["backend"] not in ("cuda", "triton") or not row["share_of_floor"]:
                    continue
                label = " ".join(row[name] for name in ("op", "form", "shape", "dtype"))
                for dtype in (row["dtype"], ""):
                    mine = best.setdefault((row["family"], dtype), {})
                    mine[label] = max(mine.get(label, 0.0), float(row["share_of_floor"]))
    found = {}
    for name, (family, dtype, kind) in kinds().items():
        rows = best.get((family, dtype))
        found[name] = (
            Share(geometric_mean(rows.values()), "measured") if rows else expected(card, kind)
        )
    return found


# --- Ways to run a step -------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a step is run.  Each technique changes one thing."""

    fused: bool = False  # norms with residual, modulation and quantisation; rope_kv in one kernel
    quantize: bool = False  # linear layers in 8 bits, per block
    low_attention: bool = False  # attention in 8 bits
    written_once: bool = False  # keys, values in 8 bits in the cache; the query is moved
    share: float | None = None  # of the key blocks, that sparse-linear attention selects
    captured: bool = False  # one CUDA graph


def techniques(share: float | None, raw: bool = False) -> list[tuple[str, Way]]:
    """The waterfall, each with everything above it.

    raw: keys that are merged later, as a layout may ask for, are neither written once in 8 bits nor
    selected by their summaries.
    """
    ways = [("bf16, eager", Way())]

    def add(name: str, **change: Any) -> None:
        ways.append((name, replace(ways[-1][1], **change)))

    add("fused norms, rope_kv", fused=True)
    add("W8A8 linear layers", quantize=True)
    add("8-bit attention", low_attention=True)
    if not raw:
        add("write-once cache", written_once=True)
    if share is not None and not raw:
        add(f"sparse-linear at {share:.0%}", share=share)
    add("captured graph", captured=True)
    return ways


# What an op costs where it is not fused: times the bytes, and how many kernels.  Gated residual
# norm: x + g h, norm, 1 + scale, shift are 3 + 2 + 2 tensors through memory instead of 4.  rope_kv:
# norm, rotation, copy into the cache.
UNFUSED = {"norm": (1.75, 4), "rope_kv": (3.0, 3)}
KERNELS = {"sla": 4, "norm": 1}  # of a call, where more than one


@dataclass(frozen=True)
class Line:
    """One kind of work of a chunk on a card."""

    name: str
    family: str
    launches: int
    floor_ms: float
    expected_ms: float  # at its share, launches included


def attention_flops(card: Card, count: float, low: bool) -> dict[str, float]:
    """Half in either product: INT8 or bf16, and values in the fastest format of the card."""
    if not low:
        return {"bf16": count}
    values = "fp8" if "fp8" in card.tflops else "bf16"
    return {products(card): count / 2, values: count / 2}


def products(card: Card) -> str:
    """The 8-bit format of linear layers and of q.k: INT8 where that is no slower."""
    row = next(row for row in arch.ARCHS if row.name == card.arch)
    return "fp8" if row.tensor_core["int8"].startswith("UTC") else "int8"


def requantised(work: Workload) -> Work:
    """A window's keys and values in 8 bits again, in every pass: what attention on tensors does."""
    moved = 3 * work.visible_tokens * work.config.dim * 2 * work.config.num_layers
    return Work("quantise window", "quant", work.config.num_layers, 0, moved)


def works(base: Workload, way: Way) -> list[Work]:
    """Of one pass."""
    load = replace(
        base,
        quantize="int8" if way.quantize else None,
        cache="int8" if way.written_once else "plain",
        share=way.share,
    )
    found = load.denoising_pass()
    if not way.written_once:
        if not base.layout.compressed:  # which rotates its keys in every pass by itself
            found.append(load.rotation())
        if way.low_attention:
            found.append(requantised(load))
    return found


def lines(card: Card, found: Iterable[Work], way: Way, reached: Mapping[str, Share]) -> list[Line]:
    ceilings = Ceilings.promised(card)
    result = []
    for work in found:
        kind = work.family
        count: dict[str, float] = {"bf16": work.flops} if kind in ("gemm", "attention") else {}
        if kind == "gemm_w8a8":
            count = {products(card): work.flops}
        elif kind == "sla" or (kind == "attention" and work.name == "self_attention"):
            count = attention_flops(card, work.flops, way.low_attention)
            if kind == "attention" and way.low_attention:
                kind = "attention, 8 bits"
        more, kernels = (1.0, KERNELS.get(kind, 1)) if way.fused else UNFUSED.get(kind, (1.0, 1))
        floor = ceilings.floor_us(count, int(work.bytes))
        if floor is None:
            raise ValueError(f"gpu: {card.name} has no products of {' and '.join(count)}")
        taken = (ceilings.floor_us(count, int(work.bytes * more)) or floor) / reached[kind].value
        launches = work.calls * kernels
        result.append(
            Line(
                work.name,
                work.family,
                launches,
                floor / 1e3,
                (taken + launches * Expected.LATENCY_US) / 1e3,
            )
        )
    return result


# --- The plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One bar of the waterfall: a chunk with this technique and those above it."""

    name: str
    chunk_ms: float
    fps: float
    floor_fps: float  # the same work, every kernel on its floor
    gained_ms: float  # against the stage above


@dataclass(frozen=True)
class Plan:
    gpu: str
    gpus: int
    preset: str
    target: str
    target_fps: float | None
    sla: float | None
    fps: float
    floor_fps: float
    first_frame_ms: float
    memory_gb: float
    memory_limit_gb: float
    exchange_ms: float
    tflop_per_frame: float
    meets_target: bool
    missed: tuple[str, ...]  # which of its demands
    shares: str  # "expected", "measured" or "measured and expected"
    stages: tuple[Stage, ...]
    lines: tuple[Line, ...]  # of the last stage, per chunk


def exchange_ms(base: Workload, card: Card, gpus: int, passes: int) -> float:
    """Ulysses: queries, keys, values and the result change hands in every layer and pass.

    Each GPU sends 4 N d itemsize (P - 1) / P^2 bytes.  Source: DeepSpeed-Ulysses (2309.14509).
    """
    if gpus == 1:
        return 0.0
    c = base.config
    sent = 4 * base.tokens * c.dim * base.itemsize * (gpus - 1) / gpus**2
    return passes * c.num_layers * sent / (card.link_gbps * LINK_SHARE * 1e6)


def chunk_ms(
    card: Card,
    base: Workload,
    way: Way,
    passes: int,
    gpus: int,
    reached: Mapping[str, Share],
) -> tuple[float, float, list[Line]]:
    """Milliseconds of a chunk, those of its floor, and what they are made of."""
    found = [work.times(passes) for work in works(base, way)]
    found += base.compression() + base.conditioning()
    parts = lines(card, found, way, reached)
    taken = sum(line.expected_ms for line in parts) / gpus
    if not way.captured:
        taken = max(taken, sum(line.launches for line in parts) * HOST_US / 1e3)
    exchanged = exchange_ms(base, card, gpus, passes)
    return taken + exchanged, sum(line.floor_ms for line in parts) / gpus + exchanged, parts


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Weights of the blocks' linear layers, and all others.  A model on the meta device has as many
    and takes a second to make."""
    c, d, ffn = config, config.dim, config.ffn_dim
    low = c.num_layers * (8 * d * d + 2 * d * ffn)
    block = 8 * d + ffn + d + 4 * d + 2 * d + 6 * d  # biases, q and k norms, cross norm, modulation
    per_patch = c.patch[0] * c.patch[1]
    embeddings = (c.in_channels * per_patch + 1) * d + (c.text_dim + 1 + d + 1) * d
    times = (c.freq_dim + 1 + d + 1) * d + (d + 1) * 6 * d
    head = (d + 1) * c.out_channels * per_patch + 2 * d
    return low, c.num_layers * block + embeddings + times + head


def memory_gb(base: Workload, way: Way, gpus: int) -> float:
    """Weights, caches and the largest activations, on each GPU: Ulysses shards the last two."""
    low, others = parameters(base.config)
    weights = low * (1 if way.quantize else 2) + others * 2
    d, ffn, tokens = base.config.dim, base.config.ffn_dim, base.tokens
    live = tokens * (2 * 6 * d + ffn * (1 if way.quantize else 2))  # x, its norm, q, k, v, result
    return (weights + (cache_bytes(base, way) + live) / gpus) / 1e9


def cache_bytes(base: Workload, way: Way) -> int:
    """Keys and values of every slot, as they are allocated, and summaries for the linear branch."""
    c = base.config
    slots = base.cache_bytes // (2 * 2 * c.num_layers * c.dim * base.grid[0] * base.grid[1])
    cache = rope_kv.make_cache(
        1,
        slots,
        base.grid[0] * base.grid[1],
        c.num_heads,
        c.head_dim,
        format="int8" if way.written_once else "plain",
        dtype=None if way.written_once else flops.DTYPES[base.itemsize],
        device="meta",
        summaries=None if way.share is None else "slot",
    )
    return c.num_layers * cache.nbytes()


def plan(
    card: Card,
    target: Target,
    *,
    preset: str | None = None,
    sla: float | None = None,
    gpus: int = 1,
    reached: Mapping[str, Share] | None = None,
) -> Plan:
    """The waterfall of a target on a card.

    Args:
        preset: geometry, as in `Target.at`; the target's own by default.
        sla: share of the key blocks that sparse-linear attention selects; None: dense, which a
            layout that compresses keys always is.
        gpus: cards side by side (Ulysses); the heads must be divisible.
        reached: shares of the floor; by default what was measured on the card, or expected.
    Raises:
        ValueError: names the argument, what was expected, what came.
    """
    target = target if preset is None else target.at(preset)
    config = target.model()
    if gpus < 1 or config.num_heads % gpus:
        fit = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ValueError(
            f"gpus: expected a divisor of the {config.num_heads} heads of {config.name}, got "
            f"{gpus}. One of {', '.join(map(str, fit))} works."
        )
    if sla is not None and not 0 < sla <= 1:
        raise ValueError(f"sla: expected a share in (0, 1], got {sla}")
    base = target.workload(config)
    sla = None if base.layout.compressed else sla
    reached = reached or shares(card)
    stages: list[Stage] = []
    parts: list[Line] = []
    for name, way in techniques(sla, raw=base.layout.compressed):
        taken, floor, parts = chunk_ms(card, base, way, target.passes, gpus, reached)
        gained = stages[-1].chunk_ms - taken if stages else 0.0
        frames = 1e3 * target.frames
        stages.append(Stage(name, taken, frames / taken, frames / floor, gained))

    # The picture's cache pass, then the first chunk up to its last denoising step
    first = chunk_ms(card, replace(base, position=1), way, target.steps, gpus, reached)[0]
    picture = chunk_ms(card, replace(base, position=0), way, 1, gpus, reached)[0] / target.chunk
    needed = memory_gb(base, way, gpus)
    last = stages[-1]
    demands = {
        "fps": target.fps is None or last.fps >= target.fps,
        "first frame": target.first_frame_s is None
        or first + picture <= 1e3 * target.first_frame_s,
        "memory": needed <= card.memory_gb,
    }
    sources = {reached[k].source for k in reached}
    work = flops.flops(base.chunk(target.steps, cache_pass=target.cache_pass))
    return Plan(
        gpu=card.name,
        gpus=gpus,
        preset=config.name,
        target=target.name,
        target_fps=target.fps,
        sla=sla,
        fps=last.fps,
        floor_fps=last.floor_fps,
        first_frame_ms=first + picture,
        memory_gb=needed,
        memory_limit_gb=card.memory_gb,
        exchange_ms=exchange_ms(base, card, gpus, target.passes),
        tflop_per_frame=work / target.frames / 1e12,
        meets_target=all(demands.values()),
        missed=tuple(name for name, met in demands.items() if not met),
        shares=" and ".join(sorted(sources, reverse=True)),
        stages=tuple(stages),
        lines=tuple(sorted(parts, key=lambda line: -line.expected_ms)),
    )


def everywhere(
    chosen: Sequence[Target], *, cards: Sequence[Card] = CARDS, **options: Any
) -> list[Plan]:
    return [plan(card, target, **options) for target in chosen for card in cards]
