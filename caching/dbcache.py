"""First-Block-Cache and DBCache: run the front blocks, and skip the rest while their residual hardly changes.

First-Block-Cache: Cheng, ParaAttention, 2024, https://github.com/chengzeyi/ParaAttention. DBCache: DefTruth et al.,
cache-dit, 2025, https://github.com/vipshop/cache-dit. Neither has a paper; the numbers are those of the code.

Kept: the residual over the blocks between the first `fn` and the last `bn`, image and text. When: the relative L1
change of the front blocks' residual against the last computed step is below `threshold`. How: reuse, or a forecast of
the residual. The last `bn` blocks always run, on top.

Differences: the change is taken per sample, and every sample must stay below the threshold (the originals average over
the batch, so that an image depends on its batch mates). cache-dit's threshold of 1 or more means "always skip"; here it
is compared like any other. Its step masks are the guard `forced`, which every method takes; its channel-subsampled
probe and accumulated-change cap are not built, nor are its calibrators FoCa and DMD: forecasts are TaylorSeer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import Guards, Policy, Verdict, View, against, relative_l1
from dita.caching.storage import bytes_of
from dita.config import check_number, check_whole
from dita.registry import register
from dita.seams import Features, Site

_CITATION = """@misc{%s,
  title={%s},
  author={%s},
  year={%s},
  howpublished={%s}
}"""


class ProbeGate(Policy):
    """Skip while the probe blocks' residual stays close to that of the last computed step.

    Args:
        blocks: blocks in the probe.
        threshold: largest relative L1 change, exclusive; 0 never skips.
    """

    def __init__(self, blocks: int, threshold: float) -> None:
        self.probe_blocks, self.threshold = blocks, threshold
        self._anchor: torch.Tensor | None = None

    def decide(self, view: View) -> Verdict:
        """Compare; the largest change of any sample counts."""
        if self.threshold <= 0 or view.probe is None or self._anchor is None:
            return Verdict(True, "threshold 0" if self.threshold <= 0 else "no probe yet")
        change = relative_l1(view.probe, self._anchor).max().item()
        return Verdict(not change < self.threshold, against("probe change", self.threshold), change)

    def computed(self, view: View) -> None:
        """The probe of a computed step is what later ones are compared with."""
        if view.probe is not None:
            self._anchor = view.probe.clone()

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """The probe's residual."""
        return outputs[:1] if site.first == 0 else ()

    def bytes_held(self) -> int:
        """Bytes of the kept probe."""
        return bytes_of([self._anchor])


@register
@dataclass(frozen=True)
class DBCache(ForecastingMethod):
    """DBCache's settings; the defaults are cache-dit's.

    Attributes:
        fn: blocks at the front that always run, and whose residual is the probe; at least 1.
        bn: blocks at the end that always run.
        threshold: largest relative L1 change of the probe that still skips, exclusive; 0 computes all.
        warmup: first steps that are all computed.
        max_consecutive: skips in a row, -1 for no limit.
        max_total: skips per run and guidance branch, -1 for no limit.
        order: 0 reuses the residual; 1 to 5 forecast it.
        basis: of the forecast, "taylor" or "newton".
        follow_first: under sequential guidance the first branch decides for all.

    Raises:
        DitaError: a setting out of range; on attaching, fewer than fn + bn + 1 blocks.

    Example:
        >>> DBCache(fn=1, threshold=0.12).label()
        'fn=1 threshold=0.12'
    """

    fn: int = 8
    bn: int = 0
    threshold: float = 0.08
    warmup: int = 8
    max_consecutive: int = -1
    max_total: int = -1
    order: int = 0
    basis: str = "taylor"
    follow_first: bool = False

    name: ClassVar[str] = "dbcache"
    title: ClassVar[str] = "DBCache"
    arxiv: ClassVar[str] = "none (cache-dit)"
    axes: ClassVar[str] = "residual between the first Fn and last Bn blocks; probe change since the last computed step"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = _CITATION % (
        "cachedit2025", "cache-dit: DBCache, a dual-block cache for diffusion transformers", "{DefTruth and others}",
        "2025", "https://github.com/vipshop/cache-dit",
    )  # fmt: skip

    def validate(self) -> None:
        """Check ranges."""
        check_whole("fn", self.fn, 1)
        check_whole("bn", self.bn, 0)
        check_number("threshold", self.threshold, 0)
        check_whole("warmup", self.warmup, 0)
        check_whole("max_consecutive", self.max_consecutive, -1)
        check_whole("max_total", self.max_total, -1)
        Forecast(self.order, self.basis)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """A span behind a probe."""
        return Recipe(
            what="span",
            when=lambda: ProbeGate(self.fn, self.threshold),
            how=Forecast(self.order, self.basis, amplification=self.amplification),
            guards=Guards(self.warmup, max_consecutive=self.max_consecutive, max_total=self.max_total),
            first=self.fn,
            last=-1 - self.bn,
            follow_first=self.follow_first,
        )

    @classmethod
    def disabled(cls) -> DBCache:
        """Every step computed."""
        return cls(fn=1, threshold=0.0)

    @classmethod
    def forced(cls) -> DBCache:
        """Skip two steps after each computed one, at any change."""
        return cls(fn=1, threshold=1e9, warmup=1, max_consecutive=2)

    @classmethod
    def ladder(cls) -> tuple[DBCache, ...]:
        """One front block with a Taylor forecast of order 1, and two front blocks with one at the end."""
        taylor = tuple(cls(fn=1, threshold=t, warmup=4, order=1, max_consecutive=3) for t in (0.05, 0.1, 0.2, 0.4))
        return (*taylor, *(cls(fn=2, bn=1, threshold=t, warmup=4, max_consecutive=3) for t in (0.05, 0.1, 0.2)))


@register
@dataclass(frozen=True)
class FirstBlockCache(DBCache):
    """First-Block-Cache: DBCache with one front block and no warm-up.

    The default threshold is diffusers' 0.05; ParaAttention publishes 0.08 for FLUX and 0.06 for HunyuanVideo.
    Attributes and errors are those of `DBCache`.

    Example:
        >>> FirstBlockCache(threshold=0.08).label()
        'threshold=0.08'
    """

    fn: int = 1
    threshold: float = 0.05
    warmup: int = 0

    name: ClassVar[str] = "fbcache"
    title: ClassVar[str] = "First-Block-Cache"
    arxiv: ClassVar[str] = "none (ParaAttention)"
    axes: ClassVar[str] = "residual behind the first block; probe change since the last computed step; reuse"
    citation: ClassVar[str] = _CITATION % (
        "paraattention2024", "ParaAttention: context parallel attention and first-block cache", "Cheng, Zeyi", "2024",
        "https://github.com/chengzeyi/ParaAttention",
    )  # fmt: skip

    @classmethod
    def disabled(cls) -> FirstBlockCache:
        """Every step computed."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> FirstBlockCache:
        """Skip two steps after each computed one, at any change."""
        return cls(threshold=1e9, max_consecutive=2)

    @classmethod
    def ladder(cls) -> tuple[FirstBlockCache, ...]:
        """Thresholds 0.03 to 0.4."""
        return tuple(cls(threshold=t) for t in (0.03, 0.05, 0.08, 0.12, 0.2, 0.4))
