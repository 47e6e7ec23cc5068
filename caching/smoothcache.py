"""SmoothCache: one calibration run decides, per kind of module, which steps are computed.

Liu et al., "SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers", CVPR workshops
2025, arXiv 2411.10510.

Kept: the outputs of attention and MLP modules, before the adaLN gate. When: with e_j[i] the relative L1 change of a
kind of module between steps i and i + j, averaged over depth, the schedule is laid greedily: a computed step i is
followed by the largest j up to `most` skipped ones with e_j[i] <= `alpha`. The first and the last step are computed.
Kinds are scheduled independently, so that a step may reuse attention and compute the MLP. How: reuse.

The calibration keeps the changes, not the schedule, so that one serves every alpha. Difference: the authors' counters
advance with calls and are not reset after a run, which sequential guidance and a second run break; here a schedule is
read by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.policy import Verdict, View, relative_l1
from dita.caching.table import CalibratedMethod, Measurement, Recorder, StepPolicy, measure
from dita.config import check_number, check_whole
from dita.registry import register
from dita.seams import Features, Site
from dita.table import Table, table_for

_LAGS = 5


def greedy_schedule(changes: Sequence[Sequence[float]], steps: int, alpha: float, most: int) -> list[bool]:
    """Lay out which steps are computed.

    Args:
        changes: for each lag j = 1, 2, ... the change between steps i and i + j, for i = 0 .. steps - 1 - j.
        steps: of the run.
        alpha: largest change that is still skipped over.
        most: largest lag.

    Returns:
        one flag per step.

    Example:
        >>> greedy_schedule([[0.5, 0.1, 0.1, 0.1], [0.9, 0.3, 0.15]], 5, alpha=0.2, most=2)
        [True, True, False, True, True]
        >>> greedy_schedule([[0.5, 0.1, 0.1, 0.1, 0.1], [0.9, 0.15, 0.15, 0.1]], 6, alpha=0.2, most=2)
        [True, True, False, False, True, True]
    """
    flags, step = [True] * steps, 0
    while step < steps:
        lags = [j for j in range(1, min(most, len(changes)) + 1) if step + j < steps and changes[j - 1][step] <= alpha]
        skip = max(lags, default=0)
        flags[step + 1 : step + 1 + skip] = [False] * skip
        step += skip + 1
    flags[-1] = True
    return flags


class ScheduledKinds(StepPolicy):
    """Follow a schedule per kind of module.

    Args:
        schedules: role of a site -> one flag per step, True to compute.
        table: where they come from.
    """

    def __init__(self, schedules: Mapping[str, Sequence[bool]], table: Table) -> None:
        super().__init__(table)
        self.schedules = schedules

    def decide(self, view: View) -> Verdict:
        """Read the schedules."""
        due = frozenset(role for role, flags in self.schedules.items() if self.table.nearest(flags, view.position))
        reason = f"schedule: {', '.join(sorted(due)) or 'nothing'} due"
        if view.position.step == view.position.steps - 1 or len(due) == len(self.schedules):
            return Verdict(True, "schedule")
        return Verdict(False, reason, computes=lambda site: site.role in due)


class _Recorder(Recorder):
    """Writes down the change of every module over one to five steps."""

    def __init__(self, sink: Measurement) -> None:
        super().__init__(sink)
        self._past: dict[Site, list[torch.Tensor]] = {}

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Compare with the last steps."""
        new = outputs[0]
        if site.kind != "module" or new is None:
            return
        past = self._past.setdefault(site, [])
        by_lag = self.sink.seen.setdefault(site.role, [{} for _ in range(_LAGS)])
        for lag, old in enumerate(past, 1):
            # e_j[i] = |F_i - F_{i+j}| / |F_{i+j}|, the later step in the denominator.
            change = relative_l1(old, new).mean().item()
            by_lag[lag - 1].setdefault(view.position.index - lag, []).append(change)
        self._past[site] = [new.detach().clone(), *past][:_LAGS]


@register
@dataclass(frozen=True)
class SmoothCache(CalibratedMethod):
    """SmoothCache's settings.

    Attributes:
        alpha: largest relative change that is still skipped over; 0 computes all. Published: 0.35 (30 and 50 steps),
            0.08 and 0.18 (DiT-XL, 50), 0.08 (70).
        most: skips in a row, 1 to 5.
        table: the changes, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model; while
            running, another number of steps than it was made for.

    Example:
        >>> SmoothCache(alpha=0.08).label()
        'alpha=0.08'
    """

    alpha: float = 0.18
    most: int = 3
    table: Table | None = field(default=None, repr=False)

    name: ClassVar[str] = "smoothcache"
    title: ClassVar[str] = "SmoothCache"
    arxiv: ClassVar[str] = "2411.10510"
    axes: ClassVar[str] = "modules; greedy schedule per kind from one run; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    shaping: ClassVar[tuple[str, ...]] = ()
    citation: ClassVar[str] = """@inproceedings{liu2025smoothcache,
  title={SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers},
  author={Liu, Joseph and Geddes, Joshua and Guo, Ziyu and Jiang, Haomiao and Nandwana, Mahesh Kumar},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("alpha", self.alpha, 0)
        check_whole("most", self.most, 1, _LAGS)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Modules, by kind."""
        anatomy.require("module", self.name)
        table = Table({})
        if self.alpha > 0:
            table = table_for(self.name, self.table, anatomy)
        roles = {part.site.role for part in anatomy.modules}
        schedules = {
            role: greedy_schedule(changes, table.steps, self.alpha, self.most)
            for role, changes in table.values.items()
            if role in roles
        }
        return Recipe(what="module", when=lambda: ScheduledKinds(schedules, table), keep="output")

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> SmoothCache:
        """Measure the changes in one full run; the pipeline comes back as it was."""

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            anatomy.require("module", self.name)
            watch = tuple(part.site for part in anatomy.modules)
            return Recipe(what="trunk", when=lambda: _Recorder(sink), watch=watch)

        sink = measure(pipe, call, build)
        values = {
            role: [
                # A step that the run left out (image-to-image) is never skipped.
                [_mean(seen.get(i)) for i in range(sink.steps - lag)]
                for lag, seen in enumerate(by_lag, 1)
            ]
            for role, by_lag in sink.seen.items()
        }
        return replace(self, table=sink.table(Table, values, pipe))

    @classmethod
    def disabled(cls) -> SmoothCache:
        """Every step computed; needs no calibration."""
        return cls(alpha=0.0)

    @classmethod
    def forced(cls) -> SmoothCache:
        """Skips over any change."""
        return cls(alpha=1e9)

    @classmethod
    def ladder(cls) -> tuple[SmoothCache, ...]:
        """Alpha 0.05 to 0.35."""
        return tuple(cls(alpha=a) for a in (0.05, 0.1, 0.18, 0.35))


def _mean(values: list[float] | None) -> float:
    return sum(values) / len(values) if values else 1e30
