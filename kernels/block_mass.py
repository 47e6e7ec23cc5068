"""How much of the attention each pair of blocks holds, exactly and without the whole map in memory."""

from __future__ import annotations

import torch

_ELEMENTS = 2**22  # of the attention map that are held at a time


def block_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    present_q: torch.Tensor,
    present_k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Sums of attention weights over pairs of blocks.

    Args:
        queries: [B, H, Tq, bq, D], as `Cut.blocks` cuts them.
        keys: [B, Hk, Tk, bk, D].
        present_q, present_k: bool, broadcast to [B, H, Tq, bq] and [B, H, Tk, bk]: places of tokens that count.
        lse: float32 [B, H, Tq, bq], log-sum-exp of each query's logits, over these keys and any others.
        scale: of the logits.

    Returns:
        float32 [B, H, Tq, Tk]; a row sums to at most its number of tokens.

    Example:
        >>> x = torch.zeros(1, 1, 2, 3, 4)
        >>> there = torch.ones(1, 1, 2, 3, dtype=torch.bool)
        >>> block_mass(x, x, there, there, torch.full((1, 1, 2, 3), 6.0).log(), 1.0)[0, 0]
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000]])
    """
    batch, heads, rows, size, _ = queries.shape
    columns, width = keys.shape[2:4]
    keys = keys.float().flatten(2, 3).repeat_interleave(heads // keys.shape[1], 1).transpose(-2, -1)
    unseen = ~present_k.expand(*present_k.shape[:2], columns, width).flatten(2)[:, :, None]
    # A query that sees no key has -inf; its weights are 0 whatever is taken off.
    lse = lse.masked_fill(~present_q | lse.isneginf(), torch.inf)
    step = max(1, _ELEMENTS // (batch * heads * size * columns * width))
    pieces = []
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        logits = queries[:, :, some].float().flatten(2, 3) * scale @ keys
        weights = (logits - lse[:, :, some].flatten(2)[..., None]).exp_().masked_fill_(unseen, 0)
        pieces.append(weights.view(batch, heads, -1, size, columns, width).sum((3, 5)))
    return torch.cat(pieces, 2)
