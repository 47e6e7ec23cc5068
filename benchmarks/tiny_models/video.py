"""Tiny film transformers, those of the Wan family apart."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models.base import (
    HEAD_WIDTH,
    HEADS,
    IMAGE,
    ROPE,
    SIDE,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    TinyModel,
    angles,
    grid_ids,
    mask,
    noise,
    text,
)

FRAMES = 2
FILM = (1, 4, FRAMES, 2 * SIDE, 2 * SIDE)
_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH}
_COG: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 3,
    "sample_width": 2 * SIDE,
    "sample_height": 2 * SIDE,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
}
_HUNYUAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": 16,
    "rope_axes_dim": ROPE,
    "guidance_embeds": False,
}


def _plain(x: torch.Tensor, t: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"hidden_states": x, "encoder_hidden_states": text(), "timestep": t, **more}


def _hunyuan(x: torch.Tensor, t: torch.Tensor, **more: Any) -> dict[str, Any]:
    return _plain(x, t, encoder_attention_mask=mask(), pooled_projections=noise(1, 16), **more)


def _framepack(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    past = {
        f"latents_{name}": noise(1, 4, frames, 2 * SIDE, 2 * SIDE, seed=frames)
        for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4))
    }
    places = {
        f"indices_latents_{name}": torch.arange(frames)
        for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4))
    }
    return _hunyuan(x, t, image_embeds=noise(1, 3, 16), indices_latents=torch.arange(FRAMES), **past, **places)


def _cosmos3(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    places = torch.arange(TEXT, TEXT + FRAMES * IMAGE)
    return {
        "input_ids": torch.arange(TEXT), "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid_ids(FRAMES)]).T.long(), "und_len": TEXT,
        "sequence_length": TEXT + FRAMES * IMAGE, "vision_tokens": [x], "vision_token_shapes": [(FRAMES, SIDE, SIDE)],
        "vision_sequence_indexes": places, "vision_mse_loss_indexes": places,
        "vision_timesteps": t.expand(FRAMES * IMAGE), "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
    }  # fmt: skip


def _kandinsky5(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    places = [torch.arange(n) for n in (FRAMES, SIDE, SIDE)]
    return _plain(x, t, pooled_projections=noise(1, 16), visual_rope_pos=places, text_rope_pos=torch.arange(TEXT))


def _ltx2(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    return _plain(
        x, t, audio_hidden_states=noise(1, 6, 8), audio_encoder_hidden_states=text(seed=2),
        num_frames=FRAMES, height=SIDE, width=SIDE, audio_num_frames=6,
    )  # fmt: skip


def _minimax(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    count, sound = FRAMES * IMAGE, 6
    places = torch.arange(count + sound + TEXT)
    video, audio, words = places[:count], places[count : count + sound], places[count + sound :]
    tags = torch.cat([torch.zeros(count), torch.ones(sound), torch.full((TEXT,), 2.0)]).long()
    ids = torch.cat([grid_ids(FRAMES), torch.arange(sound + TEXT)[:, None].expand(-1, 3)])
    return {
        "hidden_states": x, "audio_hidden_states": noise(1, sound, 8), "encoder_hidden_states": text(),
        "timestep": t, "timestep_indices": torch.zeros_like(tags), "token_tags": tags, "position_ids": ids,
        "video_indices": video, "audio_indices": audio, "text_indices": words,
    }  # fmt: skip


def _sana_wm_refiner(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    cos, sin = angles(FRAMES * IMAGE, WIDTH)
    return _plain(x, t, video_rotary_emb=(cos[None], sin[None]))


FILMS = (
    TinyModel(
        "AllegroTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": WIDTH,
            "sample_height": 2 * SIDE,
            "sample_width": 2 * SIDE,
            "sample_frames": FRAMES,
            "caption_channels": TEXT_WIDTH,
        },
        FILM,
        _plain,
    ),
    TinyModel(
        "CogVideoXTransformer3DModel",
        "video",
        _COG,
        (1, FRAMES, 4, 2 * SIDE, 2 * SIDE),
        _plain,
    ),
    TinyModel(
        "ConsisIDTransformer3DModel",
        "video",
        {
            **_COG,
            "num_layers": 4,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 2,
            "LFE_output_dim": WIDTH * 2 // 3,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 5,
        },
        (1, FRAMES, 4, 2 * SIDE, 2 * SIDE),
        lambda x, t: _plain(x, t, id_cond=noise(1, 8), id_vit_hidden=[noise(1, 2, 8, seed=n) for n in range(5)]),
    ),
    TinyModel(
        "CosmosTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
        },
        FILM,
        lambda x, t: _plain(x, t, padding_mask=torch.zeros(1, 1, 2 * SIDE, 2 * SIDE)),
    ),
    TinyModel(
        "Cosmos3OmniTransformer",
        "video",
        {
            "head_dim": HEAD_WIDTH,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "vocab_size": 32,
            "rope_axes_dim": [4, 2, 2],
        },
        FILM,
        _cosmos3,
        lambda out: torch.cat(out[0]),
    ),
    TinyModel(
        "EasyAnimateTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 2 * SIDE,
            "sample_height": 2 * SIDE,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT_WIDTH,
            "time_position_encoding_type": "3d_rope",
        },
        FILM,
        _plain,
    ),
    TinyModel("HunyuanVideoTransformer3DModel", "video", _HUNYUAN, FILM, _hunyuan),
    TinyModel(
        "HunyuanVideo15Transformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 2,
            "text_embed_dim": TEXT_WIDTH,
            "text_embed_2_dim": 16,
            "image_embed_dim": 8,
            "rope_axes_dim": ROPE,
            "target_size": 32,
        },
        FILM,
        lambda x, t: _plain(
            x,
            t,
            encoder_attention_mask=mask(),
            encoder_hidden_states_2=text(16, 3),
            encoder_attention_mask_2=mask(3),
            image_embeds=noise(1, 2, 8),
        ),
    ),
    TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        "video",
        {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        FILM,
        _framepack,
    ),
    TinyModel(
        "Kandinsky5Transformer3DModel",
        "video",
        {
            "in_visual_dim": 4,
            "in_text_dim": TEXT_WIDTH,
            "in_text_dim2": 16,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": WIDTH,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": ROPE,
        },
        (1, FRAMES, 2 * SIDE, 2 * SIDE, 4),
        _kandinsky5,
    ),
    TinyModel(
        "Kandinsky6Transformer3DModel",
        "video",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT_WIDTH,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": WIDTH,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": ROPE,
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        (1, FRAMES, 2 * SIDE, 2 * SIDE, 4),
        lambda x, t: _plain(x, t, pooled_projections=noise(1, 16), audio_hidden_states=noise(1, 6, 4)),
    ),
    TinyModel(
        "Kandinsky6SRTransformer3DModel",
        "video",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": WIDTH,
            "ff_dim": 64,
            "num_visual_blocks": 3,
            "axes_dims": ROPE,
            "nabla_window": (1, 1, 1),
        },
        (1, 1, 8, 16, 4),
        lambda x, t: {"hidden_states": torch.cat([x, noise(1, 1, 8, 16, 5)], -1), "timestep": t},
    ),
    TinyModel(
        "LatteTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": WIDTH,
            "attention_bias": True,
            "sample_size": 2 * SIDE,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": TEXT_WIDTH,
            "video_length": FRAMES,
        },
        FILM,
        _plain,
    ),
    TinyModel(
        "LTXVideoTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "num_layers": 3,
            "caption_channels": TEXT_WIDTH,
        },
        (1, FRAMES * IMAGE, 8),
        lambda x, t: _plain(x, t, encoder_attention_mask=mask(), num_frames=FRAMES, height=SIDE, width=SIDE),
    ),
    TinyModel(
        "LTX2VideoTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": HEADS,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": TEXT_WIDTH,
        },
        (1, FRAMES * IMAGE, 8),
        _ltx2,
    ),
    TinyModel(
        "MiniMaxH3Transformer3DModel",
        "video",
        {
            **_HEADS,
            "hidden_size": WIDTH,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 2,
            "audio_in_channels": 8,
            "text_dim": TEXT_WIDTH,
            "freq_dim": 16,
            "time_embed_hidden_dim": WIDTH,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        (1, FRAMES * IMAGE, 8),
        _minimax,
    ),
    TinyModel(
        "MochiTransformer3DModel",
        "video",
        {
            **_HEADS,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 16,
            "max_sequence_length": TEXT,
        },
        FILM,
        lambda x, t: _plain(x, t, encoder_attention_mask=mask(dtype=torch.bool)),
    ),
    TinyModel(
        "MotifVideoTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_WIDTH,
            "rope_axes_dim": ROPE,
        },
        FILM,
        lambda x, t: _plain(x, t, encoder_attention_mask=mask()),
    ),
    TinyModel(
        "SanaVideoTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": HEAD_WIDTH,
            "cross_attention_dim": WIDTH,
            "caption_channels": TEXT_WIDTH,
            "sample_size": SIDE,
        },
        FILM,
        _plain,
    ),
    TinyModel(
        "SanaWMTransformer3DModel",
        "video",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "softmax_every_n": 2,
            "linear_head_dim": HEAD_WIDTH,
            "chunk_plucker_channels": 4,
            "caption_channels": TEXT_WIDTH,
            "mlp_ratio": 2.0,
        },
        (1, 4, FRAMES, SIDE, SIDE),
        lambda x, t: _plain(x, t.expand(1, 1, FRAMES), encoder_attention_mask=mask()[:, None, None]),
    ),
    TinyModel(
        "SanaWMLTX2RefinerTransformer3DModel",
        "video",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": HEADS,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": TEXT_WIDTH,
        },
        (1, FRAMES * IMAGE, 8),
        _sana_wm_refiner,
    ),
    TinyModel(
        "TransformerTemporalModel",
        "video",
        {**_HEADS, "in_channels": WIDTH, "num_layers": 3, "norm_num_groups": 8, "cross_attention_dim": WIDTH},
        (8, WIDTH, 2, 2),
        lambda x, t: {"hidden_states": x, "num_frames": 8},
    ),
)
