"""Following a peer through a run: where each transformer call stands, and how much of it was computed.

Every peer is counted alike. The unit is one sample passing one attention or feed-forward module inside a transformer
block; the plain run passes all of them in every call. A peer that skips whole blocks, one that skips attention only,
and one that leaves out half of a guided batch can then be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dita.anatomy import Anatomy, describe
from dita.clock import RunClock
from dita.errors import DitaError, DitaWarning
from dita.patch import Patch
from dita.seams import Position

Forward = Callable[..., Any]


@dataclass
class Counter:
    """How much of a run was computed. It fills while the pipeline runs; of several runs it holds the last.

    Attributes:
        parts: attention and feed-forward modules that are counted.
        summary: what the peer attached, in words.
        runs: runs begun.
        calls: calls of the transformer by the pipeline.
        full_calls: calls of which everything was computed.
        computed: samples that passed a part, added up over calls and parts.
        expected: the same for the plain run.

    Example:
        >>> counter = Counter(parts=4)
        >>> counter.add(samples=2, computed=8)
        >>> counter.add(samples=2, computed=2)
        >>> counter.computed_fraction, counter.full_calls_fraction
        (0.625, 0.5)
    """

    parts: int
    summary: str = ""
    runs: int = 0
    calls: int = 0
    full_calls: int = 0
    computed: int = 0
    expected: int = 0

    @property
    def computed_fraction(self) -> float:
        """Block work done, of the plain run's.

        Raises:
            DitaError: no run was seen.
        """
        return self.computed / self._seen(self.expected)

    @property
    def full_calls_fraction(self) -> float:
        """Transformer calls computed in full, of all; what `dita.report` calls computed.

        Raises:
            DitaError: no run was seen.
        """
        return self.full_calls / self._seen(self.calls)

    def start(self) -> None:
        """Begin a run."""
        self.runs += 1
        self.calls = self.full_calls = self.computed = self.expected = 0

    def add(self, samples: int, computed: int) -> None:
        """Add a call of so many samples, of which `computed` passed some part."""
        self.calls += 1
        self.computed += computed
        self.expected += samples * self.parts
        self.full_calls += computed >= samples * self.parts

    def _seen(self, count: int) -> int:
        if not count:
            raise DitaError("no transformer call was counted: call the pipeline inside the with block, then ask")
        return count


class Attachment:
    """What a peer put on a transformer; subclasses help where the peer or the pipeline leaves something out.

    Attributes:
        summary: what is attached, in words.
        may_idle: a run that skips nothing is no surprise.
    """

    summary: str = ""
    may_idle: bool = False

    def start(self) -> None:
        """A run begins: forget the one before."""

    def call(self, position: Position, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lead one call of the transformer through the peer."""
        return forward(*args, **kwargs)

    def finish(self) -> None:
        """The last step of a run returned; the pipeline has not cleaned up yet."""


class Harness:
    """Counts one transformer's work and tells the attachment of runs and calls.

    The parts are wrapped before the peer comes, so that the peer skips the count with the part; the transformer is
    wrapped after it, so that every call of the pipeline is seen. Both on the instance only.

    Args:
        name: of the peer and its settings, for messages.
        pipe: the pipeline.
        model: its transformer.

    Raises:
        DitaError: the transformer's blocks hold no attention or feed-forward module known to dita.
    """

    def __init__(self, name: str, pipe: Any, model: nn.Module) -> None:
        self.name, self.model = name, model
        anatomy = describe(model)
        anatomy.require("module", name)
        self._parts = counted_parts(anatomy)
        self.counter = Counter(len(self._parts))
        self.attachment = Attachment()
        self._clock = RunClock(lambda: pipe.scheduler, self._started, self._finished)
        self._patches: list[Patch] = []
        self._passed = 0

    def attach(self, enable: Callable[[], Attachment]) -> None:
        """Wrap the parts, let the peer in, wrap the transformer, follow the scheduler."""
        for part in self._parts:
            self._patch(part, self._around_part)
        self.attachment = enable()
        self.counter.summary = self.attachment.summary
        self._patch(self.model, self._around_call)
        self._clock.attach()

    def detach(self) -> None:
        """Unwrap and stop following; what the peer put in between is left to `Trace.restore`."""
        self._clock.detach()
        while self._patches:
            self._patches.pop().remove()

    def _patch(self, target: nn.Module, around: Callable[..., Any]) -> None:
        self._patches.append(Patch(target, "forward", around))
        self._patches[-1].apply()

    def _started(self) -> None:
        self.counter.start()
        self.attachment.start()

    def _finished(self) -> None:
        self.attachment.finish()
        idle = self.counter.calls > 0 and self.counter.full_calls == self.counter.calls
        if idle and not self.attachment.may_idle:
            warnings.warn(f"{self.name} skipped nothing in a run of {self.counter.calls} calls", DitaWarning, 2)

    def _around_part(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._passed += samples_of(args, kwargs)
        return original(*args, **kwargs)

    def _around_call(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self._clock.position(0, None)
        if position is None:
            return original(*args, **kwargs)
        self._passed = 0
        try:
            result = self.attachment.call(position, original, args, kwargs)
        except DitaError:
            raise
        except Exception as error:
            name = type(self.model).__name__
            raise DitaError(f"{self.name} failed on {name}: {type(error).__name__}: {error}") from error
        self.counter.add(samples_of(args, kwargs), self._passed)
        return result


def counted_parts(anatomy: Anatomy) -> list[nn.Module]:
    """Attention and feed-forward modules inside a model's blocks; side by side in one block, each by itself."""
    parts: list[nn.Module] = []
    for part in anatomy.modules:
        parts += [part.module, *(feeder for feeder in part.feeders if any(True for _ in feeder.parameters()))]
    return parts


def samples_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """First dimension of the first tensor among a call's arguments.

    Example:
        >>> samples_of((), {"hidden_states": torch.zeros(2, 16, 8)})
        2
    """
    return next(int(value.shape[0]) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
