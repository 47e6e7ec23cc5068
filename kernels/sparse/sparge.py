"""SpargeAttn: attention between block means, where the tokens of a block are alike enough for their mean to tell.

Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference", ICML
2025, arXiv 2502.18137.

Score: attention between block means, after the mean of all keys is taken off the keys. A block is judged by its mean
only if its tokens are alike: the mean cosine between them (each with itself included) is above `similarity`. Selection:
of the judged columns of a row either a fixed share, or the largest prefix whose shares together are at most `mass`, at
least one; and all rows of queries and columns of keys that are not judged. When: at every step and layer.

The published plug-and-play setting is the default: half of the columns, the judgement practically off. `cdf()` is the
other one, which the authors tune for each layer and head; here one number serves all.

Differs from the paper: text is in blocks of its own that are always kept, whereas there it is cut with the image and
left to the judgement; blocks on the diagonal are always kept. The official kernel also skips the product with V of a
tile in which no logit comes within `pvthreshd` = 50 of the running maximum: weights below exp(-50), nothing that a
float32 sum could hold, so that leaving it out changes no result. It also multiplies queries and keys in INT8, which is
`qk="int8"` here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.orders import gilbert
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.scored import Scored, for_each_head
from dita.kernels.sparse.select import top_per_row
from dita.registry import register

if TYPE_CHECKING:
    from typing_extensions import Self


class Judged(Scored):
    """Keep what block means rate highly, and what they cannot rate.

    Args:
        settings: of the method.
    """

    def __init__(self, settings: SpargeAttn) -> None:
        super().__init__(settings.block_q, settings.block_k)
        self.settings = settings

    def make_cut(self, layout: Layout, device: torch.device) -> Cut:
        """Consecutive tokens, or along the curve."""
        order = gilbert(layout.grid).to(device) if self.settings.curve else None
        return Cut(layout, self.block_q, self.block_k, order, device)

    def mask(self, asked: Asked, cut: Cut) -> torch.Tensor | None:
        """See `Scored.mask`."""
        settings, heads = self.settings, asked.q.shape[1]
        if settings.mass is None and settings.keep >= 1:
            return None
        queries, present = cut.blocks(asked.q, cut.block_q)
        keys, there = cut.blocks(asked.k, cut.block_k)
        valid = cut.valid(asked.key_mask, there)
        keys = (keys.float() - _mean_key(asked)[:, :, None]) * valid[..., None]
        mean_q, likeness_q = _pooled(queries.float(), present)
        mean_k, likeness_k = (for_each_head(x, heads) for x in _pooled(keys, valid))
        vague_q, vague_k = (likeness[..., None] <= settings.similarity for likeness in (likeness_q, likeness_k))
        vague_k = vague_k.transpose(-2, -1)
        empty = ~valid.any(3)[:, :, None]
        logits = mean_q * asked.scale @ mean_k.transpose(-2, -1)
        shares = logits.masked_fill(vague_k | empty, -torch.inf).softmax(-1).nan_to_num(0.0)
        mask = top_per_row(shares, self._count(shares)) | vague_q | vague_k
        if settings.sink:
            mask[..., 0] = True
        return mask

    def _count(self, shares: torch.Tensor) -> int | torch.Tensor:
        """How many columns a row keeps of those that are judged."""
        if self.settings.mass is None:
            return max(1, int(self.settings.keep * shares.shape[-1]))
        ordered = shares.sort(dim=-1, descending=True).values.cumsum(-1)
        # A rounding error of the sum must not cost a row its last columns.
        return (ordered <= self.settings.mass * (1 + 1e-6)).sum(-1).clamp_min(1)


def _mean_key(asked: Asked) -> torch.Tensor:
    """The mean of all keys that count: float32 [B, Hk, 1, D]."""
    if asked.key_mask is None:
        return asked.k.float().mean(2, keepdim=True)
    count = asked.key_mask[:, None, :, None].float()
    return (asked.k.float() * count).sum(2, keepdim=True) / count.sum(2, keepdim=True).clamp_min(1)


def _pooled(tokens: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B, H, T, D] and mean cosine [B, H, T] of the tokens of blocks [B, H, T, block, D] whose others are 0."""
    count = present.sum(3).clamp_min(1)[..., None]
    # The mean over all pairs of a product is the product of the means.
    direction = torch.nn.functional.normalize(tokens, dim=-1).sum(3) / count
    return tokens.sum(3) / count, direction.square().sum(-1)


@register
@dataclass(frozen=True)
class SpargeAttn(SparseMethod):
    """SpargeAttn's settings.

    Attributes:
        keep: share of the columns that a row keeps, rounded down, at least one; without meaning where `mass` is given.
        mass: the most that the kept shares of a row hold together; None to go by `keep`.
        similarity: mean cosine, from -1 to 1, above which a block is judged by its mean.
        sink: the first block of keys is always kept.
        block_q, block_k: tokens of a block of queries and of keys, one a multiple of the other.
        curve: blocks follow a Hilbert curve through the video instead of rows, which makes their tokens more alike.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> SpargeAttn().label(), SpargeAttn.cdf().label()
        ('default', 'mass=0.98 similarity=0.6')
    """

    keep: float = 0.5
    mass: float | None = None
    similarity: float = -0.1
    sink: bool = False
    block_q: int = 128
    block_k: int = 64
    curve: bool = False
    dense_steps: float = field(default=0.0, kw_only=True)

    name: ClassVar[str] = "sparge"
    title: ClassVar[str] = "SpargeAttn"
    arxiv: ClassVar[str] = "2502.18137"
    axes: ClassVar[str] = "attention of block means where blocks are alike; top share or mass per row; every step"
    citation: ClassVar[str] = """@inproceedings{zhang2025spargeattn,
  title={SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference},
  author={Zhang, Jintao and Xiang, Chendong and Huang, Haofeng and Wei, Jia and Xi, Haocheng and Zhu, Jun and
    Chen, Jianfei},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("keep", self.keep, 0, 1)
        if self.mass is not None:
            check_number("mass", self.mass, 0, 1)
        check_number("similarity", self.similarity, -1, 1)
        check_whole("block_q", self.block_q, 1)
        check_whole("block_k", self.block_k, 1)
        if max(self.block_q, self.block_k) % min(self.block_q, self.block_k):
            raise DitaError(
                f"block_q is {self.block_q} and block_k {self.block_k}; expected one to be a multiple of the other"
            )

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Judged(self)

    @classmethod
    def cdf(cls, mass: float = 0.98, similarity: float = 0.6) -> Self:
        """The setting that keeps a mass instead of a number, and judges only blocks that are alike."""
        return cls(mass=mass, similarity=similarity)

    @classmethod
    def forced(cls) -> SpargeAttn:
        """Small blocks, so that few tokens suffice."""
        return cls(keep=0.3, block_q=8, block_k=4, dense_steps=0.125, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[SpargeAttn, ...]:
        """Shares down from the published one."""
        return tuple(cls(keep=keep) for keep in (0.5, 0.35, 0.25, 0.15))
