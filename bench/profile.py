# SPDX-License-Identifier: Apache-2.0
"""A step as it runs here, against the frame rate that is wanted: which phase and which op takes how
long, how far each is from its floor, what is lost between them, and what each technique brings.

Chunks are timed first, without a profiler: frames per second and phases are those of the chunk
whose time is the median.  Then one chunk is traced (profile_trace.py): ops and gaps are its own,
and a trace costs time.  Then the waterfall is run, each technique with everything above it.

Floors are the work of model/flops.py over ceilings that are measured in this run, on a GPU.  On a
CPU there are none: nobody's figures of a host say anything about a kernel.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, record_function

from reeltime import backends, checks
from reeltime.bench import plan
from reeltime.bench.harness import Run as Bench
from reeltime.bench.plan import Target
from reeltime.bench.profile_ops import Op, conditions, ops, work
from reeltime.bench.profile_trace import CHUNK, OTHER, Event, Run, named_by, read
from reeltime.bench.rows import device_name
from reeltime.bench.timing import quantiles
from reeltime.model.kv_cache import StreamMemory
from reeltime.model.miniature.weights import load_miniature
from reeltime.model.quality import QUALITIES, Quality, quantize
from reeltime.model.sampler import timesteps
from reeltime.model.step import CAPTURES, Step, named
from reeltime.model.stream import PhaseClock
from reeltime.model.transformer import CausalTransformer

MINIATURE = Target(
    "miniature", (128, 128), "vidu_s1", 2, 9, 3, True, "miniature", (8, 4), "two CPU cores", 0,
    "the avatar that ships, at its own resolution", fps=25.0,
)  # fmt: skip
SPARSE = 0.1  # share of the key blocks, of the quality levels that end in +sla
DECODE = "decode"
STOPPED = "stopped before it"
Tick = Callable[[str], object]


def goal(preset: str | None, target: str | None) -> Target:
    """What is run, and what it must reach.

    preset: as in `Target.at`, or "miniature", which is its own target; None: the target's.

    Raises:
        ValueError: no such preset or target.
    """
    known = plan.targets()
    if preset == MINIATURE.preset:
        checks.choice("target", target or MINIATURE.name, (MINIATURE.name,))
        return MINIATURE
    checks.choice("target", target or "vidu-s1", tuple(known))
    found = known[target or "vidu-s1"]
    return found if preset is None else found.at(preset)


# --- Ways to run it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How the step is run."""

    level: Quality = QUALITIES["bf16"]
    rope_on_cache: bool = False
    backend: str = "auto"
    captured: bool = False


def waterfall(profiled: Setting, gpu: bool) -> list[tuple[str, Setting | str]]:
    """Each technique with everything above it; or why it cannot be run here."""
    level = profiled.level if profiled.level.linear else QUALITIES["int8"]
    rotating = Setting(rope_on_cache=True, backend=profiled.backend)
    once = replace(rotating, rope_on_cache=False)
    if not gpu:
        sparse = Quality("sla", topk=SPARSE)
        low = replace(sparse, name="sla, 8-bit cache", kv_format=level.kv_format)
        return [
            ("keys rotated in every pass", rotating),
            ("write-once cache", once),
            (f"sparse-linear at {SPARSE:.0%}", replace(once, level=sparse)),
            ("8-bit cache", replace(once, level=low)),
            ("W8A8 linear layers", replace(once, level=replace(low, linear=level.linear))),
            ("fused norms, rope_kv", "a CPU runs the reference, not kernels"),
            ("captured graph", "a CPU has no graphs"),
        ]
    products = Quality("w8a8", linear=level.linear)
    stages: dict[str, Setting | str] = {
        "bf16, eager": replace(rotating, backend="reference"),
        "fused norms, rope_kv": rotating,
        "W8A8 linear layers": replace(rotating, level=products),
        "8-bit attention": "reads keys that were written in 8 bits: in the next one",
        "write-once cache": replace(once, level=replace(level, topk=None)),
    }
    if level.topk is not None:
        stages[f"sparse-linear at {level.topk:.0%}"] = replace(once, level=level)
    stages["captured graph"] = replace(once, level=level, captured=True)
    return list(stages.items())


class Rig:
    """A stream in the steady state, and whatever it takes to run its chunks."""

    def __init__(self, target: Target, setting: Setting, device: torch.device) -> None:
        self.device, self.draw = device, torch.Generator(device).manual_seed(0)
        dtype = wide(device)
        config = target.model()
        self.codec = None
        if target.preset == MINIATURE.preset:
            net, codec = load_miniature(dtype=dtype)
            net, self.codec = net.to(device), codec.to(device)
        else:
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                net = CausalTransformer(config).to(dtype)
        config = quantize(net, setting.level).config
        space, (p, q) = target.stride[0], config.patch
        columns, lines = (n // space for n in target.size)
        self.memory = StreamMemory(
            config, target.stream_layout(), (lines // p, columns // q),
            rope_on_cache=setting.rope_on_cache, kv_format=setting.level.kv_format, dtype=dtype,
            device=device, backend=setting.backend,
        )  # fmt: skip
        self.step = Step(
            net, self.memory, (config.in_channels, lines, columns),
            timesteps(target.steps, config.shift), backend=setting.backend,
        )  # fmt: skip
        shape = conditions(config)
        self.context = torch.randn(1, *shape, config.text_dim, generator=self.draw, device=device)
        self.context = self.context.to(dtype)
        self.step.condition(self.context)
        for _ in range(-(-target.window // target.chunk)):
            self.chunk(lambda name: nullcontext())
        if setting.captured:
            self.step.capture()
            self.chunk(lambda name: nullcontext())

    @torch.inference_mode()
    def chunk(self, around: Callable[[str], AbstractContextManager[Any]]) -> None:
        """As `Stream.next_frames` does it, with new conditions; `around` stands around phases."""
        step, step.around = self.step, around
        with around(CHUNK):
            step.condition(self.context)
            step.plan()
            self.normal(step.latents)
            for index, one in enumerate(step.passes):
                if one.next_t:
                    self.normal(step.noise)
                step.run(index)
            if self.codec is not None:
                with around(DECODE):
                    self.codec.decode_uint8(step.latents.float())

    def normal(self, x: Tensor) -> None:
        x.normal_(generator=self.draw)

    @property
    def phases(self) -> tuple[str, ...]:
        return (*self.step.phases, *([DECODE] if self.codec is not None else []))


def wide(device: torch.device) -> torch.dtype:
    """Of activations, and of weights that are not in 8 bits."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def clocked(
    rig: Rig, chunks: int, into: list[dict[str, float]], tick: Tick = lambda what: None
) -> None:
    """Appends every chunk's milliseconds per phase."""
    for _ in range(chunks):
        clock = PhaseClock(rig.device, (*rig.phases, CHUNK))
        rig.chunk(clock.phase)
        into.append({name: sum(values) for name, values in clock.ms.items()})
        tick("")


def median(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The chunk whose time is the median (of two, the faster)."""
    return sorted(found, key=lambda ms: ms[CHUNK])[(len(found) - 1) // 2]


# --- One chunk, op by op ------------------------------------------------------------------------


@contextmanager
def tracing(device: torch.device, events: list[Event]) -> Iterator[None]:
    """Fills `events` with what torch.profiler saw, as Chrome's trace format has it."""
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profiler:
        yield
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events += json.loads(path.read_text())["traceEvents"]


def traced(rig: Rig) -> tuple[list[Run], list[Event]]:
    """The runs of one chunk, and the trace they were read from."""
    gpu = rig.device.type == "cuda"

    def one() -> tuple[list[Run], list[Event]]:
        events: list[Event] = []
        with named(rig.device), tracing(rig.device, events):
            for _ in range(2):  # the first has the profiler's own first time in it
                rig.chunk(record_function)
                if gpu:
                    torch.cuda.synchronize(rig.device)
        return read(events, rig.phases, gpu), events

    runs, events = one()
    if not gpu:
        return runs, events
    graphs, rig.step.graphs = rig.step.graphs, {}
    eager = one()[0] if graphs else runs
    rig.step.graphs = graphs
    return named_by(runs, eager), events


# --- What people run ----------------------------------------------------------------------------


def gathered_attention(
    q: Tensor,
    q_int8: Tensor | None,
    q_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_mean: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    offset_index: Tensor,
    sm_scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`segment_attention` of a plain cache by PyTorch: slots side by side, one dense call.

    Eager only: whether a slot is absent is read on the host, since a mask costs the fastest kernel.
    """
    if q.shape[0] > 1 or k_scale is not None or want_lse:
        raise ValueError(f"q: expected one rotation, a plain cache and no lse, got {q.shape[0]}")
    seen = block_table[block_table >= 0]
    keys, values = (x.index_select(1, seen).flatten(1, 2).transpose(1, 2) for x in (k, v))
    out = scaled_dot_product_attention(q[0].transpose(1, 2), keys, values, scale=sm_scale)
    return out.transpose(1, 2).contiguous(), q.new_zeros(0, dtype=torch.float32)


@contextmanager
def attending(setting: Setting, gpu: bool) -> Iterator[None]:
    """Inside, the reference's attention is PyTorch's own on a GPU: float32 scores in memory, which
    an oracle may have, are nobody's starting point."""
    op = backends.OPS["segment_attention"]
    oracle = op.reference
    if gpu and setting.backend == "reference" and setting.rope_on_cache:
        op.reference = gathered_attention
    try:
        yield
    finally:
        op.reference = oracle


# --- The profile --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Of the median chunk `ms`; of the traced one, what of it are ops and what gaps."""

    phase: str
    ms: float
    share: float
    traced_ms: float | None = None
    ops_ms: float | None = None
    gap_ms: float | None = None


@dataclass(frozen=True)
class Stage:
    """One bar of the waterfall.  No chunk_ms: not measured, and why."""

    technique: str
    chunk_ms: float | None = None
    fps: float | None = None
    gained_ms: float | None = None  # against the last one that was measured
    planned_ms: float | None = None
    why: str = ""


@dataclass
class Profile:
    device: str
    gpu: bool
    preset: str
    target: str
    target_fps: float | None
    size: tuple[int, int]
    quality: str
    dtype: str  # what the level leaves wide
    backend: str
    captured: bool
    passes: int
    frames: int  # of a chunk
    chunks: int = 0  # that were timed
    chunk_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    fps: float | None = None
    meets_target: bool | None = None
    traced_ms: float | None = None
    gap_ms: float | None = None
    gap_share: float | None = None
    stopped: bool = False
    clocks: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] | None = None
    phases: list[Phase] = field(default_factory=list)
    rows: list[Op] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    trace: list[Event] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For --json: everything but the trace."""
        parts = {name: value for name, value in vars(self).items() if name not in ("runs", "trace")}
        lists = {name: [asdict(x) for x in parts[name]] for name in ("rows", "phases", "stages")}
        return parts | lists | {"size": list(self.size)}

    def time(self, found: Sequence[dict[str, float]]) -> None:
        """What clocked chunks say."""
        ms = median(found)
        total = ms[CHUNK]
        spread = quantiles([one[CHUNK] for one in found])
        self.chunks, self.chunk_ms = len(found), total
        self.p20_ms, self.p80_ms = spread.p20, spread.p80
        self.fps = 1e3 * self.frames / total
        self.meets_target = None if self.target_fps is None else self.fps >= self.target_fps
        parts = {name: value for name, value in ms.items() if name != CHUNK}
        parts[OTHER] = total - sum(parts.values())
        self.phases = [Phase(name, value, value / total) for name, value in parts.items()]

    def look(self, runs: list[Run], trace: list[Event]) -> None:
        """What a traced chunk says."""
        self.runs, self.trace = runs, trace
        self.traced_ms = sum(run.us for run in runs) / 1e3
        self.gap_ms = sum(run.gap_us for run in runs) / 1e3
        self.gap_share = self.gap_ms / self.traced_ms
        for index, phase in enumerate(self.phases):
            mine = [run for run in runs if run.phase == phase.phase]
            times = (sum(run.us for run in mine), sum(run.ops_us for run in mine))
            whole, inside = (us / 1e3 for us in times)
            self.phases[index] = replace(
                phase, traced_ms=whole, ops_ms=inside, gap_ms=whole - inside
            )


def steps(profiled: Setting, gpu: bool, chunks: int) -> int:
    """How often `measure` calls its `tick`."""
    return 3 + chunks + len(waterfall(profiled, gpu))


def measure(
    target: Target,
    setting: Setting,
    device: torch.device,
    *,
    chunks: int = 10,
    tick: Tick = lambda what: None,
    note: Tick = lambda line: None,
) -> Profile:
    """Profile a step.  Ctrl-C ends it early: then the profile has what was finished.

    Args:
        tick: called whenever something begins, with what it is, or "" for more of the same.
        note: told what cannot be measured.
    """
    gpu = device.type == "cuda"
    setting = replace(setting, captured=device.type in CAPTURES)
    found = Profile(
        device_name(device) or "host", gpu, target.preset, target.name, target.fps, target.size,
        setting.level.name, str(wide(device))[6:], setting.backend, setting.captured,
        target.steps + (not target.stream_layout().stepped), target.frames,
    )  # fmt: skip
    times: list[dict[str, float]] = []
    try:
        tick("ceilings")
        bench = Bench(device, note)
        if bench.ceilings is not None:
            found.ceilings = {"gbps": bench.ceilings.gbps, **bench.ceilings.tflops}
        tick("filling the window")
        rig = Rig(target, setting, device)
        clocked(rig, chunks, times, tick)
        found.time(times)
        rig.chunk(lambda name: nullcontext())  # and the sensors while it runs
        found.clocks = {k: v for k, v in asdict(bench.sensors.read()).items() if v is not None}
        tick("a chunk, traced")
        found.look(*traced(rig))
        counted = work(target, setting.level, wide(device).itemsize)
        found.rows = ops(found.runs, counted, setting.level, bench.ceilings)
        del rig
        if gpu:
            torch.cuda.empty_cache()  # what its graphs held
        planned = {}
        if bench.card is not None and target.preset != MINIATURE.preset:
            promised = plan.plan(bench.card, target, preset=target.preset, sla=setting.level.topk)
            planned = {stage.name: stage.chunk_ms for stage in promised.stages}
        descend(found, target, setting, device, max(1, chunks // 2), planned, tick)
    except KeyboardInterrupt:
        found.stopped = True
        if times and not found.chunks:
            found.time(times)
    return found


def descend(
    found: Profile,
    target: Target,
    profiled: Setting,
    device: torch.device,
    chunks: int,
    planned: dict[str, float],
    tick: Tick,
) -> None:
    """The waterfall, bar by bar; a bar that cannot be measured says why."""
    todo = waterfall(profiled, found.gpu)
    found.stages = [Stage(name, None, None, None, planned.get(name), STOPPED) for name, _ in todo]
    before: float | None = None
    for index, (name, setting) in enumerate(todo):
        tick(name)
        if isinstance(setting, str):
            found.stages[index] = replace(found.stages[index], why=setting)
            continue
        times: list[dict[str, float]] = []
        try:
            if setting != profiled:
                with attending(setting, found.gpu):
                    clocked(Rig(target, setting, device), chunks, times)
        except Exception as error:  # noqa: BLE001  a technique that fails here is a bar less
            why = " ".join(f"{type(error).__name__}: {error}".split())
            found.stages[index] = replace(found.stages[index], why=why)
            continue
        ms = median(times)[CHUNK] if times else found.chunk_ms
        assert ms is not None  # of the profile itself
        gained = None if before is None else before - ms
        found.stages[index] = replace(
            found.stages[index], chunk_ms=ms, fps=1e3 * target.frames / ms, gained_ms=gained, why=""
        )
        before = ms
