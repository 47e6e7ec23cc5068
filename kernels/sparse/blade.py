"""Video-BLADE's adaptive sparse attention: exact attention between a few tokens of each block picks the blocks.

Gu et al., "BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation", ICLR 2026, arXiv
2508.10774.

Order: a generalised Hilbert curve through frames, rows and columns, cut into blocks of 128. Score: of each block the
same 32 random places are taken, the attention among all these tokens is computed, and a pair of blocks gets the largest
of its 32 x 32 probabilities. Selection: the smallest set of a row that holds `energy` of its scores, but no less and no
more than two shares of the blocks; and all text. A second branch attends to the means of `group` consecutive keys and
values, as if each stood for `group` keys: the two outputs are joined by their log-sum-exp, that of the second plus
log(group). Keys that are kept count in both. When: at every step and layer.

The paper trains the model with this attention while it distils the steps. Here nothing is trained, so that its numbers
need not hold: hence a confidence of "medium". `pooled=False` switches the second branch off.

Differs from the paper's code: the block that reaches the energy is kept, there the one before it is the last; a short
last group is weighted by its own number of keys, not filled with copies of its last key; the second branch holds image
keys for image queries only, as text sees everything and is seen by all (the code has it for models without text);
blocks on the diagonal are always kept. Random places are drawn for each head, step and layer, for queries and for keys,
from a seed; the same for a whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.block_sparse import dense_attention, merge
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.orders import gilbert
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.scored import Scored, for_each_head
from dita.kernels.sparse.select import top_mass
from dita.registry import register

_ELEMENTS = 2**22  # of the map over sampled tokens that are held at a time


class Sampled(Scored):
    """Keep the blocks in which a few tokens find most, and join the means of all keys.

    Args:
        settings: of the method.
    """

    def __init__(self, settings: Blade) -> None:
        super().__init__(settings.block, settings.block)
        self.settings = settings

    def make_cut(self, layout: Layout, device: torch.device) -> Cut:
        """Consecutive tokens of the curve."""
        return Cut(layout, self.block_q, self.block_k, gilbert(layout.grid).to(device))

    def mask(self, asked: Asked, cut: Cut) -> torch.Tensor | None:
        """See `Scored.mask`."""
        settings, (heads, columns) = self.settings, (asked.q.shape[1], cut.columns)
        least, most = (max(1, int(share * columns + 1e-6)) for share in (settings.least, settings.most))
        if least >= columns:
            return None
        places = self.places(asked.step, asked.layer, heads).to(asked.q.device)
        queries = self._sample(asked.q, asked.layout, places[0])
        keys = self._sample(for_each_head(asked.k, heads), asked.layout, places[1])
        unseen = None
        if asked.key_mask is not None:
            count = asked.key_mask[:, None, :, None].expand(-1, heads, -1, -1)
            unseen = ~self._sample(count, asked.layout, places[1])[..., 0]
        return top_mass(largest_probability(queries, keys, unseen, asked.scale), settings.energy, least, most)

    def places(self, step: int, layer: int, heads: int) -> torch.Tensor:
        """Which places of every block are looked at: int64 [2, heads, samples], for queries and keys."""
        generator = torch.Generator().manual_seed((self.settings.seed * 10_007 + step) * 10_007 + layer)
        return torch.rand(2, heads, self.block_q, generator=generator).topk(self.settings.samples).indices

    def _sample(self, x: torch.Tensor, layout: Layout, places: torch.Tensor) -> torch.Tensor:
        """Tokens at these places of the blocks, the last token for places behind it: [B, H, T, samples, D]."""
        order = gilbert(layout.grid).to(x.device)
        starts = torch.arange(0, layout.visual, self.block_q, device=x.device)
        tokens = order[(starts[:, None] + places[:, None]).clamp_max(layout.visual - 1)]
        heads = torch.arange(len(places), device=x.device)[:, None, None]
        return x[:, :, layout.visual_slice][:, heads, tokens]

    def finish(self, asked: Asked, plan: BlockPlan, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Join the branch over means of keys and values."""
        settings, layout = self.settings, asked.layout
        if not settings.pooled:
            return out
        some, order = layout.visual_slice, gilbert(layout.grid).to(out.device)
        queries = asked.q[:, :, some]
        keys, values = (x[:, :, some][:, :, order] for x in (asked.k, asked.v))
        valid = None if asked.key_mask is None else asked.key_mask[:, some][:, order]
        joined = out[:, :, some], lse[:, :, some]
        whole = layout.visual // settings.group * settings.group
        for part, size in ((slice(0, whole), settings.group), (slice(whole, None), layout.visual - whole)):
            if part.start == part.stop or size == 0:
                continue
            seen = None if valid is None else valid[:, part]
            mean_k, mean_v = (group_means(x[:, :, part], size, seen) for x in (keys, values))
            seen = None if seen is None else seen.unflatten(1, (-1, size)).any(2)
            branch, lse_branch = dense_attention(queries, mean_k, mean_v, asked.scale, seen)
            joined = merge(joined, (branch, lse_branch + math.log(size)))
            asked.density += layout.visual * mean_k.shape[2] / layout.tokens**2
        answer = out.clone()
        answer[:, :, some] = joined[0]
        return answer


def largest_probability(
    queries: torch.Tensor, keys: torch.Tensor, unseen: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The largest attention weight of each pair of blocks.

    Args:
        queries: [B, H, Tq, n, D].
        keys: [B, H, Tk, m, D].
        unseen: bool [B, H, Tk, m], keys that do not count; None if all do.
        scale: of the logits.

    Returns:
        float32 [B, H, Tq, Tk].

    Example:
        >>> x = torch.zeros(1, 1, 2, 4, 8)
        >>> largest_probability(x, x, None, 1.0)[0, 0]
        tensor([[0.1250, 0.1250],
                [0.1250, 0.1250]])
    """
    batch, heads, rows, size, _ = queries.shape
    columns, width = keys.shape[2:4]
    across = keys.float().flatten(2, 3).transpose(-2, -1)
    step = max(1, _ELEMENTS // (batch * heads * size * columns * width))
    pieces = []
    for first in range(0, rows, step):
        logits = queries[:, :, first : first + step].float().flatten(2, 3) * scale @ across
        if unseen is not None:
            logits = logits.masked_fill(unseen.flatten(2)[:, :, None], -torch.inf)
        shares = logits.softmax(-1).nan_to_num(0.0)
        pieces.append(shares.view(batch, heads, -1, size, columns, width).amax((3, 5)))
    return torch.cat(pieces, 2)


def group_means(x: torch.Tensor, size: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Means of consecutive tokens.

    Args:
        x: [B, H, N, D].
        size: tokens of a group; divides N.
        valid: bool [B, N], tokens that count; a group without any is 0. None for all.

    Returns:
        [B, H, N / size, D] in the dtype of x.

    Example:
        >>> group_means(torch.tensor([1.0, 3.0, 5.0, 8.0]).view(1, 1, 4, 1), 2).flatten()
        tensor([2.0000, 6.5000])
    """
    groups = x.float().unflatten(2, (-1, size))
    if valid is None:
        return groups.mean(3).to(x.dtype)
    counts = valid[:, None, :, None].unflatten(2, (-1, size))
    return ((groups * counts).sum(3) / counts.sum(3).clamp_min(1)).to(x.dtype)


@register
@dataclass(frozen=True)
class Blade(SparseMethod):
    """The settings of Video-BLADE's attention.

    Attributes:
        energy: part of a row's scores that is kept.
        least, most: shares of the blocks between which that is held, rounded down, at least one block.
        samples: tokens of a block that are looked at.
        pooled: the second branch, over means of keys and values, is joined.
        group: keys of a mean.
        block: tokens of a block.
        seed: of the random places.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> Blade(pooled=False).label()
        'pooled=False'
    """

    energy: float = 0.95
    least: float = 0.05
    most: float = 0.17
    samples: int = 32
    pooled: bool = True
    group: int = 30
    block: int = 128
    seed: int = 0
    dense_steps: float = field(default=0.0, kw_only=True)

    name: ClassVar[str] = "blade"
    title: ClassVar[str] = "Video-BLADE (adaptive block-sparse attention)"
    arxiv: ClassVar[str] = "2508.10774"
    axes: ClassVar[str] = "attention of sampled tokens along a Hilbert curve; bounded energy; pooled second branch"
    confidence: ClassVar[str] = "medium"
    citation: ClassVar[str] = """@inproceedings{gu2026blade,
  title={BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation},
  author={Gu, Youping and others},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("energy", self.energy, 0, 1)
        check_number("least", self.least, 0, 1)
        check_number("most", self.most, 0, 1)
        check_whole("block", self.block, 1)
        check_whole("samples", self.samples, 1)
        check_whole("group", self.group, 1)
        check_whole("seed", self.seed, 0, 2**31 - 1)
        if self.least > self.most:
            raise DitaError(f"least is {self.least} and most {self.most}; expected least not to be above most")
        if self.samples > self.block:
            raise DitaError(f"samples is {self.samples}; expected no more than a block holds, {self.block}")

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Sampled(self)

    @classmethod
    def forced(cls) -> Blade:
        """Small blocks, so that few tokens suffice."""
        return cls(most=0.3, samples=2, group=3, block=4, dense_steps=0.125, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[Blade, ...]:
        """Upper bounds down to the published one and below."""
        return tuple(cls(most=most) for most in (0.5, 0.3, 0.17, 0.08))
