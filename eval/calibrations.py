"""Tables that take long to train, shipped for the bundled pipelines so that a sweep need not train them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dita.caching.table import CalibratedMethod
from dita.calibration import load_method
from dita.eval.settings import Setting

FOLDER = Path(__file__).resolve().parent / "models" / "calibrations"


def bundled(folder: str | Path, method: str) -> CalibratedMethod | None:
    """The method that was trained on a bundled pipeline; None if there is none.

    Args:
        folder: the pipeline's; its name counts.
        method: registry name.

    Example:
        >>> bundled("fashion-dit", "harmonica").table.steps
        50
        >>> bundled("fashion-dit", "taylorseer") is None
        True
    """
    path = FOLDER / Path(folder).name / f"{method}.json"
    kept = load_method(path) if path.is_file() else None
    return kept if isinstance(kept, CalibratedMethod) else None


def with_bundled(settings: Sequence[Setting], folder: str | Path) -> list[Setting]:
    """Put shipped tables into the settings that would train the very same, and shipped weights into those without any.

    Args:
        settings: of a sweep, at the pipeline's own guidance.
        folder: of the pipeline.

    Returns:
        The settings; those with a table need no calibration any more, and those that need trained weights name them.
    """
    return [_with_table(setting, folder) for setting in settings]


def _with_table(setting: Setting, folder: str | Path) -> Setting:
    config: Any = setting.config
    if getattr(config, "ships_weights", False) and not config.weights:
        weights = FOLDER / Path(folder).name / f"{setting.method}.safetensors"
        return replace(setting, config=replace(config, weights=str(weights))) if weights.is_file() else setting
    if not isinstance(config, CalibratedMethod) or not config.trained:
        return setting
    kept: Any = bundled(folder, setting.method)
    if kept is None or kept.table.steps != setting.steps:
        return setting
    if any(getattr(kept, name) != getattr(config, name) for name in config.shaping or ()):
        return setting
    return replace(setting, config=replace(config, table=kept.table))
