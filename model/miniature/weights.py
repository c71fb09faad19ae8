# SPDX-License-Identifier: Apache-2.0
"""The miniature that ships: transformer.safetensors and codec.safetensors, float16, 10 MB.

sla-50.safetensors and sla-90.safetensors turn it into sparse-linear attention that reads 50% and
10% of the key blocks: low-rank changes of the self-attention's projections, and its `proj_l`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..codec import ConvCodec
from ..config import PRESETS, SparseLinear
from ..transformer import CausalTransformer

FOLDER = Path(__file__).parent / "weights"


def load_miniature(
    folder: Path | None = None, dtype: torch.dtype = torch.float32, *, sparsity: int = 0
) -> tuple[CausalTransformer, ConvCodec]:
    """Transformer and codec from a folder of weights (the shipped one by default).

    Args:
        sparsity: percent of the key blocks that self-attention leaves to its linear branch: 0
            (dense), or what the folder holds an adapter for (50 and 90 ship).
    Raises:
        FileNotFoundError: no such file.
        ValueError: not these weights: unreadable file, or keys or shapes that do not fit.
    """
    folder = FOLDER if folder is None else Path(folder)
    transformer, codec = CausalTransformer(PRESETS["miniature"]), ConvCodec()
    for name, module in (("transformer", transformer), ("codec", codec)):
        path = folder / f"{name}.safetensors"
        fit(module, read(path), path)
    if sparsity:
        transformer = sparse(transformer, sparsity, folder / f"sla-{sparsity}.safetensors")
    return transformer.to(dtype).eval(), codec.eval()


def sparse(dense: CausalTransformer, sparsity: int, adapter: Path | None) -> CausalTransformer:
    """`dense` with sparse-linear self-attention that leaves `sparsity` percent of the key blocks to
    its linear branch; without an adapter, that branch adds nothing.

    Raises:
        FileNotFoundError, ValueError: no such adapter, or none of these weights.
    """
    if not 0 < sparsity < 100:
        raise ValueError(f"sparsity: expected a percentage from 1 to 99, got {sparsity}")
    config = replace(dense.config, sla=SparseLinear(topk=1 - sparsity / 100))
    net = CausalTransformer(config)
    state = net.state_dict() | dense.state_dict()
    if adapter is not None:
        adapt(state, read(adapter), adapter)
    fit(net, state, adapter)
    return net.eval()


def adapt(state: dict[str, Tensor], adapter: dict[str, Tensor], path: Path) -> None:
    """weight += B A for every pair of the adapter; what else it holds replaces what was there."""
    for name, value in adapter.items():
        weight, _, factor = name.partition(".lora_")
        if weight not in state or factor not in ("", "A", "B"):
            raise ValueError(f"checkpoint: {path} does not fit: unexpected {name}")
        if factor == "A":
            change = adapter[f"{weight}.lora_B"].float() @ value.float()
            state[weight] = state[weight].float() + change
        elif not factor:
            state[name] = value


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.  Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        held = ", ".join(sorted(other.name for other in path.parent.glob("*.safetensors")))
        raise FileNotFoundError(f"checkpoint: no {path.name} in {path.parent} ({held or 'empty'})")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is not a safetensors file ({error})") from error


def fit(module: nn.Module, state: dict[str, Tensor], path: Path | None) -> None:
    """Load `state`, strictly.  Raises ValueError: keys or shapes that do not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit: {error}") from error
