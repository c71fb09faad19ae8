# SPDX-License-Identifier: Apache-2.0
"""diffusers: the dispatcher's backends, models that ignore it, and its other switches."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn

import reeltime
from reeltime import attention
from reeltime.arch import UnsupportedArchError

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch as dispatch  # noqa: E402
from diffusers.models import attention_processor as old  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402

from reeltime.plugins import diffusers as plugin  # noqa: E402
from reeltime.plugins.changes import Left  # noqa: E402
from reeltime.plugins.sites import Place, Site  # noqa: E402

ENUM, REGISTRY = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
WAN = [f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)]
COG = [f"transformer_blocks.{i}.attn1" for i in (0, 1)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan():
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip


def cog():
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip


def hunyuan():
    """Its refiner of text does not ask the dispatcher, its blocks do."""
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    ).eval()  # fmt: skip


@torch.no_grad()
def run(model):
    if isinstance(getattr(model, "_orig_mod", model), diffusers.WanTransformer3DModel):
        inputs = random(1, 4, 2, 4, 4), torch.tensor([500]), random(1, 6, 16, seed=1)
        return model(*inputs, return_dict=False)[0]
    rotary = torch.zeros(32, 16).cos(), random(32, 16, seed=2)
    inputs = random(1, 2, 4, 8, 8), random(1, 6, 16, seed=1), torch.tensor([500])
    return model(*inputs, image_rotary_emb=rotary, return_dict=False)[0]


def states_of(model):
    return [dict(vars(processor)) for processor in model.attn_processors.values()]


def known():
    """All that registering writes to."""
    tables = (REGISTRY._backends, REGISTRY._constraints, REGISTRY._supported_arg_names)
    return (
        [dict(table) for table in tables],
        dict(ENUM._member_map_),
        dict(ENUM._value2member_map_),
        list(ENUM._member_names_),
        REGISTRY._active_backend,
        ModelMixin.set_attention_backend,
    )


@pytest.fixture(autouse=True)
def nothing_leaks():
    before = known()
    yield
    plugin.unregister()
    assert known() == before


class Asked(nn.Module):
    """What holds a processor."""

    def __init__(self, *processors):
        super().__init__()
        self.parts = nn.ModuleList(Asked() for _ in processors)
        for part, processor in zip(self.parts, processors, strict=True):
            part.processor = processor

    def forward(self, *args, **kwargs):
        return self.processor(self, *args, **kwargs)


# --- Which way attention goes -------------------------------------------------------------------


WAYS = {
    "transformer_wan.WanAttnProcessor": "dispatcher",
    "transformer_flux.FluxAttnProcessor": "dispatcher",
    "transformer_ltx.LTXVideoAttnProcessor": "dispatcher",
    "transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": "dispatcher",
    "transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0": "dispatcher",
    "sana_transformer.SanaAttnProcessor2_0": "sdpa",
    "transformer_lumina2.Lumina2AttnProcessor2_0": "sdpa",
    "transformer_hidream_image.HiDreamAttnProcessor": "sdpa",
    "CogVideoXAttnProcessor2_0": "sdpa",
    "JointAttnProcessor2_0": "sdpa",
    "MochiAttnProcessor2_0": "sdpa",
    "HunyuanAttnProcessor2_0": "sdpa",
    "AttnProcessor2_0": "sdpa",
    "AttnProcessor": "neither",
    "SlicedAttnProcessor": "neither",
    "SanaLinearAttnProcessor2_0": "neither",
}


def test_routes():
    made = []
    for name in WAYS:
        room, _, kind = name.rpartition(".")
        home = importlib.import_module(f"diffusers.models.transformers.{room}") if room else old
        made.append(object.__new__(getattr(home, kind)))
    assert list(plugin.routes(Asked(*made)).values()) == list(WAYS.values())


# --- The dispatcher -----------------------------------------------------------------------------

Q, K = random(2, 24, 4, 16), random(2, 40, 4, 16, seed=1)
V, FEW = random(2, 40, 4, 16, seed=2), random(2, 40, 2, 16, seed=3)
SEEN = random(2, 40, seed=4) > -1


@pytest.mark.parametrize("name", plugin.NAMES)
@pytest.mark.parametrize(
    "k, v, options",
    [
        (K, V, {}),
        (K, V, {"scale": 0.1}),
        (K, V, {"is_causal": True}),
        (K, V, {"attn_mask": SEEN[:, None, None]}),
        (K, V, {"attn_mask": SEEN}),
        (K, V, {"attn_mask": random(24, 40, seed=5)}),
        (FEW, FEW, {"enable_gqa": True}),
    ],
    ids=["plain", "scale", "causal", "mask", "mask of keys", "added", "groups of heads"],
)
def test_backend_means_what_pytorchs_means(name, k, v, options):
    want = dispatch.dispatch_attention_fn(Q, k, v, **options, backend="native")
    with plugin.register() as registered, torch.no_grad():
        got = dispatch.dispatch_attention_fn(Q, k, v, **options, backend=name)
        assert registered.calls()[name] == {"reference": 1}
    error = reeltime.checks.accuracy(got, want)
    assert attention.TOLERANCE["fp8" if "fp8" in name else "int8"].accepts(error), error
    assert error.relative_l1 > 1e-4


def test_backend_leaves_what_it_cannot_serve_and_says_so():
    with plugin.register() as registered:
        calls = registered.calls
        got = []
        for name in ("native", "reeltime_int8"):
            torch.manual_seed(0)
            got.append(dispatch.dispatch_attention_fn(Q, K, V, dropout_p=0.5, backend=name))
        assert torch.equal(*got)
        assert calls()["reeltime_int8"] == {"left: dropout": 1}
        backend = REGISTRY._backends[ENUM("reeltime_int8")]
        with pytest.raises(ValueError, match="return_lse: expected False"):
            backend(Q, K, V, return_lse=True)
        with pytest.raises(ValueError, match="_parallel_config: expected None, got object"):
            backend(Q, K, V, _parallel_config=object())


def test_set_attention_backend_of_diffusers():
    model = wan()
    plain = run(model)
    with plugin.register(model) as registered:
        model.set_attention_backend("reeltime_int8")
        got = run(model)
        assert registered.calls()["reeltime_int8"] == {"reference": 4}
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(run(compiled), got)
        assert registered.calls() == {"reeltime_int8": {"reference": 8}, "reeltime_fp8": {}}
        model.set_attention_backend("native")
        with dispatch.attention_backend("reeltime_fp8"):
            model.reset_attention_backend()
            run(model)
        assert registered.calls()["reeltime_fp8"] == {"reference": 4}
    assert 1e-4 < (got - plain).norm() / plain.norm() < 0.02
    assert torch.equal(run(model), plain)


def test_unregister_undoes_what_diffusers_leaks():
    """diffusers #14249: what is set for one model becomes the default of all, for good."""
    named, other, unnamed = wan(), wan(), wan()
    named.set_attention_backend("_native_math")
    REGISTRY._active_backend = ENUM.NATIVE
    states = states_of(other)
    plain = run(other)
    registered = plugin.register(named)
    assert plugin.register(other) is registered
    named.set_attention_backend("reeltime_int8")
    unnamed.set_attention_backend("reeltime_fp8")
    plugin.unregister()
    assert states_of(named) == [{"_attention_backend": ENUM._NATIVE_MATH}] * 4
    assert states_of(other) == states
    assert REGISTRY._active_backend is ENUM.NATIVE
    assert torch.equal(run(unnamed), plain)
    with pytest.raises(ValueError, match="must be one of"):
        other.set_attention_backend("reeltime_int8")
    plugin.unregister()


def test_models_that_ignore_the_dispatcher_are_not_passed_over():
    with plugin.register():
        with pytest.raises(ValueError, match="CogVideoXTransformer3DModel, where none does"):
            cog().set_attention_backend("Reeltime_INT8")
        model = hunyuan()
        with pytest.warns(UserWarning, match="refiner_blocks.0.attn do not ask"):
            model.set_attention_backend("reeltime_int8")
        assert model.transformer_blocks[0].attn.processor._attention_backend == "reeltime_int8"
        cog().set_attention_backend("native")  # as before


# --- A model, whichever way it goes -------------------------------------------------------------


@pytest.mark.parametrize("make, places", [(wan, WAN), (cog, COG)], ids=["wan", "cogvideox"])
@pytest.mark.parametrize("name", plugin.NAMES)
def test_set_attention_backend(make, places, name):
    model, other = make(), make()
    plain = run(model)
    report = plugin.set_attention_backend(model, name)
    got = run(model)
    assert 1e-5 < (got - plain).norm() / plain.norm() < 0.05
    assert {path: ran for path, ran in report.calls().items() if path != "dispatcher"} == {
        path: {"reference": 1} for path in places
    }
    assert not report.left
    assert torch.equal(run(other), plain)
    report.undo()
    assert torch.equal(run(model), plain)


def test_what_is_set_for_another_model_takes_no_call_away():
    model, other = wan(), wan()
    states = states_of(model)
    with plugin.set_attention_backend(model) as report, plugin.register(other) as registered:
        other.set_attention_backend("reeltime_fp8")
        run(model)
        assert [report.calls()[path] for path in WAN] == [{"reference": 1}] * 4
        assert registered.calls()["reeltime_fp8"] == {}
    assert states_of(model) == states


def test_set_attention_backend_refuses_aloud():
    model = wan()
    with pytest.raises(ValueError, match="name: expected 'reeltime_int8' or 'reeltime_fp8'"):
        plugin.set_attention_backend(model, "int8")
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module"):
        plugin.set_attention_backend(object())
    with pytest.raises(ValueError, match="nothing|none|None"):
        plugin.set_attention_backend(Asked(old.AttnProcessor()))
    with pytest.raises(UnsupportedArchError):
        plugin.set_attention_backend(model, backend="cuda")
    assert states_of(model) == [{}] * 4
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="WanAttnProcessor with a parallel config"):
        plugin.set_attention_backend(model)


def test_an_attention_of_its_own_is_left_with_a_reason():
    model = cog()
    model.transformer_blocks[0].attn1.set_processor(old.AttnProcessor())
    report = plugin.set_attention_backend(model)
    assert report.left == [Left(COG[0], "attention", "AttnProcessor has an attention of its own")]
    assert [change.path for change in report.changes] == [COG[1]]


def test_undo_after_somebody_set_another_backend():
    model = wan()
    report = plugin.set_attention_backend(model)
    model.set_attention_backend("_native_math")
    with pytest.raises(RuntimeError, match="dispatcher was changed again"):
        report.undo()
    model.set_attention_backend("native")
    report.undo()
    REGISTRY._active_backend = ENUM.NATIVE


# --- Processor by processor ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [wan, cog])
def test_processor(make):
    """diffusers hands a processor only what its signature names: CogVideoX's rotary embedding."""
    model, twin = make(), make()
    plain, own = run(model), model.attn_processors
    with plugin.set_attention_backend(twin):
        want = run(twin)
    made = {path: plugin.processor(one) for path, one in own.items()}
    model.set_attn_processor(dict(made))
    assert torch.equal(run(model), want)
    assert [one.calls for one in made.values()] == [{"reference": 1}] * len(own)
    for path, one in made.items():
        assert isinstance(one, type(own[path]))
        assert type(one).__name__ == type(own[path]).__name__
        assert inspect.signature(one.__call__) == inspect.signature(own[path].__call__)
    model.set_attn_processor(dict(own))
    assert torch.equal(run(model), plain)


def test_processors_of_one_model_share_compiled_graphs():
    torch._dynamo.reset()
    model, site = wan(), Site("", "model")
    model.set_attn_processor({
        path: plugin.processor(one, "fp8", place=Place(Site(path, "attention"), site))
        for path, one in model.attn_processors.items()
    })  # fmt: skip
    want = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(model), want)
    assert site.calls == {"attention: reference": 4}


def test_processors_keep_their_calls():
    """Also while another model's backend is the default of all."""
    model, other = wan(), wan()
    made = {path: plugin.processor(one) for path, one in model.attn_processors.items()}
    model.set_attn_processor(dict(made))
    with plugin.register() as registered:
        other.set_attention_backend("reeltime_fp8")
        run(model)
        assert registered.calls()["reeltime_fp8"] == {}
    assert [one.calls for one in made.values()] == [{"reference": 1}] * 4


def test_processor_refuses():
    with pytest.raises(ValueError, match="one: expected .* AttnProcessor, which has an attention"):
        plugin.processor(old.AttnProcessor())
    with pytest.raises(ValueError, match="format: expected"):
        plugin.processor(old.AttnProcessor2_0(), "int4")
    with pytest.raises(ValueError, match="backend: expected"):
        plugin.processor(old.AttnProcessor2_0(), backend="best")


# --- With diffusers' other switches, all of `accelerate` ----------------------------------------


def served(report):
    return {what for ran in report.calls().values() for what in ran}


@pytest.fixture(scope="module")
def accelerated():
    model = wan()
    reeltime.accelerate(model)
    return run(model)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_behind_it(offload_type, accelerated):
    model, cpu = wan(), torch.device("cpu")
    report = reeltime.accelerate(model)
    model.enable_group_offload(cpu, cpu, offload_type=offload_type, num_blocks_per_group=1)
    assert torch.equal(run(model), accelerated)
    assert served(report) == {"reference"}


def test_group_offloading_before_it_keeps_what_it_holds():
    model, cpu = wan(), torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    report = reeltime.accelerate(model, norm=None)
    held = {one.why for one in report.left if one.path.startswith("blocks")}
    assert held == {"its forward was replaced, as offloading does: accelerate first"}
    assert {change.kind for change in report.changes} == {"attention"}
    run(model)
    assert all(report.calls()[path] == {"reference": 1} for path in WAN)


def test_layerwise_casting_behind_it_passes_over_8_bit_layers(accelerated):
    model = wan()
    reeltime.accelerate(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.equal(run(model), accelerated)


def test_layerwise_casting_before_it_keeps_the_layers():
    model = wan()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    report = reeltime.accelerate(model, norm=None)
    assert {change.kind for change in report.changes} == {"attention"}
    assert any("replaced" in one.why for one in report.left)
    run(model)
    assert all(report.calls()[path] == {"reference": 1} for path in WAN)


def test_blocks_compiled_one_by_one_share_a_graph(accelerated):
    torch._dynamo.reset()
    model = wan()
    report = reeltime.accelerate(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(model), accelerated)
    assert report.model.calls == {
        "linear: reference": 20, "attention: reference": 4, "norm: reference": 14
    }  # fmt: skip


def test_fused_projections_before_it():
    model = wan()
    model.fuse_qkv_projections()
    report = reeltime.accelerate(model)
    run(model)
    ran = {path for path, what in report.calls().items() if what and path.startswith("blocks.0.a")}
    assert {"blocks.0.attn1.to_qkv", "blocks.0.attn2.to_kv", "blocks.0.attn2.to_q"} <= ran
    assert "blocks.0.attn1.to_q" not in ran


def test_enable_cache_goes_first():
    config = diffusers.FirstBlockCacheConfig(threshold=0.0)
    model = wan()
    reeltime.accelerate(model)
    with pytest.raises(ValueError, match="not registered"):
        model.enable_cache(config)
    model = wan()
    model.enable_cache(config)
    report = reeltime.accelerate(model)
    with model.cache_context("test"):
        run(model)
    assert served(report) == {"reference"}


def test_saved_8_bit_weights_are_missed_by_name(tmp_path, accelerated):
    """from_pretrained builds nn.Linear; a model that is accelerated takes them."""
    model = wan()
    report = reeltime.accelerate(model)
    model.save_pretrained(tmp_path)
    _, loading = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    changed = {change.path for change in report.changes if change.kind == "linear"}
    assert set(loading["missing_keys"]) == {f"{path}.weight" for path in changed}
    again = diffusers.WanTransformer3DModel.from_config(model.config).eval()
    reeltime.accelerate(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), accelerated)
    report.undo()
    model.save_pretrained(tmp_path / "plain")
    plain = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(plain[name], x) for name, x in wan().state_dict().items())
