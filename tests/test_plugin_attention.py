# SPDX-License-Identifier: Apache-2.0
"""Attention of any model: which modules, what a call gives, what runs instead, how it counts."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

from reeltime import backends, checks, sla
from reeltime.arch import UnsupportedArchError
from reeltime.attention import TOLERANCE
from reeltime.checks import Tolerance
from reeltime.plugins import accelerate, attention
from reeltime.plugins.changes import Left
from reeltime.plugins.sdpa import make, using

# Values in FP16 beside q and k that are not rounded: P and V lose 2^-12 each.  So small an error
# shows what the masks and scales mean, where 8 bits would hide a key too many.
FINE = {"qk": None, "pv": "fp16"}
CLOSE = Tolerance(1e-3, 1e-2)


def inputs(*sizes, dtype=torch.float32, seed=0):
    """q, k, v of shapes `sizes`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def qkv(batch=2, heads=4, queries=70, keys=70, dim=16, kv_heads=None, values=None, **options):
    kv = (batch, kv_heads or heads, keys)
    return inputs((batch, heads, queries, dim), (*kv, dim), (*kv, values or dim), **options)


def exact(*tensors, **options):
    """PyTorch's function in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    return F.scaled_dot_product_attention(*wide, attn_mask=mask, **options)


BOOL = torch.rand(70, 90, generator=torch.Generator().manual_seed(3)) < 0.7
ADDED = torch.randn(2, 1, 70, 90, generator=torch.Generator().manual_seed(4))
DEAD = torch.ones(70, 90, dtype=torch.bool).index_fill(0, torch.tensor([5]), False)
CALLS = {
    "plain": (qkv(), {}),
    "scale": (qkv(), {"scale": 0.7}),
    "cross": (qkv(keys=90), {}),
    "bool mask": (qkv(keys=90), {"attn_mask": BOOL}),
    "mask per key": (qkv(keys=90), {"attn_mask": BOOL[:1]}),
    "added mask": (qkv(keys=90), {"attn_mask": ADDED}),
    "-inf in a mask": (qkv(keys=90), {"attn_mask": ADDED.masked_fill(~BOOL, -torch.inf)}),
    "a row that sees nothing": (qkv(keys=90), {"attn_mask": DEAD}),
    "causal": (qkv(), {"is_causal": True}),
    "causal, keys left": (qkv(keys=90), {"is_causal": True}),
    "causal, queries left": (qkv(queries=90), {"is_causal": True}),
    "grouped heads": (qkv(kv_heads=2), {"enable_gqa": True}),
    "values of another size": (qkv(values=24), {}),
    "3 dimensions": (inputs((5, 70, 16), (5, 90, 16), (5, 90, 16)), {}),
    "3 dimensions, masked": (
        inputs((2, 70, 16), (2, 90, 16), (2, 90, 16)),
        {"attn_mask": ADDED[:, 0]},
    ),
    "token-major": ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()], {}),
    "channels first": ([x.mT.contiguous().mT for x in qkv()], {}),
    "one token": (qkv(queries=1, keys=1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_means_what_it_means_to_pytorch(name):
    tensors, options = CALLS[name]
    ours = make(**FINE)
    got, want = ours(*tensors, **options), exact(*tensors, **options)
    assert got.shape == want.shape
    assert got.dtype == tensors[0].dtype
    assert CLOSE.accepts(checks.accuracy(got, want))
    assert dict(ours.calls) == {"reference": 1}


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formats_are_within_their_tolerance(format, dtype):
    tensors = qkv(queries=130, keys=130, dim=64, dtype=dtype)
    qk, pv = attention.FORMATS[format]
    ours = make(qk, pv)
    error = checks.accuracy(ours(*tensors), exact(*tensors))
    assert TOLERANCE["fp8" if pv == "fp8" else "int8"].accepts(error)
    assert error.relative_l1 > 1e-3  # 8 bits ran, not PyTorch's own code


KERNEL_CALLS = {
    "plain": (qkv(queries=40), {}, None),
    "added mask": (qkv(keys=90), {"attn_mask": ADDED}, None),
    "causal, grouped heads": (qkv(kv_heads=2), {"is_causal": True, "enable_gqa": True}, None),
    "3 dimensions": (inputs((5, 70, 16), (5, 90, 16), (5, 90, 16)), {}, None),
    "sparse": (qkv(batch=1, heads=2, queries=130, keys=130), {}, 0.7),
}


@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_kernels_agree_with_the_reference(name, device):
    """Tensors as models have them, heads before tokens; the layout of results is the same."""
    pytest.importorskip("triton")
    tensors, options, keep = KERNEL_CALLS[name]
    want = make(keep=keep, backend="reference")(*tensors, **options)
    ours = make(keep=keep, backend="triton")
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    got = ours(*(x.to(device) for x in tensors), **options)
    assert got.stride() == want.stride()
    assert TOLERANCE["int8"].accepts(checks.accuracy(got.cpu(), want))
    assert dict(ours.calls) == {"triton, sparse" if keep else "triton": 1}


def test_kernels_get_dense_channels():
    tensors, _ = CALLS["channels first"]
    options = (None, None, False, "int8", "fp16", None)
    _, _, args = attention.choose(*tensors, *options, "auto")
    assert [x.stride(-1) for x in args[:3]] == [1, 1, 1]


# --- What is PyTorch's --------------------------------------------------------------------------

Q, K, V = qkv()
LEFT = {
    "5 dimensions": ([x.unsqueeze(0) for x in (Q, K, V)], {}, "5, 5 and 5 dimensions"),
    "2 dimensions": ([x[0, 0] for x in (Q, K, V)], {}, "2, 2 and 2 dimensions"),
    "a batch that broadcasts": ([Q[:1], K, V], {}, "sizes of q and k that differ"),
    "a head that broadcasts": ([Q, K[:, :1], V[:, :1]], {}, "sizes of q and k that differ"),
    "no keys": ([Q, K[:, :, :0], V[:, :, :0]], {}, "empty"),
    "a negative scale": ([Q, K, V], {"scale": -1.0}, "scale -1.0"),
    "a mask and causal": (
        [Q, K, V],
        {"attn_mask": BOOL[:, :70], "is_causal": True},
        "a mask and is_causal",
    ),
    "dropout": ([Q, K, V], {"dropout_p": 0.5}, "dropout"),
}
WRONG = {
    "dtypes": ([Q, K.half(), V], {}),
    "head dimensions": ([Q, K[..., :-1], V], {}),
    "integers": ([Q.int(), K.int(), V.int()], {}),
    "a mask that broadcasts the queries": ([Q[:, :, :1], K, V], {"attn_mask": ADDED[..., :70]}),
    "a mask of integers": ([Q, K, V], {"attn_mask": BOOL[:, :70].int()}),
    "a mask of another size": ([Q, K, V], {"attn_mask": BOOL}),
    "grouped heads by chance": ([Q, K[:, :3], V[:, :3]], {"enable_gqa": True}),
    "no tensors": ([Q.tolist(), K, V], {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_calls_are_left_to_pytorch_and_counted(name):
    tensors, options, why = LEFT[name]
    ours = make()
    torch.manual_seed(0)
    got = ours(*tensors, **options)
    torch.manual_seed(0)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors, **options))
    assert dict(ours.calls) == {f"left: {why}": 1}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_pytorchs(name):
    tensors, options = WRONG[name]
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises(theirs.type) as ours:
        make()(*tensors, **options)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_a_gradient_is_pytorchs():
    ours = make()
    tensors = [x.clone().requires_grad_() for x in (Q, K, V)]
    got = torch.autograd.grad(ours(*tensors).square().sum(), tensors)
    want = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).square().sum(), tensors)
    assert all(map(torch.equal, got, want))
    with torch.no_grad():
        ours(*tensors)
    assert dict(ours.calls) == {"left: a gradient is wanted": 1, "reference": 1}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_tangent_is_pytorchs(grad):
    ours, tensors, directions = make(), tuple(qkv()), tuple(qkv(seed=1))
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad):
        want = torch.func.jvp(F.scaled_dot_product_attention, tensors, directions)
        got = torch.func.jvp(ours, tensors, directions)
    assert all(map(torch.equal, got, want))
    assert dict(ours.calls) == {"left: a tangent is wanted": 1}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_pytorchs(layout):
    """Jagged ones listen to the function's name."""
    ours = make()
    if layout is torch.jagged:
        x = torch.nested.nested_tensor(inputs((3, 4, 16), (67, 4, 16)), layout=layout)
        x = x.transpose(1, 2)
    else:
        x = torch.nested.nested_tensor(inputs((4, 3, 16), (4, 67, 16)))
    got, want = ours(x, x, x), F.scaled_dot_product_attention(x, x, x)
    assert all(map(torch.equal, got.unbind(), want.unbind()))
    assert dict(ours.calls) == {"left: a nested tensor": 1}


def test_vmap():
    ours = make(**FINE)
    got = torch.vmap(ours)(Q[:, None], K[:, None], V[:, None])
    torch.testing.assert_close(got.squeeze(1), ours(Q, K, V))


def test_a_mask_that_learns_is_pytorchs():
    ours = make()
    bias = torch.zeros(70, 70, requires_grad=True)
    assert ours(Q, K, V, attn_mask=bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_casts_as_pytorchs(dtype):
    tensors = [x.to(dtype) for x in (Q, K, V)]
    mask = ADDED[:, :, :, :70].to(dtype)
    ours = make(**FINE)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(*tensors, attn_mask=mask)
        want = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert got.dtype == want.dtype
    cast = [x.to(want.dtype) for x in (*tensors, mask)]
    assert torch.equal(got, ours(*cast[:3], attn_mask=cast[3]))  # autocast reaches no further
    assert set(ours.calls) == {"reference"}


@pytest.mark.parametrize(
    "table, dtype, why",
    [
        ((), torch.float16, "no kernel for cuda"),
        (("triton",), torch.float64, "float64"),
    ],
)
def test_on_a_gpu_the_reference_is_no_kernel(monkeypatch, table, dtype, why):
    pytest.importorskip("triton")
    rows = [r for r in backends.TABLE if r.backend in ("reference", *table)]
    monkeypatch.setattr(backends, "TABLE", tuple(rows))
    with FakeTensorMode():
        x = torch.empty(1, 4, 64, 64, dtype=dtype, device="cuda")
        options = (None, None, False, "int8", "fp16", None)
        assert why in attention.choose(x, x, x, *options, "auto")
        op, name, _ = attention.choose(x, x, x, *options, "reference")
        assert (op, name) == (attention.ATTENTION, "reference")


def test_a_backend_that_cannot_serve_raises():
    with pytest.raises(UnsupportedArchError, match="backend"):
        make(backend="cuda")(Q, K, V)


# --- The op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALLS, *LEFT])
def test_fake_results_have_the_strides_of_real_ones(name):
    tensors, options, *_ = (CALLS | LEFT)[name]
    options = {n: x for n, x in options.items() if n != "dropout_p"}
    ours = make()
    with torch.inference_mode():
        got = ours(*tensors, **options)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        mask = options.get("attn_mask")
        fake = {**options, "attn_mask": None if mask is None else mode.from_tensor(mask)}
        want = ours(*fakes, **fake)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    both = zip(got.shape, got.stride(), want.stride(), strict=True)
    assert all(one == other for size, one, other in both if size > 1)


def test_opcheck():
    rest = (None, False, False, "int8", "fp8", None, "auto", 0)
    for mask in (None, BOOL[:, :70]):
        torch.library.opcheck(torch.ops.reeltime.plugin_attention, (Q, K, V, mask, *rest))


# --- Sparse -------------------------------------------------------------------------------------


def test_self_attention_is_sparse_and_the_rest_dense():
    q, k, v = qkv(batch=1, heads=2, queries=400, keys=400)
    ours = make(keep=0.3)
    got = ours(q, k, v)
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    pooled = [sla.pool(x, block=size)[0] for x, size in ((rows[0], 128), (rows[1], 64))]
    lists = sla.block_mask(*pooled, topk=0.3)
    want = sla.sparse_attention(*rows, lists, qk="int8", pv="fp16").transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    ours(q[:, :, :300], k, v)
    ours(q, k, v, is_causal=True)
    ours(q, k, v, attn_mask=torch.ones(400, 400, dtype=torch.bool))
    ours(*(x[:, :, :192] for x in (q, k, v)))  # three blocks: 0.3 of them is none
    assert dict(ours.calls) == {"reference, sparse": 1, "reference": 4}


def test_sparse_attention_keeps_the_blocks_that_matter():
    """Queries that look for one block of keys, and the same answer without the others."""
    q, k, v = qkv(batch=1, heads=2, queries=640, keys=640)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(9))
    q = 0.1 * q + direction
    k[:, :, 128:192] += 8 * direction / direction.norm()
    ours = make(qk=None, pv=None, keep=0.1)
    got = ours(q, k, v)
    assert TOLERANCE["bfloat16"].accepts(checks.accuracy(got, exact(q, k, v)))
    assert dict(ours.calls) == {"reference, sparse": 1}
    ours(q[:, :, :64], k, v)
    assert ours.calls["left: dense"] == 1


# --- Which modules ------------------------------------------------------------------------------


def project(module, x):
    return module.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)


def merge(y):
    return y.transpose(1, 2).flatten(2)


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        return merge(F.scaled_dot_product_attention(*project(self, x)))


class Aliased(Direct):
    def forward(self, x):
        return merge(attend(*project(self, x)))


class Inherited(Direct):
    def forward(self, x):
        return 2 * super().forward(x)


def attended(q, k, v):
    return merge(functional.scaled_dot_product_attention(q, k, v))


class Helped(Direct):
    def forward(self, x):
        return attended(*project(self, x))


class Method(Direct):
    def forward(self, x):
        return self.inner(*project(self, x))

    @staticmethod
    def inner(q, k, v):
        return attended(q, k, v)


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 2 * function(self, x)

    return wrapper


class Decorated(Direct):
    @doubled
    def forward(self, x):
        return attended(*project(self, x))


class Processor:
    scale = 1.0

    def __call__(self, module, x):
        def inner(q, k, v):
            return F.scaled_dot_product_attention(q, k, v) * self.scale

        return merge(inner(*project(module, x)))


class Double(Processor):
    scale = 2.0


class Processed(Direct):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


class Other(nn.Module):
    """No attention: its own matrix products."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = project(self, x)
        return merge((q @ k.mT).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, kind=Direct):
        super().__init__()
        self.attn, self.out = kind(), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.out(self.attn(x))


class Model(nn.Module):
    def __init__(self, kind=Direct, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Holder(Direct):
    """Calls it, and holds one that calls it."""

    def __init__(self):
        super().__init__()
        self.attn = Direct()

    def forward(self, x):
        return merge(attend(*project(self, self.attn(x))))


def model_of(kind=Direct, blocks=2):
    torch.manual_seed(0)
    return Model(kind, blocks).eval().requires_grad_(False)


X = inputs((2, 40, 32))[0]


def accelerated(model, **options):
    return accelerate(model, linear=None, norm=None, **options)


KINDS = [Direct, Aliased, Inherited, Helped, Method, Decorated, Processed, Holder]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_modules_are_found_by_their_code(kind):
    model = model_of(kind, blocks=1)
    want = model(X)
    report = accelerated(model)
    got = model(X)
    places = ["blocks.0.attn", "blocks.0.attn.attn"][: 1 + (kind is Holder)]
    assert report.calls() == {path: {"reference": 1} for path in places}
    assert report.left == []
    error = checks.accuracy(got, want)
    assert 0 < error.relative_l1 < TOLERANCE["int8"].relative_l1
    report.undo()
    assert torch.equal(model(X), want)


@pytest.mark.parametrize("format, keep", [("int8", None), ("fp8", None), (None, 0.5), ("fp8", 0.5)])
def test_the_format_and_the_share_that_were_asked_for_run(format, keep):
    model, x = model_of(), inputs((1, 130, 32))[0]
    formats = attention.FORMATS[format] if format else (None, None)
    with using(make(*formats, keep=keep)):
        want = model(x)
    with accelerated(model, attention=format, sla=keep) as report:
        assert torch.equal(model(x), want)
        ran = "reference, sparse" if keep else "reference"
        assert report.calls() == {f"blocks.{i}.attn": {ran: 1} for i in range(2)}
        what = f"Direct, {format or '16 bits'}" + (f", sla {keep}" if keep else "")
        assert {change.what for change in report.changes} == {what}


def test_a_share_of_all_keeps_all():
    model, x = model_of(), inputs((1, 200, 32))[0]
    want = model(x)
    with torch.inference_mode(), accelerated(model, attention=None, sla=1):
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def lefts(model, **options):
    """What stays of the model, and why."""
    with accelerate(model, linear="int8", norm=None, **options) as report:
        return {left.path: left.why for left in report.left if left.kind == "attention"}


def test_a_model_without_attention_is_said_once():
    assert lefts(model_of(Other)) == {"": "no call of scaled_dot_product_attention was found"}


def test_multihead_attention_stays():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, batch_first=True), 2)
    model = nn.ModuleList([model, nn.Linear(32, 32)])
    found = lefts(model)
    assert list(found) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
    assert "reads its weights" in found["0.layers.0.self_attn"]


def test_what_is_skipped_replaced_or_accelerated_stays():
    model = model_of(blocks=3)
    hooked = model.blocks[1].attn
    hooked.forward = functools.partial(type(hooked).forward, hooked)
    with accelerated(model, skip=["blocks.0.*"]) as report:
        assert report.left == [
            Left("blocks.0.attn", "attention", "skip: blocks.0.*"),
            Left(
                "blocks.1.attn",
                "attention",
                "its forward was replaced, as offloading does: accelerate first",
            ),
        ]
        assert lefts(model)["blocks.2.attn"] == "accelerated already"
        model(X)
        assert report.calls() == {"blocks.2.attn": {"reference": 1}}


class Generator(Direct):
    def forward(self, x):
        yield super().forward(x)


class Coroutine(Direct):
    async def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Generator, Coroutine])
def test_a_forward_that_runs_later_stays(kind):
    why = lefts(model_of(kind, 1))["blocks.0.attn"]
    assert why.startswith("its forward is a generator or a coroutine")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_passed_over():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(16, 16)))
    assert list(lefts(nn.ModuleList([scripted, nn.Linear(16, 16)]))) == [""]


def test_what_holds_a_skipped_module_stays():
    """Its mode would reach into it."""
    found = lefts(model_of(Holder, 1), skip=["*.attn.attn"])
    assert found["blocks.0.attn"] == "it holds blocks.0.attn.attn, which stays"


def dispatch_attention_fn(q, k, v):
    """By the name of diffusers' dispatcher."""
    return F.scaled_dot_product_attention(q, k, v)


class Dispatched(Processor):
    def __call__(self, module, x):
        return merge(dispatch_attention_fn(*project(module, x)))


@pytest.mark.parametrize(
    "backend, active, runs",
    [(None, "native", None), ("_native_cudnn", "native", None), ("sage", "native", "sage")]
    + [(None, "flash", "flash"), ("native", "flash", None)],
)
def test_what_runs_another_backend_of_diffusers_stays(monkeypatch, backend, active, runs):
    registry = types.SimpleNamespace(_active_backend=types.SimpleNamespace(value=active))
    dispatch = types.SimpleNamespace(_AttentionBackendRegistry=registry)
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", dispatch)
    model = model_of(Processed, 1)
    model.blocks[0].attn.processor = Dispatched()
    model.blocks[0].attn.processor._attention_backend = backend
    why = f"it runs diffusers' {runs!r}: reset_attention_backend() first"
    assert lefts(model) == ({} if runs is None else {"blocks.0.attn": why})


def test_a_cpu_backend_that_is_not_there_changes_nothing():
    model = model_of()
    with pytest.raises(UnsupportedArchError):
        accelerated(model, backend="cuda")
    assert all(type(block.attn) is Direct for block in model.blocks)


# --- Where it reaches ---------------------------------------------------------------------------


def test_calls_outside_are_untouched():
    model, other = model_of(), model_of()
    want, call = model(X), F.scaled_dot_product_attention(Q, K, V)
    with accelerated(model) as report:
        assert torch.equal(other(X), want)
        assert torch.equal(F.scaled_dot_product_attention(Q, K, V), call)
        assert report.calls() == {f"blocks.{i}.attn": {} for i in range(2)}
        model(X)
        assert report.calls() == {f"blocks.{i}.attn": {"reference": 1} for i in range(2)}


def test_a_processor_set_later_is_served():
    model = model_of(Processed, 1)
    with accelerated(model) as report:
        once = model.blocks[0].attn(X)
        model.blocks[0].attn.processor = Double()
        torch.testing.assert_close(model.blocks[0].attn(X), 2 * once)
        assert report.calls() == {"blocks.0.attn": {"reference": 2}}


def test_a_call_that_is_left_in_a_nested_module_counts_once():
    model = model_of(Holder, 1)
    x = X.clone().requires_grad_()
    with accelerated(model) as report:
        model(x).sum().backward()
        counts = report.calls()
        assert counts["blocks.0.attn"] == counts["blocks.0.attn.attn"]
        assert counts["blocks.0.attn"] == {"left: a gradient is wanted": 1}


def test_threads_see_their_own_model():
    ours, theirs = model_of(blocks=4), model_of(blocks=4)
    want = theirs(X)
    with accelerated(ours) as report:
        alone = ours(X)
        report.reset_calls()
        start = threading.Barrier(2)
        results = {}

        def run(name, model):
            start.wait()
            results[name] = [model(X) for _ in range(25)]

        threads = [threading.Thread(target=run, args=pair) for pair in (("a", ours), ("b", theirs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(y, alone) for y in results["a"])
        assert all(torch.equal(y, want) for y in results["b"])
        assert report.calls() == {f"blocks.{i}.attn": {"reference": 25} for i in range(4)}


def test_a_copy_counts_for_itself():
    model = model_of()
    with accelerated(model) as report:
        copy.deepcopy(model)(X)
        assert report.calls() == {f"blocks.{i}.attn": {} for i in range(2)}


def test_a_forward_kept_by_others_is_the_old_one_after_undo():
    """Hooks that offload put a bound forward back on the instance."""
    model = model_of(blocks=1)
    want = model(X)
    with accelerated(model):
        attn = model.blocks[0].attn
        attn.forward = attn.forward
    assert torch.equal(model(X), want)


# --- Compiled and exported ----------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("before", [True, False])
def test_fullgraph_compile(before):
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if before:
        compiled(X)
    with accelerated(compiled) as report:
        want = model(X)
        report.reset_calls()
        torch.testing.assert_close(compiled(X), want)
        compiled(X)
        assert report.calls()[""] == {"attention: reference": 4}


@pytest.mark.usefixtures("fresh_dynamo")
def test_blocks_compiled_one_by_one_share_a_graph():
    model = model_of(blocks=4)
    with accelerated(model) as report, torch._dynamo.config.patch(error_on_recompile=True):
        want = model(X)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(X), want)
        assert report.calls()[""] == {"attention: reference": 4}


@pytest.mark.usefixtures("fresh_dynamo")
def test_dynamic_lengths_compile_once():
    model = model_of(blocks=1)
    with accelerated(model) as report, torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (40, 33, 70):
            compiled(X.repeat(1, 2, 1)[:, :length])
        assert report.calls()[""] == {"attention: reference": 3}


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_gradient_in_a_compiled_graph_is_pytorchs_and_counted():
    model = model_of(blocks=1)
    x = X.clone().requires_grad_()
    want = torch.autograd.grad(model(x).sum(), x)[0]
    with accelerated(model) as report:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], want)
        why = "attention: left: a gradient is wanted, in a compiled graph"
        assert report.calls()[""] == {why: 1}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = model_of().requires_grad_()  # as models are: exporting them is for inference
    with accelerated(model) as report:
        with torch.no_grad():
            want = model(X)
        program = torch.export.export(model, (X,), strict=strict)
        report.reset_calls()
        op = torch.ops.reeltime.plugin_attention.default
        assert sum(node.target is op for node in program.graph.nodes) == 2
        got = program.module()(X)
        torch.testing.assert_close(got, want)
        assert report.calls()[""] == {"attention: reference": 2}
        with pytest.raises(RuntimeError, match="no gradient"):
            got.sum().backward()
