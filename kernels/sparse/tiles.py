"""Orders of tokens for methods to cut into blocks: transposed frames, tiles, groups that start blocks of their own."""

from __future__ import annotations

import dataclasses

import torch

from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.layout import Cut, Layout

Triple = tuple[int, int, int]


def framed(grid: Triple) -> Triple:
    """The grid with rows in the place of frames if it has one frame only, so that methods for films serve images.

    Example:
        >>> framed((13, 16, 16)), framed((1, 4, 6))
        ((13, 16, 16), (4, 1, 6))
    """
    frames, rows, columns = grid
    return (rows, 1, columns) if frames == 1 else grid


def sees_first_frame(layout: Layout, wanted: bool | None) -> bool:
    """Say whether all tokens see the first frame: as wanted, or if None where no text is among the tokens (Wan).

    An image has no first frame.

    Example:
        >>> sees_first_frame(Layout((5, 4, 4)), None), sees_first_frame(Layout((5, 4, 4), text=7), None)
        (True, False)
    """
    return layout.grid[0] > 1 and (layout.text == 0 if wanted is None else wanted)


def transposed(grid: Triple) -> torch.Tensor:
    """Token-major order: the same place in all frames, then the next place; int64 [V].

    Example:
        >>> transposed((2, 1, 3)).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    frames, rows, columns = grid
    return torch.arange(frames * rows * columns).view(frames, -1).T.flatten()


def cells(grid: Triple, counts: Triple) -> torch.Tensor:
    """The cell that each token lies in, if every axis is cut into that many parts of nearly equal length.

    Args:
        grid: frames, rows and columns.
        counts: parts of each axis, at least 1; no more than it has places are made.

    Returns:
        int64 [V], cells numbered in raster order.

    Example:
        >>> cells((1, 2, 5), (1, 1, 2)).view(2, 5)
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 0, 1, 1]])
    """
    number = torch.zeros(1, dtype=torch.int64)
    for length, count in zip(grid, counts, strict=True):
        count = min(count, length)
        part = torch.arange(length) * count // length
        number = (number[:, None] * count + part).flatten()
    return number


def tile_counts(grid: Triple, tile: Triple) -> Triple:
    """How many tiles lie along each axis.

    An axis that holds fewer than three whole tiles is cut into four parts, as far as it has places: windows of tiles
    need tiles to choose from. Otherwise it takes as many tiles as are needed to cover it.

    Example:
        >>> tile_counts((30, 48, 80), (6, 8, 8)), tile_counts((13, 16, 16), (6, 8, 8))
        ((5, 6, 10), (4, 4, 4))
    """
    counts = [min(4, size) if size // part < 3 else -(-size // part) for size, part in zip(grid, tile, strict=True)]
    return (counts[0], counts[1], counts[2])


def window_mask(counts: Triple, window: Triple) -> torch.Tensor:
    """Which tiles each tile sees: bool [T, T], tiles in raster order.

    Args:
        counts: tiles along each axis.
        window: extent in tiles; an axis with fewer is seen whole.

    Example:
        >>> window_mask((1, 1, 4), (1, 1, 3)).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    for count, extent in zip(counts, window, strict=True):
        extent = min(extent, count)
        place = torch.arange(count)
        first = (place - extent // 2).clamp(0, count - extent)[:, None]
        mask = torch.kron(mask, (first <= place) & (place < first + extent))
    return mask


def grouped(labels: torch.Tensor, groups: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the tokens of a group next to each other and let every group start a block of its own.

    Args:
        labels: int64 [..., V], the group of each token, from 0 to `groups` - 1; -1 for tokens to leave out.
        groups: how many there are.
        block: tokens of a block; the last one of a group ends in empty places.

    Returns:
        order: int64 [..., L], the tokens, -1 for an empty place.
        owner: int64 [..., L / block], the group whose tokens a block holds; -1 for blocks that hold none, which stand
            last where others in the batch need more.

    Example:
        >>> grouped(torch.tensor([1, 0, 1, 1]), 2, 2)
        (tensor([ 1, -1,  0,  2,  3, -1]), tensor([0, 1, 1]))
    """
    *lead, tokens = labels.shape
    labels = labels.masked_fill(labels < 0, groups)
    sizes = labels.new_zeros(*lead, groups + 1).scatter_add_(-1, labels, torch.ones_like(labels))
    blocks = -(-sizes // block)
    blocks[..., groups] = 0
    ends = blocks.cumsum(-1)
    total = max(1, int(ends[..., -1].max()))
    ordered, token = labels.sort(dim=-1, stable=True)
    rank = torch.arange(tokens, device=labels.device) - (sizes.cumsum(-1) - sizes).gather(-1, ordered)
    place = (ends - blocks).gather(-1, ordered) * block + rank
    # Tokens that are left out go to one more place, which is cut off.
    place = place.masked_fill(ordered == groups, total * block)
    order = labels.new_full((*lead, total * block + 1), -1).scatter_(-1, place, token)[..., :-1]
    each = torch.arange(total, device=labels.device).expand(*lead, -1).contiguous()
    owner = torch.searchsorted(ends[..., :groups].contiguous(), each, right=True)
    return order, owner.masked_fill(owner == groups, -1)


def crossed(rows: Cut, columns: Cut, mask: torch.Tensor, lifetime: int = 0) -> BlockPlan:
    """A plan whose queries and keys are cut differently; text sees and is seen by all.

    Args:
        rows, columns: how queries and keys are cut.
        mask: bool [B', H', rows.rows, columns.columns], over blocks of image tokens. Nothing is added to it.
        lifetime: as of the plan.

    Example:
        >>> cut = Cut(Layout((1, 2, 2), text=1), 2, 2)
        >>> crossed(cut, cut, torch.eye(2, dtype=torch.bool)[None, None]).mask(3)[0, 0].int()
        tensor([[1, 0, 1],
                [0, 1, 1],
                [1, 1, 1]], dtype=torch.int32)
    """
    mask = torch.nn.functional.pad(mask, (0, columns.text_columns, 0, rows.text_rows), value=True)
    plan = BlockPlan.of_mask(mask, rows.block_q, columns.block_k, rows.order, columns.order, lifetime)
    widest = max(1, int(plan.counts.max()))
    return dataclasses.replace(plan, indices=plan.indices[..., :widest].contiguous())
