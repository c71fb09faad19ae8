# SPDX-License-Identifier: Apache-2.0
"""Quality levels: how far each is from float32, what runs in 8 bits, and weights quantised once."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reeltime import backends
from reeltime.checks import accuracy
from reeltime.model.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from reeltime.model.config import PRESETS, ModelConfig, SparseLinear, preset
from reeltime.model.kv_cache import KV_FORMATS, StreamMemory
from reeltime.model.layers import Linear8
from reeltime.model.layout import layout
from reeltime.model.miniature import control, weights
from reeltime.model.quality import QUALITIES, Quality, named, quantize, shape, sparsify
from reeltime.model.transformer import CausalTransformer

SMALL = ModelConfig("small", 256, 2, 1024, 4, 16, 16, text_dim=64, text_len=16, freq_dim=64)
TINY = ModelConfig("tiny", 128, 1, 64, 2, 4, 4, text_dim=8, freq_dim=16, text_len=6)
EIGHT_BITS = [level for level in QUALITIES.values() if level.linear is not None]


def names(level):
    return level.name


def randomised(config, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    net = CausalTransformer(config).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return net.to(dtype)


# --- Accuracy -----------------------------------------------------------------------------------

# Relative L1 of a pass over a full window, written at the same level, against float32.
MEASURED = {
    ("small", "int8"): 2.31e-3,
    ("small", "fp8"): 7.24e-3,
    ("small", "int8+sla"): 2.31e-3,
    ("small", "fp8+sla"): 7.42e-3,
    ("miniature", "int8"): 1.62e-2,
    ("miniature", "fp8"): 4.65e-2,
    ("miniature", "int8+sla"): 1.64e-2,
    ("miniature", "fp8+sla"): 8.49e-2,
}
# What rounding does to one product, of Gaussians: with INT8, amax / 127 / sqrt(12) of 128 values
# (2.8 of their RMS) and of 128 x 128 (4 of it) is 0.0064 and 0.0091; e4m3 rounds by 0.026, twice.
PRODUCT = {"int8": math.hypot(0.0064, 0.0091), "fp8": math.hypot(0.026, 0.026)}
# And to attention: INT8 scores 0.013; values and probabilities in e4m3 0.026 each.
ATTENTION = {"int8, v fp16": 0.013, "int8, v fp8": math.hypot(0.013, 0.026, 0.026)}


def limit(level: Quality, layers: int) -> float:
    """A branch is two products and perhaps attention: eps = sqrt(2 product^2 + attention^2).

    The stream is the sum of n = 3 layers branches.  Were they of one size, and did each hand on
    the error of its input as it is, r^2 would grow by eps^2 / n with the n-th: r = eps sqrt(1 +
    ln n).  What makes it less is that the stream also holds its embedding, which has no such error.
    """
    branch = math.hypot(
        PRODUCT[str(level.linear)], PRODUCT[str(level.linear)], ATTENTION[level.kv_format]
    )
    return branch * math.sqrt(1 + math.log(3 * layers))


@torch.no_grad()
def predict(net, grid, context, clean, noisy, backend="reference"):
    """Chunks into the window, then one denoising pass."""
    frames = net.config.chunk
    memory = StreamMemory(
        net.config, layout("vidu_s1", net.config), grid, kv_format=net.quality.kv_format,
        backend=backend, device=noisy.device,
    )  # fmt: skip
    embedded = net.embed_context(context, backend)
    for start in range(0, clean.shape[1], frames):
        x = clean[:, start : start + frames]
        for kind in ("noisy", "cache"):
            memory.plan = memory.make_plans()[kind]
            net(x, torch.zeros(x.shape[:2], device=x.device), embedded, memory, backend=backend)
        memory.position += frames
    memory.plan = memory.make_plans()["final"]
    times = torch.full(noisy.shape[:2], 700.0, device=noisy.device)
    return net(noisy, times, embedded, memory, backend=backend)


def normal(seed, *sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def small(level: Quality):
    """(float32, at the level): the geometry of Wan, random weights, heads of 128."""
    inputs = (6, 8), normal(1, 1, 1, 16, 64), normal(2, 1, 18, 16, 12, 16)
    wide = randomised(SMALL)
    sparsify(wide, level)
    return tuple(
        predict(net, *inputs, normal(3, 1, 3, 16, 12, 16))
        for net in (wide, quantize(randomised(SMALL), level))
    )


def miniature(level: Quality):
    """(float32, at the level): trained weights.

    Where it is sparse, at half of the keys: a tenth of nine blocks is one, and where 8 bits choose
    another, everything is another.
    """
    sparsity = 50 if level.topk else 0
    level = replace(level, topk=0.5 if level.topk else None)
    still = normal(4, 1, 1, 64, 16, 16)
    clean = still + 0.3 * normal(5, 1, 12, 64, 16, 16)
    noisy = 0.3 * still + 0.7 * normal(6, 1, 2, 64, 16, 16)
    nets = [weights.load_miniature(sparsity=sparsity)[0] for _ in range(2)]
    quantize(nets[1], level)
    context = torch.from_numpy(control.picture_tokens())[None]
    return tuple(predict(net, (8, 8), context, clean, noisy) for net in nets)


MODELS = {"small": (small, SMALL.num_layers), "miniature": (miniature, 6)}


@pytest.mark.parametrize("level", EIGHT_BITS, ids=names)
@pytest.mark.parametrize("model", MODELS)
def test_a_level_is_as_near_to_float32_as_its_roundings(model, level):
    predictions, layers = MODELS[model]
    want, got = predictions(level)
    error = accuracy(got, want)
    assert want.std() > 0.3
    assert error.relative_l1 <= limit(level, layers), error
    assert error.cosine >= 1 - limit(level, layers) ** 2
    assert error.relative_l1 == pytest.approx(MEASURED[model, level.name], rel=0.5)


def test_bf16_level_changes_nothing():
    want, got = small(QUALITIES["bf16"])
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda layer: layer.weight_scale.copy_(layer.weight_scale.roll(1, 1)),
        lambda layer: layer.bias.data.zero_(),
        lambda layer: layer.weight.copy_(layer.weight.roll(128, 0)),
    ],
    ids=["scales shifted", "no bias", "rows misplaced"],
)
def test_a_mistake_in_the_weights_is_beyond_the_limit(mistake):
    level = QUALITIES["int8"]
    net = quantize(randomised(SMALL), level)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, Linear8) and layer.weight.shape[1] > 128:
                mistake(layer)
    inputs = (
        (6, 8),
        normal(1, 1, 1, 16, 64),
        normal(2, 1, 6, 16, 12, 16),
        normal(3, 1, 3, 16, 12, 16),
    )
    error = accuracy(predict(net, *inputs), predict(randomised(SMALL), *inputs))
    assert error.relative_l1 > 2 * MEASURED["small", "int8"]


@pytest.mark.parametrize("level", ["fp8", "int8+sla"])
def test_kernels_agree_with_the_reference(level, device):
    """Triton's, interpreted without a GPU: they read q, k and v side by side from one product."""
    want, got = (
        predict(
            quantize(randomised(replace(TINY, dim=64, num_heads=2)), QUALITIES[level]).to(device),
            (3, 4),
            *(
                normal(seed, *sizes).to(device)
                for seed, sizes in ((1, (1, 1, 6, 8)), (2, (1, 3, 4, 6, 8)), (3, (1, 3, 4, 6, 8)))
            ),
            backend=backend,
        )
        for backend in ("reference", "triton")
    )
    error = accuracy(got, want)
    assert 0 < error.relative_l1 <= limit(QUALITIES[level], TINY.num_layers) / 2


# --- What runs ----------------------------------------------------------------------------------


def ops_of_a_pass(monkeypatch, net):
    """How often each op runs in a pass over one chunk."""
    counts = Counter()
    for op in backends.OPS.values():

        def run(*args, op=op):
            counts[op.name] += 1
            return type(op).run(op, *args)

        monkeypatch.setattr(op, "run", run)
    predict(net, (2, 3), normal(1, 1, 1, 6, 8), normal(2, 1, 0, 4, 4, 6), normal(3, 1, 3, 4, 4, 6))
    return counts


@pytest.mark.parametrize("level", QUALITIES.values(), ids=names)
def test_between_the_layers_of_a_block_there_are_8_bits(monkeypatch, level):
    """Norms and fc1 quantise what they hand on; only what attention returns is quantised apart."""
    net = quantize(randomised(TINY), level)
    counts, layers = ops_of_a_pass(monkeypatch, net), TINY.num_layers
    context = 2 * layers  # k and v of cross-attention, once per chunk
    if level.linear is None:
        assert counts["norm"] == 1
        assert counts["gated_residual_norm"] == 3 * layers
        assert counts["gemm_w8a8"] == counts["quantize"] == 0
        return
    assert counts["norm_quantized"] == 3 * layers
    assert counts["norm"] == 1  # before the head
    assert counts["gated_residual_norm"] + counts["gated_residual_norm_quantized"] == 0
    assert counts["gemm_w8a8"] == 5 * layers + context  # qkv, o, q, o, fc2
    assert counts["gemm_w8a8_requantized"] == layers  # fc1
    assert counts["quantize"] == 2 * layers + context
    assert counts["segment_sla" if level.topk else "segment_attention"] == layers


def test_layers_stay_wide_by_their_names():
    wide = Quality("int8, ends wide", linear="int8", wide=("blocks.0.*", "*.ffn.2"))
    net = quantize(randomised(TINY), wide)
    low = {name for name, layer in net.named_modules() if isinstance(layer, Linear8)}
    assert low == {
        "blocks.1.self_attn.qkv", "blocks.1.self_attn.o", "blocks.1.ffn.0",
        *(f"blocks.1.cross_attn.{part}" for part in ("q", "k", "v", "o")),
    }  # fmt: skip
    memory_inputs = normal(1, 1, 1, 6, 8), normal(2, 1, 3, 4, 4, 6), normal(3, 1, 3, 4, 4, 6)
    error = accuracy(
        predict(net, (2, 3), *memory_inputs), predict(randomised(TINY), (2, 3), *memory_inputs)
    )
    assert 1e-5 < error.relative_l1 < limit(QUALITIES["int8"], 2)


def test_image_contexts_are_quantised_too():
    net = quantize(randomised(replace(TINY, image_dim=32)), QUALITIES["int8"])
    assert isinstance(net.blocks[0].cross_attn.k_img, Linear8)
    pairs = net.embed_context(normal(1, 1, 1, 6, 8), image=normal(2, 1, 1, 5, 32))
    assert len(pairs[0]) == 4


def test_a_dtype_is_for_what_is_not_in_8_bits():
    net = quantize(randomised(TINY), QUALITIES["fp8"])
    layer = net.blocks[0].ffn[0]
    codes, scales = layer.weight.clone(), layer.weight_scale.clone()
    net.to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.weight.view(torch.uint8), codes.view(torch.uint8))
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scales)
    assert layer.bias.dtype == net.head.head.weight.dtype == torch.bfloat16
    assert net.to("meta").blocks[0].ffn[0].weight.is_meta


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: named("int4"), "quality: expected one of bf16, int8, fp8"),
        (lambda: Quality("x", linear="int4"), "linear: expected one of"),
        (lambda: Quality("x", kv_format="int4"), "kv_format: expected one of"),
        (lambda: Quality("x", topk=2.0), "topk: expected a share"),
        (
            lambda: quantize(quantize(randomised(TINY), QUALITIES["int8"]), QUALITIES["fp8"]),
            "expected a transformer without one, got int8",
        ),
        (
            lambda: quantize(randomised(replace(TINY, ffn_dim=40)), QUALITIES["int8"]),
            r"blocks.0.ffn.2 takes 40 channels, int8 needs a multiple of 16",
        ),
    ],
)
def test_what_is_no_level_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_levels_name_formats_that_exist():
    assert all(level.kv_format in KV_FORMATS for level in QUALITIES.values())
    assert all(name == level.name for name, level in QUALITIES.items())


def test_a_share_of_keys_is_the_level_and_the_rest_the_model():
    """A dense model gets a linear branch that adds nothing."""
    level = QUALITIES["int8+sla"]
    dense = quantize(randomised(TINY), level)
    assert dense.config.sla == SparseLinear(0.1)
    assert not any(block.self_attn.proj_l.weight.any() for block in dense.blocks)
    own = replace(TINY, sla=SparseLinear(0.5, over="unselected", phi="elu"))
    sparse = quantize(randomised(own), level)
    assert sparse.config.sla == SparseLinear(0.1, over="unselected", phi="elu")
    assert all(block.self_attn.proj_l.weight.any() for block in sparse.blocks)
    assert quantize(randomised(own), QUALITIES["int8"]).config == own


# --- Checkpoints --------------------------------------------------------------------------------


def bits(net):
    """Its tensors; e4m3 as bytes, since it has no comparison."""
    state = net.state_dict()
    low = torch.float8_e4m3fn
    return {n: x.view(torch.uint8) if x.dtype == low else x for n, x in state.items()}


def same(a, b):
    x, y = bits(a), bits(b)
    assert x.keys() == y.keys()
    return all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)


@pytest.mark.parametrize("config", [TINY, replace(TINY, dim=192)], ids=["128", "192, ragged"])
@pytest.mark.parametrize("level", EIGHT_BITS, ids=names)
def test_loading_quantises_once_and_saving_keeps_the_bits(tmp_path, level, config):
    """Shard by shard: q, k and v of one block lie in different files."""
    save_checkpoint(randomised(config), tmp_path / "wide", max_shard_bytes=100_000)
    assert len(list((tmp_path / "wide").glob("*.safetensors"))) > 4
    net = load_checkpoint(tmp_path / "wide", quality=level.name)
    assert net.quality == level
    assert same(net, quantize(load_checkpoint(tmp_path / "wide"), level))
    save_checkpoint(net, tmp_path / "low", max_shard_bytes=100_000)
    again = load_checkpoint(tmp_path / "low")
    assert same(again, net)
    assert (again.quality, again.config) == (net.quality, net.config)
    assert same(load_checkpoint(tmp_path / "low", quality=level), net)
    stored = [
        x.dtype for p in (tmp_path / "low").glob("*.safetensors") for x in load_file(p).values()
    ]
    assert {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}[
        next(d for d in stored if d.itemsize == 1)
    ] == level.linear


def test_what_is_stored_low_is_not_something_else(tmp_path):
    save_checkpoint(quantize(randomised(TINY), QUALITIES["int8"]), tmp_path)
    with pytest.raises(ValueError, match="is stored at int8: expected that or None, got fp8"):
        load_checkpoint(tmp_path, quality="fp8")
    path = tmp_path / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    name = "blocks.0.self_attn.qkv.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=rf"{name} in .*: expected torch.int8, got torch.float8"):
        load_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for odd in (7, {"name": "x", "mood": 1}, {"name": "x", "linear": "int4"}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quality": odd}))
        with pytest.raises(ValueError, match="expected a Quality, got"):
            load_checkpoint(tmp_path)


def test_a_lora_is_merged_before_and_never_after(tmp_path):
    name = "blocks.0.ffn.0"
    pair = {f"{name}.lora_A.weight": normal(1, 4, 128), f"{name}.lora_B.weight": normal(2, 64, 4)}
    save_file(pair, tmp_path / "lora.safetensors")
    save_checkpoint(randomised(TINY), tmp_path / "wide")
    options = {"lora": tmp_path / "lora.safetensors", "lora_alpha": 4.0}
    net = load_checkpoint(tmp_path / "wide", quality="int8", **options)
    assert same(net, quantize(load_checkpoint(tmp_path / "wide", **options), QUALITIES["int8"]))
    save_checkpoint(net, tmp_path / "low")
    with pytest.raises(ValueError, match="lora"):
        load_checkpoint(tmp_path / "low", **options)


# --- Host memory --------------------------------------------------------------------------------

LAYERS_MB, SHARD = 8.4, 25_000_000
PEAK = """
import re, sys
from pathlib import Path
from reeltime.model.checkpoint import load_checkpoint
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
load_checkpoint(sys.argv[1], quality="int8")
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
except OSError:
    sys.exit(77)
before = status("VmRSS")
net = load_checkpoint(sys.argv[2], quality="int8")
print(status("VmHWM") - before, sum(x.nbytes for x in net.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_of_host_memory_is_a_shard_and_the_result(tmp_path):
    """100 MB in four files become 51 MB: without closing files, or with a wide copy, it is 150."""
    for name, layers in (("small", 1), ("large", 12)):
        config = ModelConfig(name, 512, 4, 2048, layers, 4, 4, text_dim=8, freq_dim=16)
        with torch.device("meta"):
            net = CausalTransformer(config).to(torch.bfloat16)
        save_checkpoint(net.to_empty(device="cpu"), tmp_path / name, max_shard_bytes=SHARD)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 3
    # As glibc does for the layers of a real model: each tensor is its own mapping.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this kernel does not reset a peak")
    assert done.returncode == 0, done.stderr
    peak, result = map(int, done.stdout.split())
    assert result < 0.55 * 12 * LAYERS_MB * 1e6
    working = 12e6  # a row of blocks in float32, and what Python keeps for 12 blocks
    assert result < peak < SHARD + result + working, (peak, result)


def test_14b_fits_in_24_gib_of_host_memory():
    """Public shards have at most 10 GB; what stays wide and the scales are counted."""
    with torch.device("meta"):
        net = CausalTransformer(preset("wan-14b")).to(torch.bfloat16)
        wide = sum(x.nbytes for x in net.state_dict().values())
        shape(net, QUALITIES["int8"])
    low = sum(x.nbytes for x in net.state_dict().values())
    assert wide > 28e9
    assert low + 10e9 < 24 * 2**30
    assert re.fullmatch(r"14\.\d+", f"{low / 1e9:.1f}"), low
    assert PRESETS["wan-14b"].num_layers == len(net.blocks)
