# SPDX-License-Identifier: Apache-2.0
"""The step: every pass of a stream over static buffers, captured once and replayed for ever.

Three graphs, whatever the layout, the phase of the stream and the number of steps:

    | graph     | replayed                | what it does                                           |
    | --------- | ----------------------- | ------------------------------------------------------ |
    | plan      | once per chunk          | memory; slots, block tables, rotations of all passes   |
    | condition | when conditions changed | cross-attention keys and values of every layer         |
    | pass      | per step, and to cache  | one forward, the next noise level, the stream's clock  |

One graph serves every pass, since they run the same ops on the same shapes.  What tells a pass from
another (which slots it writes, what it sees, its timestep, the level it renoises to, whether its
result is kept and time goes on) is a row of numbers on the device.  The plan is apart because its
rotations, in float64, hold for all passes of a chunk; the condition, because it mostly stays.

The graphs share one pool, take turns in it and leave nothing there: what they hand on is in static
buffers.  Where a device has no graphs, the same regions run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from reeltime import backends

from .config import ModelConfig
from .kv_cache import Plan, StreamMemory
from .layout import StreamLayout
from .memory_plan import MemoryPlan, Recorder, Recording, held
from .quality import Quality, shape
from .sampler import add_noise, to_x0
from .transformer import CausalTransformer, Context

# --- Names for profilers ------------------------------------------------------------------------

_named: str | None = None  # the kind of device whose ranges are on


def span(name: str) -> AbstractContextManager[Any]:
    """A range of that name in a profile inside of `named`, and nothing at all elsewhere."""
    if _named is None:
        return nullcontext()
    return torch.cuda.nvtx.range(name) if _named == "cuda" else torch.profiler.record_function(name)


@contextmanager
def named(device: torch.device) -> Iterator[None]:
    """Inside, every graph and every op of ours is a range: "pass intermediate", "norm.norm".

    device: where they run.  On a GPU a range is NVTX's (a replay is one; its kernels were named
    when they were captured), elsewhere torch.profiler's, whatever else the machine has.
    """
    global _named

    def ranged(op: backends.Op) -> Callable[..., Any]:
        run, name = op.run, f"{op.family}.{op.name}"

        def call(*args: Any) -> Any:
            with span(name):
                return run(*args)

        return call

    _named = device.type
    for op in backends.OPS.values():
        op.run = ranged(op)  # type: ignore[method-assign]
    try:
        yield
    finally:
        _named = None
        for op in backends.OPS.values():
            del op.run  # of the instance: the class's own is back


# --- Capture ------------------------------------------------------------------------------------


class Graph(Protocol):
    def replay(self) -> None: ...


def cuda_graphs(
    regions: Mapping[str, Callable[[], None]], device: torch.device
) -> dict[str, Graph]:
    """A CUDA graph of each region, all in one pool; they run twice before."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(2):  # the first compiles, the second has what the first one cached
            for region in regions.values():
                region()
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, Graph] = {}
    for name, region in regions.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            region()
        graphs[name] = graph
    current.wait_stream(stream)
    return graphs


# How a kind of device captures; one that is missing runs eagerly.
CAPTURES: dict[str, Callable[..., dict[str, Graph]]] = {"cuda": cuda_graphs}


# --- The passes of a chunk ----------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One forward: its kind (`StreamMemory.kinds`), its timestep, and the one it renoises to."""

    kind: str
    t: float
    next_t: float


def passes(timesteps: tuple[float, ...], layout: StreamLayout) -> tuple[Pass, ...]:
    """Denoising steps, then the cache pass, unless every step has a cache of its own.

    The noisy cache comes from an intermediate step, so it is never the last one.
    """
    last = len(timesteps) - 1
    noisy = min(layout.noisy_step, last - 1)
    kinds = ["noisy" if i == noisy else "intermediate" for i in range(last)] + ["final"]
    if layout.stepped:
        kinds = [f"step {i}" for i in range(last + 1)]
    after = (*timesteps[1:], 0.0)
    steps = [Pass(*parts) for parts in zip(kinds, timesteps, after, strict=True)]
    return (*steps, *([] if layout.stepped else [Pass("cache", 0.0, 0.0)]))


class Step:
    """The passes of one stream, or of a batch of them.

    Args:
        transformer: at any quality level.
        memory: the stream's; what is captured is bound to it.
        size: (C, h, w) of a latent frame.
        timesteps: of the denoising steps, descending.
        backend: kernel backend of every family.

    `latents` holds noise before the first pass and x0 after the final one; `noise` is what the next
    denoising pass renoises with.  Both are float32 (float64 for a float64 model): a step's rounding
    is not the model's.
    """

    def __init__(
        self,
        transformer: CausalTransformer,
        memory: StreamMemory,
        size: tuple[int, int, int],
        timesteps: tuple[float, ...],
        *,
        backend: str = "auto",
    ) -> None:
        self.transformer, self.memory, self.backend = transformer, memory, backend
        weight = transformer.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.passes, layout = passes(timesteps, memory.layout), memory.layout
        if layout.stepped and len(timesteps) > layout.steps:
            raise ValueError(
                f"timesteps: expected at most {layout.steps}, for which {layout.name} has caches, "
                f"got {len(timesteps)}. dataclasses.replace(layout, steps=...) makes more."
            )
        self.batch, self.size = memory.caches[0].k.shape[0], size
        wide = torch.promote_types(self.dtype, torch.float32)
        shape = (self.batch, layout.chunk, *size)
        self.latents = torch.zeros(shape, dtype=wide, device=self.device)
        self.noise = torch.zeros_like(self.latents)
        # A row per pass: kind, timestep, its noise level, the next one's; is it the cache pass; how
        # many latent frames time goes on.
        self.rows = torch.tensor(
            [
                (
                    *(memory.kinds.index(p.kind), p.t, p.t / 1000, p.next_t / 1000),
                    *(p.kind == "cache", layout.chunk if p is self.passes[-1] else 0),
                )
                for p in self.passes
            ],
            dtype=torch.float64, device=self.device,
        )  # fmt: skip
        self.row = self.rows[0].clone()
        plans = memory.make_plans()
        self.write_slots, self.block_tables = self._lists(plans)
        plan = plans[memory.kinds[0]]
        self.shared = replace(
            plan,
            write_slots=self.write_slots[0],
            block_table=self.block_tables[0],
            query_table=plan.query_table.clone(),
            offset_index=plan.offset_index.clone(),
        )
        if plan.key_table is not None:
            self.shared.key_table = self.shared.query_table[0]
        self.inputs: tuple[Tensor, ...] = ()  # a context and perhaps an image, as they came
        self.context: Context = []
        self.graphs: dict[str, Graph] = {}
        # What stands around each run of a graph, by its name in `phases`: a profiler's events, say.
        self.around: Callable[[str], AbstractContextManager[Any]] = span

    # --- The regions that are captured ----------------------------------------------------------

    def _lists(self, plans: dict[str, Plan]) -> tuple[Tensor, Tensor]:
        """What tells the kinds apart: slots to write [kinds, F], block tables [kinds, T]."""
        kinds = [plans[kind] for kind in self.memory.kinds]
        slots, tables = ([getattr(p, n) for p in kinds] for n in ("write_slots", "block_table"))
        return torch.stack(slots), torch.stack(tables)

    def _plan(self) -> None:
        self.memory.compress()
        plans = self.memory.make_plans()
        slots, tables = self._lists(plans)
        self.write_slots.copy_(slots)
        self.block_tables.copy_(tables)
        fresh, shared = plans[self.memory.kinds[0]], self.shared
        shared.query_table.copy_(fresh.query_table)
        shared.offset_index.copy_(fresh.offset_index)
        if shared.cache_table is not None and fresh.cache_table is not None:
            shared.cache_table.copy_(fresh.cache_table)

    def _condition(self) -> None:
        for static, fresh in zip(self.context, self._embedded(), strict=True):
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)

    def _embedded(self) -> Context:
        context, *image = self.inputs
        return self.transformer.embed_context(
            context, self.backend, image=image[0] if image else None
        )

    def plan_of(self, kind: Tensor) -> Plan:
        """The plan of a kind of pass, chosen by its index [1] in `kinds`, on the device."""
        return replace(
            self.shared,
            write_slots=self.write_slots.index_select(0, kind)[0],
            block_table=self.block_tables.index_select(0, kind)[0],
        )

    def _pass(self) -> None:
        kind, t, level, next_level, cached, frames = self.row.unbind()
        x = self.latents
        self.memory.plan = self.plan_of(kind.long().view(1))
        out = self.transformer(
            x, t.expand(x.shape[:2]), self.context, self.memory, backend=self.backend
        )
        self.memory.plan = None
        level, next_level = level.to(x.dtype), next_level.to(x.dtype)
        x0 = to_x0(out.to(x.dtype), x, level, self.transformer.config.prediction)
        x.copy_(torch.where(cached > 0, x, add_noise(x0, self.noise, next_level)))
        self.memory.position.add_(frames.long())

    @property
    def regions(self) -> dict[str, Callable[[], None]]:
        """What is captured, by name."""
        return {"plan": self._plan, "condition": self._condition, "pass": self._pass}

    @property
    def phases(self) -> tuple[str, ...]:
        """Names that `around` is given."""
        return "plan", "condition", *dict.fromkeys(f"pass {p.kind}" for p in self.passes)

    # --- Running them ---------------------------------------------------------------------------

    def _run(self, name: str) -> None:
        if self.graphs:
            self.graphs[name].replay()
        else:
            self.regions[name]()

    @torch.inference_mode()
    def plan(self) -> None:
        """Before the passes of a chunk: where they write and what they see."""
        with self.around("plan"):
            self._run("plan")

    @torch.inference_mode()
    def condition(self, context: Tensor, image: Tensor | None = None) -> None:
        """Set what the next passes are conditioned on, as in `embed_context`.

        Raises:
            ValueError: another shape than the one that was captured.
        """
        given = (context,) if image is None else (context, image)
        sizes, held = ([list(x.shape) for x in each] for each in (given, self.inputs))
        if sizes != held:
            if self.graphs:
                raise ValueError(f"context: expected {held} as it was captured, got {sizes}")
            self.inputs = tuple(x.to(self.device, self.dtype, copy=True) for x in given)
            self.context = [tuple(map(torch.clone, pair)) for pair in self._embedded()]
            return
        for static, fresh in zip(self.inputs, given, strict=True):
            static.copy_(fresh)
        with self.around("condition"):
            self._run("condition")

    @torch.inference_mode()
    def run(self, index: int) -> None:
        """The pass of that index in `passes`."""
        if not self.context:
            raise RuntimeError("Step: call condition() before a pass")
        self.row.copy_(self.rows[index])
        with self.around(f"pass {self.passes[index].kind}"):
            self._run("pass")

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the three graphs; from then on every call replays.

        The stream is where it was before: what runs to warm up changes nothing that is kept.
        Where the device has no graphs, nothing happens.

        Raises:
            RuntimeError: no condition yet, whose shape is captured as well.
        """
        if self.graphs or self.device.type not in CAPTURES:
            return
        if not self.context:
            raise RuntimeError("Step: call condition() before capture()")
        # An intermediate pass: writes scratch slots, or where every step has a cache of its own,
        # slots of the first one's ring, which may hold what is still to be compressed.
        self.row.zero_()
        memory = self.memory
        slots = memory.make_plans()[memory.kinds[0]].write_slots
        caches = [x for c in memory.caches for x in (c.k, c.v) if memory.layout.compressed]
        latents, before = self.latents.clone(), [x.index_select(1, slots) for x in caches]
        self.graphs = CAPTURES[self.device.type](self.regions, self.device)
        self.latents.copy_(latents)
        for x, old in zip(caches, before, strict=True):
            x.index_copy_(1, slots, old)

    # --- What it is -----------------------------------------------------------------------------

    @torch.inference_mode()
    def record(self, name: str) -> Recording:
        """A region run eagerly, under the rules of capture.

        Raises:
            CaptureError: it breaks one; names the op and the line.
        """
        with Recorder() as recording:
            self.regions[name]()
        return recording

    def held(self) -> dict[str, Any]:
        """Bytes that exist between two passes, as `MemoryPlan` names them."""
        net, memory, shared = self.transformer, self.memory, self.shared
        kinds = {"keys": "k", "values": "v", "scales": "k_scale k_mean v_scale", "summaries": "h z"}
        found = {
            kind: [getattr(c, name) for name in names.split() for c in memory.caches]
            for kind, names in kinds.items()
        }
        plans = (self.write_slots, self.block_tables, shared.offset_index, shared.query_table)
        buffers = {
            "conditions": [*self.inputs, *(x for pair in self.context for x in pair)],
            "passes": [
                *(self.latents, self.noise, self.rows, self.row, memory.position),
                *(*plans, shared.cache_table),
            ],
        }
        return {
            "weights": held([*net.parameters(), *net.buffers()]),
            "caches": {name: held(tensors) for name, tensors in found.items()},
            "buffers": {name: held(tensors) for name, tensors in buffers.items()},
        }

    @torch.inference_mode()
    def memory_plan(self) -> MemoryPlan:
        """What it holds, and its workspace: that of the same step on meta tensors, where every
        allocation of the kernels' own code is seen."""
        if self.device.type == "meta":
            workspace = {name: self.record(name).peak for name in self.regions}
            return MemoryPlan(**self.held(), workspace=workspace)
        memory, net, backend = self.memory, self.transformer, self.backend
        if backend == "auto" and self.device.type == "cpu":
            backend = "reference"
        shapes = [tuple(x.shape) for x in self.inputs]
        plan = planned(
            net.config, memory.layout, self.size, net.quality, batch=self.batch,
            contexts=shapes, dtype=self.dtype, rope_on_cache=memory.rope_on_cache,
            kv_format=memory.kv_format,
            backend=backend,
        )  # fmt: skip
        return MemoryPlan(**self.held(), workspace=plan.workspace)


def planned(
    config: ModelConfig,
    layout: StreamLayout,
    size: tuple[int, int, int],
    level: Quality,
    *,
    batch: int = 1,
    contexts: list[tuple[int, ...]],
    dtype: torch.dtype = torch.bfloat16,
    rope_on_cache: bool = False,
    kv_format: str | None = None,
    backend: str = "auto",
) -> MemoryPlan:
    """The memory of a step of this geometry, without any of it: on meta tensors.

    Args:
        config: as it is streamed, sparse-linear attention included.
        contexts: shapes of the context, and of an image where there is one.
        backend: "auto": as a GPU would choose, of the kernels in this build.
    """
    with torch.device("meta"):
        net = CausalTransformer(config).to(dtype)
        shape(net, level)
    memory = StreamMemory(
        config, layout, (size[1] // config.patch[0], size[2] // config.patch[1]), batch,
        rope_on_cache=rope_on_cache, kv_format=kv_format or level.kv_format, dtype=dtype,
        device="meta", backend=backend,
    )  # fmt: skip
    step = Step(net, memory, size, (1000.0,), backend=backend)
    with kernels_first() if backend == "auto" else nullcontext():
        step.condition(*(torch.empty(x, dtype=dtype, device="meta") for x in contexts))
        if config.num_layers <= 3 or level.wide:
            return step.memory_plan()
    # Layers that are alike: from the second on, each adds as many bytes to what is alive at once.
    two, three = (
        planned(
            replace(config, num_layers=layers), layout, size, level, batch=batch,
            contexts=contexts, dtype=dtype, rope_on_cache=rope_on_cache, kv_format=kv_format,
            backend=backend,
        ).workspace
        for layers in (2, 3)
    )  # fmt: skip
    more = config.num_layers - 3
    workspace = {name: size + more * (size - two[name]) for name, size in three.items()}
    return MemoryPlan(**step.held(), workspace=workspace)


@contextmanager
def kernels_first() -> Iterator[None]:
    """Inside, "auto" takes for meta tensors what it takes on a GPU, and not the reference."""
    table = backends.TABLE
    backends.TABLE = tuple(sorted(table, key=lambda row: row.backend == "reference"))
    try:
        yield
    finally:
        backends.TABLE = table
