# SPDX-License-Identifier: Apache-2.0
"""The inputs that every op is checked on: an ordinary one, and those that break kernels."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reeltime.arch import UnsupportedArchError

KINDS = {
    "normal": "independent Gaussians",
    "outlier": "every 16th channel is 3 x + 20 or 3 x - 20",
    "outlier_k": "the same in the keys alone",
    "outlier_v": "the same in the values alone",
    "constant": "all tokens equal; for norm, all channels too",
    "constant_k": "all keys equal",
    "constant_v": "all values equal",
    "zero_block": "the first 128 tokens are zero, of queries 64",
    "single_token": "one token, one key",
    "ragged": "lengths that no block divides",
    "long": "4096 keys or summands, stream position 1,000,000",
    "160k_keys": "163,840 keys, what 45 latent frames of 720p hold",
    "strided": "permuted dimensions and a gap after every row",
}
LENGTHS = {"single_token": (1, 1), "ragged": (77, 203), "zero_block": (192, 192)}
LENGTHS |= {"long": (64, 4096), "160k_keys": (64, 163_840), "strided": (96, 160)}  # queries, keys
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Inputs:
    """One kind of input, for one backend on one device.

    The same seed and name always draw the same numbers, so that recipes are compared on equal
    terms.  Masters are float64 on the CPU; the op gets them rounded, and so does its oracle.
    """

    kind: str
    backend: str
    device: torch.device
    seed: int
    refused: Counter[str] = field(default_factory=Counter, compare=False)  # by reason

    def refuse(self, error: UnsupportedArchError) -> None:
        """Count what the backend refuses by design: a dtype, say."""
        self.refused[error.why] += 1

    def offered(self, cases: Iterator[Any]) -> Iterator[Any]:
        """`cases`, none of them if the backend refuses what they are set up with."""
        try:
            yield from cases
        except UnsupportedArchError as error:
            self.refuse(error)

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys; the keys are also the tokens of x."""
        return LENGTHS.get(self.kind, (128, 256))

    def normal(self, name: str, *shape: int) -> Tensor:
        """Independent Gaussians, whatever the kind: weights, gates, queries."""
        number = zlib.crc32(f"{self.seed} {self.kind} {name}".encode())
        generator = torch.Generator().manual_seed(number)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw(self, name: str, *shape: int, tokens: int = 1) -> Tensor:
        """Activations with the kind's adversity; dimension `tokens` counts tokens, the last one
        channels."""
        x = self.normal(name, *shape)
        if self.kind in ("outlier", f"outlier_{name}"):
            sign = 1 - 2 * (torch.arange(shape[-1]) // 16 % 2)
            x[..., 3::16] = 3 * x[..., 3::16] + 20 * sign[3::16]
        if self.kind in ("constant", f"constant_{name}"):
            # Sixteenths: sums and means of equal tokens are exact, so that ties stay ties.
            x = (16 * x.narrow(tokens, 0, 1)).round().div(16).expand(shape).clone()
        if self.kind == "zero_block":
            x.narrow(tokens, 0, min(64 if name == "q" else 128, shape[tokens])).zero_()
        return x

    def put(self, x: Tensor, dtype: str = "float32") -> Tensor:
        """x as the op gets it: rounded, on the device, with the kind's strides."""
        y = x.to(self.device, DTYPES[dtype])
        if self.kind != "strided" or x.dim() < 2:
            return y
        # Leading dimensions in reverse order in memory, and a gap after every row.
        order = [*reversed(range(y.dim() - 1)), y.dim() - 1]
        store = y.new_zeros([y.shape[i] for i in order[:-1]] + [2 * y.shape[-1]])
        view = store[..., : y.shape[-1]].permute(order)
        return view.copy_(y)


def exact(x: Tensor) -> Tensor:
    """What the op was given, in float64 on the CPU: what its oracle starts from."""
    return x.detach().cpu().double()
