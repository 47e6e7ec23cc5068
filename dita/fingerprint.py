"""Short names for models and schedulers, by which calibrations are matched."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_IGNORED = ("_name_or_path", "_diffusers_version", "_class_name", "_use_default_values", "trained_betas")


def fingerprint(component: Any) -> str:
    """Class name and a hash of the configuration of a diffusers model or scheduler; weights do not enter.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> fingerprint(DDIMScheduler()) == fingerprint(DDIMScheduler())
        True
    """
    config = {k: v for k, v in dict(getattr(component, "config", {})).items() if k not in _IGNORED}
    text = json.dumps(config, sort_keys=True, default=str)
    return f"{type(component).__name__}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
