# SPDX-License-Identifier: Apache-2.0
# The types of csrc/bindings.cpp.  Entry points of kernels come with the build: see `entries`.
from collections.abc import Callable
from typing import Any

version: str
has_cuda: bool
cuda_version: str | None
nvcc: str | None
archs: tuple[str, ...]
cuda_families: tuple[str, ...]
compiler: str
build_type: str
entries: dict[str, tuple[str, ...]]

def record(
    call: Callable[[], object],
) -> list[tuple[str, tuple[int, int, int], int, int, int]]: ...
def __getattr__(name: str) -> Any: ...
