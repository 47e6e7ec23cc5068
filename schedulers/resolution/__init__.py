"""Resolution: parts of the run on fewer tokens."""

from __future__ import annotations

from dita.schedulers.resolution.bottleneck import BottleneckSampling
from dita.schedulers.resolution.progressive import ProgressiveResolution
from dita.schedulers.resolution.ralu import RALU

__all__ = ["RALU", "BottleneckSampling", "ProgressiveResolution"]
