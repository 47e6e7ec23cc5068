"""Runs on a chosen list of timesteps: what the methods that choose them share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.loop import Loop, LoopVariables, Request, Run, Runner, Solver, Step
from dita.schedulers.timesteps.schedule import (
    Points,
    arguments_of,
    check_scheduler,
    steps_asked,
    stride,
    strided,
    with_steps,
)
from dita.seams import Position
from dita.table import Table, has_form


class RunTable(Table):
    """Numbers about the steps of a whole run, which are of no use for another schedule."""

    def compare(self, steps: int, shape: tuple[int, ...], scheduler: str) -> None:
        """Warn if a run differs from the one that was measured.

        Args:
            steps: the number that has to be the same; 0 for any.
            shape: of the transformer's input, without the batch.
            scheduler: its fingerprint.
        """
        found = []
        if steps and self.steps and steps != self.steps:
            found.append(f"{self.steps} steps (now {steps})")
        if self.shape and shape != self.shape:
            found.append(f"an input of {self.shape} (now {shape})")
        if self.scheduler and scheduler != self.scheduler:
            found.append(f"{self.scheduler} (now {scheduler})")
        if found:
            text = f"the {self.noun} was made with {', '.join(found)}; calibrate again for best quality"
            warnings.warn(text, DitaWarning, stacklevel=3)


class PointsTable(RunTable):
    """Such numbers with a list of timesteps: `values` holds "timesteps", and "sigmas" where the scheduler has them."""

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        count, sigmas = len(self.values["timesteps"]), self.values["sigmas"]
        if sigmas and not has_form(sigmas, (float,) * count):
            raise ValueError(f"{count} timesteps, but noise levels {sigmas!r}")

    @property
    def listed(self) -> Points:
        """The list."""
        return Points(tuple(self.values["timesteps"]), tuple(self.values["sigmas"]))


class ListedLoop(Loop):
    """Runs the pipeline on other timesteps than the scheduler's own, as many or fewer; subclasses say on which.

    Args:
        name: of the method.
        pipe: the pipeline.
        table: of a run with the most steps that can be served; it is compared with each run.
    """

    def __init__(self, name: str, pipe: Any, table: RunTable | None = None) -> None:
        self.name, self.table, self._variables = name, table, LoopVariables(pipe)
        self._compared, self._fingerprint, self._warn = False, "", True
        self.asked = 0
        self._listed: tuple[Any, Points] | None = None
        self._left_alone = ""

    def chosen(self, asked: int) -> Points | int | str:
        """What to run where so many steps are asked for.

        Returns:
            a list; a number of steps, on the scheduler's own timesteps; or why the run is left alone, in words.
        """
        return asked

    def timesteps(self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        """See `Loop.timesteps`."""
        arguments = arguments_of(scheduler, args, kwargs)
        self._listed, self._left_alone, self.asked = None, "", steps_asked(arguments)
        plan = self._refusal(arguments) or self.chosen(self.asked)
        if isinstance(plan, str):
            self._left_alone = plan
            return original(*args, **kwargs)
        steps = plan if isinstance(plan, int) else len(plan)
        result = original(*args, **kwargs) if steps == self.asked else original(**with_steps(arguments, steps))
        # The scheduler's own list needs no help, and DDIM's own stride is not always that of its list.
        if isinstance(plan, Points) and plan != Points.of(scheduler):
            plan.write(scheduler)
            self._listed = (scheduler, plan)
        return result

    def _refusal(self, arguments: dict[str, Any]) -> str:
        if arguments.get("timesteps") is not None:
            return "the call gives timesteps of its own"
        strength = self._variables.read().get("strength")
        if isinstance(strength, (int, float)) and strength < 1:
            return f"a run of strength {strength:g} begins in the middle, at a place that other timesteps would move"
        return ""

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        check_scheduler(self.name, run.scheduler)
        self._compared, self._fingerprint, self._warn = False, fingerprint(run.scheduler), True

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`; what a shorter run saves is told to the report, spread over its steps."""
        if self.table is not None and not self._compared:
            self._compared = True
            more = self.asked if self.asked > self.table.steps else 0
            self.table.compare(more, tuple(request.latents.shape[1:]), self._fingerprint)
        if self._left_alone:
            if self._warn:
                self._warn = False
                warnings.warn(f"{self.name} leaves this run alone: {self._left_alone}", DitaWarning, stacklevel=2)
            request.remark(self._left_alone)
            return run(replace(request, reason=self._left_alone))
        position = request.position
        if position.index != position.step:
            raise DitaError(
                f"this run begins at step {position.index - position.step} of its timesteps, but {self.name} chose "
                "them for runs from pure noise; restore the pipeline, or start from noise"
            )
        steps, step = position.steps, position.step
        result = run(replace(request, reason=self.reason(position)))
        for _ in range(self.asked * step // steps + 1, self.asked * (step + 1) // steps):
            request.leave_out(f"{self.asked} steps were asked for, {steps} are run")
        return result

    def reason(self, position: Position) -> str:
        """Why a step is run, for the report."""
        return f"timestep {position.timestep:g}" if self._listed else "the scheduler's own timestep"

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`; schedulers of even stride are led to the next timestep of the list."""
        if self._listed is None or self._listed[0] is not step.scheduler or not strided(step.scheduler):
            return solve(step.output, step.sample)
        entries = [int(entry) for entry in self._listed[1].timesteps]
        number = step.position.step
        if int(step.timestep) != entries[number]:
            raise DitaError(
                f"step {number} is at timestep {int(step.timestep)}, but {self.name} chose {entries[number]}: the "
                "pipeline begins in the middle, or runs timesteps of its own"
            )
        following = entries[number + 1] if number + 1 < len(entries) else -1
        with stride(step.scheduler, entries[number] - following):
            return solve(step.output, step.sample)
