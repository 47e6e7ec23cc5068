"""The base classes of methods on the sampling loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.config import Method
from dita.loop import Loop
from dita.seams import Handler
from dita.table import Table


@dataclass(frozen=True)
class SamplingMethod(Method):
    """A method that decides how often, when and how the transformer is called; subclasses define `make`.

    It takes no site inside the transformer unless it defines `handler` too.
    """

    def handler(self, anatomy: Anatomy) -> Handler:
        """One that does nothing: the work is done around the transformer."""
        return Handler()

    def loop(self, anatomies: tuple[Anatomy, ...], pipe: Any = None) -> Loop | None:
        """See `Method.loop`; the disabled setting leaves the loop alone altogether."""
        loop = self.make(anatomies, pipe)
        return None if self == type(self).disabled() else loop

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> Loop:
        """Build the object that does the work; see `Method.loop`."""
        raise NotImplementedError(f"{type(self).__name__} must define make()")


class CalibratedSampling(SamplingMethod):
    """A method on the loop whose setting `table` is measured on the user's pipeline.

    Class attributes are those of `dita.caching.table.CalibratedMethod`.
    """

    needs_calibration: ClassVar[bool] = True
    table_kind: ClassVar[type[Table] | None] = Table
    bound: ClassVar[bool] = True
    shaping: ClassVar[tuple[str, ...] | None] = None
    trained: ClassVar[bool] = False
