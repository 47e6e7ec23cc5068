"""Tiny image pipelines with cross-attention or joint attention over latents of images."""

from __future__ import annotations

from typing import Any

import diffusers

from tiny_pipelines.base import (
    PIXELS,
    POOLED,
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
from tiny_pipelines.parts import vae

SIZE: dict[str, Any] = {"height": PIXELS, "width": PIXELS}
_FAR = {"height": 128, "width": 128}
"""Pixels where a VAE that is absent counts for 32 to one."""
_NEAR = {"height": 64, "width": 64}
"""Pixels where it counts for 8 to one."""


def _mild(cls: str, **options: Any) -> Any:
    """A scheduler of noise, whose first steps do not divide by nearly nothing."""
    return lambda: getattr(diffusers, cls)(beta_end=0.002, **options)


def _sd3(**more: Any) -> dict[str, Any]:
    return {**prompts("pooled"), **SIZE, "guidance_scale": 3.0, **more}


def _sd3_controlnet(extra: int = 0) -> Any:
    return lambda: diffusers.SD3ControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        out_channels=4,
        pos_embed_max_size=8,
        extra_conditioning_channels=extra,
    )


def _pixart(**more: Any) -> dict[str, Any]:
    given = {"negative_prompt": None, "guidance_scale": 3.0, "use_resolution_binning": False}
    return {**prompts("attention"), **_NEAR, **given, **more}


def _sana(**more: Any) -> dict[str, Any]:
    given = {"negative_prompt": None, "guidance_scale": 3.0, "use_resolution_binning": False}
    return {**prompts("attention"), **_FAR, **given, **more}


def _hunyuan_dit(**more: Any) -> dict[str, Any]:
    partly = mask()
    both = {f"{side}prompt_embeds{n}": text(seed=k) for k, (side, n) in enumerate(_SIDES)}
    both |= {f"{side}prompt_attention_mask{n}": partly for side, n in _SIDES}
    size = {"height": 16, "width": 16, "target_size": (16, 16), "original_size": (16, 16)}
    return {**both, **size, "use_resolution_binning": False, "guidance_scale": 3.0, **more}


_SIDES = [("", ""), ("", "_2"), ("negative_", ""), ("negative_", "_2")]
_HUNYUAN = {"use_style_cond_and_image_meta_size": True, "learn_sigma": True}


def _hunyuan_controlnet() -> Any:
    return diffusers.HunyuanDiT2DControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        text_len=TEXT,
        text_len_t5=TEXT,
        transformer_num_layers=4,
        use_style_cond_and_image_meta_size=True,
    )


def _hidream() -> dict[str, Any]:
    given: dict[str, Any] = {}
    for side, seed in (("", 1), ("negative_", 2)):
        given |= {
            f"{side}prompt_embeds_t5": text(seed=seed),
            f"{side}prompt_embeds_llama3": noise(4, 1, TEXT, TEXT_WIDTH, seed=seed),
            f"{side}pooled_prompt_embeds": noise(1, POOLED, seed=seed),
        }
    return {**given, **_NEAR, "guidance_scale": 3.0}


_SD3 = {"config": {}, "models": {"vae": vae(4)}}
_T = "SD3Transformer2DModel"
_SD3_NAME = "StableDiffusion3"
IMAGES = (
    TinyPipeline(
        "DiTPipeline",
        "class-to-image",
        "DiTTransformer2DModel",
        _mild("DDIMScheduler", clip_sample=False),
        lambda: {"class_labels": [3], "guidance_scale": 3.0},
        config={"num_embeds_ada_norm": 1000, "out_channels": 8},
        models={"vae": vae(4)},
        output="pt",
    ),
    TinyPipeline(
        "PixArtAlphaPipeline",
        "text-to-image",
        "PixArtTransformer2DModel",
        _mild("DPMSolverMultistepScheduler"),
        _pixart,
        config={"out_channels": 8},
    ),
    TinyPipeline(
        "PixArtSigmaPipeline",
        "text-to-image",
        "PixArtTransformer2DModel",
        _mild("DPMSolverMultistepScheduler"),
        _pixart,
        config={"out_channels": 8},
    ),
    TinyPipeline(
        "PixArtSigmaPAGPipeline",
        "text-to-image, PAG",
        "PixArtTransformer2DModel",
        _mild("DPMSolverMultistepScheduler"),
        _pixart,
        config={"out_channels": 8},
        parts={"pag_applied_layers": lambda: ["blocks.1"]},
    ),
    TinyPipeline(_SD3_NAME + "Pipeline", "text-to-image", _T, flow(), _sd3, **_SD3),
    TinyPipeline(
        _SD3_NAME + "Img2ImgPipeline",
        "image-to-image",
        _T,
        flow(),
        lambda: _sd3(image=picture(), strength=0.6),
        steps=6,
        executed=4,
        **_SD3,
    ),
    TinyPipeline(
        _SD3_NAME + "InpaintPipeline",
        "inpainting",
        _T,
        flow(),
        lambda: _sd3(image=picture(), mask_image=hole(), strength=0.6),
        config={"in_channels": 16, "out_channels": 16},
        models={"vae": vae(16)},
        steps=6,
        executed=4,
    ),
    TinyPipeline(
        _SD3_NAME + "PAGPipeline",
        "text-to-image, PAG",
        _T,
        flow(),
        _sd3,
        parts={"pag_applied_layers": lambda: ["blocks.1"]},
        **_SD3,
    ),
    TinyPipeline(
        _SD3_NAME + "PAGImg2ImgPipeline",
        "image-to-image, PAG",
        _T,
        flow(),
        lambda: _sd3(image=picture(), strength=0.6),
        parts={"pag_applied_layers": lambda: ["blocks.1"]},
        steps=6,
        executed=4,
        **_SD3,
    ),
    TinyPipeline(
        _SD3_NAME + "ControlNetPipeline",
        "control",
        _T,
        flow(),
        lambda: _sd3(control_image=picture()),
        models={"vae": vae(4), "controlnet": _sd3_controlnet()},
    ),
    TinyPipeline(
        _SD3_NAME + "ControlNetInpaintingPipeline",
        "control, inpainting",
        _T,
        flow(),
        lambda: _sd3(control_image=picture(), control_mask=hole()),
        models={"vae": vae(4), "controlnet": _sd3_controlnet(1)},
    ),
    TinyPipeline("SanaPipeline", "text-to-image", "SanaTransformer2DModel", flow(), _sana),
    TinyPipeline(
        "SanaPAGPipeline",
        "text-to-image, PAG",
        "SanaTransformer2DModel",
        flow(),
        lambda: _sana(**_NEAR),
        parts={"pag_applied_layers": lambda: ["transformer_blocks.1"]},
    ),
    TinyPipeline(
        "SanaSprintPipeline",
        "text-to-image, few steps",
        "SanaTransformer2DModel",
        lambda: diffusers.SCMScheduler(),
        lambda: _sana(intermediate_timesteps=None),
        config={"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    ),
    TinyPipeline(
        "AuraFlowPipeline",
        "text-to-image",
        "AuraFlowTransformer2DModel",
        flow(),
        lambda: {**prompts("attention"), **_NEAR, "guidance_scale": 3.0},
    ),
    TinyPipeline(
        "CogView3PlusPipeline",
        "text-to-image",
        "CogView3PlusTransformer2DModel",
        lambda: diffusers.CogVideoXDDIMScheduler(),
        lambda: {**prompts(), **_NEAR, "guidance_scale": 3.0},
    ),
    TinyPipeline(
        "CogView4Pipeline",
        "text-to-image",
        "CogView4Transformer2DModel",
        dynamic(base_shift=0.25, max_shift=0.75, base_image_seq_len=256),
        lambda: {**prompts(), **_NEAR, "guidance_scale": 3.0},
    ),
    TinyPipeline(
        "CogView4ControlPipeline",
        "control",
        "CogView4Transformer2DModel",
        dynamic(base_shift=0.25, max_shift=0.75, base_image_seq_len=256),
        lambda: {**prompts(), **SIZE, "guidance_scale": 3.0, "control_image": picture()},
        config={"in_channels": 8},
        models={"vae": vae(4)},
    ),
    TinyPipeline(
        "HunyuanDiTPipeline",
        "text-to-image",
        "HunyuanDiT2DModel",
        _mild("DDPMScheduler"),
        _hunyuan_dit,
        config=_HUNYUAN,
        models={"vae": vae(4)},
    ),
    TinyPipeline(
        "HunyuanDiTPAGPipeline",
        "text-to-image, PAG",
        "HunyuanDiT2DModel",
        _mild("DDPMScheduler"),
        _hunyuan_dit,
        config=_HUNYUAN,
        models={"vae": vae(4)},
        parts={"pag_applied_layers": lambda: ["blocks.1"]},
    ),
    TinyPipeline(
        "HunyuanDiTControlNetPipeline",
        "control",
        "HunyuanDiT2DModel",
        _mild("DDPMScheduler"),
        lambda: _hunyuan_dit(control_image=picture()),
        config=_HUNYUAN,
        models={"vae": vae(4), "controlnet": _hunyuan_controlnet},
    ),
    TinyPipeline(
        "HiDreamImagePipeline",
        "text-to-image",
        "HiDreamImageTransformer2DModel",
        flow(),
        _hidream,
        prepare=lambda pipe: setattr(pipe, "default_sample_size", 8),
    ),
    TinyPipeline(
        "LuminaPipeline",
        "text-to-image",
        "LuminaNextDiT2DModel",
        flow(),
        lambda: {**prompts("attention"), **_NEAR, "guidance_scale": 3.0},
        config={"learn_sigma": True},
    ),
    TinyPipeline(
        "Lumina2Pipeline",
        "text-to-image",
        "Lumina2Transformer2DModel",
        dynamic(),
        lambda: {**prompts("attention"), **_NEAR, "guidance_scale": 3.0},
    ),
    TinyPipeline(
        "PRXPipeline",
        "text-to-image",
        "PRXTransformer2DModel",
        flow(),
        lambda: {**prompts("attention"), **_NEAR, "guidance_scale": 3.0, "use_resolution_binning": False},
    ),
)
