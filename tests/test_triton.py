# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel stands on: an exact interpreter, one way to launch, one contract."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter as stock

from reeltime import arch, backends
from reeltime.jit import interpreter, launch
from reeltime.jit.launch import recording


def neighbour(name):
    """Another test module: pytest's importlib mode puts no directory on sys.path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = neighbour("test_backends")
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="looks at the interpreter")

# --- The interpreter: numbers -------------------------------------------------------------------


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_ptr + n, tl.load(x_ptr + n).to(y_ptr.dtype.element_ty))


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    x, y = tl.load(x_ptr + n), tl.load(y_ptr + n)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "less":
        out = tl.where(x < y, x, y)
    else:
        out = -tl.abs(x)
    tl.store(out_ptr + n, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    m, n = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    place = m * N + n
    a, b, c = tl.load(a_ptr + place), tl.load(b_ptr + place), tl.load(c_ptr + place)
    tl.store(out_ptr + place, tl.dot(a, b, c, out_dtype=out_ptr.dtype.element_ty))


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.fma(tl.load(x_ptr + n), tl.load(y_ptr + n), tl.load(z_ptr + n)))


def patterns():
    """65536 float32: every sign, exponent and upper mantissa, ties and all else below."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    lower = np.random.default_rng(0).integers(0, 65536, 65536, dtype=np.uint32)
    lower[::3], lower[1::3] = 0x8000, 0
    return torch.from_numpy((upper | lower).view(np.float32).copy())


NARROW = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def assert_same(got, want):
    """Bit for bit, but any NaN is a NaN."""
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(0.5), want.nan_to_num(0.5)
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())


@interpreted
@pytest.mark.parametrize("name", NARROW)
def test_float32_is_rounded_to_nearest_even(name):
    """Float8 saturates, as the conversion instructions of a GPU do."""
    x, dtype = patterns(), NARROW[name]
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel())
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = torch.where(x.isnan(), x, x.clamp(-limit, limit))
    assert_same(y, x.to(dtype))


@interpreted
@pytest.mark.parametrize("source", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", ["bfloat16", "float16", "e4m3"])
def test_sixteen_bits_are_rounded_to_nearest_even(source, target):
    codes = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(NARROW[source])
    y = torch.empty(codes.shape, dtype=NARROW[target])
    _cast_kernel[(1,)](codes, y, codes.numel())
    wide = codes.float()
    if target == "e4m3":
        wide = torch.where(wide.isnan(), wide, wide.clamp(-448, 448))
    assert_same(y, wide.to(NARROW[target]))


@interpreted
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_all_codes_of_float8_survive(name):
    """Widened they are their values; an infinity of e5m2 saturates on the way back."""
    codes = torch.arange(256, dtype=torch.uint8).view(NARROW[name])
    values, back = torch.empty(256), torch.empty(256, dtype=NARROW[name])
    _cast_kernel[(1,)](codes, values, 256)
    assert_same(values, codes.float())
    _cast_kernel[(1,)](values, back, 256)
    limit = torch.finfo(NARROW[name]).max
    assert_same(back, values.clamp(-limit, limit))


@interpreted
def test_integers_become_bfloat16_and_back():
    """Rounded to nearest even on the way there, towards zero on the way back."""
    x = torch.arange(-1024, 1024, dtype=torch.int32)
    y, back = torch.empty(2048, dtype=torch.bfloat16), torch.empty_like(x)
    _cast_kernel[(1,)](x, y, 2048)
    assert_same(y, x.to(torch.bfloat16))
    _cast_kernel[(1,)](y / 3, back, 2048)
    assert torch.equal(back, (y / 3).to(torch.int32))


@interpreted
@pytest.mark.parametrize("op", ["add", "mul", "maximum", "less", "negative magnitude"])
def test_bfloat16_arithmetic_is_on_values(op):
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4096, generator=g).mul(3).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, op, x.numel())
    want = {"add": x + y, "mul": x * y, "maximum": torch.maximum(x, y), "less": x.minimum(y)}
    assert_same(out, want.get(op, -x.abs()))


@interpreted
@pytest.mark.parametrize("name", NARROW)
def test_dot_of_narrow_floats(name):
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(32, 32, generator=g).to(NARROW[name]) for _ in range(2))
    c, out = torch.randn(32, 32, generator=g), torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, c, out, 32)
    want = a.double() @ b.double() + c.double()
    assert (out - want).abs().max() < 1e-5


@interpreted
def test_dot_of_int8_is_exact():
    """Largest products, on an accumulator that float32 could not hold."""
    a, b = (torch.full((128, 128), -128, dtype=torch.int8) for _ in range(2))
    a[::2], b[:, ::3] = 127, 126
    c = torch.full((128, 128), 0x4B400001, dtype=torch.int32)
    out = torch.empty_like(c)
    _dot_kernel[(1,)](a, b, c, out, 128)
    assert torch.equal(out.long(), a.long() @ b.long() + c)


@interpreted
def test_fma_rounds_once():
    g = torch.Generator().manual_seed(3)
    x, y = (1 + torch.randn(1024, generator=g) * 2**-12 for _ in range(2))
    out = torch.empty(1024)
    _fma_kernel[(1,)](x, y, -x * y, out, 1024)
    error = x.double() * y.double() - (x * y).double()  # a product of two floats fits a double
    assert error.any()
    assert torch.equal(out.double(), error)


@interpreted
def test_repair_happens_once():
    before = {name: getattr(stock.InterpreterBuilder, name) for name in ("cast_impl", "binary_op")}
    interpreter.repair()
    assert before == {name: getattr(stock.InterpreterBuilder, name) for name in before}


# --- The interpreter: memory --------------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, LIMIT, STEP: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr):
    """Program p copies N elements from p * STEP to p * STEP + SHIFT, as far as LIMIT."""
    n = tl.program_id(0) * STEP + tl.arange(0, N)
    tl.store(y_ptr + n + SHIFT, tl.load(x_ptr + n, n < LIMIT), n < LIMIT)


def copy(x, y, *, limit=64, step=16, shift=0, programs=4):
    _copy_kernel[(programs,)](x, y, limit, step, shift, 16)


@interpreted
def test_copy_in_bounds_is_let_pass():
    x, y = torch.arange(60.0), torch.zeros(60)
    copy(x, y, limit=60)
    assert torch.equal(x, y)


FAULT = r"program \({}, 0, 0\) {}s out of bounds: {} lanes, the first {} bytes from the start"


@interpreted
@pytest.mark.parametrize(
    "sizes, options, said",
    [
        pytest.param((60, 64), {}, (3, "load", 4, 240), id="load past the end"),
        pytest.param((64, 60), {}, (3, "store", 4, 240), id="store past the end"),
        pytest.param((64, 64), {"shift": -2}, (0, "store", 2, -8), id="store before the start"),
    ],
)
def test_out_of_bounds_is_reported(sizes, options, said):
    memory = torch.zeros(512)  # all of it there, two pieces of it passed
    x, y = memory[256 : 256 + sizes[0]], memory[64 : 64 + sizes[1]]
    with pytest.raises(stock.InterpreterError, match=FAULT.format(*said)):
        copy(x, y, **options)


@interpreted
def test_gap_behind_a_view_is_out_of_bounds():
    """What a tensor's storage holds beyond its last element is not the tensor's."""
    y = torch.zeros(4, 32)[:, :16]
    with pytest.raises(stock.InterpreterError, match=FAULT.format(3, "store", 16, 448)):
        copy(torch.zeros(256), y, limit=256, step=32, shift=16)


@interpreted
def test_two_programs_on_one_address_are_reported():
    said = r"programs \(0, 0, 0\) and \(1, 0, 0\) both store to one address"
    with pytest.raises(stock.InterpreterError, match=said):
        copy(torch.zeros(64), torch.zeros(64), step=15)


@interpreted
def test_two_launches_on_one_address_are_not():
    x, y = torch.arange(64.0), torch.zeros(64)
    for _ in range(2):
        copy(x, y)
    assert torch.equal(x, y)


@interpreted
def test_overlapping_views_are_one_memory():
    """Reads of one and stores to the other agree; a double store through both is still seen."""
    whole = torch.arange(80.0)
    copy(whole[:64], whole[16:], limit=16, programs=1)
    assert torch.equal(whole[16:32], whole[:16])
    copy(whole[16:32], whole, limit=16, shift=48, programs=1)  # past the end of the inner view
    assert torch.equal(whole[48:64], whole[:16])
    with pytest.raises(stock.InterpreterError, match="both store to one address"):
        copy(whole[:64], whole[8:72], step=8)


# --- Launching ----------------------------------------------------------------------------------


@triton.jit
def _fill_kernel(x_ptr, value, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), value)


def test_launch_runs_every_program(device):
    x = torch.zeros(64, device=device)
    launch.launch(_fill_kernel, (4,), x, 7.0, BLOCK=16)
    assert x.unique().tolist() == [7.0]


@pytest.mark.parametrize("grid", [(0,), (2, 0), (0, 3, 1)], ids=str)
def test_empty_grid_does_nothing(grid, device):
    x = torch.zeros(16, device=device)
    launch.launch(_fill_kernel, grid, x, 7.0, BLOCK=16)
    assert not x.any()
    with recording(arch.ARCHS[0]) as launches:
        launch.launch(_fill_kernel, grid, x, 7.0, BLOCK=16)
    assert not launches


def test_meta_tensors_are_not_launched_on():
    launch.launch(_fill_kernel, (1,), torch.empty(16, device="meta"), 7.0, BLOCK=16)


def test_recording_collects_and_does_not_run(device):
    x = torch.zeros(64, device=device)
    with recording(arch.ARCHS[3]) as launches:
        assert launch.arch_of(device).name == "sm90"
        launch.launch(_fill_kernel, (4,), x, 7.0, BLOCK=16, num_warps=8)
        with recording(arch.ARCHS[0]) as inner:
            assert launch.arch_of(device).name == "sm80"
        launch.launch(_fill_kernel, (2,), x.to("meta"), 7.0, BLOCK=32, num_stages=3)
    assert not x.any()
    assert not inner
    first, second = launches
    assert (first.kernel, first.grid) == (_fill_kernel, (4,))
    assert first.arguments["x_ptr"] is x
    assert {k: v for k, v in first.arguments.items() if k != "x_ptr"} == {"value": 7.0, "BLOCK": 16}
    assert first.options == {"num_warps": 8, "num_stages": 2}
    assert second.options == {"num_warps": 4, "num_stages": 3}
    launch.launch(_fill_kernel, (4,), x, 7.0, BLOCK=16)
    assert x.all()


def test_recording_ends_with_an_error(device):
    with pytest.raises(ZeroDivisionError), recording(arch.ARCHS[3]):
        raise ZeroDivisionError
    x = torch.zeros(16, device=device)
    launch.launch(_fill_kernel, (1,), x, 7.0, BLOCK=16)
    assert x.all()


@pytest.fixture
def h200(tmp_path, monkeypatch):
    """tuned/h200.json of a test, and the device that reads it."""
    rows = [
        {"when": {"M": 128, "N": 256}, "config": {"BLOCK_M": 64, "num_warps": 8}},
        {"when": {"M": 128}, "config": {"BLOCK_M": 32}},
    ]
    (tmp_path / "h200.json").write_text(json.dumps({"gemm": rows}))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(launch, "gpu_name", lambda index: "h200")
    launch.tuned.cache_clear()
    yield torch.device("cuda", 0)
    launch.tuned.cache_clear()


DEFAULT = {"BLOCK_M": 128, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize(
    "kernel, shape, expected",
    [
        pytest.param("gemm", {"M": 128, "N": 256}, {"BLOCK_M": 64, "num_warps": 8}, id="first row"),
        pytest.param("gemm", {"M": 128, "N": 512}, {"BLOCK_M": 32}, id="less particular row"),
        pytest.param("gemm", {"M": 64, "N": 256}, {}, id="no row agrees"),
        pytest.param("gemm", {"N": 256}, {}, id="size not given"),
        pytest.param("norm", {"M": 128, "N": 256}, {}, id="other kernel"),
    ],
)
def test_config_is_tuned_data_over_the_default(kernel, shape, expected, h200):
    assert launch.config(kernel, h200, DEFAULT, **shape) == DEFAULT | expected


def test_config_is_the_default_where_nothing_was_measured(h200, monkeypatch):
    shape = {"M": 128, "N": 256}
    assert launch.config("gemm", torch.device("cpu"), DEFAULT, **shape) == DEFAULT
    with recording(arch.ARCHS[0]):
        assert launch.config("gemm", h200, DEFAULT, **shape) == DEFAULT
    monkeypatch.setattr(launch, "gpu_name", lambda index: "another-card")
    assert launch.config("gemm", h200, DEFAULT, **shape) == DEFAULT


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA RTX PRO 6000 (Blackwell) Server Edition", "rtx-pro-6000-blackwell-server-edition"),
    ],
)
def test_slug_is_the_card_without_its_vendor(name, expected):
    assert launch.slug(name) == expected


def test_unless_names_what_serves():
    refuses = launch.unless(0, 1, check=lambda x, dtype, odd: "odd" if odd else None)
    x = torch.zeros(2)
    assert refuses(x.device, x, torch.int8, False) is None
    assert refuses(x.device, x, torch.int8, True) == "odd"
    assert refuses(x.device, x, None, False) is None
    assert "backend='reference'" in refuses(x.device, x.double(), torch.int8, False)
    assert "backend='reference'" in refuses(x.device, x, torch.float64, False)


def test_float8_needs_sm89(monkeypatch):
    cuda, fp8 = torch.device("cuda", 0), torch.float8_e4m3fn
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert bool(launch.refuses(cuda, fp8)) == refused
        assert launch.refuses(cuda, torch.int8) is None
    assert launch.refuses(torch.device("cpu"), fp8) is None


# --- Every op -----------------------------------------------------------------------------------

OP_NAMES = sorted(backends.OPS)
CALLS = samples.public_calls()
CALL_NAMES = sorted(name for name in CALLS if name.split(" ")[0] in backends.OPS)


def has_kernel(name):
    """Whether `name` has a Triton kernel; a family that nobody wrote yet has none."""
    family = backends.OPS[name].family
    if importlib.util.find_spec(f"reeltime.{family}.triton") is None:
        return False
    return backends.load(family, "triton", name)


def require(name):
    if not has_kernel(name):
        pytest.skip(f"no Triton kernel of {name} yet; test_every_op_has_a_kernel counts it")


def on(device, value):
    """A fresh copy of a sample's argument, its strides kept."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(
        value
    )


def op_samples(name, device):
    """The samples of an op that Triton serves."""
    op = backends.OPS[name]
    for args in samples.op_samples(False)[name]:
        args = tuple(on(device, a) for a in args)
        if op.refuses("triton", device, args) is None:
            yield args


def layout(result):
    """dtype, shape and strides of every tensor of a result; one element has no stride."""
    return [
        (
            t.dtype,
            [
                (size, step if size > 1 else 0)
                for size, step in zip(t.shape, t.stride(), strict=True)
            ],
        )
        for t in samples.flat(result)
    ]


def test_every_op_has_a_kernel():
    """The list of what is missing: it stays red until every family has landed."""
    assert [name for name in OP_NAMES if not has_kernel(name)] == []


@pytest.mark.parametrize("name", OP_NAMES)
def test_triton_serves_a_sample(name, device):
    """Otherwise the tests below look at nothing."""
    require(name)
    assert list(op_samples(name, device))


@pytest.mark.parametrize("name", OP_NAMES)
def test_kernel_reference_and_fake_agree_on_layout(name, device):
    """Also on meta tensors, which is how kernels are compiled ahead of time."""
    require(name)
    op = backends.OPS[name]
    for args in op_samples(name, device):
        kernel, reference = (
            op.overload(*(on(device, a) for a in args), b) for b in ("triton", "reference")
        )
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fake = op.overload(*fakes, "triton")
        meta = op.kernels["triton"](*(on("meta", a) for a in args))
        assert layout(kernel) == layout(fake)
        assert layout(reference) == layout(fake)
        assert layout(meta) == layout(fake)


@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name, device):
    require(name)
    args = next(op_samples(name, device))
    torch.library.opcheck(
        backends.OPS[name].overload,
        (*args, "triton"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.fixture
def triton_first(monkeypatch, device):
    """A table in which "auto" asks for Triton, interpreted or not."""
    rows = tuple(backends.Row(f, "triton", (device.type,)) for f in backends.FAMILIES)
    monkeypatch.setattr(backends, "TABLE", (*rows, *backends.TABLE))


@pytest.mark.parametrize("name", CALL_NAMES)
def test_public_call_compiles(name, device, triton_first, monkeypatch):
    """Whole graph, and the same numbers; a call that writes is judged by its arguments."""
    op_name = name.split(" ")[0]
    require(op_name)
    kernels, ran = backends.OPS[op_name].kernels, []
    kernel = kernels["triton"]
    monkeypatch.setitem(kernels, "triton", lambda *args: (ran.append(1), kernel(*args))[1])
    call, args = CALLS[name]
    if device.type != "cpu" and name.startswith("segment"):
        pytest.skip("its cache is on the CPU")
    eager, compiled = ([on(device, a) for a in args] for _ in range(2))
    want = call(*eager)
    assert ran
    torch.compiler.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)
    assert len(ran) > 1
    assert samples.same(got, want) if want is not None else samples.same(compiled, eager)
