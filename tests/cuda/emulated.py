# SPDX-License-Identifier: Apache-2.0
"""backend="cuda" on CPU tensors: a family's own Python and its kernels' own source, emulated.

with emulated("quant", "gemm_w8a8", sm=90):
    quant.quantize(x, backend="cuda")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import parameters
import torch

from reeltime import backends, native


class Emulator:
    """What native.launch calls for CPU tensors."""

    def __init__(self, families: tuple[str, ...], sm: int, gpu: bool, how: dict[str, Any]) -> None:
        self.owner = {entry: f for f in families for entry in parameters.entries(f)}
        self.sm, self.how = f"sm{sm}", how
        self.device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        self.launches: list[str] = []

    def __call__(self, entry: str, given: dict[str, Any]) -> None:
        family = self.owner[entry]
        _, *files = parameters.entries(family)[entry]
        sm = self.sm if self.sm in files else "sm80"
        self.launches.append(f"{entry}_{sm}")
        parameters.run(family, entry, given, sm=sm, **self.how)


@contextlib.contextmanager
def emulated(*families: str, sm: int = 80, gpu: bool = False, **how: Any) -> Iterator[Emulator]:
    """backend="cuda" serves these families on the CPU, by the code for `sm`.

    `how`: flavour, schedule, landing, seed of the emulator; replace, which plants a mistake.
    """
    before = backends.TABLE, native.emulator
    runner = Emulator(families, sm, gpu, how)
    if runner.device.type == "cpu":
        rows = tuple(backends.Row(family, "cuda", ("cpu",)) for family in families)
        backends.TABLE, native.emulator = (*before[0], *rows), runner
    try:
        with torch.no_grad():
            yield runner
    finally:
        backends.TABLE, native.emulator = before
