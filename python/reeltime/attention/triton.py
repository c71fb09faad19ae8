# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of attention, over plain tensors and over the cached segments of a stream.

out[i] = sum_j 2^(s_ij - m_i) v_j / sum_j 2^(s_ij - m_i),   m_i = max_j s_ij
with s = log2(e) sm_scale q k^T

`_attention_kernel` serves both forms; plain tensors are one segment without a table.  A program
owns BLOCK_M queries of one head and walks that head's keys, BLOCK_N at a time, segment by segment:
    q [O, B, L, H, D], one rotation per offset       out [B, L, H, E], lse [B, H, L]
    k [B, slots, N, H_kv, D], v [B, slots, N, H_kv, E]: any strides, the last dimension dense
    table, offset [T]: the slot that is read, and the rotation of the query that scores it
In 8 bits BLOCK_N is the block of 64 tokens that shares scales, and q.k = q8 (k - mu)8 + q.mu, where
q.mu of 16 blocks is one product [BLOCK_M, D] x [D, 16] ahead of their walk.

Source: FlashAttention-2 (arXiv 2307.08691); SageAttention 2 (arXiv 2411.10958).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.arch import KIB
from reeltime.attention import api
from reeltime.attention.reference import STORED
from reeltime.attention.triton_encode import encode, sequence_mean
from reeltime.jit import softmax
from reeltime.jit.launch import (
    NAMES,
    RARE,
    Config,
    arch_of,
    config,
    dense,
    launch,
    refuses,
    unless,
    width,
)
from reeltime.rope_kv.reference import BLOCK

GROUP = tl.constexpr(16)  # blocks whose q.mu is one product: the narrowest that tensor cores take


@triton.jit
def _tile(ptr, rows, stride, N, WIDTH, BLOCK: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """[rows, BLOCK] of a matrix [N, WIDTH], zero outside of it."""
    columns = tl.arange(0, BLOCK)
    place = ptr + rows[:, None] * stride + columns[None, :]
    if CHECK_ROWS and BLOCK != WIDTH:
        x = tl.load(place, (rows < N)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif CHECK_ROWS:
        x = tl.load(place, (rows < N)[:, None], other=0.0)
    elif BLOCK != WIDTH:
        x = tl.load(place, (columns < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(place)
    return x


@triton.jit
def _block(
    state,  # acc [M, E] (and more, the rest of E), total [M], m [M]
    q,
    scale,  # [M] log2 units per unit of q.k
    shift,  # [M] added to scores: q.mu
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, mask_ptr,
    rows,
    last_seen,
    j, N, L,
    D: tl.constexpr,
    E: tl.constexpr,
    H_kv,
    stride_kn, stride_vn, stride_mq, stride_mk,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    K_AS: tl.constexpr,
    V_AS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Key block j of one segment joins the state; MASKED where a row may not see all of it."""
    acc, more, total, m = state
    step = tl.cast(j, tl.int64) * BLOCK_N
    inner = tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + step * stride_kn, inner, stride_kn, N - step, D, BLOCK_D, MASKED)
    # Ahead of the scores, behind which it arrives
    v_at = v_ptr + step * stride_vn
    v = _tile(v_at, inner, stride_vn, N - step, E, BLOCK_E, MASKED)
    x = softmax.products(q, tl.trans(k.to(K_AS)))
    if k_scale_ptr is not None:
        scale = scale * tl.load(k_scale_ptr + j * H_kv)
    if MASKED:
        keys = j * BLOCK_N + inner
        seen = (keys < N)[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= last_seen[:, None])
        if mask_ptr is not None:
            at = mask_ptr + step * stride_mk + inner[None, :] * stride_mk
            at += tl.arange(0, rows.shape[0])[:, None] * stride_mq
            mask = tl.load(at, (rows < L)[:, None] & (keys < N)[None, :], other=0)
            if mask_ptr.dtype.element_ty == tl.int1:
                seen = seen & mask
            else:
                mask = mask.to(tl.float32)
                seen = seen & (mask > float("-inf"))
                # The most negative finite number is a mask, too, and must stay finite.
                mask = tl.maximum(mask * softmax.LOG2_E, -3.4e38)
                x = x * scale[:, None] + shift[:, None] + mask
                scale, shift = tl.full(scale.shape, 1.0, tl.float32), tl.zeros_like(shift)
        x = tl.where(seen, x, float("-inf"))
    p, m, alpha = softmax.probabilities(x, scale, shift, m, softmax.top(V_AS))
    before = total
    v_scale = _channels(v_scale_ptr, j * H_kv * E, E, BLOCK_E)
    acc, total = softmax.weighted(p, _as(v, V_AS), v_scale, acc, before, alpha, PARTIAL)
    if E > BLOCK_E:
        v = _tile(v_at + BLOCK_E, inner, stride_vn, N - step, E - BLOCK_E, BLOCK_E, MASKED)
        v_scale = _channels(v_scale_ptr, j * H_kv * E + BLOCK_E, E - BLOCK_E, BLOCK_E)
        more, _ = softmax.weighted(p, _as(v, V_AS), v_scale, more, before, alpha, PARTIAL)
    return acc, more, total, m


@triton.jit
def _as(v, dtype: tl.constexpr):
    """v in `dtype`.  The transpositions stop the compiler from moving the conversion behind the
    layout of mma.sync, into which 8-bit values would be gathered byte by byte."""
    if v.dtype == tl.float8e4nv:
        v = tl.trans(tl.trans(v).to(dtype))
    return v.to(dtype)


@triton.jit
def _channels(ptr, place, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One scale per channel [BLOCK], or None."""
    scale = None
    if ptr is not None:
        channels = tl.arange(0, BLOCK)
        scale = tl.load(ptr + place + channels, channels < WIDTH, other=1.0)
    return scale


@triton.jit
def _store(out_ptr, out, rows, L, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)
    held = (rows < L)[:, None] & (channels < WIDTH)[None, :]
    place = out_ptr + rows[:, None].to(tl.int64) * stride + channels[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), held)


@triton.jit
def _attention_kernel(
    q_ptr,  # [O, B, L, H, D]
    low_ptr,  # q in 8 bits [O, B, L, H, D] contiguous, or None
    q_scale_ptr,  # [O, B, ceil(L / 64), H] contiguous, or None
    k_ptr,
    v_ptr,
    k_scale_ptr,  # [B, slots, ceil(N / 64), H_kv] contiguous, or None
    k_mean_ptr,  # [B, slots, ceil(N / 64), H_kv, D] contiguous, or None; SEQUENCE: [B, H_kv, D]
    v_scale_ptr,  # [B, slots, ceil(N / 64), H_kv, E] contiguous, or None
    mask_ptr,  # [B, H, L, N] by strides, bool or added, or None
    table_ptr,  # [T] slots, negative: absent; or None: one segment, slot 0
    offset_ptr,  # [T]
    out_ptr,  # [B, L, H, E] contiguous
    lse_ptr,  # [B, H, L] contiguous, or None
    scale,  # sm_scale * log2(e)
    T,
    B,
    L,
    N,
    H,
    H_kv,
    slots,
    first_last,  # CAUSAL: the last key that query 0 sees
    stride_qo, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_ks, stride_kn, stride_kh,
    stride_vb, stride_vs, stride_vn, stride_vh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEQUENCE: tl.constexpr,
    K_AS: tl.constexpr,  # what q and k are multiplied as
    V_AS: tl.constexpr,  # what p and v are multiplied as
    PARTIAL: tl.constexpr,  # what one tile of p v is summed in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Last tiles first: causal ones are the longest
    tiles = tl.cdiv(L, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), head % H
    h_kv = h // (H // H_kv)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    last_seen = rows + first_last
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    more = acc if E > BLOCK_E else total

    # Which blocks are walked, and how many of them without a mask
    per_slot = tl.cdiv(N, BLOCK_N)
    blocks = per_slot
    free = N // BLOCK_N
    if CAUSAL:
        reach = tl.maximum((tile + 1) * BLOCK_M + first_last, 0)
        blocks = tl.minimum(blocks, tl.cdiv(reach, BLOCK_N))
        free = tl.minimum(free, tl.maximum(tile * BLOCK_M + first_last + 1, 0) // BLOCK_N)
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh + (tile * BLOCK_M).to(tl.int64) * stride_mq
        free = 0
    groups = 1
    if k_mean_ptr is not None and not SEQUENCE:
        groups = tl.cdiv(blocks, GROUP)

    for t in range(T):
        slot, offset = b * 0, b * 0
        if table_ptr is not None:
            slot, offset = tl.load(table_ptr + t), tl.load(offset_ptr + t)
        if slot >= 0:
            # The query as this segment sees it
            q_at = q_ptr + offset * stride_qo + b * stride_qb + h * stride_qh
            q_at += (tile * BLOCK_M).to(tl.int64) * stride_ql
            lane = tl.arange(0, BLOCK_M)
            row_scale = tl.full((BLOCK_M,), 1.0, tl.float32) * scale
            if low_ptr is None:
                q = _tile(q_at, lane, stride_ql, L - tile * BLOCK_M, D, BLOCK_D, True)
                q = q.to(K_AS)
            else:
                low_at = low_ptr + ((offset * B + b) * L + tile * BLOCK_M) * (H * D) + h * D
                q = _tile(low_at, lane, H * D, L - tile * BLOCK_M, D, BLOCK_D, True)
                steps = (offset * B + b) * tl.cdiv(L, 64) + rows // 64
                row_scale *= tl.load(q_scale_ptr + steps * H + h, rows < L, other=0.0)

            # Where this segment begins
            k_at = k_ptr + b * stride_kb + slot * stride_ks + h_kv * stride_kh
            v_at = v_ptr + b * stride_vb + slot * stride_vs + h_kv * stride_vh
            first = (b * slots + slot) * per_slot * H_kv + h_kv
            k_scale_at, v_scale_at = k_scale_ptr, v_scale_ptr
            if k_scale_ptr is not None:
                k_scale_at = k_scale_ptr + first
            if v_scale_ptr is not None:
                v_scale_at = v_scale_ptr + first * E

            for g in range(groups):
                # q.mu of the next 16 blocks
                start, stop = g * GROUP, blocks
                shift = tl.zeros((BLOCK_M,), tl.float32)
                if k_mean_ptr is not None and not SEQUENCE:
                    mean_at = k_mean_ptr + (first + start * H_kv) * D
                    shifts = scale * _correction(
                        q_at, stride_ql, L - tile * BLOCK_M, mean_at, H_kv * D, per_slot - start,
                        D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                    stop = tl.minimum(start + GROUP, blocks)

                # Keys that every row sees
                for j in range(start, tl.minimum(stop, free)):
                    if k_mean_ptr is not None and not SEQUENCE:
                        shift = softmax.column(shifts, j - start)
                    acc, more, total, m = _block(
                        (acc, more, total, m), q, row_scale, shift, k_at, v_at, k_scale_at,
                        v_scale_at, mask_ptr, rows, last_seen, j, N, L, D, E, H_kv, stride_kn,
                        stride_vn, stride_mq, stride_mk, CAUSAL, False, K_AS, V_AS, PARTIAL,
                        BLOCK_N, BLOCK_D, BLOCK_E,
                    )  # fmt: skip

                # The diagonal, the ragged tail, the mask
                for j in range(tl.maximum(start, free), stop):
                    if k_mean_ptr is not None and not SEQUENCE:
                        shift = softmax.column(shifts, j - start)
                    acc, more, total, m = _block(
                        (acc, more, total, m), q, row_scale, shift, k_at, v_at, k_scale_at,
                        v_scale_at, mask_ptr, rows, last_seen, j, N, L, D, E, H_kv, stride_kn,
                        stride_vn, stride_mq, stride_mk, CAUSAL, True, K_AS, V_AS, PARTIAL,
                        BLOCK_N, BLOCK_D, BLOCK_E,
                    )  # fmt: skip

    # Normalise and store
    out, lse = softmax.finish(acc, total, m, softmax.top(V_AS))
    out_ptr += (b * L * H + h) * E
    _store(out_ptr, out, rows, L, H * E, E, BLOCK_E)
    if E > BLOCK_E:
        out, _ = softmax.finish(more, total, m, softmax.top(V_AS))
        _store(out_ptr + BLOCK_E, out, rows, L, H * E, E - BLOCK_E, BLOCK_E)
    if lse_ptr is not None:
        if SEQUENCE:
            q_at = q_ptr + b * stride_qb + h * stride_qh + (tile * BLOCK_M).to(tl.int64) * stride_ql
            q = _tile(q_at, tl.arange(0, BLOCK_M), stride_ql, L - tile * BLOCK_M, D, BLOCK_D, True)
            dims = tl.arange(0, BLOCK_D)
            mean = tl.load(k_mean_ptr + (b * H_kv + h_kv) * D + dims, dims < D, other=0.0)
            lse += tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale * softmax.LN_2
        tl.store(lse_ptr + (b * H + h) * L + rows, lse, rows < L)


@triton.jit
def _correction(
    q_ptr, stride_q, held_rows,
    mean_ptr, stride_mean, held_means,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q.mu [BLOCK_M, GROUP] by tensor cores, with every bit of q and mu: TF32 holds those of 16.

    In quarters of D: what waits in registers beside the state is a quarter of the query.
    """
    PART: tl.constexpr = max(BLOCK_D // 4, 16)
    x = tl.zeros((BLOCK_M, GROUP), tl.float32)
    for start in tl.static_range(0, BLOCK_D, PART):
        q = _tile(q_ptr + start, tl.arange(0, BLOCK_M), stride_q, held_rows, D - start, PART, True)
        mean = _tile(
            mean_ptr + start, tl.arange(0, GROUP), stride_mean, held_means, D - start, PART, True
        )
        if q.dtype == mean.dtype and q.dtype != tl.float32:
            x = tl.dot(q, tl.trans(mean), x)
        elif q.dtype == tl.float32:
            x = tl.dot(q, tl.trans(mean.to(tl.float32)), x, input_precision="tf32x3")
        else:
            x = tl.dot(q.to(tl.float32), tl.trans(mean.to(tl.float32)), x, input_precision="tf32")
    return x


def tiles(q: Tensor, L: int, D: int, low: bool, scaled: bool, masked: bool) -> Config:
    """BLOCK_M, BLOCK_N, num_warps and num_stages: as wide as registers and shared memory allow."""
    arch = arch_of(q.device)
    roomy = arch.shared_limit
    full = q.dtype == torch.float32
    chosen = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    if full and not low:
        rows = 32 if D > 128 or scaled else 64
        chosen = {"BLOCK_M": rows, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif D > 128 or (full and roomy < 200 * KIB):
        rows = 32 if low and arch.tensor_core["int8"] != "IGMMA" else 64
        chosen |= {"BLOCK_M": rows, "BLOCK_N": 64 if low else 32}
    elif masked and not low:
        chosen |= {"BLOCK_N": 32}
    elif low and not full:
        chosen |= {"num_stages": 3}
    if arch.tensor_core["int8"].startswith("UTC") and D > 64:  # scores come from tensor memory
        chosen |= {"BLOCK_M": min(64, chosen["BLOCK_M"])}
    if L <= 32:
        chosen |= {"BLOCK_M": max(16, triton.next_power_of_2(L)), "num_warps": 4}
    elif L <= 64:
        chosen |= {"BLOCK_M": min(64, chosen["BLOCK_M"])}
    chosen = config("attention", q.device, chosen, L=L, D=D, low=int(low))
    return chosen | {"BLOCK_N": BLOCK} if scaled else chosen


def product_dtype(x: Tensor, y: Tensor) -> tl.dtype:  # what x and y are multiplied as
    return NAMES[x.dtype] if x.dtype == y.dtype else tl.float32


def value_dtypes(q: Tensor, v: Tensor, scaled: bool) -> tuple[tl.dtype, tl.dtype]:
    """What p and v are multiplied as, and what one tile of products is summed in.

    Values in e4m3 become fp16 again, except for tcgen05: wgmma and mma.sync want them transposed,
    which costs a byte-wise trip through shared memory and more than the faster product saves.
    """
    arch = arch_of(q.device)
    if not scaled:
        return product_dtype(q, v), tl.float32
    if v.dtype == torch.float8_e4m3fn and arch.tensor_core.get("fp8") == "UTCQMMA":
        return tl.float8e4nv, tl.float32
    return tl.float16, tl.float16 if arch.fast_fp16_sums else tl.float32


def run(
    q: Tensor,  # [O, B, L, H, D]
    low: tuple[Tensor, Tensor] | None,
    k: Tensor,  # [B, slots, N, H_kv, D]
    v: Tensor,
    k_scale: Tensor | None,
    k_mean: Tensor | None,
    v_scale: Tensor | None,
    lists: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    sm_scale: float,
    causal: str | None,
    sequence: bool,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, L, H, E] and lse [B, H, L] of one launch of _attention_kernel."""
    _, B, L, H, D = q.shape
    slots, N, H_kv, E = v.shape[1:]
    out = q.new_empty((B, L, H, E))
    lse = q.new_empty((B, H, L) if want_lse else (0,), dtype=torch.float32)
    table, offsets = lists or (None, None)
    low_q, q_scale = low or (None, None)
    v_as, partial = value_dtypes(q, v, v_scale is not None)
    scaled = low is not None or v_scale is not None
    chosen = tiles(q, L, max(D, E), low is not None, scaled, mask is not None)
    # The products of a tile that await their scale take as many registers as what they join
    halves = 2 if v_scale is not None and width(E) >= 128 else 1
    if mask is not None:
        mask = mask.expand(B, H, L, N)
    launch(
        _attention_kernel,
        (triton.cdiv(L, chosen["BLOCK_M"]) * B * H,),
        *(q, low_q, q_scale, k, v, k_scale, k_mean, v_scale, mask, table, offsets, out),
        *(lse if want_lse else None, sm_scale * softmax.LOG2_E.value),
        *(1 if table is None else table.shape[0], B, L, N, H, H_kv, slots),
        N - L if causal == "bottom_right" else 0,
        *(*q.stride()[:4], *k.stride()[:4], *v.stride()[:4]),
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        D=D,
        E=E,
        CAUSAL=causal is not None,
        SEQUENCE=sequence,
        K_AS=product_dtype(q, k) if low is None else NAMES[k.dtype],
        V_AS=v_as,
        PARTIAL=partial,
        BLOCK_D=width(D, low_q),
        BLOCK_E=width(E) // halves,
        **chosen,
    )
    return out, lse


def unservable(device: torch.device, q: Tensor, *options: object) -> str | None:
    """float64, or a format that the device has no products of."""
    low = "fp8" in options[5:7]  # qk, pv
    fp8 = torch.float8_e4m3fn if low else None
    return refuses(device, q, fp8) if low or q.dtype in RARE else None


@api.ATTENTION.kernel("triton", unless=unservable)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sm_scale: float,
    causal: str | None,
    qk: str | None,
    pv: str | None,
    smooth: str | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = dense(q), dense(k), dense(v)
    low = k_scale = k_mean = v_scale = None
    if qk is not None:
        B, S, H_kv, D = k.shape
        if smooth == "block":
            k_mean = k.new_empty((B, triton.cdiv(S, BLOCK), H_kv, D))
        elif smooth == "sequence":
            k_mean = sequence_mean(k)
        k, k_scale = encode(k, STORED[qk], k_mean)
        low = encode(q, STORED[qk], None)
    if pv is not None:
        v, v_scale = encode(v, STORED[pv], None, per_channel=True)
    return run(
        q.unsqueeze(0),
        low,
        *(k.unsqueeze(1), v.unsqueeze(1), k_scale, k_mean, v_scale, None, mask, sm_scale, causal),
        smooth == "sequence" and k_mean is not None,
        want_lse,
    )


@api.SEGMENT_ATTENTION.kernel("triton", unless=unless(0, 4))
def segment_attention(
    q: Tensor,
    q_int8: Tensor | None,
    q_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    k_mean: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    offset_index: Tensor,
    sm_scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = dense(q), dense(k), dense(v)
    low = None
    if k_scale is not None:
        if q_int8 is None or q_scale is None:
            q_int8, q_scale = encode(q.flatten(0, 1), torch.int8, None)
        low = (q_int8.contiguous(), q_scale.contiguous())
    scale, mean, v_scale = (
        None if x is None else x.contiguous() for x in (k_scale, k_mean, v_scale)
    )
    lists = (block_table.contiguous(), offset_index.contiguous())
    return run(q, low, k, v, scale, mean, v_scale, lists, None, sm_scale, None, False, want_lse)
