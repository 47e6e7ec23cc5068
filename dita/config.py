"""The base class of all methods: a frozen config that validates itself and round-trips through JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dita.errors import DitaError

if TYPE_CHECKING:
    from typing_extensions import Self

    from dita.anatomy import Anatomy
    from dita.loop import Loop
    from dita.seams import Handler, Site


@dataclass(frozen=True)
class Method:
    """One published method with its settings.

    Subclasses are frozen dataclasses whose fields are the settings, registered with `dita.registry.register`. Class
    attributes say what the paper is and how the method works:

    Attributes:
        name: registry name, such as "taylorseer".
        title: the method's own name.
        arxiv: identifier of the paper.
        citation: BibTeX entry.
        axes: the method in words: what is kept, when it is reused, how it is forecast.
        confidence: "high", "medium" or "low": how sure we are to reproduce the paper; see the module's docstring.
        seams: the seams it attaches at.
        claims: what only one method of a recipe may do, such as "reuse".
        needs_calibration: the settings hold numbers measured on the user's pipeline.
        saves: it leaves out calls or parts of them; without, it makes a run better, so that fewer steps may do.
        joint: it decides about the samples of a batch together, outside of the transformer's calls.
        across_runs: it goes on from one run to the next, such as frames of a stream; the first run is plain.
        schema: version of the settings in JSON.
        table_kind: the class of a setting named `table`, rebuilt by its `from_dict`; None without such a setting.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    axes: ClassVar[str] = ""
    confidence: ClassVar[str] = "high"
    seams: ClassVar[frozenset[str]] = frozenset()
    claims: ClassVar[frozenset[str]] = frozenset()
    needs_calibration: ClassVar[bool] = False
    saves: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    across_runs: ClassVar[bool] = False
    schema: ClassVar[int] = 1
    table_kind: ClassVar[type[Any] | None] = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `DitaError` unless the settings make sense."""

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites it takes on one model; a method that needs numbers from a calibration is asked before it has them.

        Raises:
            DitaError: the model lacks what the method needs; the message says what.
        """
        return self.handler(anatomy).sites

    def handler(self, anatomy: Anatomy) -> Handler:
        """Build the object that does the work on one model.

        Raises:
            DitaError: the model lacks what the method needs; the message says what.
        """
        raise NotImplementedError(f"{type(self).__name__} must define handler()")

    def loop(self, anatomies: tuple[Anatomy, ...], pipe: Any = None) -> Loop | None:
        """Build the object that does the work on the sampling loop; None for a method that leaves it as it is.

        Args:
            anatomies: of the pipeline's transformers.
            pipe: the pipeline; None when a bare transformer is asked about.

        Raises:
            DitaError: the pipeline is not of a kind that the method works on.
        """
        return None

    @classmethod
    def disabled(cls) -> Method:
        """The setting that never skips anything; its output is bit-identical to the plain pipeline."""
        raise NotImplementedError(f"{cls.__name__} must define disabled()")

    @classmethod
    def forced(cls) -> Method:
        """A setting that skips on any model and input, however bad the result: for checking that skipping works."""
        raise NotImplementedError(f"{cls.__name__} must define forced()")

    @classmethod
    def ladder(cls) -> tuple[Method, ...]:
        """Settings from mild to strong, for sweeps."""
        raise NotImplementedError(f"{cls.__name__} must define ladder()")

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> Method:
        """The same settings with the numbers measured on `pipe`, which `call(pipe)` runs once.

        Methods that need none return themselves.
        """
        return self

    @property
    def claimed(self) -> frozenset[str]:
        """What only one method of a recipe may do, with these settings: `claims`, and for some methods more."""
        return self.claims

    @property
    def uncalibrated(self) -> bool:
        """Whether it still lacks the numbers that `dita.calibrate` measures."""
        return self.needs_calibration and getattr(self, "table", None) is None

    def label(self) -> str:
        """The settings that differ from the defaults, in one line; "default" if none does."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.repr:
                parts.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}")
        return " ".join(parts) or "default"

    def among(self, count: int) -> Self:
        """The settings for one of a pipeline's `count` transformers; for most methods the same."""
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with other settings, validated."""
        return type(self)(**{**settings(self), **_known(type(self), changes)})

    def to_json(self) -> str:
        """Write name, schema version and settings as JSON.

        Example:
            >>> from dita.caching import TaylorSeer
            >>> TaylorSeer(interval=4) == TaylorSeer.from_json(TaylorSeer(interval=4).to_json())
            True
        """
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes, as a dictionary of plain values."""
        values = {name: getattr(value, "to_dict", lambda v=value: v)() for name, value in settings(self).items()}
        return {"method": self.name, "schema": self.schema, "settings": values}

    @staticmethod
    def from_json(text: str) -> Method:
        """Rebuild any registered method from `to_json`'s text.

        Raises:
            DitaError: not JSON, an unknown method or setting, a value of no such kind, or written by another schema
                version.
        """
        from dita import registry

        try:
            data = json.loads(text)
            name, schema, values = data["method"], data["schema"], data["settings"]
            if not isinstance(name, str) or not isinstance(values, dict):
                raise TypeError(f"a {type(name).__name__} as method and a {type(values).__name__} as settings")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DitaError(f"expected JSON with method, schema and settings, got {text[:80]!r} ({error!r})") from None
        cls = registry.get(name)
        if schema != cls.schema:
            raise DitaError(f"{name} settings have schema {schema}; this dita reads {cls.schema}: write them again")
        try:
            method = cls(**cls.decode(_known(cls, values)))
            hash(method)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise DitaError(f"these are no settings of {name}: {str(values)[:80]} ({error!r})") from None
        return method

    @classmethod
    def decode(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Turn JSON values into field values; override for fields that are not plain."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        values = {
            name: tuple(value) if isinstance(value, list) and str(kinds[name]).startswith("tuple") else value
            for name, value in values.items()
        }
        if cls.table_kind is not None and values.get("table") is not None:
            values["table"] = cls.table_kind.from_dict(values["table"])
        return values


def settings(method: Method) -> dict[str, Any]:
    """The fields of a method as a dictionary."""
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def _known(cls: type[Method], values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise DitaError(f"{cls.name} has no setting {', '.join(unknown)}; it has: {', '.join(names)}")
    return values


def check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise `DitaError` unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = f"from {low}" + ("" if high is None else f" to {high}")
        raise DitaError(f"{name} is {value!r}; expected a whole number {limit}")


def check_number(name: str, value: object, low: float, high: float | None = None) -> None:
    """Raise `DitaError` unless `value` is a finite number from `low` to `high`."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < float("inf")
    if not fine or (high is not None and value > high):  # pyright: ignore[reportOperatorIssue]
        limit = f"of at least {low:g}" + ("" if high is None else f" and at most {high:g}")
        raise DitaError(f"{name} is {value!r}; expected a finite number {limit}")
