"""Timesteps: which ones are run, and which the transformer is told."""

from __future__ import annotations

from dita.schedulers.timesteps.aligner import TimestepAligner
from dita.schedulers.timesteps.autodiffusion import AutoDiffusion
from dita.schedulers.timesteps.optimal_steps import OptimalSteps

__all__ = ["AutoDiffusion", "OptimalSteps", "TimestepAligner"]
