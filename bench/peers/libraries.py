# SPDX-License-Identifier: Apache-2.0
"""Whose kernels stand beside ours, in which version, and why one does not."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata

import torch

from reeltime import checks

PEERS = "peers"  # all of them, as a user asks for it


@dataclass(frozen=True)
class Library:
    """A package whose kernels are measured; docs/peers.md says which, and what is wrong with it."""

    name: str  # as pip knows it
    module: str  # whose import says that it works here
    gpu: bool = True  # has nothing for a CPU


LIBRARIES = (
    Library("torch", "torch", gpu=False),
    Library("sageattention", "sageattention"),
    Library("fastvideo-kernel", "fastvideo_kernel"),
    Library("fbgemm-gpu-genai", "fbgemm_gpu.experimental.gen_ai"),
    Library("flashinfer-python", "flashinfer"),
    Library("torchao", "torchao.quantization"),
    Library("liger-kernel", "liger_kernel.ops.rms_norm"),
    Library("fla-core", "fla.modules"),
    Library("gemlite", "gemlite"),
    Library("quack-kernels", "quack"),
    Library("flash-attn-4", "flash_attn.cute"),
)
NAMES = tuple(library.name for library in LIBRARIES)


@dataclass(frozen=True)
class Found:
    """A library here: usable if there is no `why`."""

    name: str
    version: str | None
    why: str | None


@functools.cache
def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def look(library: Library, device: torch.device) -> Found:
    found = version(library.name)
    if found is None:
        return Found(library.name, None, "not installed")
    if library.gpu and device.type != "cuda":
        return Found(library.name, found, "needs a GPU")
    try:
        import_module(library.module)
    except Exception as error:  # noqa: BLE001  whatever a foreign package raises is said
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return Found(library.name, found, f"does not import: {why[:200]}")
    return Found(library.name, found, None)


def find(wanted: Iterable[str], device: torch.device) -> list[Found]:
    """Those that were asked for, by name or as "peers"; PyTorch is always among them.

    Raises:
        ValueError: a name of none of them.
    """
    names: Sequence[str] = tuple(wanted)
    for name in names:
        checks.choice("against", name, (PEERS, *NAMES))
    chosen = [
        library
        for library in LIBRARIES
        if library.name == "torch" or library.name in names or PEERS in names
    ]
    return [look(library, device) for library in chosen]
