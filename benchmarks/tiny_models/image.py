"""Tiny image transformers in which image and text run side by side, or the text is read by cross-attention."""

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

PIXELS = (1, 4, 2 * SIDE, 2 * SIDE)
"""Latents of models that cut patches of two pixels themselves."""
TOKENS = (1, IMAGE, 8)
"""Latents of models whose pipeline cuts them into tokens."""
_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH}
_PATCHED: dict[str, Any] = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "sample_size": 2 * SIDE}
_FLUX: dict[str, Any] = {
    **_HEADS,
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": ROPE,
}


def _sizes() -> dict[str, torch.Tensor]:
    size = torch.tensor([[32.0, 32.0]])
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}


def _flux(x: torch.Tensor, t: torch.Tensor, **more: Any) -> dict[str, Any]:
    ids = {"img_ids": grid_ids(), "txt_ids": torch.zeros(TEXT, 3)}
    return {"hidden_states": x, "encoder_hidden_states": text(), "timestep": t / 1000, **ids, **more}


def _four_ids(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens, torch.zeros(len(tokens), 1)], 1)


def _hunyuan_dit(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": x, "timestep": t, "encoder_hidden_states": text(), "text_embedding_mask": mask(),
        "encoder_hidden_states_t5": text(seed=2), "text_embedding_mask_t5": mask(),
        "image_rotary_emb": angles(IMAGE, HEAD_WIDTH),
    }  # fmt: skip


IMAGES = (
    TinyModel(
        "AuraFlowTransformer2DModel",
        "image",
        {
            **_PATCHED,
            **_HEADS,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": TEXT_WIDTH,
            "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 64,
        },
        PIXELS,
        lambda x, t: {"hidden_states": x, "encoder_hidden_states": text(), "timestep": t / 1000},
    ),
    TinyModel("BriaTransformer2DModel", "image", {**_FLUX, "pooled_projection_dim": 16}, TOKENS, _flux),
    TinyModel(
        "BriaFiboTransformer2DModel",
        "image",
        {**_FLUX, "text_encoder_dim": TEXT_WIDTH},
        TOKENS,
        lambda x, t: _flux(x, t, text_encoder_layers=[text(seed=n) for n in range(4)]),
    ),
    TinyModel(
        "ChromaTransformer2DModel",
        "image",
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        TOKENS,
        _flux,
    ),
    TinyModel(
        "CogView3PlusTransformer2DModel",
        "image",
        {
            **_PATCHED,
            **_HEADS,
            "num_layers": 3,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
        },
        PIXELS,
        lambda x, t: {"hidden_states": x, "encoder_hidden_states": text(), "timestep": t, **_sizes()},
    ),
    TinyModel(
        "CogView4Transformer2DModel",
        "image",
        {
            **_PATCHED,
            **_HEADS,
            "num_layers": 3,
            "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "rope_axes_dim": (8, 8),
        },
        PIXELS,
        lambda x, t: {"hidden_states": x, "encoder_hidden_states": text(), "timestep": t, **_sizes()},
    ),
    TinyModel(
        "DiTTransformer2DModel",
        "image",
        {**_PATCHED, **_HEADS, "num_layers": 3, "num_embeds_ada_norm": 10},
        PIXELS,
        lambda x, t: {"hidden_states": x, "timestep": t.long(), "class_labels": torch.tensor([3])},
    ),
    TinyModel(
        "DreamLiteTransformer2DModel",
        "image",
        {**_HEADS, "in_channels": WIDTH, "num_layers": 3, "cross_attention_dim": TEXT_WIDTH, "norm_num_groups": 8},
        (1, WIDTH, SIDE, SIDE),
        lambda x, t: {"hidden_states": x, "encoder_hidden_states": text()},
    ),
    TinyModel(
        "FluxTransformer2DModel",
        "image",
        {**_FLUX, "pooled_projection_dim": 16},
        TOKENS,
        lambda x, t: _flux(x, t, pooled_projections=noise(1, 16)),
    ),
    TinyModel(
        "Flux2Transformer2DModel",
        "image",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, "guidance_embeds": False},
        TOKENS,
        lambda x, t: _flux(x, t, img_ids=_four_ids(grid_ids()), txt_ids=torch.zeros(TEXT, 4)),
    ),
    TinyModel(
        "Flux3Transformer2DModel",
        "image",
        {
            **_HEADS,
            "in_channels": 8,
            "cond_in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": TEXT_WIDTH,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        TOKENS,
        lambda x, t: _flux(x, t, img_ids=_four_ids(grid_ids()), txt_ids=torch.zeros(TEXT, 4)),
    ),
    TinyModel(
        "HunyuanDiT2DModel",
        "image",
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 2 * SIDE,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "hidden_size": WIDTH,
            "cross_attention_dim": TEXT_WIDTH,
            "cross_attention_dim_t5": TEXT_WIDTH,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "use_style_cond_and_image_meta_size": False,
        },
        PIXELS,
        _hunyuan_dit,
    ),
    TinyModel(
        "HunyuanImageTransformer2DModel",
        "image",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": TEXT_WIDTH,
            "rope_axes_dim": (8, 8),
        },
        (1, 4, SIDE, SIDE),
        lambda x, t: {
            "hidden_states": x,
            "timestep": t,
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(),
        },
    ),
    TinyModel(
        "LongCatImageTransformer2DModel",
        "image",
        {**_FLUX, "pooled_projection_dim": 16},
        TOKENS,
        _flux,
    ),
    TinyModel(
        "LuminaNextDiT2DModel",
        "image",
        {
            "sample_size": 2 * SIDE,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_layers": 3,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": TEXT_WIDTH,
            "learn_sigma": False,
        },
        PIXELS,
        lambda x, t: {
            "hidden_states": x,
            "timestep": t / 1000,
            "encoder_hidden_states": text(),
            "encoder_mask": mask(),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 8), noise(8, 8, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    TinyModel("OvisImageTransformer2DModel", "image", {**_FLUX, "out_channels": 8}, TOKENS, _flux),
    TinyModel(
        "PixArtTransformer2DModel",
        "image",
        {**_PATCHED, **_HEADS, "num_layers": 3, "cross_attention_dim": WIDTH, "caption_channels": TEXT_WIDTH},
        PIXELS,
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": text(),
            "timestep": t,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    TinyModel(
        "PRXTransformer2DModel",
        "image",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": TEXT_WIDTH,
            "hidden_size": WIDTH,
            "mlp_ratio": 2.0,
            "num_heads": HEADS,
            "depth": 3,
            "axes_dim": (8, 8),
        },
        PIXELS,
        lambda x, t: {"hidden_states": x, "timestep": t / 1000, "encoder_hidden_states": text()},
    ),
    TinyModel(
        "QwenImageTransformer2DModel",
        "image",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 3,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": ROPE,
        },
        TOKENS,
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": text(),
            "encoder_hidden_states_mask": mask(),
            "timestep": t / 1000,
            "img_shapes": [[(1, SIDE, SIDE)]],
        },
    ),
    TinyModel(
        "SanaTransformer2DModel",
        "image",
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
        (1, 4, SIDE, SIDE),
        lambda x, t: {"hidden_states": x, "encoder_hidden_states": text(), "timestep": t},
    ),
    TinyModel(
        "SD3Transformer2DModel",
        "image",
        {
            **_PATCHED,
            **_HEADS,
            "num_layers": 3,
            "joint_attention_dim": TEXT_WIDTH,
            "caption_projection_dim": WIDTH,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        PIXELS,
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": text(),
            "pooled_projections": noise(1, 16),
            "timestep": t,
        },
    ),
    TinyModel(
        "Transformer2DModel",
        "image",
        {**_HEADS, "in_channels": WIDTH, "num_layers": 3, "cross_attention_dim": TEXT_WIDTH, "norm_num_groups": 8},
        (1, WIDTH, SIDE, SIDE),
        lambda x, t: {"hidden_states": x, "encoder_hidden_states": text()},
    ),
)
