# SPDX-License-Identifier: Apache-2.0
"""Norms of other people's models in one kernel: which, what dtype, what stays, and real models."""

from __future__ import annotations

import copy
import warnings
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import dropout

import reeltime
from reeltime.arch import UnsupportedArchError
from reeltime.backends import TABLE, no_kernel
from reeltime.checks import accuracy
from reeltime.norm.api import NORM
from reeltime.plugins import known_norms
from reeltime.plugins.norm import _OP, FEW, _dtype, _fused

C = 16
HALVES = (torch.bfloat16, torch.float16)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(module):
    """With weights that are not those of a new module."""
    with torch.no_grad():
        for index, one in enumerate(module.parameters()):
            one.copy_(normal(*one.shape, seed=index + 1))
    return module.eval()


def pair(module):
    """(untouched, accelerated, report); the accelerated one is a child, as in a model."""
    net = nn.Sequential(copy.deepcopy(module))
    report = reeltime.accelerate(net, None, None, "fused")
    assert isinstance(net[0], type(module))
    assert type(net[0]) is not type(module)
    return module, net[0], report


class WideLayerNorm(nn.LayerNorm):
    """PyTorch's in float32, as Wan's is (github.com/Wan-Video/Wan2.1)."""

    def forward(self, rows):
        wide = super().forward(rows.to(torch.float32))
        return wide.to(rows.dtype)


class WideRMSNorm(nn.Module):
    """Narrow before the product with its weight, as Wan's is."""

    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, rows):
        return self.unit(rows.to(torch.float32)).to(rows.dtype) * self.weight

    def unit(self, rows):
        power = rows.square().mean(-1, keepdim=True)
        return torch.rsqrt(self.eps + power) * rows


class OtherWordsNorm(nn.Module):
    """A LayerNorm in arithmetic, whose results lie as x does; its eps has another name."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(size)) for _ in range(2))
        self.epsilon = 1e-5

    def forward(self, rows):
        wide = rows.float()
        spread = wide.var(-1, keepdim=True, unbiased=False)
        unit = (wide - wide.mean(-1, True)) / (spread + self.epsilon) ** 0.5
        return (unit * self.weight + self.bias).to(rows.dtype)


class BareNorm(nn.Module):
    """Has no weight, nor says that it has none."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5

    def forward(self, rows):
        power = rows.float().pow(2).mean(-1, keepdim=True)
        return (rows * torch.rsqrt(power + self.eps)).type_as(rows)


def with_list():
    norm = WideLayerNorm(C)
    norm.normalized_shape = [C]
    return norm


def of_diffusers(name, **options):
    def make():
        normalization = pytest.importorskip("diffusers.models.normalization")
        return getattr(normalization, name)(C, **options)

    return make


def of_transformers(family, name):
    def make():
        modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
        return getattr(modeling, name)(C)

    return make


NORMS = {
    "layer": lambda: nn.LayerNorm(C),
    "layer, no bias": lambda: nn.LayerNorm(C, bias=False),
    "layer, plain": lambda: nn.LayerNorm(C, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(C),
    "rms, eps": lambda: nn.RMSNorm(C, eps=1e-3),
    "rms, plain": lambda: nn.RMSNorm(C, elementwise_affine=False),
    "wide layer": lambda: WideLayerNorm(C),
    "wide layer, plain": lambda: WideLayerNorm(C, elementwise_affine=False),
    "wide layer, list": with_list,
    "bare": BareNorm,
    "wide rms": lambda: WideRMSNorm(C),
    "other words": lambda: OtherWordsNorm(C),
    "llama": of_transformers("llama", "LlamaRMSNorm"),
    "qwen": of_transformers("qwen3", "Qwen3RMSNorm"),
    "t5": of_transformers("t5", "T5LayerNorm"),
    "diffusers layer": of_diffusers("FP32LayerNorm"),
    "diffusers layer, plain": of_diffusers("FP32LayerNorm", elementwise_affine=False),
    "diffusers rms": of_diffusers("RMSNorm", eps=1e-5),
    "diffusers rms, bias": of_diffusers("RMSNorm", eps=1e-5, bias=True),
    "diffusers rms, plain": of_diffusers("RMSNorm", eps=1e-5, elementwise_affine=False),
    "mochi": of_diffusers("MochiRMSNorm", eps=1e-5),
}


def formula(module, x):
    """In float64."""
    x, eps = (
        x.double(),
        next(getattr(module, one) for one in known_norms.EPS if hasattr(module, one)),
    )
    centred = isinstance(module, (nn.LayerNorm, OtherWordsNorm))
    x = x - x.mean(-1, keepdim=True) if centred else x
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    weight, bias = (getattr(module, name, None) for name in known_norms.HELD)
    y = y if weight is None else y * weight.detach().double()
    return y if bias is None else y + bias.detach().double()


@pytest.mark.parametrize("name", NORMS)
def test_result_and_dtype_are_those_of_the_module(name):
    module = filled(NORMS[name]())
    for wide in (torch.float32, *HALVES):
        for narrow in (torch.float32, *HALVES, torch.float64):
            old, new, report = pair(module.to(wide))
            x = normal(2, 5, C, seed=7, dtype=narrow) * 0.01  # where eps counts
            for on in (False, True):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=on):
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # dtypes that differ are slow
                            want = old(x)
                    except RuntimeError:
                        continue  # PyTorch takes no such mix
                    got = new(x)
                assert got.dtype == want.dtype, (wide, narrow, on)
                assert got.stride() == want.stride()
                assert report.calls()["0"]["reference"] > 0
                if wide == narrow == torch.float32:
                    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
                if name != "rms" and name != "rms, plain":  # whose eps is that of the dtype
                    truth = formula(old, x)
                    ours, theirs = accuracy(got, truth), accuracy(want, truth)
                    assert ours.relative_l1 <= theirs.relative_l1 * 1.05 + 2e-7, (wide, narrow)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_eps_of_none_is_that_of_pytorch(dtype):
    old, new, _ = pair(nn.RMSNorm(C, elementwise_affine=False))
    x = normal(4, C, dtype=dtype) * (1e-8 if dtype == torch.float64 else 2e-4)
    rounding = 4 * torch.finfo(dtype).eps
    assert accuracy(new(x), old(x)).relative_l1 < rounding


@pytest.mark.parametrize(
    "name", ["layer", "rms", "diffusers rms, plain", "wide rms", "other words"]
)
def test_strides_are_those_of_the_module(name):
    """Of x as attention has it; what follows may look at results as views."""
    old, new, _ = pair(filled(NORMS[name]()))
    heads = normal(2, 5, 3, C).transpose(1, 2)
    cut = normal(2, 5, 3 * C)[..., C : 2 * C]
    last = normal(2, C, 5).mT
    with torch.no_grad():
        for x in (heads, cut, last, normal(7, C), heads.unsqueeze(0)):
            got, want = new(x), old(x)
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
            if x is not last:
                assert got.stride() == want.stride()


@pytest.mark.parametrize("name", NORMS)
def test_autocast_of_a_gpu(name):
    """As PyTorch does there: on fake tensors, which have dtypes and need no GPU."""
    module = NORMS[name]()
    norm, before = known_norms.known(module), torch.is_autocast_enabled("cuda")
    weight, bias = (getattr(module, name, None) for name in known_norms.HELD)
    with FakeTensorMode():
        x = torch.empty(2, 5, C, device="cuda", dtype=torch.bfloat16)
        for on in (False, True):
            torch.set_autocast_enabled("cuda", on)
            try:
                want = on_fake(module, x).dtype
                got = _dtype(norm, x, weight, bias, None, None, "plain")
            finally:
                torch.set_autocast_enabled("cuda", before)
            assert got == want, on


def on_fake(module, x):
    """Of a fake GPU."""
    values = {
        name: torch.empty(one.shape, device="cuda") for name, one in module.named_parameters()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.func.functional_call(module, values, x)


def test_few_rows_on_a_gpu_are_left():
    _, new, _ = pair(nn.LayerNorm(C, elementwise_affine=False))
    with FakeTensorMode():
        few = torch.empty(FEW - 1, C, device="cuda")
        scale = torch.empty(C, device="cuda")
        place = new.reeltime_norm.place
        assert _fused(new, place, few, None, None, "plain") == f"fewer than {FEW} rows"
        many = torch.empty(FEW, C, device="meta")
        assert not isinstance(_fused(new, place, many, None, None, "plain"), str)
        assert scale.is_cuda


# --- What stays ---------------------------------------------------------------------------------


class GemmaLikeNorm(WideRMSNorm):
    def forward(self, rows):
        return self.unit(rows.float()) * (1 + self.weight)


class TwiceEpsNorm(WideRMSNorm):
    def unit(self, rows):
        return rows / (rows.pow(2).mean(-1, keepdim=True) + 2 * self.eps).sqrt()


class EpsOutsideNorm(WideRMSNorm):
    def unit(self, rows):
        return rows / (rows.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class EpsForgottenNorm(WideRMSNorm):
    def unit(self, rows):
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 0.5)


class EpsClassNorm(WideRMSNorm):
    eps = property(lambda self: 1e-6, lambda self, value: None)


class OtherHalfNorm(WideRMSNorm):
    def forward(self, rows):
        return rows if rows.dtype == torch.float16 else super().forward(rows)


class AlwaysWideNorm(WideRMSNorm):
    def forward(self, rows):
        return super().forward(rows).float()


class OtherRowsNorm(WideRMSNorm):
    """Of [B, S, C]: the channels, and of anything else, too."""

    def unit(self, rows):
        return rows * torch.rsqrt(rows.pow(2).mean(2, keepdim=True) + self.eps)


class PartNorm(WideRMSNorm):
    def unit(self, rows):
        return super().unit(rows[..., :999])


class ShapeNorm(WideRMSNorm):
    def forward(self, rows):
        return rows if rows.shape[0] == 1 else super().forward(rows)


class TrainedNorm(WideRMSNorm):
    def forward(self, rows):
        return rows if self.training else super().forward(rows)


class ValueNorm(WideRMSNorm):
    def forward(self, rows):
        return rows if rows.mean() == 2 else super().forward(rows)


class ImportNorm(WideRMSNorm):
    def forward(self, rows):
        return dropout(super().forward(rows), 0)


class InPlaceNorm(WideRMSNorm):
    def forward(self, rows):
        y = super().forward(rows)
        y += 0
        return y


class StoringNorm(WideRMSNorm):
    def forward(self, rows):
        self.eps = self.eps
        return super().forward(rows)


class DefaultNorm(WideRMSNorm):
    def forward(self, rows, factor=1.0):
        return super().forward(rows) * factor


class ClosureNorm(WideRMSNorm):
    forward = torch.no_grad()(WideRMSNorm.forward)


class PairNorm(WideRMSNorm):
    def forward(self, rows):
        return super().forward(rows), None


class FetchedNorm(WideRMSNorm):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return 2 * value if name == "eps" else value


class AboveNorm(nn.LayerNorm):
    def forward(self, rows):
        return 2 * super().forward(rows)


class WideAboveNorm(AboveNorm):
    def forward(self, rows):
        return super().forward(rows.float()).to(rows.dtype)


class CalledNorm(nn.LayerNorm):
    def __call__(self, x):
        return super().__call__(x) + 1


def other_torch():
    """The same words about another `torch`."""
    code = WideRMSNorm.unit.__code__
    other = SimpleNamespace(rsqrt=torch.sqrt)
    body = {"unit": FunctionType(code, {"torch": other})}
    return type("OtherNorm", (WideRMSNorm,), body)(C)


def other_method():
    norm = WideRMSNorm(C)
    norm.unit = lambda rows: rows
    return norm


def with_more(register, name):
    norm = WideRMSNorm(C)
    getattr(norm, register)(name, nn.Parameter(torch.ones(C)))
    return norm


def patched():
    norm = nn.LayerNorm(C)
    norm.forward = lambda x: x
    return norm


STAY = {
    "weight + 1": (lambda: GemmaLikeNorm(C), "computes something else"),
    "gemma": (of_transformers("gemma", "GemmaRMSNorm"), "computes something else"),
    "2 eps": (lambda: TwiceEpsNorm(C), "computes something else"),
    "eps outside": (lambda: EpsOutsideNorm(C), "computes something else"),
    "eps forgotten": (lambda: EpsForgottenNorm(C), "computes something else"),
    "eps of the class": (lambda: EpsClassNorm(C), "no plain function"),
    "LayerNorm above": (lambda: WideAboveNorm(C), "computes something else"),
    "another float16": (lambda: OtherHalfNorm(C), "computes something else"),
    "another dtype": (lambda: AlwaysWideNorm(C), "computes something else"),
    "another dimension": (lambda: OtherRowsNorm(C), "computes something else"),
    "width": (lambda: PartNorm(C), "it uses"),
    "shape": (lambda: ShapeNorm(C), "it uses 'shape'"),
    "training": (lambda: TrainedNorm(C), "it uses 'training'"),
    "values": (lambda: ValueNorm(C), "computes something else"),
    "another function": (lambda: ImportNorm(C), "it uses 'dropout'"),
    "in place": (lambda: InPlaceNorm(C), "writes"),
    "stores": (lambda: StoringNorm(C), "writes"),
    "default": (lambda: DefaultNorm(C), "closure or defaults"),
    "closure": (lambda: ClosureNorm(C), "closure or defaults"),
    "method of its own": (other_method, "its unit is one of its own"),
    "buffer": (lambda: with_more("register_buffer", "scale"), "other tensors"),
    "parameter": (lambda: with_more("register_parameter", "scale"), "other tensors"),
    "pair": (lambda: PairNorm(C), "computes something else"),
    "__getattribute__": (lambda: FetchedNorm(C), "called in a way of its own"),
    "__call__": (lambda: CalledNorm(C), "called in a way of its own"),
    "two dimensions": (lambda: nn.LayerNorm((5, C)), "more than the last dimension"),
    "replaced": (patched, "its forward was replaced"),
    "two dimensions of a weight": (lambda: WideRMSNorm((5, C)), "more than the last dimension"),
    "another torch": (other_torch, "it uses 'torch'"),
    "no eps": (lambda: nn.LayerNorm(C, eps=0.0), "its eps is 0.0"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(C), dim=None),
        "parametrised",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_module_stays(name):
    make, why = STAY[name]
    module = make()
    cls = type(module)
    report = reeltime.accelerate(nn.Sequential(module, nn.RMSNorm(C)), None, None, "fused")
    assert type(module) is cls
    assert [(path, why in reason) for path, _, reason in report.left] == [("0", True)]


def test_forward_without_source_is_known_by_what_it_does():
    text = "class MyNorm(nn.LayerNorm):\n    def forward(self, x):\n        return {}\n"
    reports = []
    for result in ("super().forward(x)", "x"):
        scope = {"nn": nn}
        exec(text.format(result), scope)
        net = nn.Sequential(scope["MyNorm"](C), nn.LayerNorm(C))
        reports.append(reeltime.accelerate(net, None, None, "fused"))
    assert [len(report.left) for report in reports] == [0, 1]


def test_probes_leave_no_trace():
    """Nor does what happens around them change what they find."""
    module = WideRMSNorm(C).requires_grad_()
    module.register_forward_hook(lambda *args: pytest.fail("a hook ran"))
    state, before = torch.get_rng_state(), {**vars(module)}
    found = []
    for around in (torch.no_grad(), FakeTensorMode(), torch.device("meta"),
                   torch.autocast("cpu", torch.bfloat16)):  # fmt: skip
        known_norms._known.cache_clear()
        with around:
            found.append(known_norms.known(module))
    assert found == [known_norms.Norm("rms", "product", dense=True)] * 4
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(module) == before
    assert not any(torch.is_autocast_enabled(device) for device in ("cpu", "xpu"))


def test_encoder_layer_stays():
    layer = nn.TransformerEncoderLayer(C, 2, 32, batch_first=True)
    report = reeltime.accelerate(nn.Sequential(layer, nn.LayerNorm(C)), None, None, "fused")
    assert [path for path, *_ in report.left] == ["0.norm1", "0.norm2"]
    assert "reads its weight" in report.left[0].why
    assert type(layer.norm1) is nn.LayerNorm


def test_skip_and_second_time():
    net = nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(C))
    report = reeltime.accelerate(net, None, None, "fused", skip=["0"])
    assert report.left == [("0", "norm", "skip: 0")]
    with pytest.raises(ValueError, match="fused already"):
        reeltime.accelerate(net, None, None, "fused", skip=["0"])


def test_backend_that_cannot_serve_is_refused():
    with pytest.raises(UnsupportedArchError):
        reeltime.accelerate(nn.Sequential(nn.LayerNorm(C)), None, None, backend="cuda")


@pytest.mark.parametrize(
    "call, what",
    [
        (lambda norm: norm(input=normal(2, 5, C)), "called with keywords"),
        (lambda norm: norm(normal(C)), "x has no rows"),
        (lambda norm: norm(normal(2, 0, C)), "x has no rows"),
        (lambda norm: norm(normal(2, 5, C).requires_grad_()), "a gradient is wanted"),
    ],
)
def test_call_that_is_left(call, what):
    old, new, report = pair(filled(nn.LayerNorm(C)))
    old.requires_grad_(False)
    new.requires_grad_(False)
    assert torch.equal(call(new), call(old))
    assert report.calls()["0"] == {f"left: {what}": 1}


@pytest.mark.parametrize("name", ["layer", "layer, plain", "rms, plain"])
def test_error_of_a_wrong_width_is_pytorchs(name):
    _, new, report = pair(NORMS[name]())
    with pytest.raises(RuntimeError, match="normalized_shape"), torch.no_grad():
        new(normal(2, 5, C + 1))
    assert report.calls()["0"] == {"left: x has another width": 1}


def test_weight_that_is_broadcast_is_pytorchs():
    old, new, report = pair(filled(WideRMSNorm(1)))
    with torch.no_grad():
        assert torch.equal(new(normal(2, 5, C)), old(normal(2, 5, C)))
    assert report.calls()["0"] == {"left: x has another width": 1}


def test_reference_is_no_kernel_of_a_gpu():
    x = torch.empty(0, 0, C, dtype=torch.float64)
    args = (x, "layer", None, None, None, None, 1.0)
    assert no_kernel(NORM, "auto", "reference", torch.device("mps"), args) == "no kernel for mps"
    assert no_kernel(NORM, "auto", "reference", torch.device("cpu"), args) is None
    assert no_kernel(NORM, "reference", "reference", torch.device("mps"), args) is None
    if any(row.runs_on(torch.device("cuda")) for row in TABLE if row.backend == "triton"):
        why = no_kernel(NORM, "auto", "reference", torch.device("cuda"), args)
        assert "float64" in why


def test_tangent_is_pytorchs():
    old, new, report = pair(filled(nn.RMSNorm(C)))
    given = (normal(2, 5, C),), (normal(2, 5, C, seed=1),)
    with torch.no_grad():
        assert all(map(torch.equal, torch.func.jvp(new, *given), torch.func.jvp(old, *given)))
    assert report.calls()["0"] == {"left: a tangent is wanted": 1}


def test_gradient_of_a_weight_is_pytorchs():
    old, new, report = pair(filled(nn.RMSNorm(C)))
    for one in (old, new):
        one(normal(2, 5, C)).square().sum().backward()
    assert torch.equal(old.weight.grad, new.weight.grad)
    assert report.calls()["0"] == {"left: a gradient is wanted": 1}


# --- The op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_is_a_good_citizen(dtype):
    """Schema, fake tensors: shapes, dtypes and strides of results, for views as well."""
    x, w, row = normal(2, 6, C), normal(C, seed=1), normal(2, 3, C, seed=2)
    for one in (x, x.mT.contiguous().mT, x.bfloat16(), normal(4, C), normal(2, 3, 2, C)[:, ::2]):
        tests = ("test_schema", "test_faketensor")
        args = (w, w, None, None, "layer", 1e-6, dtype, "auto", 0)
        torch.library.opcheck(_OP, (one, *args), test_utils=tests)
    args = (None, None, row, row[:, :1], "rms", 1e-6, dtype, "auto", 0)
    torch.library.opcheck(_OP, (x, *args), test_utils=tests)


def test_state_moves_and_undo():
    net = nn.Sequential(filled(nn.LayerNorm(C)), filled(WideRMSNorm(C)))
    state = {name: x.clone() for name, x in net.state_dict().items()}
    keep = [id(one) for one in net.parameters()]
    with torch.no_grad():
        want = net(normal(2, 5, C))
        with reeltime.accelerate(net, None, None, "fused"):
            assert net.state_dict().keys() == state.keys()
            net.load_state_dict(state)
            assert net.to(torch.bfloat16)(normal(2, 5, C).bfloat16()).dtype == torch.bfloat16
            net.float().load_state_dict(state)
        assert [type(one) for one in net] == [nn.LayerNorm, WideRMSNorm]
        assert [id(one) for one in net.parameters()] == keep
        assert all("reeltime_norm" not in vars(one) for one in net)
        assert torch.equal(net(normal(2, 5, C)), want)


def test_a_graph_counts_where_it_stood():
    """Exported: the op with its options; another backend's counters stay."""
    net = nn.Sequential(filled(nn.LayerNorm(C)))
    x = normal(2, 5, C)
    report = reeltime.accelerate(net, None, None, "fused")
    program = torch.export.export(net, (x,), dynamic_shapes=({1: torch.export.Dim("L", min=2)},))
    nodes = [node for node in program.graph.nodes if "plugin_norm" in str(node.target)]
    assert len(nodes) == 1
    with torch.no_grad():
        want = net(normal(2, 9, C))
        report.reset_calls()
        assert torch.equal(program.module()(normal(2, 9, C)), want)
    assert report.calls()[""] == {"norm: reference": 1}


# --- Models of diffusers ------------------------------------------------------------------------


def wan():
    kind = pytest.importorskip("diffusers").WanTransformer3DModel
    model = kind(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": normal(1, 6, 16, seed=1),
    }


def flux():
    kind = pytest.importorskip("diffusers").FluxTransformer2DModel
    model = kind(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 4),
        "encoder_hidden_states": normal(1, 6, 32, seed=1),
        "pooled_projections": normal(1, 32, seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def ltx():
    kind = pytest.importorskip("diffusers").LTXVideoTransformer3DModel
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 4),
        "encoder_hidden_states": normal(1, 6, 16, seed=1),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": torch.ones(1, 6),
        "num_frames": 2, "height": 2, "width": 4,
    }  # fmt: skip


def cogvideox():
    kind = pytest.importorskip("diffusers").CogVideoXTransformer3DModel
    model = kind(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 2, 4, 8, 8),
        "encoder_hidden_states": normal(1, 6, 16, seed=1),
        "timestep": torch.tensor([5]),
    }


def sd3(dual=()):
    kind = pytest.importorskip("diffusers").SD3Transformer2DModel
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=dual,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8),
        "encoder_hidden_states": normal(1, 6, 16, seed=1),
        "pooled_projections": normal(1, 16, seed=2),
        "timestep": torch.tensor([5]),
    }


def hunyuan():
    kind = pytest.importorskip("diffusers").HunyuanVideoTransformer3DModel
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 4, 4),
        "encoder_hidden_states": normal(1, 6, 16, seed=1),
        "encoder_attention_mask": torch.ones(1, 6),
        "pooled_projections": normal(1, 8, seed=2),
        "timestep": torch.tensor([5]),
        "guidance": torch.tensor([6.0]),
    }


class TableBlock(nn.Module):
    """Rows of a table added to those of a timestep, as in Wan2.1, and frame by frame, as in
    Self-Forcing (arXiv 2506.08009)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (WideLayerNorm(C, elementwise_affine=False) for _ in range(2))
        self.last, self.inner = WideLayerNorm(C), nn.Linear(C, C)
        self.table = nn.Parameter(normal(1, 6, C))

    def forward(self, x, rows):
        shift, scale, gate, *more = (self.table + rows).split(1, dim=1)
        x = x + gate * self.inner(self.first(x).float() * (1 + scale) + shift)
        x = x + more[2] * self.inner(self.second(x).float() * (1 + more[1]) + more[0])
        shift, scale = shift[:, None], scale[:, None]
        y = self.second(x).unflatten(1, (2, 8)) * (1 + scale) + shift
        return self.last(x + y.flatten(1, 2))


def moved(rows, by, stretch):
    return rows * (1 + stretch[:, None]) + by[:, None]


class VectorBlock(nn.Module):
    """Vectors from a layer, put in by a function, as in DiT (arXiv 2212.09748)."""

    def __init__(self):
        super().__init__()
        self.norm_a, self.norm_b = (nn.LayerNorm(C, 1e-6, False) for _ in range(2))
        self.a, self.b, self.vectors = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 4 * C)

    def forward(self, x, c):
        by_a, stretch_a, by_b, stretch_b = self.vectors(c).tensor_split(4, -1)
        x = x + self.a(moved(self.norm_a(x), by_a, stretch_a))
        return x + self.b(moved(self.norm_b(x), by_b, stretch_b))


@pytest.mark.parametrize(
    "block, c, calls",
    [(TableBlock, (2, 6, C), 3), (VectorBlock, (2, C), 2)],
    ids=["table", "vectors"],
)
def test_block_of_its_own(block, c, calls):
    torch.manual_seed(0)
    old = nn.ModuleDict({"block": block().eval()})
    new = copy.deepcopy(old)
    report = reeltime.accelerate(new, None, None, "fused")
    x, c = normal(2, 16, C), normal(*c, seed=1)
    with torch.no_grad():
        got, want = new["block"](x, c), old["block"](x, c)
    assert report.calls()["block"] == {"reference": calls}
    assert report.left == []
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# Per model: norms that ran, modulations that ran, places left
MODELS = {
    "wan": (wan, 10, 5, 0),
    "flux": (flux, 6, 6, 0),
    "ltx": (ltx, 8, 5, 0),
    "cogvideox": (cogvideox, 5, 9, 0),
    "sd3": (sd3, 8, 8, 0),
    "sd3.5": (lambda: sd3((0,)), 11, 7, 1),
    "hunyuan": (hunyuan, 8, 6, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_of_diffusers(name):
    make, norms, modulations, left = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    classes = [type(one) for one in model.modules()]
    with torch.no_grad():
        want = model(**inputs)[0]
        report = reeltime.accelerate(model, None, None, "fused", skip=[])
        got = model(**inputs)[0]
        error = accuracy(got, want)
        assert error.relative_l1 < 1e-6, error
        calls = report.calls()
        root = calls.pop("", {})
        owners = {one.path for one in report.changes if one.what.startswith("modulation")}
        ran = {path: one["reference"] for path, one in calls.items() if one}
        assert (
            sum(n for path, n in ran.items() if path in owners) + root.get("norm: reference", 0)
            == modulations
        )
        assert sum(n for path, n in ran.items() if path not in owners) == norms
        assert len(report.left) == left, report.left
        assert not any(what.startswith("left") for one in calls.values() for what in one)
        report.undo()
        assert [type(one) for one in model.modules()] == classes
        assert torch.equal(model(**inputs)[0], want)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_model_in_bfloat16_is_as_near_as_before(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name][0]()
    exact = copy.deepcopy(model).double().eval()
    model.to(torch.bfloat16).eval()

    def cast(dtype):
        return {
            key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in inputs.items()
        }

    with torch.no_grad():
        try:
            truth = exact(**cast(torch.float64))[0]
        except RuntimeError:  # a model that casts to float32 by itself
            truth = exact.float()(**inputs)[0]
        want = model(**cast(torch.bfloat16))[0]
        report = reeltime.accelerate(model, None, None, "fused", skip=[])
        got = model(**cast(torch.bfloat16))[0]
    assert got.dtype == want.dtype
    assert report.calls()["norm_out"] is not None
    assert accuracy(got, truth).relative_l1 < 1.1 * accuracy(want, truth).relative_l1


def test_model_compiled_before_and_after():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = ltx()
    inputs["return_dict"] = False
    with torch.no_grad():
        early = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
        early(**inputs)
        report = reeltime.accelerate(model, None, None, "fused", skip=[])
        want = model(**inputs)[0]
        report.reset_calls()
        assert torch.equal(early(**inputs)[0], want)
        assert report.calls()[""] == {"norm: reference": 13}
        torch._dynamo.reset()
        late = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(late(**inputs)[0], want)
        assert report.calls()[""] == {"norm: reference": 26}
        program = torch.export.export(model, (), inputs)
        nodes = [node for node in program.graph.nodes if "plugin_norm" in str(node.target)]
        assert len(nodes) == 13
        assert torch.equal(program.module()(**inputs)[0], want)
