"""What several test modules need: configured methods, snapshots of a pipeline, cached plain outputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from pipelines import TINY

import dita
from dita import registry
from dita.caching.base import CachingMethod
from dita.config import Method
from dita.schedulers.base import SamplingMethod

METHODS = registry.names()
CACHING = tuple(name for name in METHODS if issubclass(registry.get(name), CachingMethod))
SAMPLING = tuple(name for name in METHODS if issubclass(registry.get(name), SamplingMethod))
"""Methods on the sampling loop."""
INSIDE = tuple(name for name in METHODS if name not in (*CACHING, *SAMPLING))
"""Methods inside a layer, which share one handler and keep little from step to step."""
THREE = ("dit", "flux", "wan")
GUIDED = tuple(name for name, tiny in TINY.items() if tiny.branches > 1 or tiny.batched_cfg)


@functools.cache
def _built(tiny: str) -> Any:
    return TINY[tiny].build()


@functools.cache
def suitable(name: str) -> tuple[str, ...]:
    """The tiny pipelines on which a method on the sampling loop has something to do."""
    cls = registry.get(name)
    among = GUIDED if "guidance" in cls.claims else tuple(TINY)
    if "timesteps" in cls.claims or cls.needs_calibration:
        among = tuple(tiny for tiny in among if tiny != "flux-img2img")  # timesteps are found for whole runs
    return tuple(tiny for tiny in among if dita.supports(_built(tiny), cls.forced()))


def of_three(name: str) -> tuple[str, ...]:
    """One or two pipelines for such a method, of the three if possible, with batched and with sequential guidance."""
    fit = suitable(name)
    first = [tiny for tiny in THREE if tiny in fit] or list(fit)
    return tuple(dict.fromkeys((first[0], first[-1])))


ON_THREE = [
    *((m, t) for m in CACHING for t in THREE),
    *((m, THREE[i % 3]) for i, m in enumerate(INSIDE)),
    *((m, t) for m in SAMPLING for t in of_three(m)),
]
"""Caching methods on all three pipelines, the others on some."""
IN_TURN = [
    *((m, THREE[i % 3]) for i, m in enumerate((*CACHING, *INSIDE))),
    *((m, of_three(m)[i % len(of_three(m))]) for i, m in enumerate(SAMPLING)),
]
"""Each method on one pipeline."""
ACROSS_RUNS = tuple(name for name in SAMPLING if registry.get(name).across_runs)
"""Methods that go on from one run to the next, the first of which is plain: they have tests of their own."""
STEPPED = ("bac", "cachequant", "harmonica", "qandc", "smoothcache")
"""Methods whose calibration is a schedule, or corrections, for runs of so many steps."""
HANDLERS = ("adaspa", "asymrnr", "sada-token", "sage", "tome")
"""One method inside a layer for each way of attaching there."""


def configured(name: str, kind: str, tiny: str, steps: int = 8) -> Method:
    """The method's disabled() or forced() setting, calibrated where it must be, for runs of that many steps."""
    config: Method = getattr(registry.get(name), kind)()
    return calibrated(config, tiny, steps) if config.needs_calibration and kind != "disabled" else config


@functools.cache
def calibrated(config: Method, tiny: str, steps: int) -> Method:
    """The setting measured on a pipeline of its own, once: all pipelines of a name have the same weights."""
    return config.calibrated(TINY[tiny].build(), functools.partial(TINY[tiny].call, steps=steps))  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def plain(tiny: str, **call: Any) -> torch.Tensor:
    """Output of the plain pipeline; `call` must be hashable."""
    return TINY[tiny].call(TINY[tiny].build(), **call)


def snapshot(pipe: Any) -> dict[str, dict[str, Any]]:
    """Every attribute dictionary that acceleration could touch: pipe, scheduler, and all modules of its models."""
    holders: dict[str, Any] = {"pipe": pipe, "scheduler": pipe.scheduler}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            holders |= {f"{name}.{path}": module for path, module in component.named_modules()}
    return {path: dict(vars(holder)) for path, holder in holders.items()}


@functools.cache
def ran(tiny: str) -> dict[str, frozenset[str]]:
    """The attributes of a plain pipeline that has run once, by name: a first run adds some."""
    pipe = TINY[tiny].build()
    TINY[tiny].call(pipe)
    return {path: frozenset(attributes) for path, attributes in snapshot(pipe).items()}


def assert_same_snapshot(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], names: dict[str, frozenset[str]] | None = None
) -> None:
    """Key for key; the values that a run changes (scheduler state) are only compared by key.

    Args:
        before, after: snapshots.
        names: the keys expected after, where a run came between; those of `before` if None.
    """
    assert before.keys() == after.keys()
    for path, attributes in before.items():
        assert after[path].keys() == (attributes.keys() if names is None else names[path]), path
        if path not in ("pipe", "scheduler"):
            changed = [k for k, v in attributes.items() if after[path][k] is not v]
            assert not changed, (path, changed)
