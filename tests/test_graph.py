# SPDX-License-Identifier: Apache-2.0
"""Every op in a captured graph: replayed with other inputs, it is what the op itself computes.

Inputs are overwritten and outputs poisoned before the replay, so that neither a kernel that was
launched on another stream, nor one that read its inputs on the host, nor one that writes too little
goes unnoticed.
"""

from __future__ import annotations

import pytest
import torch

from reeltime import backends
from reeltime.arch import UnsupportedArchError
from reeltime.bench import sanitize
from reeltime.bench.case import clone, mapped, poison, tensors

CASES = {case.label: case for family in backends.FAMILIES for case in sanitize.cases(family)}


def plain(held):
    """Its tensors, 8-bit floats as bytes: they have no comparison."""
    return [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in tensors(held)]


def same(a, b):
    pairs = zip(plain(a), plain(b), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


def overwrite(inputs, fresh):
    for old, new in zip(tensors(inputs), tensors(fresh), strict=True):
        old.copy_(new)


def test_every_op_has_a_case():
    assert {case.op for case in CASES.values()} == set(backends.OPS)


@pytest.mark.parametrize("label", CASES)
def test_stale_inputs_would_show(label):
    """Two seeds give two results: otherwise a replay that ignored its inputs would pass."""
    case, cpu = CASES[label], torch.device("cpu")
    first, second = (case.run(case.make(cpu, seed), "reference") for seed in (0, 1))
    assert not same(first, second)
    poison(first)
    assert not same(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("label", CASES)
@torch.no_grad()
def test_replay_with_other_inputs_is_eager(label, backend):
    case, place = CASES[label], torch.device("cuda")
    inputs, fresh = (case.make(place, seed) for seed in (0, 1))
    try:
        backends.resolve(case.family, backend, place)
        first = mapped(case.run(clone(inputs), backend), torch.Tensor.clone)
    except UnsupportedArchError as refusal:
        pytest.skip(refusal.why)
    eager = clone(fresh)
    if case.op == "write":  # what it leaves alone is poison in both
        poison(eager["cache"])
    want = case.run(eager, backend)

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side):
        got = case.run(inputs, backend)
    overwrite(inputs, fresh)
    poison(got)
    graph.replay()
    torch.cuda.synchronize()
    assert same(got, want)
    assert not same(got, first)
