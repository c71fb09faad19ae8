# SPDX-License-Identifier: Apache-2.0
"""plugins: reeltime's kernels in models that were not written for them."""

from reeltime.plugins.accelerate import SENSITIVE, Report, accelerate

__all__ = ["SENSITIVE", "Report", "accelerate"]
