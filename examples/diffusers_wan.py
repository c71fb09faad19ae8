# SPDX-License-Identifier: Apache-2.0
"""reeltime in diffusers' Wan.

python examples/diffusers_wan.py --weights Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out wan.mp4
python examples/diffusers_wan.py --tiny    # random weights, any CPU: the report and the error
"""

from __future__ import annotations

import argparse

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_video

import reeltime


def film(weights: str, prompt: str, out: str) -> None:
    pipe = WanPipeline.from_pretrained(weights, torch_dtype=torch.bfloat16).to("cuda")
    report = reeltime.accelerate(pipe.transformer)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)  # optional
    export_to_video(pipe(prompt, height=480, width=832, num_frames=81).frames[0], out, fps=16)
    print(report)


def tiny() -> None:
    """The same pipeline over 37,000 random weights, without text encoder and VAE."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds": torch.zeros(1, 6, 16)}

    def latents() -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
        return pipe(**text, **size, generator=seed, output_type="latent").frames

    want = latents()
    report = reeltime.accelerate(pipe.transformer)
    got = latents()
    print(report)
    print(f"relative error of the latents: {float((got - want).norm() / want.norm()):.1e}")
    report.undo()
    print(f"as before after undo(): {torch.equal(latents(), want)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", help="a folder, or a name on the Hub")
    what.add_argument("--tiny", action="store_true", help="random weights, on a CPU")
    parser.add_argument("--prompt", default="A cat walks on the grass, realistic style.")
    parser.add_argument("--out", default="wan.mp4")
    options = parser.parse_args()
    if options.tiny:
        tiny()
    else:
        film(options.weights, options.prompt, options.out)
