# SPDX-License-Identifier: Apache-2.0
"""transformers: model.set_attn_implementation("reeltime_int8"), after `register()`.

The function is transformers' own for SDPA, with ours in place of PyTorch's: masks, grouped heads,
caches and errors stay as they are there.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reeltime.plugins import sdpa
from reeltime.plugins.attention import FORMATS, Mode, Replacement

NAMES = {f"reeltime_{format}": format for format in FORMATS}


def register(*, backend: str = "auto") -> dict[str, Replacement]:
    """Make "reeltime_int8" and "reeltime_fp8" names of attention, for every model.

    A model runs in 8 bits from its own set_attn_implementation on; until then nothing has changed.

    Args:
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        By name, what runs; its `calls` count, over all models.
    Raises:
        ValueError: an unknown backend.
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    made = {name: sdpa.make(*FORMATS[f], backend=backend) for name, f in NAMES.items()}
    for name, replacement in made.items():
        AttentionInterface.register(name, _attention_function(replacement))
        AttentionMaskInterface.register(name, sdpa_mask)
    return made


def unregister() -> None:
    """The names are no more.  Models that still use one fail: give them another before."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in NAMES:  # there is no public way back
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)


def _attention_function(replacement: Replacement) -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(*args: Any, **kwargs: Any) -> Any:
        with Mode(replacement):
            return sdpa_attention_forward(*args, **kwargs)

    return attend
