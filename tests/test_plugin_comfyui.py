# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's attention override, called as ComfyUI calls it, without ComfyUI."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reeltime import backends, checks
from reeltime.attention import TOLERANCE
from reeltime.plugins import comfyui
from reeltime.plugins.comfyui import attention_override

NODE = Path(__file__).resolve().parent.parent / "examples" / "comfyui" / "__init__.py"
B, H, S, D = 2, 4, 70, 16


def comfy_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
    **kwargs,
):  # fmt: skip
    """The signature and layouts of attention_pytorch in comfy/ldm/modules/attention.py."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (x.view(x.shape[0], x.shape[1], -1, dim).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask if mask.dim() > 2 else mask.unsqueeze(0)
        mask = mask if mask.dim() > 3 else mask.unsqueeze(1)
    options = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return y if skip_output_reshape else y.transpose(1, 2).reshape(y.shape[0], -1, heads * D)


def optimized_attention(*args, transformer_options, **kwargs):
    """As its wrap_attn: the override gets the function, the arguments, and these two."""
    kwargs |= {"transformer_options": transformer_options, "_inside_attn_wrapper": True}
    return transformer_options["optimized_attention_override"](comfy_attention, *args, **kwargs)


def inputs(heads=H, flat=False, queries=S, kv_heads=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, queries), (kv_heads or heads, S), (kv_heads or heads, S))
    made = [torch.randn(B, *size, D, generator=generator).to(dtype) for size in sizes]
    return [x.transpose(1, 2).flatten(2) for x in made] if flat else made


def call(override, q, k, v, **kwargs):
    options = {"optimized_attention_override": override}
    return optimized_attention(q, k, v, H, transformer_options=options, **kwargs)


MASK = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(1)) < 0.8
ADDED = torch.randn(B, H, S, S, generator=torch.Generator().manual_seed(2))
SERVED = {
    "flat": ({"flat": True}, {}),
    "flat, output by heads": ({"flat": True}, {"skip_output_reshape": True}),
    "by heads": ({}, {"skip_reshape": True}),
    "by heads, output too": ({}, {"skip_reshape": True, "skip_output_reshape": True}),
    "cross": ({"flat": True, "queries": 30}, {}),
    "mask of 2 dimensions": ({"flat": True}, {"mask": ADDED[0, 0]}),
    "mask of 3 dimensions": ({"flat": True}, {"mask": MASK[:, 0]}),
    "mask of 4 dimensions": ({"flat": True}, {"mask": ADDED}),
    "scale": ({"flat": True}, {"scale": 0.5}),
    "grouped heads": ({"flat": True, "kv_heads": 2}, {"enable_gqa": True}),
    "attn_precision": ({"flat": True}, {"attn_precision": torch.float32}),
    "low precision allowed": ({"flat": True}, {"low_precision_attention": True}),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_call_means_what_it_means_to_comfyui(name, caplog):
    made, options = SERVED[name]
    q, k, v = inputs(**made)
    override = attention_override()
    got, want = call(override, q, k, v, **options), comfy_attention(q, k, v, H, **options)
    assert got.shape == want.shape
    error = checks.accuracy(got, want)
    assert 0 < error.relative_l1 < TOLERANCE["int8"].relative_l1
    assert dict(override.calls) == {"reference": 1}
    assert not caplog.records


LEFT = {
    "low_precision_attention=False": ({"flat": True}, {"low_precision_attention": False}),
    "unknown arguments is_causal": ({"flat": True}, {"is_causal": False}),
    "torch.complex64, torch.complex64 and torch.complex64": (
        {"dtype": torch.complex64},
        {"skip_reshape": True},
    ),
    "scale -1.0": ({"flat": True}, {"scale": -1.0}),
}


@pytest.mark.parametrize("why", LEFT)
def test_other_calls_are_comfyuis_with_one_warning(why, caplog):
    made, options = LEFT[why]
    q, k, v = inputs(**made)
    override = attention_override()
    seen = []

    def original(*args, **kwargs):
        seen.append((args, kwargs))
        return "ComfyUI's"

    for _ in range(3):
        assert override(original, q, k, v, H, _inside_attn_wrapper=True, **options) == "ComfyUI's"
    assert dict(override.calls) == {f"left: {why}": 3}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert why in caplog.text
    args, kwargs = seen[0]
    assert args == (q, k, v, H)
    assert kwargs["_inside_attn_wrapper"] is True
    assert options.items() <= kwargs.items()


def test_heads_that_do_not_divide_are_comfyuis_error():
    q, k, v = inputs(flat=True)
    override = attention_override()
    with pytest.raises(RuntimeError):
        override(comfy_attention, q, k, v, 5)
    assert dict(override.calls) == {"left: 5 heads in [64]": 1}


def test_a_gradient_is_comfyuis():
    q, k, v = inputs(flat=True)
    override = attention_override()
    got = call(override, q.requires_grad_(), k, v)
    assert got.requires_grad
    assert dict(override.calls) == {"left: a gradient is wanted": 1}


def test_what_no_kernel_serves_is_comfyuis(monkeypatch, caplog):
    """As on a GPU that has no kernel for these heads."""
    monkeypatch.setattr(comfyui.attention, "choose", lambda *args: "heads of 16")
    q, k, v = inputs(flat=True)
    override = attention_override()
    assert torch.equal(call(override, q, k, v), comfy_attention(q, k, v, H))
    assert dict(override.calls) == {"left: heads of 16": 1}
    assert "heads of 16" in caplog.text


def test_sparse():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 320, 64, generator=generator) for _ in range(3))
    override = attention_override("fp8", sla=0.4)
    call(override, q, k, v)
    call(override, q[:, :9], k, v)
    assert dict(override.calls) == {"reference, sparse": 1, "reference": 1}


@pytest.mark.parametrize(
    "options, argument",
    [({"format": "int4"}, "format"), ({"sla": 2.0}, "sla"), ({"format": None}, "format, sla")],
)
def test_a_wrong_option_is_named(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        attention_override(**options)


def test_memory_is_planned_by_kernels_alone(monkeypatch):
    rows = tuple(row for row in backends.TABLE if row.backend == "reference")
    kernel = backends.Row("attention", "triton", ("cuda",))
    monkeypatch.setattr(backends, "TABLE", (kernel, *rows))
    assert attention_override().memory_efficient
    assert not attention_override(backend="reference").memory_efficient
    monkeypatch.setattr(backends, "TABLE", rows)
    assert not attention_override().memory_efficient


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    override = attention_override()
    q, k, v = inputs(flat=True)
    want = call(override, q, k, v)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, **options):
        return call(override, q, k, v, **options)

    torch.testing.assert_close(run(q, k, v), want)
    run(q, k, v, low_precision_attention=False)
    why = "left: low_precision_attention=False, in a compiled graph"
    assert dict(override.calls) == {"reference": 2, why: 1}
    torch._dynamo.reset()


# --- The node -----------------------------------------------------------------------------------


class Patcher:
    """Of ComfyUI's ModelPatcher, what a node touches."""

    def __init__(self, model_options):
        self.model_options = model_options

    def clone(self):
        return Patcher(copy.deepcopy(self.model_options))


@pytest.fixture(scope="module")
def node():
    spec = importlib.util.spec_from_file_location("comfyui_reeltime", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_patches_a_clone(node):
    ((name, kind),) = node.NODE_CLASS_MAPPINGS.items()
    assert name in node.NODE_DISPLAY_NAME_MAPPINGS
    inputs_of = kind.INPUT_TYPES()["required"]
    chosen = {"format": inputs_of["format"][0][1], "sla": inputs_of["sla"][1]["default"]}
    loaded = Patcher({"transformer_options": {"other": 1}})
    (patched,) = getattr(kind(), kind.FUNCTION)(loaded, **chosen)
    assert loaded.model_options == {"transformer_options": {"other": 1}}
    options = patched.model_options["transformer_options"]
    assert options["other"] == 1
    q, k, v = inputs(flat=True)
    optimized_attention(q, k, v, H, transformer_options=options)
    again = patched.clone().model_options["transformer_options"]
    optimized_attention(q, k, v, H, transformer_options=again)
    override = options["optimized_attention_override"]
    assert dict(override.calls) == {"reference": 2}
    assert (override.replacement.qk, override.replacement.pv) == ("int8", "fp8")
    assert override.replacement.keep is None


def test_the_node_keeps_a_share(node):
    (patched,) = node.ReeltimeAttention().patch(Patcher({}), "int8", 0.25)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    assert override.replacement.keep == 0.25
