"""Guidance: which of its branches are computed, and what stands for those that are not."""

from __future__ import annotations

from dita.schedulers.guidance.interval import GuidanceInterval

__all__ = ["GuidanceInterval"]
