"""Guidance: which of its branches are computed, and what stands for those that are not."""

from __future__ import annotations

from dita.schedulers.guidance.adaptive import AdaptiveGuidance
from dita.schedulers.guidance.agd import AGD
from dita.schedulers.guidance.cfg_cache import CFGCache
from dita.schedulers.guidance.cfg_zero import CFGZero
from dita.schedulers.guidance.interval import GuidanceInterval
from dita.schedulers.guidance.linear_ag import LinearAG
from dita.schedulers.guidance.rcfg import RCFG

__all__ = ["AGD", "AdaptiveGuidance", "CFGCache", "CFGZero", "GuidanceInterval", "LinearAG", "RCFG"]
