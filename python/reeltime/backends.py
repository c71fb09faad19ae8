# SPDX-License-Identifier: Apache-2.0
"""Which backend serves which kernel family, and how an op is registered with PyTorch.

TABLE is the only place that knows what exists.  `Op` gives one contract its three faces:

- the reference, called directly, so that autograd and torch.compile see plain PyTorch;
- `torch.ops.reeltime.<name>`, opaque, with a fake kernel: what hand-written kernels run behind, and
  what exported graphs hold.  Its gradient is that of the reference, recomputed;
- its kernels by backend, which `triton.py` and the C++ bindings fill in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


# The order is the order of preference: "auto" takes the first row that serves the device.
TABLE: tuple[Row, ...] = tuple(Row(family, "reference") for family in FAMILIES)


def resolve(family: str, backend: str, device: torch.device) -> str:
    """The backend that a call runs on.

    Raises:
        ValueError: an unknown family or backend.
        UnsupportedArchError: no row of TABLE serves this family, backend and device.
    """
    for row in TABLE:
        if row.family == family and backend in ("auto", row.backend) and row.runs_on(device):
            return row.backend
    from reeltime import arch, checks

    checks.choice("family", family, FAMILIES)
    checks.choice("backend", backend, BACKENDS)
    served = [row.backend for row in TABLE if row.family == family and row.runs_on(device)]
    offer = " or ".join(f"backend={name!r}" for name in served) or "another device"
    raise arch.UnsupportedArchError(
        f"backend: {backend!r} cannot serve {family} on {device} in this build. Pass {offer}, or "
        "backend='auto' to let the table choose."
    )


def support_matrix() -> list[dict[str, object]]:
    """One row per family and backend: family, backend, available, why."""
    rows: list[dict[str, object]] = []
    for family in FAMILIES:
        for backend in BACKENDS[1:]:
            found = [row for row in TABLE if (row.family, row.backend) == (family, backend)]
            where = ", ".join(found[0].device_types) or "any device" if found else ""
            why = f"runs on {where}" if found else f"this build has no {backend} kernel for it"
            rows.append(
                {"family": family, "backend": backend, "available": bool(found), "why": why}
            )
    return rows


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
        self.overload = self.forward = self._register(self.name, schema, fake)
        if differentiable:
            torch.library.register_autograd(
                f"reeltime::{self.name}", self._backward, setup_context=self._save, lib=LIBRARY
            )
            # The hop through autograd doubles the cost of a call, even where nothing needs a
            # gradient: without grad mode, calls go to a twin that has no such registration.
            twin = f"{self.name}_forward"
            self.forward = self._register(twin, schema.replace(self.name, twin, 1), fake)
        OPS[self.name] = self

    def _register(self, name: str, schema: str, fake: Callable[..., Any]) -> Any:
        LIBRARY.define(schema)
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"reeltime::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY
        )
        return getattr(torch.ops.reeltime, name).default

    def run(self, backend: str, device: torch.device, *args: Any) -> Any:
        """Run on what `backend` resolves to: the reference directly, a kernel behind the op."""
        chosen = resolve(self.family, backend, device)
        if chosen == "reference":
            return self.reference(*args)
        op = self.overload if torch.is_grad_enabled() else self.forward
        return op(*args, chosen)

    def _run(self, *args: Any) -> Any:
        return self.kernels[args[-1]](*args[:-1])

    @staticmethod
    def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*[a for a in inputs if isinstance(a, Tensor)])
        ctx.plain = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Recompute through the reference: a kernel needs no backward of its own to be trained."""
        saved = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad
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
