# SPDX-License-Identifier: Apache-2.0
"""The harness: no time for a wrong kernel, and the path of a GPU without one.

That path is walked on a CUDA of this file's own, whose clock the tests hold and whose kernels run
when a captured graph is replayed, as real ones do.
"""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from reeltime import arch
from reeltime.arch import UnsupportedArchError
from reeltime.bench import bench_sla, case, ceilings, hardware, harness, rows, timing
from reeltime.bench.case import Expected, Judged
from reeltime.bench.ceilings import Ceilings
from reeltime.bench.sensors import Reading, Sensors, throttled
from reeltime.checks import Tolerance

CPU = torch.device("cpu")
H200 = hardware.lookup("H200")

# --- Oracle before time -------------------------------------------------------------------------

TOLERANCE = Tolerance(1e-3, 1e-2)


def doubling(double=lambda x: 2 * x, op="quantize", **changes):
    """A case that doubles numbers."""
    one = case.Case(
        "quant", op, "", "64", "fp32", {"fp32": 64}, 512, Expected(0.9, 0.9, ""),
        make=lambda device, seed: {"x": torch.randn(64, generator=seeded(seed))},
        run=lambda inputs, backend: double(inputs["x"]),
        judge=lambda inputs, y: iter([Judged("y", y, 2 * inputs["x"].double(), TOLERANCE)]),
    )  # fmt: skip
    return replace(one, **changes)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def fail(x):
    raise RuntimeError("no image\nfor this\n device")


@pytest.mark.parametrize(
    "double, why",
    [
        pytest.param(lambda x: 2.01 * x, "y: relative L1 5.00e-03 .at most 0.001", id="scaled"),
        pytest.param(lambda x: 2 * x.roll(1), "y: relative L1", id="misplaced"),
        pytest.param(lambda x: (2 * x).index_fill(0, torch.tensor(63), torch.nan), "inf", id="NaN"),
        pytest.param(lambda x: 2 * x[:63], "expected the shape", id="short"),
        pytest.param(fail, "RuntimeError: no image for this device$", id="raises"),
    ],
)
def test_wrong_kernel_has_no_time(double, why):
    (row,) = harness.Run(CPU, print).rows(doubling(double), "reference")
    assert row.p50_us is row.p20_us is row.tflops is row.gbps is None
    assert re.search(why, row.error or ""), row.error


def test_right_kernel_has_a_time_of_the_host():
    (row,) = harness.Run(CPU, print).rows(doubling(), "reference")
    assert row.error is None
    assert 0 < row.p20_us <= row.p50_us <= row.p80_us
    assert row.gbps == pytest.approx(512 / row.p50_us / 1e3)
    assert row.device.startswith("host: ")
    assert row.floor_us is row.share_of_floor is row.expected_share is row.sm_mhz is None


def test_nothing_judged_is_wrong():
    (row,) = harness.Run(CPU, print).rows(doubling(judge=lambda inputs, y: iter([])), "reference")
    assert "no result was judged" in row.error


def test_oracle_must_be_finite():
    bad = doubling(
        lambda x: torch.full_like(x, torch.nan),
        judge=lambda inputs, y: iter([Judged("y", y, y.double(), TOLERANCE)]),
    )
    (row,) = harness.Run(CPU, print).rows(bad, "reference")
    assert "oracle itself is not finite" in row.error


def test_refusal_by_design_is_no_row():
    def refuse(x):
        raise UnsupportedArchError("quant: no", "no float8 here")

    with pytest.raises(UnsupportedArchError):
        harness.Run(CPU, print).rows(doubling(refuse), "reference")
    with pytest.raises(KeyError):
        harness.Run(CPU, print).rows(doubling(op="quantise"), "reference")


def test_near_ties_are_left_out_of_what_is_judged():
    score = torch.tensor([[[[5.0, 3.0, 1.0], [5.0, 3.0, 3.0 - 1e-9]]]], dtype=torch.float64)
    clear = bench_sla.settled(score, 2, 200)  # two query blocks of one head
    assert clear.shape == (1, 200, 1)
    assert clear[0, :128].all()
    assert not clear[0, 128:].any()
    assert bench_sla.settled(score, 3, 200).all()
    tied = torch.zeros(1, 200, 1, dtype=torch.bool)
    with pytest.raises(harness.WrongResultError, match="near ties"):
        list(bench_sla.judged(torch.zeros(1, 200, 1, 4), None, tied, TOLERANCE))


def test_peers_are_measured_once_and_compared():
    calls = []
    peer = case.Peer(
        "torch mul", "mul 64", "fp32", {}, 512, doubling().make, lambda i: calls.append(1)
    )
    slower = replace(peer, name="slow", key="slow", run=lambda i: [calls.append(1)] * 100_000)
    broken = replace(peer, name="broken", key="broken", run=lambda i: fail(i))
    process = harness.Run(CPU, print)
    one = doubling(peers=(slower, peer, broken))
    found = process.rows(one, "reference")
    assert [row.backend for row in found] == ["slow", "torch mul", "broken", "reference"]
    assert "no image" in found[2].error
    ours = found[-1]
    assert ours.best_peer == "torch mul"
    assert ours.ratio == pytest.approx(found[1].p50_us / ours.p50_us)
    before = len(calls)
    assert [row.backend for row in process.rows(one, "reference")] == ["reference"]
    assert len(calls) == before


# --- Time ---------------------------------------------------------------------------------------


def test_quantiles():
    assert timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_copies_go_past_the_cache_and_fit():
    mb = 2**20
    assert timing.copies_past_cache(10 * mb, 60 * mb, 10**12) == 13  # 130 MB of 120
    assert timing.copies_past_cache(500 * mb, 60 * mb, 10**12) == 2
    assert timing.copies_past_cache(500 * mb, 60 * mb, 2000 * mb) == 1
    assert timing.copies_past_cache(1, 60 * mb, 10**12) == timing.COPIES


class Cuda:
    """A CUDA that keeps its own time: a kernel takes 10 us, a graph 5 us more.

    A kernel is a function that is launched; while a graph is captured it is noted instead of run.
    """

    def __init__(self):
        self.now, self.capturing, self.replays, self.seen = 0.0, None, 0, []

    def launch(self, kernel):
        if self.capturing is None:
            self.now += 10.0
            kernel()
        else:
            self.capturing.append(kernel)

    def install(self, monkeypatch, name="NVIDIA H200"):
        cuda = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                self.at = cuda.now

            def synchronize(self):
                assert self.at is not None

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        class Graph:
            def __init__(self):
                self.kernels = []

            def replay(self):
                cuda.now += 5.0 + 10.0 * len(self.kernels)
                cuda.replays += 1
                for kernel in self.kernels:
                    kernel()

        @contextlib.contextmanager
        def capture(graph, stream=None):
            cuda.capturing = graph.kernels
            yield
            cuda.capturing = None

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        properties = SimpleNamespace(L2_cache_size=2**20, uuid="0000")
        for attribute, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda device: stream,
            "stream": lambda s: contextlib.nullcontext(),
            "current_stream": lambda device: stream,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (2**34, 2**35),
            "get_device_properties": lambda device: properties,
            "get_device_name": lambda device=None: name,
            "get_device_capability": lambda device=None: (9, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, attribute, value)
        monkeypatch.setattr(harness, "measured", lambda *_: Ceilings(4000.0, {"fp32": 60.0}))
        monkeypatch.setitem(sys.modules, "pynvml", None)
        return harness.Run(SimpleNamespace(type="cuda"), self.seen.append)


@pytest.fixture
def cuda():
    return Cuda()


def kernel_of(cuda, write=lambda y, x: y.copy_(2 * x), launch=None):
    """Doubling as a kernel that is launched."""

    def double(x):
        y = torch.empty_like(x)
        (launch or cuda.launch)(lambda: write(y, x))
        return y

    return double


def test_a_graph_is_timed_per_call(cuda, monkeypatch):
    process = cuda.install(monkeypatch)
    (row,) = process.rows(doubling(kernel_of(cuda)), "cuda")
    assert row.error is None
    # 512 copies, since no more are held; rounds until a graph takes 2 ms.
    assert row.p50_us == pytest.approx(10 + 5 / 512, abs=1e-3)
    assert row.p20_us == pytest.approx(row.p80_us)
    assert row.device == "NVIDIA H200"
    assert row.floor_us == pytest.approx(512 / 4000 / 1e3)
    assert row.share_of_floor == pytest.approx(row.floor_us / row.p50_us)
    assert row.expected_share == Expected(0.9, 0.9, "").share("H200", row.floor_us)
    assert row.ceiling_gbps == 4000.0
    assert row.ceiling_tflops == pytest.approx(60.0)
    assert row.sm_mhz is None
    assert "not installed" in cuda.seen[0]
    assert cuda.replays >= timing.SAMPLES[0]


def test_short_graphs_are_captured_again_with_more_calls(cuda, monkeypatch):
    cuda.install(monkeypatch)
    calls = kernel_of(cuda)
    graph = timing.Graph(lambda i: calls(torch.ones(4)), 3, None)
    assert graph.calls == 3
    times = graph.time()
    assert graph.calls % 3 == 0
    assert graph.calls * 10 > 0.8 * timing.LEAST_GRAPH_US
    assert times.p50 == pytest.approx(10 + 5 / graph.calls)


def test_every_copy_has_its_turn_and_its_own_result(cuda, monkeypatch):
    cuda.install(monkeypatch)
    order, calls = [], kernel_of(cuda)
    graph = timing.Graph(lambda i: order.append(i) or calls(torch.full((2,), float(i))), 3, None)
    assert order == [0, 0, 0, 1, 2]  # two to warm up
    graph.replay()
    assert [float(y[0]) for y in graph.results] == [0.0, 2.0, 4.0]


def test_a_kernel_that_is_not_captured_has_no_time(cuda, monkeypatch):
    """Launched on a stream of its own, say: eager calls are right and every replay is fast."""
    process = cuda.install(monkeypatch)
    (row,) = process.rows(doubling(kernel_of(cuda, launch=lambda kernel: kernel())), "cuda")
    assert row.p50_us is None
    assert "y: relative L1 inf" in row.error


def test_poison_comes_before_the_replay(cuda, monkeypatch):
    """They are on two streams: without waiting, what a replay wrote could be poisoned after."""
    cuda.install(monkeypatch)
    calls, waits = kernel_of(cuda), []
    graph = timing.Graph(lambda i: calls(torch.ones(4)), 1, None)
    replays = cuda.replays
    graph.stream.wait_stream = lambda other: waits.append(cuda.replays)
    graph.replay(2)
    assert waits == [replays]


def test_a_kernel_that_writes_too_little_has_no_time(cuda, monkeypatch):
    process = cuda.install(monkeypatch)

    def write(y, x):
        y[:63] = 2 * x[:63]

    (row,) = process.rows(doubling(kernel_of(cuda, write)), "cuda")
    assert row.p50_us is None


def test_a_broken_gpu_measures_nothing_more(cuda, monkeypatch):
    process = cuda.install(monkeypatch)

    def illegal(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def crash(x):
        monkeypatch.setattr(torch.cuda, "synchronize", illegal)
        illegal()

    (first,) = process.rows(doubling(crash), "cuda")
    assert "illegal memory access" in first.error
    (second,) = process.rows(doubling(kernel_of(cuda)), "cuda")
    assert second.error == "not run: the GPU failed in quantize fp32 64"


def test_an_unknown_card_is_measured_and_not_filed(cuda, monkeypatch, tmp_path):
    process = cuda.install(monkeypatch, "NVIDIA L40S")
    (row,) = process.rows(doubling(kernel_of(cuda)), "cuda")
    assert row.share_of_floor
    assert row.expected_share is None
    assert process.promised() == arch.lookup((9, 0)).tflops
    with pytest.raises(ValueError, match="hardware: expected one of"):
        rows.results_file(tmp_path, process.device, "abc")


def test_ceilings_are_measured_as_kernels_are(cuda, monkeypatch):
    """The real `measured`, on small matrices of the CPU."""
    cuda.install(monkeypatch)
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "COPIED", 4000)
    calls = []
    real = ceilings.products

    def products(device):
        found = real(CPU)
        found["bf16"] = lambda: cuda.launch(lambda: calls.append(1))
        found["int8"] = lambda: fail(None)
        return found

    monkeypatch.setattr(ceilings, "products", products)
    notes = []
    found = ceilings.measured(CPU, H200.tflops, notes.append)
    assert found.tflops["bf16"] == pytest.approx(2 * 64**3 / 10 / 1e6, rel=0.01)
    assert found.tflops["fp32"] == H200.tflops["fp32"]
    assert "ceiling of int8 not measured" in notes[0]
    assert calls

    rows_of_them = list(ceilings.as_rows(CPU, Sensors(CPU), notes.append))
    assert {row.family for row in rows_of_them} == {ceilings.FAMILY}
    assert [row.dtype for row in rows_of_them] == ["uint8", "bf16", "fp8", "fp8"]
    assert [row.form for row in rows_of_them] == ["", "", "", "fast sums"]
    assert rows_of_them[0].gbps == pytest.approx(2 * 4000 / rows_of_them[0].p50_us / 1e3)
    assert rows_of_them[1].tflops == found.tflops["bf16"]


# --- Sensors ------------------------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch):
    """An NVML whose card has no power meter and runs into its power cap."""
    module = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def refuse(handle):
        raise NVMLError("Not Supported")

    module.NVMLError, module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM = NVMLError, 1, 2
    module.NVML_TEMPERATURE_GPU = 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda name: name
    module.nvmlSystemGetDriverVersion = lambda: b"580.1"
    module.nvmlDeviceGetClockInfo = lambda handle, which: {1: 1980, 2: 3201}[which]
    module.nvmlDeviceGetTemperature = lambda handle, which: 45
    module.nvmlDeviceGetPowerUsage = refuse
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x4
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = SimpleNamespace(uuid="abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return module


def test_sensors_read_what_the_card_has(nvml):
    sensors = Sensors(SimpleNamespace(type="cuda"))
    assert sensors.missing is None
    assert sensors.driver == "580.1"
    assert sensors._handle == "GPU-abcd"
    assert sensors.read() == Reading(1980, 3201, None, 45, "power cap")


def test_sensors_say_why_they_read_nothing(nvml, monkeypatch):
    def unavailable():
        raise nvml.NVMLError("Driver Not Loaded")

    nvml.nvmlInit = unavailable
    sensors = Sensors(SimpleNamespace(type="cuda"))
    assert sensors.missing == "NVML: Driver Not Loaded"
    assert sensors.read() == Reading()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in Sensors(SimpleNamespace(type="cuda")).missing
    assert Sensors(CPU).missing == "no GPU"


def test_throttle_reasons_by_name():
    assert throttled(0x1) == "none"  # idle
    assert throttled(0x24) == "power cap; thermal"


def test_a_wrong_kernel_fails_its_pytest_benchmark():
    with pytest.raises(harness.WrongResultError):
        harness.with_pytest(lambda call: fail(None), doubling(lambda x: 3 * x))
