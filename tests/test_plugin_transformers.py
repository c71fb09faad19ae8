# SPDX-License-Identifier: Apache-2.0
"""transformers' attention by name: masks, grouped heads, decoding with a cache, encoders."""

from __future__ import annotations

import pytest
import torch

from reeltime import checks
from reeltime.attention import TOLERANCE
from reeltime.plugins import accelerate
from reeltime.plugins import transformers as plugin

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PICTURE = TINY | {"image_size": 32, "patch_size": 4}


def llama():
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **TINY)
    return ready(transformers.LlamaForCausalLM(config))


def ready(model):
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture
def registered():
    made = plugin.register()
    yield made
    plugin.unregister()


def tokens(*size):
    return torch.randint(0, 64, size, generator=torch.Generator().manual_seed(1))


def both(model, name, run):
    """What `run` gives with transformers' SDPA and with the attention `name`."""
    model.set_attn_implementation("sdpa")
    want = run(model)
    model.set_attn_implementation(name)
    return run(model), want


def close(got, want, format="int8"):
    """Two layers: an error of each."""
    error = checks.accuracy(got, want).relative_l1
    return 0 < error < 2 * TOLERANCE[format].relative_l1


PADDED = torch.ones(2, 70, dtype=torch.int64).index_fill(1, torch.arange(5), 0)
PADDED[1] = 1


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("padded", [False, True])
def test_llama(registered, format, padded):
    name = f"reeltime_{format}"
    mask = {"attention_mask": PADDED} if padded else {}
    got, want = both(llama(), name, lambda m: m(tokens(2, 70), **mask).logits)
    seen = PADDED.bool() if padded else slice(None)
    assert close(got[seen], want[seen], format)
    assert dict(registered[name].calls) == {"reference": 2}


@pytest.mark.parametrize("step", [1, 3])
def test_llama_decodes_with_a_cache(registered, step):
    """Queries are fewer than keys: they stand at their end."""

    def run(model):
        ids = tokens(2, 40)
        cache = model(ids[:, :30], use_cache=True).past_key_values
        out = [
            model(ids[:, i : i + step], past_key_values=cache).logits for i in range(30, 39, step)
        ]
        return torch.cat(out, 1)

    model = llama()
    got, want = both(model, "reeltime_int8", run)
    assert close(got, want)
    whole = model(tokens(2, 40)).logits[:, 30:39]
    assert checks.accuracy(got, whole).relative_l1 < 2 * TOLERANCE["int8"].relative_l1


def test_generate(registered):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got, want = both(llama(), "reeltime_int8", lambda m: m.generate(tokens(1, 20), **options))
    assert torch.equal(got, want)
    assert registered["reeltime_int8"].calls["reference"] == 10


def encoders():
    vit = transformers.ViTModel(transformers.ViTConfig(**PICTURE), add_pooling_layer=False)
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=64, **TINY))
    return {
        "ViT": (vit, {"pixel_values": torch.randn(1, 3, 32, 32)}),
        "CLIP": (clip, {"input_ids": tokens(1, 70)}),
    }


@pytest.mark.parametrize("name", ["ViT", "CLIP"])
def test_encoders(registered, name):
    torch.manual_seed(0)
    model, inputs = encoders()[name]
    got, want = both(ready(model), "reeltime_int8", lambda m: m(**inputs).last_hidden_state)
    assert close(got, want)
    assert dict(registered["reeltime_int8"].calls) == {"reference": 2}


def test_other_models_are_untouched(registered):
    model, other = llama(), llama()
    want = other(tokens(1, 20)).logits
    model.set_attn_implementation("reeltime_int8")
    assert not torch.equal(model(tokens(1, 20)).logits, want)
    assert torch.equal(other(tokens(1, 20)).logits, want)


def test_attentions_are_refused_as_by_sdpa(registered):
    def error(name):
        model = llama()
        model.set_attn_implementation(name)
        try:
            return model(tokens(1, 20), output_attentions=True).attentions
        except ValueError as raised:
            return str(raised).replace(name, "")

    assert error("reeltime_int8") == error("sdpa")


def test_fullgraph_compile(registered):
    torch._dynamo.reset()
    model = llama()
    model.set_attn_implementation("reeltime_int8")
    want = model(tokens(1, 20)).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(1, 20)).logits, want)
    assert registered["reeltime_int8"].calls["reference"] == 4
    torch._dynamo.reset()


def test_unregister_leaves_nothing():
    interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    before = [dict(interface._global_mapping) for interface in interfaces]
    plugin.register()
    assert [dict(interface._global_mapping) for interface in interfaces] != before
    plugin.unregister()
    assert [dict(interface._global_mapping) for interface in interfaces] == before
    with pytest.raises(ValueError, match="reeltime_int8"):
        llama().set_attn_implementation("reeltime_int8")


def test_an_unknown_backend_registers_nothing():
    with pytest.raises(ValueError, match="backend"):
        plugin.register(backend="cpu")
    assert "reeltime_int8" not in transformers.AttentionInterface._global_mapping


# --- Without the name: `accelerate` ---------------------------------------------------------------


def test_accelerate():
    model = llama()
    want = model(tokens(2, 70), attention_mask=PADDED).logits
    with accelerate(model, linear=None, norm=None) as report:
        got = model(tokens(2, 70), attention_mask=PADDED).logits
        assert close(got[PADDED.bool()], want[PADDED.bool()])
        places = {f"model.layers.{i}.self_attn": {"reference": 1} for i in range(2)}
        assert report.calls() == places


def test_accelerate_says_that_eager_attention_stays():
    model = llama()
    model.set_attn_implementation("eager")
    with accelerate(model, norm=None) as report:
        left = {one.path: one.why for one in report.left if one.kind == "attention"}
    why = "it runs transformers' 'eager': set_attn_implementation('sdpa') first"
    assert left == {f"model.layers.{i}.self_attn": why for i in range(2)}
