"""Stages of a run at different resolutions: their noise levels, written into the scheduler's own list of timesteps.

A noise level is the share of noise in x = (1 - n) x0 + n eps, from 1 down to 0, whichever way the scheduler counts. A
shift by h is n -> h n / (1 + (h - 1) n). Shifts multiply, so that a stage's shift is given as a factor on top of
whatever the pipeline does: a fixed shift, one by resolution, or a list of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dita.errors import DitaError


@dataclass(frozen=True)
class Stage:
    """A part of the run at one resolution.

    Attributes:
        scale: of height and width, 1 for those that the user asked for.
        levels: noise levels at which the model runs, and last the one at which the stage ends.

    Example:
        >>> Stage(0.5, (1.0, 0.75, 0.5)).steps
        2
    """

    scale: float
    levels: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Steps of the solver."""
        return len(self.levels) - 1


def shifted(level: float, factor: float) -> float:
    """A noise level under a further shift.

    Example:
        >>> shifted(0.5, 3.0), shifted(shifted(0.5, 2.0), 1.5)
        (0.75, 0.75)
    """
    return level if factor == 1 else factor * level / (1 + (factor - 1) * level)


def level_at(levels: Sequence[float], share: float) -> float:
    """The noise level after a share of a schedule, in between its steps by a straight line.

    Args:
        levels: of the whole schedule, its end included.
        share: from 0 to 1.

    Example:
        >>> level_at([1.0, 0.9, 0.5, 0.0], 2 / 3), round(level_at([1.0, 0.9, 0.5, 0.0], 0.5), 3)
        (0.5, 0.7)
    """
    place = share * (len(levels) - 1)
    whole = min(int(place + 1e-9), len(levels) - 1)
    rest = place - whole
    if rest < 1e-9 or whole == len(levels) - 1:
        return levels[whole]
    return levels[whole] + rest * (levels[whole + 1] - levels[whole])


def apportioned(steps: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Split steps in proportion to shares, at least one each, by largest remainders.

    Raises:
        DitaError: fewer steps than shares.

    Example:
        >>> apportioned(20, (3, 11, 6)), apportioned(8, (3, 11, 6))
        ((3, 11, 6), (1, 5, 2))
    """
    if steps < len(shares):
        raise DitaError(f"{len(shares)} stages need at least as many steps, but the run has {steps}: ask for more")
    exact = [steps * share / sum(shares) for share in shares]
    counts = [max(1, int(value + 1e-9)) for value in exact]
    while sum(counts) != steps:
        more = 1 if sum(counts) < steps else -1
        able = [n for n, count in enumerate(counts) if count + more > 0]
        counts[max(able, key=lambda n: more * (exact[n] - counts[n]))] += more
    return tuple(counts)


_HISTORY = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


def check_scheduler(method: str, scheduler: Any) -> None:
    """Raise `DitaError` unless stages can be run on this scheduler.

    Between two stages x0 is estimated and noise is added for straight paths, so that it has to be flow matching; and a
    stage ends with a step of first order, so that a solver may look back (what it remembers is dropped with the stage)
    but must not call the model twice a step.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> check_scheduler("m", DDIMScheduler())
        Traceback (most recent call last):
        dita.errors.DitaError: m changes the resolution within a run, which it can do under flow matching with ...
    """
    bases = {base.__name__ for base in type(scheduler).__mro__}
    config = dict(getattr(scheduler, "config", {}))
    euler = "FlowMatchEulerDiscreteScheduler" in bases and not config.get("stochastic_sampling")
    flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    multistep = bool(bases & set(_HISTORY)) and flow and "sde" not in str(config.get("algorithm_type"))
    if not (euler or multistep):
        raise DitaError(
            f"{method} changes the resolution within a run, which it can do under flow matching with "
            "FlowMatchEulerDiscreteScheduler (without stochastic_sampling), or UniPCMultistepScheduler or "
            "DPMSolverMultistepScheduler with use_flow_sigmas and flow_prediction; this pipeline has "
            f"{type(scheduler).__name__}. Put one of these in its place if the model was trained by flow matching"
        )


def rising(scheduler: Any) -> bool:
    """Whether its sigmas rise from 0 to 1 as noise falls, and the model puts out x0 - eps: Mochi."""
    return bool(dict(getattr(scheduler, "config", {})).get("invert_sigmas"))


def noise_levels(scheduler: Any) -> tuple[float, ...]:
    """Noise levels of the run that is set, one a step and the end.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
        >>> noise_levels(scheduler)
        (1.0, 0.5, 0.0)
    """
    sigmas = torch.as_tensor(scheduler.sigmas).double().flatten().tolist()
    return tuple(1 - sigma for sigma in sigmas) if rising(scheduler) else tuple(sigmas)


def write_levels(scheduler: Any, stages: Sequence[Stage]) -> None:
    """Make the stages' noise levels those of the run that is set; entries that stay as they are keep every bit.

    Args:
        scheduler: see `check_scheduler`.
        stages: the first begins where the run does, the last ends at no noise.
    """
    old, kept = noise_levels(scheduler), scheduler.timesteps
    levels = [level for stage in stages for level in stage.levels[:-1]] + [stages[-1].levels[-1]]
    if levels == list(old):
        return
    like = scheduler.sigmas
    values = [1 - level for level in levels] if rising(scheduler) else levels
    scheduler.sigmas = torch.tensor(values, dtype=like.dtype, device=like.device)
    times = (scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps).to(kept)
    for n, (new, plain) in enumerate(zip(levels[:-1], old[:-1], strict=False)):
        if new == plain:
            times[n] = kept[n]
    scheduler.timesteps = times
    scheduler.num_inference_steps = len(times)


def forget_history(scheduler: Any) -> None:
    """Let a solver that looks back begin anew, as `set_timesteps` does; its place in the list stays."""
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)
        scheduler.lower_order_nums = 0
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample = None
