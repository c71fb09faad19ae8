# SPDX-License-Identifier: Apache-2.0
"""reeltime._C and reeltime.native: names, numbers, errors, and launches noted without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import parameters
import pytest
import torch
from emulated import emulated

from reeltime import _C, arch, backends, native, quant
from reeltime.arch import UnsupportedArchError

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
compiled = pytest.mark.skipif(not _C.has_cuda, reason="this build has no CUDA kernels")
FAMILIES = sorted(path.parent.name for path in CSRC.glob("*/binding.cpp"))


def test_numbers_of_dtypes():
    enum = re.search(r"enum class Dtype : int32_t {(.*?)}", (CSRC / "common/dtype.h").read_text())
    spelled = [str(dtype).removeprefix("torch.") for dtype in native.DTYPES]
    named = [name.strip().removeprefix("k").lower() for name in enum[1].split(",")]
    assert named == [{"float8_e4m3fn": "e4m3"}.get(name, name) for name in spelled]
    assert native.code(torch.int8) == native.code_of(torch.empty(0, dtype=torch.int8)) == 3


def test_every_family_with_a_binding_is_built():
    lines = re.findall(r"^add_family\((\w+) (.*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M)
    built = {name: files.removesuffix(" FALLBACK").split() for name, files in lines}
    assert built == {
        family: [path.stem for path in sorted((CSRC / family).glob("sm*.cu"))]
        for family in FAMILIES
    }


@compiled
@pytest.mark.parametrize("family", FAMILIES)
def test_binding_names_every_field(family):
    for entry, (struct, *files) in parameters.entries(family).items():
        assert list(_C.entries[entry]) == list(parameters.fields(family, struct))
        text = (CSRC / family / "binding.cpp").read_text()
        assert set(files) == set(re.findall(rf"(?<=\b{entry}_)sm\d+", text))


GOOD = dict(
    x=4096, xq=4096, x_scale=4096, M=8, K=128, stride_xm=128, block_rows=1, x_dtype=1, dtype=3
)


@compiled
@pytest.mark.parametrize(
    "change, message",
    [
        ({"M": None}, "quantize: missing argument M"),
        ({"N": 3}, "quantize: unknown argument N"),
        ({"M": 1.5}, "M: expected a 32-bit integer, got float 1.5"),
        ({"M": 2**31}, "M: expected a 32-bit integer, got int 2147483648"),
        ({"stride_xm": 2**63}, "stride_xm: expected a 64-bit integer"),
        ({"x": "here"}, "x: expected an address or None, got str 'here'"),
        ({"dtype": 2**31}, "dtype: expected an enumerator"),
    ],
)
def test_bad_argument_is_named(change, message):
    given = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(TypeError, match=re.escape(message)):
        _C.record(lambda: _C.quantize(90, 0, **given))


@compiled
def test_launch_errors_say_what_failed():
    with pytest.raises(RuntimeError, match="quantize on sm_90: cudaErrorInvalidValue"):
        _C.record(lambda: _C.quantize(90, 0, **{**GOOD, "dtype": 0}))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"quantize on sm_90: cudaError\w+, .*driver"):
            _C.quantize(90, 0, **GOOD)


@compiled
@pytest.mark.parametrize("target", arch.ARCHS, ids=lambda row: row.name)
def test_launches_are_noted_for_meta_tensors(target):
    x = torch.empty(6120, 1536, dtype=torch.bfloat16, device="meta")
    with native.recording(target) as launches:
        quant.quantize(x, backend="cuda")
        quant.quantize(x, block_rows=128, backend="cuda")
    assert [(len(noted.kernel) > 9, noted.threads) for noted in launches] == [(True, 256)] * 2
    assert "quantize_kernel" in launches[0].kernel
    assert launches[0].grid == (6120 // 4 * 12 // 16 + (6120 // 4 * 12 % 16 > 0), 1, 1)
    quant.quantize(x, backend="cuda")  # outside: nothing is noted, nothing runs
    assert len(launches) == 2


@compiled
def test_recording_ends_with_its_call():
    with pytest.raises(ZeroDivisionError):
        _C.record(lambda: 1 / 0)
    assert _C.record(lambda: None) == []


def test_cpu_tensors_are_refused_without_an_emulator():
    with pytest.raises(UnsupportedArchError, match="'cuda' cannot serve quant on cpu"):
        quant.quantize(torch.ones(2, 16), backend="cuda")
    with pytest.raises(RuntimeError, match="quantize: expected tensors on a GPU, got cpu"):
        native.launch("quantize", torch.device("cpu"))


def test_emulated_backend_is_gone_afterwards():
    before = backends.TABLE
    with emulated("quant"):
        with pytest.raises(UnsupportedArchError, match="float64 has backend='reference'"):
            quant.quantize(torch.ones(2, 16).double(), backend="cuda")
        quant.quantize(torch.ones(2, 16), backend="cuda")
    assert backends.TABLE is before
    assert native.emulator is None


def test_unbuilt_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 9))
    native._unbuilt.cache_clear()
    why = native.unless(0)(torch.device("cuda", 0), torch.ones(1))
    native._unbuilt.cache_clear()
    assert why is not None
    assert "not for sm_99" in why


@compiled
def test_cuda_is_preferred_on_gpus_and_reported():
    rows = [row for row in backends.TABLE if row.family == "quant"]
    assert [row.backend for row in rows if row.runs_on(torch.device("cuda"))][0] == "cuda"
    cells = {(row["family"], row["backend"]): row for row in backends.support_matrix()}
    for family in _C.cuda_families:
        assert cells[family, "cuda"]["available"]


@pytest.mark.parametrize("index", [0, 1])
def test_launch_takes_the_current_stream_of_the_tensors_device(monkeypatch, index):
    """Device 0 is current: device 1 is made so for the launch, and for nothing else."""
    calls, entered = [], []

    class Extension:
        @staticmethod
        def quantize(sm, stream, **values):
            calls.append((sm, stream, values, list(entered)))

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.clear()

    class Stream:
        def __init__(self, device):
            self.cuda_stream = 100 + device.index

    monkeypatch.setattr(native, "_C", Extension)
    monkeypatch.setattr(native, "arch_of", lambda device: arch.ARCHS[3])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", Device)
    device, x = torch.device("cuda", index), torch.ones(4)
    native.launch("quantize", device, x=x, xq=None, M=3)
    other = [device] if index else []
    assert calls == [(90, 100 + index, {"x": x.data_ptr(), "xq": None, "M": 3}, other)]
    assert entered == []
