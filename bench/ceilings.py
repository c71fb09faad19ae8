# SPDX-License-Identifier: Apache-2.0
"""What a card can do at best: by its data sheet, or measured in the run that is judged by it.

    python -m reeltime.bench.ceilings [--out bench/results]    # of the card at hand, as rows

floor = max(flops / peak, bytes / bandwidth): no kernel is faster, whoever wrote it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from reeltime.bench.hardware import Card
from reeltime.bench.sensors import Reading, Sensors
from reeltime.bench.timing import Graph, Times

if TYPE_CHECKING:
    from reeltime.bench.rows import Row

FAMILY = "ceiling"  # of its rows
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


@dataclass(frozen=True)
class Best:
    """One measurement: of the copy, `flops` is 0; of a product, `bytes` is."""

    name: str  # "copy", or the dtype and how
    times: Times
    flops: float = 0.0
    bytes: int = 0

    @property
    def dtype(self) -> str:
        return self.name.split(",")[0]

    @property
    def gbps(self) -> float:
        return self.bytes / self.times.p50 / 1e3

    @property
    def tflops(self) -> float:
        return self.flops / self.times.p50 / 1e6


def bests(
    device: torch.device,
    note: Callable[[str], object],
    meanwhile: Callable[[], object] | None = None,
) -> Iterator[Best]:
    """The copy, then every product that PyTorch does not refuse; `note` is told of one it does.

    `meanwhile` runs while the GPU is at work.
    """
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copied = Graph(lambda i, a=source, b=target: b.copy_(a), 1, device).time(meanwhile)
    yield Best("copy", copied, bytes=2 * COPIED)
    del source, target
    for name, call in products(device).items():
        try:
            times = Graph(lambda i, call=call: call(), 1, device).time(meanwhile)
        except RuntimeError as error:
            note(f"ceiling of {name} not measured: {error}")
            continue
        yield Best(name, times, flops=2 * SIDE**3)
    torch.cuda.empty_cache()


def measured(
    device: torch.device, promised: Mapping[str, float], note: Callable[[str], object]
) -> Ceilings:
    """Of a card at hand.  `promised`: its data sheet, for what no product here measures."""
    copied, *rest = bests(device, note)
    rates: dict[str, float] = {}
    for one in rest:
        rates[one.dtype] = max(rates.get(one.dtype, 0.0), one.tflops)
    return Ceilings(copied.gbps, shared(rates, promised))


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


# --- As rows ------------------------------------------------------------------------------------


def as_rows(device: torch.device, sensors: Sensors, note: Callable[[str], object]) -> Iterator[Row]:
    """A row per measurement, with the clocks meanwhile."""
    from reeltime.bench import rows  # which knows this file

    readings: list[Reading] = []
    for one in bests(device, note, lambda: readings.append(sensors.read())):
        copied = one.name == "copy"
        yield rows.Row(
            FAMILY,
            "copy" if copied else "product",
            one.name.partition(", ")[2],
            f"{COPIED >> 20} MiB" if copied else "x".join([str(SIDE)] * 3),
            "uint8" if copied else one.dtype,
            "torch",
            rows.device_name(device),
            **dict(zip(("p50_us", "p20_us", "p80_us"), one.times, strict=True)),
            tflops=None if copied else one.tflops,
            gbps=one.gbps if copied else None,
            **rows.conditions(readings[-1]),
        )


def main(
    out: Annotated[Path | None, typer.Option(help="Append to <gpu>.csv in this folder.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="What was measured; asked of git by default.")
    ] = None,
) -> None:
    """Copy bandwidth and matrix rates of the GPU at hand, on random data."""
    from reeltime.bench import rows

    if not torch.cuda.is_available():
        raise ValueError("ceilings: expected a CUDA device, found none")
    device = torch.device("cuda")
    commit = commit or rows.find_commit(Path.cwd())
    path = None if out is None else rows.results_file(out, device, commit)
    sensors = Sensors(device)
    where = rows.environment(commit, sensors)
    for row in as_rows(device, sensors, print):
        rate = f"{row.gbps:.0f} GB/s" if row.gbps else f"{row.tflops:.0f} TFLOPS"
        print(f"{row.label}: {rate}, {row.sm_mhz} MHz, {row.power_w} W, {row.throttle}", flush=True)
        if path is not None:
            rows.append(path, [row], where)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
