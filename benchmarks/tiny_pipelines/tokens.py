"""Tiny image pipelines that cut latents into tokens: Chroma, Bria, Qwen-Image, Z-Image, Flux 2 and others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tiny_pipelines.base import (
    TEXT,
    TEXT_WIDTH,
    TinyPipeline,
    dynamic,
    flow,
    hole,
    mask,
    noise,
    picture,
    prompts,
    text,
)
from tiny_pipelines.image import SIZE
from tiny_pipelines.parts import pooling_vae, vae, wan_vae

_FILM_SIZE: dict[str, Any] = {"height": 64, "width": 64}


def _chroma(**more: Any) -> dict[str, Any]:
    given = prompts("attention")
    masks = {name: value.bool() for name, value in given.items() if name.endswith("mask")}
    return {**given, **masks, **SIZE, "guidance_scale": 3.0, **more}


def _qwen(**more: Any) -> dict[str, Any]:
    return {**prompts("mask"), **_FILM_SIZE, "true_cfg_scale": 3.0, **more}


def _qwen_controlnet(extra: int = 0) -> Any:
    return lambda: diffusers.QwenImageControlNetModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        extra_condition_channels=extra,
    )


def _listed(**more: Any) -> dict[str, Any]:
    """Z-Image takes a list of embeddings."""
    return {
        "prompt_embeds": list(text()), "negative_prompt_embeds": list(text(seed=2)), **SIZE, "guidance_scale": 3.0,
        **more,
    }  # fmt: skip


def _chromas(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    return TinyPipeline(name, task, "ChromaTransformer2DModel", dynamic(), inputs, models={"vae": vae(2)}, **options)


def _qwens(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    models = {"vae": wan_vae(2, "AutoencoderKLQwenImage"), **options.pop("models", {})}
    scheduler = dynamic(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return TinyPipeline(name, task, "QwenImageTransformer2DModel", scheduler, inputs, models=models, **options)


def _zimages(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    models = {"vae": vae(4), **options.pop("models", {})}
    return TinyPipeline(name, task, "ZImageTransformer2DModel", flow(), inputs, models=models, **options)


def _flux2(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    return TinyPipeline(
        name,
        task,
        "Flux2Transformer2DModel",
        dynamic(),
        inputs,
        models={
            "vae": lambda: diffusers.AutoencoderKLFlux2(
                block_out_channels=(4, 4),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=2,
                norm_num_groups=2,
                mid_block_add_attention=False,
            )
        },
        **options,
    )


_FAR_VAE = {"vae": pooling_vae()}
_MEGA = {"height": 512, "width": 512}
"""These resize what they edit to a megapixel, so that only a VAE which shrinks it more keeps the tokens few."""

TOKENS = (
    _chromas("ChromaPipeline", "text-to-image", _chroma),
    _chromas(
        "ChromaImg2ImgPipeline", "image-to-image", lambda: _chroma(image=picture(), strength=0.6), steps=6, executed=4
    ),
    _chromas(
        "ChromaInpaintPipeline",
        "inpainting",
        lambda: _chroma(image=picture(), mask_image=hole(), strength=0.6),
        steps=6,
        executed=4,
        prepare=lambda pipe: pipe.transformer.register_to_config(guidance_embeds=False),
        remark="diffusers asks its transformer for a setting, guidance_embeds, that it has not; added here",
    ),
    TinyPipeline(
        "BriaPipeline",
        "text-to-image",
        "BriaTransformer2DModel",
        flow(),
        lambda: {**prompts(), **SIZE, "guidance_scale": 3.0},
        models={"vae": vae(2)},
    ),
    TinyPipeline(
        "OvisImagePipeline",
        "text-to-image",
        "OvisImageTransformer2DModel",
        dynamic(),
        lambda: {**prompts(), **SIZE, "negative_prompt": None, "guidance_scale": 3.0},
        models={"vae": vae(2)},
    ),
    TinyPipeline(
        "ErnieImagePipeline",
        "text-to-image",
        "ErnieImageTransformer2DModel",
        flow(),
        lambda: {
            "prompt_embeds": list(text()),
            "negative_prompt_embeds": list(text(seed=2)),
            **SIZE,
            "guidance_scale": 3.0,
            "use_pe": False,
        },
        models={"vae": vae(4)},
    ),  # fmt: skip
    TinyPipeline(
        "Krea2Pipeline",
        "text-to-image",
        "Krea2Transformer2DModel",
        dynamic(),
        lambda: {
            "prompt_embeds": noise(1, TEXT, 2, TEXT_WIDTH),
            "prompt_embeds_mask": mask(dtype=torch.bool),
            "negative_prompt_embeds": noise(1, TEXT, 2, TEXT_WIDTH, seed=2),
            "negative_prompt_embeds_mask": mask(dtype=torch.bool),
            **_FILM_SIZE,
            "guidance_scale": 3.0,
        },
        models={"vae": wan_vae(2, "AutoencoderKLQwenImage")},
    ),  # fmt: skip
    TinyPipeline(
        "NucleusMoEImagePipeline",
        "text-to-image",
        "NucleusMoEImageTransformer2DModel",
        dynamic(),
        lambda: {**prompts("mask"), **_FILM_SIZE, "guidance_scale": 3.0},
        models={"vae": wan_vae(2, "AutoencoderKLQwenImage")},
    ),
    _qwens("QwenImagePipeline", "text-to-image", _qwen),
    _qwens(
        "QwenImageImg2ImgPipeline",
        "image-to-image",
        lambda: _qwen(image=picture(64), strength=0.6),
        steps=6,
        executed=4,
    ),
    _qwens(
        "QwenImageInpaintPipeline",
        "inpainting",
        lambda: _qwen(image=picture(64), mask_image=hole(64), strength=0.6),
        steps=6,
        executed=4,
    ),
    _qwens("QwenImageEditPipeline", "editing", lambda: _qwen(image=picture(64), **_MEGA), models=_FAR_VAE),
    _qwens("QwenImageEditPlusPipeline", "editing", lambda: _qwen(image=[picture(64)], **_MEGA), models=_FAR_VAE),
    _qwens(
        "QwenImageEditInpaintPipeline",
        "editing, inpainting",
        lambda: _qwen(image=picture(64), mask_image=hole(64), strength=0.6, **_MEGA),
        steps=6,
        executed=4,
        models=_FAR_VAE,
    ),
    _qwens(
        "QwenImageControlNetPipeline",
        "control",
        lambda: _qwen(control_image=picture(64)),
        models={"controlnet": _qwen_controlnet()},
    ),
    _qwens(
        "QwenImageControlNetInpaintPipeline",
        "control, inpainting",
        lambda: _qwen(control_image=picture(64), control_mask=hole(64)),
        models={"controlnet": _qwen_controlnet(4)},
    ),
    _zimages("ZImagePipeline", "text-to-image", _listed),
    _zimages(
        "ZImageImg2ImgPipeline", "image-to-image", lambda: _listed(image=picture(), strength=0.6), steps=6, executed=4
    ),
    _zimages(
        "ZImageInpaintPipeline",
        "inpainting",
        lambda: _listed(image=picture(), mask_image=hole(), strength=0.6),
        steps=6,
        executed=4,
    ),
    _flux2("Flux2Pipeline", "text-to-image", lambda: {"prompt_embeds": text(), **SIZE}),
    _flux2(
        "Flux2Pipeline", "editing", lambda: {"prompt_embeds": text(), **SIZE, "image": picture(64)}, variant="editing"
    ),
    _flux2("Flux2KleinPipeline", "text-to-image", lambda: {**prompts(), **SIZE, "guidance_scale": 3.0}),
    _flux2(
        "Flux2KleinInpaintPipeline",
        "inpainting",
        lambda: {**prompts(), **SIZE, "image": picture(64), "mask_image": hole(64), "strength": 0.6},
        steps=6,
        executed=4,
    ),
    _flux2("Flux2KleinKVPipeline", "editing", lambda: {"prompt_embeds": text(), **SIZE, "image": picture(64)}),
)
