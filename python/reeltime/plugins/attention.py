# SPDX-License-Identifier: Apache-2.0
"""Attention of any model in 8 bits: `F.scaled_dot_product_attention` is ours while it runs.

The forward of a module that calls it enters a `TorchFunctionMode`, which only its own thread sees.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from reeltime import backends, checks, sla
from reeltime.attention.api import ATTENTION
from reeltime.backends import Op
from reeltime.plugins import reach, sites
from reeltime.plugins.changes import Change, Left, SwapClass, uncompiled
from reeltime.plugins.sites import Place
from reeltime.plugins.source import LAZY
from reeltime.sla.api import SPARSE_ATTENTION

if TYPE_CHECKING:
    from reeltime.plugins.accelerate import Scope

FORMATS = {"int8": ("int8", "fp16"), "fp8": ("int8", "fp8")}  # name -> qk, pv

# --- The op -------------------------------------------------------------------------------------


def pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
) -> Tensor:
    """PyTorch's own code; for plain tensors by a name that no mode of ours listens to."""
    if not type(q) is type(k) is type(v) is Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa
        )
    return torch.ops.aten.scaled_dot_product_attention.default(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa
    )


def unserved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
) -> str | None:
    """Why a call is PyTorch's, by its metadata: also what it has errors for.  None: it is ours."""
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        return f"{q.dim()}, {k.dim()} and {v.dim()} dimensions"
    if q.dtype not in checks.FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"{q.dtype}, {k.dtype} and {v.dtype}"
    if not q.device == k.device == v.device:
        return "several devices"
    if not q.numel() or not k.numel() or not v.numel():
        return "empty"
    heads = k.shape[-3]
    grouped = q.shape[-3] % heads == 0 if gqa else q.shape[-3] == heads
    if not grouped or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        return "sizes of q and k that differ"
    if k.shape[:-1] != v.shape[:-1]:
        return "sizes of k and v that differ"
    if scale is not None and not 0 < scale < math.inf:
        return f"scale {scale}"
    return None if mask is None else _unserved_mask(q, k, mask, causal)


def _unserved_mask(q: Tensor, k: Tensor, mask: Tensor, causal: bool) -> str | None:
    if causal:
        return "a mask and is_causal"
    if mask.dtype not in (torch.bool, torch.float32, q.dtype) or mask.device != q.device:
        return f"a mask of {mask.dtype} on {mask.device}"
    full = (*q.shape[:-1], k.shape[-2])
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.dim() > q.dim() or any(have not in (1, want) for have, want in sizes):
        return "a mask of more sizes than q and k"
    return None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    qk: str | None,
    pv: str | None,
    keep: float | None,
    backend: str,
    site: int,
) -> Tensor:
    why = unserved(q, k, v, mask, scale, causal, gqa)
    if why is not None:
        sites.count(site, "attention", f"left: {why}")
        return pytorch(q, k, v, mask, 0.0, causal, scale, gqa).contiguous()
    with no_autocast(q.device):
        chosen = choose(q, k, v, mask, scale, causal, qk, pv, keep, backend)
        if isinstance(chosen, str):
            what = f"left: {chosen}"
            y = _token_major(pytorch(q, k, v, mask, 0.0, causal, scale, gqa)).contiguous()
        else:
            op, what, args = chosen
            if op is SPARSE_ATTENTION and keep is not None:
                args = (*args[:3], *_lists(args[0], args[1], keep, backend), *args[5:])
            y, _ = op.run(what, q.device, *args)
            what += ", sparse" * (op is SPARSE_ATTENTION)
    sites.count(site, "attention", what)
    return _head_major(y, q)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    *options: Any,
) -> Tensor:
    if unserved(q, k, v, mask, scale, causal, gqa) is not None:
        return pytorch(q, k, v, mask, 0.0, causal, scale, gqa).contiguous()
    batch, heads = (1, *q.shape[:-2])[-2:]
    return _head_major(q.new_empty((batch, q.shape[-2], heads, v.shape[-1])), q)


def _no_gradient(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(
        "plugin_attention: an exported graph has no gradient of it. Differentiate the model itself."
    )


backends.LIBRARY.define(
    "plugin_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, bool causal, "
    "bool gqa, str? qk, str? pv, float? keep, str backend, int site) -> Tensor"
)
backends.LIBRARY.impl("plugin_attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("reeltime::plugin_attention", _fake, lib=backends.LIBRARY)
torch.library.register_autograd("reeltime::plugin_attention", _no_gradient, lib=backends.LIBRARY)
_OP = torch.ops.reeltime.plugin_attention.default


def _token_major(x: Tensor) -> Tensor:
    """[B, H, S, D] or [H, S, D] -> [B, S, H, D]."""
    return (x if x.dim() == 4 else x.unsqueeze(0)).transpose(1, 2)


def _head_major(y: Tensor, q: Tensor) -> Tensor:
    """[B, S, H, D] -> the dimensions of q.  A view: models transpose it again."""
    y = y.transpose(1, 2)
    return y if q.dim() == 4 else y.squeeze(0)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is computed inside an op is not autocast's: a product of codes overflows in float16."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# --- What serves a call -------------------------------------------------------------------------


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    qk: str | None,
    pv: str | None,
    keep: float | None,
    backend: str,
) -> tuple[Op, str, tuple[Any, ...]] | str:
    """For a call that is ours: the op, its backend and its arguments, the lists of sparse attention
    left out; or why PyTorch's own code is better."""
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in map(_token_major, (q, k, v))]
    sm_scale = checks.softmax_scale(scale, q.shape[-1])
    if keep is not None and _is_sparse(q, k, mask, causal, keep):
        op = SPARSE_ATTENTION
        args = (*rows, None, None, sla.BLOCK_Q, sla.BLOCK_K, sm_scale, math.inf, qk, pv, "block")
    elif qk is None and pv is None:
        return "dense"
    else:
        op = ATTENTION
        args = (*rows, mask, sm_scale, "top_left" if causal else None, qk, pv, "block", False)
    chosen = backends.resolve(op.family, backend, q.device, op, args)
    return backends.no_kernel(op, backend, chosen, q.device, args) or (op, chosen, args)


def _is_sparse(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, keep: float) -> bool:
    """Self-attention over so many blocks of keys that this share of them is at least one."""
    same = q.shape[-2] == k.shape[-2] and mask is None and not causal
    return same and keep * -(-k.shape[-2] // sla.BLOCK_K) >= 1


def _lists(q: Tensor, k: Tensor, keep: float, backend: str) -> Any:
    """The blocks of keys that each block of queries attends to."""
    pooled = _means(q, sla.BLOCK_Q), _means(k, sla.BLOCK_K)
    return sla.block_mask(*pooled, topk=float(keep), backend=backend)


def _means(x: Tensor, size: int) -> Tensor:
    """[B, S, H, D] -> [B, ceil(S / size), H, D].  sla.pool measures more, and reads x again."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = x.shape[1] // size
    means = x[:, : blocks * size].unflatten(1, (blocks, size)).mean(2, dtype=wide)
    if blocks * size == x.shape[1]:
        return means
    return torch.cat([means, x[:, blocks * size :].mean(1, keepdim=True, dtype=wide)], 1)


# --- In place of PyTorch's ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Replacement:
    """A function with the signature of `F.scaled_dot_product_attention`.

    Attributes:
        keep: share of the blocks of keys that self-attention keeps, or None.
    """

    qk: str | None
    pv: str | None
    keep: float | None
    backend: str
    place: Place

    @property
    def calls(self) -> Counter[str]:
        """{what ran: how often}: a backend, or "left: why" where PyTorch's own code did."""
        return self.place.site.calls

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        inputs = (query, key, value, attn_mask)
        why = not_inference(inputs, dropout_p)
        if why is not None:
            left(self.place.number, why, torch.compiler.is_compiling())
            return pytorch(*inputs, dropout_p, is_causal, scale, enable_gqa)
        call = _attention if backends.unwatched(query) else _OP
        return call(
            *_autocast(inputs), scale, is_causal, enable_gqa, self.qk, self.pv, self.keep,
            self.backend, self.place.number,
        )  # fmt: skip


# query, key, value and the mask or None
Inputs: TypeAlias = tuple[Any, Any, Any, Any]


def not_inference(inputs: Inputs, dropout: float) -> str | None:
    """Why a call cannot be an op's: it drops out, or is differentiated, or its tensors are not
    plain ones.  An exported graph is for inference."""
    if dropout:
        return "dropout"
    if sites.tangents():
        return "a tangent is wanted"
    for x in inputs:
        if x is None:
            continue
        if not isinstance(x, Tensor):
            return "not tensors"
        if x.requires_grad and torch.is_grad_enabled() and not sites.exporting():
            return "a gradient is wanted"
        if x.is_nested or (type(x) is not Tensor and is_traceable_wrapper_subclass(x)):
            return "a nested tensor" if x.is_nested else type(x).__name__
    return None


def left(number: int, why: str, compiling: bool) -> None:
    """A call that is PyTorch's.  While compiling, it is one for all that the graph will make."""
    compiled = ", in a compiled graph" * compiling
    sites.count(number, "attention", f"left: {why}{compiled}")


# As torch.compiler.assume_constant_result does, which would import dynamo, for a second
left._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autocast(inputs: Inputs) -> Inputs:
    """As autocast casts the arguments of PyTorch's."""
    device = inputs[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    q, k, v, mask = (x.to(dtype) if x is not None and x.dtype in narrow else x for x in inputs)
    return q, k, v, mask


class Mode(TorchFunctionMode):
    """While it is entered, `attend` is what its thread calls as scaled_dot_product_attention."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # dynamo cannot trace the super() in its Python
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


PLAN = "reeltime_attention"


def _body(base: type) -> dict[str, Any]:
    forward = base.forward  # type: ignore[attr-defined]

    @functools.wraps(forward)
    def attending(self: Any, *args: Any, **kwargs: Any) -> Any:
        replacement = getattr(self, PLAN, None)
        if replacement is None:  # undone, and still held by what offloaded it
            return forward(self, *args, **kwargs)
        with Mode(replacement):
            return forward(self, *args, **kwargs)

    return {"forward": attending}


# --- Where --------------------------------------------------------------------------------------


def find(
    model: nn.Module, scope: Scope, format: str | None, keep: float | None
) -> Iterator[Change | Left]:
    """Every module whose forward calls scaled_dot_product_attention, as what becomes of it or why
    it stays."""
    calls: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, MULTIHEAD) and type(module).forward is MULTIHEAD.forward:
            reasons[path] = "nn.MultiheadAttention reads its weights instead of calling its layers"
        elif (marker := reach.marker(module)) is not None:
            calls[path] = module
            if why := _stays(path, module, marker, scope):
                reasons[path] = why
    for path in calls:
        inside = f"{path}." if path else ""
        kept = [p for p in reasons if p in calls and p != path and p.startswith(inside)]
        if kept and path not in reasons:
            reasons[path] = f"it holds {uncompiled(kept[0])}, which stays"
    if not calls and not reasons:
        yield Left("", "attention", "no call of scaled_dot_product_attention was found")
    for path, why in reasons.items():
        yield Left(uncompiled(path), "attention", why)
    for path, module in calls.items():
        if path not in reasons:
            yield _change(path, module, model, scope, format, keep)


MULTIHEAD = nn.MultiheadAttention
# Of diffusers' backends, those that call scaled_dot_product_attention.
NATIVE = {"native", *(f"_native_{name}" for name in ("cudnn", "efficient", "flash", "math"))}


def _stays(path: str, module: nn.Module, marker: str, scope: Scope) -> str | None:
    if PLAN in vars(module):
        return "accelerated already"
    if pattern := scope.skips(uncompiled(path)):
        return f"skip: {pattern}"
    if "forward" in vars(module):
        return "its forward was replaced, as offloading does: accelerate first"
    if getattr(getattr(type(module).forward, "__code__", None), "co_flags", 0) & LAZY:
        return "its forward is a generator or a coroutine: it would run when the mode is left"
    if marker == "ALL_ATTENTION_FUNCTIONS":
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
        if implementation != "sdpa":
            return (
                f"it runs transformers' {implementation!r}: set_attn_implementation('sdpa') first"
            )
    if marker == "dispatch_attention_fn":
        backend = reach.held(module, "_attention_backend") or _active_backend()
        if (backend := str(getattr(backend, "value", backend))) not in NATIVE:
            return f"it runs diffusers' {backend!r}: reset_attention_backend() first"
    return None


def _active_backend() -> Any:
    """Of diffusers, for processors that name none."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    return "native" if dispatch is None else dispatch._AttentionBackendRegistry._active_backend


def _change(
    path: str,
    module: nn.Module,
    model: nn.Module,
    scope: Scope,
    format: str | None,
    keep: float | None,
) -> Change | Left:
    qk, pv = FORMATS[format] if format else (None, None)
    parameter = next(module.parameters(), next(model.parameters(), None))
    device = torch.device("cpu") if parameter is None else parameter.device
    family = "sla" if format is None else "attention"
    backend = backends.resolve(family, scope.backend, device)
    if backend == "reference" and scope.backend == "auto" and device.type not in ("cpu", "meta"):
        return Left(uncompiled(path), "attention", f"no kernel for {device.type}")
    sparse = "" if keep is None else f", sla {keep}"
    place = scope.place(path, "attention")
    return SwapClass(
        uncompiled(path),
        "attention",
        f"{type(module).__name__}, {format or '16 bits'}{sparse}",
        backend,
        place,
        module=module,
        key=PLAN,
        body=_body,
        attributes={PLAN: Replacement(qk, pv, keep, scope.backend, place)},
    )
