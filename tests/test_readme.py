# SPDX-License-Identifier: Apache-2.0
"""Every snippet of README runs: Python as it stands, commands as far as a test can afford.

A command that takes long or needs a GPU is parsed by the command line itself, so that no option in
it is unknown; make targets, extras and files must exist.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer

from reeltime import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# Sizes of a real video, cut down to what a CPU does in a second.
SMALLER = {
    "height=480, width=832, num_frames=81": (
        "height=16, width=16, num_frames=5, num_inference_steps=2, output_type='latent'"
    ),
}
# Commands that are cheap enough to run: by how they begin.
RUN = ("reeltime kernels", "reeltime avatar", "reeltime plan", "reeltime bench --floors")


def snippets(language: str) -> list[str]:
    return [text for name, text in FENCE.findall(README) if name == language]


def commands() -> list[str]:
    """Lines of the shell snippets: continued lines joined, comments dropped."""
    lines = "".join(snippets("")).replace("\\\n", " ").splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def first_line(text: str) -> str:
    return next(line for line in text.splitlines() if "import" not in line and line.strip())[:50]


# --- Python -------------------------------------------------------------------------------------


def tiny_wan():
    """diffusers' Wan with random weights, tokenizer and all."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16,
        out_channels=16, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=net.eval(),
    )


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A working folder with what a reader of README would have downloaded."""
    monkeypatch.chdir(tmp_path)
    if "WanPipeline" in README:
        import diffusers

        monkeypatch.setattr(
            diffusers.WanPipeline, "from_pretrained", lambda *_, **__: tiny_wan().to(torch.float32)
        )
    tiny_wan_checkpoint(tmp_path / "Wan2.1-T2V-1.3B")
    return tmp_path


def tiny_wan_checkpoint(folder: Path) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=16, freq_dim=32, ffn_dim=64,
        num_layers=2, rope_max_seq_len=32, in_channels=16, out_channels=16,
    ).save_pretrained(folder)  # fmt: skip


def test_substitutions_are_of_something():
    assert all(text in README for text in SMALLER)


@pytest.mark.parametrize("source", snippets("python"), ids=first_line)
def test_python_runs(source, newcomer):
    for text, smaller in SMALLER.items():
        source = source.replace(text, smaller)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


# --- Commands -----------------------------------------------------------------------------------


def parsed(arguments: list[str]) -> None:
    """The command line takes these: unknown options and bad values raise."""
    group = typer.main.get_command(cli.app)
    if arguments and arguments[0].startswith("-"):
        group.make_context("reeltime", arguments)
        return
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


def problem(command: str) -> str | None:
    """What is wrong with a line of README, without running it."""
    words = shlex.split(command)
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    program, rest = Path(words[0]).name, words[1:]
    if program == "reeltime":
        try:
            parsed(rest)
        except (typer.Exit, SystemExit):
            return None  # --version and the like
        except Exception as error:  # noqa: BLE001  whatever the parser says is the answer
            return str(getattr(error, "message", error))
        return None
    if program == "make":
        known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        targets = [word for word in rest if "=" not in word]
        return next((f"no target {name}" for name in targets if name not in known), None)
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        asked = re.findall(r"(?:reeltime|\.)\[([\w,-]+)\]", command)
        names = {name for group in asked for name in group.split(",")}
        unknown = names - set(extras["optional-dependencies"])
        return f"no extra {unknown}" if unknown else None
    if program in ("pytest", "python"):
        paths = [word for word in rest if word.endswith(".py")]
        return next((f"no file {path}" for path in paths if not (ROOT / path).exists()), None)
    if program in ("mkdir", "git", "cd"):
        return None
    return f"nobody knows {program}"


@pytest.mark.parametrize("command", commands())
def test_command_is_one(command):
    assert problem(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "reeltime plan --gpus two",
        "reeltime frobnicate",
        "reeltime bench --aginst peers",
        "make demmo",
        "pip install '.[everything]'",
        "pytest bench/bench_nothing.py",
        "curl somewhere",
    ],
)
def test_a_wrong_command_is_noticed(command):
    assert problem(command) is not None


@pytest.mark.parametrize(
    "command", [line for line in commands() if line.replace(".venv/bin/", "").startswith(RUN)]
)
def test_cheap_command_runs(command, newcomer, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(command)[1:])
    assert end.value.code in (0, 1, None)  # 1: a target is missed, which is an answer


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [path for path in links if not (ROOT / path).exists()] == []
