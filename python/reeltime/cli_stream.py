# SPDX-License-Identifier: Apache-2.0
"""`reeltime stream` and `reeltime avatar`.

torch, av and numpy are imported inside the commands: --help must not wait for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from reeltime.model.media import VideoWriter
    from reeltime.model.miniature.director import Director, Voice
    from reeltime.model.stream import Stream

FPS = 25
DEMO_SECONDS = 10.0
INTERACTIVE_SECONDS = 60.0
DEMO_CUES = ("turn left@1", "turn right@2.5", "raise hand@4", "nod@6", "smile@8")
WARM_UP = 2  # chunks that count for nothing: the first passes allocate and fill caches
MAX_THREADS = 4  # tensors this small gain nothing from more

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(stream)
    app.command()(avatar)


# --- Checks before any work ---------------------------------------------------------------------


def check_out(out: Path, suffix: str, inputs: tuple[Path | None, ...] = ()) -> None:
    """out is a file that can be written and is none of the inputs.

    Raises:
        ValueError: odd suffix, a folder, an input, or not writable.
        FileNotFoundError: its folder is missing.
    """
    if out.suffix.lower() != suffix:
        raise ValueError(f"out: expected a name that ends in {suffix}, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: no such folder: {out.parent}")
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"out: no permission to write {out}")
    for path in inputs:
        if path is not None and path.exists() and out.exists() and out.samefile(path):
            raise ValueError(f"out: {out} is also an input")


def positive(name: str, value: float, unit: str) -> float:
    """value, which must be a number above zero (infinity is one)."""
    if not value > 0:
        raise ValueError(f"{name}: expected {unit} above 0, got {value:g}")
    return value


# --- While it runs ------------------------------------------------------------------------------


@dataclass
class Ending:
    """Why a stream ends before its last frame: Ctrl-C, a termination, or "quit"."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: int = 0


@contextmanager
def noticing_signals(ending: Ending) -> Iterator[None]:
    """Ctrl-C ends the stream after the chunk in hand; a second one ends the process."""

    def end(number: int, _: object) -> None:
        ending.signal = number
        ending.event.set()
        signal.signal(number, before[number])

    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TypedLines:
    """Lines of a file descriptor with the time each one came, read by a thread.

    "quit" sets the event.  The descriptor is read directly: a thread that waits inside sys.stdin
    would hold its lock when the interpreter shuts down.
    """

    def __init__(self, descriptor: int, quit_event: threading.Event) -> None:
        self._lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self._descriptor, self._quit = descriptor, quit_event
        threading.Thread(target=self._read, name="typed lines", daemon=True).start()

    def _read(self) -> None:
        rest = b""
        while data := self._some():
            came = time.perf_counter()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._put(came, line)
        self._put(time.perf_counter(), rest)  # the last line may lack its end

    def _some(self) -> bytes:
        try:
            return os.read(self._descriptor, 4096)
        except OSError:  # a terminal that went away has no more lines
            return b""

    def _put(self, came: float, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if text.lower() == "quit":
            self._quit.set()
        elif text:
            self._lines.put((came, text))

    def waiting(self) -> list[tuple[float, str]]:
        """What came since the last call: (time, line)."""
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return lines


def stdin_descriptor() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError("interactive: there is no standard input to read lines from") from error


@dataclass
class Run:
    """One stream from its first frame to its last, and what was measured on the way."""

    stream: Stream
    director: Director
    voice: Voice
    writer: VideoWriter
    console: Console
    frames: int | None  # None: until it is ended
    chunk: int  # video frames of a chunk
    ending: Ending
    lines: TypedLines | None = None
    digest: Any = None
    ttff_ms: float | None = None  # from the picture in memory to the first frames in memory
    latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    frames_timed: int = 0  # after the warm-up, where there are any
    seconds_timed: float = 0.0  # that they took: wall time, pauses left out
    _since: float = 0.0

    def play(self, picture: Any, bar: Progress | None) -> None:
        """Generate and write chunk after chunk, from the picture [H, W, 3] uint8."""
        import torch

        from reeltime.model.miniature.control import picture_tokens

        task = bar.add_task("stream", total=self.frames, fps=0.0) if bar else None
        start = self._since = time.perf_counter()
        recent = deque([(start, 0)], maxlen=8)
        self.stream.start(torch.from_numpy(picture)[None], torch.from_numpy(picture_tokens())[None])
        while self.left() > 0:
            if self.lines:
                self._keep_pace(start)
            if self.ending.event.is_set():
                break
            self._next_chunk(start)
            if self.writer.frames == WARM_UP * self.chunk and self.left() > 0:
                self.frames_timed, self._since = 0, time.perf_counter()
            recent.append((time.perf_counter(), self.writer.frames))
            if bar and task is not None:
                (then, before), (now, done) = recent[0], recent[-1]
                bar.update(task, completed=done, fps=(done - before) / (now - then))
        self.writer.close()
        self.seconds_timed = time.perf_counter() - self._since

    def _next_chunk(self, start: float) -> None:
        import torch

        typed = self._take_lines()
        envelope, samples = self.voice.next_chunk(self.chunk)
        tokens = torch.from_numpy(self.director.next_chunk(envelope))[None]
        pixels = self.stream.next_frames(tokens)[0].numpy()  # (T, H, W, 3)
        now = time.perf_counter()
        if self.ttff_ms is None:
            self.ttff_ms = 1e3 * (now - start)
        for came, text, frame in typed:
            self.latency_ms.append(1e3 * (now - came))
            self._say(f"{text}: frame {frame}, {self.latency_ms[-1]:.0f} ms after the line")
        keep = int(min(self.chunk, self.left()))
        pixels, samples = pixels[:keep], samples[: keep * len(samples) // self.chunk]
        if self.digest:
            self.digest.update(pixels.tobytes())
        self.writer.write(pixels, samples)
        self.frames_timed += self.chunk  # made, though the end may cut some off

    def left(self) -> float:
        return math.inf if self.frames is None else self.frames - self.writer.frames

    def fps(self) -> float | None:
        """Frames made over wall time, the writing of the video included."""
        return self.frames_timed / self.seconds_timed if self.frames_timed else None

    def _keep_pace(self, start: float) -> None:
        ahead = start + self.writer.frames / FPS - time.perf_counter()
        if ahead > 0:
            before = time.perf_counter()
            self.ending.event.wait(ahead)
            self._since += time.perf_counter() - before

    def _take_lines(self) -> list[tuple[float, str, int]]:
        taken = []
        for came, text in self.lines.waiting() if self.lines else ():
            try:
                taken.append((came, text, self.director.say(text)))
            except ValueError as error:
                self._say(str(error))
        return taken

    def _say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)


# --- Afterwards ---------------------------------------------------------------------------------


def peak_memory_mb() -> float | None:
    """Largest resident size of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def percentiles(ms: list[float]) -> dict[str, float | None]:
    if not ms:
        return {"p50_ms": None, "p95_ms": None}
    import numpy as np

    p50, p95 = np.percentile(ms, [50, 95])
    return {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2)}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def measured(run: Run) -> dict[str, Any]:
    """What a run was and took: milliseconds per chunk, the warm-up left out where more remains."""
    import torch

    clock = {name: list(ms) for name, ms in run.stream.clock.ms.items()}
    write = list(run.writer.ms)
    if len(clock["decode"]) > WARM_UP:
        clock = {name: ms if name == "encode" else ms[WARM_UP:] for name, ms in clock.items()}
        write = write[WARM_UP:]
    passes = (clock["denoise"], clock["cache_pass"], clock["decode"])
    total = [sum(parts) for parts in zip(*passes, strict=False)]
    phases = {name: percentiles(ms) for name, ms in clock.items()}
    phases |= {"total": percentiles(total), "write": percentiles(write)}
    memory = run.stream.memory
    return {
        "frames": run.writer.frames,
        "seconds": run.writer.frames / FPS,
        "fps": rounded(run.fps()),
        "generation_fps": rounded(1e3 * run.chunk * len(total) / sum(total) if total else None),
        "ttff_ms": rounded(run.ttff_ms),
        "chunk_ms_p50": phases["total"]["p50_ms"],
        "chunk_ms_p95": phases["total"]["p95_ms"],
        "phases": phases,
        "latency_ms_p50": percentiles(list(run.latency_ms))["p50_ms"],
        "peak_memory_mb": rounded(peak_memory_mb()),
        "cache_mb": rounded(memory.nbytes / 2**20 if memory else None),
        "threads": torch.get_num_threads(),
        "frames_hash": run.digest.hexdigest() if run.digest else None,
    }


def draw(console: Console, document: dict[str, Any], chunk: int) -> None:
    """The one table at the end."""

    def cell(value: float | None, unit: str) -> str:
        return "not measured" if value is None else f"{value:.1f} {unit}"

    frames, size = document["frames"], f"{document['seconds']:.2f} s"
    table = Table("", "p50", "p95", title=f"{document['out']}: {frames} frames, {size}")
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("time to first frame", cell(document["ttff_ms"], "ms"), "")
    labels = {
        "encode": "encode (the picture, once)",
        "denoise": f"denoise ({document['steps']} steps)",
        "cache_pass": "cache pass",
        "decode": "decode",
        "total": f"total per chunk of {chunk} frames",
        "write": "video writing (its own thread)",
    }
    for name, label in labels.items():
        row = document["phases"][name]
        once = name == "encode"
        table.add_row(
            label,
            cell(row["p50_ms"], "ms"),
            "" if once else cell(row["p95_ms"], "ms"),
            end_section=once or name == "total",
        )
    verdict = "met" if document["meets_target"] else "missed"
    target = f"target {document['target_fps']:g} {verdict}"
    table.add_section()
    table.add_row("generation alone", cell(document["generation_fps"], "FPS"), "")
    table.add_row("with video writing", cell(document["fps"], "FPS"), target)
    if document["latency_ms_p50"] is not None:
        table.add_row("typed line to changed frame", cell(document["latency_ms_p50"], "ms"), "")
    table.add_row("peak memory", cell(document["peak_memory_mb"], "MB"), "")
    console.print(table)


# --- The commands -------------------------------------------------------------------------------


def stream(
    image: Annotated[
        Path | None, typer.Option(help="The avatar's picture; a bundled one by default.")
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="The voice, any sound file; the bundled one by default.")
    ] = None,
    say: Annotated[
        list[str] | None,
        typer.Option(help='Timed instruction, "turn left@2"; repeat it for more.'),
    ] = None,
    out: Annotated[Path, typer.Option(help="The video to write, .mp4.")] = Path("reeltime.mp4"),
    seconds: Annotated[
        float | None,
        typer.Option(
            help=f'Length, "inf" for until Ctrl-C. By default that of --audio, '
            f"{DEMO_SECONDS:g} without, {INTERACTIVE_SECONDS:g} with --interactive.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="What a pass sees: vidu_s1, self_forcing, longlive, flowact_r1 or liveact."
        ),
    ] = "vidu_s1",
    steps: Annotated[int, typer.Option(min=1, max=4, help="Denoising steps per chunk.")] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Same seed and threads, same frames.")
    ] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of weights; the bundled ones by default.")
    ] = None,
    sparsity: Annotated[
        int,
        typer.Option(
            min=0, max=99, help="Percent of key blocks left to linear attention: 0, 50 or 90."
        ),
    ] = 0,
    target_fps: Annotated[
        float | None,
        typer.Option(help="Exit 1 below it; 25 for the table only.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"torch threads; by default one per core, {MAX_THREADS} at most.",
            show_default=False,
        ),
    ] = None,
    loop_audio: Annotated[
        bool, typer.Option("--loop-audio", help="Start the voice again at its end, not silence.")
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Also read instructions from stdin, one per line; runs in real time; quit ends.",
        ),
    ] = False,
    frames_hash: Annotated[
        bool, typer.Option("--frames-hash", help="SHA-256 of the frames, in the JSON document.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a picture speak and act: one avatar, one voice, timed or typed instructions.

    Without arguments: ten seconds from the bundled examples.  Ctrl-C ends the stream early and
    leaves a playable file (exit code 130).
    """
    # The cheap checks come before the imports: bad input should not wait for torch.
    if target_fps is not None:
        positive("target-fps", target_fps, "frames per second")
    if seconds is not None:
        positive("seconds", seconds, "a length")
    check_out(out, ".mp4", (image, audio))
    descriptor = stdin_descriptor() if interactive else None

    from reeltime.model.miniature import director as directing

    notes = Console(stderr=True)
    examples = Path(directing.__file__).parent / "examples"
    voice = directing.Voice(audio or examples / "voice.wav", loop=loop_audio)
    if not voice.seconds:
        notes.print(f"audio: no samples in {audio}: the stream is silent", markup=False)
    if seconds is None:
        seconds = INTERACTIVE_SECONDS if interactive else DEMO_SECONDS
        if audio and voice.seconds and not interactive:
            seconds = voice.seconds
    if say is None and image is None and audio is None and not interactive:
        say = [cue for cue in DEMO_CUES if float(cue.partition("@")[2]) < seconds]
    cues = [directing.parse_cue(text, seconds) for text in say or ()]

    from reeltime.model.miniature.picture import read_picture

    picture = read_picture(image or examples / "avatar-20.png")
    if picture.message:
        notes.print(picture.message, markup=False, soft_wrap=True)

    start = time.perf_counter()
    generator = load_stream(layout, steps, seed, checkpoint, threads, sparsity)
    load_ms = 1e3 * (time.perf_counter() - start)

    from reeltime.model.media import VideoWriter

    ending = Ending()
    height, width = picture.pixels.shape[:2]
    with noticing_signals(ending), VideoWriter(out, width, height, fps=FPS) as writer:
        run = Run(
            generator,
            directing.Director(cues),
            voice,
            writer,
            notes,
            frames=None if math.isinf(seconds) else math.ceil(seconds * FPS - 1e-6),
            chunk=generator.layout.chunk * generator.codec.config.frames_per_latent,
            ending=ending,
            lines=None if descriptor is None else TypedLines(descriptor, ending.event),
            digest=hashlib.sha256() if frames_hash else None,
        )
        # A bar that redraws itself would write over what is being typed.
        with _progress(notes) if run.lines is None else nullcontext() as bar:
            run.play(picture.pixels, bar)

    document = measured(run) | {
        "out": str(out),
        "target_fps": target_fps or float(FPS),
        "meets_target": (run.fps() or 0.0) >= (target_fps or FPS),
        "load_ms": round(load_ms, 1),
        "layout": layout,
        "steps": steps,
        "seed": seed,
        "sparsity": sparsity,
        "signal": ending.signal,
    }
    draw(Console(stderr=as_json), document, run.chunk)
    if as_json:
        print(json.dumps(document))
    if ending.signal:
        raise typer.Exit(128 + ending.signal)
    if target_fps is not None and not document["meets_target"]:
        raise typer.Exit(1)


def load_stream(
    layout: str,
    steps: int,
    seed: int,
    checkpoint: Path | None,
    threads: int | None,
    sparsity: int = 0,
) -> Stream:
    """The miniature, ready to start.  Raises ValueError, FileNotFoundError: layout, checkpoint."""
    import torch

    from reeltime.model import layout as layouts
    from reeltime.model.config import preset
    from reeltime.model.miniature.weights import load_miniature
    from reeltime.model.stream import Stream

    chosen = layouts.layout(layout, preset("miniature"))
    transformer, codec = load_miniature(checkpoint, sparsity=sparsity)
    torch.set_num_threads(threads or min(available_cores(), MAX_THREADS))
    torch.set_flush_denormal(True)
    return Stream(transformer, codec, chosen, steps=steps, seed=seed)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames, {task.fields[fps]:.1f} FPS"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def avatar(
    seed: Annotated[int, typer.Option(min=0, help="Who: same seed, same person.")] = 7,
    out: Annotated[Path, typer.Option(help="The picture to write, .png.")] = Path("avatar.png"),
    count: Annotated[
        int, typer.Option(min=1, max=10_000, help="Several, from consecutive seeds.")
    ] = 1,
    pose: Annotated[
        str,
        typer.Option("--pose", "--say", help="An instruction to show; a stream wants neutral."),
    ] = "neutral",
    size: Annotated[
        int, typer.Option(min=32, max=2048, help="Pixels per side; a stream wants 128.")
    ] = 128,
    as_json: AsJson = False,
) -> None:
    """Draw people that `reeltime stream --image` takes; none of them was trained on.

    With --count, the seed is added to each name: face.png becomes face-7.png, face-8.png, ...
    """
    check_out(out, ".png")

    import numpy as np
    from PIL import Image

    from reeltime.model.miniature.avatar import random_identity, render
    from reeltime.model.miniature.control import Track, instruction_id

    track = Track()
    track.say(instruction_id(pose))
    poses = track.advance(np.zeros(FPS, np.float32))[1]
    shown = poses[[int(np.abs(poses).sum(axis=1).argmax())]]  # a nod is shown at its lowest
    rows: list[dict[str, Any]] = []
    for number in range(seed, seed + count):
        path = out if count == 1 else out.with_stem(f"{out.stem}-{number}")
        # Training draws its people from default_rng(number): this is another sequence.
        who = random_identity(np.random.default_rng((number, 1)))
        Image.fromarray(render(who, shown, size)[0]).save(path)
        rows.append({"out": str(path), "seed": number, "pose": pose, "size": size})
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        Console().print(Text(row["out"]), soft_wrap=True)
