"""How far a number computed from few samples can be trusted: percentile intervals by resampling.

Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; Efron and Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dita.errors import DitaError

Statistic = Callable[[torch.Tensor], torch.Tensor]

_CHUNK = 4_000_000  # values gathered at a time, 32 MB in float64


class Interval(NamedTuple):
    """A statistic of `count` samples and the interval [low, high] that resampling gives it, in its own units."""

    estimate: float
    low: float
    high: float
    count: int


def bootstrap_interval(
    values: torch.Tensor,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    statistic: Statistic | None = None,
) -> Interval:
    """Percentile bootstrap interval of a statistic of per-sample values.

    The interval covers a little less often than `level` when there are few samples: for the mean of 10 normal values
    about 90 % of the 95 % intervals hold the truth.

    Args:
        values: numbers [N], such as one PSNR per image. Infinite ones are refused: leave them out and say how many.
        level: share of the resampled statistics inside the interval, in (0, 1).
        resamples: how often N values are drawn from the N with replacement.
        seed: the draws depend on it and on N only.
        statistic: maps float64 [..., N] to [...]; the mean if left out. A statistic that depends on the order of the
            values makes no sense here.

    Returns:
        The statistic of `values` itself and the interval. With one value, low and high equal it.

    Raises:
        DitaError: `values` is not [N], is empty or holds NaN or inf; `level` or `resamples` makes no sense; the
            statistic does not return one number per row.

    Example:
        >>> interval = bootstrap_interval(torch.arange(101.0))
        >>> interval.estimate, interval.low < 50 < interval.high, interval.count
        (50.0, True, 101)
    """
    if values.ndim != 1 or values.numel() == 0 or values.is_complex():
        raise DitaError(f"values are {values.dtype} {tuple(values.shape)}; expected at least one number, as [N]")
    samples = _checked(values, level, resamples)
    compute = statistic or _mean
    found = [_apply(compute, samples[rows]) for rows in _draws(len(samples), resamples, seed)]
    return _interval(_apply(compute, samples[None]), torch.cat(found), level, len(samples))


def bootstrap_rows(
    features: torch.Tensor,
    statistic: Callable[[torch.Tensor], float],
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of a set of feature vectors, such as a Frechet distance.

    With the same seed the rows drawn are those of `bootstrap_interval`. A statistic that is biased in few samples is
    biased once more by resampling, since a resample holds each row several times or not at all. The interval of a
    Frechet distance that is not large against its bias in N rows therefore lies wholly above the estimate, even for 40
    rows per feature: then only its width can be read.

    Args:
        features: float [N, D].
        statistic: maps float64 [N, D] to one number.
        level: as in `bootstrap_interval`.
        resamples: how often; the statistic is called once for each and once for `features` itself.
        seed: as in `bootstrap_interval`.

    Raises:
        DitaError: as in `bootstrap_interval`.

    Example:
        >>> from dita.eval.metrics.frechet import Gaussian, frechet_distance
        >>> data = Gaussian(torch.zeros(2).double(), torch.eye(2).double(), 1000)
        >>> rows = 1 + torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> interval = bootstrap_rows(rows, lambda part: frechet_distance(Gaussian.fit(part), data))
        >>> interval.low < 2 < interval.high
        True
    """
    if features.ndim != 2 or features.numel() == 0 or features.is_complex():
        raise DitaError(f"features are {features.dtype} {tuple(features.shape)}; expected numbers [N, D]")
    samples = _checked(features, level, resamples)

    def one(part: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(statistic(part), dtype=torch.float64).reshape(1)

    chunks = _draws(len(samples), resamples, seed)
    found = torch.cat([one(samples[rows]) for chunk in chunks for rows in chunk])
    return _interval(one(samples), found, level, len(samples))


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(-1)


def _checked(values: torch.Tensor, level: float, resamples: int) -> torch.Tensor:
    if not 0 < level < 1 or resamples < 1:
        raise DitaError(f"level is {level}, resamples {resamples}; expected a level inside (0, 1), at least 1 resample")
    samples = values.detach().double().cpu()
    if not samples.isfinite().all():
        wrong = int((~samples.isfinite()).sum())
        raise DitaError(f"{wrong} of {samples.numel()} values are NaN or infinite; leave them out and say how many")
    return samples


def _draws(count: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // count)
    for start in range(0, resamples, rows):
        yield torch.randint(count, (min(rows, resamples - start), count), generator=generator)


def _apply(statistic: Statistic, rows: torch.Tensor) -> torch.Tensor:
    found = statistic(rows)
    if found.shape != rows.shape[:1]:
        raise DitaError(
            f"the statistic maps {tuple(rows.shape)} to {tuple(found.shape)}; expected one number per row, "
            f"{tuple(rows.shape[:1])}: reduce the last dimension only"
        )
    return found.double()


def _interval(estimate: torch.Tensor, found: torch.Tensor, level: float, count: int) -> Interval:
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = found.quantile(tails).tolist()
    return Interval(estimate.item(), low, high, count)
