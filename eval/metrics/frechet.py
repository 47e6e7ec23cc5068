"""The Frechet distance between two Gaussians, whatever the features they were fitted to.

Heusel et al. 2017 (arXiv 1706.08500) use it on Inception features and call that FID; on any other features the number
is another one and carries another name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dita.errors import DitaError


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and unbiased covariance [D, D], float64, of `count` feature vectors."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int

    @classmethod
    def fit(cls, features: torch.Tensor) -> Gaussian:
        """Fit a Gaussian.

        Args:
            features: float [N, D], N at least 2.

        Raises:
            DitaError: fewer than two vectors, or a shape that is not [N, D].

        Example:
            >>> Gaussian.fit(torch.tensor([[0.0], [2.0]])).covariance
            tensor([[2.]], dtype=torch.float64)
        """
        if features.ndim != 2 or len(features) < 2:
            raise DitaError(f"features have shape {tuple(features.shape)}; expected [N, D] with N of at least 2")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root is taken from the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so that singular
    covariances (fewer samples than features) do no harm. Fitted to few samples the distance is biased upwards:
    compare only numbers with the same sample counts.

    Args:
        first: Gaussian over D features.
        second: Gaussian over D features.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        DitaError: the feature counts differ.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> a, b = Gaussian(torch.zeros(2).double(), one, 9), Gaussian(torch.ones(2).double(), 4 * one, 9)
        >>> round(frechet_distance(a, b), 6)
        4.0
    """
    if first.mean.shape != second.mean.shape:
        raise DitaError(f"one Gaussian has {first.mean.numel()} features, the other {second.mean.numel()}")
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    trace = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(0.0, ((first.mean - second.mean).square().sum() + trace).item())
