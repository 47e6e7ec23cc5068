"""HiCache: TaylorSeer's ladder with scaled Hermite polynomials in place of powers.

Feng et al., "HiCache: Training-free Acceleration of Diffusion Models via Hermite Polynomial-based Feature Caching",
arXiv 2508.16984.

Kept, when: as TaylorSeer. How: sum_j D_j s^j H_j(s k) / j! over the backward differences D_j, with the physicists'
Hermite polynomials H_j. A scale s of 1 / sqrt(2) leaves order 1 as Taylor's and makes order 2 use k^2 - 1; a smaller
one damps every order, order 1 by 2 s^2.

Confidence: medium. The authors' code was not read; 0.5 is the scale of a re-implementation and 0.71 that of FreqCa's
released code, which contains the same forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import FixedInterval
from dita.config import check_number, check_whole
from dita.registry import register


@register
@dataclass(frozen=True)
class HiCache(ForecastingMethod):
    """HiCache's settings.

    Attributes:
        interval: one computed step, then interval - 1 forecast ones; 1 computes all.
        order: of the expansion, 0 to 5.
        scale: of the Hermite polynomials, above 0 and at most 1.
        warmup: first steps that are all computed.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> HiCache(interval=5, scale=0.71).label()
        'interval=5 scale=0.71'
    """

    interval: int = 6
    order: int = 2
    scale: float = 0.5
    warmup: int = 3

    name: ClassVar[str] = "hicache"
    title: ClassVar[str] = "HiCache"
    arxiv: ClassVar[str] = "2508.16984"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "modules; fixed interval; Hermite forecast"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@article{feng2025hicache,
  title={HiCache: Training-free Acceleration of Diffusion Models via Hermite Polynomial-based Feature Caching},
  author={Feng, Liang and Zheng, Shikang and Liu, Jiacheng and Lin, Yuqi and Zhou, Qinming and Cai, Peiliang and
    Wang, Xinyu and Chen, Junjie and Zou, Chang and Ma, Yue and Zhang, Linfeng},
  journal={arXiv preprint arXiv:2508.16984},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 1)
        check_number("scale", self.scale, 1e-3, 1)
        Forecast(self.order, "hermite", self.scale)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over modules."""
        return Recipe(
            what="module",
            when=lambda: FixedInterval(self.interval, self.warmup),
            how=Forecast(self.order, "hermite", self.scale, self.amplification),
            keep="output",
            oldest_anchor=self.warmup - 2,
        )

    @classmethod
    def disabled(cls) -> HiCache:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> HiCache:
        """Every other step forecast."""
        return cls(interval=2, warmup=1)

    @classmethod
    def ladder(cls) -> tuple[HiCache, ...]:
        """Intervals 3 to 7 at order 2, with a warm-up of 5 as for TaylorSeer."""
        return tuple(cls(interval=n, scale=0.71, warmup=5) for n in (3, 4, 5, 7))
