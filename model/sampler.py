# SPDX-License-Identifier: Apache-2.0
"""Few-step flow matching: x_t = (1 - sigma) x0 + sigma * noise, t = 1000 sigma.

A step predicts x0 and, unless it is the last, renoises it with fresh noise to the next level
(consistency-style sampling, as in Self-Forcing, arXiv 2506.08009).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Unwarped timesteps by number of steps; "wan" is the list that Self-Forcing and CausVid warp.
BASE_TIMESTEPS: dict[int, tuple[float, ...]] = {
    1: (1000.0,),
    2: (1000.0, 500.0),
    3: (1000.0, 2000 / 3, 1000 / 3),
    4: (1000.0, 750.0, 500.0, 250.0),
}


def warp(sigma: Tensor | float, shift: float) -> Tensor | float:
    """sigma' = shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def timesteps(steps: int, shift: float) -> tuple[float, ...]:
    """The schedule for a number of steps, e.g. (1000, 937.5, 833.3, 625) for 4 with shift 5.

    Raises:
        ValueError: no schedule of that length.
    """
    if steps not in BASE_TIMESTEPS:
        raise ValueError(f"steps: expected one of {sorted(BASE_TIMESTEPS)}, got {steps}")
    return tuple(float(1000 * warp(t / 1000, shift)) for t in BASE_TIMESTEPS[steps])


def to_x0(prediction: Tensor, x_t: Tensor, sigma: float, kind: str) -> Tensor:
    """x0 from the network's output: itself, or x_t - sigma * velocity."""
    return prediction if kind == "x0" else x_t - sigma * prediction


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    return torch.lerp(x0, noise, sigma)
