# SPDX-License-Identifier: Apache-2.0
"""reeltime profile: its numbers add up, what is planted is found, and its page says the same."""

from __future__ import annotations

import html
import json
import os
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from reeltime import backends, cli
from reeltime.bench import plan, profile, profile_ops, profile_report, profile_trace
from reeltime.bench.bench_step import TINY
from reeltime.bench.ceilings import Ceilings
from reeltime.bench.plan import Target
from reeltime.bench.profile import Setting
from reeltime.model import flops
from reeltime.model.config import PRESETS, SparseLinear
from reeltime.model.quality import QUALITIES
from reeltime.model.transformer import Block

CPU = torch.device("cpu")
PASSES, LAYERS = 4, TINY.num_layers
TARGET = Target(
    "tiny", (64, 48), "vidu_s1", 2, 7, PASSES - 1, True, "tiny", (8, 4), "none", 0, "", fps=1e-3
)  # fmt: skip
VIDU = plan.targets()["vidu-s1"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield


@pytest.fixture(scope="module")
def found():
    """A tiny step on the CPU."""
    told: list[str] = []
    one = profile.measure(TARGET, Setting(), CPU, chunks=3, tick=told.append)
    assert len(told) == profile.steps(Setting(), False, 3)
    return one


def one_trace():
    """Ops, phases and trace of a chunk, without the rest."""
    rig = profile.Rig(TARGET, Setting(), CPU)
    runs, events = profile.traced(rig)
    return runs, profile_ops.ops(runs, {}, QUALITIES["bf16"], None), events


# --- It adds up ---------------------------------------------------------------------------------


def test_phases_add_up_to_the_chunk(found):
    assert [x.phase for x in found.phases] == [
        *("plan", "condition", "pass intermediate", "pass noisy", "pass final", "pass cache"),
        "other",
    ]
    assert sum(x.ms for x in found.phases) == pytest.approx(found.chunk_ms)
    assert sum(x.share for x in found.phases) == pytest.approx(1)
    assert found.p20_ms <= found.chunk_ms <= found.p80_ms
    assert found.fps == pytest.approx(1e3 * 8 / found.chunk_ms)
    assert found.meets_target


@pytest.mark.clock
def test_phases_hold_most_of_the_chunk(found):
    assert found.phases[-1].ms < 0.2 * found.chunk_ms


def test_ops_and_gaps_add_up_to_their_phase_and_to_the_trace(found):
    for x in found.phases:
        assert x.ops_ms + x.gap_ms == pytest.approx(x.traced_ms)
        assert x.ops_ms >= 0 <= x.gap_ms
    assert sum(x.traced_ms for x in found.phases) == pytest.approx(found.traced_ms)
    assert sum(x.ms for x in found.rows) + found.gap_ms == pytest.approx(found.traced_ms)
    assert sum(x.share for x in found.rows) + found.gap_share == pytest.approx(1)
    for run in found.runs[:-1]:
        assert sum(us for _, us in run.gaps()) == pytest.approx(run.gap_us)
        ends = [run.start_us, *(x.start_us + x.us for x in run.slices)]
        assert all(x.start_us >= end - 1e-3 for x, end in zip(run.slices, ends, strict=False))


def test_every_op_is_counted_once(found):
    calls = {op.op: op.calls for op in found.rows}
    assert calls["attention.segment_attention"] == calls["rope_kv.write"] == PASSES * LAYERS
    assert calls["norm.gated_residual_norm"] == 3 * PASSES * LAYERS
    assert calls[f"linear {TINY.dim} -> {TINY.ffn_dim}"] == PASSES * LAYERS
    families = {op.family for op in found.rows}
    assert families == {"attention", "rope_kv", "norm", "gemm", "torch"}
    assert all(op.floor_ms is op.lost_ms is None for op in found.rows)  # a host has no floors


def test_work_is_that_of_the_ops(found):
    counted = profile_ops.work(TARGET, QUALITIES["bf16"], 4)
    assert set(counted) <= {op.op for op in found.rows}
    for op in found.rows:
        works = counted.get(op.op)
        assert op.gflop == (works and pytest.approx(sum(w.flops for w in works) / 1e9))


@pytest.mark.parametrize("level", ["bf16", "int8", "fp8+sla"])
def test_nearly_all_work_has_an_op(level):
    quality = QUALITIES[level]
    counted = profile_ops.work(VIDU, quality, 2)
    for name, works in counted.items():
        assert {profile_trace.family(name)} == {work.family for work in works}
    square = {work.name for work in counted["gemm_w8a8 1536 -> 1536"]} if quality.linear else set()
    assert ("cross_key_value" in square) == (quality.linear is not None)  # in 8 bits as well
    config = VIDU.model()
    if quality.topk is not None:
        config = replace(config, sla=SparseLinear(quality.topk))
    load = VIDU.workload(config, share=quality.topk, quantize=quality.linear)
    mine = sum(flops.flops(works) for works in counted.values())
    assert 0.99 < mine / flops.flops(load.chunk(VIDU.steps)) <= 1


# --- What is planted is found -------------------------------------------------------------------


def test_a_slow_op_is_at_the_top(monkeypatch):
    op = backends.OPS["norm"]
    quick = op.reference

    def slow(*args):
        time.sleep(0.05)
        return quick(*args)

    monkeypatch.setattr(op, "reference", slow)
    runs, rows, _ = one_trace()
    assert rows[0].op == "norm"
    assert rows[0].calls == PASSES
    assert rows[0].ms > 50 * PASSES
    assert sum(run.gap_us for run in runs) < 25e3 * PASSES


def test_a_host_that_dawdles_between_ops_is_a_gap(monkeypatch):
    forward = Block.forward

    def dawdling(*args):
        time.sleep(0.05)
        return forward(*args)

    monkeypatch.setattr(Block, "forward", dawdling)
    runs, rows, _ = one_trace()
    assert all(op.ms < 50 for op in rows)
    gaps = {run.phase: run.gap_us for run in runs}
    assert all(gaps[name] > 50e3 * LAYERS for name in gaps if name.startswith("pass"))
    assert gaps["plan"] < 50e3


# --- Kernels of a GPU ---------------------------------------------------------------------------


def event(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def on_gpu(captured):
    """A chunk: the host is done long before the GPU."""
    events = [
        event("user_annotation", "chunk", 1000, 100),
        event("user_annotation", "plan", 1000, 20),
        event("user_annotation", "pass final", 1030, 60),
        event("kernel", "rotate", 1500, 10, correlation=1),
        event("kernel", "norm_k", 1520, 30, correlation=2),
        event("kernel", "split_k", 1545, 20, correlation=3),  # begins before the one before ends
        event("kernel", "reduce", 1570, 5, correlation=3),
        event("kernel", "stray", 900, 5, correlation=9),  # of the chunk before
    ]
    launch = [event("cuda_runtime", "cudaLaunchKernel", 990, 1, correlation=9)]
    if captured:
        for e in events:
            if e["cat"] == "kernel" and e["args"]["correlation"] in (2, 3):
                e["args"]["correlation"] = 5
        launch += [event("cuda_runtime", "cudaGraphLaunch", t, 2, correlation=c)
                   for t, c in ((1005, 1), (1040, 5))]  # fmt: skip
        return events + launch
    sizes = [[1, 12, 256], [336, 256], [336]]
    host = [
        event("cpu_op", "aten::cos", 1002, 8),
        event("cpu_op", "reeltime::gated_residual_norm_quantized", 1035, 10),
        event("cpu_op", "aten::linear", 1050, 20, **{"Input Dims": sizes}),
        event("cpu_op", "aten::addmm", 1055, 10, **{"Input Dims": sizes}),
    ]
    launch += [
        event("cuda_runtime", "cudaLaunchKernel", 1005, 1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 1040, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 1060, 1, correlation=3),
    ]
    return events + host + launch


def test_kernels_belong_to_the_call_that_launched_them():
    runs = profile_trace.read(on_gpu(False), ("plan", "pass final"), True)
    assert [run.phase for run in runs] == ["plan", "pass final", "other"]
    got = [(x.op, x.kernel, x.start_us, x.us) for run in runs for x in run.slices]
    assert got == [
        ("cos", "rotate", 0, 10),
        ("norm.gated_residual_norm", "norm_k", 20, 30),
        ("linear 256 -> 336", "split_k", 50, 15),
        ("linear 256 -> 336", "reduce", 70, 5),
    ]
    assert (runs[1].us, runs[1].gap_us, list(runs[1].gaps())) == (55, 5, [(65, 5)])
    assert sum(run.us for run in runs) == 75  # first kernel to last
    rows = profile_ops.ops(runs, {}, QUALITIES["bf16"], None)
    assert {op.op: (op.calls, op.kernels) for op in rows}["linear 256 -> 336"] == (1, 2)


def test_a_replay_bears_the_names_of_the_eager_run():
    eager, replayed = (
        profile_trace.read(on_gpu(captured), ("plan", "pass final"), True)
        for captured in (False, True)
    )
    assert {x.op for run in replayed for x in run.slices} == {""}
    assert profile_trace.named_by(replayed, eager) == eager
    other = [*eager]
    other[1] = replace(eager[1], slices=eager[1].slices[:-1])
    named = profile_trace.named_by(replayed, other)
    assert [x.op for x in named[1].slices] == ["norm_k", "split_k", "reduce"]
    assert named[0] == eager[0]


def test_a_trace_without_a_chunk_or_kernels_is_refused():
    with pytest.raises(ValueError, match="'chunk'"):
        profile_trace.read([], (), False)
    with pytest.raises(ValueError, match="kernels"):
        profile_trace.read([event("user_annotation", "chunk", 0, 9)], (), True)


def gpu_profile():
    """As of a GPU, from a synthetic trace; nothing here was measured."""
    runs = profile_trace.read(on_gpu(False), ("plan", "pass final"), True)
    works = [
        flops.Work("fc1", "gemm", 1, 1_200_000, 4000),
        flops.Work("write", "rope_kv", 1, 10, 10_000),
    ]
    counted = {"linear 256 -> 336": works[:1], "norm.gated_residual_norm": works[1:]}
    ceilings = Ceilings(1.0, {"bf16": 0.1, "fp32": 0.01})
    one = profile.Profile(
        "a card", True, "wan-1.3b", "vidu-s1", 42, (960, 544), "int8+sla", "bfloat16", "auto", True,
        4, 12, ceilings={"gbps": 1.0, "bf16": 0.1, "fp32": 0.01}, clocks={"sm_mhz": 1980},
    )  # fmt: skip
    one.time([{"plan": 1.0, "pass final": 3.0, "chunk": 5.0}])
    one.look(runs, on_gpu(False))
    one.rows = profile_ops.ops(runs, counted, QUALITIES["bf16"], ceilings)
    one.stages = [
        profile.Stage("bf16, eager", 9.0, 1333.3, None, 8.0),
        profile.Stage("8-bit attention", planned_ms=7.0, why="in the next one"),
        profile.Stage("captured graph", 5.0, 2400.0, 4.0, 3.0),
    ]
    return one


def test_ops_are_sorted_by_what_is_above_their_floor():
    rows = gpu_profile().rows
    assert [op.op for op in rows] == ["norm.gated_residual_norm", "cos", "linear 256 -> 336"]
    by_name = {op.op: op for op in rows}
    linear = by_name["linear 256 -> 336"]
    assert linear.floor_ms == pytest.approx(12e-3)  # 1.2 MFLOP at 0.1 TFLOPS
    assert linear.lost_ms == pytest.approx(8e-3)  # of 15 + 5 us
    assert by_name["norm.gated_residual_norm"].floor_ms == pytest.approx(10e-3)
    assert by_name["norm.gated_residual_norm"].bound == "memory"
    assert by_name["cos"].floor_ms is None


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level, share", [("int8+sla", 0.1), ("fp8", None)])
def test_the_waterfall_is_that_of_the_plan(level, share):
    setting = Setting(QUALITIES[level], captured=True)
    stages = profile.waterfall(setting, gpu=True)
    assert [name for name, _ in stages] == [name for name, _ in plan.techniques(share)]
    assert stages[-1][1] == setting  # it ends where the profile is


def test_what_a_cpu_cannot_run_is_not_measured(found):
    by_name = {stage.technique: stage for stage in found.stages}
    unmeasured = {name for name, stage in by_name.items() if stage.chunk_ms is None}
    assert unmeasured == {"fused norms, rope_kv", "captured graph"}
    assert all(by_name[name].why for name in unmeasured)
    assert all(stage.planned_ms is None for stage in found.stages)
    assert by_name["write-once cache"].chunk_ms == found.chunk_ms  # it is the same setting
    first, second = found.stages[:2]
    assert second.gained_ms == pytest.approx(first.chunk_ms - second.chunk_ms)


def test_a_technique_that_fails_is_a_bar_less(monkeypatch):
    whole = profile.Rig

    def failing(target, setting, device):
        if setting.rope_on_cache:
            raise RuntimeError("no such\nkernel")
        return whole(target, setting, device)

    monkeypatch.setattr(profile, "Rig", failing)
    first, second = profile.measure(TARGET, Setting(), CPU, chunks=1).stages[:2]
    assert (first.chunk_ms, first.why) == (None, "RuntimeError: no such kernel")
    assert second.chunk_ms
    assert second.gained_ms is None  # against nothing


def test_each_technique_runs_what_it_says():
    settings = dict(profile.waterfall(Setting(), gpu=False))
    rigs = {
        name: profile.Rig(TARGET, setting, CPU)
        for name, setting in settings.items()
        if isinstance(setting, Setting)
    }
    seen = {
        name: (rig.memory.rope_on_cache, rig.memory.kv_format, rig.memory.config.sla is not None,
               rig.step.transformer.blocks[0].ffn.takes)
        for name, rig in rigs.items()
    }  # fmt: skip
    assert list(seen.values()) == [
        (True, "plain", False, None),
        (False, "plain", False, None),
        (False, "plain", True, None),
        (False, "int8, v fp16", True, None),
        (False, "int8, v fp16", True, "int8"),
    ]
    assert all(int(rig.memory.position) >= TARGET.window for rig in rigs.values())  # steady


@pytest.mark.parametrize("preset, target, size", [
    ("wan-1.3b", None, (960, 544)), ("wan-14b-480p", None, (832, 480)),
    ("wan-1.3b-540p", "liveact", (960, 544)), ("miniature", None, (128, 128)),
])  # fmt: skip
def test_goals(preset, target, size):
    one = profile.goal(preset, target)
    assert one.size == size
    assert preset.startswith(one.preset)
    assert one.name == target or target is None


# --- What it writes -----------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are closed, attributes, and numbers by what they belong to."""

    VOID = {"meta", "rect", "line", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.append(dict(attrs))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def numbers(self, kind, name):
        return {a[kind]: a[name] for a in self.attributes if kind in a}


@pytest.mark.parametrize("make", [None, gpu_profile], ids=["host", "card"])
def test_the_page_has_the_numbers_and_asks_nobody(make, found):
    one = make() if make else found
    text = profile_report.html(one)
    page, document = Page(text), one.document()
    assert "http" not in text
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href"} & set(a) for a in page.attributes)
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text

    def cell(value):
        return "" if value is None else str(value)

    for kind, rows, key in (("op", document["rows"][: profile_report.SHOWN], "op"),
                            ("technique", document["stages"], "technique"),
                            ("phase", document["phases"], "phase")):  # fmt: skip
        ms = "chunk_ms" if kind == "technique" else "ms"
        assert page.numbers(f"data-{kind}", "data-ms") == {r[key]: cell(r[ms]) for r in rows}
    floors = page.numbers("data-op", "data-floor")
    assert floors == {r["op"]: cell(r["floor_ms"]) for r in document["rows"][: len(floors)]}
    planned = page.numbers("data-technique", "data-planned")
    assert planned == {r["technique"]: cell(r["planned_ms"]) for r in document["stages"]}
    assert ("Roofline" in text) == one.gpu
    assert profile_report.verdict(one) in text


def test_the_trace_is_one_chunk_from_zero_without_names_of_the_machine(found):
    trace = profile_trace.document(found.trace)
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    chunks = [e for e in complete if e["name"] == "chunk"]
    assert [(e["ts"], pytest.approx(e["dur"] / 1e3)) for e in chunks] == [(0, found.traced_ms)]
    assert min(e["ts"] for e in complete) == 0
    assert {"pass final", "norm.norm", "aten::linear"} <= {e["name"] for e in complete}
    assert set(trace) == {"traceEvents", "displayTimeUnit"}


# --- The command --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments, target=TARGET):
        """Exit code, stdout, stderr of `reeltime profile`, tiny."""
        if target is not None:
            monkeypatch.setattr(profile, "goal", lambda preset, name: target)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["profile", "--device", "cpu", "--chunks", "1", *arguments])
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def test_the_command(run, tmp_path):
    tmp_path /= "made/for/it"
    code, out, err = run("--json", "--out", str(tmp_path), target=replace(TARGET, fps=1e9))
    assert code == 1
    document = json.loads(out)
    assert document["meets_target"] is False
    assert document["rows"][0]["op"] in err
    assert "1e+09 wanted: missed" in err
    assert "figures of the host" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("profile.png", "report.html", "trace.json"),
    ]
    assert Image.open(tmp_path / "profile.png").size[0] > 800
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert document["rows"][0]["op"] in html.unescape((tmp_path / "report.html").read_text())


def test_ctrl_c_keeps_what_was_finished(run, monkeypatch, tmp_path):
    whole = profile.Rig
    made = []

    def stopping(*args):
        made.append(whole(*args))
        if len(made) > 2:
            raise KeyboardInterrupt
        return made[-1]

    monkeypatch.setattr(profile, "Rig", stopping)
    code, out, err = run("--json", "--out", str(tmp_path))
    document = json.loads(out)
    assert code == 130
    assert document["stopped"]
    assert document["rows"]
    assert "stopped" in err
    assert [stage["why"] for stage in document["stages"]] == ["", "", *["stopped before it"] * 5]
    assert "Stopped" in (tmp_path / "report.html").read_text()


def test_ctrl_c_among_the_chunks_keeps_those_before_it(monkeypatch):
    rig = profile.Rig(TARGET, Setting(), CPU)
    chunk, count = rig.chunk, []

    def stopping(around):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        chunk(around)

    monkeypatch.setattr(rig, "chunk", stopping)
    monkeypatch.setattr(profile, "Rig", lambda *_: rig)
    found = profile.measure(TARGET, Setting(), CPU, chunks=5)
    assert (found.stopped, found.chunks, found.rows, found.stages) == (True, 2, [], [])
    assert found.traced_ms is None
    Page(profile_report.html(found))


def test_what_cannot_be_written_is_told_before_anything_runs(run, monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "measure", None)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    code, _, err = run("--out", str(tmp_path))
    assert code == 2
    assert "out: no permission to write to" in err
    code, _, err = run("--out", str(tmp_path / "left"), "--backend", "fast")
    assert code == 2
    assert not list(tmp_path.iterdir())  # nothing is made for arguments that are wrong


@pytest.mark.parametrize("arguments, message", [
    (("--preset", "wan-2b"), "preset: expected one of wan-1.3b"),
    (("--preset", "wan-1.3b-540p"), "preset: expected 'miniature' on a CPU"),
    (("--target", "vidu-s1"), "target: expected 'miniature'"),
    (("--quality", "int4"), "quality: expected one of bf16"),
    (("--out", __file__), "out: expected a folder, got a file"),
    (("--out", f"{__file__}/profile"), "cannot be made: Not a directory"),
    (("--backend", "fast"), "backend: expected"),
    (("--device", "tpu"), "device: expected"),
])  # fmt: skip
def test_bad_input_is_one_line(run, arguments, message):
    code, out, err = run(*arguments, target=None)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_the_first_bar_of_a_gpu_is_attention_as_pytorch_has_it(monkeypatch):
    """Not the oracle's, whose scores are float32 in memory; and nothing of it stays."""
    op, calls = backends.OPS["segment_attention"], []
    oracle, dense = op.reference, profile.gathered_attention

    def both(*args):
        calls.append(args[8].shape)
        got, want = dense(*args)[0], oracle(*args)[0]
        torch.testing.assert_close(got, want)
        return got, want

    monkeypatch.setattr(profile, "gathered_attention", both)
    for name, setting in profile.waterfall(Setting(QUALITIES["int8"]), gpu=True)[:2]:
        calls.clear()
        with profile.attending(setting, gpu=True):
            profile.clocked(profile.Rig(TARGET, setting, CPU), 1, [])
        assert bool(calls) == (name == "bf16, eager")
        assert op.reference is oracle
    with profile.attending(Setting(rope_on_cache=True, backend="reference"), gpu=False):
        assert op.reference is oracle


@pytest.mark.gpu
def test_a_captured_step_on_a_gpu():
    setting = Setting(QUALITIES["int8+sla"], captured=True)
    one = profile.measure(TARGET, setting, torch.device("cuda", 0), chunks=3)
    assert one.captured
    names = {op.op for op in one.rows}
    assert {"sla.segment_sla", "norm.gated_residual_norm", "rope_kv.write"} <= names
    assert any(op.floor_ms for op in one.rows)
    assert 0 <= one.gap_share < 1
    assert sum(x.ms for x in one.rows) + one.gap_ms == pytest.approx(one.traced_ms)
    assert [s.technique for s in one.stages if s.chunk_ms is None] == ["8-bit attention"]
    Page(profile_report.html(one))
