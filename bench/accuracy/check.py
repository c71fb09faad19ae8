# SPDX-License-Identifier: Apache-2.0
"""Run the cases of families and judge them: rows for tables, JSON and pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from reeltime import backends, checks
from reeltime.arch import UnsupportedArchError
from reeltime.bench.accuracy.case import OURS, Case
from reeltime.bench.accuracy.inputs import Inputs

PATHS = "paths"  # what is checked like a family: attention's 8-bit paths, of two families


@dataclass(frozen=True)
class Row:
    """One op on one input.  passed is None for what is shown and not judged.

    peak is the largest error over the root mean square of the float64 result.
    """

    family: str
    op: str
    recipe: str
    source: str  # "ours", or the paper and repository of a published recipe
    input: str
    cosine: float
    relative_l1: float
    rmse: float
    peak: float
    tolerance_relative_l1: float | None
    tolerance_peak: float | None
    passed: bool | None
    error: str | None  # what the op raised instead of a result
    backend: str
    device: str

    @property
    def share(self) -> float:
        """Of the tolerance that is used up; of 1 where there is none."""
        if self.tolerance_relative_l1 is None or self.tolerance_peak is None:
            return self.relative_l1
        shares = zip(
            (self.relative_l1, self.peak),
            (self.tolerance_relative_l1, self.tolerance_peak),
            strict=True,
        )
        return max(error / limit if limit else math.inf * error for error, limit in shares)

    def document(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def plan(families: Sequence[str], backend: str, device: torch.device) -> dict[str, str]:
    """{family: backend that it runs on}, for those of `families` (or `PATHS`) that can be served.

    Raises:
        ValueError: unknown backend.
        UnsupportedArchError: none of the families can be served.
    """
    checks.choice("backend", backend, backends.BACKENDS)
    served, refused = {}, []
    for family in families:
        try:
            name = "attention" if family == PATHS else family
            served[family] = backends.resolve(name, backend, device)
        except UnsupportedArchError as error:
            refused.append(error)
    if not served:
        raise refused[0]
    return served


def read(path: Path) -> list[Row]:
    """The rows of a document that `reeltime check --json` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        documents = json.loads(path.read_text())["rows"]
        rows = [Row(**document) for document in documents]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"beside: expected rows of --json in {path}, got {error!r}") from error
    # JSON has no infinity: see document().
    return [replace(row, relative_l1=math.inf) if row.relative_l1 is None else row for row in rows]


def kinds(family: str) -> tuple[str, ...]:
    """The inputs that a family is checked on."""
    return import_module(f"reeltime.bench.accuracy.{family}").KINDS


def check(
    family: str,
    kind: str,
    *,
    backend: str,
    device: torch.device | str = "cpu",
    seed: int = 0,
    refused: Counter[str] | None = None,
) -> Iterator[Row]:
    """Every op of a family on one kind of input.

    What the backend refuses by design (float64, say) gives no row; `refused` counts the reasons.
    """
    reasons = Counter() if refused is None else refused
    inputs = Inputs(kind, backend, torch.device(device), seed, reasons)
    cases = import_module(f"reeltime.bench.accuracy.{family}").cases
    with torch.no_grad():
        for case in cases(inputs):
            try:
                yield judge(case, family, inputs)
            except UnsupportedArchError as error:
                inputs.refuse(error)


def judge(case: Case, family: str, inputs: Inputs) -> Row:
    message = None
    try:
        error = checks.accuracy(case.run().detach().cpu(), case.want)
    except UnsupportedArchError:
        raise
    except (ValueError, RuntimeError) as raised:
        error, message = checks.Accuracy(0.0, math.inf, math.inf, math.inf), str(raised)
    finite = math.isfinite(error.relative_l1) and bool(case.want.isfinite().all())
    limit = case.tolerance
    return Row(
        family=family,
        op=case.op,
        recipe=case.recipe,
        source=case.source,
        input=inputs.kind,
        **error._asdict(),
        tolerance_relative_l1=None if limit is None else limit.relative_l1,
        tolerance_peak=None if limit is None else limit.peak,
        passed=None if limit is None else finite and limit.accepts(error),
        error=message,
        backend=inputs.backend,
        device=str(inputs.device),
    )


def ours(row: Row) -> bool:
    return row.source == OURS
