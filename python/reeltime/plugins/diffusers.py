# SPDX-License-Identifier: Apache-2.0
"""diffusers: 8-bit attention by its own switches, and for the models that ignore them.

Three ways, of which the first says what it did:

- `set_attention_backend(model, "reeltime_int8")`: every call of scaled_dot_product_attention of
  this model, whichever way its processors reach it, and of no other model.
- `register()`, then diffusers' own `model.set_attention_backend("reeltime_int8")`: processors that
  ask its dispatcher, as Wan's and Flux's do.  Others (CogVideoX, SD3, Mochi, Sana ...) ignore it,
  which is an error, or a warning where some ask: `routes(model)` says which.
- `processor(one)` for `model.set_attn_processor`, processor by processor.

With diffusers' other switches, this and `reeltime.accelerate` go
    after   fuse_qkv_projections, fuse_lora and unload_lora, enable_cache, apply_layer_skip;
    before  enable_group_offload, enable_model_cpu_offload, enable_layerwise_casting, torch.compile,
            compile_repeated_blocks.
LoRA adapters that are loaded stay beside the 8-bit layers; to load one afterwards is an error of
peft.  `from_pretrained` cannot read what an accelerated model saves, and lists what it misses: undo
first, or keep `state_dict()` for a model that is accelerated again.
"""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers.models import attention_dispatch as dispatch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from reeltime import checks
from reeltime.backends import BACKENDS
from reeltime.plugins import attention as attentions
from reeltime.plugins import reach
from reeltime.plugins.accelerate import Report, accelerate
from reeltime.plugins.changes import Change, Left, subclass
from reeltime.plugins.sites import Place, Site

NAMES = {f"reeltime_{format}": format for format in attentions.FORMATS}
ROUTES = {"dispatch_attention_fn": "dispatcher", "scaled_dot_product_attention": "sdpa"}
BACKEND, PARALLEL = "_attention_backend", "_parallel_config"  # of diffusers' processors
INSTEAD = "For attention over several GPUs take one of diffusers' own backends."

_names: Any = dispatch.AttentionBackendName
_registry: Any = dispatch._AttentionBackendRegistry


def _processors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    for path, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if callable(processor):
            yield path, module, processor


def routes(model: nn.Module) -> dict[str, str]:
    """{attention module: which way its processor goes}, read from the processor's code.

    "dispatcher" (diffusers' set_attention_backend reaches it), "sdpa" (it calls PyTorch's
    scaled_dot_product_attention itself) or "neither" (it has no softmax, or one of its own).
    """
    return {
        path: ROUTES.get(reach.marker(module) or "", "neither")
        for path, module, _ in _processors(model)
    }


def _not_in_parallel(processor: Any) -> None:
    if getattr(processor, PARALLEL, None) is not None:
        checks.fail(
            "model",
            "a model without context parallelism",
            f"{type(processor).__name__} with a parallel config",
            INSTEAD,
        )


# --- A model, whichever way it goes -------------------------------------------------------------


@dataclass(eq=False)
class Pin(Change):
    """Processors that ask the dispatcher get PyTorch's attention from it: that is what is replaced.
    Left to the default they would follow what is set for any other model.

    Attributes:
        processors: each once, and what its own __dict__ had.
    """

    processors: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def apply(self) -> None:
        for processor, _ in self.processors:
            setattr(processor, BACKEND, _names.NATIVE)

    def revert(self) -> None:
        if any(getattr(one, BACKEND) is not _names.NATIVE for one, _ in self.processors):
            raise self.changed_since()
        for processor, own in self.processors:
            _restore(processor, own)


def _own(processor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(processor).items() if name == BACKEND}


def _restore(processor: Any, own: dict[str, Any]) -> None:
    vars(processor).pop(BACKEND, None)
    vars(processor).update(own)


def set_attention_backend(
    model: nn.Module, name: str = "reeltime_int8", *, backend: str = "auto"
) -> Report:
    """8-bit attention in `model`, whichever way its processors go, and in no other model.

    Args:
        model: a model of diffusers, as `pipe.transformer`.
        name: "reeltime_int8" (INT8 q.k, FP16 values) or "reeltime_fp8" (INT8 q.k, FP8 values).
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        A Report: every attention module by name, what ran there, what was left and why; `undo()`.
    Raises:
        ValueError: an unknown name, context parallelism, or nothing could be changed.
        UnsupportedArchError: `backend` cannot serve the model's device.
    """
    checks.choice("name", name, tuple(NAMES))
    found = list(_processors(model)) if isinstance(model, nn.Module) else []
    ways = routes(model) if found else {}
    for _, _, processor in found:
        _not_in_parallel(processor)
    asking = {id(p): p for path, _, p in found if ways[path] == "dispatcher"}
    pin = Pin(
        "dispatcher", "attention", "pinned to PyTorch's attention, for this model", "-",
        Place(Site("dispatcher", "attention"), Site("", "model")),
        processors=[(p, _own(p)) for p in asking.values() if getattr(type(p), BACKEND, 0) is None],
    )  # fmt: skip
    pin.apply()
    try:
        report = accelerate(
            model, linear=None, attention=NAMES[name], norm=None, skip=(), backend=backend
        )
    except BaseException:
        pin.revert()
        raise
    if pin.processors:
        report.changes.append(pin)
    known = {change.path for change in report.changes} | {left.path for left in report.left}
    report.left += [
        Left(path, "attention", f"{type(p).__name__} has an attention of its own")
        for path, _, p in found
        if path not in known
    ]
    return report


# --- The dispatcher -----------------------------------------------------------------------------


class Registered:
    """Backends of the dispatcher, and the way back; as a context manager it goes back at the end.

    Calls are counted for all models together: the dispatcher does not say who asks.
    """

    def __init__(self) -> None:
        self.active = _registry._active_backend
        self.kept: list[tuple[Any, dict[str, Any]]] = []
        self.sites = {name: Site(name, "attention") for name in NAMES}
        self.members = [_member(name) for name in NAMES]
        self.setter = ModelMixin.set_attention_backend
        native = _names.NATIVE
        for member in self.members:
            _names._member_map_[member.name] = _names._value2member_map_[member.value] = member
            _names._member_names_.append(member.name)
            attend = _backend(member.value, self.sites[member.value], _registry._backends[native])
            _registry.register(member, constraints=_registry._constraints[native])(attend)
        ModelMixin.set_attention_backend = _outspoken(self.setter)

    def calls(self) -> dict[str, dict[str, int]]:
        """{backend: {what ran: how often}}."""
        return {name: dict(site.calls) for name, site in self.sites.items()}

    def unregister(self) -> None:
        """The dispatcher as it was: its backends, its default, and what processors asked for."""
        global _registered
        if _registered is not self:
            return
        for processor, own in self.kept:
            if getattr(processor, BACKEND) in self.members:
                _restore(processor, own)
        for holder in gc.get_referrers(*self.members):  # processors of models that nobody named
            own = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
            if own.get(BACKEND) in self.members:
                own[BACKEND] = None
        if getattr(ModelMixin.set_attention_backend, "__wrapped__", None) is self.setter:
            ModelMixin.set_attention_backend = self.setter
        if _registry._active_backend in self.members:
            _registry._active_backend = self.active
        for member in self.members:
            del _names._member_map_[member.name], _names._value2member_map_[member.value]
            _names._member_names_.remove(member.name)
            for known in ("_backends", "_constraints", "_supported_arg_names"):
                del getattr(_registry, known)[member]
        _registered = None

    def __enter__(self) -> Registered:
        return self

    def __exit__(self, *error: object) -> None:
        self.unregister()


_registered: Registered | None = None


def register(*models: nn.Module) -> Registered:
    """Give diffusers' dispatcher the backends "reeltime_int8" and "reeltime_fp8".

    `model.set_attention_backend("reeltime_int8")` takes them, as does `attention_backend(...)`.
    The former refuses a model that ignores the dispatcher; the latter cannot know: look at `calls`.
    diffusers makes what is set for one model the default of every other that names none;
    `unregister` undoes that, too.  Registering again adds models.

    Args:
        models: those whose backends are to be as they are now after `unregister`; any other that
            still asks for one of ours then asks for the default.
    """
    global _registered
    _registered = _registered or Registered()
    for model in models:
        for _, _, processor in _processors(model):
            if (
                hasattr(processor, BACKEND)
                and getattr(processor, BACKEND) not in _registered.members
            ):
                _registered.kept.append((processor, _own(processor)))
    return _registered


def unregister() -> None:
    """Undo `register`."""
    if _registered is not None:
        _registered.unregister()


def _outspoken(setter: Callable[..., None]) -> Callable[..., None]:
    """diffusers' set_attention_backend, which passes over what does not ask its dispatcher, in
    silence; for our names that is said."""

    @functools.wraps(setter)
    def set_attention_backend(self: nn.Module, backend: str) -> None:
        if backend.lower() in NAMES:
            ways = routes(self)
            deaf = [path for path, way in ways.items() if way == "sdpa"]
            if "dispatcher" not in ways.values():
                checks.fail(
                    "backend",
                    "a model whose processors ask diffusers' dispatcher",
                    f"{type(self).__name__}, where none does",
                    "Call reeltime.plugins.diffusers.set_attention_backend(model, name).",
                )
            if deaf:
                warnings.warn(
                    f"{backend}: {', '.join(deaf)} do not ask diffusers' dispatcher and stay as "
                    "they are; reeltime.plugins.diffusers.set_attention_backend serves all.",
                    stacklevel=2,
                )
        setter(self, backend)

    return set_attention_backend


def _member(name: str) -> Any:
    """Of diffusers' Enum, which is closed."""
    member = str.__new__(_names, name)
    member._name_, member._value_ = name.upper(), name
    return member


def _backend(name: str, site: Site, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """diffusers' own backend for PyTorch's attention, with ours in its place."""
    qk, pv = attentions.FORMATS[NAMES[name]]
    attend = attentions.Replacement(qk, pv, None, "auto", Place(site, site))

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if return_lse:
            checks.fail("return_lse", "False", True, INSTEAD)
        if _parallel_config is not None:
            checks.fail("_parallel_config", "None", type(_parallel_config).__name__, INSTEAD)
        with attentions.Mode(attend):
            return native(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    return attention


# --- Processor by processor ---------------------------------------------------------------------


def processor(
    one: Any, format: str = "int8", *, backend: str = "auto", place: Place | None = None
) -> Any:
    """A copy of an attention processor, of a subclass of its class, that attends in 8 bits.

        own = model.attn_processors
        model.set_attn_processor({path: processor(one) for path, one in own.items()})

    and `model.set_attn_processor(own)` undoes it.  `calls` of each says what ran.

    Args:
        one: any processor whose code reaches scaled_dot_product_attention.
        format: "int8" (INT8 q.k, FP16 values) or "fp8" (INT8 q.k, FP8 values).
        backend: "auto", "reference", "triton" or "cuda".
        place: what counts; processors whose Places name one model share compiled graphs.
    Raises:
        ValueError: an unknown format or backend, context parallelism, or an attention of its own.
    """
    checks.choice("format", format, tuple(attentions.FORMATS))
    checks.choice("backend", backend, BACKENDS)
    _not_in_parallel(one)
    if reach.marker(_Caller(one)) is None:
        checks.fail(
            "one",
            "a processor whose code reaches scaled_dot_product_attention",
            f"{type(one).__name__}, which has an attention of its own",
            "Leave it as it is, or take another processor of this model first.",
        )
    qk, pv = attentions.FORMATS[format]
    if place is None:
        site = Site(type(one).__name__, "attention")
        place = Place(site, site)
    made = copy.copy(one)
    made.__class__ = subclass(type(one), attentions.PLAN, _body)
    setattr(made, attentions.PLAN, attentions.Replacement(qk, pv, None, backend, place))
    if hasattr(made, BACKEND):
        setattr(made, BACKEND, _names.NATIVE)  # or the calls would not come by
    return made


class _Caller(nn.Module):
    """What a processor stands in."""

    def __init__(self, one: Any) -> None:
        super().__init__()
        self.processor = one

    def forward(self) -> Any:
        return self.processor()


def _body(base: type) -> dict[str, Any]:
    call: Any = base.__call__

    @functools.wraps(call)  # diffusers passes on what the signature names
    def attending(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attentions.Mode(getattr(self, attentions.PLAN)):
            return call(self, *args, **kwargs)

    def calls(self: Any) -> dict[str, int]:
        return dict(getattr(self, attentions.PLAN).place.site.calls)

    return {"__call__": attending, "calls": property(calls)}
