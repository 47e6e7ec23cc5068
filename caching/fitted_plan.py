"""Carrying out the fitted forecast: which steps of a run are computed, and the weights of each that is not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from dita.caching.anchors import choose_anchors, spread
from dita.caching.fitted_table import FittedTable
from dita.caching.fitting import Moments, Tracker
from dita.caching.forecast import taylor_weights
from dita.caching.policy import Policy, Verdict, View
from dita.seams import Features, Position, Site

_KEPT = 64
_SCHEDULES: OrderedDict[tuple[bytes, bytes, bytes, int, int, int], tuple[int, ...]] = OrderedDict()


def schedule_for(moments: Moments, full: int, most: int, warmup: int) -> tuple[int, ...]:
    """`choose_anchors`, remembered: attaching the same fit again searches nothing."""
    key = (moments.gram.tobytes(), moments.response.tobytes(), moments.unrest.tobytes(), full, most, warmup)
    if key not in _SCHEDULES:
        _SCHEDULES[key] = choose_anchors(moments, full, most, warmup)[0]
        while len(_SCHEDULES) > _KEPT:
            _SCHEDULES.popitem(last=False)
    return _SCHEDULES[key]


class Plan:
    """A schedule, and the weights that belong to whatever was computed so far.

    Args:
        schedule: steps that are computed, from 0.
        moments: None without a fit: Taylor's order 1 then.
        most: anchors a forecast may use.
    """

    def __init__(self, schedule: tuple[int, ...], moments: Moments | None, most: int) -> None:
        self.schedule, self.moments, self.most = frozenset(schedule), moments, most
        self._found: dict[tuple[bool | None, ...], tuple[tuple[float, ...], float]] = {}

    def weights(self, past: tuple[bool | None, ...]) -> tuple[tuple[float, ...], float]:
        """The weights of the next step, newest anchor first, and the expected mean squared error of its output.

        Args:
            past: for each step so far whether it was computed; None for one that was not seen: at the beginning
                another transformer's, later left out by another method.
        """
        if past not in self._found:
            self._found[past] = self._fit(past)
        return self._found[past]

    def _fit(self, past: tuple[bool | None, ...]) -> tuple[tuple[float, ...], float]:
        seen = [step for step, computed in enumerate(past) if computed]
        if self.moments is None:
            return tuple(taylor_weights(len(past) - seen[-1], seen[:-3:-1])), 0.0
        tracker, began = Tracker(self.moments, self.most), False
        for step, computed in enumerate(past):
            if computed and step and not began:
                tracker.forget()  # another transformer ran the steps before
            began = began or bool(computed)
            # A step that was not seen later on, some other method left out: no anchor of this stream.
            tracker.step([bool(computed) if began else step in self.schedule or step == 0])
        count = len(tracker.anchors())
        weights = tracker.step([False])[0]
        return tuple(float(w) for w in weights[:count]), float(tracker.error()[0])


class Planner:
    """Makes the plans of one model's runs.

    Args:
        table: the fit; None for a formula in its place.
        full: steps computed; 0 for as many as `speedup` leaves.
        speedup: of the run, by the calibrated seconds.
        most: anchors a forecast may use.
        warmup: first steps that are computed in any case.
        given: the schedule of runs like the calibrated one; () to choose it.
    """

    def __init__(
        self,
        table: FittedTable | None,
        full: int,
        speedup: float,
        most: int,
        warmup: int = 1,
        given: tuple[int, ...] = (),
    ) -> None:
        self.table, self.full, self.speedup = table, full, speedup
        self.most, self.warmup, self.given = most, warmup, given
        self._plans: dict[object, Plan] = {}

    def plan(self, view: View) -> Plan:
        """The plan of the run under way, at its first step."""
        position, schedule = view.position, view.schedule()
        steps = position.steps
        known = self.table is not None and schedule is not None and len(schedule.timesteps) == steps
        if not known or schedule is None or self.table is None or schedule.order != 1 or steps < 2:
            return Plan(spread(steps, self._count(steps)), None, self.most)
        ours = view.scheduler == self.table.scheduler and steps == self.table.steps
        same = ours and np.allclose(schedule.timesteps, self.table.timesteps, atol=1e-2)
        key = "calibrated" if same else (view.scheduler, schedule.timesteps)
        if key not in self._plans:
            response = self.table.moments.response if same else schedule.measure()
            moments = self.table.at(schedule.timesteps, response)
            chosen = self.given if same else ()
            chosen = chosen or schedule_for(moments, self._count(steps), self.most, self.warmup)
            self._plans[key] = Plan(chosen, moments, self.most)
        return self._plans[key]

    def _count(self, steps: int) -> int:
        if self.full:
            return min(self.full, steps)
        if self.table is not None:
            return self.table.full_for(self.speedup, steps)
        return int(min(steps, max(2, np.floor(steps / self.speedup + 1e-9))))


class Following(Policy):
    """Follows the plan of a run.

    Args:
        planner: makes it.
        say: called at the run's first step, to warn.
    """

    def __init__(self, planner: Planner, say: Callable[[], None] | None = None) -> None:
        self._planner, self._say = planner, say
        self._plan: Plan | None = None
        self._past: list[bool | None] = []

    def decide(self, view: View) -> Verdict:
        """Compute the steps of the schedule, or those that the gate names; forecast the others."""
        plan, step = self._of(view), view.position.step
        planned = step in plan.schedule
        if planned if view.due is None else view.due:
            return Verdict(True, "chosen" if planned else "harder than calibrated")
        weights, error = plan.weights(self._until(view.position))
        return Verdict(False, "fitted" if plan.moments is not None else "not fitted", error, weights=weights)

    def _of(self, view: View) -> Plan:
        if self._plan is None:
            if self._say is not None:
                self._say()
            self._plan = self._planner.plan(view)
        return self._plan

    def _until(self, position: Position) -> tuple[bool | None, ...]:
        """What became of the steps before this one, with None for those that this stream did not see."""
        self._past += [None] * (position.step - len(self._past))
        return tuple(self._past[: position.step])

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """The plan is made at the run's first step, when its scheduler has not stepped yet."""
        self._of(view)

    def computed(self, view: View) -> None:
        """Remember the step."""
        self._past = [*self._until(view.position), True]

    def skipped(self, view: View) -> None:
        """Remember the step."""
        self._past = [*self._until(view.position), False]
