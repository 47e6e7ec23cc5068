"""Searching the timestep that a transformer is best told, step by step, against a run with many more steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch

from dita.errors import DitaError
from dita.loop import Loop, Request, Run, Runner, Solver, Step
from dita.passage import flatten
from dita.schedulers.timesteps.tracing import Trace, argument_of, same_start
from dita.seams import Features
from dita.watching import watched

Replay = tuple[Features, Callable[[Features], Any]]
"""The tensors that a transformer returned, and how to wrap them as it did."""


def moved(request: Request, offset: float) -> Request:
    """The same call at another timestep; whole numbers become float32.

    Raises:
        DitaError: it is told several timesteps, which one number cannot move.
    """
    if offset == 0:
        return request
    name = argument_of(request.anatomy.model)
    value = torch.as_tensor(request.get(name))
    if value.ndim > 1:
        raise DitaError(
            f"{request.anatomy.name} is given a timestep for each of its tokens ({list(value.shape)}); "
            "timestep-aligner moves the one of the whole step"
        )
    value = value if value.is_floating_point() else value.float()
    return request.changed(**{name: value + offset})


def targets(coarse: Trace, fine: Trace) -> list[torch.Tensor]:
    """Where the fine run was when the coarse one had finished each of its steps, in straight coordinates.

    Between two states of the fine run it went straight.

    Raises:
        DitaError: the two runs began from different noise.
    """
    same_start(coarse, fine)
    down = fine.u[0] > fine.u[-1]
    places = fine.u.flip(0) if down else fine.u
    found = []
    for place in coarse.u[1:]:
        after = int(torch.searchsorted(places, place).clamp(1, len(places) - 1))
        share = ((place - places[after - 1]) / (places[after] - places[after - 1])).clamp(0, 1)
        pair = [len(places) - 1 - n if down else n for n in (after - 1, after)]
        one, two = (fine.states[n].double() / fine.scale[n] for n in pair)
        found.append(torch.lerp(one, two, share.to(one.device)))
    return found


def minimise(error: Callable[[float], float], low: float, high: float, evaluations: int) -> tuple[float, float]:
    """Search a minimum without gradients: five even trials, then golden sections around the best of them.

    Args:
        error: what to minimise.
        low, high: where to search.
        evaluations: how often `error` may be called, at least 5.

    Returns:
        the best place tried, and its error.

    Example:
        >>> place, error = minimise(lambda x: (x - 0.3) ** 2, -1.0, 1.0, 25)
        >>> round(place, 3), error < 1e-6
        (0.3, True)
    """
    tried = {place: error(place) for place in (low + (high - low) * n / 4 for n in range(5))}
    ordered = sorted(tried)
    best = ordered.index(min(tried, key=tried.__getitem__))
    left, right = ordered[max(0, best - 1)], ordered[min(len(ordered) - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    while len(tried) < evaluations and right > left:
        inner = (right - golden * (right - left), left + golden * (right - left))
        # One of the two was tried in the round before, but for rounding.
        known = [
            next((x for x in tried if math.isclose(x, place, rel_tol=1e-9, abs_tol=1e-12)), None) for place in inner
        ]
        values = []
        for place, old in zip(inner, known, strict=True):
            if old is None:
                tried[place] = error(place)
            values.append(tried[place if old is None else old])
        left, right = (left, inner[1]) if values[0] < values[1] else (inner[0], right)
    place = min(tried, key=tried.__getitem__)
    return place, tried[place]


class _Enough(Exception):
    """A trial got as far as it had to."""


class Trial(Loop):
    """Runs a call up to one step, on which the transformer is told another timestep; the steps before are remembered.

    Args:
        coarse: the run as it is without.
        trained: timesteps of the training schedule, beyond which none is told.
    """

    def __init__(self, coarse: Trace, trained: int) -> None:
        self._coarse, self._trained = coarse, trained
        self._kept: dict[tuple[int, int], Replay] = {}
        self._new: dict[float, list[Replay]] = {}
        self._place, self._offset = 0, 0.0
        self._calls = (-1, 0)
        self._found: torch.Tensor | None = None

    def begin(self, number: int) -> None:
        """Try this step from now on."""
        self._place = number
        self._new.clear()

    def keep(self, offset: float) -> None:
        """Take the step so from now on; it was tried."""
        for number, replay in enumerate(self._new[offset]):
            self._kept[self._place, number] = replay

    def range(self, reach: float) -> tuple[float, float]:
        """Between which displacements to search: so many gaps to the next timestep, within those that were trained."""
        entries, told, number = self._coarse.points.timesteps, self._coarse.told, self._place
        near = number + 1 if number + 1 < len(entries) else number - 1
        gap, scale = abs(entries[number] - entries[near]), (told[0] - told[-1]) / (entries[0] - entries[-1])
        ends = (
            scale * max(-reach * gap, -entries[number]),
            scale * min(reach * gap, self._trained - entries[number]),
        )
        return min(ends), max(ends)

    def state(self, pipe: Any, call: Callable[[Any], Any], offset: float) -> torch.Tensor:
        """The latents after the step, if the transformer is told its timestep moved by so much: float64 [B, ...].

        Raises:
            DitaError: the call has fewer steps than it had at first.
        """
        self._offset, self._found, self._new[offset] = offset, None, []
        with watched(pipe, self), contextlib.suppress(_Enough):
            call(pipe)
        if self._found is None:
            raise DitaError(
                f"{self._coarse.name} runs the calibration call again and again, with the same number of steps each "
                f"time; step {self._place} was missing in one"
            )
        return self._found.double()

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        self._calls = (-1, 0)

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        step = request.position.step
        number = self._calls[1] if self._calls[0] == step else 0
        self._calls = (step, number + 1)
        if step < self._place:
            features, rebuild = self._kept[step, number]
            return rebuild(tuple(None if t is None else t.clone() for t in features))
        result = run(moved(request, self._offset))
        features, rebuild = flatten(result)
        self._new[self._offset].append((tuple(None if t is None else t.clone() for t in features), rebuild))
        return result

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        found = solve(step.output, step.sample)
        if step.position.step == self._place:
            self._found = found.detach()
            raise _Enough
        return found
