"""SADA's stability criterion, and what stands for the model's output at a step that is skipped.

See `dita.schedulers.solvers.sada`. B samples; f is the slope of the trajectory at a step, M the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dita.loop import Step
from dita.schedulers.levels import Level, predicts

WEIGHTS = (5 / 8, 3 / 4, -3 / 8)
"""Of the slopes at a step and the two before it, in the sample extrapolated from it."""


class Criterion:
    """Watches a run step by step and judges it; subclasses know what the model puts out."""

    def stand_in(self, step: Step, entry: int) -> torch.Tensor:
        """What the scheduler is given at a step that was skipped, of the shape and dtype of `step.output`.

        Args:
            step: its output is that of the last step that was computed, after guidance.
            entry: number of the step's timestep in the scheduler's list.
        """
        raise NotImplementedError

    def stepped(
        self, step: Step, entry: int, used: torch.Tensor, after: torch.Tensor, skipped: bool
    ) -> list[float] | None:
        """The scheduler took a step.

        Args:
            step, entry: as before it.
            used: the output that the scheduler was given.
            after: the next sample.
            skipped: the transformer was not called.

        Returns:
            the mean of M for each sample; None as long as there are fewer than three slopes.
        """
        raise NotImplementedError

    def plan(self, step: Step, entry: int, polynomial: bool) -> bool:
        """The step after this one is to be skipped: prepare what stands for it.

        Args:
            step, entry: the step that was taken.
            polynomial: by x0 kept from time to time, where the criterion has such.

        Returns:
            False if too little is known yet.
        """
        raise NotImplementedError

    def tensors(self) -> list[torch.Tensor | None]:
        """What is kept."""
        raise NotImplementedError


class NoiseCriterion(Criterion):
    """For models that predict noise, velocity or the clean sample over the noise levels of DDPM.

    Args:
        interval: x0 is kept at every step whose number is 1 modulo this.
        terms: how many x0 are kept.
        reach: see `SADA`.
    """

    def __init__(self, interval: int, terms: int, reach: str) -> None:
        self.interval, self.terms, self.reach = interval, terms, reach
        self._slopes: list[torch.Tensor] = []
        self._kept: list[tuple[int, torch.Tensor]] = []
        self._ahead: torch.Tensor | None = None
        self._clean: torch.Tensor | None = None

    def stand_in(self, step: Step, entry: int) -> torch.Tensor:
        """See `Criterion.stand_in`: the output of a model that sees the planned x0 in the sample at hand."""
        assert self._clean is not None
        level = Level.of(step.scheduler, entry)
        sample = wide(step.sample) * scaling(step.scheduler, level)
        return level.output(sample, self._clean).to(step.output.dtype)

    def stepped(
        self, step: Step, entry: int, used: torch.Tensor, after: torch.Tensor, skipped: bool
    ) -> list[float] | None:
        """See `Criterion.stepped`; at a skipped step the slope is that of the old output at the new sample."""
        scheduler, number, level = step.scheduler, step.position.step, Level.of(step.scheduler, entry)
        sample = wide(step.sample) * scaling(scheduler, level)
        if number % self.interval == 1 % self.interval:
            self._kept = [*self._kept, (number, level.clean(sample, wide(used)))][-self.terms :]
        clean = level.clean(sample, wide(step.output))
        slope = drift(scheduler, entry) * ((sample - level.alpha * clean) / level.sigma**2 - sample)
        older, self._slopes = self._slopes, [*self._slopes, slope][-2:]
        self._ahead = None
        if len(older) < 2 or entry + 1 >= len(scheduler.timesteps):
            return None
        slopes = (slope, older[1], older[0])
        here, there = (float(scheduler.timesteps[n]) for n in (entry, entry + 1))
        gap = here - there if self.reach == "step" else 1.0
        self._ahead = sample - gap * torch.stack([w * f for w, f in zip(WEIGHTS, slopes, strict=True)]).sum(0)
        residual = wide(after) * scaling(scheduler, Level.of(scheduler, entry + 1)) - self._ahead
        return means(residual * (slopes[0] - 2 * slopes[1] + slopes[2]))

    def plan(self, step: Step, entry: int, polynomial: bool) -> bool:
        """See `Criterion.plan`."""
        self._clean = None
        if polynomial and len(self._kept) >= min(2, self.terms):
            self._clean = lagrange(self._kept, step.position.step + 1)
        if not polynomial and self._ahead is not None:
            self._clean = Level.of(step.scheduler, entry + 1).clean(self._ahead, wide(step.output))
        return self._clean is not None

    def tensors(self) -> list[torch.Tensor | None]:
        """See `Criterion.tensors`."""
        return [*self._slopes, *(clean for _, clean in self._kept), self._ahead, self._clean]


class FlowCriterion(Criterion):
    """For flow matching, where the output is the slope: M is minus its second difference."""

    def __init__(self) -> None:
        self._outputs: list[torch.Tensor] = []

    def stand_in(self, step: Step, entry: int) -> torch.Tensor:
        """See `Criterion.stand_in`: the line through the last two outputs, as if they were a step apart."""
        return (2 * self._outputs[-1] - self._outputs[-2]).to(step.output.dtype)

    def stepped(
        self, step: Step, entry: int, used: torch.Tensor, after: torch.Tensor, skipped: bool
    ) -> list[float] | None:
        """See `Criterion.stepped`; at a skipped step the old output is remembered, not what stood for it."""
        older, self._outputs = self._outputs, [*self._outputs, wide(step.output)][-2:]
        if len(older) < 2:
            return None
        if skipped:
            return [0.0] * len(used)  # on the line, up to a rounding that must not decide
        sign = Level.of(step.scheduler, entry).sign  # of the output, where time runs upwards
        return means(sign * (2 * older[1] - older[0] - wide(used)))

    def plan(self, step: Step, entry: int, polynomial: bool) -> bool:
        """See `Criterion.plan`."""
        return len(self._outputs) == 2

    def tensors(self) -> list[torch.Tensor | None]:
        """See `Criterion.tensors`."""
        return [*self._outputs]


def criterion_for(scheduler: Any, interval: int, terms: int, reach: str) -> Criterion:
    """A criterion for a run on this scheduler; the settings are those of `SADA`.

    Raises:
        DitaError: the scheduler does not say what its model predicts; see `dita.schedulers.levels.predicts`.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> type(criterion_for(FlowMatchEulerDiscreteScheduler(), 4, 3, "step")).__name__
        'FlowCriterion'
    """
    return FlowCriterion() if predicts(scheduler) == "flow" else NoiseCriterion(interval, terms, reach)


def lagrange(points: Sequence[tuple[int, torch.Tensor]], at: int) -> torch.Tensor:
    """The polynomial through points (number, value), at another number.

    Args:
        points: at least one, with different numbers and values of one shape.
        at: where it is evaluated.

    Returns:
        of the values' shape and dtype.

    Example:
        >>> lagrange([(0, torch.tensor(0.0)), (1, torch.tensor(1.0)), (2, torch.tensor(4.0))], 4)
        tensor(16.)
    """
    total = torch.zeros_like(points[0][1])
    for number, value in points:
        weight = 1.0
        for other, _ in points:
            if other != number:
                weight *= (at - other) / (number - other)
        total = total + weight * value
    return total


def drift(scheduler: Any, entry: int) -> float:
    """Half of DDPM's beta at an entry of the scheduler's list of timesteps, read off its noise levels.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(beta_start=0.02, beta_end=0.02)
        >>> scheduler.set_timesteps(10)
        >>> round(drift(scheduler, 3), 6)
        0.01
    """
    number, alphas = int(float(scheduler.timesteps[entry])), scheduler.alphas_cumprod
    return 0.5 * (1 - float(alphas[number]) / (float(alphas[number - 1]) if number else 1.0))


def scaling(scheduler: Any, level: Level) -> float:
    """What the scheduler multiplies samples with before the model reads them: alpha for Euler and its kin, else 1.

    Example:
        >>> from diffusers import DDIMScheduler, EulerDiscreteScheduler
        >>> level = Level("noise", 0.6, 0.8)
        >>> scaling(DDIMScheduler(), level), scaling(EulerDiscreteScheduler(), level)
        (1.0, 0.6)
    """
    return level.alpha if level.kind != "flow" and hasattr(scheduler, "is_scale_input_called") else 1.0


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least.

    Example:
        >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def means(x: torch.Tensor) -> list[float]:
    """The mean of every sample of [B, ...].

    Example:
        >>> means(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        [2.0, 0.0]
    """
    return x.flatten(1).mean(1).tolist()
