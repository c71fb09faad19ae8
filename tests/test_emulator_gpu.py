# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel, launch by launch: what a GPU has written beside what the emulator makes of the
same source and the same bits.

On a GPU that says what the emulator can be trusted with.  Without one, another schedule of the
emulator stands for the GPU and must leave the same bits.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import emulate
import parameters
import pytest
import torch
from emulated import emulated
from torch import Tensor

from reeltime import backends, native
from reeltime.arch import UnsupportedArchError
from reeltime.bench import sanitize

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

GPU = torch.cuda.is_available()
SMS = (native.arch_of(torch.device("cuda")).sm,) if GPU else (80, 90)
PROCESSORS = 132  # keys are split between them, as on a GPU
# Instructions like ex2.approx are exact in the emulator: behind one, a result that is rounded again
# may fall on the other side.  In attention it is a probability that does, in three bits.
SHARES = {"attention": 2**-9, "sla": 2**-9}  # of the largest value of a tensor; otherwise
SHARE = 2**-16
BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float8_e4m3fn: (torch.int8, 0x7F),
}


# --- Comparing ----------------------------------------------------------------------------------


def steps(x: Tensor) -> Tensor:
    """Numbers of the values of its dtype, in order: neighbours differ by one, +0 and -0 by none."""
    if x.dtype not in BITS:
        return x.long()
    dtype, mask = BITS[x.dtype]
    bits = x.contiguous().view(dtype).long()
    return torch.where(bits < 0, -(bits & mask), bits & mask)


@dataclass
class Difference:
    """Of one output, over all launches of its kernel."""

    launches: int = 0
    elements: int = 0
    differing: int = 0
    most_steps: int = 0

    def __str__(self) -> str:
        many = f"{self.launches} launches, {self.elements} elements"
        if not self.differing:
            return f"{many}: bit for bit"
        return f"{many}: {self.differing} differ, at most by {self.most_steps} roundings"


def compare(where: str, got: Tensor, want: Tensor, share: float, found: Difference) -> None:
    """Adds to `found`.

    Raises:
        AssertionError: an element is off by more than a rounding and that share of the largest.
    """
    apart = (steps(got) - steps(want)).abs()
    x, y = got.float(), want.float()
    apart.masked_fill_(x.isnan() & y.isnan(), 0)
    found.launches += 1
    found.elements += got.numel()
    found.differing += int((apart > 0).sum())
    found.most_steps = max(found.most_steps, int(apart.max()) if apart.numel() else 0)
    rounding = 0 if got.dtype in (torch.int32, torch.int64, torch.uint8) else 1
    wrong = apart > rounding
    if got.dtype in BITS:
        largest = y.where(y.isfinite(), 0.0).abs().max() if y.numel() else 0.0
        wrong &= ~((x - y).abs() <= share * largest)
    if wrong.any():
        first = tuple(int(i[0]) for i in wrong.nonzero(as_tuple=True))
        raise AssertionError(
            f"{where}{list(first)}: {got[first].item()!r}, and {want[first].item()!r} emulated; "
            f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than a rounding"
        )


def copied(x: Tensor) -> Tensor:
    """On the CPU, with the strides of `x`, at an address that is aligned as its own is."""
    if 0 in x.shape:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    flat = x.detach().as_strided((span,), (1,))
    room = torch.zeros(span * x.element_size() + 512, dtype=torch.uint8)
    skip = (x.data_ptr() - room.data_ptr()) % 256
    own = room[skip : skip + span * x.element_size()].view(x.dtype)
    return own.copy_(flat).as_strided(x.shape, x.stride())


class Beside:
    """Stands in for `native.launch`: launches, then emulates, then compares every output."""

    def __init__(self, sm: int, launch: Callable[..., None], **how: Any) -> None:
        self.sm, self.launch, self.how = f"sm{sm}", launch, how
        self.found: dict[str, Difference] = {}

    def __call__(self, entry: str, device: torch.device, **fields: Any) -> None:
        owner = next(f for f in backends.FAMILIES if entry in parameters.entries(f))
        struct, *files = parameters.entries(owner)[entry]
        given = {k: copied(v) if isinstance(v, Tensor) else v for k, v in fields.items()}
        self.launch(entry, device, **fields)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        sm = self.sm if self.sm in files else "sm80"
        try:
            parameters.run(owner, entry, given, sm=sm, **self.how)
        except emulate.EmulationError as refused:  # as binding.cpp asks before it chooses
            if "launcher refused" not in str(refused) or sm == "sm80":
                raise
            sm = "sm80"
            parameters.run(owner, entry, given, sm=sm, **self.how)
        for name, kind in parameters.fields(owner, struct).items():
            if kind == "output" and isinstance(fields[name], Tensor):
                where = f"{entry}_{sm}, {name}"
                compare(
                    where, copied(fields[name]), given[name], SHARES.get(owner, SHARE),
                    self.found.setdefault(where, Difference()),
                )  # fmt: skip


@contextmanager
def beside(sm: int, **planted: Any) -> Iterator[tuple[torch.device, Beside]]:
    """Inside, every launch is compared; `planted` goes to what stands for a GPU."""
    options: dict[str, Any] = {"sm": sm, "gpu": True} | planted
    with pytest.MonkeyPatch.context() as patch, emulated(*backends.FAMILIES, **options) as stand_in:
        how = {} if GPU else {"schedule": "backward", "landing": "wait"}
        runner = Beside(sm, native.launch, **how)
        if not GPU:
            patch.setattr(native, "processors", lambda device: PROCESSORS)
        for name in backends.FAMILIES:
            import_module(f"reeltime.{name}.cuda")
        for module in list(sys.modules.values()):
            if getattr(module, "launch", None) is runner.launch and module is not native:
                patch.setattr(module, "launch", runner)
        yield stand_in.device, runner


def play(family: str, sm: int, **planted: Any) -> dict[str, Difference]:
    """Every case of a family at ragged shapes."""
    with beside(sm, **planted) as (device, runner):
        for case in sanitize.cases(family):
            try:
                case.run(case.make(device, 0), "cuda")
            except UnsupportedArchError:
                continue
    return runner.found


# --- Tests --------------------------------------------------------------------------------------


@pytest.mark.device
@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("family", backends.FAMILIES)
def test_emulated_is_what_a_gpu_computes(family, sm):
    found = play(family, sm)
    for where, difference in found.items():
        print(f"{family}: {where}: {difference}")
    assert found
    if not GPU:
        assert not any(difference.differing for difference in found.values())


def test_every_kernel_is_launched():
    """What is compared on a GPU, and looked at by compute-sanitizer, is all that there is."""
    launched = set()
    with emulated(*backends.FAMILIES) as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "processors", lambda device: PROCESSORS)
        patch.setattr(parameters, "run", lambda family, entry, *_, **__: launched.add(entry))
        for case in itertools.chain(*map(sanitize.cases, backends.FAMILIES)):
            try:
                case.run(case.make(runner.device, 0), "cuda")
            except UnsupportedArchError:
                continue
    assert launched == {entry for f in backends.FAMILIES for entry in parameters.entries(f)}


@pytest.mark.skipif(GPU, reason="a GPU has no mistakes planted")
def test_a_difference_is_told_by_kernel_and_element():
    edits = {"sm80.cu": [("odd ? even_row : odd_row", "odd ? odd_row : even_row")]}
    with pytest.raises(
        AssertionError, match=r"quantize_sm80, xq\[\d+, \d+\]: -?\d+, and -?\d+ emu"
    ):
        play("quant", 80, replace=edits)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_steps_are_roundings(dtype):
    x = torch.tensor([-1.5, -1.0, -0.0, 0.0, 1.0, 1.5], dtype=dtype)
    assert steps(x).tolist() == sorted(steps(x).tolist())
    assert steps(x)[2] == steps(x)[3] == 0
    wide = torch.tensor([1.0], dtype=dtype)
    after = wide.view(BITS[dtype][0]).add(1).view(dtype)
    assert int(steps(after) - steps(wide)) == 1


def test_one_rounding_is_allowed_and_two_are_not():
    want = torch.tensor([1.0, 2.0, torch.nan, 3.0], dtype=torch.bfloat16)
    one, two = want.clone(), want.clone()
    one.view(torch.int16)[1] += 1
    two.view(torch.int16)[1] += 2
    found = Difference()
    compare("k, out", one, want, 0.0, found)
    assert (found.differing, found.most_steps) == (1, 1)
    with pytest.raises(AssertionError, match=r"k, out\[1\]: 2.03125, and 2.0 emulated; 1 of 4"):
        compare("k, out", two, want, 0.0, found)
    compare("k, out", two, want, 0.1, found)  # beside the largest it is small
    with pytest.raises(AssertionError, match="k, list"):
        compare("k, list", torch.tensor([1]), torch.tensor([2]), 1.0, found)


def test_a_copy_has_the_layout_and_the_alignment():
    x = torch.arange(1000, dtype=torch.float32)[3:].as_strided((4, 5), (7, 2))
    y = copied(x)
    assert y.stride() == x.stride()
    assert torch.equal(x, y)
    assert (x.data_ptr() - y.data_ptr()) % 256 == 0
