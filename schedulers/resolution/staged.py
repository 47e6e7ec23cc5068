"""Runs in stages of different resolution on a pipeline that knows of one: what the methods in this folder share.

The pipeline loops over the timesteps that the scheduler gives it, hands its latents to the transformer and its output
to `scheduler.step`. So the stages' timesteps are written into the scheduler; the transformer is told the present size;
and the last step of a stage returns latents of the next stage's size, which are the pipeline's own from then on. Only
the noise it begins with has the full size and is brought down on the way (`Layout.shrunk_noise`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.errors import DitaError
from dita.loop import Loop, LoopVariables, Request, Run, Runner, Solver, Step
from dita.passage import flatten
from dita.schedulers.base import SamplingMethod
from dita.schedulers.resolution.layout import Layout
from dita.schedulers.resolution.mixture import latents_of, sequence_of, tokens_in, tokens_of
from dita.schedulers.resolution.positions import check_positions, run_at
from dita.schedulers.resolution.stages import (
    Stage,
    check_scheduler,
    forget_history,
    noise_levels,
    rising,
    write_levels,
)

_CONDITIONS = ("image", "mask_image", "control_image", "video", "mask", "strength", "conditions", "init_image")


@dataclass(frozen=True)
class Ending:
    """The last step of a stage.

    Attributes:
        stage: its number.
        sample: latents before the step.
        velocity: eps - x0 as the model has it, after guidance, in float32.
        level: the noise level of the sample.
    """

    stage: int
    sample: torch.Tensor
    velocity: torch.Tensor
    level: float

    def clean(self) -> torch.Tensor:
        """The estimate of x0, float32."""
        return self.sample.float() - self.level * self.velocity


class StagedLoop(Loop):
    """Runs the stages; subclasses say which they are, in `plan`, and may change how one leads to the next.

    Args:
        name: of the method.
        pipe: the pipeline.
        stretched: tokens of a small picture are told to lie as far apart as they do in the large one.
    """

    def __init__(self, name: str, pipe: Any, stretched: bool = False) -> None:
        self.name, self._variables, self.stretched = name, LoopVariables(pipe), stretched
        self.stages: tuple[Stage, ...] = ()
        self._written_to: Any = None
        self._forget()

    def plan(self, levels: tuple[float, ...]) -> tuple[Stage, ...]:
        """The stages of a run.

        Args:
            levels: noise levels that the pipeline set, one a step, and its end.

        Returns:
            stages of which the first begins at the first of these levels and the last ends at the last, at scale 1.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan()")

    def lead_over(self, ending: Ending) -> torch.Tensor:
        """Latents of the next stage: x0 is estimated and resized, and noise is added.

        Returns:
            in any dtype.
        """
        layout, start = self._known(), self.stages[ending.stage + 1].levels[0]
        old, new = (self.grid(n) for n in (ending.stage, ending.stage + 1))
        clean = layout.resized(ending.clean(), old, new)
        return (1 - start) * clean + start * self.noise(clean.shape, clean)

    def timesteps(self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        """See `Loop.timesteps`."""
        result = original(*args, **kwargs)
        check_scheduler(self.name, scheduler)
        self.stages, self._written_to = self.plan(noise_levels(scheduler)), scheduler
        write_levels(scheduler, self.stages)
        return result

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        self._forget()
        if run.scheduler is not self._written_to:
            self.stages = ()

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        if not self.stages:
            request.remark(f"the scheduler was replaced in this run; {self.name} takes part from the next one on")
            return run(replace(request, reason="plainly: the scheduler was replaced"))
        if self.layout is None:
            if request.position.index != request.position.step:
                raise DitaError(
                    f"{self.name} begins at another resolution, but this run begins in the middle of its timesteps, as "
                    "from a picture: restore the pipeline for this call"
                )
            own = self._variables.read().get("latents")
            self.layout = Layout.of(request, own if isinstance(own, torch.Tensor) else None)
            self.check_layout(self.layout)
        return self.call(self.place(request.position.index)[0], request, run)

    def check_layout(self, layout: Layout) -> None:
        """Raise `DitaError` if the stages do not go with this size; asked once a run."""

    def call(self, stage: int, request: Request, run: Runner) -> Any:
        """Run the model at a stage's resolution."""
        layout, grid = self._known(), self.grid(stage)
        if grid == layout.full:
            return run(replace(request, reason=f"stage {stage + 1}: full resolution"))
        ratio = (layout.tokens(grid), layout.tokens(layout.full))
        changed = layout.request(request, grid)
        changed = replace(changed, reason=f"stage {stage + 1}: {grid[0]} x {grid[1]} tokens a frame", tokens=ratio)
        return self._stretched(changed, run, grid) if self.stretched else run(changed)

    def _stretched(self, request: Request, run: Runner, grid: tuple[int, int]) -> Any:
        layout = self._known()
        sides = [
            (torch.arange(n, device=request.latents.device) + 0.5) * (whole / n) - 0.5
            for n, whole in zip(grid, layout.full, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).view(1, 1, -1, 2)
        places = places.expand(1, layout.frames, -1, 2)
        sequence = sequence_of(layout, tokens_of(layout, request.latents, grid))
        result = run_at(request, run, layout, layout.full, places, sequence, (layout.frames, *grid))
        (output, *rest), rebuild = flatten(result)
        assert output is not None
        return rebuild((latents_of(layout, tokens_in(layout, output), grid), *rest))

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        if not self.stages or self.layout is None:
            return solve(step.output, step.sample)
        number, place = self.place(step.position.index)
        stage = self.stages[number]
        sample, output = self.fitted(number, step.sample, step.output)
        if self._fresh:
            forget_history(step.scheduler)
            self._fresh = False
        if place + 1 < stage.steps or not self.leads_elsewhere(number):
            return solve(output, sample)
        self._fresh = True
        solve(output, sample)  # for the scheduler's count; its own step would have to be of one size
        velocity = -output.float() if rising(step.scheduler) else output.float()
        return self.lead_over(Ending(number, sample, velocity, stage.levels[place])).to(sample.dtype)

    def fitted(self, stage: int, sample: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample and output at the stage's size, where the pipeline or another method still has the full one."""
        layout, grid = self._known(), self.grid(stage)
        if grid != layout.full and layout.fits(output, layout.full):
            output = layout.resized(output, layout.full, grid)  # left out by another method, which put zeros there
        return layout.brought(sample, grid), output

    def leads_elsewhere(self, stage: int) -> bool:
        """Whether the stage ends otherwise than by a step to the next noise level."""
        if stage + 1 == len(self.stages):
            return False
        ends, starts = self.stages[stage].levels[-1], self.stages[stage + 1].levels[0]
        return self.grid(stage) != self.grid(stage + 1) or ends != starts

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of tokens at a stage."""
        return self._known().grid(self.stages[stage].scale)

    def place(self, entry: int) -> tuple[int, int]:
        """The stage of an entry of the list of timesteps, and the number of the step within it."""
        for number, stage in enumerate(self.stages):
            if entry < stage.steps:
                return number, entry
            entry -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps - 1

    def noise(self, shape: tuple[int, ...] | torch.Size, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise from the user's generators, else from the global one, as pipelines draw theirs.

        Args:
            shape: [B, ...]; with a list of generators each sample has its own.
            like: float32, for its device.
        """
        from diffusers.utils.torch_utils import randn_tensor  # with it come torch's compilers

        generator = self._variables.read().get("generator")
        return randn_tensor(tuple(shape), generator=generator, device=like.device, dtype=torch.float32)

    def _known(self) -> Layout:
        assert self.layout is not None
        return self.layout

    def _forget(self) -> None:
        self.layout: Layout | None = None
        self._fresh = False


@dataclass(frozen=True)
class StagedMethod(SamplingMethod):
    """A method that runs in stages of different resolution; subclasses define `staged`.

    Attributes:
        stretched: tokens of a small picture are told to lie as far apart as they do in the large one, for models that
            were trained at one size. Without, as published, they lie as in a picture of that size.
    """

    stretched: bool = field(default=False, kw_only=True)

    seams: ClassVar[frozenset[str]] = frozenset({"step", "model"})
    claims: ClassVar[frozenset[str]] = frozenset({"resolution", "timesteps", "solver"})

    def staged(self, pipe: Any) -> StagedLoop:
        """Build the object that does the work on a pipeline that passed the checks."""
        raise NotImplementedError(f"{type(self).__name__} must define staged()")

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> StagedLoop:
        """See `SamplingMethod.make`.

        Raises:
            DitaError: the scheduler is not a flow-matching one, or the pipeline begins from, or is conditioned on, a
                picture of full size.
        """
        if pipe is not None:
            check_scheduler(self.name, pipe.scheduler)
            parameters = signature(type(pipe).__call__).parameters
            given = [name for name in _CONDITIONS if name in parameters]
            if given:
                raise DitaError(
                    f"{self.name} starts from noise at another resolution, but {type(pipe).__name__} takes "
                    f"{', '.join(given)}: a picture of full size, which cannot follow. Use a text-to-image or "
                    "text-to-video pipeline"
                )
        for anatomy in anatomies if self.stretched else ():
            check_positions(self.name, anatomy.model)
        return self.staged(pipe)


def check_stages(name: str, **settings: tuple[Any, ...]) -> None:
    """Raise `DitaError` unless all settings are tuples of one length, at least 1.

    Example:
        >>> check_stages("m", scales=(0.5, 1.0), steps=(1,))
        Traceback (most recent call last):
        dita.errors.DitaError: m has scales of 2 and steps of 1; expected one value for each stage
    """
    lengths = {key: len(value) if isinstance(value, tuple) else 0 for key, value in settings.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        counts = " and ".join(f"{key} of {length}" for key, length in lengths.items())
        raise DitaError(f"{name} has {counts}; expected one value for each stage")
