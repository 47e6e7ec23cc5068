"""Tiny film pipelines, those of the Wan family apart."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tiny_pipelines.base import (
    POOLED,
    TEXT,
    TEXT_WIDTH,
    TinyPipeline,
    dynamic,
    film,
    flow,
    mask,
    noise,
    picture,
    prompts,
    text,
)
from tiny_pipelines.parts import cog_vae, cosmos_vae, hunyuan15_vae, hunyuan_vae, ltx_vae, magvit_vae, vae, wan_vae

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5}


def _cog_scheduler() -> Any:
    return diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def _cog(**more: Any) -> dict[str, Any]:
    return {**prompts(), "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, **more}


def _cogs(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    config = {
        "sample_width": 16,
        "sample_height": 16,
        "use_rotary_positional_embeddings": True,
        **options.pop("config", {}),
    }
    return TinyPipeline(
        name,
        task,
        "CogVideoXTransformer3DModel",
        _cog_scheduler,
        inputs,
        config=config,
        models={"vae": cog_vae()},
        **options,
    )


def _hunyuan(**more: Any) -> dict[str, Any]:
    return {**prompts("pooled", "attention"), **SIZE, "guidance_scale": 6.0, **more}


def _ltx(**more: Any) -> dict[str, Any]:
    return {**prompts("attention"), "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0, **more}


def _ltxs(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    scheduler = dynamic(base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1)
    return TinyPipeline(
        name,
        task,
        "LTXVideoTransformer3DModel",
        options.pop("scheduler", scheduler),
        inputs,
        models={"vae": ltx_vae()},
        **options,
    )


def _kandinsky(**more: Any) -> dict[str, Any]:
    given = {
        f"{side}prompt_embeds_{kind}": noise(1, *shape, seed=seed)
        for side, seed in (("", 1), ("negative_", 2))
        for kind, shape in (("qwen", (TEXT, TEXT_WIDTH)), ("clip", (POOLED,)))
    }
    lengths = torch.tensor([0, TEXT], dtype=torch.int32)
    return {
        **given,
        "prompt_cu_seqlens": lengths,
        "negative_prompt_cu_seqlens": lengths,
        **SIZE,
        "guidance_scale": 3.0,
        **more,
    }


def _any_size(pipe: Any) -> None:
    pipe.resolutions = [(64, 64)]


_SMALL = {"height": 64, "width": 64}


def _cosmos(**more: Any) -> dict[str, Any]:
    return {**prompts(), **SIZE, "guidance_scale": 3.0, **more}


def _cosmoses(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    return TinyPipeline(
        name,
        task,
        "CosmosTransformer3DModel",
        options.pop("scheduler", flow(use_karras_sigmas=True)),
        inputs,
        models={"vae": options.pop("vae", wan_vae())},
        parts={"safety_checker": _Harmless},
        **options,
    )


class _Harmless:
    """Stands for Cosmos' guard model, and finds nothing."""

    def to(self, *_: Any) -> None:
        """Move nothing."""

    def check_text_safety(self, _: str) -> bool:
        """Every prompt is fine."""
        return True

    def check_video_safety(self, video: Any) -> Any:
        """Every film is fine."""
        return video


FILMS = (
    _cogs("CogVideoXPipeline", "text-to-video", _cog),
    _cogs("CogVideoXPipeline", "text-to-video", lambda: _cog(use_dynamic_cfg=True), variant="dynamic guidance"),
    _cogs(
        "CogVideoXImageToVideoPipeline", "image-to-video", lambda: _cog(image=picture(32)), config={"in_channels": 8}
    ),
    _cogs(
        "CogVideoXVideoToVideoPipeline", "video-to-video", lambda: _cog(video=film(), strength=0.6), steps=7, executed=4
    ),
    _cogs("CogVideoXFunControlPipeline", "control", lambda: _cog(control_video=film()), config={"in_channels": 8}),
    TinyPipeline(
        "HunyuanVideoPipeline",
        "text-to-video",
        "HunyuanVideoTransformer3DModel",
        flow(shift=7.0),
        _hunyuan,
        config={"guidance_embeds": True},
    ),
    TinyPipeline(
        "HunyuanVideoImageToVideoPipeline",
        "image-to-video",
        "HunyuanVideoTransformer3DModel",
        flow(shift=7.0),
        lambda: _hunyuan(image=picture(64)),
        config={"in_channels": 9, "image_condition_type": "latent_concat"},
        models={"vae": hunyuan_vae()},
    ),
    TinyPipeline(
        "HunyuanSkyreelsImageToVideoPipeline",
        "image-to-video",
        "HunyuanVideoTransformer3DModel",
        flow(shift=7.0),
        lambda: _hunyuan(image=picture(64), guidance_scale=1.0, true_cfg_scale=3.0),
        config={"in_channels": 8},
        models={"vae": hunyuan_vae()},
    ),
    _ltxs("LTXPipeline", "text-to-video", _ltx),
    _ltxs("LTXImageToVideoPipeline", "image-to-video", lambda: _ltx(image=picture(32))),
    _ltxs("LTXConditionPipeline", "image-to-video", lambda: _ltx(image=picture(32)), scheduler=flow()),
    _ltxs(
        "LTXConditionPipeline",
        "video-to-video",
        lambda: _ltx(video=film(9), denoise_strength=0.6),
        scheduler=flow(),
        steps=7,
        executed=4,
        variant="video-to-video",
    ),
    TinyPipeline(
        "MochiPipeline",
        "text-to-video",
        "MochiTransformer3DModel",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        lambda: {**prompts("attention"), "height": 64, "width": 64, "num_frames": 7, "guidance_scale": 3.0},
    ),
    TinyPipeline(
        "LattePipeline",
        "text-to-video",
        "LatteTransformer3DModel",
        lambda: diffusers.DDIMScheduler(beta_end=0.002, clip_sample=False),
        lambda: {
            **prompts(),
            "negative_prompt": None,
            "height": 64,
            "width": 64,
            "video_length": 2,
            "guidance_scale": 3.0,
        },
        config={"out_channels": 8},
        models={"vae": vae(4)},
    ),
    TinyPipeline(
        "AllegroPipeline",
        "text-to-video",
        "AllegroTransformer3DModel",
        lambda: diffusers.EulerAncestralDiscreteScheduler(beta_end=0.002),
        lambda: {
            **prompts("attention"),
            "negative_prompt": None,
            "height": 64,
            "width": 64,
            "num_frames": 8,
            "guidance_scale": 3.0,
        },
        config={"attention_head_dim": 24, "cross_attention_dim": 48},
    ),
    TinyPipeline("Kandinsky5T2VPipeline", "text-to-video", "Kandinsky5Transformer3DModel", flow(), _kandinsky),
    TinyPipeline(
        "Kandinsky5I2VPipeline",
        "image-to-video",
        "Kandinsky5Transformer3DModel",
        flow(),
        lambda: _kandinsky(image=picture(64), num_frames=17),
        models={"vae": hunyuan_vae()},
        config={"visual_cond": True},
    ),
    TinyPipeline(
        "Kandinsky5T2IPipeline",
        "text-to-image",
        "Kandinsky5Transformer3DModel",
        flow(),
        lambda: _kandinsky(**_SMALL),
        models={"vae": vae(4, levels=4)},
        prepare=_any_size,
    ),
    TinyPipeline(
        "Kandinsky5I2IPipeline",
        "image-to-image",
        "Kandinsky5Transformer3DModel",
        flow(),
        lambda: _kandinsky(image=picture(64), **_SMALL),
        models={"vae": vae(4, levels=4)},
        prepare=_any_size,
        config={"visual_cond": True},
    ),
    _cosmoses(
        "CosmosTextToWorldPipeline",
        "text-to-video",
        _cosmos,
        scheduler=lambda: diffusers.EDMEulerScheduler(sigma_max=80, sigma_data=0.5),
        vae=cosmos_vae(),
    ),
    _cosmoses(
        "CosmosVideoToWorldPipeline",
        "image-to-video",
        lambda: _cosmos(image=picture(64), num_frames=9),
        config={"in_channels": 5},
        scheduler=lambda: diffusers.EDMEulerScheduler(sigma_max=80, sigma_data=0.5),
        vae=cosmos_vae(),
    ),
    _cosmoses("Cosmos2TextToImagePipeline", "text-to-image", _cosmos),
    _cosmoses(
        "Cosmos2VideoToWorldPipeline", "image-to-video", lambda: _cosmos(image=picture(64)), config={"in_channels": 5}
    ),
    TinyPipeline(
        "HunyuanVideo15Pipeline",
        "text-to-video",
        "HunyuanVideo15Transformer3DModel",
        flow(),
        lambda: {**_two(), **SIZE},
        config={"in_channels": 9},
        models={"vae": hunyuan15_vae()},
        parts={"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
    ),
    TinyPipeline(
        "HunyuanImagePipeline",
        "text-to-image",
        "HunyuanImageTransformer2DModel",
        flow(),
        lambda: {**_two(16), "height": 64, "width": 64},
        config={"text_embed_2_dim": 16},
        parts={
            "guider": lambda: diffusers.AdaptiveProjectedMixGuidance(),
            "ocr_guider": lambda: diffusers.AdaptiveProjectedMixGuidance(),
        },
    ),
    TinyPipeline(
        "MotifVideoPipeline",
        "text-to-video",
        "MotifVideoTransformer3DModel",
        flow(),
        lambda: {**prompts("attention"), **SIZE},
        models={"vae": wan_vae()},
        config={"in_channels": 9},
        parts={"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
    ),
    TinyPipeline(
        "SanaVideoPipeline",
        "text-to-video",
        "SanaVideoTransformer3DModel",
        lambda: diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        lambda: {
            **prompts("attention"),
            "negative_prompt": None,
            "height": 64,
            "width": 64,
            "frames": 5,
            "guidance_scale": 3.0,
            "use_resolution_binning": False,
        },
        models={"vae": wan_vae()},
    ),
    TinyPipeline(
        "SanaImageToVideoPipeline",
        "image-to-video",
        "SanaVideoTransformer3DModel",
        flow(),
        lambda: {
            **prompts("attention"),
            "negative_prompt": None,
            "height": 64,
            "width": 64,
            "frames": 5,
            "guidance_scale": 3.0,
            "use_resolution_binning": False,
            "image": picture(64),
        },
        models={"vae": wan_vae()},
    ),
    TinyPipeline(
        "EasyAnimatePipeline",
        "text-to-video",
        "EasyAnimateTransformer3DModel",
        flow(),
        lambda: {**prompts("attention"), **SIZE, "guidance_scale": 3.0},
        models={"vae": magvit_vae()},
    ),
)


def _two(width: int = 16) -> dict[str, Any]:
    given: dict[str, Any] = prompts("mask")
    for side, seed in (("", 5), ("negative_", 6)):
        given |= {f"{side}prompt_embeds_2": text(width, 3, seed), f"{side}prompt_embeds_mask_2": mask(3)}
    return given
