"""Tiny VAEs, text and image encoders that pipelines share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

_VAES: Any = diffusers  # whose annotations are narrower than what it takes


def vae(channels: int = 4, levels: int = 2) -> Callable[[], Any]:
    """A VAE of images that halves rows and columns at every level but the first."""
    return lambda: _VAES.AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def wan_vae(channels: int = 4, cls: str = "AutoencoderKLWan") -> Callable[[], Any]:
    """A VAE of films: 8 pixels and 4 frames to one."""
    return lambda: getattr(diffusers, cls)(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def pooling_vae(channels: int = 2) -> Callable[[], Any]:
    """A VAE of images, 64 pixels to one, that takes their means: some pipelines bring every image to a megapixel."""
    return lambda: _Pooling(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * 7,
        num_res_blocks=1,
        temperal_downsample=[False] * 6,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


class _Pooling(diffusers.AutoencoderKLQwenImage):
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        pooled = torch.nn.functional.avg_pool3d(x, (1, 64, 64))[:, : self.config["z_dim"]]
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([pooled, pooled * 0], 1)))


def clip_vision(width: int = 8) -> Any:
    """An encoder of images, as five tokens."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=width,
        )
    )


def clip_images() -> Any:
    """What prepares images for it."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def cog_vae(channels: int = 4) -> Callable[[], Any]:
    """A VAE of films: 2 pixels and 2 frames to one."""
    return lambda: _VAES.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )


def hunyuan_vae(channels: int = 4) -> Callable[[], Any]:
    """A VAE of films: 8 pixels and 4 frames to one."""
    return lambda: _VAES.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def ltx_vae(channels: int = 8) -> Callable[[], Any]:
    """A VAE of films: 8 pixels and 8 frames to one."""
    return lambda: _VAES.AutoencoderKLLTXVideo(
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        patch_size=1,
    )


def hunyuan15_vae(channels: int = 4) -> Callable[[], Any]:
    """A VAE of films: 16 pixels and 4 frames to one."""
    return lambda: _VAES.AutoencoderKLHunyuanVideo15(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )


def magvit_vae(channels: int = 4) -> Callable[[], Any]:
    """A VAE of films: 8 pixels and 4 frames to one."""
    return lambda: _VAES.AutoencoderKLMagvit(
        latent_channels=channels, block_out_channels=[4, 4, 4, 4], layers_per_block=1, norm_num_groups=2
    )


def cosmos_vae(channels: int = 4) -> Callable[[], Any]:
    """A VAE of films: 8 pixels and 8 frames to one."""
    return lambda: _VAES.AutoencoderKLCosmos(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(1,),
        resolution=16,
        num_layers=1,
        patch_size=4,
        latents_mean=None,
        latents_std=None,
    )
