"""Watching a run of the pipeline, to choose timesteps by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeVar

import torch

from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.loop import Loop, Request, Run, Runner, Solver, Step
from dita.schedulers.timesteps.running import ListedLoop, RunTable
from dita.schedulers.timesteps.schedule import Points, straightened
from dita.table import frozen
from dita.watching import watched

T = TypeVar("T", bound=RunTable)
TOLD = ("timestep", "timesteps")
"""How transformers call the argument by which they are told the time."""


def argument_of(model: Any) -> str:
    """The name under which a transformer is told its timestep.

    Raises:
        DitaError: it takes none of that name.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> argument_of(DiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8))
        'timestep'
    """
    parameters = signature(type(model).forward).parameters
    name = next((name for name in TOLD if name in parameters), None)
    if name is None:
        raise DitaError(
            f"{type(model).__name__} takes no argument {' or '.join(TOLD)}; it takes {', '.join(parameters)}"
        )
    return name


@dataclass
class Trace:
    """What a watched run went through.

    Attributes:
        name: of the method that calibrates.
        points: its timesteps.
        states: latents before the first step and after each, N + 1 of [B, ...].
        u, scale: see `straightened`.
        shape: of the transformer's input, without the batch.
        scheduler: its fingerprint.
        told: what the transformer was told for a timestep, step by step, on its own scale.
    """

    name: str
    points: Points
    states: list[torch.Tensor]
    u: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, ...] = ()
    scheduler: str = ""
    told: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return len(self.points)

    def straight(self) -> torch.Tensor:
        """The states in straight coordinates, float64 [N + 1, D] on the CPU; see `straightened`."""
        states = torch.stack([state.double().flatten().cpu() for state in self.states])
        return states / self.scale[:, None]

    def table(self, kind: type[T], values: Mapping[str, Any], pipe: Any) -> T:
        """The table of `values` under the conditions of this run, for the pipeline's first transformer."""
        from dita.session import transformers_of

        model = next(iter(transformers_of(pipe).values()))
        return kind(frozen(values), fingerprint(model), self.scheduler, self.shape, self.steps)


class Watcher(Loop):
    """Writes down the latents of a run; every number of steps and list can be run under it.

    Args:
        name: of the method that calibrates.
        plan: what to run, as `ListedLoop.chosen` says it; 0 for what the call asks for.
        pipe: the pipeline.
    """

    def __init__(self, name: str, pipe: Any, plan: Points | int = 0) -> None:
        self.inner = _Planned(name, pipe, plan)
        self.trace: Trace | None = None

    def timesteps(self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        """See `Loop.timesteps`."""
        return self.inner.timesteps(scheduler, original, args, kwargs)

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        self.inner.begin_run(run)
        u, scale = straightened(run.scheduler)
        self.trace = Trace(
            self.inner.name, Points.of(run.scheduler), [], u, scale, scheduler=fingerprint(run.scheduler)
        )

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        if self.trace is not None:
            self.trace.shape = tuple(request.latents.shape[1:])
            if len(self.trace.told) == request.position.step:
                told = torch.as_tensor(request.get(argument_of(request.anatomy.model)))
                self.trace.told.append(told.flatten()[0].item())
        return self.inner.model(request, run)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        found = self.inner.step(step, solve)
        if self.trace is not None:
            if not self.trace.states:
                self.trace.states.append(step.sample.detach().clone())
            self.trace.states.append(found.detach().clone())
        return found


class _Planned(ListedLoop):
    def __init__(self, name: str, pipe: Any, plan: Points | int) -> None:
        super().__init__(name, pipe)
        self.plan = plan

    def chosen(self, asked: int) -> Points | int | str:
        return self.plan or asked


def trace(name: str, pipe: Any, call: Callable[[Any], Any], plan: Points | int = 0) -> Trace:
    """Run `call(pipe)` and write down its latents; the pipeline comes back as it was.

    Args:
        name: of the method that calibrates.
        pipe: the pipeline, accelerated or not: what is attached is taken off meanwhile.
        call: runs it once.
        plan: steps or timesteps to run in place of those that the call asks for; 0 for those.

    Raises:
        DitaError: the call ran no sampling loop, or began in the middle of one.

    Example:
        >>> trace("m", pipe, lambda p: p("a prompt"), plan=100).steps  # doctest: +SKIP
        100
    """
    watcher = Watcher(name, pipe, plan)
    with watched(pipe, watcher):
        call(pipe)
    found = watcher.trace
    if found is None or len(found.states) != found.steps + 1:
        raise DitaError(
            f"the calibration call of {name} did not run a whole sampling loop: it must run the pipeline once, from "
            "pure noise"
        )
    return found


def same_start(one: Trace, two: Trace) -> None:
    """Raise `DitaError` unless two runs began from the same noise, whatever its strength.

    Example:
        >>> same_start(one, another)  # doctest: +SKIP
    """
    starts = [run.states[0].double() / run.scale[0] for run in (one, two)]
    alike = starts[0].shape == starts[1].shape
    if not alike or torch.nn.functional.cosine_similarity(*(s.flatten() for s in starts), dim=0) < 0.99:
        raise DitaError(
            f"{one.name} runs the calibration call again and again; it must start from the same noise each time: make "
            "a generator with a seed within it"
        )
