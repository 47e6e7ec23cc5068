"""Tables of residual magnitude ratios: measured in one run, saved, and matched to the run they are used in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.seams import Position

_FLUX = (
    1.0, 1.211, 1.117, 1.078, 1.0625, 1.039, 1.031, 1.039, 1.023, 1.031, 1.023, 0.980, 1.016, 1.008,
    1.0, 1.008, 1.0, 1.008, 1.0, 1.0, 0.996, 0.996, 0.980, 0.988, 0.965, 0.957, 0.934, 0.891,
)  # fmt: skip


@dataclass(frozen=True)
class MagnitudeTable:
    """Ratios gamma_i = mean over tokens of |R_i| / |R_{i-1}|, L2 norm over channels, per stream.

    Attributes:
        ratios: stream ("branch/stage") -> one ratio per solver step of the full schedule; the first is 1, and steps
            that the calibration run left out are 0.
        model: fingerprint of the transformer; "" fits any (published tables).
        scheduler: fingerprint of the scheduler; "" fits any.
        shape: shape of the transformer's first input without the batch; () fits any.
    """

    ratios: Mapping[str, tuple[float, ...]]
    model: str = ""
    scheduler: str = ""
    shape: tuple[int, ...] = ()

    @classmethod
    def published(cls, family: str) -> MagnitudeTable | None:
        """The authors' table for a model family, or None. FLUX.1-dev: 28 steps, 1024x1024."""
        return cls({"": _FLUX}) if family == "flux" else None

    def of(self, position: Position) -> tuple[float, ...]:
        """The ratios of a stream; an unknown stream gets the first one's."""
        key = stream_key(position)
        return self.ratios[key] if key in self.ratios else next(iter(self.ratios.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ratios": {key: list(values) for key, values in self.ratios.items()},
            "model": self.model,
            "scheduler": self.scheduler,
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, data: Any) -> MagnitudeTable:
        """Read what `to_dict` wrote.

        Raises:
            DitaError: not such a table.
        """
        try:
            ratios = {str(k): tuple(float(x) for x in v) for k, v in data["ratios"].items()}
            return cls(ratios, data["model"], data["scheduler"], tuple(data["shape"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DitaError(f"not a table of magnitude ratios ({error!r}); dita.calibrate writes one") from None


def stream_key(position: Position) -> str:
    """The table's name of a stream."""
    return f"{position.branch}/{position.stage}"


class Magnitudes(Policy):
    """A policy that reads a table.

    Args:
        table: the ratios.
    """

    def __init__(self, table: MagnitudeTable) -> None:
        self.table = table
        self._checked = False

    def index(self, position: Position) -> int:
        """The table's entry for a step: its own, or the nearest when the numbers of steps differ."""
        length = len(self.table.of(position))
        if length == position.schedule_length or position.schedule_length < 2:
            return min(position.index, length - 1)
        return round(position.index * (length - 1) / (position.schedule_length - 1))

    def ratio(self, position: Position) -> float:
        """The ratio of a step."""
        return self.table.of(position)[self.index(position)]

    def check_match(self, view: View) -> None:
        """Warn once a run if the table was measured under other conditions."""
        if self._checked or not self.table.ratios:
            return
        self._checked = True
        length, shape = len(self.table.of(view.position)), tuple(view.shapes[0][1:]) if view.shapes else ()
        differences = []
        if length != view.position.schedule_length:
            differences.append(f"{length} steps (now {view.position.schedule_length}; read at the nearest step)")
        if self.table.shape and self.table.shape != shape:
            differences.append(f"an input of {self.table.shape} (now {shape})")
        if self.table.scheduler and self.table.scheduler != view.scheduler:
            differences.append(f"{self.table.scheduler} (now {view.scheduler})")
        if differences:
            text = f"the magnitude ratios were measured with {', '.join(differences)}; calibrate again for best quality"
            warnings.warn(text, DitaWarning, stacklevel=2)


@dataclass
class _Measurement:
    ratios: dict[str, list[float]] = field(default_factory=dict)
    scheduler: str = ""
    shape: tuple[int, ...] = ()


class _Recorder(Policy):
    """Computes every step and writes down the ratios."""

    wants_residual = True

    def __init__(self, sink: _Measurement) -> None:
        self.sink = sink
        self._norms: Any = None

    def decide(self, view: View) -> Verdict:
        """Always compute."""
        return Verdict(True, "calibration")

    def computed(self, view: View) -> None:
        """Compare the residual's token norms with the step before."""
        if view.residual is None:
            raise DitaError("calibration saw no residual; this is a bug in dita")
        norms = view.residual.float().norm(dim=-1)
        ratio = 1.0 if self._norms is None else (norms / self._norms.clamp_min(1e-12)).mean().item()
        self._norms = norms
        # A step that the run leaves out (image-to-image) gets 0, the ratio that no threshold below 1 skips on.
        unseen = [0.0] * view.position.schedule_length
        self.sink.ratios.setdefault(stream_key(view.position), unseen)[view.position.index] = ratio
        self.sink.scheduler = view.scheduler
        self.sink.shape = tuple(view.shapes[0][1:]) if view.shapes else ()


@dataclass(frozen=True)
class _Calibration(CachingMethod):
    """Watches the trunk and skips nothing."""

    sink: _Measurement = field(default_factory=_Measurement, compare=False)

    name: ClassVar[str] = "magcache-calibration"

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's residual, always computed."""
        return Recipe(what="trunk", when=lambda: _Recorder(self.sink), text=False)

    @classmethod
    def disabled(cls) -> _Calibration:
        """It never skips, so that no warning is due."""
        return cls()


def measure(pipe: Any, call: Callable[[Any], Any]) -> MagnitudeTable:
    """Run `call(pipe)` once, in full, and return the ratios of its first transformer.

    Raises:
        DitaError: the call ran no sampling loop.
    """
    from dita.session import accelerated, transformers_of

    calibration = _Calibration()
    with accelerated(pipe, calibration):
        call(pipe)
    sink = calibration.sink
    if not sink.ratios:
        raise DitaError("the calibration call ran no sampling loop: it must run the pipeline once")
    model = next(iter(transformers_of(pipe).values()))
    ratios = {key: tuple(values) for key, values in sink.ratios.items()}
    return MagnitudeTable(ratios, fingerprint(model), sink.scheduler, sink.shape)
