"""Forecasts: weighted sums of past features.

Every forecast here is F = sum_j c_j F_j over the anchors F_0 (newest), F_1, ..., with sum_j c_j = 1 and weights that
depend only on the distance k ahead and the gaps d_j = a_{j-1} - a_j between anchors, in solver steps. Constant features
are forecast exactly by all of them, linear ones by order 1 of each basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial

from dita.errors import DitaError

Weights = Callable[[int, Sequence[int]], list[float]]
"""(k, anchors newest first) -> one weight per anchor."""


def taylor_weights(k: int, anchors: Sequence[int]) -> list[float]:
    """Weights of TaylorSeer's backward-difference ladder (arXiv 2503.06923), order len(anchors) - 1.

    The ladder divides every difference by the newest gap only, D_{j+1} = (D_j - D_j at the anchor before) / d_1, and
    extrapolates by sum_j D_j k^j / j!. That is the published form: from order 2 on it does not interpolate the anchors
    (Newton's does), so a quadratic is not forecast exactly.

    Args:
        k: steps from the newest anchor to the step forecast.
        anchors: step numbers of the anchors, newest first, strictly falling.

    Example:
        >>> taylor_weights(2, [10, 4])
        [1.3333333333333333, -0.3333333333333333]
    """
    count = len(anchors)
    # ladder[i] holds the j-th difference at anchor i as a weight vector over the anchors.
    ladder = [[1.0 if i == j else 0.0 for j in range(count)] for i in range(count)]
    weights = [0.0] * count
    for order in range(count):
        scale = k**order / factorial(order)
        weights = [w + scale * d for w, d in zip(weights, ladder[0], strict=True)]
        ladder = [
            [(a - b) / (anchors[i] - anchors[i + 1]) for a, b in zip(ladder[i], ladder[i + 1], strict=True)]
            for i in range(len(ladder) - 1)
        ]
    return weights


def newton_weights(k: int, anchors: Sequence[int]) -> list[float]:
    """Weights of the polynomial through all anchors: exact for polynomials of degree len(anchors) - 1.

    Args and units as in `taylor_weights`.

    Example:
        >>> newton_weights(1, [2, 1, 0])
        [3.0, -3.0, 1.0]
    """
    target = anchors[0] + k
    weights = []
    for i, a in enumerate(anchors):
        weight = 1.0
        for j, b in enumerate(anchors):
            if i != j:
                weight *= (target - b) / (a - b)
        weights.append(weight)
    return weights


BASES: dict[str, Weights] = {"taylor": taylor_weights, "newton": newton_weights}


@dataclass(frozen=True)
class Forecast:
    """How a skipped feature is had from past ones.

    Attributes:
        order: 0 reuses the newest anchor; m uses m + 1 anchors, fewer while there are fewer.
        basis: "taylor" or "newton"; the same up to order 1.
    """

    order: int = 0
    basis: str = "taylor"

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or not 0 <= self.order <= 3:
            raise DitaError(f"order is {self.order!r}; expected a whole number from 0 (reuse) to 3")
        if self.basis not in BASES:
            raise DitaError(f"basis is {self.basis!r}; expected one of {', '.join(BASES)}")

    @property
    def anchors(self) -> int:
        """Anchors it can use."""
        return self.order + 1

    def weights(self, step: int, anchors: Sequence[int]) -> list[float]:
        """One weight per anchor (newest first) for `step`; they sum to 1.

        Example:
            >>> Forecast(order=0).weights(7, [5])
            [1.0]
        """
        return BASES[self.basis](step - anchors[0], anchors[: self.anchors])
