# SPDX-License-Identifier: Apache-2.0
"""The source of a function that runs, and the function that another source would be.

Only what is certain is handed out: the file is compiled again, and its bytecode must be the
function's own.  So a file that changed since, an import hook, or a function that somebody put in
place of another is noticed.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple, cast

Definition = (ast.FunctionDef, ast.AsyncFunctionDef)
# A body that runs after the call of its function
LAZY = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Source(NamedTuple):
    """A function and where it is defined; the tree is the caller's to change."""

    function: Any  # FunctionType, which mypy would bind as a method
    tree: ast.Module
    node: ast.FunctionDef


def source_of(function: FunctionType) -> Source | str:
    """Its source, or why there is none."""
    code = function.__code__
    try:
        text = "".join(inspect.findsource(code)[0])
        codes = _codes(text, code.co_filename)
    except (OSError, SyntaxError, ValueError):
        return f"the source of {function.__name__} is not available"
    if codes.get((code.co_name, code.co_firstlineno)) != code:
        return f"the source of {function.__name__} is not what runs"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, Definition) and node.name == code.co_name:
            if min([node.lineno, *(one.lineno for one in node.decorator_list)]) == (
                code.co_firstlineno
            ):
                return Source(function, tree, node)  # type: ignore[arg-type]
    return f"{function.__name__} is no function of its own"


def recompiled(source: Source) -> FunctionType:
    """The function that the tree defines now, with its globals, closure, defaults and lines.

    The whole file is compiled, so that class scopes mean what they mean there: `super()`, private
    names, imports from __future__.
    """
    function, code = source.function, source.function.__code__
    made = compile(source.tree, code.co_filename, "exec", dont_inherit=True)
    new = next(
        one
        for one in _nested(made)
        if (one.co_name, one.co_firstlineno) == (code.co_name, code.co_firstlineno)
    )
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return _like(function, new, tuple(cells[name] for name in new.co_freevars))


def rewrapped(wrapper: FunctionType, old: FunctionType, new: FunctionType) -> FunctionType:
    """`wrapper`, which holds `old` in its closure, around `new` instead."""
    cells = wrapper.__closure__ or ()
    closure = tuple(CellType(new) if one.cell_contents is old else one for one in cells)
    return _like(wrapper, wrapper.__code__, closure)


def _like(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure or None
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return cast(FunctionType, functools.wraps(function)(made))


@functools.lru_cache(maxsize=64)
def _codes(text: str, filename: str) -> dict[tuple[str, int], CodeType]:
    made = compile(text, filename, "exec", dont_inherit=True)
    return {(one.co_name, one.co_firstlineno): one for one in _nested(made)}


def _nested(code: CodeType) -> Iterator[CodeType]:
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one
            yield from _nested(one)
