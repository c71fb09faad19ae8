# SPDX-License-Identifier: Apache-2.0
"""x [M, K] times w [N, K]^T alone: no bias and no epilogue is asked of a peer.

Whose call takes 8 bits gets x in 8 bits, as our kernel does.  Whose call takes bf16 quantises x in
its time, and its name says so.  All are held to the float64 product of x and w in bf16, so that
what a coarser scale loses shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime import quant
from reeltime.bench.case import Inputs, Judged, Peer
from reeltime.bench.peers.adapter import Adapter, compiled, generous
from reeltime.checks import Tolerance
from reeltime.gemm_w8a8 import TOLERANCE, flops

FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
LIMIT = {FP8: 448.0, INT8: 127.0}
Prepare = Callable[[Inputs], Inputs]
# Of the product, where both operands were rounded: independent errors add in squares.
BOUNDS = {name: 2**0.5 * quant.TOLERANCE[name].relative_l1 for name in ("int8", "fp8")}


def bound(dtype: str) -> Tolerance:
    """Of a product against that of the same operands in bf16."""
    return Tolerance(BOUNDS[dtype], 1.0) if dtype in BOUNDS else TOLERANCE["bfloat16"]


# --- Operands -----------------------------------------------------------------------------------


def low(x: Tensor, dtype: torch.dtype, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x in 8 bits with one scale for all of `dim`, which it keeps."""
    scale = x.float().abs().amax(dim, keepdim=True) / LIMIT[dtype]
    y = (x / scale).clamp(-LIMIT[dtype], LIMIT[dtype])
    return (y.round() if dtype == INT8 else y).to(dtype), scale


def plain(x: Tensor, w: Tensor) -> Inputs:
    return {"a": x, "b": w.t()}


def scaled(dtype: torch.dtype, dim: tuple[int, ...], *, transposed: bool) -> Prepare:
    """Scales of rows, or of all: a_scale [M, 1] or [1, 1]; transposed: b [K, N], and its scales."""

    def prepare(inputs: Inputs) -> Inputs:
        (a, a_scale), (b, b_scale) = (low(inputs[name], dtype, dim) for name in "xw")
        if transposed:
            b, b_scale = b.t(), b_scale.t()
        return {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale}

    return prepare


def blocks(rows: int) -> Prepare:
    """FP8, a scale for 128 columns of each `rows` rows of a, and for 128 x 128 of b."""

    def prepare(inputs: Inputs) -> Inputs:
        options: Any = {"dtype": FP8, "backend": "reference"}
        a, a_scale = quant.quantize(inputs["x"], block_rows=rows, **options)
        b, b_scale = quant.quantize(inputs["w"], block_rows=128, **options)
        return {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale}

    return prepare


def for_cublas(inputs: Inputs) -> Inputs:
    """Scales contiguous along M and N; of b, as many along K as a multiple of four."""
    held = blocks(1)(inputs)
    b_scale = held["b_scale"]
    return {
        "a": held["a"],
        "b": held["b"].t(),
        "a_scale": held["a_scale"].t().contiguous().t(),
        "b_scale": F.pad(b_scale, (0, -b_scale.shape[1] % 4)).t(),
    }


def along_m(inputs: Inputs) -> Inputs:
    """Scales as [K / 128, M] and [K / 128, N / 128]."""
    held = blocks(1)(inputs)
    return held | {name: held[name].t().contiguous() for name in ("a_scale", "b_scale")}


def one_number(dtype: torch.dtype) -> Prepare:
    """Both scales of whole tensors as one float on the host."""

    def prepare(inputs: Inputs) -> Inputs:
        held = scaled(dtype, (0, 1), transposed=False)(inputs)
        scale = float(held["a_scale"]) * float(held["b_scale"])
        return {"a": held["a"], "b": held["b"], "scale": scale}

    return prepare


# --- PyTorch ------------------------------------------------------------------------------------


def bf16_mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=BF16, use_fast_accum=True)


def scaled_mm_blocks(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    recipes = getattr(F, "ScalingType", None)
    if recipes is None:
        raise RuntimeError("this PyTorch has no torch.nn.functional.scaled_mm")
    row, square = recipes.BlockWise1x128, recipes.BlockWise128x128
    return F.scaled_mm(a, b, a_scale, row, b_scale, square, output_dtype=BF16)


def int_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return torch._int_mm(a, b)


def int_mm_scaled(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return (torch._int_mm(a, b) * a_scale * b_scale).to(BF16)


# --- Others -------------------------------------------------------------------------------------


def fbgemm(op: str, *more: Any) -> Callable[..., Tensor]:
    """An op of fbgemm_gpu by its name; its scales of rows are one-dimensional."""

    def multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        import fbgemm_gpu.experimental.gen_ai  # noqa: F401  registers them

        if op == "f8f8bf16_rowwise":
            a_scale, b_scale = a_scale.flatten(), b_scale.flatten()
        return getattr(torch.ops.fbgemm, op)(a, b, a_scale, b_scale, *more)

    return multiply


def fbgemm_tensors(op: str) -> Callable[..., Tensor]:
    def multiply(a: Tensor, b: Tensor, scale: float) -> Tensor:
        import fbgemm_gpu.experimental.gen_ai  # noqa: F401  registers them

        return getattr(torch.ops.fbgemm, op)(a, b, scale)

    return multiply


def fbgemm_triton(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import matmul_fp8_block

    return matmul_fp8_block(a, b, a_scale, b_scale, 128, 128, 128)


def torchao_triton(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    from torchao.kernel.blockwise_quantization import blockwise_fp8_gemm

    return blockwise_fp8_gemm(a, a_scale, b, b_scale)


def torchao_linear(config: Callable[[Any], Any]) -> Prepare:
    """A linear layer as torchao quantises it; its weights stay where they are between calls."""

    def prepare(inputs: Inputs) -> Inputs:
        from torchao import quantization

        w = inputs["w"]
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
        layer.weight.data.copy_(w)
        quantization.quantize_(layer, config(quantization))
        return {"x": inputs["x"], "layer": compiled(layer)}

    return prepare


def torchao_rows(quantization: Any) -> Any:
    config = quantization.Float8DynamicActivationFloat8WeightConfig
    return config(granularity=quantization.PerRow())


def torchao_blocks(quantization: Any) -> Any:
    from torchao.quantization.granularity import PerBlock

    config = quantization.Float8DynamicActivationFloat8WeightConfig
    return config(granularity=[PerBlock([1, 128]), PerBlock([128, 128])])


def torchao_int8(quantization: Any) -> Any:
    return quantization.Int8DynamicActivationInt8WeightConfig()


def gemlite_linear(format: str, **options: Any) -> Prepare:
    def prepare(inputs: Inputs) -> Inputs:
        from gemlite import helper

        kind = getattr(helper, f"A8W8_{format}_dynamic")
        w = inputs["w"]
        layer = kind(device=w.device, dtype=w.dtype, **options).from_weights(w)
        return {"x": inputs["x"], "layer": layer}

    return prepare


def apply(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    return layer(x)


def fastvideo_weights(inputs: Inputs) -> Inputs:
    from fastvideo_kernel import int8_quant

    w_q, w_s = int8_quant(inputs["w"])
    return {"x": inputs["x"], "w_q": w_q, "w_s": w_s}


def fastvideo(x: Tensor, w_q: Tensor, w_s: Tensor) -> Tensor:
    from fastvideo_kernel import int8_linear

    return int8_linear(x, w_q, w_s)


def flashinfer_bmm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    from flashinfer import bmm_fp8

    return bmm_fp8(a[None], b[None], a_scale.view(()), b_scale.view(()), BF16)[0]


def quack(a: Tensor, b: Tensor) -> Tensor:
    from quack.gemm_interface import gemm

    return gemm(a, b)


def rows_of(inputs: Inputs) -> Inputs:
    return plain(**inputs)


# --- All of them --------------------------------------------------------------------------------

BY_TENSOR, BY_ROW = (0, 1), (1,)
CEILING = "torch._int_mm, no scales: a ceiling"
OWN: Any = {"asked": False, "gpu": False}
QUANTISES = ", quantises x"
ADAPTERS = (
    Adapter("torch", "torch.mm", bf16_mm, "bf16", rows_of, **OWN),
    Adapter(
        "torch", "torch._scaled_mm tensor-wise", scaled_mm, "fp8",
        scaled(FP8, BY_TENSOR, transposed=True), **OWN,
    ),
    Adapter(
        "torch", "torch._scaled_mm row-wise", scaled_mm, "fp8",
        scaled(FP8, BY_ROW, transposed=True), **OWN,
    ),
    Adapter("torch", "torch scaled_mm 1x128, 128x128", scaled_mm_blocks, "fp8", for_cublas, **OWN),
    Adapter("torch", CEILING, int_mm, "int8", scaled(INT8, BY_ROW, transposed=True), **OWN),
    Adapter(
        "torch", "torch._int_mm row-wise, compiled", compiled(int_mm_scaled), "int8",
        scaled(INT8, BY_ROW, transposed=True),
    ),
    Adapter(
        "fbgemm-gpu-genai", "row-wise", fbgemm("f8f8bf16_rowwise"), "fp8",
        scaled(FP8, BY_ROW, transposed=False),
    ),
    Adapter(
        "fbgemm-gpu-genai", "tensor-wise", fbgemm_tensors("f8f8bf16_tensorwise"), "fp8",
        one_number(FP8),
    ),
    Adapter("fbgemm-gpu-genai", "1x128, 128x128", fbgemm("f8f8bf16_groupwise"), "fp8", along_m),
    Adapter(
        "fbgemm-gpu-genai", "128x128", fbgemm("f8f8bf16_blockwise", 128, 128, 128), "fp8",
        blocks(128),
    ),
    Adapter("fbgemm-gpu-genai", "128x128, Triton", fbgemm_triton, "fp8", blocks(128)),
    Adapter(
        "fbgemm-gpu-genai", "tensor-wise INT8", fbgemm_tensors("i8i8bf16"), "int8", one_number(INT8)
    ),
    Adapter("torchao", "1x128, 128x128, Triton", torchao_triton, "fp8", blocks(1)),
    Adapter("torchao", "row-wise" + QUANTISES, apply, "fp8", torchao_linear(torchao_rows)),
    Adapter("torchao", "1x128, 128x128" + QUANTISES, apply, "fp8", torchao_linear(torchao_blocks)),
    Adapter("torchao", "row-wise INT8" + QUANTISES, apply, "int8", torchao_linear(torchao_int8)),
    Adapter("gemlite", "row-wise" + QUANTISES, apply, "fp8", gemlite_linear("fp8")),
    Adapter("gemlite", "row-wise INT8" + QUANTISES, apply, "int8", gemlite_linear("int8")),
    Adapter(
        "gemlite", "1x128, 128x128" + QUANTISES, apply, "fp8",
        gemlite_linear("fp8", block_quant=True),
    ),
    Adapter(
        "gemlite", "1x128, 128x128 INT8" + QUANTISES, apply, "int8",
        gemlite_linear("int8", block_quant=True),
    ),
    Adapter("fastvideo-kernel", "128x128 INT8" + QUANTISES, fastvideo, "int8", fastvideo_weights),
    Adapter(
        "flashinfer-python", "cuBLAS, tensor-wise", flashinfer_bmm, "fp8",
        scaled(FP8, BY_TENSOR, transposed=True),
    ),
    Adapter("quack-kernels", "bf16", quack, "bf16", rows_of),
)  # fmt: skip


def products(
    M: int, N: int, K: int, operands: Callable[[torch.device, int], Inputs]
) -> tuple[Peer, ...]:
    """operands: x [M, K] and w [N, K] in bf16, which ours were quantised from."""

    def peer(adapter: Adapter) -> Peer:
        def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
            want = inputs["x"].double() @ inputs["w"].double().t()
            yield Judged("y", result, want, generous(bound(adapter.dtype)))

        item = 2 if adapter.dtype == "bf16" else 1
        ceiling = adapter.name == CEILING
        moved = (M + N) * K * item + M * N * (4 if ceiling else 2)
        return adapter.peer(
            f"{M}x{N}x{K}", adapter.dtype, {adapter.dtype: flops(M, N, K)}, moved, operands,
            None if ceiling else judge,
        )  # fmt: skip

    return tuple(peer(adapter) for adapter in ADAPTERS)
