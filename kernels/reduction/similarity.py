"""What ToMA and Token Transforming share: destinations that cover all tokens, and weights by similarity.

Similarities are cosines of the tokens, in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dita.kernels.reduction.matching import Grid

_WORST = -1.0  # the lowest cosine: how well a token is covered by no destination at all
_HAIR = 1e-5


def windows(grid: Grid, side: int) -> torch.Tensor:
    """Square windows within frames; those at the lower and right edges may be cut off.

    Args:
        grid: frames, rows and columns of the tokens.
        side: of a window in tokens.

    Returns:
        int64 [W, n], tokens of every window in order, -1 behind the last of a smaller one.

    Example:
        >>> windows((1, 2, 3), 2)
        tensor([[ 0,  1,  3,  4],
                [ 2,  5, -1, -1]])
    """
    frames, rows, columns = grid
    tokens = torch.arange(frames * rows * columns).view(grid)
    padded = functional.pad(tokens, (0, -columns % side, 0, -rows % side), value=-1)
    members = padded.unfold(1, side, side).unfold(2, side, side).reshape(-1, side * side)
    order = (members < 0).int().argsort(dim=1, stable=True)
    members = members.gather(1, order)
    return members[:, : int((members >= 0).sum(1).max())]


def unit(x: torch.Tensor) -> torch.Tensor:
    """Tokens [..., C] of length 1, float32."""
    return functional.normalize(x.float(), dim=-1)


def cover(similarity: torch.Tensor, present: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Greedy facility location: tokens to which all others are as similar as possible.

    Each time the token is taken that raises sum_j max over the taken of S_j most; of equal ones the first. Two tokens
    that are each other's nearest gain the same, so that near ties are the rule: a hair of preference for earlier tokens
    keeps rounding, which differs from one batch size to the next, from deciding.

    Args:
        similarity: [B, W, n, n], symmetric.
        present: bool [W, n], where a window has a token.
        counts: int64 [W], how many are taken, at most as many as there are.

    Returns:
        int64 [B, W, D], places in the windows in the order taken, D being the largest count; where a window takes fewer
        the rest means nothing.

    Example:
        >>> x = unit(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
        >>> cover((x @ x.T)[None, None], torch.ones(1, 3, dtype=torch.bool), torch.tensor([2]))
        tensor([[[1, 2]]])
    """
    batch, many, size, _ = similarity.shape
    similarity = similarity.masked_fill(~present[:, None, :], _WORST)  # no destination is an empty place
    best = similarity.new_full((batch, many, size), _WORST)
    free = present.expand(batch, -1, -1).clone()
    counted = present[:, :, None].to(similarity.dtype)
    preference = _HAIR * torch.arange(size, device=similarity.device)
    taken = []
    for _ in range(int(counts.max())):
        gain = ((similarity - best[..., None]).clamp_min(0) * counted).sum(-2)
        chosen = (gain - preference).masked_fill(~free, -torch.inf).argmax(-1, keepdim=True)
        free.scatter_(-1, chosen, False)
        column = similarity.gather(-1, chosen[..., None, :].expand(-1, -1, size, -1))[..., 0]
        best = torch.maximum(best, column)
        taken.append(chosen)
    return torch.cat(taken, -1)


def shared_out(sizes: torch.Tensor, ratio: float) -> torch.Tensor:
    """How many destinations windows of these sizes get so that `ratio` of the tokens goes: int64, at least 1 each.

    Example:
        >>> shared_out(torch.tensor([64, 10, 1]), 0.5)
        tensor([32,  5,  1])
    """
    return (sizes * (1 - ratio)).round().long().clamp_min(1)
