# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm with per-frame modulation and gated residual."""

from reeltime.norm.api import TOLERANCE, bytes, flops, gated_residual_norm, norm

__all__ = ["TOLERANCE", "bytes", "flops", "gated_residual_norm", "norm"]
