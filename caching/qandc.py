"""Q&C's cache: modules reused at a fixed interval, and the variance of the latents put right after every step.

Ding et al., "Q&C: When Quantization Meets Cache in Efficient Image Generation", ICLR 2026, arXiv 2503.02508.

Kept: the outputs of attention and MLP modules, before the adaLN gate. When: steps whose number is a multiple of
`interval` are computed (FORA). How: reuse. Correction: the latents x that a finished step leaves become
mu + K (x - mu), with mu and K per step and channel from a full and a cached run on the same noise, x' and x. The
paper's K minimises rQNSR^2 + MSE, that is sum w (mu + K (x - mu) - x')^2 with w = 1 + 1 / x'^2, for want of
K = sigma' / sigma (its eq. 9).

The cached run of the calibration is corrected as it goes, so that each K is for what those before it leave: with the K
of an uncorrected run every step would undo the same error again (on fashion-dit at interval 3, 38 dB become 20).

A call that draws 16 images or more is wanted: K for the few pixels of a handful fits their noise.

Differences: |x'| is at least `floor` standard deviations in 1 / x', because latents cross zero and a few elements would
decide. "published" is the paper's eq. 12 as printed, whose second sum holds (x - mu) / x' where the minimum has
(x - mu) (x' - mu) / x'^2; it is not 1 for a run without error and ruins images (33 dB at a floor of 1, 13 dB at 0.1).
Confidence: medium; the formulas were read in notes on the paper and in a translation, and no code is public.

Not here: the quantised weights (W8A8), for which diffusers' own quantisation goes with this, and TAP, which picks
samples across steps for the ranges of a quantiser; a K per step has only that step's samples, and uses them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.policy import Guards, Periodic, Verdict, View
from dita.caching.table import CalibratedMethod, Measurement, Recorder, StepPolicy, measure
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.grid import channel_axis
from dita.registry import register
from dita.seams import Position
from dita.table import Table, table_for

_SCALES = ("least-squares", "ratio", "published", "none")


def variance_scale(
    cached: torch.Tensor, reference: torch.Tensor, scale: str = "least-squares", floor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and factor per channel that bring the latents of a cached run to those of a full one.

    Args:
        cached, reference: x and x' [samples, C].
        scale: "least-squares", "ratio" or "published", see the module.
        floor: least |x'| divided by, in standard deviations of the channel.

    Returns:
        mu and K, float64 [C]; K is 1 where the channel is constant.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> [round(t.item(), 3) for t in variance_scale(x, x)]
        [1.333, 1.0]
        >>> round(variance_scale(x, 2 * x, "ratio")[1].item(), 3)
        2.0
    """
    x, goal = cached.double(), reference.double()
    mean = x.mean(0)
    moved, wanted = x - mean, goal - mean
    inverse = goal.sign() / goal.abs().clamp_min(1e-30).maximum(floor * goal.std(0, correction=0))
    if scale == "ratio":
        above, below = goal.std(0, correction=0), x.std(0, correction=0)
    else:
        second = moved * inverse if scale == "published" else moved * wanted * inverse.square()
        above, below = (moved * wanted + second).sum(0), (moved.square() * (1 + inverse.square())).sum(0)
    return mean, torch.where(below > 0, above / below.clamp_min(1e-30), torch.ones_like(below))


def compensate(latents: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor, axis: int) -> torch.Tensor:
    """mu + K (x - mu), per channel, in float32.

    Args:
        latents: any shape with C channels at `axis`.
        mean, factor: [C].
        axis: of the channels.

    Example:
        >>> compensate(torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]), 1)
        tensor([[3., 3.]])
    """
    shape = [-1 if n == axis else 1 for n in range(latents.ndim)]
    mu, k = (t.to(latents.device, torch.float32).reshape(shape) for t in (mean, factor))
    return (mu + k * (latents.float() - mu)).to(latents.dtype)


class CheckedPeriodic(StepPolicy):
    """Every `interval`-th step, from the first on; for runs that the table was made for."""

    def __init__(self, interval: int, table: Table) -> None:
        super().__init__(table)
        self._schedule = Periodic(interval)

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        return self._schedule.decide(view)


class _Recorder(Recorder):
    """Notes the conditions and the noise that a run begins with, while computing every `interval`-th step."""

    def __init__(self, sink: Measurement, interval: int = 1) -> None:
        super().__init__(sink)
        self._schedule = Periodic(interval)

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        return self._schedule.decide(view)

    def computed(self, view: View) -> None:
        """Note them."""
        self.note(view)
        if view.latents is not None:
            self.sink.seen.setdefault("start", view.latents.detach().cpu().clone())


@register
@dataclass(frozen=True)
class QandC(CalibratedMethod):
    """Q&C's settings for its cache.

    Attributes:
        interval: steps whose number is a multiple of it are computed; 1 computes all.
        scale: how K is had: "least-squares", "ratio" (of standard deviations), "published" (eq. 12 as printed), or
            "none" for the cache alone, which needs no calibration.
        floor: least |x'| that is divided by, in standard deviations of the channel.
        table: mu and K, from `dita.calibrate`, for this interval, scale, floor and guards.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model or setting; while
            running, another number of steps than it was made for.

    Example:
        >>> QandC(interval=4, scale="ratio").label()
        'interval=4 scale=ratio'
    """

    interval: int = 3
    scale: str = "least-squares"
    floor: float = 1.0
    table: Table | None = field(default=None, repr=False)

    name: ClassVar[str] = "qandc"
    title: ClassVar[str] = "Q&C (cache)"
    arxiv: ClassVar[str] = "2503.02508"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "modules; fixed interval; reuse, and the variance of the latents corrected after each step"
    seams: ClassVar[frozenset[str]] = frozenset({"module", "step"})
    citation: ClassVar[str] = """@inproceedings{ding2026qandc,
  title={Q\\&C: When Quantization Meets Cache in Efficient Image Generation},
  author={Ding, Xin and Li, Xin and Qin, Haotong and Chen, Zhibo},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("floor", self.floor, 0)
        if self.scale not in _SCALES:
            raise DitaError(f"scale is {self.scale!r}; expected one of {', '.join(_SCALES)}")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Modules, and a corrector of the latents."""
        anatomy.require("module", self.name)
        if self.interval == 1 or self.scale == "none":
            return Recipe(what="module", when=lambda: Periodic(self.interval), keep="output")
        table = table_for(self.name, self.table, anatomy)
        made = {name: value for name, value in table.values.items() if name != "rows"}
        if made != self._conditions():
            raise DitaError(f"this calibration is for {made}, not for {self._conditions()}: calibrate again")
        rows = [tuple(map(torch.tensor, row)) if row else None for row in table.values["rows"]]

        def correct(position: Position, latents: torch.Tensor) -> torch.Tensor:
            row, axis = table.nearest(rows, position), channel_axis(anatomy.model, latents)
            if row is None:
                return latents
            if len(row[0]) != latents.shape[axis]:
                raise DitaError(
                    f"qandc was calibrated on {len(row[0])} channels; the latents are {tuple(latents.shape)}"
                )
            return compensate(latents, row[0], row[1], axis)

        return Recipe(what="module", when=lambda: CheckedPeriodic(self.interval, table), keep="output", correct=correct)

    def _conditions(self) -> dict[str, Any]:
        guards = {"guards": str(self.guards)} if str(self.guards) else {}
        return {"interval": self.interval, "scale": self.scale, "floor": float(self.floor), **guards}

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> QandC:
        """Make one full run and one cached run; the pipeline comes back as it was.

        Raises:
            DitaError: the runs begin with different noise, so that `call` has to seed its generator.
        """
        if self.scale == "none":
            return self
        reference: dict[int, torch.Tensor] = {}
        found: dict[int, tuple[list[float], list[float]]] = {}

        def full(anatomy: Anatomy, sink: Measurement) -> Recipe:
            anatomy.require("module", self.name)

            def record(position: Position, latents: torch.Tensor) -> torch.Tensor:
                reference[position.index] = latents.detach().cpu().clone()
                return latents

            return Recipe(what="model", when=lambda: _Recorder(sink), keep="output", correct=record)

        begun = measure(pipe, call, full).seen.get("start")

        def cached(anatomy: Anatomy, sink: Measurement) -> Recipe:
            def fit(position: Position, latents: torch.Tensor) -> torch.Tensor:
                goal, start = reference.get(position.index), sink.seen.get("start")
                if goal is None or begun is None or start is None or not torch.equal(begun, start):
                    raise DitaError(
                        "the two calibration runs do not begin with the same noise: make a seeded generator inside the "
                        "call, as in lambda p: p(..., generator=torch.Generator().manual_seed(0))"
                    )
                axis = channel_axis(anatomy.model, latents)
                x, wanted = (t.detach().cpu().movedim(axis, -1).flatten(0, -2) for t in (latents, goal))
                mean, factor = variance_scale(x, wanted, self.scale, self.floor)
                found[position.index] = (mean.tolist(), factor.tolist())
                return compensate(latents, mean, factor, axis)

            guards = Guards.of(self.guards)
            when = functools.partial(_Recorder, sink, self.interval)
            return Recipe(what="module", when=when, keep="output", guards=guards, correct=fit)

        sink = measure(pipe, call, cached)
        # A step that the run left out (image-to-image) has no row.
        rows = [found.get(step, ()) for step in range(sink.steps)]
        return replace(self, table=sink.table(Table, {**self._conditions(), "rows": rows}, pipe))

    @classmethod
    def disabled(cls) -> QandC:
        """Every step computed; needs no calibration."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> QandC:
        """Every other step."""
        return cls(interval=2)

    @classmethod
    def ladder(cls) -> tuple[QandC, ...]:
        """Intervals 2 to 6."""
        return tuple(cls(interval=n) for n in (2, 3, 4, 6))
