"""How much of the attention each pair of blocks holds, exactly and without the whole map in memory."""

from __future__ import annotations

import torch

_ELEMENTS = 2**21  # of the attention map that are held at a time


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
    queries, keys, lse = queries.detach(), keys.detach(), lse.detach()  # what is chosen has no gradient
    keys = keys.float().flatten(2, 3).repeat_interleave(heads // keys.shape[1], 1)
    # A query that sees no key has -inf; its weights are 0 whatever is taken off.
    lse = lse.masked_fill(~present_q | lse.isneginf(), torch.inf)
    # A column of ones takes the log-sum-exp off within the product.
    keys = torch.cat([keys, torch.ones_like(keys[..., :1])], -1).flatten(0, 1).mT
    queries = torch.cat([queries.float() * scale, -lse[..., None]], -1).flatten(0, 1)
    step = max(1, _ELEMENTS // (batch * heads * size * columns * width))
    pieces, buffer = [], keys.new_empty(len(keys), min(step, rows) * size, keys.shape[2])
    for first in range(0, rows, step):
        some = queries[:, first : first + step].flatten(1, 2)
        # Written over and over: memory that is new each time costs as much as the product.
        weights = buffer.view(-1)[: some.shape[1] * len(keys) * keys.shape[2]].view(len(keys), -1, keys.shape[2])
        torch.bmm(some, keys, out=weights).exp_()
        pieces.append(weights.unflatten(1, (-1, size)).sum(2))
    sums = torch.cat(pieces, 1).view(batch, heads, rows, columns, width)
    return sums.masked_fill_(~present_k[:, :, None], 0).sum(-1)
