"""LightCache: reuse at a fixed interval, with what is kept waiting in host memory.

Xiao et al., "LightCache: Memory-Efficient, Training-Free Acceleration for Video Generation", arXiv 2510.05367.

Kept: the output of all blocks, on the host (`keep_on`). When: steps whose number is a multiple of `interval` are
computed. How: reuse.

Differences: the authors cache the deep blocks of a U-Net and a transformer only as an aside, there by timestep values
modulo the interval, which makes the schedule arbitrary; here it goes by steps. Their code leaves the swap to
accelerate's offloading of the model; this moves the features alone, on a stream of their own. Decoding in slices is
`sliced_decoding`, which switches on what the pipeline's autoencoder has for that. Confidence: medium.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Periodic
from dita.config import check_whole
from dita.errors import DitaError
from dita.registry import register


@contextmanager
def sliced_decoding(pipe: Any, tiles: bool = False) -> Iterator[None]:
    """Let a pipeline's autoencoder take one sample at a time within a `with` block; afterwards it is as it was.

    Args:
        pipe: a diffusers pipeline, accelerated or not, whose autoencoder is its `vae`.
        tiles: let it take large samples in overlapping tiles too, which changes them a little.

    Raises:
        DitaError: the pipeline has no autoencoder that can do so.

    Example:
        >>> from types import SimpleNamespace
        >>> from diffusers import AutoencoderKL
        >>> pipe = SimpleNamespace(vae=AutoencoderKL())
        >>> with sliced_decoding(pipe):
        ...     pipe.vae.use_slicing
        True
        >>> pipe.vae.use_slicing
        False
    """
    vae = getattr(pipe, "vae", None)
    wanted = ("enable_slicing", "enable_tiling") if tiles else ("enable_slicing",)
    lacking = [name for name in wanted if not callable(getattr(vae, name, None))]
    if lacking:
        what = "no component named vae" if vae is None else f"a {type(vae).__name__} without {', '.join(lacking)}"
        raise DitaError(f"decoding in slices needs an autoencoder that offers it; {type(pipe).__name__} has {what}")
    before = dict(vars(vae))
    try:
        for name in wanted:
            getattr(vae, name)()
        yield
    finally:
        for name in [name for name in vars(vae) if name not in before]:
            del vars(vae)[name]
        vars(vae).update((name, value) for name, value in before.items() if vars(vae)[name] is not value)


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
