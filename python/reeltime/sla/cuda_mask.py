# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of sla's mask: csrc/sla/pool.h, csrc/sla/mask.h.

pool(q, 128, low=True)                           means of blocks, and the INT8 query, in one read
choose(pooled_q, pooled_k, ..., want="list")     scores and selection, in one launch
compress(choice, capacity)                       codes -> CSR of selected and marginal blocks
expand(indptr, indices, n)                       CSR -> codes

Key blocks are numbered through the segments: block j is block j % per_slot of slot j // per_slot.
Codes are 0 absent, 1 selected, 2 marginal, 3 negligible.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reeltime.attention.cuda import Lists, encode_query
from reeltime.native import code, dense, launch, strides
from reeltime.rope_kv.reference import BLOCK

ROWS_IN_SHARED = 2048  # kMostShared of csrc/sla/mask.h
MOST_BLOCKS = 2**20  # of keys, of which sums of probabilities are exact
WIDEST = 256  # channels of a head


def unfit(rows: int, n: int, dim: int) -> str | None:
    """Which masks no kernel makes: of `rows` query blocks and n key blocks of `dim` channels."""
    if dim > WIDEST:
        return f"its kernels take head dimensions up to {WIDEST}, not {dim}"
    if n >= MOST_BLOCKS or rows * n >= 2**31:
        return f"its kernels count blocks in 32 bits, too few for {rows} x {n}"
    return None


class Pooled(NamedTuple):
    """[O, B, S, H, D] by blocks of tokens."""

    mean: Tensor  # [O, B, n, H, D] float32
    similar: Tensor | None  # [O, B, n, H] uint8: 0 where a block's tokens are unlike each other
    low: tuple[Tensor, Tensor] | None  # [O, B, S, H, D] int8, [O, B, ceil(S / 64), H] float32


def pool(x: Tensor, size: int, similarity: float = -1.0, *, low: bool = False) -> Pooled:
    """Mean of each block of `size` tokens of x [O, B, S, H, D], D a multiple of 16 up to 256;
    with similarity > -1 which blocks have a mean cosine above it; `low`: x in attention's INT8."""
    O, B, S, H, D = x.shape  # noqa: E741
    x, n, apart = dense(x), -(-S // size), low and size % BLOCK != 0
    mean = x.new_empty((O, B, n, H, D), dtype=torch.float32)
    similar = x.new_empty((O, B, n, H), dtype=torch.uint8) if similarity > -1 else None
    encoded = None
    if apart:
        codes, scale = encode_query(x.flatten(0, 1))
        encoded = codes.view(x.shape), scale.unflatten(0, (O, B))
    elif low:
        encoded = (
            x.new_empty(x.shape, dtype=torch.int8),
            x.new_empty((O, B, -(-S // BLOCK), H), dtype=torch.float32),
        )
    launch(
        "pool_blocks",
        x.device,
        x=x,
        mean=mean,
        similar=similar,
        code=None if encoded is None or apart else encoded[0],
        scale=None if encoded is None or apart else encoded[1],
        **{"O": O, "B": B, "S": S, "H": H, "D": D},
        block=size,
        **strides("x", x, "obsh"),
        similarity=similarity,
        dtype=code(x.dtype),
    )
    return Pooled(mean, similar, encoded)


class Choice(NamedTuple):
    """What was selected for each query block, in the forms that were wanted."""

    lists: Lists | None  # bounds [B, H, rows, 2]; blocks [B, H, rows * capacity], row i's at i * c.
    code: Tensor | None  # [B, H, rows, n] int8
    counts: Tensor | None  # [2, B, H, rows] int32: selected, marginal


def choose(
    pooled_q: Tensor,  # [O, B, rows, H, D] of 16 or 32 bits
    pooled_k: Tensor,  # [B, slots, per_slot, H_kv, D] of 16 or 32 bits
    similar_q: Tensor | None,  # [B, rows, H] uint8
    similar_k: Tensor | None,  # [B, n, H_kv] uint8
    segments: tuple[Tensor, Tensor] | None,  # table and offset_index, [T] int64 contiguous
    topk: int | None,
    topp: float | None,
    negligible: float | None,
    sm_scale: float,
    *,
    want: str = "list",  # of "list", "code" and "counts"
) -> Choice:
    """Which of the n = T * per_slot key blocks each query block attends to; unfit() says what it
    cannot take.  "list" is what attention reads."""
    queries, keys = dense(pooled_q), dense(pooled_k)
    O, B, rows, H, D = queries.shape  # noqa: E741
    per_slot, H_kv = keys.shape[2:4]
    table, offset_index = (None, None) if segments is None else segments
    T = 1 if table is None else table.shape[0]
    n = T * per_slot
    bounded = topp is None and similar_q is None and similar_k is None and topk is not None
    capacity = min(topk, n) if bounded and topk is not None else n

    def integers(*shape: int) -> Tensor:
        return queries.new_empty(shape, dtype=torch.int32)

    lists = None
    if "list" in want:
        lists = Lists(integers(B, H, rows, 2), integers(B, H, rows * capacity))
    codes = queries.new_empty((B, H, rows, n), dtype=torch.int8) if "code" in want else None
    counts = integers(2, B, H, rows) if "counts" in want else None
    launch(
        "choose_blocks",
        queries.device,
        q=queries,
        k=keys,
        similar_q=similar_q,
        similar_k=similar_k,
        table=table,
        offset_index=offset_index,
        keys=None if n <= ROWS_IN_SHARED else integers(B, H, rows, n),
        code=codes,
        bounds=None if lists is None else lists.bounds,
        blocks=None if lists is None else lists.blocks,
        count=counts,
        **{"O": O, "B": B, "rows": rows, "H": H, "H_kv": H_kv, "D": D, "T": T},
        per_slot=per_slot,
        capacity=capacity,
        topk=1 if topk is None else topk,
        topp=0.0 if topp is None else topp,
        negligible=negligible or 0.0,
        sm_scale=sm_scale,
        **strides("q", queries, "obnh"),
        **strides("k", keys, "bsnh"),
        **strides("g", similar_q, "bnh"),
        **strides("l", similar_k, "bnh"),
        q_dtype=code(queries.dtype),
        k_dtype=code(keys.dtype),
    )
    return Choice(lists, codes, counts)


def compress(choice: Choice, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indptr and indices of the selected blocks, `capacity` of a row at most, and of the marginal
    ones; of a choice with code and counts."""
    codes, counts = choice.code, choice.counts
    assert codes is not None
    assert counts is not None
    B, H, rows, n = codes.shape

    def integers(size: int) -> Tensor:
        return codes.new_empty((B, H, size), dtype=torch.int32)

    out = integers(rows + 1), integers(rows * capacity), integers(rows + 1), integers(rows * n)
    if not rows:  # nobody writes them
        out[0].zero_()
        out[2].zero_()
    launch(
        "compress_codes",
        codes.device,
        code=codes,
        count=counts,
        selected_indptr=out[0],
        selected_indices=out[1],
        marginal_indptr=out[2],
        marginal_indices=out[3],
        heads=B * H,
        rows=rows,
        n=n,
        capacity=capacity,
    )
    return out


def expand(indptr: Tensor, indices: Tensor, n: int) -> Tensor:
    """Codes [B, H, rows, n]: 1 where a block is listed, 0 elsewhere."""
    B, H, rows = indptr.shape[0], indptr.shape[1], indptr.shape[2] - 1
    codes = indptr.new_empty((B, H, rows, n), dtype=torch.int8)
    launch(
        "expand_lists",
        codes.device,
        indptr=indptr,
        indices=indices,
        code=codes,
        **{"B": B, "H": H},
        rows=rows,
        n=n,
        room=indices.shape[2],
        **strides("p", indptr, "bhn"),
        **strides("i", indices, "bhn"),
    )
    return codes
