"""Shifts and noise correlation by which a run in stages visits noise levels as often as a plain one does.

When a stage ends at time e and the picture is enlarged 2x2, its noise comes in blocks. Correlated noise makes it white
again and puts the clock back to s = e / (Z (1 - e) + e), Z^2 >= 4. So some times are visited twice; shifts h_k of the
stages and Z are chosen for their density over all steps to match the plain one, with those times counted twice: RALU's
noise-timestep rescheduling with distribution matching. Times run from 0 (noise) to 1; the density of a schedule with
shift h is h / (1 + (h - 1) t)^2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

_POINTS = 1000
_LOW, _HIGH = 0.5, 10.0  # of the shifts
_ENOUGH = 1.03


def starts(ends: Sequence[float], z: float) -> tuple[float, ...]:
    """Times at which the stages start, given those at which they end.

    Example:
        >>> [round(s, 4) for s in starts((0.3, 0.45, 1.0), 6.317)]
        [0.0, 0.0635, 0.1147]
    """
    return (0.0, *(end / (z * (1 - end) + end) for end in ends[:-1]))


def density(times: np.ndarray, shift: float, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """Density of the times that a schedule visits between two of them, 0 outside."""
    share = [shift * t / (1 + (shift - 1) * t) for t in (start, end)]
    inside = (times >= start) & (times <= end)
    return np.where(inside, shift / (1 + (shift - 1) * times) ** 2 / (share[1] - share[0]), 0.0)


def mismatch(values: Sequence[float], steps: Sequence[int], ends: Sequence[float], shift: float) -> float:
    """Jensen-Shannon distance between the wanted density and that of the stages, on 1000 times.

    Args:
        values: shifts of the three stages, and Z.
        steps: of each stage.
        ends: times at which they end; the last is 1.
        shift: of the plain schedule.

    Example:
        >>> round(mismatch((5.019, 2.589, 2.226, 6.317), (5, 6, 7), (0.3, 0.45, 1.0), 3.0), 5)
        0.01746
    """
    times = np.linspace(0, 1, _POINTS)
    first = starts(ends, values[3])
    wanted, visited = density(times, shift), np.zeros(_POINTS)
    for start, end in zip(first[1:], ends[:-1], strict=True):
        wanted = wanted + (end - start) * density(times, shift, start, end)
    for count, own, start, end in zip(steps, values[:3], first, ends, strict=True):
        visited = visited + count * density(times, own, start, end)
    p, q = (np.clip(d, 1e-10, None) / np.clip(d, 1e-10, None).sum() for d in (wanted, visited))
    middle = (p + q) / 2
    divergence = (p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()
    return float(np.sqrt(max(divergence, 0.0) / 2))


@functools.lru_cache(maxsize=64)
def matched(steps: tuple[int, ...], ends: tuple[float, ...], shift: float) -> tuple[float, float, float, float]:
    """Shifts of the three stages and Z that match well.

    The mismatch falls steeply in Z at first and is flat thereafter, while each stage's start moves towards pure noise:
    the least Z is taken that comes within 3 % of the best.

    Args:
        steps, ends, shift: as for `mismatch`.

    Example:
        >>> [round(value, 1) for value in matched((5, 6, 7), (0.3, 0.45, 1.0), 3.0)]
        [4.9, 2.6, 2.2, 6.9]
    """
    fits, shifts = [], np.full(3, 3.0)
    for z in 2 * 1.1 ** np.arange(25):
        worth = functools.partial(_cost, z=float(z), steps=steps, ends=ends, shift=shift)
        shifts = simplex(worth, shifts, _LOW, _HIGH, rounds=20)
        fits.append((worth(shifts), (*shifts.tolist(), float(z))))
    least = min(cost for cost, _ in fits)
    return next(values for cost, values in fits if cost <= _ENOUGH * least)


def _cost(shifts: np.ndarray, z: float, steps: tuple[int, ...], ends: tuple[float, ...], shift: float) -> float:
    return mismatch((*shifts.tolist(), z), steps, ends, shift)


def simplex(
    cost: Callable[[np.ndarray], float], start: np.ndarray, low: float, high: float, rounds: int = 60
) -> np.ndarray:
    """Nelder and Mead's search for a least cost, with all numbers between two limits.

    Example:
        >>> simplex(lambda x: float(((x - 3.5) ** 2).sum()), np.array([1.0, 2.0, 3.0]), 0.0, 9.0).round(2)
        array([3.5, 3.5, 3.5])
    """
    corners = [start, *(start + np.eye(len(start))[n] * 0.1 * start[n] for n in range(len(start)))]
    ranked = sorted((cost(c := np.clip(corner, low, high)), tuple(c)) for corner in corners)
    for _ in range(rounds):
        centre, worst = np.mean([corner for _, corner in ranked[:-1]], axis=0), np.array(ranked[-1][1])

        def tried(stretch: float, centre: np.ndarray = centre, worst: np.ndarray = worst) -> tuple[float, tuple]:
            place = np.clip(centre + stretch * (centre - worst), low, high)
            return cost(place), tuple(place)

        new = tried(1.0)
        if new < ranked[0]:
            new = min(new, tried(2.0))
        elif new[0] >= ranked[-2][0]:
            new = min(new, tried(0.5)) if new[0] < ranked[-1][0] else tried(-0.5)
        if new[0] < ranked[-1][0]:
            ranked[-1] = new
        else:
            top = np.array(ranked[0][1])
            ranked = [ranked[0], *((cost(c := (top + np.array(corner)) / 2), tuple(c)) for _, corner in ranked[1:])]
        ranked.sort()
    return np.array(ranked[0][1])
