# SPDX-License-Identifier: Apache-2.0
"""Attention over plain tensors and over cached segments."""

from reeltime.attention.api import TOLERANCE, attention, bytes, flops, segment_attention

__all__ = ["TOLERANCE", "attention", "bytes", "flops", "segment_attention"]
