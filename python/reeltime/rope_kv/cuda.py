# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of rope_kv: csrc/rope_kv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reeltime import native
from reeltime.native import code, code_of, launch, strides, unless
from reeltime.rope_kv import api
from reeltime.rope_kv.reference import BLOCK

WIDEST = 256  # head_dim of kernels that hold 64 tokens of a head


def _pairs(table: Tensor | None) -> Tensor | None:
    """float32, each (cos, sin) side by side, as rope_table makes them."""
    if table is None or table.dtype == torch.float32 and table.stride()[-2:] == (2, 1):
        return table
    return table.float().contiguous()


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _too_wide(head_dim: int, *rows: Tensor | None) -> str | None:
    """What the kernels of 64 tokens cannot hold; the rows are tokens in dimension 1."""
    if head_dim > WIDEST:
        return f"its kernels hold head_dim <= {WIDEST}, got {head_dim}"
    if BLOCK * max((x.stride(1) for x in rows if x is not None), default=0) >= 2**32:
        return f"its kernels count the elements of {BLOCK} tokens in 32 bits"
    return None


def _rotate_rows(
    x: Tensor,  # [B, T, N, H, D]
    table: Tensor | None,  # [O, T * N, D / 2, 2]
    weight: Tensor | None,
    eps: float,
    sm_scale: float,
    out: Tensor,
) -> None:
    B, T, N, H, D = x.shape
    launch(
        "rotate_rows",
        x.device,
        x=x,
        weight=weight,
        table=table,
        out=out,
        **{"B": B, "T": T, "N": N, "H": H, "D": D, "O": 1 if table is None else table.shape[0]},
        **strides("x", x, "btnhd"),
        **strides("t", table, "ol"),
        eps=eps,
        sm_scale=sm_scale,
        dtype=code(x.dtype),
        weight_dtype=code_of(weight),
    )


@api.QUERY.kernel("cuda", unless=unless(0, 3))
def query(
    q: Tensor,
    table: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
    sm_scale: float,
) -> Tensor:
    (B, L, C), table = q.shape, _pairs(table)
    D = C // num_heads
    out = q.new_empty((1 if table is None else table.shape[0], B, L, num_heads, D))
    heads = q.as_strided((B, 1, L, num_heads, D), (q.stride(0), 0, q.stride(1), D, 1))
    _rotate_rows(heads, table, _dense(norm_weight), eps, sm_scale, out)
    return out


@api.ROPE_ON_CACHE.kernel("cuda", unless=unless(0))
def rope_on_cache(k_raw: Tensor, table: Tensor) -> Tensor:
    out = k_raw.new_empty(k_raw.shape)
    _rotate_rows(k_raw, _pairs(table.unsqueeze(0)), None, 1.0, 1.0, out)
    return out


def _cannot_encode(q: Tensor, table: Tensor | None, heads: int, *_: object) -> str | None:
    return _too_wide(q.shape[2] // heads, q, table)


@api.QUERY_INT8.kernel("cuda", unless=unless(0, 3, check=_cannot_encode))
def query_int8(
    q: Tensor,
    table: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
    sm_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, C), table, weight = q.shape, _pairs(table), _dense(norm_weight)
    offsets, blocks = 1 if table is None else table.shape[0], -(-L // BLOCK)
    out = q.new_empty((offsets, B, L, num_heads, C // num_heads))
    low = q.new_empty(out.shape, dtype=torch.int8)
    scale = q.new_empty((offsets, B, blocks, num_heads), dtype=torch.float32)
    launch(
        "query_int8",
        q.device,
        q=q,
        weight=weight,
        table=table,
        inverse=None if weight is None else q.new_empty((B, L), dtype=torch.float32),
        out=out,
        code=low,
        scale=scale,
        **{"B": B, "L": L, "H": num_heads, "D": C // num_heads, "O": offsets},
        **strides("q", q, "bl"),
        **strides("t", table, "ol"),
        eps=eps,
        sm_scale=sm_scale,
        dtype=code(q.dtype),
        weight_dtype=code_of(weight),
        processors=native.processors(q.device),
    )
    return out, low, scale


def _cannot_write(k: Tensor, v: Tensor, *rest: Any) -> str | None:
    table, cache = rest[1], rest[6:]
    if not all(part is None or part.is_contiguous() for part in cache):
        return "it writes caches with the strides that make_cache gives; backend='reference' any"
    table = None if table is None else table.unsqueeze(0)
    return _too_wide(cache[0].shape[4], k, v, table)


@api.WRITE.kernel("cuda", unless=unless(0, 1, 4, 8, 9, check=_cannot_write))
def write(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    table: Tensor | None,
    norm_weight: Tensor | None,
    num_heads: int,
    eps: float,
    phi: str,
    cache_k: Tensor,
    cache_v: Tensor,
    k_scale: Tensor | None,
    k_mean: Tensor | None,
    v_scale: Tensor | None,
    h: Tensor | None,
    z: Tensor | None,
) -> None:
    table, weight = _pairs(table), _dense(norm_weight)
    B, S, N, H, D = cache_k.shape
    if k_scale is None or v_scale is None or k_mean is None:
        k_scale = v_scale = None  # plain
    F, nb, slot_h, slot_z = slots.shape[0], -(-N // BLOCK), None, None
    if h is not None and z is not None and h.shape[2] < nb:
        slot_h, slot_z = h, z
        h, z = (x.new_empty((B, F, nb, *x.shape[3:])) for x in (h, z))
    launch(
        "write_cache",
        k.device,
        k=k,
        v=v,
        weight=weight,
        table=table,
        slots=slots,
        inverse=None if weight is None else k.new_empty(k.shape[:2], dtype=torch.float32),
        cache_k=cache_k,
        cache_v=cache_v,
        k_scale=k_scale,
        k_mean=k_mean,
        v_scale=v_scale,
        h=h,
        z=z,
        slot_h=slot_h,
        slot_z=slot_z,
        **{"B": B, "F": F, "N": N, "H": H, "D": D, "S": S},
        **strides("k", k, "bl"),
        **strides("v", v, "bl"),
        **strides("t", table, "l"),
        stride_s=slots.stride(0),
        eps=eps,
        phi=api.PHI.index(phi),
        k_dtype=code(k.dtype),
        v_dtype=code(v.dtype),
        weight_dtype=code_of(weight),
        cache_k_dtype=code(cache_k.dtype),
        cache_v_dtype=code(cache_v.dtype),
        mean_dtype=code_of(k_mean),
        processors=native.processors(k.device),
    )
