# SPDX-License-Identifier: Apache-2.0
"""Training clips, rendered by worker processes: every seed is one person under random direction."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..codec import ConvCodec
from .avatar import POSE, random_identity, render
from .control import FRAMES_PER_LATENT, condition_tokens, random_clip

_T = TypeVar("_T")


CHUNK_FRAMES = 8  # video frames of a chunk
LATE_CHUNKS = 4  # consecutive chunks kept from somewhere later in the stream
_codec: ConvCodec | None = None  # a worker's own


def make_clip(seed: int) -> dict[str, Tensor]:
    """One person's stream, in latents, with what is needed to draw it again.

    A stream of up to 120 frames is directed, but only what training windows need is drawn: the
    picture, the first chunk (the first state) and four consecutive later chunks.

    Returns:
        picture [C, h, w] and latents [10, C, h, w] float16, tokens [10, 4, 48], person [22],
        poses [40, 8].
    """
    assert _codec is not None
    rng = np.random.default_rng(seed)
    who = random_identity(rng)
    kept = CHUNK_FRAMES * LATE_CHUNKS
    start = CHUNK_FRAMES * (1 if rng.uniform() < 0.2 else int(rng.integers(1, 11)))
    control, envelope, poses = random_clip(rng, start + kept)
    tokens = condition_tokens(control, envelope)
    index = np.r_[0:CHUNK_FRAMES, start : start + kept]
    drawn = render(who, np.concatenate([np.zeros((1, len(POSE)), np.float32), poses[index]]))
    video = np.concatenate([np.repeat(drawn[:1], FRAMES_PER_LATENT, axis=0), drawn[1:]])
    with torch.inference_mode():
        z = _codec.encode(torch.from_numpy(video)[None])[0].half()
    latent = index[::FRAMES_PER_LATENT] // FRAMES_PER_LATENT
    arrays = (tokens[latent], who.to_vector(), poses[index])
    values = (z[0], z[1:], *map(torch.from_numpy, arrays))
    return dict(zip(("pictures", "latents", "tokens", "people", "poses"), values, strict=True))


def make_stills(seed: int) -> np.ndarray:
    """[4, S, S, 3] uint8: one person in four unrelated moments, for the codec."""
    rng = np.random.default_rng(seed)
    who = random_identity(rng)
    poses = random_clip(rng, 96, switch=1 / 12)[2]
    return render(who, poses[rng.choice(96, 4, replace=False)])


def _start_worker(codec: Path | None) -> None:
    global _codec
    torch.set_num_threads(1)  # one process per core does better than many threads on small frames
    if codec is not None:
        _codec = ConvCodec().eval()
        _codec.load_state_dict(load_file(codec))


def _map(
    function: Callable[[int], _T], seeds: range, workers: int, codec: Path | None
) -> Iterator[_T]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (codec,)) as pool:
        yield from pool.imap(function, seeds, chunksize=8)


def clips(seeds: range, workers: int, codec: Path) -> Iterator[dict[str, Tensor]]:
    """`make_clip` of consecutive seeds, in order, encoded with the codec in that file."""
    return _map(make_clip, seeds, workers, codec)


def stills(seeds: range, workers: int) -> Iterator[np.ndarray]:
    """`make_stills` of consecutive seeds, in order."""
    return _map(make_stills, seeds, workers, None)
