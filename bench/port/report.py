# SPDX-License-Identifier: Apache-2.0
"""Every specimen on every architecture: judged, as rows, as a page and as a Markdown table."""

from __future__ import annotations

import concurrent.futures as futures
import functools
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2

from reeltime import _C, native
from reeltime.arch import REGISTERS, Arch, UnsupportedArchError
from reeltime.bench.port.compile import Compiled, built, compile, identity
from reeltime.bench.port.specimens import Specimen, all_specimens
from reeltime.jit.launch import Launch, recording

OK, SLOW, SPILLS, SHARED = "ok", "slow path", "spills", "too much shared memory"
FAILED, ABSENT = "failed", "not offered"
BAD = (SLOW, SPILLS, SHARED, FAILED)
HARMLESS = 0.01  # share of the innermost loops' instructions that may reload a spilled register


@dataclass(frozen=True)
class Row:
    """One kernel of one call on one architecture."""

    arch: str
    family: str
    case: str
    kernel: str
    backend: str
    warps: int
    registers: int
    spill_bytes: int
    hot_spills: int  # loads and stores of them in the innermost loops
    shared_bytes: int
    shared_limit: int
    blocks_per_sm: int
    occupancy: float  # resident threads over the most that an SM holds
    tensor_core: str  # matrix instructions in the SASS
    compile_s: float
    verdict: str
    why: str = ""


def blocks_per_sm(arch: Arch, warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks that registers, shared memory and threads let live on one SM.

    Registers are given to a warp in units of 256 and to warps in fours; shared memory in units of
    128 bytes, with 1 KiB per block kept by the system (CUDA programming guide, appendix on compute
    capabilities).
    """
    by_threads = min(arch.threads // (32 * warps), arch.blocks)
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // warp_registers // 4 * 4 // warps if registers else arch.blocks
    by_shared = arch.shared // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_threads, by_registers, by_shared)


def judge(compiled: Compiled, arch: Arch) -> tuple[str, str]:
    """The verdict, worst first, and its reason."""
    if compiled.error:
        return FAILED, compiled.error
    if compiled.shared_bytes > arch.shared_limit:
        return SHARED, f"{compiled.shared_bytes} of {arch.shared_limit} bytes"
    spilled = ""
    if compiled.spill_bytes:
        spilled = f"spills {compiled.spill_bytes} bytes, {compiled.hot_spills or 'none'} of "
        spilled += f"{compiled.hot_instructions} instructions of the innermost loops"
    if compiled.hot_spills > HARMLESS * compiled.hot_instructions:
        return SPILLS, spilled
    found = sorted({name.split(".")[0] for name in compiled.instructions})
    for operand in compiled.operands:
        best = arch.tensor_core.get(operand, "a matrix instruction")
        if best not in found:
            return SLOW, f"{operand}: expected {best}, found {', '.join(found) or 'FMA'}"
    return OK, spilled


def row(specimen: Specimen, launch: Launch | native.Launch, arch: Arch, compiled: Compiled) -> Row:
    if isinstance(launch, Launch):
        backend, warps = "triton", launch.options["num_warps"]
    else:
        backend, warps = "cuda", launch.threads // 32
    blocks = blocks_per_sm(arch, warps, compiled.registers, compiled.shared_bytes)
    counted: dict[str, int] = {}
    for name, count in compiled.instructions.items():
        short = name.split(".")[0]
        counted[short] = counted.get(short, 0) + count
    verdict, why = judge(compiled, arch)
    return Row(
        arch=arch.name,
        family=specimen.family,
        case=specimen.case,
        kernel=kernel_name(launch),
        backend=backend,
        warps=warps,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        hot_spills=compiled.hot_spills,
        shared_bytes=compiled.shared_bytes,
        shared_limit=arch.shared_limit,
        blocks_per_sm=blocks,
        occupancy=round(blocks * warps * 32 / arch.threads, 3),
        tensor_core=", ".join(f"{name} {count}" for name, count in sorted(counted.items())),
        compile_s=round(compiled.compile_s, 2),
        verdict=verdict,
        why=why,
    )


def absent(specimen: Specimen, backend: str, arch: Arch, why: str) -> Row:
    """A call that this architecture is not offered, and the reason that its user is told."""
    return Row(
        arch.name, specimen.family, specimen.case, "", backend, 0, 0, 0, 0, 0,
        arch.shared_limit, 0, 0.0, "", 0.0, ABSENT, why,
    )  # fmt: skip


def kernel_name(launch: Launch | native.Launch) -> str:
    """Of a mangled symbol, lengths and names in turn, the last name."""
    if isinstance(launch, Launch):
        return launch.kernel.__name__.strip("_").removesuffix("_kernel")
    parts, rest = [""], launch.kernel.removeprefix("_ZN")
    while number := re.match(r"\d+", rest):
        end = number.end() + int(number[0])
        parts.append(rest[number.end() : end])
        rest = rest[end:]
    return parts[-1].removesuffix("_kernel")


def launches(specimen: Specimen, arch: Arch) -> list[Launch]:
    """What the call would launch; a kernel that it launches twice alike counts once."""
    with recording(arch) as recorded:
        specimen.call("triton")
    return list({identity(launch): launch for launch in recorded}.values())


def extension_rows(specimen: Specimen, arch: Arch) -> list[Row]:
    """The same of the CUDA kernels that the extension was built with."""
    if arch.target not in _C.archs:
        why = f"this build has CUDA kernels for {', '.join(_C.archs)}"
        return [absent(specimen, "cuda", arch, why)]
    try:
        with native.recording(arch) as recorded:
            specimen.call("cuda")
    except UnsupportedArchError as error:
        return [absent(specimen, "cuda", arch, error.why)]
    return [
        row(specimen, one, arch, built(one.kernel, one.shared_bytes, specimen.products, arch))
        for one in dict.fromkeys(recorded)
    ]


@functools.cache
def specimens() -> list[Specimen]:
    """All of them, made once per process."""
    return list(all_specimens())


CUDA_FIRST = 100  # before Triton's kernels of the same call

Task = tuple[Arch, int, int]  # architecture, specimen, launch: a worker records it again


def compile_task(task: Task) -> Compiled:
    arch, specimen, index = task
    return compile(launches(specimens()[specimen], arch)[index], arch)


def measure(
    archs: Sequence[Arch],
    families: Sequence[str],
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    workers: int | None = None,
) -> list[Row]:
    """Compile every kernel of `families` for `archs`, in as many processes as there are cores.

    Args:
        progress: called with (done, total, what is being waited for).
    """
    calls = specimens()
    rows: dict[tuple[int, int, int], Row] = {}
    wanted: dict[tuple[str, str], list[tuple[int, int, int, Launch]]] = {}
    for a, arch in enumerate(archs):
        for s, specimen in enumerate(calls):
            if specimen.family not in families:
                continue
            if specimen.family in _C.cuda_families and "cuda" in specimen.backends:
                for i, one in enumerate(extension_rows(specimen, arch)):
                    rows[s, i - CUDA_FIRST, a] = one
            try:
                found = launches(specimen, arch)
            except UnsupportedArchError as error:
                rows[s, 0, a] = absent(specimen, "triton", arch, error.why)
                continue
            for i, launch in enumerate(found):
                wanted.setdefault((arch.name, identity(launch)), []).append((s, i, a, launch))
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        jobs = {}
        for same in wanted.values():
            s, i, a, _ = same[0]
            jobs[pool.submit(compile_task, (archs[a], s, i))] = same
        try:
            for done, job in enumerate(futures.as_completed(jobs), start=1):
                for s, i, a, launch in jobs[job]:
                    rows[s, i, a] = row(calls[s], launch, archs[a], job.result())
                progress(done, len(jobs), calls[jobs[job][0][0]].case)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [rows[key] for key in sorted(rows)]


def summary(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """(family and backend, arch) -> "12 ok", or what is wrong: "10 ok, 2 spills"."""
    cells: dict[tuple[str, str], dict[str, int]] = {}
    for one in rows:
        cell = cells.setdefault((f"{one.family} ({one.backend})", one.arch), {})
        cell[one.verdict] = cell.get(one.verdict, 0) + 1
    order = (OK, *BAD, ABSENT)
    return {
        key: ", ".join(f"{cell[verdict]} {verdict}" for verdict in order if verdict in cell)
        for key, cell in cells.items()
    }


MARKERS = ("<!-- port:begin -->", "<!-- port:end -->")


def markdown(rows: Sequence[Row]) -> str:
    """Families by architecture, then every kernel whose verdict is not ok, with its reason."""
    archs = list(dict.fromkeys(one.arch for one in rows))
    cells = summary(rows)
    families = list(dict.fromkeys(family for family, _ in cells))
    lines = ["| family | " + " | ".join(archs) + " |", "|---|" + "---|" * len(archs)]
    for family in families:
        lines.append(
            f"| {family} | " + " | ".join(cells.get((family, arch), "-") for arch in archs) + " |"
        )
    troubled = [one for one in rows if one.verdict in BAD]
    if troubled:
        lines += ["", "| arch | case | kernel | verdict | why |", "|---|---|---|---|---|"]
        lines += [
            f"| {one.arch} | {one.case} | {one.backend}: {one.kernel} | {one.verdict} | {one.why} |"
            for one in troubled
        ]
    return "\n".join(lines)


def rewrite(page: Path, rows: Sequence[Row]) -> None:
    """Put the tables between the markers of `page`."""
    text = page.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise ValueError(f"--update: expected {' and '.join(MARKERS)} once each in {page}")
    head, rest = text.split(MARKERS[0])
    tail = rest.split(MARKERS[1])[1]
    page.write_text(f"{head}{MARKERS[0]}\n{markdown(rows)}\n{MARKERS[1]}{tail}")


def html(rows: Sequence[Row], title: str) -> str:
    """One page: kernels by architecture, coloured by verdict, every number on hover."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    archs = list(dict.fromkeys(one.arch for one in rows))
    grouped: dict[str, dict[tuple[str, str], dict[str, Row]]] = {}
    for one in rows:
        kernels = grouped.setdefault(one.family, {})
        kernels.setdefault((one.case, f"{one.backend}: {one.kernel}"), {})[one.arch] = one
    page = environment.get_template("page.html")
    return page.render(title=title, archs=archs, families=grouped).lstrip()


def as_dicts(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(one) for one in rows]
