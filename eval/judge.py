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
    InceptionDistance,
    class_accuracy,
    fd_garment,
    garment_perceptual_distance,
    lpips,
    psnr,
    ssim,
    summarize_psnr,
)
from dita.eval.metrics.pretrained import require
from dita.eval.metrics.weights import ALEXNET, INCEPTION, find_weights
from dita.eval.reference import Reference, load_reference


@dataclass
class Judge:
    """The garment classifier, the real data as it sees them, and whether FID and LPIPS are computed too.

    Example:
        >>> Judge().against_data(images, labels)  # doctest: +SKIP
        {'fd_garment': 3.1, 'class_accuracy': 0.93}
    """

    classifier: FashionClassifier = field(default_factory=load_classifier)
    reference: Reference = field(default_factory=load_reference)
    fid: bool = False
    lpips: bool = False
    device: str | torch.device = "cpu"
    _inception: InceptionDistance | None = field(default=None, repr=False)

    def against_data(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Compare images [N, 1, 32, 32] in [0, 1] of classes `labels` [N] with the real test set."""
        result = {"class_accuracy": class_accuracy(images, labels, self.classifier).overall}
        if len(images) > 1:
            result["fd_garment"] = fd_garment(images, self.reference.test, self.classifier)
        if self.fid:
            if self._inception is None:
                real = (load_fashion_mnist("test")[0] + 1) / 2
                self._inception = InceptionDistance(real.to(self.device), download=False)
            result["fid"] = self._inception(images.to(self.device))
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
            result["lpips"] = self._lpips(images, plain)
        return result

    def _lpips(self, images: torch.Tensor, plain: torch.Tensor) -> float:
        return lpips(images.to(self.device), plain.to(self.device), download=False).mean().item()

    def floor(self, samples: int) -> dict[str, float]:
        """The same numbers for real images: FD-garment of training images, accuracy on the test images."""
        held = len(self.reference.train_features)
        result = {"class_accuracy": self.reference.test_accuracy}
        if 2 <= samples <= held:
            result["fd_garment"] = self.reference.floor(samples)
        return result


def make_judge(published_metrics: bool | None = None, device: str | torch.device = "cpu") -> Judge:
    """Build the judge of a sweep.

    Args:
        published_metrics: whether FID and LPIPS are computed too. True: both, downloading the weights if need be.
            False: neither. None: LPIPS if its weights are on this machine already, FID if besides there is a GPU,
            since its network takes half an hour for the 10,000 test images on a CPU.
        device: where to judge.

    Raises:
        DitaError: they were demanded and their weights or packages cannot be had.

    Example:
        >>> make_judge(False).fid  # doctest: +SKIP
        False
    """
    wanted = {
        "fid": ("torch_fidelity", INCEPTION, torch.device(device).type != "cpu"),
        "lpips": ("torchvision", ALEXNET, True),
    }
    chosen = dict.fromkeys(wanted, False)
    for name, (module, weights, cheap) in wanted.items():
        if published_metrics is False or (published_metrics is None and not cheap):
            continue
        try:
            require(module)
            find_weights(weights, download=bool(published_metrics))
            chosen[name] = True
        except DitaError:
            if published_metrics:
                raise
    return Judge(fid=chosen["fid"], lpips=chosen["lpips"], device=device)
