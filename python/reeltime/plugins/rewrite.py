# SPDX-License-Identifier: Apache-2.0
"""Modulation in the source of a method: `self.norm(x) * (1 + scale) + shift` becomes one call.

    self.norm(x) * (1 + scale) + shift          with or without the shift; scale and shift may be
    self.norm(x) * (1 + scale)[:, None] + ...   views, as scale[:, None] or scale.unsqueeze(1)
    (self.norm(x.float()) * (1 + scale) + shift).type_as(x)                            diffusers Wan
    self.norm(x).float() * (1 + scale) + shift                                                   Wan
    self.norm(x).unflatten(1, (F, T)) * (1 + scale) + shift                         Wan, frame-wise
    modulate(self.norm(x), shift, scale)        a free function that returns x * (1 + ..) + ..  DiT
    y = self.norm(x); ...; y = y * (1 + scale) + shift

becomes `self.reeltime_modulated(self.norm, x, scale, shift, form)`, where `form` is one of FORMS.

Scale and shift are evaluated once, x before them, as they were; what moves is the norm itself, so
nothing that is evaluated in its stead may change x: only views, arithmetic and further norms, no
call of anything else, no assignment in place.  What is not certain stays as it is.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator
from types import FunctionType
from typing import NamedTuple, cast

from reeltime.plugins.source import LAZY, Definition, Source, recompiled, rewrapped, source_of

METHOD = "reeltime_modulated"
# As it stands; x.float() and .type_as(x) around it; .float() behind the norm
FORMS = ("plain", "widened", "float")

# Neither change a tensor nor read what another statement writes.
VIEWS = frozenset(
    "chunk contiguous expand expand_as flatten float movedim narrow permute repeat_interleave "
    "reshape size split squeeze to transpose tensor_split type_as unbind unflatten unsqueeze view "
    "view_as".split()
)
# Decorators that call what they wrap, found in their closure: (module, name of the wrapper).
WRAPPERS = {
    ("torch.utils._contextlib", "decorate_context"),  # torch.no_grad() and its like
    ("diffusers.utils.peft_utils", "wrapper"),  # apply_lora_scale
}
UNCERTAIN = {"eval", "exec", "locals", "vars"}  # see names that the source does not show


class Rewritten(NamedTuple):
    """What became of a method.

    Attributes:
        function: in its stead; None if nothing changed.
        norms: names of those whose modulation is a call now.
        left: what looks like modulation and stays, and why.
    """

    function: FunctionType | None = None
    norms: str = ""
    left: tuple[str, ...] = ()


class Modulation(NamedTuple):
    """head * (1 + scale) + shift"""

    head: ast.expr
    scale: ast.expr
    shift: ast.expr | None


class Head(NamedTuple):
    """self.<norm>(x)"""

    norm: ast.Attribute
    x: ast.expr
    form: str


@functools.lru_cache(maxsize=1024)
def rewrite(method: object, norms: frozenset[str]) -> Rewritten:
    """A method of a module whose children `norms` are norms that a kernel can serve."""
    function = method
    if isinstance(method, FunctionType) and hasattr(method, "__wrapped__"):
        function = method.__wrapped__
    if not isinstance(function, FunctionType) or not norms & set(function.__code__.co_names):
        return Rewritten()
    source = source_of(function)
    if isinstance(source, str):
        return Rewritten(left=(f"modulation: {source}",))
    finder = _Finder(source, norms)
    finder.rewrite()
    if not finder.found:
        return Rewritten(left=tuple(finder.left))
    names = ", ".join(sorted(finder.found))
    if function.__code__.co_flags & LAZY:
        why = f"{function.__name__} is a generator or a coroutine"
        return Rewritten(left=(f"modulation of {names}: {why}",))
    if function is method:
        return Rewritten(recompiled(source), names, tuple(finder.left))
    wrapper = cast(FunctionType, method)
    if not _calls_only(wrapper, function):
        why = f"{function.__name__} has a decorator that is not known"
        return Rewritten(left=(f"modulation of {names}: {why}",))
    made = rewrapped(wrapper, function, recompiled(source))
    return Rewritten(made, names, tuple(finder.left))


def _calls_only(wrapper: FunctionType, inner: FunctionType) -> bool:
    name = wrapper.__globals__.get("__name__"), wrapper.__code__.co_name
    cells = wrapper.__closure__ or ()
    return name in WRAPPERS and any(cell.cell_contents is inner for cell in cells)


# --- Patterns -----------------------------------------------------------------------------------


def _calls(node: ast.AST, *names: str) -> bool:
    """<anything>.<name>(...)"""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
    )


def _takes_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and not node.args and not node.keywords


def _certain(node: ast.AST | None) -> bool:
    """Evaluated sooner or later, its value is the same, and nothing else happens."""
    match node:
        case None | ast.Name() | ast.Constant():
            return True
        case ast.Call(func=ast.Attribute(value=value), args=args, keywords=keywords):
            return _calls(node, *VIEWS) and all(
                map(_certain, (value, *args, *(one.value for one in keywords)))
            )
        case ast.Attribute() | ast.Subscript() | ast.Slice() | ast.Tuple() | ast.List():
            pass
        case ast.BinOp() | ast.UnaryOp():
            pass
        case _:
            return False
    parts = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
    return all(map(_certain, parts))


def _is_one(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == 1


def _gain(node: ast.expr) -> ast.expr | None:
    """The scale of `1 + scale`, of `(1 + scale)[...]` or `(1 + scale).unsqueeze(...)`."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return right if _is_one(left) else left if _is_one(right) else None
        case ast.Subscript(value=value):
            inner = _gain(value)
            return inner and ast.copy_location(ast.Subscript(inner, node.slice, ast.Load()), node)
        case ast.Call(func=ast.Attribute(value=value, attr="unsqueeze"), args=args, keywords=[]):
            inner = _gain(value)
            view = inner and ast.Attribute(inner, "unsqueeze", ast.Load())
            return view and ast.copy_location(ast.Call(view, args, []), node)
    return None


def _modulation(node: ast.expr) -> Modulation | None:
    product, shift = node, None
    match node:
        case ast.BinOp(left=ast.BinOp(op=ast.Mult()) as left, op=ast.Add(), right=right):
            product, shift = left, right
    match product:
        case ast.BinOp(left=head, op=ast.Mult(), right=right):
            scale = _gain(right)
            if scale is not None and _certain(scale) and _certain(shift):
                return Modulation(head, scale, shift)
    return None


def _mentions(node: ast.AST, name: str) -> int:
    return sum(isinstance(one, ast.Name) and one.id == name for one in ast.walk(node))


def _same(a: ast.AST, b: ast.AST) -> bool:
    return ast.dump(a) == ast.dump(b)


# --- A method -----------------------------------------------------------------------------------


class _Finder(ast.NodeTransformer):
    def __init__(self, source: Source, norms: frozenset[str]) -> None:
        self.source, self.node, self.norms = source, source.node, norms
        arguments = [*self.node.args.posonlyargs, *self.node.args.args]
        self.me = arguments[0].arg if arguments else ""
        self.found: set[str] = set()
        self.left: list[str] = []

    def rewrite(self) -> None:
        names = [one for one in ast.walk(self.node) if isinstance(one, ast.Name)]
        if any(one.id == self.me and not isinstance(one.ctx, ast.Load) for one in names):
            return
        # Where a name may be seen otherwise than the statements show, one by one
        unclear = (ast.Try, getattr(ast, "TryStar", ast.Try), ast.Global, ast.Nonlocal)
        if not any(one.id in UNCERTAIN for one in names) and not any(
            isinstance(one, unclear) for one in ast.walk(self.node)
        ):
            for body in self._bodies(self.node):
                self._pairs(body)
        self.node.body = [self.visit(statement) for statement in self.node.body]
        self._missed()

    # An expression

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # another scope, where names may mean something else

    visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_FunctionDef  # type: ignore

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        return self._call(node, self._inline(node)) or self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        narrowed = self._narrowed(node)
        return self._call(node, narrowed or self._inline(node)) or self.generic_visit(node)

    def _inline(self, node: ast.expr) -> tuple[Head, Modulation] | None:
        parts = _modulation(node) or self._applied(node)
        head = parts and self._head(parts.head)
        return (head, parts) if head and parts else None

    def _narrowed(self, node: ast.Call) -> tuple[Head, Modulation] | None:
        """(self.norm(x.float()) * ...).type_as(x), also .to(x.dtype)."""
        if not _calls(node, "type_as", "to") or len(node.args) != 1 or node.keywords:
            return None
        found = self._inline(cast(ast.Attribute, node.func).value)
        if found is None or found[0].form != "plain" or not _calls(found[0].x, "float"):
            return None
        wide = cast(ast.Call, found[0].x)
        x, like = cast(ast.Attribute, wide.func).value, node.args[0]
        if cast(ast.Attribute, node.func).attr == "to":
            if not isinstance(like, ast.Attribute) or like.attr != "dtype":
                return None
            like = like.value
        if not _takes_none(wide) or not _certain(x) or not _same(x, like):
            return None
        return found[0]._replace(x=x, form="widened"), found[1]

    def _head(self, node: ast.expr) -> Head | None:
        """self.norm(x), and what may stand between it and the scale."""
        if _calls(node, "float") and _takes_none(node):
            inner = self._head(cast(ast.Attribute, cast(ast.Call, node).func).value)
            return inner and inner._replace(form="float")
        if _calls(node, "unflatten"):
            call = cast(ast.Call, node)
            inner = self._head(cast(ast.Attribute, call.func).value)
            given = [*call.args, *(one.value for one in call.keywords)]
            if inner is None or inner.form != "plain" or not given or not _is_one(given[0]):
                return None
            if not all(map(_certain, given)):
                return None
            view = ast.Attribute(inner.x, "unflatten", ast.Load())
            return inner._replace(x=ast.Call(view, call.args, call.keywords))
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr=name) as norm,
                args=[x],
                keywords=[],
            ) if owner == self.me and name in self.norms and not isinstance(x, ast.Starred):
                return Head(norm, x, "plain")
        return None

    def _applied(self, node: ast.expr) -> Modulation | None:
        """modulate(head, shift, scale): a free function of one line, with its arguments put in."""
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                pass
            case _:
                return None
        code = self.source.function.__code__
        if name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            return None
        free = _free_modulation(self.source.function.__globals__.get(name))
        if free is None or len(args) != len(free[0]):
            return None
        names, parts = free
        values = dict(zip(names, args, strict=True))
        given = [value for one, value in values.items() if one != cast(ast.Name, parts.head).id]
        if not all(map(_certain, given)):
            return None
        return Modulation(*(one and _put(one, values, node) for one in parts))  # type: ignore

    def _call(self, node: ast.expr, found: tuple[Head, Modulation] | None) -> ast.expr | None:
        if found is None:
            return None
        head, parts = found
        self.found.add(head.norm.attr)
        x = self.visit(head.x)
        args = [head.norm, x, parts.scale, parts.shift or ast.Constant(None)]
        method = ast.Attribute(ast.Name(self.me, ast.Load()), METHOD, ast.Load())
        call = ast.copy_location(ast.Call(method, [*args, ast.Constant(head.form)], []), node)
        return ast.fix_missing_locations(call)

    # Two statements

    def _bodies(self, node: ast.AST) -> Iterator[list[ast.stmt]]:
        """Every list of statements of this scope."""
        for field in ("body", "orelse"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                yield body
                for statement in body:
                    if not isinstance(statement, (*Definition, ast.ClassDef)):
                        yield from self._bodies(statement)

    def _pairs(self, body: list[ast.stmt]) -> None:
        for index, statement in enumerate(body):
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if self._head(value):
                    self._pair(name, statement, body[index + 1 :])

    def _pair(self, name: str, first: ast.Assign, rest: list[ast.stmt]) -> None:
        """y = self.norm(x); ...; y = y * (1 + scale) + shift: y = x; ...; y = modulated(y)."""
        for statement in rest:
            if not _mentions(statement, name):
                if not self._is_quiet(statement):
                    return
                continue
            value = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
            if value is None or _mentions(value, name) != 1 or not self._is_spent(name, statement):
                return
            if _calls(value, "type_as", "to"):  # of the result: stays where it is
                value = cast(ast.Attribute, cast(ast.Call, value).func).value
            parts = _modulation(value) or self._applied(value)
            if not parts or not isinstance(parts.head, ast.Name) or parts.head.id != name:
                return
            head = cast(Head, self._head(first.value))
            put = ast.copy_location(ast.Name(name, ast.Load()), parts.head)
            first.value, head = ast.copy_location(head.x, first.value), head._replace(x=put)
            new = cast(ast.expr, self._call(value, (head, parts)))
            _Swap(value, new).visit(statement)
            return

    def _is_quiet(self, statement: ast.stmt) -> bool:
        """It gives names to values that are certain, or to norms of them, modulated or not."""
        match statement:
            case ast.Assign(targets=targets, value=value):
                head, done = self._head(value), _calls(value, METHOD)
                parts = [head.x] if head else cast(ast.Call, value).args if done else [value]
                tuples = [one.elts if isinstance(one, ast.Tuple) else [one] for one in targets]
                return all(map(_certain, parts)) and all(
                    isinstance(one, ast.Name) for names in tuples for one in names
                )
        return False

    def _is_spent(self, name: str, last: ast.stmt) -> bool:
        """Nobody can see the norm's own result: the name is given away there, or stands nowhere
        else."""
        match last:
            case ast.Assign(targets=[ast.Name(id=same)]) if same == name:
                return True
        return _mentions(self.node, name) == 2

    def _missed(self) -> None:
        """What looks like modulation of a norm's result and is not certain."""
        given = {
            one.targets[0].id: head.norm.attr
            for one in ast.walk(self.node)
            if isinstance(one, ast.Assign)
            and isinstance(one.targets[0], ast.Name)
            and (head := self._head(one.value))
        }
        for one in ast.walk(self.node):
            if isinstance(one, ast.BinOp) and (parts := _modulation(one)):
                norm = given.pop(parts.head.id, None) if isinstance(parts.head, ast.Name) else None
                if norm is not None:
                    why = "what lies between, or later uses of the norm's result, could see it"
                    self.left.append(f"modulation of {norm}, line {one.lineno}: {why}")


def _put(body: ast.expr, values: dict[str, ast.expr], call: ast.expr) -> ast.expr:
    """An expression of another function, with values for its names, as if it stood in the call."""
    body = copy.deepcopy(body)
    for one in ast.walk(body):
        ast.copy_location(one, call)
    return cast(ast.expr, _Put(values).visit(body))


class _Put(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.values[node.id]


class _Swap(ast.NodeTransformer):
    """One expression for another."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


@functools.lru_cache(maxsize=256)
def _free_modulation(function: object) -> tuple[list[str], Modulation] | None:
    """Arguments and body of `def modulate(x, shift, scale): return x * (1 + ..) + ..`."""
    source = source_of(function) if isinstance(function, FunctionType) else ""
    if isinstance(source, str) or cast(FunctionType, function).__code__.co_flags & LAZY:
        return None
    node = source.node
    arguments = node.args
    names = [one.arg for one in arguments.args]
    simple = not (arguments.posonlyargs or arguments.kwonlyargs or arguments.defaults)
    if not simple or arguments.vararg or arguments.kwarg or node.decorator_list:
        return None
    match node.body:
        case [ast.Return(value=value)] | [ast.Expr(value=ast.Constant()), ast.Return(value=value)]:
            parts = value and _modulation(value)
            if value and parts and isinstance(parts.head, ast.Name):
                used = [one.id for one in ast.walk(value) if isinstance(one, ast.Name)]
                return (names, parts) if sorted(used) == sorted(names) else None
    return None
