"""Caching methods that calibrate, and the one run that measures their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.seams import Position, Site
from dita.table import Table, frozen

T = TypeVar("T", bound="Table")


def stream_key(position: Position) -> str:
    """The table's name of a stream."""
    return f"{position.branch}/{position.stage}"


@dataclass
class Measurement:
    """What a calibration run has seen; `seen` is the recorder's own."""

    seen: dict[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    shape: tuple[int, ...] = ()
    steps: int = 0

    def table(self, kind: type[T], values: Mapping[str, Any], pipe: Any) -> T:
        """The table of `values` under the conditions seen, for the pipeline's first transformer."""
        from dita.session import transformers_of

        model = next(iter(transformers_of(pipe).values()))
        return kind(frozen(values), fingerprint(model), self.scheduler, self.shape, self.steps)


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

    def computed(self, view: View) -> None:
        """Remember the conditions of the run."""
        self.note(view)


class TablePolicy(Policy):
    """A policy that reads a table, and warns once a run if the table was measured under other conditions.

    Args:
        table: what it reads.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._checked = False

    def check(self, view: View) -> None:
        """Compare the conditions, the first time in a run."""
        if not self._checked:
            self._checked = True
            self.table.check(view)


class CalibratedMethod(CachingMethod):
    """A method whose setting `table` is measured on the user's pipeline.

    Class attributes:
        table_kind: the table's class.
        bound: the numbers hold for the scheduler, steps and resolution they were measured at, and a run under others
            warns.
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
