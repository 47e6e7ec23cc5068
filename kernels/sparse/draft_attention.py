"""DraftAttention: the attention of a small draft of every frame says which blocks of the full one to compute.

Shen et al., "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance", 2025, arXiv 2505.14708.

Order: each frame is cut into patches of 8 x 16 tokens, and a patch is a block. Score: attention between the means of
the patches, softmax per row. Selection: the highest scores of a whole head, so that rows keep different numbers, and
all text. When: anew at every step and layer after a quarter of the steps, which are dense (a commented-out line of the
official code; as published it has no dense step).

Differs from the paper: frames need not be multiples of 8 x 16. They are cut into patches that are as equal as can be
and at most that large, and a patch with fewer tokens than the largest ends in empty places: 45 x 80 becomes 6 x 5
patches of 7 or 8 rows. On smaller frames the patches shrink to the frame. Blocks on the diagonal are always kept, as
otherwise a row can be empty. Exactly the stated share of the patches is kept, the official code keeps one pair more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number
from dita.errors import DitaError
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.orders import tiles
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.scored import Scored, pooled_shares
from dita.kernels.sparse.select import top_per_head
from dita.registry import register


class Draft(Scored):
    """Keep the pairs of patches with the highest score in a head.

    Args:
        density: share of the pairs that are kept.
        patch: most rows and columns of a patch.
    """

    def __init__(self, density: float, patch: tuple[int, int]) -> None:
        super().__init__(0, 0)
        self.density, self.patch = density, patch

    def make_cut(self, layout: Layout, device: torch.device) -> Cut:
        """A block to a patch."""
        order, places = tiles(layout.grid, (1, *self.patch))
        return Cut(layout, places, places, order.to(device))

    def mask(self, asked: Asked, cut: Cut) -> torch.Tensor | None:
        """See `Scored.mask`."""
        return None if self.density >= 1 else top_per_head(pooled_shares(asked, cut), self.density)


@register
@dataclass(frozen=True)
class DraftAttention(SparseMethod):
    """DraftAttention's settings.

    Attributes:
        density: share of the pairs of patches that are kept; the published sparsity of 0.9 is a density of 0.1.
        patch: most rows and columns of tokens of a patch.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> DraftAttention(density=0.25).label()
        'density=0.25'
    """

    density: float = 0.1
    patch: tuple[int, int] = (8, 16)
    dense_steps: float = field(default=0.25, kw_only=True)

    name: ClassVar[str] = "draft-attention"
    title: ClassVar[str] = "DraftAttention"
    arxiv: ClassVar[str] = "2505.14708"
    axes: ClassVar[str] = "attention of pooled patches; top share per head; every step"
    citation: ClassVar[str] = """@article{shen2025draftattention,
  title={DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance},
  author={Shen, Xuan and Han, Chenxia and Zhou, Yufa and Xie, Yanyue and Gong, Yifan and Wang, Quanyi and Wang, Yiwei
    and Wang, Yanzhi and Zhao, Pu and Gu, Jiuxiang},
  journal={arXiv preprint arXiv:2505.14708},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("density", self.density, 0, 1)
        if len(self.patch) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.patch):
            raise DitaError(f"patch is {self.patch!r}; expected rows and columns, each a whole number of at least 1")

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Draft(self.density, self.patch)

    @classmethod
    def forced(cls) -> DraftAttention:
        """Small patches, so that few tokens suffice."""
        return cls(density=0.2, patch=(2, 2), dense_steps=0.125, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[DraftAttention, ...]:
        """Densities down to the published one."""
        return tuple(cls(density=density) for density in (0.4, 0.3, 0.2, 0.1))
