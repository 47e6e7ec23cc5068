"""Asking the transformer about states that the pipeline has not reached: its timesteps, its guidance, its arguments.

A pipeline says neither how it turns the scheduler's timestep into the transformer's argument, nor how it combines its
guidance branches. Both are taken from short lists of what pipelines do, and compared with what this one did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dita.loop import Request

TimeForm = Callable[[torch.Tensor, int, torch.dtype], torch.Tensor]
"""Turns the scheduler's timesteps, their number in training and a dtype into the transformer's argument."""
GuidanceForm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Combines conditional output, unconditional output and scale."""

TIME_FORMS: tuple[TimeForm, ...] = (
    lambda t, trained, dtype: t.to(dtype),
    lambda t, trained, dtype: t.to(dtype) / trained,
    lambda t, trained, dtype: 1 - t.to(dtype) / trained,
)


def plain_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, u + w (c - u).

    Example:
        >>> plain_guidance(torch.tensor([2.0]), torch.tensor([1.0]), 3.0)
        tensor([4.])
    """
    return uncond + scale * (cond - uncond)


def renormed_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """The same, each token brought back to the norm of the conditional output, as Qwen-Image does.

    Example:
        >>> renormed_guidance(torch.tensor([2.0]), torch.tensor([1.0]), 3.0)
        tensor([2.])
    """
    guided = plain_guidance(cond, uncond, scale)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


GUIDANCE_FORMS: tuple[GuidanceForm, ...] = (plain_guidance, renormed_guidance)


def close(new: torch.Tensor, old: torch.Tensor) -> bool:
    """The relative error is at most 1e-3, or 8 roundings of a dtype that is coarser than that.

    Example:
        >>> close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]))
        True
    """
    if new.shape != old.shape:
        return False
    limit = max(1e-3, 8 * max(torch.finfo(t.dtype).eps for t in (new, old)))
    return bool((new.double() - old.double()).norm() <= limit * old.double().norm())


def timesteps_like(argument: Any, timesteps: torch.Tensor, entry: int, trained: int) -> torch.Tensor | None:
    """The transformer's timestep at every entry of the schedule, by how it is given at one.

    Args:
        argument: the transformer's timestep: a number, a scalar, or one for each row.
        timesteps: the scheduler's, [n].
        entry: which of them it stands for.
        trained: timesteps of training.

    Returns:
        [n], of the argument's dtype and device; None where it is none of the forms that pipelines are known to use.

    Example:
        >>> timesteps_like(torch.tensor([0.75]), torch.tensor([1000.0, 750.0, 500.0]), 1, 1000)
        tensor([1.0000, 0.7500, 0.5000])
    """
    if not isinstance(argument, (int, float, torch.Tensor)):
        return None
    given = torch.as_tensor(argument)
    if given.ndim > 1 or not 0 <= entry < len(timesteps):
        return None
    timesteps = timesteps.to(given.device)
    exact = not given.dtype.is_floating_point
    for form in TIME_FORMS:
        listed = form(timesteps, trained, given.dtype)
        if listed.dtype != given.dtype:
            continue
        here = listed[entry].expand_as(given)
        if torch.equal(here, given) if exact else torch.allclose(here, given, rtol=2 * torch.finfo(given.dtype).eps):
            return listed
    return None


def unsuited(request: Request) -> str:
    """Why calls of this kind cannot be made for several states at once, in words; "" if they can."""
    if not {"cond", "uncond"}.issuperset(request.roles) and request.roles != ("all",):
        return f"the pipeline has more branches than a conditional and an unconditional one: {request.roles}"
    if not isinstance(request.get("hidden_states"), torch.Tensor):
        return "the transformer is not called with its latents in one tensor named hidden_states"
    return "another method batches several steps already" if request.entries else ""


def widened(
    request: Request, samples: Sequence[int], states: torch.Tensor, entries: Sequence[int], times: torch.Tensor
) -> Request:
    """The same call for other states, each of its own timestep, in one batch.

    Args:
        request: the pipeline's call, of one branch or several.
        samples: the sample that each state belongs to, whose prompt and other arguments it takes; it may come often.
        states: what the transformer is to read, [rows, ...].
        entries: where each state stands in the scheduler's list of timesteps.
        times: the transformer's timestep at each entry of that list.

    Returns:
        a call with `rows` rows of every branch.
    """
    branches = len(request.roles)
    taken = request.taken([n * request.batch + sample for n in range(branches) for sample in samples])
    hidden = torch.cat([states.to(request.latents.dtype)] * branches)
    timestep = times[torch.tensor([*entries] * branches, device=times.device)]
    return replace(taken.changed(hidden_states=hidden, timestep=timestep), entries=tuple(entries))


def guided(
    outputs: Mapping[str, torch.Tensor], scale: float | None, wanted: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor | str:
    """Combine branches as the pipeline does.

    Args:
        outputs: by role, what the transformer returned, [R, ...].
        scale: of guidance.
        wanted: what the pipeline made of some rows, as its scheduler was given it.
        rows: which rows.

    Returns:
        [R, ...], of the dtype and with the channels of `wanted`, in memory of its own; or why it is not known how, in
        words.

    Example:
        >>> branches = {"cond": torch.tensor([[2.0], [5.0]]), "uncond": torch.tensor([[1.0], [1.0]])}
        >>> guided(branches, 3.0, torch.tensor([[4.0]]), [0])
        tensor([[ 4.],
                [13.]])
    """
    wide = {role: t.to(torch.promote_types(t.dtype, wanted.dtype)) for role, t in outputs.items()}
    cut = {role: cut_to(output, wanted.shape) for role, output in wide.items()}
    cond, uncond = cut.get("cond", cut.get("all")), cut.get("uncond")
    if cond is None or ("uncond" in cut and uncond is None):
        return "the transformer's output has another shape than what the scheduler is given"
    if uncond is None:
        fine = close(cond[rows], wanted)
        return cond.to(wanted.dtype, copy=True) if fine else "the pipeline changes the transformer's output"
    if scale is None:
        return "the guidance scale is not known"
    for form in GUIDANCE_FORMS:
        made = form(cond, uncond, scale)
        if close(made[rows], wanted):
            return made.to(wanted.dtype)
    return "the pipeline combines its branches otherwise than by u + w (c - u)"


def cut_to(output: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor | None:
    """Drop trailing channels that the pipeline drops too (a learned variance).

    Args:
        output: [rows, ...].
        wanted: the shape of the guided output, whose rows do not matter.

    Returns:
        [rows, *wanted[1:]]; None if more than one axis differs, or that one is too short.

    Example:
        >>> cut_to(torch.zeros(3, 8, 2, 2), (1, 4, 2, 2)).shape
        torch.Size([3, 4, 2, 2])
    """
    if output.ndim != len(wanted):
        return None
    axes = [axis for axis in range(1, output.ndim) if output.shape[axis] != wanted[axis]]
    if len(axes) > 1 or any(output.shape[axis] < wanted[axis] for axis in axes):
        return None
    return output.narrow(axes[0], 0, wanted[axes[0]]) if axes else output


def changed_argument(new: Request, old: Request, besides: Sequence[str] = ("hidden_states", "timestep")) -> str:
    """The name of an argument in which two calls of a transformer differ, "" for none; the guidance scale counts.

    Args:
        new, old: the calls.
        besides: arguments that may differ.
    """
    if new.scale != old.scale:
        return "guidance scale"
    names = dict.fromkeys((*new.parameters, *new.kwargs, *old.kwargs))
    for name in names:
        if name not in besides and not _same(new.get(name), old.get(name)):
            return name
    return ""


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (bool, int, float, str, type(None))) or isinstance(b, (bool, int, float, str, type(None))):
        return type(a) is type(b) and bool(a == b)
    return type(a) is type(b)  # a callable, a processor: not known to differ
