"""Tiny image transformers with text and image in one sequence, or that pack their tokens in a way of their own."""

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
    grid_ids,
    mask,
    noise,
    text,
)
from tiny_models.image import PIXELS, TOKENS

_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH}
_TEXT_THEN_IMAGE = torch.cat([torch.zeros(TEXT, 3), grid_ids()])


def _fibo2(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    bundle = torch.stack([text(seed=n) for n in range(2)], 1)
    return {"hidden_states": x, "timestep": t / 1000, "encoder_hidden_states": bundle}


def _glm(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    size = torch.tensor([[32.0, 32.0]])
    return {
        "hidden_states": x, "encoder_hidden_states": text(), "prior_token_id": torch.arange(IMAGE)[None],
        "prior_token_drop": torch.zeros(1, IMAGE, dtype=torch.bool), "timestep": t, "target_size": size,
        "crop_coords": torch.zeros(1, 2),
    }  # fmt: skip


def _hidream(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": x, "timesteps": t, "encoder_hidden_states_t5": text(),
        "encoder_hidden_states_llama3": torch.stack([text(seed=n) for n in range(4)]), "pooled_embeds": noise(1, 16),
    }  # fmt: skip


def _ideogram(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    count = TEXT + IMAGE
    return {
        "hidden_states": torch.cat([x.new_zeros(1, TEXT, x.shape[-1]), x], 1), "timestep": t / 1000,
        "encoder_hidden_states": text(count=count), "position_ids": _TEXT_THEN_IMAGE[None].long(),
        "segment_ids": torch.zeros(1, count, dtype=torch.long),
        "indicator": torch.tensor([[3] * TEXT + [2] * IMAGE]),
    }  # fmt: skip


def _omnigen(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    count = TEXT + 1 + IMAGE
    causal = torch.ones(count, count).tril()
    causal[-IMAGE:] = 1  # only the image sees what comes later
    return {
        "hidden_states": x, "timestep": t / 1000, "input_ids": torch.arange(TEXT)[None], "input_img_latents": [],
        "input_image_sizes": {}, "attention_mask": causal[None],
        "position_ids": torch.arange(count)[None],
    }  # fmt: skip


def _qwen21(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    slots = torch.tensor([[False] * TEXT + [True] * (IMAGE // 4)])
    return {
        "hidden_states": x, "encoder_hidden_states": text(), "timestep": t / 1000, "img_shapes": [[(1, SIDE, SIDE)]],
        "img_mask": slots,
    }  # fmt: skip


STREAMS = (
    TinyModel(
        "BriaFibo2Transformer2DModel",
        "image",
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": WIDTH,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "cap_feat_dim": TEXT_WIDTH,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": ROPE,
            "axes_lens": (32, 16, 16),
        },
        PIXELS,
        _fibo2,
    ),
    TinyModel(
        "ErnieImageTransformer2DModel",
        "image",
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_layers": 3,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "text_in_dim": TEXT_WIDTH,
            "rope_axes_dim": ROPE,
        },
        PIXELS,
        lambda x, t: {"hidden_states": x, "timestep": t, "text_bth": text(), "text_lens": torch.tensor([TEXT])},
    ),
    TinyModel(
        "GlmImageTransformer2DModel",
        "image",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": IMAGE,
        },
        PIXELS,
        _glm,
    ),
    TinyModel(
        "HiDreamImageTransformer2DModel",
        "image",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [TEXT_WIDTH, TEXT_WIDTH],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 3],
            "force_inference_output": True,
        },
        PIXELS,
        _hidream,
    ),
    TinyModel(
        "Ideogram4Transformer2DModel",
        "image",
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 3,
            "intermediate_size": 64,
            "adaln_dim": 8,
            "llm_features_dim": TEXT_WIDTH,
            "mrope_section": (4, 2, 2),
        },
        TOKENS,
        _ideogram,
        lambda out: out[0][:, TEXT:],
    ),
    TinyModel(
        "JoyImageEditTransformer3DModel",
        "image",
        {
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "text_dim": TEXT_WIDTH,
            "num_layers": 3,
            "rope_dim_list": list(ROPE),
        },
        (1, 4, 1, 2 * SIDE, 2 * SIDE),
        lambda x, t: {"hidden_states": x, "timestep": t, "encoder_hidden_states": text()},
    ),
    TinyModel(
        "JoyImageEditPlusTransformer3DModel",
        "image",
        {
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "text_dim": TEXT_WIDTH,
            "num_layers": 3,
            "rope_dim_list": list(ROPE),
        },
        (1, IMAGE, 4, 1, 2, 2),
        lambda x, t: {
            "hidden_states": x,
            "timestep": t,
            "encoder_hidden_states": text(),
            "shape_list": [[(1, SIDE, SIDE)]],
        },
    ),
    TinyModel(
        "Krea2Transformer2DModel",
        "image",
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 16,
            "text_hidden_dim": TEXT_WIDTH,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": ROPE,
        },
        TOKENS,
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": noise(1, TEXT, 2, TEXT_WIDTH),
            "timestep": t / 1000,
            "position_ids": _TEXT_THEN_IMAGE,
        },
    ),
    TinyModel(
        "Lumina2Transformer2DModel",
        "image",
        {
            "sample_size": 2 * SIDE,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": ROPE,
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": TEXT_WIDTH,
        },
        PIXELS,
        lambda x, t: {
            "hidden_states": x,
            "timestep": t / 1000,
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(dtype=torch.bool),
        },
    ),
    TinyModel(
        "NucleusMoEImageTransformer2DModel",
        "image",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 5,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": ROPE,
            "num_experts": 2,
            "moe_intermediate_dim": 16,
            "capacity_factors": [1.0] * 5,
        },
        TOKENS,
        lambda x, t: {
            "hidden_states": x,
            "img_shapes": [(1, SIDE, SIDE)],
            "encoder_hidden_states": text(),
            "encoder_hidden_states_mask": mask(dtype=torch.bool),
            "timestep": t / 1000,
        },
    ),
    TinyModel(
        "OmniGenTransformer2DModel",
        "image",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "intermediate_size": 64,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
        },
        PIXELS,
        _omnigen,
    ),
    TinyModel(
        "PriorTransformer",
        "image",
        {
            **_HEADS,
            "num_layers": 3,
            "embedding_dim": 16,
            "num_embeddings": TEXT,
            "additional_embeddings": 4,
            "clip_embed_dim": 16,
        },
        (1, 16),
        lambda x, t: {
            "hidden_states": x,
            "timestep": t,
            "proj_embedding": noise(1, 16),
            "encoder_hidden_states": text(16),
            "attention_mask": mask(dtype=torch.bool),
        },
    ),
    TinyModel(
        "QwenImage21Transformer2DModel",
        "image",
        {
            **_HEADS,
            "patch_size": 1,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "context_in_dim": TEXT_WIDTH,
            "axes_dims_rope": ROPE,
        },
        TOKENS,
        _qwen21,
        lambda out: out[0][:, -IMAGE:],
    ),
    TinyModel(
        "ZImageTransformer2DModel",
        "image",
        {
            "in_channels": 4,
            "dim": WIDTH,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT_WIDTH,
            "axes_dims": ROPE,
            "axes_lens": (128, 16, 16),
        },
        (1, 4, 1, 2 * SIDE, 2 * SIDE),
        lambda x, t: {"x": list(x), "t": t / 1000, "cap_feats": list(text())},
        lambda out: torch.stack(out[0]),
    ),
)
