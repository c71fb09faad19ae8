# SPDX-License-Identifier: Apache-2.0
"""Per-block quantisation to INT8 and FP8."""

from reeltime.quant.api import TOLERANCE, bytes, dequantize, flops, quantize, quantize_weight

__all__ = ["TOLERANCE", "bytes", "dequantize", "flops", "quantize", "quantize_weight"]
