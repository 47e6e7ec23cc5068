"""Tables of measured numbers: one format for all methods that calibrate, and the one run that fills them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.seams import Position, Site

T = TypeVar("T", bound="Table")


@dataclass(frozen=True)
class Table:
    """Numbers that one run measured, and the conditions they belong to.

    Attributes:
        values: name -> numbers, nested tuples of numbers, or mappings of those; what they mean is the method's matter.
        model: fingerprint of the transformer; "" fits any (published tables).
        scheduler: fingerprint of the scheduler; "" fits any.
        shape: shape of the transformer's first input without the batch; () fits any.
        steps: solver steps of the full schedule; 0 fits any.
    """

    values: Mapping[str, Any]
    model: str = ""
    scheduler: str = ""
    shape: tuple[int, ...] = ()
    steps: int = 0

    noun: ClassVar[str] = "calibration"
    """What the numbers are, for messages."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "values": _plain(self.values),
            "model": self.model,
            "scheduler": self.scheduler,
            "shape": list(self.shape),
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls: type[T], data: Any) -> T:
        """Read what `to_dict` wrote.

        Raises:
            DitaError: not such a table.
        """
        try:
            values = {str(name): _frozen(value) for name, value in data["values"].items()}
            return cls(values, data["model"], data["scheduler"], tuple(data["shape"]), int(data["steps"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DitaError(f"not a table of {cls.noun} ({error!r}); dita.calibrate writes one") from None

    def differences(self, view: View) -> list[str]:
        """In what the run at hand differs from the one that was measured, in words."""
        found, shape = [], tuple(view.shapes[0][1:]) if view.shapes else ()
        if self.steps and self.steps != view.position.schedule_length:
            found.append(f"{self.steps} steps (now {view.position.schedule_length}; read at the nearest step)")
        if self.shape and self.shape != shape:
            found.append(f"an input of {self.shape} (now {shape})")
        if self.scheduler and self.scheduler != view.scheduler:
            found.append(f"{self.scheduler} (now {view.scheduler})")
        return found

    def check(self, view: View) -> None:
        """Warn if the run at hand differs from the one that was measured."""
        found = self.differences(view)
        if found:
            text = f"the {self.noun} was measured with {', '.join(found)}; calibrate again for best quality"
            warnings.warn(text, DitaWarning, stacklevel=3)

    def nearest(self, numbers: Sequence[Any], position: Position) -> Any:
        """The entry of a list with one number per step: the step's own, or the nearest if the step counts differ."""
        return numbers[nearest_index(len(numbers), position)]


def nearest_index(length: int, position: Position) -> int:
    """Map a step of a run onto a list with an entry per step of another.

    Example:
        >>> nearest_index(5, Position(8, 9, 0, "all", 8, 9, 8))
        4
    """
    if length == position.schedule_length or position.schedule_length < 2:
        return min(position.index, length - 1)
    return round(position.index * (length - 1) / (position.schedule_length - 1))


def table_for(method: str, table: T | None, anatomy: Anatomy) -> T:
    """The table, if it is there and belongs to this model.

    Raises:
        DitaError: there is none, or it was measured on another model.
    """
    if table is None:
        raise DitaError(
            f"{method} has no numbers for {anatomy.name}: measure them with one run, "
            f'{method.replace("-", "_")} = dita.calibrate(pipe, "{method}", lambda p: p(...), save="{method}.json")'
        )
    model = fingerprint(anatomy.model)
    if table.model and table.model != model:
        raise DitaError(f"this {table.noun} was measured on {table.model}, not on {model}: calibrate again")
    return table


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
        return kind(_frozen(values), fingerprint(model), self.scheduler, self.shape, self.steps)


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
    """

    needs_calibration: ClassVar[bool] = True
    table_kind: ClassVar[type[Table]] = Table
    bound: ClassVar[bool] = True
    shaping: ClassVar[tuple[str, ...] | None] = None
    trained: ClassVar[bool] = False

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The method's sites; asking needs no table yet."""
        return type(self).disabled().handler(anatomy).sites  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def decode(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rebuild the table from JSON."""
        values = super().decode(values)
        if values.get("table") is not None:
            values["table"] = cls.table_kind.from_dict(values["table"])
        return values


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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _frozen(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is no number")
    return value
