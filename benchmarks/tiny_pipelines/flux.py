"""Tiny pipelines of the Flux family."""

from __future__ import annotations

from typing import Any

import diffusers

from tiny_pipelines.base import PIXELS, POOLED, TEXT_WIDTH, TinyPipeline, dynamic, hole, picture, prompts
from tiny_pipelines.parts import vae

SIZE: dict[str, Any] = {"height": PIXELS, "width": PIXELS}
_VAE = {"vae": vae(2)}
_T = "FluxTransformer2DModel"


def _inputs(**more: Any) -> dict[str, Any]:
    given = prompts("pooled")
    return {**{k: v for k, v in given.items() if not k.startswith("negative")}, **SIZE, "guidance_scale": 3.5, **more}


def _guided(**more: Any) -> dict[str, Any]:
    return {**prompts("pooled"), **SIZE, "guidance_scale": 3.5, "true_cfg_scale": 3.0, **more}


def _controlnet() -> Any:
    return diffusers.FluxControlNetModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=[4, 6, 6],
    )


def _flux(name: str, task: str, inputs: Any, **options: Any) -> TinyPipeline:
    return TinyPipeline(name, task, _T, dynamic(), inputs, models={**_VAE, **options.pop("models", {})}, **options)


_CONTROL = {"in_channels": 16, "out_channels": 8}
FLUXES = (
    _flux("FluxPipeline", "text-to-image", _inputs),
    _flux("FluxPipeline", "text-to-image", _guided, variant="true guidance"),
    _flux("FluxImg2ImgPipeline", "image-to-image", lambda: _inputs(image=picture(), strength=0.6), steps=6, executed=4),
    _flux(
        "FluxInpaintPipeline",
        "inpainting",
        lambda: _inputs(image=picture(), mask_image=hole(), strength=0.6),
        steps=6,
        executed=4,
    ),
    _flux(
        "FluxFillPipeline",
        "inpainting",
        lambda: _inputs(image=picture(), mask_image=hole()),
        config={"in_channels": 8 + 8 + 16, "out_channels": 8},
    ),
    _flux(
        "FluxKontextPipeline",
        "editing",
        lambda: _guided(image=picture(), max_area=PIXELS * PIXELS, _auto_resize=False),
    ),
    _flux(
        "FluxKontextInpaintPipeline",
        "editing",
        lambda: _inputs(image=picture(), mask_image=hole(), strength=0.6, max_area=PIXELS * PIXELS, _auto_resize=False),
        steps=6,
        executed=4,
    ),
    _flux("FluxControlPipeline", "control", lambda: _inputs(control_image=picture()), config=_CONTROL),
    _flux(
        "FluxControlImg2ImgPipeline",
        "control, image-to-image",
        lambda: _inputs(control_image=picture(), image=picture(seed=6), strength=0.6),
        config=_CONTROL,
        steps=6,
        executed=4,
    ),
    _flux(
        "FluxControlInpaintPipeline",
        "control, inpainting",
        lambda: _inputs(control_image=picture(), image=picture(seed=6), mask_image=hole(), strength=0.6),
        config=_CONTROL,
        steps=6,
        executed=4,
    ),
    _flux(
        "FluxControlNetPipeline",
        "control",
        lambda: _inputs(control_image=picture()),
        models={"controlnet": _controlnet},
    ),
    _flux(
        "FluxControlNetImg2ImgPipeline",
        "control, image-to-image",
        lambda: _inputs(control_image=picture(), image=picture(seed=6), strength=0.6),
        models={"controlnet": _controlnet},
        steps=6,
        executed=4,
    ),
    _flux(
        "FluxControlNetInpaintPipeline",
        "control, inpainting",
        lambda: _inputs(control_image=picture(), image=picture(seed=6), mask_image=hole(), strength=0.6),
        models={"controlnet": _controlnet},
        steps=6,
        executed=4,
    ),
)
