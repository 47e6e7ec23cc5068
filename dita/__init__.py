"""dita makes diffusion transformers fast without retraining them.

    import dita
    pipe = dita.accelerate_pipeline(pipe)              # a safe default
    pipe = dita.accelerate_pipeline(pipe, "taylorseer", interval=4)
    print(dita.report(pipe))
    dita.restore_pipeline(pipe)

Names are loaded when first used, so that importing dita costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dita.errors import DitaError, DitaWarning

if TYPE_CHECKING:
    from dita.adapter import accelerate_model
    from dita.calibration import calibrate, load_method
    from dita.config import Method
    from dita.overview import methods
    from dita.reporting import Report, RunReport, StepRecord
    from dita.session import accelerate_pipeline, accelerated, cite, report, restore_pipeline, share_decisions
    from dita.support import SupportReport, supports

__version__ = "0.1.0"

_HOMES = {
    "Method": "dita.config",
    "Report": "dita.reporting",
    "RunReport": "dita.reporting",
    "StepRecord": "dita.reporting",
    "SupportReport": "dita.support",
    "accelerate_model": "dita.adapter",
    "accelerate_pipeline": "dita.session",
    "accelerated": "dita.session",
    "calibrate": "dita.calibration",
    "cite": "dita.session",
    "load_method": "dita.calibration",
    "methods": "dita.overview",
    "report": "dita.session",
    "restore_pipeline": "dita.session",
    "share_decisions": "dita.session",
    "supports": "dita.support",
}

__all__ = [
    "DitaError",
    "DitaWarning",
    "Method",
    "Report",
    "RunReport",
    "StepRecord",
    "SupportReport",
    "accelerate_model",
    "accelerate_pipeline",
    "accelerated",
    "calibrate",
    "cite",
    "load_method",
    "methods",
    "report",
    "restore_pipeline",
    "share_decisions",
    "supports",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dita' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
