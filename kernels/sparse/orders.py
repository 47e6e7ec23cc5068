"""Orders of the image tokens, so that those which lie together in space and time share a block.

Each function maps a grid of frames, rows and columns to numbers of its tokens (flattened in this order) in a new order,
int64 on the CPU. Results are cached and shared: do not write into them.

The curve is the generalised Hilbert curve of J. Cerveny (2019) in three dimensions: a box is cut in two along its major
axis, or in three or five boxes whose curves start where the one before ends. The halves are chosen here by their
parity: a curve from one corner of a box to the next along the major axis can go in unit steps throughout if and only if
the major axis has an even number of cells or all three have an odd one. Every box is cut into such boxes, so that there
are no diagonal steps, which the published recursion makes for some odd sizes.
"""

from __future__ import annotations

import functools
import itertools

import torch

from dita.errors import DitaError

Grid = tuple[int, int, int]
_Axis = tuple[int, int]  # stride, which may be negative, and number of cells


@functools.lru_cache(maxsize=32)
def gilbert(grid: Grid) -> torch.Tensor:
    """A space-filling curve through a box of any size: each token once, neighbours in the order adjacent in the box.

    Args:
        grid: frames, rows, columns.

    Returns:
        int64 [frames * rows * columns].

    Raises:
        DitaError: a grid without tokens.

    Example:
        >>> gilbert((1, 3, 3)).tolist()
        [0, 1, 4, 3, 6, 7, 8, 5, 2]
        >>> gilbert((2, 2, 2)).tolist()
        [0, 2, 6, 4, 5, 7, 3, 1]
    """
    _check(grid, "grid")
    axes = [(grid[1] * grid[2], grid[0]), (grid[2], grid[1]), (1, grid[2])]
    even = [axis for axis in axes if axis[1] % 2 == 0]
    # Of equally long axes the columns, as neighbours in memory.
    major = max(even or axes, key=lambda axis: (axis[1], -axis[0]))
    axes.remove(major)
    second, third = reversed(axes)
    order: list[int] = []
    _walk(order, 0, major, second, third)
    return torch.tensor(order, dtype=torch.int64)


def _walk(order: list[int], start: int, a: _Axis, b: _Axis, c: _Axis) -> None:
    """Append the curve through a box that begins at `start` and ends at the other end of its edge along `a`."""
    if b[1] * c[1] == 1:
        order.extend(start + a[0] * place for place in range(a[1]))
        return
    if a[1] == 2 and max(b[1], c[1]) == 2:
        sheet = [start] + [start + b[0]] * (b[1] == 2)
        sheet += [cell + c[0] for cell in reversed(sheet)] * (c[1] == 2)
        order.extend(sheet)
        order.extend(cell + a[0] for cell in reversed(sheet))
        return
    if 2 * a[1] > 3 * max(b[1], c[1]):
        first, second = _halves(a, odd=False)
        _walk(order, start, first, b, c)
        _walk(order, _move(start, first), second, b, c)
        return
    if 3 * c[1] > 4 * b[1]:
        b, c = c, b
    all_odd = a[1] % 2 == b[1] % 2 == c[1] % 2 == 1
    if 3 * b[1] > 4 * c[1] or all_odd:
        first, second = _halves(a, odd=False)
        near, far = _halves(b, odd=False)
        _walk(order, start, near, c, first)
        _walk(order, _move(start, near), a, far, c)
        _walk(order, _end(_end(start, a), near), _back(near), c, _back(second))
        return
    if c[1] % 2 == 1 and b[1] % 2 == 0:
        b, c = c, b
    first, second = _halves(a, odd=c[1] % 2 == 1)
    near, far = _halves(b, odd=False)
    low, high = _halves(c, odd=False)
    _walk(order, start, near, low, first)
    _walk(order, _move(start, near), c, first, far)
    _walk(order, _end(_end(start, near), c), a, _back(near), _back(high))
    _walk(order, _end(_end(_move(start, near), a), c), _back(c), _back(second), far)
    _walk(order, _end(_end(start, a), near), _back(near), low, _back(second))


def _halves(axis: _Axis, odd: bool) -> tuple[_Axis, _Axis]:
    """Cut an axis in two about equal parts, the first with an odd or an even number of cells."""
    stride, cells = axis
    if cells == 2:
        return (stride, 1), (stride, 1)
    half = cells // 2
    if half % 2 != odd:
        # Of an odd axis the second part is odd: where it is a major axis it must not be left with a single cell.
        half += 1 if half == 1 or (cells % 2 and half + 1 < cells - 1) else -1
    return (stride, half), (stride, cells - half)


def _move(start: int, axis: _Axis) -> int:
    return start + axis[0] * axis[1]


def _end(start: int, axis: _Axis) -> int:
    return start + axis[0] * (axis[1] - 1)


def _back(axis: _Axis) -> _Axis:
    return -axis[0], axis[1]


@functools.lru_cache(maxsize=32)
def tiles(grid: Grid, tile: Grid) -> tuple[torch.Tensor, int]:
    """Boxes of tokens one after the other, frame by frame, row by row, column by column, inside a box as well.

    An axis is cut into as few parts as the tile allows, all of the same length or one cell less. All boxes get the
    places of the largest, rounded up to a multiple of 16 if they are more than that, which the Triton kernel asks for.

    Args:
        grid: frames, rows, columns.
        tile: the most a box may have of each.

    Returns:
        int64 [boxes * places], -1 at the end of a box that has fewer tokens; and the places of a box.

    Raises:
        DitaError: a grid or tile without tokens.

    Example:
        >>> order, places = tiles((1, 2, 5), (1, 2, 3))
        >>> order.view(-1, places)
        tensor([[ 0,  1,  5,  6, -1, -1],
                [ 2,  3,  4,  7,  8,  9]])
    """
    _check(grid, "grid")
    _check(tile, "tile")
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    boxes = [
        numbers[frames][:, rows][:, :, columns].flatten()
        for frames, rows, columns in itertools.product(*map(_parts, grid, tile))
    ]
    places = max(map(len, boxes))
    if places > 16:
        places += -places % 16
    return torch.cat([torch.nn.functional.pad(box, (0, places - len(box)), value=-1) for box in boxes]), places


def _parts(cells: int, most: int) -> list[slice]:
    count = -(-cells // most)
    return [slice(part * cells // count, (part + 1) * cells // count) for part in range(count)]


@functools.lru_cache(maxsize=32)
def touching(grid: Grid, block: int) -> torch.Tensor:
    """Which blocks of the curve hold tokens that are neighbours in the box, side by side or across a corner.

    Args:
        grid: frames, rows, columns.
        block: consecutive tokens of `gilbert(grid)` to a block.

    Returns:
        bool [blocks, blocks], symmetric, True on the diagonal.

    Example:
        >>> touching((1, 1, 6), 2).int()
        tensor([[1, 1, 0],
                [1, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    order = gilbert(grid)
    owner = torch.empty_like(order)
    owner[order] = torch.arange(len(order)) // block
    owner = owner.view(grid)
    blocks = -(-len(order) // block)
    touch = torch.zeros(blocks, blocks, dtype=torch.bool)
    for steps in itertools.product((-1, 0, 1), repeat=3):
        here = tuple(slice(max(0, -step), cells - max(0, step)) for step, cells in zip(steps, grid, strict=True))
        there = tuple(slice(max(0, step), cells - max(0, -step)) for step, cells in zip(steps, grid, strict=True))
        touch[owner[here].flatten(), owner[there].flatten()] = True
    return touch


def _check(box: Grid, what: str) -> None:
    if len(box) != 3 or min(box) < 1:
        raise DitaError(f"expected a {what} of frames, rows and columns, each at least 1, got {tuple(box)}")
