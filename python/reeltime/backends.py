# SPDX-License-Identifier: Apache-2.0
"""Which backend serves which kernel family, and how an op is registered with PyTorch.

TABLE is the only place that knows what exists.  `Op` gives one contract its three faces:

- the reference, called directly, so that autograd and torch.compile see plain PyTorch;
- `torch.ops.reeltime.<name>`, opaque, with a fake kernel: what hand-written kernels run behind
  wherever autograd, a tracer or a profiler looks, and what exported graphs hold.  Its gradient is
  the kernel's own, or the reference's, recomputed;
- its kernels by backend, which a family's `triton.py` and `cuda.py` add when first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reeltime import _C

FAMILIES = ("quant", "norm", "rope_kv", "gemm_w8a8", "attention", "sla")
BACKENDS = ("auto", "reference", "triton", "cuda")


@dataclass(frozen=True)
class Row:
    """One backend of one family, and the devices it runs on (empty: every device)."""

    family: str
    backend: str
    device_types: tuple[str, ...] = ()

    def runs_on(self, device: torch.device) -> bool:
        return not self.device_types or device.type in self.device_types


def _triton(*device_types: str) -> tuple[Row, ...]:
    installed = importlib.util.find_spec("triton") is not None
    return tuple(Row(family, "triton", device_types) for family in FAMILIES if installed)


def _cuda(*device_types: str) -> tuple[Row, ...]:
    """Of the families that this build has compiled kernels for."""
    return tuple(Row(family, "cuda", device_types) for family in _C.cuda_families)


# The order is the order of preference: "auto" takes the first row that serves the call.  On CPUs
# Triton interprets, which is for tests: TRITON_INTERPRET=1 allows it and "auto" never asks for it.
# On meta tensors a kernel gives shapes, and reeltime port records what it would launch.
TABLE: tuple[Row, ...] = (
    *_cuda("cuda"),
    *_triton("cuda"),
    *(Row(family, "reference") for family in FAMILIES),
    *_cuda("meta"),
    *_triton("meta", *["cpu"] * (os.environ.get("TRITON_INTERPRET") == "1")),
)


def resolve(
    family: str,
    backend: str,
    device: torch.device,
    op: Op | None = None,
    args: tuple[Any, ...] = (),
) -> str:
    """The backend that a call runs on.

    Args:
        op, args: the call; without them, any call of the family.
    Raises:
        ValueError: an unknown family or backend.
        UnsupportedArchError: no row of TABLE serves this family, backend, device and arguments.
    """
    for row in TABLE:
        if row.family == family and backend in ("auto", row.backend) and row.runs_on(device):
            if op is None or op.refuses(row.backend, device, args) is None:
                return row.backend
    from reeltime import arch, checks

    checks.choice("family", family, FAMILIES)
    checks.choice("backend", backend, BACKENDS)
    served = [row.backend for row in TABLE if row.family == family and row.runs_on(device)]
    why = op.refuses(backend, device, args) if op and backend in served else None
    offer = " or ".join(f"backend={name!r}" for name in served if name != backend)
    raise arch.UnsupportedArchError(
        f"backend: {backend!r} cannot serve {family} on {device} in this build"
        f"{f': {why}' if why else ''}. Pass {offer or 'another device'}, or backend='auto' to let "
        "the table choose.",
        why,
    )


def no_kernel(
    op: Op, backend: str, chosen: str, device: torch.device, args: tuple[Any, ...]
) -> str | None:
    """Why `backend` resolved to the reference where kernels are: for who then has better code.

    None on a CPU, where the reference serves, and if it was asked for.
    """
    if chosen != "reference" or backend != "auto" or device.type == "cpu":
        return None
    rows = [r for r in TABLE if r.family == op.family and r.backend != "reference"]
    reasons = [op.refuses(row.backend, device, args) for row in rows if row.runs_on(device)]
    return next(filter(None, reasons), f"no kernel for {device.type}")


def support_matrix() -> list[dict[str, object]]:
    """One row per family and backend: family, backend, available, why."""
    rows: list[dict[str, object]] = []
    for family in FAMILIES:
        for backend in BACKENDS[1:]:
            found = [row for row in TABLE if (row.family, row.backend) == (family, backend)]
            devices = [name for row in found for name in row.device_types if name != "meta"]
            where = ", ".join(devices) or "any device"
            why = f"runs on {where}" if found else f"this build has no {backend} kernel for it"
            rows.append(
                {"family": family, "backend": backend, "available": bool(found), "why": why}
            )
    return rows


def unwatched(x: Tensor) -> bool:
    """Nobody would see the op: no gradient, tracing, mode, transform, profiler or subclass.

    Then the kernel is called directly: the hop through PyTorch's dispatcher costs the host more
    than all of our checks.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ) and type(x) in (Tensor, torch.nn.Parameter)


def load(family: str, backend: str, op: str) -> bool:
    """Import reeltime.<family>.<backend>, which adds its kernels; whether `op` has one then."""
    importlib.import_module(f"reeltime.{family}.{backend}")
    return backend in OPS[op].kernels


# As torch.compiler.assume_constant_result does, which would import dynamo, for a second
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


LIBRARY = torch.library.Library("reeltime", "DEF")
OPS: dict[str, Op] = {}


class Op:
    """One registered op.

    `schema` ends in `str backend`; `reference` and `fake` take the arguments before it.  An op that
    writes into its arguments, or whose outputs are all integers, is not `differentiable`.
    """

    def __init__(
        self,
        family: str,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        differentiable: bool = True,
    ) -> None:
        self.family = family
        self.name = schema.split("(")[0]
        self.reference = reference
        self.kernels: dict[str, Callable[..., Any]] = {"reference": reference}
        self.unless: dict[str, Callable[..., str | None]] = {}
        self.gradients: dict[str, Callable[..., Any]] = {}
        # (backend, device) -> the table it was resolved by, and which backends it offers, in order.
        self.resolved: dict[tuple[str, torch.device], tuple[Any, tuple[str, ...]]] = {}
        self.overload = self._register(schema, fake)
        if differentiable:
            torch.library.register_autograd(
                f"reeltime::{self.name}", self._backward, setup_context=self._save, lib=LIBRARY
            )
        OPS[self.name] = self

    def _register(self, schema: str, fake: Callable[..., Any]) -> Any:
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"reeltime::{self.name}", lambda *args: fake(*args[:-1]), lib=LIBRARY
        )
        return getattr(torch.ops.reeltime, self.name).default

    def kernel(self, backend: str, *, unless: Callable[..., str | None] | None = None) -> Any:
        """Decorate the function that serves this op on `backend`.

        `unless(device, *args)` says why these arguments cannot be served, or None.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels[backend] = function
            if unless is not None:
                self.unless[backend] = unless
            return function

        return add

    def gradient(self, backend: str) -> Any:
        """Decorate the gradient of this op on `backend`: (args, grads, needed) -> one per arg.

        `args` as the kernel takes them, `grads` one per output (None: unused), `needed` one bool
        per arg.  Without one, the gradient is that of the reference, recomputed.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self.gradients[backend] = function
            return function

        return add

    def refuses(self, backend: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
        """Why `backend` cannot serve these arguments, or None."""
        if backend not in self.kernels and not load(self.family, backend, self.name):
            return f"it has no kernel for {self.name}"
        unless = self.unless.get(backend)
        return None if unless is None else unless(device, *args)

    def run(self, backend: str, device: torch.device, *args: Any) -> Any:
        """Run on what `backend` resolves to: the reference directly, a kernel behind the op."""
        chosen = None
        if not torch.compiler.is_compiling():
            known = self.resolved.get((backend, device))
            if known is None or known[0] is not TABLE:
                offers = [r.backend for r in TABLE if r.family == self.family and r.runs_on(device)]
                names = tuple(name for name in offers if backend in ("auto", name))
                known = self.resolved[backend, device] = (TABLE, names)
            for name in known[1]:
                if self.refuses(name, device, args) is None:
                    chosen = name
                    break
        if chosen is None:  # or to say why
            chosen = resolve(self.family, backend, device, self, args)
        if chosen == "reference":
            return self.reference(*args)
        if unwatched(args[0]) or device.type == "meta":  # on meta the op would run its fake
            return self.kernels[chosen](*args)
        return self.overload(*args, chosen)

    def _run(self, *args: Any) -> Any:
        backend = args[-1]
        if backend not in self.kernels:
            load(self.family, backend, self.name)
        return self.kernels[backend](*args[:-1])

    @staticmethod
    def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*[a for a in inputs if isinstance(a, Tensor)])
        ctx.plain = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kernel's own gradient; without one, recomputed through the reference."""
        saved = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad
        backend = ctx.plain[-1][0]
        if backend in self.gradients:
            args = [next(saved) if plain is None else plain[0] for plain in ctx.plain]
            return (*self.gradients[backend](args[:-1], grads, needed[:-1]), None)
        args = [
            next(saved).detach().requires_grad_(need) if plain is None else plain[0]
            for plain, need in zip(ctx.plain, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = self.reference(*args[:-1])
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if output.requires_grad and grad is not None
        ]
        wanted = [arg for arg, need in zip(args, needed, strict=True) if need]
        got = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        )
        return tuple(next(got) if need else None for need in needed)
