"""Tables of residual magnitude ratios, measured in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.policy import View
from dita.caching.table import Measurement, Recorder, branch_name, measure, row_of, stream_key
from dita.errors import DitaError
from dita.seams import Position
from dita.table import Table

_FLUX = (
    1.0, 1.211, 1.117, 1.078, 1.0625, 1.039, 1.031, 1.039, 1.023, 1.031, 1.023, 0.980, 1.016, 1.008,
    1.0, 1.008, 1.0, 1.008, 1.0, 1.0, 0.996, 0.996, 0.980, 0.988, 0.965, 0.957, 0.934, 0.891,
)  # fmt: skip


@dataclass(frozen=True)
class MagnitudeTable(Table):
    """Ratios gamma_i = mean over tokens of |R_i| / |R_{i-1}|, L2 norm over channels, per stream.

    Attributes:
        values: stream ("branch/stage") -> one ratio per solver step of the full schedule; the first is 1, and steps
            that the calibration run left out are 0. The rest as in `Table`.
    """

    noun: ClassVar[str] = "table of magnitude ratios"
    form: ClassVar[Any] = {str: [float]}

    __hash__ = Table.__hash__

    @classmethod
    def published(cls, family: str) -> MagnitudeTable | None:
        """The authors' table for a model family, or None. FLUX.1-dev: 28 steps, 1024x1024."""
        return cls({"": _FLUX}, steps=len(_FLUX)) if family == "flux" else None

    def knows(self, position: Position) -> bool:
        """Whether there are ratios of a stream; published ones are of any, those of a batch of branches of each."""
        shared = branch_name(position.branch) in self.shared
        return shared or "" in self.values or row_of(self.values, position) is not None

    def of(self, position: Position) -> tuple[float, ...]:
        """The ratios of a stream; an unknown stream gets the first one's."""
        found = row_of(self.values, position)
        return next(iter(self.values.values())) if found is None else found


class _Recorder(Recorder):
    """Writes down the ratios."""

    wants_residual = True
    _norms: Any = None

    def computed(self, view: View) -> None:
        """Compare the residual's token norms with the step before."""
        if view.residual is None:
            raise DitaError("calibration saw no residual; this is a bug in dita")
        norms = view.residual.float().norm(dim=-1)
        ratio = 1.0 if self._norms is None else (norms / self._norms.clamp_min(1e-12)).mean().item()
        self._norms = norms
        # A step that the run leaves out (image-to-image) gets 0, the ratio that no threshold below 1 skips on.
        unseen = [0.0] * view.position.schedule_length
        self.sink.seen.setdefault(stream_key(view.position), unseen)[view.position.index] = ratio
        self.note(view)


def measure_magnitudes(pipe: Any, call: Callable[[Any], Any]) -> MagnitudeTable:
    """Run `call(pipe)` once, in full, and return the ratios of its first transformer.

    Raises:
        DitaError: the call ran no sampling loop.
    """

    def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
        return Recipe(what="trunk", when=lambda: _Recorder(sink), text=False)

    sink = measure(pipe, call, build)
    return sink.table(MagnitudeTable, sink.seen, pipe)
