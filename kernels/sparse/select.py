"""Which blocks are worth computing: selectors that turn scores of blocks into a mask."""

from __future__ import annotations

import math

import torch

from dita.errors import DitaError


def top_per_row(scores: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """Keep the highest scores of each row; of equal ones the earlier.

    Args:
        scores: [..., T], any floating dtype.
        keep: how many, from 0 to T; or int [...], a number for each row, broadcast.

    Returns:
        bool [..., T].

    Example:
        >>> top_per_row(torch.tensor([1.0, 3.0, 2.0]), 2)
        tensor([False,  True,  True])
    """
    place = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(place)
    rank.scatter_(-1, place, torch.arange(scores.shape[-1], device=scores.device).expand_as(place))
    return rank < (keep[..., None] if isinstance(keep, torch.Tensor) else keep)


def top_mass(
    shares: torch.Tensor, mass: float, least: int | torch.Tensor = 1, most: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Keep the smallest set of each row that holds a part of its mass.

    Args:
        shares: [..., T], not negative, float32; rows need not sum to 1.
        mass: from 0 to 1, the part of the row's sum; the entry that reaches it is kept.
        least, most: bounds on how many are kept.

    Returns:
        bool [..., T].

    Example:
        >>> top_mass(torch.tensor([0.5, 0.1, 0.4]), 0.8)
        tensor([ True, False,  True])
        >>> top_mass(torch.tensor([0.5, 0.1, 0.4]), 0.4, least=2)
        tensor([ True, False,  True])
    """
    if not 0 <= mass <= 1:
        raise DitaError(f"a part of the mass is a number from 0 to 1, got {mass!r}")
    ordered = shares.sort(dim=-1, descending=True, stable=True).values
    before = ordered.cumsum(-1) - ordered
    # A rounding error of the sum must not let a row go on for ever.
    needed = (before < mass * ordered.sum(-1, keepdim=True) * (1 - 1e-6)).sum(-1)
    if not isinstance(least, int) or least > 0:
        needed = needed.clamp_min(least)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if most is not None:
        needed = needed.clamp_max(most)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return top_per_row(shares, needed)


def top_per_head(scores: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the highest scores of a whole head, so that rows keep different numbers.

    Args:
        scores: [B, H, Tq, Tk].
        density: share to keep, from 0 to 1; rounded up to a whole number.

    Returns:
        bool [B, H, Tq, Tk].

    Example:
        >>> top_per_head(torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]]), 0.5)[0, 0]
        tensor([[False,  True],
                [ True, False]])
    """
    flat = scores.flatten(2)
    keep = math.ceil(density * flat.shape[-1] - 1e-6)
    return top_per_row(flat, keep).view_as(scores)
