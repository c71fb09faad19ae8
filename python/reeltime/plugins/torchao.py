# SPDX-License-Identifier: Apache-2.0
"""torchao: `quantize_(model, ReeltimeW8A8Config(), takes)` puts `Linear8` into a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from reeltime import checks
from reeltime.backends import BACKENDS
from reeltime.plugins import linear as linears
from reeltime.plugins.accelerate import Scope
from reeltime.plugins.changes import Left, SwapModule
from reeltime.plugins.sites import Place, Site
from reeltime.quant.api import FORMATS


@dataclass
class ReeltimeW8A8Config(AOBaseConfig):
    """Linear layers in W8A8: weights quantised once, 128 x 128 blocks; activations per token and
    128 channels, in every call.

    Args:
        format: "int8" or "fp8".
        backend: "auto", "reference", "triton" or "cuda".
    Raises:
        ValueError: an unknown format or backend; from `quantize_`, a layer that cannot be changed,
            when those before it are.  `filter_fn=takes` passes over such layers.
        UnsupportedArchError: from `quantize_`, `backend` cannot serve the layer's device.
    """

    format: str = "int8"
    backend: str = "auto"
    _site: Site = field(default_factory=lambda: Site("", "linear"), repr=False, compare=False)

    def __post_init__(self) -> None:
        checks.choice("format", self.format, tuple(FORMATS))
        checks.choice("backend", self.backend, BACKENDS)

    @property
    def calls(self) -> dict[str, int]:
        """{what ran: how often}, over all layers that were quantised with this object."""
        return dict(self._site.calls)


def takes(module: nn.Module, path: str = "") -> bool:
    """A `filter_fn` of `quantize_`: whether a module is a linear layer that can be changed."""
    return isinstance(module, nn.Linear) and isinstance(
        _find(module, ReeltimeW8A8Config()), SwapModule
    )


def _find(module: nn.Module, config: ReeltimeW8A8Config) -> SwapModule | Left:
    scope = Scope(config.backend, (), False, config._site)
    for found in linears.find(nn.ModuleList([module]), scope, config.format):
        assert isinstance(found, (SwapModule, Left))
        return found
    return Left("", "linear", f"it is a {type(module).__name__}")


@register_quantize_module_handler(ReeltimeW8A8Config)
def _quantize(module: nn.Module, config: ReeltimeW8A8Config) -> nn.Module:
    """The module itself becomes the layer: what `quantize_` was called on has no owner to hold
    another, and a layer with several owners stays one."""
    found = _find(module, config)
    if isinstance(found, Left):
        checks.fail(
            "filter_fn",
            "linear layers that can be changed",
            f"{module}: {found.why}",
            "Pass reeltime.plugins.torchao.takes, or one that leaves it out.",
        )
    layer = found.make(module)
    layer.place = Place(config._site, config._site)  # it was told no name: it counts for all
    vars(module).clear()
    vars(module).update(vars(layer))
    module.__class__ = type(layer)
    return module
