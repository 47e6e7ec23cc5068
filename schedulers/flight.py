"""Frames in flight: the rows of a stream batch between two calls of the pipeline, and the filter before them."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from dita.loop import Request, Runner
from dita.passage import flatten
from dita.schedulers.solvers.ahead import changed_argument
from dita.schedulers.solvers.first_order import FirstOrder


def skip_probability(cosine: float, threshold: float) -> float:
    """How likely the filter skips a frame.

    Args:
        cosine: of the frame and the last one processed, from -1 to 1.
        threshold: below it nothing is skipped; 1 switches the filter off.

    Example:
        >>> skip_probability(1.0, 0.98), skip_probability(0.99, 0.98), skip_probability(0.9, 0.98)
        (1.0, 0.5, 0.0)
    """
    return max(0.0, 1 - (1 - cosine) / (1 - threshold)) if threshold < 1 else 0.0


@dataclass
class Flight:
    """What a stream keeps from frame to frame, for B samples and S denoising indices. Its tensors are never written to.

    Attributes:
        sampling: what the frames have in common: name -> scheduler, timesteps, shape of the latents, and so on.
        negative: the pipeline's tensors of the negative prompt, by name.
        reference: input of the last frame that was processed, [B, ...].
        clean: of each index, latents of the input image, [B, ...]; None in text-to-image.
        chance: draws for the filter.
        skips: frames skipped in a row, by sample.
        calls: the calls of a step, without latents.
        times: of each index, the transformer's timestep in each of these calls.
        entries: of each index, its place in the scheduler's list of timesteps.
        latents: of each index but the first, whose latents come with the frame, [B, ...] before its step.
        result: the last frame that was finished, [B, ...].
    """

    sampling: dict[str, Any]
    negative: dict[str, torch.Tensor]
    reference: torch.Tensor
    clean: list[torch.Tensor | None]
    chance: random.Random
    skips: list[int]
    calls: list[Request] = field(default_factory=list)
    times: list[list[Any]] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    result: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """B."""
        return len(self.skips)

    def next(self) -> Flight:
        """A copy for one more frame."""
        own = {name: list(getattr(self, name)) for name in ("clean", "skips", "latents")}
        return replace(self, **own, chance=copy.deepcopy(self.chance))

    def bytes_held(self) -> int:
        """Bytes of its tensors, conditions not counted, which the pipeline has made anyway."""
        kept = [self.result, self.reference, *self.latents, *self.clean]
        return sum(t.nbytes for t in {id(t): t for t in kept if t is not None}.values())

    def changed(self, sampling: dict[str, Any], negative: dict[str, torch.Tensor], request: Request) -> str:
        """What is other than it was in the frames before, "" for nothing.

        Args:
            sampling, negative: of the new frame.
            request: its first call.
        """
        for name, value in sampling.items():
            if value != self.sampling[name]:
                return name
        for name in sorted({*negative, *self.negative}):
            new, old = negative.get(name), self.negative.get(name)
            if new is None or old is None or new.shape != old.shape or not torch.equal(new, old):
                return name
        return changed_argument(request, self.calls[0])

    def let_through(self, subject: torch.Tensor, threshold: float, max_skips: int) -> tuple[int, ...]:
        """The samples that the filter does not skip, one draw for all; counts the others.

        Args:
            subject: input of the new frame, [B, ...].
            threshold, max_skips: see `Stream`.
        """
        if threshold >= 1:
            return tuple(range(self.batch))
        cosines = F.cosine_similarity(subject.flatten(1).float(), self.reference.flatten(1).float()).tolist()
        draw = self.chance.random()
        skipped = [
            draw < skip_probability(cosine, threshold) and count < max_skips
            for cosine, count in zip(cosines, self.skips, strict=True)
        ]
        self.skips = [count + 1 if skip else 0 for skip, count in zip(skipped, self.skips, strict=True)]
        return tuple(n for n, skip in enumerate(skipped) if not skip)

    def note(self, number: int, request: Request) -> str:
        """Remember how the transformer is called in a frame that is run in full.

        Args:
            number: of the call in its step.
            request: the call.

        Returns:
            the argument, other than latents and timestep, that changed since the first step, "" for none.
        """
        index = request.position.step
        if index == 0:
            self.calls.append(request.changed(hidden_states=None))
        if len(self.times) <= index:
            self.times.append([])
        self.times[index].append(request.get("timestep"))
        return self.other(number, request)

    def other(self, number: int, request: Request) -> str:
        """The argument in which a call differs from the one of that number in the first step, "" for none."""
        return changed_argument(request, self.calls[number]) if number < len(self.calls) else "call"

    def spread(self, number: int, request: Request, solver: FirstOrder) -> Request:
        """The same call with a row for every index: for each branch, for each index, for each sample.

        Args:
            number: of the call in its step.
            request: the frame's own call, at the first index.
            solver: of the run.
        """
        size, branches = self.batch, range(len(request.roles))
        rows = [b * size + n for b in branches for _ in self.entries for n in range(size)]
        own = request.latents[:size]
        older = [solver.scaled(e, x).to(own) for e, x in zip(self.entries[1:], self.latents, strict=True)]
        times = [_by_row(calls[number], size * len(branches), own.device) for calls in self.times]
        spread = request.taken(rows).changed(
            hidden_states=torch.cat([own, *older] * len(branches)),
            timestep=torch.cat([t[b * size : (b + 1) * size] for b in branches for t in times]),
        )
        known = [t for t in self.clean if t is not None]
        return replace(spread, entries=tuple(self.entries), clean=torch.cat(known) if known else None)

    def advance(
        self, outputs: Sequence[torch.Tensor], first: torch.Tensor, solver: FirstOrder, who: tuple[int, ...]
    ) -> None:
        """Move the rows of some samples by one step, and up by one index.

        Args:
            outputs: of each index, the model's output after guidance, [B, ...].
            first: the frame's own latents after its first step, [B, ...].
            solver: of the run.
            who: the samples; the others stay.
        """
        rows = zip(self.entries[1:], outputs[1:], self.latents, strict=True)
        moved = [first, *(solver.step(*row) for row in rows)]
        before = [*self.latents, self.result]
        *self.latents, self.result = [merged(new, old, who) for new, old in zip(moved, before, strict=True)]
        if self.clean[0] is not None:
            self.clean[1:] = [merged(*pair, who) for pair in zip(self.clean, self.clean[1:], strict=False)]


def merged(new: torch.Tensor | None, old: torch.Tensor | None, who: Sequence[int]) -> torch.Tensor:
    """The rows `who` of `new`, the others of `old`, if there is one.

    Example:
        >>> merged(torch.ones(3), torch.zeros(3), (0, 2))
        tensor([1., 0., 1.])
    """
    assert new is not None
    if old is None or len(who) == new.shape[0]:
        return new
    result = old.clone()
    result[list(who)] = new[list(who)].to(old.dtype)
    return result


def run_some(request: Request, run: Runner, who: Sequence[int], size: int) -> Any:
    """Run a call on the rows of some samples; the others are zeros in what it returns.

    Args:
        request: its batch holds groups of `size` rows, one for each branch and index.
        who: the samples, of `size`.
    """
    if len(who) == size:
        return run(request)
    groups = request.latents.shape[0] // size
    rows = [group * size + n for group in range(groups) for n in who]
    clean = request.clean
    if clean is not None:
        clean = clean.unflatten(0, (-1, size))[:, list(who)].flatten(0, 1)
    features, rebuild = flatten(run(replace(request.taken(rows), clean=clean)))
    whole = [None if t is None else t.new_zeros(groups * size, *t.shape[1:]) for t in features]
    for t, part in zip(whole, features, strict=True):
        if t is not None and part is not None:
            t[rows] = part
    return rebuild(tuple(whole))


def _by_row(value: Any, rows: int, device: torch.device) -> torch.Tensor:
    """A transformer's timestep, of which all rows may share one."""
    times = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device=device)
    return times if times.ndim and times.shape[0] == rows else times.expand(rows)
