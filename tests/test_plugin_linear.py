# SPDX-License-Identifier: Apache-2.0
"""Linear8 in place of nn.Linear: what it computes, how it moves, loads and is left alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import reeltime
from reeltime import gemm_w8a8, quant
from reeltime.arch import UnsupportedArchError
from reeltime.checks import accuracy
from reeltime.plugins.linear import _OP, Linear8
from reeltime.quant.api import FORMATS

K, N = 272, 208  # ragged blocks in both


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(inputs=K, outputs=N, bias=True, dtype=torch.float32, seed=1):
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(outputs, inputs, seed=seed))
        if bias:
            layer.bias.copy_(normal(outputs, seed=seed + 1))
    return layer.to(dtype)


def accelerated(layer, format="int8", **options):
    """(its Linear8, the report)"""
    net = nn.Sequential(layer).eval()
    report = reeltime.accelerate(net, format, None, None, **options)
    assert isinstance(net[0], Linear8)
    return net[0], report


def bits(x):
    return x.detach().contiguous().view(torch.uint8).clone()


# --- What it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_result_is_that_of_quantised_factors(format, dtype):
    old = linear(dtype=dtype)
    new, _ = accelerated(old, format)
    x = normal(3, 7, K, dtype=dtype)
    with torch.no_grad():
        got, wide = new(x), old(x)
    assert got.dtype == dtype
    assert got.shape == wide.shape
    x8 = quant.quantize(x.flatten(0, 1), dtype=FORMATS[format])
    x8 = quant.dequantize(*x8, dtype=torch.float64)
    w8 = new.weight_codes, new.weight_scale
    w8 = quant.dequantize(*w8, block_rows=128, dtype=torch.float64)
    exact = (x8 @ w8.T + old.bias.double()).view_as(got)
    name = str(dtype).split(".")[1]
    assert gemm_w8a8.TOLERANCE[name].accepts(accuracy(got, exact)), accuracy(got, exact)
    # Each factor is off by at most quant's tolerance, and the two errors are independent.
    limit = math.hypot(*[quant.TOLERANCE[format].relative_l1] * 2)
    assert accuracy(got, wide).relative_l1 <= limit


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 5, K), (0, K), (2, 0, K)], ids=str)
def test_leading_dimensions(shape, bias):
    old = linear(bias=bias)
    new, report = accelerated(old)
    x = normal(*shape)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            got = new(x)
        assert got.shape == old(x).shape
        assert got.is_contiguous()
        assert accuracy(got, old(x)).relative_l1 < 0.02
    assert report.calls() == {"0": {"reference": 2}}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat(1, 1, 2)[..., K:],
        lambda x: x[:, :1].expand(-1, 4, -1),
        lambda x: x[:, 0].t().contiguous().t(),
    ],
    ids=["transposed", "K strided", "sliced", "expanded", "2-D, K strided"],
)
def test_any_strides(view):
    new, _ = accelerated(linear())
    x = view(normal(3, 5, K))
    with torch.no_grad():
        assert torch.equal(new(x), new(x.contiguous()))


def test_nan_stays_in_its_token():
    new, _ = accelerated(linear())
    x = normal(4, K)
    want = new(x)
    x[2, 3] = math.nan
    got = new(x)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])


@pytest.mark.parametrize("format", FORMATS)
def test_op_keeps_its_promises(format):
    new, _ = accelerated(linear(), format)
    promises = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if format == "int8":  # PyTorch cannot compare fp8 arguments with what they were
        promises.append("test_schema")
    for x in (normal(2, 3, K), normal(3, 2, K).transpose(0, 1).requires_grad_()):
        args = (x, new.weight_codes, new.weight_scale, new.bias, torch.bfloat16, "auto", 0)
        torch.library.opcheck(_OP, args, test_utils=promises)


def test_gradient_is_straight_through():
    new, _ = accelerated(linear())
    x = normal(2, 3, K).requires_grad_()
    y, grad = new(x), normal(2, 3, N, seed=5)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ new.weight)
    torch.testing.assert_close(new.bias.grad, grad.sum((0, 1)))
    assert new.weight_codes.grad is None


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_tangent_is_straight_through(grad):
    new, report = accelerated(linear())
    x, direction = normal(3, K), normal(3, K, seed=5)
    with torch.set_grad_enabled(grad):
        _, got = torch.func.jvp(new, (x,), (direction,))
    torch.testing.assert_close(got, direction @ new.weight.T)
    assert report.calls() == {"0": {"left: a tangent is wanted": 1}}


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_gives_the_dtype_that_it_would(dtype, amp):
    old = linear(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    new, _ = accelerated(old)
    x = normal(3, K, dtype=dtype)
    with torch.autocast("cpu", amp), torch.no_grad():
        got, want = new(x), old(x)
    assert got.dtype == want.dtype
    assert accuracy(got, want).relative_l1 < 0.02
    with torch.autocast("cpu", amp):  # and so has the gradient that of x
        new(x.requires_grad_()).sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_not_for_a_product_of_codes(amp):
    """128 * 127 * 127 is no float16, and no bfloat16 without rounding."""
    new, _ = accelerated(nn.Linear(K, N, bias=False))
    new.weight_codes.fill_(127)
    x = normal(3, K).abs()
    with torch.no_grad():
        want = new(x).to(amp)
        with torch.autocast("cpu", amp):
            assert torch.equal(new(x), want)


def test_what_does_not_fit_is_refused_in_every_mode():
    new, _ = accelerated(linear())
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            with pytest.raises(ValueError, match="x: expected dtype torch.float32"):
                new(normal(3, K, dtype=torch.bfloat16))
            with pytest.raises(ValueError, match=r"x: expected shape \[..., 272\], got \[3, 256\]"):
                new(normal(3, 256))
            with pytest.raises(ValueError, match="x: expected shape"):
                new(torch.tensor(1.0))
            with pytest.raises(ValueError, match="x: expected the device of the layer"):
                new(torch.empty(3, K, device="meta"))


# --- Who serves it ------------------------------------------------------------------------------


def test_backend_that_was_asked_for_is_what_runs(monkeypatch):
    pytest.importorskip("triton")
    x = normal(3, 128)
    new, report = accelerated(linear(128, 64), backend="triton")
    want, _ = accelerated(linear(128, 64))
    with torch.no_grad():
        torch.testing.assert_close(new(x), want(x))
    assert report.changes[0].backend == "triton"
    assert report.calls() == {"0": {"triton": 1}}
    net = nn.Sequential(linear())
    with pytest.raises(UnsupportedArchError, match="'cuda' cannot serve gemm_w8a8 on cpu"):
        reeltime.accelerate(net, backend="cuda")
    assert type(net[0]) is nn.Linear


def test_where_only_the_reference_would_serve_a_gpu_pytorch_does():
    """meta is a device that is no CPU and has no kernel of its own."""
    new, report = accelerated(linear())
    with torch.no_grad():
        assert new.to("meta")(torch.empty(3, K, device="meta")).shape == (3, N)
    assert report.calls() == {"0": {"left: no kernel for meta": 1}}
    new, report = accelerated(linear(), backend="reference")
    with torch.no_grad():
        new.to("meta")(torch.empty(3, K, device="meta"))
    assert report.calls() == {"0": {"reference": 1}}


# --- A module like others -----------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_dtype_that_models_read_is_that_of_results(format, bias):
    """diffusers and transformers cast inputs to the dtype of the first parameter or of `weight`."""
    old = linear(bias=bias, dtype=torch.bfloat16)
    new, _ = accelerated(old, format)
    assert next(iter(new.parameters())).dtype == new.weight.dtype == new.dtype == torch.bfloat16
    assert (new.in_features, new.out_features, new.weight.shape) == (K, N, (N, K))
    assert (new.bias is None) != bias
    assert f"bias={bias}, {format}, torch.bfloat16" in repr(new)
    limit = quant.TOLERANCE[format].relative_l1 + quant.TOLERANCE["bfloat16"].relative_l1
    assert accuracy(new.weight, old.weight).relative_l1 < limit


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_moves_codes_and_casts_results(format, bias):
    new, _ = accelerated(linear(bias=bias), format)
    codes, scale = bits(new.weight_codes), bits(new.weight_scale)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        new.to(dtype)
        assert new(normal(2, K, dtype=dtype)).dtype == new.dtype == dtype
        assert new.weight_codes.dtype == FORMATS[format]
        assert torch.equal(bits(new.weight_codes), codes)
        assert torch.equal(bits(new.weight_scale), scale)
    new.share_memory()
    assert new.weight_codes.is_shared()
    new.to("meta", torch.bfloat16)
    assert {p.device.type for p in new.parameters()} == {"meta"}
    assert (new.weight_codes.dtype, new.weight_scale.dtype) == (FORMATS[format], torch.float32)
    new.to_empty(device="cpu")
    assert new(normal(2, K, dtype=torch.bfloat16)).shape == (2, N)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_state_of_its_own_and_of_the_original(format, bias, assign):
    x, source = normal(3, K), linear(bias=bias, seed=7)
    want, _ = accelerated(source, format)
    assert not any(name.endswith(".weight") or name == "weight" for name in want.state_dict())
    for state in (want.state_dict(), source.state_dict()):
        new, _ = accelerated(linear(bias=bias), format)
        kept = dict(state)
        new.load_state_dict(state, assign=assign)
        assert state.keys() == kept.keys()
        with torch.no_grad():
            assert torch.equal(new(x), want(x))
        assert not new.weight_codes.requires_grad
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_codes"):
        new.load_state_dict({k: v for k, v in want.state_dict().items() if "codes" not in k})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \[208, 256\]"):
        new.load_state_dict(linear(256, bias=bias).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*else"):
        new.load_state_dict(source.state_dict() | {"else": x})


def test_hooks_and_handles_stay():
    old, seen = linear(), []
    first = old.register_forward_hook(lambda module, args, y: seen.append(type(module)) or y * 2)
    old.register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True)
    x = normal(2, K)
    new, report = accelerated(old)
    twice = new(x)
    assert seen == ["pre", Linear8]
    first.remove()
    assert torch.equal(new(x) * 2, twice)
    new.register_forward_hook(lambda module, args, y: y + 1)
    report.undo()
    assert torch.equal(old(x), nn.functional.linear(x, old.weight, old.bias) + 1)


def test_copies_count_for_themselves():
    new, report = accelerated(linear())
    x = normal(2, K)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(other(x), new(x))
        assert other.weight_codes.data_ptr() != new.weight_codes.data_ptr()
        assert other.place.site.calls == {"reference": 1}
    assert report.calls() == {"0": {"reference": 2}}


def test_offloading_moves_codes_and_scales():
    hooks = pytest.importorskip("accelerate.hooks")
    from accelerate import cpu_offload

    x = normal(2, K)
    net = nn.Sequential(linear(), nn.GELU(), linear(N, 64, bias=False, seed=3)).eval()
    report = reeltime.accelerate(net, "fp8", None, None, skip=(), backend="reference")
    with torch.no_grad():
        want = net[0](x), net[2](normal(2, N))
        cpu_offload(net, execution_device="cpu")
        assert all(x.is_meta for x in net.state_dict().values())
        assert torch.equal(net[0](x), want[0])
        assert torch.equal(net[2](normal(2, N)), want[1])
    with pytest.raises(RuntimeError, match="undo: 2 is on no device now. Remove the hooks"):
        report.undo()
    hooks.remove_hook_from_submodules(net)
    report.undo()
    assert type(net[0]) is nn.Linear
    assert net[0].weight.device.type == "cpu"


# --- What is left alone -------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Weight(torch.Tensor):
    """As torchao's quantised weights are: a subclass in a plain nn.Linear."""


def with_weight(weight):
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def with_forward_replaced():
    layer = nn.Linear(16, 16)
    layer.forward = layer.forward
    return layer


def tied():
    embedding, head = nn.Embedding(16, 16), nn.Linear(16, 16)
    head.weight = embedding.weight
    return nn.ModuleList([head, embedding])


class Listed(nn.Module):
    """Reaches its layer by a list, where nothing could stand in its stead."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.layers = [self.layer]


class Bound(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.call = self.layer.forward


LEFT = {
    "in a list or the like": Listed,
    "a method of it is": Bound,
    "OwnForward is a class of its own": lambda: OwnForward(16, 16),
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
    "computed by a hook": lambda: spectral_norm(nn.Linear(16, 16)),
    "its forward was replaced": with_forward_replaced,
    "its weight is a Weight": lambda: with_weight(torch.ones(16, 16).as_subclass(Weight)),
    "its weight is in torch.int8": lambda: with_weight(torch.ones(16, 16, dtype=torch.int8)),
    "on the meta device": lambda: nn.Linear(16, 16, device="meta"),
    "shares a parameter": tied,
    "24 inputs are no multiple of 16": lambda: nn.Linear(24, 16),
    "0 inputs": lambda: with_weight(torch.ones(16, 0)),
    "NaN or Inf": lambda: with_weight(torch.full((16, 16), math.inf)),
    "nn.MultiheadAttention reads": lambda: nn.MultiheadAttention(16, 2),
    "nn.TransformerEncoderLayer reads": lambda: nn.TransformerEncoderLayer(16, 2),
    "compiled by itself": lambda: torch.compile(nn.Linear(16, 16)),
    "skip: 0": lambda: nn.Linear(16, 16),
}


@pytest.mark.parametrize("why", LEFT)
def test_left_alone_with_a_reason(why):
    net = nn.Sequential(LEFT[why](), nn.Linear(16, 16))
    before = list(net.named_modules())
    report = reeltime.accelerate(net, attention=None, norm=None, skip=["0"] * ("skip" in why))
    assert [change.path for change in report.changes] == ["1"]
    assert report.left
    assert all(left.kind == "linear" and why in left.why for left in report.left)
    assert all(left.path.startswith("0") and "_orig_mod" not in left.path for left in report.left)
    report.undo()
    assert list(net.named_modules()) == before


def test_hooked_by_accelerate_is_left():
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    accelerate.hooks.add_hook_to_module(net[0], accelerate.hooks.AlignDevicesHook("cpu"))
    report = reeltime.accelerate(net, attention=None, norm=None)
    assert [left.why for left in report.left] == [
        "its forward was replaced, as offloading does: accelerate first"
    ]


def test_layer_with_two_owners_is_replaced_at_both():
    shared = linear(64, 64)
    net = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, shared)})
    report = reeltime.accelerate(net, attention=None, norm=None)
    assert net["a"][0] is net["b"][0] is net["b"][1]
    assert isinstance(net["a"][0], Linear8)
    assert [change.path for change in report.changes] == ["a.0"]
    report.undo()
    assert net["a"][0] is net["b"][0] is net["b"][1] is shared


def test_model_that_is_a_layer_is_refused():
    with pytest.raises(ValueError, match="it is the model"):
        reeltime.accelerate(linear())


def test_original_is_freed_before_the_next_is_quantised(monkeypatch):
    """Without undo, no more than one layer is held twice."""
    import weakref

    net = nn.Sequential(*(linear(64, 64) for _ in range(3)))
    weights = [weakref.ref(layer.weight) for layer in net]
    alive, quantize = [], quant.quantize_weight
    monkeypatch.setattr(
        quant,
        "quantize_weight",
        lambda w, **options: (
            alive.append(sum(r() is not None for r in weights)) or quantize(w, **options)
        ),
    )
    report = reeltime.accelerate(net, attention=None, norm=None, undoable=False)
    assert alive == [3, 2, 1]
    with pytest.raises(RuntimeError, match="undo: of 0 nothing was kept"):
        report.undo()
    assert isinstance(net[2], Linear8)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.add_(1),
        lambda layer: setattr(layer.weight, "data", torch.zeros(1)),
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.copy_(torch.zeros_like(layer.weight)),
    ],
    ids=["data in place", "data", "in place", "copy"],
)
def test_a_write_to_the_weight_is_no_silent_loss(write):
    layer = nn.Sequential(nn.Linear(32, 48))
    reeltime.accelerate(layer, attention=None, norm=None)
    assert type(layer[0].weight * 1) is torch.Tensor
    with pytest.raises((RuntimeError, AttributeError)), torch.no_grad():
        write(layer[0])
