"""The fitted forecast with one part of it exchanged: other weights, other places, other calibrations.

For `benchmarks/fitted.py`. Weights finer than one number per anchor and step come from moments of one's own: of every
channel of what is forecast, or of both guidance branches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.fitted import Fitted
from dita.caching.fitted_plan import Following, Plan, Planner
from dita.caching.fitted_table import FittedTable
from dita.caching.fitting import RIDGE, Moments, Tracker
from dita.caching.forecast import Forecast, taylor_weights
from dita.caching.history import History
from dita.caching.policy import Verdict, View
from dita.caching.table import Measurement, Recorder, measure
from dita.loop import Loop, Solver, Step
from dita.seams import Call, Features, Site

Weights = Mapping[int, torch.Tensor]
"""Of each skipped step: [anchors, C], one for each channel, or [anchors, 2], one for each branch."""


class LocalTracker(Tracker):
    """Weights of the least error of each output, whatever the steps before fell short of."""

    def _forecast(self, runs: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept, self._errors = self._errors, np.zeros_like(self._errors)
        found = super()._forecast(runs, truth)
        self._errors = kept
        return found


class FixedPlan(Plan):
    """Weights of some kind on a given schedule."""

    kind: str = "tracking"
    given: Weights | None = None

    def _fit(self, past: tuple[bool | None, ...]) -> tuple[tuple[float, ...], float]:
        seen = [step for step, computed in enumerate(past) if computed][::-1]
        if self.given is not None:
            return self.given[len(past)], 0.0  # pyright: ignore[reportReturnType]
        if self.kind.startswith("taylor"):
            order = int(self.kind[-1])
            return tuple(taylor_weights(len(past) - seen[0], seen[: order + 1])), 0.0
        assert self.moments is not None
        tracker = (LocalTracker if self.kind == "local" else Tracker)(self.moments, self.most)
        for computed in past:
            tracker.step([bool(computed)])
        return tuple(tracker.step([False])[0][: len(tracker.anchors())]), 0.0


class FixedPlanner(Planner):
    """Hands out one plan."""

    only: Plan

    def plan(self, view: View) -> Plan:
        return self.only


class ByBranch(Forecast):
    """Each half of the batch, a guidance branch, by weights of its own: of the first column, then of the second."""

    given: ClassVar[Weights] = {}

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        weights = self.given[call.position.step]
        halves = []
        for branch in (0, 1):
            parts = [entry.features[0].chunk(2)[branch] for entry in history.entries]  # pyright: ignore
            halves.append(sum(w * part for w, part in zip(weights[:, branch].tolist(), parts, strict=False)))
        return (torch.cat(halves), *(None for _ in history.newest[1:]))


class Unweighted(Following):
    """Leaves the weights to the forecast."""

    def decide(self, view: View) -> Verdict:
        return replace(super().decide(view), weights=None)


@dataclass(frozen=True)
class Variant(Fitted):
    """A fitted forecast with a part of it exchanged.

    Attributes:
        schedule: steps that are computed.
        kind: of weights, "tracking", "local" or "taylor n".
        what: is forecast: "model", "trunk", "halves" (of the trunk), or "module".
        kept: "output" or "residual".
        weights: in place of those of `kind`.
        branches: these are weights of branches, not channels.
    """

    schedule: tuple[int, ...] = ()
    kind: str = "tracking"
    what: str = "model"
    kept: str = "output"
    weights: Weights | None = field(default=None, compare=False, repr=False)
    branches: bool = False

    name: ClassVar[str] = "fitted variant"

    def planner(self, table: FittedTable | None, full: int, speedup: float) -> Planner:
        assert table is not None
        planner = FixedPlanner(table, len(self.schedule), 1.0, self.anchors)
        planner.only = FixedPlan(self.schedule, table.moments, self.anchors)
        planner.only.kind, planner.only.given = self.kind, self.weights
        return planner

    def recipe(self, anatomy: Anatomy) -> Recipe:
        recipe = replace(super().recipe(anatomy), what=self.what, keep=self.kept)
        if self.what == "halves":
            middle, last = len(anatomy.blocks) // 2, len(anatomy.blocks) - 1
            return replace(recipe, what="span", sites=anatomy.spans(0, middle - 1) + anatomy.spans(middle, last))
        if self.branches:
            how = ByBranch(self.anchors - 1)
            object.__setattr__(how, "given", self.weights)
            plans = self.planner(self.table, 0, 1.0)
            return replace(recipe, how=how, when=lambda: Unweighted(plans))
        return recipe


class _Seeing(Recorder):
    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        assert outputs[0] is not None
        seen: dict[Any, Any] = self.sink.seen
        if view.position.step == 0 and view.latents is not None:
            seen.setdefault("began", []).append(view.latents.double())
        seen.setdefault(view.position.step, []).append(outputs[0].double())


def outputs_of(pipe: Any, calls: Sequence[Callable[[Any], Any]], what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model or its trunk puts out in full runs, and the latents before them: float64 [S, B, ...], [B, ...].

    Guidance branches lie one after the other in every call's part of B.
    """
    found: list[dict[Any, Any]] = [measure(pipe, call, functools.partial(_seeing, what)).seen for call in calls]
    steps = range(sum(isinstance(key, int) for key in found[0]))
    outputs = torch.stack([torch.cat([part for seen in found for part in seen[step]]) for step in steps])
    return outputs, torch.cat([part for seen in found for part in seen["began"]])


def _seeing(what: str, anatomy: Anatomy, sink: Measurement) -> Recipe:
    return Recipe(what, lambda: _Seeing(sink), keep="output")


def channel_weights(
    outputs: torch.Tensor, began: torch.Tensor, moments: Moments, schedule: tuple[int, ...], most: int, kind: str
) -> dict[int, torch.Tensor]:
    """Weights of every channel, the last axis, from its own moments: [anchors, C] of each skipped step.

    Args:
        outputs, began: see `outputs_of`; latents of another shape than the outputs are left out, and so is feedback.
        moments: of the model's output, whose solver's map is used.
        schedule: steps computed.
        most: anchors of a forecast.
        kind: "tracking" or "local".
    """
    steps, channels = len(outputs), outputs.shape[-1]
    alike = began.shape == outputs.shape[1:]
    tensors = torch.cat([outputs, began[None] if alike else torch.zeros_like(outputs[:1])]).reshape(
        steps + 1, -1, channels
    )
    grams = torch.einsum("snc,tnc->cst", tensors, tensors).div(tensors.shape[1]).numpy()
    found: dict[int, list[torch.Tensor]] = {step: [] for step in range(steps) if step not in schedule}
    for gram in grams:
        own = Moments(gram, moments.response, np.zeros(steps))
        if not alike:
            own.__dict__["feedback"] = np.zeros(steps)
        tracker = (LocalTracker if kind == "local" else Tracker)(own, most)
        for step in range(steps):
            weights = tracker.step([step in schedule])[0][: len(tracker.anchors())]
            if step in found:
                found[step].append(torch.from_numpy(weights).float())
    return {step: torch.stack(weights, 1) for step, weights in found.items()}


def shared_weights(moments: Moments, schedule: tuple[int, ...], most: int) -> dict[int, torch.Tensor]:
    """One weight for each anchor: [anchors, 1] of each skipped step."""
    tracker, found = Tracker(moments, most), {}
    for step in range(moments.steps):
        weights = tracker.step([step in schedule])[0][: len(tracker.anchors())]
        if step not in schedule:
            found[step] = torch.from_numpy(weights).float()[:, None]
    return found


def shrunk(own: Weights, shared: Weights, share: float) -> dict[int, torch.Tensor]:
    """Own weights, drawn towards the shared ones by a share from 0 to 1."""
    return {step: (1 - share) * own[step] + share * shared[step] for step in own}


def branch_weights(
    outputs: torch.Tensor, began: torch.Tensor, scale: float, moments: Moments, schedule: tuple[int, ...], most: int
) -> dict[int, torch.Tensor]:
    """Weights of each branch that together leave the guided run's latents nearest: [anchors, 2] of each skipped step.

    Least squares over the anchors of both branches, each branch's weights summing to 1.

    Args:
        outputs, began: of one call, see `outputs_of`: the conditional half first.
        scale: of guidance.
        moments: of the guided output, whose solver's map and feedback are used.
        schedule: steps computed.
        most: anchors of a forecast.
    """
    steps, response = moments.steps, torch.from_numpy(moments.response)
    cond, uncond = (part.reshape(steps, -1) for part in outputs.chunk(2, dim=1))
    parts, truth = (scale * cond, (1 - scale) * uncond), scale * cond + (1 - scale) * uncond
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    found, errors, off = {}, torch.zeros_like(truth), torch.zeros_like(truth[0])
    for step in range(steps):
        if step in schedule:
            drift = float(moments.feedback[step]) * off  # both branches answer to it alike
            kept = [(parts[0][step] + scale * drift, parts[1][step] + (1 - scale) * drift), *kept][:most]
            latest = sum(kept[0])
        else:
            reach = response[-1]
            lack = torch.einsum("t,tn->n", reach[:step], errors[:step]) / reach[step]
            wanted = truth[step] - lack - sum(kept[0])
            apart = torch.stack([old[b] - kept[0][b] for old in kept[1:] for b in (0, 1)] or [0 * wanted])
            gram = apart @ apart.T
            ridge = RIDGE * gram.diagonal() + 1e-12 * (1e-30 + gram.trace())
            solution = torch.linalg.solve(gram + torch.diag(ridge), apart @ wanted)
            latest = sum(kept[0]) + solution @ apart
            own = solution.view(-1, 2) if len(kept) > 1 else torch.zeros(0, 2).double()
            found[step] = torch.cat([1 - own.sum(0, keepdim=True), own]).float()
        errors[step] = latest - truth[step]
        off = torch.einsum("t,tn->n", response[step + 1, : step + 1], errors[: step + 1])
    return found


class OnPolicy(Loop):
    """Steps with forecasts on a schedule, but computes every output: what the model says along accelerated runs.

    Attributes:
        runs: of each its outputs and, last, the latents it began with: float64 [S + 1, N].
    """

    def __init__(self, schedule: tuple[int, ...], weights: Weights) -> None:
        self.schedule, self.given = schedule, weights
        self.runs: list[torch.Tensor] = []
        self._anchors: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        self._began = torch.zeros(0)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """Put the forecast in place of the output; see `Loop.step`."""
        now, output = step.position.step, step.output
        if now == 0:
            self._anchors, self._outputs, self._began = [], [], step.sample.double().flatten()
        self._outputs.append(output.double().flatten())
        if now in self.schedule:
            self._anchors = [output, *self._anchors]
        else:
            weights = self.given[now][:, 0].tolist()
            output = torch.stack([w * kept for w, kept in zip(weights, self._anchors, strict=False)]).sum(0)
        if now == step.position.steps - 1:
            self.runs.append(torch.stack([*self._outputs, self._began]))
        return solve(output, step.sample)
