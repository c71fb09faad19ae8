# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, and the cache that is written once and read many times."""

from reeltime.rope_kv.api import (
    TOLERANCE,
    KVCache,
    apply_rope,
    bytes,
    flops,
    make_cache,
    query,
    rope_on_cache,
    rope_table,
    write,
)

__all__ = [
    "TOLERANCE",
    "KVCache",
    "apply_rope",
    "bytes",
    "flops",
    "make_cache",
    "query",
    "rope_on_cache",
    "rope_table",
    "write",
]
