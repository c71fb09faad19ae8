# SPDX-License-Identifier: Apache-2.0
"""Every check of an argument, and its message; and how close a result is to its oracle.

A message names the argument, what was expected, what came, and what would work.  Arguments are
checked by their metadata (shape, dtype, device, stride), so a check never waits for a GPU.

A call pays for its checks in microseconds: each begins with one condition that a good argument
meets.  Where that condition fails, the slow way says why; where it is merely narrower than what is
allowed, the slow way finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT8_OR_FP8 = (torch.int8, torch.float8_e4m3fn)


def fail(argument: str, expected: str, got: object, fix: str) -> NoReturn:
    """Raise the ValueError that every check raises."""
    raise ValueError(f"{argument}: expected {expected}, got {got}. {fix}")


def tensor(argument: str, x: Any, ndim: int, layout: str) -> None:
    """`x` is a tensor of `ndim` dimensions; `layout` spells them, e.g. "[B, L, C]"."""
    if not isinstance(x, torch.Tensor):
        fail(argument, f"a tensor {layout}", type(x).__name__, "Convert it with torch.as_tensor.")
    if x.dim() != ndim:
        fail(
            argument,
            f"{ndim} dimensions {layout}",
            f"shape {list(x.shape)}",
            f"Reshape it to {layout}.",
        )


def shape(argument: str, x: torch.Tensor, want: Sequence[int], layout: str) -> None:
    """`x` has exactly the shape `want`; `layout` says where its numbers come from."""
    if x.shape != want:
        fail(
            argument,
            f"shape {layout} = {list(want)}",
            list(x.shape),
            "Reshape or slice it, or pass the other arguments that it belongs to.",
        )


def dtype(argument: str, x: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """`x` has one of the `allowed` dtypes."""
    if x.dtype not in allowed:
        fail(
            argument,
            "dtype " + " or ".join(map(str, allowed)),
            x.dtype,
            f"Convert it, for example with .to({allowed[0]}).",
        )


def device(argument: str, x: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """`x` lives where `like` lives."""
    if x.device != like.device:
        fail(
            argument,
            f"the device of {like_name} ({like.device})",
            x.device,
            f"Move it with .to('{like.device}').",
        )


def dense_last(argument: str, x: torch.Tensor) -> None:
    """The last dimension of `x` is contiguous; every other stride is free."""
    if not x.is_contiguous() and x.stride(-1) != 1 and x.shape[-1] > 1:
        fail(
            argument,
            "a contiguous last dimension (stride 1)",
            f"strides {list(x.stride())}",
            "Call .contiguous() on it.",
        )


def activation(argument: str, x: Any, ndim: int, layout: str) -> None:
    """`x` is a floating-point tensor of `ndim` dimensions, the last of them contiguous."""
    if (
        not isinstance(x, torch.Tensor)
        or x.dim() != ndim
        or x.dtype not in FLOATS
        or not x.is_contiguous()
    ):
        tensor(argument, x, ndim, layout)
        dtype(argument, x, FLOATS)
        dense_last(argument, x)


def choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        fail(argument, " or ".join(map(repr, allowed)), repr(value), "Pass one of those.")


def positive(argument: str, value: float) -> None:
    """`value` is a finite number above zero."""
    if not 0 < value < math.inf:
        fail(argument, "a finite number > 0", value, "Leave it out to take the default.")


def at_least(argument: str, value: int, least: int) -> None:
    """`value` is at least `least`."""
    if value < least:
        fail(argument, f"at least {least}", value, f"Pass {least} or more.")


def divides(argument: str, part: int, whole: int, whole_name: str) -> None:
    """`part` divides `whole` exactly."""
    if part <= 0 or whole % part:
        fail(
            argument,
            f"a divisor of {whole_name} = {whole}",
            part,
            f"Pad {whole_name} to a multiple of it, or change it.",
        )


def finite_scale(argument: str, scale: torch.Tensor) -> None:
    """No NaN or Inf in `scale`.  It reads the values: for tensors on a CPU, where that is no sync.

    One sum shows them all; it may overflow without them, which the second look finds out.
    """
    if not math.isfinite(scale.sum().item()) and not bool(scale.isfinite().all()):
        fail(
            argument,
            "finite scales",
            "NaN or Inf among them",
            "Quantise again from finite values: a block with NaN or Inf has scale NaN.",
        )


def qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q, k, v agree as [B, S, H, D] with grouped heads."""
    if (
        isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and isinstance(v, torch.Tensor)
        and len(have := q.shape) == len(keys := k.shape) == len(values := v.shape) == 4
        and keys == (have[0], keys[1], keys[2], have[3])
        and values == (keys[0], keys[1], keys[2], values[3])
        and keys[2]
        and not have[2] % keys[2]
        and (same := q.dtype) in FLOATS
        and k.dtype == same == v.dtype
        and k.device == q.device == v.device
        and q.is_contiguous()
        and k.is_contiguous()
        and v.is_contiguous()
    ):
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        tensor(name, x, 4, "[B, S, H, D]")
        dense_last(name, x)
    dtype("q", q, FLOATS)
    for name, x in (("k", k), ("v", v)):
        dtype(name, x, (q.dtype,))
        device(name, x, q, "q")
    batch, _, heads, dim = q.shape
    _, length, heads_kv, _ = k.shape
    divides("k (its heads H_kv)", heads_kv, heads, "H of q")
    shape("k", k, (batch, length, heads_kv, dim), "[B, S_kv, H_kv, D]")
    shape("v", v, (batch, length, heads_kv, v.shape[3]), "[B, S_kv, H_kv, D_v]")


def segments(
    q: torch.Tensor, k: torch.Tensor, block_table: torch.Tensor, offset_index: torch.Tensor
) -> None:
    """q [O, B, L, H, D] fits a cache k [B, slots, N, H, D], and both lists fit each other."""
    if (
        isinstance(q, torch.Tensor)
        and isinstance(block_table, torch.Tensor)
        and len(have := q.shape) == 5
        and have[0]
        and q.dtype in FLOATS
        and (keys := k.shape) == (have[1], keys[1], keys[2], have[3], have[4])
        and len(listed := block_table.shape) == 1
        and offset_index.shape == listed
        and block_table.dtype == torch.int64 == offset_index.dtype
        and k.device == q.device == block_table.device == offset_index.device
    ):
        return
    tensor("q", q, 5, "[O, B, L, H, D]")
    dtype("q", q, FLOATS)
    batch, _, _, heads, dim = k.shape
    shape("q", q, (q.shape[0], batch, q.shape[2], heads, dim), "[O, B, L, H, D] of the cache")
    at_least("q (its offsets O)", q.shape[0], 1)
    device("cache", k, q, "q")
    tensor("block_table", block_table, 1, "[T]")
    shape("offset_index", offset_index, block_table.shape, "[T] of block_table")
    for name, index in (("block_table", block_table), ("offset_index", offset_index)):
        dtype(name, index, (torch.int64,))
        device(name, index, q, "q")


def softmax_scale(sm_scale: float | None, dim: int) -> float:
    """sm_scale, or 1 / sqrt(D)."""
    if sm_scale is None:
        return dim**-0.5
    if not 0 < sm_scale < math.inf:
        positive("sm_scale", sm_scale)
    return sm_scale


def output(name: str, out: torch.Tensor | None, want: Sequence[int], like: torch.dtype) -> None:
    """`out`, if given, has the shape and dtype of the result."""
    if out is not None:
        shape(name, out, want, "shape of the result")
        dtype(name, out, (like,))


class Accuracy(NamedTuple):
    """The distance of a result from its oracle; peak is the largest error over the oracle's RMS."""

    cosine: float
    relative_l1: float
    rmse: float
    peak: float


class Tolerance(NamedTuple):
    """What a backend may differ from the float64 oracle by."""

    relative_l1: float
    peak: float

    def accepts(self, error: Accuracy) -> bool:
        return error.relative_l1 <= self.relative_l1 and error.peak <= self.peak


def accuracy(got: torch.Tensor, want: torch.Tensor) -> Accuracy:
    """Compare in float64.  NaN on one side only is an infinite error; two zero tensors agree."""
    a, b = got.detach().double().flatten(), want.detach().double().flatten()
    if a.shape != b.shape:
        fail("got", f"the shape of want {list(want.shape)}", list(got.shape), "Compare like sizes.")
    if not torch.equal(a.isfinite(), b.isfinite()):
        return Accuracy(0.0, math.inf, math.inf, math.inf)
    a, b = a[b.isfinite()], b[b.isfinite()]
    if a.numel() == 0 or torch.equal(a, b):
        return Accuracy(1.0, 0.0, 0.0, 0.0)
    error, tiny = (a - b).abs(), torch.finfo(torch.float64).tiny
    rms = b.square().mean().sqrt().clamp(min=tiny)
    return Accuracy(
        cosine=float(a @ b / (a.norm() * b.norm()).clamp(min=tiny)),
        relative_l1=float(error.sum() / b.abs().sum().clamp(min=tiny)),
        rmse=float(error.square().mean().sqrt()),
        peak=float(error.max() / rms),
    )
