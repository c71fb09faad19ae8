# SPDX-License-Identifier: Apache-2.0
"""Every test sees poisoned memory: whatever torch.empty returns is NaN, or 91, until written."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.utils._device

# Without a GPU, Triton kernels run in the interpreter; Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Each allocates without writing.
POISONED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, with its floating-point results filled with NaN and small integers with 91."""

    @functools.wraps(allocate)
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int8, torch.int32):
            tensor.fill_(91)
        return tensor

    return poisoned


# torch remembers, at first use, which functions `with torch.device(...)` redirects: make it
# remember the real ones, or `meta` would allocate memory in a poisoned test.
torch.utils._device._device_constructors()


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in POISONED:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: a GPU, or the CPU with Triton interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def keep_subnormals() -> Iterator[None]:
    """Commands flush subnormal numbers to zero for speed; the next test must not inherit that."""
    yield
    torch.set_flush_denormal(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--no-emulator",
        action="store_true",
        help="skip what emulates CUDA kernels: on a GPU, what does not run there",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-emulator"):
        import emulate

        emulate.refuse = lambda: pytest.skip("emulated")


# Test files that cannot be imported without a package which a machine with a GPU may lack.
NEEDS = {
    "av": ("test_director.py", "test_media.py", "test_stream_cli.py"),
    "diffusers": ("test_checkpoint.py", "test_oracle.py", "test_wan_vae.py"),
}
MISSING = [package for package in NEEDS if importlib.util.find_spec(package) is None]
collect_ignore = [file for package in MISSING for file in NEEDS[package]]


def pytest_report_header() -> list[str]:
    return [f"without {p}, not collected: {', '.join(NEEDS[p])}" for p in MISSING]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_slow = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(no_slow)
