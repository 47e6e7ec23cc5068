"""Fitted: forecasts and schedules learned from the user's own pipeline.

dita's own; there is no paper. `docs/fitted.md` has the derivation, the ablations and where it fails.

Kept: the transformer's output. When: the steps, as many as wanted, that leave the least expected error of the last
latents, found by a search. How: a weighted sum of the newest anchors, with weights of each step's own in closed form.
Both follow from the second moments of the outputs over the steps of a few full runs and from the linear map that the
scheduler makes of outputs (`dita.caching.fitting`), so that one calibration serves every speedup.

The weights track: a skipped step is forecast not as well as can be, but such that the latents after it come closest to
those of the full run, by which it makes good what the steps before fell short of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.anchors import spread
from dita.caching.engine import Recipe
from dita.caching.fitted_calibration import media_of, observe, psnr_of, rerun
from dita.caching.fitted_gate import Gate
from dita.caching.fitted_plan import Following, Planner
from dita.caching.fitted_table import FittedTable, read_fit
from dita.caching.forecast import Forecast
from dita.caching.table import CalibratedMethod
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.loop import Loop
from dita.registry import register
from dita.table import Table, table_for

_DEFAULT = 3.0


@register
@dataclass(frozen=True)
class Fitted(CalibratedMethod):
    """The settings of the fitted forecast.

    Attributes:
        full: steps of a run that are computed; 0 for as many as `speedup` leaves.
        speedup: of a whole run, by what steps cost in the calibration; 1 computes all; 0 for that of the calibration
            file, else 3.
        anchors: computed outputs that a forecast may use, 1 to 6.
        warmup: first steps that are computed in any case, where at least twice as many are computed in all.
        gate: how many times the plan's expected error of the last latents, in amplitude, a sample's may come to, by
            what its forecasts are found to be off: harder ones have more steps computed, easier ones fewer, see
            `dita.caching.fitted_gate`; 0 for no gate. With ``per_sample=True`` each sample is judged by itself, else
            the worst one of the batch counts.
        calibration: a file that `dita.calibrate(..., save="x.safetensors")` wrote, in place of a table.
        table: the moments, from `dita.calibrate`. Without any, every n-th step is computed, and forecasts are Taylor's
            of order 1.

    Raises:
        DitaError: a setting out of range; on attaching, a fit of another model, or a file that is none.

    Example:
        >>> Fitted(speedup=4).label()
        'speedup=4'
    """

    full: int = 0
    speedup: float = 0.0
    anchors: int = 5
    warmup: int = 1
    gate: float = 0.0
    calibration: str = ""
    table: FittedTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "fitted"
    title: ClassVar[str] = "Fitted"
    arxiv: ClassVar[str] = "dita"
    axes: ClassVar[str] = "model output; steps searched for; weights of each step fitted to track the full run"
    seams: ClassVar[frozenset[str]] = frozenset({"model"})
    table_kind: ClassVar[type[Table]] = FittedTable
    shaping: ClassVar[tuple[str, ...]] = ()
    bound: ClassVar[bool] = False
    trajectories: ClassVar[int] = 4
    citation: ClassVar[str] = """@software{dita2026fitted,
  title={Fitted: forecasts and schedules learned from one's own diffusion pipeline},
  author={{The dita authors}},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("full", self.full, 0)
        check_number("speedup", self.speedup, 0)
        check_whole("anchors", self.anchors, 1, 6)
        if 0 < self.speedup < 1:
            raise DitaError(
                f"speedup is {self.speedup!r}; expected a number of at least 1, or 0 for the calibrated one"
            )
        check_whole("warmup", self.warmup, 1)
        check_number("gate", self.gate, 0)
        if not isinstance(self.calibration, str):
            object.__setattr__(self, "calibration", str(self.calibration))  # a path

    @cached_property
    def fit(self) -> tuple[FittedTable | None, int, float]:
        """The table, given or read, the steps to compute and the speedup.

        Raises:
            DitaError: the file is none.
        """
        table, full, speedup = self.table, self.full, self.speedup
        if self.calibration and table is None:
            kept = Fitted.read(self.calibration)
            table = kept.table
            if not full and not speedup:
                full, speedup = kept.full, kept.speedup
        return table, full, speedup or _DEFAULT

    @staticmethod
    def read(path: str | Path) -> Fitted:
        """The method that `save` wrote.

        Raises:
            DitaError: no such file, or not such a file.
        """
        table, kept = read_fit(path)
        return Fitted(table=table).replace(**kept)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The model's output, by a planner that all streams share."""
        table, full, speedup = self.fit
        if table is not None:
            table = table_for(self.name, table, anatomy)
            table.check_parts()
        planner = self.planner(table, full, speedup)
        unsure = table is None and (speedup > 1 or bool(full))
        return Recipe(
            what="model",
            when=lambda: Following(planner, _say_uncalibrated if unsure else None),
            how=Forecast(self.anchors - 1),
            keep="output",
        )

    def loop(self, anatomies: tuple[Anatomy, ...], pipe: Any = None) -> Loop | None:
        """The gate, if there is one; see `Method.loop`."""
        table, full, speedup = self.fit
        if not self.gate or table is None:
            return None
        return Gate(table, full or table.full_for(speedup, table.steps), self.anchors, self.warmup, self.gate)

    def planner(self, table: FittedTable | None, full: int, speedup: float) -> Planner:
        """What plans the runs of one model."""
        return Planner(table, full, speedup, self.anchors, self.warmup)

    def coarser(self) -> Fitted | None:
        """One anchor less."""
        return self.replace(anchors=self.anchors - 1) if self.anchors > 1 else None

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> Fitted:
        """Measure the moments in full runs, and in one more with steps skipped; the pipeline comes back as it was."""
        return self.calibrated_on(pipe, [call])

    def calibrated_on(
        self,
        pipe: Any,
        calls: Sequence[Callable[[Any], Any]],
        advance: Callable[[], None] = lambda: None,
        psnr: float | None = None,
        beside: Sequence[Any] = (),
    ) -> Fitted:
        """The same from several calls; see `dita.calibrate`.

        Args:
            pipe: the pipeline.
            calls: each runs it, once or several times, in as many steps as the others.
            advance: called after each, and after the one that is run again.
            psnr: see `dita.calibrate`; sets `full`.
            beside: methods that are at work meanwhile.
        """
        table, shown = observe(pipe, calls, lambda fit: _Probing(anchors=self.anchors, table=fit), advance, beside)
        found = replace(self, table=table, calibration="")
        return found if psnr is None else found.reaching(psnr, pipe, calls[0], shown, beside)

    def reaching(
        self, psnr: float, pipe: Any, call: Callable[[Any], Any], shown: Any, beside: Sequence[Any] = ()
    ) -> Fitted:
        """The same with as few computed steps as keep a PSNR, by bisection over accelerated runs.

        Args:
            psnr: in dB, of what `call` returns to `shown`.
            pipe: the pipeline.
            call: runs it once.
            shown: what it returned in full.
            beside: methods that are at work meanwhile.

        Raises:
            DitaError: the call returns no media, or leaving out one step is too much already.
        """
        if self.table is None:
            raise DitaError("a PSNR is reached from a calibration; this setting has none")
        wanted, low, high = media_of(shown), 1, self.table.steps
        while high - low > 1:
            middle = (low + high) // 2
            tried = replace(self, full=middle, speedup=0.0)
            near = psnr_of(rerun(pipe, call, tried, *beside), wanted) >= psnr
            low, high = (low, middle) if near else (middle, high)
        if high == self.table.steps:
            raise DitaError(f"no step can be left out for {psnr:g} dB: ask for less, or take the plain pipeline")
        return replace(self, full=high, speedup=0.0)

    def save(self, path: str | Path) -> None:
        """Write the calibration and how many steps are wanted; `Fitted(calibration=path)` reads it.

        Raises:
            DitaError: there is no calibration.
        """
        table, full, speedup = self.fit
        if table is None:
            raise DitaError("there is no fit to save; dita.calibrate measures one")
        table.save(
            path, {"full": full, "speedup": 0.0 if full else speedup, "anchors": self.anchors, "warmup": self.warmup}
        )

    @classmethod
    def disabled(cls) -> Fitted:
        """Every step computed; needs no calibration."""
        return cls(speedup=1.0)

    @classmethod
    def forced(cls) -> Fitted:
        """Every other step."""
        return cls(speedup=2.0)

    @classmethod
    def ladder(cls) -> tuple[Fitted, ...]:
        """Speedups from 1.5 to 6."""
        return tuple(cls(speedup=s) for s in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0))


@dataclass(frozen=True)
class _Probing(Fitted):
    """Computes a third of the steps, closer at the beginning, where a model takes errors worst."""

    def planner(self, table: FittedTable | None, full: int, speedup: float) -> Planner:
        assert table is not None
        return Planner(table, 0, 1.0, self.anchors, given=spread(table.steps, max(2, table.steps // 3), 1.7))


def _say_uncalibrated() -> None:
    import warnings

    from dita.errors import DitaWarning

    text = (
        "fitted has no calibration: it extrapolates on an even schedule. Measure one with "
        'fitted = dita.calibrate(pipe, calls=[lambda p: p(...)], speedup=3, save="fit.safetensors")'
    )
    warnings.warn(text, DitaWarning, stacklevel=2)
