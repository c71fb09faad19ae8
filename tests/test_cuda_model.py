# SPDX-License-Identifier: Apache-2.0
"""The shipped miniature streams a chunk through the CUDA kernels' own source, on the emulator.

backend="cuda" is asked of every op and refused by none, but for cross-attention, which is in full
precision: what a kernel does not serve would raise.  That each was launched as often as the model
has work for it is counted.
"""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from emulated import Emulator, emulated
from torch import Tensor

from reeltime.checks import accuracy
from reeltime.model import quality
from reeltime.model.layers import CrossAttention
from reeltime.model.layout import layout
from reeltime.model.miniature import control, weights
from reeltime.model.miniature.avatar import POSE, random_identity, render
from reeltime.model.quality import Quality
from reeltime.model.stream import Stream

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

FAMILIES = ("quant", "norm", "rope_kv", "gemm_w8a8", "attention", "sla")
LAYERS = 6
BEFORE = 5  # chunks, by the reference: the window is full, and the picture has moved in it
FORWARDS, CONTEXTS = 2, 1  # of a chunk: one denoising step and the cache pass

# Per forward: three norms a layer, one before the head; queries of cross-attention, and keys of its
# contexts, are rotated nowhere but normed by the same kernel.
ALWAYS = {
    "normalise": FORWARDS * (3 * LAYERS + 1),
    "rotate_rows": (FORWARDS + CONTEXTS) * LAYERS,
    "write_cache": FORWARDS * LAYERS,
    "attention": FORWARDS * LAYERS,
}
DENSE = ALWAYS | {"query_int8": FORWARDS * LAYERS}
# q k v, o, cross q, cross o, fc1, fc2; cross k, cross v.  Norms and fc1 quantise what they hand on;
# what attention hands on, and the context, is left to quantize.
LINEAR = {
    "gemm_w8a8": (6 * FORWARDS + 2 * CONTEXTS) * LAYERS,
    "quantize": (2 * FORWARDS + 2 * CONTEXTS) * LAYERS,
}
# The query is pooled and rounded by the same read, once it is rotated.
SPARSE = ALWAYS | {"rotate_rows": (2 * FORWARDS + CONTEXTS) * LAYERS}
SPARSE |= dict.fromkeys(
    ("pool_blocks", "choose_blocks", "sum_summaries", "project_sums", "linear_rows"),
    FORWARDS * LAYERS,
)
LEVELS = {  # name -> level, launches
    "int8 cache": (Quality("int8 cache", kv_format="int8, v fp16"), DENSE),
    "fp8 values": (Quality("fp8 values", kv_format="int8, v fp8"), DENSE),
    "int8": (quality.named("int8"), DENSE | LINEAR),
    "fp8": (quality.named("fp8"), DENSE | LINEAR),
    "int8 cache, sla": (Quality("sla", kv_format="int8, v fp16", topk=0.1), SPARSE),
    "int8+sla": (quality.named("int8+sla"), SPARSE | LINEAR),
}


def picture(pixels: int) -> Tensor:
    whole = render(random_identity(np.random.default_rng(1)), np.zeros((1, len(POSE)), np.float32))
    step = whole.shape[1] // pixels
    return torch.from_numpy(np.ascontiguousarray(whole[:, ::step, ::step]))


def play(level: Quality, backend: str, pixels: int) -> Tensor:
    """A chunk of one denoising step behind a picture and chunks of the reference, and one more of
    the reference, which sees what the cache pass of that chunk wrote."""
    transformer, codec = weights.load_miniature(sparsity=90 if level.topk else 0)
    quality.quantize(transformer, level)
    stream = Stream(
        transformer, codec, layout("vidu_s1", transformer.config), steps=1, backend="reference"
    )
    stream.start(picture(pixels), torch.from_numpy(control.picture_tokens())[None])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(BEFORE + 2, 1, 2, 4, control.TOKEN_DIM, generator=generator)
    made = []
    for index, chunk in enumerate(tokens):
        for part in (stream, stream.memory, stream.step):
            part.backend = backend if index == BEFORE else "reference"
        made.append(stream.next_latents(chunk))
    return torch.cat(made[BEFORE:])


@pytest.fixture(autouse=True)
def _full_precision_in_cross_attention(monkeypatch):
    attend = CrossAttention._attend
    monkeypatch.setattr(
        CrossAttention, "_attend", lambda self, q, k, v, _: attend(self, q, k, v, "reference")
    )


def compare(level: Quality, pixels: int) -> Counter[str]:
    """Hold the kernels' stream against the reference's and that in float32; what was launched.

    An error e before a rounding of step s leaves it as sqrt(e s): a few codes fall otherwise, by a
    whole step.  So behind layers in 8 bits two right streams are as far from each other as from
    float32, and what can be asked is that they are no farther, and equally far from that.
    """
    wide = play(Quality("wide", topk=level.topk), "reference", pixels)
    reference = play(level, "reference", pixels)
    with emulated(*FAMILIES) as runner:
        got = play(level, "cuda", pixels)
    assert wide.std() > 0.3
    lost, off = accuracy(reference, wide).relative_l1, accuracy(got, wide).relative_l1
    apart = accuracy(got, reference).relative_l1
    assert off < 1.1 * lost, (off, lost)
    # Of the probabilities, which kernels round and the reference does not.
    share = 1 if level.linear else 1 / 4
    assert apart < share * lost, (apart, lost)
    return Counter(entry.rpartition("_")[0] for entry in runner.launches)


@pytest.mark.parametrize("name", LEVELS)
def test_miniature_streams_as_the_reference(name):
    """16 tokens per latent frame: blocks of 64 that are a quarter full."""
    level, launches = LEVELS[name]
    assert compare(level, 64) == launches


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_miniature_of_full_size_streams_as_the_reference(name):
    level, launches = LEVELS[name]
    assert compare(level, 128) == launches


MISTAKES = {  # what a launch of attention gets instead
    "left out": lambda given: None,
    "one rotation for all": lambda given: {
        **given, "offset_index": torch.zeros_like(given["offset_index"])
    },
    "keys of other slots": lambda given: {**given, "table": given["table"].roll(1)},
    "means forgotten": lambda given: {**given, "smooth": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_one_launch_is_seen(name, monkeypatch):
    run, seen = Emulator.__call__, Counter[str]()

    def wrong(self: Emulator, entry: str, given: dict[str, Any]) -> None:
        seen[entry] += 1
        if entry == "attention" and seen[entry] == 2:
            given = MISTAKES[name](given)
        if given is not None:
            run(self, entry, given)

    monkeypatch.setattr(Emulator, "__call__", wrong)
    with pytest.raises(AssertionError):
        compare(LEVELS["int8 cache"][0], 64)
