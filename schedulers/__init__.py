"""The sampling loop around the transformer: guidance, solver, timesteps and resolution.

Methods in this room decide how often, at which timesteps, at which size and with which guidance the transformer is
called. They attach at the step seam and the model seam (`dita.loop`) and know nothing of the inside of a block.
Importing this package registers them.
"""

from __future__ import annotations

from dita.schedulers import guidance, resolution, solvers, timesteps
from dita.schedulers.stream import Stream

__all__ = ["Stream", "guidance", "resolution", "solvers", "timesteps"]
