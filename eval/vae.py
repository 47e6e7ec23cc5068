"""A lossless module in the VAE's place, so that a stock latent pipeline can draw pixels."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from einops import rearrange


class SpaceToDepthVAE(ModelMixin, ConfigMixin):
    """Moves blocks of pixels into channels and back; has no weights that matter and loses nothing.

    A stage of an `AutoencoderKL` halves the sides; here each of `block_out_channels` after the first does so exactly,
    by moving 2x2 pixels into the channels. Takes images [B, 3, H, W] and videos [B, 3, T, H, W] in [-1, 1]. It carries
    the configuration names that FluxPipeline and WanPipeline read.

    Args:
        block_out_channels: channels after each stage; n stages shrink the sides 2^(n-1) times; only n matters.
        shift_factor: subtracted from latents by FluxPipeline, about the mean pixel.
        scaling_factor: multiplies latents after the shift in FluxPipeline, about one over the pixels' deviation.
        latents_mean: as shift_factor, for WanPipeline, one per channel.
        latents_std: deviation per channel, for WanPipeline.

    Example:
        >>> vae = SpaceToDepthVAE(block_out_channels=(3, 12))
        >>> x = torch.rand(1, 3, 8, 16)
        >>> z = vae.encode(x).latent_dist.mode()
        >>> z.shape, torch.equal(vae.decode(z).sample, x)
        (torch.Size([1, 12, 4, 8]), True)
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (3, 12),
        latent_channels: int = 12,
        z_dim: int = 12,
        shift_factor: float = 0.0,
        scaling_factor: float = 1.0,
        latents_mean: tuple[float, ...] = (0.0,),
        latents_std: tuple[float, ...] = (1.0,),
        scale_factor_spatial: int = 2,
        scale_factor_temporal: int = 1,
    ) -> None:
        super().__init__()
        self.block = 2 ** (len(block_out_channels) - 1)
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # carries dtype and device

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> SimpleNamespace | tuple[SimpleNamespace]:
        """Encode pixels; the "distribution" in `latent_dist` is the latents themselves."""
        latents = rearrange(x, "b c ... (h p) (w q) -> b (c p q) ... h w", p=self.block, q=self.block)
        exact = SimpleNamespace(mode=lambda: latents, sample=lambda generator=None: latents, mean=latents)
        return SimpleNamespace(latent_dist=exact) if return_dict else (exact,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents to pixels."""
        pixels = rearrange(z, "b (c p q) ... h w -> b c ... (h p) (w q)", p=self.block, q=self.block)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
