"""TaylorSeer: forecast attention and MLP outputs by a Taylor expansion over steps.

Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", ICCV 2025, arXiv 2503.06923.

Kept: outputs of every attention and MLP before the adaLN gate ("module"), or only the output of the last block
("last-block", the authors' lite form), or the transformer's output ("model", diffusers' lite form, which forecasts the
last projection and with it the final norm's modulation). When: the first `warmup` steps, then every `interval`-th. How:
backward differences over steps, each divided by the newest gap, in a Taylor sum of order `order`.

Differences from the authors' code: anchors are kept raw and turned into one weighted sum, which is the same number;
the "newton" basis (exact polynomial extrapolation) is ours. Defaults are those of the released FLUX code; it uses
interval 4, order 2, warm-up 1 for HiDream, and interval 5, order 1, warm-up 1 for HunyuanVideo and Wan 2.1. There is no
granularity of single blocks: a skipped block's forecast does not depend on its input, so that it would forecast what
"last-block" does and keep as many tensors as there are blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import FixedInterval
from dita.config import check_whole
from dita.errors import DitaError
from dita.registry import register

_KEPT = {"module": "module", "last-block": "trunk", "model": "model"}


@register
@dataclass(frozen=True)
class TaylorSeer(ForecastingMethod):
    """TaylorSeer's settings.

    Attributes:
        interval: one computed step, then interval - 1 forecast ones; 1 computes all.
        order: of the expansion, 0 (reuse) to 5; order + 1 anchors are kept per site.
        warmup: first steps that are all computed.
        granularity: "module", "last-block" or "model".
        basis: "taylor" (published) or "newton".

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> TaylorSeer(interval=4, order=2).label()
        'interval=4 order=2'
    """

    interval: int = 6
    order: int = 1
    warmup: int = 3
    granularity: str = "module"
    basis: str = "taylor"

    name: ClassVar[str] = "taylorseer"
    title: ClassVar[str] = "TaylorSeer"
    arxiv: ClassVar[str] = "2503.06923"
    axes: ClassVar[str] = "modules, last block or model output; fixed interval; Taylor forecast"
    seams: ClassVar[frozenset[str]] = frozenset({"module", "block", "model"})
    citation: ClassVar[str] = """@inproceedings{liu2025taylorseer,
  title={From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers},
  author={Liu, Jiacheng and Zou, Chang and Lyu, Yuanhuiyi and Chen, Junjie and Zhang, Linfeng},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 1)
        if self.granularity not in _KEPT:
            raise DitaError(f"granularity is {self.granularity!r}; expected one of {', '.join(_KEPT)}")
        Forecast(self.order, self.basis)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over modules, the trunk's output or the model's."""
        return Recipe(
            what=_KEPT[self.granularity],
            when=lambda: FixedInterval(self.interval, self.warmup),
            how=Forecast(self.order, self.basis, amplification=self.amplification),
            keep="output",
            # The authors start the differences at the last warm-up step but one.
            oldest_anchor=self.warmup - 2,
        )

    def coarser(self) -> TaylorSeer | None:
        """Modules of order 1, then the last block, then the model's output, then lower orders of that."""
        if self.granularity == "module":
            return self.replace(order=self.order - 1) if self.order > 1 else self.replace(granularity="last-block")
        if self.granularity == "last-block":
            return self.replace(granularity="model")
        return super().coarser()

    @classmethod
    def disabled(cls) -> TaylorSeer:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> TaylorSeer:
        """Every other step forecast."""
        return cls(interval=2, warmup=1)

    @classmethod
    def ladder(cls) -> tuple[TaylorSeer, ...]:
        """Modules at orders 1 and 2 and both lite forms at order 2, all with a warm-up of 5.

        The default warm-up of 3 leaves the two newest anchors one step apart where features change fastest, so that the
        first forecasts overshoot: on fashion-dit at interval 5 a warm-up of 5 was 9 dB better for two more steps.
        """
        modules = [cls(interval=n, order=1, warmup=5) for n in (2, 3, 4, 5, 6, 8)]
        modules += [cls(interval=n, order=2, warmup=5) for n in (3, 4, 5, 6)]
        lite = [
            cls(interval=n, order=2, warmup=5, granularity=g) for g in ("last-block", "model") for n in (3, 4, 5, 7)
        ]
        return (*modules, *lite)
