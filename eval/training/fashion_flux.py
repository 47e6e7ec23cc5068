"""Train fashion-flux, the text-to-image pipeline that ships with dita.

    python -m dita.eval.training.fashion_flux --minutes 120 --out runs/fashion-flux
    python -m dita.eval.training.fashion_flux --distil runs/fashion-flux/pipeline --minutes 15 --out runs/flux-distilled

A stock FluxPipeline over scenes of two garments, 32x64 pixels: two double-stream and six single-stream blocks of width
192 over 128 image tokens (4x4 pixels each) and 16 words, a small T5 and a small CLIP text model trained with it.
Rectified flow (arXiv 2210.02747) with logit-normal noise levels, half of them shifted by 12, captions dropped in one of
ten samples. The text encoders first learn to read, by themselves (`dita.eval.training.reading`). The features after
the third block are held to those of the garment classifier, place by place (REPA, arXiv 2410.06940): not of the world's
reader, which judges the samples.

The first command trains at guidance embedding 1. The second distils classifier-free guidance into the guidance
embedding (arXiv 2210.03142), so that `guidance_scale` costs one call a step; at `guidance_scale=1` the model stays the
plain conditional one, for use with `true_cfg_scale`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from dita.eval.classifier import load_classifier
from dita.eval.task import Task
from dita.eval.training.flow import FlowTraining, arguments, flow_loss, noise_levels, two_noise_levels
from dita.eval.training.reading import learn_to_read
from dita.eval.training.words import LENGTH, build_clip, build_t5, build_tokenizer
from dita.eval.vae import SpaceToDepthVAE
from dita.eval.world import GROUND, Renderer, Scene, random_scene

HEIGHT, WIDTH = 32, 64
CALL = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH}
_SHIFT, _SCALE = -0.6, 2.3  # of the pixels: near the mean, and one over the deviation
_DROPPED = 0.1
_MOST_GUIDANCE = 6.0
_SHIFTS = 1.0, 12.0


def build_pipeline() -> FluxPipeline:
    """Build the untrained pipeline: 6.9 M parameters."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear")) or name in ("proj_out",):
            nn.init.zeros_(module.weight)  # pyright: ignore[reportArgumentType]
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=SpaceToDepthVAE((3, 12), 12, 12, shift_factor=_SHIFT, scaling_factor=_SCALE),  # pyright: ignore[reportArgumentType]
        text_encoder=build_clip(),
        tokenizer=build_tokenizer(),  # pyright: ignore[reportArgumentType]
        text_encoder_2=build_t5(),
        tokenizer_2=build_tokenizer(),  # pyright: ignore[reportArgumentType]
        transformer=transformer,
    )


def latents(pipe: Any, scenes: Sequence[Scene], renderer: Renderer, generator: torch.Generator) -> torch.Tensor:
    """Render scenes as the transformer sees them: float32 [B, 128, 48], packed."""
    kept = (pipe.vae.encode(renderer.scenes(scenes, generator)).latent_dist.mode() - _SHIFT) * _SCALE
    return FluxPipeline._pack_latents(kept, len(scenes), 12, HEIGHT // 2, WIDTH // 2)


def velocity(
    pipe: Any, forward: Any, noisy: torch.Tensor, level: torch.Tensor, texts: list[str], guidance: torch.Tensor
) -> torch.Tensor:
    """Velocity [B, 128, 48] that a pipeline predicts at noise level [B]; `forward` is its transformer, or compiled."""
    words, pooled, text_ids = pipe.encode_prompt(texts, max_sequence_length=LENGTH)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, HEIGHT // 4, WIDTH // 4, noisy.device, noisy.dtype)
    return forward(
        hidden_states=noisy,
        timestep=level,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=words,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]


class FluxTraining(FlowTraining):
    """Trains the pipeline on rendered scenes."""

    trained = ("transformer", "text_encoder", "text_encoder_2")
    task = Task("scene", steps=28, guidance=5.0, samples=64, quick_samples=12, call=dict(CALL))

    def __init__(self, args: argparse.Namespace) -> None:
        if args.distil:
            args.init_from = args.distil
        super().__init__(args)
        if not args.distil:  # guidance is still two calls
            self.task = replace(self.task, guidance=1.0, call={**CALL, "true_cfg_scale": 5.0, "negative_prompt": ""})
        self.renderer, self.unseen = Renderer("train", args.data), Renderer("test", args.data)
        transformer = self.pipe.transformer
        self.forward: Any = torch.compile(transformer) if args.compile else transformer
        self.teacher = None
        if args.distil:
            self.teacher = self.load(Path(args.distil)).to(torch.float32)
            self.teacher_forward: Any = self.teacher.transformer
            if args.compile:
                self.teacher_forward = torch.compile(self.teacher.transformer)

    def build(self) -> FluxPipeline:
        return build_pipeline()

    def prepare(self) -> None:
        if self.args.distil or not self.args.reading:
            return
        self.pipe.text_encoder_2.load_state_dict(build_t5().state_dict())
        encoders = nn.ModuleList([self.pipe.text_encoder, self.pipe.text_encoder_2])

        def encode(texts: list[str]) -> tuple[torch.Tensor, ...]:
            words, pooled, _ = self.pipe.encode_prompt(texts, max_sequence_length=LENGTH)
            return words, pooled

        share = learn_to_read(encode, encoders, (128, 128), 60 * self.args.reading, self.generator)
        print(f"text encoders read {share:.1%} after {self.args.reading} minutes", flush=True)

    def build_helpers(self) -> nn.ModuleDict:
        if self.args.distil or not self.args.align:
            return nn.ModuleDict()
        self.classifier = load_classifier()
        self.seen: list[torch.Tensor] = []
        third = self.pipe.transformer.single_transformer_blocks[0]
        third.register_forward_hook(lambda module, args, output: self.seen.append(output[1]))
        wide, features = self.pipe.transformer.inner_dim, self.classifier.widths[-1]
        layers = nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, features)
        return nn.ModuleDict({"projector": nn.Sequential(*layers)})

    def alignment(self, clean: torch.Tensor) -> torch.Tensor:
        """Mean of 1 - cosine between the projected features of the last forward pass and the classifier's."""
        latents = FluxPipeline._unpack_latents(clean, HEIGHT, WIDTH, vae_scale_factor=2)
        images = self.pipe.vae.decode(latents / _SCALE + _SHIFT, return_dict=False)[0]
        grey = ((images.amax(1, keepdim=True) + 1 - 2 * GROUND) / (1 - GROUND) - 1).clamp(-1, 1)
        left, right = grey.chunk(2, dim=-1)
        with torch.no_grad():
            maps = self.classifier.maps(torch.cat([left, right]))[-1]
        target = torch.cat(maps.chunk(2), dim=-1).flatten(2).mT  # [B, 128 tokens, channels], row by row
        tokens = self.helpers["projector"](self.seen.pop())
        return 1 - nn.functional.cosine_similarity(tokens, target, dim=-1).mean()

    def load(self, folder: Path) -> FluxPipeline:
        return FluxPipeline.from_pretrained(folder, local_files_only=True)

    def batch(self, count: int, renderer: Renderer, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """Draw packed latents [count, 128, 48] and their captions; one caption in seven leaves the places open."""
        scenes = [random_scene(generator) for _ in range(count)]
        packed, texts = latents(self.pipe, scenes, renderer, generator), []
        for scene, chance in zip(scenes, torch.rand(count, generator=generator).tolist(), strict=True):
            text = str(scene)
            if chance < 1 / 7:
                text = text.replace(" on the left", "").replace(" on the right", "")
            texts.append(text)
        return packed, texts

    def loss(self, progress: float) -> tuple[torch.Tensor, int]:
        count, generator = self.args.batch, self.generator
        clean, texts = self.batch(count, self.renderer, generator)
        dropped = (torch.rand(count, generator=generator) < _DROPPED).tolist()
        texts = ["" if drop else text for drop, text in zip(dropped, texts, strict=True)]
        level, noise = two_noise_levels(count, generator, _SHIFTS), torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, level.view(-1, 1, 1))
        guidance = torch.ones(count)
        if self.teacher is None:
            if self.helpers:
                self.seen.clear()
            predicted = velocity(self.pipe, self.forward, noisy, level, texts, guidance)
            loss = flow_loss(predicted, clean, noise)
            return (loss + self.args.align * self.alignment(clean) if self.helpers else loss), count
        guided = torch.rand(count, generator=generator) < 0.75
        guidance = torch.where(guided, 1 + (_MOST_GUIDANCE - 1) * torch.rand(count, generator=generator), guidance)
        with torch.no_grad():
            ones = torch.ones(count)
            told = velocity(self.teacher, self.teacher_forward, noisy, level, texts, ones)
            untold = velocity(self.teacher, self.teacher_forward, noisy, level, [""] * count, ones)
            target = untold + guidance.view(-1, 1, 1) * (told - untold)
        predicted = velocity(self.pipe, self.forward, noisy, level, texts, guidance)
        return nn.functional.mse_loss(predicted, target), count

    @torch.no_grad()
    def held_out(self) -> float:
        generator = torch.Generator().manual_seed(0)
        clean, texts = self.batch(64, self.unseen, generator)
        level, noise = noise_levels(64, generator), torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, level.view(-1, 1, 1))
        with self.averaged():
            predicted = velocity(self.pipe, self.pipe.transformer, noisy, level, texts, torch.ones(64))
        return flow_loss(predicted, clean, noise).item()


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, "runs/fashion-flux", minutes=120, batch=64, lr=2e-3)
    parser.add_argument("--align", type=float, default=0.2, help="weight of the alignment of features; 0: none")
    parser.add_argument("--reading", type=float, default=2, help="minutes of the text encoders alone, T5 anew")
    parser.add_argument("--distil", default=None, help="folder of the trained pipeline whose guidance to distil")
    FluxTraining(parser.parse_args()).run()


if __name__ == "__main__":
    main()
