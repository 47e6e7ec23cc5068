"""The methods used when the user names none: the pipeline's own calibration if there is one, else by model family.

Without a calibration it is the first-block gate: it decides from the input at hand, falls back to computing when a
prompt is hard, and cannot skip on few-step models whose steps differ too much. Thresholds are the published ones where
there are any (FLUX 0.08, HunyuanVideo 0.06, both from ParaAttention), else diffusers' own default of 0.05. At most
three steps are skipped in a row.
"""

from __future__ import annotations

from typing import Any

from dita.anatomy import Anatomy
from dita.calibration import present
from dita.config import Method
from dita.registry import resolve

_THRESHOLDS = {"flux": 0.08, "hunyuan-video": 0.06}
_OTHER = 0.05


def default_methods(anatomy: Anatomy, pipe: Any = None) -> tuple[Method, ...]:
    """The default recipe for a pipeline, or for one transformer alone."""
    fitted = None if pipe is None else present(pipe)
    if fitted is not None:
        return (fitted,)
    threshold = _THRESHOLDS.get(anatomy.family, _OTHER)
    return (resolve("fbcache", threshold=threshold, max_consecutive=3),)
