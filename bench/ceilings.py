# SPDX-License-Identifier: Apache-2.0
"""What a card can do at best: by its data sheet, or measured in the run that is judged by it.

floor = max(flops / peak, bytes / bandwidth): no kernel is faster, whoever wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from reeltime.bench.hardware import Card
from reeltime.bench.timing import Graph

SIDE = 8192  # of the square matrix products
COPIED = 2**31  # bytes of the tensor that is copied


@dataclass(frozen=True)
class Ceilings:
    """tflops by dtype; a dtype that is missing has no peak, and what needs it no floor."""

    gbps: float
    tflops: Mapping[str, float]

    @classmethod
    def promised(cls, card: Card) -> Ceilings:
        """By the data sheet."""
        return cls(card.gbps, card.tflops)

    def compute_us(self, flops: Mapping[str, float]) -> float | None:
        if not set(flops) <= set(self.tflops):
            return None
        return sum(count / self.tflops[dtype] for dtype, count in flops.items()) / 1e6

    def memory_us(self, moved: int) -> float:
        return moved / self.gbps / 1e3

    def floor_us(self, flops: Mapping[str, float], moved: int) -> float | None:
        compute = self.compute_us(flops)
        return None if compute is None else max(compute, self.memory_us(moved))

    def bound(self, flops: Mapping[str, float], moved: int) -> str:
        """What the floor is made of."""
        compute = self.compute_us(flops)
        if compute is None:
            return ""
        return "memory" if self.memory_us(moved) >= compute else " + ".join(flops)


# --- Measured -----------------------------------------------------------------------------------


def products(device: torch.device) -> dict[str, Callable[[], object]]:
    """A large product of random numbers by dtype; zeros would run faster than data does."""
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(SIDE, SIDE, generator=generator, device=device) for _ in range(2))
    one = torch.ones((), device=device)
    a, b = x.bfloat16(), y.bfloat16().t()
    a8, b8 = ((40 * z).clamp(-127, 127).to(torch.int8) for z in (x, y))
    calls: dict[str, Callable[[], object]] = {
        "bf16": functools.partial(torch.mm, a, b),
        "int8": functools.partial(torch._int_mm, a8, b8.t()),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        low = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t()
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        for name, fast in (("fp8", False), ("fp8, fast sums", True)):
            scaled = functools.partial(torch._scaled_mm, *low, use_fast_accum=fast, **options)
            calls[name] = scaled
    return calls


def measured(
    device: torch.device, promised: Mapping[str, float], note: Callable[[str], object]
) -> Ceilings:
    """Of a card at hand.  `promised`: its data sheet, for what no product here measures.

    `note` is told of a product that PyTorch refuses.
    """
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copied = Graph(lambda i, a=source, b=target: b.copy_(a), 1, device).time()
    gbps = 2 * COPIED / copied.p50 / 1e3
    del source, target
    rates: dict[str, float] = {}
    for name, call in products(device).items():
        try:
            p50 = Graph(lambda i, call=call: call(), 1, device).time().p50
        except RuntimeError as error:
            note(f"ceiling of {name} not measured: {error}")
            continue
        dtype = name.split(",")[0]
        rates[dtype] = max(rates.get(dtype, 0.0), 2 * SIDE**3 / p50 / 1e6)
    torch.cuda.empty_cache()
    return Ceilings(gbps, shared(rates, promised))


def shared(rates: Mapping[str, float], promised: Mapping[str, float]) -> dict[str, float]:
    """Formats whose peaks are equal by the data sheet share the best rate that was measured.

    They run on the same tensor cores at the same rate; what differs is the library's kernel, and a
    ceiling must not be lower for a poor one.
    """
    best = {
        dtype: max(
            rate for other, rate in rates.items() if promised.get(other) == promised.get(dtype)
        )
        for dtype, rate in rates.items()
        if dtype in promised
    }
    return {**promised, **rates, **best}
