# SPDX-License-Identifier: Apache-2.0
"""Launch every kernel once through the public API, at small ragged shapes: for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python -m reeltime.bench.sanitize

Without PyTorch's cache every tensor is an allocation of its own, so that one element past its end
is past an allocation.  Inputs are made on the CPU and copied, results copied back: the tools see
who wrote what, and few kernels that are not ours.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from reeltime import backends
from reeltime.arch import UnsupportedArchError
from reeltime.bench import harness
from reeltime.bench.case import mapped
from reeltime.bench.shapes import TINY

CPU = torch.device("cpu")


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
            for case in harness.cases(family, TINY):
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
