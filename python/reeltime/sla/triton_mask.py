# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of sla's mask: pool, score, rank, list.

    _pool_kernel      a program owns one block of tokens of one head, read once: its mean, whether
                      its tokens are alike, and its INT8 form, a scale for every 64 of them
    _score_kernel     a tile of query blocks x key blocks of one segment
    _select_kernel    a program owns one query block: its row of scores stays in registers, where
                      thresholds are found bit by bit (32 counts), so nothing is sorted
    _compress_kernel  a program owns one row of a CSR, and the rows before it by their counts
    _expand_kernel    the inverse: a program marks the blocks of one row

Scores go through memory (4 bytes per pair of blocks), because a tile of 16 rows makes them by one
product, where a program that ranked its own row would read every pooled key again.
Key blocks are numbered through the segments: block j is block j % per_slot of slot j // per_slot.
Codes are 0 absent, 1 selected, 2 marginal, 3 negligible.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit import lang, softmax
from reeltime.jit.launch import launch, width

LOWEST = tl.constexpr(-(2**31))  # the order of a column that is not there
SELECTED, MARGINAL, NEGLIGIBLE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG2_E = tl.constexpr(softmax.LOG2_E)


@triton.jit
def tile(ptr, rows, stride, held, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix with dense rows of WIDTH; zero where a row is not held."""
    columns = tl.arange(0, BLOCK)
    inside = held[:, None]
    if BLOCK != WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], inside, other=0.0)


@triton.jit
def unit_rows(x):
    """x [N, D] over the norm of each row; a row of zeros stays zero."""
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    return x / tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)[:, None]


@triton.jit
def _pool_kernel(
    x_ptr,  # [O, B, S, H, D]
    mean_ptr,  # [O, B, n, H, D] float32 contiguous, or None
    similar_ptr,  # [O, B, n, H] bytes contiguous, or None
    low_ptr,  # [O, B, S, H, D] int8 contiguous, or None; blocks are then whole times BLOCK_S = 64
    scale_ptr,  # [O, B, ceil(S / 64), H] float32 contiguous
    similarity,
    B,
    S,
    H,
    stride_xo,
    stride_xb,
    stride_xs,
    stride_xh,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, h, ob = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x_ptr += (ob // B).to(tl.int64) * stride_xo + (ob % B).to(tl.int64) * stride_xb + h * stride_xh
    end = tl.minimum(S, (block + 1) * SIZE)
    dims = tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    unit = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, SIZE, BLOCK_S):
        rows = block * SIZE + start + tl.arange(0, BLOCK_S)
        x = tile(x_ptr, rows, stride_xs, rows < end, D, BLOCK_D).to(tl.float32)
        mean += tl.sum(x, 0)
        if similar_ptr is not None:
            unit += tl.sum(unit_rows(x), 0)
        if low_ptr is not None:
            step = (block * SIZE + start) // BLOCK_S
            scale = lang.block_scale(tl.max(lang.magnitude(x)), 127.0)
            scale_at = scale_ptr + (ob.to(tl.int64) * tl.cdiv(S, BLOCK_S) + step) * H + h
            tl.store(scale_at, scale, step * BLOCK_S < S)
            low = lang.encode(x, tl.full((1, 1), 0.0, tl.float32) + scale, 127.0, tl.int8)
            low_at = low_ptr + ((ob.to(tl.int64) * S + rows)[:, None] * H + h) * D + dims[None, :]
            tl.store(low_at, low, (rows < end)[:, None] & (dims < D)[None, :])
    at = (ob.to(tl.int64) * tl.num_programs(0) + block) * H + h
    count = (end - block * SIZE).to(tl.float32)
    if mean_ptr is not None:
        tl.store(mean_ptr + at * D + dims, mean / count, dims < D)
    if similar_ptr is not None:
        unit = unit / count
        tl.store(similar_ptr + at, (tl.sum(unit * unit) > similarity).to(tl.uint8))


@triton.jit
def _score_kernel(
    q_ptr,  # [O, B, nQ, H, D]
    k_ptr,  # [B, slots, per_slot, H_kv, D]
    table_ptr,  # [T] slots, negative: absent; or None: one segment, slot 0
    offset_ptr,  # [T]
    score_ptr,  # [B, H, nQ, T * per_slot] float32 contiguous
    sm_scale,
    rows,
    per_slot,
    segments,
    H,
    H_kv,
    stride_qo,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kn,
    stride_kh,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(per_slot, BLOCK_N)
    t, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (tl.program_id(2) // H).to(tl.int64), tl.program_id(2) % H
    slot, offset = b * 0, b * 0
    if table_ptr is not None:
        slot, offset = tl.load(table_ptr + t), tl.load(offset_ptr + t)
    q_ptr += offset * stride_qo + b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + tl.maximum(slot, 0) * stride_ks + h // (H // H_kv) * stride_kh
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    present = n < tl.where(slot >= 0, per_slot, 0)
    score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        held = (m < rows)[:, None] & (dims < D)[None, :]
        q = tl.load(q_ptr + m[:, None] * stride_qn + dims[None, :], held, other=0.0)
        held = present[:, None] & (dims < D)[None, :]
        k = tl.load(k_ptr + n[:, None] * stride_kn + dims[None, :], held, other=0.0)
        q, k = q.to(tl.float32) * sm_scale, k.to(tl.float32)
        score = tl.dot(q, tl.trans(k), score, input_precision="ieee")
    at = (b * H + h) * rows * segments * per_slot + t * per_slot
    place = score_ptr + at + m[:, None] * (segments * per_slot) + n[None, :]
    tl.store(place, score, (m < rows)[:, None] & (n < per_slot)[None, :])


@triton.jit
def _ahead(order, threshold, room):
    """The first `room` columns: by order, equals by position; order[room - 1] is the threshold."""
    above, level = order > threshold, order == threshold
    before = tl.cumsum(level.to(tl.int32), 0) - level.to(tl.int32)
    return above | (level & (before < room - tl.sum(above.to(tl.int32))))


@triton.jit
def _select_kernel(
    score_ptr,  # [B, H, nQ, n] float32 contiguous
    similar_q_ptr,  # [B, nQ, H] bytes by strides, or None
    similar_k_ptr,  # [B, n, H_kv] bytes by strides, or None
    table_ptr,  # [T], or None: every block is present
    offset_ptr,  # [T]
    code_ptr,  # [B, H, nQ, n] int8 contiguous, or None
    list_ptr,  # [B, H, nQ, n] int32 contiguous, or None: selected blocks, those of offset 0 first
    bounds_ptr,  # [B, H, nQ, PARTS + 3]: where the list of each offset starts, where the last one
    # ends (in list_ptr, from its first row of this head), blocks present, and marginal
    topk,
    topp,
    negligible,
    n,
    per_slot,
    H,
    H_kv,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_lb,
    stride_ln,
    stride_lh,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    real = columns < n
    row = (b * H + h) * tl.num_programs(0) + i
    score = tl.load(score_ptr + row * n + columns, real, other=float("-inf"))
    gone = ~real
    if table_ptr is not None:
        gone = gone | (tl.load(table_ptr + columns // per_slot, real, other=-1) < 0)
    outside = columns < 0
    if similar_k_ptr is not None:  # badly pooled: out of the ranking, always in
        at = similar_k_ptr + b * stride_lb + columns * stride_ln + h // (H // H_kv) * stride_lh
        outside = tl.load(at, real, other=1) == 0
    score = tl.where(gone | outside, float("-inf"), score)

    # Integers in the order of the scores: NaN first, zeros equal
    score = tl.where(score == score, tl.where(score == 0.0, 0.0, score), float("nan"))
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    present = tl.sum((~gone).to(tl.int32))
    room = present
    if negligible is not None:
        room = present - tl.floor(present.to(tl.float32) * negligible).to(tl.int32)
    p, limit = tl.zeros((COLUMNS,), tl.float32), 0.0
    if topp is not None:
        p = tl.where(real, tl.exp2((score - tl.max(score, 0)) * LOG2_E), 0.0)
        limit = tl.sum(p) * topp
        p = tl.where(limit == limit, p, 0.0)  # no softmax: every threshold is out of reach
        limit = tl.where(limit == limit, limit, 0.0)

    # Thresholds, four bits at a time from the highest
    top = tl.full((), LOWEST, tl.int32)
    low, near = top, top
    digits = tl.arange(0, 16)
    for step in range(8):
        step_bits = digits << (28 - 4 * step)
        reached = tl.sum((order[:, None] >= (top ^ step_bits)[None, :]).to(tl.int32), 0) >= topk
        top ^= (tl.sum(reached.to(tl.int32)) - 1) << (28 - 4 * step)
        if topp is not None:
            mass = tl.sum(
                tl.where(order[:, None] >= (near ^ step_bits)[None, :], p[:, None], 0.0), 0
            )
            near ^= (tl.sum((mass >= limit).to(tl.int32)) - 1) << (28 - 4 * step)
        if negligible is not None:
            reached = tl.sum((order[:, None] >= (low ^ step_bits)[None, :]).to(tl.int32), 0) >= room
            low ^= (tl.sum(reached.to(tl.int32)) - 1) << (28 - 4 * step)

    # Selected, marginal, negligible
    selected = _ahead(order, top, topk) | outside
    if topp is not None:
        level = order == near
        before = (tl.cumsum(level.to(tl.int32), 0) - 1).to(tl.float32)
        mass = tl.sum(tl.where(order > near, p, 0.0)) + before * p
        inside = (order > near) | (level & (mass < limit))
        selected = selected | inside
    if similar_q_ptr is not None:
        alike = tl.load(similar_q_ptr + b * stride_gb + i * stride_gn + h * stride_gh)
        selected = selected | (columns < tl.where(alike == 0, n, 0))
    selected = selected & ~gone
    marginal = _ahead(order, low, room) & ~selected & ~gone
    if code_ptr is not None:
        code = tl.where(selected, SELECTED, tl.where(marginal, MARGINAL, NEGLIGIBLE))
        code = tl.where(gone, 0, code).to(tl.int8)
        tl.store(code_ptr + row * n + columns, code, real)

    # The list, offset by offset, ascending in each
    bounds_ptr += row * (PARTS + 3)
    start = i * n
    tl.store(bounds_ptr, start)
    for part in tl.static_range(PARTS):
        mine = selected
        if PARTS > 1:
            mine = mine & (tl.load(offset_ptr + columns // per_slot, real, other=-1) == part)
        if list_ptr is not None:
            place = (b * H + h) * tl.num_programs(0) * n + start
            place = place + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(list_ptr + place, columns, mine)
        start += tl.sum(mine.to(tl.int32))
        tl.store(bounds_ptr + part + 1, start)
    tl.store(bounds_ptr + PARTS + 1, present)
    tl.store(bounds_ptr + PARTS + 2, tl.sum(marginal.to(tl.int32)))


@triton.jit
def _compress_kernel(
    code_ptr,  # [B * H, rows, n] int8, by strides
    count_ptr,  # [B * H, rows] int32 of that code, by strides: count_ptr[...] - before_ptr[...]
    before_ptr,  # the same strides, or None: zeros
    indptr_ptr,  # [B * H, rows + 1] contiguous
    indices_ptr,  # [B * H, rows * capacity] contiguous
    n,
    capacity,
    stride_xb,
    stride_xm,
    stride_xn,
    stride_cb,
    stride_cm,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0)

    # Where this row starts and where all of them end
    m = tl.arange(0, ROWS)
    at = bh * stride_cb + m * stride_cm
    count = tl.load(count_ptr + at, m < rows, other=0)
    if before_ptr is not None:
        count -= tl.load(before_ptr + at, m < rows, other=0)
    start, end = tl.sum(tl.where(m < i, count, 0)), tl.sum(count)
    indptr_ptr += bh * (rows + 1)
    tl.store(indptr_ptr + i + 1, start + tl.sum(tl.where(m == i, count, 0)))
    tl.store(indptr_ptr, 0, i == 0)

    # Its blocks, ascending; beyond the last row of all, this row's share of -1
    columns = tl.arange(0, COLUMNS)
    place = bh * stride_xb + i.to(tl.int64) * stride_xm + columns * stride_xn
    mine = tl.load(code_ptr + place, columns < n, other=0) == CODE
    indices_ptr += bh * rows * capacity
    to = start + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(indices_ptr + to, columns, mine & (to < rows * capacity))
    slot = i * capacity + columns
    tl.store(
        indices_ptr + slot, tl.full((COLUMNS,), -1, tl.int32), (columns < capacity) & (slot >= end)
    )


@triton.jit
def _expand_kernel(
    indptr_ptr,  # [B, H, rows + 1] by strides
    indices_ptr,  # [B, H, room] by strides
    code_ptr,  # [B, H, rows, n] int8 contiguous, zeros
    H,
    n,
    stride_pb,
    stride_ph,
    stride_pn,
    stride_ib,
    stride_ih,
    stride_in,
    BLOCK: tl.constexpr,
):
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    indptr_ptr += b * stride_pb + h * stride_ph
    begin, end = tl.load(indptr_ptr + i * stride_pn), tl.load(indptr_ptr + (i + 1) * stride_pn)
    code_ptr += ((b * H + h) * tl.num_programs(0) + i) * n
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        at = indices_ptr + b * stride_ib + h * stride_ih + entry * stride_in
        column = tl.load(at, entry < end, other=0)
        tl.store(code_ptr + column, tl.full((BLOCK,), SELECTED, tl.int8), entry < end)


# --- Launchers ----------------------------------------------------------------------------------


def pool(
    x: Tensor, size: int, similarity: float = -1.0, *, mean: bool = True, low: bool = False
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """x [O, B, S, H, D] -> mean [O, B, n, H, D]; similar [O, B, n, H]; x in INT8, and its scale.

    The INT8 query is a workspace: encoded here, where nothing else needs registers.
    """
    O, B, S, H, D = x.shape  # noqa: E741
    n, apart = -(-S // size), low and size % 64 != 0
    pooled = x.new_empty((O, B, n, H, D), dtype=torch.float32) if mean else None
    guarded = mean and similarity > -1
    similar = x.new_empty((O, B, n, H), dtype=torch.uint8) if guarded else None
    encoded = x_low = scale = None
    if low and not apart:
        x_low = x.new_empty(x.shape, dtype=torch.int8)
        scale = x.new_empty((O, B, -(-S // 64), H), dtype=torch.float32)
        encoded = (x_low, scale)
    launch(
        _pool_kernel,
        (n, H, O * B),
        *(x, pooled, similar, x_low, scale, similarity, B, S, H, *x.stride()[:4]),
        SIZE=size,
        D=D,
        BLOCK_S=64 if size % 64 == 0 else min(64, triton.next_power_of_2(size)),
        BLOCK_D=width(D),
        num_warps=8 if low else 4,
    )
    return pooled, similar, pool(x, 64, mean=False, low=True)[2] if apart else encoded


class Choice:
    """What was selected for each query block, in the forms that kernels read."""

    def __init__(self, like: Tensor, shape: tuple[int, int, int, int], parts: int) -> None:
        B, H, rows, n = shape
        self.shape, self.parts = shape, parts
        self.code: Tensor | None = like.new_empty(shape, dtype=torch.int8)
        self.blocks: Tensor | None = like.new_empty(shape, dtype=torch.int32)
        self.bounds = like.new_empty((B, H, rows, parts + 3), dtype=torch.int32)


def choose(
    pooled_q: Tensor,  # [O, B, nQ, H, D]
    pooled_k: Tensor,  # [B, slots, per_slot, H_kv, D]
    similar_q: Tensor | None,
    similar_k: Tensor | None,
    segments: tuple[Tensor, Tensor] | None,
    topk: int | None,
    topp: float | None,
    negligible: float | None,
    sm_scale: float,
    parts: int = 1,
    want: str = "code list",
) -> Choice:
    O, B, rows, H, D = pooled_q.shape  # noqa: E741
    per_slot, H_kv = pooled_k.shape[2:4]
    table, offset = (None, None) if segments is None else segments
    count = 1 if table is None else table.shape[0]
    n = count * per_slot
    score = pooled_q.new_empty((B, H, rows, n), dtype=torch.float32)
    BLOCK_M, BLOCK_N = 16, 64
    launch(
        _score_kernel,
        (count * triton.cdiv(per_slot, BLOCK_N), triton.cdiv(rows, BLOCK_M), B * H),
        *(pooled_q, pooled_k, table, offset, score, sm_scale, rows, per_slot, count, H, H_kv),
        *(*pooled_q.stride()[:4], *pooled_k.stride()[:4]),
        D=D,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=32,
    )
    choice = Choice(score, (B, H, rows, n), parts)
    choice.code = choice.code if "code" in want else None
    choice.blocks = choice.blocks if "list" in want else None
    COLUMNS = triton.next_power_of_2(n)
    guards = [(0, 0, 0) if x is None else x.stride() for x in (similar_q, similar_k)]
    launch(
        _select_kernel,
        (rows, H, B),
        *(score, similar_q, similar_k, table, offset, choice.code, choice.blocks, choice.bounds),
        *(topk or 1, topp, negligible, n, per_slot, H, H_kv, *guards[0], *guards[1]),
        PARTS=parts,
        COLUMNS=COLUMNS,
        num_warps=min(max(COLUMNS // 128, 1), 16),  # 128 columns x 16 guesses per warp
    )
    return choice


def compress(
    code: Tensor, count: Tensor, before: Tensor | None, kind: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Blocks of one code [B, H, rows, n], counted [B, H, rows] -> indptr, indices."""
    B, H, rows, n = code.shape
    indptr = code.new_empty((B, H, rows + 1), dtype=torch.int32)
    indices = code.new_empty((B, H, rows * capacity), dtype=torch.int32)
    if not rows:
        indptr.zero_()
    launch(
        _compress_kernel,
        (rows, B * H),
        *(code, count, before, indptr, indices, n, capacity, *code.stride()[1:]),
        *count.stride()[1:],
        CODE=kind,
        ROWS=triton.next_power_of_2(max(rows, 1)),
        COLUMNS=triton.next_power_of_2(n),
    )
    return indptr, indices


def expand(indptr: Tensor, indices: Tensor, n: int) -> Tensor:
    """Codes [B, H, rows, n]: 1 where a block is listed, 0 elsewhere."""
    B, H, rows = indptr.shape[0], indptr.shape[1], indptr.shape[2] - 1
    code = indptr.new_zeros((B, H, rows, n), dtype=torch.int8)
    launch(
        _expand_kernel,
        (rows, H, B),
        *(indptr, indices, code, H, n, *indptr.stride(), *indices.stride()),
        BLOCK=128,
    )
    return code
