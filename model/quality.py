# SPDX-License-Identifier: Apache-2.0
"""Quality levels, as data: what of a transformer runs in which format.

    | level    | layers of the blocks | keys | values | self-attention    |
    | -------- | -------------------- | ---- | ------ | ----------------- |
    | bf16     | the model's dtype    | same | same   | as the model's    |
    | int8     | INT8                 | INT8 | FP16   | as the model's    |
    | fp8      | FP8 (e4m3)           | INT8 | FP8    | as the model's    |
    | int8+sla | INT8                 | INT8 | FP16   | 10% of the blocks |
    | fp8+sla  | FP8 (e4m3)           | INT8 | FP8    | 10% of the blocks |

In 8 bits a norm quantises what it hands on, q, k and v are one product, fc1 hands GELU on in 8 bits
to fc2, and the products before a residual add it.  What reads a picture, a text or a timestep, the
head and the projection of sla's linear branch stay in the model's dtype: they are less than a
percent of the work, and what the first two get wrong is in every block behind them.

Which kernel serves a format is the backend's matter, and no level names one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from reeltime import quant
from reeltime.quant.api import FORMATS

from .config import SparseLinear
from .kv_cache import KV_FORMATS
from .layers import Linear8

if TYPE_CHECKING:
    from .transformer import CausalTransformer

# Layers of a block that can be in 8 bits, and what each is made of: names below blocks.<i>.
LAYERS: dict[str, tuple[str, ...]] = {"self_attn.qkv": ("q", "k", "v")} | {
    name: (name.rpartition(".")[2],)
    for name in (
        "self_attn.o",
        *(f"cross_attn.{part}" for part in ("q", "k", "v", "o", "k_img", "v_img")),
        *("ffn.0", "ffn.2"),
    )
}


@dataclass(frozen=True)
class Quality:
    """One level.

    Attributes:
        linear: format of the blocks' linear layers: None (the model's dtype), "int8" or "fp8".
        kv_format: of self-attention's keys and values, one of `kv_cache.KV_FORMATS`.
        topk: share of the key blocks that sparse-linear attention selects; None: as the model is.
        wide: layers that stay in the model's dtype, as patterns of their names ("blocks.0.*").
    """

    name: str
    linear: str | None = None
    kv_format: str = "plain"
    topk: float | None = None
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, allowed in (("linear", (None, *FORMATS)), ("kv_format", tuple(KV_FORMATS))):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}: expected one of {allowed}, got {getattr(self, field)!r}"
                )
        if self.topk is not None:
            SparseLinear(self.topk)

    def stays(self, layer: str) -> bool:
        """Whether blocks.<i>.<layer> keeps the model's dtype."""
        return self.linear is None or any(fnmatch(layer, pattern) for pattern in self.wide)


QUALITIES = {
    q.name: q
    for q in (
        Quality("bf16"),
        Quality("int8", linear="int8", kv_format="int8, v fp16"),
        Quality("fp8", linear="fp8", kv_format="int8, v fp8"),
        Quality("int8+sla", linear="int8", kv_format="int8, v fp16", topk=0.1),
        Quality("fp8+sla", linear="fp8", kv_format="int8, v fp8", topk=0.1),
    )
}


def named(name: str) -> Quality:
    """The level of that name.

    Raises:
        ValueError: unknown name; the message lists the levels.
    """
    if name not in QUALITIES:
        raise ValueError(f"quality: expected one of {', '.join(QUALITIES)}, got {name!r}")
    return QUALITIES[name]


# --- Layers in 8 bits ---------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a layer in 8 bits stands, or will."""

    owner: nn.Module
    name: str  # of the layer in its owner: "qkv"
    path: str  # of the owner: "blocks.3.self_attn"
    parts: tuple[str, ...]  # of the checkpoint: "q", "k", "v"


def places(net: CausalTransformer, level: Quality) -> Iterator[Place]:
    """The layers that this level wants in 8 bits, block by block."""
    for index, block in enumerate(net.blocks):
        for layer, parts in LAYERS.items():
            room, _, name = layer.rpartition(".")
            owner = block.get_submodule(room)
            path = f"blocks.{index}.{room}"
            if not level.stays(f"{path}.{name}") and hasattr(owner, parts[0]):
                yield Place(owner, name, path, parts)


def install(place: Place, level: Quality) -> Linear8:
    """A layer in 8 bits, still empty, where its parts were."""
    owner, name, path, parts = place
    wide = [owner.get_submodule(part) for part in parts]
    first, outputs = wide[0].weight, sum(layer.weight.shape[0] for layer in wide)
    if first.shape[1] % 16:
        raise ValueError(
            f"quality: {path}.{name} takes {first.shape[1]} channels, {level.linear} needs a "
            "multiple of 16. Keep it wide."
        )
    layer = Linear8(parts, (first.shape[1], outputs), str(level.linear), first.dtype, first.device)
    for part in parts:
        if part != name:
            delattr(owner, part)
    setattr(owner, name, layer)  # in place of its only part, where it has one
    return layer


@torch.no_grad()
def fill(layer: Linear8, weights: list[Tensor], biases: list[Tensor]) -> None:
    """The weights of its parts, quantised: once, and never again."""
    wide = torch.cat(weights)
    layer.weight, layer.weight_scale = quant.quantize_weight(wide, dtype=layer.weight.dtype)
    layer.bias = nn.Parameter(torch.cat(biases), requires_grad=False)


def quantize(net: CausalTransformer, level: Quality) -> CausalTransformer:
    """Bring `net` to a level, in place, layer by layer: no layer is held twice for long.

    Raises:
        ValueError: it has another level already, or a layer that cannot have this one.
    """
    if net.quality != QUALITIES["bf16"]:
        raise ValueError(f"quality: expected a transformer without one, got {net.quality.name}")
    for place in places(net, level):
        wide = [place.owner.get_submodule(part) for part in place.parts]
        fill(install(place, level), [w.weight for w in wide], [w.bias for w in wide])
    sparsify(net, level)
    net.quality = level
    return net


def shape(net: CausalTransformer, level: Quality) -> Mapping[str, tuple[Linear8, int]]:
    """Bring `net` to a level without weights: {the name of a weight or bias that a checkpoint
    holds: (the layer that it goes into, which of its parts it is)}."""
    found = {}
    for place in places(net, level):
        layer = install(place, level)
        for index, part in enumerate(place.parts):
            for kind in ("weight", "bias"):
                found[f"{place.path}.{part}.{kind}"] = (layer, index)
    net.quality = level
    return found


def sparsify(net: CausalTransformer, level: Quality) -> None:
    """Self-attention to the share of key blocks that the level says.

    A model without sparse-linear attention gets it: its linear branch adds nothing before training.
    """
    if level.topk is None:
        return
    sparse = net.config.sla or SparseLinear(level.topk)
    net.config = replace(net.config, sla=replace(sparse, topk=level.topk))
    like = net.patch_embedding.weight
    for block in net.blocks:
        if block.self_attn.proj_l is None:
            place = {"dtype": like.dtype, "device": like.device}
            block.self_attn.add_projection(net.config.head_dim, **place)
