# SPDX-License-Identifier: Apache-2.0
"""Triton, the summaries of rope_kv: h = phi(K)^T V and z of 64 tokens, and their sums over a slot.

The product runs on tensor cores, phi and values wider than bfloat16 each as the sum of two
bfloat16.

For a cache with summaries of slots, blocks leave theirs in a workspace, and a program of
`_slots_kernel` adds one piece of them up, block after block: programs that made the sum of a head
as they went through a frame's keys would be too few to fill a GPU.
Floor: 4 (nb + 1) D (D + 1) bytes per frame and head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reeltime.jit.launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def phi_tile(x, held, PHI: tl.constexpr):
    """The feature map of keys [64, BLOCK_D]; 0 outside."""
    if PHI == "softmax":
        x = tl.where(held, x, float("-inf"))
        top = tl.max(x, axis=1, keep_dims=True)
        y = tl.exp2((x - tl.where(top == float("-inf"), 0.0, top)) * LOG2_E)
        y /= tl.sum(y, axis=1, keep_dims=True)
    elif PHI == "elu":
        y = tl.where(x <= 0.0, tl.exp2(x * LOG2_E), x + 1.0)
    else:
        y = tl.where(x <= 0.0, 0.0, x)
    return tl.where(held, y, 0.0)


@triton.jit
def terms(x):
    """x as the sum of two bfloat16, to 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(high, low, v):
    """phi(K)^T V in float32, from the terms of phi [64, D] and v [64, E]."""
    high, low = tl.trans(high), tl.trans(low)
    if v.dtype == tl.bfloat16:
        h = tl.dot(high, v, tl.dot(low, v))
    else:
        v, rest = terms(v)
        h = tl.dot(high, rest, tl.dot(low, rest))
        h = tl.dot(high, v, tl.dot(low, v, h))
    return h


@triton.jit
def _add_blocks(
    x_ptr, out_ptr, frame, to, piece, nb, WIDTH, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """out[to] = the sum of x[frame], [nb, WIDTH], over its blocks in their order."""
    lanes = piece * BLOCK + tl.arange(0, BLOCK)
    x_ptr += frame * nb * WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, nb, GROUP):
        blocks = start + tl.arange(0, GROUP)
        held = (blocks < nb)[:, None] & (lanes < WIDTH)[None, :]
        place = blocks.to(tl.int64)[:, None] * WIDTH + lanes[None, :]
        total += tl.sum(tl.load(x_ptr + place, held, other=0.0), 0)
    tl.store(out_ptr + to * WIDTH + lanes, total, lanes < WIDTH)


@triton.jit
def _slots_kernel(
    h_ptr,  # [B, F, nb, H, D, D]
    z_ptr,  # [B, F, nb, H, D]
    slots_ptr,  # [F] int64
    slot_h_ptr,  # [B, slots, 1, H, D, D]
    slot_z_ptr,  # [B, slots, 1, H, D]
    F, nb, slots, stride_s,
    H_WIDTH,  # H * D * D
    Z_WIDTH,  # H * D
    GROUP: tl.constexpr,  # blocks whose loads are on their way together
    BLOCK: tl.constexpr,
):  # fmt: skip
    # A program owns BLOCK elements of a frame's h, or of its z
    piece, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, f = frame // F, frame % F
    slot = tl.load(slots_ptr + f * stride_s)
    if (slot < 0) | (slot >= slots):
        return
    to, pieces = b * slots + slot, tl.cdiv(H_WIDTH, BLOCK)
    if piece < pieces:
        _add_blocks(h_ptr, slot_h_ptr, frame, to, piece, nb, H_WIDTH, GROUP, BLOCK)
    else:
        _add_blocks(z_ptr, slot_z_ptr, frame, to, piece - pieces, nb, Z_WIDTH, GROUP, BLOCK)


# --- Launcher -----------------------------------------------------------------------------------


def add_blocks(h: Tensor, z: Tensor, slots: Tensor, slot_h: Tensor, slot_z: Tensor) -> None:
    """h [B, F, nb, H, D, D] and z, of blocks, into the slots of a cache."""
    B, F, nb, H, D = z.shape
    widths, piece = (H * D * D, H * D), 512
    launch(
        _slots_kernel,
        (sum(triton.cdiv(width, piece) for width in widths), B * F),
        *(h, z, slots, slot_h, slot_z, F, nb, slot_h.shape[1], slots.stride(0), *widths),
        GROUP=8,
        BLOCK=piece,
    )
