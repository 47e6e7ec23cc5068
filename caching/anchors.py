"""Which steps of a run to compute: a search over the expected error of the last latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dita.caching.fitting import Moments, expected_error

_REACH = 3  # steps that an anchor may be moved at once
_ROUNDS = 200
_TRIED = 3  # starts
_LONG = 64
_NUMBERS = 2**21  # followed at once, which bounds the memory of long runs


def spread(steps: int, full: int, power: float = 1.0) -> tuple[int, ...]:
    """Steps spread over a run, the first one among them; a power above 1 sets them closer at the beginning.

    Args:
        steps: of the run.
        full: how many are wanted, from 1 to `steps`.

    Example:
        >>> spread(10, 4)
        (0, 2, 5, 7)
        >>> spread(10, 4, 2.0)
        (0, 1, 2, 5)
    """
    places = steps * (np.arange(full) / full) ** power
    taken: list[int] = []
    for number, place in enumerate(places):
        # At least one after the last, and leaving room for those to come.
        taken.append(int(min(max(place, taken[-1] + 1 if taken else 0), steps - full + number)))
    return tuple(taken)


def as_mask(schedule: tuple[int, ...], steps: int) -> np.ndarray:
    """A schedule as flags: bool [steps].

    Example:
        >>> as_mask((0, 2), 3).tolist()
        [True, False, True]
    """
    mask = np.zeros(steps, dtype=bool)
    mask[list(schedule)] = True
    return mask


def choose_anchors(moments: Moments, full: int, most: int, warmup: int = 1) -> tuple[tuple[int, ...], float]:
    """The steps to compute, as many as given, that leave the least expected error of the last latents.

    A local search: of schedules spread evenly and unevenly behind a dense beginning of several lengths, the best few
    are improved by moving the anchor, by up to three steps, that lowers the error most, until none does; the best end
    of these by moving anchors to anywhere. Runs of more than 64 steps are searched from one start by small moves only.

    Args:
        moments: of full runs.
        full: steps computed, from 1 to all.
        most: anchors a forecast may use.
        warmup: first steps that are computed in any case, at most half of `full`.

    Returns:
        the steps, rising from 0, and the expected mean squared error of the last latents, see `expected_error`.

    Example:
        >>> euler = np.tril(np.ones((7, 7)), -1)
        >>> outputs = np.array([0.0, 3.0, 4.0, 4.0, 4.0, 4.0, 0.0])
        >>> choose_anchors(Moments(np.outer(outputs, outputs), euler, np.zeros(6)), 3, 1)[0]
        (0, 1, 2)
    """
    steps, kept = moments.steps, max(1, min(warmup, full // 2))
    starts = set[tuple[int, ...]]()
    for dense in {kept, *(d for d in (3, 5) if kept < d <= full // 2)}:
        for power in (1.0, 1.3, 1.7):
            rest = spread(steps - dense + 1, full - dense + 1, power)
            starts.add((*range(dense - 1), *(dense - 1 + step for step in rest)))
    first = sorted(starts)
    tried = _errors(moments, first, most).argsort()[: 1 if steps > _LONG else _TRIED]
    ends = [_descend(moments, first[n], most, kept, _REACH) for n in tried]
    best = min(ends, key=lambda end: (end[1], end[0]))
    return best if steps > _LONG else _descend(moments, best[0], most, kept, steps)


def _errors(moments: Moments, schedules: Sequence[tuple[int, ...]], most: int) -> np.ndarray:
    masks = np.stack([as_mask(schedule, moments.steps) for schedule in schedules])
    together = max(1, _NUMBERS // moments.vectors.size)
    parts = [masks[start : start + together] for start in range(0, len(masks), together)]
    return np.concatenate([expected_error(moments, part, most) for part in parts])


def _descend(
    moments: Moments, start: tuple[int, ...], most: int, kept: int, reach: int
) -> tuple[tuple[int, ...], float]:
    best, error = start, float(_errors(moments, [start], most)[0])
    for _ in range(_ROUNDS):
        moves = sorted(set(_moves(best, moments.steps, kept, reach)))
        if not moves:
            break
        errors = _errors(moments, moves, most)
        number = int(errors.argmin())
        if not errors[number] < error * (1 - 1e-4):
            break
        best, error = moves[number], float(errors[number])
    return best, error


def _moves(schedule: tuple[int, ...], steps: int, kept: int, reach: int) -> Iterator[tuple[int, ...]]:
    taken = set(schedule)
    for number, anchor in enumerate(schedule[kept:], kept):
        for by in (*range(-reach, 0), *range(1, reach + 1)):
            if 0 < anchor + by < steps and anchor + by not in taken:
                yield tuple(sorted((*schedule[:number], anchor + by, *schedule[number + 1 :])))
