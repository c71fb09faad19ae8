# SPDX-License-Identifier: Apache-2.0
"""The calls whose kernels a port must compile: every op of every family at the shapes of the DiT.

A specimen is a public call on meta tensors.  It costs nothing, and what it would launch, with
which tiles on which architecture, is what a GPU would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reeltime import attention, gemm_w8a8, norm, quant, rope_kv, sla
from reeltime.backends import OPS, load
from reeltime.model.config import ModelConfig, preset
from reeltime.sla import BLOCK_K, BLOCK_Q

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8, FP8, INT64 = torch.int8, torch.float8_e4m3fn, torch.int64
FORMATS = {"int8": INT8, "fp8": FP8}
GRID = (34, 60)  # tokens of a latent frame of 960 x 544 pixels
FRAME = GRID[0] * GRID[1]


@dataclass(frozen=True)
class Specimen:
    family: str
    case: str  # the op, its formats, its shape where several are compiled
    call: Callable[..., object]  # takes the backend
    backends: tuple[str, ...] = ("triton", "cuda")

    @property
    def products(self) -> tuple[str, ...]:
        """Dtypes that tensor cores multiply, of the families where every kernel's case says so."""
        if self.family != "gemm_w8a8":
            return ()
        return (self.case.split(" ")[0],)


def specimen(case: str, function: Callable[..., Any], *args: Any, **options: Any) -> Specimen:
    """`function` of a family's public API."""
    family = function.__module__.split(".")[1]
    return Specimen(family, case, lambda backend: function(*args, backend=backend, **options))


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def all_specimens() -> Iterator[Specimen]:
    """Of each family, for Wan 1.3B; norms and products also for Wan 14B."""
    small, large = preset("wan-1.3b"), preset("wan-14b")
    yield from of_quant(small)
    yield from of_norm(small)
    yield from of_norm(large)
    yield specimen("rms, C=20480", norm.norm, meta(1, 1560, 20480), kind="rms")
    yield from of_rope_kv(small)
    yield from of_gemm(small)
    yield from of_gemm(large)
    yield from of_attention(small)
    yield from of_sla(small)


def chunk(config: ModelConfig) -> int:
    """Tokens of a chunk: the queries of a pass."""
    return config.chunk * FRAME


def cache(
    config: ModelConfig, values: torch.dtype | None, summaries: str = "slot"
) -> rope_kv.KVCache:
    """A window and a reference frame of one layer, with summaries; values None: plain."""
    return rope_kv.make_cache(
        1, config.window + 1, FRAME, config.num_heads, config.head_dim,
        format="plain" if values is None else "int8", dtype=values or BF16, device="meta",
        summaries=summaries,
    )  # fmt: skip


def of_quant(config: ModelConfig) -> Iterator[Specimen]:
    x = meta(chunk(config), config.dim)
    for name, dtype in FORMATS.items():
        for rows in (1, 128):
            case = f"quantize {name} {rows}x128"
            yield specimen(case, quant.quantize, x, dtype=dtype, block_rows=rows)
        xq, scale = meta(*x.shape, dtype=dtype), meta(x.shape[0], x.shape[1] // 128, dtype=F32)
        yield specimen(f"dequantize {name}", quant.dequantize, xq, scale, dtype=BF16)


def of_norm(config: ModelConfig) -> Iterator[Specimen]:
    C = config.dim
    x, mod, weight = meta(1, chunk(config), C), meta(1, config.chunk, C), meta(C)
    adaln = {"scale": mod, "shift": mod}
    gated = norm.gated_residual_norm, x, x, mod
    yield specimen(f"layer, modulated, C={C}", norm.norm, x, **adaln)
    yield specimen(f"layer, modulated, int8, C={C}", norm.norm, x, quantize="int8", **adaln)
    yield specimen(f"rms, affine, C={C}", norm.norm, x, kind="rms", weight=weight)
    yield specimen(f"gated, modulated, C={C}", *gated, **adaln)
    for name, rows in (("int8", 1), ("int8", 128), ("fp8", 128)):
        case = f"gated, modulated, {name} {rows}x128, C={C}"
        yield specimen(case, *gated, quantize=name, block_rows=rows, **adaln)


def of_rope_kv(config: ModelConfig) -> Iterator[Specimen]:
    L, C, half = chunk(config), config.dim, config.head_dim // 2
    x, table = meta(1, L, C), meta(2, L, half, 2, dtype=F32)
    normed: Any = {"num_heads": config.num_heads, "norm_weight": meta(C)}
    yield specimen("query", rope_kv.query, x, table, **normed)
    yield specimen("query int8", rope_kv.query, x, table, quantize="int8", **normed)
    slots = meta(config.chunk, dtype=INT64)
    for name, values in (("plain", None), ("int8, v fp16", F16), ("int8, v fp8", FP8)):
        for summaries in ("slot", "block") if values == FP8 else ("slot",):
            put = rope_kv.write, x, x, cache(config, values, summaries), slots
            case = f"write {name}, summaries per {summaries}"
            yield specimen(case, *put, table=table[0], **normed)
    raw = meta(1, config.window, FRAME, config.num_heads, config.head_dim)
    turn = meta(config.window * FRAME, half, 2, dtype=F32)
    yield specimen("rope_on_cache", rope_kv.rope_on_cache, raw, turn)


def of_gemm(config: ModelConfig) -> Iterator[Specimen]:
    """qkv with bias; fc1 with GELU, requantised; fc2 into the gated residual."""
    M, C, F = chunk(config), config.dim, config.ffn_dim
    residual = {"epilogue": "gated_residual", "residual": meta(M, C), "gate": meta(config.chunk, C)}
    for name, dtype in FORMATS.items():
        layers: Any = (
            ("bias", C, C, {}),
            ("gelu, requantised", F, C, {"epilogue": "gelu", "requantize": name}),
            ("gated residual", C, F, residual),
        )
        for rows in (1, 128):
            for layer, N, K, options in layers:
                yield specimen(
                    f"{name} {rows}x128, {M}x{N}x{K}, {layer}",
                    gemm_w8a8.gemm_w8a8,
                    *(meta(M, K, dtype=dtype), meta(N, K, dtype=dtype)),
                    *(meta(-(-n // b), -(-K // 128), dtype=F32) for n, b in ((M, rows), (N, 128))),
                    bias=meta(N),
                    block_rows=rows,
                    **options,
                )


def window(config: ModelConfig) -> tuple[Tensor, ...]:
    """The query of two offsets, and which slots it sees."""
    q = meta(2, 1, chunk(config), config.num_heads, config.head_dim)
    return q, meta(config.window, dtype=INT64), meta(config.window, dtype=INT64)


def of_attention(config: ModelConfig) -> Iterator[Specimen]:
    H, (q, *where) = config.num_heads, window(config)
    low: Any = {
        "q_int8": meta(*q.shape, dtype=INT8),
        "q_scale": meta(2, 1, -(-q.shape[2] // 64), H, dtype=F32),
    }
    segments = attention.segment_attention
    yield specimen("segments, bf16", segments, q, cache(config, None), *where, sm_scale=1.0)
    for name, values in (("fp16", F16), ("fp8", FP8)):
        held = cache(config, values)
        case = f"segments, qk int8, pv {name}"
        yield specimen(case, segments, q, held, *where, sm_scale=1.0, **low)
    for dim in (64, 96, 128, 256):
        qkv = [meta(1, 4096, H, dim) for _ in range(3)]
        yield specimen(f"plain, bf16, causal, D={dim}", attention.attention, *qkv, causal=True)
        case = f"plain, qk int8, pv fp16, D={dim}"
        yield specimen(case, attention.attention, *qkv, qk="int8", pv="fp16")
    qkv = [meta(1, 4096, H, config.head_dim) for _ in range(3)]
    for qk in FORMATS:
        yield specimen(f"plain, qk {qk}, pv fp8", attention.attention, *qkv, qk=qk, pv="fp8")
    case, few = "plain, qk int8, pv fp16, few queries", meta(1, 64, H, config.head_dim)
    yield specimen(case, attention.attention, few, *qkv[1:], qk="int8", pv="fp16")
    case = "plain, qk int8, pv fp16, mean of the sequence"
    low = {"qk": "int8", "pv": "fp16", "smooth": "sequence"}
    yield specimen(case, attention.attention, *qkv, **low)


def of_sla(config: ModelConfig) -> Iterator[Specimen]:
    L, H, D, keys = chunk(config), config.num_heads, config.head_dim, config.window * FRAME
    q, k = meta(1, L, H, D), meta(1, keys, H, D)
    pooled = meta(1, -(-L // 128), H, D), meta(1, -(-keys // 64), H, D)
    proj: Any = {"proj_weight": meta(D, D), "proj_bias": meta(D)}
    yield specimen("block_mask, top-k", sla.block_mask, *pooled, topk=0.1)
    yield specimen("block_mask, top-p", sla.block_mask, *pooled, topp=0.9)
    lists = sla.CSR(*(meta(1, H, n, dtype=torch.int32) for n in (pooled[0].shape[1] + 1, 48 * 67)))
    h, z = meta(1, pooled[1].shape[1], H, D, D, dtype=F32), meta(*pooled[1].shape, dtype=F32)
    yield specimen("sparse_attention, bf16", sla.sparse_attention, q, k, k, lists)
    for qk, pv in (("int8", "fp16"), ("int8", "fp8"), ("fp8", "fp8")):
        case, low = f"qk {qk}, pv {pv}", {"qk": qk, "pv": pv}
        yield specimen(f"sparse_attention, {case}", sla.sparse_attention, q, k, k, lists, **low)
        yield specimen(f"sla, {case}", sla.sla, q, k, k, **proj, **low)
    linear = sla.linear_attention
    yield specimen("linear_attention, all", linear, q, h, z)
    yield specimen("linear_attention, unselected", linear, q, h, z, lists, over="unselected")
    for over in ("all", "unselected"):
        yield specimen(f"sla, bf16, {over}", sla.sla, q, k, k, over=over, **proj)
    turned, *where = window(config)
    for name, values in (("bf16", None), ("int8, v fp16", F16), ("int8, v fp8", FP8)):
        held = cache(config, values)
        yield specimen(f"segments, {name}", sla.segment_sla, turned, held, *where, **proj)
    weights = proj["proj_weight"], proj["proj_bias"]
    yield Specimen("sla", "sla backward, bf16", lambda _: backward(q, k, *weights), ("triton",))


def backward(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor) -> object:
    """The gradient that training runs."""
    load("sla", "triton", "sla")
    mask = (keys_selected(k), None, 0.1)
    options = ("all", -1.0, float("inf"), BLOCK_Q, BLOCK_K, "softmax", 0.1, 1e-5)
    args = (q, k, k, weight, bias, *mask, *options)
    needed = tuple(isinstance(arg, Tensor) for arg in args)
    return OPS["sla"].gradients["triton"](args, (torch.empty_like(q),), needed)


def keys_selected(k: Tensor, share: float = 0.1) -> int:
    return int(share * -(-k.shape[1] // BLOCK_K))
