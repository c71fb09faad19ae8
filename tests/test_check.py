# SPDX-License-Identifier: Apache-2.0
"""`reeltime check`: green as it is, red for every planted mistake, fair to other recipes."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reeltime import backends, checks, cli, cli_tables
from reeltime.attention import reference as attention
from reeltime.bench.accuracy import case, check, pages, picture, recipes, segments
from reeltime.bench.accuracy.inputs import KINDS, Inputs
from reeltime.bench.accuracy.paths import PEERS
from reeltime.gemm_w8a8 import reference as gemm
from reeltime.norm import reference as norm
from reeltime.quant import reference as quant
from reeltime.rope_kv import reference as rope_kv
from reeltime.sla import reference as sla

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NOT_OPS = {"TOLERANCE", "BLOCK_Q", "BLOCK_K", "CSR", "KVCache", "bytes", "flops", "make_cache"} | {
    "quantize_weight"  # quantize, strip by strip
}


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `reeltime check`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", *arguments])
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


@pytest.fixture(scope="module")
def everything() -> tuple[list[check.Row], set[str]]:
    """All rows of the default check, and which registered ops ran for them."""
    ran, call = set(), backends.Op.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.Op, "run", lambda op, *a: ran.add(op.name) or call(op, *a))
        rows = [
            row
            for family in backends.FAMILIES
            for kind in check.kinds(family)
            for row in check.check(family, kind, backend="reference")
        ]
    return rows, ran


@pytest.fixture(scope="module")
def rows(everything: tuple[list[check.Row], set[str]]) -> list[check.Row]:
    return everything[0]


@pytest.fixture(scope="module")
def paths() -> list[check.Row]:
    """Attention path by path, but for 160k keys, which take a minute."""
    kinds = [kind for kind in check.kinds(check.PATHS) if kind != "160k_keys"]
    return [row for kind in kinds for row in check.check(check.PATHS, kind, backend="reference")]


def error(rows: list[check.Row], recipe: str, kind: str) -> float:
    return next(r.relative_l1 for r in rows if (r.recipe, r.input) == (recipe, kind))


# --- What is checked ----------------------------------------------------------------------------


def test_everything_of_ours_passes(rows):
    assert [row for row in rows if row.passed is False or row.error] == []
    assert sum(row.passed is True for row in rows) > 1500
    assert all(row.passed is None for row in rows if not check.ours(row))


def test_every_public_op_appears(everything):
    rows, ran = everything
    for family in backends.FAMILIES:
        public = set(import_module(f"reeltime.{family}").__all__) - NOT_OPS
        assert {row.op for row in rows if row.family == family} == public
    assert ran == set(backends.OPS)


def test_every_family_meets_every_adversity(rows):
    named = {re.sub("_[kv]$", "", kind) for kind in KINDS} - {"160k_keys"}  # paths have them
    for family in backends.FAMILIES:
        kinds = {row.input for row in rows if row.family == family}
        assert kinds == set(check.kinds(family)) <= set(KINDS)
        assert {re.sub("_[kv]$", "", kind) for kind in kinds} == named


def test_every_stated_tolerance_of_a_float_format_is_used(rows):
    for family in backends.FAMILIES:
        stated = import_module(f"reeltime.{family}").TOLERANCE
        used = {r.tolerance_relative_l1 for r in rows if r.family == family}
        unused = {name for name, limit in stated.items() if limit.relative_l1 not in used}
        assert not {name for name in unused if "float" in name}


def test_oracles_import_no_reference():
    """An equation made of the reference would agree with its mistakes."""
    for path in (ROOT / "bench/accuracy").glob("*.py"):
        assert not re.search(r"^(from|import) .*\breference\b", path.read_text(), re.M), path


def test_strided_inputs_are_strided():
    inputs = Inputs("strided", "reference", CPU, 0)
    for shape in ((5, 8), (2, 5, 8), (2, 5, 3, 8)):
        x = inputs.put(inputs.draw("x", *shape))
        assert x.shape == shape
        assert x.stride(-1) == 1
        assert not x.is_contiguous()
        assert torch.equal(x.double(), inputs.draw("x", *shape).float().double())


def test_same_seed_same_rows_other_seed_other_rows():
    runs = [list(check.check("quant", "ragged", backend="reference", seed=s)) for s in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert all(row.passed is not False for row in runs[2])


# --- What a verdict is worth --------------------------------------------------------------------


def test_bound_is_met_by_correct_rounding_and_by_nothing_coarser():
    torch.manual_seed(0)
    x = torch.randn(64, 256, dtype=torch.float64)
    x[:, 3] *= 50
    sizes = {0: 1, 1: 128}
    step = case.widest(x, sizes) / 127
    bound = case.rounding_bound(x, "int8", sizes)
    assert (((x / step).round() * step - x).abs() <= bound * (1 + 1e-9)).all()
    assert (((x / step).trunc() * step - x).abs() > bound).any()
    low = (x / (step * 127 / 448)).to(torch.float8_e4m3fn).double() * step * 127 / 448
    assert ((low - x).abs() <= case.rounding_bound(x, "fp8", sizes) * (1 + 1e-9)).all()
    assert ((x.bfloat16().double() - x).abs() <= case.rounding_bound(x, "bfloat16")).all()


def test_widening_is_for_outliers_alone():
    stated = {"int8": checks.Tolerance(0.02, 0.05)}
    x = torch.randn(64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = case.tolerance(stated, "int8", x, {1: 128})
    assert plain.relative_l1 == 0.02
    assert plain.peak < 0.02  # half a step is all that INT8 may move, whatever is stated
    x[:, 3] *= 50
    wide = case.tolerance(stated, "int8", x, {1: 128})
    assert wide.relative_l1 > 0.02
    assert wide.peak > 0.05


def test_an_op_that_raises_fails_and_says_why():
    def refuse() -> torch.Tensor:
        raise ValueError("x: expected mercy, got none")

    zero = torch.zeros(2, dtype=torch.float64)
    inputs = Inputs("normal", "reference", CPU, 0)
    row = check.judge(case.Case("op", "r", refuse, zero, checks.Tolerance(9, 9)), "quant", inputs)
    assert row.passed is False
    assert row.error == "x: expected mercy, got none"
    nan = case.Case("op", "r", lambda: zero / 0, zero, checks.Tolerance(9, 9))
    document = check.judge(nan, "quant", inputs).document()
    assert document["passed"] is False
    assert document["relative_l1"] is None
    json.dumps(document, allow_nan=False)


def changed(module: Any, name: str, make: Callable[[Callable], Callable]) -> tuple[Any, str, Any]:
    return module, name, make(getattr(module, name))


def swapped(module: Any, name: str, **fixed: Any) -> tuple[Any, str, Any]:
    """`module.name` with some arguments set to what they should not be."""
    function = getattr(module, name)
    signature = inspect.signature(function)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments |= {k: f(bound.arguments[k]) for k, f in fixed.items()}
        return function(*bound.args, **bound.kwargs)

    return module, name, wrong


ones, zeros = torch.ones_like, torch.zeros_like
nothing = lambda _: None  # noqa: E731


def truncated(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """quant.store towards zero."""
    limit = quant.LIMIT[dtype]
    y = (x / scale).nan_to_num(0.0).clamp(-limit, limit)
    if dtype == torch.int8:
        return y.trunc().to(dtype)
    y = y.float()
    step = torch.maximum(y.abs().clamp(min=2**-6).log2().floor().exp2() / 8, y * 0 + 2**-9)
    return (y if dtype == torch.float16 else (y / step).trunc() * step).to(dtype)


def truncated_bfloat16(y: torch.Tensor) -> torch.Tensor:
    return (y.view(torch.int32) & -65536).view(torch.float32) if y.dtype == torch.float32 else y


def summed_before_rounding(score: torch.Tensor, v: torch.Tensor, pv: str | None) -> torch.Tensor:
    p = (score - score.amax(-1, keepdim=True)).exp()
    low = p if pv is None else (p * 448).to(torch.float8_e4m3fn).to(p.dtype) / 448
    return (low @ v) / p.sum(-1, keepdim=True)


# Family, input, and what is changed in the reference: each must turn the check red.
MISTAKES = {
    "quant: scale dropped": ("quant", "normal", swapped(quant, "spread", scale=ones)),
    "quant: one scale for all blocks": (
        "quant", "outlier", swapped(quant, "spread", scale=lambda s: s[:1, :1].expand_as(s)),
    ),
    "quant: zero block divides by zero": (
        "quant", "zero_block", (quant, "scale_of", lambda a, d: a.float() / quant.LIMIT[d]),
    ),
    "quant: two bits lost": (
        "quant", "normal", (quant, "store", lambda x, s, d: ((x / s / 4).round() * 4).to(d)),
    ),
    "quant: not saturated": ("quant", "normal", swapped(quant, "scale_of", amax=lambda a: a / 2)),
    "quant: truncated": ("quant", "normal", (quant, "store", truncated)),
    "quant: scale off by 1%": (
        "quant", "normal", changed(quant, "scale_of", lambda f: lambda *a: f(*a) * 1.01),
    ),
    "norm: output truncated to INT8": ("norm", "normal", (quant, "store", truncated)),
    "norm: output truncated to bfloat16": (
        "norm", "normal",
        changed(norm, "wide_norm", lambda f: lambda *a: truncated_bfloat16(f(*a))),
    ),
    "norm: mean not subtracted": (
        "norm", "normal", swapped(norm, "normalise", kind=lambda kind: "rms"),
    ),
    "norm: modulation scale off by 1%": (
        "norm", "normal",
        swapped(norm, "modulate", scale=lambda s: None if s is None else 1.01 * s),
    ),
    "norm: modulation scale dropped": ("norm", "normal", swapped(norm, "modulate", scale=nothing)),
    "norm: shift dropped": ("norm", "normal", swapped(norm, "modulate", shift=nothing)),
    "norm: gate dropped": ("norm", "normal", swapped(norm, "gated_residual", gate=nothing)),
    "norm: first frame for all": (
        "norm", "normal",
        swapped(norm, "modulate", scale=lambda s: None if s is None else s[:, :1].expand_as(s)),
    ),
    "norm: epsilon dropped": ("norm", "constant", swapped(norm, "normalise", eps=lambda _: 0.0)),
    "rope_kv: rotation dropped": ("rope_kv", "normal", (rope_kv, "rotate", lambda x, table: x)),
    "rope_kv: rotated backwards": (
        "rope_kv", "normal",
        swapped(rope_kv, "rotate", table=lambda t: t * torch.tensor([1, -1], dtype=t.dtype)),
    ),
    "rope_kv: angles in float32": (
        "rope_kv", "long",
        swapped(rope_kv, "rope_table", frame_positions=lambda p: p.double() * (1 + 2**-24)),
    ),
    "rope_kv: block mean dropped": (
        "rope_kv", "normal", changed(rope_kv, "block_mean", lambda f: lambda *a: zeros(f(*a))),
    ),
    "rope_kv: ragged tail counted": (
        "rope_kv", "ragged", changed(rope_kv, "held", lambda f: lambda *a: ones(f(*a))),
    ),
    "rope_kv: norm per head": (
        "rope_kv", "normal",
        (rope_kv, "heads_of", lambda x, w, h, eps: rope_kv.wide(x).unflatten(-1, (h, -1))),
    ),
    "rope_kv: keys and queries truncated": ("rope_kv", "normal", (quant, "store", truncated)),
    "rope_kv: value scale off by 1%": (
        "rope_kv", "normal",
        changed(rope_kv, "encode_values", lambda f: lambda *a: (f(*a)[0], f(*a)[1] * 1.01)),
    ),
    "rope_kv: shifted before it is encoded": (
        "rope_kv", "normal", swapped(rope_kv, "encode", x=lambda x: x + 0.02),
    ),
    "gemm_w8a8: output truncated": ("gemm_w8a8", "normal", (quant, "store", truncated)),
    "gemm_w8a8: output truncated to bfloat16": (
        "gemm_w8a8", "normal",
        changed(gemm, "epilogue", lambda f: lambda *a: truncated_bfloat16(f(*a))),
    ),
    "gemm_w8a8: scale off by 1%": (
        "gemm_w8a8", "normal", swapped(gemm, "product", a_scale=lambda s: 1.01 * s),
    ),
    "gemm_w8a8: scale of a dropped": (
        "gemm_w8a8", "normal", swapped(gemm, "product", a_scale=ones),
    ),
    "gemm_w8a8: scale of b dropped": (
        "gemm_w8a8", "normal", swapped(gemm, "product", b_scale=ones),
    ),
    "gemm_w8a8: bias dropped": ("gemm_w8a8", "normal", swapped(gemm, "epilogue", bias=nothing)),
    "gemm_w8a8: gate dropped": ("gemm_w8a8", "normal", swapped(gemm, "epilogue", gate=nothing)),
    "gemm_w8a8: last K block dropped": (
        "gemm_w8a8", "ragged",
        swapped(gemm, "product", a=lambda a: a.clone().index_fill_(1, torch.tensor([207]), 0)),
    ),
    "attention: mean correction dropped": (
        "attention", "outlier_k",
        changed(attention, "scores", lambda f: lambda q, k, qk, smooth: (
            f(q, k, qk, smooth) if smooth != "block" or not qk
            else f(q, k - rope_kv.per_token(rope_kv.block_mean(k), k.shape[1], -3), qk, None)
        )),
    ),
    "attention: cached mean correction dropped": (
        "attention", "normal",
        changed(attention, "window", lambda f: lambda q, low, cached, *rest: f(
            q, low, (*cached[:3], None if low is None else zeros(cached[3]), cached[4]), *rest
        )),
    ),
    "attention: value scale dropped": (
        "attention", "normal",
        changed(attention, "window", lambda f: lambda q, low, cached, *rest: f(
            q, low, (*cached[:4], None if low is None else ones(cached[4])), *rest
        )),
    ),
    "attention: causal by one": (
        "attention", "normal", swapped(attention, "visible", q=lambda q: q[:, 1:]),
    ),
    "attention: mask dropped": ("attention", "normal", swapped(attention, "visible", mask=nothing)),
    "attention: offsets dropped": (
        "attention", "normal", swapped(attention, "segment_scores", offset_index=zeros),
    ),
    "attention: absent slots seen": (
        "attention", "normal",
        changed(attention, "locate", lambda f: lambda *a: (f(*a)[0], zeros(f(*a)[1]), f(*a)[2])),
    ),
    "attention: keys, queries and values truncated": (
        "attention", "normal", (quant, "store", truncated),
    ),
    "attention: score scale off by 1%": (
        "attention", "normal", changed(attention, "scores", lambda f: lambda *a: 1.01 * f(*a)),
    ),
    "attention: P summed before it is rounded": (
        "attention", "constant_v", (attention, "weighted", summed_before_rounding),
    ),
    "attention: sequence mean not subtracted": (
        "attention", "outlier_k", swapped(attention, "scores", smooth=nothing),
    ),
    "sla: cached keys and values truncated": ("sla", "normal", (quant, "store", truncated)),
    "sla: lowest blocks selected": (
        "sla", "normal", swapped(sla, "classify", score=lambda s: -s),
    ),
    "sla: ragged tail attended": (
        "sla", "ragged", swapped(sla, "attend", held=ones),
    ),
    "sla: linear branch over all": (
        "sla", "normal", (sla, "covered", lambda over, selected, marginal: None),
    ),
    "sla: feature map dropped": (
        "sla", "normal", (rope_kv, "feature_map", lambda x, phi: x.abs()),
    ),
    "sla: projection dropped": ("sla", "normal", (sla, "project", lambda out, weight, bias: out)),
    "sla: linear branch dropped": (
        "sla", "normal", changed(sla, "linear", lambda f: lambda *a: zeros(f(*a))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_turns_the_check_red(name, monkeypatch, capsys):
    family, kind, (module, attribute, wrong) = MISTAKES[name]
    monkeypatch.setattr(check, "kinds", lambda family: (kind,))
    monkeypatch.setattr(module, attribute, wrong)
    code, out, _ = run(capsys, family)
    assert code == 1
    assert "FAIL" in out


@pytest.mark.parametrize("family", backends.FAMILIES)
def test_five_mistakes_per_family(family):
    assert sum(planted == family for planted, _, _ in MISTAKES.values()) >= 5


# --- Published recipes --------------------------------------------------------------------------


def test_amax_over_128_saturates_at_the_positive_maximum():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64).view(2, 128)
    got = recipes.blocks_of_128(x)
    assert got[1, -1] == 127 / 128
    assert got[0, 0] == -1
    assert recipes.blocks_of_128(torch.zeros(3, 5)).abs().max() == 0


def test_whole_rows_have_a_scale_each():
    x = torch.randn(3, 300, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [0.01]])
    moved = (recipes.whole_rows(x) - x).abs()
    assert (moved <= x.abs().amax(1, keepdim=True) / 254 * (1 + 1e-9)).all()


def test_scale_groups_are_those_of_an_mma_fragment():
    groups = recipes.query_groups(256, "thread")
    assert groups.unique(return_counts=True)[1].tolist() == [4] * 64
    assert groups[[0, 8, 16, 24]].unique().numel() == 1
    assert recipes.query_groups(256, "warp").unique(return_counts=True)[1].tolist() == [32] * 8
    assert recipes.query_groups(256, "block").unique(return_counts=True)[1].tolist() == [128] * 2
    keys = recipes.key_groups(128, "thread")
    assert keys.unique(return_counts=True)[1].tolist() == [16] * 8
    assert keys[[0, 1, 8, 9]].unique().numel() == 1
    assert keys[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_smoothing_pays_on_outlier_keys(rows):
    """By mean of block or sequence alike, and not on independent Gaussians."""
    for qk, pv in (("int8", "full"), ("int8", "fp16"), ("fp8", "fp8")):
        none = error(rows, f"qk {qk} no mean, pv {pv}", "outlier_k")
        for mean in ("block mean", "sequence mean"):
            assert error(rows, f"qk {qk} {mean}, pv {pv}", "outlier_k") < 0.5 * none
    plain = [
        error(rows, f"qk int8 {mean}, pv full", "normal") for mean in ("block mean", "no mean")
    ]
    assert plain[0] == pytest.approx(plain[1], rel=0.1)


def test_finer_groups_are_no_worse(rows):
    for kind in ("normal", "outlier_k", "long"):
        block = error(rows, "Sage int8 per block, pv fp16", kind)
        assert error(rows, "Sage2 int8 per thread, pv fp16", kind) <= block * 1.01
        assert error(rows, "Sage2 int8 per warp, pv fp8", kind) < 0.1


def test_row_sum_before_rounding_leaves_a_bias(rows):
    """Constant values show it: weights that sum to one give them back."""
    assert error(rows, "qk int8 block mean, pv fp8", "constant_v") < 1e-6
    assert 1e-4 < error(rows, "Sage2 int8 per thread, pv fp8", "constant_v") < 1e-2


def test_a_narrow_v_costs_no_more_than_its_subnormals(rows):
    wide = error(rows, "Sage2 int8 per thread, pv fp8", "normal")
    narrow = error(rows, "Sage2++ int8 per thread, pv fp8 fp16-acc", "normal")
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.1)


def test_a_share_of_few_blocks_is_none_for_them_and_one_for_us(rows):
    assert error(rows, "TurboDiffusion SLA, top 10%", "normal") == math.inf
    assert error(rows, "TurboDiffusion SLA, top 10%", "long") < 1e-12
    assert error(rows, "float32 top 10%", "normal") < 1e-5


# --- The command --------------------------------------------------------------------------------


def test_json_is_one_flat_document(capsys):
    code, out, err = run(capsys, "quant", "--json")
    assert code == 0
    document = json.loads(out)
    keys = {"rows", "backends", "device", "seed", "checked", "failed", "left_out"}
    assert set(document) == keys
    assert document["backends"] == {"quant": "reference"}
    assert document["failed"] == 0
    for row in document["rows"]:
        assert all(re.fullmatch("[a-z0-9_]+", key) for key in row)
        assert not any(isinstance(value, (dict, list)) for value in row.values())
        assert {"family", "op", "recipe", "input", "cosine", "relative_l1", "rmse", "peak"} <= set(
            row
        )
        assert row["backend"] == "reference"
    assert "TurboDiffusion" in err  # the table


def test_table_names_what_it_judged(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run(capsys, "gemm_w8a8")
    assert code == 0
    for word in (
        "int8 1x128, bfloat16 out",
        "TurboT2AV",
        "pass",
        "shown",
        "worst input",
        "0 failed",
    ):
        assert word in out
    code, whole, _ = run(capsys, "gemm_w8a8", "--all")
    assert whole.count("pass") > 5 * out.count("pass")


def test_piped_table_is_wide_and_80_columns_suffice(capsys, monkeypatch):
    monkeypatch.setattr(check, "kinds", lambda family: ("normal",))
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = run(capsys, "attention")
    assert max(map(len, out.splitlines())) in range(90, cli_tables.PIPED_WIDTH + 1)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "attention")
    assert max(map(len, out.splitlines())) <= 80
    assert "pass" in out
    assert "…" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["atention"], "family: expected 'quant' or .*'attention'.* got 'atention'"),
        (["--backend", "cudnn"], "backend: expected 'auto' or 'reference'.* got 'cudnn'"),
        (["--backend", "cute", "quant"], "backend: expected 'auto'"),
        (["--device", "tpu"], "device: expected 'cpu'.* got 'tpu'"),
        (["--device", "cuda:99"], "device: expected 'cpu'.* got 'cuda:99'"),
        (["--picture", "out.jpg"], "out: expected a name that ends in .png"),
        (["--update", "no/such/page.md"], "no such folder"),
        (["quant", "--update", "page.md"], "update: expected all families"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_2_and_says_what_exists(arguments, message, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1


def test_backend_without_a_kernel_is_refused_by_name(monkeypatch, capsys):
    table = tuple(backends.Row(family, "reference") for family in backends.FAMILIES)
    monkeypatch.setattr(backends, "TABLE", table)
    code, _, err = run(capsys, "--backend", "triton")
    assert code == 2
    assert "backend='reference'" in err


def test_families_that_a_backend_lacks_are_named(monkeypatch, capsys):
    monkeypatch.setattr(backends, "TABLE", (backends.Row("quant", "reference"),))
    monkeypatch.setattr(check, "kinds", lambda family: ("single_token",))
    code, out, err = run(capsys, "--json")
    assert code == 0
    assert json.loads(out)["backends"] == {"quant": "reference"}
    assert "sla: not checked, no auto backend" in err


def test_help_does_not_import_torch():
    code = """
import sys
from collections import Counter
from reeltime.cli import main
try: main(["check", "--help"])
except SystemExit as stop: assert not stop.code, stop.code
assert not {"torch", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- Picture and page ---------------------------------------------------------------------------


def test_picture_is_drawn_and_light(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "kinds", lambda family: ("normal", "ragged"))
    out = tmp_path / "error.png"
    assert run(capsys, "quant", "--picture", str(out))[0] == 0
    with Image.open(out) as image:
        assert min(image.size) > 300
        grey = image.convert("L").histogram()
    assert sum(grey[240:]) > 0.8 * sum(grey)
    assert sum(grey[:200]) > 1000


def test_picture_and_page_show_what_exists(rows, paths):
    """A renamed recipe would leave its column empty."""
    there = {(row.family, row.op, row.recipe) for row in rows + paths}
    for family, series in picture.SERIES.items():
        assert {(family, op, recipe) for op, recipe, _ in series} <= there


def test_update_rewrites_between_the_markers_alone(tmp_path, rows):
    page = tmp_path / "page.md"
    begin, end = pages.MARKERS
    page.write_text(f"above\n{begin}\nstale\n{end}\nbelow\n")
    pages.update(page, rows)
    text = page.read_text()
    assert text.startswith(f"above\n{begin}\n")
    assert text.endswith(f"{end}\nbelow\n")
    assert "stale" not in text
    assert "| NaN |" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="accuracy:begin"):
        pages.update(page, rows)


def test_shipped_page_lists_the_recipes_of_today(rows, paths):
    """Digits may differ from machine to machine; what is compared may not."""
    text = (ROOT / "docs/accuracy.md").read_text()
    shipped = re.findall(r"^\| ([a-z_0-9]+) \| ([^|]+) \| [a-z ]+ \| [\d.]+ \|", text, re.M)
    today = {(row.op, row.recipe) for row in rows + paths}
    assert {(op, recipe.strip()) for op, recipe in shipped} == today
    assert "| FAIL |" not in text
    assert (ROOT / "docs/accuracy.png").stat().st_size > 10_000


# --- Path by path -------------------------------------------------------------------------------


def test_every_path_passes_and_has_its_peers(paths):
    assert [row for row in paths if row.passed is False or row.error] == []
    there = {(row.op, row.recipe) for row in paths}
    for (op, recipe), peers in PEERS.items():
        assert {(op, recipe), *((op, peer) for peer in peers)} <= there
    alone = {(row.op, row.recipe) for row in paths if check.ours(row)} - set(PEERS)
    assert all("sequence" in recipe or op == "segment_sla" or "fp8 block" in recipe
               for op, recipe in alone)  # fmt: skip


def test_mean_of_the_block_costs_no_more_than_that_of_the_sequence(paths):
    """What writing once costs: nothing that a change of the rounded values would not."""
    found = {(row.op, row.recipe, row.input): row.relative_l1 for row in paths}
    for qk, pv in (("int8", "fp16"), ("int8", "fp8"), ("fp8", "fp8")):
        for kind in {row.input for row in paths} - {"constant_v"}:
            name = f"qk {qk} {{}} mean, pv {pv}"
            ours, theirs = (found["attention", name.format(m), kind] for m in ("block", "sequence"))
            assert ours < 1.1 * theirs, (name, kind)


def test_page_shows_other_backends_beside(paths):
    """Under their path, with their own ratio to its peers, and the worst of them is named."""
    path, peer = next(iter(PEERS.items()))[0], "Sage2 int8 per thread, pv fp16"
    mine, theirs = (
        next(r for r in paths if (r.op, r.recipe, r.input) == (path[0], name, "normal"))
        for name in (path[1], peer)
    )
    bad = replace(mine, relative_l1=7 * theirs.relative_l1, backend="cuda", device="sm_99")
    text = pages.markdown(paths, [bad])
    lines = text.splitlines()
    at = lines.index(next(line for line in lines if line.startswith(f"| **{', '.join(path)}**")))
    assert lines[at + 1].startswith(f"| cuda, sm_99 | {pages.number(bad.relative_l1)} |  |")
    assert f"| {', '.join(path)} (cuda, sm_99) / {peer} | 7.00 |" in text
    assert f"to 7.00 times its error, most in {', '.join(path)} (cuda, sm_99), normal" in text


def test_rows_of_another_run_are_read_back(paths, tmp_path):
    page = tmp_path / "rows.json"
    page.write_text(json.dumps({"rows": [row.document() for row in paths[:9]]}))
    assert check.read(page) == paths[:9]
    page.write_text("[]")
    with pytest.raises(ValueError, match=r"beside: expected rows of --json in .*rows\.json"):
        check.read(page)


def test_shipped_rows_are_of_the_paths_of_today(paths):
    """docs/accuracy.md shows them beside the reference's."""
    shipped = check.read(ROOT / "bench/results/accuracy_emulated.json")
    mine = {(row.op, row.recipe, row.input) for row in paths if check.ours(row)}
    assert {(row.op, row.recipe, row.input) for row in shipped} == mine
    assert all(row.passed for row in shipped)


def test_160k_keys_are_what_they_say():
    inputs = Inputs("160k_keys", "reference", CPU, 0)
    assert inputs.lengths[1] == 163_840
    assert math.prod(segments.GRIDS["160k_keys"]) * segments.FRAMES["160k_keys"] == 163_840


def test_what_a_backend_refuses_is_left_out_and_counted():
    """Triton computes in float32: the float64 recipes have no row, and the reason is told."""
    refused: Counter[str] = Counter()
    rows = list(check.check("quant", "single_token", backend="triton", refused=refused))
    everything = list(check.check("quant", "single_token", backend="reference"))
    assert {row.recipe for row in everything} - {row.recipe for row in rows}
    assert all(row.passed is not False for row in rows)
    assert refused == {
        "its kernels compute in float32; float64 has backend='reference'": len(everything)
        - len(rows)
    }
