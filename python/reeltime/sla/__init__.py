# SPDX-License-Identifier: Apache-2.0
"""Sparse-linear attention: block mask, block-sparse branch, linear branch, and all of it fused."""

from reeltime.sla.api import (
    BLOCK_K,
    BLOCK_Q,
    CSR,
    TOLERANCE,
    block_mask,
    bytes,
    flops,
    linear_attention,
    pool,
    segment_sla,
    sla,
    sparse_attention,
    summaries,
)

__all__ = [
    "BLOCK_K",
    "BLOCK_Q",
    "CSR",
    "TOLERANCE",
    "block_mask",
    "bytes",
    "flops",
    "linear_attention",
    "pool",
    "segment_sla",
    "sla",
    "sparse_attention",
    "summaries",
]
