"""Weights by which an unconditional output is told from earlier outputs, fitted to runs with both branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.loop import Run
from dita.schedulers.guidance.moment import Moment, refuse_stream
from dita.schedulers.guidance.policy import GuidancePolicy
from dita.seams import Position
from dita.table import Conditions, Table, has_form

Row = tuple[tuple[float, ...], tuple[float, ...]]
_CHUNK = 2**16


@dataclass(frozen=True)
class Measured:
    """Under what conditions a run is made.

    Attributes:
        position, shapes, scheduler: see `dita.table.Conditions`; of shapes there is one, of the transformer's latents.
        scale: of guidance.
    """

    position: Position
    shapes: tuple[tuple[int, ...], ...]
    scheduler: str
    scale: float | None

    @classmethod
    def at(cls, moment: Moment, scheduler: str) -> Measured:
        """The conditions of one evaluation, with that fingerprint of a scheduler."""
        latents = () if moment.request is None else moment.request.part("cond").latents.shape
        return cls(moment.position, (tuple(latents),), scheduler, moment.scale)


@dataclass(frozen=True)
class LinearWeights(Table):
    """Weights of the outputs so far, in the sum that stands for an unconditional one.

    Attributes:
        values: stage ("0", or "1" for the second one of a solver's step) -> a row for each step of the schedule, the
            weights of the conditional outputs up to its own and those of the unconditional ones before it; empty where
            nothing is to be estimated. Besides "interval" and "scale", as they were measured. The rest as in `Table`.
    """

    noun: ClassVar[str] = "fit of weights"
    form: ClassVar[Any] = {"interval": int, "scale": float}

    __hash__ = Table.__hash__

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        for stage in sorted(set(self.values) - set(self.form)):
            for index, row in enumerate(self.values[stage]):
                weights = (index + 1, index)
                if row and not has_form(row, tuple((float,) * count for count in weights)):
                    raise ValueError(f"step {index} has not {weights[0]} and {weights[1]} weights")

    def row(self, position: Position) -> Row | None:
        """The weights of a step; None where there are none, or they were fitted to another number of steps."""
        rows = self.values.get(str(position.stage), ())
        if self.steps != position.schedule_length or position.index >= len(rows):
            return None
        return rows[position.index] or None

    def differences(self, view: Conditions, guidance: str = "") -> list[str]:
        """See `Table.differences`; the guidance scale counts too."""
        found = super().differences(view, guidance)
        steps, scale, now = view.position.schedule_length, self.values.get("scale"), getattr(view, "scale", None)
        if self.steps and self.steps != steps:
            found[0] = f"{self.steps} steps (now {steps}; nothing is estimated)"
        if scale and now is not None and abs(scale - now) > 1e-6:
            found.append(f"a guidance scale of {scale:g} (now {now:g})")
        return found


def fit_row(gram: torch.Tensor, own: int, known: list[int], first: int, ridge: float) -> Row:
    """Weights of one step, by least squares with a prior.

    Args:
        gram: [2T, 2T] float64, inner products of T conditional outputs and T unconditional ones after them, summed over
            trajectories.
        own: number of the step t.
        known: numbers of the steps before it whose unconditional outputs there will be.
        first: number of the first step of the run.
        ridge: what is added to the diagonal: the weight of the prior, u_t = c_t + u_j - c_j with j the last in `known`.

    Returns:
        weights of the conditional outputs 0 to t and of the unconditional ones 0 to t - 1; 0 where there is none.

    Example:
        >>> c, u = [[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 2.0, 3.0]]  # u_1 = 2 c_1 + 3 u_0
        >>> outputs = torch.tensor([*c, *u], dtype=torch.float64)
        >>> [[abs(round(w, 6)) for w in part] for part in fit_row(outputs @ outputs.T, 1, [0], 0, 1e-12)]
        [[0.0, 2.0], [3.0]]
    """
    steps = gram.shape[0] // 2
    columns = [*range(first, own + 1), *(steps + i for i in known)]
    prior = torch.zeros(len(columns), dtype=gram.dtype)
    prior[own - first] = 1.0
    if known:
        prior[known[-1] - first] -= 1.0
        prior[columns.index(steps + known[-1])] = 1.0
    inner = gram[columns][:, columns]
    residual = gram[columns, steps + own] - inner @ prior
    # The outputs of neighbouring steps are nearly the same, so that the equations alone are all but singular.
    damped = inner + ridge * torch.eye(len(columns), dtype=gram.dtype)
    weights = (prior + torch.linalg.lstsq(damped, residual).solution).tolist()
    row = ([0.0] * (own + 1), [0.0] * own)
    for column, weight in zip(columns, weights, strict=True):
        row[column >= steps][column % steps] = weight
    return tuple(row[0]), tuple(row[1])


class Trajectories(GuidancePolicy):
    """Plain guidance that adds up the inner products of all outputs of each run.

    Attributes:
        measured: conditions of the first run; None before.
    """

    def __init__(self) -> None:
        self.measured: Measured | None = None
        self._grams: dict[int, torch.Tensor] = {}
        self._last: dict[int, torch.Tensor] = {}
        self._run: dict[tuple[int, int, int], torch.Tensor] = {}
        self._first, self._samples = 0, 0

    def begin_run(self, run: Run) -> None:
        """See `GuidancePolicy.begin_run`."""
        self.finish()
        self._scheduler = fingerprint(run.scheduler)

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """Remember both outputs until the run is over."""
        assert uncond is not None
        refuse_stream("linear-ag", moment, cond)
        position = moment.position
        if self.measured is None:
            self.measured = Measured.at(moment, self._scheduler)
        if position.schedule_length != self.measured.position.schedule_length:
            raise DitaError(
                f"the calibration call ran {self.measured.position.schedule_length} steps first and "
                f"{position.schedule_length} now; weights are fitted for one number of steps"
            )
        self._first = position.index - position.step
        for place, output in enumerate((cond, uncond)):
            key = (position.stage, place, position.index)
            self._run[key] = moment.guided(output).to("cpu", torch.float32, copy=True)
        return uncond

    def finish(self) -> bool:
        """Add up the run that is over; False if it is the same as the one before it, which then counts once."""
        run, self._run = self._run, {}
        if not run:
            return True
        assert self.measured is not None
        steps = self.measured.position.schedule_length
        grams = {stage: torch.zeros(2 * steps, 2 * steps, dtype=torch.float64) for stage, _, _ in run}
        for stage, gram in grams.items():
            keys = [key for key in run if key[0] == stage]
            rows = torch.tensor([place * steps + index for _, place, index in keys])
            elements = run[keys[0]][0].numel()
            for parts in zip(*(run[key].flatten().split(_CHUNK) for key in keys), strict=True):
                stacked = torch.stack(parts).double() / elements**0.5
                gram[rows[:, None], rows] += stacked @ stacked.T
        if self._last and all(torch.equal(gram, self._last.get(stage, gram[:0])) for stage, gram in grams.items()):
            return False
        self._last = grams
        self._samples += next(iter(run.values())).shape[0]
        for stage, gram in grams.items():
            self._grams[stage] = self._grams[stage] + gram if stage in self._grams else gram
        return True

    def weights(self, interval: int, ridge: float) -> dict[str, list[Any]]:
        """The rows of every stage, for both branches at every `interval`-th step.

        Args:
            interval: in steps.
            ridge: weight of the prior, as a share of one trajectory.

        Returns:
            values of a `LinearWeights`.
        """
        values: dict[str, list[Any]] = {}
        for stage, gram in self._grams.items():
            seen = [i for i in range(gram.shape[0] // 2) if gram[i, i] > 0]
            damping = ridge * gram.diagonal().sum().item() / (2 * max(1, len(seen)) * max(1, self._samples))
            rows: list[Any] = [()] * (gram.shape[0] // 2)
            for own in seen:
                if (own - self._first) % interval:
                    known = [i for i in seen if i < own and (i - self._first) % interval == 0]
                    rows[own] = fit_row(gram, own, known, self._first, damping)
            values[str(stage)] = rows
        return values
