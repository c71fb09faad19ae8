# SPDX-License-Identifier: Apache-2.0
"""reeltime: kernels for real-time, interactive video diffusion.

Import what you need, `from reeltime.attention import attention`: this file imports nothing, so
that the command line starts at once.  `reeltime.accelerate` is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reeltime.plugins import accelerate

__version__ = "0.1.0"
__all__ = ["accelerate"]


def __getattr__(name: str) -> Any:
    if name == "accelerate":
        from reeltime.plugins import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
