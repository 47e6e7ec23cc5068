"""Where a part of a run ends: what the guards of every method inside a layer count by."""

from __future__ import annotations

import math


def steps_of(part: float, steps: int) -> int:
    """How many first steps make up a part of a run; one that is cut counts.

    Args:
        part: of the run, from 0 to 1.
        steps: of the run.

    Example:
        >>> steps_of(0.2, 50), steps_of(0.2, 8), steps_of(0.0, 8)
        (10, 2, 0)
    """
    return math.ceil(part * steps - 1e-9)
