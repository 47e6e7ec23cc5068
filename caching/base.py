"""The base class of caching methods: a recipe makes the sites and the handler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.budget import BudgetHandler, Form
from dita.caching.engine import CacheHandler, Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import Guards
from dita.caching.storage import Storage
from dita.config import Method, check_whole
from dita.errors import DitaError
from dita.seams import Handler

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class CachingMethod(Method):
    """A method that is a point on the engine's axes; subclasses define `recipe`.

    Attributes:
        keep_on: "device", or "host": features wait in pinned host memory, to which they travel while the model goes on.
        keep_as: "" as computed, "bf16" or "fp16": halves what float32 features take.
        max_cache_bytes: most bytes held at a time, shared evenly by the pipeline's transformers; 0 for no limit. What
            would hold more gives way, see `dita.caching.budget`, and the report says how.
        guards: limits on what is skipped besides the method's own, as a mapping or `dita.caching.Guards`, such as
            {"warmup": 4, "tail": 1, "max_consecutive": 3, "forced": [10, 20]}. Where a limit forbids a skip, the whole
            step is computed, and the method goes on from there; schedules keep counting steps, not computed ones.
    """

    keep_on: str = field(default="device", kw_only=True)
    keep_as: str = field(default="", kw_only=True)
    max_cache_bytes: int = field(default=0, kw_only=True)
    guards: Guards | Mapping[str, Any] = field(default=Guards(), kw_only=True)

    claims: ClassVar[frozenset[str]] = frozenset({"which steps are reused"})

    def __post_init__(self) -> None:
        self.storage()
        check_whole("max_cache_bytes", self.max_cache_bytes, 0)
        object.__setattr__(self, "guards", Guards.of(self.guards))
        super().__post_init__()

    def storage(self) -> Storage:
        """Where and how precisely features are kept."""
        return Storage(self.keep_on, self.keep_as)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The method on the engine's axes, for one model."""
        raise NotImplementedError(f"{type(self).__name__} must define recipe()")

    def cached(self, anatomy: Anatomy) -> CacheHandler:
        """The engine with the method's recipe and the user's guards, on one model.

        Raises:
            DitaError: the model lacks what the method needs.
        """
        recipe = self.recipe(anatomy)
        recipe = replace(recipe, guards=recipe.guards.joined(Guards.of(self.guards)))
        return CacheHandler(recipe, anatomy, self.name, self.storage())

    def coarser(self) -> Self | None:
        """The next setting that keeps less, for a memory budget; None if there is none.

        A method with a setting `order` takes one anchor less; others override this.
        """
        order = getattr(self, "order", 0)
        return self.replace(order=order - 1) if order > 0 else None

    def forms(self, anatomy: Anatomy) -> Iterator[Form]:
        """The ways to carry it out that a memory budget may choose from, this one first, on one model.

        Raises:
            DitaError: the model lacks what the method needs.
        """
        setting: Self | None = self
        while setting is not None:
            try:
                handler = setting.cached(anatomy)
            except DitaError:
                if setting is self:
                    raise
                handler = None  # the model lacks what this coarser setting needs; a still coarser one may do
            half = setting.keep_as or "bf16"
            options = ((setting.keep_on, setting.keep_as), (setting.keep_on, half), ("host", half))
            for place, precision in dict.fromkeys(options if handler else ()):
                changed = setting.replace(keep_on=place, keep_as=precision)
                names = [f.name for f in fields(self) if getattr(changed, f.name) != getattr(self, f.name)]
                label = " ".join(f"{name}={getattr(changed, name)}" for name in names)
                assert handler is not None
                yield Form(label or "as set", handler, Storage(place, precision))
            setting = setting.coarser()

    def among(self, count: int) -> Self:
        """The same settings for one of `count` transformers of a pipeline, with its share of the budget."""
        if not self.max_cache_bytes:
            return self
        return self.replace(max_cache_bytes=max(1, self.max_cache_bytes // count))

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        if self.max_cache_bytes:
            return BudgetHandler(tuple(self.forms(anatomy)), self.name, self.max_cache_bytes)
        return self.cached(anatomy)


@dataclass(frozen=True)
class ForecastingMethod(CachingMethod):
    """A caching method whose forecast's weights can grow far above 1, where anchors are close and the step is not.

    Attributes:
        amplification: limit on the sum of |weights|, by which rounding and noise in the computed features are
            multiplied, kept by lowering the order of the forecast; 0 for none, as published. See `Forecast`.
    """

    amplification: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        Forecast(amplification=self.amplification)
        super().__post_init__()
