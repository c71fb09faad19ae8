# SPDX-License-Identifier: Apache-2.0
"""Linear layers of any model in W8A8: `Linear8` in place of `nn.Linear`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reeltime import backends, checks, quant
from reeltime.gemm_w8a8 import api as gemm
from reeltime.plugins import sites
from reeltime.plugins.attention import no_autocast
from reeltime.plugins.changes import COMPILED, Change, Left, SwapModule, uncompiled
from reeltime.plugins.sites import Place
from reeltime.quant.api import FORMATS, scale_shape

if TYPE_CHECKING:
    from reeltime.plugins.accelerate import Scope

BLOCK = 128  # rows and columns of a weight that share a scale


# --- The op -------------------------------------------------------------------------------------


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
    site: int,
) -> Tensor:
    _check(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    codes, scale = quant.quantize(rows, dtype=weight.dtype, backend=backend)
    # Not by the public call: on a CPU it refuses NaN, which a model must hand on as it came.
    args = (codes, weight, scale, weight_scale, bias, None, None, 1, "none", out_dtype)
    chosen = backends.resolve("gemm_w8a8", backend, x.device, gemm.GEMM, args)
    why = backends.no_kernel(gemm.GEMM, backend, chosen, x.device, args)
    if why is None:
        with no_autocast(x.device):
            y = gemm.GEMM.run(chosen, x.device, *args).view(*x.shape[:-1], weight.shape[0])
        sites.count(site, "linear", chosen)
        return y
    wide = quant.dequantize(weight, weight_scale, block_rows=BLOCK, dtype=out_dtype)
    y = F.linear(x.to(out_dtype), wide, None if bias is None else bias.to(out_dtype))
    sites.count(site, "linear", f"left: {why}")
    return y


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        inputs = weight.shape[1]
        if x.dim() == 0 or x.shape[-1] != inputs:
            checks.fail("x", f"shape [..., {inputs}]", list(x.shape), "Pass what the layer takes.")
        checks.device("x", x, weight, "the layer")


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _check(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As if nothing had been rounded (straight-through), with the weights that there are."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ quant.dequantize(*ctx.saved_tensors, block_rows=BLOCK, dtype=grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum_to_size(grad.shape[-1])
    return grad_x, None, None, grad_bias, None, None, None


backends.LIBRARY.define(
    "plugin_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType out_dtype, str backend, int site) -> Tensor"
)
backends.LIBRARY.impl("plugin_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("reeltime::plugin_linear", _fake, lib=backends.LIBRARY)
torch.library.register_autograd(
    "reeltime::plugin_linear", _backward, setup_context=_save, lib=backends.LIBRARY
)
_OP = torch.ops.reeltime.plugin_linear.default


def _left(number: int, why: str) -> None:
    """PyTorch's own code runs.  In a compiled graph that is decided, and counted, at its making."""
    sites.count(number, "linear", f"left: {why}")


# As torch.compiler.assume_constant_result does, which would import dynamo, for a second
_left._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- The layer ----------------------------------------------------------------------------------

# What of a module `Linear8` has its own of.  The rest of its state it shares with the layer that it
# stands for: hooks (their handles still remove them), training, what others have put there.
OWN = ("_parameters", "_buffers", "_modules", "_compiled_call_impl")


class Computed(Tensor):
    """Weights that stand in no layer: what merges an adapter into them, say, would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    @property
    def data(self) -> Tensor:
        raise RuntimeError(
            "weight: expected a layer in the model's dtype, got one in 8 bits, whose weight is "
            "computed: writing would be lost. Merge before accelerate(), or undo() it first."
        )


class Linear8(nn.Module):
    """A linear layer in W8A8: y = x @ weight.T + bias, both factors in 8 bits.

    Weights have a scale per 128 x 128, inputs one per token and 128 channels, made in every call.

    Codes and scales are parameters, as whoever offloads weights moves parameters.  Whoever asks a
    layer for its dtype looks at the first: that is the bias, or an empty one in its stead.

    Attributes:
        bias: [N], in the dtype of results.
        like: [0] in the dtype of results, in a layer without bias.
        weight_codes: [N, K] int8 or float8_e4m3fn.
        weight_scale: [ceil(N / 128), ceil(K / 128)] float32.
    """

    in_features: int
    out_features: int

    def __init__(self, linear: nn.Linear, format: str, backend: str, place: Place) -> None:
        super().__init__()
        self.__dict__.update({name: x for name, x in vars(linear).items() if name not in OWN})
        self.format, self.backend, self.place = format, backend, place
        bias, weight = linear.bias, linear.weight.detach()
        if bias is None:
            self.register_parameter("bias", None)
            self.like = nn.Parameter(weight.new_empty(0), requires_grad=False)
        else:
            self.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        codes, scale = quant.quantize_weight(weight, dtype=FORMATS[format])
        self.weight_codes = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of results."""
        return self.like.dtype if self.bias is None else self.bias.dtype

    @property
    def weight(self) -> Tensor:
        """The weights in `dtype`, computed for code that reads them; writing to them raises."""
        codes, scale = self.weight_codes, self.weight_scale
        if torch.compiler.is_compiling():
            return quant.dequantize(codes, scale, block_rows=BLOCK, dtype=self.dtype)
        with torch.inference_mode():  # outside of which PyTorch refuses to write
            wide = quant.dequantize(codes, scale, block_rows=BLOCK, dtype=self.dtype)
            return wide.as_subclass(Computed)

    def forward(self, x: Tensor) -> Tensor:
        bias, device = self.bias, x.device.type
        dtype = (self.like if bias is None else bias).dtype
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        elif x.dtype != dtype:
            checks.dtype("x", x, (dtype,))
        if sites.tangents():  # straight through, as the gradient
            _left(self.place.number, "a tangent is wanted")
            eight = self.weight_codes, self.weight_scale
            weight = quant.dequantize(*eight, block_rows=BLOCK, dtype=dtype)
            return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        call = _linear if backends.unwatched(x) else _OP
        return call(
            x, self.weight_codes, self.weight_scale, bias, dtype, self.backend, self.place.number
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.format}, {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8:
        """.to(dtype) is for the bias: codes and scales only move."""
        eight = self.weight_codes, self.weight_scale

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if any(x is one for one in eight) and y.dtype != x.dtype else y

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """From a state of its own, or from that of the original layer, quantised here."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            want = self.weight_codes
            if weight.shape != want.shape:
                errors = rest[-1]
                errors.append(
                    f"size mismatch for {prefix}weight: {list(weight.shape)} from the state, "
                    f"{list(want.shape)} in the layer."
                )
                return
            codes, scale = quant.quantize_weight(weight.to(want.device), dtype=want.dtype)
            state_dict = {k: x for k, x in state_dict.items() if k != f"{prefix}weight"}
            state_dict |= {f"{prefix}weight_codes": codes, f"{prefix}weight_scale": scale}
            if self.bias is None:
                state_dict[f"{prefix}like"] = self.like
        super()._load_from_state_dict(state_dict, prefix, *rest)


# --- Where ---------------------------------------------------------------------------------------

# Read the weights of their layers instead of calling them, at least at times.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
BARE = nn.Module()


def find(model: nn.Module, scope: Scope, format: str) -> Iterator[Change | Left]:
    """Every linear layer of the model, as what it becomes or why it stays."""
    paths: dict[nn.Module, list[str]] = {}
    readers: list[tuple[str, str]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, READERS):
            readers.append((f"{path}." if path else "", type(module).__name__))
        if isinstance(module, (nn.Linear, Linear8)):
            paths.setdefault(module, []).append(path)
    elsewhere = set(_elsewhere(model))
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for module, found in paths.items():
        why = _stands_in(found, readers, scope) or _is(module, users)
        if why is None and module in elsewhere:
            why = "it is also in a list or the like, or a method of it is, which would keep it"
        if why is not None:
            yield Left(uncompiled(found[0]), "linear", why)
        else:
            yield _change(model, cast(nn.Linear, module), found, scope, format)


def _elsewhere(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that their owners also reach otherwise than by name, where none is put instead."""
    for owner in model.modules():
        for name in vars(owner).keys() - vars(BARE).keys():
            held = vars(owner)[name]
            values = held.values() if isinstance(held, dict) else held
            for one in values if isinstance(held, (dict, list, tuple)) else (held,):
                one = one.__self__ if isinstance(one, MethodType) else one
                if isinstance(one, nn.Module):
                    yield one


def _stands_in(found: list[str], readers: list[tuple[str, str]], scope: Scope) -> str | None:
    """Why a layer stays because of where it stands."""
    for path in found:
        owner, _, name = path.rpartition(".")
        for room, reader in readers:
            if path.startswith(room):
                return f"nn.{reader} reads its weight instead of calling it"
        if path == "":
            return "it is the model: accelerate what holds it"
        if name == COMPILED:
            return "compiled by itself: accelerate first"
        if pattern := scope.skips(path):
            return f"skip: {pattern}"
    return None


def _is(module: nn.Module, users: Counter[int]) -> str | None:
    """Why a layer stays because of what it is."""
    if isinstance(module, Linear8):
        return "in 8 bits already"
    if hasattr(module, "parametrizations"):
        return "parametrised: its weight is computed"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a class of its own"
    if "forward" in vars(module):
        return "its forward was replaced, as offloading does: accelerate first"
    weight = module._parameters.get("weight")
    if weight is None or set(module._parameters) != {"weight", "bias"}:
        return "its weight is computed by a hook"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.is_meta:
        return "its weight is on the meta device: load it first"
    if weight.dtype not in checks.FLOATS:
        return f"its weight is in {weight.dtype}"
    if any(users[id(p)] > 1 for p in module.parameters()):
        return "it shares a parameter with another module"
    if weight.shape[1] % 16 or not weight.numel():
        return f"{weight.shape[1]} inputs are no multiple of 16"
    if not weight.detach().isfinite().all():
        return "its weight holds NaN or Inf"
    return None


def _change(
    model: nn.Module, linear: nn.Linear, found: list[str], scope: Scope, format: str
) -> Change | Left:
    weight = linear.weight
    outputs, inputs = weight.shape
    a = torch.empty((0, inputs), dtype=FORMATS[format], device=weight.device)
    scale = torch.empty(scale_shape(0, inputs, 1), device=weight.device)
    args = (a, a, scale, scale, None, None, None, 1, "none", weight.dtype)
    backend = backends.resolve("gemm_w8a8", scope.backend, weight.device, gemm.GEMM, args)
    if why := backends.no_kernel(gemm.GEMM, scope.backend, backend, weight.device, args):
        return Left(uncompiled(found[0]), "linear", why)
    place = scope.place(found[0], "linear")
    scales = scale_shape(outputs, inputs, BLOCK)
    owners = [where.rpartition(".")[::2] for where in found]
    return SwapModule(
        place.site.path,
        "linear",
        f"Linear {inputs} -> {outputs}, {format}",
        backend,
        place,
        saved=weight.nbytes - outputs * inputs - 4 * scales[0] * scales[1],
        owners=tuple(dict.fromkeys((model.get_submodule(owner), name) for owner, name in owners)),
        old=linear,
        make=lambda old: Linear8(old, format, scope.backend, place),
        undoable=scope.undoable,
    )
