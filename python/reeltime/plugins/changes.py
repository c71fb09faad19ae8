# SPDX-License-Identifier: Apache-2.0
"""What is done to a model, and undone: a module in place of another, a class in place of another.

Whoever changes a family of modules (`linear`, `attention`, `norm`) yields a `Change` for each place
that it would change and a `Left` for each that it would not, and touches nothing until `apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from reeltime.plugins.sites import Place

COMPILED = "_orig_mod"  # torch.compile's wrapper holds its module under this name


def uncompiled(path: str) -> str:
    """The name that a module has without torch.compile's wrappers around it."""
    return ".".join(name for name in path.split(".") if name != COMPILED)


class Left(NamedTuple):
    """A place that stays as it is."""

    path: str
    kind: str
    why: str


@dataclass(eq=False)
class Change:
    """A place that changes.

    Attributes:
        what: "Linear 1536 -> 8960, int8".
        backend: which serves it where the model is now: "reference", "triton" or "cuda".
        saved: bytes of weights on the model's device.
    """

    path: str
    kind: str
    what: str
    backend: str
    place: Place
    saved: int = 0

    @property
    def kept(self) -> bool:
        """Whether what was there is kept, so that it can be undone."""
        return True

    def apply(self) -> None:
        raise NotImplementedError

    def revert(self) -> None:
        """Of what is kept; also of what `apply` was interrupted in, and of nothing.

        Raises RuntimeError: the place was changed again since.
        """
        raise NotImplementedError

    def changed_since(self) -> RuntimeError:
        return RuntimeError(
            f"undo: {self.path} was changed again after this. Undo what came later first."
        )


@dataclass(eq=False)
class SwapModule(Change):
    """Another module, wherever the old one stood (a module may have several owners).

    The old module's parameters wait in host memory, as the same objects; what is not undoable is
    let go of, one module before the next is made.

    Attributes:
        make: old -> new.
    """

    owners: tuple[tuple[nn.Module, str], ...] = ()
    old: nn.Module | None = None
    make: Callable[[Any], nn.Module] = nn.Identity
    undoable: bool = True
    new: nn.Module | None = None

    @property
    def kept(self) -> bool:
        return self.old is not None

    def apply(self) -> None:
        self.new = self.make(self.old)
        for owner, name in self.owners:
            owner._modules[name] = self.new
        if self.undoable:
            self._move(torch.device("cpu"))
        else:
            self.old = None

    def revert(self) -> None:
        if self.new is None:
            return
        old = cast(nn.Module, self.old)
        if any(owner._modules.get(name) not in (self.new, old) for owner, name in self.owners):
            raise self.changed_since()
        device = next(self.new.parameters()).device
        if device.type == "meta":
            raise RuntimeError(
                f"undo: {self.path} is on no device now. Remove the hooks that offload it first."
            )
        self._move(device)
        old.train(self.new.training)
        for owner, name in self.owners:
            owner._modules[name] = old
        self.new = None

    def _move(self, device: torch.device) -> None:
        for parameter in cast(nn.Module, self.old).parameters():
            parameter.data = parameter.data.to(device)


_classes: dict[tuple[type, Any], type] = {}


def subclass(base: type, key: Any, body: Callable[[type], dict[str, Any]]) -> type:
    """The subclass of `base` with this body: the same one for the same key, under its base's name.

    Compiled code is guarded by a module's class: changed modules compile again, and equal ones
    share what was compiled.
    """
    if (base, key) not in _classes:
        made = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[base, key] = type(base.__name__, (base,), made | body(base))
    return _classes[base, key]


@dataclass(eq=False)
class SwapClass(Change):
    """A subclass of the same module's class, made when it is applied: another may stand on it.

    Attributes:
        key: names the body: equal keys, equal bodies.
        body: base class -> the attributes of the subclass.
        attributes: what its methods read from the module.
    """

    module: nn.Module = field(default_factory=nn.Identity)
    key: Any = None
    body: Callable[[type], dict[str, Any]] = lambda base: {}
    attributes: dict[str, Any] = field(default_factory=dict)
    classes: tuple[type, type] | None = None  # before, since

    def apply(self) -> None:
        old = type(self.module)
        self.classes = old, subclass(old, self.key, self.body)
        self.module.__class__ = self.classes[1]
        for name, value in self.attributes.items():
            object.__setattr__(self.module, name, value)

    def revert(self) -> None:
        if self.classes is None:
            return
        old, new = self.classes
        if type(self.module) not in (old, new):
            raise self.changed_since()
        self.module.__class__ = old
        for name in self.attributes:
            vars(self.module).pop(name, None)
        # Hooks that offload hold the forward that they found, and leave it to the instance.
        for name, value in list(vars(self.module).items()):
            if isinstance(value, MethodType) and value.__func__ in vars(new).values():
                method = getattr(old, value.__func__.__name__)
                setattr(self.module, name, MethodType(method, self.module))
        self.classes = None
