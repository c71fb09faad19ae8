# SPDX-License-Identifier: Apache-2.0
"""ComfyUI: transformer_options["optimized_attention_override"] = attention_override().

ComfyUI calls it in place of its own attention, which it passes along:
https://github.com/Comfy-Org/ComfyUI/pull/9639
https://github.com/Comfy-Org/ComfyUI/blob/master/comfy/ldm/modules/attention.py (wrap_attn)
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from reeltime import backends, checks
from reeltime.plugins import attention, sdpa

# What ComfyUI's own functions are passed besides; scale, enable_gqa and low_precision_attention
# mean something.  Another name may change what is computed: ComfyUI's function knows.
KNOWN = {
    "scale",
    "enable_gqa",
    "low_precision_attention",
    "transformer_options",
    "_inside_attn_wrapper",
}

_warned: set[tuple[int, str]] = set()


def attention_override(
    format: str | None = "int8", *, sla: float | None = None, backend: str = "auto"
) -> Override:
    """What ComfyUI calls instead of its attention.

    A call that is not served goes to ComfyUI's own function: counted, and a warning the first time.

    Args:
        format: "int8" (INT8 q.k, FP16 values), "fp8" (INT8 q.k, FP8 values) or None: 16 bits, with
            sla alone.
        sla: share of the key blocks, in (0, 1], that self-attention keeps; None: all.
        backend: "auto", "reference", "triton" or "cuda".
    Raises:
        ValueError: an unknown format, or none and no sla.
    """
    checks.choice("format", format, (*attention.FORMATS, None))
    sdpa.check_share("sla", sla)
    if format is None and sla is None:
        checks.fail("format, sla", "one of them", "neither", "Leave the override out.")
    qk, pv = attention.FORMATS[format] if format else (None, None)
    return Override(sdpa.make(qk, pv, keep=sla, backend=backend))


class Override:
    """An attention override.

    Attributes:
        calls: {what ran: how often}.
        memory_efficient: that no matrix of all scores is stored: ComfyUI plans memory by it.
    """

    def __init__(self, replacement: attention.Replacement) -> None:
        self.replacement = replacement
        self.calls = replacement.calls
        chosen = backends.resolve("attention", "auto", torch.device("cuda"))
        self.memory_efficient = chosen != "reference" != replacement.backend

    def __deepcopy__(self, memo: object) -> Override:
        """Clones of a model share it: earlier versions of ComfyUI copy all options deeply."""
        return self

    def __call__(
        self,
        original: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As attention_pytorch of ComfyUI: q, k, v [B, S, H * D], or [B, H, S, D] with
        skip_reshape; the result [B, S, H * D], or [B, H, S, D] with skip_output_reshape."""
        inputs, why = _operands(q, k, v, heads, mask, skip_reshape, kwargs)
        scale, gqa = kwargs.get("scale"), kwargs.get("enable_gqa", False)
        why = why or self._unserved(inputs, scale, gqa)
        if why is not None:
            _leave(self.replacement.place.number, why, torch.compiler.is_compiling())
            return original(
                q, k, v, heads, mask=mask, attn_precision=attn_precision,
                skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs,
            )  # fmt: skip
        y = self.replacement(*inputs, scale=scale, enable_gqa=gqa)
        return y if skip_output_reshape else y.transpose(1, 2).flatten(2)

    def _unserved(self, inputs: attention.Inputs, scale: float | None, gqa: bool) -> str | None:
        why = attention.not_inference(inputs, 0.0)
        why = why or attention.unserved(*inputs, scale, False, gqa)
        if why is not None or torch.compiler.is_compiling():  # there the op itself looks
            return why
        how = self.replacement
        chosen = attention.choose(*inputs, scale, False, how.qk, how.pv, how.keep, how.backend)
        return chosen if isinstance(chosen, str) else None


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None,
    skip_reshape: bool,
    kwargs: dict[str, Any],
) -> tuple[attention.Inputs, str | None]:
    """(q, k, v [B, H, S, D], mask [B, 1, S_q, S_kv]), or why not."""
    nothing = (q, k, v, mask)
    if kwargs.get("low_precision_attention", True) is False:
        return nothing, "low_precision_attention=False"
    if unknown := sorted(set(kwargs) - KNOWN):
        return nothing, f"unknown arguments {', '.join(unknown)}"
    if not skip_reshape:
        if any(x.dim() != 3 for x in (q, k, v)) or q.shape[-1] % heads:
            return nothing, f"{heads} heads in {list(q.shape[2:])}"
        dim = q.shape[-1] // heads
        if any(x.shape[-1] % dim for x in (k, v)):
            return nothing, f"heads of {dim} in keys of {k.shape[-1]}"
        q, k, v = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.dim() in (2, 3):
        mask = mask[(None,) * (3 - mask.dim())].unsqueeze(1)
    return (q, k, v, mask), None


def _leave(number: int, why: str, compiling: bool) -> None:
    attention.left(number, why, compiling)
    if (number, why) not in _warned:
        _warned.add((number, why))
        logging.getLogger(__name__).warning("ComfyUI's own attention serves calls: %s", why)


# As torch.compiler.assume_constant_result does, which would import dynamo, for a second
_leave._dynamo_marked_constant = True  # type: ignore[attr-defined]
