"""Destinations, and which of them every other token resembles most: what AsymRnR and ToMe share.

Destinations are one token of every cell of the grid, drawn at random alike for all samples and heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dita.errors import DitaError
from dita.kernels.reduction.operators import Merged, Pruned, group_sizes

_ELEMENTS = 2**25  # of the matrix of distances that are held at a time

Grid = tuple[int, int, int]


def fitting(cell: tuple[int, ...], grid: Grid) -> Grid:
    """A cell (frames, rows, columns) that is nowhere longer than the grid.

    Example:
        >>> fitting((6, 2, 2), (1, 4, 4))
        (1, 2, 2)
    """
    frames, rows, columns = (min(side, whole) for side, whole in zip(cell, grid, strict=True))
    return frames, rows, columns


def seed_of(seed: int, layer: int, step: int) -> int:
    """A seed of its own for every layer and step, the same for all branches and samples.

    Example:
        >>> len({seed_of(seed, layer, step) for seed in (0, 1) for layer in range(60) for step in range(50)})
        6000
    """
    return (seed * 1009 + layer) * 10007 + step


def cells(grid: Grid, cell: Grid, offset: tuple[int, int, int] = (0, 0, 0)) -> torch.Tensor:
    """The tokens of every whole cell.

    Args:
        grid: frames, rows and columns of the tokens.
        cell: frames, rows and columns of a cell, at most the grid's.
        offset: of the first cell; what does not fill a cell is left out.

    Returns:
        int64 [cells, tokens of a cell].

    Example:
        >>> cells((1, 2, 5), (1, 2, 2), (0, 0, 1))
        tensor([[1, 2, 6, 7],
                [3, 4, 8, 9]])
    """
    tokens = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    for axis, (side, first) in enumerate(zip(cell, offset, strict=True)):
        count = (grid[axis] - first) // side
        tokens = tokens.narrow(axis, first, count * side).unfold(axis, side, side)
    return tokens.reshape(-1, cell[0] * cell[1] * cell[2])


def draw_destinations(grid: Grid, cell: Grid, seed: int, shifted: bool = False) -> torch.Tensor:
    """One random token of every whole cell.

    Args:
        grid, cell: see `cells`.
        seed: of the draw; torch's own random state is left alone.
        shifted: where cells do not fill the grid they begin anywhere they fit; else in the first corner.

    Returns:
        int64 [cells].

    Example:
        >>> drawn = draw_destinations((1, 4, 4), (1, 2, 2), seed=0)
        >>> [(t // 8, t % 4 // 2) for t in drawn.tolist()]
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    generator = torch.Generator().manual_seed(seed)
    spare = [whole % side for side, whole in zip(cell, grid, strict=True)]
    drawn = [int(torch.randint(room + 1, (), generator=generator)) if shifted else 0 for room in spare]
    members = cells(grid, cell, (drawn[0], drawn[1], drawn[2]))
    choice = torch.randint(members.shape[1], (len(members), 1), generator=generator)
    return members.gather(1, choice)[:, 0]


def others(destinations: torch.Tensor, tokens: int) -> torch.Tensor:
    """All tokens but those, in order: int64 [tokens - destinations] or, row by row, [B, ...].

    Example:
        >>> others(torch.tensor([2, 0]), 4)
        tensor([1, 3])
    """
    taken = torch.zeros(*destinations.shape[:-1], tokens, dtype=torch.bool, device=destinations.device)
    taken.scatter_(-1, destinations, True)
    place = torch.arange(tokens, device=taken.device).expand_as(taken)
    return place[~taken].view(*destinations.shape[:-1], -1)


@dataclass(frozen=True)
class Matching:
    """Every token and the destination nearest to it.

    Attributes:
        destinations: int64 [B or 1, d].
        sources: int64 [B or 1, s], the other tokens.
        nearest: int64 [B, s], the place in `destinations` of the nearest one.
        distance: float32 [B, s], squared Euclidean distance to it.
    """

    destinations: torch.Tensor
    sources: torch.Tensor
    nearest: torch.Tensor
    distance: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, destinations: torch.Tensor, elements: int = _ELEMENTS) -> Matching:
        """Match by squared Euclidean distance; for unit tokens that orders like the cosine.

        Args:
            x: [B, N, C].
            destinations: int64 [d], or [B, d] where samples differ.
            elements: most distances that are held at a time.

        Raises:
            DitaError: no destinations.

        Example:
            >>> found = Matching.of(torch.tensor([[[0.0], [1.0], [5.0], [7.0]]]), torch.tensor([0, 3]))
            >>> found.sources, found.nearest, found.distance
            (tensor([[1, 2]]), tensor([[0, 1]]), tensor([[1., 4.]]))
        """
        destinations = destinations.to(x.device)
        if destinations.ndim == 1:
            destinations = destinations[None]
        if not destinations.shape[1]:
            raise DitaError("there is no destination to reduce tokens to; expected at least one cell in the grid")
        sources = others(destinations, x.shape[1])
        batch = torch.arange(len(x), device=x.device)[:, None]
        to = x[batch, destinations.expand(len(x), -1)].float()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        size = max(1, elements // max(1, to.shape[0] * to.shape[1]))
        far = torch.cat([-2 * to, to.square().sum(-1, keepdim=True), torch.ones_like(to[..., :1])], -1)
        for piece in sources.split(size, dim=1):
            part = x[batch, piece.expand(len(x), -1)].float()
            near = torch.cat([part, torch.ones_like(part[..., :1]), part.square().sum(-1, keepdim=True)], -1)
            distance, place = (near @ far.transpose(1, 2)).min(-1)
            found.append((place, distance))
        if not found:
            empty = torch.zeros(len(x), 0, device=x.device)
            found.append((empty.long(), empty))
        nearest, distance = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return cls(destinations, sources, nearest, distance)

    def pair(self, kept: int, mean: bool = False, weigh: bool = False) -> Pruned:
        """Keep the destinations and the tokens farthest from theirs; the others are dropped.

        Args:
            kept: how many of the other tokens are kept, from 0 to all.
            mean: destinations become means with what is dropped to them.
            weigh: the pair tells how many tokens each stands for.

        Returns:
            the operators; first the kept tokens, farthest first, then the destinations.

        Example:
            >>> x = torch.tensor([[[0.0], [1.0], [5.0], [7.0]]])
            >>> pair = Matching.of(x, torch.tensor([0, 3])).pair(1)
            >>> pair.positions, pair.stand_in
            (tensor([[2, 0, 3]]), tensor([[1, 1, 0, 2]]))
        """
        batch, many = self.nearest.shape
        count = self.destinations.shape[1]
        order = self.distance.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(many, device=order.device).expand(batch, -1))
        sources, destinations = self.sources.expand(batch, -1), self.destinations.expand(batch, -1)
        positions = torch.cat([sources.gather(1, order[:, :kept]), destinations], 1)
        stand_in = torch.empty(batch, many + count, dtype=torch.int64, device=order.device)
        stand_in.scatter_(1, sources, torch.where(rank < kept, rank, kept + self.nearest))
        stand_in.scatter_(1, destinations, torch.arange(kept, kept + count, device=order.device).expand(batch, -1))
        sizes = group_sizes(stand_in, kept + count).float() if weigh else None
        return (Merged if mean else Pruned)(positions, stand_in, sizes)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept of it."""
        return (self.destinations, self.sources, self.nearest, self.distance)
