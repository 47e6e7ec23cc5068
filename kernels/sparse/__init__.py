"""Block-sparse attention: which part of the attention is computed, and what stands in for the rest.

Importing this package registers every such method.
"""

from __future__ import annotations

from dita.kernels.sparse.adaspa import AdaSpa
from dita.kernels.sparse.blade import Blade
from dita.kernels.sparse.draft_attention import DraftAttention
from dita.kernels.sparse.jenga import Jenga
from dita.kernels.sparse.radial import RadialAttention
from dita.kernels.sparse.re_ttention import ReTtention
from dita.kernels.sparse.sage import Sage
from dita.kernels.sparse.sla import SLA
from dita.kernels.sparse.sliding_tile import SlidingTile
from dita.kernels.sparse.sparge import SpargeAttn
from dita.kernels.sparse.svg import SparseVideoGen
from dita.kernels.sparse.svg2 import SparseVideoGen2
from dita.kernels.sparse.vmoba import VMoBA
from dita.kernels.sparse.vorta import VORTA
from dita.kernels.sparse.xattention import XAttention

__all__ = [
    "AdaSpa",
    "Blade",
    "DraftAttention",
    "Jenga",
    "RadialAttention",
    "ReTtention",
    "SLA",
    "Sage",
    "SlidingTile",
    "SpargeAttn",
    "SparseVideoGen",
    "SparseVideoGen2",
    "VMoBA",
    "VORTA",
    "XAttention",
]
