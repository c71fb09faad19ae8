# SPDX-License-Identifier: Apache-2.0
"""`reeltime plan`: frames per second on cards that are not here, technique by technique.

torch is imported inside the command: --help must not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from reeltime.cli_stream import check_out
from reeltime.cli_tables import grid, report_console

if TYPE_CHECKING:
    from reeltime.bench.hardware import Card
    from reeltime.bench.memory import Held
    from reeltime.bench.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(plan)


def plan(
    gpu: Annotated[
        str | None,
        typer.Option(help="rtx-5090, h200, a100 ...; every card by default.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="vidu-s1, flowact-r1 ...; every one by default.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Geometry: wan-1.3b, wan-5b or wan-14b, at the target's size, or wan-1.3b-540p, "
            "-480p at one of their own; the target's by default.",
            show_default=False,
        ),
    ] = None,
    sla: Annotated[
        float | None,
        typer.Option(help="Share of key blocks that are attended to.", show_default="dense"),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Cards side by side, by Ulysses.")] = 1,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the waterfalls, .png.", show_default=False)
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="What a step holds at each quality level, and which cards have room for it.",
        ),
    ] = False,
    quality: Annotated[
        str | None,
        typer.Option(
            help="With --memory: bf16, int8, fp8, int8+sla or fp8+sla; all of them by default.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="With --memory: vidu_s1, self_forcing, longlive ...; the target's by default.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Plan a step from first principles: FLOPs, bytes, data sheets and the shares of our kernels.

    Without --gpu: which cards meet each target.  With it: the waterfall of what every technique
    brings.  Denoising and cache pass, without the codec.  Exit code 1 if a named target is missed
    on a named card, or with --memory if a named card lacks the room.
    """
    if picture is not None:
        check_out(picture, ".png")
    from reeltime import checks
    from reeltime.bench import hardware
    from reeltime.bench import plan as planner

    known = planner.targets()
    if target is not None:
        checks.choice("target", target, tuple(known))
    chosen = [one for name, one in known.items() if target in (None, name)]
    cards = hardware.CARDS if gpu is None else (hardware.lookup(gpu),)
    if memory:
        others = {"sla": sla, "picture": picture, "gpus": None if gpus == 1 else gpus}
        for option, value in others.items():
            if value is not None:
                checks.fail(option, "none with --memory", value, "It is of one card, by --quality.")
        levels = show_memory(target, preset, quality, layout, cards, as_json)
        if gpu is not None and not all(one.held_by for one in levels):
            raise typer.Exit(1)
        return
    for option, name in (("quality", quality), ("layout", layout)):
        if name is not None:
            checks.fail(option, "none without --memory", repr(name), "Pass --memory.")
    console = report_console(as_json, wider=20)
    found = planner.everywhere(chosen, cards=cards, preset=preset, sla=sla, gpus=gpus)
    if picture is not None:
        from reeltime.bench import waterfall

        waterfall.draw(found, picture)
    if as_json:
        print(json.dumps({"rows": [asdict(one) for one in found]}, allow_nan=False))
    if gpu is None:
        draw_overview(console, found)
    else:
        for one in found:
            draw_plan(console, one)
    if gpu is not None and target is not None and not found[0].meets_target:
        raise typer.Exit(1)


def show_memory(
    target: str | None,
    preset: str | None,
    quality: str | None,
    layout: str | None,
    cards: Sequence[Card],
    as_json: bool,
) -> list[Held]:
    from reeltime import checks
    from reeltime.bench import memory
    from reeltime.bench.profile import goal
    from reeltime.model.layout import LAYOUTS
    from reeltime.model.quality import QUALITIES, named

    if layout is not None:
        checks.choice("layout", layout, tuple(LAYOUTS))
    aim, console = goal(preset, target), report_console(as_json)
    found: list[Held] = []
    left_out: dict[str, str] = {}
    for level in QUALITIES.values() if quality is None else [named(quality)]:
        try:
            found.append(memory.held(aim, level, layout=layout, cards=cards))
        except ValueError as error:  # a layout that not every level can have
            if quality is not None:
                raise
            left_out[level.name] = str(error)
    if as_json:
        rows = [one.row() for one in found]
        print(json.dumps({"rows": rows, "left_out": left_out}, allow_nan=False))
    draw_memory(console, found)
    for name, why in left_out.items():
        console.print(Text(f"{name} left out: {why}", style="yellow"), soft_wrap=True)
    return found


# --- Tables -------------------------------------------------------------------------------------


def verdict(one: Plan) -> Text:
    if one.meets_target:
        return Text("met", style="green")
    return Text(f"misses {', '.join(one.missed)}", style="red")


def describe(one: Plan) -> str:
    wanted = [] if one.target_fps is None else [f"{one.target_fps:g} FPS wanted"]
    dense = "dense" if one.sla is None else f"sparse-linear at {one.sla:.0%}"
    return ", ".join([f"{one.target}: {one.preset}", dense, *wanted])


def draw_overview(console: Console, found: Sequence[Plan]) -> None:
    """A table per target, a line per card."""
    for name in dict.fromkeys(one.target for one in found):
        mine = [one for one in found if one.target == name]
        table = grid(
            describe(mine[0]),
            ("card", "FPS", "floor", "first frame ms", "memory GB", "exchange ms", "", "shares"),
        )
        for one in mine:
            cells: list[Any] = [
                f"{one.gpus} x {one.gpu}" if one.gpus > 1 else one.gpu,
                f"{one.fps:.1f}",
                f"{one.floor_fps:.1f}",
                f"{one.first_frame_ms:.0f}",
                f"{one.memory_gb:.1f} of {one.memory_limit_gb:.0f}",
                f"{one.exchange_ms:.1f}",
                verdict(one),
                one.shares,
            ]
            table.add_row(*(x if isinstance(x, Text) else Text(x) for x in cells))
        console.print(table)
    remark(console)


def draw_plan(console: Console, one: Plan) -> None:
    """The waterfall, then what the last stage is made of."""
    card = f"{one.gpus} x {one.gpu}" if one.gpus > 1 else one.gpu
    table = grid(
        f"{describe(one)}, on {card}", ("technique", "ms / chunk", "saved", "FPS", "floor")
    )
    for stage in one.stages:
        saved = f"{stage.gained_ms:.1f}" if stage is not one.stages[0] else ""
        row = [stage.name, f"{stage.chunk_ms:.1f}", saved]
        table.add_row(*map(Text, (*row, f"{stage.fps:.1f}", f"{stage.floor_fps:.1f}")))
    console.print(table)
    total = sum(line.expected_ms for line in one.lines)
    table = grid("where the last one spends a chunk", ("op", "ms", "share", "floor ms", "launches"))
    for line in one.lines[:8]:
        row = [line.name, f"{line.expected_ms:.1f}", f"{line.expected_ms / total:.0%}"]
        table.add_row(*map(Text, (*row, f"{line.floor_ms:.1f}", str(line.launches))))
    console.print(table)
    said = f"first frame {one.first_frame_ms:.0f} ms, {one.memory_gb:.1f} of "
    said += f"{one.memory_limit_gb:.0f} GB, {one.tflop_per_frame:.1f} TFLOP per frame: "
    console.print(Text(said).append_text(verdict(one)), soft_wrap=True)
    remark(console)


def draw_memory(console: Console, found: Sequence[Held]) -> None:
    """A line per part and per card, the quality levels beside each other."""
    one = found[0]
    aim, (columns, lines) = one.target, one.target.size
    parts = [each.plan.parts() for each in found]
    unit, scale = ("GB", 1e9) if one.plan.peak >= 1e9 else ("MB", 1e6)
    title = f"{aim.preset} at {columns} x {lines}, {one.layout}: {unit}"
    table = grid(title, ("", *(each.quality for each in found)))
    for part in parts[0]:
        cells = (part, *(f"{sizes[part] / scale:.2f}" for sizes in parts))
        table.add_row(*map(Text, cells), style="bold" if part == "peak" else "")
    for card in one.cards:
        table.add_row(
            Text(f"{card.name}, {card.memory_gb:g} GB"),
            *(
                Text("fits", style="green") if each.fits(card) else Text("too small", style="red")
                for each in found
            ),
        )
    console.print(table)
    line = f"chunks of {aim.chunk} in {aim.window} latent frames; peak: with the largest workspace "
    line += "alone, without codec and CUDA's own context"
    console.print(Text(line, style="dim"), soft_wrap=True)
    if one.workspace_of == "reference":
        line = "workspace of the reference, since this build has no kernels: pip install "
        console.print(Text(line + "'reeltime[triton]'", style="yellow"), soft_wrap=True)


def remark(console: Console) -> None:
    line = "planned, not measured; shares of the floor as expected unless a results file has them"
    console.print(Text(line, style="dim"), soft_wrap=True)
