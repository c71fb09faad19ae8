# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI node: the attention of a model in 8 bits."""

from __future__ import annotations

from typing import Any

from reeltime.plugins.comfyui import attention_override


class ReeltimeAttention:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model/attention"
    DESCRIPTION = "INT8 or FP8 attention by reeltime; sla < 1 keeps that share of the keys."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "format": (["int8", "fp8"],),
                "sla": ("FLOAT", share),
            }
        }

    def patch(self, model: Any, format: str, sla: float) -> tuple[Any]:
        model = model.clone()
        options = model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = attention_override(
            format, sla=sla if sla < 1 else None
        )
        return (model,)


NODE_CLASS_MAPPINGS = {"ReeltimeAttention": ReeltimeAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"ReeltimeAttention": "Attention in 8 bits (reeltime)"}
