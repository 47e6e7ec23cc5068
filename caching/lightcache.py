"""LightCache: reuse at a fixed interval, with what is kept waiting in host memory.

Xiao et al., "LightCache: Memory-Efficient, Training-Free Acceleration for Video Generation", arXiv 2510.05367.

Kept: the output of all blocks, on the host (`keep_on`). When: steps whose number is a multiple of `interval` are
computed. How: reuse.

Differences: the authors cache the deep blocks of a U-Net and a transformer only as an aside, there by timestep values
modulo the interval, which makes the schedule arbitrary; here it goes by steps. Their code leaves the swap to
accelerate's offloading of the model; this moves the features alone, on a stream of their own. Decoding in slices and
chunks is what `pipe.vae.enable_slicing()` and `enable_tiling()` of diffusers do. Confidence: medium.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Periodic
from dita.config import check_whole
from dita.registry import register


@register
@dataclass(frozen=True)
class LightCache(CachingMethod):
    """LightCache's settings.

    Attributes:
        interval: steps whose number is a multiple of it are computed; 1 computes all.
        keep_on: "host" or "device".

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> LightCache(interval=3).label()
        'interval=3'
    """

    interval: int = 2
    keep_on: str = field(default="host", kw_only=True)

    name: ClassVar[str] = "lightcache"
    title: ClassVar[str] = "LightCache"
    arxiv: ClassVar[str] = "2510.05367"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "output of all blocks, on the host; fixed interval; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@article{xiao2025lightcache,
  title={LightCache: Memory-Efficient, Training-Free Acceleration for Video Generation},
  author={Xiao, Yang and Li, Gen and Deng, Kaiyuan and Wu, Yushu and Zhan, Zheng and Wang, Yanzhi and Ma, Xiaolong and
    Hui, Bo},
  journal={arXiv preprint arXiv:2510.05367},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over the trunk's output."""
        return Recipe(what="trunk", when=lambda: Periodic(self.interval), keep="output")

    @classmethod
    def disabled(cls) -> LightCache:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> LightCache:
        """Every other step reused."""
        return cls(interval=2)

    @classmethod
    def ladder(cls) -> tuple[LightCache, ...]:
        """Intervals 2 to 4."""
        return tuple(cls(interval=n) for n in (2, 3, 4))
