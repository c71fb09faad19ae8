# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of attention in 8 bits: csrc/attention."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reeltime import native
from reeltime.attention import api
from reeltime.attention.reference import STORED
from reeltime.native import code, code_of, dense, launch, strides, unless
from reeltime.rope_kv.reference import BLOCK

SUM_ROWS = 1024  # kSumRows of csrc/attention/encode.h
SMOOTH = (None, "block", "sequence")  # enum class Smooth
MOST = 65535  # blocks of a grid in any direction but the first
QUERIES = 128  # of a block of threads

# What splitting over keys costs, in blocks of 64 keys: what a block of threads does besides them,
# and the kernel that combines the splits.
START, COMBINE, MOST_SPLITS = 4, 12, 16


def unfit_dims(*dims: int) -> str | None:
    """Which head dimensions no kernel takes."""
    if all(dim % 16 == 0 and 0 < dim <= 256 for dim in dims):
        return None
    return (
        "its kernels take head dimensions that are multiples of 16 up to 256, not "
        f"{' and '.join(map(str, dict.fromkeys(dims)))}, which backend='triton' has"
    )


def unfit(q: Tensor, v: Tensor) -> str | None:
    """Which sizes no kernel takes."""
    why = unfit_dims(q.shape[-1], v.shape[-1])
    if why is None and max(q.shape[-4], q.shape[-2]) > MOST:
        why = f"its kernels take up to {MOST} batches and heads; backend='triton' takes more"
    return why


def blocks_per_processor(device: torch.device, channels: int) -> int:
    """How many blocks of threads of the attention kernel run on one SM at once."""
    hopper = device.type != "cpu" and native.arch_of(device).capability[0] == 9
    return 1 if hopper or channels > 128 else 2


@functools.lru_cache
def splits_of(tiles: int, steps: int, slots: int) -> int:
    """Into how many parts to split `steps` blocks of keys, for the fewest of them end to end.

    tiles: blocks of threads of one split.  slots: how many run at once.
    """

    def cost(splits: int) -> int:
        waves = -(-tiles * splits // slots)
        return waves * (-(-steps // splits) + START) + (COMBINE if splits > 1 else 0)

    return min(range(1, max(1, min(MOST_SPLITS, steps // START)) + 1), key=cost)


def lacks_products(q: Tensor, v: Tensor, mask: Tensor | None, smooth: str | None) -> str | None:
    """Why q and k in e4m3 have no kernel on this GPU; the emulator has products of every type."""
    arch = native.arch_of(q.device)
    product = "QMMA" if q.device.type == "cpu" else arch.tensor_core.get("fp8")
    if product is None:
        return "its kernels of qk='fp8' need sm89 or newer; here backend='reference' has it"
    if product == "QMMA":
        return None
    if product != "QGMMA":
        return f"its kernels have no products of e4m3 on {arch.name}; backend='triton' has qk='fp8'"
    # The rule of attention_sm90_serves in csrc/attention/sm90.cu; there is nothing to fall back to
    dims = q.shape[-1], v.shape[-1]
    apart = any(at % 8 for at in (q.storage_offset(), *q.stride()[:-1]))  # from 16 bytes
    if dims in ((64, 64), (128, 128)) and mask is None:
        if smooth != "block" or (q.element_size() == 2 and not apart):
            return None
    return (
        f"its kernels of qk='fp8' on {arch.name} take q, k and v of 64 or 128 channels, no mask, "
        "and with smooth='block' 16-bit rows that start at multiples of 16 bytes, not "
        f"{' and '.join(map(str, dims))} channels of {q.dtype} with strides {tuple(q.stride())}"
        f"{'' if mask is None else ' and a mask'}; qk='int8' and backend='triton' have more"
    )


def refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: Any) -> str | None:
    qk, pv, smooth = options[2:5]
    if qk not in ("int8", "fp8") or pv not in ("fp16", "fp8"):
        return (
            "its kernels are those of qk='int8' or 'fp8' with pv='fp16' or 'fp8', not of "
            f"qk={qk!r} with pv={pv!r}, which backend='triton' has"
        )
    return unfit(q, v) or (lacks_products(q, v, mask, smooth) if qk == "fp8" else None)


def refuses_segments(q: Tensor, *rest: Any) -> str | None:
    k, v, k_scale, _, v_scale = rest[2:7]
    if k_scale is None or v_scale is None or v.dtype not in (torch.float16, STORED["fp8"]):
        return "its kernels read caches of format 'int8'; 'plain' has backend='triton'"
    return unfit(q, v)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it if not all of its rows start at multiples of 16 bytes."""
    size = x.element_size()
    steps = [step * size for n, step in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    if x.stride(-1) == 1 and not any(at % 16 for at in (x.data_ptr(), *steps)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class Operands(NamedTuple):
    """What attention multiplies; [B, S, H, D] of tensors, [B, slots, N, H_kv, D] of caches."""

    q_code: Tensor
    q_scale: Tensor
    k_code: Tensor
    k_scale: Tensor
    k_mean: Tensor | None
    v_code: Tensor
    v_scale: Tensor

    def as_segment(self) -> Operands:
        """Those of tensors as those of a cache of one slot."""
        return self._replace(k_code=self.k_code.unsqueeze(1), v_code=self.v_code.unsqueeze(1))


class Lists(NamedTuple):
    """Which blocks of keys 128 queries see: blocks[b, h, bounds[b, h, i][0] : bounds[b, h, i][1]].

    The two numbers are neighbours in memory: [B, H, nQ, 2], or indptr of a CSR, [B, H, nQ + 1].
    Heads are dense, H times as many per batch.
    """

    bounds: Tensor  # int32
    blocks: Tensor  # [B, H, room] int32 contiguous, ascending in each list


def encode(q: Tensor, k: Tensor, v: Tensor, qk: str, pv: str, smooth: str | None) -> Operands:
    """[B, S, H, D] each, in 8 bits (v: of `pv`)."""
    B, S, H_kv, D = k.shape
    E, blocks = v.shape[3], -(-S // BLOCK)
    k_mean = partial = None
    if smooth == "block":
        k_mean = k.new_empty((B, blocks, H_kv, D))
    elif smooth == "sequence":
        k_mean = k.new_empty((B, H_kv, D), dtype=torch.float32)
        partial = k.new_empty((B, -(-S // SUM_ROWS), H_kv, D), dtype=torch.float32)
    k_code = k.new_empty(k.shape, dtype=STORED[qk])
    k_scale = k.new_empty((B, blocks, H_kv), dtype=torch.float32)
    v_code = v.new_empty(v.shape, dtype=STORED[pv])
    v_scale = v.new_empty((B, blocks, H_kv, E), dtype=torch.float32)
    q_code, q_scale = encode_query(
        q,
        qk,
        smooth,
        k=k,
        v=v,
        k_code=k_code,
        k_scale=k_scale,
        k_mean=k_mean,
        partial=partial,
        v_code=v_code,
        v_scale=v_scale,
        S_kv=S,
        H_kv=H_kv,
        E=E,
    )
    return Operands(q_code, q_scale, k_code, k_scale, k_mean, v_code, v_scale)


NO_KEYS = dict.fromkeys(("k", "v", "k_code", "k_scale", "k_mean", "partial", "v_code", "v_scale"))


def encode_query(
    q: Tensor, qk: str = "int8", smooth: str | None = None, **keys: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] in 8 bits, and a scale per 64 tokens and head; in the same launch the `keys`."""
    B, S, H, D = q.shape
    q_code = q.new_empty(q.shape, dtype=STORED[qk])
    q_scale = q.new_empty((B, -(-S // BLOCK), H), dtype=torch.float32)
    keys = keys or NO_KEYS | {"S_kv": 0, "H_kv": 0, "E": 0}
    k, v, v_code = (keys[name] for name in ("k", "v", "v_code"))
    launch(
        "encode_qkv",
        q.device,
        q=q,
        q_code=q_code,
        q_scale=q_scale,
        **keys,
        B=B,
        S_q=S,
        H=H,
        D=D,
        **strides("q", q, "bsh"),
        **strides("k", k, "bsh"),
        **strides("v", v, "bsh"),
        smooth=SMOOTH.index(smooth),
        x_dtype=code(q.dtype),
        qk_dtype=code(q_code.dtype),
        v_dtype=code_of(v_code),
    )
    return q_code, q_scale


def run(
    q: Tensor,  # [O, B, L, H, D]
    low: Operands,
    *,
    table: Tensor | None = None,
    offset_index: Tensor | None = None,
    mask: Tensor | None = None,
    sm_scale: float,
    causal: str | None = None,
    smooth: str | None,
    want_lse: bool,
    lists: Lists | None = None,
    added: Tensor | None = None,
    pv_skip: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """out [B, L, H, E] (plus `added`, as it) and lse [B, H, L]."""
    _, B, L, H, D = q.shape
    k, v = low.k_code, low.v_code
    slots, N, H_kv, E = v.shape[1:]
    T = 1 if table is None else table.shape[0]
    splits = 1
    if lists is None and added is None:
        at_once = native.processors(q.device) * blocks_per_processor(q.device, max(D, E))
        splits = splits_of(-(-L // QUERIES) * H * B, T * -(-N // BLOCK), at_once)
    out = q.new_empty((B, L, H, E))
    lse = q.new_empty((B, H, L) if want_lse else (0,), dtype=torch.float32)
    to, to_lse = out, lse if want_lse else None
    if splits > 1:
        to = q.new_empty((splits, B, L, H, E), dtype=torch.float32)
        to_lse = q.new_empty((splits, B, H, L), dtype=torch.float32)
    if mask is not None:
        mask = mask.expand(B, H, L, N)
        mask = mask.view(torch.int8) if mask.dtype == torch.bool else mask
    launch(
        "attention",
        q.device,
        q=q,
        q_code=low.q_code,
        q_scale=low.q_scale,
        k=k,
        v=v,
        k_scale=low.k_scale,
        k_mean=low.k_mean,
        v_scale=low.v_scale,
        mask=mask,
        table=table,
        offset_index=offset_index,
        list_bounds=None if lists is None else lists.bounds,
        list_blocks=None if lists is None else lists.blocks,
        added=added,
        out=to,
        lse=to_lse,
        B=B,
        L=L,
        N=N,
        H=H,
        H_kv=H_kv,
        D=D,
        E=E,
        slots=slots,
        T=T,
        splits=splits,
        room=0 if lists is None else lists.blocks.shape[2],
        stride_list_head=0 if lists is None else lists.bounds.stride(1),
        stride_list_row=0 if lists is None else lists.bounds.stride(2),
        causal=int(causal is not None),
        first_last=N - L if causal == "bottom_right" else 0,
        **strides("q", q, "oblh"),
        **strides("k", k, "bsnh"),
        **strides("v", v, "bsnh"),
        **strides("m", mask, "bhln"),
        sm_scale=sm_scale,
        pv_skip=pv_skip,
        smooth=SMOOTH.index(smooth),
        q_dtype=code(q.dtype),
        mean_dtype=code_of(low.k_mean),
        mask_dtype=code_of(mask),
        qk_dtype=code(low.k_code.dtype),
        v_dtype=code(v.dtype),
        out_dtype=code(to.dtype),
    )
    if splits > 1:
        launch(
            "combine_parts",
            q.device,
            part=to,
            part_lse=to_lse,
            out=out,
            lse=lse if want_lse else None,
            B=B,
            L=L,
            H=H,
            E=E,
            splits=splits,
            out_dtype=code(out.dtype),
        )
    return out, lse


@api.ATTENTION.kernel("cuda", unless=unless(0, 3, check=refuses))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sm_scale: float,
    causal: str | None,
    qk: str,
    pv: str,
    smooth: str | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    return run(
        q.unsqueeze(0),
        encode(q, k, v, qk, pv, smooth).as_segment(),
        mask=mask,
        sm_scale=sm_scale,
        causal=causal,
        smooth=smooth,
        want_lse=want_lse,
    )


@api.SEGMENT_ATTENTION.kernel("cuda", unless=unless(0, 6, check=refuses_segments))
def segment_attention(
    q: Tensor,
    q_int8: Tensor | None,
    q_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    k_mean: Tensor | None,
    v_scale: Tensor,
    block_table: Tensor,
    offset_index: Tensor,
    sm_scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    q = dense(q)
    if q_int8 is None or q_scale is None:
        q_int8, q_scale = encode_query(q.flatten(0, 1))
    return run(
        q,
        Operands(
            aligned(q_int8.contiguous()),
            q_scale.contiguous(),
            aligned(k),
            k_scale.contiguous(),
            None if k_mean is None else k_mean.contiguous(),
            aligned(v),
            aligned(v_scale.contiguous()),
        ),
        table=block_table.contiguous(),
        offset_index=offset_index.contiguous(),
        sm_scale=sm_scale,
        smooth=None if k_mean is None else "block",
        want_lse=want_lse,
    )
