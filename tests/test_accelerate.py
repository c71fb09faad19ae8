# SPDX-License-Identifier: Apache-2.0
"""accelerate: what it changes, reports and undoes; under compile, export and threads.

On linear layers, since all kinds of changes share what is tested here.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import reeltime
from reeltime.plugins import SENSITIVE, Report, changes, linear, sites
from reeltime.plugins.changes import Left, SwapClass
from reeltime.plugins.linear import Linear8
from reeltime.plugins.sites import Place, Site

D = 64
BLOCKS = 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(D, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PLACES = [f"blocks.{i}.{name}" for i in range(BLOCKS) for name in ("up", "down")]


def net(seed=0):
    made = Net().eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    return made


def tokens(seed=1):
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))


def accelerate(model, **options):
    return reeltime.accelerate(model, **{"attention": None, "norm": None} | options)


def everything(model):
    """(modules, parameters) by name: objects; and the parameters' bits."""
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    return modules, parameters, {name: p.detach().clone() for name, p in parameters.items()}


def assert_untouched(model, before):
    modules, parameters, values = everything(model)
    assert modules == before[0]
    assert all(parameters[name] is p for name, p in before[1].items())
    assert all(values[name].dtype == x.dtype for name, x in before[2].items())
    assert all(torch.equal(values[name], x) for name, x in before[2].items())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def strict_compile():
    """Compile from nothing; to compile again is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


# --- The report ---------------------------------------------------------------------------------


def test_report_says_what_was_done():
    model, x = net(), tokens()
    want = model(x)
    report = accelerate(model)
    assert [change.path for change in report.changes] == PLACES
    assert report.left == [Left("head", "linear", "skip: head")]
    # Per block: 2 * D * 2D weights of 4 bytes become 1 byte and, for both layers, one scale.
    assert report.bytes_saved == BLOCKS * (3 * 2 * D * 2 * D - 2 * 4)
    assert report.calls() == {path: {} for path in PLACES}
    assert 0 < (model(x) - want).norm() / want.norm() < 0.02
    assert report.calls() == {path: {"reference": 1} for path in PLACES}
    report.reset_calls()
    assert report.calls() == {path: {} for path in PLACES}


def test_defaults_change_every_kind_and_undo():
    model, x = net(), tokens()
    before, want = everything(model), model(x)
    with reeltime.accelerate(model) as report:
        model(x)
        assert {name for calls in report.calls().values() for name in calls} == {"reference"}
    assert_untouched(model, before)
    assert torch.equal(model(x), want)


def test_rows_are_json():
    model = net()
    report = accelerate(model)
    torch.compile(model, backend="eager")(tokens())
    rows = json.loads(json.dumps(report.rows()))
    assert [row["path"] for row in rows] == [*PLACES, "", "head"]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["what"] == "Linear 64 -> 128, int8"
    assert (rows[-2]["kind"], rows[-2]["calls"]) == ("model", {"linear: reference": 2 * BLOCKS})
    assert (rows[-1]["left"], rows[-1]["backend"]) == ("skip: head", None)


def columns(lines):
    """{title: what stands below it, without spaces}"""
    titles = ["where", "kind", "what", "calls"]
    starts = [lines[0].index(title) for title in titles] + [None]
    slices = [slice(*pair) for pair in zip(starts, starts[1:], strict=False)]
    texts = ["".join("".join(line[part] for line in lines).split()) for part in slices]
    return dict(zip(titles, texts, strict=True))


@pytest.mark.parametrize("width", [80, 120])
def test_table_is_readable(width):
    model = net()
    report = accelerate(model)
    model(tokens())
    long = "single_transformer_blocks.0.attn.add_q_proj.with_a_very_long_name.base_layer"
    report.left.append(Left(long, "linear", "its weight is a [b]Tensor[/b] of float8_e4m3fn"))
    text = io.StringIO()
    Console(file=text, width=width).print(report)
    title, *lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert title.startswith("6 places changed, 2 left, 0.1 MiB of weights saved")
    below = columns(lines)
    assert "blocks.*.up(3x)" in below["where"]
    assert long in below["where"]
    assert "Linear64->128,int8" in below["what"]
    assert "left:itsweightisa[b]Tensor[/b]offloat8_e4m3fn" in below["what"]
    assert "reference3reference3" in below["calls"]
    report.undo()
    assert "undone" in str(report)


def test_place_that_changed_twice_counts_by_kind():
    model = net()
    report = accelerate(model)
    other = Site("blocks.0.up", "norm")
    report.changes.append(changes.Change(other.path, "norm", "", "", Place(other, report.model)))
    sites.count(other.number, "norm", "triton")
    model(tokens())
    assert report.calls()["blocks.0.up"] == {"linear: reference": 1, "norm: triton": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"linear": "int4"}, "linear: expected None or 'int8' or 'fp8', got 'int4'"),
        ({"attention": "int4"}, "attention: expected None or 'int8' or 'fp8'"),
        ({"norm": "fast"}, "norm: expected None or 'fused'"),
        ({"backend": "gpu"}, "backend: expected 'auto'"),
        ({"sla": 0.0}, r"sla: expected a share of the key blocks in \(0, 1\], got 0.0"),
        ({"skip": "head"}, r"skip: expected a list of patterns, got 'head'. Pass \[pattern\]"),
        ({"sla": "0.1"}, r"sla: expected a share of the key blocks in \(0, 1\], got '0.1'"),
        ({"skip": None}, "skip: expected a list of patterns, got None"),
        ({"skip": [0]}, "skip: expected patterns of names, got 0"),
        ({"skip": ["*"]}, r"got Net with none \(blocks.0.up: skip: \*; "),
    ],
    ids=str,
)
def test_bad_argument_is_named(options, message):
    model = net()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        accelerate(model, **options)
    assert_untouched(model, before)


def test_only_modules_are_accelerated():
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got dict"):
        reeltime.accelerate({})
    with pytest.raises(ValueError, match="nothing was found"):
        accelerate(nn.Sequential(nn.GELU()))
    with pytest.raises(ValueError, match=r"got Net with none \(blocks.0.up: skip"):
        accelerate(torch.compile(net()), skip=["*"])


def test_skip_that_names_nothing_is_said():
    report = accelerate(net(), skip=["block.0.*", "head", "*embed*"])
    assert [tuple(left) for left in report.left if left.kind == "skip"] == [
        ("block.0.*", "skip", "no module has such a name")
    ]


def test_skip_adds_to_what_is_sensitive():
    report = accelerate(net(), skip=[*SENSITIVE, "blocks.0.*"])
    assert [change.path for change in report.changes] == PLACES[2:]
    assert {left.path for left in report.left} == {"head", "blocks.0.up", "blocks.0.down"}


# --- Undo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_undo_is_bit_for_bit(format):
    model, x = net(), tokens()
    before, want = everything(model), model(x)
    report = accelerate(model, linear=format)
    first = model(x)
    model.to(torch.float64).to(torch.float32)  # exact for what stayed a plain parameter
    assert torch.equal(model(x), first)
    model.train()
    report.undo()
    assert all(module.training for module in model.modules())
    assert_untouched(model.eval(), before)
    assert torch.equal(model(x), want)
    report.undo()  # nothing is left to do
    again = accelerate(model, linear=format)
    assert torch.equal(model(x), first)
    again.undo()


def test_undo_gives_each_its_own_dtype_whatever_the_model_has_now():
    model = net()
    before = everything(model)
    report = accelerate(model, skip=())
    model.to(torch.bfloat16)
    assert model(tokens().bfloat16()).dtype == torch.bfloat16
    report.undo()
    assert_untouched(model, before)


@pytest.mark.gpu
def test_originals_wait_in_host_memory():
    pytest.importorskip("triton")
    model, x = net().cuda(), tokens().cuda()
    before, want = everything(model), model(x)
    report = accelerate(model)
    assert {change.old.weight.device.type for change in report.changes} == {"cpu"}
    assert (model(x) - want).norm() / want.norm() < 0.02
    assert {name for calls in report.calls().values() for name in calls} <= {"triton", "cuda"}
    model.cpu()
    report.undo()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    report = accelerate(model)
    model.cuda()
    report.undo()
    assert_untouched(model, before)


def test_other_models_are_not_touched():
    model, other, x = net(), net(), tokens()
    before, want = everything(other), other(x)
    globals_before = {name: id(value) for name, value in vars(F).items()}
    forward, call = nn.Linear.forward, nn.Module.__call__
    report = accelerate(model)
    model(x)
    assert_untouched(other, before)
    assert torch.equal(other(x), want)
    assert (nn.Linear.forward, nn.Module.__call__) == (forward, call)
    assert {name: id(value) for name, value in vars(F).items()} == globals_before
    report.undo()


def test_second_accelerate_leaves_what_is_in_8_bits():
    model, x = net(), tokens()
    before = everything(model)
    first = accelerate(model, skip=["*down", "head"])
    second = accelerate(model)
    assert [change.path for change in second.changes] == PLACES[1::2]
    assert [left.why for left in second.left] == ["in 8 bits already"] * BLOCKS + ["skip: head"]
    with pytest.raises(ValueError, match=r"none \(blocks.0.up: in 8 bits already"):
        accelerate(model)
    model(x)
    assert sum(len(calls) for calls in first.calls().values()) == BLOCKS
    first.undo()  # they share no place, so the order is free
    second.undo()
    assert_untouched(model, before)


def test_place_changed_since_is_not_undone():
    model = net()
    before = everything(model)
    report = accelerate(model)
    mine = nn.Identity()
    ours, model.blocks[1].up = model.blocks[1].up, mine
    with pytest.raises(RuntimeError, match="undo: blocks.1.up was changed again after this"):
        report.undo()
    assert model.blocks[1].up is mine
    assert not report.undone
    model.blocks[1].up = ours
    report.undo()
    assert_untouched(model, before)


def class_change(module, name, path="blocks.0"):
    def body(base):
        def forward(self, x):
            getattr(self, name).append(name)
            return base.forward(self, x)

        return {"forward": forward}

    place = Place(Site(path, name), Site("", "model"))
    return SwapClass(
        path, name, "", "", place, module=module, key=name, body=body, attributes={name: []}
    )


def test_classes_stand_on_each_other_and_are_undone_in_reverse():
    model, x = net(), tokens()
    before, want, block = everything(model), model(x), model.blocks[0]
    under, over = class_change(block, "under"), class_change(block, "over")
    under.apply()
    over.apply()
    assert torch.equal(model(x), want)
    assert (block.under, block.over) == (["under"], ["over"])
    assert isinstance(block, Block)
    assert type(block).__qualname__ == "Block"
    with pytest.raises(RuntimeError, match="Undo what came later first"):
        under.revert()
    other = class_change(model.blocks[1], "under")
    other.apply()
    assert type(model.blocks[1]) is other.classes[1] is type(block).__base__  # shares its graphs
    Report([other, under, over], [], Site("", "model")).undo()
    assert_untouched(model, before)
    assert not hasattr(block, "under")


# --- Interrupted --------------------------------------------------------------------------------


@dataclass(eq=False)
class Interrupted(SwapClass):
    """Stopped between two of its own lines."""

    attributes: dict = field(default_factory=lambda: {None: "no name of an attribute"})


@pytest.mark.parametrize("undoable", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError], ids=str)
def test_failure_halfway_changes_nothing(error, undoable, monkeypatch):
    model, x = net(), tokens()
    before, want, made = everything(model), model(x), []

    class Fails(Linear8):
        def __init__(self, *args):
            made.append(len(made))
            if len(made) == 4:
                raise error("planted")
            super().__init__(*args)

    monkeypatch.setattr(linear, "Linear8", Fails)
    with pytest.raises(error, match="planted"):
        accelerate(model, undoable=undoable)
    if undoable:
        assert_untouched(model, before)
        assert torch.equal(model(x), want)
    else:  # three are gone; the rest still works
        kinds = [type(model.get_submodule(path)) for path in PLACES]
        assert kinds == [Fails] * 3 + [nn.Linear] * 3
        assert (model(x) - want).norm() / want.norm() < 0.02


def test_change_stopped_inside_is_undone(monkeypatch):
    model = net()
    before, find = everything(model), linear.find

    def planted(model, scope, format):
        yield from find(model, scope, format)
        place = scope.place("blocks.0", "linear")
        yield class_change(model.blocks[0], "before")
        yield Interrupted("blocks.0", "linear", "", "", place, module=model.blocks[0])

    monkeypatch.setattr(linear, "find", planted)
    with pytest.raises(TypeError):
        accelerate(model)
    assert_untouched(model, before)


def test_owners_exchanged_halfway_are_undone(monkeypatch):
    shared = nn.Linear(D, D)
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model[1], "_modules", Refusing(model[1]._modules))
        with pytest.raises(KeyboardInterrupt):
            accelerate(model)
        assert model[0][0] is model[1][0] is shared


class Refusing(dict):
    """Interrupts the first who writes."""

    refused = False

    def __setitem__(self, name, value):
        if not self.refused:
            self.refused = True
            raise KeyboardInterrupt
        super().__setitem__(name, value)


# --- Threads ------------------------------------------------------------------------------------


def test_threads_get_equal_results_and_exact_counts():
    model, x, rounds = net(), tokens(), 12
    report = accelerate(model)
    want = model(x)
    report.reset_calls()

    def run(_):
        with torch.no_grad():
            return all(torch.equal(model(x), want) for _ in range(rounds))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))
    assert report.calls() == {path: {"reference": 8 * rounds} for path in PLACES}


def test_count_is_exact_under_contention():
    class Slow(Counter):
        """Another thread comes between reading a count and writing it."""

        def __getitem__(self, name):
            n = super().__getitem__(name)
            time.sleep(1e-6)
            return n

    site = Site("", "linear", calls=Slow())

    def run(_):
        for _ in range(100):
            sites.count(site.number, "linear", "reference")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    assert site.calls == {"reference": 800}


# --- Compiled and exported ----------------------------------------------------------------------


@pytest.mark.skipif(" " in torch.__file__, reason="inductor does not quote the path of PyTorch")
def test_compiled_after(strict_compile):
    model, x = net(), tokens()
    report = accelerate(model)
    want = model(x)
    report.reset_calls()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), want)
    assert report.calls() == {path: {} for path in PLACES} | {"": {"linear: reference": 12}}


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_compiled_before(how):
    torch._dynamo.reset()
    model, x = net(), tokens()
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if how == "in place":
        model.compile(fullgraph=True, backend="aot_eager")
        compiled = model
    torch.testing.assert_close(compiled(x), want)
    report = accelerate(compiled)
    assert [change.path for change in report.changes] == PLACES
    eight = compiled(x)
    assert 0 < (eight - want).norm() / want.norm() < 0.02
    assert report.calls()[""] == {"linear: reference": 6}
    report.undo()
    torch.testing.assert_close(compiled(x), want)
    assert report.calls()[""] == {"linear: reference": 6}


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_blocks_compiled_one_by_one_share_a_graph(how, strict_compile):
    model, x = net(), tokens()
    if how == "wrapper":  # before: names are then those of the wrappers, and ours are without
        model.blocks = nn.ModuleList(
            torch.compile(block, fullgraph=True, backend="aot_eager") for block in model.blocks
        )
    report = accelerate(model, skip=["head", "blocks.0.up"])
    assert [change.path for change in report.changes] == PLACES[1:]
    report.undo()
    report = accelerate(model)
    if how == "in place":
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    model(x)
    assert report.calls() == {path: {} for path in PLACES} | {"": {"linear: reference": 6}}


def test_two_models_and_a_copy_count_apart_when_compiled():
    torch._dynamo.reset()
    x = tokens()
    models = [net(), net(1)]
    reports = [accelerate(model) for model in models]
    models.append(copy.deepcopy(models[0]))
    want = [model(x) for model in models]
    for model, y in zip(models, want, strict=True):
        model.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(x), y)
    for report in reports:
        assert report.calls()[""] == {"linear: reference": 6}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_program_counts(strict, monkeypatch):
    model, x = net(), tokens()
    report = accelerate(model)
    want = model(x)
    report.reset_calls()
    program = torch.export.export(model, (x,), strict=strict)
    assert report.calls() == {path: {} for path in PLACES}  # nothing has run yet
    assert str(program.graph).count("reeltime.plugin_linear") == 6
    torch.testing.assert_close(program.module()(x), want)
    assert report.calls()[""] == {"linear: reference": 6}
    with monkeypatch.context() as elsewhere:  # another process, whose models have these numbers
        elsewhere.setattr(sites, "PROCESS", sites.PROCESS + (1 << 32))
        torch.testing.assert_close(program.module()(x), want)
    assert report.calls()[""] == {"linear: reference": 6}
    del model, report
    gc.collect()
    torch.testing.assert_close(program.module()(x), want)  # counted by nobody, as elsewhere


def test_compiled_gradient_is_the_eager_one():
    model, x = net(), tokens()
    with torch.inference_mode():  # of whoever loads a model; no tensor of ours may keep it
        accelerate(model)
    grads = []
    with torch.enable_grad():
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            y = x.clone().requires_grad_()
            run(y).square().sum().backward()
            grads.append(y.grad)
    torch.testing.assert_close(*grads)


# --- Weights ------------------------------------------------------------------------------------


def test_state_of_a_model_goes_both_ways():
    source, x = net(seed=3), tokens()
    eight = net(seed=3)
    accelerate(eight)
    want = eight(x)
    for state in (source.state_dict(), eight.state_dict()):
        model = net()
        accelerate(model)
        model.load_state_dict(state)
        assert torch.equal(model(x), want)
    with pytest.raises(RuntimeError, match="weight_codes"):
        net().load_state_dict(eight.state_dict())


def test_undo_after_offloading_hooks_are_gone():
    """They leave the forward that they found to the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    torch.manual_seed(0)
    model, x = Attends(), torch.randn(2, 70, 32)
    with torch.no_grad():
        want = model(x)
        for remove_first in (True, False):
            report = reeltime.accelerate(model, linear=None)
            hooks.add_hook_to_module(model, hooks.ModelHook())
            model(x)
            if remove_first:
                hooks.remove_hook_from_module(model)
            report.undo()
            assert torch.equal(model(x), want)
            if not remove_first:
                hooks.remove_hook_from_module(model)
                assert torch.equal(model(x), want)
            vars(model).pop("forward", None)
            assert {"attention: reference", "norm: reference"} <= set(report.calls()[""])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.register_buffer("scale", torch.randn(1, 1, 32))

    def forward(self, x):
        y = self.norm(x) * (1 + self.scale) + self.scale
        q = y.unflatten(-1, (2, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q)
