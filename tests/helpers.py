"""What several test modules need: configured methods, snapshots of a pipeline, cached plain outputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from pipelines import TINY

from dita import registry
from dita.config import Method

METHODS = registry.names()
THREE = ("dit", "flux", "wan")


def configured(name: str, kind: str, tiny: str) -> Method:
    """The method's disabled() or forced() setting, calibrated where it must be."""
    config: Method = getattr(registry.get(name), kind)()
    return calibrated(config, tiny) if config.needs_calibration and kind != "disabled" else config


@functools.cache
def calibrated(config: Method, tiny: str) -> Method:
    """The setting measured on a pipeline of its own, once: all pipelines of a name have the same weights."""
    return config.calibrated(TINY[tiny].build(), TINY[tiny].call)  # pyright: ignore[reportAttributeAccessIssue]


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


def assert_same_snapshot(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    """Key for key; the values that a run changes (scheduler state) are only compared by key."""
    assert before.keys() == after.keys()
    for path, attributes in before.items():
        assert attributes.keys() == after[path].keys(), path
        if path not in ("pipe", "scheduler"):
            changed = [k for k, v in attributes.items() if after[path][k] is not v]
            assert not changed, (path, changed)
