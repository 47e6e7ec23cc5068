"""MagCache: skip while the magnitudes of the trunk's residual, known from one calibration run, predict little error.

Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", NeurIPS 2025, arXiv 2506.09045.

Kept: the residual of the image stream over all blocks. When: with gamma_i the mean over tokens of the ratio of the
residual's norms at steps i and i - 1, the error of skipping since the last computed step is sum_j |1 - prod gamma|; a
step is skipped while it stays below `threshold` and at most `max_skip` steps are skipped in a row. The first
`retention` of the steps are computed. How: reuse, not rescaled by the ratio, as published.

The ratios come from one run (`dita.calibrate`) and belong to a model, scheduler, number of steps and resolution.
Another model is refused; another scheduler, resolution, guidance or step count gives a warning, and the table is then
read at the nearest step, as the authors do. FLUX's published ratios are built in.

Differences: the authors compare with "<" for Wan and Qwen-Image and with "<=" for FLUX and others; here it is "<", and
a threshold of 0 computes everything. The steps that `retention` computes are rounded down, as theirs are; diffusers
rounds to the nearest number, which of 28 steps at 0.1 makes three in place of two. The authors' hard-coded computation
of step 11 of 28 on FLUX is the setting `always`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.magnitude import MagnitudeTable, measure_magnitudes
from dita.caching.policy import Guards, Verdict, View, against
from dita.caching.table import CalibratedMethod, TablePolicy
from dita.config import check_number, check_whole
from dita.registry import register
from dita.table import Table, nearest_index, table_for


class MagnitudeGate(TablePolicy):
    """Skip while the accumulated magnitude error is small.

    Args:
        table: the calibrated ratios.
        threshold: largest accumulated error, exclusive; 0 never skips.
        max_skip: most skips in a row.
        retention: fraction of the run's steps that are computed first.
        always: indices of the table whose step is computed whatever the error.
    """

    def __init__(
        self, table: MagnitudeTable, threshold: float, max_skip: int, retention: float, always: tuple[int, ...]
    ) -> None:
        super().__init__(table)
        self.table: MagnitudeTable = table
        self.threshold, self.max_skip, self.retention = threshold, max_skip, retention
        self.always = frozenset(always)
        self._ratios: tuple[float, ...] = ()
        self._ratio, self._error, self._skips = 1.0, 0.0, 0

    def begin(self, view: View) -> None:
        """See `TablePolicy.begin`; say whose ratios a branch reads that has none."""
        super().begin(view)
        if self.table.values and not self.table.knows(view.position):
            names = list(self.table.values)
            self.warn_without(view.position, names, f"decided by those of {names[0]}")

    def decide(self, view: View) -> Verdict:
        """Add this step's error to those since the last computed step."""
        position = view.position
        if self.threshold <= 0:
            return Verdict(True, "threshold 0")
        if position.local_step < int(self.retention * position.steps):
            return Verdict(True, "retention")
        self._ratios = self._ratios or self.table.of(position)
        if self.always and nearest_index(len(self._ratios), position) in self.always:
            return Verdict(True, "always computed")
        self._ratio *= self.table.nearest(self._ratios, position)
        self._error += abs(1 - self._ratio)
        self._skips += 1
        if self._skips <= self.max_skip and self._error < self.threshold:
            return Verdict(False, against("magnitude error", self.threshold), self._error)
        reason = "max_skip" if self._skips > self.max_skip else against("magnitude error", self.threshold)
        return Verdict(True, reason, self._error)

    def computed(self, view: View) -> None:
        """Start anew."""
        self._ratio, self._error, self._skips = 1.0, 0.0, 0


@register
@dataclass(frozen=True)
class MagCache(CalibratedMethod):
    """MagCache's settings; the defaults are diffusers'.

    Attributes:
        threshold: largest accumulated error that still skips, exclusive; 0 computes all.
        max_skip: most skips in a row. Published with thresholds: 0.12 and 2 or 0.24 and 6 (Wan 2.1), 0.24 and 5 (FLUX),
            0.24 and 6 or 0.12 and 4 (HunyuanVideo), 0.05 and 4 (Kontext).
        retention: fraction of the run's steps computed first; 0.1 for FLUX.
        always: table indices that are always computed; (11,) for FLUX.
        table: the ratios, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no table, or one of another model.

    Example:
        >>> MagCache(threshold=0.12, max_skip=4).label()
        'threshold=0.12 max_skip=4'
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    always: tuple[int, ...] = ()
    table: MagnitudeTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "magcache"
    title: ClassVar[str] = "MagCache"
    arxiv: ClassVar[str] = "2506.09045"
    axes: ClassVar[str] = "image residual of the trunk; accumulated magnitude error from a table; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    table_kind: ClassVar[type[Table] | None] = MagnitudeTable
    schema: ClassVar[int] = 2
    shaping: ClassVar[tuple[str, ...]] = ()
    citation: ClassVar[str] = """@inproceedings{ma2025magcache,
  title={MagCache: Fast Video Generation with Magnitude-Aware Cache},
  author={Ma, Zehong and Wei, Longhui and Wang, Feng and Zhang, Shiliang and Tian, Qi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)
        check_whole("max_skip", self.max_skip, 0)
        check_number("retention", self.retention, 0, 1)
        for index in self.always:
            check_whole("an index in always", index, 0)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's image residual, gated by the table."""
        table = MagnitudeTable({})
        if self.threshold > 0:
            table = table_for(self.name, self.table or MagnitudeTable.published(anatomy.family), anatomy)
        return Recipe(
            what="trunk",
            when=lambda: MagnitudeGate(table, self.threshold, self.max_skip, self.retention, self.always),
            guards=Guards(warmup=1),
            text=False,
        )

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> MagCache:
        """Measure the ratios in one full run; the pipeline comes back as it was."""
        return replace(self, table=measure_magnitudes(pipe, call))

    @classmethod
    def disabled(cls) -> MagCache:
        """Every step computed; needs no table."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> MagCache:
        """Skip two steps after each computed one, at any error."""
        return cls(threshold=1e9, max_skip=2, retention=0.0)

    @classmethod
    def ladder(cls) -> tuple[MagCache, ...]:
        """From 0.02 with 2 skips to 0.24 with 6, at last with a tenth of the steps retained."""
        pairs = ((0.02, 2), (0.04, 2), (0.06, 3), (0.12, 4), (0.24, 6))
        return (*(cls(threshold=t, max_skip=k) for t, k in pairs), cls(threshold=0.24, max_skip=6, retention=0.12))
