# SPDX-License-Identifier: Apache-2.0
"""The GPU table: what each architecture can run, and its ceilings.

To port to a new GPU, add a row here, its nvcc target in CMakeLists.txt and its card in
bench/hardware.py; docs/porting.md walks through it.  Peaks are data-sheet numbers of the named
card: dense, at boost clock, float32 accumulation unless the key says otherwise.  Measured ceilings
belong to bench.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class UnsupportedArchError(RuntimeError):
    """No backend of this build serves the request; the message lists what it can run.

    `why` is the part that is about the arguments, where they are what is refused.
    """

    def __init__(self, message: str, why: str | None = None) -> None:
        super().__init__(message)
        self.why = why or message


@dataclass(frozen=True)
class Arch:
    """One GPU architecture."""

    name: str  # sm90: the spelling used in files, tables and messages
    capability: tuple[int, int]
    target: str  # what nvcc compiles for; "a" marks instructions of this chip alone
    gpu: str  # the card that `tflops` describes
    backends: tuple[str, ...]
    shared_limit: int  # bytes of shared memory that one block may use
    shared: int  # bytes that the blocks of one SM share, 1 KiB of them lost per block
    threads: int  # resident threads of one SM
    blocks: int  # resident blocks of one SM
    processors: int  # SMs of that card
    tensor_core: dict[str, str]  # the fastest instruction of a matrix product, by dtype
    tflops: dict[str, float]  # a missing dtype has no tensor-core path

    @property
    def fast_fp16_sums(self) -> bool:
        """Products of 16 and 8 bits run at twice the rate if they are summed in float16: on cards
        that share a die with the consumer line."""
        return self.shared_limit < 100 * KIB

    @property
    def sm(self) -> int:
        """90 of capability 9.0: what Triton and ptxas call it."""
        return 10 * self.capability[0] + self.capability[1]


KIB = 1024
REGISTERS = 65536  # of one SM, 32 bits each, on every architecture here
ALL = ("cuda", "triton", "reference")

# The SASS names of matrix products: one warp, one warpgroup (Hopper), tensor memory (Blackwell).
WARP = {"float16": "HMMA", "bfloat16": "HMMA", "int8": "IMMA"}
WARP_FP8 = WARP | {"fp8": "QMMA"}
WARPGROUP = {"float16": "HGMMA", "bfloat16": "HGMMA", "int8": "IGMMA", "fp8": "QGMMA"}
TENSOR_MEMORY = {"float16": "UTCHMMA", "bfloat16": "UTCHMMA", "int8": "UTCIMMA", "fp8": "UTCQMMA"}

ARCHS: tuple[Arch, ...] = (
    Arch("sm80", (8, 0), "80", "A100 SXM", ALL, 163 * KIB, 164 * KIB, 2048, 32, 108, WARP, {
        "fp32": 19.5, "bf16": 312.0, "int8": 624.0,
    }),
    Arch("sm86", (8, 6), "86", "RTX 3090", ALL, 99 * KIB, 100 * KIB, 1536, 16, 82, WARP, {
        "fp32": 35.6, "bf16": 71.2, "int8": 284.7,
    }),
    Arch("sm89", (8, 9), "89", "RTX 4090", ALL, 99 * KIB, 100 * KIB, 1536, 24, 128, WARP_FP8, {
        "fp32": 82.6, "bf16": 165.2, "int8": 660.6, "fp8": 330.3, "fp8_fp16_accumulate": 660.6,
    }),
    Arch("sm90", (9, 0), "90a", "H100/H200 SXM", ALL, 227 * KIB, 228 * KIB, 2048, 32, 132,
         WARPGROUP, {
        "fp32": 66.9, "bf16": 989.4, "int8": 1978.9, "fp8": 1978.9,
    }),
    Arch("sm100", (10, 0), "100a", "B200", ALL, 227 * KIB, 228 * KIB, 2048, 32, 148,
         TENSOR_MEMORY, {
        "fp32": 75.0, "bf16": 2250.0, "int8": 4500.0, "fp8": 4500.0,
    }),
    Arch("sm120", (12, 0), "120a", "RTX 5090", ALL, 99 * KIB, 100 * KIB, 1536, 24, 170, WARP_FP8, {
        "fp32": 104.8, "bf16": 209.5, "int8": 838.0, "fp8": 419.0, "fp8_fp16_accumulate": 838.0,
    }),
)  # fmt: skip


def lookup(capability: tuple[int, int]) -> Arch:
    """The row of a compute capability, as `torch.cuda.get_device_capability()` spells it.

    Raises:
        UnsupportedArchError: the table has no such row; the message lists those it has.
    """
    for arch in ARCHS:
        if arch.capability == tuple(capability):
            return arch
    known = ", ".join(arch.name for arch in ARCHS)
    raise UnsupportedArchError(
        f"no entry for compute capability {capability[0]}.{capability[1]}; reeltime knows {known}. "
        "A new GPU is one row in reeltime/arch.py (see CONTRIBUTING.md)"
    )


def slug(name: str) -> str:
    """A card's name in lower case, words joined by hyphens, the vendor left out: NVIDIA H200 ->
    h200, the spelling of tuned/<gpu>.json and results/<gpu>.csv."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|geforce", "", name.lower())).strip("-")
