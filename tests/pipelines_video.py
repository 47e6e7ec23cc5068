"""Tiny video pipelines: Wan 2.1 and 2.2, CogVideoX, HunyuanVideo, LTX-Video, Mochi."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from pipelines_base import (
    POOLED_WIDTH,
    TEXT_TOKENS,
    TEXT_WIDTH,
    Dims,
    TinyPipeline,
    assemble,
    caller,
    pooled,
    text,
    text_mask,
)


def frames(small: int, large: int, pixels: int = 64) -> dict[str, Dims]:
    """Size arguments: square frames of ``pixels``, with ``small`` or ``large`` frames."""
    return {
        "small": {"height": pixels, "width": pixels, "num_frames": small},
        "large": {"height": pixels, "width": pixels, "num_frames": large},
    }


def build_wan(experts: int = 1) -> DiffusionPipeline:
    """Wan with one transformer (2.1), or with a high-noise and a low-noise one (2.2)."""

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=4,
            rope_max_seq_len=32,
        )

    return assemble(
        WanPipeline,
        seed=600,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        models=dict.fromkeys(("transformer", "transformer_2")[:experts], transformer),
        boundary_ratio=0.875 if experts == 2 else None,
    )


def build_cogvideox() -> DiffusionPipeline:
    """CogVideoX 5B layout (rotary positions) with the published DDIM settings."""
    return assemble(
        CogVideoXPipeline,
        seed=700,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
        models={
            "transformer": lambda: CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=32,
                text_embed_dim=TEXT_WIDTH,
                num_layers=4,
                sample_width=8,
                sample_height=8,
                max_text_seq_length=TEXT_TOKENS,
                use_rotary_positional_embeddings=True,
            )
        },
    )


def build_hunyuan() -> DiffusionPipeline:
    """HunyuanVideo, guidance-distilled, with 3 double and 3 single blocks and one token refiner block."""
    return assemble(
        HunyuanVideoPipeline,
        seed=800,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        models={
            "transformer": lambda: HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=3,
                num_single_layers=3,
                num_refiner_layers=1,
                text_embed_dim=TEXT_WIDTH,
                pooled_projection_dim=POOLED_WIDTH,
                rope_axes_dim=(4, 6, 6),
            )
        },
    )


def build_ltx() -> DiffusionPipeline:
    """LTX-Video with the published scheduler settings."""
    return assemble(
        LTXPipeline,
        seed=900,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        models={
            "transformer": lambda: LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=16,
                cross_attention_dim=32,
                num_layers=4,
                caption_channels=TEXT_WIDTH,
            )
        },
    )


def build_mochi() -> DiffusionPipeline:
    """Mochi: a text stream narrower than the video stream, and time that runs upwards."""
    return assemble(
        MochiPipeline,
        seed=1000,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        models={
            "transformer": lambda: MochiTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=4,
                pooled_projection_dim=16,
                in_channels=4,
                text_embed_dim=TEXT_WIDTH,
                time_embed_dim=32,
                max_sequence_length=TEXT_TOKENS,
            )
        },
    )


def plain_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    return {"prompt_embeds": text(rows, 1), "negative_prompt_embeds": text(rows, 2)}


def masked_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    masks = {"prompt_attention_mask": text_mask(rows), "negative_prompt_attention_mask": text_mask(rows)}
    return plain_inputs(rows, dims) | masks


def hunyuan_inputs(rows: range, dims: Dims) -> dict[str, Any]:
    extra = {"pooled_prompt_embeds": pooled(rows, 3), "negative_pooled_prompt_embeds": pooled(rows, 4)}
    return masked_inputs(rows, dims) | extra


call_wan = caller(plain_inputs, frames(5, 9), result="frames", guidance_scale=3.0)
call_cogvideox = caller(plain_inputs, frames(5, 9), result="frames", guidance_scale=3.0)
call_hunyuan = caller(hunyuan_inputs, frames(5, 9), result="frames", guidance_scale=6.0)
call_ltx = caller(masked_inputs, frames(9, 17, pixels=128), result="frames", guidance_scale=3.0)
call_mochi = caller(
    masked_inputs, frames(7, 13), result="frames", upstream_warning="In CPU autocast", guidance_scale=3.0
)

VIDEO = (
    TinyPipeline("wan", build_wan, call_wan, branches=2, batched_cfg=False),
    TinyPipeline("wan-2", lambda: build_wan(experts=2), call_wan, branches=2, batched_cfg=False),
    TinyPipeline("cogvideox", build_cogvideox, call_cogvideox, branches=1, batched_cfg=True),
    TinyPipeline("hunyuan", build_hunyuan, call_hunyuan, branches=1, batched_cfg=False),
    TinyPipeline("ltx", build_ltx, call_ltx, branches=1, batched_cfg=True),
    TinyPipeline("mochi", build_mochi, call_mochi, branches=1, batched_cfg=True),
)
