"""Tables of measured numbers: one format for all methods that calibrate."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from dita.anatomy import Anatomy
from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.loop import ROLES
from dita.seams import Position

T = TypeVar("T", bound="Table")


class Conditions(Protocol):
    """What a run at hand is compared by: a caching method's view, or a call."""

    @property
    def position(self) -> Position: ...

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]: ...

    @property
    def scheduler(self) -> str: ...


@dataclass(frozen=True)
class Table:
    """Numbers that one run measured, and the conditions they belong to.

    Attributes:
        values: name -> numbers, nested tuples of numbers, or mappings of those; what they mean is the method's matter.
        model: fingerprint of the transformer; "" fits any (published tables).
        scheduler: fingerprint of the scheduler; "" fits any.
        shape: shape of the transformer's first input without the batch; () fits any.
        steps: solver steps of the full schedule; 0 fits any.
        guidance: "batched", or the branches that were called, such as "cond,uncond"; "" fits any.
    """

    values: Mapping[str, Any]
    model: str = ""
    scheduler: str = ""
    shape: tuple[int, ...] = ()
    steps: int = 0
    guidance: str = ""

    noun: ClassVar[str] = "calibration"
    """What the numbers are, for messages."""
    form: ClassVar[Any] = None
    """What `values` look like, see `has_form`; None for what the method itself checks."""

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "values": plain(self.values),
            "model": self.model,
            "scheduler": self.scheduler,
            "shape": list(self.shape),
            "steps": self.steps,
            "guidance": self.guidance,
        }

    @classmethod
    def from_dict(cls: type[T], data: Any) -> T:
        """Read what `to_dict` wrote; of tables that were written without a guidance mode it fits any.

        Raises:
            DitaError: not such a table.
        """
        try:
            values = {str(name): frozen(value) for name, value in data["values"].items()}
            model, scheduler, shape, steps = (data[name] for name in ("model", "scheduler", "shape", "steps"))
            whole = all(isinstance(number, int) and 0 <= number < 2**20 for number in (*shape, steps))
            guidance = data.get("guidance", "")
            if not all(isinstance(name, str) for name in (model, scheduler, guidance)) or not whole:
                raise ValueError(f"measured on {model!r}, {scheduler!r}, {shape!r}, {steps!r}, {guidance!r}")
            table = cls(values, model, scheduler, tuple(shape), steps, guidance)
            table.verify()
            return table
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DitaError(f"not a table of {cls.noun} ({error!r}); dita.calibrate writes one") from None

    def verify(self) -> None:
        """Look whether the numbers are laid out as the method reads them.

        Raises:
            ValueError: they are not.
        """
        if self.form is not None and not has_form(self.values, self.form):
            raise ValueError("its numbers are not laid out like that")

    @property
    def shared(self) -> tuple[str, ...]:
        """Branches that were measured in one batch: its numbers serve each, since methods on the loop take it apart."""
        return ROLES if self.guidance == "batched" else ()

    def differences(self, view: Conditions, guidance: str = "") -> list[str]:
        """In what the run at hand differs from the one that was measured, in words.

        Args:
            view: the run.
            guidance: "batched", or the branch that is called; "" if that is not known.
        """
        found, shape = [], tuple(view.shapes[0][1:]) if view.shapes else ()
        if self.steps and self.steps != view.position.schedule_length:
            found.append(f"{self.steps} steps (now {view.position.schedule_length}; read at the nearest step)")
        if self.shape and self.shape != shape:
            found.append(f"an input of {self.shape} (now {shape})")
        if self.scheduler and self.scheduler != view.scheduler:
            found.append(f"{self.scheduler} (now {view.scheduler})")
        if self.guidance and guidance and guidance not in (*self.guidance.split(","), *self.shared):
            found.append(f"guidance {self.guidance} (now {guidance})")
        return found

    def check(self, view: Conditions, guidance: str = "", rescales: bool = True) -> None:
        """Warn if the run at hand differs from the one that was measured.

        Args:
            view, guidance: see `differences`.
            rescales: the numbers mean something at another number of steps, where they are read at the nearest one.

        Raises:
            DitaError: the number of steps differs, and they do not.
        """
        steps = view.position.schedule_length
        if self.steps and self.steps != steps and not rescales:
            raise DitaError(
                f"the {self.noun} was made for runs of {self.steps} steps, and this run has {steps}: what it says of a "
                f"step means nothing there. Run {self.steps} steps, or calibrate again with {steps}"
            )
        found = self.differences(view, guidance)
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


def has_form(value: Any, form: Any) -> bool:
    """Whether nested numbers are laid out in a certain way.

    Args:
        value: numbers, tuples and mappings.
        form: `float` for a number; `int` for a whole one, not below 0; `[form]` for one or more of a form;
            `(form, form)` for as many as stand there; `{str: form}` for one or more by any name; `{"name": form}` for
            these names and perhaps others.

    Example:
        >>> has_form({"a": (1.0, 2.0)}, {str: [float]}), has_form({"a": (1.0, 2.0)}, {"a": (int, int)})
        (True, False)
    """
    if isinstance(form, dict):
        if not isinstance(value, Mapping):
            return False
        if str in form:
            return bool(value) and all(has_form(entry, form[str]) for entry in value.values())
        return all(name in value and has_form(value[name], entry) for name, entry in form.items())
    if isinstance(form, list):
        return isinstance(value, tuple) and bool(value) and all(has_form(entry, form[0]) for entry in value)
    if isinstance(form, tuple):
        alike = isinstance(value, tuple) and len(value) == len(form)
        return alike and all(map(has_form, value, form))
    if form is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, (int, float))


def plain(value: Any) -> Any:
    """Mappings and sequences as dictionaries and lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def frozen(value: Any) -> Any:
    """Mappings and sequences as dictionaries and tuples.

    Raises:
        ValueError: something in them is neither a finite number nor a string.
    """
    if isinstance(value, Mapping):
        return {str(name): frozen(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(frozen(entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value
