# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.functional.scaled_dot_product_attention`, drop-in, in 8 bits.

from reeltime.plugins.sdpa import scaled_dot_product_attention   # instead of PyTorch's
attend = sdpa.make(qk="int8", pv="fp8")                          # in another format
with sdpa.using(attend): ...                                     # whoever calls PyTorch's gets it
"""

from __future__ import annotations

from torch import Tensor

from reeltime import backends, checks
from reeltime.attention.api import check_formats
from reeltime.plugins.attention import Mode, Replacement
from reeltime.plugins.sites import Place, Site


def make(
    qk: str | None = "int8",
    pv: str | None = "fp16",
    *,
    keep: float | None = None,
    backend: str = "auto",
) -> Replacement:
    """A function with PyTorch's signature, and `calls`: what served its calls, how often.

    Args:
        qk, pv: formats of q and k and of the values, as in attention.attention.
        keep: share of the key blocks, in (0, 1], that self-attention keeps; None: all.
        backend: "auto", "reference", "triton" or "cuda".
    Raises:
        ValueError: an unknown format, or nothing that would differ from PyTorch's.
    """
    check_formats(qk, pv, "block")
    checks.choice("backend", backend, backends.BACKENDS)
    check_share("keep", keep)
    if qk is None and pv is None and keep is None:
        checks.fail("qk, pv, keep", "one of them", "none", "Use PyTorch's own function for that.")
    site = Site("", "attention")
    return Replacement(qk, pv, keep, backend, Place(site, site))


def check_share(name: str, share: float | None) -> None:
    if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
        checks.fail(
            name, "a share of the key blocks in (0, 1]", repr(share), "Pass 0.1 for a tenth."
        )


INT8 = make()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function, arguments and errors, in INT8 q.k and FP16 values: `INT8.calls` counts.

    What needs a gradient, drops out or has no kernel here is PyTorch's own code, and counted so.
    """
    return INT8(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def using(attend: Replacement = INT8) -> Mode:
    """A context in which this thread's calls of F.scaled_dot_product_attention are `attend`'s."""
    return Mode(attend)
