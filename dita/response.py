"""What a scheduler makes of the model's outputs: the linear map that most deterministic solvers are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dita.loop import previous_sample

_TOLERANCE = 1e-3  # of the latents' size; solvers that clip, threshold or draw noise are off by far more


@dataclass(frozen=True)
class Schedule:
    """The timesteps of the run under way.

    Attributes:
        timesteps: one for each evaluation that is executed, of the training schedule, scaled to 0..1000.
        order: evaluations in a step of the solver.
        measure: makes `linear_response` of it; None is returned once the run has begun.
    """

    timesteps: tuple[float, ...]
    order: int
    measure: Callable[[], np.ndarray | None]


def linear_response(scheduler: Any, begin: int = 0) -> np.ndarray | None:
    """How the latents follow from the noise they begin with and the model's outputs, measured on a copy.

    DDIM, Euler, DPM-Solver++, UniPC and flow matching turn outputs v_0, ..., v_{S-1} into latents that are sums of
    them, with numbers that the timesteps alone decide: x_s = R[s, S] x_0 + sum_t R[s, t] v_t. A copy of the scheduler
    is stepped on numbers: entry t of the batch puts out 1 at step t and 0 elsewhere, so that its latents are R[:, t].
    One more entry puts out any numbers, by which the map is checked.

    Args:
        scheduler: of diffusers, with its timesteps set and before its first step; it is copied, not stepped.
        begin: first of its timesteps that is executed; image-to-image runs leave out some.

    Returns:
        float64 [S + 1, S + 1], row s for the latents before step s, row S for the last ones. None if the step is no
        such map (noise is drawn, or something is clipped), or takes more than one output.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
        >>> linear_response(scheduler).round(2).tolist()
        [[0.0, 0.0, 1.0], [-0.5, 0.0, 1.0], [-0.5, -0.5, 1.0]]
    """
    if getattr(scheduler, "order", 1) != 1:
        return None
    try:
        return _measure(copy.deepcopy(scheduler), begin)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None  # its step asks for more than an output, a timestep and a sample


def _measure(scheduler: Any, begin: int) -> np.ndarray | None:
    timesteps = scheduler.timesteps[begin:]
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    steps, device = len(timesteps), timesteps.device
    # Some solvers look at the sample's axes: [entry, channel, row, column].
    generator = torch.Generator().manual_seed(0)
    shape = (steps + 2, 1, 2, 2)
    sample = torch.zeros(shape)
    sample[steps] = 1.0
    sample[steps + 1] = 3 * torch.randn(shape[1:], generator=generator)
    outputs = torch.zeros(steps, *shape)
    outputs[range(steps), range(steps)] = 1.0
    outputs[:, steps + 1] = 3 * torch.randn(steps, *shape[1:], generator=generator)
    sample, outputs = sample.to(device), outputs.to(device)
    drawn, found = torch.cat([outputs[:, -1], sample[-1:]]).double(), [sample]
    takes = inspect.signature(type(scheduler).step).parameters
    with torch.random.fork_rng(devices=[]):
        for output, timestep in zip(outputs, timesteps, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(found[-1], timestep)  # some warn if it was not called
            named = {"return_dict": False} if "return_dict" in takes else {}
            new = previous_sample(type(scheduler).step(scheduler, output, timestep, found[-1], **named))
            if new is None or new.shape != sample.shape:
                return None
            found.append(new.to(sample.dtype))
    rows = torch.stack(found).double()
    response = rows[:, : steps + 1, 0, 0, 0]
    expected = torch.einsum("st,tcij->scij", response, drawn)
    error = (rows[:, -1] - expected).abs().max()
    if not torch.isfinite(rows).all() or error > _TOLERANCE * rows[:, -1].abs().max():
        return None
    return response.cpu().numpy()
