"""Forecasts: weighted sums of past features.

Every forecast here is F = sum_j c_j F_j over the anchors F_0 (newest), F_1, ..., with sum_j c_j = 1 and weights that
depend only on the distance k ahead and the gaps d_j = a_{j-1} - a_j between anchors, in solver steps. Constant features
are forecast exactly by all of them, linear ones by order 1 of each basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, factorial

from dita.caching.history import Entry, History, makes
from dita.caching.storage import Storage
from dita.errors import DitaError
from dita.seams import Call, Features, Site

Weights = Callable[[int, Sequence[int]], list[float]]
"""(k, anchors newest first) -> one weight per anchor."""


def ladder_weights(terms: Sequence[float], anchors: Sequence[int]) -> list[float]:
    """Weights of sum_j D_j terms[j] / j! over TaylorSeer's backward-difference ladder (arXiv 2503.06923).

    The ladder divides every difference by the newest gap only, D_{j+1} = (D_j - D_j at the anchor before) / d_1.

    Args:
        terms: what the j-th difference is multiplied by, besides 1 / j!; one per anchor.
        anchors: step numbers of the anchors, newest first, strictly falling.

    Example:
        >>> ladder_weights([1, 2], [10, 4])
        [1.3333333333333333, -0.3333333333333333]
    """
    count = len(anchors)
    # ladder[i] holds the j-th difference at anchor i as a weight vector over the anchors.
    ladder = [[1.0 if i == j else 0.0 for j in range(count)] for i in range(count)]
    weights = [0.0] * count
    for order, term in enumerate(terms[:count]):
        scale = term / factorial(order)
        weights = [w + scale * d for w, d in zip(weights, ladder[0], strict=True)]
        ladder = [
            [(a - b) / (anchors[i] - anchors[i + 1]) for a, b in zip(ladder[i], ladder[i + 1], strict=True)]
            for i in range(len(ladder) - 1)
        ]
    return weights


def taylor_weights(k: int, anchors: Sequence[int]) -> list[float]:
    """Weights of the Taylor sum over the ladder: sum_j D_j k^j / j!, order len(anchors) - 1.

    That is the published form of TaylorSeer: from order 2 on it does not interpolate the anchors (Newton's does), so a
    quadratic is not forecast exactly.

    Args:
        k: steps from the newest anchor to the step forecast.
        anchors: step numbers of the anchors, newest first, strictly falling.

    Example:
        >>> taylor_weights(2, [10, 4])
        [1.3333333333333333, -0.3333333333333333]
    """
    return ladder_weights([float(k**j) for j in range(len(anchors))], anchors)


def hermite_weights(k: int, anchors: Sequence[int], scale: float = 0.5) -> list[float]:
    """Weights with scaled physicists' Hermite polynomials s^j H_j(s k) in place of the powers k^j (HiCache).

    Args:
        k, anchors: as in `taylor_weights`.
        scale: s; at 1 / sqrt(2) the first order is Taylor's, below it is damped.

    Example:
        >>> [round(w, 3) for w in hermite_weights(2, [10, 4])]
        [1.167, -0.167]
    """
    terms = [1.0, 2 * scale * k]
    for order in range(1, len(anchors)):
        terms.append(2 * scale * k * terms[order] - 2 * order * terms[order - 1])
    # H_j is evaluated at s k; s^j is applied last.
    return ladder_weights([scale**j * term for j, term in enumerate(terms[: len(anchors)])], anchors)


def binomial_weights(k: int, anchors: Sequence[int]) -> list[float]:
    """Weights (-1)^j C(p, j + 1) of the polynomial one equal step ahead, whatever k and the gaps are (AB-Cache).

    Args:
        k, anchors: as in `taylor_weights`; both unused but for the number of anchors p.

    Example:
        >>> binomial_weights(3, [12, 6])
        [2.0, -1.0]
    """
    count = len(anchors)
    return [float((-1) ** j * comb(count, j + 1)) for j in range(count)]


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


BASES: dict[str, Weights] = {
    "taylor": taylor_weights,
    "newton": newton_weights,
    "hermite": hermite_weights,
    "binomial": binomial_weights,
}


@dataclass(frozen=True)
class Forecast:
    """How a skipped feature is had from past ones. Subclasses may need more than weights, and override `forecast`.

    Attributes:
        order: 0 reuses the newest anchor; m uses m + 1 anchors, fewer while there are fewer.
        basis: "taylor", "newton" (the same up to order 1), "hermite" or "binomial".
        scale: of the Hermite polynomials.
        amplification: largest sum of |weights|, by which the anchors' own rounding and noise are multiplied; the order
            is lowered until it is kept. 0 for no limit, as published. Two anchors one step apart and a forecast five
            steps ahead make it 11.
    """

    order: int = 0
    basis: str = "taylor"
    scale: float = 0.5
    amplification: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or not isinstance(self.order, int) or not 0 <= self.order <= 5:
            raise DitaError(f"order is {self.order!r}; expected a whole number from 0 (reuse) to 5")
        if self.basis not in BASES:
            raise DitaError(f"basis is {self.basis!r}; expected one of {', '.join(BASES)}")
        if not isinstance(self.amplification, (int, float)) or not (self.amplification == 0 or self.amplification >= 1):
            raise DitaError(f"amplification is {self.amplification!r}; expected 0 (no limit) or a number of at least 1")

    @property
    def anchors(self) -> int:
        """Anchors it can use."""
        return self.order + 1

    def retain(self, entries: list[Entry]) -> list[Entry]:
        """Choose which entries of a history are kept, of all, newest first."""
        return entries[: self.anchors]

    def make_history(self, storage: Storage) -> History:
        """The ring that one site's features are kept in."""
        return History(self.anchors, self.retain, storage)

    def weights(self, step: int, anchors: Sequence[int]) -> list[float]:
        """One weight per anchor used (newest first) for `step`; they sum to 1.

        Example:
            >>> Forecast(order=0).weights(7, [5])
            [1.0]
            >>> Forecast(order=1, amplification=3).weights(8, [3, 2])
            [1.0]
        """
        for count in range(min(self.anchors, len(anchors)), 0, -1):
            weights = self._weights(step - anchors[0], anchors[:count])
            if self.bounded(weights):
                return weights
        return [1.0]

    def bounded(self, weights: Iterable[float]) -> bool:
        """Whether the sum of |weights| keeps within `amplification`."""
        return not self.amplification or sum(map(abs, weights)) <= self.amplification + 1e-9

    def _weights(self, k: int, anchors: Sequence[int]) -> list[float]:
        if self.basis == "hermite":
            return hermite_weights(k, anchors, self.scale)
        return BASES[self.basis](k, anchors)

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        """The features at the step of `call`, on top of `base` where given.

        Args:
            history: the site's.
            base: tensors to add to, one per feature, or ().
            site: where.
            call: the transformer call under way.
        """
        return history.combine(_weights_of(self, call.position.step, tuple(history.steps)), base)


@dataclass(frozen=True)
class SelfFeeding(Forecast):
    """A forecast whose results are anchors of later ones, so that what it amplifies adds up from step to step.

    `amplification` bounds what a forecast has come to be of the computed features. Subclasses may override `rules`.
    """

    def rules(self, step: int, entries: Sequence[Entry]) -> Iterable[list[float]]:
        """Weights of the entries, newest first, for a step: the wanted ones, then those of lower order."""
        for count in range(min(self.anchors, len(entries)), 0, -1):
            yield self._weights(step - entries[0].step, [entry.step for entry in entries[:count]])

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        """See `Forecast.forecast`; the result is pushed."""
        entries, rules = history.entries, self.rules(call.position.step, history.entries)
        if self.amplification:
            made = ((weights, makes(entries, weights)) for weights in rules)
            # The newest entry alone keeps the limit that it was made under.
            weights, shares = next((m for m in made if self.bounded(m[1].values())), ([1.0], makes(entries, [1.0])))
        else:
            weights, shares = next(iter(rules)), {}
        result = history.combine(weights, base)
        history.push(call.position.step, result, shares)
        return result


@lru_cache(maxsize=4096)
def _weights_of(how: Forecast, step: int, anchors: tuple[int, ...]) -> list[float]:
    # The sites of a call ask for the same weights, one after the other.
    return how.weights(step, anchors)
