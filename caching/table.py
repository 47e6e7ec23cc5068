"""Caching methods that calibrate, and the one run that measures their numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.loop import ROLES
from dita.seams import Call, Position, Site
from dita.table import Table, frozen

T = TypeVar("T", bound="Table")


_NAMES = {"neg": "uncond", **{f"call {order}": role for order, role in enumerate(ROLES)}}


def branch_name(branch: str) -> str:
    """One name for a branch, whether the pipeline names its calls, or a method on the loop did, or only their order is
    known; the first call is the conditional one, as `dita.loop.roles_of` has it.

    Example:
        >>> branch_name("pred_uncond"), branch_name("call 1"), branch_name("cond_uncond")
        ('uncond', 'uncond', 'cond_uncond')
    """
    name = branch.removeprefix("pred_")
    return _NAMES.get(name, name)


def stream_key(position: Position) -> str:
    """The table's name of a stream."""
    return f"{position.branch}/{position.stage}"


def row_of(values: Mapping[str, Any], position: Position, before: str = "") -> Any:
    """What a table holds of a stream, by the name that it had when it was measured; None for a stream unseen.

    Args:
        values: name of a stream, with something before it or not -> anything.
        position: in the stream.
        before: what stands before the name.

    Example:
        >>> row_of({"call 1/0": 5}, Position(0, 9, 0, "uncond", 0, 9, 0))
        5
    """
    key = before + stream_key(position)
    if key in values:
        return values[key]
    wanted = f"{branch_name(position.branch)}/{position.stage}"
    for name, value in values.items():
        branch, _, stage = name.removeprefix(before).partition("/")
        if name.startswith(before) and f"{branch_name(branch)}/{stage}" == wanted:
            return value
    return None


def guidance_of(view: View | Call) -> str:
    """ "batched" where a call holds the same latents twice, as guidance in one batch does; else the branch's name."""
    latents = view.latents
    if latents is not None and len(latents) % 2 == 0 and torch.equal(*latents.chunk(2)):
        return "batched"
    return branch_name(view.position.branch)


@dataclass
class Measurement:
    """What a calibration run has seen; `seen` is the recorder's own."""

    seen: dict[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    shape: tuple[int, ...] = ()
    steps: int = 0
    guidance: set[str] = field(default_factory=set)

    def table(self, kind: type[T], values: Mapping[str, Any], pipe: Any) -> T:
        """The table of `values` under the conditions seen, for the pipeline's first transformer."""
        from dita.session import transformers_of

        model = next(iter(transformers_of(pipe).values()))
        guidance = ",".join(sorted(self.guidance))
        return kind(frozen(values), fingerprint(model), self.scheduler, self.shape, self.steps, guidance)


class Recorder(Policy):
    """Computes every step and writes down what it saw; subclasses define `saw` or `computed`."""

    def __init__(self, sink: Measurement) -> None:
        self.sink = sink

    def decide(self, view: View) -> Verdict:
        """Always compute."""
        return Verdict(True, "calibration")

    def note(self, view: View) -> None:
        """Remember the conditions of the run."""
        self.sink.scheduler, self.sink.steps = view.scheduler, view.position.schedule_length
        self.sink.shape = tuple(view.shapes[0][1:]) if view.shapes else ()
        if view.position.local_step == 0:
            self.sink.guidance.add(guidance_of(view))

    def computed(self, view: View) -> None:
        """Remember the conditions of the run."""
        self.note(view)


class TablePolicy(Policy):
    """A policy that reads a table, and warns once a run if the table was measured under other conditions.

    Args:
        table: what it reads.

    Class attributes:
        rescales: a run of another number of steps reads the table at the nearest step, as the paper defines; without,
            it is refused.
    """

    rescales: ClassVar[bool] = True

    def __init__(self, table: Table) -> None:
        self.table = table

    def begin(self, view: View) -> None:
        """Compare the conditions.

        Raises:
            DitaError: the table is for another number of steps, and means nothing at this one.
        """
        self.table.check(view, guidance_of(view), self.rescales)

    def warn_without(self, position: Position, held: Iterable[str], instead: str) -> None:
        """Say that the table holds other streams than the one that is about to run.

        Args:
            position: in that stream.
            held: names of those that it holds.
            instead: what becomes of the branch, in words that go on from "which is".
        """
        text = f"the {self.table.noun} has numbers of {', '.join(held)}, none of {stream_key(position)}"
        warnings.warn(f"{text}, which is {instead}; calibrate again", DitaWarning, stacklevel=3)


class StepPolicy(TablePolicy):
    """A policy that reads a schedule or corrections made for the steps of a run of so many, and of no other number."""

    rescales: ClassVar[bool] = False


class CalibratedMethod(CachingMethod):
    """A method whose setting `table` is measured on the user's pipeline.

    Class attributes:
        table_kind: the table's class.
        bound: the numbers hold for the scheduler, steps, resolution and guidance they were measured at, and a run under
            others warns, or is refused (see `StepPolicy`).
        shaping: settings that the numbers depend on beyond chance, the others only read them; None: on all of them.
        trained: `call` runs many times, on a sample of its own each.
        trajectories: samples that `call` should draw for good numbers.
    """

    needs_calibration: ClassVar[bool] = True
    table_kind: ClassVar[type[Table] | None] = Table
    bound: ClassVar[bool] = True
    shaping: ClassVar[tuple[str, ...] | None] = None
    trained: ClassVar[bool] = False
    trajectories: ClassVar[int] = 1

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The method's sites; asking needs no table yet."""
        return type(self).disabled().handler(anatomy).sites  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class _Calibration(CachingMethod):
    """Watches, and skips nothing."""

    build: Callable[[Anatomy, Measurement], Recipe] = field(default=lambda a, s: Recipe("trunk", Policy), compare=False)
    sink: Measurement = field(default_factory=Measurement, compare=False)

    name: ClassVar[str] = "calibration"

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The recorder's."""
        return self.build(anatomy, self.sink)

    @classmethod
    def disabled(cls) -> _Calibration:
        """It never skips, so that no warning is due."""
        return cls()


def measure(pipe: Any, call: Callable[[Any], Any], build: Callable[[Anatomy, Measurement], Recipe]) -> Measurement:
    """Run `call(pipe)` once, in full, under a recorder; the pipeline comes back as it was.

    Args:
        pipe: the pipeline.
        call: runs it once.
        build: makes the recipe whose policy is a `Recorder` on the given measurement.

    Raises:
        DitaError: the call ran no sampling loop.
    """
    from dita.session import accelerated

    calibration = _Calibration(build)
    with accelerated(pipe, calibration):
        call(pipe)
    if not calibration.sink.steps:
        raise DitaError("the calibration call ran no sampling loop: it must run the pipeline once")
    return calibration.sink
