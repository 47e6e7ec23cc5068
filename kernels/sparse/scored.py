"""What methods share that score pairs of blocks and keep the best: one cut of the tokens, and scores of block means."""

from __future__ import annotations

import torch

from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.policy import Asked, Policy


class Scored(Policy):
    """Cuts the tokens into blocks and asks for a mask over them at every step.

    Subclasses define `mask`, and `make_cut` where blocks are not consecutive tokens.

    Args:
        block_q, block_k: tokens of a block of queries and of keys.
    """

    fleeting = True

    def __init__(self, block_q: int, block_k: int) -> None:
        self.block_q, self.block_k = block_q, block_k
        self._cuts: dict[tuple[Layout, torch.device], Cut] = {}

    def begin_run(self) -> None:
        """Forget the cuts."""
        self._cuts.clear()

    def make_cut(self, layout: Layout, device: torch.device) -> Cut:
        """How the tokens are cut; asked once for every layout in a run."""
        return Cut(layout, self.block_q, self.block_k, device=device)

    def cut(self, asked: Asked) -> Cut:
        """The cut of these tokens."""
        key = (asked.layout, asked.q.device)
        if key not in self._cuts:
            self._cuts[key] = self.make_cut(*key)
        return self._cuts[key]

    def mask(self, asked: Asked, cut: Cut) -> torch.Tensor | None:
        """Bool [B', H', rows, columns] over blocks of image tokens, True where one is kept; None for all.

        Text and the diagonal are kept whatever it says.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mask()")

    def plan(self, asked: Asked) -> BlockPlan | None:
        """See `Policy.plan`."""
        cut = self.cut(asked)
        mask = self.mask(asked, cut)
        return None if mask is None else cut.plan(mask)


def for_each_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys [B, Hk, ...] once for every query head they serve: [B, heads, ...].

    Example:
        >>> for_each_head(torch.tensor([[[1.0], [2.0]]]), 4).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def pooled_shares(asked: Asked, cut: Cut) -> torch.Tensor:
    """Attention between block means: softmax over key blocks of mean query times mean key.

    Blocks of which no key counts get 0.

    Args:
        asked: queries and keys.
        cut: how they are cut; empty places and masked keys are in no mean.

    Returns:
        float32 [B, H, rows, columns]; rows sum to 1, or to 0 where no key counts.

    Example:
        >>> q = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1)
        >>> asked = Asked(q, q, q, 1.0, None, Layout((1, 1, 3)), 0, 1, 0, 1, {}, lambda: q)
        >>> pooled_shares(asked, Cut(asked.layout, 2, 2))[0, 0, 0] * 1000
        tensor([  2.4726, 997.5274])
    """
    tokens, present = cut.blocks(asked.k, cut.block_k)
    valid = cut.valid(asked.key_mask, present)
    keys = (tokens.float() * valid[..., None]).sum(3) / valid.sum(3).clamp_min(1)[..., None]
    keys = for_each_head(keys, asked.q.shape[1])
    logits = cut.means(asked.q, cut.block_q) * asked.scale @ keys.transpose(-2, -1)
    return logits.masked_fill(~valid.any(3)[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
