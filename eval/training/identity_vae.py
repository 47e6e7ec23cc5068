"""A lossless `AutoencoderKL` in closed form, so that a stock latent pipeline can work on pixels.

Diffusers' latent pipelines decode with a VAE. For a model that denoises pixels the VAE has to be the identity, which a
convolutional decoder ending in GroupNorm and SiLU does not offer at first sight. Two facts give it:

- silu(a) - silu(-a) = a, so carrying x and -x in two channels passes SiLU exactly;
- with two more channels holding +M and -M the group has mean 0 and variance (mean(x^2) + M^2) / 2, so that GroupNorm
  is the constant sqrt(2)/M up to a relative error of mean(x^2) / (2 M^2), below 5e-7 for |x| <= 1 and M = 1000.

Everything between is switched off by zero convolutions inside residual blocks.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL

_M = 1000.0


def build_identity_vae(channels: int = 1) -> AutoencoderKL:
    """Build an `AutoencoderKL` with encode(x).mode() == x and decode(x) == x, to about 1e-6 for |x| <= 1 in float32.

    Args:
        channels: image channels, which are the latent channels too.

    Example:
        >>> vae = build_identity_vae(1)
        >>> x = torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)
        >>> bool((vae.decode(x).sample - x).abs().max() < 1e-5)
        True
    """
    width = 2 * channels + 2
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(width,),
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    state = {name: torch.zeros_like(value) for name, value in vae.state_dict().items()}
    for side in ("encoder", "decoder"):
        for channel in range(channels):
            state[f"{side}.conv_in.weight"][2 * channel, channel, 1, 1] = 1.0
            state[f"{side}.conv_in.weight"][2 * channel + 1, channel, 1, 1] = -1.0
            # mean(x^2) is over 2 * channels + 2 channels, of which the last two hold +-M.
            scale = _M * math.sqrt(2 / width)
            state[f"{side}.conv_out.weight"][channel, 2 * channel, 1, 1] = scale
            state[f"{side}.conv_out.weight"][channel, 2 * channel + 1, 1, 1] = -scale
        state[f"{side}.conv_in.bias"][-2] = _M
        state[f"{side}.conv_in.bias"][-1] = -_M
        state[f"{side}.conv_norm_out.weight"].fill_(1.0)
    state["encoder.conv_out.bias"][channels:] = -30.0  # log variance: sampling the posterior returns its mean
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)
