"""Tiny image pipelines: DiT, PixArt, Stable Diffusion 3, Flux, Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pipelines_base import (
    POOLED_WIDTH,
    TEXT_WIDTH,
    Dims,
    TinyPipeline,
    assemble,
    caller,
    pooled,
    rows_of_noise,
    text,
    text_mask,
)

PIXELS = {"small": {"height": 64, "width": 64}, "large": {"height": 64, "width": 96}}
FLUX_CHANNELS = 16

# With the published 0.02, the first step divides by sqrt(alpha_bar) = 0.006, and weights that do not really predict the
# noise then send the latents to the hundreds, where every block looks like the identity.
MILD_BETA = 0.002


def build_dit() -> DiffusionPipeline:
    """DiT with learned sigma, 16 tokens, and a one-level VAE because the pipeline always decodes."""
    return assemble(
        DiTPipeline,
        seed=100,
        scheduler=DDIMScheduler(clip_sample=False, beta_end=MILD_BETA),
        models={
            "transformer": lambda: DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=4, sample_size=8
            ),
            "vae": lambda: AutoencoderKL(
                block_out_channels=(8,), norm_num_groups=4, sample_size=8, mid_block_add_attention=False
            ),
        },
    )


def build_pixart() -> DiffusionPipeline:
    """PixArt-alpha with cross-attention, learned sigma and a masked prompt."""
    return assemble(
        PixArtAlphaPipeline,
        seed=200,
        scheduler=DPMSolverMultistepScheduler(beta_end=MILD_BETA),
        models={
            "transformer": lambda: PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=8,
                num_layers=4,
                cross_attention_dim=32,
                sample_size=8,
                caption_channels=TEXT_WIDTH,
            )
        },
    )


def build_sd3(heun: bool = False) -> DiffusionPipeline:
    """Stable Diffusion 3.5 layout (two dual-attention blocks, q/k norm), or the 3.0 layout with Heun's solver."""
    scheduler = FlowMatchHeunDiscreteScheduler if heun else FlowMatchEulerDiscreteScheduler
    return assemble(
        StableDiffusion3Pipeline,
        seed=300,
        scheduler=scheduler(shift=3.0),
        models={
            "transformer": lambda: SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=4,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH,
                caption_projection_dim=32,
                pooled_projection_dim=POOLED_WIDTH,
                pos_embed_max_size=16,
                dual_attention_layers=() if heun else (0, 1),
                qk_norm=None if heun else "rms_norm",
            )
        },
    )


def build_flux(cls: Callable[..., Any] = FluxPipeline, distilled: bool = True) -> DiffusionPipeline:
    """Flux with 3 double and 3 single blocks; ``distilled`` adds the guidance embedding."""
    return assemble(
        cls,
        seed=400,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        models={
            "transformer": lambda: FluxTransformer2DModel(
                in_channels=4 * FLUX_CHANNELS,
                num_layers=3,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=POOLED_WIDTH,
                guidance_embeds=distilled,
                axes_dims_rope=(4, 6, 6),
            )
        },
    )


def build_qwen() -> DiffusionPipeline:
    """Qwen-Image with a masked prompt and the published scheduler settings."""
    return assemble(
        QwenImagePipeline,
        seed=500,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        models={
            "transformer": lambda: QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=4,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=(4, 6, 6),
            )
        },
    )


def labels(rows: range, dims: Dims) -> dict[str, Any]:
    return {"class_labels": [7 * row + 3 for row in rows]}


def pixart_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    return {
        "prompt_embeds": text(rows, 1),
        "prompt_attention_mask": text_mask(rows),
        "negative_prompt": None,
        "negative_prompt_embeds": text(rows, 2),
        "negative_prompt_attention_mask": text_mask(range(rows.start + 1, rows.stop + 1)),
    }


def pooled_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    return {
        "prompt_embeds": text(rows, 1),
        "pooled_prompt_embeds": pooled(rows, 3),
        "negative_prompt_embeds": text(rows, 2),
        "negative_pooled_prompt_embeds": pooled(rows, 4),
    }


def img2img_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    start = rows_of_noise(rows, 5, FLUX_CHANNELS, dims["height"] // 8, dims["width"] // 8)
    return pooled_inputs(rows, dims) | {"image": start}


def qwen_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    return {
        "prompt_embeds": text(rows, 1),
        "prompt_embeds_mask": text_mask(rows),
        "negative_prompt_embeds": text(rows, 2),
        "negative_prompt_embeds_mask": text_mask(rows),
    }


# DiTPipeline takes its size from the transformer, so "large" cannot differ from "small".
call_dit = caller(labels, {"small": {}, "large": {}}, output_type="pt", guidance_scale=3.0)
call_pixart = caller(
    pixart_inputs,
    PIXELS,
    upstream_warning="__array__ implementation doesn't accept a copy keyword",
    guidance_scale=3.0,
    use_resolution_binning=False,
)
call_sd3 = caller(pooled_inputs, PIXELS, guidance_scale=3.0)
call_flux = caller(pooled_inputs, PIXELS, guidance_scale=3.5)
call_flux_cfg = caller(pooled_inputs, PIXELS, true_cfg_scale=3.0)
call_img2img = caller(img2img_inputs, PIXELS, guidance_scale=3.5, strength=0.7)
call_qwen = caller(qwen_inputs, PIXELS, true_cfg_scale=3.0)

IMAGE = (
    TinyPipeline("dit", build_dit, call_dit, branches=1, batched_cfg=True),
    TinyPipeline("pixart", build_pixart, call_pixart, branches=1, batched_cfg=True),
    TinyPipeline("sd3", build_sd3, call_sd3, branches=1, batched_cfg=True),
    TinyPipeline("sd3-heun", lambda: build_sd3(heun=True), call_sd3, branches=1, batched_cfg=True),
    TinyPipeline("flux", build_flux, call_flux, branches=1, batched_cfg=False),
    TinyPipeline("flux-cfg", lambda: build_flux(distilled=False), call_flux_cfg, branches=2, batched_cfg=False),
    TinyPipeline("flux-img2img", lambda: build_flux(FluxImg2ImgPipeline), call_img2img, branches=1, batched_cfg=False),
    TinyPipeline("qwen", build_qwen, call_qwen, branches=2, batched_cfg=False),
)
