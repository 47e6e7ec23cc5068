"""The gate of the fitted forecast: samples harder than those of the calibration have more steps computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dita.caching.fitted_plan import schedule_for
from dita.caching.fitted_table import FittedTable
from dita.caching.fitting import RIDGE, Moments
from dita.loop import Loop, Request, Run, Runner, Solver, Step

_ENTRIES = 8192  # of each sample that are compared


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


class Gate(Loop):
    """Compares, at every computed step, the forecast that it replaces with the output.

    Where the error of some sample is more than `limit` times the expected one, in amplitude, the steps up to the next
    computed one are cut into as many pieces as the fourth root of the ratio of the squared errors says, since the error
    of a forecast grows about with the square of its distance, and a step is computed between any two of them.

    Args:
        table: the fit; runs of other timesteps are left alone.
        full: steps computed.
        most: anchors of a forecast.
        warmup: first steps that are computed in any case.
        limit: above 1.
    """

    def __init__(self, table: FittedTable, full: int, most: int, warmup: int, limit: float) -> None:
        self.table, self.most, self.limit = table, most, limit
        self.schedule = schedule_for(table.moments, full, most, warmup)
        self._fits: dict[tuple[int, ...], tuple[np.ndarray, float]] = {}
        self._alike, self._extra = False, set[int]()
        self._kept: list[tuple[int, torch.Tensor]] = []

    def begin_run(self, run: Run) -> None:
        """Forget everything; see `Loop.begin_run`."""
        self._extra.clear()
        self._kept.clear()
        self._alike = run.steps == self.table.steps

    def model(self, request: Request, run: Runner) -> Any:
        """Have a step computed that the plan would skip."""
        if request.position.step in self._extra:
            request = replace(request, fresh=True, reason="harder than calibrated")
        return run(request)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """Compare, where the step was computed."""
        now = step.position.step
        # A run of other steps has no entry of its own in the table.
        self._alike = self._alike and step.position.index == now
        self._alike = self._alike and abs(step.position.timestep - self.table.timesteps[now]) < 1e-2
        if self._alike and (now in self._extra or now in self.schedule):
            flat = step.output.detach().flatten(1)
            output = flat[:, :: max(1, flat.shape[1] // _ENTRIES)].float()
            if len(self._kept) >= 2 and self._kept[0][1].shape == output.shape:
                self._judge(now, output)
            self._kept = [(now, output.clone()), *self._kept][: self.most]
        return solve(step.output, step.sample)

    def _judge(self, now: int, output: torch.Tensor) -> None:
        key = (now, *(at for at, _ in self._kept))
        if key not in self._fits:
            self._fits[key] = local_fit(self.table.moments, key[1:], now)
        weights, expected = self._fits[key]
        forecast = sum(float(w) * kept for w, (_, kept) in zip(weights, self._kept, strict=True))
        worst = (output - forecast).square().mean(1).max().item() / max(expected, 1e-30)
        following = min((at for at in self.schedule if at > now), default=self.table.steps)
        if worst > self.limit**2:
            pieces = min(following - now, int(np.ceil(worst**0.25)))
            self._extra |= {now + round(piece * (following - now) / pieces) for piece in range(1, pieces)}

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        return sum(kept.nbytes for _, kept in self._kept)
