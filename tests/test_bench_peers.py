# SPDX-License-Identifier: Apache-2.0
"""Peers: judged before they are timed, named with their version, and called as they want to be.

Triton's run in the interpreter.  Of those that need a GPU, functions with the signatures of their
wheels stand in, which read every operand in the layout that the library documents: an adapter that
passes another one is wrong here, as it would be there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reeltime import backends, cli
from reeltime.bench import harness, peers
from reeltime.bench.peers import libraries
from reeltime.bench.peers.adapter import Adapter, compiled, generous
from reeltime.bench.peers.libraries import Found, Library
from reeltime.bench.peers.quant import rounded
from reeltime.bench.shapes import TINY
from reeltime.checks import Tolerance

CPU = torch.device("cpu")
BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torch.compile leaves what it is given: a compiler's time, and none of its mistakes."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


def measure(case, peer):
    with torch.no_grad():
        return harness.Run(CPU, print).theirs(case, peer)


def everything(families=backends.FAMILIES):
    """(case, peer) at tiny shapes."""
    for family in families:
        for case in harness.cases(family, TINY):
            yield from ((case, peer) for peer in case.peers)


def of(library, families=backends.FAMILIES, *, asked=True):
    """Those of a library, every key once."""
    kept = [one for one in everything(families) if one[1].library == library]
    return list({peer.key: (case, peer) for case, peer in kept if peer.asked == asked}.values())


# --- PyTorch ------------------------------------------------------------------------------------

NEED_A_GPU = {"torch scaled_mm 1x128, 128x128", "torch sdpa cudnn", "torch sdpa efficient"}


ONE_SCALE = "only supports per-tensor scaling for CPU"  # PyTorch before 2.12


@pytest.mark.parametrize("asked", [False, True], ids=["always", "asked"])
def test_peers_of_torch_are_right(asked):
    found = of("torch", asked=asked)
    assert len(found) > 20
    for case, peer in found:
        row = measure(case, peer)
        if peer.name in NEED_A_GPU:
            assert "wrong" not in row.error
            continue
        if ONE_SCALE in (row.error or ""):
            continue
        assert row.error is None, (row.label, row.error)
        assert (row.relative_l1 is None) == (peer.judge is None)


def test_what_is_not_judged_is_a_ceiling_or_a_copy():
    names = {p.name for asked in (False, True) for _, p in of("torch", asked=asked) if not p.judge}
    assert names == {"torch copy_", "torch._int_mm, no scales: a ceiling"}


def test_ours_and_peers_are_held_to_the_same_product():
    """In FP8 with scales of rows, and in ours with scales of blocks, about as much is lost."""
    case = next(c for c in harness.cases("gemm_w8a8", TINY) if c.dtype == "fp8")
    found = harness.Run(CPU, print).rows(case, "reference")
    by_row = next(row for row in found if row.backend == "torch._scaled_mm row-wise")
    if ONE_SCALE in (by_row.error or ""):
        pytest.skip(f"torch._scaled_mm {ONE_SCALE}")
    ours = found[-1]
    assert ours.relative_l1 == pytest.approx(by_row.relative_l1, rel=0.1)
    assert ours.peer_relative_l1 < 0.1 * ours.relative_l1  # bf16, on a CPU
    assert ours.best_peer == "torch.mm"


# --- Right and wrong ----------------------------------------------------------------------------


def rms_case():
    return next(c for c in harness.cases("norm", TINY) if c.form == "RMSNorm, weight")


def test_a_wrong_peer_is_said_to_be_and_never_the_best():
    options = {"asked": False, "gpu": False}
    slow = Adapter("torch", "right", lambda x, weight, **_: rms(x, weight), **options)
    fast = Adapter("torch", "fast", lambda x, weight, **_: x, **options)
    raises = Adapter("torch", "raises", lambda **_: 1 / 0, **options)
    case = peers.beside(replace(rms_case(), peers=()), [slow, fast, raises])
    found = {row.backend: row for row in harness.Run(CPU, print).rows(case, "reference")}
    assert found["fast"].p50_us is None
    assert found["fast"].error.startswith("wrong: y: relative L1 ")
    assert found["fast"].relative_l1 > generous(Tolerance(4e-3, 1)).relative_l1
    assert found["raises"].relative_l1 is None
    assert found["raises"].error.startswith("ZeroDivisionError")
    assert found["right"].error is None
    assert found["reference"].best_peer == "right"
    assert found["reference"].peer_relative_l1 == found["right"].relative_l1


def test_a_ceiling_is_no_peer_where_somebody_computes_the_same():
    def row(name, time, error):
        return harness.Row("", "", "", "", "", name, "", p50_us=time, relative_l1=error)

    ceiling, right, broken = row("ceiling", 1.0, None), row("right", 2.0, 0.1), row("b", None, 0.9)
    assert harness.fastest([ceiling, right, broken]).backend == "right"
    assert harness.fastest([ceiling, broken]).backend == "ceiling"
    assert harness.fastest([broken]) is None


def test_a_peer_that_writes_into_its_inputs_is_judged_by_fresh_ones():
    def spoil(x, weight, **_):
        y = rms(x, weight)
        x.zero_()
        return y

    case = peers.beside(rms_case(), [Adapter("torch", "spoils", spoil)])
    assert measure(case, case.peers[-1]).error is None


# --- Triton's, in the interpreter ---------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    triton = pytest.importorskip("triton")
    if triton.__version__ < "3.7" and np.__version__ >= "2.4":
        pytest.skip("Triton issue 9171: its interpreter, which is repaired for our kernels alone")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here")
    from triton.runtime import interpreter

    real = interpreter._implicit_cvt

    def with_floats(arg):
        """The interpreter leaves a float as it is; a GPU's kernels get a scalar."""
        if not isinstance(arg, float):
            return real(arg)
        kind = interpreter.tl.float32
        held = interpreter.TensorHandle(np.array([arg], np.float32), kind)
        return interpreter.tl.tensor(held, kind)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return interpreter


@pytest.mark.parametrize("keys, wrong", [(128, False), (160, True), (200, True)])
def test_sageattention_and_its_tail(keys, wrong, interpreted):
    """Version 1 masks no keys past the last whole block of 64: each scores zero."""
    pytest.importorskip("sageattention")
    found = peers.scaled_dot_product(1, 64, keys, 1, 64)
    (peer,) = (peer for peer in found if peer.library == "sageattention")
    inputs = peer.make(CPU, 0)
    keys_before = inputs["k"].clone()
    peer.run(inputs)
    assert torch.equal(inputs["k"], keys_before)  # as the next call needs them
    row = measure(harness.cases("attention", TINY)[0], peer)
    assert row.backend == f"sageattention {libraries.version('sageattention')}, INT8 q.k"
    if wrong:
        assert row.error.startswith("wrong: out: relative L1 1.")
        assert 0.1 < row.relative_l1 < 0.2
        assert row.p50_us is None
    else:
        assert row.error is None
        assert row.relative_l1 < 0.02


def test_liger_is_right(interpreted, monkeypatch):
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    # libdevice's is none of a CPU's.
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: interpreted.tl.rsqrt(x))
    ((case, peer),) = of("liger-kernel")
    row = measure(case, peer)
    assert row.error is None
    assert row.relative_l1 < 8e-3  # it rounds to bf16 before the weight as well


def test_fla_is_right(interpreted, monkeypatch):
    pytest.importorskip("fla.modules")
    from fla.modules.norm import layernorm
    from fla.modules.rotary import ops

    for kernel in (layernorm.layer_norm_fwd_kernel, ops.rotary_embedding_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])  # nothing to tune
    monkeypatch.setattr(ops, "get_multiprocessor_count", lambda index: 4)
    found = of("fla-core")
    assert {case.op for case, _ in found} == {"norm", "rope_on_cache"}
    for case, peer in found:
        row = measure(case, peer)
        assert row.error is None, row.error
        assert row.relative_l1 < 5e-3


def test_torchao_in_int8_is_right():
    pytest.importorskip("torchao.quantization")
    found = [one for one in of("torchao", ["gemm_w8a8"]) if "INT8" in one[1].name]
    for case, peer in found[:2]:
        row = measure(case, peer)
        assert row.error is None, row.error
        assert row.relative_l1 < 0.02


# --- Those that need a GPU: stand-ins ------------------------------------------------------------


def rms(x, weight):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), 1e-6).to(x.dtype)


def dense(q, k, v, mask=None):
    """[B, H, S, D] in float32."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)


def spread(scale, size, block):
    return scale.repeat_interleave(block, 0)[:size]


def times(a, b, a_scale, b_scale):
    """[M, K] and [N, K] with scales [M, K / 128] and [N, K / 128]."""
    pairs = (a, a_scale), (b, b_scale)
    wide = [x.float() * spread(scale.t(), x.shape[1], 128).t() for x, scale in pairs]
    return torch.mm(wide[0], wide[1].t()).to(BF16)


def linear_of(w, dtype, block):
    """A layer that rounds its input as it did its weights."""
    held = rounded(w, dtype, 128 if block else 1)

    def run(x):
        w_scale = spread(held[1], len(w), 128) if block else held[1]
        low, scale = rounded(x, dtype, 1)
        return times(low, held[0], scale, w_scale)

    return run


class Sparse:
    """flashinfer.VariableBlockSparseAttentionWrapper."""

    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim,
        causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None,
        sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True, q_data_type="float16",
        kv_data_type=None,
    ):  # fmt: skip
        assert block_row_sz.shape == block_mask_map.shape[:2]
        assert block_col_sz.shape == block_mask_map.shape[::2]
        assert q_data_type == BF16
        rows = block_mask_map.repeat_interleave(block_row_sz[0], 1)
        self.mask, self.dim = rows.repeat_interleave(block_col_sz[0], 2), head_dim

    def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
        assert q.shape == (self.mask.shape[0], self.mask.shape[1], self.dim)
        return dense(q, k, v, self.mask).to(q.dtype)


def single_prefill_with_kv_cache(
    q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
    packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
    use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
    rope_scale=None, rope_theta=None, backend="auto", return_lse=False,
):  # fmt: skip
    assert (q.dtype == FP8) <= (backend == "fa3")
    scales = (scale_q, scale_k, scale_v)
    held = (
        (x.float() if s is None else x.float() * s[None, :, None]).transpose(0, 1)
        for x, s in zip((q, k, v), scales, strict=True)
    )
    return dense(*held).transpose(0, 1).to(o_dtype or q.dtype)


def bmm_fp8(A, B, A_scale, B_scale, dtype, out=None, backend="cublas"):
    assert B.stride(1) == 1  # column-major
    return (torch.bmm(A.float(), B.float()) * A_scale * B_scale).to(dtype)


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None,
    full_block_cnt=None, full_block_idx=None, mask_block_cnt=None, mask_block_idx=None,
    block_size=None, return_lse=False,
):  # fmt: skip
    held = (x.transpose(1, 2) for x in (q, k, v))
    return dense(*held).transpose(1, 2).to(q.dtype), None


def block_sparse_attn(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
    """fastvideo_kernel.block_sparse_attn.block_sparse_attn_sm90 and its twin in Triton."""
    assert q2k_idx.dtype == q2k_num.dtype == variable_block_sizes.dtype == torch.int32
    assert q.shape[2] % 64 == k.shape[2] % 64 == 0
    assert variable_block_sizes.sum() == TINY.window.total  # what is padding, it must be told
    assert all(x.is_contiguous() for x in (q, k, v, q2k_idx, q2k_num))
    columns = torch.arange(q2k_idx.shape[3]) < q2k_num.unsqueeze(-1)
    blocks = torch.zeros_like(columns).scatter(3, q2k_idx.long(), columns)
    held = torch.arange(64) < variable_block_sizes.unsqueeze(1)
    mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3) & held.flatten()
    return dense(q, k, v, mask).to(q.dtype), None


def int8_linear(x, w_q, w_s, **kwargs):
    low, scale = rounded(x, INT8, 128)
    return times(low, w_q, spread(scale, len(x), 128), spread(w_s, len(w_q), 128))


def f8f8bf16_rowwise(XQ, WQ, x_scale, w_scale, bias=None, use_fast_accum=True):
    assert x_scale.shape == XQ.shape[:1]
    return (torch.mm(XQ.float(), WQ.float().t()) * x_scale[:, None] * w_scale).to(BF16)


def f8f8bf16_groupwise(XQ, WQ, x_scale, w_scale):
    assert x_scale.is_contiguous()
    return times(XQ, WQ, x_scale.t(), spread(w_scale.t(), len(WQ), 128))


def matmul_fp8_block(
    a, b, a_scale, b_scale, scale_block_m=256, scale_block_n=256, scale_block_k=256,
    dot_out_dtype=None, allow_tf32=True, fp8_fast_accum=True,
):  # fmt: skip
    assert scale_block_m == scale_block_n == scale_block_k == 128
    return times(a, b, spread(a_scale, len(a), 128), spread(b_scale, len(b), 128))


def one_scale(XQ, WQ, scale, **_):
    assert isinstance(scale, float)
    return (scale * torch.mm(XQ.float(), WQ.float().t())).to(BF16)


def blockwise_fp8_gemm(a, a_s, b, b_s, block_size=128):
    return times(a, b, a_s, spread(b_s, len(b), 128))


def quack_rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6,
    prenorm=False,
):  # fmt: skip
    return rms(x, weight)


def gemlite_kind(dtype):
    def kind(device="cuda:0", dtype_=None, block_quant=False, **named):
        assert named["dtype"] == BF16
        return SimpleNamespace(from_weights=lambda w, **_: linear_of(w, dtype, block_quant))

    return kind


STAND_INS = {
    "flash-attn-4": {"flash_attn.cute": {"flash_attn_func": flash_attn_func}},
    "flashinfer-python": {
        "flashinfer": {
            "single_prefill_with_kv_cache": single_prefill_with_kv_cache,
            "bmm_fp8": bmm_fp8,
            "VariableBlockSparseAttentionWrapper": Sparse,
        },
        "flashinfer.norm": {"rmsnorm": lambda input, weight, eps=1e-6: rms(input, weight)},
    },
    "fastvideo-kernel": {
        "fastvideo_kernel": {
            "int8_quant": lambda x: rounded(x, INT8, 128),
            "int8_linear": int8_linear,
        },
        "fastvideo_kernel.block_sparse_attn": {
            "block_sparse_attn_sm90": block_sparse_attn,
            "block_sparse_attn_triton": block_sparse_attn,
        },
        "fastvideo_kernel.turbodiffusion_ops": {"rmsnorm": lambda x, w, eps: (rms(x, w), None)},
    },
    "fbgemm-gpu-genai": {
        "fbgemm_gpu.experimental.gen_ai": {},
        "fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm": {
            "matmul_fp8_block": matmul_fp8_block,
            "quantize_fp8_group": lambda x, group_size=128: rounded(x, FP8, 1),
            "quantize_fp8_block": lambda x, block_m=256, block_k=256: rounded(x, FP8, block_m),
        },
    },
    "gemlite": {
        "gemlite.helper": {
            "A8W8_int8_dynamic": gemlite_kind(INT8),
            "A8W8_fp8_dynamic": gemlite_kind(FP8),
        },
    },
    "quack-kernels": {
        "quack": {"rmsnorm": quack_rmsnorm},
        "quack.gemm_interface": {"gemm": lambda A, B, out=None, bias=None, **_: torch.mm(A, B)},
    },
    "torchao": {
        "torchao.kernel.blockwise_quantization": {
            "blockwise_fp8_gemm": blockwise_fp8_gemm,
            "fp8_blockwise_act_quant": lambda x, block_size=128: rounded(x, FP8, 1),
        },
    },
}
OPS = {
    "f8f8bf16_rowwise": f8f8bf16_rowwise,
    "f8f8bf16_groupwise": f8f8bf16_groupwise,
    "f8f8bf16_blockwise": matmul_fp8_block,
    "f8f8bf16_tensorwise": one_scale,
    "i8i8bf16": one_scale,
}


@pytest.mark.parametrize("library", STAND_INS)
def test_adapters_pass_what_the_libraries_want(library, monkeypatch):
    for name in STAND_INS[library]:
        parts = name.split(".")
        for last in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:last]), ModuleType(parts[last - 1]))
    for name, functions in STAND_INS[library].items():
        module = ModuleType(name)
        for function, stand_in in functions.items():
            setattr(module, function, stand_in)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            above, _, last = name.rpartition(".")
            monkeypatch.setattr(sys.modules[above], last, module, raising=False)
    monkeypatch.setattr(torch.ops, "fbgemm", SimpleNamespace(**OPS), raising=False)
    found = [one for one in of(library) if "quantises x" not in one[1].name or library != "torchao"]
    assert found
    for case, peer in found:
        row = measure(case, peer)
        assert row.error is None, (peer.name, row.label, row.error)


# --- What is here -------------------------------------------------------------------------------


def test_what_is_missing_says_why(monkeypatch):
    monkeypatch.setattr(libraries, "version", {"fla-core": "0.6.0", "gemlite": "1"}.get)
    broken = libraries.look(Library("gemlite", "reeltime.no_such_module", gpu=False), CPU)
    assert (broken.name, broken.version) == ("gemlite", "1")
    assert broken.why.startswith("does not import: ModuleNotFoundError: No module named")
    assert libraries.look(Library("absent", "json"), CPU) == Found("absent", None, "not installed")
    assert libraries.look(Library("fla-core", "fla"), CPU).why == "needs a GPU"
    assert libraries.look(Library("fla-core", "json", gpu=False), CPU).why is None


def test_only_what_was_asked_for_is_measured():
    case = rms_case()
    few = harness.Run(CPU, print)
    assert [peer.name for peer in few.chosen(case)] == ["torch copy_"]
    run = harness.Run(CPU, print, [Found("torch", "2", None), Found("fla-core", "0", "broken")])
    assert [peer.name for peer in run.chosen(case)] == ["torch copy_", "torch F.rms_norm, eager"]
    assert run.away == {"torch F.rms_norm and the rest, compiled"}
    assert [one.name for one in libraries.find(["gemlite"], CPU)] == ["torch", "gemlite"]
    with pytest.raises(ValueError, match="against: expected 'peers' or 'torch' or"):
        libraries.find(["sage"], CPU)


def test_every_library_has_an_adapter():
    assert {peer.library for _, peer in everything()} == set(libraries.NAMES)


def test_compiled_is_never_quietly_eager(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: seen.append(options) or call)
    double = compiled(lambda x: 2 * x)
    assert double(2) == double(x=2) == 4
    assert len(seen) == 1
    assert seen[0]["fullgraph"] is True


def test_the_command_says_who_is_missing_and_draws(capsys, tmp_path, monkeypatch):
    real = harness.cases
    monkeypatch.setattr(harness, "cases", lambda family, sizes: real(family, sizes)[:1])
    picture = tmp_path / "ratios.png"
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "norm", "--against", "peers", "--json", "--picture", str(picture)])
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert stop.value.code in (0, None)
    here = {one["name"]: one for one in document["peers"]}
    assert set(here) == set(libraries.NAMES)
    assert here["torch"]["why"] is None
    assert all(one["why"] for name, one in here.items() if name != "torch")
    ours = document["rows"][-1]
    assert ours["best_peer"] == "torch F.layer_norm, eager"
    assert 0 < ours["relative_l1"] < ours["peer_relative_l1"] < 0.01
    assert "peers: quack-kernels" in shown.err
    assert "F.layer_norm and the rest, compiled" in shown.err
    assert Image.open(picture).size[0] > 800
