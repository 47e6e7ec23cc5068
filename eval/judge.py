"""All quality numbers of one set of generated garments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.classifier import FashionClassifier, load_classifier
from dita.eval.data import load_fashion_mnist
from dita.eval.metrics import (
    class_accuracy,
    fd_garment,
    frechet_inception_distance,
    garment_perceptual_distance,
    lpips,
    psnr,
    ssim,
    summarize_psnr,
)
from dita.eval.metrics.weights import ALEXNET, INCEPTION, find_weights
from dita.eval.reference import GarmentReference, load_reference


@dataclass
class Judge:
    """The garment classifier, the real data as it sees them, and which of FID and LPIPS can be computed.

    Example:
        >>> Judge().against_data(images, labels)  # doctest: +SKIP
        {'fd_garment': 3.1, 'class_accuracy': 0.93}
    """

    classifier: FashionClassifier = field(default_factory=load_classifier)
    reference: GarmentReference = field(default_factory=load_reference)
    fid: bool = False
    lpips: bool = False
    _real: torch.Tensor | None = field(default=None, repr=False)

    def against_data(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Compare images [N, 1, 32, 32] in [0, 1] of classes `labels` [N] with the real test set."""
        result = {"class_accuracy": class_accuracy(images, labels, self.classifier).overall}
        if len(images) > 1:
            result["fd_garment"] = fd_garment(images, self.reference.test, self.classifier)
        if self.fid:
            if self._real is None:
                self._real = (load_fashion_mnist("test")[0] + 1) / 2
            result["fid"] = frechet_inception_distance(images, self._real, download=False)
        return result

    def against_plain(self, images: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
        """Compare images [N, 1, 32, 32] in [0, 1] one by one with the uncached run's; no PSNR if all are identical."""
        summary = summarize_psnr(psnr(images, plain))
        result: dict[str, Any] = {
            "psnr": summary.mean if math.isfinite(summary.mean) else None,
            "psnr_pooled": summary.pooled if math.isfinite(summary.pooled) else None,
            "psnr_worst": summary.worst if math.isfinite(summary.worst) else None,
            "identical": summary.identical,
            "ssim": ssim(images, plain).mean().item(),
            "perceptual": garment_perceptual_distance(images, plain, self.classifier).mean().item(),
        }
        if self.lpips:
            result["lpips"] = lpips(images, plain, download=False).mean().item()
        return result

    def floor(self, samples: int) -> dict[str, float]:
        """The same numbers for real images: FD-garment of training images, accuracy on the test images."""
        held = len(self.reference.train_features)
        result = {"class_accuracy": self.reference.test_accuracy}
        if 2 <= samples <= held:
            result["fd_garment"] = self.reference.floor(samples)
        return result


def make_judge(published_metrics: bool | None = None) -> Judge:
    """Build the judge of a sweep.

    Args:
        published_metrics: whether FID and LPIPS are computed too. None: those whose weights are on this machine
            already; True: both, downloading the weights if need be; False: neither.

    Raises:
        DitaError: they were demanded and their weights cannot be had.

    Example:
        >>> make_judge(False).fid  # doctest: +SKIP
        False
    """

    def available(name: str) -> bool:
        if published_metrics is False:
            return False
        try:
            find_weights(name, download=bool(published_metrics))
        except DitaError:
            if published_metrics:
                raise
            return False
        return True

    return Judge(fid=available(INCEPTION), lpips=available(ALEXNET))
