# SPDX-License-Identifier: Apache-2.0
"""The miniature streamed on Triton's kernels: every family at work, against the reference.

A picture of 64 x 64 pixels, 16 tokens per latent frame: the interpreter's time goes by tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reeltime import attention
from reeltime.checks import accuracy
from reeltime.model.config import ModelConfig, SparseLinear
from reeltime.model.layout import layout
from reeltime.model.miniature import control, train, weights
from reeltime.model.miniature.avatar import POSE, random_identity, render
from reeltime.model.stream import Stream
from reeltime.model.transformer import CausalTransformer


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    pixels = render(random_identity(np.random.default_rng(1)), np.zeros((1, len(POSE)), np.float32))
    return torch.from_numpy(np.ascontiguousarray(pixels[:, ::2, ::2]))


def play(sparsity, backend, picture, chunks, device):
    transformer, codec = weights.load_miniature(sparsity=sparsity)
    transformer, codec = transformer.to(device), codec.to(device)
    stream = Stream(
        transformer, codec, layout("vidu_s1", transformer.config), steps=1, backend=backend
    )
    stream.start(picture.to(device), torch.from_numpy(control.picture_tokens())[None].to(device))
    generator = torch.Generator().manual_seed(3)
    tokens = (torch.randn(1, 2, 4, control.TOKEN_DIM, generator=generator) for _ in range(chunks))
    return torch.cat([stream.next_latents(t.to(device)) for t in tokens], 1).cpu()


@pytest.mark.parametrize("sparsity, chunks", [(0, 2), (50, 1)])
def test_miniature_streams_as_the_reference(sparsity, chunks, picture, device):
    """Six layers, a picture, chunks and their cache passes: errors of float32 do not pile up."""
    want = play(sparsity, "reference", picture, chunks, device)
    got = play(sparsity, "triton", picture, chunks, device)
    assert want.std() > 0.3
    error = accuracy(got, want)
    assert attention.TOLERANCE["float32"].accepts(error), error


def test_training_on_the_kernels_has_the_reference_gradient(device):
    """A training window through sparse attention: the kernels' own gradient, and the rest's."""
    config = ModelConfig(
        "tiny", 32, 2, 32, 1, 4, 4, text_dim=8, freq_dim=32, prediction="x0", chunk=2, window=9,
        sla=SparseLinear(0.4, "unselected"),
    )  # fmt: skip
    torch.manual_seed(0)
    net = CausalTransformer(config).to(device)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    x, times = torch.randn(1, 15, 4, 8, 16, device=device), torch.rand(1, 15, device=device) * 900
    context = torch.randn(1, 15, 3, 8, device=device)
    gradients = []
    for backend in ("reference", "triton"):
        memory = train.TrainingMemory(config, (4, 8), backend)
        memory.table = memory.table.to(device)
        net.zero_grad()
        out = net(x, times, net.embed_context(context, backend), memory, backend=backend)
        out.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    want, got = gradients
    assert set(got) == set(want)
    assert want["blocks.0.self_attn.proj_l.weight"].abs().max() > 1e-3
    for name, value in want.items():
        error = accuracy(got[name], value)
        assert error.relative_l1 < 1e-4, (name, error)
