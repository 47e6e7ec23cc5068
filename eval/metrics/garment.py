"""Metrics on the bundled garment classifier. They are neither FID nor LPIPS and are never called so."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dita.errors import DitaError
from dita.eval.classifier import FashionClassifier, in_batches
from dita.eval.metrics.frechet import Gaussian, frechet_distance
from dita.eval.metrics.pixel import check_images, check_pair

if TYPE_CHECKING:
    from dita.eval.worldnet import WorldNet


@torch.no_grad()
def garment_perceptual_distance(
    images: torch.Tensor, reference: torch.Tensor, classifier: FashionClassifier
) -> torch.Tensor:
    """Distance of each image to its reference as the garment classifier sees them.

    At each of the five feature maps both images' channel vectors are scaled to unit length; the squared difference is
    summed over channels and averaged over pixels; the five numbers are averaged. The recipe is that of Zhang et al.
    2018 (arXiv 1801.03924) without learned weights, on another network: not LPIPS.

    Args:
        images: float [N, 1, 32, 32] in [0, 1].
        reference: the same shape.
        classifier: from `load_classifier`.

    Returns:
        float32 [N], from 0 for identical images to 2.

    Raises:
        DitaError: shapes differ or values leave [0, 1].

    Example:
        >>> x = torch.rand(3, 1, 32, 32)
        >>> garment_perceptual_distance(x, x, FashionClassifier().eval())
        tensor([0., 0., 0.])
    """
    images, reference = check_pair(images, reference)
    pairs = torch.stack([images, reference], 1)
    return in_batches(lambda part: unit_difference(part[:, 0], part[:, 1], classifier), pairs)


def unit_difference(images: torch.Tensor, reference: torch.Tensor, net: FashionClassifier | WorldNet) -> torch.Tensor:
    """Squared difference of unit-length channel vectors over the maps of `net`, float [N]; images in [0, 1]."""
    total = torch.zeros(len(images), device=images.device)
    maps, others = net.maps(2 * images - 1), net.maps(2 * reference - 1)
    for one, two in zip(maps, others, strict=True):
        one = torch.nn.functional.normalize(one, dim=1)
        two = torch.nn.functional.normalize(two, dim=1)
        total += (one - two).square().sum(1).mean((1, 2))
    return total / len(maps)


def garment_features(images: torch.Tensor, classifier: FashionClassifier) -> torch.Tensor:
    """Compute the classifier's feature layer: images float [N, 1, 32, 32] in [0, 1] to float32 [N, 64].

    Example:
        >>> garment_features(torch.rand(3, 1, 32, 32), FashionClassifier().eval()).shape
        torch.Size([3, 64])
    """
    return in_batches(lambda part: classifier.features(2 * part - 1), check_images(images))


def fd_garment(images: torch.Tensor, data: Gaussian, classifier: FashionClassifier) -> float:
    """Frechet distance of images to data on the garment classifier's features ("FD-garment"; not FID).

    Args:
        images: float [N, 1, 32, 32] in [0, 1]; N is part of the result, see `frechet_distance`.
        data: `Gaussian.fit(garment_features(real_images, classifier))`.
        classifier: the same one.

    Raises:
        DitaError: values leave [0, 1], or there are fewer than two images.

    Example:
        >>> net, x = FashionClassifier().eval(), torch.rand(8, 1, 32, 32)
        >>> fd_garment(x, Gaussian.fit(garment_features(x, net)), net) < 1e-6
        True
    """
    return frechet_distance(Gaussian.fit(garment_features(images, classifier)), data)


class ClassAccuracy(NamedTuple):
    """Share of images recognised as the class asked for, in [0, 1]: over all, and by class label."""

    overall: float
    per_class: dict[int, float]


def class_accuracy(images: torch.Tensor, labels: torch.Tensor, classifier: FashionClassifier) -> ClassAccuracy:
    """Share of images that the classifier assigns to the class that was asked for.

    Args:
        images: float [N, 1, 32, 32] in [0, 1].
        labels: int64 [N].
        classifier: from `load_classifier`.

    Raises:
        DitaError: there are not as many labels as images.

    Example:
        >>> class_accuracy(torch.rand(4, 1, 32, 32), torch.arange(4), FashionClassifier().eval()).overall <= 1
        True
    """
    images = check_images(images)
    if labels.shape != (len(images),):
        raise DitaError(f"labels have shape {tuple(labels.shape)}; expected [{len(images)}], one for each image")
    labels = labels.to(images.device)
    right = in_batches(lambda part: classifier(2 * part - 1).argmax(1), images) == labels
    present = labels.unique().tolist()
    return ClassAccuracy(
        right.float().mean().item(),
        {label: right[labels == label].float().mean().item() for label in present},
    )
