# SPDX-License-Identifier: Apache-2.0
"""The table of backends, and what registration promises of every op: opcheck, compile, export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reeltime import attention, backends, checks, gemm_w8a8, norm, quant, rope_kv, sla
from reeltime.arch import UnsupportedArchError

CPU = torch.device("cpu")


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(
        grad
    )


def scale(*shape: int) -> Tensor:
    return random(*shape).abs() + 0.1


def int8(*shape: int) -> Tensor:
    return random(*shape).mul(40).clamp(-127, 127).to(torch.int8)


def table(*lead: int) -> Tensor:
    """[..., 12, 4, 2] for two frames of 2 x 3 tokens, D = 8."""
    return rope_kv.rope_table(torch.arange(2).expand(*lead, 2), (2, 3), 8)


def cache(
    format: str, dtype: torch.dtype | None = None, tokens: int = 6, summaries: str = "block"
) -> rope_kv.KVCache:
    frames = 3
    c = rope_kv.make_cache(1, frames, tokens, 2, 8, format=format, dtype=dtype, summaries=summaries)
    rope_kv.write(
        random(1, frames * tokens, 16),
        random(1, frames * tokens, 16) + 1,
        c,
        torch.arange(frames),
        num_heads=2,
    )
    return c


def cached(c: rope_kv.KVCache) -> tuple[Tensor | None, ...]:
    return c.k, c.v, c.k_scale, c.k_mean, c.v_scale


def op_samples(grad: bool) -> dict[str, list[tuple[object, ...]]]:
    """Arguments of every registered op, `backend` left out.

    opcheck compares tensors with allclose, which float8 lacks: int8 caches hold float16 values.
    """
    i8, f32 = torch.int8, torch.float32
    x, h = random(2, 6, 8, grad=grad), random(2, 6, 9, grad=grad)[..., :8]
    options = ("layer", random(8, grad=grad), None, random(2, 3, 8, grad=grad), None, 1e-6)
    gate = random(2, 2, 8, grad=grad)
    query = (random(1, 12, 16, grad=grad), table(2), 2, random(16, grad=grad), 1e-6, 0.5)
    qkv = tuple(random(1, n, 2, 8, grad=grad) for n in (5, 7, 7))
    plain, low = cache("plain"), cache("int8", torch.float16)
    ragged = cache("plain", tokens=65, summaries="slot")
    q = random(2, 1, 12, 2, 8, grad=grad)
    where = (torch.tensor([2, -1, 0]), torch.tensor([0, 1, 1]))
    gemm = (int8(6, 144), int8(130, 144), scale(1, 2), scale(2, 2), random(130, grad=grad))
    tail = (random(6, 130, grad=grad), random(2, 130, grad=grad), 128, "gated_residual")
    pooled = (random(1, 3, 2, 8), random(1, 4, 1, 8))
    csr = sla.block_mask(*pooled, topk=2)
    hz = random(1, 4, 1, 8, 8, grad=grad), scale(1, 4, 1, 8)
    long = tuple(random(1, n, h, 8, grad=grad) for n, h in ((9, 2), (13, 1), (13, 1)))
    proj = random(8, 8, grad=grad), random(8, grad=grad)
    mask = (2, 0.5, 0.25)
    return {
        "quantize": [(random(5, 130), i8, 1), (random(5, 130), torch.float8_e4m3fn, 128)],
        "dequantize": [(int8(5, 130), scale(5, 2).requires_grad_(grad), 1, f32)],
        "norm": [(x, *options)],
        "norm_quantized": [(x.detach(), i8, 128, "rms", None, None, None, None, 1e-6)],
        "gated_residual_norm": [(x, h, gate, *options), (x, h, None, *options)],
        "gated_residual_norm_quantized": [
            (x.detach(), h.detach(), None, i8, 1, "layer", None, None, None, None, 1e-6)
        ],
        "query": [query, (query[0], None, 2, None, 1e-6, 1.0)],
        "query_int8": [(random(1, 12, 16), table(2), 2, None, 1e-6, 1.0)],
        "write": [
            (random(1, 12, 16), random(1, 12, 16), torch.tensor([2, 0]), table(), None, 2, 1e-6)
            + ("softmax", *cached(c), c.h, c.z)
            for c in (plain, low)
        ]
        + [
            (random(1, 65, 16), random(1, 65, 16), torch.tensor([2]), None, None, 2, 1e-6)
            + ("elu", *cached(ragged), ragged.h, ragged.z)
        ],
        "rope_on_cache": [(random(1, 2, 6, 2, 8, grad=grad), table())],
        "gemm_w8a8": [(*gemm, *tail, f32), (*gemm, None, None, 128, "gelu", torch.bfloat16)],
        "gemm_w8a8_requantized": [(*gemm[:4], None, None, None, 128, "none", i8)],
        "attention": [
            (*qkv, None, 0.3, "bottom_right", None, None, None, True),
            (*qkv, random(5, 7), 0.3, None, None, None, None, False),
        ],
        "segment_attention": [
            (q, None, None, *cached(c), *where, 0.3, lse)
            for c, lse in ((plain, True), (low, False))
        ],
        "block_mask": [
            (*pooled, None, None, *mask, 0.3, 4),
            (*pooled, None, None, 2, None, 0, 1, 2),
        ],
        "sparse_attention": [
            (*qkv, *csr, 2, 2, 0.3, 9.0, None, None, None),
            (*qkv, *csr, 2, 2, 0.3, 9.0, "int8", "fp16", "block"),
        ],
        "linear_attention": [
            (random(1, 5, 2, 8, grad=grad), *hz, *csr, "unselected", 2, "softmax", 1e-5),
            (random(1, 5, 2, 8, grad=grad), *hz, None, None, "all", 2, "elu", 1e-5),
        ],
        "sla": [
            (*long, *proj, *mask, "marginal", -1.0, 9.0, 4, 4, "softmax", 0.3, 1e-5, *formats)
            for formats in ((None, None, None), ("int8", "fp16", "block"))
        ],
        "segment_sla": [
            (q, *cached(c), c.h, c.z, *where, *proj, *mask, over, 9.0, 4, "softmax", 0.3, 1e-5)
            for c, over in ((plain, "unselected"), (low, "all"), (ragged, "all"))
        ],
    }


def public_calls() -> dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]]:
    """Every public op as a function of tensors, and those tensors."""
    plain, low = cache("plain"), cache("int8")
    x, mod = random(2, 6, 8), random(2, 3, 8)
    xq, x_scale = quant.quantize(random(5, 144))
    b, b_scale = quant.quantize(random(130, 144), block_rows=128)
    wide, q = random(1, 12, 16), random(2, 1, 12, 2, 8)
    where = (torch.tensor([2, -1, 0]), torch.tensor([0, 1, 1]))
    qkv = random(1, 130, 2, 8), random(1, 190, 1, 8), random(1, 190, 1, 8)
    pooled_q, pooled_k = random(1, 3, 2, 8), random(1, 4, 1, 8)
    csr = sla.block_mask(random(1, 2, 2, 8), random(1, 3, 1, 8), topk=2)
    h, z = sla.summaries(*qkv[1:])

    def write(low: bool) -> object:
        def call(k: Tensor, v: Tensor, slots: Tensor, t: Tensor, *parts: Tensor) -> None:
            names = ("k", "v", "k_mean", "h", "z", "k_scale", "v_scale")
            held = dict(zip(names, parts, strict=False))
            target = rope_kv.KVCache(format="int8" if low else "plain", **held)
            rope_kv.write(k, v, target, slots, table=t, num_heads=2)

        return call

    slots = (wide, random(1, 12, 16) + 1, torch.tensor([2, 0]), table())
    parts = [(c.k, c.v, c.k_mean, c.h, c.z) for c in (plain, low)]
    calls: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
        "quantize": (lambda x: quant.quantize(x, block_rows=128), (random(5, 130),)),
        "dequantize": (lambda xq, s: quant.dequantize(xq, s), (xq, x_scale)),
        "norm": (lambda x, m: norm.norm(x, scale=m, shift=m), (x, mod)),
        "norm_quantized": (lambda x: norm.norm(x, kind="rms", quantize="fp8"), (x,)),
        "gated_residual_norm": (lambda x, m: norm.gated_residual_norm(x, x, m), (x, mod)),
        "gated_residual_norm_quantized": (
            lambda x, m: norm.gated_residual_norm(x, x, m, quantize="int8"),
            (x, mod),
        ),
        "query": (lambda q, t: rope_kv.query(q, t, num_heads=2), (wide, table(2))),
        "query_int8": (
            lambda q, t: rope_kv.query(q, t, num_heads=2, quantize="int8"),
            (wide, table(2)),
        ),
        "write": (write(False), (*slots, *parts[0])),
        "write int8": (write(True), (*slots, *parts[1], low.k_scale, low.v_scale)),
        "rope_on_cache": (rope_kv.rope_on_cache, (random(1, 2, 6, 2, 8), table())),
        "rope_table": (lambda p: rope_kv.rope_table(p, (2, 3), 8), (torch.arange(2),)),
        "gemm_w8a8": (
            lambda a, b, s, t: gemm_w8a8.gemm_w8a8(a, b, s, t, epilogue="gelu"),
            (xq, b, x_scale, b_scale),
        ),
        "gemm_w8a8_requantized": (
            lambda a, b, s, t: gemm_w8a8.gemm_w8a8(a, b, s, t, requantize="fp8"),
            (xq, b, x_scale, b_scale),
        ),
        "attention": (
            lambda q, k, v: attention.attention(q, k, v, causal=True, return_lse=True),
            qkv,
        ),
        "attention int8": (
            lambda q, k, v: attention.attention(q, k, v, qk="int8", pv="fp8"),
            qkv,
        ),
        "segment_attention": (
            lambda q, t, o: attention.segment_attention(q, plain, t, o),
            (q, *where),
        ),
        "segment_attention int8": (
            lambda q, t, o: attention.segment_attention(q, low, t, o, return_lse=True),
            (q, *where),
        ),
        "block_mask": (lambda q, k: sla.block_mask(q, k, topk=2, topp=0.5), (pooled_q, pooled_k)),
        "sparse_attention": (
            lambda q, k, v, p, i: sla.sparse_attention(q, k, v, sla.CSR(p, i)),
            (*qkv, *csr),
        ),
        "linear_attention": (
            lambda q, h, z, p, i: sla.linear_attention(q, h, z, sla.CSR(p, i), over="unselected"),
            (qkv[0], h, z, *csr),
        ),
        "sla": (lambda q, k, v: sla.sla(q, k, v, topp=0.5, similarity=0.1, pv_skip=5.0), qkv),
        "segment_sla": (
            lambda q, t, o: sla.segment_sla(q, plain, t, o, over="marginal"),
            (q, *where),
        ),
    }
    return calls


def flat(results: object) -> list[Tensor]:
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [r for r in results if isinstance(r, Tensor)]


def same(got: object, want: object) -> bool:
    pairs = zip(flat(got), flat(want), strict=True)
    return all(torch.equal(g.float(), w.float()) for g, w in pairs)


OP_NAMES = sorted(backends.OPS)
CALL_NAMES = sorted(public_calls())


# --- The table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", backends.FAMILIES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reference_serves_every_family(family, backend):
    assert backends.resolve(family, backend, CPU) == "reference"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_absent_backend_says_what_would_serve(backend, monkeypatch):
    monkeypatch.setattr(backends, "TABLE", (backends.Row("norm", "reference"),))
    with pytest.raises(UnsupportedArchError, match=f"'{backend}' cannot serve norm on cpu.*refer"):
        norm.norm(random(1, 2, 4), backend=backend)


@pytest.mark.parametrize(
    "family, backend, named", [("norms", "auto", "family"), ("norm", "cudnn", "backend")]
)
def test_unknown_name_is_a_value_error(family, backend, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected 'quant'|^{named}: expected 'auto'"):
        backends.resolve(family, backend, CPU)


def test_support_matrix_is_the_table():
    rows = backends.support_matrix()
    pairs = {(row["family"], row["backend"]) for row in rows}
    assert pairs == {(f, b) for f in backends.FAMILIES for b in backends.BACKENDS[1:]}
    available = {(row["family"], row["backend"]) for row in rows if row["available"]}
    assert available == {(row.family, row.backend) for row in backends.TABLE}
    assert all(row["why"] for row in rows)


def test_first_row_wins_and_its_kernel_is_called(monkeypatch):
    rows = (backends.Row("norm", "triton", ("cpu",)), *backends.TABLE)
    monkeypatch.setattr(backends, "TABLE", rows)
    kernels = backends.OPS["norm"].kernels
    monkeypatch.setitem(kernels, "triton", lambda x, *options: torch.full_like(x, 7.0))
    x = random(1, 2, 4)
    assert norm.norm(x).unique().tolist() == [7.0]
    assert not same(norm.norm(x, backend="reference"), norm.norm(x))


def test_what_is_remembered_never_outlives_its_reason(monkeypatch):
    """A refusal sends one call elsewhere and not those after it; a new table is looked at anew."""
    op = backends.OPS["norm"]
    rows = (backends.Row("norm", "triton", ("cpu",)), backends.Row("norm", "reference"))
    monkeypatch.setattr(backends, "TABLE", rows)
    monkeypatch.setattr(op, "resolved", {})
    monkeypatch.setitem(op.kernels, "triton", lambda x, *options: torch.full_like(x, 7.0))
    refuse = lambda device, x, *_: "no float64" if x.dtype == torch.float64 else None  # noqa: E731
    monkeypatch.setitem(op.unless, "triton", refuse)
    x = random(1, 2, 4)
    for dtype, sevens in ((torch.float64, False), (torch.float32, True)) * 2:
        assert (norm.norm(x.to(dtype)) == 7.0).all() == sevens
    with pytest.raises(UnsupportedArchError, match="norm on cpu in this build: no float64. Pass b"):
        norm.norm(x.double(), backend="triton")
    monkeypatch.setattr(backends, "TABLE", rows[1:])
    assert not (norm.norm(x) == 7.0).any()


# --- Registration -------------------------------------------------------------------------------


def test_every_op_has_a_sample():
    assert set(op_samples(False)) == set(OP_NAMES)
    assert set(OP_NAMES) <= {name.split(" ")[0] for name in CALL_NAMES}


@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name):
    for args in op_samples(False)[name]:
        torch.library.opcheck(backends.OPS[name].overload, (*args, "reference"))


SECONDS_TO_TRACE = ("linear_attention", "segment_sla", "sla", "sparse_attention")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SECONDS_TO_TRACE else ()) for n in OP_NAMES],
)
def test_opcheck_with_gradients(name):
    args = op_samples(True)[name][0]
    torch.library.opcheck(backends.OPS[name].overload, (*args, "reference"))


@pytest.mark.parametrize("name", OP_NAMES)
def test_op_is_its_reference(name):
    if name == "write":
        pytest.skip("returns nothing; test_public_call_compiles looks at what it wrote")
    op = backends.OPS[name]
    for args in op_samples(False)[name]:
        assert same(op.overload(*args, "reference"), op.reference(*args))


@pytest.mark.parametrize(
    "name", ["norm", "query", "gemm_w8a8", "attention", "linear_attention", "sla"]
)
def test_gradient_behind_the_op_is_that_of_the_reference(name):
    gradients = []
    for call in (backends.OPS[name].reference, None):
        args = op_samples(True)[name][0]
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        result = call(*args) if call else backends.OPS[name].overload(*args, "reference")
        gradients.append(torch.autograd.grad(flat(result)[0].square().sum(), leaves))
    assert len(gradients[0]) > 1
    assert same(*gradients)


@pytest.mark.parametrize("name", CALL_NAMES)
def test_public_call_compiles(name):
    """Whole graph, and the same numbers; a call that writes is judged by its arguments."""
    call, args = public_calls()[name]
    eager, compiled = ([a.clone() for a in args] for _ in range(2))
    want = call(*eager)
    torch.compiler.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)
    assert same(got, want) if want is not None else same(compiled, eager)


@pytest.mark.parametrize("name", CALL_NAMES)
def test_public_call_exports(name):
    call, args = public_calls()[name]

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> object:
            return call(*args)

    eager, exported = ([a.clone() for a in args] for _ in range(2))
    want = call(*eager)
    got = torch.export.export(Module(), tuple(exported)).module()(*exported)
    assert same(got, want) if want is not None else same(exported, eager)


def test_op_survives_export_as_one_node():
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return backends.OPS["norm"].overload(
                x, "rms", None, None, None, None, 1e-6, "reference"
            )

    program = torch.export.export(Module(), (random(1, 2, 4),))
    assert [n for n in program.graph.nodes if n.target is backends.OPS["norm"].overload]
    assert same(program.module()(random(1, 2, 4)), norm.norm(random(1, 2, 4), kind="rms"))


# --- Comparing ----------------------------------------------------------------------------------


def test_accuracy_sees_what_differs():
    want = torch.tensor([3.0, -4.0, 0.0])
    assert checks.accuracy(want.clone(), want) == (1.0, 0.0, 0.0, 0.0)
    error = checks.accuracy(want + torch.tensor([0.0, 0.0, 0.7]), want)
    assert error.relative_l1 == pytest.approx(0.1)
    assert error.rmse == pytest.approx(0.7 / 3**0.5)
    assert error.peak == pytest.approx(0.7 / (25 / 3) ** 0.5)
    assert error.cosine == pytest.approx(25 / (5 * 25.49**0.5))
    assert checks.Tolerance(0.11, 0.3).accepts(error)
    assert not checks.Tolerance(0.09, 0.3).accepts(error)
    assert not checks.Tolerance(0.11, 0.2).accepts(error)
    assert checks.accuracy(torch.tensor([torch.nan]), torch.tensor([1.0])).peak == float("inf")
    with pytest.raises(ValueError, match="got: expected the shape"):
        checks.accuracy(want, want[:2])


# --- Direct calls -------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_kernel_is_called_directly_only_where_nobody_watches(monkeypatch):
    """A dispatch mode, a profiler and autograd all see the op; a plain call has no hop."""
    rows = (backends.Row("norm", "triton", ("cpu",)), backends.Row("norm", "reference"))
    monkeypatch.setattr(backends, "TABLE", rows)
    op = backends.OPS["norm"]
    monkeypatch.setattr(op, "resolved", {})
    monkeypatch.setitem(op.kernels, "triton", lambda x, *options: torch.full_like(x, 7.0))
    x = random(1, 2, 4)
    with torch.no_grad():
        assert norm.norm(x).unique().tolist() == [7.0]
        with Seen() as seen:
            norm.norm(x)
        assert any("reeltime.norm" in name for name in seen.names)
        with torch.profiler.profile() as profile:
            norm.norm(x)
        assert any("reeltime::norm" in event.key for event in profile.key_averages())
        assert not backends.unwatched(torch.empty(1, dtype=torch.float32).as_subclass(Sub))
    assert not backends.unwatched(x)  # with gradients


class Sub(Tensor):
    pass
