# SPDX-License-Identifier: Apache-2.0
"""`reeltime.accelerate` in models of diffusers, their own code, tiny and with random weights.

What is replaced is counted place by place against what the untouched model called, so a layer that
is passed over is noticed, and one that ran twice.  Errors are of the model's output, relative L2.
With random weights they say that the path is right from end to end, and to what degree rounding is
visible behind the residual connections; nothing about the quality of a trained model.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode

import reeltime
from reeltime import gemm_w8a8
from reeltime.plugins import SENSITIVE

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FOUR = {"in_channels": 4, "out_channels": 4}


def wan(num_layers=2):
    model = diffusers.WanTransformer3DModel(
        **HEADS, **FOUR, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=num_layers,
        cross_attn_norm=True,
    )  # fmt: skip
    return model, (torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(1, 6, 16))


def flux():
    model = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(48.0).view(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def ltx():
    """The text of its cross-attention is masked."""
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, cross_attention_dim=32, num_layers=1,
        caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 24, 16),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "num_frames": 2,
        "height": 3,
        "width": 4,
    }


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, **FOUR, time_embed_dim=16, text_embed_dim=16, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=5, max_text_seq_length=6,
    )  # fmt: skip
    return model, (torch.randn(1, 2, 4, 8, 8), torch.randn(1, 6, 16), torch.tensor([500]))


def sd3():
    model = diffusers.SD3Transformer2DModel(
        **HEADS, **FOUR, sample_size=8, patch_size=2, num_layers=2, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    return model, (
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 6, 32),
        torch.randn(1, 32),
        torch.tensor([500]),
    )


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, **FOUR, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "pooled_projections": torch.randn(1, 16),
        "guidance": torch.tensor([6.0]),
    }


class Client(NamedTuple):
    """Calls per forward, and the error that was measured; on a CPU, in float32."""

    make: Callable[[], tuple[nn.Module, Any]]
    linear: int
    attention: int
    norm: int
    error: float


CLIENTS = {
    "wan": Client(wan, linear=20, attention=4, norm=14, error=5.8e-3),
    "flux": Client(flux, linear=17, attention=2, norm=11, error=8.0e-3),
    "ltx": Client(ltx, linear=12, attention=2, norm=6, error=7.1e-3),
    "cogvideox": Client(cogvideox, linear=12, attention=2, norm=13, error=3.7e-3),
    "sd3": Client(sd3, linear=21, attention=2, norm=15, error=5.9e-3),
    "hunyuan_video": Client(hunyuan_video, linear=17, attention=2, norm=11, error=8.2e-3),
}
# Of what was measured.  Another machine sums in another order, which moves a few values across the
# border between two codes; a wrong scale, weight or layout is off by far more.  Each stays below
# what one INT8 product may be off by: errors add up as squares, and so do the layers' outputs.
MARGIN = 1.5
LIMIT = gemm_w8a8.TOLERANCE["int8"].relative_l1

OPS = {
    kind: getattr(torch.ops.reeltime, f"plugin_{kind}").default
    for kind in ("linear", "attention", "norm")
}


def built(make):
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for p in model.parameters():  # what is 0 or 1 at first could be left out unnoticed
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval(), inputs


@torch.no_grad()
def run(model, inputs):
    named = {"return_dict": False}
    if isinstance(inputs, dict):
        return model(**inputs, **named)[0]
    return model(*inputs, **named)[0]


def error(got, want):
    return float((got - want).float().norm() / want.float().norm())


def skipped(path):
    return any(fnmatch.fnmatch(path, pattern) for pattern in SENSITIVE)


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def kind_of(module):
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ in ("LayerNorm", "FP32LayerNorm", "RMSNorm"):
        return "norm"
    return "attention" if hasattr(module, "processor") else None


def called(model, inputs):
    """{kind: {place: calls}} of what one forward of an untouched model calls, and its result."""
    calls = {kind: Counter() for kind in OPS}
    handles = []
    for path, module in model.named_modules():
        if kind := kind_of(module):
            count = lambda *_, to=calls[kind], path=path: to.update([path])  # noqa: E731
            handles.append(module.register_forward_hook(count))
    with Counting() as attention:
        y = run(model, inputs)
    for handle in handles:
        handle.remove()
    assert attention.calls == calls["attention"].total()
    return {k: {p: n for p, n in c.items() if not skipped(p)} for k, c in calls.items()}, y


def counted(report, kind):
    """{place: {what ran: how often}} of those where something ran."""
    sites = [change.place.site for change in report.changes if change.kind == kind]
    return {site.path: dict(site.calls) for site in sites if site.calls}


def nodes(graph):
    targets = [node.target for node in graph.nodes]
    return {kind: targets.count(op) for kind, op in OPS.items()}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


clients = pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)


@clients
def test_counts_error_undo(client):
    model, inputs = built(client.make)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    parameters, kinds = dict(model.named_parameters()), [type(m) for m in model.modules()]
    expected, want = called(model, inputs)
    assert {kind: sum(calls.values()) for kind, calls in expected.items()} == {
        "linear": client.linear, "attention": client.attention, "norm": client.norm
    }  # fmt: skip
    report = reeltime.accelerate(model, linear="int8", attention="int8", norm="fused")
    got = run(model, inputs)
    assert torch.equal(run(model, inputs), got)
    for kind in ("linear", "attention"):
        twice = {path: {"reference": 2 * n} for path, n in expected[kind].items()}
        assert counted(report, kind) == twice
    norms = counted(report, "norm").values()
    assert sum(ran["reference"] for ran in norms) == 2 * client.norm
    assert all(ran.keys() == {"reference"} for ran in norms)
    assert {one.why.partition(":")[0] for one in report.left} == {"skip"}
    assert client.error / MARGIN < error(got, want) < client.error * MARGIN < LIMIT
    report.undo()
    assert torch.equal(run(model, inputs), want)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def compiled(model, graphs):
    """With every graph that autograd would be asked for noted."""

    def note(graph, _):
        graphs.append(nodes(graph.graph))
        return make_boxed_func(graph.forward)

    return torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=note))


@clients
def test_compiled(client):
    model, inputs = built(client.make)
    report = reeltime.accelerate(model)
    want, graphs = run(model, inputs), []
    report.reset_calls()
    got = run(compiled(model, graphs), inputs)
    ran = {"linear": client.linear, "attention": client.attention, "norm": client.norm}
    assert graphs == [ran]
    assert report.calls()[""] == {f"{kind}: reference": n for kind, n in ran.items()}
    assert torch.equal(got, want), error(got, want)


@clients
def test_exported(client):
    model, inputs = built(client.make)
    report = reeltime.accelerate(model)
    want = run(model, inputs)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        program = torch.export.export(model, args, {**kwargs, "return_dict": False})
    ran = {"linear": client.linear, "attention": client.attention, "norm": client.norm}
    assert nodes(program.graph) == ran
    report.reset_calls()
    with torch.no_grad():
        got = program.module()(*args, **kwargs, return_dict=False)[0]
    assert report.calls()[""] == {f"{kind}: reference": n for kind, n in ran.items()}
    assert torch.equal(got, want), error(got, want)


@pytest.mark.parametrize(
    "kind, format, measured",
    [
        ("linear", "int8", 5.9e-3),
        ("linear", "fp8", 2.5e-2),
        ("attention", "int8", 1.7e-3),
        ("attention", "fp8", 9.5e-3),
        ("norm", "fused", 2e-7),  # float32, in another order
    ],
)
def test_each_alone(kind, format, measured):
    client = CLIENTS["wan"]
    model, inputs = built(client.make)
    want = run(model, inputs)
    report = reeltime.accelerate(model, **{**dict.fromkeys(OPS), kind: format})
    got = run(model, inputs)
    assert {change.kind for change in report.changes} == {kind}
    ran = [what["reference"] for what in counted(report, kind).values()]
    assert sum(ran) == getattr(client, kind)
    assert measured / MARGIN < error(got, want) < measured * MARGIN
    if format != "fp8":  # the graph of another format is the same
        graphs = []
        run(compiled(model, graphs), inputs)
        assert graphs == [{**dict.fromkeys(OPS, 0), kind: getattr(client, kind)}]


def test_compiled_first():
    """Compiled code of the untouched model does not answer for the accelerated one, nor after."""
    model, inputs = built(functools.partial(wan, num_layers=1))
    graphs = []
    compiled_model = compiled(model, graphs)
    want = run(compiled_model, inputs)
    report = reeltime.accelerate(compiled_model)
    assert 0 < error(run(compiled_model, inputs), want) < CLIENTS["wan"].error * MARGIN
    report.undo()
    assert torch.equal(run(compiled_model, inputs), want)
    assert graphs[:2] == [dict.fromkeys(OPS, 0), {"linear": 10, "attention": 2, "norm": 7}]


@pytest.mark.skipif(" " in torch.__file__, reason="inductor does not quote the path of PyTorch")
def test_inductor(monkeypatch):
    """What most people compile with.  It looks at what torch.empty does: no poison here."""
    monkeypatch.undo()
    model, inputs = built(functools.partial(wan, num_layers=1))
    report = reeltime.accelerate(model)
    want = run(model, inputs)
    report.reset_calls()
    got = run(torch.compile(model, fullgraph=True), inputs)
    assert report.calls()[""] == {
        "linear: reference": 10, "attention: reference": 2, "norm: reference": 7
    }  # fmt: skip
    assert error(got, want) < CLIENTS["wan"].error  # sums in another order: other codes


def narrow(x):
    return x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_bfloat16(name):
    """Two roundings that know nothing of each other: 8 bits, and bfloat16 everywhere else."""
    model, inputs = built(CLIENTS[name].make)
    want = run(model, inputs)
    model.to(torch.bfloat16)
    inputs = torch.utils._pytree.tree_map(narrow, inputs)
    plain = run(model, inputs)
    reeltime.accelerate(model)
    got = run(model, inputs)
    assert got.dtype == plain.dtype == torch.bfloat16
    expected = math.hypot(error(plain, want), CLIENTS[name].error)
    assert expected / MARGIN < error(got, want) < expected * MARGIN


def example():
    return runpy.run_path(Path(__file__).parents[1] / "examples" / "diffusers_wan.py")


def test_example_tiny(capsys):
    example()["tiny"]()
    out = capsys.readouterr().out
    assert "40 places changed" in out
    assert "as before after undo(): True" in out
    measured = float(re.search("error of the latents: (.*)", out)[1])
    assert 5.8e-3 / MARGIN < measured < 5.8e-3 * MARGIN


def test_example_with_weights(monkeypatch, capsys):
    """Its lines, on a pipeline that holds a tiny transformer and makes no frames."""
    lines, model = example(), wan()[0]

    class Pipeline(SimpleNamespace):
        @classmethod
        def from_pretrained(cls, weights, torch_dtype):
            return cls(transformer=model.to(torch_dtype), weights=weights)

        def to(self, device):
            return self

        def __call__(self, prompt, height, width, num_frames):
            return SimpleNamespace(frames=[(prompt, height, width, num_frames)])

    saved = []
    film = lines["film"]
    monkeypatch.setitem(film.__globals__, "WanPipeline", Pipeline)
    monkeypatch.setitem(film.__globals__, "export_to_video", lambda *args, fps: saved.append(args))
    film("folder", "a cat", "out.mp4")
    assert saved == [(("a cat", 480, 832, 81), "out.mp4")]
    assert "40 places changed" in capsys.readouterr().out
