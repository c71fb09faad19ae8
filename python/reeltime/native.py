# SPDX-License-Identifier: Apache-2.0
"""The one way a CUDA kernel is launched, noted for `reeltime port`, or refused.

A family's `cuda.py` allocates the outputs and calls launch() with the fields of the kernel's
parameters, by name.  On a GPU they go to reeltime._C as addresses and numbers, with the current
stream; on meta tensors nothing runs, but what would is noted while recording(); on CPU tensors the
emulator runs the same source, where tests have installed it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reeltime import _C, arch

# The numbers of csrc/common/dtype.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Launch:
    """What one launch would have run."""

    kernel: str  # its symbol in the extension
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared_bytes: int


@dataclass
class Recording:
    arch: arch.Arch
    launches: list[Launch]


_recording: Recording | None = None

# Runs an entry point on CPU tensors, (entry, fields) -> None.  Only tests have one.
emulator: Callable[[str, dict[str, Any]], None] | None = None


@contextlib.contextmanager
def recording(target: arch.Arch) -> Iterator[list[Launch]]:
    """Note the launches of calls on meta tensors, as `target` would get them."""
    global _recording
    before, _recording = _recording, Recording(target, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def launch(entry: str, device: torch.device, **fields: Any) -> None:
    """Run `entry` on the current stream of `device`; the fields are those of its parameters."""
    if device.type == "cuda":
        run = getattr(_C, entry)
        values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
        sm, stream = arch_of(device).sm, torch.cuda.current_stream(device).cuda_stream
        if device.index is None or device.index == torch.cuda.current_device():
            run(sm, stream, **values)
        else:
            with torch.cuda.device(device):
                run(sm, stream, **values)
    elif device.type == "meta":
        if _recording is not None:
            _recording.launches.extend(_noted(entry, _recording.arch, fields))
    elif emulator is not None:
        emulator(entry, fields)
    else:
        raise RuntimeError(f"{entry}: expected tensors on a GPU, got {device}")


def _noted(entry: str, target: arch.Arch, fields: dict[str, Any]) -> list[Launch]:
    """Addresses that nobody follows, all aligned."""
    values = {k: 4096 if isinstance(v, Tensor) else v for k, v in fields.items()}
    rows = _C.record(functools.partial(getattr(_C, entry), target.sm, 0, **values))
    return [Launch(*row) for row in rows]


def code(dtype: torch.dtype | None) -> int:
    """The number of a dtype in csrc/common/dtype.h; of none, any."""
    return 0 if dtype is None else DTYPES.index(dtype)


def code_of(x: Tensor | None) -> int:
    """The same of a tensor's dtype."""
    return 0 if x is None else DTYPES.index(x.dtype)


@functools.cache
def _stride_names(name: str, dims: str) -> tuple[str, ...]:
    return tuple(sys.intern(f"stride_{name}{dim}") for dim in dims)


def strides(name: str, x: Tensor | None, dims: str) -> dict[str, int]:
    """The fields stride_<name><dim> of the first dimensions of x, in elements; of no tensor, 0."""
    names = _stride_names(name, dims)
    return dict.fromkeys(names, 0) if x is None else dict(zip(names, x.stride(), strict=False))


def dense(x: Tensor) -> Tensor:
    """x with neighbouring channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _arch_of(index: int) -> arch.Arch:
    return arch.lookup(torch.cuda.get_device_capability(index))


def arch_of(device: torch.device) -> arch.Arch:
    """The row of the GPU table that a launch on `device` is made for."""
    if device.type == "cuda":
        return _arch_of(torch.cuda.current_device() if device.index is None else device.index)
    return arch.ARCHS[0] if _recording is None else _recording.arch


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """SMs of the device."""
    if device.type == "cuda":
        return _processors(torch.cuda.current_device() if device.index is None else device.index)
    return 2 if _recording is None else _recording.arch.processors


@functools.cache
def _unbuilt(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    targets = {row.capability: row.target for row in arch.ARCHS}
    if targets.get(capability) in _C.archs:
        return None
    return (
        f"its kernels are built for {', '.join(f'sm_{a}' for a in _C.archs)}, not for "
        f"sm_{capability[0]}{capability[1]}; build with -C cmake.define.REELTIME_CUDA_ARCHS=native"
    )


def unless(
    *names: int, check: Callable[..., str | None] | None = None
) -> Callable[..., str | None]:
    """A predicate for Op.kernel: refuses float64 at these positions and GPUs that the extension was
    not built for; then `check(*args)` has its say."""

    def predicate(device: torch.device, *arguments: Any) -> str | None:
        for index in names:
            value = arguments[index]
            if getattr(value, "dtype", value) is torch.float64:
                return "its kernels compute in float32; float64 has backend='reference'"
        if device.type == "cuda":
            why = _unbuilt(torch.cuda.current_device() if device.index is None else device.index)
            if why:
                return why
        return None if check is None else check(*arguments)

    return predicate
