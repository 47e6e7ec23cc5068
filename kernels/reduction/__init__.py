"""Token reduction: attention on fewer image tokens than there are, and what stands in for the rest.

Importing this package registers every such method.
"""

from __future__ import annotations

from dita.kernels.reduction.asymrnr import AsymRnR
from dita.kernels.reduction.sada_token import SADAToken
from dita.kernels.reduction.token_transforming import TokenTransforming
from dita.kernels.reduction.toma import ToMA
from dita.kernels.reduction.tome import ToMe

__all__ = ["AsymRnR", "SADAToken", "ToMA", "ToMe", "TokenTransforming"]
