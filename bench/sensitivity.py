# SPDX-License-Identifier: Apache-2.0
"""What every layer of a model loses if it alone is changed, and which are worth leaving alone.

Errors of layers are independent of each other to first order: their squares add up.  The
suggestion leaves out the fewest layers, the worst first, that bring the root of the sum below a
budget; then it is measured, because that sum is only an estimate.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reeltime import checks
from reeltime.checks import Accuracy
from reeltime.plugins import SENSITIVE, Report, accelerate

COLORS = {"linear": "#1b6ca8", "attention": "#d1495b", "norm": "#2a9d4a"}


@dataclass(frozen=True)
class Layer:
    """One place, changed alone.

    Attributes:
        relative_l1, cosine: of the model's output against that of the untouched model.
        share: of the sum of all squared errors.
        calls: {what ran there: how often} in one forward; empty: this input does not reach it.
    """

    path: str
    kind: str
    what: str
    relative_l1: float
    cosine: float
    calls: Mapping[str, int]
    share: float = 0.0

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Together:
    """Many places at once."""

    name: str
    skip: tuple[str, ...]
    places: int
    relative_l1: float
    cosine: float
    predicted: float | None = None  # relative L1, from the layers


@dataclass
class Subject:
    """A model and an input of it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self) -> Tensor:
        """Every floating-point number that it returns, noise drawn inside seeded."""
        torch.manual_seed(0)
        with torch.no_grad():
            found = tree_leaves(_plain(self.model(*self.args, **self.kwargs)))
        numbers = [x.double().flatten() for x in found if isinstance(x, Tensor)
                   and x.is_floating_point()]  # fmt: skip
        if not numbers:
            checks.fail(
                "model", "a module that returns floating-point tensors", "none",
                "Return the network itself from the factory, not a pipeline.",
            )  # fmt: skip
        return torch.cat(numbers).cpu()


def _plain(output: Any) -> Any:
    """Outputs of Hugging Face's libraries are dictionaries that torch does not look into."""
    return dict(output) if isinstance(output, Mapping) else output


@contextmanager
def theirs(what: str) -> Iterator[None]:
    """Inside, an exception is of the user's code."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"model: {what} raised {type(error).__name__}: {error}") from error


def load(spec: str) -> Subject:
    """The subject that `package.module:factory` makes.

    The factory takes nothing and returns (model, inputs): a tuple of arguments, or a dictionary of
    keyword arguments.  Modules are looked for in the working folder too.

    Raises:
        ValueError: no such module or factory, or something else came out of it.
    """
    name, _, factory = spec.partition(":")
    what = "package.module:factory"
    if not name or not factory:
        checks.fail("model", what, repr(spec), "For example my_models:tiny_wan.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        got = f"{spec!r}, and there is no module {error.name}"
        checks.fail("model", what, got, "Is its folder the working folder, or installed?")
    make = getattr(module, factory, None)
    if not callable(make):
        checks.fail("model", what, f"{spec!r}, and {name} has no function {factory}", "Add one.")
    with theirs(spec):
        made = make()
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], tuple | dict)
    ):
        got = type(made).__name__
        if isinstance(made, tuple):
            got = f"({', '.join(type(part).__name__ for part in made)})"
        checks.fail(
            "model", f"{spec} to return (module, tuple or dict of its inputs)", got,
            "Return both; a single input is (x,).",
        )  # fmt: skip
    model, inputs = made
    model.eval()
    return Subject(model, *((inputs, {}) if isinstance(inputs, tuple) else ((), inputs)))


def reference(subject: Subject) -> Tensor:
    """The output of the untouched model.

    Raises:
        ValueError: two runs differ, or it is not finite.
    """
    with theirs("its forward"):
        want, again = subject.run(), subject.run()
    if not bool(want.isfinite().all()):
        checks.fail("model", "finite outputs", "NaN or Inf", "Pass inputs that it can take.")
    if not torch.equal(want, again):
        apart = checks.accuracy(again, want).relative_l1
        checks.fail(
            "model",
            "the same output twice, seeded",
            f"two that differ by {apart:.1e}",
            "Take out what depends on earlier calls or on time.",
        )
    return want


def survey(subject: Subject, **options: Any) -> Report:
    """Every place that could be changed, none left out; the model is as it was afterwards."""
    with accelerate(subject.model, skip=(), **options) as report:
        return report


def layers(subject: Subject, report: Report, want: Tensor) -> Iterator[Layer]:
    """The places of a survey, one changed at a time."""
    for change in report.changes:
        change.place.site.calls.clear()
        change.apply()
        try:
            error = checks.accuracy(subject.run(), want)
        finally:
            change.revert()
        yield Layer(
            change.path, change.kind, change.what, error.relative_l1, error.cosine,
            dict(change.place.site.calls),
        )  # fmt: skip


def shared(found: Sequence[Layer]) -> list[Layer]:
    """With each layer's share of the sum of squares, the worst first."""
    total = sum(one.relative_l1**2 for one in found) or 1.0
    ranked = sorted(found, key=lambda one: -one.relative_l1)
    return [replace(one, share=one.relative_l1**2 / total) for one in ranked]


def predicted(found: Sequence[Layer], skip: Sequence[str]) -> float:
    return math.sqrt(sum(one.relative_l1**2 for one in found if one.path not in skip))


def suggest(found: Sequence[Layer], budget: float | None) -> list[str]:
    """The fewest layers, worst first, without which the predicted error is within `budget`.

    Without a budget: half of the error of all, and no more than a tenth of the layers.
    """
    ranked = shared(found)
    most = len(ranked) if budget is not None else -(-len(ranked) // 10)
    limit = predicted(ranked, ()) / 2 if budget is None else budget
    left: list[str] = []
    while len(left) < most and predicted(ranked, left) > limit:
        left.append(next(one.path for one in ranked if one.path not in left))
    return left


def together(
    subject: Subject, want: Tensor, name: str, skip: Sequence[str], found: Sequence[Layer] = (),
    **options: Any,
) -> Together:  # fmt: skip
    """Everything at once but for `skip`, measured."""
    with accelerate(subject.model, skip=skip, **options) as report:
        error: Accuracy = checks.accuracy(subject.run(), want)
        places = len(report.changes)
    expected = predicted(found, skip) if found else None
    return Together(name, tuple(skip), places, error.relative_l1, error.cosine, expected)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def levels(
    subject: Subject, want: Tensor, found: Sequence[Layer], suggested: Sequence[str],
    **options: Any,
) -> Iterator[Together]:  # fmt: skip
    """All places, the default skip list, the suggested one where it leaves any."""
    yield together(subject, want, "everything", (), found, **options)
    if any(not _matches(one.path, SENSITIVE) for one in found):
        yield together(subject, want, "default skip", SENSITIVE, **options)
    if suggested and {one.path for one in found} - set(suggested):
        yield together(subject, want, "suggested skip", suggested, found, **options)


def draw(found: Sequence[Layer], skip: Sequence[str], out: Path, title: str) -> None:
    """Error by place in the model's order, on a logarithmic scale; what is suggested is marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [one for one in found if one.relative_l1 > 0]
    height = 1.4 + 0.17 * max(len(shown), 4)
    figure = Figure(figsize=(10, min(height, 60)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(
        places, [one.relative_l1 for one in shown],
        color=[COLORS.get(one.kind, "#999999") for one in shown],
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(
        places, [("skip  " if one.path in skip else "") + one.path for one in shown], fontsize=6
    )
    for label, one in zip(axes.get_yticklabels(), shown, strict=True):
        if one.path in skip:
            label.set_fontweight("bold")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("relative L1 of the output if this place alone is changed")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    kinds = dict.fromkeys(one.kind for one in shown)
    axes.legend(handles=[Patch(color=COLORS.get(k, "#999999"), label=k) for k in kinds], fontsize=7)
    axes.set_title(title, loc="left", fontsize=9)
    figure.savefig(out, dpi=110, metadata={"Software": None})
