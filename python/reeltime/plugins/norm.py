# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm of any model, and the modulation behind them, in one kernel.

A norm stays the module that it is, with its parameters; what changes is its class, whose forward
calls the kernel.  `known_norms` says which modules are norms.  Where a method of the module that
owns a norm modulates its result, `rewrite` makes that one call, too.

What is recognised, tested with these models (of diffusers, unless said otherwise):

    model           norms                       modulation that becomes one call with its norm
    Wan             FP32LayerNorm, RMSNorm      norm1 and norm3 of blocks; norm_out
    Flux            LayerNorm, RMSNorm          norm1, norm1_context (AdaLayerNormZero), norm2 and
                                                norm2_context; norm of single blocks; norm_out
    LTX             RMSNorm, LayerNorm          norm1 and norm2 of blocks; norm_out
    CogVideoX       LayerNorm                   norm1 and norm2 of blocks (CogVideoXLayerNormZero,
                                                both streams); norm_out
    SD3             LayerNorm, RMSNorm          as Flux; not norm1 of blocks with two attentions,
                                                which modulates one result twice
    HunyuanVideo    LayerNorm, RMSNorm          as Flux
    Wan2.1          WanLayerNorm, WanRMSNorm    norm1 and norm2, also frame by frame (Self-Forcing)
    DiT             LayerNorm                   modulate(self.norm1(x), shift, scale), a function

A norm_out is skipped by default (accelerate.SENSITIVE).  The gated residual before a norm is not
fused: in these models other modules lie between the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.modules.module as modules
from torch import Tensor, nn

from reeltime import backends, checks
from reeltime.norm.api import NORM
from reeltime.plugins import known_norms, sites
from reeltime.plugins.changes import Change, Left, SwapClass, uncompiled
from reeltime.plugins.known_norms import DTYPES, Norm
from reeltime.plugins.rewrite import METHOD, rewrite
from reeltime.plugins.sites import Place

if TYPE_CHECKING:
    from reeltime.plugins.accelerate import Scope

PLAN, PLACE = "reeltime_norm", "reeltime_modulation"  # attributes of a norm and of its owner
FEW = 64  # rows, as the vectors of a timestep: whoever computes them leaves most of a GPU idle


# --- The op -------------------------------------------------------------------------------------


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    backend: str,
    site: int,
) -> Tensor:
    """x [..., C] normalised, in `dtype`, contiguous; scale and shift [B, F, C] of [B, L, C]."""
    rows = x.to(torch.promote_types(x.dtype, dtype))
    if scale is not None:
        rows = rows.reshape(x.shape[0], -1, x.shape[-1])
    else:
        rows = rows.flatten(0, -3) if x.dim() > 2 else rows[None]
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    args = (rows, kind, weight, bias, scale, shift, eps)
    chosen = backends.resolve("norm", backend, x.device, NORM, args)
    why = backends.no_kernel(NORM, backend, chosen, x.device, args)
    y = NORM.run(chosen, x.device, *args)
    sites.count(site, "norm", f"left: {why}" if why else chosen)
    return y.view(x.shape).to(dtype)


backends.LIBRARY.define(
    "plugin_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, str kind, "
    "float eps, ScalarType dtype, str backend, int site) -> Tensor"
)
backends.LIBRARY.impl("plugin_norm", _norm, "CompositeExplicitAutograd")
torch.library.register_fake(
    "reeltime::plugin_norm",
    lambda x, *rest: x.new_empty(x.shape, dtype=rest[6]),
    lib=backends.LIBRARY,
)
_OP = torch.ops.reeltime.plugin_norm.default


# --- A call -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """What a norm's forward is told."""

    norm: Norm
    backend: str
    place: Place


def _left(number: int, why: str) -> None:
    """PyTorch's own code runs.  In a compiled graph that is decided, and counted, at its making."""
    sites.count(number, "norm", f"left: {why}")


# As torch.compiler.assume_constant_result does, which would import dynamo, for a second
_left._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fused(
    module: nn.Module, place: Place, x: Any, scale: Any, shift: Any, form: str
) -> Tensor | str:
    """What the kernel makes of a call; or why PyTorch's own code is to run."""
    plan: Plan = getattr(module, PLAN)
    norm = plan.norm
    weight, bias = (getattr(module, name, None) for name in known_norms.HELD)
    why = _unfit([one for one in (x, weight, bias, scale, shift) if one is not None])
    if why is not None:
        return why
    shape = getattr(module, "normalized_shape", x.shape[-1:])
    if norm.dense and x.shape[-1:] != tuple(shape):
        return "x has another width"
    dtype = _dtype(norm, x, weight, bias, scale, shift, form)
    eps = getattr(module, norm.eps)
    if eps is None:  # of what statistics are computed in
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    order = None
    if scale is not None:
        rows = _per_frame(scale, x), None if shift is None else _per_frame(shift, x)
        if rows[0] is None or (rows[1] is None and shift is not None):
            return "scale or shift are not rows for batches, frames or tokens of x"
        scale, shift = rows
    elif x.is_cuda and x.numel() < FEW * x.shape[-1]:
        return f"fewer than {FEW} rows"
    elif not norm.dense and not x.is_contiguous():
        order = _memory_order(x)
        x = x.permute(*order, -1)
    call = _norm if backends.unwatched(x) else _OP
    y = call(x, weight, bias, scale, shift, norm.kind, eps, dtype, plan.backend, place.number)
    return y if order is None else y.permute(*(order.index(at) for at in range(len(order))), -1)


def _unfit(given: list[Any]) -> str | None:
    x = given[0]
    if sites.tangents():
        return "a tangent is wanted"
    for one in given:
        if not isinstance(one, Tensor) or one.dtype not in checks.FLOATS or one.is_nested:
            return "not a floating-point tensor"
        if one.device != x.device:
            return "not all on one device"
        if one.requires_grad and torch.is_grad_enabled() and not sites.exporting():
            return "a gradient is wanted"
    if x.dim() < 2 or not x.numel():
        return "x has no rows"
    # What does not fit is PyTorch's to broadcast, or to refuse.
    return None if all(one.shape[-1:] == x.shape[-1:] for one in given) else "x has another width"


def _dtype(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    form: str,
) -> torch.dtype:
    """What PyTorch's promotion makes of the expression."""
    if form == "widened":
        return x.dtype
    dtype = DTYPES[norm.dtype](norm.kind, x.dtype, x.device.type, weight, bias)
    if form == "float":
        dtype = torch.float32
    for one in (scale, shift):
        dtype = dtype if one is None else torch.promote_types(dtype, one.dtype)
    return dtype


def _per_frame(value: Tensor, x: Tensor) -> Tensor | None:
    """What is broadcast to x, as [B, F, C] of x [B, L, C], a view; None if it is none.

    x [B, S, C] takes a row per token, per batch or one for all; x [B, F, T, C] one per frame, too;
    of x [B, C] every row is a batch.
    """
    if not 2 <= x.dim() <= 4 or not 1 <= value.dim() <= x.dim():
        return None
    value = value[(None,) * (x.dim() - value.dim())]
    if any(have != 1 and have != want for have, want in zip(value.shape, x.shape, strict=True)):
        return None
    if x.dim() == 2:
        return value.expand(x.shape)[:, None]
    if x.dim() == 3:
        return value.expand(x.shape[0], -1, -1)
    if value.shape[2] == 1:
        return value[:, :, 0].expand(x.shape[0], -1, -1)
    if value.shape[1] != x.shape[1]:
        return None
    return value.expand(x.shape).flatten(1, 2)


def _memory_order(x: Tensor) -> list[int]:
    """Its dimensions but the last, outermost first; not by sort(), which dynamo cannot trace."""
    order: list[int] = []
    for dim in range(x.dim() - 1):
        at = len(order)
        while at and x.stride(order[at - 1]) < x.stride(dim):
            at -= 1
        order.insert(at, dim)
    return order


def _forward(base: type) -> dict[str, Any]:
    """A norm's forward."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        place = getattr(self, PLAN).place
        y: Tensor | str = "called with keywords"
        if len(args) == 1 and not kwargs:
            y = _fused(self, place, args[0], None, None, "plain")
        if not isinstance(y, str):
            return y
        _left(place.number, y)
        return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return {"forward": forward}


def _modulated(self: nn.Module, norm: Any, x: Any, scale: Any, shift: Any, form: str) -> Any:
    """norm(x) * (1 + scale) + shift, of the module that owns the norm; `form` as in rewrite."""
    place = getattr(self, PLACE)
    y = _hooked(norm) or _fused(norm, place, x, scale, shift, form)
    if not isinstance(y, str):
        return y
    _left(place.number, y)
    h = norm(x.float() if form == "widened" else x)
    h = (h.float() if form == "float" else h) * (1 + scale)
    h = h if shift is None else h + shift
    return h.type_as(x) if form == "widened" else h


def _hooked(norm: nn.Module) -> str | None:
    """Whether somebody waits for the norm to be called."""
    if not hasattr(norm, PLAN):
        return "the norm was replaced"
    if "forward" in norm.__dict__ or modules._has_any_global_hook():
        return "the norm has a hook"
    hooks = norm._forward_hooks, norm._forward_pre_hooks
    return "the norm has a hook" if any(hooks) else None


# --- Where --------------------------------------------------------------------------------------

READERS = (nn.TransformerEncoderLayer,)  # read the weights of norms instead of calling them


def find(model: nn.Module, scope: Scope) -> Iterator[Change | Left]:
    """Every norm of the model, and every module that modulates the result of one of its own."""
    changes: dict[nn.Module, str] = {}
    readers: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, READERS):
            readers += (f"{path}." if path else "",)
        if not known_norms.looks_like_one(module):
            continue
        if PLAN in vars(module):
            found: Change | Left = Left(uncompiled(path), "norm", "fused already")
        elif readers and path.startswith(readers):
            why = "nn.TransformerEncoderLayer reads its weight instead of calling it"
            found = Left(uncompiled(path), "norm", why)
        else:
            found = _change(model, module, uncompiled(path), scope)
        if isinstance(found, Change):
            changes[module] = found.backend
        yield found
    for path, module in model.named_modules():
        mine = {name: changes[one] for name, one in module.named_children() if one in changes}
        if mine:
            yield from _modulations(module, uncompiled(path), mine, scope)


def _change(model: nn.Module, module: nn.Module, path: str, scope: Scope) -> Change | Left:
    norm = known_norms.known(module)
    if isinstance(norm, str):
        return Left(path, "norm", norm)
    if pattern := scope.skips(path):
        return Left(path, "norm", f"skip: {pattern}")
    like = next(itertools.chain(module.parameters(), model.parameters()), torch.empty(0))
    width = known_norms.width(module)
    weight, bias = (getattr(module, name, None) for name in known_norms.HELD)
    args = (like.new_empty((0, 0, width)), norm.kind, weight, bias, None, None, 1.0)
    backend = backends.resolve("norm", scope.backend, like.device, NORM, args)
    if why := backends.no_kernel(NORM, scope.backend, backend, like.device, args):
        return Left(path, "norm", why)
    place = scope.place(path, "norm")
    return SwapClass(
        path,
        "norm",
        f"{type(module).__name__} {width}",
        backend,
        place,
        module=module,
        key="norm",
        body=_forward,
        attributes={PLAN: Plan(norm, scope.backend, place)},
    )


def _modulations(
    owner: nn.Module, path: str, norms: dict[str, str], scope: Scope
) -> Iterator[Change | Left]:
    """Of a module and the backends of its norms by name."""
    methods: dict[str, Any] = {}
    modulated = []
    for cls in itertools.takewhile(lambda one: one is not nn.Module, type(owner).__mro__):
        for name, method in vars(cls).items():
            # What is no function stays, and what another class above it overrides
            if not isinstance(method, FunctionType) or getattr(type(owner), name) is not method:
                continue
            if name == "__init__":  # ran already
                continue
            found = rewrite(method, frozenset(norms))
            yield from (Left(path, "norm", why) for why in found.left)
            if found.function is not None:
                methods[name] = found.function
                modulated.append(found.norms)
    if not methods:
        return
    if methods.keys() & vars(owner).keys():
        why = "its forward was replaced, as offloading does: accelerate first"
        yield Left(path, "norm", f"modulation: {why}")
        return
    place = scope.place(path, "norm") if path else Place(scope.model, scope.model)
    names = ", ".join(modulated)
    yield SwapClass(
        path,
        "norm",
        f"modulation of {names}",
        norms[names.split(",")[0]],
        place,
        module=owner,
        key=("modulation", frozenset(norms)),
        body=lambda base: {**methods, METHOD: _modulated},
        attributes={PLACE: place},
    )
