"""The base class of methods on the sampling loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dita.anatomy import Anatomy
from dita.config import Method
from dita.loop import Loop
from dita.seams import Handler


@dataclass(frozen=True)
class SamplingMethod(Method):
    """A method that decides how often, when and how the transformer is called; subclasses define `make`.

    It takes no site inside the transformer.
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
