"""FasterCache: reuse attention outputs with the drift between the two newest ones added.

Lv et al., "FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality", ICLR 2025, arXiv
2410.19355.

Kept: the outputs of self-attention (and joint attention) modules at the two newest computed steps. When: below
timestep `high`, all but every `interval`-th step. How: F_1 + w (F_1 - F_2), newest F_1, with w constant or rising
linearly. Only computed outputs are kept, as in the authors' code; diffusers' port keeps extrapolated ones too, so that
they compound.

The authors count calls: reuse begins with call 16 and w = 0.5 (Latte), 18 and 0.3 (CogVideoX), 8 and
w = 0.9 (c - 7) / 20 at call c (Open-Sora), 45 and 0.3 (Open-Sora-Plan); one of two steps is skipped, two of three by
CogVideoX and Open-Sora-Plan. `FasterCache.published` gives these, with the count as a warm-up guard and no limit on the
timestep. The defaults are diffusers', which has timestep 681 in place of the count: 50 even steps from 1000 on reach
680 with step 16, so that it is Latte's count, and holds for other numbers of steps. Of two steps the one with an even
number is computed; which one the authors compute could not be checked.

This is the dynamic feature reuse of the paper. Its CFG-Cache, which leaves out the unconditional branch, acts on the
sampling loop and is a method of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import Policy, Verdict, View
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register

_PUBLISHED: dict[str, dict[str, Any]] = {
    "latte": {"interval": 2, "weight": 0.5, "guards": {"warmup": 16}},
    "cogvideox": {"interval": 3, "weight": 0.3, "guards": {"warmup": 18}},
    "open-sora": {"interval": 2, "weight": 0.9, "rise": 20, "rise_from": 7, "guards": {"warmup": 8}},
    "open-sora-plan": {"interval": 3, "weight": 0.3, "guards": {"warmup": 45}},
}


@dataclass(frozen=True)
class Drift(Forecast):
    """The newest anchor, and `weight` times its difference to the one before, whatever the distance.

    Attributes:
        weight: of the difference; with `rise`, `rise` steps after step `rise_from`.
        rise, rise_from: the weight grows linearly from 0 at step `rise_from`, to 1 at most; a `rise` of 0 keeps it.
    """

    weight: float = 0.5
    rise: int = 0
    rise_from: int = 0

    def weights(self, step: int, anchors: object) -> list[float]:
        """See `Forecast.weights`.

        Example:
            >>> Drift(order=1).weights(3, [2, 0])
            [1.5, -0.5]
            >>> [round(w, 3) for w in Drift(order=1, weight=0.9, rise=20, rise_from=7).weights(17, [16, 14])]
            [1.45, -0.45]
        """
        weight = self.weight
        if self.rise:
            weight = min(1.0, max(0.0, weight * (step - self.rise_from) / self.rise))
        count = len(anchors)  # pyright: ignore[reportArgumentType]
        return [1.0] if count < 2 else [1 + weight, -weight]


class BelowTimestep(Policy):
    """Skip all but every `interval`-th step below a timestep."""

    def __init__(self, interval: int, high: float) -> None:
        self.interval, self.high = interval, high

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        position = view.position
        if not position.timestep < self.high:
            return Verdict(True, f"timestep not below {self.high:g}", position.timestep)
        return Verdict(position.local_step % self.interval == 0, f"interval {self.interval}", position.timestep)


@register
@dataclass(frozen=True)
class FasterCache(CachingMethod):
    """FasterCache's settings for attention; the defaults are diffusers'.

    Attributes:
        interval: below the timestep, steps whose number is a multiple of it are computed; 1 computes all.
        weight: of the drift, from 0 (reuse) to 1.
        high: timestep, of 1000, below which outputs are reused.
        rise, rise_from: steps over which the weight grows to `weight` and on, to 1 at most, from 0 at step `rise_from`;
            a `rise` of 0 keeps it constant.

    Raises:
        DitaError: a setting out of range; on attaching, a model without recognised attention modules.

    Example:
        >>> FasterCache(interval=3, weight=0.3).label()
        'interval=3 weight=0.3'
    """

    interval: int = 2
    weight: float = 0.5
    high: float = 681.0
    rise: int = 0
    rise_from: int = 0

    name: ClassVar[str] = "fastercache"
    title: ClassVar[str] = "FasterCache (attention)"
    arxiv: ClassVar[str] = "2410.19355"
    axes: ClassVar[str] = "self-attention modules; fixed interval below a timestep; newest plus drift"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@inproceedings{lv2025fastercache,
  title={FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality},
  author={Lv, Zhengyao and Si, Chenyang and Song, Junhao and Yang, Zhenyu and Qiao, Yu and Liu, Ziwei and
    Wong, Kwan-Yee K},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("weight", self.weight, 0, 1)
        check_number("high", self.high, 0, 1001)
        check_whole("rise", self.rise, 0)
        check_whole("rise_from", self.rise_from, 0)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Self-attention modules."""
        anatomy.require("module", self.name)
        sites = tuple(part.site for part in anatomy.attentions(cross=False))
        if not sites:
            raise DitaError(f"fastercache found no self-attention module inside the blocks of {anatomy.name}")
        return Recipe(
            what="module",
            when=lambda: BelowTimestep(self.interval, self.high),
            how=Drift(1, weight=self.weight, rise=self.rise, rise_from=self.rise_from),
            keep="output",
            sites=sites,
        )

    @classmethod
    def published(cls, model: str) -> FasterCache:
        """The authors' settings for a model: "latte", "cogvideox", "open-sora" or "open-sora-plan".

        Raises:
            DitaError: none of them.

        Example:
            >>> FasterCache.published("open-sora").rise
            20
        """
        if model not in _PUBLISHED:
            raise DitaError(f"nothing is published for {model!r}; known are {', '.join(_PUBLISHED)}")
        return cls(high=1001, **_PUBLISHED[model])

    @classmethod
    def disabled(cls) -> FasterCache:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> FasterCache:
        """Every other step at any timestep."""
        return cls(high=1001)

    @classmethod
    def ladder(cls) -> tuple[FasterCache, ...]:
        """One of two steps, two of three, and both from a higher timestep on."""
        return (cls(), cls(interval=3, weight=0.3), cls(high=900), cls(interval=3, weight=0.3, high=900))
