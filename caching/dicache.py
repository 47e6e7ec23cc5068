"""DiCache: a shallow probe decides when to reuse the trunk, and how far to extrapolate it.

Bu et al., "DiCache: Let Diffusion Model Determine Its Own Cache", ICLR 2026, arXiv 2508.17356.

Kept: the residual of the image stream over all blocks at the two newest computed steps, and the probe's residual
there. When: every step runs the first `depth` blocks; the relative L1 change of their output against the step before
(skipped or not) is added up, and a step is skipped while the sum stays below `threshold`; a computed step sets it to
0 and goes on from the probe's output. The first `retention` of the steps are computed. How: R_2 + g (R_1 - R_2),
newest R_1, with g = mean|p - P_2| / mean|P_1 - P_2| from the probe's residuals, at least 1 and at most `most`.

Published: FLUX threshold 0.4 with retention 0.2 and most 1.5; HunyuanVideo 0.1; Wan 0.08 with most 2. Differences:
the change is taken per sample and the largest counts (the authors average over the batch). g is one number for the
batch, from means over all of it, as the authors have it: an image in a batch is extrapolated as far as the batch's
probes went (`per_sample=True` runs each alone). `minus_input` subtracts the change of the trunk's input, the authors'
other indicator. Their FLUX code never empties its window; here a run starts afresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.policy import Policy, Verdict, View, against, relative_l1
from dita.caching.storage import bytes_of
from dita.config import check_number, check_whole
from dita.registry import register
from dita.seams import Features, Site


class OnlineProbe(Policy):
    """Skip while the probe's accumulated change is small, and weigh the two anchors by where the probe stands.

    Args:
        depth: blocks in the probe.
        threshold: largest accumulated relative L1 change, exclusive; 0 never skips.
        retention: fraction of the run's steps computed first.
        most: largest extrapolation g.
        minus_input: the indicator is the difference between the probe's change and its input's.
    """

    def __init__(self, depth: int, threshold: float, retention: float, most: float, minus_input: bool) -> None:
        self.probe_blocks, self.threshold, self.retention = depth, threshold, retention
        self.most, self.minus_input = most, minus_input
        self._now: tuple[torch.Tensor, torch.Tensor] | None = None  # the probe's input and output
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._anchors: list[torch.Tensor] = []  # the probe's residuals at computed steps, newest first
        self._error: torch.Tensor | float = 0.0

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Take the probe's input and output."""
        if site.first == 0 and inputs[0] is not None and outputs[0] is not None:
            self._now = (inputs[0].clone(), outputs[0].clone())

    def decide(self, view: View) -> Verdict:
        """Add the probe's change since the step before."""
        if self.threshold <= 0 or self._now is None or self._last is None:
            return Verdict(True, "threshold 0" if self.threshold <= 0 else "first step")
        if view.position.local_step < int(self.retention * view.position.steps):
            return Verdict(True, "retention")
        change = relative_l1(self._now[1], self._last[1])
        if self.minus_input:
            change = (change - relative_l1(self._now[0], self._last[0])).abs()
        self._error = self._error + change
        worst = self._error.max().item()
        skip = worst < self.threshold
        return Verdict(
            not skip, against("probe change", self.threshold), worst, weights=self._weights() if skip else None
        )

    def _weights(self) -> tuple[float, ...]:
        if len(self._anchors) < 2 or self._now is None:
            return (1.0,)
        probe, (new, old) = self._now[1] - self._now[0], self._anchors
        reach = ((probe - old).abs().mean() / (new - old).abs().mean().clamp_min(1e-12)).item()
        g = min(max(reach, 1.0), self.most)
        return (g, 1 - g)

    def computed(self, view: View) -> None:
        """The probe's residual is an anchor."""
        if self._now is not None:
            self._anchors = [self._now[1] - self._now[0], *self._anchors][:2]
        self._error = 0.0
        self.skipped(view)

    def skipped(self, view: View) -> None:
        """The next step is compared with this one."""
        self._last, self._now = self._now, None

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """The probe's last input and output, and two of its residuals."""
        return (inputs[0], *outputs[:1] * 3) if site.first == 0 else ()

    def bytes_held(self) -> int:
        """Bytes of the probe's tensors."""
        return bytes_of([*(self._last or ()), *self._anchors])


@register
@dataclass(frozen=True)
class DiCache(CachingMethod):
    """DiCache's settings; the defaults are FLUX's.

    Attributes:
        threshold: largest accumulated change of the probe that still skips, exclusive; 0 computes all.
        depth: blocks in the probe, 1 to 5 as published.
        retention: fraction of the run's steps computed first.
        most: largest extrapolation between the two anchors, at least 1; 1 reuses the newest.
        minus_input: subtract the change of the trunk's input; then published with threshold 0.08 and retention 0.

    Raises:
        DitaError: a setting out of range; on attaching, a model with no more than `depth` blocks.

    Example:
        >>> DiCache(threshold=0.1).label()
        'threshold=0.1'
    """

    threshold: float = 0.4
    depth: int = 1
    retention: float = 0.2
    most: float = 1.5
    minus_input: bool = False

    name: ClassVar[str] = "dicache"
    title: ClassVar[str] = "DiCache"
    arxiv: ClassVar[str] = "2508.17356"
    axes: ClassVar[str] = "image residual of the trunk; accumulated probe change; extrapolated as far as the probe went"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@inproceedings{bu2026dicache,
  title={DiCache: Let Diffusion Model Determine Its Own Cache},
  author={Bu, Jiazi and Ling, Pengyang and Zhou, Yujie and Wang, Yibin and Zang, Yuhang and Wu, Tong and
    Lin, Dahua and Wang, Jiaqi},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)
        check_whole("depth", self.depth, 1)
        check_number("retention", self.retention, 0, 1)
        check_number("most", self.most, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's image residual behind a probe."""
        return Recipe(
            what="trunk",
            when=lambda: OnlineProbe(self.depth, self.threshold, self.retention, self.most, self.minus_input),
            how=Forecast(1),
            text=False,
            from_probe=True,
        )

    @classmethod
    def disabled(cls) -> DiCache:
        """Every step computed."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> DiCache:
        """Skips at any change."""
        return cls(threshold=1e9)

    @classmethod
    def ladder(cls) -> tuple[DiCache, ...]:
        """Thresholds 0.05 to 0.4."""
        return tuple(cls(threshold=t) for t in (0.05, 0.1, 0.2, 0.4))
