# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of sla: block-sparse attention and linear attention, in one pass over q.

out_i = softmax(sm_scale q_i k_J^T) v_J + phi(q_i) H_i / (phi(q_i) Z_i + eps),  J = listed blocks

`_attend_kernel` serves every form; plain tensors are one segment without a table.  A program owns
BLOCK_M queries of one query block and head and walks its list, BLOCK_N keys at a time:
    q [O, B, L, H, D], one rotation per offset      out [B, L, H, E], lse [B, H, L]
    k [B, slots, N, H_kv, D], v [B, slots, N, H_kv, E]: any strides, the last dimension dense
    list, bounds: rows of blocks, a part for each offset, so that q is loaded once per part
    H [O, B, H, rows or 1, D, E], Z [O, B, H, rows or 1, D]: of this query block, or of all
The linear branch comes last and accumulates into the same tile: its rows are divided before the
product, and a projection is already in H.  For an INT8 cache q.mu of 16 blocks is one product
[BLOCK_M, D] x [D, 16] ahead of their walk.
Source: SLA (arXiv 2509.24006); SpargeAttention (arXiv 2502.18137).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit import softmax
from reeltime.jit.launch import NAMES, Config, arch_of, config, launch, width
from reeltime.sla.triton_linear import (
    FLOAT32,
    linear_rows,
    linear_slices,
    linear_strides,
    query_tile,
)
from reeltime.sla.triton_mask import Choice, tile

GROUP = tl.constexpr(16)  # blocks whose q.mu is one product: the narrowest that tensor cores take


@triton.jit
def _correction(q, mean):
    """q.mu [M, GROUP]: 16-bit q by tensor cores without losing a bit, float32 q without TF32."""
    if q.dtype == mean.dtype and q.dtype != tl.float32:
        x = tl.dot(q, tl.trans(mean))
    elif q.dtype == tl.float32:
        x = tl.dot(q, tl.trans(mean.to(tl.float32)), input_precision="ieee")
    else:
        x = tl.dot(q.to(tl.float32), tl.trans(mean.to(tl.float32)), input_precision="tf32")
    return x


@triton.jit
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    low_ptr,  # q in INT8 [O, B, L, H, D] contiguous, or None: the cache is not
    q_scale_ptr,  # [O, B, ceil(L / 64), H] contiguous
    k_scale_ptr,  # [B, slots, per_slot, H_kv] contiguous
    k_mean_ptr,  # [B, slots, per_slot, H_kv, D] contiguous
    v_scale_ptr,  # [B, slots, per_slot, H_kv, E] contiguous
    table_ptr,  # [T] slots, negative: absent; or None: one segment, slot 0
    offset_ptr,  # [T]
    list_ptr,  # [B * H, room] int32
    bounds_ptr,  # [B * H, rows, ...] int32
    h_ptr,  # [O, B, H, rows or 1, D, E] float32 contiguous, or None: no linear branch
    z_ptr,
    bias_ptr,  # [E], or None
    out_ptr,  # [B, L, H, E] contiguous, or None
    lse_ptr,  # [B, H, L] contiguous, or None
    grad_ptr,  # [B, L, H, E] by strides, or None
    delta_ptr,  # [B, H, L]: grad . out of the sparse branch
    keep_ptr,  # [B, H, rows, n] int8, or None: 1 where a block's values were used
    scale,  # sm_scale * log2(e)
    skip,  # pv_skip * log2(e), or None
    eps,
    B,
    L,
    N,
    H,
    H_kv,
    slots,
    per_slot,
    n,
    stride_qo,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gl,
    stride_gh,
    stride_list,
    stride_bounds,
    stride_row,
    shared,  # query heads that one H serves
    stride_hb,  # of Z, per head
    stride_hm,  # of Z, per query block; 0: the same for all
    stride_ho,
    PHI: tl.constexpr,
    PARTS: tl.constexpr,
    ENTRYWISE: tl.constexpr,  # lists are not split by offset: q is loaded for every entry
    OFFSETS: tl.constexpr,
    SIZE_Q: tl.constexpr,
    SIZE_K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    K_AS: tl.constexpr,  # what q and k are multiplied as, and p and v
    V_AS: tl.constexpr,
    PARTIAL: tl.constexpr,  # what the products of one scaled tile are summed in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (SIZE_Q + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (SIZE_K + BLOCK_N - 1) // BLOCK_N
    i, h, b = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) % TILES * BLOCK_M
    rows = i * SIZE_Q + start + tl.arange(0, BLOCK_M)
    held = (rows < L) & (start + tl.arange(0, BLOCK_M) < SIZE_Q)
    h_kv = h // (H // H_kv)
    head = b * H + h
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    list_ptr += head * stride_list
    bounds_ptr += head * stride_bounds + i * stride_row
    channels = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    TOP: tl.constexpr = softmax.top(V_AS)
    begin, end = tl.load(bounds_ptr), tl.load(bounds_ptr + PARTS)
    parts = PARTS
    if ENTRYWISE:
        parts = end - begin
    for part in range(parts):
        # The query of this part of the list
        offset = part + b * 0
        if ENTRYWISE:
            end = begin + 1
            offset = tl.load(offset_ptr + tl.load(list_ptr + begin) // per_slot)
        else:
            end = tl.load(bounds_ptr + part + 1)
        q_at = q_ptr + offset * stride_qo
        row_scale = tl.full((BLOCK_M,), 1.0, tl.float32) * scale
        if low_ptr is not None:
            low_at = low_ptr + (offset * B + b) * L * H * D + h * D
            q = tile(low_at, rows, H * D, held, D, BLOCK_D)
            step_at = (offset * B + b) * tl.cdiv(L, 64) + rows // 64
            row_scale *= tl.load(q_scale_ptr + step_at * H + h, held, other=1.0)
        else:
            q = tile(q_at, rows, stride_ql, held, D, BLOCK_D).to(K_AS)
        group = tl.maximum(end - begin, 1)
        if k_mean_ptr is not None:
            group = GROUP

        for first in range(begin, end, group):
            last = tl.minimum(first + group, end)
            shift = tl.zeros((BLOCK_M,), tl.float32)
            if k_mean_ptr is not None:
                # q.mu of the next 16 blocks; q is read again, to hold one form of it
                near = tile(q_at, rows, stride_ql, held, D, BLOCK_D)
                entry = first + tl.arange(0, GROUP)
                ahead = tl.load(list_ptr + entry, entry < last, other=0)
                slot_ahead = tl.zeros((GROUP,), tl.int64)
                if table_ptr is not None:
                    slot_ahead = tl.load(table_ptr + ahead // per_slot, entry < last, other=0)
                mean_at = (b * slots + slot_ahead) * per_slot + ahead % per_slot
                mean_ptr = k_mean_ptr + h_kv * D
                mean = tile(mean_ptr, mean_at, H_kv * D, entry < last, D, BLOCK_D)
                shifts = _correction(near, mean) * scale

            # The listed blocks, a tile of keys at a time
            for u in range(first * STEPS, last * STEPS):
                j = tl.load(list_ptr + u // STEPS)
                slot = b * 0
                if table_ptr is not None:
                    slot = tl.load(table_ptr + j // per_slot)
                inner = u % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
                keys = j % per_slot * SIZE_K + inner
                seen = (keys < N) & (inner < SIZE_K)
                k = tile(k_ptr + slot * stride_ks, keys, stride_kn, seen, D, BLOCK_D)
                x = softmax.products(q, tl.trans(k.to(K_AS)))
                x = tl.where(seen[None, :], x, float("-inf"))
                x_scale = row_scale
                if k_scale_ptr is not None:
                    block_at = ((b * slots + slot) * per_slot + j % per_slot) * H_kv + h_kv
                    x_scale = row_scale * tl.load(k_scale_ptr + block_at)
                if k_mean_ptr is not None:
                    shift = softmax.column(shifts, u // STEPS - first)
                p, m, alpha = softmax.probabilities(x, x_scale, shift, m, TOP)
                v_at, v_scale = v_ptr + slot * stride_vs, None
                if k_scale_ptr is not None:  # not before p: the scores need the registers
                    v_scale_at = v_scale_ptr + block_at * E + channels
                    v_scale = tl.load(v_scale_at, channels < E, other=1.0)
                if skip is None:
                    v = tile(v_at, keys, stride_vn, seen, E, BLOCK_E).to(V_AS)
                    acc, total = softmax.weighted(p, v, v_scale, acc, total, alpha, PARTIAL)
                else:
                    # A block far below every row's maximum keeps its place in the sum alone
                    gap = x * x_scale[:, None] + (shift - m)[:, None]
                    gap = tl.where(held[:, None] & (x > float("-inf")), gap, float("-inf"))
                    keep = tl.max(gap) > -skip
                    if keep_ptr is not None:
                        keep_at = keep_ptr + (head * (tl.num_programs(0) // TILES) + i) * n + j
                        tl.store(keep_at, keep.to(tl.int8))
                    if keep:
                        v = tile(v_at, keys, stride_vn, seen, E, BLOCK_E).to(V_AS)
                        acc, total = softmax.weighted(p, v, v_scale, acc, total, alpha, PARTIAL)
                    else:
                        acc, total = acc * alpha[:, None], total * alpha + tl.sum(p, 1)
        begin = end

    # The sparse branch
    acc, lse = softmax.finish(acc, total, m, TOP)
    row_at = head * L + rows
    if lse_ptr is not None:
        tl.store(lse_ptr + row_at, lse, held)
    if delta_ptr is not None:
        grad_ptr += b * stride_gb + h * stride_gh
        grad = tile(grad_ptr, rows, stride_gl, held, E, BLOCK_E).to(tl.float32)
        tl.store(delta_ptr + row_at, tl.sum(grad * acc, 1), held)

    # The linear branch
    if h_ptr is not None:
        z_at = (b * (H // shared) + h // shared) * stride_hb + i * stride_hm
        acc, inverse = linear_rows(
            acc, q_ptr, h_ptr + z_at * E, z_ptr + z_at, eps, rows, held, stride_qo, stride_ql,
            stride_ho, PHI, OFFSETS, D, E, BLOCK_D, BLOCK_E, SLICE, PRECISION,
        )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channels, channels < E, other=0.0).to(tl.float32)[None, :]
        if table_ptr is not None:
            acc = tl.where(tl.load(bounds_ptr + PARTS + 1) > 0, acc, 0.0)
    if out_ptr is not None:
        out_at = out_ptr + ((b * L + rows)[:, None] * H + h) * E + channels[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), held[:, None] & (channels < E)[None, :])


# --- Launchers ----------------------------------------------------------------------------------


def tiles(q: Tensor, E: int, block_q: int, block_k: int, whole: bool, low: bool) -> Config:
    """BLOCK_M, BLOCK_N, num_warps, num_stages: as wide as registers allow.

    float32 products have no tensor core and keep their operands in registers: small tiles.  With
    two offsets 128 rows spill where mma.sync holds q in registers, and where tcgen05 moves
    accumulators through them.  `whole` blocks: pv_skip looks at all of one.
    """
    O, _, L, _, D = q.shape  # noqa: E741
    name, wide = arch_of(q.device).name, q.dtype == FLOAT32
    limit_m, limit_n, warps = 128, 64, 8
    if wide:
        limit_m, limit_n = 32, 32
    elif max(D, E) > 128:
        limit_m, limit_n = 64, 32
    elif O > 1 and (name in ("sm80", "sm86", "sm89") or (name == "sm100" and not low)):
        limit_m, warps = 64, 8 if low or name == "sm100" else 4
    default = {
        "BLOCK_M": query_tile(block_q, L, 256 if whole else limit_m),
        "BLOCK_N": min(128 if whole else limit_n, width(block_k)),
        "num_warps": warps,
        "num_stages": 1 if wide else 2,
    }
    if whole:
        return default
    return config("sla_attend", q.device, default, D=D, block_q=block_q, block_k=block_k)


def value_dtypes(q: Tensor, v: Tensor, scaled: bool) -> tuple[tl.dtype, tl.dtype]:
    """What p and v are multiplied as, and what one tile of scaled products is summed in.

    e4m3 becomes fp16 again, because wgmma and mma.sync want values transposed.  A tile is summed in
    fp16, 64 keys of p <= 1 and |v| <= 448, which cannot overflow: it takes half the registers of a
    second float32 tile, and runs at twice its rate on the cards that halve float32's.
    """
    if scaled:
        return tl.float16, tl.float16
    return NAMES[q.dtype] if q.dtype == v.dtype else tl.float32, tl.float32


def attend(
    q: Tensor,  # [O, B, L, H, D]
    k: Tensor,  # [B, slots, N, H_kv, D]
    v: Tensor,
    lists: tuple[Tensor, Tensor, int],  # list, bounds, parts
    sizes: tuple[int, int],  # block_q, block_k
    sm_scale: float,
    pv_skip: float,
    *,
    low: tuple[Tensor | None, ...] | None = None,  # q in INT8, its scale, k_scale, k_mean, v_scale
    segments: tuple[Tensor, Tensor] | None = None,
    linear: tuple[Tensor, Tensor, Tensor | None, str, float] | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    grad: Tensor | None = None,
    delta: Tensor | None = None,
    keep: Tensor | None = None,
) -> None:
    """Launch _attend_kernel; linear is H, Z, bias, phi, eps."""
    O, B, L, H, D = q.shape  # noqa: E741
    _, slots, N, H_kv, E = v.shape
    indices, bounds, parts = lists
    sizes = (min(sizes[0], max(L, 1)), sizes[1])  # one query block needs no more rows than q
    per_slot = -(-N // sizes[1])
    whole = pv_skip < float("inf")
    tile_of = tiles(q, E, *sizes, whole, low is not None)
    table, offset = (None, None) if segments is None else segments
    low_q, q_scale, k_scale, k_mean, v_scale = (None,) * 5 if low is None else low
    h, z, bias, phi, eps = (None, None, None, "relu", 1.0) if linear is None else linear
    rows = -(-L // sizes[0])
    v_as, partial = value_dtypes(q, v, low is not None)
    launch(
        _attend_kernel,
        (rows * triton.cdiv(sizes[0], tile_of["BLOCK_M"]), H, B),
        *(q, k, v, low_q, q_scale, k_scale, k_mean, v_scale, table, offset),
        *(indices, bounds, h, z, bias),
        *(out, lse, grad, delta, keep, sm_scale * softmax.LOG2_E),
        *(pv_skip * softmax.LOG2_E if whole else None, eps, B, L, N, H, H_kv, slots, per_slot),
        *(per_slot * (1 if table is None else table.shape[0]), *q.stride()[:4], *k.stride()[:4]),
        *(*v.stride()[:4], *((0, 0, 0) if grad is None else grad.stride()[:3])),
        *(indices.stride(0), *bounds.stride()[:2], *linear_strides(h, H)),
        PHI=phi,
        PARTS=parts,
        ENTRYWISE=whole and O > 1,
        OFFSETS=O,
        SIZE_Q=sizes[0],
        SIZE_K=sizes[1],
        D=D,
        E=E,
        K_AS=NAMES[q.dtype] if q.dtype == k.dtype else tl.float32 if low is None else tl.int8,
        V_AS=v_as,
        PARTIAL=partial,
        BLOCK_D=width(D),
        BLOCK_E=width(E),
        **linear_slices(q),
        **tile_of,
    )


def by_head(x: Tensor) -> Tensor:
    """[B, H, ...] -> [B * H, ...], contiguous."""
    return x.contiguous().flatten(0, 1)


def lists_of(choice: Choice) -> tuple[Tensor, Tensor, int]:
    assert choice.blocks is not None
    return choice.blocks.flatten(2).flatten(0, 1), choice.bounds.flatten(0, 1), choice.parts
