# SPDX-License-Identifier: Apache-2.0
# The types of csrc/bindings.cpp.
version: str
has_cuda: bool
cuda_version: str | None
nvcc: str | None
archs: tuple[str, ...]
cuda_families: tuple[str, ...]
compiler: str
build_type: str
