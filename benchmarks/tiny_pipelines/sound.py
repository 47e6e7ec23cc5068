"""Tiny pipelines for sound, films with sound, shapes, and embeddings of images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from tiny_pipelines.base import POOLED, TEXT_WIDTH, TinyPipeline, dynamic, mask, noise, prompts, text

_LENGTH = 16


class Sizes(SimpleNamespace):
    """Stands for a VAE where a pipeline that returns latents only asks for its sizes."""


def _oobleck() -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=8,
        sampling_rate=16,
    )


def _projection() -> Any:
    from diffusers import StableAudioProjectionModel

    return StableAudioProjectionModel(
        text_encoder_dim=TEXT_WIDTH, conditioning_dim=TEXT_WIDTH, min_value=0, max_value=8
    )


def _duration() -> Any:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    return StableAudio3DurationEmbedder(output_dim=TEXT_WIDTH, fourier_dim=8)


def _same() -> Any:
    return Sizes(config=SimpleNamespace(sampling_rate=16, latent_dim=8), downsampling_ratio=4)


def _connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=TEXT_WIDTH // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=TEXT_WIDTH // 2,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )


def _ltx2_vae() -> Any:
    config = SimpleNamespace(scaling_factor=1.0, timestep_conditioning=False)
    return Sizes(
        latents_mean=torch.zeros(8), latents_std=torch.ones(8), config=config,
        spatial_compression_ratio=8, temporal_compression_ratio=4,
    )  # fmt: skip


def _ltx2_audio() -> Any:
    config = SimpleNamespace(sample_rate=160, mel_hop_length=10, mel_bins=8, latent_channels=2)
    return Sizes(
        latents_mean=torch.zeros(8), latents_std=torch.ones(8), config=config,
        mel_compression_ratio=2, temporal_compression_ratio=1,
    )  # fmt: skip


def _ltx2(**more: Any) -> dict[str, Any]:
    given = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0}
    return {**prompts("attention"), **given, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0, **more}


def _unclip() -> Any:
    return diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
    )


def _words(pipe: Any) -> None:
    """Answer for text encoders that take words only."""

    def encode(*_: Any) -> Any:
        words = torch.cat([text(POOLED, seed=2), text(POOLED)])
        return noise(2, POOLED), words, mask(dtype=torch.bool).expand(2, -1)

    pipe._encode_prompt = encode
    if hasattr(pipe, "get_zero_embed"):
        pipe.get_zero_embed = lambda *_, **__: torch.zeros(1, POOLED)


SOUNDS = (
    TinyPipeline(
        "StableAudioPipeline",
        "text-to-audio",
        "StableAudioDiTModel",
        lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=5.0),
        lambda: {
            **prompts(),
            "attention_mask": mask(),
            "negative_attention_mask": mask(),
            "audio_end_in_s": 4.0,
            "guidance_scale": 3.0,
        },
        config={"global_states_input_dim": 2 * TEXT_WIDTH},
        models={"vae": _oobleck, "projection_model": _projection},
    ),  # fmt: skip
    TinyPipeline(
        "StableAudio3Pipeline",
        "text-to-audio",
        "StableAudio3DiTModel",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        lambda: {
            "prompt_embeds": text(),
            "encoder_attention_mask": mask(),
            "negative_prompt_embeds": text(seed=2),
            "negative_encoder_attention_mask": mask(),
            "duration": 4.0,
            "guidance_scale": 3.0,
        },
        config={"global_cond_dim": TEXT_WIDTH},
        models={"duration_embedder": _duration},
        parts={"vae": _same},
    ),  # fmt: skip
    TinyPipeline(
        "LTX2Pipeline",
        "text-to-video with sound",
        "LTX2VideoTransformer3DModel",
        dynamic(),
        _ltx2,
        models={"connectors": _connectors},
        parts={"vae": _ltx2_vae, "audio_vae": _ltx2_audio},
    ),
    TinyPipeline(
        "ShapEPipeline",
        "text-to-3D",
        "PriorTransformer",
        lambda: diffusers.HeunDiscreteScheduler(
            beta_schedule="exp", num_train_timesteps=64, prediction_type="sample", use_karras_sigmas=True
        ),
        lambda: {"prompt": "", "guidance_scale": 3.0},
        config={
            "additional_embeddings": 0,
            "num_embeddings": _LENGTH,
            "time_embed_act_fn": "gelu",
            "norm_in_type": "layer",
            "encoder_hid_proj_type": None,
            "added_emb_type": None,
            "embedding_proj_norm_type": None,
            "clip_embed_dim": 32,
        },
        holds=("prior",),
        prepare=lambda pipe: setattr(pipe, "_encode_prompt", lambda *_: noise(2, POOLED)),
    ),
    TinyPipeline(
        "KandinskyV22PriorPipeline",
        "text to image embedding",
        "PriorTransformer",
        _unclip,
        lambda: {"prompt": "", "guidance_scale": 3.0},
        holds=("prior",),
        output="pt",
        prepare=_words,
    ),
    TinyPipeline(
        "KandinskyPriorPipeline",
        "text to image embedding",
        "PriorTransformer",
        _unclip,
        lambda: {"prompt": "", "guidance_scale": 3.0},
        holds=("prior",),
        output="pt",
        prepare=_words,
    ),
)
