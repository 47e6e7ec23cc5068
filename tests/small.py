"""Pipelines of three blocks, recipes drawn over the registry, and what must hold of a run and after it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers import snapshot
from pipelines import TINY
from pipelines_image import MILD_BETA
from torch import nn

import dita
from dita import registry
from dita.caching.base import CachingMethod
from dita.config import Method

BLOCKS = {"transformer_blocks": 2, "single_transformer_blocks": 1, "blocks": 3}
FEW = {"dit": {"transformer_blocks": 3}, "sd3": {"transformer_blocks": 3}}
SCHEDULERS: dict[str, tuple[Callable[[], Any], ...]] = {
    "dit": (
        lambda: DDIMScheduler(clip_sample=False, beta_end=MILD_BETA),
        lambda: DPMSolverMultistepScheduler(beta_end=MILD_BETA),
    ),
    "flux": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),),
    "sd3": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), lambda: FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "wan": (
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
}
"""Batched guidance, distilled, a solver of second order, and sequential guidance."""
CALIBRATED_STEPS = 5


@dataclass(frozen=True)
class Asked:
    """One call of a pipeline."""

    steps: int = 3
    seed: int = 0
    batch: int = 1
    size: str = "small"


def build(tiny: str, scheduler: int = 0) -> Any:
    """A fresh pipeline of that kind, its transformer cut to three blocks."""
    pipe: Any = TINY[tiny].build()
    for name, count in {**BLOCKS, **FEW.get(tiny, {})}.items():
        held = getattr(pipe.transformer, name, None)
        if isinstance(held, nn.ModuleList):
            # The last block of Stable Diffusion 3 differs from the others: it puts out no text.
            kept = [*list(held)[: count - 1], held[-1]]
            setattr(pipe.transformer, name, nn.ModuleList(kept))
    pipe.scheduler = SCHEDULERS[tiny][scheduler]()
    return pipe


def call(tiny: str, pipe: Any, asked: Asked, **extra: Any) -> torch.Tensor:
    """Run it."""
    return TINY[tiny].call(pipe, steps=asked.steps, seed=asked.seed, batch=asked.batch, size=asked.size, **extra)


@functools.cache
def plain(tiny: str, scheduler: int, asked: Asked) -> tuple[torch.Tensor, dict[str, frozenset[str]]]:
    """Output of the plain pipeline, and the names of all attributes that it then has."""
    pipe = build(tiny, scheduler)
    output = call(tiny, pipe, asked)
    return output, {path: frozenset(attributes) for path, attributes in snapshot(pipe).items()}


@dataclass(frozen=True)
class Setting:
    """One method of a recipe: a name, "default", "disabled", "forced" or "ladder 2", and how a cache keeps features."""

    name: str
    strength: str = "forced"
    keep: str = ""

    def config(self, tiny: str) -> Method:
        """The method, calibrated on a pipeline of that kind if it needs numbers and is forced.

        Raises:
            DitaError: it cannot be calibrated there.
        """
        cls = registry.get(self.name)
        kind, _, rung = self.strength.partition(" ")
        ladder = cls.ladder()
        made = ladder[int(rung) % len(ladder)] if rung else cls() if kind == "default" else getattr(cls, kind)()
        if isinstance(made, CachingMethod):
            made = made.replace(**KEEPS[self.keep])
        return calibrated(made, tiny) if kind == "forced" and made.needs_calibration else made


KEEPS: dict[str, dict[str, Any]] = {
    "": {},
    "host": {"keep_on": "host"},
    "bf16": {"keep_as": "bf16"},
    "budget": {"max_cache_bytes": 20_000},
}


@functools.cache
def calibrated(config: Method, tiny: str) -> Method:
    """Measured once for all tests of a process."""
    return config.calibrated(build(tiny), lambda pipe: call(tiny, pipe, Asked(CALIBRATED_STEPS)))


@contextmanager
def quietly() -> Iterator[None]:
    """Without dita's warnings, of runs that reuse nothing and of calibrations measured elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dita.DitaWarning)
        yield


def classes_of(pipe: Any) -> dict[type, dict[str, Any]]:
    """What the classes of a pipeline, its scheduler and all of its modules hold."""
    modules = [m for c in pipe.components.values() if isinstance(c, nn.Module) for m in c.modules()]
    kinds = {cls for held in (pipe, pipe.scheduler, *modules) for cls in type(held).__mro__}
    return {cls: _held(cls) for cls in kinds if cls.__module__.startswith(("diffusers", "dita"))}


def _held(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name != "__slotnames__"}  # the copy module's own note


def assert_same_classes(before: dict[type, dict[str, Any]]) -> None:
    """Nothing was put on a class."""
    for cls, held in before.items():
        now = _held(cls)
        assert now.keys() == held.keys(), (cls, now.keys() ^ held.keys())
        changed = [name for name in held if now[name] is not held[name]]
        assert not changed, (cls, changed)


def assert_consistent(run: Any) -> None:
    """Every step of a finished run is in the report, once for each branch."""
    assert run.finished and run.records
    assert {record.step for record in run.records} == set(range(run.steps))
    for (_, branch, stage), records in run.streams().items():
        steps = [record.step for record in records]
        assert steps == sorted(set(steps)), (branch, stage, steps)
    whole = [record for record in run.records if record.action == "computed"]
    assert len(whole) + run.reused == len(run.records)
    assert all(record.reason for record in run.records if record.action != "computed")
    assert all(0 <= record.density <= 1 and 0 < record.tokens <= 1 for record in run.records)
    assert run.peak_cache_bytes >= 0 and str(run) and run.details()
