"""XAttention: sums over antidiagonals of the attention map say how much each block holds.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025, arXiv 2503.16428.

Score: consecutive tokens form groups of `stride`; two groups get the mean logit over the antidiagonal of their square
of the map (the first query with the last key, and so on), which crosses every row, column and diagonal. Softmax over
the groups of keys, summed over the groups of a pair of blocks. Selection: the smallest set of a row that holds `mass`
of it, and all text. When: at every step and layer after the first tenth (5 of 50 steps).

Differs from the paper: text is in blocks of its own, always kept, and not scored, whereas the authors' HunyuanVideo
code scores it with the image; that code also hands queries over as keys and keys as queries, which is not repeated
here. Blocks on the diagonal are always kept. A group at the end with fewer tokens is filled with zeros, as there;
groups without tokens are left out. The thresholds that the paper tunes for each head of a language model are one number
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.scored import Scored, for_each_head
from dita.kernels.sparse.select import top_mass
from dita.registry import register

_ELEMENTS = 2**22  # of the map over groups that are held at a time


class Antidiagonal(Scored):
    """Keep the mass that antidiagonals promise.

    Args:
        mass: part of a row's score that is kept.
        stride: tokens of a group.
        block: tokens of a block, a multiple of the stride.
    """

    def __init__(self, mass: float, stride: int, block: int) -> None:
        super().__init__(block, block)
        self.mass, self.stride = mass, stride

    def mask(self, asked: Asked, cut: Cut) -> torch.Tensor | None:
        """See `Scored.mask`."""
        if self.mass >= 1:
            return None
        queries, present = cut.blocks(asked.q, cut.block_q)
        keys, there = cut.blocks(asked.k, cut.block_k)
        valid = cut.valid(asked.key_mask, there)
        keys = for_each_head(keys * valid[..., None], asked.q.shape[1])
        return top_mass(antidiagonal_mass(queries, keys, present, valid, asked.scale, self.stride), self.mass)


def antidiagonal_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    present_q: torch.Tensor,
    present_k: torch.Tensor,
    scale: float,
    stride: int,
) -> torch.Tensor:
    """Softmax of antidiagonal means, summed over blocks.

    Args:
        queries, keys: [B, H, T, block, D], 0 in empty places.
        present_q, present_k: bool, broadcast to [B, H, T, block]: places of tokens that count.
        scale: of the logits.
        stride: tokens of a group; divides the block.

    Returns:
        float32 [B, H, Tq, Tk]; a row sums to its number of groups of queries.

    Example:
        >>> x, there = torch.zeros(1, 1, 2, 4, 8), torch.ones(1, 1, 2, 4, dtype=torch.bool)
        >>> antidiagonal_mass(x, x, there, there, 1.0, 2)[0, 0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    batch, heads, rows, block, _ = queries.shape
    columns, groups = keys.shape[2], block // stride
    across = keys.float().unflatten(3, (groups, stride)).flatten(4).flatten(2, 3).transpose(-2, -1)
    unseen = ~present_k.unflatten(3, (groups, stride)).any(4).flatten(2)[:, :, None]
    asking = present_q.unflatten(3, (groups, stride)).any(4)
    step = max(1, _ELEMENTS // (batch * heads * groups * columns * groups))
    pieces = []
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        down = queries[:, :, some].float().unflatten(3, (groups, stride)).flip(4).flatten(4).flatten(2, 3)
        logits = (down * (scale / stride) @ across).masked_fill(unseen, -torch.inf)
        shares = logits.softmax(-1).nan_to_num(0.0) * asking[:, :, some].flatten(2)[..., None]
        pieces.append(shares.view(batch, heads, -1, groups, columns, groups).sum((3, 5)))
    return torch.cat(pieces, 2)


@register
@dataclass(frozen=True)
class XAttention(SparseMethod):
    """XAttention's settings.

    Attributes:
        mass: part of the score of a row of blocks that is kept; the paper has 0.9 and 0.95 for video.
        stride: tokens of a group; a larger one is cheaper and coarser.
        block: tokens of a block, a multiple of the stride.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> XAttention(mass=0.95).label()
        'mass=0.95'
    """

    mass: float = 0.9
    stride: int = 16
    block: int = 128
    dense_steps: float = field(default=0.1, kw_only=True)

    name: ClassVar[str] = "xattention"
    title: ClassVar[str] = "XAttention"
    arxiv: ClassVar[str] = "2503.16428"
    axes: ClassVar[str] = "antidiagonal sums of strided tokens; top mass per row; every step"
    citation: ClassVar[str] = """@inproceedings{xu2025xattention,
  title={XAttention: Block Sparse Attention with Antidiagonal Scoring},
  author={Xu, Ruyi and Xiao, Guangxuan and Huang, Haofeng and Guo, Junxian and Han, Song},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("mass", self.mass, 0, 1)
        check_whole("stride", self.stride, 1)
        check_whole("block", self.block, 1)
        if self.block % self.stride:
            raise DitaError(f"block is {self.block}; expected a multiple of the stride, {self.stride}")

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Antidiagonal(self.mass, self.stride, self.block)

    @classmethod
    def forced(cls) -> XAttention:
        """Small blocks and mass, so that few tokens suffice."""
        return cls(mass=0.3, stride=2, block=4, dense_steps=0.125, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[XAttention, ...]:
        """Masses from the published one down: short videos spread their attention over more of their few blocks."""
        return tuple(cls(mass=mass) for mass in (0.9, 0.8, 0.65, 0.5))
