# SPDX-License-Identifier: Apache-2.0
"""reeltime: kernels for real-time, interactive video diffusion.

Import what you need, `from reeltime.attention import attention`: this file imports nothing, so
that the command line starts at once.
"""

__version__ = "0.1.0"
