"""The arithmetic of the fitted forecast: weights and expected errors in closed form, from second moments alone.

Let v_0, ..., v_{S-1} be the outputs (after guidance) of a run with every step computed, x_0 the noise it begins with,
and G the mean products of these S + 1 tensors, averaged over entries, samples and calls. Deterministic solvers are
linear, x_s = R[s, S] x_0 + sum_t R[s, t] v_t (`dita.response`). Whatever a run with skipped steps puts out is then a
combination of the same S + 1 tensors, so that its distance from the full run is a quadratic form in G at any step.

A skipped step s puts out sum_j w_j v_{a_j} over the newest anchors, sum_j w_j = 1. The weights are not those of the
least error of the output: they leave the least expected distance between the last latents and those of the full run,
were all later outputs right. For solvers without a memory that is the distance right after the step. What the steps
before fell short of is so made good as far as the anchors tell of it, where forecasts of single outputs all err to the
same side, and the solver adds that up.

A computed step sees latents that are off by d, and answers with v_s + f_s d and something in other directions, of the
size k_s |d|. The mean feedback f_s is the regression of outputs on latents, <v_s, x_s> / <x_s, x_s>: about 0 for
v-prediction, and what makes noise prediction correct itself. k_s is measured on one accelerated run, by comparing it
with the full one. No weight can make good what nothing tells of: a schedule's expected error adds, for each computed
step, the square of 3 k_s |d| times what the steps up to the next computed one make of it. Three times is a choice, for
caution: samples differ (`docs/fitted.md` has what 1 to 4 times give).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

RIDGE = 1e-6  # of a regressor's own size, against anchors that tell the same
CAUTION = 3.0  # times the measured unrest: a few samples take errors much worse than the mean does


@dataclass(frozen=True, eq=False)
class Moments:
    """What the fit knows of a pipeline's runs.

    Attributes:
        gram: float64 [S + 1, S + 1], mean products of the outputs of S steps and, last, the latents they begin with.
        response: float64 [S + 1, S + 1], see `dita.response.linear_response`.
        unrest: float64 [S], k_s above; 0 where it was not measured.
    """

    gram: np.ndarray
    response: np.ndarray
    unrest: np.ndarray

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return len(self.gram) - 1

    @cached_property
    def vectors(self) -> np.ndarray:
        """Vectors [S + 1, D] whose dot products are the moments: arithmetic on them is that on the tensors."""
        values, axes = np.linalg.eigh((self.gram + self.gram.T) / 2)
        kept = values > 1e-9 * values[-1]
        return axes[:, kept] * np.sqrt(values[kept])

    @cached_property
    def latents(self) -> np.ndarray:
        """Those of the latents before each step and after the last: [S + 1, D]."""
        return self.response @ self.vectors

    @cached_property
    def feedback(self) -> np.ndarray:
        """f_s, by which outputs follow latents: [S]."""
        x = self.latents[:-1]
        return np.einsum("sd,sd->s", self.vectors[:-1], x) / np.maximum(np.einsum("sd,sd->s", x, x), 1e-30)


class Tracker:
    """Runs with skipped steps, followed side by side in the space that the moments span.

    Args:
        moments: of full runs.
        most: anchors a forecast may use.
        count: runs.

    Example:
        A run whose outputs grow evenly is forecast exactly from two anchors:

        >>> gram = np.outer([0.0, 1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0, 0.0])
        >>> euler = np.tril(np.ones((5, 5)), -1)
        >>> tracker = Tracker(Moments(gram, euler, np.zeros(4)), most=2)
        >>> for computed in (True, True, False):
        ...     weights = tracker.step([computed])
        >>> weights[0].round(3).tolist(), tracker.distance().round(3).tolist()
        ([2.0, -1.0], [0.0])
    """

    def __init__(self, moments: Moments, most: int, count: int = 1) -> None:
        self.moments, self.most, self.count = moments, most, count
        steps, size = moments.steps, moments.vectors.shape[1]
        self.now = 0
        self._outputs = np.zeros((count, steps, size))
        self._errors = np.zeros((count, steps, size))
        self._anchors = np.full((count, most), -1)
        self._off = np.zeros((count, size))  # of the latents now

    def step(self, computed: Sequence[bool] | np.ndarray) -> np.ndarray:
        """Take every run one step further.

        Args:
            computed: [count], which of them compute it; a run's first step must be.

        Returns:
            float64 [count, most], the weights of the newest anchors, newest first, where the step is skipped; 0 for
            anchors that are not there yet.
        """
        s, m, computed = self.now, self.moments, np.asarray(computed, dtype=bool)
        truth = m.vectors[s]
        weights = np.zeros((self.count, self.most))
        weights[:, 0] = 1.0
        if computed.any():
            self._outputs[computed, s] = truth + m.feedback[s] * self._off[computed]
            self._anchors[computed] = np.concatenate(
                [np.full((computed.sum(), 1), s), self._anchors[computed, :-1]], axis=1
            )
        skipped = ~computed
        if skipped.any():
            weights[skipped], self._outputs[skipped, s] = self._forecast(skipped, truth)
        self._errors[:, s] = self._outputs[:, s] - truth
        self.now += 1
        self._off = np.einsum("t,ptd->pd", m.response[self.now, : self.now], self._errors[:, : self.now])
        return weights

    def _forecast(self, runs: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s, reach = self.now, self.moments.response[-1]
        anchors = self._anchors[runs]
        rows = np.flatnonzero(runs)[:, None]
        known = self._outputs[rows, np.maximum(anchors, 0)]
        newest = known[:, :1]
        apart = (known - newest)[:, 1:] * (anchors[:, 1:, None] >= 0)
        wanted = truth - newest[:, 0]
        if abs(reach[s]) > 1e-12:
            wanted = wanted - np.einsum("t,ptd->pd", reach[:s], self._errors[runs, :s]) / reach[s]
        gram = apart @ apart.transpose(0, 2, 1)
        size = np.einsum("pii->pi", gram)
        floor = RIDGE * size + 1e-12 * (1e-30 + size.sum(1, keepdims=True)) + (size == 0)
        gram[:, range(self.most - 1), range(self.most - 1)] += floor
        found = np.linalg.solve(gram, (apart @ wanted[:, :, None]))[..., 0]
        weights = np.concatenate([1 - found.sum(1, keepdims=True), found], axis=1)
        return weights, newest[:, 0] + np.einsum("pj,pjd->pd", found, apart)

    def forget(self) -> None:
        """From here on only steps to come are anchors: what was kept so far is someone else's."""
        self._anchors[:] = -1

    def anchors(self, run: int = 0) -> tuple[int, ...]:
        """The newest computed steps of a run, newest first."""
        return tuple(int(a) for a in self._anchors[run] if a >= 0)

    def error(self) -> np.ndarray:
        """Expected mean squared error of the outputs of the last step, per run: [count]."""
        return np.square(self._errors[:, self.now - 1]).sum(1)

    def distance(self) -> np.ndarray:
        """Expected mean squared distance of the latents now from those of a full run, per run: [count]."""
        return np.square(self._off).sum(1)


def expected_error(moments: Moments, schedules: np.ndarray, most: int) -> np.ndarray:
    """Expected mean squared distance of the last latents from those of a full run, with what no weight makes good.

    Args:
        moments: of full runs.
        schedules: bool [P, S], the steps that are computed; the first must be.
        most: anchors a forecast may use.

    Returns:
        float64 [P].

    Example:
        >>> moments = Moments(np.eye(5), np.tril(np.ones((5, 5)), -1), np.ones(4))
        >>> expected_error(moments, np.ones((1, 4), dtype=bool), 2).tolist()
        [0.0]
    """
    tracker = Tracker(moments, most, len(schedules))
    total, unknown, reach = np.zeros((3, len(schedules)))
    for s, computed in enumerate(schedules.T):
        total += np.where(computed, unknown * reach**2, 0)
        unknown = np.where(computed, (CAUTION * moments.unrest[s]) ** 2 * tracker.distance(), unknown)
        reach = np.where(computed, 0, reach) + abs(moments.response[-1, s])
        tracker.step(computed)
    return tracker.distance() + total + unknown * reach**2
