"""Tiny film transformers of the Wan family."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models.base import HEAD_WIDTH, HEADS, SIDE, TEXT_WIDTH, TinyModel, noise, text
from tiny_models.video import FILM, FRAMES

_WAN: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_WIDTH,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 3,
}


def _plain(x: torch.Tensor, t: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text(), **more}


def _anyflow(x: torch.Tensor, t: torch.Tensor, **more: Any) -> dict[str, Any]:
    times = t[:, None].expand(-1, x.shape[1])
    return _plain(x, times, r_timestep=times - 100, **more)


def _helios(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    history = {
        f"latents_history_{name}": noise(1, 4, frames, 2 * SIDE, 2 * SIDE, seed=frames)
        for name, frames in (("short", 1), ("mid", 2), ("long", 4))
    }
    places = {
        f"indices_latents_history_{name}": torch.arange(frames)[None]
        for name, frames in (("short", 1), ("mid", 2), ("long", 4))
    }
    return _plain(x, t, indices_hidden_states=torch.arange(FRAMES)[None], **history, **places)


def _animate(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    condition = noise(1, 8, FRAMES + 1, 2 * SIDE, 2 * SIDE)
    return _plain(
        torch.cat([x, condition], 1), t, pose_hidden_states=noise(1, 4, FRAMES, 2 * SIDE, 2 * SIDE),
        face_pixel_values=noise(1, 3, 5, 16, 16), encoder_hidden_states_image=noise(1, 3, 8),
    )  # fmt: skip


def _animate2(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    tokens = FRAMES * SIDE * SIDE
    kept = WanAnimate2KVCache(3)
    for layer in range(3):
        kept.get(layer).store(*(noise(1, tokens, HEADS, HEAD_WIDTH, seed=layer + n) for n in (0, 9)))
    grid = torch.tensor([[FRAMES, SIDE, SIDE]])
    return {
        "hidden_states": list(x), "timestep": t, "encoder_hidden_states": list(text()),
        "condition_latents": list(noise(1, 4, FRAMES, 2 * SIDE, 2 * SIDE)), "kv_cache": kept,
        "kv_cache_mode": "cached", "seq_len": tokens, "reference_grid_sizes": grid, "offset_grid_sizes": grid,
        "origin_len": 4 * FRAMES - 3, "origin_area": (64, 64),
    }  # fmt: skip


def _uncompiled_masks(model: torch.nn.Module) -> None:
    """Put the block mask of a tiny film where the model keeps it; it would compile the code that makes one."""
    from diffusers.models.transformers import transformer_wan_animate_2 as module

    made = module.create_block_mask
    module.create_block_mask = lambda *args, **kwargs: made(*args, **{**kwargs, "_compile": False})
    try:
        model.block_masks[FRAMES, SIDE * SIDE] = model.create_mask(FRAMES, SIDE * SIDE, torch.device("cpu"))  # pyright: ignore
    finally:
        module.create_block_mask = made


WANS = (
    TinyModel("AnyFlowTransformer3DModel", "video", _WAN, (1, FRAMES, 4, 2 * SIDE, 2 * SIDE), _anyflow),
    TinyModel(
        "AnyFlowFARTransformer3DModel",
        "video",
        {**_WAN, "chunk_partition": (1, 1)},
        (1, FRAMES, 4, 2 * SIDE, 2 * SIDE),
        lambda x, t: _anyflow(x, t, chunk_partition=(1, 1)),
    ),
    TinyModel("ChronoEditTransformer3DModel", "video", _WAN, FILM, _plain),
    TinyModel("HeliosTransformer3DModel", "video", {**_WAN, "rope_dim": (4, 6, 6)}, FILM, _helios),
    TinyModel("SkyReelsV2Transformer3DModel", "video", _WAN, FILM, _plain),
    TinyModel("WanTransformer3DModel", "video", _WAN, FILM, _plain),
    TinyModel(
        "WanAnimateTransformer3DModel",
        "video",
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "added_kv_proj_dim": 32,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
            "num_layers": 4,
        },
        (1, 4, FRAMES + 1, 2 * SIDE, 2 * SIDE),
        _animate,
    ),
    TinyModel(
        "WanAnimate2Transformer3DModel",
        "video",
        {
            "text_len": 8,
            "in_dim": 8,
            "dim": HEADS * HEAD_WIDTH,
            "ffn_dim": 64,
            "freq_dim": 16,
            "text_dim": TEXT_WIDTH,
            "out_dim": 4,
            "num_heads": HEADS,
            "num_layers": 3,
            "use_img_emb": False,
        },
        FILM,
        _animate2,
        lambda out: torch.stack(out[0]),
        prepare=_uncompiled_masks,
    ),
    TinyModel(
        "WanVACETransformer3DModel",
        "video",
        {**_WAN, "vace_layers": [0, 2], "vace_in_channels": 6},
        FILM,
        lambda x, t: _plain(x, t, control_hidden_states=noise(1, 6, FRAMES, 2 * SIDE, 2 * SIDE)),
    ),
)
