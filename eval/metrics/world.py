"""Distance between samples of the bundled world, as its network sees them. Not LPIPS and never called so."""

from __future__ import annotations

import torch

from dita.eval.classifier import in_batches
from dita.eval.metrics.garment import unit_difference
from dita.eval.metrics.pixel import check_pair
from dita.eval.worldnet import WorldNet, views_of


@torch.no_grad()
def world_perceptual_distance(media: torch.Tensor, reference: torch.Tensor, net: WorldNet) -> torch.Tensor:
    """Distance of each sample to its reference over the layers of the world network.

    At each of the five feature maps both channel vectors are scaled to unit length; the squared difference is summed
    over channels and averaged over pixels, layers and views (the halves of a scene, the frames of a clip). The recipe
    is that of Zhang et al. 2018 (arXiv 1801.03924) without learned weights, on another network.

    Args:
        media: scenes float [N, 3, 32, 64] or clips [N, frames, 3, 32, 32], in [0, 1].
        reference: the same shape.
        net: from `load_worldnet`.

    Returns:
        float32 [N], from 0 for identical samples to 2.

    Raises:
        DitaError: shapes differ or values leave [0, 1].

    Example:
        >>> x = torch.rand(3, 3, 32, 64)
        >>> world_perceptual_distance(x, x, WorldNet().eval())
        tensor([0., 0., 0.])
    """
    one, two = views_of(media), views_of(reference)
    first, second = check_pair(one.flatten(0, 1), two.flatten(0, 1))
    pairs = torch.stack([first, second], 1)
    total = in_batches(lambda part: unit_difference(part[:, 0], part[:, 1], net), pairs, batch=250)
    return total.unflatten(0, one.shape[:2]).mean(1)
