# SPDX-License-Identifier: Apache-2.0
"""The miniature that ships: transformer.safetensors and codec.safetensors, float16, 10 MB."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..codec import ConvCodec
from ..config import PRESETS
from ..transformer import CausalTransformer

FOLDER = Path(__file__).parent / "weights"


def load_miniature(
    folder: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[CausalTransformer, ConvCodec]:
    """Transformer and codec from a folder of weights (the shipped one by default).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not these weights: unreadable file, or keys or shapes that do not fit.
    """
    folder = FOLDER if folder is None else Path(folder)
    transformer, codec = CausalTransformer(PRESETS["miniature"]), ConvCodec()
    for name, module in (("transformer", transformer), ("codec", codec)):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: no {path.name} in {folder}")
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"checkpoint: {path} is not a safetensors file ({error})") from error
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: {path} does not fit: {error}") from error
    return transformer.to(dtype).eval(), codec.eval()
