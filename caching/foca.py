"""FoCa: forecast features by a BDF2 step, then calibrate the forecast by a Heun step.

Zheng et al., "Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers", AAAI 2026, arXiv
2508.16211.

Kept: outputs of every attention and MLP before the adaLN gate; per site the two newest values, computed or forecast,
and the two newest computed ones. When: the first `warmup` steps, then every `interval`-th. How, with F_k the newest
value, F_{k-1} the one before, and F' the slope between the two newest computed values over their gap: predict P = 4/3
F_k - 1/3 F_{k-1} + 2/3 F'_k, correct F = F_k + (F' + (P - F_k)) / 2, and let F enter the window. F'_k is F' at a
computed value and F_k - F_{k-1} at a forecast one.

Confidence: medium. The authors' code was not available; this follows the paper's equations. cache-dit's calibrator of
that name differs: it does not divide the slope of computed values by their gap, so that it is as many times too steep
as the gap is long, and it fades into reuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import SelfFeeding
from dita.caching.history import Entry
from dita.caching.policy import FixedInterval
from dita.config import check_whole
from dita.registry import register


@dataclass(frozen=True)
class PredictCorrect(SelfFeeding):
    """FoCa's forecast: BDF2, then Heun, over a window that forecasts enter; what amplifies too much is reuse."""

    @property
    def anchors(self) -> int:
        """Two newest values and two computed ones."""
        return 4

    def retain(self, entries: list[Entry]) -> list[Entry]:
        """Keep the two newest entries and the two newest computed ones."""
        computed = [entry for entry in entries if entry.real][:2]
        return [entry for i, entry in enumerate(entries) if i < 2 or any(entry is kept for kept in computed)]

    def entry_weights(self, steps: list[int], real: list[bool]) -> list[float]:
        """Weights of the entries, newest first, for one step after the newest.

        Args:
            steps: of the entries.
            real: whether they were computed.

        Example:
            >>> PredictCorrect().entry_weights([1, 0], [True, True])
            [2.0, -1.0]
        """
        return list(_entry_weights(tuple(steps), tuple(real)))

    def rules(self, step: int, entries: Sequence[Entry]) -> Iterable[list[float]]:
        """See `SelfFeeding.rules`."""
        yield self.entry_weights([entry.step for entry in entries], [entry.real for entry in entries])


@lru_cache
def _entry_weights(steps: tuple[int, ...], real: tuple[bool, ...]) -> list[float]:
    # The modules of a call ask for the same weights, one after the other.
    count = len(steps)
    computed = [i for i in range(count) if real[i]]
    unit = [[1.0 if i == j else 0.0 for j in range(count)] for i in range(count)]
    if count < 2 or len(computed) < 2:
        return unit[0]
    new, old = computed[:2]
    gap = steps[new] - steps[old]
    slope = [(a - b) / gap for a, b in zip(unit[new], unit[old], strict=True)]
    spacing = steps[0] - steps[1]
    newest = slope if real[0] else [(a - b) / spacing for a, b in zip(unit[0], unit[1], strict=True)]
    # BDF2 on equal steps of 1; where the entry before is further away (a run's first steps), its slope stands in.
    change = [(a - b) / spacing for a, b in zip(unit[0], unit[1], strict=True)]
    predicted = [a + c / 3 + 2 / 3 * s for a, c, s in zip(unit[0], change, newest, strict=True)]
    return [a + (s + p - a) / 2 for a, s, p in zip(unit[0], slope, predicted, strict=True)]


@register
@dataclass(frozen=True)
class FoCa(ForecastingMethod):
    """FoCa's settings.

    Attributes:
        interval: one computed step, then interval - 1 forecast ones; 1 computes all. Published: 3 to 7.
        warmup: first steps that are all computed.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> FoCa(interval=4).label()
        'interval=4'
    """

    interval: int = 5
    warmup: int = 3

    name: ClassVar[str] = "foca"
    title: ClassVar[str] = "FoCa"
    arxiv: ClassVar[str] = "2508.16211"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "modules; fixed interval; BDF2 forecast with a Heun correction"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@inproceedings{zheng2026foca,
  title={Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers},
  author={Zheng, Shikang and Feng, Liang and Wang, Xinyu and Zhou, Qinming and Cai, Peiliang and Zou, Chang and
    Liu, Jiacheng and Lin, Yuqi and Chen, Junjie and Ma, Yue and Zhang, Linfeng},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over modules."""
        return Recipe(
            what="module",
            when=lambda: FixedInterval(self.interval, self.warmup),
            how=PredictCorrect(order=1, amplification=self.amplification),
            keep="output",
        )

    @classmethod
    def disabled(cls) -> FoCa:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> FoCa:
        """Two of three steps forecast."""
        return cls(interval=3, warmup=2)

    @classmethod
    def ladder(cls) -> tuple[FoCa, ...]:
        """Intervals 3 to 7, with a warm-up of 5 as for TaylorSeer."""
        return tuple(cls(interval=n, warmup=5) for n in (3, 4, 5, 7))
