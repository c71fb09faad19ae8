# SPDX-License-Identifier: Apache-2.0
"""`accelerate`: reeltime's kernels in a model of somebody else's, and a report of what was done."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from reeltime import checks
from reeltime.backends import BACKENDS
from reeltime.plugins import attention as attentions
from reeltime.plugins import linear as linears
from reeltime.plugins import norm as norms
from reeltime.plugins.changes import COMPILED, Change, Left, uncompiled
from reeltime.plugins.sdpa import check_share
from reeltime.plugins.sites import Place, Site
from reeltime.quant.api import FORMATS

# First and last layers, and what a timestep goes through: a percent of the work, and what they get
# wrong is in every block.  Patterns of names.
SENSITIVE = (
    "*embed*",
    "*time_*",
    "*adaln*",
    "*modulation*",
    "*norm*.linear",
    "*norm_out*",
    "*_mod.*",
    "proj_in",
    "proj_out",
    "head",
    "head.*",
    "lm_head",
)


@dataclass(frozen=True)
class Scope:
    """What whoever looks for changes is told."""

    backend: str
    skip: tuple[str, ...]
    undoable: bool
    model: Site

    def skips(self, path: str) -> str | None:
        """The pattern that keeps this place as it is, or None."""
        name = uncompiled(path)
        return next((pattern for pattern in self.skip if fnmatch(name, pattern)), None)

    def place(self, path: str, kind: str) -> Place:
        return Place(Site(uncompiled(path), kind), self.model)


@dataclass(eq=False)
class Report:
    """What `accelerate` did to a model; printed, a table.

    Attributes:
        changes: places that changed.
        left: places that did not, and why.
        model: counters of compiled graphs.
        undone: the changes are no more; what they counted still is.
    """

    changes: list[Change]
    left: list[Left]
    model: Site
    undone: bool = False

    @property
    def bytes_saved(self) -> int:
        """Of weights, on the model's device."""
        return sum(change.saved for change in self.changes)

    def calls(self) -> dict[str, dict[str, int]]:
        """{name of a place: {what ran there: how often}} since the model was accelerated.

        What ran is a backend, or "left: why" where the kernels did not serve a call and PyTorch's
        own code ran; where a place changed twice, by kind.  Compiled graphs count for the model as
        a whole, under "", by kind.  Every count is of a kernel that was launched; the replay of a
        CUDA graph launches unseen.
        """
        sites = [change.place.site for change in self.changes]
        shared = Counter(site.path for site in sites)
        found: dict[str, dict[str, int]] = {site.path: {} for site in sites}
        for site in sites:
            kind = f"{site.kind}: " if shared[site.path] > 1 else ""
            found[site.path] |= {kind + what: n for what, n in site.calls.items()}
        if self.model.calls:
            found[""] = found.get("", {}) | dict(self.model.calls)
        return found

    def reset_calls(self) -> None:
        """Counters to zero."""
        for change in self.changes:
            change.place.site.calls.clear()
        self.model.calls.clear()

    def rows(self) -> list[dict[str, Any]]:
        """One row per place, and one for compiled graphs that ran, for JSON."""
        rows = [
            _row(
                change.path,
                change.kind,
                what=change.what,
                backend=change.backend,
                bytes_saved=change.saved,
                calls=dict(change.place.site.calls),
            )
            for change in self.changes
        ]
        if self.model.calls:
            rows.append(_row("", "model", what="compiled graphs", calls=dict(self.model.calls)))
        return rows + [_row(left.path, left.kind, left=left.why) for left in self.left]

    def undo(self) -> None:
        """The model as it was, bit for bit: the same parameters in the same modules.

        What is compiled compiles again.  If it raises because of a later change, undo that and call
        it again: it goes on where it stopped.

        Raises:
            RuntimeError: a place was changed again since, or nothing was kept (undoable=False).
        """
        for change in self.changes:
            if not change.kept:
                raise RuntimeError(f"undo: of {change.path} nothing was kept (undoable=False).")
        for change in reversed(self.changes):
            change.revert()
        self.undone = True

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __rich__(self) -> Table:
        """Places that differ only in the number of their block are one row, whose calls are theirs
        together; where nothing was called yet, what would serve it stands with 0."""
        title = f"{len(self.changes)} places changed, {len(self.left)} left"
        if self.bytes_saved:
            title += f", {self.bytes_saved / 2**20:.1f} MiB of weights saved"
        title += ", undone since" * self.undone
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for name in ("where", "kind", "what", "calls"):
            table.add_column(name, overflow="fold", no_wrap=name == "kind")
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows():
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["path"])
            what = row["what"] or f"left: {row['left']}"
            groups.setdefault((pattern, row["kind"], what, row["backend"] or ""), []).append(row)
        for (pattern, kind, what, backend), rows in groups.items():
            where = rows[0]["path"] if len(rows) == 1 else f"{pattern} ({len(rows)} x)"
            calls = Counter({backend: 0} if backend else {})
            for row in rows:
                calls.update(row["calls"])
            cells = (where, kind, what, ", ".join(f"{name} {n}" for name, n in calls.items()))
            table.add_row(*map(Text, cells), style="dim" if rows[0]["left"] else "")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text).print(self)
        return text.getvalue()


def _row(path: str, kind: str, **cells: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"path": path, "kind": kind}
    return (
        row | {"what": None, "backend": None, "bytes_saved": 0, "calls": {}, "left": None} | cells
    )


def accelerate(
    model: nn.Module,
    linear: str | None = "int8",
    attention: str | None = "int8",
    norm: str | None = "fused",
    sla: float | None = None,
    skip: Sequence[str] = SENSITIVE,
    *,
    backend: str = "auto",
    undoable: bool = True,
) -> Report:
    """reeltime's kernels in `model`, in place, for inference.

    Linear layers become W8A8 (weights quantised once, 128 x 128 blocks; activations per token and
    128 channels), calls of `scaled_dot_product_attention` 8-bit attention, LayerNorm and RMSNorm
    and the modulation behind them one kernel.  What is not recognised stays as it is, and the
    report says why.  Where a call cannot be served (a gradient is wanted, a shape that no kernel of
    this device takes) PyTorch's own code runs and is counted as such.

    Works before and after torch.compile, and before torch.export; state_dict() holds the 8-bit
    weights, and load_state_dict() takes those or the original ones.  Call it before hooks that
    offload are set.  Where it fails, it changes nothing; no other model is touched, nothing global
    is patched.  Not while another thread runs the model.  An accelerated model cannot be pickled
    (keep its state_dict, or undo first), and its linear layers keep the dtype that undo() restores.

    Args:
        model: any module; torch.compile's wrapper is looked through.
        linear: "int8", "fp8" or None.
        attention: "int8" (INT8 q.k, FP16 values), "fp8" (INT8 q.k, FP8 values) or None.
        norm: "fused" or None.
        sla: share of the key blocks, in (0, 1], that self-attention keeps; None: all.  Sparsity
            without training loses quality: look at the result.
        skip: patterns (fnmatch) of names that keep their format; pass [*SENSITIVE, "blocks.0.*"]
            to add one.
        backend: "auto", "reference", "triton" or "cuda".
        undoable: keep the original weights, in host memory, for `Report.undo`.  Otherwise each goes
            before the next is quantised, and what fails halfway stays halfway.
    Returns:
        A Report; as a context manager it undoes the changes at the end.
    Raises:
        ValueError: an unknown format, or nothing in the model could be changed.
        UnsupportedArchError: `backend` cannot serve the model's device.
    Source: W8A8 and attention: Vidu S1, section 2.3; SLA: arXiv 2509.24006.
    """
    if not isinstance(model, nn.Module):
        checks.fail("model", "a torch.nn.Module", type(model).__name__, "Pass the network itself.")
    for name, value, allowed in (
        ("linear", linear, (None, *FORMATS)),
        ("attention", attention, (None, *attentions.FORMATS)),
        ("norm", norm, (None, "fused")),
        ("backend", backend, BACKENDS),
    ):
        checks.choice(name, value, allowed)
    check_share("sla", sla)
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        checks.fail("skip", "a list of patterns", repr(skip), "Pass [pattern].")
    skip = tuple(skip)
    if strange := [one for one in skip if not isinstance(one, str)]:
        checks.fail("skip", "patterns of names", repr(strange[0]), "Pass names of modules.")
    model = getattr(model, COMPILED, model)
    scope = Scope(backend, skip, undoable, Site("", "model"))
    changes: list[Change] = []
    left: list[Left] = []
    names = [uncompiled(path) for path, _ in model.named_modules(remove_duplicate=False)]
    for pattern in scope.skip:
        if pattern not in SENSITIVE and not any(fnmatch(name, pattern) for name in names):
            left.append(Left(pattern, "skip", "no module has such a name"))
    for found in _find(model, scope, linear, attention, norm, sla):
        if isinstance(found, Change):
            changes.append(found)
        else:
            left.append(found)
    if not changes:
        reasons = "; ".join(f"{one.path or 'model'}: {one.why}" for one in left[:3])
        checks.fail(
            "model",
            "a module with linear layers, attention or norms that can be changed",
            f"{type(model).__name__} with none ({reasons or 'nothing was found'})",
            "Pass the network itself, or a shorter skip list.",
        )
    try:
        with torch.inference_mode(False):  # what is made there could never meet a gradient
            for change in changes:
                change.apply()
    except BaseException:
        for change in reversed(changes):
            if change.kept:
                change.revert()
        raise
    return Report(changes, left, scope.model)


def _find(
    model: nn.Module,
    scope: Scope,
    linear: str | None,
    attention: str | None,
    norm: str | None,
    sla: float | None,
) -> Iterator[Change | Left]:
    if linear is not None:
        yield from linears.find(model, scope, linear)
    # Attention stands around the forward that there is, which norm may have rewritten.
    if norm is not None:
        yield from norms.find(model, scope)
    if attention is not None or sla is not None:
        yield from attentions.find(model, scope, attention, sla)
