"""Jenga's AttenCarve: blocks along a space-filling curve, kept by their means and for being neighbours in the video.

Zhang et al., "Training-Free Efficient Video Generation via Dynamic Token Carving", NeurIPS 2025, arXiv 2505.16864.

Order: a generalised Hilbert curve through frames, rows and columns, cut into blocks of 128. Score: attention between
block means, image only. Selection: the smallest set of a row whose shares exceed `mass`, but at least a share of the
blocks, less in the second part of the run; all blocks with a token next to one of the row's, side by side or across a
corner; and all text. When: at every step and layer, none dense; the first step of a stage, which the authors' step
skipping always computes, is carved like the others.

Differs from the paper: only AttenCarve is here. Its progressive resolution (ProRes), with the bias on text that goes
with it, is the method `progressive-resolution`; skipped steps are the business of caches. The curve has no diagonal
steps (see `orders`), the last block may be short instead of being filled up, text has blocks of its own in any number
instead of the last two, and blocks on the diagonal are kept with or without neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.guards import steps_of
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.orders import gilbert, touching
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.scored import Scored, pooled_shares
from dita.kernels.sparse.select import top_mass
from dita.registry import register


class Carve(Scored):
    """Keep the mass, the least number and the neighbours.

    Args:
        settings: of the method.
    """

    def __init__(self, settings: Jenga) -> None:
        super().__init__(settings.block, settings.block)
        self.settings = settings

    def make_cut(self, layout: Layout, device: torch.device) -> Cut:
        """Consecutive tokens of the curve."""
        return Cut(layout, self.block_q, self.block_k, gilbert(layout.grid).to(device))

    def mask(self, asked: Asked, cut: Cut) -> torch.Tensor | None:
        """See `Scored.mask`."""
        settings = self.settings
        late = asked.step >= steps_of(settings.switch, asked.steps)
        least = max(1, int(settings.keep[late] * cut.columns + 1e-6))
        mask = top_mass(pooled_shares(asked, cut), settings.mass, least)
        if settings.neighbours:
            mask = mask | touching(asked.layout.grid, self.block_k).to(mask.device)
        return mask


@register
@dataclass(frozen=True)
class Jenga(SparseMethod):
    """The settings of Jenga's AttenCarve.

    Attributes:
        keep: least share of the blocks that a row keeps, before and after `switch`; published as drop rates of 0.75 and
            0.85 (base), 0.7 and 0.8 (turbo), 0.8 and 0.95 (flash).
        mass: part of the score that a row keeps; 0.3, or 0.5 for flash.
        switch: part of the run after which the second share holds.
        neighbours: blocks that touch in the video are kept.
        block: tokens of a block.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> Jenga(mass=0.5).label()
        'mass=0.5'
    """

    keep: tuple[float, float] = (0.25, 0.15)
    mass: float = 0.3
    switch: float = 0.5
    neighbours: bool = True
    block: int = 128
    dense_steps: float = field(default=0.0, kw_only=True)

    name: ClassVar[str] = "jenga"
    title: ClassVar[str] = "Jenga (AttenCarve)"
    arxiv: ClassVar[str] = "2505.16864"
    axes: ClassVar[str] = (
        "attention of block means along a Hilbert curve; top mass, least share, neighbours; every step"
    )
    citation: ClassVar[str] = """@inproceedings{zhang2025jenga,
  title={Training-Free Efficient Video Generation via Dynamic Token Carving},
  author={Zhang, Yuechen and Xing, Jinbo and Xia, Bin and Liu, Shaoteng and Peng, Bohao and Tao, Xin and Wan, Pengfei
    and Lo, Eric and Jia, Jiaya},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if len(self.keep) != 2:
            raise DitaError(f"keep is {self.keep!r}; expected two shares, before and after the switch")
        for share in self.keep:
            check_number("keep", share, 0, 1)
        check_number("mass", self.mass, 0, 1)
        check_number("switch", self.switch, 0, 1)
        check_whole("block", self.block, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Carve(self)

    @classmethod
    def forced(cls) -> Jenga:
        """Small blocks, so that few tokens suffice, and no neighbours: in a tiny image all blocks are."""
        return cls(keep=(0.3, 0.2), mass=0.2, neighbours=False, block=4, dense_steps=0.125, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[Jenga, ...]:
        """The published base and two around it; without neighbours last, of which short videos have many."""
        settings = ((0.4, 0.3), True), ((0.25, 0.15), True), ((0.25, 0.15), False), ((0.15, 0.05), False)
        return tuple(cls(keep=keep, neighbours=neighbours, block=64) for keep, neighbours in settings)
