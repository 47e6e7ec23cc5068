"""Train fashion-wan, the text-to-video pipeline that ships with dita.

    python -m dita.eval.training.fashion_wan --minutes 240 --out runs/fashion-wan

A stock WanPipeline over clips of one moving garment, 13 frames of 32x32 pixels: eight blocks of width 128 over 3,328
tokens (2x2 pixels of one frame each), a small UMT5 encoder trained with it. Rectified flow (arXiv 2210.02747) with
logit-normal noise levels, half shifted by 2 and half by 24, captions dropped in one of ten samples.
Positions are rotary, so that training begins at 16x16 pixels and with few frames, and ends at full size: see `STAGES`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from dita.eval.task import Task
from dita.eval.training.flow import FlowTraining, arguments, flow_loss, noise_levels, two_noise_levels
from dita.eval.training.words import LENGTH, build_tokenizer, build_umt5
from dita.eval.vae import SpaceToDepthVAE
from dita.eval.world import CLIP_FRAMES, SIDE, Clip, Renderer, random_clip

_MEAN, _STD = -0.65, 0.4  # of the pixels
_DROPPED = 0.1
_SHIFT = 2.0
_SHIFTS = 2.0, 24.0


@dataclass(frozen=True)
class Shape:
    """Clips of one size, and how many make a batch."""

    frames: int
    side: int
    batch: int


# From which part of the budget on, and the shapes between which batches alternate. Garments are learnt from single
# frames, which cost a thirteenth of a clip, motion from small and short clips, and both together at the end.
STAGES: tuple[tuple[float, tuple[Shape, ...]], ...] = (
    (0.00, (Shape(5, 16, 32), Shape(1, SIDE, 32))),
    (0.40, (Shape(5, SIDE, 8), Shape(1, SIDE, 32), Shape(CLIP_FRAMES, 16, 12))),
    (0.80, (Shape(CLIP_FRAMES, SIDE, 3), Shape(1, SIDE, 32), Shape(5, SIDE, 8))),
)


def build_pipeline() -> WanPipeline:
    """Build the untrained pipeline: 2.6 M parameters."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=128,
        freq_dim=256,
        ffn_dim=512,
        num_layers=8,
        rope_max_seq_len=64,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        if name in ("proj_out", "condition_embedder.time_proj"):
            torch.nn.init.zeros_(module.weight)  # pyright: ignore[reportArgumentType]
    vae = SpaceToDepthVAE((3,), 3, 3, latents_mean=(_MEAN,) * 3, latents_std=(_STD,) * 3, scale_factor_spatial=1)
    return WanPipeline(
        tokenizer=build_tokenizer(),  # pyright: ignore[reportArgumentType]
        text_encoder=build_umt5(),
        vae=vae,  # pyright: ignore[reportArgumentType]
        scheduler=UniPCMultistepScheduler(  # pyright: ignore[reportArgumentType]
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )


def latents(clips: Sequence[Clip], renderer: Renderer, generator: torch.Generator, shape: Shape) -> torch.Tensor:
    """Render clips as the transformer sees them: float32 [B, 3, frames, side, side]."""
    return (renderer.clips(clips, generator, shape.frames, shape.side) - _MEAN) / _STD


def velocity(pipe: Any, noisy: torch.Tensor, level: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Velocity, shaped as `noisy`, that a pipeline predicts at noise level [B]."""
    words, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    (predicted,) = pipe.transformer(
        hidden_states=noisy, timestep=1000 * level, encoder_hidden_states=words, return_dict=False
    )
    return predicted


class WanTraining(FlowTraining):
    """Trains the pipeline on rendered clips."""

    trained = ("transformer", "text_encoder")
    # The pipeline adds one to num_frames where the VAE keeps every frame.
    task = Task(
        "clip",
        steps=25,
        batch=2,
        samples=12,
        quick_samples=3,
        call={"height": SIDE, "width": SIDE, "num_frames": CLIP_FRAMES - 1, "max_sequence_length": LENGTH},
    )

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.renderer, self.unseen = Renderer("train", args.data), Renderer("test", args.data)
        if args.compile:
            self.pipe.transformer.compile_repeated_blocks(dynamic=False)

    def build(self) -> WanPipeline:
        return build_pipeline()

    def load(self, folder: Path) -> WanPipeline:
        return WanPipeline.from_pretrained(folder, local_files_only=True)

    def batch(self, shape: Shape, renderer: Renderer, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """Draw latents [batch, 3, frames, side, side] and their captions."""
        clips = [random_clip(generator) for _ in range(shape.batch)]
        return latents(clips, renderer, generator, shape), [str(clip) for clip in clips]

    def loss(self, progress: float) -> tuple[torch.Tensor, int]:
        generator = self.generator
        shapes = [shapes for start, shapes in STAGES if progress >= start][-1]
        shape = shapes[self.step % len(shapes)]
        clean, texts = self.batch(shape, self.renderer, generator)
        dropped = (torch.rand(shape.batch, generator=generator) < _DROPPED).tolist()
        texts = ["" if drop else text for drop, text in zip(dropped, texts, strict=True)]
        level, noise = two_noise_levels(shape.batch, generator, _SHIFTS), torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1))
        return flow_loss(velocity(self.pipe, noisy, level, texts), clean, noise), shape.batch

    @torch.no_grad()
    def held_out(self) -> float:
        generator = torch.Generator().manual_seed(0)
        clean, texts = self.batch(Shape(4, SIDE, 16), self.unseen, generator)
        level, noise = noise_levels(16, generator, _SHIFT), torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1))
        with self.averaged():
            predicted = velocity(self.pipe, noisy, level, texts)
        return flow_loss(predicted, clean, noise).item()


def main() -> None:
    """Parse the command line and train."""
    WanTraining(arguments(__doc__, "runs/fashion-wan", minutes=240, batch=0, lr=2e-3).parse_args()).run()


if __name__ == "__main__":
    main()
