# SPDX-License-Identifier: Apache-2.0
"""The step: three graphs for a whole stream, the rules of capture, and its memory.

Without a GPU, a graph is a list of PyTorch's ops with the tensors that they were called on: they
read and write the same memory again, and no Python of ours runs.
"""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reeltime import arch, backends, cli, native
from reeltime.bench import bench_step, harness
from reeltime.bench.shapes import DIT, TINY
from reeltime.model import step as steps
from reeltime.model.codec import CodecConfig, ConvCodec
from reeltime.model.config import ModelConfig, SparseLinear, preset
from reeltime.model.kv_cache import PASSES, StreamMemory
from reeltime.model.layout import LAYOUTS, layout
from reeltime.model.memory_plan import CaptureError, Recorder, compare
from reeltime.model.quality import QUALITIES, quantize
from reeltime.model.sampler import add_noise, timesteps, to_x0
from reeltime.model.step import Pass, Step, passes, planned
from reeltime.model.stream import PhaseClock, Stream
from reeltime.model.transformer import CausalTransformer

CONFIG = ModelConfig(
    "tiny", 48, 2, 64, 2, 4, 4, text_dim=8, freq_dim=32, prediction="x0", chunk=2, window=7
)
SIZE = (4, 4, 6)
CPU = torch.device("cpu")


def randomised(config=CONFIG, level="bf16"):
    g = torch.Generator().manual_seed(0)
    net = CausalTransformer(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return quantize(net, QUALITIES[level])


def normal(seed, *sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def stream(name="vidu_s1", level="bf16", config=CONFIG, **options):
    torch.manual_seed(0)
    codec = ConvCodec(CodecConfig(frame_channels=1, widths=(8, 8, 8)))
    made = Stream(randomised(config, level), codec, layout(name, config), **options)
    made.start_from_latents(normal(1, 1, 1, *SIZE), normal(2, 1, 1, 3, 8))
    return made


def context(seed):
    return normal(100 + seed, 1, CONFIG.chunk, 3, 8)


def step_of(name="vidu_s1", level="bf16", device="cpu", backend="reference", config=CONFIG):
    net = randomised(config, level).to(device)
    memory = StreamMemory(
        net.config, layout(name, net.config), (2, 3), kv_format=net.quality.kv_format,
        device=device, backend=backend,
    )  # fmt: skip
    step = Step(net, memory, SIZE, (1000.0, 700.0, 400.0), backend=backend)
    step.condition(context(0).to(device))
    return step


# --- Replay -------------------------------------------------------------------------------------


class Replayed(TorchDispatchMode):
    """A graph of a region: its ops, to be run again on the same memory."""

    def __init__(self, region):
        super().__init__()
        self.ops = []
        with self:
            region()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self):
        for func, args, kwargs, out in self.ops:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """A CPU that captures; what it has captured last."""
    made = {}

    def capture(regions, device):
        for region in regions.values():
            region()
        made.update({name: Replayed(region) for name, region in regions.items()})
        return dict(made)

    monkeypatch.setitem(steps.CAPTURES, "cpu", capture)
    bench_step.scene.cache_clear()
    return made


# Every layout, and what else changes the ops of a step.
FORMS = [*((name, "bf16") for name in LAYOUTS), ("vidu_s1", "fp8"), ("vidu_s1", "int8+sla")]


@pytest.mark.parametrize("name, level", FORMS)
def test_replayed_stream_is_the_eager_one(graphs, monkeypatch, name, level):
    """Fill phase and steady state, every kind of pass, conditions that change: bit for bit."""
    said = [context(0), None, context(1), None, None, context(2)]
    eager = stream(name, level, capture=False)
    want = [eager.next_latents(each) for each in said]
    assert not eager.step.graphs
    captured = stream(name, level)
    got = [captured.next_latents(said[0])]
    assert set(captured.step.graphs) == set(graphs) == {"plan", "condition", "pass"}
    for method in ("forward", "embed_context"):  # Python has no part any more
        monkeypatch.setattr(CausalTransformer, method, None)
    monkeypatch.setattr(StreamMemory, "make_plans", None)
    got += [captured.next_latents(each) for each in said[1:]]
    assert want[0].std() > 0.3
    assert not torch.equal(want[4], want[5])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert int(captured.memory.position) == 1 + len(said) * CONFIG.chunk


@torch.inference_mode()
def sampled(config, name, noise):
    """A stream as it is written down in papers: numbers on the host, no buffers, no table."""
    net, times = randomised(config), timesteps(3, config.shift)
    memory = StreamMemory(config, layout(name, config), (2, 3))

    def forward(x, t, c, plan):
        memory.plan = plan
        return net(x, torch.full(x.shape[:2], t, dtype=torch.float64), net.embed_context(c), memory)

    own = name == "liveact"  # a cache for every step, and no cache pass
    kinds = ("step 0", "step 1", "step 2") if own else ("intermediate", "noisy", "final")
    plans = memory.make_plans(1)
    forward(normal(1, 1, 1, *SIZE), 0.0, normal(2, 1, 1, 3, 8), plans[memory.kinds[-1]])
    memory.position += 1
    chunks = []
    for chunk in range(5):
        memory.compress()
        plans, x = memory.make_plans(), next(noise)
        for i, (t, kind) in enumerate(zip(times, kinds, strict=True)):
            x = to_x0(forward(x, t, context(chunk), plans[kind]), x, t / 1000, config.prediction)
            if i < 2:
                x = add_noise(x, next(noise), times[i + 1] / 1000)
        chunks.append(x)
        if not own:
            forward(x, 0.0, context(chunk), plans["cache"])
        memory.position += config.chunk
    return chunks


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_stream_is_the_sampling_loop(name, prediction):
    config = replace(CONFIG, prediction=prediction)
    noise = [normal(50 + i, 1, config.chunk, *SIZE) for i in range(15)]
    want = sampled(config, name, iter(noise))
    made, draws = stream(name, config=config), iter(noise)
    made._noise = lambda: next(draws)
    for chunk in range(5):
        assert torch.equal(made.next_latents(context(chunk)), want[chunk])


@pytest.mark.parametrize("name", ["vidu_s1", "liveact"])
def test_capture_leaves_the_stream_where_it_was(graphs, name):
    eager, captured = (stream(name, capture=False) for _ in range(2))
    for each in (eager, captured):
        for i in range(4):
            each.next_latents(context(i))
    left = captured.step.latents.clone()
    captured.step.capture()
    assert graphs
    assert torch.equal(captured.step.latents, left)
    assert torch.equal(captured.next_latents(context(9)), eager.next_latents(context(9)))


def test_a_captured_context_keeps_its_shape(graphs):
    captured = stream()
    captured.next_latents(context(0))
    message = r"context: expected \[\[1, 2, 3, 8\]\] as it was captured, got \[\[1, 1, 3, 8\]\]"
    with pytest.raises(ValueError, match=message):
        captured.next_latents(normal(3, 1, 1, 3, 8))


def test_a_step_needs_a_condition_first(graphs):
    net = randomised()
    step = Step(net, StreamMemory(CONFIG, layout("vidu_s1", CONFIG), (2, 3)), SIZE, (1000.0,))
    for call in (step.capture, lambda: step.run(0)):
        with pytest.raises(RuntimeError, match=r"Step: call condition\(\) before"):
            call()


def test_a_stream_starts_again_on_the_same_memory(graphs):
    first, again = stream(), stream()
    for i in range(5):
        again.next_latents(context(10 + i))
    held = again.memory
    again.start_from_latents(normal(1, 1, 1, *SIZE), normal(2, 1, 1, 3, 8))
    again.noise.manual_seed(0)
    assert again.memory is held
    for i in range(4):
        assert torch.equal(again.next_latents(context(i)), first.next_latents(context(i)))


def test_without_graphs_a_step_runs_eagerly():
    step = step_of()
    step.capture()
    assert step.graphs == {}
    step.run(0)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_passes_of_a_chunk(count):
    times = timesteps(count, 5.0)
    found = passes(times, layout("vidu_s1", CONFIG))
    kinds = {1: [], 2: ["noisy"], 3: ["intermediate", "noisy"]}
    kinds[4] = ["intermediate", "noisy", "intermediate"]
    assert [p.kind for p in found] == [*kinds[count], "final", "cache"]
    assert [p.t for p in found] == [*times, 0.0]
    assert [p.next_t for p in found] == [*times[1:], 0.0, 0.0]
    assert found[-1] == Pass("cache", 0.0, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("level", list(QUALITIES))
def test_replay_is_eager_on_a_gpu(level):
    config = replace(CONFIG, dim=256, num_heads=2)
    place = bench_step.Geometry(replace(config, prediction="velocity", text_len=16), (7, 11))
    one = bench_step.case("chunk", place, QUALITIES[level])
    inputs = one.make(torch.device("cuda"), 0)
    result = one.run(inputs, "auto")
    assert set(inputs["scene"].step.graphs) == {"plan", "condition", "pass"}
    harness.verify(one.judge(inputs, result))


# --- The rules of capture -----------------------------------------------------------------------


@pytest.mark.parametrize("name, level", FORMS)
def test_fill_phase_and_steady_state_are_one_graph(name, level):
    """Every pass of every chunk runs the ops of the first, in its order and its shapes."""
    step = step_of(name, level)
    seen = {}
    for chunk in range(5):
        step.latents.copy_(normal(chunk, *step.latents.shape))
        for region in ("plan", "condition"):
            compare(seen.setdefault(region, found := step.record(region)), found)
        for index in range(len(step.passes)):
            if chunk in (1, 2, 3):
                step.run(index)
                continue
            step.row.copy_(step.rows[index])
            compare(seen.setdefault("pass", found := step.record("pass")), found)
    assert int(step.memory.position) == 5 * CONFIG.chunk > CONFIG.window
    assert len(seen["pass"].calls) > 100


@pytest.mark.parametrize("level", list(QUALITIES))
def test_a_step_without_data_is_the_same_graph(level):
    """On meta tensors nothing could be read.  The check of scales on a CPU is no part of it."""
    real, meta = step_of(level=level), step_of(level=level, device="meta")
    for region in real.regions:
        compare(real.record(region), real.record(region))
        first = meta.record(region)
        compare(first, meta.record(region))
        assert first.calls
        assert first.peak == real.record(region).peak


@pytest.mark.parametrize("level", list(QUALITIES))
def test_launchers_of_kernels_keep_the_rules(monkeypatch, level):
    """What Python does around our kernels on a GPU: theirs is the code that is captured there."""
    monkeypatch.setattr(native, "arch_of", lambda device: arch.lookup((9, 0)))
    wide = replace(CONFIG, dim=64)  # heads of 32
    reference = step_of(level=level, device="meta", config=wide).record("pass")
    with steps.kernels_first():
        step = step_of(level=level, device="meta", backend="auto", config=wide)
        first = {region: step.record(region) for region in step.regions}
        for region in step.regions:
            compare(first[region], step.record(region))
    if "triton" in {row.backend for row in backends.TABLE}:
        assert len(first["pass"].calls) < len(reference.calls) / 2


def read_item(y):
    return y * y.sum().item()


def read_branch(y):
    return y if y.sum() > 0 else -y


def read_list(y):
    return y * y.flatten().tolist()[0]


def read_cpu(y):
    return y * float(y.cpu().mean())


def read_index(y):
    return y * [1.0, 2.0][y.argmax() % 2]


def read_equal(y):
    return -y if torch.equal(y, y + 1) else y


def sized_by_data(y):
    return y + y[y > 0].sum()


def sized_by_nonzero(y):
    return y + y.nonzero().shape[0]


def from_the_host(y):
    return y * torch.tensor(2.0)


MISTAKES = {
    read_item: "item reads the device from the host",
    read_branch: "__bool__ reads the device from the host",
    read_list: "tolist reads the device from the host",
    read_cpu: "cpu reads the device from the host",
    read_index: "__index__ reads the device from the host",
    read_equal: "equal reads the device from the host",
    sized_by_data: "the size of what .* returns is data",
    sized_by_nonzero: "the size of what nonzero returns is data",
    from_the_host: "tensor copies from the host",
}


def plant(monkeypatch, mistake):
    attend = StreamMemory.attend

    def planted(self, *args):
        return mistake(attend(self, *args))

    monkeypatch.setattr(StreamMemory, "attend", planted)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_what_no_graph_can_hold_is_named_with_its_line(monkeypatch, mistake, device):
    step = step_of(device=device)
    plant(monkeypatch, mistake)
    line = mistake.__code__.co_firstlineno + 1
    where = rf"tests/test_step.py:{line} in {mistake.__name__}: return "
    with pytest.raises(CaptureError, match=f"capture: {MISTAKES[mistake]}, at {where}"):
        step.record("pass")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda y, n: -y if n > 2 else y, r"op \d+ is aten.* in one run, at .*, and aten.neg"),
        (lambda y, n: y + y.new_zeros(n).sum(), r"is aten.new_zeros.default\(1, .* -> \[1\]"),
        (lambda y, n: y * n, r"is aten.mul.Tensor\(1\) .* in one run, .* aten.mul.Tensor\(3\)"),
    ],
    ids=["branch", "size", "constant"],
)
def test_a_host_counter_shows_in_the_second_run(monkeypatch, change, message):
    """No rule of one run sees what Python has counted."""
    count = [0]

    def mistake(y):
        count[0] += 1
        return change(y, count[0])

    step = step_of()
    plant(monkeypatch, mistake)
    first = step.record("pass")  # two layers
    with pytest.raises(CaptureError, match=message):
        compare(first, step.record("pass"))


def test_a_buffer_that_moves_shows_in_the_second_run():
    step = step_of()
    first = step.record("pass")
    step.noise = step.noise.clone()
    with pytest.raises(CaptureError, match="aten.lerp.* works on other memory in another run"):
        compare(first, step.record("pass"))


def test_a_run_that_goes_on_is_noticed():
    x = torch.ones(3)
    with Recorder() as short:
        x.add_(1)
    with Recorder() as long:
        x.add_(1)
        x.mul_(2)
    with pytest.raises(CaptureError, match=r"one run goes on with aten.mul_.Tensor\(2\) -> \[3\]"):
        compare(short, long)


def test_memory_that_outlives_a_region_is_named(monkeypatch):
    kept = []

    def keep(y):
        kept.append(y + 1)
        return y

    step = step_of()
    plant(monkeypatch, keep)
    message = "capture: 2 tensors outlive the region.* has 2304 bytes, .*in keep: kept.append"
    with pytest.raises(CaptureError, match=message):
        step.record("pass")


# --- Memory -------------------------------------------------------------------------------------


def storages():
    """Bytes of all tensors there are, by memory."""
    gc.collect()
    # No fake ones, which other tests may have left behind
    held = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}


@pytest.mark.parametrize("name, level", FORMS)
def test_the_plan_is_what_tensors_hold(name, level):
    before = storages()
    step = step_of(name, level)
    plan = step.memory_plan()
    held = {p: n for p, n in storages().items() if p not in before}
    caches = sum(plan.caches.values())
    assert plan.weights + caches + sum(plan.buffers.values()) == sum(held.values())
    assert plan.weights == sum(x.nbytes for x in step.transformer.state_dict().values())
    assert caches == step.memory.nbytes
    for _ in range(3):
        step.plan()
        for index in range(len(step.passes)):
            step.run(index)
    assert {p: n for p, n in storages().items() if p not in before} == held
    # The workspace that meta tensors tell is what the same ops have alive here.
    assert plan.workspace == {region: step.record(region).peak for region in step.regions}
    assert plan.peak == sum(held.values()) + plan.workspace["pass"]


def test_parts_of_a_plan():
    """A peak is what is held and the largest workspace: graphs take turns in one pool."""
    plan = step_of(level="int8+sla").memory_plan()
    parts = plan.parts()
    assert list(parts) == [
        *("weights", "caches, keys", "caches, values", "caches, scales", "caches, summaries"),
        *("buffers, conditions", "buffers, passes"),
        *("workspace, plan", "workspace, condition", "workspace, pass", "peak"),
    ]
    assert all(size > 0 for size in parts.values())
    work = [size for name, size in parts.items() if name.startswith("workspace")]
    assert parts["peak"] == sum(parts.values()) - parts["peak"] - sum(work) + max(work)


@pytest.mark.parametrize("name, level", FORMS)
def test_many_layers_are_planned_by_two_and_three(name, level):
    """As if all of them had run."""
    config = replace(CONFIG, num_layers=6)
    step = step_of(name, level, config=config)
    plan = planned(
        step.transformer.config, step.memory.layout, SIZE, QUALITIES[level],
        contexts=[(1, CONFIG.chunk, 3, 8)], dtype=torch.float32, backend="reference",
    )  # fmt: skip
    assert plan.caches == step.held()["caches"]
    assert plan.workspace == {region: step.record(region).peak for region in step.regions}


@pytest.mark.parametrize("level", ["bf16", "int8", "int8+sla"])
def test_wan_is_planned_without_its_memory(level):
    """1.3B at 960 x 544: weights of 2 bytes or 1, and whatever make_cache allocates."""
    config, level = preset("wan-1.3b"), QUALITIES[level]
    if level.topk:
        config = replace(config, sla=SparseLinear(level.topk))
    where = layout("vidu_s1", config)
    plan = planned(config, where, (16, 68, 120), level, contexts=[(1, 1, 512, 4096)])
    memory = StreamMemory(
        config, where, (34, 60), kv_format=level.kv_format, dtype=torch.bfloat16, device="meta"
    )
    assert sum(plan.caches.values()) == memory.nbytes
    if level.linear is None:
        assert plan.weights == 2 * 1_418_996_800
    else:
        in_blocks = 30 * (8 * 1536**2 + 2 * 1536 * 8960)
        assert plan.weights < 2 * 1_418_996_800 - in_blocks * 0.999
    kernels = "triton" in {row.backend for row in backends.TABLE}
    if kernels:  # no [queries x keys] anywhere
        assert plan.workspace["pass"] < 2**30 < plan.peak


# --- Hooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "a GPU beside it"])
def test_ranges_are_there_when_asked_for_and_cost_nothing_otherwise(monkeypatch, gpu):
    """On a CPU they are torch.profiler's, whatever else the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda.nvtx, "range", None)
    step = step_of(level="int8")
    assert isinstance(steps.span("x"), nullcontext)
    assert all("run" not in vars(op) for op in backends.OPS.values())
    with steps.named(CPU), torch.profiler.profile() as profile:
        step.plan()
        step.run(len(step.passes) - 1)
    names = {event.name for event in profile.events()}
    assert {"plan", "pass cache", "norm.norm_quantized", "gemm_w8a8.gemm_w8a8"} <= names
    assert "attention.segment_attention" in names
    assert all("run" not in vars(op) for op in backends.OPS.values())
    assert isinstance(steps.span("x"), nullcontext)


def test_ranges_of_a_gpu_are_those_of_nvtx(monkeypatch):
    entered = []

    @contextmanager
    def ranged(name):
        entered.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", ranged)
    step = step_of()
    with steps.named(torch.device("cuda")):
        step.run(0)
    step.run(0)
    assert entered[0] == "pass intermediate"
    assert entered.count("pass intermediate") == 1
    assert entered.count("attention.segment_attention") == CONFIG.num_layers


def test_phases_of_a_step_can_be_timed():
    step = step_of()
    clock = PhaseClock(CPU, step.phases)
    step.around = clock.phase
    step.plan()
    step.condition(context(1))
    for index in range(len(step.passes)):
        step.run(index)
    counts = {name: len(ms) for name, ms in clock.ms.items()}
    assert counts == dict.fromkeys(
        ("plan", "condition", "pass intermediate", "pass noisy", "pass final", "pass cache"), 1
    )


class Event:
    """An event of a GPU that is done with it when told so."""

    done, now = False, 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.now += 1.0
        self.at = Event.now

    def query(self):
        return Event.done

    def synchronize(self):
        Event.done = True

    def elapsed_time(self, end):
        return end.at - self.at


def test_phases_of_a_gpu_are_timed_without_waiting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = PhaseClock(torch.device("cuda"))
    for _ in range(2):
        with clock.phase("denoise"):
            pass
    assert not Event.done
    assert len(clock._pending) == 2
    assert list(clock.ms["denoise"]) == [1.0, 1.0]
    assert not clock._pending


# --- Benchmark ----------------------------------------------------------------------------------


def find(sizes, op, level):
    cases = harness.cases(harness.STEP, sizes)
    return next(c for c in cases if c.op == op and c.form.endswith(f", {level}"))


@pytest.mark.parametrize("op, level", [("block", "fp8"), ("pass", "int8+sla"), ("chunk", "int8")])
def test_step_is_timed_on_the_host(graphs, op, level):
    (row,) = harness.Run(CPU, print).rows(find(TINY, op, level), "reference")
    assert row.error is None
    assert row.p50_us > 0
    assert row.device.startswith("host: ")
    assert row.floor_us is None
    assert (row.family, row.op, row.backend) == ("step", op, "reference")


def test_a_replay_that_is_not_eager_has_no_time(graphs):
    case = find(TINY, "pass", "bf16")

    def run(inputs, backend):
        return case.run(inputs, backend).add_(1e-3 if inputs["scene"].step.graphs else 0.0)

    (row,) = harness.Run(CPU, print).rows(replace(case, run=run), "reference")
    assert row.p50_us is None
    assert "pass, replayed, result 0: relative L1" in row.error


def test_an_eager_chunk_is_timed_without_the_graphs(graphs, monkeypatch):
    case = find(TINY, "chunk", "bf16, eager")
    (row,) = harness.Run(CPU, print).rows(case, "reference")
    assert row.error is None
    monkeypatch.setattr(Replayed, "replay", lambda self: pytest.fail("a graph was replayed"))
    inputs = case.make(CPU, 0)
    case.run(inputs, "reference")
    assert inputs["scene"].step.graphs


def test_what_could_not_be_captured_is_tried_again(graphs, monkeypatch):
    """Cases share a scene: a failure must not leave one that looks captured."""
    inputs = find(TINY, "pass", "bf16").make(CPU, 0)
    scene = inputs["scene"]
    with monkeypatch.context() as patch:
        patch.setattr(scene.step, "capture", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scene.ready("reference")
    assert scene.ready("reference").step.graphs


def test_floors_of_the_step_are_those_of_its_kernels():
    """FLOPs of a pass by format: what is quantised is not counted in bf16 as well."""
    for level in QUALITIES:
        chunk, one = (find(DIT, op, level) for op in ("chunk", "pass"))
        assert sum(chunk.flops.values()) == pytest.approx(4 * sum(one.flops.values()))
        assert chunk.bytes == 4 * one.bytes
    bf16, int8, fp8, sla = (find(DIT, "pass", n).flops for n in ("bf16", "int8", "fp8", "int8+sla"))
    linear = 2 * 6120 * 30 * (6 * 1536**2 + 2 * 1536 * 8960)  # without k and v of the context
    scores = 2 * 30 * 6120 * 42840 * 1536
    assert int8["int8"] == pytest.approx(linear + scores)
    assert fp8["fp8"] == pytest.approx(linear + scores)
    assert bf16["bf16"] - int8["bf16"] == pytest.approx(linear + scores)
    assert sla["int8"] < linear + 0.2 * scores


def test_step_is_benchmarked_by_name_only(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "step", "--floors", "--json"])
    assert not stop.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["family"] for row in rows} == {"step"}
    assert {row["op"] for row in rows} == {"block", "pass", "chunk"}
    assert all(row["floor_us"] > 0 for row in rows)
    assert harness.wanted(CPU, "step") == ("reference",)
    assert harness.wanted(torch.device("cuda"), "step") == ("auto",)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "steps"])
    assert stop.value.code == 2
    assert "'step'" in capsys.readouterr().err


def test_kinds_of_passes_are_rows_of_numbers():
    step = step_of()
    assert step.rows[:, 0].tolist() == [PASSES.index(p.kind) for p in step.passes]
    assert step.rows.dtype == torch.float64
