# SPDX-License-Identifier: Apache-2.0
"""sla's gradient on Triton, and the kernels of its sparse branch (the linear one: triton_linear).

    p = 2^(s - lse),  ds = p (keep grad v^T - delta),  delta = grad . out - grad_lse
    dq = sm_scale ds k,  dk = sm_scale ds^T q,  dv = (keep p)^T grad

    _dq_kernel        a program owns a tile of queries and walks its list
    _transpose_kernel a program lists the query blocks that attend to one key block
    _dkv_kernel       a program owns a tile of keys of one key head and walks those lists, one query
                      head of its group after the other
The choice of blocks is a step function and has no gradient.  Nothing is added atomically, so the
gradient is deterministic.  p is recomputed from lse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit import softmax
from reeltime.jit.launch import Config, config, dense, launch, width
from reeltime.sla import api
from reeltime.sla.triton_attend import attend, by_head, lists_of
from reeltime.sla.triton_linear import (
    FLOAT32,
    key_gradients,
    linear_gradients,
    per_key_block,
    query_tile,
)
from reeltime.sla.triton_mask import LOG2_E, expand, tile
from reeltime.sla.triton_summaries import COVERED, COVERED_LISTS, parts_of, project, sums_of


@triton.jit
def _dq_kernel(
    q_ptr,  # [B, L, H, D]
    k_ptr,  # [B, N, H_kv, D]
    v_ptr,  # [B, N, H_kv, E]
    grad_ptr,  # [B, L, H, E]
    list_ptr,  # as in _attend_kernel
    bounds_ptr,
    lse_ptr,  # [B, H, L] contiguous
    delta_ptr,
    keep_ptr,  # [B, H, rows, n] int8, or None: every block's values were used
    extra_ptr,  # [B, L, H, D] float32 contiguous: what the linear branch adds, or None
    dq_ptr,  # [B, L, H, D] contiguous
    sm_scale,
    L,
    N,
    H,
    H_kv,
    n,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gl,
    stride_gh,
    stride_list,
    stride_bounds,
    stride_row,
    SIZE_Q: tl.constexpr,
    SIZE_K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    TILES: tl.constexpr = (SIZE_Q + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (SIZE_K + BLOCK_N - 1) // BLOCK_N
    i, h, b = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) % TILES * BLOCK_M
    rows = i * SIZE_Q + start + tl.arange(0, BLOCK_M)
    held = (rows < L) & (start + tl.arange(0, BLOCK_M) < SIZE_Q)
    head, h_kv = b * H + h, h // (H // H_kv)
    q = tile(q_ptr + b * stride_qb + h * stride_qh, rows, stride_ql, held, D, BLOCK_D)
    grad = tile(grad_ptr + b * stride_gb + h * stride_gh, rows, stride_gl, held, E, BLOCK_E)
    lse = tl.load(lse_ptr + head * L + rows, held, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + head * L + rows, held, other=0.0)
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    bounds_ptr += head * stride_bounds + i * stride_row
    begin, end = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for u in range(begin * STEPS, end * STEPS):
        j = tl.load(list_ptr + head * stride_list + u // STEPS)
        inner = u % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = j * SIZE_K + inner
        seen = (keys < N) & (inner < SIZE_K)
        k = tile(k_ptr, keys, stride_kn, seen, D, BLOCK_D)
        v = tile(v_ptr, keys, stride_vn, seen, E, BLOCK_E)
        x = softmax.products(q, tl.trans(k)) * (sm_scale * LOG2_E)
        p = tl.where(seen[None, :], tl.exp2(x - lse[:, None]), 0.0)
        dp = softmax.products(grad, tl.trans(v))
        if keep_ptr is not None:
            rows_of_head = tl.num_programs(0) // TILES
            dp *= tl.load(keep_ptr + (head * rows_of_head + i) * n + j).to(tl.float32)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq *= sm_scale
    dims = tl.arange(0, BLOCK_D)
    at = ((b * L + rows)[:, None] * H + h) * D + dims[None, :]
    inside = held[:, None] & (dims < D)[None, :]
    if extra_ptr is not None:
        dq += tl.load(extra_ptr + at, inside, other=0.0)
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), inside)


@triton.jit
def _transpose_kernel(
    code_ptr,  # [B * H, rows, n] int8 contiguous
    list_ptr,  # [B * H, n, rows] int32 contiguous
    bounds_ptr,  # [B * H, n, 2] int32 contiguous, in list_ptr from its first row of this head
    rows,
    n,
    ROWS: tl.constexpr,
):
    j, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, ROWS)
    mine = tl.load(code_ptr + (head * rows + i) * n + j, i < rows, other=0) == 1
    count = mine.to(tl.int32)
    tl.store(list_ptr + head * n * rows + j * rows + tl.cumsum(count, 0) - 1, i, mine)
    tl.store(bounds_ptr + (head * n + j) * 2, j * rows)
    tl.store(bounds_ptr + (head * n + j) * 2 + 1, j * rows + tl.sum(count))


@triton.jit
def _dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    list_ptr,  # [B * H, n, rows] query blocks
    bounds_ptr,  # [B * H, n, 2]
    lse_ptr,
    delta_ptr,
    keep_ptr,
    dk_ptr,  # [B, N, H_kv, D] contiguous
    dv_ptr,  # [B, N, H_kv, E] contiguous
    sm_scale,
    L,
    N,
    H,
    H_kv,
    rows,
    n,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gl,
    stride_gh,
    ADD: tl.constexpr,  # to what is in dk and dv: the linear branch
    SIZE_Q: tl.constexpr,
    SIZE_K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    TILES: tl.constexpr = (SIZE_Q + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (SIZE_K + BLOCK_N - 1) // BLOCK_N
    j, h_kv, b = tl.program_id(0) // STEPS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner = tl.program_id(0) % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = j * SIZE_K + inner
    seen = (keys < N) & (inner < SIZE_K)
    k = tile(k_ptr + b * stride_kb + h_kv * stride_kh, keys, stride_kn, seen, D, BLOCK_D)
    v = tile(v_ptr + b * stride_vb + h_kv * stride_vh, keys, stride_vn, seen, E, BLOCK_E)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    group = H // H_kv
    for h in range(h_kv * group, (h_kv + 1) * group):
        head = b * H + h
        begin = tl.load(bounds_ptr + (head * n + j) * 2)
        end = tl.load(bounds_ptr + (head * n + j) * 2 + 1)
        q_at = q_ptr + b * stride_qb + h * stride_qh
        grad_at = grad_ptr + b * stride_gb + h * stride_gh
        for u in range(begin * TILES, end * TILES):
            i = tl.load(list_ptr + head * n * rows + u // TILES)
            lane = u % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
            at = i * SIZE_Q + lane
            held = (at < L) & (lane < SIZE_Q)
            q = tile(q_at, at, stride_ql, held, D, BLOCK_D)
            grad = tile(grad_at, at, stride_gl, held, E, BLOCK_E)
            lse = tl.load(lse_ptr + head * L + at, held, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + head * L + at, held, other=0.0)
            x = softmax.products(k, tl.trans(q)) * (sm_scale * LOG2_E)
            p = tl.exp2(x - lse[None, :])  # [N, M]
            dp = softmax.products(v, tl.trans(grad))
            used = p
            if keep_ptr is not None:
                keep = tl.load(keep_ptr + (head * rows + i) * n + j).to(tl.float32)
                used, dp = p * keep, dp * keep
            dv = tl.dot(used.to(grad.dtype), grad, dv, input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk *= sm_scale

    dims, channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    dk_ptr += ((b * N + keys)[:, None] * H_kv + h_kv) * D + dims[None, :]
    dv_ptr += ((b * N + keys)[:, None] * H_kv + h_kv) * E + channels[None, :]
    held_k, held_v = seen[:, None] & (dims < D)[None, :], seen[:, None] & (channels < E)[None, :]
    if ADD:
        dk += tl.load(dk_ptr, held_k, other=0.0).to(tl.float32)
        dv += tl.load(dv_ptr, held_v, other=0.0).to(tl.float32)
    tl.store(dk_ptr, dk.to(dk_ptr.dtype.element_ty), held_k)
    tl.store(dv_ptr, dv.to(dv_ptr.dtype.element_ty), held_v)


# --- Launchers ----------------------------------------------------------------------------------

Gradients = tuple[Tensor | None, ...]


def tiles(name: str, q: Tensor, E: int, block_q: int, block_k: int) -> Config:
    """BLOCK_M, BLOCK_N, num_warps, num_stages of _dq_kernel and _dkv_kernel."""
    L, D = q.shape[1], max(q.shape[3], E)
    wide = q.dtype == FLOAT32
    limit_m, limit_n = (16, 16) if wide else (64, 64) if D <= 128 else (32, 32)
    default = {
        "BLOCK_M": query_tile(block_q, L, limit_m),
        "BLOCK_N": min(limit_n, width(block_k)),
        "num_warps": 4 if wide else 8,
        "num_stages": 1 if wide else 2,
    }
    return config(name, q.device, default, D=D, block_q=block_q, block_k=block_k)


def sparse_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    code: Tensor,  # [B, H, rows, n]: 1 where selected
    lists: tuple[Tensor, Tensor, int],
    sizes: tuple[int, int],
    sm_scale: float,
    pv_skip: float,
    needed: Sequence[bool],
    extra: Tensor | None = None,  # what the linear branch adds to dq
    sums: tuple[Tensor, Tensor] | None = None,  # dh [B, H_kv, n or 1, D, E], dz
    phi: str = "relu",
) -> Gradients:
    """dq, dk, dv; where not needed, None."""
    (B, L, H, D), (_, N, H_kv, E) = q.shape, v.shape
    rows, n = code.shape[2:]
    sizes = (min(sizes[0], max(L, 1)), sizes[1])
    lse, delta = (q.new_empty((B, H, L), dtype=FLOAT32) for _ in range(2))
    keep = code.new_zeros(code.shape) if pv_skip < float("inf") else None
    attend(
        *(q.unsqueeze(0), k.unsqueeze(1), v.unsqueeze(1), lists, sizes, sm_scale, pv_skip),
        lse=lse,
        grad=grad,
        delta=delta,
        keep=keep,
    )
    if grad_lse is not None:
        delta -= grad_lse
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    shape: Any = {"SIZE_Q": sizes[0], "SIZE_K": sizes[1], "D": D, "E": E}
    shape |= {"BLOCK_D": width(D), "BLOCK_E": width(E)}
    dq = dk = dv = None
    if needed[0]:
        dq = q.new_empty(q.shape)
        of = tiles("sla_dq", q, E, *sizes)
        launch(
            _dq_kernel,
            (rows * triton.cdiv(sizes[0], of["BLOCK_M"]), H, B),
            *(q, k, v, grad, *lists[:2], lse, delta, keep, extra, dq, sm_scale, L, N, H, H_kv, n),
            *(*strides, lists[0].stride(0), *lists[1].stride()[:2]),
            **shape,
            **of,
        )
    if needed[1] or needed[2]:
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        listed = code.new_empty((B * H, n, rows), dtype=torch.int32)
        bounds = code.new_empty((B * H, n, 2), dtype=torch.int32)
        launch(
            _transpose_kernel,
            (n, B * H),
            *(code, listed, bounds, rows, n),
            ROWS=triton.next_power_of_2(max(rows, 1)),
            num_warps=1,
        )
        of = tiles("sla_dkv", q, E, *sizes)
        if sums is not None:
            key_gradients(k, v, *sums, dk, dv, sizes[1], phi)
        launch(
            _dkv_kernel,
            (n * triton.cdiv(sizes[1], of["BLOCK_N"]), H_kv, B),
            *(q, k, v, grad, listed, bounds, lse, delta, keep, dk, dv, sm_scale, L, N),
            *(H, H_kv, rows, n, *strides),
            ADD=sums is not None,
            **shape,
            **of,
        )
    return dq, dk if needed[1] else None, dv if needed[2] else None


@api.SPARSE_ATTENTION.gradient("triton")
def sparse_attention(
    args: tuple[Any, ...], grads: tuple[Tensor | None, ...], needed: Sequence[bool]
) -> Gradients:
    q, k, v, indptr, indices, block_q, block_k, sm_scale, pv_skip, *_ = (
        args  # straight through 8 bits
    )
    grad, grad_lse = grads
    if grad is None:
        grad = q.new_zeros((*q.shape[:3], v.shape[3]))
    code = expand(indptr, indices, -(-k.shape[1] // block_k))
    lists = (by_head(indices), by_head(indptr), 1)
    sizes = (block_q, block_k)
    options = (code, lists, sizes, sm_scale, pv_skip, needed)
    return *sparse_gradients(q, k, v, dense(grad), grad_lse, *options), *[None] * 9


@api.LINEAR_ATTENTION.gradient("triton")
def linear_attention(
    args: tuple[Any, ...], grads: tuple[Tensor | None, ...], needed: Sequence[bool]
) -> Gradients:
    q, h, z, indptr, indices, over, block_q, phi, eps = args
    (grad,) = grads
    assert grad is not None
    sums = sums_of(h, z, indptr, indices, over)
    q = dense(q)
    dq, dH, dZ = linear_gradients(q, dense(grad), *sums, block_q, phi, eps, q.dtype)
    code = None if indptr is None else expand(indptr, indices, h.shape[1])
    covered = 0 if code is None else COVERED_LISTS[over]
    dh = dz = None
    if needed[1]:
        dh = per_key_block(dH, code, covered, h.shape[2]).transpose(1, 2)
        dh = dh.to(h.dtype).expand(h.shape)
    if needed[2]:
        dz = per_key_block(dZ.unsqueeze(-1), code, covered, h.shape[2]).squeeze(-1).transpose(1, 2)
        dz = dz.to(z.dtype).expand(z.shape)
    return dq if needed[0] else None, dh, dz, *[None] * 6


@api.SLA.gradient("triton")
def sla(
    args: tuple[Any, ...], grads: tuple[Tensor | None, ...], needed: Sequence[bool]
) -> Gradients:
    q, k, v, weight, bias, topk, topp, negligible, over, similarity, pv_skip, *rest = args
    block_q, block_k, phi, sm_scale, eps, *_ = rest
    assert grads[0] is not None
    grad, H_kv = dense(grads[0]), k.shape[2]
    options = (topk, topp, negligible, over, similarity, block_q, block_k, phi, sm_scale)
    choice, h, z, raw = parts_of(q, k, v, weight, *options, want="code list")
    extra, dH, dZ = linear_gradients(q, grad, h, z, block_q, phi, eps, FLOAT32)

    # What of dH reaches each key block; a projection is undone first
    code, covered = (None, 0) if over == "all" else (choice.code, COVERED[over])
    back = dH if weight is None else project(dH, weight.t())
    dh = per_key_block(back, code, covered, H_kv)
    dz = per_key_block(dZ.unsqueeze(-1), code, covered, H_kv).squeeze(-1)
    three = sparse_gradients(
        *(q, k, v, grad, None, choice.code, lists_of(choice), (block_q, block_k), sm_scale),
        *(pv_skip, needed, extra, (dh, dz), phi),
    )

    # H' = H W^T, where H is the sum over all blocks or of each query block
    dweight = dbias = None
    if needed[3]:
        above = per_key_block(dH, None, 0, H_kv) if over == "all" else dH
        dweight = (above.flatten(0, -2).t() @ raw.flatten(0, -2)).to(weight.dtype)
    if needed[4]:
        dbias = grad.sum((0, 1, 2), dtype=FLOAT32).to(bias.dtype)
    return *three, dweight, dbias, *[None] * 14
