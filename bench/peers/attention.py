# SPDX-License-Identifier: Apache-2.0
"""Dense attention over plain tensors, [B, S, H, D] in bf16, quantised in the call if at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from reeltime import attention
from reeltime.bench import cached
from reeltime.bench.case import Draw, Inputs, Judged, Peer
from reeltime.bench.peers.adapter import Adapter, compiled, generous

FP8 = torch.float8_e4m3fn


def heads_first(inputs: Inputs) -> Inputs:
    """q, k and v as views [B, H, S, D]."""
    return inputs | {name: inputs[name].transpose(1, 2) for name in "qkv"}


def pinned(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flex_attention(q, k, v)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """It subtracts the mean of the keys in place: they are copied first."""
    from sageattention import sageattn

    return sageattn(q, k.clone(), v, tensor_layout="NHD")


def flashinfer(backend: str) -> Callable[..., Tensor]:
    """One request: no batch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flashinfer import single_prefill_with_kv_cache

        return single_prefill_with_kv_cache(q[0], k[0], v[0], backend=backend)[None]

    return attend


@compiled
def per_head(*held: Tensor) -> list[Tensor]:
    """[S, H, D] each: all of them in FP8, then their scales [H]."""
    scales = [x.float().abs().amax((0, 2)) / 448 for x in held]
    low = [(x / s[:, None]).to(FP8) for x, s in zip(held, scales, strict=True)]
    return low + scales


def flashinfer_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    held = per_head(q[0], k[0], v[0])
    return single_prefill_with_kv_cache(*held, o_dtype=q.dtype, backend="fa3")[None]


def flash_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v)[0]


def torch_sdpa(name: str, backend: SDPBackend) -> Adapter:
    call = pinned(backend)
    return Adapter("torch", f"torch sdpa {name}", call, "bf16", heads_first, False, False)


ADAPTERS = (
    torch_sdpa("flash", SDPBackend.FLASH_ATTENTION),
    torch_sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
    torch_sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    Adapter("torch", "torch flex_attention, compiled", compiled(flex), "bf16", heads_first),
    Adapter("sageattention", "INT8 q.k", sage, "int8, fp16"),
    Adapter("flashinfer-python", "fa2", flashinfer("fa2"), "bf16"),
    Adapter("flashinfer-python", "fa3", flashinfer("fa3"), "bf16"),
    Adapter("flashinfer-python", "fa3, FP8 per head", flashinfer_fp8, "fp8, fp8"),
    Adapter("flash-attn-4", "dense", flash_4, "bf16"),
)


def scaled_dot_product(B: int, S_q: int, S_kv: int, H: int, D: int) -> tuple[Peer, ...]:
    """Each of PyTorch's backends, one pinned at a time; then everybody else's kernels."""
    shape = (B, S_q, S_kv, H, D)

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {"q": draw(B, S_q, H, D), "k": draw(B, S_kv, H, D), "v": draw(B, S_kv, H, D)}

    def peer(adapter: Adapter) -> Peer:
        dtypes = adapter.dtype.split(", ")

        def judge(inputs: Inputs, result: Any) -> Iterator[Judged]:
            q, k, v = (x.double() for x in inputs.values())
            want = cached.together(
                S_q, lambda rows: attention.attention(q[:, rows], k, v, backend="reference")
            )
            format = "fp8" if "fp8" in dtypes else "int8" if "int8" in dtypes else "bfloat16"
            yield Judged("out", result, want, generous(attention.TOLERANCE[format]))

        flops: dict[str, float] = {}
        for dtype in dtypes:  # both products in it, or one in each; FP16 has the peak of bf16
            name = "bf16" if dtype == "fp16" else dtype
            flops[name] = flops.get(name, 0.0) + attention.flops(*shape) / len(dtypes)
        moved = attention.bytes(*shape)
        return adapter.peer(str(shape), adapter.dtype, flops, moved, make, judge)

    return tuple(peer(adapter) for adapter in ADAPTERS)
