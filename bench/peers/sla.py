# SPDX-License-Identifier: Apache-2.0
"""Attention over lists of blocks, its mask, its linear branch, and all three.

Lists that our kernel is given are given to a peer in its own format; where ours makes them in the
call, so does it.  Its layout is its own choice, made beforehand, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from reeltime.bench.case import Inputs
from reeltime.bench.peers.adapter import Adapter, compiled
from reeltime.bench.peers.attention import heads_first
from reeltime.sla import BLOCK_K, BLOCK_Q
from reeltime.sla.reference import expand

BF16 = "bf16"
EPS = 1e-5
SMALL = 64  # tokens on either side of a block of fastvideo's


def blocks(length: int, size: int) -> int:
    return -(-length // size)


def listed(inputs: Inputs) -> Tensor:
    """[B, H, nQ, nK] bool."""
    csr = inputs["csr"]
    return expand(csr.indptr, csr.indices, blocks(inputs["k"].shape[1], BLOCK_K))


def in_front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, how many are set, and the indices of all with those that are set in front."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.int()


# --- FlexAttention ------------------------------------------------------------------------------


def block_mask_of(mask: Tensor, lengths: tuple[int, int]) -> BlockMask:
    """Every listed block is full; how far the keys go, the kernel knows."""
    count, order = in_front(mask)

    def member(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[b, h, q // BLOCK_Q, k // BLOCK_K]

    # What the forward pass does not read is left out: it would cost a transposition of the mask.
    backward: Any = dict.fromkeys(
        ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    )
    return BlockMask(
        seq_lengths=lengths, kv_num_blocks=torch.zeros_like(count), kv_indices=order,
        full_kv_num_blocks=count, full_kv_indices=order, BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
        mask_mod=member, **backward,
    )  # fmt: skip


@compiled
def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
    return flex_attention(q, k, v, block_mask=mask)


def for_flex(inputs: Inputs) -> Inputs:
    lengths = inputs["q"].shape[1], inputs["k"].shape[1]
    held = heads_first({name: inputs[name] for name in "qkv"})
    return held | {"mask": block_mask_of(listed(inputs), lengths)}


def flex_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return flex(q, k, v, mask).transpose(1, 2)


# --- fastvideo ----------------------------------------------------------------------------------


def for_fastvideo(inputs: Inputs) -> Inputs:
    """[B, H, S, D] padded to blocks of 64 x 64, so that each of our rows of blocks is two."""

    def padded(x: Tensor) -> Tensor:
        return F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % SMALL)).contiguous()

    rows, length = blocks(inputs["q"].shape[1], SMALL), inputs["k"].shape[1]
    count, order = in_front(listed(inputs).repeat_interleave(BLOCK_Q // SMALL, 2)[:, :, :rows])
    starts = torch.arange(0, length, SMALL, dtype=torch.int32, device=order.device)
    return {name: padded(inputs[name]) for name in "qkv"} | {
        "index": order.contiguous(),
        "count": count,
        "sizes": (length - starts).clamp(max=SMALL),
        "tokens": inputs["q"].shape[1],
    }


def fastvideo(kind: str) -> Any:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, sizes: Tensor, tokens: int
    ) -> Tensor:
        # The package has a function of the same name.
        module = import_module("fastvideo_kernel.block_sparse_attn")
        op = getattr(module, f"block_sparse_attn_{kind}")
        return op(q, k, v, index, count, sizes)[0][:, :, :tokens].transpose(1, 2)

    return attend


# --- FlashInfer ---------------------------------------------------------------------------------


def for_flashinfer(inputs: Inputs) -> Inputs:
    """Planned beforehand, as lists are: it reads them on the host."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    mask, q, k = listed(inputs)[0], inputs["q"], inputs["k"]
    space = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = VariableBlockSparseAttentionWrapper(space)

    def sizes(length: int, size: int) -> Tensor:
        starts = torch.arange(0, length, size, dtype=torch.int32, device=q.device)
        return (length - starts).clamp(max=size).expand(mask.shape[0], -1).contiguous()

    wrapper.plan(
        block_mask_map=mask,
        block_row_sz=sizes(q.shape[1], BLOCK_Q),
        block_col_sz=sizes(k.shape[1], BLOCK_K),
        num_qo_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        q_data_type=q.dtype,
    )
    held = {name: inputs[name][0].transpose(0, 1).contiguous() for name in "qkv"}
    return held | {"wrapper": wrapper}


def flashinfer(q: Tensor, k: Tensor, v: Tensor, wrapper: Any) -> Tensor:
    return wrapper.run(q, k, v).transpose(0, 1)[None]


# --- Mask and linear branch ---------------------------------------------------------------------


def top(pooled_q: Tensor, pooled_k: Tensor, count: int) -> Tensor:
    """The blocks of each row with the highest scores, [B, H, nQ, count], ascending."""
    score = torch.einsum("bqhd,bkhd->bhqk", pooled_q.float(), pooled_k.float())
    return score.topk(count, dim=-1).indices.sort(-1).values.int()


def lists(pooled_q: Tensor, pooled_k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    index = top(pooled_q, pooled_k, count)
    first = torch.arange(index.shape[2] + 1, dtype=torch.int32, device=index.device) * count
    return first.expand(*index.shape[:2], -1).contiguous(), index.flatten(2)


def pooled(x: Tensor, size: int) -> Tensor:
    """[B, S, H, D] -> the mean of each block."""
    length = x.shape[1]
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, -length % size))
    held = torch.full((padded.shape[1] // size,), size, device=x.device)
    held[-1] = length - size * (held.shape[0] - 1)
    return padded.unflatten(1, (-1, size)).sum(2) / held[:, None, None]


def selection(q: Tensor, k: Tensor, count: int) -> Tensor:
    """[B, H, nQ, nK] bool."""
    index = top(pooled(q, BLOCK_Q), pooled(k, BLOCK_K), count).long()
    mask = index.new_zeros((*index.shape[:3], blocks(k.shape[1], BLOCK_K)), dtype=torch.bool)
    return mask.scatter(-1, index, True)


def linear(q: Tensor, h: Tensor, z: Tensor) -> Tensor:
    """phi(q) H / (phi(q) Z + eps) with H [B, H, D, D] and Z [B, H, D] of all keys."""
    features = q.float().softmax(-1)
    above = torch.einsum("bqhd,bhde->bqhe", features.to(q.dtype), h.to(q.dtype))
    below = torch.einsum("bqhd,bhd->bqh", features, z.float()) + EPS
    return above / below.unsqueeze(-1)


def of_summaries(q: Tensor, h: Tensor, z: Tensor) -> Tensor:
    return linear(q, h.sum(1), z.sum(1)).to(q.dtype)


def both(
    sparse: Tensor, q: Tensor, k: Tensor, v: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """The projected linear branch added to the sparse one."""
    features = k.float().softmax(-1)
    h = torch.einsum("bkhd,bkhe->bhde", features.to(k.dtype), v)
    rest = linear(q, h, features.sum(1)).to(q.dtype)
    return sparse.transpose(1, 2) + F.linear(rest, proj_weight, proj_bias)


# --- All of them --------------------------------------------------------------------------------


def mask_adapters(count: int) -> Iterator[Adapter]:
    @compiled
    def chosen(pooled_q: Tensor, pooled_k: Tensor) -> tuple[Tensor, Tensor]:
        return lists(pooled_q, pooled_k, count)

    yield Adapter("torch", "torch.topk, compiled", chosen)


def sparse_adapters() -> Iterator[Adapter]:
    yield Adapter("torch", "torch flex_attention, compiled", flex_blocks, BF16, for_flex)
    for kind in ("sm90", "triton"):
        name = f"block_sparse_attn_{kind}"
        yield Adapter("fastvideo-kernel", name, fastvideo(kind), BF16, for_fastvideo)
    yield Adapter("flashinfer-python", "block-sparse", flashinfer, BF16, for_flashinfer)


def linear_adapters() -> Iterator[Adapter]:
    yield Adapter("torch", "torch products, compiled", compiled(of_summaries))


def sla_adapters(count: int) -> Iterator[Adapter]:
    """Three compiled parts: dynamo takes no mask that was made inside of what it compiles."""

    @compiled
    def chosen(q: Tensor, k: Tensor) -> Tensor:
        return selection(q, k, count)

    rest = compiled(both)
    attend = compiled(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
        mask = block_mask_of(chosen(q, k), (q.shape[1], k.shape[1]))
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return rest(attend(*heads, block_mask=mask), q, k, v, proj_weight, proj_bias)

    yield Adapter("torch", "torch top-k, flex_attention, linear branch, compiled", call, BF16)
