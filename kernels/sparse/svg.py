"""Sparse VideoGen: every head keeps a band, along frames or along time, whichever a few of its queries like better.

Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity", ICML 2025,
arXiv 2502.01776.

Selection: a spatial head sees what is less than w tokens away, counted frame by frame; a temporal head, what is less
than w away counted place by place, the same place of all frames first. Where the text is not among the tokens (Wan),
all see the first frame too. With L tokens, N_t of them text, and a density d the width is w = L (1 - sqrt(1 - d')),
d' = d - 2 N_t / L. Score: some image queries, drawn at random, attend exactly and with either pattern; the pattern of
the smaller mean squared error is the head's, at every step anew. The tokens of temporal heads are put in their order,
and one plan serves all heads.

Differs from the paper: a pair of blocks is kept if their middles are less than w apart, or if they share tokens; the
authors compute every block that the band touches, with a mask inside. The patterns that are compared are those that
are then computed; the authors compare bands of fixed width, on rows among the first of the sequence. Keys of the first
frame are put before the others, so that they fill blocks of their own in temporal heads too. In an image rows take the
place of frames: heads then differ in whether they look along rows or along columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.kernels.masked_attention import masked_attention
from dita.kernels.plan import BlockPlan, put_back
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.tiles import crossed, framed, sees_first_frame, transposed
from dita.registry import register

_ELEMENTS = 2**24  # of the attention map that are held at a time


def band_width(density: float, tokens: int, text: int) -> float:
    """Half the width of a band that, with all text rows and columns, keeps that share of an attention map.

    Example:
        >>> band_width(0.75, 1000, 0), band_width(1.0, 1000, 0), band_width(0.1, 1000, 100)
        (500.0, 1000.0, 0.0)
    """
    rest = min(1.0, max(0.0, density - 2 * text / tokens))
    return tokens * (1 - math.sqrt(1 - rest))


def banded_blocks(
    queries: torch.Tensor, keys: torch.Tensor, position: torch.Tensor, block: int, width: float, sink: int
) -> torch.Tensor:
    """Which blocks a band keeps: bool [T, T].

    Args:
        queries, keys: int64 [V], the tokens in the order they are cut.
        position: int64 [V], where each token stands in the order in which the band is one.
        block: tokens of a block.
        width: half the band's.
        sink: so many tokens, the first by number, are seen by all.

    Example:
        >>> banded_blocks(torch.arange(6), torch.arange(6), torch.arange(6), 2, 2.5, sink=0).int()
        tensor([[1, 1, 0],
                [1, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    (low_q, high_q, middle_q), (low_k, high_k, middle_k) = (
        torch.stack([torch.stack([p.min(), p.max(), p.mean()]) for p in position[order].double().split(block)], 1)
        for order in (queries, keys)
    )
    kept = (middle_q[:, None] - middle_k).abs() < width
    kept |= (low_q[:, None] <= high_k) & (low_k <= high_q[:, None])
    return kept | torch.stack([(part < sink).any() for part in keys.split(block)])


class Bands(Policy):
    """Give every head the better of two bands.

    Args:
        density, block, sampled, first_frame: as of the method.
    """

    def __init__(self, density: float, block: int, sampled: int, first_frame: bool | None) -> None:
        self.density, self.block, self.sampled, self.first_frame = density, block, sampled, first_frame
        self.fleeting = True
        self._patterns: dict[Layout, BlockPlan] = {}

    def begin_run(self) -> None:
        """Forget the patterns."""
        self._patterns.clear()

    def plan(self, asked: Asked) -> BlockPlan | None:
        """Choose a pattern for every head."""
        if self.density >= 1:
            return None
        both = self.patterns(asked.layout, asked.q.device)
        chosen = asked.state["chosen"] = self.choose(asked, both)
        assert both.order_q is not None and both.order_k is not None
        return BlockPlan(
            both.counts[0][chosen], both.indices[0][chosen], self.block, self.block,
            both.order_q[0][chosen], both.order_k[0][chosen], holes=both.holes,
        )  # fmt: skip

    def patterns(self, layout: Layout, device: torch.device | str) -> BlockPlan:
        """Both patterns as a plan for two heads, a spatial and a temporal one; made once a run."""
        if layout not in self._patterns:
            width = band_width(self.density, layout.tokens, layout.text)
            grid = framed(layout.grid)
            sink = grid[1] * grid[2] if sees_first_frame(layout, self.first_frame) else 0
            queries, keys, masks = [], [], []
            for order in (torch.arange(layout.visual), transposed(grid)):
                queries.append(order)
                keys.append(torch.cat([order[order < sink], order[order >= sink]]))
                masks.append(banded_blocks(order, keys[-1], order.argsort(), self.block, width, sink))
            rows, columns = (
                Cut(layout, self.block, self.block, torch.stack(orders)[None].to(device)) for orders in (queries, keys)
            )
            self._patterns[layout] = crossed(rows, columns, torch.stack(masks)[None].to(device))
        return self._patterns[layout]

    def choose(self, asked: Asked, both: BlockPlan) -> torch.Tensor:
        """The pattern that comes closer to exact attention on some queries.

        Args:
            asked: the attention.
            both: as `patterns` returns it.

        Returns:
            int64 [B, H], 0 for the spatial and 1 for the temporal pattern.
        """
        layout, (_, heads, tokens, _) = asked.layout, asked.q.shape
        # The same queries for every head and batch item, whatever was drawn before.
        generator = torch.Generator().manual_seed(asked.step * asked.layers + asked.layer)
        rows = torch.randperm(layout.visual, generator=generator)[: self.sampled] + layout.visual_slice.start
        row, column = (_blocks_of(order, tokens, self.block) for order in (both.order_q, both.order_k))
        mask = both.mask(int(column.max()) + 1)[0]
        valid = None if asked.key_mask is None else asked.key_mask[:, None, None]
        k, v = asked.k.float(), asked.v.float()
        error = torch.zeros(2, *asked.q.shape[:2], device=asked.q.device)
        for some in rows.to(asked.q.device).split(max(1, _ELEMENTS // (heads * tokens))):
            q = asked.q[:, :, some].float()
            exact, _ = masked_attention(q, k, v, valid, asked.scale)
            for pattern in range(2):
                seen = mask[pattern, row[pattern, some]][:, column[pattern]]
                out, _ = masked_attention(q, k, v, seen if valid is None else seen & valid, asked.scale)
                error[pattern] += (out - exact).square().sum((-2, -1))
        return (error[1] < error[0]).long()


def _blocks_of(order: torch.Tensor | None, tokens: int, block: int) -> torch.Tensor:
    """The block that holds each token under the orders [1, 2, N'] of both patterns: int64 [2, tokens]."""
    assert order is not None
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return put_back(place, order, tokens)[0] // block


@register
@dataclass(frozen=True)
class SparseVideoGen(SparseMethod):
    """Sparse VideoGen's settings; the defaults are those for Wan 2.1.

    Attributes:
        density: share of the attention map that band and text are to keep; 0.25 for HunyuanVideo.
        block: tokens of a block.
        sampled: queries that a head's pattern is chosen by.
        first_frame: all tokens see the first frame, beyond the density; None: where the text is not among the tokens.
        dense_steps: 0.1 for HunyuanVideo.
        dense_layers: 3 % of the layers.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> SparseVideoGen(density=0.25).label()
        'density=0.25'
    """

    density: float = 0.3
    block: int = 128
    sampled: int = 64
    first_frame: bool | None = None
    dense_layers: int = field(default=1, kw_only=True)

    name: ClassVar[str] = "svg"
    title: ClassVar[str] = "Sparse VideoGen"
    arxiv: ClassVar[str] = "2502.01776"
    axes: ClassVar[str] = "error of sampled queries; spatial or temporal band per head; chosen at every step"
    citation: ClassVar[str] = """@inproceedings{xi2025sparse,
  title={Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity},
  author={Xi, Haocheng and Yang, Shuo and Zhao, Yilong and Xu, Chenfeng and Li, Muyang and Li, Xiuyu and others},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("density", self.density, 0, 1)
        check_whole("block", self.block, 1)
        check_whole("sampled", self.sampled, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Bands(self.density, self.block, self.sampled, self.first_frame)

    @classmethod
    def forced(cls) -> SparseVideoGen:
        """Small blocks, so that few tokens suffice."""
        return cls(density=0.4, block=4, dense_layers=0, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[SparseVideoGen, ...]:
        """Densities around the published one."""
        return tuple(cls(density=density) for density in (0.4, 0.3, 0.2, 0.1))
