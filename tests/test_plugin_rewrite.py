# SPDX-License-Identifier: Apache-2.0
"""Modulation in the source of a forward: what is recognised, what only looks like it, and undo."""

from __future__ import annotations

import copy
import functools
import importlib.util
import linecache
import traceback

import pytest
import torch
from torch import nn

import reeltime
from reeltime.checks import accuracy

B, S, C = 2, 6, 16


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(rows, by, stretch):
    """A function that modulates, as DiT has one (arXiv 2212.09748)."""
    return rows * (1 + stretch.unsqueeze(1)) + by[:, None]


FACTOR = 0.5


def not_moved(rows, by, stretch):
    return rows * (1 + stretch.unsqueeze(1)) + by[:, None] * FACTOR


class Block(nn.Module):
    affine = True

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(C, eps=1e-6, elementwise_affine=self.affine)
        self.other = nn.RMSNorm(C, eps=1e-6)
        self.linear = nn.Linear(C, C)
        with torch.no_grad():
            if not self.affine:
                return
            self.norm.weight.copy_(normal(C, seed=1))
            self.norm.bias.copy_(normal(C, seed=2))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, s, t):
        for block in self.blocks:
            x = block(x, s, t)
        return x


def pair(kind, dtype=torch.float32):
    """(untouched, accelerated, report), equal in weights."""
    torch.manual_seed(0)
    nets = [Net(kind()).eval().to(dtype) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    return *nets, reeltime.accelerate(nets[1], None, None, "fused", skip=[])


def modulated(report):
    return [change.what for change in report.changes if change.what.startswith("modulation")]


def left(report):
    return [why for path, _, why in report.left if path == "blocks.0"]


def agree(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


# --- What is recognised -------------------------------------------------------------------------


class Expression(Block):
    def forward(self, x, s, t):
        return self.norm(x) * (1 + s) + t


class Reversed(Block):
    def forward(self, x, s, t):
        return self.linear(self.norm(x) * (s + 1.0) + t)


class ScaleOnly(Block):
    def forward(self, x, s, t):
        return self.norm(x) * (1 + s) - t


class Views(Block):
    def forward(self, x, s, t):
        s, t = s[:, 0], t.squeeze(1)
        return self.norm(x) * (1 + s)[:, None, :] + t.unsqueeze(1)


class TwoStatements(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        h = h * (1 + s) + t
        return x + self.linear(h)


class Between(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        k = self.other(x)
        s, t = s * 0.5, t.to(x.dtype)
        k = k * (1 + t) + s
        x = x * 2  # another tensor: h is of the first
        out = h * (1 + s) + t
        return out + k + x


class Widened(Block):
    affine = False  # as PyTorch refuses weights that are not wide

    def forward(self, x, s, t):
        return (self.norm(x.float()) * (1 + s) + t).type_as(x)


class Narrowed(Block):
    affine = False

    def forward(self, x, s, t):
        return (self.norm(x.float()) * (1 + s) + t).to(x.dtype)


class Float(Block):
    def forward(self, x, s, t):
        return self.norm(x).float() * (1 + s) + t


class Frames(Block):
    def forward(self, x, s, t):
        s, t = s.expand(-1, 3, -1)[:, :, None], t.expand(-1, 3, -1)[:, :, None]
        h = self.norm(x).unflatten(dim=1, sizes=(3, 2)) * (1 + s) + t
        return h.flatten(1, 2)


class Function(Block):
    def forward(self, x, s, t):
        return self.linear(moved(self.norm(x), t[:, 0], s[:, 0]))


class FunctionLater(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        return moved(h, t[:, 0], s[:, 0])


class Elsewhere(Block):
    def forward(self, x, s, t):
        return self._inner(x, s, shift=t)

    def _inner(self, x, s, *, shift=None):
        return self.norm(x) * (1 + s) + shift


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x, s, t):
        return self.norm(x) * (1 + s) + t


class Conditional(Block):
    def forward(self, x, s, t):
        return self.norm(x) * (1 + s) + t if x.dim() == 3 else self.norm(x)


class Scoped(Expression):
    __factor = 3.0

    def forward(self, x, s, t):
        x = super().forward(x, s, t)
        return self.__factor * (self.other(x) * (1 + s) + t)


RECOGNISED = {
    Expression: 1, Reversed: 1, ScaleOnly: 1, Views: 1, TwoStatements: 1, Between: 2, Widened: 1,
    Narrowed: 1, Float: 1, Frames: 1, Function: 1, FunctionLater: 1, Elsewhere: 1, Decorated: 1,
    Conditional: 1, Scoped: 1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", RECOGNISED, ids=lambda kind: kind.__name__)
def test_pattern_is_one_call(kind, dtype):
    net, fast, report = pair(kind, dtype)
    args = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(B, S, C), (B, 1, C)])]
    args.append(normal(B, 1, C, seed=9, dtype=dtype))
    with torch.no_grad():
        want, got = net(*args), fast(*args)
        exact = net.double()(*[one.double() for one in args])
    assert report.calls()["blocks.0"] == {"reference": RECOGNISED[kind]}
    assert modulated(report)
    assert not left(report)
    assert got.dtype == want.dtype
    if dtype == torch.float32:
        agree(got, want)
    # No farther from the truth than PyTorch, but for one rounding of the result
    ours, theirs = accuracy(got, exact), accuracy(want, exact)
    assert ours.relative_l1 <= theirs.relative_l1 * 1.05 + 1e-7


def test_dtype_of_a_wide_modulation():
    net, fast, report = pair(Expression, torch.bfloat16)
    x, s, t = normal(B, S, C).bfloat16(), normal(B, 1, C, seed=1), normal(C, seed=2).bfloat16()
    with torch.no_grad():
        assert fast(x, s, t).dtype == net(x, s, t).dtype == torch.float32
        assert fast(x, s.bfloat16(), t.half()).dtype == torch.float32
        assert fast(x, s.bfloat16(), t).dtype == torch.bfloat16


class AnotherType(Block):
    affine = False

    def forward(self, x, s, t):
        return (self.norm(x.float()) * (1 + s) + t).type_as(s)


def test_dtype_of_another_tensor():
    net, fast, report = pair(AnotherType)
    x, s, t = normal(B, S, C).bfloat16(), normal(B, 1, C, seed=1), normal(C, seed=2)
    with torch.no_grad():
        agree(fast(x, s, t), net(x, s, t))
        assert fast(x, s.half(), t).dtype == torch.float16
    assert report.calls()["blocks.0"] == {"reference": 2}


def test_kernel_reads_what_is_broadcast(device):
    """A row for all, per batch, per frame, per token: strides of zero."""
    pytest.importorskip("triton")
    net = Net(Expression()).to(device)
    fast = copy.deepcopy(net)
    report = reeltime.accelerate(fast, None, None, "fused", backend="triton")
    x = normal(B, 3, 2, C).to(device)
    rows = [(C,), (B, 1, 1, C), (1, 3, 1, C), (B, 3, 2, C)]
    with torch.no_grad():
        for s, t in zip(rows, [*rows[1:], rows[0]], strict=True):
            args = x, normal(*s, seed=1).to(device), normal(*t, seed=2).to(device)
            torch.testing.assert_close(fast(*args), net(*args), rtol=1e-5, atol=1e-5)
    assert report.calls()["blocks.0"] == {"triton": 4}


@pytest.mark.parametrize(
    "x, s, t",
    [
        ((B, S, C), (C,), (B, S, C)),
        ((B, S, C), (1, 1, C), (S, C)),
        ((B, S, C), (B, 1, C), (1, S, C)),
        ((S, C), (C,), (S, C)),
        ((S, C), (1, C), (1, C)),
        ((B, 3, 2, C), (B, 3, 1, C), (C,)),
        ((B, 3, 2, C), (1, 3, 1, C), (B, 1, 1, C)),
        ((B, 3, 2, C), (3, 2, C), (B, 3, 2, C)),
    ],
)
def test_shapes_that_are_broadcast(x, s, t):
    net, fast, report = pair(Expression)
    args = [normal(*shape, seed=i) for i, shape in enumerate((x, s, t))]
    with torch.no_grad():
        agree(fast(*args), net(*args))
        transposed = [args[0].mT.contiguous().mT, *args[1:]]
        agree(fast(*transposed), net(*args))
    assert report.calls()["blocks.0"] == {"reference": 2}


@pytest.mark.parametrize(
    "x, s, t",
    [
        ((B, 3, 2, C), (2, C), (C,)),  # a row per token of a frame, the same in all frames
        ((B, 3, 2, C), (C,), (B, 1, 2, C)),
        ((1, S, C), (B, 1, C), (C,)),  # makes x larger
        ((S, C), (1, S, C), (C,)),
        ((2, B, 3, 2, C), (C,), (C,)),
        ((B, S, C), (B, S, 1), (C,)),
        ((0, S, C), (C,), (C,)),
    ],
)
def test_shapes_that_are_left(x, s, t):
    net, fast, report = pair(Expression)
    args = [normal(*shape, seed=i) for i, shape in enumerate((x, s, t))]
    with torch.no_grad():
        assert torch.equal(fast(*args), net(*args))
    (what,) = report.calls()["blocks.0"]
    assert what.startswith("left: ")


# --- What only looks like it --------------------------------------------------------------------


class NoOne(Block):
    def forward(self, x, s, t):
        return self.norm(x) * s + t


class Two(Block):
    def forward(self, x, s, t):
        return self.norm(x) * (2 + s) + t


class Minus(Block):
    def forward(self, x, s, t):
        return self.norm(x) * (1 - s) + t


class Boolean(Block):
    def forward(self, x, s, t):
        return self.norm(x) * (True + s) + t


class Reused(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        out = h * (1 + s) + t
        return out + h


class ReusedInside(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        h = h * (1 + s) + t + h
        return h


class ReusedAsShift(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        h = h * (1 + s) + h
        return h


class ReusedAsType(Block):
    def forward(self, x, s, t):
        h = self.norm(x).float()
        h = (h * (1 + s) + t).type_as(h)
        return h


class Captured(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        late = (h * one for one in (1.0, 2.0))
        h = h * (1 + s) + t
        return h + sum(late)


class Reassigned(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        h = self.linear(h)
        h = h * (1 + s) + t
        return h


class InPlace(Block):
    def forward(self, x, s, t):
        x = x.clone()
        h = self.norm(x)
        x += 1
        h = h * (1 + s) + t
        return h + x


class InPlaceCall(Block):
    def forward(self, x, s, t):
        x = x.clone()
        h = self.norm(x)
        torch.relu_(x)
        h = h * (1 + s) + t
        return h + x


class InPlaceMethod(Block):
    def forward(self, x, s, t):
        x = x.clone()
        h = self.norm(x)
        y = x.mul_(2)
        h = h * (1 + s) + t
        return h + y


class InPlaceScale(Block):
    def forward(self, x, s, t):
        x = x.clone()
        return self.norm(x) * (1 + x.mul_(2)) + t


class Augmented(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        h *= 1 + s
        h += t
        return h


class ConditionalNorm(Block):
    def forward(self, x, s, t):
        return (self.norm(x) if x.dim() == 3 else x) * (1 + s) + t


class Branches(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        if x.dim() == 3:
            h = h * (1 + s) + t
        return h


class Guarded(Block):
    def forward(self, x, s, t):
        h = x
        try:
            h = self.norm(x)
            s = s.view(B, 2, C)
            h = h * (1 + s) + t
        except RuntimeError:
            h = h + t
        return h


class AnotherSelf(Block):
    def forward(self, x, s, t):
        self = Other()
        return self.norm(x) * (1 + s) + t


class Other:
    def norm(self, x):
        return x * 3


class AnotherFunction(Block):
    def forward(self, x, s, t):
        return not_moved(self.norm(x), t[:, 0], s[:, 0])


class ArgumentInPlace(Block):
    def forward(self, x, s, t):
        x = x.clone()
        return moved(self.norm(x), x.mul_(2)[:, 0], s[:, 0])


class Shadowed(Block):
    def forward(self, x, s, t):
        moved = not_moved
        return moved(self.norm(x), t[:, 0], s[:, 0])


class Nested(Block):
    def forward(self, x, s, t):
        def inner(self):
            return self.norm(x) * (1 + s) + t

        return inner(Other()) + self.norm(x)


class Keywords(Block):
    def forward(self, x, s, t):
        return self.norm(input=x) * (1 + s) + t


class Names(Block):
    def forward(self, x, s, t):
        h = self.norm(x)
        out = h * (1 + s) + t
        return out + locals()["h"]


def doubled(function):
    @functools.wraps(function)
    def inner(*args):
        return 2 * function(*args)

    return inner


class Doubled(Block):
    @doubled
    def forward(self, x, s, t):
        return self.norm(x) * (1 + s) + t


ALIKE = {
    NoOne: None, Two: None, Minus: None, Boolean: None, Augmented: None, ConditionalNorm: None,
    AnotherSelf: None, AnotherFunction: None, Shadowed: None, Nested: None, Keywords: None,
    Reused: "later uses", Captured: "later uses", ReusedInside: "later uses",
    ReusedAsShift: "later uses", ReusedAsType: "later uses",
    Reassigned: "what lies between", InPlace: "what lies between", InPlaceCall: "what lies between",
    ArgumentInPlace: None, InPlaceMethod: "what lies between", Branches: "what lies between",
    Guarded: "what lies between", Names: "what lies between", InPlaceScale: None,
    Doubled: "forward has a decorator that is not known",
}  # fmt: skip


@pytest.mark.parametrize("kind", ALIKE, ids=lambda kind: kind.__name__)
def test_lookalike_stays(kind):
    net, fast, report = pair(kind)
    args = normal(B, S, C), normal(B, 1, C, seed=1), normal(B, 1, C, seed=2)
    with torch.no_grad():
        agree(fast(*args), net(*args))
    assert modulated(report) == []
    whys = left(report)
    assert len(whys) == (ALIKE[kind] is not None)
    assert all(ALIKE[kind] in why for why in whys)


class Generator(Block):
    def forward(self, x, s, t):
        yield self.norm(x) * (1 + s) + t


class Coroutine(Block):
    async def forward(self, x, s, t):
        return self.norm(x) * (1 + s) + t


@pytest.mark.parametrize("kind", [Generator, Coroutine])
def test_lazy_forward_stays(kind):
    report = pair(kind)[2]
    assert modulated(report) == []
    assert left(report) == ["modulation of norm: forward is a generator or a coroutine"]


def test_without_source_it_stays():
    text = "class Made(Block):\n    def __init__(self):\n        super(Made, self).__init__()\n"
    text += "        self.norm.eps *= 2\n    def forward(self, x, s, t):\n"
    text += "        return self.norm(x) * (1 + s) + t\n"
    scope = {"Block": Block}
    exec(text, scope)
    report = pair(scope["Made"])[2]
    assert modulated(report) == []
    assert left(report) == ["modulation: the source of forward is not available"]


def test_source_that_does_not_run_is_noticed(tmp_path):
    path = tmp_path / "changed.py"
    text = "from torch import nn\nclass Made(nn.Module):\n    def __init__(self):\n"
    text += "        super().__init__()\n        self.norm = nn.LayerNorm(16)\n"
    text += "    def forward(self, x, s, t):\n        return self.norm(x) * ({} + s) + t\n"
    path.write_text(text.format("s * 1"))
    spec = importlib.util.spec_from_file_location("changed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text(text.format("1"))
    linecache.checkcache()
    report = pair(module.Made)[2]
    assert modulated(report) == []
    assert left(report) == ["modulation: the source of forward is not what runs"]


def test_forward_of_an_instance_stays():
    net = Net(Expression())
    block = net.blocks[0]
    block.forward = functools.partial(Expression.forward, block)
    report = reeltime.accelerate(net, None, None, "fused")
    assert modulated(report) == []
    assert "was replaced" in left(report)[0]


# --- Around it ----------------------------------------------------------------------------------


def test_undo_is_complete():
    net, fast, report = pair(Scoped)
    block, before = fast.blocks[0], net.blocks[0]
    assert type(block) is not Scoped
    assert isinstance(block, Scoped)
    assert fast.state_dict().keys() == net.state_dict().keys()
    report.undo()
    assert type(block) is Scoped
    assert type(block.norm) is nn.LayerNorm
    assert vars(block).keys() == vars(before).keys()
    assert vars(block.norm).keys() == vars(before.norm).keys()
    args = normal(B, S, C), normal(B, 1, C, seed=1), normal(B, 1, C, seed=2)
    with torch.no_grad():
        assert torch.equal(fast(*args), net(*args))


def test_another_model_is_not_touched():
    net = pair(Expression)[0]
    assert type(net.blocks[0]) is Expression
    assert Expression.forward.__code__.co_names == ("norm",)


def test_traceback_shows_the_original_line():
    net, fast, _ = pair(TwoStatements)
    with pytest.raises(RuntimeError) as raised, torch.no_grad():
        fast(normal(B, S, C), normal(B, 5, C), normal(B, 1, C))
    lines = [one.line for one in traceback.extract_tb(raised.tb) if one.name == "forward"]
    assert "h = h * (1 + s) + t" in lines


def test_gradient_is_pytorchs():
    net, fast, report = pair(TwoStatements)
    grads = []
    for one in (net, fast):
        args = [normal(*shape, seed=3).requires_grad_() for shape in [(B, S, C), (B, 1, C), (C,)]]
        one(*args).square().sum().backward()
        grads.append([arg.grad for arg in (*args, *one.parameters())])
    assert all(
        torch.equal(got, want)
        for got, want in zip(*grads, strict=True)
        if want is not None or got is not None
    )
    assert report.calls()["blocks.0"] == {"left: a gradient is wanted": 1}


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_of_the_norm_is_called(hook):
    net, fast, report = pair(Expression)
    args = normal(B, S, C), normal(B, 1, C, seed=1), normal(B, 1, C, seed=2)
    seen = []
    handle = getattr(fast.blocks[0].norm, hook)(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        agree(fast(*args), net(*args))
        assert report.calls()["blocks.0"] == {"left: the norm has a hook": 1}
        assert len(seen) == 1
        if hook == "register_forward_hook":
            agree(seen[0], net.blocks[0].norm(args[0]))
        handle.remove()
        fast(*args)
    assert report.calls()["blocks.0"]["reference"] == 1


def test_norm_that_somebody_replaces():
    net, fast, report = pair(Expression)
    args = normal(B, S, C), normal(B, 1, C, seed=1), normal(B, 1, C, seed=2)
    net.blocks[0].norm = fast.blocks[0].norm = nn.Identity()
    with torch.no_grad():
        assert torch.equal(fast(*args), net(*args))
    assert report.calls()["blocks.0"] == {"left: the norm was replaced": 1}


def test_blocks_compiled_one_by_one_share_a_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net(*[TwoStatements() for _ in range(3)]).eval()
    args = normal(B, S, C), normal(B, 1, C, seed=1), normal(B, 1, C, seed=2)
    report = reeltime.accelerate(net, None, None, "fused")
    with torch.no_grad():
        want = net(*args)
        report.reset_calls()
        for block in net.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            agree(net(*args), want)
    assert report.calls()[""] == {"norm: reference": 3}


def test_what_is_left_in_a_compiled_graph_is_counted():
    torch._dynamo.reset()
    net, fast, report = pair(Expression)
    args = normal(B, 3, 2, C), normal(2, C, seed=1), normal(C, seed=2)
    with torch.no_grad():
        got = torch.compile(fast, fullgraph=True, backend="aot_eager")(*args)
        agree(got, net(*args))
    calls = report.calls()[""]
    assert calls.pop("norm: reference") == 1  # the norm itself
    assert [what.startswith("norm: left: scale or shift are not rows") for what in calls] == [True]


class Transposed(Block):
    """Sizes and strides that are symbols while compiling."""

    def __init__(self):
        super().__init__()
        self.query = PlainNorm(C // 2)

    def forward(self, x, s, t):
        h = self.norm(x) * (1 + s) + t
        return self.query(h.unflatten(-1, (2, C // 2)).transpose(1, 2))


class PlainNorm(nn.Module):
    """Its results lie in memory as x does."""

    def __init__(self, size):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.ones(size))

    def forward(self, rows):
        wide = rows.float()
        unit = wide / (wide.square().mean(-1, True) + self.eps).sqrt()
        return unit.to(rows.dtype) * self.weight


def test_lengths_of_a_compiled_graph_are_free():
    torch._dynamo.reset()
    net, fast, report = pair(Transposed)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (4, 7, 9):
            args = normal(B, length, C), normal(B, 1, C, seed=1), normal(B, 1, C, seed=2)
            agree(compiled(*args), net(*args))
    assert report.calls()[""] == {"norm: reference": 6}
