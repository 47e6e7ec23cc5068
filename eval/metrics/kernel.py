"""The kernel distance between two sets of features, whatever the features.

Binkowski et al. 2018, "Demystifying MMD GANs" (arXiv 1801.01401): the squared maximum mean discrepancy under a cubic
kernel. On Inception features it is called KID; on any other features the number carries another name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dita.errors import DitaError

_LARGEST = 1000  # vectors per subset in the published protocol


class KernelDistance(NamedTuple):
    """Mean and population standard deviation of the distance over `subsets` subsets of `subset_size` vectors."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_distance(
    features: torch.Tensor,
    data_features: torch.Tensor,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, averaged over random subsets.

    Its expectation does not depend on how many vectors there are, unlike the Frechet distance's, and is 0 for two sets
    from one distribution: around that, single values are negative half the time. Subsets overlap, so `std` is the
    spread over subsets, not the error of the mean.

    Args:
        features: float [N, D].
        data_features: float [M, D].
        subsets: pairs of subsets, drawn without replacement inside each.
        subset_size: vectors in each, from 2 to the smaller of N and M; the smallest of N, M and 1000 if left out.
            1000 and 100 subsets are the published protocol.
        seed: the subsets depend on it, N and M only.

    Returns:
        Mean and standard deviation over the subsets, and their number and size.

    Raises:
        DitaError: the shapes are not [N, D] and [M, D], a value is NaN or infinite, or the subsets do not fit.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]])
        >>> kernel_distance(x, y, subsets=1)  # 1 + 125 - 2 * (1 + 27 + 1 + 27) / 4
        KernelDistance(mean=98.0, std=0.0, subsets=1, subset_size=2)
    """
    if features.ndim != 2 or data_features.ndim != 2 or features.shape[1] != data_features.shape[1]:
        raise DitaError(
            f"features have shapes {tuple(features.shape)} and {tuple(data_features.shape)}; expected [N, D] and [M, D]"
        )
    smaller = min(len(features), len(data_features))
    size = min(smaller, _LARGEST) if subset_size is None else subset_size
    if subsets < 1 or not 2 <= size <= smaller:
        raise DitaError(
            f"{subsets} subsets of {size} vectors out of {len(features)} and {len(data_features)}; expected at least 1 "
            f"subset of 2 to {smaller}"
        )
    ours, theirs = features.double(), data_features.double()
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise DitaError("features hold NaN or infinite values; find the images that gave them")
    generator = torch.Generator().manual_seed(seed)
    pairs = ((_pick(ours, size, generator), _pick(theirs, size, generator)) for _ in range(subsets))
    values = torch.tensor([_discrepancy(*pair) for pair in pairs], dtype=torch.float64)
    return KernelDistance(values.mean().item(), values.std(correction=0).item(), subsets, size)


def _pick(rows: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]


def _discrepancy(x: torch.Tensor, y: torch.Tensor) -> float:
    size = len(x)
    same = sum(_kernel(part, part).sum() - (part.square().mean(1) + 1).pow(3).sum() for part in (x, y))
    return float(same / (size * (size - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)
