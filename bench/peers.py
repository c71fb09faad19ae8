# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own kernels, measured in the same run: what a reader would use instead.

A peer computes the product or the attention alone, in its own format.  It quantises nothing, adds
no bias and rotates nothing, so that it is never slower for doing more than was asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reeltime import attention
from reeltime.bench.case import Draw, Inputs, Peer
from reeltime.gemm_w8a8 import flops

FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16


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


def products(M: int, N: int, K: int) -> tuple[Peer, ...]:
    """a [M, K] times b [N, K]^T; b is passed as its transposed view."""
    return tuple(_products(M, N, K))


def _products(M: int, N: int, K: int) -> Iterator[Peer]:
    def peer(
        name: str,
        dtype: str,
        stored: torch.dtype,
        scales: Callable[[torch.device], tuple[Tensor, ...]],
        multiply: Callable[..., Tensor],
    ) -> Peer:
        def make(device: torch.device, seed: int) -> Inputs:
            draw = Draw(device, seed)
            a, b = draw(M, K, dtype=torch.float32), draw(N, K, dtype=torch.float32)
            if stored == INT8:
                a, b = ((40 * x).clamp(-127, 127) for x in (a, b))
            return {"operands": (a.to(stored), b.to(stored).t(), *scales(device))}

        item = 2 if stored == BF16 else 1
        moved = (M + N) * K * item + M * N * (4 if stored == INT8 else 2)
        return Peer(
            name,
            f"{name} {M}x{N}x{K}",
            dtype,
            {dtype: flops(M, N, K)},
            moved,
            make,
            lambda inputs: multiply(*inputs["operands"]),
        )

    def ones(*shapes: tuple[int, ...]) -> Callable[[torch.device], tuple[Tensor, ...]]:
        return lambda device: tuple(torch.ones(shape, device=device) for shape in shapes)

    def scaled(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=BF16, use_fast_accum=True)

    def block_scales(device: torch.device) -> tuple[Tensor, ...]:
        """[M, K / 128] and [K / 128, N / 128], contiguous along their first dimension, which cuBLAS
        wants to be a multiple of four in b."""
        blocks = -(-K // 128)
        a_scale = torch.ones(blocks, M, device=device).t()
        return a_scale, torch.ones(-(-N // 128), blocks + -blocks % 4, device=device).t()

    def by_blocks(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        recipes = getattr(F, "ScalingType", None)
        if recipes is None:
            raise RuntimeError("this PyTorch has no torch.nn.functional.scaled_mm")
        row, square = recipes.BlockWise1x128, recipes.BlockWise128x128
        return F.scaled_mm(a, b, a_scale, row, b_scale, square, output_dtype=BF16)

    yield peer("torch.mm", "bf16", BF16, ones(), torch.mm)
    yield peer("torch._scaled_mm tensor-wise", "fp8", FP8, ones((), ()), scaled)
    yield peer("torch._scaled_mm row-wise", "fp8", FP8, ones((M, 1), (1, N)), scaled)
    yield peer("torch scaled_mm 1x128, 128x128", "fp8", FP8, block_scales, by_blocks)
    yield peer("torch._int_mm", "int8", INT8, ones(), torch._int_mm)


PINNED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def scaled_dot_product(B: int, S_q: int, S_kv: int, H: int, D: int) -> tuple[Peer, ...]:
    """Dense attention in bf16 by each of PyTorch's backends, one pinned at a time."""

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        qkv = (draw(B, length, H, D) for length in (S_q, S_kv, S_kv))
        return {"qkv": tuple(x.transpose(1, 2) for x in qkv)}

    def run(backend: SDPBackend) -> Callable[[Inputs], Any]:
        def attend(inputs: Inputs) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(*inputs["qkv"])

        return attend

    shape = (B, S_q, S_kv, H, D)
    return tuple(
        Peer(
            f"torch sdpa {name}",
            f"sdpa {name} {shape}",
            "bf16",
            {"bf16": attention.flops(*shape)},
            attention.bytes(*shape),
            make,
            run(backend),
        )
        for name, backend in PINNED.items()
    )
