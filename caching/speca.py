"""SpeCa: TaylorSeer drafts steps, the last block verifies them, and a draft that was off makes the next step computed.

Liu et al., "SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching", ACM MM 2025,
arXiv 2509.11628.

Kept, how: as TaylorSeer's modules, order `order`. When: a computed step is always followed by a draft. After `least`
drafts the last block is also run for real on what the drafted blocks hand it, and e, the mean over elements of
|draft - exact| / |exact|, is compared with max(`floor`, `threshold` * `decay`^progress), progress being the part of the
run that is done; if it is greater, the next step is computed. So it is after `most` drafts, and at steps 0 and 2. What
was computed for verification is used for nothing else, and nothing is rolled back, unlike in the paper's text: this is
what the released code does.

Published: FLUX threshold 7, decay 0.3, floor 0.1, 2 to 8 drafts; DiT-XL floor 0.01, 2 to 5 or 3 to 8 drafts. The ratio
explodes where the exact output is near 0, hence thresholds far above 1. Differences: the error is taken per sample over
the image stream, and the largest counts; the authors average over the batch and, in FLUX, over text tokens too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import Policy, Verdict, View, against
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Features

_ENHANCED = 3  # the first steps, in which a draft is always followed by a computed step
_TINY = 1e-10


class Speculation(Policy):
    """Draft until the last verification failed, or often enough.

    Args:
        threshold, decay, floor: of the largest error, at the beginning, per run, and at least.
        least, most: drafts before the first verification, and before a computed step.
    """

    def __init__(self, threshold: float, decay: float, floor: float, least: int, most: int) -> None:
        self.threshold, self.decay, self.floor, self.least, self.most = threshold, decay, floor, least, most
        self._drafts = 0
        self._error: float | None = None

    def decide(self, view: View) -> Verdict:
        """Compare the last verification's error with what this step allows."""
        if self.most == 0:
            return Verdict(True, "no drafts")
        if self._drafts == 0:
            return Verdict(False, "draft after a computed step")
        step = view.position.local_step
        allowed = max(self.floor, self.threshold * self.decay ** ((step + 1) / view.position.steps))
        if step < _ENHANCED:
            return Verdict(True, "warm-up")
        if self._drafts >= self.most:
            return Verdict(True, f"{self.most} drafts", self._error)
        verify = self._drafts >= self.least
        if verify and self._error is not None and self._error > allowed:
            return Verdict(True, against("last draft's error", allowed), self._error)
        return Verdict(False, against("last draft's error", allowed), self._error, verify=verify)

    def verified(self, draft: Features, exact: Features, view: View) -> None:
        """Measure the draft; the largest error of any sample counts."""
        guess, truth = draft[0], exact[0]
        if guess is not None and truth is not None:
            ratio = (guess.float() - truth.float()).abs() / (truth.float().abs() + _TINY)
            self._error = ratio.flatten(1).mean(1).max().item()

    def computed(self, view: View) -> None:
        """Start anew."""
        self._drafts, self._error = 0, None

    def skipped(self, view: View) -> None:
        """One draft more."""
        self._drafts += 1


@register
@dataclass(frozen=True)
class SpeCa(ForecastingMethod):
    """SpeCa's settings; the defaults are FLUX's.

    Attributes:
        threshold: largest error at the beginning of the run.
        decay: factor on it over the whole run, above 0 and at most 1.
        floor: what it does not fall below.
        least: drafts after a computed step before the first verified one.
        most: drafts after which a step is computed; 0 computes all.
        order: of the Taylor forecast, 0 to 5.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> SpeCa(threshold=1.0, most=5).label()
        'threshold=1 most=5'
    """

    threshold: float = 7.0
    decay: float = 0.3
    floor: float = 0.1
    least: int = 2
    most: int = 8
    order: int = 2

    name: ClassVar[str] = "speca"
    title: ClassVar[str] = "SpeCa"
    arxiv: ClassVar[str] = "2509.11628"
    axes: ClassVar[str] = "modules; error of the last block's draft at the step before; Taylor forecast"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@inproceedings{liu2025speca,
  title={SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching},
  author={Liu, Jiacheng and Zou, Chang and Lyu, Yuanhuiyi and Li, Kaixin and Wang, Shaobo and Zhang, Linfeng},
  booktitle={Proceedings of the 33rd ACM International Conference on Multimedia},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)
        check_number("decay", self.decay, 0, 1)
        check_number("floor", self.floor, 0)
        check_whole("least", self.least, 1)
        check_whole("most", self.most, 0)
        if self.decay == 0:
            raise DitaError("decay is 0; expected a number above 0")
        Forecast(self.order)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Modules, with the last block verified."""
        anatomy.require("module", self.name)
        last = len(anatomy.blocks) - 1
        return Recipe(
            what="module",
            when=lambda: Speculation(self.threshold, self.decay, self.floor, self.least, self.most),
            how=Forecast(self.order, amplification=self.amplification),
            keep="output",
            verify=anatomy.span(last, last),
        )

    @classmethod
    def disabled(cls) -> SpeCa:
        """Every step computed."""
        return cls(most=0)

    @classmethod
    def forced(cls) -> SpeCa:
        """Drafts whatever the error."""
        return cls(threshold=1e9, decay=1.0)

    @classmethod
    def ladder(cls) -> tuple[SpeCa, ...]:
        """Thresholds 0.3 to 7 with a floor as low as DiT's, and longer drafts."""
        short = tuple(cls(threshold=t, floor=0.01, most=5) for t in (0.1, 0.3, 1.0))
        return (*short, cls(threshold=1.0, floor=0.01), cls())
