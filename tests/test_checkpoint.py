# SPDX-License-Identifier: Apache-2.0
"""Every public layout loads to the same outputs; whatever does not fit is listed."""

from __future__ import annotations

import gc
import json
import os
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from reeltime.model import checkpoint
from reeltime.model.checkpoint import WEIGHTS, infer_config, load_checkpoint, save_checkpoint
from reeltime.model.config import PRESETS, ModelConfig
from reeltime.model.kv_cache import DenseMemory
from reeltime.model.miniature.weights import FOLDER as MINIATURE
from reeltime.model.transformer import CausalTransformer

CONFIG = ModelConfig("tiny", 128, 1, 64, 2, 4, 4, text_dim=8, freq_dim=16, text_len=6)
MAPS = Path("/proc/self/maps")
INDEX = f"{WEIGHTS}.safetensors.index.json"


def randomised(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5))
    return module.eval()


@pytest.fixture(scope="module")
def net():
    return randomised(CausalTransformer(CONFIG))


@pytest.fixture
def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@torch.no_grad()
def output(net):
    g = torch.Generator().manual_seed(1)
    x, c = torch.randn(1, 2, 4, 4, 6, generator=g), torch.randn(1, 1, 5, 8, generator=g)
    memory = DenseMemory(torch.arange(2), (2, 3), net.config)
    out = net(x, torch.tensor([[0.0, 700.0]]), net.embed_context(c), memory)
    assert out.std() > 0.3
    return out


def load(path, config=CONFIG, **options):
    return load_checkpoint(path, config, **({"dtype": torch.float32} | options))


def wrapped(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


# --- Layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000], ids=["one file", "sharded"])
def test_wan_folder(net, tmp_path, shard_bytes):
    save_checkpoint(net, tmp_path / "wan", max_shard_bytes=shard_bytes)
    files = sorted((tmp_path / "wan").glob("*.safetensors"))
    assert (len(files) > 2) == (tmp_path / "wan" / INDEX).is_file() == (shard_bytes < 10**9)
    loaded = load(tmp_path / "wan", None)
    assert loaded.config == CONFIG  # also what only our own config.json says
    assert torch.equal(output(loaded), output(net))
    assert not loaded.training
    with pytest.raises(ValueError, match="folder: expected one without weights"):
        save_checkpoint(net, tmp_path / "wan")


def test_config_json_as_wan_writes_it(net, tmp_path):
    """Nothing of ours in it: text_len and heads are Wan's, the rest comes from the shapes."""
    save_checkpoint(net, tmp_path)
    theirs = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 128, "eps": 1e-06}
    theirs |= {"ffn_dim": 64, "freq_dim": 16, "in_dim": 4, "model_type": "t2v", "num_heads": 2}
    theirs |= {"num_layers": 2, "out_dim": 4, "text_len": 6}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    loaded = load(tmp_path, None)
    assert loaded.config == replace(CONFIG, name=tmp_path.stem, num_heads=2)
    (tmp_path / "config.json").unlink()
    loaded = load(tmp_path, None)
    assert loaded.config == replace(CONFIG, name=tmp_path.stem, num_heads=1, text_len=512)


@pytest.mark.parametrize("shards", ["10GB", "200KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("inner", ["", "transformer"], ids=["transformer", "pipeline"])
def test_diffusers_folder(tmp_path, shards, inner):
    """Its own spelling, and its own config.json; test_oracle.py has its outputs at length."""
    theirs = randomised(
        WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=64, num_layers=2,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / inner, max_shard_size=shards)
    assert (tmp_path / inner / INDEX).is_file() == (shards == "200KB")
    loaded = load(tmp_path, None)
    assert loaded.config == replace(CONFIG, name=tmp_path.stem, text_len=512)
    x, c = torch.randn(1, 2, 4, 4, 6), torch.randn(1, 1, 5, 8)
    padded = torch.nn.functional.pad(c[:, 0], (0, 0, 0, 507))
    with torch.no_grad():
        memory = DenseMemory(torch.arange(2), (2, 3), loaded.config)
        got = loaded(x, torch.full((1, 2), 700.0), loaded.embed_context(c), memory)
        want = theirs(x.transpose(1, 2), torch.tensor([700.0]), padded).sample.transpose(1, 2)
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


PICKLES = {
    "Self-Forcing": ("generator_ema", "model."),
    "CausVid": ("generator", "model."),
    "Causal-Forcing": ("generator", "model._fsdp_wrapped_module."),
    "LongLive base": ("model", "model."),
    "flat": (None, ""),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickled_layouts(net, state, tmp_path, name):
    part, prefix = PICKLES[name]
    held = wrapped(state, prefix)
    torch.save(held if part is None else {part: held, "critic": {}, "step": 3}, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", None)
    assert loaded.config == replace(CONFIG, name="m", text_len=512)
    assert torch.equal(output(load(tmp_path / "m.pt")), output(net))


def test_blocks_wrapped_one_by_one(net, state, tmp_path):
    inner = {re.sub(r"^(blocks\.\d+)", r"\1._fsdp_wrapped_module", n): t for n, t in state.items()}
    torch.save({"generator": wrapped(inner, "model._fsdp_wrapped_module.")}, tmp_path / "m.pt")
    assert torch.equal(output(load(tmp_path / "m.pt")), output(net))


def test_averaged_weights_go_first_and_part_chooses(net, state, tmp_path):
    path = tmp_path / "m.pt"
    other = randomised(CausalTransformer(CONFIG), seed=1)
    held = {"generator": wrapped(other.state_dict(), "model."), "generator_ema": state}
    torch.save(held, path)
    assert torch.equal(output(load(path)), output(net))
    assert torch.equal(output(load(path, part="generator")), output(other))
    with pytest.raises(ValueError, match=r"part: .* \(generator, generator_ema\), got 'critic'"):
        load(path, part="critic")


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
def test_one_safetensors(net, state, tmp_path, prefix):
    save_file(wrapped(state, prefix), tmp_path / "m.safetensors")
    assert torch.equal(output(load(tmp_path / "m.safetensors")), output(net))


def test_miniature_is_recognised():
    loaded = load(MINIATURE / "transformer.safetensors", None)
    assert loaded.config is not None
    assert loaded.config == PRESETS["miniature"]


def test_dtype_is_that_of_every_parameter(state, tmp_path):
    state["head.modulation"] = state["head.modulation"].double()  # diffusers keeps some in float32
    save_file(state, tmp_path / "m.safetensors")
    loaded = load_checkpoint(tmp_path / "m.safetensors", CONFIG)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    want = state["blocks.0.self_attn.q.weight"].to(torch.bfloat16)
    assert torch.equal(loaded.blocks[0].self_attn.q.weight, want)


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_file_of_the_wanted_dtype_is_mapped_not_copied(state, tmp_path, ending):
    """14B in bf16 is 28.6 GB: a parameter may only be the file's own page."""
    path = tmp_path / f"m.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    loaded = load(path)
    lines = [line for line in MAPS.read_text().splitlines() if str(path) in line]
    spans = [line.split()[0].split("-") for line in lines]
    inside = [
        any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in spans) for p in loaded.parameters()
    ]
    assert all(inside)


def test_one_tensor_is_read_at_a_time(state, tmp_path, monkeypatch):
    """With another dtype: what was read is gone before the next is."""
    save_file(state, tmp_path / "m.safetensors")
    read, alive, most = checkpoint.SafetensorsFile.read, set(), 0

    def counted(self, name):
        nonlocal most
        tensor = read(self, name).clone()
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(checkpoint.SafetensorsFile, "read", counted)
    gc.collect()
    load(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert most <= 2  # the one in hand, and the one before until its name is taken
    assert not alive


# --- Geometry -----------------------------------------------------------------------------------

IMAGE_TO_VIDEO = replace(PRESETS["wan-14b"], name="x", in_channels=36, image_dim=1280)


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (PRESETS["wan-1.3b"], 1_418_996_800, 825),
        (PRESETS["wan-5b"], 4_999_787_712, 825),
        (PRESETS["wan-14b"], 14_288_491_584, 1095),
        (IMAGE_TO_VIDEO, 16_394_878_784, 1303),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_public_sizes_are_recognised(config, parameters, tensors, tmp_path):
    """Shapes alone give back the preset; image-to-video is told from its tensors, as Wan 2.1 and
    2.2 write the same config.json."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in CausalTransformer(config).named_parameters()}
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    assert infer_config(shapes, {}, tmp_path / "x") == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 256}, r"config.json of .* says dim 256, its weights say 128"),
        ({"in_dim": 36}, r"says in_channels 36, its weights say 4"),
        ({"num_heads": "2"}, r"expected num_heads of type int, got '2'"),
        ({"num_heads": 3}, r"num_heads: expected a divisor of dim 128"),
        ({"reeltime": {"mood": 1}}, r"mood is not known here"),
    ],
)
def test_config_json_that_does_not_fit(net, tmp_path, changes, message):
    save_checkpoint(net, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reeltime": {}, **changes}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, None)


def test_heads_that_shapes_cannot_tell(tmp_path):
    odd = replace(CONFIG, dim=96)
    save_checkpoint(CausalTransformer(odd), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config: the shapes of .* do not tell the number of head"):
        load(tmp_path, None)
    assert load(tmp_path, odd).config == odd


# --- What does not fit --------------------------------------------------------------------------


def test_what_does_not_fit_is_listed(state, tmp_path):
    del state["blocks.1.norm3.bias"]
    state["vace.weight"] = torch.zeros(2)
    state["head.head.bias"] = torch.zeros(3)
    save_file(wrapped(state, "model."), tmp_path / "m.safetensors")
    message = (
        "does not fit tiny: 1 missing: blocks.1.norm3.bias; 1 unexpected: model.vace.weight; "
        "1 misshapen: head.head.bias (expected [16], got [3])"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path / "m.safetensors")


def test_long_lists_end_in_a_count(state, tmp_path):
    torch.save(state, tmp_path / "m.pt")
    missing = r"27 missing: (blocks\.2\.[\w.]+, ){9}blocks\.2\.[\w.]+ and 17 more$"
    with pytest.raises(ValueError, match=missing):
        load(tmp_path / "m.pt", replace(CONFIG, num_layers=3))


def test_two_spellings_of_one_name(state, tmp_path):
    state["model.head.modulation"] = state["head.modulation"].clone()
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"head.modulation in .* and .* are both head.modulation"):
        load(tmp_path / "m.safetensors")


def test_another_model_is_named_by_what_it_holds(tmp_path):
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"no Wan transformer: .*; it holds conv_in.weight"):
        load(tmp_path / "unet.safetensors", None)


def test_eight_bit_weights_are_refused(state, tmp_path):
    state["head.head.weight"] = state["head.head.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"head.head.weight in .* got torch.float8_e4m3fn"):
        load(tmp_path / "m.safetensors")


def whole(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path.read_bytes()


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-5],
        lambda d: d[: len(d) // 2],
        lambda d: d[:4],
        lambda d: b"",
        lambda d: b"<p>",
    ],
    ids=["last bytes", "half", "header", "empty", "a web page"],
)
def test_damaged_file_is_named(state, tmp_path, ending, damage):
    path = tmp_path / f"m.{ending}"
    path.write_bytes(damage(whole(path, state)))
    with pytest.raises(ValueError, match=f"checkpoint: {path} is truncated or no"):
        load(path)


@pytest.mark.parametrize("index", [True, False], ids=["index", "names"])
def test_missing_shard_is_named(net, tmp_path, index):
    save_checkpoint(net, tmp_path, max_shard_bytes=200_000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    if not index:
        (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"shard {gone.name} is missing in {tmp_path}"):
        load(tmp_path)


class Unsafe:
    def __reduce__(self):
        return os.mkdir, ("unsafe",)


def test_code_in_a_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Unsafe()}, "m.pt")
    with pytest.raises(ValueError, match=r"m.pt is refused: expected tensors only, got \w+.mkdir"):
        load("m.pt")
    assert not (tmp_path / "unsafe").exists()


@pytest.mark.parametrize(
    "held, message",
    [
        ({"critic": {}}, "expected one of generator_ema, .* got critic"),
        ({"generator_lora": {}}, "expected one of generator_ema, .* got generator_lora"),
        ({"generator": {"step": 3}}, r"expected tensors only in .* got also step"),
        ([torch.zeros(1)], "expected a dict in .* got list"),
    ],
)
def test_pickles_of_something_else(tmp_path, held, message):
    torch.save(held, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.pt")


def test_bad_paths_are_named(net, state, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere.pt"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\*"):
        load(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ValueError, match=r"expected a folder, .safetensors, .* got .*m.gguf"):
        load(tmp_path / "m.gguf")
    (tmp_path / INDEX).write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match="expected weight_map"):
        load(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not JSON"):
        load(tmp_path)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="part: .* has no parts, got 'generator'"):
        load(tmp_path / "m.safetensors", part="generator")
    with pytest.raises(ValueError, match="part: .* is a folder and has no parts"):
        load(tmp_path, part="generator")
    with pytest.raises(ValueError, match="lora_alpha: expected None without lora, got 8"):
        load(tmp_path / "m.safetensors", lora_alpha=8)


# --- LoRA ---------------------------------------------------------------------------------------

RANK, TARGETS = 4, ("blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.1.cross_attn.k")
SPELLINGS = {
    "LongLive": "base_model.model.{}.lora_{}.weight",
    "adapter name": "base_model.model.{}.lora_{}.default.weight",
    "kohya": "diffusion_model.{}.lora_{}.weight",
}


def low_rank(state, spelling="LongLive"):
    """The factors of three weights as a file spells them, and the weights merged at alpha = 6."""
    halves = ("down", "up") if spelling == "kohya" else ("A", "B")
    g = torch.Generator().manual_seed(5)
    factors, merged = {}, dict(state)
    for target in TARGETS:
        out, inner = state[f"{target}.weight"].shape
        a, b = torch.randn(RANK, inner, generator=g), torch.randn(out, RANK, generator=g)
        for half, tensor in zip(halves, (a, b), strict=True):
            factors[SPELLINGS[spelling].format(target, half)] = tensor
        merged[f"{target}.weight"] = state[f"{target}.weight"] + 6 / RANK * b @ a
    return factors, merged


def assert_merged(loaded, merged):
    for name, p in loaded.state_dict().items():
        torch.testing.assert_close(p, merged[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("spelling", ["LongLive", "adapter name"])
def test_lora_is_merged(state, tmp_path, spelling):
    factors, merged = low_rank(state, spelling)
    torch.save({"generator": wrapped(state, "model.")}, tmp_path / "m.pt")
    torch.save({"generator_lora": factors, "critic_lora": {}}, tmp_path / "lora.pt")
    loaded = load(tmp_path / "m.pt", lora=tmp_path / "lora.pt", lora_alpha=6)
    assert_merged(loaded, merged)
    assert (output(loaded) - output(load(tmp_path / "m.pt"))).abs().max() > 0.1


def test_lora_with_its_own_alpha(state, tmp_path):
    factors, merged = low_rank(state, "kohya")
    factors |= {f"diffusion_model.{target}.alpha": torch.tensor(6.0) for target in TARGETS}
    save_file(state, tmp_path / "m.safetensors")
    save_file(factors, tmp_path / "lora.safetensors")
    options = {"lora": tmp_path / "lora.safetensors"}
    assert_merged(load(tmp_path / "m.safetensors", **options), merged)
    with pytest.raises(ValueError, match="lora_alpha: .* holds its own, expected None, got 4"):
        load(tmp_path / "m.safetensors", lora_alpha=4, **options)


def test_lora_is_merged_before_rounding(state, tmp_path):
    factors, merged = low_rank(state)
    torch.save(state, tmp_path / "m.pt")
    torch.save(factors, tmp_path / "lora.pt")
    loaded = load_checkpoint(tmp_path / "m.pt", CONFIG, lora=tmp_path / "lora.pt", lora_alpha=6)
    name = f"{TARGETS[0]}.weight"
    got, want = loaded.state_dict()[name], merged[name].to(torch.bfloat16)
    assert (got != want).float().mean() < 1e-3  # one rounding, up to ties


def without(factors, ending):
    return {name: t for name, t in factors.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    "change, alpha, message",
    [
        (lambda f: f, None, r"lora_alpha: .* \(rank 4\) holds none: expected the alpha"),
        (lambda f: without(f, "q.lora_B.weight"), 6, r"expected A and B for blocks.0.self_attn.q"),
        (lambda f: f | {"x.diff": torch.zeros(1)}, 6, r"pairs of lora_A and lora_B .* got x.diff"),
        (lambda f: {}, 6, r"pairs of lora_A and lora_B .* got nothing"),
        (
            lambda f: {n.replace("blocks.1", "blocks.7"): t for n, t in f.items()},
            6,
            r"lora: .* does not fit tiny: 2 unexpected: blocks.7.cross_attn.k.weight, blocks.7.ffn",
        ),
        (
            lambda f: {n: t[:, :9] if "q.lora_A" in n else t for n, t in f.items()},
            6,
            r"1 misshapen: blocks.0.self_attn.q.weight \(expected \[128, 128\], got \[128, 9\]\)",
        ),
        (
            lambda f: {n: t[:2] if "q.lora_A" in n else t for n, t in f.items()},
            6,
            r"expected A \[rank, in\] and B \[out, rank\] .* got \[2, 128\] and \[128, 4\]",
        ),
    ],
    ids=["no alpha", "half a pair", "not a pair", "nothing", "blocks", "shape", "rank"],
)
def test_lora_that_does_not_fit(state, tmp_path, change, alpha, message):
    factors, _ = low_rank(state)
    save_file(state, tmp_path / "m.safetensors")
    torch.save(change(factors), tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.safetensors", lora=tmp_path / "lora.pt", lora_alpha=alpha)


def test_saved_file_is_wan_s_own(net, state, tmp_path):
    save_checkpoint(net, tmp_path)
    saved = load_file(tmp_path / f"{WEIGHTS}.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
