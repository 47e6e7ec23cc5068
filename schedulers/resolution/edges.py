"""Which tokens of a small picture to enlarge first: those with most edges."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

_WEAK, _STRONG = 100.0, 200.0  # thresholds on gradients of grey values from 0 to 255, as for Canny's detector
_GREY = (0.299, 0.587, 0.114)


def gradient(planes: torch.Tensor) -> torch.Tensor:
    """|d/dx| + |d/dy| by Sobel's filters, of every plane.

    Args:
        planes: float [..., H, W].

    Returns:
        of the same shape.

    Example:
        >>> gradient(torch.tensor([[[0.0, 0.0, 1.0, 1.0]] * 3]))[0, 1]
        tensor([0., 4., 4., 0.])
    """
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=planes.device)
    both = torch.stack([kernel, kernel.T])[:, None]
    flat = F.pad(planes.float().reshape(-1, 1, *planes.shape[-2:]), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(flat, both).abs().sum(1).reshape(planes.shape)


def edge_scores(pictures: torch.Tensor, grid: tuple[int, int], coloured: bool) -> torch.Tensor:
    """How much of each token's place is edge.

    Args:
        pictures: float [N, C, H, W]; coloured ones have 3 channels in [0, 1].
        grid: rows and columns of tokens.
        coloured: grey values count, from not at all below a gradient of 100 to fully above 200; without, the gradients
            of all channels are summed as they are.

    Returns:
        float [N, rows * columns].

    Example:
        >>> picture = torch.zeros(1, 3, 8, 8)
        >>> picture[..., 6:] = 1
        >>> edge_scores(picture, (2, 2), coloured=True).round(decimals=2)
        tensor([[0.00, 0.50, 0.00, 0.50]])
    """
    if coloured:
        grey = torch.einsum("nchw, c -> nhw", pictures.float().clamp(0, 1), pictures.new_tensor(_GREY).float())
        steepness = gradient(255 * grey)
        # Where no place has an edge, the steepest ones still come first.
        marks = ((steepness - _WEAK) / (_STRONG - _WEAK)).clamp(0, 1) + 1e-6 * steepness
    else:
        marks = gradient(pictures).sum(1)
    return F.adaptive_avg_pool2d(marks[:, None], grid).flatten(1)


def decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """Pictures in [0, 1], float32 [B, 3, H, W], of latents [B, C, 1, h, w]; None without a decoder of pictures.

    Args:
        pipe: whose `vae` decodes as its own pipeline has it: z / scaling_factor + shift_factor.
        latents: of one frame; a film is not decoded, which would cost more than what is gained.
    """
    vae = getattr(pipe, "vae", None)
    scale = getattr(getattr(vae, "config", None), "scaling_factor", None)
    if vae is None or latents.shape[2] != 1 or not isinstance(scale, (int, float)):
        return None
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures = vae.decode((latents[:, :, 0] / scale + shift).to(vae.dtype), return_dict=False)[0].float()
    return (pictures / 2 + 0.5).to(latents.device) if pictures.ndim == 4 and pictures.shape[1] == 3 else None


def most_edges(pipe: Any, clean: torch.Tensor, grid: tuple[int, int], count: int, decode: bool) -> torch.Tensor:
    """The tokens with most edges in each frame.

    Args:
        pipe: the pipeline.
        clean: estimate of x0, [B, C, F, H, W].
        grid: rows and columns of tokens.
        count: how many.
        decode: look at the decoded picture where there is a decoder, not at the latents.

    Returns:
        int64 [B, F, count], rising.
    """
    pictures = decoded(pipe, clean) if decode else None
    planes = rearrange(clean, "b c f h w -> (b f) c h w") if pictures is None else pictures
    scores = edge_scores(planes, grid, pictures is not None)
    return scores.topk(count).indices.sort().values.view(clean.shape[0], clean.shape[2], count)
