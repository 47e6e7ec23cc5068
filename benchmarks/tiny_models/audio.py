"""Tiny transformers for sound, and for molecules."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models.base import HEAD_WIDTH, HEADS, TEXT_WIDTH, WIDTH, TinyModel, angles, mask, noise, text

LENGTH = 16
SOUND = (1, LENGTH, 8)
"""Latents with channels last."""
WAVE = (1, 8, LENGTH)
"""Latents with channels before time."""
_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH}


def _t5_film(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    return {
        "encodings_and_masks": [(text(WIDTH), mask(dtype=torch.bool))], "decoder_input_tokens": x,
        "decoder_noise_time": t / 1000,
    }  # fmt: skip


def _protein(x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    rows = torch.zeros(1, LENGTH, dtype=torch.bool)
    return {
        "bb_ca": x[..., :3], "local_latents": x[..., 3:], "bb_ca_time": t / 1000, "local_latents_time": t / 1000,
        "padding_mask": mask(LENGTH, torch.bool),
        "conditioning": {"is_in_context_conditioning": rows, "supports_local_latent": ~rows},
    }  # fmt: skip


SOUNDS = (
    TinyModel(
        "AceStepTransformer1DModel",
        "audio",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "head_dim": HEAD_WIDTH,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 4,
            "encoder_hidden_size": TEXT_WIDTH,
        },
        SOUND,
        lambda x, t: {
            "hidden_states": x,
            "timestep": t / 1000,
            "timestep_r": t / 1000,
            "encoder_hidden_states": text(),
            "context_latents": noise(1, LENGTH, 16),
        },
    ),
    TinyModel(
        "LongCatAudioDiTTransformer",
        "audio",
        {
            "dit_dim": WIDTH,
            "dit_depth": 3,
            "dit_heads": HEADS,
            "dit_text_dim": TEXT_WIDTH,
            "latent_dim": 8,
            "ff_mult": 2.0,
        },
        SOUND,
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(),
            "timestep": t / 1000,
            "latent_cond": noise(1, LENGTH, 8),
        },
    ),
    TinyModel(
        "MiniMaxMusic3RVQDepthDecoder",
        "audio",
        {
            "hidden_size": WIDTH,
            "num_layers": 3,
            "num_attention_heads": HEADS,
            "intermediate_size": 64,
            "audio_vocab_size": 16,
            "num_codebooks": 8,
        },
        (1, 8, WIDTH),
        lambda x, t: {"inputs_embeds": x},
        lambda out: out,
    ),
    TinyModel(
        "MiniMaxMusic3Transformer1DModel",
        "audio",
        {
            **_HEADS,
            "in_channels": 8,
            "condition_dim": TEXT_WIDTH,
            "num_layers": 3,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        WAVE,
        lambda x, t: {
            "hidden_states": x,
            "timestep": t / 1000,
            "encoder_hidden_states": text(count=LENGTH),
        },
    ),
    TinyModel(
        "StableAudioDiTModel",
        "audio",
        {
            **_HEADS,
            "sample_size": LENGTH,
            "in_channels": 8,
            "num_layers": 3,
            "num_key_value_attention_heads": 1,
            "out_channels": 8,
            "cross_attention_dim": WIDTH,
            "time_proj_dim": 8,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": TEXT_WIDTH,
        },
        WAVE,
        lambda x, t: {
            "hidden_states": x,
            "timestep": t / 1000,
            "encoder_hidden_states": text(),
            "global_hidden_states": noise(1, 1, 16),
            "rotary_embedding": angles(LENGTH + 1, HEAD_WIDTH // 2),
        },
    ),
    TinyModel(
        "StableAudio3DiTModel",
        "audio",
        {
            "io_channels": 8,
            "embed_dim": WIDTH,
            "depth": 3,
            "num_heads": HEADS,
            "cond_token_dim": TEXT_WIDTH,
            "global_cond_dim": 16,
            "local_add_cond_dim": 4,
            "timestep_features_dim": 16,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        WAVE,
        lambda x, t: {
            "hidden_states": x,
            "timestep": t / 1000,
            "encoder_hidden_states": text(),
            "global_hidden_states": noise(1, 16),
        },
    ),
    TinyModel(
        "T5FilmDecoder",
        "audio",
        {
            "input_dims": 8,
            "targets_length": LENGTH,
            "d_model": WIDTH,
            "num_layers": 3,
            "num_heads": HEADS,
            "d_kv": HEAD_WIDTH,
            "d_ff": 64,
        },
        SOUND,
        _t5_film,
        lambda out: out,
    ),
)

OTHERS = (
    TinyModel(
        "RFD4ProteinaTransformer",
        "other",
        {
            "nlayers": 4,
            "token_dim": WIDTH,
            "nheads": HEADS,
            "dim_cond": 16,
            "pair_repr_dim": 8,
            "latent_dim": 5,
            "token_type_emb_dim": 4,
            "cath_emb_dim": 4,
            "t_emb_dim": 8,
            "seq_sep_dim": 5,
            "xt_pair_dist_dim": 4,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca",),
            "tri_mult_c": 8,
        },
        (1, LENGTH, 8),
        _protein,
        lambda out: torch.cat([out[0], out[1]], -1),
    ),
)
