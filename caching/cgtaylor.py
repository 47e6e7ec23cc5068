"""CG-Taylor: run the first block, and skip the rest while a Taylor forecast of that block's output proves right.

Guan et al., "Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor", arXiv
2508.02240.

Kept: the outputs (hidden states, not residuals) of the first block, the probe, and of the last block, the target.
When: every step runs the probe; with e the relative L1 error of its Taylor forecast, a step whose e stays below
`threshold` is skipped; the first `warmup` steps and the last one are computed. How: a Taylor forecast of the target.
Both ladders move on computed steps only, and a computed step goes on from the probe's output.

Published thresholds: FLUX 0.13 and 0.03 with orders (1, 1); Wan 2.1 0.36 with (3, 1); DiT-XL 0.008 with (3, 1).
Confidence: high for DiT, medium for FLUX and Wan, whose code could not be read. Difference: the error is taken per
sample and the largest counts; the authors average over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.history import History
from dita.caching.policy import Guards, Policy, Verdict, View, against, relative_l1
from dita.config import check_number, check_whole
from dita.registry import register
from dita.seams import Features, Site


class ForecastGate(Policy):
    """Skip while the forecast of the first block's output is close to what it really puts out.

    Args:
        threshold: largest relative L1 error, exclusive; 0 never skips.
        how: the forecast of the probe.
    """

    probe_blocks = 1

    def __init__(self, threshold: float, how: Forecast) -> None:
        self.threshold, self.how = threshold, how
        self._history = History(how.anchors)
        self._now: torch.Tensor | None = None

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Take the probe's output."""
        if site.first == 0:
            self._now = outputs[0]

    def decide(self, view: View) -> Verdict:
        """Compare the probe with its forecast; the largest error of any sample counts."""
        if self.threshold <= 0 or self._now is None:
            return Verdict(True, "threshold 0")
        weights = self.how.weights(view.position.step, self._history.steps)
        expected = self._history.combine(weights)[0]
        if expected is None:
            return Verdict(True, "no probe yet")
        error = relative_l1(expected, self._now).max().item()
        return Verdict(not error < self.threshold, against("forecast error", self.threshold), error)

    def computed(self, view: View) -> None:
        """The probe of a computed step is an anchor."""
        self._history.push(view.position.step, (self._now,))
        self._now = None

    def skipped(self, view: View) -> None:
        """Forget the probe."""
        self._now = None

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """The probe's anchors."""
        return outputs[:1] * self.how.anchors if site.first == 0 else ()

    def bytes_held(self) -> int:
        """Bytes of the probe's anchors."""
        return self._history.bytes_held()


@register
@dataclass(frozen=True)
class CGTaylor(ForecastingMethod):
    """CG-Taylor's settings; the defaults are FLUX's.

    Attributes:
        threshold: largest relative L1 error of the probe's forecast that still skips, exclusive; 0 computes all.
        probe_order: order of the probe's Taylor forecast, 0 to 5.
        order: order of the target's.
        warmup: first steps that are all computed.

    Raises:
        DitaError: a setting out of range; on attaching, a model of fewer than two blocks.

    Example:
        >>> CGTaylor(threshold=0.03).label()
        'threshold=0.03'
    """

    threshold: float = 0.13
    probe_order: int = 1
    order: int = 1
    warmup: int = 3

    name: ClassVar[str] = "cg-taylor"
    title: ClassVar[str] = "CG-Taylor"
    arxiv: ClassVar[str] = "2508.02240"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "last block's output; forecast error of the first block; Taylor forecast"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@article{guan2025forecasting,
  title={Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor},
  author={Guan, Xiaoliu and Jiang, Lielin and Chen, Hanqi and Zhang, Xu and Yan, Jiaxing and Wang, Guanzhong and
    Liu, Yi and Zhang, Zetao and Wu, Yu},
  journal={arXiv preprint arXiv:2508.02240},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)
        check_whole("warmup", self.warmup, 1)
        Forecast(self.probe_order)
        Forecast(self.order)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's output behind the first block."""
        return Recipe(
            what="trunk",
            when=lambda: ForecastGate(self.threshold, Forecast(self.probe_order, amplification=self.amplification)),
            how=Forecast(self.order, amplification=self.amplification),
            keep="output",
            guards=Guards(self.warmup, tail=1),
        )

    @classmethod
    def disabled(cls) -> CGTaylor:
        """Every step computed."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> CGTaylor:
        """Skips at any error."""
        return cls(threshold=1e9, warmup=2)

    @classmethod
    def ladder(cls) -> tuple[CGTaylor, ...]:
        """Thresholds 0.01 to 0.13."""
        return tuple(cls(threshold=t) for t in (0.01, 0.02, 0.04, 0.08, 0.13))
