# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of sla's linear branch: what of the keys reaches a query block, H and Z.

    _keys_kernel     a program owns some consecutive key blocks of one head, read once: mean, guard,
                     h = phi(K)^T V and z = sum phi(K), per block or summed over all of its own
    _sum_kernel      over="all": a program owns a piece of [D, E] and sums it over every block, or
                     over every slot of a cache that has only their sums
    _cover_kernel    otherwise: include [rows, n] x h [n, D E], a tile per program
    _project_kernel  H W^T: out = (phi H) W^T = phi (H W^T), so that the projection costs E^2 per
                     channel of H instead of E^2 per token, and no second tile of accumulators

h is 4 D E bytes per block, four times an 8-bit key block and its values, so what counts is how
often it is read.  Over all blocks it is read once.  Otherwise every query block needs its own sum,
and the product reads h once for 64 of them; the rows of a GQA group share it.  Z is the same with
E = 1.  total - selected would read no less, for every block is selected by someone, and what it
leaves may be far smaller than both: outlier keys are what is selected, and Inf - Inf is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit.launch import launch, width
from reeltime.sla.triton_mask import (
    LOG2_E,
    Choice,
    choose,
    expand,
    pool,
    tile,
    unit_rows,
)


@triton.jit
def piece(x_ptr, rows, stride, dims, inside, other):
    """Some columns of some rows, float32."""
    place = x_ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(place, inside, other=other).to(tl.float32)


@triton.jit
def phi_rows(x_ptr, rows, stride, held, PHI: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr):
    """What phi needs to know of whole rows [D]: their maximum, and the factor of softmax."""
    top = tl.zeros(rows.shape, tl.float32)
    factor = tl.full(rows.shape, 1.0, tl.float32)
    if PHI == "softmax":
        top = tl.full(rows.shape, float("-inf"), tl.float32)
        sum = tl.zeros(rows.shape, tl.float32)
        for start in range(0, D, SLICE):
            dims = start + tl.arange(0, SLICE)
            inside = held[:, None] & (dims < D)[None, :]
            x = piece(x_ptr, rows, stride, dims, inside, float("-inf"))
            risen = tl.maximum(top, tl.max(x, 1))
            base = tl.where(risen == float("-inf"), 0.0, risen)
            sum = sum * tl.exp2((top - base) * LOG2_E)
            sum += tl.sum(tl.exp2((x - base[:, None]) * LOG2_E), 1)
            top = risen
        top = tl.where(top == float("-inf"), 0.0, top)
        factor = 1.0 / tl.where(sum == 0.0, 1.0, sum)
    return top, factor


@triton.jit
def phi_tile(x, held, top, factor, PHI: tl.constexpr):
    """phi of some columns of the rows that `top` and `factor` are of; 0 where not held."""
    if PHI == "softmax":
        y = tl.exp2((x - top[:, None]) * LOG2_E)
    elif PHI == "elu":
        y = tl.where(x <= 0.0, tl.exp2(x * LOG2_E), x + 1.0)
    else:
        y = tl.where(x <= 0.0, 0.0, x)
    return tl.where(held, y * factor[:, None], 0.0)


@triton.jit
def phi(x, held, PHI: tl.constexpr):
    """The feature map of whole rows x [N, D] float32."""
    top = tl.zeros((x.shape[0],), tl.float32)
    factor = tl.full((x.shape[0],), 1.0, tl.float32)
    if PHI == "softmax":
        x = tl.where(held, x, float("-inf"))
        top = tl.max(x, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        sum = tl.sum(tl.exp2((x - top[:, None]) * LOG2_E), 1)
        factor = 1.0 / tl.where(sum == 0.0, 1.0, sum)
    return phi_tile(x, held, top, factor, PHI)


@triton.jit
def phi_gradient(df, f, x, along, PHI: tl.constexpr):
    """The gradient of x from that of f = phi(x); along [N] is f . df over whole rows."""
    if PHI == "softmax":
        dx = f * (df - along[:, None])
    elif PHI == "elu":
        dx = df * tl.where(x <= 0.0, f, 1.0)
    else:
        dx = tl.where(x <= 0.0, 0.0, df)
    return dx


@triton.jit
def _keys_kernel(
    k_ptr,  # [B, S, H, D]
    v_ptr,  # [B, S, H, E]
    mean_ptr,  # [B, n, H, D] float32 contiguous, or None
    similar_ptr,  # [B, n, H] bytes contiguous, or None
    h_ptr,  # [B, programs, H, D, E] float32 contiguous, or None
    z_ptr,  # [B, programs, H, D] float32 contiguous
    similarity,
    S,
    n,
    H,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    PHI: tl.constexpr,
    SIZE: tl.constexpr,
    OWNED: tl.constexpr,  # key blocks of one program
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    PIECES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E  # programs that share D x E accumulators
    group, head, b = tl.program_id(0) // PIECES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(0) % PIECES * BLOCK_E + tl.arange(0, BLOCK_E)
    here = tl.where(tl.program_id(0) % PIECES == 0, D, 0)  # dims that this program stores alone
    k_ptr += b * stride_kb + head * stride_kh
    v_ptr += b * stride_vb + head * stride_vh
    dims = tl.arange(0, BLOCK_D)
    h = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(group * OWNED, tl.minimum(n, (group + 1) * OWNED)):
        end = tl.minimum(S, (block + 1) * SIZE)
        mean = tl.zeros((BLOCK_D,), tl.float32)
        unit = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, SIZE, BLOCK_N):
            rows = block * SIZE + start + tl.arange(0, BLOCK_N)
            seen = rows < end
            k = tile(k_ptr, rows, stride_ks, seen, D, BLOCK_D).to(tl.float32)
            if mean_ptr is not None:
                mean += tl.sum(k, 0)
            if similar_ptr is not None:
                unit += tl.sum(unit_rows(k), 0)
            if h_ptr is not None:
                v_at = v_ptr + rows.to(tl.int64)[:, None] * stride_vs + channels[None, :]
                v = tl.load(v_at, seen[:, None] & (channels < E)[None, :], other=0.0)
                # Rounded as the product takes it, for z too: the division cancels the rounding
                f = phi(k, seen[:, None] & (dims < D)[None, :], PHI).to(v.dtype)
                h = tl.dot(tl.trans(f), v, h, input_precision="ieee")
                z += tl.sum(f.to(tl.float32), 0)
        at = (b * n + block) * H + head
        count = (end - block * SIZE).to(tl.float32)
        if mean_ptr is not None:
            tl.store(mean_ptr + at * D + dims, mean / count, dims < here)
        if similar_ptr is not None:
            unit = unit / count
            tl.store(similar_ptr + at, (tl.sum(unit * unit) > similarity).to(tl.uint8), here > 0)
    if h_ptr is not None:
        at = ((b * (tl.num_programs(0) // PIECES) + group) * H + head) * D
        held = (dims < D)[:, None] & (channels < E)[None, :]
        tl.store(h_ptr + at * E + dims[:, None] * E + channels[None, :], h, held)
        tl.store(z_ptr + at + dims, z, dims < here)


@triton.jit
def _sum_kernel(
    x_ptr,  # [B, slots, per_slot, H, D, E]
    table_ptr,  # [T] slots, negative: absent; or None: one segment, slot 0
    offset_ptr,  # [T]
    sum_ptr,  # [O, B, H, D, E] float32 contiguous
    B,
    n,  # T * per_slot
    per_slot,
    stride_xb,
    stride_xs,
    stride_xn,
    stride_xh,
    stride_xd,
    stride_xe,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, ob = tl.program_id(1), tl.program_id(2)
    o, b = ob // B, (ob % B).to(tl.int64)
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += b * stride_xb + h * stride_xh
    place = (lanes // E) * stride_xd + (lanes % E) * stride_xe
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, GROUP):
        j = start + tl.arange(0, GROUP)
        mine = j < n
        at = (j % per_slot).to(tl.int64) * stride_xn
        if table_ptr is not None:
            slot = tl.load(table_ptr + j // per_slot, mine, other=-1)
            mine = mine & (slot >= 0)
            mine = mine & (tl.load(offset_ptr + j // per_slot, mine, other=-1) == o)
            at += slot * stride_xs
        held = mine[:, None] & (lanes < D * E)[None, :]
        x = tl.load(x_ptr + at[:, None] + place[None, :], held, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    at = (ob.to(tl.int64) * tl.num_programs(1) + h) * (D * E)
    tl.store(sum_ptr + at + lanes, total, lanes < D * E)


@triton.jit
def _cover_kernel(
    code_ptr,  # [B, H_kv, rows, n] int8: rows of all the query heads of a key head; by strides
    x_ptr,  # [B, slots, per_slot, H_kv, D, E]
    table_ptr,
    offset_ptr,
    sum_ptr,  # [O, B, H_kv, rows, D, E] float32 contiguous
    B,
    H_kv,
    rows,
    n,
    per_slot,
    stride_cb,
    stride_ch,
    stride_cm,
    stride_cn,
    stride_xb,
    stride_xs,
    stride_xn,
    stride_xh,
    stride_xd,
    stride_xe,
    COVERED: tl.constexpr,  # bit c: blocks of code c are summed
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    obh = tl.program_id(2)
    o, b, h = obh // (B * H_kv), (obh // H_kv % B).to(tl.int64), obh % H_kv
    lanes = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += b * stride_xb + h * stride_xh
    place = (lanes // E) * stride_xd + (lanes % E) * stride_xe
    code_ptr += b * stride_cb + h * stride_ch
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        mine = j < n
        at = (j % per_slot).to(tl.int64) * stride_xn
        if table_ptr is not None:
            slot = tl.load(table_ptr + j // per_slot, mine, other=-1)
            mine = mine & (slot >= 0)
            mine = mine & (tl.load(offset_ptr + j // per_slot, mine, other=-1) == o)
            at += slot * stride_xs
        held = (m < rows)[:, None] & mine[None, :]
        code_at = (
            code_ptr + m.to(tl.int64)[:, None] * stride_cm + j.to(tl.int64)[None, :] * stride_cn
        )
        code = tl.load(code_at, held, other=0)
        include = tl.where(held, (COVERED >> code.to(tl.int32)) & 1, 0).to(tl.float32)
        held = mine[:, None] & (lanes < D * E)[None, :]
        x = tl.load(x_ptr + at[:, None] + place[None, :], held, other=0.0).to(tl.float32)
        total = tl.dot(include, x, total, input_precision="ieee")
    at = (obh.to(tl.int64) * rows + m)[:, None] * (D * E) + lanes[None, :]
    tl.store(sum_ptr + at, total, (m < rows)[:, None] & (lanes < D * E)[None, :])


@triton.jit
def _project_kernel(
    x_ptr,  # [R, K] float32 contiguous
    weight_ptr,  # [N, K] by strides
    out_ptr,  # [R, N] float32 contiguous
    R,
    N,
    K,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        held = (m < R)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], held, other=0.0)
        held = (k < K)[:, None] & (n < N)[None, :]
        weight_at = weight_ptr + k[:, None] * stride_wk + n[None, :] * stride_wn
        weight = tl.load(weight_at, held, other=0.0).to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
    held = (m < R)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], total, held)


# --- Launchers ----------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]
# Which codes the linear branch sums: of a Choice, and of lists that were expanded
COVERED = {"unselected": 0b1100, "marginal": 0b0100}
COVERED_LISTS = {"unselected": 0b0001, "marginal": 0b0010}


def key_blocks(
    k: Tensor, v: Tensor, phi: str, size: int, similarity: float, *, owned: int, pooled: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """[B, S, H, D] -> mean [B, n, H, D], similar [B, n, H], h [B, programs, H, D, E], z."""
    B, S, H, D = k.shape
    E, n = v.shape[3], -(-S // size)
    programs = triton.cdiv(n, owned)
    lead = (B, n, H)
    mean = k.new_empty((*lead, D), dtype=torch.float32) if pooled else None
    guarded = pooled and similarity > -1
    similar = k.new_empty(lead, dtype=torch.uint8) if guarded else None
    h = k.new_empty((B, programs, H, D, E), dtype=torch.float32)
    z = k.new_empty((B, programs, H, D), dtype=torch.float32)
    BLOCK_E = min(width(E), 128 if D <= 128 else 64)
    launch(
        _keys_kernel,
        (programs * triton.cdiv(E, BLOCK_E), H, B),
        *(k, v, mean, similar, h, z, similarity, S, n, H, *k.stride()[:3], *v.stride()[:3]),
        PHI=phi,
        SIZE=size,
        OWNED=owned,
        D=D,
        E=E,
        BLOCK_N=min(64 if k.itemsize == 2 else 16, max(16, triton.next_power_of_2(size))),
        BLOCK_D=width(D),
        BLOCK_E=BLOCK_E,
        num_warps=4 if D <= 64 else 16 if k.itemsize == 4 else 8,
    )
    return mean, similar, h, z


def total(x: Tensor, segments: Pair | None, offsets: int) -> Tensor:
    """x [B, slots, per_slot, H, D, E] summed over the blocks of each offset: [O, B, H, 1, D, E]."""
    B, _, per_slot, H, D, E = x.shape
    table, offset = (None, None) if segments is None else segments
    n = per_slot if table is None else table.shape[0] * per_slot
    out = x.new_empty((offsets, B, H, 1, D, E), dtype=torch.float32)
    BLOCK = min(512, triton.next_power_of_2(D * E))
    launch(
        _sum_kernel,
        (triton.cdiv(D * E, BLOCK), H, offsets * B),
        *(x, table, offset, out, B, n, per_slot, *x.stride()),
        D=D,
        E=E,
        GROUP=8,
        BLOCK=BLOCK,
    )
    return out


def cover(code: Tensor, covered: int, x: Tensor, segments: Pair | None, offsets: int) -> Tensor:
    """x summed over the covered blocks of each row of code [B, H, rows, n]: [O, B, H, rows, D, E].

    The result is a workspace: a program per query block would read h again for each of them.
    """
    B, _, per_slot, H_kv, D, E = x.shape
    heads, rows, n = code.shape[1:]
    stacked = code.view(B, H_kv, heads // H_kv * rows, n)
    table, offset = (None, None) if segments is None else segments
    out = x.new_empty((offsets, B, heads, rows, D, E), dtype=torch.float32)
    return product(stacked, covered, x, table, offset, out, offsets)


def product(
    code: Tensor,
    covered: int,
    x: Tensor,
    table: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    offsets: int,
) -> Tensor:
    B, H, rows, n = code.shape
    D, E = x.shape[4:]
    BLOCK_M = min(64, width(rows))
    BLOCK_N = min(128, width(D * E))
    launch(
        _cover_kernel,
        (triton.cdiv(D * E, BLOCK_N), triton.cdiv(rows, BLOCK_M), offsets * B * H),
        *(code, x, table, offset, out, B, H, rows, n, x.shape[2], *code.stride(), *x.stride()),
        COVERED=covered,
        D=D,
        E=E,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=16,
    )
    return out


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] weight^T, weight [N, K]; x contiguous float32."""
    (N, K), R = weight.shape, x.numel() // max(1, x.shape[-1])
    out = x.new_empty((*x.shape[:-1], N))
    BLOCK = min(64, width(N))
    launch(
        _project_kernel,
        (triton.cdiv(R, 64), triton.cdiv(N, BLOCK)),
        *(x, weight, out, R, N, K, *weight.stride()),
        BLOCK_M=64,
        BLOCK_N=BLOCK,
        BLOCK_K=16,
    )
    return out


def reach(
    over: str, choice: Choice, h: Tensor, z: Tensor, segments: Pair | None, offsets: int
) -> Pair:
    """H [O, B, H, rows or 1, D, E] and Z of the linear branch; h [B, slots, n, H, D, E]."""
    z = z.unsqueeze(-1)
    if over == "all":
        return total(h, segments, offsets), total(z, segments, offsets).squeeze(-1)
    assert choice.code is not None
    both = [cover(choice.code, COVERED[over], x, segments, offsets) for x in (h, z)]
    return both[0], both[1].squeeze(-1)


def sums_of(
    h: Tensor, z: Tensor, indptr: Tensor | None, indices: Tensor | None, over: str
) -> tuple[Tensor, Tensor]:
    """H [1, B, H, rows or 1, D, E] and Z of the summaries h [B, n, H_kv, D, E] and z."""
    parts = (h.unsqueeze(1), z.unsqueeze(1).unsqueeze(-1))
    if indptr is None or indices is None:
        sums = [total(x, None, 1) for x in parts]
    else:
        code = expand(indptr, indices, h.shape[1])
        sums = [cover(code, COVERED_LISTS[over], x, None, 1) for x in parts]
    return sums[0], sums[1].squeeze(-1)


# Key blocks of one program where only their sum is wanted: 1 / 16 of the workspace, and still as
# many programs as a GPU has places for at a window of 20 frames
OWNED = 16


def parts_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_weight: Tensor | None,
    topk: int | None,
    topp: float | None,
    negligible: float,
    over: str,
    similarity: float,
    block_q: int,
    block_k: int,
    phi: str,
    sm_scale: float,
    want: str = "list",
) -> tuple[Choice, Tensor, Tensor, Tensor]:
    """What is selected; H, projected, and Z; and H as it was before."""
    pooled_q, similar_q, _ = pool(q.unsqueeze(0), block_q, similarity)
    owned = OWNED if over == "all" else 1
    if over == "all" and k.shape[1] <= block_k * OWNED:
        owned = 1
    pooled_k, similar_k, h, z = key_blocks(k, v, phi, block_k, similarity, owned=owned, pooled=True)
    assert pooled_q is not None
    assert pooled_k is not None
    similar = None if similar_q is None else similar_q[0], similar_k
    lowest = negligible if over == "marginal" else None
    choice = choose(
        *(pooled_q, pooled_k.unsqueeze(1), *similar, None),
        *(topk, topp, lowest, sm_scale),
        want=want if over == "all" else "code list",
    )
    raw, z = reach(over, choice, h.unsqueeze(1), z.unsqueeze(1), None, 1)
    return choice, raw if proj_weight is None else project(raw, proj_weight), z, raw
