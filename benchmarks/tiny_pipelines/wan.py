"""Tiny film pipelines of the Wan family, and others that use its VAE."""

from __future__ import annotations

from typing import Any

import diffusers

from tiny_pipelines.base import TinyPipeline, film, picture, prompts
from tiny_pipelines.parts import clip_images, clip_vision, wan_vae

SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}


def _wan(**more: Any) -> dict[str, Any]:
    return {**prompts(), **SIZE, "guidance_scale": 3.0, **more}


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _wans(name: str, task: str, inputs: Any, transformer: str = "WanTransformer3DModel", **options: Any) -> Any:
    models = {"vae": wan_vae(), **options.pop("models", {})}
    return TinyPipeline(name, task, transformer, options.pop("scheduler", _unipc), inputs, models=models, **options)


_EXPERTS: dict[str, Any] = {"holds": ("transformer", "transformer_2"), "parts": {"boundary_ratio": lambda: 0.9}}
_SKYREELS = "SkyReelsV2Transformer3DModel"
_BASE = {"base_num_frames": 5}
_SEEING: dict[str, Any] = {"models": {"image_encoder": clip_vision}, "parts": {"image_processor": clip_images}}
_FORCING: dict[str, Any] = {"transformer": _SKYREELS, "config": {"inject_sample_info": False}}

WANS = (
    _wans("WanPipeline", "text-to-video", _wan),
    _wans("WanPipeline", "text-to-video", _wan, variant="two experts", **_EXPERTS),
    _wans("WanImageToVideoPipeline", "image-to-video", lambda: _wan(image=picture(32)), config={"in_channels": 12}),
    _wans(
        "WanImageToVideoPipeline",
        "image-to-video",
        lambda: _wan(image=picture(32), last_image=picture(32, 6)),
        config={"in_channels": 12},
        variant="two experts",
        **_EXPERTS,
    ),
    _wans("WanVideoToVideoPipeline", "video-to-video", lambda: _wan(video=film(), strength=0.6), steps=7, executed=4),
    _wans(
        "WanVACEPipeline",
        "control, video editing",
        lambda: _wan(video=film(), mask=film(seed=9)),
        "WanVACETransformer3DModel",
        config={"vace_in_channels": 4 + 4 + 64},
    ),
    _wans("LucyEditPipeline", "video editing", lambda: _wan(video=film()), config={"in_channels": 8}),
    _wans(
        "WanAnimatePipeline",
        "animation",
        lambda: _wan(
            image=picture(32), pose_video=film(), face_video=film(seed=20), segment_frame_length=5,
        ),
        "WanAnimateTransformer3DModel",
        **_SEEING,
    ),
    _wans("SkyReelsV2Pipeline", "text-to-video", _wan, _SKYREELS),
    _wans(
        "SkyReelsV2ImageToVideoPipeline",
        "image-to-video",
        lambda: _wan(image=picture(32)),
        _SKYREELS,
        config={"in_channels": 12, "image_dim": 8},
        **_SEEING,
    ),
    _wans("SkyReelsV2DiffusionForcingPipeline", "text-to-video", lambda: _wan(prompt=None, **_BASE), **_FORCING),
    _wans(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "image-to-video",
        lambda: _wan(image=picture(32), **_BASE),
        **_FORCING,
    ),
    _wans(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "video-to-video",
        lambda: _wan(video=film(), overlap_history=1, num_frames=9, **_BASE),
        **_FORCING,
    ),
    _wans(
        "ChronoEditPipeline",
        "editing",
        lambda: _wan(image=picture(32)),
        "ChronoEditTransformer3DModel",
        config={"in_channels": 12, "image_dim": 8},
        **_SEEING,
    ),
    _wans("AnyFlowPipeline", "text-to-video, few steps", _wan, "AnyFlowTransformer3DModel",
          scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler()),
)  # fmt: skip
