"""Solvers: steps taken without the transformer, or several at a time."""

from __future__ import annotations

from dita.schedulers.solvers.dualfast import DualFast
from dita.schedulers.solvers.picard import Picard
from dita.schedulers.solvers.sada import SADA

__all__ = ["DualFast", "Picard", "SADA"]
