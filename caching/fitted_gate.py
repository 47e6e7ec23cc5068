"""The gate of the fitted forecast: each sample has as many steps computed as keep its error within that of the plan.

At a computed step the forecast that it replaces is known. A sample whose forecasts are off by more than expected is
harder than the calibration, and its errors to come are taken to be larger by as much. The steps still to be computed
are then chosen anew: as few as leave an expected error of the last latents, so enlarged or reduced, within the plan's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dita.caching.anchors import as_mask
from dita.caching.fitted_plan import schedule_for
from dita.caching.fitted_table import FittedTable
from dita.caching.fitting import RIDGE, Moments, expected_error
from dita.loop import Loop, Request, Run, Runner, Solver, Step

_ENTRIES = 8192  # of each sample that are compared
_DOUBT = 1.0  # how many measured errors the calibration counts for


def local_fit(moments: Moments, anchors: Sequence[int], step: int) -> tuple[np.ndarray, float]:
    """Weights of the least error of one output, from outputs of full runs, and that error.

    Args:
        moments: of full runs.
        anchors: their steps, newest first.
        step: the one forecast.

    Returns:
        float64 [anchors], which sum to 1, and the expected mean squared error.

    Example:
        >>> gram = np.outer([0.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 0.0])
        >>> weights, error = local_fit(Moments(gram, np.eye(4), np.zeros(3)), [1, 0], 2)
        >>> weights.round(3).tolist(), round(error, 6)
        ([2.0, -1.0], 0.0)
    """
    vectors = moments.vectors
    newest = vectors[anchors[0]]
    apart, wanted = vectors[list(anchors[1:])] - newest, vectors[step] - newest
    gram = apart @ apart.T
    found = np.linalg.solve(gram + np.diag(RIDGE * np.diag(gram) + 1e-30), apart @ wanted)
    return np.concatenate([[1 - found.sum()], found]), float(np.square(wanted - found @ apart).sum())


class Rest:
    """The steps that remain to be computed, from what was so far and how hard the sample is.

    Args:
        moments: of full runs.
        schedule: the plan's.
        most: anchors of a forecast.
        limit: times the plan's expected error, in amplitude, that a run's may come to.

    Example:
        >>> outputs = np.array([0.0, 3.0, 4.0, 4.2, 4.3, 4.3, 0.0])
        >>> rest = Rest(Moments(np.outer(outputs, outputs), np.tril(np.ones((7, 7)), -1), np.zeros(6)), (0, 1, 3), 1, 1)
        >>> rest.after((0, 1), 1.0), rest.after((0, 1), 0.01), rest.after((0, 1), 100.0)
        ((3,), (), (2, 3))
    """

    def __init__(self, moments: Moments, schedule: tuple[int, ...], most: int, limit: float) -> None:
        self.moments, self.schedule, self.most, self.limit = moments, schedule, most, limit
        self._known: dict[tuple[int, ...], float] = {}
        self._orders: dict[tuple[tuple[int, ...], tuple[int, ...], bool], tuple[int, ...]] = {}

    def after(self, past: tuple[int, ...], hardness: float) -> tuple[int, ...]:
        """The fewest steps, of those that come of the plan's by leaving out or adding one after the other.

        Args:
            past: the computed steps so far, the newest the one just done.
            hardness: the sample's squared errors over the expected ones.
        """
        now = past[-1]
        planned = tuple(step for step in self.schedule if step > now)
        everything = tuple(range(now + 1, self.moments.steps))
        lost = self._error((*past, *everything))
        # What is lost already may be more than the limit: the rest then keeps to the plan's share of it.
        own = tuple(step for step in self.schedule if step <= now)
        share = self._error(self.schedule) - self._error((*own, *everything))
        allowed = max(self.limit**2 * self._error(self.schedule) - hardness * lost, self.limit**2 * share)

        def fits(rest: tuple[int, ...]) -> bool:
            return hardness * (self._error((*past, *rest)) - lost) <= allowed * (1 + 1e-9)

        rest = planned
        if not fits(rest):
            while not fits(rest) and len(rest) < len(everything):
                rest = self._next(past, rest, fewer=False)
            return rest
        while rest and fits(fewer := self._next(past, rest, fewer=True)):
            rest = fewer
        return rest

    def _next(self, past: tuple[int, ...], rest: tuple[int, ...], fewer: bool) -> tuple[int, ...]:
        """With the step that is missed least left out, or the one that helps most added."""
        key = (past, rest, fewer)
        if key not in self._orders:
            ways = [tuple(step for step in rest if step != out) for out in rest]
            if not fewer:
                new = [step for step in range(past[-1] + 1, self.moments.steps) if step not in rest]
                ways = [tuple(sorted((*rest, step))) for step in new]
            self._measure([(*past, *way) for way in ways])
            self._orders[key] = min(ways, key=lambda way: (self._error((*past, *way)), way))
        return self._orders[key]

    def _error(self, schedule: tuple[int, ...]) -> float:
        if schedule not in self._known:
            self._measure([schedule])
        return self._known[schedule]

    def _measure(self, schedules: Sequence[tuple[int, ...]]) -> None:
        unknown = [schedule for schedule in schedules if schedule not in self._known]
        if unknown:
            masks = np.stack([as_mask(schedule, self.moments.steps) for schedule in unknown])
            errors = expected_error(self.moments, masks, self.most)
            self._known |= dict(zip(unknown, map(float, errors), strict=True))


@dataclass
class Followed:
    """A sample, or a batch that is computed together, in its run.

    Attributes:
        rest: steps that remain to be computed.
        past: those that were.
        ratios: logarithms of measured squared errors over expected ones.
        kept: the newest outputs, float32 [samples, entries].
    """

    rest: tuple[int, ...]
    past: tuple[int, ...] = ()
    ratios: list[float] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)

    def hardness(self) -> float:
        """The geometric mean of the measured ratios, held towards 1 while there are few."""
        return math.exp(sum(self.ratios) / (len(self.ratios) + _DOUBT))


class Gate(Loop):
    """Compares, at every computed step, the forecast that it replaces with the output, and chooses the rest anew.

    Samples that are run one by one are judged each by itself; of a batch that is computed together the worst counts.

    Args:
        table: the fit; runs of other timesteps are left alone.
        full: steps computed of a sample as hard as the calibration.
        most: anchors of a forecast.
        warmup: first steps that are computed in any case.
        limit: see `Rest`.
    """

    def __init__(self, table: FittedTable, full: int, most: int, warmup: int, limit: float) -> None:
        self.table, self.most = table, most
        self.schedule = schedule_for(table.moments, full, most, warmup)
        self._rest = Rest(table.moments, self.schedule, most, limit)
        self._warm = max(1, min(warmup, full // 2))
        self._fits: dict[tuple[int, ...], tuple[np.ndarray, float]] = {}
        self._alike, self._batch, self._now = False, 1, 0
        self._followed: dict[int | None, Followed] = {}

    def begin_run(self, run: Run) -> None:
        """Forget everything; see `Loop.begin_run`."""
        self._followed.clear()
        self._alike = run.steps == self.table.steps

    def model(self, request: Request, run: Runner) -> Any:
        """Have the steps computed that each sample needs."""
        self._batch, self._now = request.batch, request.position.step
        return run(replace(request, due=self._due) if self._alike else request)

    def _due(self, sample: int | None) -> bool:
        if sample not in self._followed:
            self._followed[sample] = Followed(self.schedule)
        return self._now in self._followed[sample].rest

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """Compare, where the step was computed."""
        now = step.position.step
        # A run of other steps has no entry of its own in the table.
        self._alike = self._alike and step.position.index == now
        self._alike = self._alike and abs(step.position.timestep - self.table.timesteps[now]) < 1e-2
        flat = step.output.detach().flatten(1)
        for sample, followed in self._followed.items() if self._alike else ():
            if now in followed.rest:
                # Some pipelines step every sample twice, once a branch.
                rows = flat if sample is None else flat[sample :: self._batch]
                self._judge(followed, now, rows[:, :: max(1, flat.shape[1] // _ENTRIES)].float())
        return solve(step.output, step.sample)

    def _judge(self, followed: Followed, now: int, output: torch.Tensor) -> None:
        seen = followed.kept
        if len(seen) >= 2 and seen[0].shape == output.shape:
            key = (now, *followed.past[: -1 - len(seen) : -1])
            if key not in self._fits:
                self._fits[key] = local_fit(self.table.moments, key[1:], now)
            weights, expected = self._fits[key]
            # Row by row: a sum over a batch may be added up in another order.
            errors = [
                float((row - sum(float(w) * kept[n] for w, kept in zip(weights, seen, strict=True))).square().mean())
                for n, row in enumerate(output)
            ]
            if math.isfinite(sum(errors)):
                followed.ratios.append(math.log(max(errors) + 1e-30) - math.log(expected + 1e-30))
        followed.past = (*followed.past, now)
        followed.kept = [output.clone(), *seen][: self.most]
        followed.rest = tuple(step for step in followed.rest if step > now)
        if followed.ratios and len(followed.past) >= self._warm:
            followed.rest = self._rest.after(followed.past, followed.hardness())

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        return sum(kept.nbytes for followed in self._followed.values() for kept in followed.kept)
