# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made exact: what TRITON_INTERPRET=1 computes on a CPU is what a GPU would.

The interpreter of Triton 3.6 to 3.9 computes bfloat16 on its raw bits, truncates where hardware
rounds to nearest even, neither rounds nor saturates float8, and rounds a fused multiply-add twice.
`repair` replaces those operations, once.  It also checks every load and store: in bounds of a
tensor that was passed, and no address stored by two programs of one launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
SATURATES = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
NARROW = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # numpy holds their bits, not their values
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


class MemoryFault(Exception):
    """A load or store that a GPU might have let pass."""


def convert(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Bits of `source` to bits of `target`, rounded to nearest even; float8 saturates."""
    bits = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(f"i{data.itemsize}"))
    value = bits.view(torch.uint8).view(FLOATS[source])
    if target in SATURATES:
        wide, limit = value.float(), SATURATES[target]
        value = torch.where(wide.isnan(), wide, wide.clamp(-limit, limit))
    value = value.to(FLOATS[target])
    kind = interpreter._get_np_dtype(target)
    return value.view(BITS[value.itemsize]).numpy().view(kind).reshape(data.shape)


def wide(handle: Any) -> np.ndarray:
    """The values of a handle that numpy can compute with."""
    kind = handle.dtype.scalar
    return convert(handle.data, kind, tl.float32) if kind in NARROW else handle.data


def narrowed(data: np.ndarray, kind: Any) -> Any:
    return Handle(convert(data.astype(np.float32), tl.float32, kind), kind)


# --- Arithmetic ---------------------------------------------------------------------------------


def repair_casts() -> None:
    cast, convert_float = Builder.cast_impl, interpreter._convert_float

    def cast_impl(self: Any, src: Any, target: Any) -> Any:
        source, target_kind = src.dtype.scalar, target.scalar
        if source in FLOATS and target_kind in FLOATS:
            return Handle(convert(src.data, source, target_kind), target_kind)
        if source in NARROW:
            return Handle(wide(src).astype(interpreter._get_np_dtype(target)), target_kind)
        if target_kind in NARROW:
            return narrowed(src.data, target_kind)
        return cast(self, src, target)

    def convert_nearest(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        exact = source.scalar in FLOATS and target.scalar in FLOATS
        if exact and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(data, source.scalar, target.scalar)
        return convert_float(data, source, target, rounding)

    Builder.cast_impl = cast_impl
    interpreter._convert_float = convert_nearest


def repair_arithmetic() -> None:
    binary, dot = Builder.binary_op, Builder.create_dot

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        kind = lhs.dtype.scalar
        if kind not in NARROW:
            return binary(self, lhs, rhs, op)
        result = op(wide(lhs), wide(rhs))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else narrowed(result, kind)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        kind = a.dtype.scalar
        if kind == tl.int8:  # exact in float64 up to K = 2^39, and far faster than integers
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return Handle(product.astype(np.int32) + d.data, d.dtype.scalar)
        if kind in NARROW or kind == tl.float16:
            product = np.matmul(wide(a).astype(np.float32), wide(b).astype(np.float32))
            return Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *precision)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return Handle(exact.astype(z.data.dtype), z.dtype.scalar)

    Builder.binary_op, Builder.create_dot, Builder.create_fma = binary_op, create_dot, create_fma


def repair_indices() -> None:
    """A loop bound is an array of one element, which numpy no longer turns into an int."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_tensor


# --- Memory -------------------------------------------------------------------------------------


class Memory:
    """The tensors of the launch that runs, and which program stored to each of their bytes."""

    def __init__(self) -> None:
        self.extents: list[tuple[int, int]] = []
        self.starts = self.ends = np.zeros(0, np.int64)
        self.owners: dict[int, np.ndarray] = {}  # by extent, once it is stored to

    def allow(self, argument: Any) -> None:
        """The bytes between a tensor's first and last element, not all of its storage."""
        if isinstance(argument, (list, tuple)):
            for part in argument:
                self.allow(part)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            steps = zip(argument.shape, argument.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            start = argument.data_ptr()
            self.extents.append((start, start + (last + 1) * argument.element_size()))

    def seal(self) -> None:
        """Sort the extents; those that overlap are views of one memory."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted(self.extents):
            if merged and low < merged[-1][1]:
                low, high = merged[-1][0], max(high, merged.pop()[1])
            merged.append((low, high))
        self.extents = merged
        if merged:
            self.starts, self.ends = np.array(merged).T

    def check(self, pointers: Any, mask: np.ndarray, program: Any, verb: str) -> None:
        seen = np.broadcast_to(mask, pointers.data.shape).astype(bool)
        address = pointers.data[seen].astype(np.int64)
        if not address.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        home = np.searchsorted(self.starts, address, "right") - 1
        inside = (home >= 0) & (address + size <= self.ends[home])
        if not inside.all():
            bad = int(address[~inside][0])
            low, high = min(self.extents, key=lambda e: min(abs(bad - e[0]), abs(bad - e[1])))
            raise MemoryFault(
                f"program {program} {verb}s out of bounds: {int((~inside).sum())} lanes, the first "
                f"{bad - low} bytes from the start of a tensor of {high - low} bytes"
            )
        if verb == "store":
            first, last = int(home.min()), int(home.max())
            for index in range(first, last + 1):
                here = address if first == last else address[home == index]
                if index not in self.owners:
                    length = self.ends[index] - self.starts[index]
                    self.owners[index] = np.full(length, -1, np.int64)
                self.claim(self.owners[index], here - self.starts[index], program)

    def claim(self, owner: np.ndarray, place: np.ndarray, program: tuple[int, ...]) -> None:
        x, y, z = program
        me = (x << 42) | (y << 21) | z
        others = owner[place][(owner[place] >= 0) & (owner[place] != me)]
        if others.size:
            who = int(others[0])
            other = who >> 42, who >> 21 & 0x1FFFFF, who & 0x1FFFFF
            raise MemoryFault(f"programs {other} and {program} both store to one address")
        owner[place] = me


def repair_memory() -> None:
    load, store = Builder.create_masked_load, Builder.create_masked_store
    prepare, run = interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__
    patch = interpreter._patch_lang
    running: list[Memory] = []
    patched: set[int] = set()

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        running[-1].check(pointers, mask.data, self.grid_idx, "load")
        return load(self, pointers, mask, *rest, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].check(pointers, mask.data, self.grid_idx, "store")
        return store(self, pointers, value, mask, *rest)

    def prepare_arguments(self: Any, arguments: Any, named: Any) -> Any:
        copies = prepare(self, arguments, named)
        running[-1].allow(copies[0])
        running[-1].allow(list(copies[1].values()))
        running[-1].seal()
        return copies

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        running.append(Memory())
        patched.clear()
        try:
            with np.errstate(all="ignore"):
                return run(self, *arguments, **named)
        finally:
            running.pop()

    def patch_once(fn: Any) -> Any:
        """Every call of a device function patches triton.language again: once a launch will do."""
        modules = {
            id(value) for value in fn.__globals__.values() if value is tl or value is tl.core
        }
        if modules <= patched:
            return None
        patched.update(modules)
        return patch(fn)

    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    interpreter.GridExecutor._init_args_hst = prepare_arguments
    interpreter.GridExecutor.__call__ = call
    interpreter._patch_lang = patch_once


_repaired = False


def repair() -> None:
    """Replace what is wrong, once per process."""
    global _repaired
    if not _repaired:
        _repaired = True
        repair_casts()
        repair_arithmetic()
        repair_indices()
        repair_memory()
