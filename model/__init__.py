# SPDX-License-Identifier: Apache-2.0
"""The thin causal diffusion transformer: geometry, memory, layouts, sampling, streaming."""
