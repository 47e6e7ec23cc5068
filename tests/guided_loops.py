"""Guided sampling loops written by hand, and what tests of guidance ask of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from pipelines import TINY

import dita
from dita.config import Method
from dita.loop import Run
from dita.schedulers.guidance.moment import Moment
from dita.seams import Position

W = 3.0
STEPS = 8
StandIn = Callable[[int, torch.Tensor, "torch.Tensor | None", torch.Tensor], torch.Tensor]


def run(tiny: str, *methods: Method, **call: Any) -> tuple[torch.Tensor, Any]:
    with dita.accelerated(TINY[tiny].build(), *methods) as pipe:
        return TINY[tiny].call(pipe, **call), dita.report(pipe).last


def computed(report: Any, branch: str) -> list[int]:
    return [r.step for r in report.records if r.branch == branch and r.action == "computed"]


def moment(step: int, steps: int = STEPS, timestep: float = 500.0, batch: int = 1, stage: int = 0) -> Moment:
    return Moment(Position(step, steps, stage, "", step, steps, step, timestep), W, batch)


def ddim_run(steps: int = STEPS) -> Run:
    return Run(None, DDIMScheduler(), steps, ())


@torch.no_grad()
def by_hand(tiny: str, both: Callable[[int, float], bool], stand_in: StandIn, batch: int = 1) -> torch.Tensor:
    """The pipeline's loop without dita: `both` says whether the unconditional branch runs, `stand_in` what u is."""
    pipe: Any = TINY[tiny].build()
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**({"hidden_states": args[0]} if args else {}), **kwargs})

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    TINY[tiny].call(pipe, batch=batch)
    hook.remove()
    pipe.scheduler.set_timesteps(STEPS)
    x = calls[0]["hidden_states"][:batch]
    for i, t in enumerate(pipe.scheduler.timesteps):
        if tiny == "dit":  # one call, the conditional half first; four channels of noise, four of variance
            given = {**calls[i], "hidden_states": torch.cat([x, x])}
            if not both(i, float(t)):
                given = {k: v[:batch] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            parts = pipe.transformer(**given).sample[:, :4].split(batch)
            c, u = parts[0], parts[1] if len(parts) > 1 else None
        else:
            c = pipe.transformer(**{**calls[2 * i], "hidden_states": x})[0]
            u = pipe.transformer(**{**calls[2 * i + 1], "hidden_states": x})[0] if both(i, float(t)) else None
        u = stand_in(i, c, u, x)
        x = pipe.scheduler.step(u + W * (c - u), t, x, return_dict=False)[0]
    if tiny == "dit":
        return (pipe.vae.decode(1 / pipe.vae.config.scaling_factor * x).sample / 2 + 0.5).clamp(0, 1)
    return x
