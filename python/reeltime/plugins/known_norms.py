# SPDX-License-Identifier: Apache-2.0
"""Which modules are a LayerNorm or an RMSNorm: by what their forward computes, not by their name.

A forward is known if

    it is PyTorch's own, also in a subclass;
    or its code says nothing but what a norm has to say (WORDS, CONSTANTS), so that what it does in
    one place it does everywhere, and on probes it agrees with the equation below: in value, dtype
    and order in memory.

    y = z / sqrt(mean(z^2) + eps) * weight + bias,   z = x (RMSNorm) or x - mean(x) (LayerNorm)

Probed is an object of the same class that has weights of its own and nothing else.
"""

from __future__ import annotations

import dis
import functools
import itertools
import re
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from reeltime import checks


class Norm(NamedTuple):
    """How a module normalises its last dimension.

    Attributes:
        kind: "layer" or "rms".
        dtype: of its result, one of DTYPES.
        eps: name of the attribute.
        dense: results are contiguous, as PyTorch's own norms make them; others keep the order of
            x in memory, as arithmetic does.
    """

    kind: str
    dtype: str
    eps: str = "eps"
    dense: bool = False


# --- The dtype of a result ----------------------------------------------------------------------

# Under autocast PyTorch's own norms compute in float32 on the devices where it says so.
AUTOCAST = {
    (f"aten::{kind}_norm", device): torch._C._dispatch_has_kernel_for_dispatch_key(
        f"aten::{kind}_norm", f"Autocast{device.upper()}"
    )
    for kind in ("layer", "rms")
    for device in ("cpu", "cuda", "xpu")
}


def _own(kind: str, x: torch.dtype, device: str) -> torch.dtype:
    if AUTOCAST.get((f"aten::{kind}_norm", device)) and torch.is_autocast_enabled(device):
        return x if x == torch.float64 else torch.float32
    return x


def _of_weight(x: torch.dtype, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    if weight is None:
        return x
    half = weight.dtype in (torch.float16, torch.bfloat16)
    x = weight.dtype if half else torch.promote_types(x, weight.dtype)
    return x if bias is None else torch.promote_types(x, bias.dtype)


# (kind, dtype of x, its device, weight, bias) -> dtype
DTYPES: dict[str, Callable[..., torch.dtype]] = {
    "own": lambda kind, x, device, weight, bias: _own(kind, x, device),
    "input": lambda kind, x, device, weight, bias: x,
    "product": lambda kind, x, device, weight, bias: (
        x if weight is None else torch.promote_types(x, weight.dtype)
    ),
    "weight": lambda kind, x, device, weight, bias: _of_weight(x, weight, bias),
}


OTHERS = (nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)


def looks_like_one(module: nn.Module) -> bool:
    """Whether a reader of the report would ask what became of it."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    cls = type(module)
    other = isinstance(module, OTHERS) or cls.__module__.startswith("torch.nn.utils")
    leaf = next(module.children(), None) is None
    return leaf and "norm" in cls.__name__.lower() and not other


def width(module: nn.Module) -> int:
    """Of what it normalises; 0 if it takes any."""
    if isinstance(weight := getattr(module, "weight", None), Tensor):
        return len(weight)
    shape = getattr(module, "normalized_shape", getattr(module, "dim", 0))
    return shape if isinstance(shape, int) else shape[0]


def known(module: nn.Module) -> Norm | str:
    """How it normalises, or why that is not known."""
    if "forward" in vars(module):
        return "its forward was replaced, as offloading does: accelerate first"
    if hasattr(module, "parametrizations"):
        return "parametrised: its weight is computed"
    cls: Any = type(module)
    held = {name: one for name, one in module._parameters.items() if one is not None}
    if module._buffers or held.keys() != {n for n in HELD if getattr(module, n, None) is not None}:
        return f"{cls.__name__} holds other tensors than a weight and a bias"
    norm = _known(cls, frozenset(held))
    if isinstance(norm, str):
        return norm
    shape = getattr(module, "normalized_shape", getattr(module, "dim", 0))
    if any(one.dim() != 1 for one in held.values()) or (not isinstance(shape, int) and shape[1:]):
        return "it normalises more than the last dimension"
    replaced = {*vars(module), *module._modules} - {*HELD, norm.eps, "normalized_shape"}
    if replaced := replaced.intersection(_said(cls)):
        return f"its {min(replaced)} is one of its own"
    eps = getattr(module, norm.eps)
    if eps is None and norm.dtype == "own":
        return norm
    return norm if isinstance(eps, float) and eps > 0 else f"its eps is {eps}"


@functools.lru_cache(maxsize=1024)
def _known(cls: Any, held: frozenset[str]) -> Norm | str:
    own = nn.Module.__call__, nn.Module.__getattr__, object.__getattribute__
    if (cls.__call__, cls.__getattr__, cls.__getattribute__) != own:
        return f"{cls.__name__} is called in a way of its own"
    if cls.forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        kind = "layer" if cls.forward is nn.LayerNorm.forward else "rms"
        return Norm(kind, "own", dense=True)
    said = _said(cls)
    norm = said if isinstance(said, str) else _probed(cls, held, said)
    return f"the forward of {cls.__name__} is not known: {norm}" if isinstance(norm, str) else norm


# --- What a forward says ------------------------------------------------------------------------

HELD = ("weight", "bias")
EPS = frozenset("eps epsilon norm_eps variance_epsilon".split())
WORDS = EPS | frozenset(
    "F bfloat16 bias double dtype float float16 float32 float64 forward functional layer_norm mean "
    "nn normalized_shape pow rms_norm rsqrt sqrt square super to torch type type_as var weight "
    "is_torch_npu_available torch_npu npu_rms_norm".split()  # diffusers, for an NPU
)
KEYWORDS = WORDS | {"correction", "dim", "input", "keepdim", "unbiased"}
CONSTANTS = (None, -1, -0.5, 0, 0.5, 1, 2)
# Of an object, an item or a global name, and in place
WRITES = re.compile("(STORE|DELETE)_(ATTR|SUBSCR|SLICE|GLOBAL)|INPLACE_")


@functools.lru_cache(maxsize=1024)
def _said(cls: Any) -> frozenset[str] | str:
    """Every name in a forward and in what it calls; or why it may do what no norm does."""
    said: set[str] = set()
    functions = [cls.forward]
    for function in functions:  # grows
        if not isinstance(function, FunctionType):
            return "it calls what is no plain function"
        if why := _beyond(function):
            return why
        for name in function.__code__.co_names:
            # super() may mean any class
            bases = (vars(one) for one in cls.__mro__ if one not in (nn.Module, object))
            found = [one[name] for one in bases if name in one]
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType) and not _is_torchs(name, value):
                found.append(value)
            elif value is not None and not _is_torchs(name, value):
                return f"it uses {name!r}"
            if not found and name not in WORDS:
                return f"it uses {name!r}"
            said.add(name)
            functions += [one for one in found if one not in functions]
    return frozenset(said)


def _is_torchs(name: str, value: Any) -> bool:
    """Whether a global is what its name says."""
    if name == "is_torch_npu_available":
        return getattr(value, "__module__", None) == "diffusers.utils.import_utils"
    return any(value is one or value is getattr(one, name, None) for one in (torch, nn, F))


def _beyond(function: FunctionType) -> str | None:
    """What a function has or does that no norm needs."""
    code = function.__code__
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if {*code.co_freevars} - {"__class__"} or {*defaults} - {None}:
        return "it has a closure or defaults"
    for one in dis.get_instructions(code):
        if WRITES.match(one.opname) or (one.opname == "BINARY_OP" and one.argrepr.endswith("=")):
            return "it writes in place"
        if one.opcode in dis.hasconst:
            value = code.co_consts[one.arg or 0]
        else:
            value = one.arg if one.opname == "LOAD_SMALL_INT" else None
        for part in value if isinstance(value, tuple) else (value,):
            if part not in (KEYWORDS if isinstance(part, str) else CONSTANTS):
                return f"it uses {getattr(part, 'co_name', part)!r}"
    return None


# --- What it computes ---------------------------------------------------------------------------

WIDTH, SOME_EPS = 8, 0.3
# By row: so small that eps is all, plain, large, constant, far from zero
SPREAD, MEAN = (1e-3, 1.0, 30.0, 0.0, 1.0), (0.0, 0.0, 0.0, 2.0, 4.0)
ROUNDINGS = 8  # of the narrowest dtype: about as many as there are operations


def _probed(cls: Any, held: frozenset[str], said: frozenset[str]) -> Norm | str:
    """The norm that agrees with every probe: on a CPU without autocast, and with it on fakes of a
    GPU, of a kind that is seldom there, as fakes of one that is there would wake it up."""
    if len(eps := said & EPS) != 1:
        return "it reads no eps, or several"
    ways = itertools.product(("layer", "rms"), DTYPES, eps, (False, True))
    norms = [Norm(*way) for way in ways]
    floats = [checks.FLOATS, *(checks.FLOATS if name in held else (None,) for name in HELD)]
    before = torch.is_autocast_enabled("xpu")
    torch.set_autocast_enabled("xpu", True)  # torch.autocast refuses where there is none
    try:
        with _disable_current_modes(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dtypes that differ are slow
            for dtypes in itertools.product(*floats):
                norms = _agreeing(norms, cls, dtypes)
    finally:
        torch.set_autocast_enabled("xpu", before)
    return norms[0] if norms else "it computes something else"


def _agreeing(norms: list[Norm], cls: Any, dtypes: tuple[torch.dtype | None, ...]) -> list[Norm]:
    """Of these, those that agree with what it makes of x, weight and bias in these dtypes."""
    if not norms:
        return norms
    like: Any = {"dtype": torch.float64, "device": "cpu"}
    some = torch.arange(5 * 3 * 2 * WIDTH, **like).square().sin().view(5, 3, 2, WIDTH)
    spread, mean = (torch.tensor(one, **like).view(5, 1, 1, 1) for one in (SPREAD, MEAN))
    x = (some * spread + mean).permute(2, 1, 0, 3)  # in memory the other way round
    wide = zip((x, some[1, 1, 0] + 1, some[1, 2, 0]), dtypes, strict=True)
    real: list[Any] = [dtype and one.to(dtype) for one, dtype in wide]
    eps = norms[0].eps
    results = [(_run(cls, eps, *real), *real)]
    refused = results[0][0] is None
    with FakeTensorMode():  # knows no values: what depends on them fails
        fake = [
            one if one is None else torch.empty(one.shape, dtype=one.dtype, device="xpu")
            for one in real
        ]
        results.append((_run(cls, eps, *fake), *fake))
    if refused and not {*dtypes} <= {torch.float32, None}:  # PyTorch takes not every mix
        results = [result for result in results if result[0] is not None]
    return [norm for norm in norms if all(_agrees(norm, *result) for result in results)]


def _run(cls: Any, eps: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    """What the forward gives; None: an error, or no tensor like x."""
    module = object.__new__(cls)
    held = {"weight": weight, "bias": bias, eps: SOME_EPS, "normalized_shape": (WIDTH,)}
    vars(module).update(held)
    try:
        y = cls.forward(module, x)
    except Exception:  # noqa: BLE001  whatever it raises: no norm
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _agrees(norm: Norm, y: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    dtype = DTYPES[norm.dtype](norm.kind, x.dtype, x.device.type, weight, bias)
    if y is None or y.dtype != dtype or not x.is_cpu:
        return y is not None and y.dtype == dtype
    want = x.double()
    want = want - want.mean(-1, keepdim=True) if norm.kind == "layer" else want
    want = want / (want.square().mean(-1, keepdim=True) + SOME_EPS).sqrt()
    want = want if weight is None else want * weight.double()
    want = want if bias is None else want + bias.double()
    roundings = [torch.finfo(one.dtype).eps for one in (x, weight, bias, y) if one is not None]
    limit = ROUNDINGS * max(*roundings, torch.finfo(torch.float32).eps)
    near = (y.double() - want).abs() <= limit * (1 + want.abs())
    ordered = y.is_contiguous() if norm.dense else y.stride() == torch.empty_like(x).stride()
    return bool(near.all()) and ordered
