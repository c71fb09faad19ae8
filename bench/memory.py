# SPDX-License-Identifier: Apache-2.0
"""What a step holds on a GPU at each quality level, and which cards have room for it.

The step itself, on meta tensors (model/step.py): nothing is allocated, nothing estimated.  Without
the codec, CUDA's own context and what PyTorch's allocator rounds up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from reeltime import backends
from reeltime.bench.hardware import CARDS, Card
from reeltime.bench.plan import Target
from reeltime.bench.profile_ops import conditions
from reeltime.model.config import SparseLinear
from reeltime.model.memory_plan import MemoryPlan
from reeltime.model.quality import Quality
from reeltime.model.step import planned


@dataclass(frozen=True)
class Held:
    """One quality level of a step."""

    target: Target
    layout: str
    quality: str
    workspace_of: str  # "kernels", or "reference" where this build has none
    plan: MemoryPlan
    cards: tuple[Card, ...]  # that were asked for

    def fits(self, card: Card) -> bool:
        return self.plan.peak <= card.memory_gb * 1e9

    @property
    def held_by(self) -> list[str]:
        return [card.name for card in self.cards if self.fits(card)]

    def row(self) -> dict[str, Any]:
        """Flat, for --json: "caches, keys" is caches_keys_bytes."""
        columns, lines = self.target.size
        parts = {
            f"{part.replace(', ', '_')}_bytes": size for part, size in self.plan.parts().items()
        }
        return {
            "preset": self.target.preset,
            "target": self.target.name,
            "width": columns,
            "height": lines,
            "layout": self.layout,
            "quality": self.quality,
            "workspace_of": self.workspace_of,
            **parts,
            "held_by": self.held_by,
        }


def held(
    target: Target, level: Quality, *, layout: str | None = None, cards: Sequence[Card] = CARDS
) -> Held:
    """A target's step at a quality level.

    Args:
        layout: one of `model.layout.LAYOUTS`; the target's own by default.
        cards: to say of which of them have room.
    Raises:
        ValueError: a layout that this level cannot have.
    """
    config, name = target.model(), layout or target.layout
    if level.topk is not None:
        config = replace(config, sla=SparseLinear(level.topk))
    plan = planned(
        config,
        target.stream_layout(name),
        (config.in_channels, *(n // target.stride[0] for n in reversed(target.size))),
        level,
        contexts=[(1, *conditions(config), config.text_dim)],
    )
    kernels = any(row.backend != "reference" for row in backends.TABLE)
    whose = "kernels" if kernels else "reference"
    return Held(target, name, level.name, whose, plan, tuple(cards))
