# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of rope_kv: every projection read from HBM once, every result written once.

Without 8 bits nothing spans tokens: a program of `_rows_kernel` owns whole rows (all heads of a
token, as in norm) and turns them once per offset.  A row of the table serves every head from L1.

INT8 spans 64 tokens of one head, RMSNorm all heads of one token: `_inverse_kernel` leaves 1 / rms,
4 bytes per token, and a program of `_query_int8_kernel` or `_write_kernel` owns GROUP heads of 64
tokens, which it reads from L2, and one table tile for all of them.  Means, scales, stored keys and
values, h and z of a block leave together.  h is D / 16 bytes per element of k, most of what is
written; triton_summaries has its product, and sums of a slot's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.arch import UnsupportedArchError
from reeltime.jit import lang
from reeltime.jit.launch import arch_of, config, launch, unless
from reeltime.quant.reference import LIMIT
from reeltime.rope_kv import api
from reeltime.rope_kv.reference import BLOCK
from reeltime.rope_kv.triton_summaries import add_blocks, phi_tile, product, terms

# --- Pieces of the kernels ----------------------------------------------------------------------


@triton.jit
def _row(x_row, columns, inside, stride_h, stride_d, D: tl.constexpr):
    """[1, W] of one token's heads, float32."""
    place = x_row + columns // D * stride_h + columns % D * stride_d
    return tl.load(place, inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _turn_row(x, weight_ptr, stride_w, table_row, out_row, columns, inside, D: tl.constexpr):
    """Weighed, rotated, stored."""
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + columns * stride_w, inside, other=0.0).to(tl.float32)
    if table_row is not None:
        table = tl.load(table_row + columns % D, inside, other=0.0)
        x = lang.rotate(x, table.to(tl.float32))
    tl.store(out_row + columns, x.to(out_row.dtype.element_ty), inside)


@triton.jit
def _head(x_ptr, x_at, inverse, weight_ptr, stride_w, table_ptr, table_at, held, dims, inside):
    """One head of 64 tokens [64, BLOCK_D] in float32: normed if there is a weight, rotated."""
    x = tl.load(x_ptr + x_at, held, other=0.0).to(tl.float32) * inverse
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + dims * stride_w, inside, other=0.0).to(tl.float32)
    if table_ptr is not None:
        x = lang.rotate(x, tl.load(table_ptr + table_at, held, other=0.0).to(tl.float32))
    return x


# --- Kernels ------------------------------------------------------------------------------------


@triton.jit
def _inverse_kernel(
    x_ptr,  # [B, L, C]
    inverse_ptr,  # [B, L] float32: 1 / sqrt(mean(x^2) + eps)
    rows,  # B * L
    L, eps, stride_xb, stride_xl,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        x_row = x_ptr + (row // L).to(tl.int64) * stride_xb + (row % L).to(tl.int64) * stride_xl
        squares = tl.zeros((CHUNK,), tl.float32)
        for left in range(0, C, CHUNK):
            columns = left + tl.arange(0, CHUNK)
            x = tl.load(x_row + columns, columns < C, other=0.0).to(tl.float32)
            squares += x * x
        tl.store(inverse_ptr + row, tl.rsqrt(tl.sum(squares) / C + eps))


@triton.jit
def _rows_kernel(
    x_ptr,  # [B, T, N, H, D], of a projection T = 1
    weight_ptr,  # [C] or None: no norm
    inverse_ptr,  # [B, L] where a row is wider than a program holds, or None
    table_ptr,  # [O, L, D], pairs of (cos, sin), L = T * N; or None
    out_ptr,  # [O, B, L, H, D] contiguous
    rows,  # B * L
    L, N, offsets, eps, sm_scale, stride_xb, stride_xt, stride_xn, stride_xh, stride_xd, stride_w,
    stride_to, stride_tl,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr,  # a row in two pieces, as in norm
    TAIL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    head_at = tl.program_id(1) * (HEAD + TAIL) + tl.arange(0, HEAD)[None, :]
    head_in = head_at < C
    if TAIL > 0:
        tail_at = HEAD + tl.arange(0, TAIL)[None, :]
        tail_in = tail_at < C
    for row in range(first, tl.minimum(first + ROWS, rows)):
        # Load
        token = row % L
        x_row = x_ptr + (row // L).to(tl.int64) * stride_xb
        x_row += (token // N).to(tl.int64) * stride_xt + (token % N).to(tl.int64) * stride_xn
        head = _row(x_row, head_at, head_in, stride_xh, stride_xd, D)
        if TAIL > 0:
            tail = _row(x_row, tail_at, tail_in, stride_xh, stride_xd, D)

        # Norm
        factor = sm_scale
        if inverse_ptr is not None:
            factor *= tl.load(inverse_ptr + row)
        elif weight_ptr is not None:
            squares = tl.sum(head * head)
            if TAIL > 0:
                squares += tl.sum(tail * tail)
            factor *= tl.rsqrt(squares / C + eps)
        head *= factor
        if TAIL > 0:
            tail *= factor

        # Turn once per offset
        for o in range(offsets):
            table_row, turn = table_ptr, tl.cast(o, tl.int64)
            if table_ptr is not None:
                table_row += turn * stride_to + token.to(tl.int64) * stride_tl
            out_row = out_ptr + (turn * rows + row) * C
            _turn_row(head, weight_ptr, stride_w, table_row, out_row, head_at, head_in, D)
            if TAIL > 0:
                _turn_row(tail, weight_ptr, stride_w, table_row, out_row, tail_at, tail_in, D)


@triton.jit
def _query_int8_kernel(
    q_ptr,  # [B, L, C]
    inverse_ptr,  # [B, L], or None: no norm
    weight_ptr,  # [C] or None
    table_ptr,  # [O, L, D] or None
    out_ptr,  # [O, B, L, H, D] contiguous
    int8_ptr,  # as out
    scale_ptr,  # [O, B, ceil(L / 64), H] contiguous
    B, L, H, offsets, sm_scale, stride_qb, stride_ql, stride_w, stride_to, stride_tl,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # heads of one program
    BLOCK: tl.constexpr,  # tokens
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Tokens of the block; offsets from its first are 32 bits wide
    first, block, b = tl.program_id(0) * GROUP, tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = block.to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    here, inside = i < L - block * BLOCK, dims < D
    held = here & inside
    q_ptr += b * stride_qb + start * stride_ql
    inverse = sm_scale
    if inverse_ptr is not None:
        inverse *= tl.load(inverse_ptr + b * L + start + i, here, other=0.0)

    for o in range(offsets):
        turn = tl.cast(o, tl.int64)
        table_row, weight = table_ptr, weight_ptr
        if table_ptr is not None:
            table_row += turn * stride_to + start * stride_tl
        out_at = ((turn * B + b) * L + start) * H * D
        scale_at = ((turn * B + b) * tl.num_programs(1) + block) * H
        for head in range(first, tl.minimum(first + GROUP, H)):
            # Norm, turn, round
            if weight_ptr is not None:
                weight = weight_ptr + head * D * stride_w
            q_at, table_at = head * D + i * stride_ql + dims, i * stride_tl + dims
            q = _head(
                q_ptr, q_at, inverse, weight, stride_w, table_row, table_at, held, dims, inside
            )
            q = q.to(out_ptr.dtype.element_ty)
            place = head * D + i * (H * D) + dims
            tl.store(out_ptr + out_at + place, q, held)

            # Encode what was stored
            q = q.to(tl.float32)
            amax = tl.max(tl.max(lang.magnitude(q), axis=1, keep_dims=True), axis=0, keep_dims=True)
            scale = lang.block_scale(amax, LIMIT)  # [1, 1]
            tl.store(int8_ptr + out_at + place, lang.encode(q, scale, LIMIT, tl.int8), held)
            tl.store(scale_ptr + scale_at + head + tl.zeros((1, 1), tl.int32), scale)


@triton.jit
def _write_kernel(
    k_ptr,  # [B, F * N, C]
    v_ptr,
    inverse_ptr,  # [B, F * N], or None: no norm
    weight_ptr,  # [C] or None
    table_ptr,  # [F * N, D] or None
    slots_ptr,  # [F] int64
    cache_k_ptr,  # [B, slots, N, H, D]; all of the cache is contiguous
    cache_v_ptr,
    k_scale_ptr,  # [B, slots, nb, H], or None: plain
    k_mean_ptr,  # [B, slots, nb, H, D] or None
    v_scale_ptr,  # [B, slots, nb, H, D]
    h_ptr,  # [B, slots, nb, H, D, D], or None: no summaries; or if BY_FRAME [B, F, nb, H, D, D]
    z_ptr,  # [B, slots, nb, H, D] or [B, F, nb, H, D]
    F, N, H, slots, stride_kb, stride_kl, stride_vb, stride_vl, stride_w, stride_tl, stride_s,
    PHI: tl.constexpr, K_LIMIT: tl.constexpr, V_LIMIT: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,  # columns of h at a time
    BY_FRAME: tl.constexpr,
):  # fmt: skip
    # A slot out of range is nobody's memory
    first, block = tl.program_id(0) * GROUP, tl.program_id(1)
    b, f = (tl.program_id(2) // F).to(tl.int64), tl.program_id(2) % F
    slot = tl.load(slots_ptr + f * stride_s)
    if (slot < 0) | (slot >= slots):
        return

    # Tokens of the block; offsets from its first are 32 bits wide
    start = f.to(tl.int64) * N + block * BLOCK
    count = tl.minimum(BLOCK, N - block * BLOCK)
    i = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    here, inside = i < count, dims < D
    held = here & inside
    k_ptr += b * stride_kb + start * stride_kl
    v_ptr += b * stride_vb + start * stride_vl
    to = (b * slots + slot) * N + block * BLOCK
    cache_k_ptr += to * H * D
    cache_v_ptr += to * H * D
    to = ((b * slots + slot) * tl.num_programs(1) + block) * H
    sums_to = ((b * F + f) * tl.num_programs(1) + block) * H if BY_FRAME else to
    weight = weight_ptr
    if table_ptr is not None:
        table_ptr += start * stride_tl
    inverse = 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + b * F * N + start + i, here, other=0.0)

    for head in range(first, tl.minimum(first + GROUP, H)):
        if weight_ptr is not None:
            weight = weight_ptr + head * D * stride_w
        k_at, table_at = head * D + i * stride_kl + dims, i * stride_tl + dims
        k = _head(k_ptr, k_at, inverse, weight, stride_w, table_ptr, table_at, held, dims, inside)
        place, at, sums_at = head * D + i * (H * D), to + head, sums_to + head

        # Keys around their mean as stored
        if k_mean_ptr is not None:
            mean = tl.sum(k, axis=0, keep_dims=True) * (1.0 / count)
            mean = mean.to(k_mean_ptr.dtype.element_ty)
            tl.store(k_mean_ptr + at * D + dims, mean, inside)
        if k_scale_ptr is not None:
            centred = tl.where(held, k - mean.to(tl.float32), 0.0)
            amax = tl.max(tl.max(lang.magnitude(centred), axis=1), axis=0)
            k_scale = lang.block_scale(amax, K_LIMIT)
            tl.store(k_scale_ptr + at, k_scale)
            k_scale += tl.zeros((1, 1), tl.float32)
            k_code = lang.encode(centred, k_scale, K_LIMIT, tl.int8)
            tl.store(cache_k_ptr + place + dims, k_code, held)
        else:
            tl.store(cache_k_ptr + place + dims, k.to(cache_k_ptr.dtype.element_ty), held)

        # Features of the keys
        if h_ptr is not None:
            features = phi_tile(k, held, PHI)
            z = tl.sum(features, axis=0, keep_dims=True)
            tl.store(z_ptr + sums_at * D + dims, z, inside)
            high, low = terms(features)

        # Values and h
        for left in range(0, D, SLICE):
            some = left + tl.arange(0, SLICE)[None, :]
            v_held = here & (some < D)
            v = tl.load(v_ptr + head * D + i * stride_vl + some, v_held, other=0.0)
            if v_scale_ptr is not None:
                v_scale = tl.max(lang.magnitude(v), axis=0, keep_dims=True)
                v_scale = lang.block_scale(v_scale, V_LIMIT)
                tl.store(v_scale_ptr + at * D + some, v_scale, some < D)
                code = lang.encode(v.to(tl.float32), v_scale, V_LIMIT, cache_v_ptr.dtype.element_ty)
                tl.store(cache_v_ptr + place + some, code, v_held)
            else:
                tl.store(cache_v_ptr + place + some, v.to(cache_v_ptr.dtype.element_ty), v_held)
            if h_ptr is not None:
                channels = tl.arange(0, BLOCK_D)[:, None]
                h_held = (channels < D) & (some < D)
                h_at = h_ptr + sums_at * D * D + channels * D + some
                tl.store(h_at, product(high, low, v), h_held)


# --- Launchers ----------------------------------------------------------------------------------

WHOLE = 8192  # the widest row that one program holds


def _pieces(C: int) -> tuple[int, int]:
    """HEAD and TAIL of a row, powers of two."""
    if C > WHOLE:
        return WHOLE, 0
    head = 1 << C.bit_length() - 1
    return head, triton.next_power_of_2(C - head) if C > head else 0


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / rms of every token [B, L]: what 64 tokens of one head cannot know of the others."""
    B, L, C = x.shape
    inverse = x.new_empty((B, L), dtype=torch.float32)
    chunk = min(512, triton.next_power_of_2(C))
    tile = {"ROWS": 4 if B * L >= 4096 else 1, "num_warps": max(1, chunk // 256)}
    tile = config("rope_kv_inverse", x.device, tile, C=C)
    launch(
        _inverse_kernel,
        (triton.cdiv(B * L, tile["ROWS"]),),
        *(x, inverse, B * L, L, eps, *x.stride()[:2]),
        **{"C": C, "CHUNK": chunk, **tile},
    )
    return inverse


def _dense(table: Tensor | None) -> Tensor | None:
    """Pairs of (cos, sin) side by side, as rope_table makes them."""
    if table is None or table.stride()[-2:] == (2, 1):
        return table
    return table.contiguous()


def _stride(value: Tensor | None, *dims: int) -> tuple[int, ...]:
    return tuple(0 if value is None else value.stride(dim) for dim in dims)


def _rotate_rows(
    x: Tensor,  # [B, T, N, H, D]
    table: Tensor | None,  # [O, L, D / 2, 2]
    weight: Tensor | None,
    inverse: Tensor | None,
    eps: float,
    sm_scale: float,
    out: Tensor,
) -> None:
    B, T, N, H, D = x.shape
    C, rows = H * D, B * T * N
    head, tail = _pieces(C)
    tile = {"ROWS": 4 if rows >= 4096 else 1, "num_warps": min(16, max(1, head // 256))}
    tile = config("rope_kv_rows", x.device, tile, C=C, D=D)
    launch(
        _rows_kernel,
        (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(C, head + tail)),
        *(x, weight, inverse, table, out, rows, T * N, N),
        *(1 if table is None else table.shape[0], eps, sm_scale, *x.stride()),
        *(*_stride(weight, 0), *_stride(table, 0, 1)),
        **{"C": C, "D": D, "HEAD": head, "TAIL": tail, **tile},
    )


@api.QUERY.kernel("triton", unless=unless(0))
def query(
    q: Tensor,
    table: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
    sm_scale: float,
) -> Tensor:
    (B, L, C), table = q.shape, _dense(table)
    D = C // num_heads
    out = q.new_empty((1 if table is None else table.shape[0], B, L, num_heads, D))
    if out.numel():
        inverse = None if norm_weight is None or C <= WHOLE else _inverse(q, eps)
        heads = q.as_strided((B, 1, L, num_heads, D), (q.stride(0), 0, q.stride(1), D, 1))
        _rotate_rows(heads, table, norm_weight, inverse, eps, sm_scale, out)
    return out


@api.ROPE_ON_CACHE.kernel("triton", unless=unless(0))
def rope_on_cache(k_raw: Tensor, table: Tensor) -> Tensor:
    out = k_raw.new_empty(k_raw.shape)
    if out.numel():
        _rotate_rows(k_raw, _dense(table.unsqueeze(0)), None, None, 1.0, 1.0, out)
    return out


def _heads_tile(kernel: str, x: Tensor, dim: int) -> dict[str, int]:
    """Heads that share a table tile, and warps: 32 float32 of a head per thread."""
    wide = max(16, triton.next_power_of_2(dim))
    tile = {"GROUP": 2, "num_warps": min(8, max(2, wide // 16))}
    return {"BLOCK_D": wide, **config(kernel, x.device, tile, D=dim)}


@api.QUERY_INT8.kernel("triton", unless=unless(0))
def query_int8(
    q: Tensor,
    table: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
    sm_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, C), table = q.shape, _dense(table)
    D, offsets, blocks = C // num_heads, 1 if table is None else table.shape[0], -(-L // BLOCK)
    out = q.new_empty((offsets, B, L, num_heads, D))
    low = q.new_empty(out.shape, dtype=torch.int8)
    scale = q.new_empty((offsets, B, blocks, num_heads), dtype=torch.float32)
    if not out.numel():
        return out, low, scale
    inverse = None if norm_weight is None else _inverse(q, eps)
    tile = _heads_tile("rope_kv_query_int8", q, D)
    launch(
        _query_int8_kernel,
        (triton.cdiv(num_heads, tile["GROUP"]), blocks, B),
        *(q, inverse, norm_weight, table, out, low, scale, B, L, num_heads, offsets, sm_scale),
        *(*q.stride()[:2], *_stride(norm_weight, 0), *_stride(table, 0, 1)),
        **{"LIMIT": LIMIT[torch.int8], "D": D, "BLOCK": BLOCK, **tile},
    )
    return out, low, scale


@api.WRITE.kernel("triton", unless=unless(0, 9))
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
    if not k.numel():
        return
    parts = (cache_k, cache_v, k_scale, k_mean, v_scale, h, z)
    if not all(part is None or part.is_contiguous() for part in parts):
        raise UnsupportedArchError(
            "cache: expected the strides that make_cache gives, got others. "
            "backend='reference' writes any other."
        )
    B, _, N, H, D = cache_k.shape
    F, nb, table = slots.shape[0], -(-N // BLOCK), _dense(table)
    sums = (h, z)
    if per_slot := h is not None and z is not None and h.shape[2] < nb:
        sums = h.new_empty((B, F, nb, *h.shape[3:])), z.new_empty((B, F, nb, *z.shape[3:]))
    inverse = None if norm_weight is None else _inverse(k, eps)
    tile = _heads_tile("rope_kv_write", k, D)
    # Of h at a time: as much as registers allow, twice that where accumulators need few or none
    wide = arch_of(k.device).tensor_core["int8"] != "IMMA" and tile["BLOCK_D"] <= 128
    area = 8192 if wide and v.dtype == torch.bfloat16 and h is not None else 4096
    tile.setdefault("SLICE", min(64, tile["BLOCK_D"], area // tile["BLOCK_D"]))
    launch(
        _write_kernel,
        (triton.cdiv(H, tile["GROUP"]), nb, B * F),
        *(k, v, inverse, norm_weight, table, slots),
        *(cache_k, cache_v, k_scale, k_mean, v_scale, *sums, F, N, H, cache_k.shape[1]),
        *(*k.stride()[:2], *v.stride()[:2], *_stride(norm_weight, 0), *_stride(table, 0)),
        slots.stride(0),
        PHI=phi,
        K_LIMIT=LIMIT[torch.int8],
        V_LIMIT=LIMIT.get(cache_v.dtype, 1.0),
        BY_FRAME=per_slot,
        **{"D": D, "BLOCK": BLOCK, **tile},
    )
    if per_slot:
        add_blocks(*sums, slots, h, z)
