# SPDX-License-Identifier: Apache-2.0
"""An accelerated transformer where kernels serve it: counted, compiled, captured, undone.

What needs no kernel runs here too, on the reference; tests/test_plugin_*.py have the rest.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reeltime
from reeltime.checks import accuracy

D, HEADS, BLOCKS, TOKENS = 128, 2, 2, 200
GPU = torch.cuda.is_available()
KERNELS = {"cuda", "triton"} if GPU else {"reference"}
PLACES = 7 * BLOCKS  # a block's four linear layers and three norms


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_in, self.norm_out = (nn.LayerNorm(D, elementwise_affine=False) for _ in range(2))
        self.qkv, self.to_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.query_norm = nn.RMSNorm(D)

    def forward(self, x, scale, shift):
        h = self.norm_in(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.query_norm(q), k, v))
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.to_out(h.transpose(1, 2).flatten(2))
        h = self.norm_out(x) * (1 + scale) + shift
        return x + self.down(F.gelu(self.up(h), approximate="tanh"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x, scale, shift):
        for block in self.blocks:
            x = block(x, scale, shift)
        return x


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    made = Net().eval()
    return made.to(device, torch.bfloat16 if GPU else torch.float32)


def inputs(net, seed=1):
    g, like = torch.Generator().manual_seed(seed), next(net.parameters())
    x, *modulation = (torch.randn(1, n, D, generator=g) for n in (TOKENS, 1, 1))
    return [y.to(like) for y in (x, *(0.1 * m for m in modulation))]


def served(report):
    """{what ran: how often} over all places, without their kinds."""
    found: dict[str, int] = {}
    for calls in report.calls().values():
        for what, count in calls.items():
            name = what.rpartition(": ")[2]
            found[name] = found.get(name, 0) + count
    return found


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_kernels_serve_every_place(net, format):
    x = inputs(net)
    want = net(*x)
    report = reeltime.accelerate(net, linear=format, attention=format, skip=())
    got = net(*x)
    assert accuracy(got, want).relative_l1 < 0.1
    assert not torch.equal(got, want)
    counted = served(report)
    assert set(counted) <= KERNELS, report
    assert sum(counted.values()) >= PLACES + BLOCKS  # and attention
    report.undo()
    assert torch.equal(net(*x), want)


REPLAYING = pytest.param("reduce-overhead", marks=pytest.mark.gpu)


@pytest.mark.skipif(" " in torch.__file__, reason="inductor does not quote the path of PyTorch")
@pytest.mark.parametrize("mode", ["default", REPLAYING])
def test_compiled(net, mode):
    """The other mode captures: no count goes on then, and the result follows the inputs."""
    report = reeltime.accelerate(net, skip=())
    x, fresh = inputs(net), inputs(net, 2)
    want = net(*x), net(*fresh)
    report.reset_calls()
    run = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(3):
        run(*x)
    assert set(served(report)) <= KERNELS, report
    assert sum(served(report).values()) >= PLACES + BLOCKS
    for given, eager in zip((x, fresh), want, strict=True):
        assert accuracy(run(*given).clone(), eager).relative_l1 < 0.02  # fused otherwise


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs(net):
    reeltime.accelerate(net, skip=())
    x, fresh = inputs(net), inputs(net, 2)
    want = net(*fresh)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            net(*x)
    with torch.cuda.graph(graph, stream=side):
        got = net(*x)
    for old, new in zip(x, fresh, strict=True):
        old.copy_(new)
    got.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_weights_take_less_memory(net):
    before = torch.cuda.memory_allocated()
    report = reeltime.accelerate(net, attention=None, norm=None, skip=())
    torch.cuda.synchronize()
    assert 0 < before - torch.cuda.memory_allocated() <= report.bytes_saved + 4096 * PLACES
