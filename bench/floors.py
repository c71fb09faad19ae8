# SPDX-License-Identifier: Apache-2.0
"""What each kernel cannot beat on cards that are not here, and what it should reach of that.

Data sheets and arithmetic: nothing is measured.  What is expected is a share of the floor by the
ceilings of the run that measures it, which lie a little below a data sheet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from reeltime.bench import hardware, harness
from reeltime.bench.case import Case
from reeltime.bench.ceilings import Ceilings
from reeltime.bench.hardware import Card
from reeltime.bench.rows import Row
from reeltime.bench.shapes import Sizes

PLANNED = ("H200", "RTX 5090")


@dataclass(frozen=True)
class Floor:
    """One kernel on one card.  None: the card lacks the format."""

    family: str
    op: str
    form: str
    shape: str
    dtype: str
    gflop: float
    mbytes: float
    card: str
    floor_us: float | None
    bound: str  # memory, or the dtypes of the tensor cores
    expected_share: float | None  # of the floor
    why: str

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.op, self.dtype, self.form, self.shape) if part)


def floor(case: Case, card: Card) -> Floor:
    ceilings = Ceilings.promised(card)
    least = ceilings.floor_us(case.flops, case.bytes)
    return Floor(
        *(case.family, case.op, case.form, case.shape, case.dtype),
        gflop=sum(case.flops.values()) / 1e9,
        mbytes=case.bytes / 1e6,
        card=card.name,
        floor_us=least,
        bound=ceilings.bound(case.flops, case.bytes),
        expected_share=None if least is None else case.expected.share(card.name, least),
        why=case.expected.why,
    )


def floors(families: Iterable[str], sizes: Sizes) -> list[Floor]:
    return [
        floor(case, hardware.lookup(name))
        for family in families
        for case in harness.cases(family, sizes)
        for name in PLANNED
    ]


def as_rows(found: Iterable[Floor]) -> list[Row]:
    """For the picture: outlines, since nothing was measured."""
    names = ("family", "op", "form", "shape", "dtype", "floor_us", "expected_share")
    return [
        Row(**{name: getattr(floor, name) for name in names}, backend=floor.card, device=floor.card)
        for floor in found
    ]


def documents(found: Iterable[Floor]) -> list[dict[str, Any]]:
    return [asdict(floor) for floor in found]
