# SPDX-License-Identifier: Apache-2.0
"""Launch every kernel once through the public API, at small ragged shapes: for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python -m reeltime.bench.sanitize

Without PyTorch's cache every tensor is an allocation of its own, so that one element past its end
is past an allocation.  Inputs are made on the CPU and copied, results copied back: the tools see
who wrote what, and few kernels that are not ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import torch
import typer

from reeltime import backends
from reeltime.arch import UnsupportedArchError
from reeltime.bench import harness
from reeltime.bench.case import Case, Draw, Inputs, mapped
from reeltime.bench.shapes import TINY

CPU = torch.device("cpu")
KEYS = (
    30 * 64 + 7
)  # beside few queries: enough for several blocks of threads each, and a ragged end


def cases(family: str) -> Iterator[Case]:
    """All that a family is measured at, in small; together they launch every kernel there is."""
    found = list(harness.cases(family, TINY))
    yield from found
    if family == "attention":
        low = next(case for case in found if case.dtype == "int8, fp8")
        yield replace(low, form="keys split", shape=f"70x{KEYS}", make=few_queries, peers=())


def few_queries(device: torch.device, seed: int) -> Inputs:
    draw = Draw(device, seed)
    return {"q": draw(1, 70, 1, 64), "k": draw(1, KEYS, 1, 64), "v": draw(1, KEYS, 1, 64)}


def main(
    families: Annotated[list[str] | None, typer.Argument(help="All of them by default.")] = None,
    backend: Annotated[str, typer.Option(help="cuda or triton.")] = "cuda",
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """Exit code 1 if nothing could be launched."""
    place = torch.device(device)
    launched: dict[str, int] = {}
    refused: dict[str, str] = {}
    with torch.no_grad():
        for family in families or backends.FAMILIES:
            for case in cases(family):
                try:
                    backends.resolve(family, backend, place)
                    inputs = mapped(case.make(CPU, 0), lambda x: x.to(place))
                    mapped(case.run(inputs, backend), lambda x: x.cpu())
                except UnsupportedArchError as error:
                    refused[case.label] = error.why
                    continue
                launched[case.op] = launched.get(case.op, 0) + 1
                print(f"{backend}: {case.label}", flush=True)
    for label, why in refused.items():
        print(f"refused: {label}: {why}")
    missing = sorted(set(backends.OPS) - set(launched))
    print(f"{sum(launched.values())} calls of {len(launched)} ops; not launched: {missing}")
    if not launched:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
