"""Block-sparse attention: which part of the attention is computed, and what stands in for the rest.

Importing this package registers every such method.
"""

from __future__ import annotations

from dita.kernels.sparse.adaspa import AdaSpa

__all__ = [
    "AdaSpa",
]
