"""Running a given list of timesteps on a stock scheduler.

The scheduler's own `set_timesteps` runs first, for as many steps as the list has, so that everything it prepares for a
run is its own; then the list is written where it keeps its timesteps and sigmas, which the next run overwrites anyway.
What is written are final values, after any shift, of pairs that belong together: passing them through `sigmas=` or
`timesteps=` would shift them again, or round them.

Schedulers without sigmas (DDIM and its kin) do not look up where a step leads: they subtract an even stride, the
training timesteps divided by the number of steps. For the time of one step they are told the number of steps whose
stride leads to the next entry of the list, a fraction if need be, and do all the rest themselves.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from inspect import signature
from typing import Any

import numpy as np
import torch

from dita.errors import DitaError

STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
"""Schedulers that step by an even stride, by the name of the class or a base."""
_RANDOM = re.compile("Ancestral|SDE|LCM|TCD|DDPM|SASolver")


@dataclass(frozen=True)
class Points:
    """Timesteps of a run and, where the scheduler keeps them, their sigmas; the end of the run is not among them.

    Attributes:
        timesteps: as the scheduler gives them to the pipeline, one a step.
        sigmas: the noise levels at the same places, after any shift; () for schedulers without.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> scheduler.set_timesteps(4)
        >>> Points.of(scheduler).pick([0, 3]).timesteps
        (1000.0, 1.0)
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def of(cls, scheduler: Any) -> Points:
        """Those of the run that is set.

        Raises:
            DitaError: the scheduler keeps more or fewer sigmas than one for each timestep and one for the end.
        """
        timesteps = tuple(torch.as_tensor(scheduler.timesteps).flatten().tolist())
        if strided(scheduler):
            return cls(timesteps)
        sigmas = tuple(torch.as_tensor(scheduler.sigmas).flatten().tolist())
        if len(sigmas) != len(timesteps) + 1:
            raise DitaError(
                f"{type(scheduler).__name__} keeps {len(sigmas)} sigmas for {len(timesteps)} timesteps; expected one "
                "each and one for the end"
            )
        return cls(timesteps, sigmas[:-1])

    def pick(self, indices: Sequence[int]) -> Points:
        """Some of them, by number."""
        return Points(tuple(self.timesteps[i] for i in indices), tuple(self.sigmas[i] for i in indices if self.sigmas))

    def write(self, scheduler: Any) -> None:
        """Make them those of the run, which has as many.

        The end stays the scheduler's own, but where that would lead back (UniPC's last sigma doubles as its end) it is
        the last of these.
        """
        old = scheduler.timesteps
        scheduler.timesteps = torch.tensor(self.timesteps, dtype=old.dtype, device=old.device)
        if self.sigmas:
            old = scheduler.sigmas
            new = torch.tensor(self.sigmas, dtype=old.dtype, device=old.device)
            nearer = torch.maximum if scheduler.config.get("invert_sigmas") else torch.minimum
            scheduler.sigmas = torch.cat([new, nearer(old[-1:], new[-1:])])


def strided(scheduler: Any) -> bool:
    """Whether it steps by an even stride."""
    return any(base.__name__ in STRIDED for base in type(scheduler).__mro__)


@contextlib.contextmanager
def stride(scheduler: Any, gap: int) -> Iterator[None]:
    """Let a scheduler that steps by an even stride step by this one, for the time of one step.

    Args:
        scheduler: see `strided`.
        gap: training timesteps to the next entry, at least 1.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler(clip_sample=False)
        >>> scheduler.set_timesteps(10)
        >>> with stride(scheduler, 3):
        ...     1000 // scheduler.num_inference_steps
        3
        >>> scheduler.num_inference_steps
        10
    """
    own = scheduler.num_inference_steps
    scheduler.num_inference_steps = Fraction(int(scheduler.config.num_train_timesteps), gap)
    try:
        yield
    finally:
        scheduler.num_inference_steps = own


def check_scheduler(method: str, scheduler: Any) -> None:
    """Raise `DitaError` unless a list of timesteps can be run on this scheduler, and runs the same way twice.

    Example:
        >>> from diffusers import FlowMatchHeunDiscreteScheduler
        >>> check_scheduler("m", FlowMatchHeunDiscreteScheduler())
        Traceback (most recent call last):
        dita.errors.DitaError: m needs a scheduler that calls the model once a step; FlowMatchHeunDiscreteScheduler ...
    """
    name, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    if int(getattr(scheduler, "order", 1)) > 1:
        raise DitaError(
            f"{method} needs a scheduler that calls the model once a step; {name} does so twice. Use "
            "FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler, for instance"
        )
    noisy = _RANDOM.search(name) or config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type"))
    if noisy:
        raise DitaError(f"{method} needs a scheduler without noise of its own; {name} adds some at each step")
    check_predictor(method, scheduler)
    if not strided(scheduler) and not (hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index")):
        raise DitaError(
            f"{method} does not know where {name} keeps its timesteps; expected {', '.join(STRIDED)} or a scheduler "
            "with sigmas and a step_index, such as FlowMatchEulerDiscreteScheduler"
        )


def check_predictor(method: str, scheduler: Any) -> None:
    """Raise `DitaError` where a UniPC lets another scheduler predict, which keeps timesteps of its own."""
    predictor = getattr(scheduler, "solver_p", None)
    if predictor is not None:
        raise DitaError(
            f"{method} needs a scheduler that steps by itself; {type(scheduler).__name__} lets "
            f"{type(predictor).__name__} predict (solver_p), which keeps timesteps of its own. Leave solver_p out"
        )


def arguments_of(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `scheduler.set_timesteps(*args, **kwargs)` by name."""
    names = tuple(signature(type(scheduler).set_timesteps).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def steps_asked(arguments: dict[str, Any]) -> int:
    """How many steps such arguments ask for.

    Raises:
        DitaError: they do not tell.

    Example:
        >>> steps_asked({"sigmas": [1.0, 0.5], "device": None})
        2
    """
    for name in ("sigmas", "timesteps"):
        if arguments.get(name) is not None:
            return len(arguments[name])
    count = arguments.get("num_inference_steps")
    if count is None:
        raise DitaError(f"set_timesteps was given {sorted(arguments)}, which do not tell the number of steps")
    return int(count)


def with_steps(arguments: dict[str, Any], steps: int) -> dict[str, Any]:
    """Arguments of `set_timesteps` for another number of steps; sigmas are spread over it as they were.

    Example:
        >>> with_steps({"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.7}, 2)
        {'sigmas': [1.0, 0.5], 'mu': 0.7}
    """
    changed = dict(arguments)
    if changed.get("num_inference_steps") is not None:
        changed["num_inference_steps"] = steps
    sigmas = changed.get("sigmas")
    if sigmas is not None:
        old = np.array([*(float(sigma) for sigma in sigmas), 0.0])
        count = len(old) - 1
        even = np.linspace(1.0, 1 / count, count)
        spread = np.interp(np.arange(steps) / steps, np.arange(count + 1) / count, old)
        # What pipelines pass is even; theirs to the last bit.
        changed["sigmas"] = (np.linspace(1.0, 1 / steps, steps) if np.allclose(old[:-1], even) else spread).tolist()
    return changed


def straightened(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates in which a step of first order is a straight line, at the run's timesteps and its end.

    With latents x = a x0 + s eps, the state x / (a + s) moves along eps - x0 as s / (a + s) falls, for DDIM and flow
    matching alike.

    Args:
        scheduler: with a run set.

    Returns:
        u and scale, float64 [steps + 1]: the state is x / scale, and a step from u to v moves it by v - u times a
        slope.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = DDIMScheduler()
        >>> scheduler.set_timesteps(2)
        >>> [round(v, 3) for v in straightened(scheduler)[0].tolist()]
        [0.775, 0.01, 0.0]
    """
    config = dict(getattr(scheduler, "config", {}))
    if strided(scheduler):
        places = torch.as_tensor(scheduler.timesteps).flatten().cpu().long()
        alphas = scheduler.alphas_cumprod.double().cpu()[places]
        alphas = torch.cat([alphas, torch.as_tensor(scheduler.final_alpha_cumprod).double().cpu().reshape(1)])
        a, s = alphas.sqrt(), (1 - alphas).sqrt()
        return s / (a + s), a + s
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    flow = "Flow" in type(scheduler).__name__ or config.get("use_flow_sigmas")
    if flow or config.get("prediction_type") == "flow_prediction":
        return sigmas, torch.ones_like(sigmas)
    ratio = sigmas / (1 + sigmas)
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0:
        return ratio, (1 + sigmas) / (1 + sigmas**2).sqrt()
    return ratio, 1 + sigmas
