# SPDX-License-Identifier: Apache-2.0
"""gemm_w8a8: 8-bit matrix product with per-block scales and a fused epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reeltime import checks
from reeltime.backends import Op
from reeltime.checks import Tolerance
from reeltime.gemm_w8a8 import reference
from reeltime.gemm_w8a8.reference import BLOCK_K, BLOCK_N
from reeltime.quant.api import BLOCK_ROWS, FORMATS, check_scale, scale_shape

EPILOGUES = ("none", "gelu", "gated_residual")
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# By format of the result, against float64 on the same 8-bit operands: what quantisation costs is
# quant's tolerance.  Products are exact or float32, so only sums over K blocks and the final
# rounding differ; 8 bits adds one requantisation step.
TOLERANCE = {
    "float64": Tolerance(1e-12, 1e-11),
    "float32": Tolerance(2e-6, 2e-5),
    "bfloat16": Tolerance(4e-3, 4e-2),
    "float16": Tolerance(5e-4, 5e-3),
    "int8": Tolerance(0.02, 0.1),
    "fp8": Tolerance(0.04, 0.7),
}


def flops(M: int, N: int, K: int) -> int:
    """A multiply and an add per product."""
    return 2 * M * N * K


def bytes(
    M: int,
    N: int,
    K: int,
    *,
    block_rows: int = 1,
    itemsize: int = 2,
    epilogue: str = "none",
    requantize: str | None = None,
) -> int:
    """Operands and scales read once, the result written once; the residual read once."""
    rows, blocks = scale_shape(M, K, block_rows)
    operands = (M + N) * K + 4 * blocks * (rows + -(-N // BLOCK_N))
    residual = M * N * itemsize if epilogue == "gated_residual" else 0
    if requantize is None:
        return operands + residual + M * N * itemsize
    out_rows, out_blocks = scale_shape(M, N, block_rows)
    return operands + residual + M * N + 4 * out_rows * out_blocks


ARGUMENTS = (
    "Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, Tensor? residual, "
    "Tensor? gate, int block_rows, str epilogue, ScalarType dtype, str backend"
)


def _fake_gemm(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=rest[-1])


def _fake_requantized(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    scale = scale_shape(a.shape[0], b.shape[0], rest[-3])
    return _fake_gemm(a, b, *rest), a.new_empty(scale, dtype=torch.float32)


GEMM = Op("gemm_w8a8", f"gemm_w8a8({ARGUMENTS}) -> Tensor", reference.gemm, _fake_gemm)
GEMM_REQUANTIZED = Op(
    "gemm_w8a8",
    f"gemm_w8a8_requantized({ARGUMENTS}) -> (Tensor, Tensor)",
    reference.gemm_requantized,
    _fake_requantized,
    differentiable=False,
)


def _check_operands(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, block_rows: int
) -> tuple[int, int]:
    if (
        not isinstance(a, Tensor)
        or not isinstance(b, Tensor)
        or len(left := a.shape) != 2
        or len(right := b.shape) != 2
        or (K := left[1]) != right[1]
        or K % 16
        or (stored := a.dtype) not in checks.INT8_OR_FP8
        or b.dtype != stored
        or not a.is_contiguous()
        or not b.is_contiguous()
        or block_rows not in BLOCK_ROWS
        or a_scale.shape != (-(-left[0] // block_rows), -(-K // BLOCK_K))
        or b_scale.shape != (-(-right[0] // BLOCK_N), -(-K // BLOCK_K))
        or a_scale.dtype != torch.float32
        or b_scale.dtype != torch.float32
        or (device := a.device) != b.device
        or a_scale.device != device
        or b_scale.device != device
    ):
        _check_pair(a, b, block_rows)
        check_scale("a_scale", a_scale, block_rows, "a", a, "[ceil(M / bm), ceil(K / 128)]")
        check_scale("b_scale", b_scale, BLOCK_N, "b", b, "[ceil(N / 128), ceil(K / 128)]")
    if a_scale.is_cpu and not torch.compiler.is_compiling():
        checks.finite_scale("a_scale", a_scale)
        checks.finite_scale("b_scale", b_scale)
    return left[0], right[0]


def _check_pair(a: Tensor, b: Tensor, block_rows: int) -> None:
    checks.choice("block_rows", block_rows, BLOCK_ROWS)
    for name, x, layout in (("a", a, "[M, K]"), ("b", b, "[N, K]")):
        checks.tensor(name, x, 2, layout)
        checks.dtype(name, x, checks.INT8_OR_FP8)
        checks.dense_last(name, x)
    checks.dtype("b", b, (a.dtype,))
    checks.shape("b", b, (b.shape[0], a.shape[1]), "[N, K of a]")
    if a.shape[1] % 16:
        checks.fail("K", "a multiple of 16", a.shape[1], "Pad a and b with zeros along K.")
    checks.device("b", b, a, "a")


def _check_epilogue(
    M: int,
    N: int,
    a: Tensor,
    kind: str,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    if kind not in EPILOGUES:
        checks.choice("epilogue", kind, EPILOGUES)
    device = a.device
    if bias is not None and (bias.shape != (N,) or bias.device != device):
        checks.shape("bias", bias, (N,), "[N]")
        checks.device("bias", bias, a, "a")
    if (kind == "gated_residual") != (residual is not None):
        checks.fail(
            "residual",
            'a tensor [M, N] with epilogue="gated_residual", and only with it',
            f"{'none' if residual is None else 'one'} with epilogue={kind!r}",
            "Pass both or neither.",
        )
    if residual is not None and (residual.shape != (M, N) or residual.device != device):
        checks.shape("residual", residual, (M, N), "[M, N]")
        checks.device("residual", residual, a, "a")
    if gate is not None:
        if residual is None:
            checks.fail("gate", "None without a residual", "a tensor", "Leave it out.")
        have = gate.shape
        if len(have) != 2 or have[1] != N or not have[0] or M % have[0] or gate.device != device:
            checks.tensor("gate", gate, 2, "[F, N]")
            checks.shape("gate", gate, (have[0], N), "[F, N]")
            checks.divides("gate (its frames F)", have[0], M, "M")
            checks.device("gate", gate, a, "a")


def gemm_w8a8(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    block_rows: int = 1,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    requantize: str | None = None,
    backend: str = "auto",
    out: Any = None,
) -> Any:
    """Per-block W8A8 matrix product with a fused epilogue.

    y[m, n] = sum_kb a_scale[m // bm, kb] * b_scale[n // 128, kb] * sum_{k in kb} a[m, k] * b[n, k]
    out = y + bias                                       epilogue "none"
    out = gelu_tanh(y + bias)                            epilogue "gelu"
    out = residual + gate[frame(m)] * (y + bias)         epilogue "gated_residual"

    Args:
        a: [M, K] int8 or float8_e4m3fn, K contiguous, K % 16 == 0; K blocks of 128, ragged.
        b: [N, K], dtype of a.
        a_scale: [ceil(M / block_rows), ceil(K / 128)] float32, finite.
        b_scale: [ceil(N / 128), ceil(K / 128)] float32, finite.
        block_rows: bm, 1 or 128: rows of a that share a scale.
        bias: optional [N].
        residual: [M, N], with epilogue "gated_residual" only.
        gate: optional [F, N], M % F == 0, frame(m) = m // (M / F); None is 1.
        out_dtype: bfloat16, float16, float32 or float64 (sums in float64: the oracle).
        requantize: None, "int8" or "fp8": the result in 8 bits instead, blocks of block_rows x 128,
            quantised from the float32 sums.
        out: optional result, or (yq, y_scale), written in place.
        backend: "auto", "reference", "triton" or "cuda".
    Returns:
        [M, N] of out_dtype; requantised: yq [M, N], y_scale [ceil(M / bm), ceil(N / 128)].
    Raises:
        ValueError: names the argument, what was expected, what came; NaN scales on the CPU (on a
            GPU they give NaN, since looking would wait).
        UnsupportedArchError: lists what this build can run.
    Accumulation: INT8 exact inside a K block, FP8 float32; float32 across.  Graph-safe: yes.
    Source: Vidu S1, section 2.3.2; TurboDiffusion (arXiv 2512.16093).
    """
    M, N = _check_operands(a, b, a_scale, b_scale, block_rows)
    if epilogue != "none" or bias is not None or residual is not None or gate is not None:
        _check_epilogue(M, N, a, epilogue, bias, residual, gate)
    if out_dtype not in OUT_DTYPES:
        checks.choice("out_dtype", out_dtype, OUT_DTYPES)
    if requantize is None:
        if out is not None:
            checks.output("out", out, (M, N), out_dtype)
        # fmt: off
        y = GEMM.run(
            backend, a.device, a, b, a_scale, b_scale, bias, residual, gate, block_rows, epilogue,
            out_dtype,
        )
        # fmt: on
        return y if out is None else out.copy_(y)
    if requantize not in FORMATS:
        checks.choice("requantize", requantize, (None, *FORMATS))
    arguments = (a, b, a_scale, b_scale, bias, residual, gate, block_rows, epilogue)
    yq, y_scale = GEMM_REQUANTIZED.run(backend, a.device, *arguments, FORMATS[requantize])
    if out is None:
        return yq, y_scale
    checks.output("out[0]", out[0], yq.shape, yq.dtype)
    checks.output("out[1]", out[1], y_scale.shape, y_scale.dtype)
    return out[0].copy_(yq), out[1].copy_(y_scale)
