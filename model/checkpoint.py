# SPDX-License-Identifier: Apache-2.0
"""Public checkpoints, loaded unchanged, and saved.

All of these hold the same tensors under some spelling of Wan's names:

    | layout                                            | spelling                         |
    | ------------------------------------------------- | -------------------------------- |
    | Wan folder: config.json, diffusion_pytorch_model* | Wan's                            |
    | diffusers folder: transformer/                    | its own, see `DIFFUSERS`         |
    | .pt of Self-Forcing, CausVid, LongLive and kin    | Wan's, see `PARTS`, `WRAPPERS`   |
    | one .safetensors, such as Krea's                  | any of these                     |

A file is mapped, not read: names and shapes are compared first, then one tensor at a time is read,
merged with its LoRA if there is one, and moved to where it stays.  Nothing is held twice, and on
the CPU a tensor that already has the wanted dtype is used in place, from the file.  Nothing but
tensors is unpickled.

With a quality level in 8 bits a layer is quantised when the last of its weights has been read, and
a file is closed before the next: the peak is one file and the result.  `save_checkpoint` writes
what was quantised, and loading that again quantises nothing.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import PRESETS, ModelConfig, SparseLinear
from .layers import Linear8
from .quality import QUALITIES, Quality, fill, named, shape, sparsify
from .transformer import CausalTransformer

WEIGHTS = "diffusion_pytorch_model"  # stem of the files in a folder of Wan's or diffusers'
PARTS = ("generator_ema", "generator", "model", "state_dict")  # of a .pt, in order of preference
LORA_PARTS = ("generator_lora",)
# Components of a name that come from training code: the first kind anywhere, the second in front.
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
PREFIXES = {"base_model", "model", "module", "generator", "transformer", "diffusion_model"}
IGNORED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")  # in files of old, never used

# diffusers' spelling as patterns, Wan's as replacements; a name takes the first that fits it whole.
DIFFUSERS = tuple(
    (re.compile(pattern), wan)
    for pattern, wan in (
        (r"(patch_embedding\..+)", r"\1"),
        (r"condition_embedder\.time_embedder\.linear_1\.(.+)", r"time_embedding.0.\1"),
        (r"condition_embedder\.time_embedder\.linear_2\.(.+)", r"time_embedding.2.\1"),
        (r"condition_embedder\.time_proj\.(.+)", r"time_projection.1.\1"),
        (r"condition_embedder\.text_embedder\.linear_1\.(.+)", r"text_embedding.0.\1"),
        (r"condition_embedder\.text_embedder\.linear_2\.(.+)", r"text_embedding.2.\1"),
        (r"condition_embedder\.image_embedder\.norm1\.(.+)", r"img_emb.proj.0.\1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.(.+)", r"img_emb.proj.1.\1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.2\.(.+)", r"img_emb.proj.3.\1"),
        (r"condition_embedder\.image_embedder\.norm2\.(.+)", r"img_emb.proj.4.\1"),
        (r"scale_shift_table", r"head.modulation"),
        (r"proj_out\.(.+)", r"head.head.\1"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"(blocks\.\d+)\.norm2\.(.+)", r"\1.norm3.\2"),  # the only norm of a block with weights
        (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.(.+)", r"\1.ffn.0.\2"),
        (r"(blocks\.\d+)\.ffn\.net\.2\.(.+)", r"\1.ffn.2.\2"),
        (r"(blocks\.\d+)\.attn1\.to_([qkv])\.(.+)", r"\1.self_attn.\2.\3"),
        (r"(blocks\.\d+)\.attn1\.to_out\.0\.(.+)", r"\1.self_attn.o.\2"),
        (r"(blocks\.\d+)\.attn1\.(norm_[qk]\..+)", r"\1.self_attn.\2"),
        (r"(blocks\.\d+)\.attn2\.to_([qkv])\.(.+)", r"\1.cross_attn.\2.\3"),
        (r"(blocks\.\d+)\.attn2\.to_out\.0\.(.+)", r"\1.cross_attn.o.\2"),
        (r"(blocks\.\d+)\.attn2\.(norm_[qk]\..+)", r"\1.cross_attn.\2"),
        (r"(blocks\.\d+)\.attn2\.add_([kv])_proj\.(.+)", r"\1.cross_attn.\2_img.\3"),
        (r"(blocks\.\d+)\.attn2\.norm_added_k\.(.+)", r"\1.cross_attn.norm_k_img.\2"),
    )
)
# config.json's spellings of ModelConfig's fields.
SETTINGS = {
    "dim": "dim",
    "num_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "in_dim": "in_channels",
    "in_channels": "in_channels",
    "out_dim": "out_channels",
    "out_channels": "out_channels",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "freq_dim": "freq_dim",
    "eps": "eps",
}
HEAD_DIM = 128  # of every public Wan
TEXT_LEN = 512
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LISTED = 10  # names that an error spells out


# --- Files --------------------------------------------------------------------------------------


class SafetensorsFile:
    """An open .safetensors: shapes by stored name, and tensors on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint: {path} is truncated or no safetensors file ({error})"
            ) from error
        self.shapes = {n: tuple(self._file.get_slice(n).get_shape()) for n in self._file.keys()}

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def close(self) -> None:
        """Its pages stay mapped for tensors that are used in place, and for nothing else."""
        del self._file


class PickleFile:
    """As `SafetensorsFile`, for a .pt: tensors only, mapped from the file.

    part: which of its state dicts; None takes the first of `preferred` that is there.
    """

    def __init__(self, path: Path, part: str | None, preferred: tuple[str, ...]) -> None:
        self.path = path
        state = _unpickle(path)
        held = [name for name, value in state.items() if isinstance(value, Mapping)]
        if part is None and held:
            part = next((p for p in preferred if p in held), None)
            if part is None:
                raise ValueError(
                    f"checkpoint: expected one of {', '.join(preferred)} in {path}, "
                    f"got {', '.join(map(str, held))}"
                )
        if part is not None:
            if part not in held:
                there = ", ".join(map(str, held)) or "one state dict, without a name"
                raise ValueError(f"part: expected one that {path} holds ({there}), got {part!r}")
            state = state[part]
        others = [str(n) for n, v in state.items() if not isinstance(v, Tensor)]
        if others:
            raise ValueError(
                f"checkpoint: expected tensors only in {path}, got also {_listing(others)}"
            )
        self._state: Mapping[str, Tensor] = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]

    def close(self) -> None:
        del self._state


WeightFile = SafetensorsFile | PickleFile


def _unpickle(path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found.group(1) if found else "something else"
        raise ValueError(
            f"checkpoint: {path} is refused: expected tensors only, got {what}; unpickling that "
            "could run any code"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"checkpoint: {path} is truncated or no file of torch.save since 1.6 "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"checkpoint: expected a dict in {path}, got {type(state).__name__}")
    return state


def open_file(
    path: Path, part: str | None = None, preferred: tuple[str, ...] = PARTS
) -> WeightFile:
    """The file, opened by its ending.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or part does not name one of its state dicts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return PickleFile(path, part, preferred)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"checkpoint: expected a folder, .safetensors, .pt, .pth, .ckpt or .bin, got {path}"
        )
    if part is not None:
        raise ValueError(f"part: {path} is a safetensors file and has no parts, got {part!r}")
    return SafetensorsFile(path)


def find_folder(path: Path) -> Path:
    """The folder with the weights: path itself, or its transformer/ in diffusers' layout."""
    for folder in (path, path / "transformer"):
        if any(folder.glob(f"{WEIGHTS}*.safetensors*")):
            return folder
    raise FileNotFoundError(f"checkpoint: no {WEIGHTS}*.safetensors in {path} or its transformer/")


def shard_paths(folder: Path) -> list[Path]:
    """The weight files of a folder, by its index where there is one.

    Raises:
        FileNotFoundError: a shard that the index, or the name of another one, promises.
        ValueError: the index is not one.
    """
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        entries = _read_json(index).get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
            raise ValueError(f"checkpoint: expected weight_map, names to files, in {index}")
        paths = [folder / name for name in sorted(set(entries.values()))]
    else:
        paths = sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
        for path in list(paths):
            if match := re.fullmatch(r"(.+)-\d+-of-(\d+)", path.stem):
                stem, count = match.groups()
                width = len(count)
                promised = (f"{stem}-{i + 1:0{width}}-of-{count}" for i in range(int(count)))
                paths = sorted({*paths, *(folder / f"{name}.safetensors" for name in promised)})
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: shard {path.name} is missing in {folder}")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"checkpoint: {path} is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"checkpoint: expected an object in {path}, got {type(document).__name__}")
    return document


# --- Names --------------------------------------------------------------------------------------


def unwrap(name: str) -> str:
    """The name without what training code wrapped around it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in PREFIXES:
        parts = parts[1:]
    return ".".join(parts)


def wan_name(name: str) -> str:
    """Wan's name of a parameter in any spelling; what fits none comes back unwrapped."""
    name = unwrap(name)
    for pattern, wan in DIFFUSERS:
        if pattern.fullmatch(name):
            return pattern.sub(wan, name)
    return name


def wan_names(files: list[WeightFile]) -> dict[str, tuple[WeightFile, str]]:
    """Wan's name -> (file, stored name) of every tensor.

    Raises:
        ValueError: two tensors of one name.
    """
    found: dict[str, tuple[WeightFile, str]] = {}
    for file in files:
        for stored in file.shapes:
            if IGNORED.fullmatch(unwrap(stored)):
                continue
            name = wan_name(stored)
            if name in found:
                other, there = found[name]
                raise ValueError(
                    f"checkpoint: {stored} in {file.path} and {there} in {other.path} are both "
                    f"{name}"
                )
            found[name] = (file, stored)
    return found


# --- Geometry -----------------------------------------------------------------------------------


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], where: Path
) -> ModelConfig:
    """The geometry that the shapes tell, and from config.json what they cannot tell.

    Args:
        shapes: by Wan's name.
        settings: config.json, or nothing.
        where: the checkpoint, for its name and for messages.
    Raises:
        ValueError: no Wan transformer; config.json contradicts the shapes; heads unknown.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(name, ())
        if len(found) != rank:
            raise ValueError(
                f"checkpoint: {where} is no Wan transformer: expected {name} of {rank} dimensions, "
                f"got {list(found) or 'none'}; it holds {_listing(sorted(shapes))}"
            )
        return found

    dim, in_channels, frames, *patch = shape("patch_embedding.weight", 5)
    if frames != 1:
        raise ValueError(f"checkpoint: expected patches of one latent frame, got {frames}")
    blocks = {match.group(1) for n in shapes if (match := re.match(r"blocks\.(\d+)\.", n))}
    told: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": len(blocks),
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight", 2)[0] // math.prod(patch),
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "patch": tuple(patch),
        "image_dim": shapes.get("img_emb.proj.0.weight", (0,))[0],
    }
    stated = {ours: settings[theirs] for theirs, ours in SETTINGS.items() if theirs in settings}
    own = settings.get("reeltime", {})
    if isinstance(own, dict):
        stated |= {name: value for name, value in own.items() if name not in told}
    sparse = stated.pop("sla", None)
    _check_settings(stated, where)
    if sparse is not None:
        told["sla"] = _stored(SparseLinear, sparse, where)
    for field, value in stated.items():
        if told.get(field, value) != value:
            raise ValueError(
                f"checkpoint: config.json of {where} says {field} {value}, "
                f"its weights say {told[field]}"
            )
    for config in PRESETS.values():
        if all(getattr(config, field) == value for field, value in told.items()):
            return replace(config, **stated)
    if "num_heads" not in stated and dim % HEAD_DIM:
        raise ValueError(
            f"config: the shapes of {where} do not tell the number of heads of width {dim}: "
            "pass a ModelConfig"
        )
    guessed: dict[str, Any] = {
        "name": where.stem,
        "num_heads": dim // HEAD_DIM,
        "text_len": TEXT_LEN,
    }
    return ModelConfig(**(guessed | told | stated))


def _stored(kind: type[Any], value: Any, where: Path) -> Any:
    """A dataclass of ours, as config.json holds it.

    Raises:
        ValueError: not one.
    """
    try:
        return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in value.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: config.json of {where}: expected a {kind.__name__}, got {value} ({error})"
        ) from error


def _check_settings(stated: Mapping[str, Any], where: Path) -> None:
    types = {field: type(value) for field, value in asdict(PRESETS["miniature"]).items()}
    for field, value in stated.items():
        if field not in types:
            raise ValueError(f"checkpoint: config.json of {where}: {field} is not known here")
        if type(value) is not types[field] and (type(value), types[field]) != (int, float):
            raise ValueError(
                f"checkpoint: config.json of {where}: expected {field} of type "
                f"{types[field].__name__}, got {value!r}"
            )


# --- LoRA ---------------------------------------------------------------------------------------


class Lora:
    """weight + alpha / rank * B @ A for the weights that a file has such pairs for.

    Args:
        path: .pt (a flat dict, or its part "generator_lora") or .safetensors, names as peft
            ("lora_A", "lora_B") or kohya ("lora_down", "lora_up", "alpha") write them.
        alpha: as it was trained; None where the file holds it.
    Raises:
        ValueError: names that are no LoRA, halves of a pair, ranks that differ, alpha unknown.
    """

    FACTOR = re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.default)?\.weight")
    ALPHA = re.compile(r"(.+)\.alpha")

    def __init__(self, path: Path, alpha: float | None) -> None:
        self.path = path
        self._file = open_file(path, preferred=LORA_PARTS)
        self.names: dict[str, dict[str, str]] = defaultdict(dict)  # weight -> {"A": stored, ...}
        unexpected = []
        for stored in self._file.shapes:
            if match := self.FACTOR.fullmatch(stored):
                module, kind = match.groups()
                kind = {"down": "A", "up": "B"}.get(kind, kind)
            elif match := self.ALPHA.fullmatch(stored):
                module, kind = match.group(1), "alpha"
            else:
                unexpected.append(stored)
                continue
            self.names[wan_name(f"{module}.weight")][kind] = stored
        if unexpected or not self.names:
            raise ValueError(
                f"lora: expected pairs of lora_A and lora_B in {path}, got {_listing(unexpected)}"
            )
        self._scales = {name: self._scale(name, alpha) for name in self.names}

    def _scale(self, name: str, alpha: float | None) -> float:
        stored = self.names[name]
        if not {"A", "B"} <= stored.keys():
            raise ValueError(
                f"lora: expected A and B for {name} in {self.path}, got {list(stored)}"
            )
        a, b = (self._file.shapes[stored[kind]] for kind in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"lora: expected A [rank, in] and B [out, rank] for {name}, "
                f"got {list(a)} and {list(b)}"
            )
        if "alpha" in stored:
            if alpha is not None:
                raise ValueError(
                    f"lora_alpha: {self.path} holds its own, expected None, got {alpha}"
                )
            alpha = float(self._file.read(stored["alpha"]))
        if alpha is None:
            raise ValueError(
                f"lora_alpha: {self.path} (rank {a[0]}) holds none: expected the alpha it was "
                "trained with (LongLive: its rank), got None"
            )
        return alpha / a[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight that a pair is for."""
        a, b = (self._file.shapes[self.names[name][kind]] for kind in "AB")
        return (b[0], a[1])

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """weight with its share added, in float32; as it is where there is none."""
        if name not in self.names:
            return weight
        a, b = (self._file.read(self.names[name][kind]).float() for kind in "AB")
        return torch.addmm(weight.float(), b, a, alpha=self._scales[name])


# --- Loading and saving -------------------------------------------------------------------------


def load_checkpoint(
    path: Path | str,
    config: ModelConfig | None = None,
    *,
    part: str | None = None,
    lora: Path | str | None = None,
    lora_alpha: float | None = None,
    quality: Quality | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> CausalTransformer:
    """A public checkpoint as a `CausalTransformer`, ready to stream.

    Args:
        path: folder of Wan's or diffusers' layout (whole or its transformer/), .safetensors, or .pt
            of the Self-Forcing family.
        config: geometry; None takes the preset that the shapes fit, or infers it from the shapes
            and config.json.
        part: of a .pt, which state dict; None takes the first of `PARTS` that it has, so that
            averaged weights ("generator_ema") go before "generator".
        lora: file of a LoRA to merge (LongLive).   lora_alpha: see `Lora`.
        quality: level that its layers are quantised to, or its name; None: as they are stored.
        dtype, device: of the parameters; of those in 8 bits, of the biases.
    Raises:
        FileNotFoundError: the path, or a shard of it, does not exist.
        ValueError: unreadable or unsafe file; missing, unexpected or misshapen tensors, listed;
            a config.json that contradicts the weights; a LoRA that does not fit; another quality
            than the one that is stored.

    On the CPU the parameters may share memory with the file: replace it, never write into it.
    """
    path, lora = Path(path), None if lora is None else Path(lora)
    if lora is None and lora_alpha is not None:
        raise ValueError(f"lora_alpha: expected None without lora, got {lora_alpha}")
    settings: dict[str, Any] = {}
    if path.is_dir():
        if part is not None:
            raise ValueError(f"part: {path} is a folder and has no parts, got {part!r}")
        folder = find_folder(path)
        files = [open_file(shard) for shard in shard_paths(folder)]
        if (folder / "config.json").is_file():
            settings = _read_json(folder / "config.json")
    else:
        files = [open_file(path, part)]
    found = wan_names(files)
    shapes = {name: file.shapes[stored] for name, (file, stored) in found.items()}
    if config is None:
        config = infer_config(shapes, settings, path)
    with torch.device("meta"):
        net = CausalTransformer(config)
    stored = _stored_quality(settings, path)
    if stored is not None:
        shape(net, stored)
    expected = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    stored_names = {name: stored for name, (_, stored) in found.items()}
    check_names(expected, shapes, stored_names, f"checkpoint: {path} does not fit {config.name}")
    pairs = Lora(lora, lora_alpha) if lora is not None else None
    if pairs is not None:
        given = {name: pairs.shape(name) for name in pairs.names}
        wanted = {name: shape for name, shape in expected.items() if name in given}
        check_names(wanted, given, {}, f"lora: {lora} does not fit {config.name}")
    level = named(quality) if isinstance(quality, str) else quality or stored or QUALITIES["bf16"]
    if stored is not None and level != stored:
        raise ValueError(
            f"quality: {path} is stored at {stored.name}: expected that or None, got {level.name}"
        )
    coded = {
        f"{name}.{kind}": getattr(layer, kind).dtype
        for name, layer in net.named_modules()
        if isinstance(layer, Linear8)
        for kind in ("weight", "weight_scale")
    }
    if pairs is not None and coded:
        raise ValueError(f"lora: {path} is stored in 8 bits, which nothing can be merged with")
    homes = {} if stored is not None else shape(net, level)
    parts: dict[Linear8, dict[tuple[str, int], Tensor]] = defaultdict(dict)
    for file in files:
        mine = {name: stored for name, (owner, stored) in found.items() if owner is file}
        state = {}
        for name, tensor in _tensors(file, mine, pairs, coded, dtype, device):
            if name in homes:
                _gather(parts, *homes[name], name.rpartition(".")[2], tensor)
            else:  # a copy, where a view would keep the file mapped
                state[name] = tensor.clone() if homes else tensor
        net.load_state_dict(state, strict=False, assign=True)
        file.close()
    sparsify(net, level)
    return net.eval()


def _stored_quality(settings: Mapping[str, Any], where: Path) -> Quality | None:
    value = settings.get("quality")
    return None if value is None else _stored(Quality, value, where)


def _gather(
    parts: dict[Linear8, dict[tuple[str, int], Tensor]],
    layer: Linear8,
    index: int,
    kind: str,
    tensor: Tensor,
) -> None:
    """A weight or bias of a part of `layer`; with the last of them it is quantised."""
    held, count = parts[layer], len(layer.parts)
    held[kind, index] = tensor
    if len(held) == 2 * count:
        fill(layer, *([held[kind, i] for i in range(count)] for kind in ("weight", "bias")))
        del parts[layer]


def _tensors(
    file: WeightFile,
    names: Mapping[str, str],
    lora: Lora | None,
    coded: Mapping[str, torch.dtype],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Iterator[tuple[str, Tensor]]:
    """(Wan's name, tensor where it stays) of one file: one tensor is read after the other left.

    coded: dtypes of codes and scales, which are not converted.
    """
    for name, stored in names.items():
        tensor = file.read(stored)
        if tensor.dtype not in ((coded[name],) if name in coded else FLOATS):
            expected = coded.get(name, "16 bits or more of floating point")
            raise ValueError(
                f"checkpoint: {stored} in {file.path}: expected {expected}, got {tensor.dtype}"
            )
        if lora is not None:
            tensor = lora.merge(name, tensor)
        yield name, tensor.to(device=device, dtype=coded.get(name, dtype)).contiguous()


def check_names(
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    title: str,
) -> None:
    """Both hold the same names with the same shapes.

    Raises:
        ValueError: lists what is missing, unexpected (as the file spells it) and misshapen.
    """
    problems = {
        "missing": sorted(expected.keys() - got.keys()),
        "unexpected": sorted(stored.get(name, name) for name in got.keys() - expected.keys()),
        "misshapen": [
            f"{name} (expected {list(expected[name])}, got {list(got[name])})"
            for name in sorted(expected.keys() & got.keys())
            if expected[name] != got[name]
        ],
    }
    said = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems.items() if names]
    if said:
        raise ValueError(f"{title}: {'; '.join(said)}")


def _listing(names: list[str]) -> str:
    more = len(names) - LISTED
    listed = ", ".join(names[:LISTED]) or "nothing"
    return f"{listed} and {more} more" if more > 0 else listed


def save_checkpoint(
    net: CausalTransformer, folder: Path | str, *, max_shard_bytes: int = 10 * 10**9
) -> None:
    """Write Wan's layout: config.json and safetensors, sharded with an index where they are large.

    Args:
        folder: made if needed; must not hold weights yet.
        max_shard_bytes: a larger model becomes several files.
    Raises:
        ValueError: the folder holds weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"{WEIGHTS}*")):
        raise ValueError(f"folder: expected one without weights, got {folder}")
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in net.state_dict().items():
        if (
            shards[-1]
            and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes
        ):
            shards.append({})
        shards[-1][name] = tensor
    names = [f"{WEIGHTS}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{WEIGHTS}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file({n: t.contiguous() for n, t in shard.items()}, folder / name, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        size = sum(t.nbytes for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    own = asdict(net.config)
    kind = "i2v" if own["image_dim"] else "t2v"
    config: dict[str, Any] = {"_class_name": "WanModel", "model_type": kind}
    theirs = ("dim", "num_heads", "ffn_dim", "num_layers", "in_dim", "out_dim")
    config |= {name: own[SETTINGS[name]] for name in (*theirs, "text_dim", "freq_dim", "eps")}
    config |= {"patch_size": [1, *own["patch"]], "reeltime": own}
    if own["text_len"]:
        config["text_len"] = own["text_len"]
    if net.quality.linear is not None:
        config["quality"] = asdict(net.quality)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
