# SPDX-License-Identifier: Apache-2.0
"""The config for torchao's quantize_: what it puts where, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import reeltime
from reeltime.arch import UnsupportedArchError
from reeltime.plugins.linear import Linear8

torchao = pytest.importorskip("torchao.quantization")
from reeltime.plugins.torchao import ReeltimeW8A8Config, takes  # noqa: E402

X = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 256), nn.GELU(), nn.Linear(256, 32, bias=False)).eval()


@torch.no_grad()
def run(model):
    return model(X)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_quantize_gives_what_accelerate_gives(model, format):
    twin, plain = copy.deepcopy(model), run(model)
    config = ReeltimeW8A8Config(format)
    torchao.quantize_(model, config)
    reeltime.accelerate(twin, linear=format, attention=None, norm=None, skip=())
    got = run(model)
    assert torch.equal(got, run(twin))
    assert not torch.equal(got, plain)
    assert config.calls == {"reference": 2}


def test_quantize_on_the_layer_itself():
    """It has no owner: whoever swaps modules would change nothing."""
    layer = nn.Linear(48, 32).eval()
    config = ReeltimeW8A8Config()
    torchao.quantize_(layer, config)
    run(layer)
    assert config.calls == {"reference": 1}
    assert isinstance(layer, Linear8)


def test_a_layer_with_two_owners_stays_one(model):
    both = nn.ModuleDict({"a": nn.Sequential(model[0]), "b": nn.Sequential(model[0])})
    torchao.quantize_(both, ReeltimeW8A8Config())
    assert both["a"][0] is both["b"][0]
    assert isinstance(both["a"][0], Linear8)


def test_compiled_and_exported(model):
    config = ReeltimeW8A8Config()
    torchao.quantize_(model, config)
    want = run(model)
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="aot_eager")), want)
    exported = torch.export.export(model, (X,))
    op = torch.ops.reeltime.plugin_linear.default
    assert [node.target for node in exported.graph.nodes].count(op) == 2
    assert torch.equal(run(exported.module()), want)
    assert config.calls == {"reference": 6}


@pytest.mark.parametrize(
    "layer, why",
    [
        (nn.Linear(20, 16), "20 inputs are no multiple of 16"),
        (nn.Linear(16, 16, device="meta"), "meta device"),
        (nn.Conv1d(16, 16, 1), "it is a Conv1d"),
        (nn.MultiheadAttention(16, 1).out_proj, "a class of its own"),
    ],
    ids=["inputs", "meta", "convolution", "subclass"],
)
def test_a_layer_that_cannot_be_changed_is_an_error(layer, why):
    assert not takes(layer)
    with pytest.raises(ValueError, match=f"filter_fn: expected .*{why}.*takes"):
        torchao.quantize_(nn.Sequential(layer), ReeltimeW8A8Config(), lambda m, name: m is layer)


def test_takes_passes_over_what_cannot_be_changed(model):
    model.append(nn.Linear(32, 16)).append(nn.Linear(16, 3)).append(nn.Linear(3, 2))
    torchao.quantize_(model, ReeltimeW8A8Config(), takes)
    assert [type(m) for m in model[3:]] == [Linear8, Linear8, nn.Linear]


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="format: expected 'int8' or 'fp8', got 'int4'"):
        ReeltimeW8A8Config("int4")
    with pytest.raises(ValueError, match="backend: expected"):
        ReeltimeW8A8Config(backend="best")
    with pytest.raises(UnsupportedArchError):
        torchao.quantize_(nn.Linear(16, 16), ReeltimeW8A8Config(backend="cuda"))


def test_diffusers_quantises_while_it_loads(tmp_path):
    """It calls quantize_ on one layer after another, and keeps Wan's time embedder in float32.  The
    reloading of what it saves is refused."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    saved = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=1,
    ).eval()  # fmt: skip
    saved.save_pretrained(tmp_path / "plain")
    config = ReeltimeW8A8Config()
    loaded = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "plain",
        quantization_config=diffusers.TorchAoConfig(config, modules_to_not_convert=["proj_out"]),
        torch_dtype=torch.float32,
    )
    reeltime.accelerate(saved, attention=None, norm=None, skip=["proj_out", "*time_embedder*"])
    got, want = loaded.state_dict(), saved.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.no_grad():
        loaded(torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 6, 16))
    assert config.calls == {"reference": 3 + 10}
    loaded.save_pretrained(tmp_path / "eight")
    with pytest.raises(ValueError, match="ReeltimeW8A8Config"):
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "eight")
