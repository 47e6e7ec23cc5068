"""Schedulers of diffusers whose timesteps are part of their configuration, so that a schedule is saved with a pipeline.

    found = dita.calibrate(pipe, "optimal-steps", call)
    pipe.scheduler = listed_scheduler(pipe.scheduler, found.table.points(10))
    pipe("a prompt", num_inference_steps=10)
    pipe.save_pretrained("mine")

Nothing of dita has to be attached to a pipeline that runs on one of these; `DiffusionPipeline.from_pretrained("mine")`
needs this module imported, because diffusers loads a class that is not its own only then.

There is one each for DDIM, flow matching's Euler, DPM-Solver++ and UniPC. They prepare a run as their base class does,
for as many steps as the list has, and then write the list, as a method that is attached would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from dita.errors import DitaError
from dita.schedulers.timesteps.schedule import Points, arguments_of, check_predictor, steps_asked, stride

__all__ = [
    "ListedDDIMScheduler",
    "ListedDPMSolverMultistepScheduler",
    "ListedFlowMatchEulerDiscreteScheduler",
    "ListedUniPCMultistepScheduler",
    "SchedulerMixin",
    "listed_scheduler",
]
# diffusers loads a scheduler only if it finds the base class in the scheduler's own module.


def _taking(base: Any, *names: str) -> Callable[..., None]:
    """An `__init__` that takes lists besides what the base class takes; diffusers reads off it what is saved."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        lists = {name: kwargs.pop(name, None) for name in names}
        base.__init__(self, *args, **kwargs)
        for name, listed in lists.items():
            if not listed:
                raise DitaError(f"{type(self).__name__} needs {name}; listed_scheduler makes one with its list")
            _CHECKS[name](self, listed)
        if len({len(listed) for listed in lists.values()}) > 1:
            told = " and ".join(f"{len(listed)} {name}" for name, listed in lists.items())
            raise DitaError(f"{type(self).__name__} was given {told}; expected one of each for every step")
        self.register_to_config(**{name: list(listed) for name, listed in lists.items()})

    own = signature(base.__init__)
    extra = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names]
    __init__.__signature__ = own.replace(parameters=[*own.parameters.values(), *extra])  # pyright: ignore
    return __init__


def _writing(base: Any) -> Callable[..., None]:
    """A `set_timesteps` that lets the base class prepare the run, then writes the list."""

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = arguments_of(self, args, kwargs)
        points, asked = _points(self), steps_asked(arguments)
        if asked != len(points):
            raise DitaError(
                f"this {type(self).__name__} holds {len(points)} timesteps, but {asked} steps were asked for: call "
                f"the pipeline with num_inference_steps={len(points)}, or give it another scheduler"
            )
        rest = {name: value for name, value in arguments.items() if name not in ("sigmas", "timesteps")}
        base.set_timesteps(self, **{**rest, "num_inference_steps": asked})
        points.write(self)

    return set_timesteps


def _points(scheduler: Any) -> Points:
    sigmas = tuple(scheduler.config.get("listed_sigmas") or ())
    timesteps = scheduler.config.get("listed_timesteps")
    if timesteps is None:
        timesteps = (torch.tensor(sigmas, dtype=torch.float32) * scheduler.config.num_train_timesteps).tolist()
    return Points(tuple(timesteps), sigmas)


def _check_timesteps(scheduler: Any, listed: Sequence[float]) -> None:
    whole = all(isinstance(entry, int) for entry in listed)
    limit = scheduler.config.num_train_timesteps
    if not whole or not all(a > b for a, b in zip((limit, *listed), (*listed, -1), strict=True)):
        raise DitaError(f"listed_timesteps are {listed}; expected falling whole numbers from below {limit} down to 0")


def _check_sigmas(scheduler: Any, listed: Sequence[float]) -> None:
    config = scheduler.config
    ordered, expected = [float("inf"), *listed, 0.0], "falling to above 0"
    if config.get("invert_sigmas"):
        ordered, expected = [1.0, *reversed(listed), -1e-6], "rising from 0 to below 1"
    elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        ordered, expected = [1.0 + 1e-6, *listed, 0.0], "falling from 1 to above 0"
    elif config.use_flow_sigmas:  # multistep formulas take the logarithm of 1 - sigma
        ordered, expected = [1.0, *listed, 0.0], "falling from below 1 to above 0"
    if not all(a > b for a, b in zip(ordered, ordered[1:], strict=False)):
        raise DitaError(f"listed_sigmas are {listed}; expected {expected}")


_CHECKS = {"listed_timesteps": _check_timesteps, "listed_sigmas": _check_sigmas}


class ListedDDIMScheduler(DDIMScheduler):
    """DDIM over a list of timesteps of its own.

    Args:
        listed_timesteps: falling whole numbers of the training schedule, one a step.
        options: those of `DDIMScheduler`.

    Raises:
        DitaError: no such list; on `set_timesteps`, another number of steps.

    Example:
        >>> scheduler = ListedDDIMScheduler(listed_timesteps=[999, 400, 50])
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps
        tensor([999, 400,  50])
    """

    __init__: Callable[..., None] = _taking(DDIMScheduler, "listed_timesteps")
    set_timesteps: Callable[..., None] = _writing(DDIMScheduler)

    @functools.wraps(DDIMScheduler.step)
    def step(self, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        entries = self.timesteps.tolist()
        if int(timestep) not in entries:
            raise DitaError(f"timestep {int(timestep)} is none of the {len(entries)} that are run: {entries}")
        following = [*entries[1:], -1][entries.index(int(timestep))]
        with stride(self, int(timestep) - following):
            return super().step(model_output, timestep, *args, **kwargs)


class ListedFlowMatchEulerDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps of flow matching over a list of sigmas of its own, whatever the shift or the resolution.

    Args:
        listed_sigmas: the noise levels, one a step, without the end; falling from 1, or rising from 0 with
            `invert_sigmas`.
        options: those of `FlowMatchEulerDiscreteScheduler`.

    Raises:
        DitaError: no such list; on `set_timesteps`, another number of steps.

    Example:
        >>> scheduler = ListedFlowMatchEulerDiscreteScheduler(listed_sigmas=[1.0, 0.75, 0.25], shift=3.0)
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps, scheduler.sigmas
        (tensor([1000.,  750.,  250.]), tensor([1.0000, 0.7500, 0.2500, 0.0000]))
    """

    __init__: Callable[..., None] = _taking(FlowMatchEulerDiscreteScheduler, "listed_sigmas")
    set_timesteps: Callable[..., None] = _writing(FlowMatchEulerDiscreteScheduler)


class ListedDPMSolverMultistepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++ over timesteps and sigmas of its own, whatever the spacing or the shift.

    Args:
        listed_timesteps: falling whole numbers of the training schedule, one a step: what the transformer is told.
        listed_sigmas: the noise levels at the same places, as the scheduler keeps them, without the end; with
            `use_flow_sigmas` below 1.
        options: those of `DPMSolverMultistepScheduler`.

    Raises:
        DitaError: no such lists, or of different lengths; on `set_timesteps`, another number of steps.

    Example:
        >>> scheduler = ListedDPMSolverMultistepScheduler(listed_timesteps=[999, 400], listed_sigmas=[157.4, 1.7])
        >>> scheduler.set_timesteps(2)
        >>> scheduler.timesteps, scheduler.sigmas
        (tensor([999, 400]), tensor([157.4000,   1.7000,   0.0000]))
    """

    __init__: Callable[..., None] = _taking(DPMSolverMultistepScheduler, "listed_timesteps", "listed_sigmas")
    set_timesteps: Callable[..., None] = _writing(DPMSolverMultistepScheduler)


class ListedUniPCMultistepScheduler(UniPCMultistepScheduler):
    """UniPC over timesteps and sigmas of its own, whatever the spacing or the shift.

    Args:
        listed_timesteps, listed_sigmas: see `ListedDPMSolverMultistepScheduler`.
        options: those of `UniPCMultistepScheduler`.

    Raises:
        DitaError: no such lists, or of different lengths; on `set_timesteps`, another number of steps.

    Example:
        >>> flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        >>> scheduler = ListedUniPCMultistepScheduler(**flow, listed_timesteps=[999, 400], listed_sigmas=[0.999, 0.4])
        >>> scheduler.set_timesteps(2)
        >>> scheduler.timesteps, scheduler.sigmas
        (tensor([999, 400]), tensor([0.9990, 0.4000, 0.0000]))
    """

    __init__: Callable[..., None] = _taking(UniPCMultistepScheduler, "listed_timesteps", "listed_sigmas")
    set_timesteps: Callable[..., None] = _writing(UniPCMultistepScheduler)


_KINDS = (
    ListedDDIMScheduler,
    ListedFlowMatchEulerDiscreteScheduler,
    ListedDPMSolverMultistepScheduler,
    ListedUniPCMultistepScheduler,
)


def listed_scheduler(scheduler: Any, points: Points) -> Any:
    """A scheduler like this one that runs these timesteps.

    Args:
        scheduler: a `DDIMScheduler`, `FlowMatchEulerDiscreteScheduler`, `DPMSolverMultistepScheduler` or
            `UniPCMultistepScheduler`.
        points: what to run, from a table or `Points.of`.

    Returns:
        one of the classes above.

    Raises:
        DitaError: the scheduler is another, or lets another predict (`solver_p`), or the points are not those of its
            kind.

    Example:
        >>> listed = listed_scheduler(DDIMScheduler(), Points((999, 400, 50)))
        >>> listed.config.listed_timesteps
        [999, 400, 50]
    """
    if not isinstance(points, Points):
        raise DitaError(
            f"expected the timesteps to run, got {type(points).__name__}: `table.points(steps)` of optimal-steps for a "
            "number of steps that it chose for, or `table.listed` of autodiffusion"
        )
    check_predictor("a list of timesteps", scheduler)
    lists = {"listed_timesteps": [int(entry) for entry in points.timesteps], "listed_sigmas": list(points.sigmas)}
    for kind in _KINDS:
        if isinstance(scheduler, kind.__bases__[0]):
            taken = signature(kind.__init__).parameters
            own = {name: listed for name, listed in lists.items() if name in taken}
            return kind.from_config(scheduler.config, **own)  # pyright: ignore[reportArgumentType]
    raise DitaError(
        f"no scheduler of {type(scheduler).__name__}'s kind holds a list; expected "
        f"{', '.join(kind.__bases__[0].__name__ for kind in _KINDS[:-1])} or {_KINDS[-1].__bases__[0].__name__}"
    )
