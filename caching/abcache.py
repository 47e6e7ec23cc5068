"""AB-Cache: extrapolate the model's output from its last computed values, one equal step ahead.

Yu et al., "AB-Cache: Training-Free Acceleration of Diffusion Models via Adams-Bashforth Cached Feature Reuse", ACM MM
2025, arXiv 2504.10540.

Kept: the transformer's output. When: the first `warmup` steps, then every step whose number is a multiple of
`interval` (0..4, 6, 12, ..., 48 of 50 as published). How: sum_j (-1)^j C(points, j + 1) F_j over the newest `points`
outputs, the polynomial of degree points - 1 one equal step ahead; as in the authors' code it grows neither with the
distance nor with the gaps between anchors, so that all skips after one computed step reuse the same value.

The authors extrapolate after guidance is applied. The weights being the same for both branches, extrapolating each
branch gives the same combination. `push_forecasts` lets forecasts enter the queue; the description is ambiguous on
it, and a reading of the authors' code says no.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast, SelfFeeding
from dita.caching.policy import Periodic
from dita.config import check_whole
from dita.registry import register


@register
@dataclass(frozen=True)
class ABCache(ForecastingMethod):
    """AB-Cache's settings; the defaults are those published for FLUX.

    Attributes:
        interval: steps whose number is a multiple of it are computed; 1 computes all.
        warmup: first steps that are all computed; at least `points`, so that the queue is full.
        points: outputs extrapolated from, 1 (reuse) to 5; 2 is the headline setting. The sum of |weights| is
            2^points - 1, by which noise in the outputs is multiplied, and more with every forecast that is pushed.
        push_forecasts: forecasts enter the queue too.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> ABCache(interval=4).label()
        'interval=4'
    """

    interval: int = 6
    warmup: int = 5
    points: int = 2
    push_forecasts: bool = False

    name: ClassVar[str] = "ab-cache"
    title: ClassVar[str] = "AB-Cache"
    arxiv: ClassVar[str] = "2504.10540"
    axes: ClassVar[str] = "model output; fixed interval; polynomial one equal step ahead"
    seams: ClassVar[frozenset[str]] = frozenset({"model"})
    citation: ClassVar[str] = """@inproceedings{yu2025abcache,
  title={AB-Cache: Training-Free Acceleration of Diffusion Models via Adams-Bashforth Cached Feature Reuse},
  author={Yu, Zichao and Zou, Zhen and Shao, Guojiang and Zhang, Chengwei and Xu, Shengze and Huang, Jie and
    Zhao, Feng and Cun, Xiaodong and Zhang, Wenyi},
  booktitle={Proceedings of the 33rd ACM International Conference on Multimedia},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("points", self.points, 1, 5)
        check_whole("warmup", self.warmup, self.points)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over the model's output."""
        kind = SelfFeeding if self.push_forecasts else Forecast
        return Recipe(
            what="model",
            when=lambda: Periodic(self.interval, self.warmup),
            how=kind(self.points - 1, "binomial", amplification=self.amplification),
            keep="output",
        )

    def coarser(self) -> ABCache | None:
        """One point less."""
        return self.replace(points=self.points - 1) if self.points > 1 else None

    @classmethod
    def disabled(cls) -> ABCache:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> ABCache:
        """Every other step forecast."""
        return cls(interval=2, warmup=2)

    @classmethod
    def ladder(cls) -> tuple[ABCache, ...]:
        """Intervals 2 to 6 with two points, and reuse."""
        return (*(cls(interval=n) for n in (2, 3, 4, 6)), *(cls(interval=n, points=1) for n in (2, 3)))
