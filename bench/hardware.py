# SPDX-License-Identifier: Apache-2.0
"""The cards: what a data sheet promises of each.  One row per card; docs/porting.md adds one.

Floors of cards that nobody has here are computed from these rows.  On a card at hand the ceilings
are measured (bench/ceilings.py), and this row says which file its results go to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reeltime.arch import ARCHS, slug


def peaks(name: str) -> Mapping[str, float]:
    """Dense TFLOPS by dtype of an architecture's card, from reeltime/arch.py."""
    return next(arch.tflops for arch in ARCHS if arch.name == name)


@dataclass(frozen=True)
class Card:
    name: str
    device: str  # as torch.cuda.get_device_name() spells it
    arch: str  # its row of reeltime/arch.py
    gbps: float  # memory bandwidth
    l2_mb: float  # capacity of the L2 cache
    memory_gb: float
    link_gbps: float  # to another card, in one direction: NVLink, or PCIe
    watts: int  # board power
    tflops: Mapping[str, float]  # peaks(arch), or its own where it is another card of that arch

    @property
    def file(self) -> str:
        """Its results: bench/results/<file>."""
        return f"{slug(self.device)}.csv"


CARDS: tuple[Card, ...] = (
    Card("A100", "NVIDIA A100-SXM4-80GB", "sm80", 2039, 40, 80, 300, 400, peaks("sm80")),
    Card("RTX 4090", "NVIDIA GeForce RTX 4090", "sm89", 1008, 72, 24, 32, 450, peaks("sm89")),
    Card("H100", "NVIDIA H100 80GB HBM3", "sm90", 3352, 50, 80, 450, 700, peaks("sm90")),
    Card("H200", "NVIDIA H200", "sm90", 4800, 60, 141, 450, 700, peaks("sm90")),
    Card("B200", "NVIDIA B200", "sm100", 8000, 126, 180, 900, 1000, peaks("sm100")),
    Card("RTX 5090", "NVIDIA GeForce RTX 5090", "sm120", 1792, 96, 32, 64, 575, peaks("sm120")),
)


def find(device: str) -> Card | None:
    """The row of a device name, or of a card's own name; None if there is none."""
    for card in CARDS:
        if slug(device) in (slug(card.device), slug(card.name)):
            return card
    return None


def lookup(device: str) -> Card:
    """The row of a device name.

    Raises:
        ValueError: no such row; the message says where one is added.
    """
    card = find(device)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise ValueError(
            f"hardware: expected one of {known}, got {device!r}. A new card is one row in "
            "bench/hardware.py: see docs/porting.md."
        )
    return card
