# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of sla's linear branch, query by query: out = phi(q) H / (phi(q) Z + eps).

    t = grad H^T / (phi(q) Z + eps),  u = grad . out,  dphi(q) = t - u Z / (phi(q) Z + eps)
    dH = phi(q)^T grad / (phi(q) Z + eps),  dZ = -u phi(q)^T / (phi(q) Z + eps)
    dphi(K) = V dh^T + dz,  dV = phi(K) dh

    linear_rows       the forward of a tile of queries; `_linear_kernel` alone, or in _attend_kernel
    _dh_kernel        a program owns some channels of a query block: its dq, dH and dZ
    _dkeys_kernel     a program owns a tile of keys: what h and z of its block give dk and dv
H is [O, B, H, rows or 1, D, E]: of each query block, or of all of them.  Every product with it
takes SLICE channels at a time, so that no program holds all of it.  Softmax needs two numbers of a
whole row first, and its gradient a third, which has a short way: phi(q) . dphi(q) = u eps / (phi(q)
Z + eps), and phi(K) . dphi(K) = V . dV + phi(K) . dz.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit.launch import launch, width
from reeltime.sla.triton_mask import tile
from reeltime.sla.triton_summaries import (
    phi_gradient,
    phi_rows,
    phi_tile,
    piece,
    product,
    total,
)


@triton.jit
def linear_rows(
    acc,  # [M, E]
    q_ptr,  # [O, L, D] of one head
    h_ptr,  # [O, D, E] of these rows
    z_ptr,  # [O, D]
    eps,
    rows,
    held,
    stride_qo,
    stride_ql,
    stride_zo,
    PHI: tl.constexpr,
    OFFSETS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + phi(q) H / (phi(q) Z + eps), some channels at a time: acc leaves few registers.

    Also 1 / (phi(q) Z + eps).
    """
    channels = tl.arange(0, BLOCK_E)
    below = tl.zeros(rows.shape, tl.float32)
    for o in range(OFFSETS):
        x_ptr = q_ptr + o * stride_qo
        top, factor = phi_rows(x_ptr, rows, stride_ql, held, PHI, D, SLICE)
        for start in range(0, D, SLICE):
            dims = start + tl.arange(0, SLICE)
            inside = held[:, None] & (dims < D)[None, :]
            x = piece(x_ptr, rows, stride_ql, dims, inside, 0.0)
            z = tl.load(z_ptr + o * stride_zo + dims, dims < D, other=0.0)
            below += tl.sum(phi_tile(x, inside, top, factor, PHI) * z[None, :], 1)
    below = 1.0 / (below + eps)
    for o in range(OFFSETS):
        x_ptr = q_ptr + o * stride_qo
        top, factor = phi_rows(x_ptr, rows, stride_ql, held, PHI, D, SLICE)
        for start in range(0, D, SLICE):
            dims = start + tl.arange(0, SLICE)
            inside = held[:, None] & (dims < D)[None, :]
            x = piece(x_ptr, rows, stride_ql, dims, inside, 0.0)
            f = phi_tile(x, inside, top, factor * below, PHI)
            h_at = h_ptr + o * stride_zo * E + dims[:, None] * E + channels[None, :]
            h = tl.load(h_at, (dims < D)[:, None] & (channels < E)[None, :], other=0.0)
            acc = tl.dot(f, h, acc, input_precision=PRECISION)
    return acc, below


@triton.jit
def _linear_kernel(
    q_ptr,  # [O, B, L, H, D]
    h_ptr,  # as in _attend_kernel
    z_ptr,
    out_ptr,  # [B, L, H, E] contiguous, or None
    grad_ptr,  # [B, L, H, E] by strides, or None
    inner_ptr,  # [B, H, L]: grad . out
    inverse_ptr,  # [B, H, L]: 1 / (phi(q) Z + eps)
    eps,
    L,
    H,
    stride_qo,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_gb,
    stride_gl,
    stride_gh,
    shared,
    stride_hb,
    stride_hm,
    stride_ho,
    PHI: tl.constexpr,
    OFFSETS: tl.constexpr,
    SIZE_Q: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (SIZE_Q + BLOCK_M - 1) // BLOCK_M
    i, h, b = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) % TILES * BLOCK_M
    rows = i * SIZE_Q + start + tl.arange(0, BLOCK_M)
    held = (rows < L) & (start + tl.arange(0, BLOCK_M) < SIZE_Q)
    channels = tl.arange(0, BLOCK_E)
    z_at = (b * (H // shared) + h // shared) * stride_hb + i * stride_hm
    acc, inverse = linear_rows(
        tl.zeros((BLOCK_M, BLOCK_E), tl.float32), q_ptr + b * stride_qb + h * stride_qh,
        h_ptr + z_at * E, z_ptr + z_at, eps, rows, held, stride_qo, stride_ql, stride_ho,
        PHI, OFFSETS, D, E, BLOCK_D, BLOCK_E, SLICE, PRECISION,
    )  # fmt: skip
    if grad_ptr is not None:
        grad_ptr += b * stride_gb + h * stride_gh
        grad = tile(grad_ptr, rows, stride_gl, held, E, BLOCK_E).to(tl.float32)
        row_at = (b * H + h) * L + rows
        tl.store(inner_ptr + row_at, tl.sum(grad * acc, 1), held)
        tl.store(inverse_ptr + row_at, inverse, held)
    if out_ptr is not None:
        out_at = out_ptr + ((b * L + rows)[:, None] * H + h) * E + channels[None, :]
        inside = held[:, None] & (channels < E)[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _dh_kernel(
    q_ptr,  # [B, L, H, D]
    grad_ptr,  # [B, L, H, E]
    h_ptr,  # [1, B, H or H_kv, rows or 1, D, E] float32 contiguous, projected
    z_ptr,
    inner_ptr,  # [B, H, L]: grad . out of the linear branch, u
    inverse_ptr,  # [B, H, L]: 1 / (phi(q) Z + eps)
    dq_ptr,  # [B, L, H, D] contiguous
    dh_ptr,  # [B, H, rows, D, E] float32 contiguous
    dz_ptr,  # [B, H, rows, D]
    eps,
    L,
    H,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_gb,
    stride_gl,
    stride_gh,
    shared,
    stride_hb,
    stride_hm,
    PHI: tl.constexpr,
    SIZE_Q: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE
    i, h, b = tl.program_id(0) // SLICES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    grad_ptr += b * stride_gb + h * stride_gh
    dims = tl.program_id(0) % SLICES * SLICE + tl.arange(0, SLICE)
    channels = tl.arange(0, BLOCK_E)
    square = (dims < D)[:, None] & (channels < E)[None, :]
    z_at = (b * (H // shared) + h // shared) * stride_hb + i * stride_hm
    z = tl.load(z_ptr + z_at + dims, dims < D, other=0.0)
    h_at = h_ptr + z_at * E + dims[:, None] * E + channels[None, :]
    sums = tl.load(h_at, square, other=0.0)
    dh = tl.zeros((SLICE, BLOCK_E), tl.float32)
    dz = tl.zeros((SLICE,), tl.float32)
    for start in range(0, SIZE_Q, BLOCK_M):
        lane = start + tl.arange(0, BLOCK_M)
        rows = i * SIZE_Q + lane
        held = (rows < L) & (lane < SIZE_Q)
        inside = held[:, None] & (dims < D)[None, :]
        top, factor = phi_rows(q_ptr, rows, stride_ql, held, PHI, D, SLICE)
        x = piece(q_ptr, rows, stride_ql, dims, inside, 0.0)
        f = phi_tile(x, inside, top, factor, PHI)
        row_at = (b * H + h) * L + rows
        inverse = tl.load(inverse_ptr + row_at, held, other=0.0)
        below = tl.load(inner_ptr + row_at, held, other=0.0) * inverse
        grad = tile(grad_ptr, rows, stride_gl, held, E, BLOCK_E).to(tl.float32) * inverse[:, None]
        df = tl.dot(grad, tl.trans(sums), input_precision=PRECISION) - below[:, None] * z[None, :]
        # phi(q) . df over all channels is u - u phi(q) Z / (phi(q) Z + eps)
        dq = phi_gradient(df, f, x, below * eps, PHI)
        at = ((b * L + rows)[:, None] * H + h) * D + dims[None, :]
        tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), inside)
        dh = tl.dot(tl.trans(f), grad, dh, input_precision=PRECISION)
        dz -= tl.sum(f * below[:, None], 0)
    at_h = (b * H + h) * (tl.num_programs(0) // SLICES) + i
    tl.store(dh_ptr + at_h * D * E + dims[:, None] * E + channels[None, :], dh, square)
    tl.store(dz_ptr + at_h * D + dims, dz, dims < D)


@triton.jit
def _dkeys_kernel(
    k_ptr,  # [B, N, H_kv, D]
    v_ptr,  # [B, N, H_kv, E]
    dh_ptr,  # [B, H_kv, n or 1, D, E] float32 contiguous
    dz_ptr,  # [B, H_kv, n or 1, D]
    dk_ptr,  # [B, N, H_kv, D] contiguous
    dv_ptr,  # [B, N, H_kv, E] contiguous
    N,
    H_kv,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_zh,
    stride_zn,
    PHI: tl.constexpr,
    SIZE_K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STEPS: tl.constexpr = (SIZE_K + BLOCK_N - 1) // BLOCK_N
    j, h, b = tl.program_id(0) // STEPS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner = tl.program_id(0) % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = j * SIZE_K + inner
    seen = (keys < N) & (inner < SIZE_K)
    k_ptr += b * stride_kb + h * stride_kh
    channels = tl.arange(0, BLOCK_E)
    v = tile(v_ptr + b * stride_vb + h * stride_vh, keys, stride_vn, seen, E, BLOCK_E)
    v = v.to(tl.float32)
    z_at = (b * H_kv + h) * stride_zh + j * stride_zn
    top, factor = phi_rows(k_ptr, keys, stride_kn, seen, PHI, D, SLICE)

    # dV = phi(K) dh, and what softmax needs: phi(K) . (V dh^T + dz) = V . dV + phi(K) . dz
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, SLICE):
        dims = start + tl.arange(0, SLICE)
        inside = seen[:, None] & (dims < D)[None, :]
        x = piece(k_ptr, keys, stride_kn, dims, inside, 0.0)
        f = phi_tile(x, inside, top, factor, PHI)
        dh_at = dh_ptr + z_at * E + dims[:, None] * E + channels[None, :]
        dh = tl.load(dh_at, (dims < D)[:, None] & (channels < E)[None, :], other=0.0)
        dz = tl.load(dz_ptr + z_at + dims, dims < D, other=0.0)
        dv = tl.dot(f, dh, dv, input_precision=PRECISION)
        along += tl.sum(f * dz[None, :], 1)
    along += tl.sum(v * dv, 1)
    at_v = ((b * N + keys)[:, None] * H_kv + h) * E + channels[None, :]
    held_v = seen[:, None] & (channels < E)[None, :]
    tl.store(dv_ptr + at_v, dv.to(dv_ptr.dtype.element_ty), held_v)

    # dphi(K) = V dh^T + dz
    for start in range(0, D, SLICE):
        dims = start + tl.arange(0, SLICE)
        inside = seen[:, None] & (dims < D)[None, :]
        x = piece(k_ptr, keys, stride_kn, dims, inside, 0.0)
        f = phi_tile(x, inside, top, factor, PHI)
        dh_at = dh_ptr + z_at * E + dims[:, None] * E + channels[None, :]
        dh = tl.load(dh_at, (dims < D)[:, None] & (channels < E)[None, :], other=0.0)
        dz = tl.load(dz_ptr + z_at + dims, dims < D, other=0.0)
        df = tl.dot(v, tl.trans(dh), input_precision=PRECISION) + dz[None, :]
        at_k = ((b * N + keys)[:, None] * H_kv + h) * D + dims[None, :]
        dk = phi_gradient(df, f, x, along, PHI)
        tl.store(dk_ptr + at_k, dk.to(dk_ptr.dtype.element_ty), inside)


# --- Launchers ----------------------------------------------------------------------------------

FLOAT32 = torch.float32


def query_tile(size: int, length: int, limit: int) -> int:
    """Rows of one program: a query block, or a piece of one."""
    return min(limit, width(min(size, max(length, 1))))


def linear_slices(q: Tensor) -> dict[str, Any]:
    wide = q.dtype == FLOAT32
    return {"SLICE": 16 if wide else 32, "PRECISION": "ieee" if wide else "tf32"}


def linear_strides(h: Tensor | None, heads: int) -> tuple[int, int, int, int]:
    """Query heads of one H; and of Z, laid out as H without E: per head, query block, offset."""
    if h is None:
        return 1, 0, 0, 0
    O, B, H, rows, D, _ = h.shape  # noqa: E741
    return heads // H, rows * D, D if rows > 1 else 0, B * H * rows * D


def linear_into(
    out: Tensor | None,
    q: Tensor,
    h: Tensor,
    z: Tensor,
    block_q: int,
    phi: str,
    eps: float,
    grad: Tensor | None = None,
    inner: Tensor | None = None,
    inverse: Tensor | None = None,
) -> None:
    """out [B, L, H, E] = phi(q) H / (phi(q) Z + eps), q [O, B, L, H, D]."""
    O, B, L, H, D = q.shape  # noqa: E741
    E, block_q = h.shape[5], min(block_q, max(L, 1))
    BLOCK_M = query_tile(block_q, L, 32 if q.dtype == FLOAT32 else 128)
    launch(
        _linear_kernel,
        (-(-L // block_q) * triton.cdiv(block_q, BLOCK_M), H, B),
        *(q, h, z, out, grad, inner, inverse, eps, L, H, *q.stride()[:4]),
        *((0, 0, 0) if grad is None else grad.stride()[:3]),
        *linear_strides(h, H),
        PHI=phi,
        OFFSETS=O,
        SIZE_Q=block_q,
        D=D,
        E=E,
        BLOCK_M=BLOCK_M,
        BLOCK_D=width(D),
        BLOCK_E=width(E),
        **linear_slices(q),
        num_warps=4 if q.dtype == FLOAT32 else 8,
    )


def linear_gradients(
    q: Tensor,
    grad: Tensor,
    h: Tensor,  # [1, B, H or H_kv, rows or 1, D, E], projected
    z: Tensor,
    block_q: int,
    phi: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, L, H, D] of dtype; dH [B, H, rows, D, E] and dZ of every query block."""
    (B, L, H, D), E = q.shape, grad.shape[3]
    block_q = min(block_q, max(L, 1))
    rows, of_heads = -(-L // block_q), h.shape[2]
    dq = q.new_empty(q.shape, dtype=dtype)
    dh = q.new_empty((B, H, rows, D, E), dtype=FLOAT32)
    dz = q.new_empty((B, H, rows, D), dtype=FLOAT32)
    inner, inverse = (q.new_empty((B, H, L), dtype=FLOAT32) for _ in range(2))
    linear_into(None, q.unsqueeze(0), h, z, block_q, phi, eps, grad, inner, inverse)
    of = linear_slices(q)
    launch(
        _dh_kernel,
        (rows * triton.cdiv(D, of["SLICE"]), H, B),
        *(q, grad, h, z, inner, inverse, dq, dh, dz, eps, L, H, *q.stride()[:3]),
        *(*grad.stride()[:3], H // of_heads, h.shape[3] * D, D if h.shape[3] > 1 else 0),
        PHI=phi,
        SIZE_Q=block_q,
        D=D,
        E=E,
        BLOCK_M=query_tile(block_q, L, 16 if q.dtype == FLOAT32 else 32),
        BLOCK_E=width(E),
        num_stages=1,
        **of,
    )
    return dq, dh, dz


def key_gradients(
    k: Tensor,
    v: Tensor,
    dh: Tensor,  # [B, H_kv, n or 1, D, E]
    dz: Tensor,
    dk: Tensor,
    dv: Tensor,
    block_k: int,
    phi: str,
) -> None:
    """dk [B, N, H_kv, D] and dv, of the linear branch alone, in place."""
    (B, N, H_kv, D), E = k.shape, v.shape[3]
    limit = 16 if k.dtype == FLOAT32 else 64 if max(D, E) <= 128 else 32
    BLOCK_N = min(limit, width(block_k))
    launch(
        _dkeys_kernel,
        (triton.cdiv(N, block_k) * triton.cdiv(block_k, BLOCK_N), H_kv, B),
        *(k, v, dh, dz, dk, dv, N, H_kv, *k.stride()[:3], *v.stride()[:3]),
        *(dz.shape[2] * D, D if dz.shape[2] > 1 else 0),
        PHI=phi,
        SIZE_K=block_k,
        D=D,
        E=E,
        BLOCK_N=BLOCK_N,
        BLOCK_E=width(E),
        **linear_slices(k),
        num_warps=4 if D <= 64 else 8,
        num_stages=1,
    )


def per_key_block(x: Tensor, code: Tensor | None, covered: int, H_kv: int) -> Tensor:
    """x [B, H, rows, D, E] summed over the query blocks that reach each key block.

    [B, H_kv, n, D, E]; code None: they all reach all of them, [B, H_kv, 1, D, E].
    """
    B, H, rows, D, E = x.shape
    stacked = x.reshape(B, H_kv, H // H_kv * rows, D, E).transpose(1, 2).unsqueeze(1)
    if code is None:
        return total(stacked, None, 1)[0]
    n = code.shape[3]
    turned = code.view(B, H_kv, H // H_kv * rows, n).transpose(2, 3)
    out = x.new_empty((1, B, H_kv, n, D, E))
    return product(turned, covered, stacked, None, None, out, 1)[0]
