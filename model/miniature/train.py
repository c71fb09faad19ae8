# SPDX-License-Identifier: Apache-2.0
"""Train the miniature: first the codec, then the transformer on its latents.

    python -m reeltime.model.miniature.train

Teacher forcing over two copies of a window (as in block-causal diffusion training, e.g. CausVid,
arXiv 2412.07772): context copies C are what the cache will hold, target copies T are denoised.

    picture | C0 C1 C2 | T0 T1 T2 T3        T_i sees the picture, C_j for j < i, and itself

C0 is the first state, always clean.  C1, C2 are history: at the noisy-cache level when the targets
are at intermediate steps, clean when they are at the last step (TwinCache, Vidu S1 section 2.3.1).
In the second half of training part of the clean history is the model's own prediction, renoised
targets included, so that it learns to stand on what it made itself (Self-Forcing's lesson at the
price of one extra forward pass).
"""

from __future__ import annotations

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reeltime import rope_kv, sla
from reeltime.sla import BLOCK_K

from ..codec import ConvCodec, to_planes
from ..config import PRESETS, ModelConfig
from ..layers import SelfAttention
from ..sampler import add_noise, timesteps, warp
from ..transformer import CausalTransformer
from .avatar import Identity, render
from .control import picture_tokens
from .data import LATE_CHUNKS, clips, stills

CHUNKS = 4  # target chunks in a training window
console = Console(stderr=True)


class TrainingMemory:
    """Self-attention over picture | C0 C1 C2 | T0 T1 T2 T3, group by group: no mask, no waste."""

    def __init__(
        self, config: ModelConfig, grid: tuple[int, int], backend: str = "reference"
    ) -> None:
        self.sla, self.backend = config.sla, backend
        if config.sla is not None:  # as many blocks as a full window, also where there are fewer
            blocks = config.window * -(-grid[0] * grid[1] // BLOCK_K)
            self.topk = max(1, int(config.sla.topk * blocks))
        c, n = config.chunk, grid[0] * grid[1]
        chunk = [list(range(1 + c * i, 1 + c * (i + 1))) for i in range(CHUNKS)]
        positions = [0, *sum(chunk[:-1], []), *sum(chunk, [])]
        self.table = rope_kv.rope_table(torch.tensor(positions), grid, config.head_dim)
        self.context_end = n * (1 + c * (CHUNKS - 1))
        # Context is block-causal: picture, then one group per chunk.  Targets see what is before.
        self.ends = [n * (1 + c * i) for i in range(CHUNKS)]
        self.chunk_tokens = n * c

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attn: SelfAttention) -> Tensor:
        q, k = (
            rope_kv.query(
                x, self.table[None], num_heads=attn.num_heads, norm_weight=w.weight,
                eps=attn.eps, backend=self.backend,
            )[0]
            for x, w in ((q, attn.norm_q), (k, attn.norm_k))
        )  # (B, L, H, D)  # fmt: skip
        v = v.unflatten(-1, (attn.num_heads, -1))
        q, k, v = (x.to(v.dtype) for x in (q, k, v))
        out, start = [], 0
        for end in self.ends:
            out.append(self._see(q[:, start:end], k[:, :end], v[:, :end], attn))
            start = end
        for i, end in enumerate(self.ends):
            own = slice(self.context_end + i * self.chunk_tokens,
                        self.context_end + (i + 1) * self.chunk_tokens)  # fmt: skip
            keys = torch.cat([k[:, :end], k[:, own]], dim=1)
            values = torch.cat([v[:, :end], v[:, own]], dim=1)
            out.append(self._see(q[:, own], keys, values, attn))
        return torch.cat(out, dim=1).flatten(2)

    def _see(self, q: Tensor, k: Tensor, v: Tensor, attn: SelfAttention) -> Tensor:
        """[B, L, H, D], as the stream will compute it: dense, or sparse and linear."""
        if self.sla is not None:
            with torch.autocast(q.device.type, enabled=False):  # the ranking is exact in the stream
                return sla.sla(
                    q, k, v, topk=self.topk, over=self.sla.over, phi=self.sla.phi,
                    backend=self.backend, **attn.projection,
                )  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def progress_bar(transient: bool = False) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        refresh_per_second=2,
    )


def clock_rate(fraction: float, step: int, warmup: int = 50, decay: float = 0.7) -> float:
    """Learning rate factor: linear warm-up by steps, then linear to zero over the last `decay`."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.02, (1 - fraction) / decay))


def train_codec(minutes: float, seed: int, count: int, workers: int, folder: Path) -> ConvCodec:
    """A denoising autoencoder: latents of unit variance that survive a little noise."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = 1_000_000_000 + seed * 10_000_000
    pool = torch.empty(count, 4, 128, 128, 3, dtype=torch.uint8)
    with progress_bar() as bar:
        task = bar.add_task("codec pictures", total=count, status="")
        for i, frames in enumerate(stills(range(base, base + count), workers)):
            pool[i] = torch.from_numpy(frames)
            bar.update(task, completed=i + 1)
    pool = pool.flatten(0, 1)
    codec = ConvCodec().to(memory_format=torch.channels_last)
    parameters = list(codec.parameters())
    optimiser = torch.optim.AdamW(parameters, 2e-3, betas=(0.9, 0.97), weight_decay=0.01)
    log, start, step = TrainingLog(folder / "codec.json"), time.monotonic(), 0
    with progress_bar() as bar:
        task = bar.add_task("codec", total=1000, status="")
        while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * clock_rate(fraction, step)
            x = to_planes(pool[torch.randint(count * 4, (16,), generator=generator)])
            z = codec.encoder(x)
            mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) + 1e-4
            with torch.no_grad():
                rate = max(0.02, 1 / (step + 1))
                codec.mean.lerp_(mean, rate)
                codec.std.lerp_(std, rate)
            level = 0.25 * torch.rand(len(z), 1, 1, 1) * std[:, None, None]
            error = codec.decoder(z + level * torch.randn_like(z)) - x
            square = error.square().mean()
            scale = mean.square().mean() + std.log().square().mean()
            loss = 4 * square + 0.3 * error.abs().mean() + 1e-3 * scale
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step += 1
            log.add(step, start, square.item())
            status = f"step {step}, PSNR {-10 * math.log10(log.smooth / 4):.2f} dB"
            bar.update(task, completed=1000 * fraction, status=status)
    log.save()
    save_weights(folder / "codec.safetensors", codec.state_dict())
    return codec


class TrainingLog:
    """Losses over time: a JSON file, from which the picture of the curve is drawn."""

    def __init__(self, path: Path) -> None:
        self.path, self.smooth = path, float("nan")
        self.rows: list[tuple[int, float, float]] = []

    def add(self, step: int, start: float, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}: lower the learning rate")
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        if step % 20 == 0:
            self.rows.append((step, round((time.monotonic() - start) / 60, 3), self.smooth))
        if step % 200 == 0:
            self.save()

    def resume(self) -> None:
        if self.path.exists():
            self.rows = [tuple(r) for r in json.loads(self.path.read_text())]

    def save(self) -> None:
        self.path.write_text(json.dumps(self.rows))


def draw_curves(folder: Path) -> None:
    """loss.png: both loss curves, from the logs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, name in zip(axes, ("codec", "transformer"), strict=True):
        path = folder / f"{name}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        axis.plot([r[0] for r in rows], [r[2] for r in rows], lw=1.2)
        axis.set(title=name, xlabel="step", ylabel="mean squared error", yscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """float16 on disk, written whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().half() for k, v in state.items()}, temporary)
    temporary.replace(path)


def latent_pool(codec: Path, seeds: range, workers: int) -> dict[str, Tensor]:
    """Training clips, see `data.make_clip`, stacked: each value [people, ...]."""
    rows: list[dict[str, Tensor]] = []
    with progress_bar() as bar:
        task = bar.add_task("clips", total=len(seeds), status="")
        for row in clips(seeds, workers, codec):
            rows.append(row)
            bar.update(task, completed=len(rows))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass
class Windows:
    """Random training windows of a latent pool: four chunks, the first of them the first state."""

    pool: dict[str, Tensor]
    chunk: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.rest = torch.from_numpy(picture_tokens())  # (1, 4, 48)

    def sample(self, batch: int) -> Window:
        c, g, pool = self.chunk, self.generator, self.pool
        person = torch.randint(len(pool["pictures"]), (batch,), generator=g)
        first = torch.randint(1, LATE_CHUNKS - CHUNKS + 3, (batch,), generator=g)
        late = first[:, None] * c + torch.arange(c * (CHUNKS - 1))
        frames = torch.cat([torch.arange(c).expand(batch, c), late], dim=1)  # (B, 4 c)
        tokens = pool["tokens"][person[:, None], frames]
        rest = self.rest.expand(batch, *self.rest.shape)
        return Window(
            picture=pool["pictures"][person, None].float(),
            x0=pool["latents"][person[:, None], frames].float(),
            tokens=torch.cat([rest, tokens], dim=1),
            person=person,
            frames=frames,
        )

    def draw(self, window: Window, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ground-truth pixels of `count` random video frames of each row of a window.

        Returns:
            index [B, count] into the window's video frames, pixels [B, count, S, S, 3] uint8, and
            mouth [B, count, S, S] bool: the pixels that another mouth would change.
        """
        batch, latent_frames = window.frames.shape
        index = torch.randint(4 * latent_frames, (batch, count), generator=self.generator)
        video = torch.gather(window.frames, 1, index // 4) * 4 + index % 4
        pixels, mouth = [], []
        for person, moments in zip(window.person.tolist(), video, strict=True):
            who = Identity.from_vector(self.pool["people"][person].numpy())
            poses = self.pool["poses"][person, moments].numpy()
            other = poses.copy()
            other[:, -1] = poses[:, -1] < 0.5
            pixels.append(render(who, poses))
            mouth.append((pixels[-1] != render(who, other)).any(-1))
        return index, torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(mouth))


@dataclass
class Window:
    """picture [B, 1, C, h, w], x0 [B, 4 chunks, C, h, w], tokens [B, 1 + frames, 4, 48]; which
    person [B] and which latent frames [B, 4 chunks] of the pool these are."""

    picture: Tensor
    x0: Tensor
    tokens: Tensor
    person: Tensor
    frames: Tensor

    def to(self, device: torch.device) -> Window:
        """What the network sees on `device`; the renderer's indices stay."""
        picture, x0, tokens = (t.to(device) for t in (self.picture, self.x0, self.tokens))
        return Window(picture, x0, tokens, self.person, self.frames)


class Levels:
    """Noise levels as the stream will use them (3 steps), with enough others for 1, 2 and 4."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        self.steps = [t / 1000 for t in timesteps(3, config.shift)]
        self.shift, self.generator = config.shift, generator

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """Target levels [B, CHUNKS] and history level [B, 1], as sigma."""
        g = self.generator
        last = torch.rand(batch, 1, generator=g) < 0.4  # targets at the last step
        pick = torch.randint(2, (batch, CHUNKS), generator=g)
        early = torch.tensor(self.steps)[pick]
        other = warp(torch.rand(batch, CHUNKS, generator=g), self.shift)
        free = torch.rand(batch, CHUNKS, generator=g) < 0.2
        target = torch.where(last, torch.tensor(self.steps[-1]), early)
        target = torch.where(free, other, target)
        clean = last | (torch.rand(batch, 1, generator=g) < 0.25)
        return target, torch.where(clean, 0.0, self.steps[1])


def predict_x0(
    net: CausalTransformer,
    memory: TrainingMemory,
    window: Window,
    levels: tuple[Tensor, Tensor],
    own_history: float,
) -> Tensor:
    """x0 of the target copies of a window, [B, 4 chunks, C, h, w]."""
    picture, x0, tokens = window.picture, window.x0, window.tokens
    target, history = (level.to(x0.device) for level in levels)
    c, rows = net.config.chunk, len(x0)
    zeros, rand = x0.new_zeros, functools.partial(torch.rand, device=x0.device)
    context_frames = c * (CHUNKS - 1)
    sigma_target = target.repeat_interleave(c, 1)  # (B, 4 c)
    sigma_context = torch.cat([zeros(rows, c), history.expand(rows, 2 * c)], dim=1)
    sigma = torch.cat([zeros(rows, 1), sigma_context, sigma_target], dim=1)
    all_tokens = torch.cat([tokens[:, : 1 + context_frames], tokens[:, 1:]], dim=1)
    context = net.embed_context(all_tokens, memory.backend)

    def forward(clean: Tensor, aim: Tensor) -> Tensor:
        """Predict x0 of the targets: history made from `clean`, targets noised from `aim`."""
        whole = torch.cat([picture, clean[:, :context_frames], aim], dim=1)
        noised = add_noise(whole, torch.randn_like(whole), sigma[..., None, None, None])
        with torch.autocast(x0.device.type, torch.bfloat16):
            out = net(noised, sigma * 1000, context, memory, backend=memory.backend)
        return out[:, 1 + context_frames :].float()

    clean, aim = x0, x0
    if own_history > 0:
        with torch.no_grad():
            made = forward(x0, x0)
        mine = (rand(rows, 1, 1, 1, 1) < own_history).to(x0.dtype)
        clean = torch.lerp(x0, made, mine)
        aim = torch.lerp(x0, made, mine * (rand(rows, 4 * c, 1, 1, 1) < 0.5).to(x0.dtype))
    # A little noise on what the cache holds: the stream's own history is never perfect either.
    clean = clean + 0.1 * rand(rows, 1, 1, 1, 1) * torch.randn_like(clean)
    return forward(clean, aim)


def pixel_loss(codec: ConvCodec, predicted: Tensor, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Weighted mean squared error, on [-1, 1], of a few decoded video frames.

    What moves is a small part of the picture (a mouth is 2% of it) and all of what a person looks
    at: pixels count for more the further they are from the mean of the row's frames, and more
    again where the mouth is.
    """
    index, pixels, mouth = (t.to(predicted.device) for t in drawn)
    z = predicted.unflatten(2, (4, -1)).flatten(1, 2)  # (B, video frames, 16, h, w)
    z = z[torch.arange(len(z))[:, None], index].flatten(0, 1)
    z = z * codec.std[:, None, None] + codec.mean[:, None, None]
    truth = to_planes(pixels.flatten(0, 1))
    rows = truth.unflatten(0, index.shape)
    moved = (rows - rows.mean(1, keepdim=True)).abs().mean(2, keepdim=True).flatten(0, 1)
    weight = 1 + 6 * moved + 10 * mouth.flatten(0, 1)[:, None]
    return (weight * (codec.decoder(z) - truth).square()).mean()


def make_optimisers(net: CausalTransformer, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for the rest."""
    hidden = [p for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    ids = {id(p) for p in hidden}
    rest = [p for p in net.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(
        hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.97), weight_decay=0.0)
    return [muon, adam]


class Average:
    """Exponential average of parameters: what is kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.steps = module, 0
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        keep = min(0.998, (self.steps + 1) / (self.steps + 20))
        current = [v.detach() for v in self.module.state_dict().values()]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - keep)


def train_transformer(
    codec: ConvCodec,
    pool: dict[str, Tensor],
    minutes: float,
    seed: int,
    folder: Path,
    *,
    batch: int = 6,
    rate: float = 1.5e-3,
    resume: bool = False,
) -> None:
    """Diffusion training on latents; from 60% on, also on pixels, and of the decoder with it."""
    config = PRESETS["miniature"]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = CausalTransformer(config)
    with torch.no_grad():  # start as the identity: nothing is added, zero is predicted
        for block in net.blocks:
            block.modulation.zero_()
        net.time_projection[1].weight.mul_(0.1)
        net.head.head.weight.zero_()
        net.head.head.bias.zero_()
    grid = tuple(s // p for s, p in zip(pool["pictures"].shape[-2:], config.patch, strict=True))
    memory = TrainingMemory(config, grid)
    windows, levels = Windows(pool, config.chunk, generator), Levels(config, generator)
    codec.requires_grad_(False)
    codec.decoder.requires_grad_(True)  # the encoder is fixed: the pool is made with it
    decoder = list(codec.decoder.parameters())
    optimisers = [*make_optimisers(net, rate), torch.optim.AdamW(decoder, rate, betas=(0.9, 0.97))]
    averages = {"transformer": Average(net), "codec": Average(codec)}
    log, spent, step = TrainingLog(folder / "transformer.json"), 0.0, 0
    checkpoint = folder / "transformer.ckpt"
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        codec.load_state_dict(saved["codec"])
        step, spent = saved["step"], saved["spent"]
        log.resume()
        for name, average in averages.items():
            average.values, average.steps = saved["averages"][name], step
        for o, state in zip(optimisers, saved["optimisers"], strict=True):
            o.load_state_dict(state)
    start = time.monotonic() - spent

    def save() -> None:
        state = {
            "net": net.state_dict(),
            "codec": codec.state_dict(),
            "averages": {name: average.values for name, average in averages.items()},
            "step": step,
            "spent": time.monotonic() - start,
            "optimisers": [o.state_dict() for o in optimisers],
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        log.save()
        for name, average in averages.items():
            save_weights(folder / "shipped" / f"{name}.safetensors", average.values)

    with progress_bar() as bar:
        task = bar.add_task("transformer", total=1000, status="")
        try:
            while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
                factor = clock_rate(fraction, step, warmup=100)
                for optimiser in optimisers:
                    for group in optimiser.param_groups:
                        group["lr"] = rate * factor
                    optimiser.zero_grad()
                own = 0.5 if fraction > 0.45 and step % 2 else 0.0
                window = windows.sample(batch)
                predicted = predict_x0(net, memory, window, levels.sample(batch), own)
                error = F.mse_loss(predicted, window.x0)
                loss = error
                if fraction > 0.6:
                    loss = loss + 40 * pixel_loss(codec, predicted, windows.draw(window, 8))
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                nn.utils.clip_grad_norm_(decoder, 1.0)
                for optimiser in optimisers:
                    optimiser.step()
                for average in averages.values():
                    average.update()
                step += 1
                log.add(step, start, error.item())
                status = f"step {step}, loss {log.smooth:.4f}"
                bar.update(task, completed=1000 * fraction, status=status)
                if step % 500 == 0:
                    save()
        finally:  # Ctrl-C keeps what was learned; --resume goes on from there
            save()


def main(
    folder: Annotated[Path, typer.Option(help="Where weights, logs and loss.png go.")] = Path(
        "build/miniature"
    ),
    minutes: Annotated[float, typer.Option(help="Minutes for the transformer.")] = 70.0,
    codec_minutes: Annotated[float, typer.Option(help="Minutes for the codec.")] = 7.5,
    people: Annotated[int, typer.Option(help="Clips to render for the transformer.")] = 2400,
    pictures: Annotated[int, typer.Option(help="People to render for the codec.")] = 6000,
    workers: Annotated[int, typer.Option(help="Rendering processes.")] = 2,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 6,
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train the miniature and write codec.safetensors, transformer.safetensors and loss.png."""
    (folder / "shipped").mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    weights = folder / "codec.safetensors"
    if weights.exists():
        codec = ConvCodec()
        codec.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    else:
        codec = train_codec(codec_minutes, seed, pictures, workers, folder)
    cache = folder / f"pool-{seed}-{people}.pt"
    if cache.exists():
        pool = torch.load(cache, weights_only=True)
    else:
        pool = latent_pool(weights, range(seed * people, (seed + 1) * people), workers)
        torch.save(pool, cache)
    train_transformer(codec, pool, minutes, seed, folder, batch=batch, resume=resume)
    draw_curves(folder)
    console.print(f"weights in {folder / 'shipped'}, curves in {folder / 'loss.png'}")


if __name__ == "__main__":
    typer.run(main)
