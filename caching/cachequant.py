"""CacheQuant's cache: a schedule by dynamic programming, and an affine correction per channel and step.

Liu, Li and Gu, "CacheQuant: Comprehensively Accelerated Diffusion Models", CVPR 2025, arXiv 2503.01323.

Kept: the residual over all blocks. The authors keep the input of one up-sampling block of a U-Net; the trunk's
residual is what corresponds to it in a transformer. When: the steps are cut into segments, one step computed at the
head of each, so that the summed L1 distance of the features within a segment to its head is least; a segment is half
to twice as long as `interval`. How: F = a F_head + b with a and b per channel, fitted by least squares to one run,
for every skipped step.

The calibration is for one interval. Only the cache is built: quantisation and the second correction behind it belong
to the authors' quantiser. The authors fit to many samples; a call that draws a batch does the same here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.history import History
from dita.caching.policy import Verdict, View
from dita.caching.table import CalibratedMethod, Measurement, Recorder, StepPolicy, measure, row_of, stream_key
from dita.config import check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Call, Features, Position, Site
from dita.table import Table, has_form, nearest_index, table_for


def segments(distance: Sequence[Sequence[float]], steps: int, interval: int) -> list[int]:
    """Cut steps into segments of least summed distance to their heads (Fisher's optimal segmentation).

    Args:
        distance: distance[i][j] between steps i and i + 1 + j.
        steps: how many there are.
        interval: segments are ceil(interval / 2) to 2 interval steps long, but for the last; there are
            round(steps / interval) of them if that can be.

    Returns:
        the heads, rising, the first being 0.

    Example:
        >>> segments([[0.0, 9.0], [9.0, 9.0], [0.0, 0.0], [0.0], []], 5, 2)
        [0, 2]
    """
    low, high, wanted = math.ceil(interval / 2), 2 * interval, max(1, round(steps / interval))

    def cost(start: int, end: int) -> float:
        return sum(distance[start][: end - start - 1])

    # best[count][end]: least cost of cutting the first `end` steps into `count` segments, and the last one's head.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    while len(best) <= wanted or steps not in best[-1]:
        row: dict[int, tuple[float, int]] = {}
        for start, (so_far, _) in best[-1].items():
            for end in range(start + 1, min(start + high, steps) + 1):
                if end - start < low and end != steps:
                    continue
                total = so_far + cost(start, end)
                if end not in row or total < row[end][0]:
                    row[end] = (total, start)
        if not row:
            break
        best.append(row)
    count = max((n for n in range(1, min(wanted, len(best) - 1) + 1) if steps in best[n]), default=len(best) - 1)
    heads, end = [], steps
    for row in reversed(best[1 : count + 1]):
        end = row[end][1]
        heads.append(end)
    return heads[::-1]


class Segmented(StepPolicy):
    """Compute the heads of segments.

    Args:
        heads: the steps computed, in the table's steps.
        table: where they come from.
        affine: reused features are corrected as it says.
    """

    def __init__(self, heads: frozenset[int], table: Table, affine: bool) -> None:
        super().__init__(table)
        self.heads, self.affine = heads, affine

    def begin(self, view: View) -> None:
        """See `TablePolicy.begin`; say if a branch is not corrected."""
        super().begin(view)
        streams = {name.rpartition(", ")[2]: True for name in self.table.values if ", " in name}
        if self.affine and streams and row_of(streams, view.position) is None:
            self.warn_without(view.position, streams, "reused as it is")

    def decide(self, view: View) -> Verdict:
        """Read the schedule."""
        if not self.table.steps:
            return Verdict(True, "no schedule")
        return Verdict(nearest_index(self.table.steps, view.position) in self.heads, "segments")


@dataclass(frozen=True)
class SegmentTable(Table):
    """The "interval", the "heads" of its segments, and "site, stream" -> for each step a scale and a shift per channel.

    A head has () instead.
    """

    noun: ClassVar[str] = "schedule of segments"
    form: ClassVar[Any] = {"interval": int, "heads": [int]}

    __hash__ = Table.__hash__

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        for name in sorted(set(self.values) - set(self.form)):
            rows = self.values[name]
            fitted = [row for row in rows if row] if isinstance(rows, tuple) else [rows]
            if not rows or not all(has_form(row, ([float], [float])) and len(row[0]) == len(row[1]) for row in fitted):
                raise ValueError(f"{name} has no scale and shift per channel")


@dataclass(frozen=True)
class Affine(Forecast):
    """The head of the segment, scaled and shifted per channel as fitted for the step.

    Attributes:
        table: "site, stream" -> for each step a scale and a shift per channel, () for heads.
    """

    table: SegmentTable = field(default_factory=lambda: SegmentTable({}))

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        """See `Forecast.forecast`; the text stream is reused, and so is a step that is not the head (a guard's)."""
        rows = row_of(self.rows, call.position, f"{site.name}, ")
        fitted = self.table.nearest(rows, call.position) if rows and self._fitted_to(history, call.position) else None
        newest = history.newest[0]
        if fitted is None or newest is None:
            return history.combine([1.0], base)
        if fitted.shape[-1] != newest.shape[-1]:
            raise DitaError(
                f"the {self.table.noun} corrects {fitted.shape[-1]} channels of {site.name}, which has "
                f"{newest.shape[-1]}: calibrate again"
            )
        scale, shift = fitted.to(newest.device)
        start = shift.expand_as(newest) if not base or base[0] is None else base[0] + shift
        image = history.combine(scale[None], (start, *base[1:]), only=0)
        return (*image, *(history.combine([1.0], base, only=n)[0] for n in range(1, len(history.newest))))

    def _fitted_to(self, history: History, position: Position) -> bool:
        """Whether the newest step kept is the head that this step's correction was fitted to."""
        now, newest = position.index, history.steps[0] + position.index - position.step
        return newest == max((head for head in self.table.values["heads"] if head <= now), default=0)

    @cached_property
    def rows(self) -> dict[str, list[torch.Tensor | None]]:
        """The table as tensors [2, C], None for heads."""
        return {
            name: [torch.tensor(row) if row else None for row in rows]
            for name, rows in self.table.values.items()
            if name not in ("interval", "heads")
        }


class _Recorder(Recorder):
    """Keeps the image residual of every step."""

    wants_residual = True

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Keep it on the host."""
        new, old = outputs[0], inputs[0] if inputs else None
        if new is not None and old is not None:
            kept = self.sink.seen.setdefault(f"{site.name}, {stream_key(view.position)}", {})
            kept[view.position.index] = (new - old).float().cpu()


def fit_affine(head: torch.Tensor, target: torch.Tensor) -> tuple[list[float], list[float]]:
    """Scale and shift per channel that map one feature onto another with least squared error.

    Args:
        head, target: float32 [B, N, C].

    Returns:
        C scales and C shifts.

    Example:
        >>> fit_affine(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [5.0]]]))
        ([2.0], [1.0])
    """
    x, y = head.flatten(0, 1).double(), target.flatten(0, 1).double()
    dx, dy = x - x.mean(0), y - y.mean(0)
    variance = dx.square().sum(0)
    scale = torch.where(variance > 0, (dx * dy).sum(0) / variance.clamp_min(1e-30), torch.ones_like(variance))
    return scale.tolist(), (y.mean(0) - scale * x.mean(0)).tolist()


@register
@dataclass(frozen=True)
class CacheQuant(CalibratedMethod):
    """CacheQuant's settings for its cache.

    Attributes:
        interval: mean length of a segment, of which one step is computed; 1 computes all.
        affine: correct the reused residual; without it the schedule alone is used.
        table: the schedule and the corrections, from `dita.calibrate`, for this interval.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model or interval; while
            running, another number of steps than it was made for.

    Example:
        >>> CacheQuant(interval=4).label()
        'interval=4'
    """

    interval: int = 3
    affine: bool = True
    table: SegmentTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "cachequant"
    table_kind: ClassVar[type[Table] | None] = SegmentTable
    title: ClassVar[str] = "CacheQuant (cache)"
    arxiv: ClassVar[str] = "2503.01323"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "residual of the trunk; segments by dynamic programming; reuse with an affine correction"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@inproceedings{liu2025cachequant,
  title={CacheQuant: Comprehensively Accelerated Diffusion Models},
  author={Liu, Xuewen and Li, Zhikai and Gu, Qingyi},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's residual on the schedule."""
        table = SegmentTable({})
        if self.interval > 1:
            table = table_for(self.name, self.table, anatomy)
            if table.values["interval"] != self.interval:
                raise DitaError(
                    f"this calibration is for interval {table.values['interval']}, not {self.interval}: calibrate again"
                )
        heads = frozenset(table.values.get("heads", ()))
        how = Affine(table=table) if self.affine else Forecast()
        return Recipe(what="trunk", when=lambda: Segmented(heads, table, self.affine), how=how)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> CacheQuant:
        """Lay the schedule and fit the corrections to one full run; the pipeline comes back as it was."""

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            return Recipe(what="trunk", when=lambda: _Recorder(sink))

        sink = measure(pipe, call, build)
        reach = 2 * self.interval
        distance = [[0.0] * min(reach, sink.steps - 1 - i) for i in range(sink.steps)]
        for kept in sink.seen.values():
            for i, j in [(i, j) for i, row in enumerate(distance) for j in range(len(row))]:
                # A step that the run left out (image-to-image) is as far as can be from all others.
                known = i in kept and i + 1 + j in kept
                distance[i][j] += (kept[i + 1 + j] - kept[i]).abs().mean().item() if known else 1e30
        heads = segments(distance, sink.steps, self.interval)
        values: dict[str, Any] = {"interval": self.interval, "heads": heads}
        for name, kept in sink.seen.items():
            rows: list[Any] = []
            for step in range(sink.steps):
                head = max(h for h in heads if h <= step)
                known = step != head and step in kept and head in kept
                rows.append(fit_affine(kept[head], kept[step]) if known else ())
            values[name] = rows
        return replace(self, table=sink.table(SegmentTable, values, pipe))

    @classmethod
    def disabled(cls) -> CacheQuant:
        """Every step computed; needs no calibration."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> CacheQuant:
        """Segments of about two steps."""
        return cls(interval=2)

    @classmethod
    def ladder(cls) -> tuple[CacheQuant, ...]:
        """Intervals 2 to 6."""
        return tuple(cls(interval=n) for n in (2, 3, 4, 6))
