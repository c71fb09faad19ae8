# SPDX-License-Identifier: Apache-2.0
"""The command `reeltime`.

Exit codes: 0 done, 1 a check or a target missed, 2 bad input, 70 a bug in reeltime, 130 stopped.
With --json a command writes one JSON document to stdout and nothing else there.  Only --debug
shows a traceback.  torch is imported by the commands that need it, never by this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import reeltime
from reeltime import _C, cli_bench, cli_check, cli_plan, cli_port, cli_profile, cli_stream
from reeltime.arch import ARCHS, UnsupportedArchError, lookup

# What a user can mend: reported in one line.  Anything else is a bug.
INPUT_ERRORS = (ValueError, OSError, UnsupportedArchError)  # FileNotFoundError is an OSError

app = typer.Typer(
    help="Real-time, interactive video diffusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli_stream.register(app)
cli_check.register(app)
cli_port.register(app)
cli_bench.register(app)
cli_plan.register(app)
cli_profile.register(app)


def build_facts() -> dict[str, Any]:
    """What this build was made with.  has_cuda: CUDA kernels are in.  nvcc: the one found."""
    return {
        "version": reeltime.__version__,
        "has_cuda": _C.has_cuda,
        "cuda_version": _C.cuda_version,
        "nvcc": _C.nvcc,
        "archs": list(_C.archs),
        "cuda_families": list(_C.cuda_families),
        "compiler": _C.compiler,
        "build_type": _C.build_type,
    }


def build_line() -> str:
    """The build facts as one line for people."""
    if _C.has_cuda:
        cuda = f"CUDA {_C.cuda_version} kernels for {', '.join(_C.archs)}"
    elif _C.nvcc:
        cuda = f"no CUDA kernels (nvcc {_C.nvcc} found)"
    else:
        cuda = "no CUDA kernels (built without nvcc)"
    return f"reeltime {reeltime.__version__}: {cuda}; {_C.compiler}, {_C.build_type}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(build_line())
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print version and build."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any position).")
    ] = False,
) -> None:
    """Real-time, interactive video diffusion."""


def device_facts() -> dict[str, str] | None:
    """The current GPU and its architecture, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        arch = lookup(torch.cuda.get_device_capability()).name
    except UnsupportedArchError:
        arch = "unknown"
    return {"name": torch.cuda.get_device_name(), "arch": arch}


@app.command()
def kernels(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """What this build can run: kernel families by backends, and why something is missing."""
    from reeltime import backends

    rows, device = backends.support_matrix(), device_facts()
    if as_json:
        print(json.dumps({"build": build_facts(), "device": device, "rows": rows}))
        return

    console = Console()
    console.print(build_line(), highlight=False)
    gpu = f"{device['name']} ({device['arch']})" if device else "no GPU"
    console.print(f"device: {gpu}\n", highlight=False)

    columns = list(dict.fromkeys(str(row["backend"]) for row in rows))
    table = Table("family", *columns, title="Kernels", title_justify="left")
    missing: dict[str, list[str]] = {}
    for family in backends.FAMILIES:
        cells = {row["backend"]: row for row in rows if row["family"] == family}
        table.add_row(family, *(_cell(cells[backend]) for backend in columns))
        for row in cells.values():
            if not row["available"]:
                missing.setdefault(f"{row['backend']}: {row['why']}", []).append(family)
    console.print(table)
    for why, families in missing.items():
        names = "every family" if len(families) == len(backends.FAMILIES) else ", ".join(families)
        console.print(f"no {why} ({names})", highlight=False, markup=False)
    console.print()

    table = Table("arch", "GPU", "shared / block", "in this build", title="Architectures")
    table.title_justify = "left"
    for arch in ARCHS:
        compiled = "yes" if arch.target in _C.archs else "no"
        table.add_row(arch.name, arch.gpu, f"{arch.shared_limit // 1024} KiB", compiled)
    console.print(table)


def _cell(row: dict[str, Any]) -> Text:
    return Text(row["why"], style="green") if row["available"] else Text("no", style="yellow")


def _report(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the one place where an error becomes a message and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        # Usage errors (exit 2) and Ctrl-C (exit 130) are handled in here, by typer.
        app(args=[a for a in arguments if a != "--debug"], prog_name="reeltime")
    except INPUT_ERRORS as error:
        if debug:
            raise
        _report(str(error) or type(error).__name__)
        sys.exit(2)
    except Exception as error:  # noqa: BLE001  the last line of defence, see the exit codes above
        if debug:
            raise
        _report(f"{type(error).__name__}: {error} (a bug in reeltime; --debug shows where)")
        sys.exit(70)
