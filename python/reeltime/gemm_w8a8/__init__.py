# SPDX-License-Identifier: Apache-2.0
"""Per-block W8A8 matrix product."""

from reeltime.gemm_w8a8.api import TOLERANCE, bytes, flops, gemm_w8a8

__all__ = ["TOLERANCE", "bytes", "flops", "gemm_w8a8"]
