# SPDX-License-Identifier: Apache-2.0
"""What a captured region may do, and the memory that a step needs.

`Recorder` runs a region once, eagerly, and keeps what a graph would keep of it: the ops with their
shapes, where each was called, and how many bytes were alive at a time.  It stops at whatever no
graph can hold:

- a host read (`.item()`, `bool(tensor)`, an index, `.cpu()`, `.tolist()`), which is a wait for the
  device, and what Python does with the value is captured once and never looked at again;
- a size that depends on data (`nonzero`, a boolean index);
- memory that is still held when the region is over: a replay would write into it again.

What it cannot see in one run, a branch of Python or a counter, shows in two: `compare` wants them
equal, op by op, in their shapes, their constants and the memory that they find.  On meta tensors
nothing can depend on data at all, and nothing is allocated.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reeltime import checks

# Methods that bring a value to the host, as Python spells them and as PyTorch does.
HOST_READS = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"}
HOST_READS |= {"item", "tolist", "numpy", "cpu", "equal", "is_nonzero", "_local_scalar_dense"}
DATA_SIZES = {"nonzero", "masked_select", "argwhere", "unique", "_unique2", "unique_dim"}
DATA_SIZES |= {"unique_consecutive", "bincount"}
HOST_DATA = {"tensor", "as_tensor", "new_tensor", "from_numpy", "asarray"}  # a copy, captured once
# Looks at values of a CPU only, where that is no wait; a GPU never comes here.
HOST_CHECKS = {checks.finite_scale.__code__}
SKIPPED = (str(Path(torch.__file__).parent), __file__)  # files that are never the cause


class CaptureError(RuntimeError):
    """A region does what no captured graph can hold: names the op and the line."""


@dataclass(frozen=True)
class Place:
    """A line of source."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        path = Path(self.file)
        text = linecache.getline(self.file, self.line).strip()
        return f"{path.parent.name}/{path.name}:{self.line} in {self.function}: {text}"


@dataclass(frozen=True)
class Call:
    """One op of a region: its name, what a graph would hold of the call, and who made it."""

    op: str
    constants: tuple[str, ...]  # arguments that are no tensors
    static: tuple[int, ...]  # memory of arguments that were there before the region
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    place: Place = field(compare=False)


@dataclass
class Recording:
    """What a region did."""

    calls: list[Call] = field(default_factory=list)
    peak: int = 0  # bytes alive at once that the region itself had allocated


class Recorder(TorchDispatchMode):
    """`with Recorder() as recording:` around a region, run eagerly on any device.

    Raises:
        CaptureError: the region cannot be captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._held: dict[int, tuple[int, Place]] = {}  # storage: its bytes, who allocated it
        self._alive = 0
        self._methods = _Methods()

    def __enter__(self) -> Recording:
        super().__enter__()
        self._methods.__enter__()
        return self.recording

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._methods.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
        if kind is None and self._held:
            size, place = max(self._held.values(), key=lambda held: held[0])
            raise CaptureError(
                f"capture: {len(self._held)} tensors outlive the region, which every replay would "
                f"write into again; the largest has {size} bytes, from {place}"
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        place, name = here(), func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        constants = tuple(str(x) for x in leaves if not isinstance(x, Tensor))
        refuse(name, inputs, kwargs or {}, place)
        if name == "lift_fresh":  # a number that Python has just made a tensor of
            self._hold(inputs[0].untyped_storage(), [], place)
        memory = [x.untyped_storage() for x in inputs]
        known = [storage._cdata for storage in memory]
        static = tuple(s._cdata for s in memory if s.nbytes() and s._cdata not in self._held)
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        results = tuple((tuple(x.shape), x.dtype) for x in outputs)
        self.recording.calls.append(Call(str(func), constants, static, results, place))
        for x in outputs:
            self._hold(x.untyped_storage(), known, place)
        return out

    def _hold(self, storage: torch.UntypedStorage, known: list[int], place: Place) -> None:
        key = storage._cdata
        if key in known or key in self._held or not storage.nbytes():
            return
        self._held[key] = (storage.nbytes(), place)
        weakref.finalize(storage, self._drop, key)
        self._alive += storage.nbytes()
        self.recording.peak = max(self.recording.peak, self._alive)

    def _drop(self, key: int) -> None:
        self._alive -= self._held.pop(key)[0]


class _Methods(TorchFunctionMode):
    """Host reads that never become an op on a CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST_READS | HOST_DATA:
            refuse(name, [], {}, here())
        return func(*args, **(kwargs or {}))


def refuse(name: str, inputs: list[Tensor], options: dict[str, Any], place: Place) -> None:
    if name in HOST_READS and not _is_host_check():
        raise CaptureError(f"capture: {name} reads the device from the host, at {place}")
    if name in HOST_DATA:
        raise CaptureError(f"capture: {name} copies from the host, at {place}")
    if name in DATA_SIZES or name == "index" and inputs[1].dtype in (torch.bool, torch.uint8):
        raise CaptureError(f"capture: the size of what {name} returns is data, at {place}")
    devices = {x.device.type for x in inputs if x.dim()}  # a number may come from anywhere
    if devices and options.get("device") is not None:
        devices.add(torch.device(options["device"]).type)
    if len(devices) > 1:
        copied = " and ".join(sorted(devices))
        raise CaptureError(f"capture: {name} copies between {copied}, at {place}")


def _is_host_check() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code in HOST_CHECKS:
            return True
        frame = frame.f_back
    return False


def here() -> Place:
    """The innermost line that is neither PyTorch's nor this file's."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(SKIPPED):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def compare(first: Recording, second: Recording) -> None:
    """Both are the same graph.

    Raises:
        CaptureError: names the first op in which they differ, and its line.
    """
    for index, (a, b) in enumerate(zip(first.calls, second.calls, strict=False)):
        if a != b:
            if replace(a, static=b.static) == b:
                raise CaptureError(
                    f"capture: op {index}, {describe(a)}, works on other memory in another run, at "
                    f"{a.place}"
                )
            raise CaptureError(
                f"capture: op {index} is {describe(a)} in one run, at {a.place}, and {describe(b)} "
                f"in another, at {b.place}"
            )
    if len(first.calls) != len(second.calls):
        longer = max(first.calls, second.calls, key=len)
        extra = longer[min(len(first.calls), len(second.calls))]
        raise CaptureError(f"capture: one run goes on with {describe(extra)}, at {extra.place}")


def describe(call: Call) -> str:
    shapes = ", ".join(f"{list(shape)} {str(dtype)[6:]}" for shape, dtype in call.results)
    return f"{call.op}({', '.join(call.constants)}) -> {shapes or 'nothing'}"


# --- The plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a step, all of them known before it runs.

    Attributes:
        weights: parameters and buffers of the transformer.
        caches: of every layer: keys, values, scales, summaries.
        buffers: static inputs and outputs: conditions, and the latents, noise and plans of a pass.
        workspace: of each graph, what it has alive at once at most; one pool serves them all.
    """

    weights: int
    caches: dict[str, int]
    buffers: dict[str, int]
    workspace: dict[str, int]

    @property
    def peak(self) -> int:
        held = (self.weights, *self.caches.values(), *self.buffers.values())
        return sum(held) + max(self.workspace.values(), default=0)

    def parts(self) -> dict[str, int]:
        """Flat, for tables and --json.  The peak is their sum, with the largest workspace alone."""
        groups = {"caches": self.caches, "buffers": self.buffers, "workspace": self.workspace}
        found = {"weights": self.weights}
        for group, sizes in groups.items():
            found |= {f"{group}, {name}": size for name, size in sizes.items()}
        return found | {"peak": self.peak}


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of distinct memory, as it was allocated."""
    storages = (x.untyped_storage() for x in tensors if x is not None)
    return sum({s._cdata: s.nbytes() for s in storages}.values())
