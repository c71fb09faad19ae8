# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of rope_kv: the oracle, differentiable, on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reeltime.norm.reference import normalise, wide
from reeltime.quant import reference as quant

BLOCK = 64  # tokens that share one key scale, one mean key and one value scale per channel


def rope_table(
    frame_positions: Tensor,
    grid: tuple[int, int],
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
) -> Tensor:
    height, width = grid
    spatial = 2 * (head_dim // 6)
    device = frame_positions.device

    def angles(position: Tensor, dim: int) -> Tensor:
        index = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
        return position.double().unsqueeze(-1) * theta ** (-index / max(dim, 1))

    t = angles(frame_positions, head_dim - 2 * spatial)  # [..., F, t / 2]
    y = angles(torch.arange(height, device=device), spatial)  # [h, s / 2]
    x = angles(torch.arange(width, device=device), spatial)  # [w, s / 2]
    lead = (*frame_positions.shape, height, width)
    angle = torch.cat(
        [
            t[..., None, None, :].expand(*lead, t.shape[-1]),
            y[:, None].expand(*lead, y.shape[-1]),
            x.expand(*lead, x.shape[-1]),
        ],
        dim=-1,
    )
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [..., F, h, w, D / 2, 2]
    return table.flatten(-5, -3).to(dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """wide x [..., L, H, D] by table [..., L, D / 2, 2], pairs (2i, 2i + 1) as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (x.shape[-1] // 2, 2)))
    turn = torch.view_as_complex(table.to(x.dtype).contiguous()).unsqueeze(-2)
    return torch.view_as_real(pairs * turn).flatten(-2)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    return rotate(wide(x).contiguous(), table).to(x.dtype)


def rope_on_cache(k_raw: Tensor, table: Tensor) -> Tensor:
    return apply_rope(k_raw.flatten(1, 2), table).view(k_raw.shape)


def heads_of(x: Tensor, norm_weight: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """[B, L, C] -> wide [B, L, H, D], RMSNorm over the full C if it has a weight."""
    y = wide(x) if norm_weight is None else normalise(wide(x), "rms", norm_weight, None, eps)
    return y.unflatten(-1, (num_heads, y.shape[-1] // num_heads))


def wide_query(
    q: Tensor,
    table: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
    sm_scale: float,
) -> Tensor:
    heads = heads_of(q, norm_weight, num_heads, eps).unsqueeze(0)  # [1, B, L, H, D]
    if sm_scale != 1.0 or table is None:
        heads = heads * sm_scale  # a new tensor: an op must not return a view of its argument
    return heads if table is None else rotate(heads.contiguous(), table.unsqueeze(1))


def query(q: Tensor, *options: object) -> Tensor:
    """[B, L, C] -> [O, B, L, H, D]."""
    return wide_query(q, *options).to(q.dtype).contiguous()  # type: ignore[arg-type]


def query_int8(q: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    rotated = query(q, *options)
    return rotated, *encode(wide(rotated), torch.int8)


def blocks(x: Tensor, size: int = BLOCK) -> Tensor:
    """[..., N, H, D] -> [..., ceil(N / size), size, H, D], the ragged tail filled with zeros."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[-3] % size))
    return padded.unflatten(-3, (padded.shape[-3] // size, size))


def per_token(x: Tensor, tokens: int, dim: int, size: int = BLOCK) -> Tensor:
    """One value per block along `dim` -> one per token."""
    return x.repeat_interleave(size, dim).narrow(dim, 0, tokens)


def held(tokens: int, device: torch.device, size: int = BLOCK) -> Tensor:
    """[ceil(N / size), size]: True where a block holds a token, False in the ragged tail."""
    count = -(-tokens // size)
    index = torch.arange(count * size, device=device)
    return (index < tokens).view(count, size)


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """wide [..., N, H, D] -> x / scale in `dtype`, scale [..., nb, H] per block and head."""
    scale = quant.scale_of(blocks(x).abs().amax((-3, -1)), dtype)
    full = per_token(scale, x.shape[-3], -2).unsqueeze(-1)
    return quant.store(x, full, dtype), scale


def encode_values(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """wide [..., N, H, D] -> v / scale in `dtype`, scale [..., nb, H, D] per block and channel."""
    scale = quant.scale_of(blocks(v).abs().amax(-3), dtype)
    return quant.store(v, per_token(scale, v.shape[-3], -3), dtype), scale


def block_mean(k: Tensor, size: int = BLOCK) -> Tensor:
    """[..., N, H, D] -> [..., nb, H, D]: the mean key of each block, over the tokens it holds."""
    count = held(k.shape[-3], k.device, size).sum(1).view(-1, 1, 1)
    return blocks(k, size).sum(-3) / count


def feature_map(x: Tensor, phi: str) -> Tensor:
    """phi of linear attention, over the head dimension; never negative."""
    if phi == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if phi == "elu" else F.relu(x)


def summaries(k: Tensor, v: Tensor, phi: str, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """h [..., nb, H, D, D] = phi(K)^T V and z [..., nb, H, D] = sum phi(K), per block."""
    features = blocks(feature_map(k, phi), size)  # zero in the ragged tail
    return torch.einsum("...nhd,...nhe->...hde", features, blocks(v, size)), features.sum(-3)


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
    frames = (slots.shape[0], cache_k.shape[2])
    keys = heads_of(k, norm_weight, num_heads, eps)
    if table is not None:
        keys = rotate(keys.contiguous(), table)
    keys = keys.unflatten(1, frames)  # [B, F, N, H, D]
    values = heads_of(v, None, num_heads, eps).unflatten(1, frames)

    def put(cache: Tensor, value: Tensor) -> None:
        cache.index_copy_(1, slots, value.to(cache.dtype))

    if h is not None and z is not None:
        for cache, x in zip((h, z), summaries(keys, values, phi), strict=True):
            put(cache, x if cache.shape[2] == x.shape[2] else x.sum(2, keepdim=True))
    if k_mean is not None:
        put(k_mean, block_mean(keys))
    if k_scale is None or v_scale is None or k_mean is None:
        put(cache_k, keys)
        put(cache_v, values)
        return
    # The mean is subtracted as stored, so that q.(k - mu) + q.mu is exact.
    mean = block_mean(keys).to(k_mean.dtype).to(keys.dtype)
    k_int8, scale = encode(keys - per_token(mean, frames[1], -3), torch.int8)
    put(cache_k, k_int8)
    put(k_scale, scale)
    # index_copy_ has no float8 kernel: bytes are bytes.
    v_stored, scale = encode_values(values, cache_v.dtype)
    width = torch.uint8 if cache_v.dtype.itemsize == 1 else cache_v.dtype
    cache_v.view(width).index_copy_(1, slots, v_stored.view(width))
    put(v_scale, scale)
