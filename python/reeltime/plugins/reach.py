# SPDX-License-Identifier: Apache-2.0
"""Which modules call `scaled_dot_product_attention`, by reading their code without running it.

What a module's forward reaches: methods of itself, plain functions of its package, and callables
that it holds and that are no modules, as diffusers' processors.  Submodules answer for themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

# Names of what calls it: PyTorch's own, diffusers' dispatcher, transformers' table.
MARKERS = ("scaled_dot_product_attention", "dispatch_attention_fn", "ALL_ATTENTION_FUNCTIONS")
DEPTH = 3  # calls between forward and the marker: forward, a processor, a function, one to spare


def marker(module: nn.Module) -> str | None:
    """Which of MARKERS the forward of `module` reaches."""
    reached: list[tuple[Any, list[Any]]] = [(getattr(type(module), "forward", None), [module])]
    seen: set[CodeType] = set()
    for _ in range(DEPTH + 1):
        further: list[tuple[Any, list[Any]]] = []
        for function, owners in reached:
            code = getattr(function, "__code__", None)
            if code is None or code in seen:
                continue
            seen.add(code)
            names = _names(code)
            for found in (*names, *_real_names(function, names)):
                if found in MARKERS:
                    return found
            further += _callees(function, names, owners)
        reached = further
    return None


def held(module: nn.Module, attribute: str) -> Any:
    """What the module, or a callable that it holds, has of this name; None: nothing."""
    owners = (module, *(one for one in vars(module).values() if callable(one)))
    return next((x for one in owners if (x := getattr(one, attribute, None))), None)


def _names(code: CodeType) -> set[str]:
    """Globals and attributes that the code asks for, functions inside it included."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)


def _real_names(function: FunctionType, names: set[str]) -> Iterator[str]:
    """What an alias stands for: `from torch.nn.functional import scaled_dot_... as attend`."""
    for name in names:
        value = function.__globals__.get(name)
        if callable(value):
            yield getattr(value, "__name__", "")


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def _callees(
    function: FunctionType, names: set[str], owners: list[Any]
) -> Iterator[tuple[Any, list[Any]]]:
    """What the function may call next, each with the objects that are `self` to it."""
    for cell in (getattr(function, "__wrapped__", None), *_cells(function)):
        yield from _as_function(cell, owners)
    for name in names:
        value = function.__globals__.get(name)
        rooms = [value] if isinstance(value, ModuleType) else []
        for found in (value, *(vars(room).get(other) for room in rooms for other in names)):
            if isinstance(found, FunctionType) and _package(found) == _package(function):
                yield found, owners
        for owner in owners:
            yield from _attribute(owner, name, owners)


def _cells(function: FunctionType) -> Iterator[Any]:
    """What a decorator wraps, among others."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _attribute(owner: Any, name: str, owners: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    for kind in type(owner).__mro__:
        if kind in (nn.Module, object):
            break
        value = vars(kind).get(name)
        yield from _as_function(getattr(value, "fget", None) or value, owners)
    value = getattr(owner, "__dict__", {}).get(name)
    if value is None and isinstance(owner, nn.Module):
        value = owner._modules.get(name)  # a processor may be a module, and is called as none
    yield from _as_function(value, owners)


def _as_function(value: Any, owners: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    elif isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, FunctionType):
        yield value, owners
    elif not isinstance(value, type) and callable(value):
        call = type(value).__call__
        if isinstance(call, FunctionType) and call is not nn.Module.__call__:
            yield call, [*owners, value]
