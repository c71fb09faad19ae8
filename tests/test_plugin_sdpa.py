# SPDX-License-Identifier: Apache-2.0
"""The drop-in: PyTorch's signature, other formats, in use inside a `with`, compiled, exported."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reeltime import checks
from reeltime.attention import TOLERANCE
from reeltime.plugins import sdpa


def tensors(**options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, 100, 32, generator=generator, **options) for _ in range(3)]


@pytest.fixture(autouse=True)
def no_counts():
    sdpa.INT8.calls.clear()
    torch._dynamo.reset()


def test_by_position_and_by_name():
    """diffusers calls it by name."""
    q, k, v = tensors()
    mask = torch.ones(100, 100, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.2, enable_gqa=True)
    named = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "scale": 0.2}
    for got in (
        sdpa.scaled_dot_product_attention(q, k, v, mask, 0.0, False, 0.2, True),
        sdpa.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True, **named),
    ):
        error = checks.accuracy(got, want)
        assert 0 < error.relative_l1 < TOLERANCE["int8"].relative_l1
    assert dict(sdpa.INT8.calls) == {"reference": 2}


def test_another_format():
    q, k, v = tensors()
    want = F.scaled_dot_product_attention(q, k, v)
    errors = [
        checks.accuracy(sdpa.make(qk, pv)(q, k, v), want).relative_l1
        for qk, pv in ((None, "fp16"), ("int8", "fp16"), ("int8", "fp8"))
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 < errors[1] < TOLERANCE["int8"].relative_l1 < errors[2]
    assert errors[2] < TOLERANCE["fp8"].relative_l1


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"qk": "int4"}, "qk"),
        ({"pv": "int8"}, "pv"),
        ({"keep": 0.0}, "keep"),
        ({"keep": 2}, "keep"),
        ({"backend": "cpu"}, "backend"),
        ({"qk": None, "pv": None}, "qk, pv, keep"),
    ],
)
def test_a_wrong_option_is_named(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        sdpa.make(**options)


class Model(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_using_reaches_all_calls_of_this_thread_and_no_other():
    model, inputs = Model(), tensors()
    want = model(*inputs)
    results = []
    with sdpa.using():
        got = model(*inputs)
        thread = threading.Thread(target=lambda: results.append(model(*inputs)))
        thread.start()
        thread.join()
    assert not torch.equal(got, want)
    assert torch.equal(results[0], want)
    assert torch.equal(model(*inputs), want)
    assert dict(sdpa.INT8.calls) == {"reference": 1}


def test_the_inner_one_is_in_use():
    inputs, outer, inner = tensors(), sdpa.make(), sdpa.make("int8", "fp8")
    with sdpa.using(outer), sdpa.using(inner):
        Model()(*inputs)
        F.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    assert dict(outer.calls) == {}
    assert dict(inner.calls) == {"reference": 1, "left: dropout": 1}


class Plugged(nn.Module):
    def forward(self, q, k, v):
        return sdpa.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_compiled_in_one_graph():
    inputs = tensors()
    want = Plugged()(*inputs)
    sdpa.INT8.calls.clear()
    compiled = torch.compile(Plugged(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), want)
    outside = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    plain = outside(*inputs)
    with sdpa.using():
        torch.testing.assert_close(outside(*inputs), want)
    torch.testing.assert_close(outside(*inputs), plain)
    assert dict(sdpa.INT8.calls) == {"reference": 2}


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    inputs = tensors()
    program = torch.export.export(Plugged(), tuple(inputs), strict=strict)
    assert torch.ops.reeltime.plugin_attention.default in {n.target for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), Plugged()(*inputs))
