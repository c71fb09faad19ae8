# SPDX-License-Identifier: Apache-2.0
"""copy_: what nothing that moves as many bytes is faster than."""

from __future__ import annotations

import torch
from torch import Tensor

from reeltime.bench.case import Inputs, Peer


def copying(moved: int) -> tuple[Peer, ...]:
    """copy_ of as many bytes: half of them read, half written."""

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        source.random_(0, 255, generator=generator)
        return {"source": source, "target": torch.empty_like(source)}

    def run(inputs: Inputs) -> Tensor:
        return inputs["target"].copy_(inputs["source"])

    return (Peer("torch copy_", f"copy {moved}", "bytes", {}, moved, make, run),)
