"""The base class of caching methods: a recipe makes the sites and the handler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.engine import CacheHandler, Recipe, plan_sites
from dita.caching.storage import Storage
from dita.config import Method
from dita.errors import DitaError
from dita.seams import Handler, Site


@dataclass(frozen=True)
class CachingMethod(Method):
    """A method that is a point on the engine's axes; subclasses define `recipe`.

    Attributes:
        keep_on: "device", or "host": features wait in pinned host memory, to which they travel while the model goes on.
        keep_as: "" as computed, "bf16" or "fp16": halves what float32 features take.
    """

    keep_on: str = field(default="device", kw_only=True)
    keep_as: str = field(default="", kw_only=True)

    claims: ClassVar[frozenset[str]] = frozenset({"which steps are reused"})

    def __post_init__(self) -> None:
        self.storage()
        super().__post_init__()

    def storage(self) -> Storage:
        """Where and how precisely features are kept."""
        return Storage(self.keep_on, self.keep_as)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The method on the engine's axes, for one model."""
        raise NotImplementedError(f"{type(self).__name__} must define recipe()")

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """See `Method.sites`."""
        reused, watched, probe = plan_sites(self.recipe(anatomy), anatomy, self.name)
        return (*(() if probe is None else (probe,)), *reused, *watched)

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        return CacheHandler(self.recipe(anatomy), anatomy, self.name, self.storage())


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
