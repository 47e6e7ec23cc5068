"""VMoBA: every query picks the blocks of keys whose mean it is most like; blocks are cut anew from layer to layer.

Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", ICLR 2026, arXiv 2506.23858; here without
training.

Blocks: layers take turns between parts of the film (1-D), columns through all its frames (2-D) and boxes (3-D).
Score: the product of the query and the mean key of a block. Selection: a query's own block is kept; the scores are
brought to 0..1 by their smallest and largest, and of the other blocks the best are kept, at least one and until with
the own block they hold `threshold` of the sum. That is done for every query and head (scope "query_head", the default
of the authors' code) or for all queries of a head at once ("head_global", their paper's global selection). With `top`
every query keeps so many blocks, its own included, instead ("head_global": so many on average). When: at every step.

How: a selection by query is no plan over blocks of queries. In rounds, every query attends to one of the blocks that it
picked; in a round the queries are put together by block, and the rounds are joined by their log-sum-exp. The result is
exact, and so is the density.

Differs from the paper: it is made for training, and its settings for use without training are not published: the first
steps are dense by default, as with the other methods here (`dense_steps=0` for none). Blocks
are given as numbers of parts of each axis, those of the authors' cost estimate for 21 x 20 x 32 tokens, and axes are
cut into parts of nearly equal length where they are not divisible. Text among the tokens, of which the paper says
nothing, sees and is seen by all. In an image rows take the place of frames in 1-D.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.block_sparse import dense_attention, merge
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.tiles import Triple, cells, framed, grouped
from dita.registry import register

SCOPES = ("query_head", "head_global")


def select_blocks(
    gate: torch.Tensor, own: torch.Tensor, threshold: float, scope: str = "query_head", top: int = 0
) -> torch.Tensor:
    """The blocks of keys that each query sees.

    Args:
        gate: float32 [B, H, V, C], scores of the blocks.
        own: bool [V, C], the block that each query lies in.
        threshold, scope, top: as of the method.

    Returns:
        bool [B, H, V, C].

    Example:
        >>> gate = torch.tensor([[0.0, 3.0, 4.0, 1.0]])[None, None]
        >>> own = torch.tensor([[True, False, False, False]])
        >>> select_blocks(gate, own, 0.25), select_blocks(gate, own, 0.6), select_blocks(gate, own, 0, top=2)
        (tensor([[[[ True, False,  True, False]]]]),
         tensor([[[[ True,  True,  True, False]]]]),
         tensor([[[[ True, False,  True, False]]]]))
    """
    queries, blocks = own.shape
    wide = (lambda x: x.flatten(2)) if scope == "head_global" else (lambda x: x)
    mine = wide(own.expand(gate.shape))
    flat = wide(gate)
    if top:
        # The own block comes first, whatever its score.
        best = flat.masked_fill(mine, torch.inf).argsort(dim=-1, descending=True, stable=True)
        keep = torch.tensor(min(top, blocks) * (queries if scope == "head_global" else 1), device=gate.device)
    else:
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        spread = high - low
        shares = (flat - low) / torch.where(spread <= 1e-6, 1, spread)
        total = shares.sum(-1, keepdim=True) + 1e-6
        missing = (threshold - shares.masked_fill(~mine, 0).sum(-1, keepdim=True) / total).clamp_min(0)
        others, best = shares.masked_fill(mine, -1).sort(dim=-1, descending=True, stable=True)
        held = (others.clamp_min(0).cumsum(-1) / total) < missing
        keep = held.sum(-1, keepdim=True) + 1
    kept = torch.arange(best.shape[-1], device=gate.device) < keep
    seen = torch.zeros_like(mine, dtype=torch.bool).scatter_(-1, best, kept.expand_as(best))
    return (seen | mine).view(gate.shape)


class Mixture(Policy):
    """Let every query attend to the blocks that it picks.

    Args:
        threshold, scope, top, block: as of the method.
        partitions: parts of frames, rows and columns in 1-D, 2-D and 3-D layers.
    """

    def __init__(
        self,
        threshold: float,
        scope: str,
        top: int,
        partitions: tuple[Triple, Triple, Triple],
        block: int,
    ) -> None:
        self.threshold, self.scope, self.top = threshold, scope, top
        self.partitions, self.block = partitions, block

    def cells(self, layout: Layout, layer: int) -> torch.Tensor:
        """The block of every image token in this layer: int64 [V]."""
        kind = layer % 3
        return cells(framed(layout.grid) if kind == 0 else layout.grid, self.partitions[kind])

    def attend(self, asked: Asked) -> torch.Tensor:
        """Select, attend round by round, and join."""
        if self.stays_dense(asked):
            return super().attend(asked)
        layout, (image, text) = asked.layout, (asked.layout.visual_slice, asked.layout.text_slice)
        if "blocks" not in asked.state:
            asked.state["blocks"] = self.cells(layout, asked.layer).to(asked.q.device)
        labels = asked.state["blocks"]
        count = int(labels.max()) + 1
        own = labels[:, None] == torch.arange(count, device=labels.device)
        sizes = own.sum(0)
        q, k, v = (x[:, :, image] for x in (asked.q, asked.k, asked.v))
        means = (own.float().mT @ k.float() / sizes[:, None]).repeat_interleave(q.shape[1] // k.shape[1], 1)
        seen = select_blocks(q.float() @ means.mT, own, self.threshold, self.scope, self.top)
        pairs = float((seen.double() @ sizes.double()).sum(-1).mean()) + layout.visual * layout.text
        kept = (pairs + layout.text * layout.tokens) / layout.tokens**2
        asked.reason = self.not_worth(kept)
        if asked.reason:
            return self.watch(asked)
        asked.density = kept
        mask = None if asked.key_mask is None else asked.key_mask[:, image]
        result = self._rounds(dataclasses.replace(asked, q=q, k=k, v=v, key_mask=mask), seen, labels)
        if not layout.text:
            asked.lse = result[1]
            return result[0].to(q.dtype)
        words = asked.k[:, :, text], asked.v[:, :, text]
        mask = None if asked.key_mask is None else asked.key_mask[:, text]
        seen_by_image = merge(result, dense_attention(q, *words, asked.scale, mask))
        seen_by_text = dense_attention(asked.q[:, :, text], asked.k, asked.v, asked.scale, asked.key_mask)
        parts = [seen_by_image, seen_by_text][:: -1 if layout.text_first else 1]
        asked.lse = torch.cat([lse for _, lse in parts], 2)
        return torch.cat([out.to(q.dtype) for out, _ in parts], 2)

    def _rounds(self, asked: Asked, seen: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of image tokens over the blocks they see: float32 [B, H, V, D] and its log-sum-exp [B, H, V]."""
        q, count = asked.q, seen.shape[-1]
        order_k, owner_k = grouped(labels, count, self.block)
        pieces = torch.bincount(owner_k, minlength=count)
        first = pieces.cumsum(0) - pieces
        within = torch.arange(int(pieces.max()), device=q.device)
        picked = seen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        many = seen.sum(-1)
        result = q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        for turn in range(int(many.max())):
            order_q, owner_q = grouped(picked[..., turn].masked_fill(many <= turn, -1), count, self.block)
            plan = BlockPlan(
                pieces[owner_q].masked_fill(owner_q < 0, 0).to(torch.int32),
                (first[owner_q][..., None] + within).clamp_max(len(owner_k) - 1).to(torch.int32),
                self.block, self.block, order_q, order_k,
            )  # fmt: skip
            result = merge(result, self.attention(asked, plan))
        return result


@register
@dataclass(frozen=True)
class VMoBA(SparseMethod):
    """VMoBA's settings.

    Attributes:
        threshold: part of the sum of normalised scores that the kept blocks hold.
        scope: "query_head" or "head_global": over what blocks are ranked.
        top: how many blocks a query keeps instead, with its own; 0 for `threshold`.
        parts: of the film in 1-D layers.
        columns: parts of rows and columns in 2-D layers.
        boxes: parts of frames, rows and columns in 3-D layers.
        block: tokens of a block of the kernel.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> VMoBA(threshold=0.3).label()
        'threshold=0.3'
    """

    threshold: float = 0.25
    scope: str = "query_head"
    top: int = 0
    parts: int = 7
    columns: tuple[int, int] = (5, 8)
    boxes: tuple[int, int, int] = (3, 5, 4)
    block: int = 64

    name: ClassVar[str] = "vmoba"
    title: ClassVar[str] = "VMoBA"
    arxiv: ClassVar[str] = "2506.23858"
    axes: ClassVar[str] = (
        "query times mean key, per query; threshold or top-k of 1-D, 2-D and 3-D blocks; at every step"
    )
    confidence: ClassVar[str] = "medium"
    citation: ClassVar[str] = """@inproceedings{wu2026vmoba,
  title={{VMoBA}: Mixture-of-Block Attention for Video Diffusion Models},
  author={Wu, Jianzong and Hou, Liang and Yang, Haotian and Tao, Xin and Tian, Ye and Wan, Pengfei and Zhang, Di and
    Tong, Yunhai},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0, 1)
        if self.scope not in SCOPES:
            raise DitaError(f"scope is {self.scope!r}; expected one of {', '.join(SCOPES)}")
        check_whole("top", self.top, 0)
        check_whole("block", self.block, 1)
        for count in (self.parts, *self.columns, *self.boxes):
            check_whole("a number of parts", count, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        partitions = (self.parts, 1, 1), (1, *self.columns), self.boxes
        return Mixture(self.threshold, self.scope, self.top, partitions, self.block)

    @classmethod
    def forced(cls) -> VMoBA:
        """Two blocks a query, of few tokens."""
        return cls(top=2, parts=4, columns=(2, 2), boxes=(2, 2, 2), block=4, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[VMoBA, ...]:
        """Thresholds around the published 0.25."""
        return tuple(cls(threshold=threshold) for threshold in (0.45, 0.35, 0.25, 0.15))
