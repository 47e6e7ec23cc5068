"""Schedulers of diffusers whose timesteps are part of their configuration, so that a schedule is saved with a pipeline.

    found = dita.calibrate(pipe, "optimal-steps", call)
    pipe.scheduler = listed_scheduler(pipe.scheduler, found.table.points(10))
    pipe("a prompt", num_inference_steps=10)
    pipe.save_pretrained("mine")

Nothing of dita has to be attached to a pipeline that runs on one of these; `DiffusionPipeline.from_pretrained("mine")`
needs this module imported, because diffusers loads a class that is not its own only then.

There is one for DDIM and one for flow matching's Euler. A list found with DPM++ 2M or UniPC (as on fashion-wan) is
refused here: keep its method attached instead, as JSON (`dita.calibrate(..., save=...)`, `dita.load_method`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from dita.errors import DitaError
from dita.schedulers.timesteps.schedule import Points, steps_asked, stride

__all__ = ["ListedDDIMScheduler", "ListedFlowMatchEulerDiscreteScheduler", "SchedulerMixin", "listed_scheduler"]
# diffusers loads a scheduler only if it finds the base class in the scheduler's own module.


def _taking(base: Any, name: str, check: Callable[[Any, Sequence[float]], None]) -> Callable[..., None]:
    """An `__init__` that takes a list besides what the base class takes; diffusers reads off it what is saved."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        listed = kwargs.pop(name, None)
        base.__init__(self, *args, **kwargs)
        if not listed:
            raise DitaError(f"{type(self).__name__} needs {name}; listed_scheduler makes one with its list")
        check(self, listed)
        self.register_to_config(**{name: list(listed)})

    own = signature(base.__init__)
    extra = Parameter(name, Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = own.replace(parameters=[*own.parameters.values(), extra])  # pyright: ignore
    return __init__


def _check_count(scheduler: Any, listed: Sequence[float], asked: int) -> None:
    if asked != len(listed):
        raise DitaError(
            f"this {type(scheduler).__name__} holds {len(listed)} timesteps, but {asked} steps were asked for: call "
            f"the pipeline with num_inference_steps={len(listed)}, or give it another scheduler"
        )


def _check_timesteps(scheduler: Any, listed: Sequence[float]) -> None:
    whole = all(isinstance(entry, int) for entry in listed)
    limit = scheduler.config.num_train_timesteps
    if not whole or not all(a > b for a, b in zip((limit, *listed), (*listed, -1), strict=True)):
        raise DitaError(f"listed_timesteps are {listed}; expected falling whole numbers from below {limit} down to 0")


def _check_sigmas(scheduler: Any, listed: Sequence[float]) -> None:
    rising = bool(scheduler.config.invert_sigmas)
    ordered = [*listed, 1.0] if rising else [1.0 + 1e-6, *listed, 0.0]
    if not all((a < b) if rising else (a > b) for a, b in zip(ordered, ordered[1:], strict=False)):
        raise DitaError(
            f"listed_sigmas are {listed}; expected {'rising to below 1' if rising else 'falling from 1 to above 0'}"
        )


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

    __init__: Callable[..., None] = _taking(DDIMScheduler, "listed_timesteps", _check_timesteps)

    @functools.wraps(DDIMScheduler.set_timesteps)
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        listed = self.config.listed_timesteps  # pyright: ignore[reportAttributeAccessIssue]
        _check_count(self, listed, num_inference_steps)
        super().set_timesteps(num_inference_steps, device)
        Points(tuple(listed)).write(self)

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

    __init__: Callable[..., None] = _taking(FlowMatchEulerDiscreteScheduler, "listed_sigmas", _check_sigmas)

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        listed = self.config.listed_sigmas  # pyright: ignore[reportAttributeAccessIssue]
        asked = steps_asked({"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps})
        _check_count(self, listed, asked)
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu)
        places = torch.tensor(listed, dtype=torch.float32) * self.config.num_train_timesteps  # pyright: ignore
        Points(tuple(places.tolist()), tuple(listed)).write(self)


def listed_scheduler(scheduler: Any, points: Points) -> ListedDDIMScheduler | ListedFlowMatchEulerDiscreteScheduler:
    """A scheduler like this one that runs these timesteps.

    Args:
        scheduler: a `DDIMScheduler` or a `FlowMatchEulerDiscreteScheduler`.
        points: what to run, from a table or `Points.of`.

    Raises:
        DitaError: the scheduler is another.

    Example:
        >>> listed = listed_scheduler(DDIMScheduler(), Points((999, 400, 50)))
        >>> listed.config.listed_timesteps
        [999, 400, 50]
    """
    if isinstance(scheduler, DDIMScheduler):
        whole = [int(entry) for entry in points.timesteps]
        return ListedDDIMScheduler.from_config(scheduler.config, listed_timesteps=whole)  # pyright: ignore
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = list(points.sigmas)
        return ListedFlowMatchEulerDiscreteScheduler.from_config(scheduler.config, listed_sigmas=sigmas)  # pyright: ignore
    raise DitaError(
        f"no scheduler of {type(scheduler).__name__}'s kind holds a list; expected DDIMScheduler or "
        "FlowMatchEulerDiscreteScheduler"
    )
