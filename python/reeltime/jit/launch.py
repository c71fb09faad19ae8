# SPDX-License-Identifier: Apache-2.0
"""The one way a Triton kernel is launched, recorded for ahead-of-time compilation, or refused.

Configurations are data: tuned/<gpu>.json where someone measured, a heuristic of the family
otherwise.  Nothing is tuned inside a call, so a captured step replays what was captured.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from reeltime import arch
from reeltime.arch import slug

# Decided when a kernel is decorated, so it cannot change afterwards.
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from reeltime.jit import interpreter

    interpreter.repair()

TUNED = Path(__file__).resolve().parent.parent / "tuned"
Config = dict[str, int]  # tile sizes by constexpr name, num_warps, num_stages


@dataclass(frozen=True)
class Launch:
    """What one launch would have run."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter name, constexprs included
    options: Config  # num_warps, num_stages


@dataclass
class Recording:
    arch: arch.Arch
    launches: list[Launch]


_recording: Recording | None = None


@contextlib.contextmanager
def recording(target: arch.Arch) -> Iterator[list[Launch]]:
    """Collect launches, configured for `target`, instead of running them; tensors may be meta."""
    global _recording
    before, _recording = _recording, Recording(target, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constexprs: Any,
) -> None:
    """Run `kernel` on the current stream of its tensors' device; an empty grid does nothing."""
    if 0 in grid:
        return
    if _recording is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constexprs
        options = {"num_warps": num_warps, "num_stages": num_stages}
        _recording.launches.append(Launch(kernel, grid, named, options))
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    if device.type == "meta":
        return
    run = functools.partial(kernel[grid], *arguments, **constexprs)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(num_warps=num_warps, num_stages=num_stages)
    else:
        run(num_warps=num_warps, num_stages=num_stages)


def arch_of(device: torch.device) -> arch.Arch:
    """The row of the GPU table that a launch on `device` is configured for."""
    if _recording is not None:
        return _recording.arch
    if device.type == "cuda":
        return arch.lookup(torch.cuda.get_device_capability(device))
    return arch.ARCHS[0]  # interpreted: what every GPU can run


def config(kernel: str, device: torch.device, default: Config, **shape: int) -> Config:
    """The tuned configuration of `kernel` on this GPU for this shape, or `default`.

    tuned/<gpu>.json: {kernel: [{"when": {name: size, ...}, "config": {...}}, ...]}; the first row
    whose sizes all agree wins, and what it leaves out comes from `default`.
    """
    if device.type != "cuda" or _recording is not None:
        return default
    for row in tuned(gpu_name(device.index or 0)).get(kernel, ()):
        if all(shape.get(name) == size for name, size in row["when"].items()):
            return {**default, **row["config"]}
    return default


@functools.cache
def gpu_name(index: int) -> str:
    """The card of that index, as files are named after it."""
    return slug(torch.cuda.get_device_name(index))


@functools.cache
def tuned(gpu: str) -> dict[str, list[dict[str, Config]]]:
    """tuned/<gpu>.json, or nothing."""
    path = TUNED / f"{gpu}.json"
    return json.loads(path.read_text()) if path.exists() else {}


RARE = frozenset((torch.float64, torch.float8_e4m3fn))  # what some device does not serve


def refuses(device: torch.device, *formats: torch.dtype | torch.Tensor | None) -> str | None:
    """Why Triton cannot serve these dtypes on this device, or None: what `unless` is made of."""
    dtypes = {f.dtype if isinstance(f, torch.Tensor) else f for f in formats}
    if torch.float64 in dtypes:
        return "its kernels compute in float32; float64 has backend='reference'"
    if torch.float8_e4m3fn in dtypes and (device.type == "cuda" or _recording is not None):
        if arch_of(device).capability < (8, 9):
            return "float8_e4m3fn needs sm89 or newer; here backend='reference' has it"
    return None


def unless(
    *names: int, check: Callable[..., str | None] | None = None
) -> Callable[..., str | None]:
    """A predicate for Op.kernel: refuses on the arguments at these positions, then `check`."""

    def predicate(device: torch.device, *arguments: Any) -> str | None:
        for index in names:  # every call pays for this loop: a good one for nothing else
            value = arguments[index]
            if getattr(value, "dtype", value) in RARE:
                why = refuses(device, *(arguments[i] for i in names))
                if why:
                    return why
                break
        return None if check is None else check(*arguments)

    return predicate


# What a kernel calls a dtype.
NAMES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def width(dim: int, *stored: torch.Tensor | None) -> int:
    """The power of two that a tile pads D to; 8-bit products take no fewer than 32."""
    low = any(x is not None and x.element_size() == 1 for x in stored)
    return max(triton.next_power_of_2(dim), 32 if low else 16)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous: a copy of tensors that are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
