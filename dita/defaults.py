"""The methods used when the user names none, by model family.

The default is the first-block gate: it decides from the input at hand, falls back to computing when a prompt is hard,
and cannot skip on few-step models whose steps differ too much. Thresholds are the published ones where there are any
(FLUX 0.08, HunyuanVideo 0.06, both from ParaAttention), else diffusers' own default of 0.05. At most three steps are
skipped in a row.
"""

from __future__ import annotations

from dita.anatomy import Anatomy
from dita.config import Method
from dita.registry import resolve

_THRESHOLDS = {"flux": 0.08, "hunyuan-video": 0.06}
_OTHER = 0.05


def default_methods(anatomy: Anatomy) -> tuple[Method, ...]:
    """The default recipe for one transformer."""
    threshold = _THRESHOLDS.get(anatomy.family, _OTHER)
    return (resolve("fbcache", threshold=threshold, max_consecutive=3),)
