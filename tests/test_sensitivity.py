# SPDX-License-Identifier: Apache-2.0
"""`reeltime check --model`: the layer that hurts is found, and left out it hurts no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from reeltime import cli
from reeltime.bench import sensitivity

FACTORY = "tests_of_sensitivity"


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.unused = nn.Linear(dim, dim)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"sample": x, "count": x.shape[0]}


def subject(outlier: str | None = "blocks.1.down") -> sensitivity.Subject:
    """A net in which one layer loses much in 8 bits: one weight drowns the rest of its block."""
    torch.manual_seed(7)
    net = Net()
    if outlier:
        layer = net.get_submodule(outlier)
        with torch.no_grad():
            layer.weight[0, 0] = 300.0
            layer.bias[0] = 0.0
    return sensitivity.Subject(net.eval(), (torch.randn(2, 70, 32),), {})


def survey(**options):
    made = subject()
    want = sensitivity.reference(made)
    report = sensitivity.survey(made, **options)
    return made, want, report, list(sensitivity.layers(made, report, want))


def test_the_layer_that_hurts_comes_first():
    _, _, _, found = survey(norm=None)
    ranked = sensitivity.shared(found)
    assert ranked[0].path == "blocks.1.down"
    assert ranked[0].share > 0.5
    assert sum(one.share for one in ranked) == pytest.approx(1)
    assert {one.kind for one in found} == {"linear", "attention"}


def test_every_place_is_measured_alone_and_put_back():
    made, want, report, found = survey()
    assert [one.path for one in found] == [change.path for change in report.changes]
    assert torch.equal(made.run(), want)
    assert all(type(block.down) is nn.Linear for block in made.model.blocks)
    quiet = [one.path for one in found if not one.calls]
    assert quiet == ["unused"]
    assert next(one for one in found if one.path == "unused").relative_l1 == 0


def test_suggestion_is_minimal_and_measured():
    made, want, _, found = survey(norm=None)
    suggested = sensitivity.suggest(found, None)
    assert suggested == ["blocks.1.down"]
    levels = {one.name: one for one in sensitivity.levels(made, want, found, suggested, norm=None)}
    everything, left = levels["everything"], levels["suggested skip"]
    assert left.places == everything.places - 1
    assert left.relative_l1 < everything.relative_l1 / 2
    assert everything.predicted == pytest.approx(everything.relative_l1, rel=0.5)


@pytest.mark.parametrize("budget, count", [(10.0, 0), (1e-9, None)])
def test_budget(budget, count):
    _, _, _, found = survey(norm=None)
    suggested = sensitivity.suggest(found, budget)
    reached = sum(one.relative_l1 > 0 for one in found)
    assert len(suggested) == (reached if count is None else count)


# --- The command --------------------------------------------------------------------------------


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A module in the working folder, as a user has it."""
    source = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('made', {__file__!r})\n"
        "made = importlib.util.module_from_spec(spec); spec.loader.exec_module(made)\n"
        "def net():\n    one = made.subject(); return one.model, one.args\n"
        "def random():\n"
        "    class Forgetful(made.Net):\n"
        "        calls = 0\n"
        "        def forward(self, x):\n"
        "            Forgetful.calls += 1\n"
        "            return x * Forgetful.calls\n"
        "    return Forgetful(), (torch.ones(1, 2, 32),)\n"
        "def odd():\n    return made.Net()\n"
        "def plain():\n    return torch.nn.ReLU(), {'input': torch.ones(3)}\n"
        "def broken():\n    return {}['weights']\n"
        "def unfit():\n    return made.Net(), (torch.ones(1, 2, 5),)\n"
        "thing = 3\n"
    )
    (tmp_path / f"{FACTORY}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    yield FACTORY
    sys.modules.pop(FACTORY, None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        cli.main(["check", *arguments])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_command(factory, capsys, tmp_path):
    picture = tmp_path / "layers.png"
    code, out, _ = run(capsys, "--model", f"{factory}:net", "--json", "--picture", str(picture))
    assert code == 0
    said = json.loads(out)
    assert said["suggested_skip"] == ["blocks.1.down"]
    assert [level["name"] for level in said["levels"]] == [
        "everything", "default skip", "suggested skip",
    ]  # fmt: skip
    assert said["layers"][0]["path"] == "blocks.1.down"
    assert Image.open(picture).size[0] > 500


def test_a_budget_that_nothing_meets_is_a_miss(factory, capsys):
    code, out, _ = run(capsys, "--model", f"{factory}:net", "--budget", "1e-12", "--json")
    assert code == 1
    assert json.loads(out)["budget_met"] is False


def test_table(factory, capsys):
    code, out, _ = run(capsys, "--model", f"{factory}:net", "--budget", "0.5")
    assert code == 0
    assert "blocks.1.down" in out
    assert "everything" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "nowhere_at_all:net"], ["no module nowhere_at_all"]),
        (["--model", "no_colon"], ["package.module:factory"]),
        (["--model", FACTORY + ":missing"], ["no function missing"]),
        (["--model", FACTORY + ":thing"], ["no function thing"]),
        (["--model", FACTORY + ":broken"], [":broken raised KeyError: 'weights'"]),
        (["--model", FACTORY + ":unfit"], ["its forward raised RuntimeError"]),
        (["--model", FACTORY + ":odd"], ["(module, tuple or dict", "Net"]),
        (["--model", FACTORY + ":random"], ["the same output twice"]),
        (["--model", FACTORY + ":plain"], ["got ReLU with none"]),
        (["--model", FACTORY + ":net", "--linear", "int4"], ["linear", "int4"]),
        (["--model", FACTORY + ":net", "--budget", "0"], ["budget"]),
        (["norm", "--model", FACTORY + ":net"], ["family"]),
        (["--budget", "0.1"], ["budget", "--model"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("-") else None,
)
def test_bad_input_says_what_would_work(factory, capsys, arguments, words):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    said = " ".join(err.split())
    for word in words:
        assert word in said
