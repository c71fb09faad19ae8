# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the miniature to sparse-linear attention: a small adapter beside the dense weights.

    python -m reeltime.model.miniature.finetune --sparsity 50
    python -m reeltime.model.miniature.finetune --sparsity 90 --device cuda --backend triton

Everything of the dense model is frozen.  Learned are low-rank changes of the self-attention's four
projections (LoRA, arXiv 2106.09685) and `proj_l` of the linear branch, with the loss of train.py.
The mask is recomputed at every step and not differentiated (SLA, arXiv 2509.24006).  On a CPU the
gradient is autograd's through the reference, on a GPU that of the Triton kernels.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..transformer import CausalTransformer
from .train import (
    Levels,
    TrainingMemory,
    Windows,
    clock_rate,
    console,
    latent_pool,
    pixel_loss,
    predict_x0,
    progress_bar,
)
from .weights import FOLDER, load_miniature, sparse

PROJECTIONS = ("q", "k", "v", "o")


class LowRank(nn.Module):
    """weight -> weight + B A, with B zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


def make_adapter(net: CausalTransformer, rank: int) -> dict[str, nn.Parameter]:
    """Freeze `net`, add what is learned, and return it by the names that weights.adapt reads."""
    net.requires_grad_(False)
    learned: dict[str, nn.Parameter] = {}
    for index, block in enumerate(net.blocks):
        attn, where = block.self_attn, f"blocks.{index}.self_attn"
        for name in PROJECTIONS:
            change = LowRank(getattr(attn, name).weight, rank)
            parametrize.register_parametrization(getattr(attn, name), "weight", change)
            learned[f"{where}.{name}.weight.lora_A"] = change.lora_A
            learned[f"{where}.{name}.weight.lora_B"] = change.lora_B
        for name, value in attn.proj_l.named_parameters():
            learned[f"{where}.proj_l.{name}"] = value.requires_grad_(True)
    return learned


def finetune(
    sparsity: int,
    pool: dict[str, Tensor],
    minutes: float,
    out: Path,
    *,
    rank: int = 8,
    rate: float = 2e-3,
    batch: int = 6,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    weights: Path = FOLDER,
    resume: bool = False,
) -> list[float]:
    """Train an adapter for `minutes` and write it; the smoothed loss of every step."""
    torch.manual_seed(seed)
    dense, codec = load_miniature(weights)
    net = sparse(dense, sparsity, None)
    learned = make_adapter(net, rank)
    if resume and out.exists():
        for name, value in load_file(out).items():
            learned[name].data.copy_(value)
    net, codec = net.to(device), codec.to(device).requires_grad_(False)
    config = net.config
    grid = tuple(s // p for s, p in zip(pool["pictures"].shape[-2:], config.patch, strict=True))
    memory = TrainingMemory(config, grid, backend)
    memory.table = memory.table.to(device)
    generator = torch.Generator().manual_seed(seed)
    windows, levels = Windows(pool, config.chunk, generator), Levels(config, generator)
    optimiser = torch.optim.AdamW(learned.values(), rate, betas=(0.9, 0.97), weight_decay=0.0)
    average = {name: value.detach().clone() for name, value in learned.items()}
    losses: list[float] = []
    start = time.monotonic()

    def save() -> None:
        state = {k: v.to("cpu", torch.float16).contiguous() for k, v in average.items()}
        save_file(state, out)

    with progress_bar() as bar:
        task = bar.add_task(f"sla-{sparsity}", total=1000, status="")
        try:
            while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
                for group in optimiser.param_groups:
                    group["lr"] = rate * clock_rate(fraction, len(losses))
                optimiser.zero_grad()
                own = 0.5 if len(losses) % 2 else 0.0
                window = windows.sample(batch)
                seen = window.to(torch.device(device))
                predicted = predict_x0(net, memory, seen, levels.sample(batch), own)
                error = F.mse_loss(predicted, seen.x0)
                drawn = windows.draw(window, 8)
                (error + 40 * pixel_loss(codec, predicted, drawn)).backward()
                nn.utils.clip_grad_norm_(list(learned.values()), 1.0)
                optimiser.step()
                smooth = 0.98 * losses[-1] + 0.02 * error.item() if losses else error.item()
                losses.append(smooth)
                keep = min(0.998, len(losses) / (len(losses) + 20))
                for name, value in learned.items():
                    average[name].lerp_(value.detach().to(average[name].device), 1 - keep)
                status = f"step {len(losses)}, loss {smooth:.4f}"
                bar.update(task, completed=1000 * fraction, status=status)
                if len(losses) % 200 == 0:
                    save()
        finally:  # Ctrl-C keeps what was learned
            save()
    return losses


def main(
    sparsity: Annotated[int, typer.Option(help="Percent of key blocks left to the linear branch.")],
    folder: Annotated[Path, typer.Option(help="Where the pool is and the adapter goes.")] = Path(
        "build/miniature"
    ),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 10.0,
    people: Annotated[int, typer.Option(help="Clips to render, as train renders them.")] = 2400,
    workers: Annotated[int, typer.Option(help="Rendering processes.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="Of the kernels: auto, reference, triton.")] = "auto",
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the adapter that is there.")] = False,
) -> None:
    """Write sla-<sparsity>.safetensors and its loss into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    cache = folder / f"pool-{seed}-{people}.pt"
    if cache.exists():
        pool = torch.load(cache, weights_only=True)
    else:
        codec = FOLDER / "codec.safetensors"
        pool = latent_pool(codec, range(seed * people, (seed + 1) * people), workers)
        torch.save(pool, cache)
    out = folder / f"sla-{sparsity}.safetensors"
    options: Any = {"device": device, "backend": backend, "seed": seed, "resume": resume}
    losses = finetune(sparsity, pool, minutes, out, **options)
    (folder / f"sla-{sparsity}.json").write_text(json.dumps([round(x, 5) for x in losses]))
    console.print(f"{len(losses)} steps, loss {losses[-1]:.4f}: {out}")


if __name__ == "__main__":
    typer.run(main)
