"""Measuring: trained pipelines that ship with dita, metrics, timing, sweeps, reports.

Names are loaded when first used: importing `dita.eval` loads neither diffusers nor torchmetrics nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dita.eval.classifier import FashionClassifier, load_classifier
    from dita.eval.columns import psnr_of
    from dita.eval.costmodel import CostModel
    from dita.eval.data import CLASSES, load_fashion_mnist
    from dita.eval.flops import count_flops
    from dita.eval.modelshape import ModelShape
    from dita.eval.pipelines import load_pipeline
    from dita.eval.rows import best_at, read_rows
    from dita.eval.sweep import run_sweep
    from dita.eval.timing import measure, pinned_threads
    from dita.eval.winners import best_at_semantic

_HOMES = {
    "CLASSES": "data",
    "CostModel": "costmodel",
    "FashionClassifier": "classifier",
    "ModelShape": "modelshape",
    "best_at": "rows",
    "best_at_semantic": "winners",
    "count_flops": "flops",
    "load_classifier": "classifier",
    "load_fashion_mnist": "data",
    "load_pipeline": "pipelines",
    "measure": "timing",
    "pinned_threads": "timing",
    "psnr_of": "columns",
    "read_rows": "rows",
    "run_sweep": "sweep",
}

__all__ = [
    "CLASSES",
    "CostModel",
    "FashionClassifier",
    "ModelShape",
    "best_at",
    "best_at_semantic",
    "count_flops",
    "load_classifier",
    "load_fashion_mnist",
    "load_pipeline",
    "measure",
    "pinned_threads",
    "psnr_of",
    "read_rows",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
