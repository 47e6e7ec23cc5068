"""EasyCache: reuse what the transformer adds to the latents, while the latents move little.

Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching", arXiv
2507.02860.

Kept: output minus latents, of each branch. When: with k the ratio of the output's mean change to the latents' between
the two newest computed steps, every step adds k * mean|x_i - x_{i-1}| / mean|y| to an error, y being the newest
computed output; a step is skipped while the error stays below `threshold`, and a computed step sets it to 0. The
first `warmup` steps and the last are computed. Under guidance the step's first branch decides for the others. How:
latents plus what was kept.

Differences: the error is taken per sample and the largest counts; the authors average over the batch. Where the
transformer returns more channels than it takes (a learned variance), those are reused as they are; where it takes
more, only those that it returns are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Guards, Policy, Verdict, View, against
from dita.caching.storage import bytes_of
from dita.config import check_number, check_whole
from dita.registry import register
from dita.seams import Features, Site


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().abs().flatten(1).mean(1)


class LatentChange(Policy):
    """Skip while the output, as far as it follows the latents, has changed little.

    Args:
        threshold: largest accumulated relative change, exclusive; 0 never skips.
        warmup: steps before the error begins to be added up.
    """

    def __init__(self, threshold: float, warmup: int) -> None:
        self.threshold, self.warmup = threshold, warmup
        self._latents: torch.Tensor | None = None  # of the last step
        self._computed: tuple[torch.Tensor, torch.Tensor] | None = None  # latents and output of the last computed one
        self._rate: torch.Tensor | None = None
        self._error: torch.Tensor | float = 0.0

    def decide(self, view: View) -> Verdict:
        """Add this step's change."""
        if self.threshold <= 0 or view.latents is None or self._latents is None or self._computed is None:
            return Verdict(True, "threshold 0" if self.threshold <= 0 else "first step")
        if self._rate is None or view.position.local_step < self.warmup:
            return Verdict(True, "warm-up")
        step = self._rate * _mean(view.latents - self._latents) / _mean(self._computed[1]).clamp_min(1e-12)
        self._error = self._error + step
        worst = self._error.max().item()
        return Verdict(not worst < self.threshold, against("output change", self.threshold), worst)

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Measure how the output moves with the latents between computed steps."""
        latents, output = inputs[0], outputs[0]
        if latents is None or output is None:
            return
        if self._computed is not None:
            moved = _mean(latents - self._computed[0]).clamp_min(1e-12)
            self._rate = _mean(output - self._computed[1]) / moved
        self._computed = (latents.clone(), output.clone())
        self._error = 0.0

    def computed(self, view: View) -> None:
        """Remember the latents."""
        self._latents = None if view.latents is None else view.latents.clone()

    def skipped(self, view: View) -> None:
        """Remember the latents."""
        self.computed(view)

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """Latents of the last step and of the last computed one, and the latter's output."""
        return (*inputs[:1] * 2, outputs[0])

    def bytes_held(self) -> int:
        """Bytes of the latents and the output kept."""
        return bytes_of([self._latents, *(self._computed or ())])


@register
@dataclass(frozen=True)
class EasyCache(CachingMethod):
    """EasyCache's settings; the defaults are those for Wan 2.1.

    Attributes:
        threshold: largest accumulated relative change of the output that still skips, exclusive; 0 computes all.
            Published: 0.05 and 0.1 (Wan 2.1), 0.025 (HunyuanVideo).
        warmup: first steps that are all computed; 5 for HunyuanVideo.

    Raises:
        DitaError: a setting out of range; while running, a model that changes the shape of its latents.

    Example:
        >>> EasyCache(threshold=0.1).label()
        'threshold=0.1'
    """

    threshold: float = 0.05
    warmup: int = 10

    name: ClassVar[str] = "easycache"
    title: ClassVar[str] = "EasyCache"
    arxiv: ClassVar[str] = "2507.02860"
    axes: ClassVar[str] = "model output minus latents; accumulated change of the latents; reuse; first branch decides"
    seams: ClassVar[frozenset[str]] = frozenset({"model"})
    citation: ClassVar[str] = """@article{zhou2025easycache,
  title={Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching},
  author={Zhou, Xin and Liang, Dingkang and Chen, Kaijin and Feng, Tianrui and Chen, Xiwu and Lin, Hongkai and
    Ding, Yikang and Tan, Feiyang and Zhao, Hengshuang and Bai, Xiang},
  journal={arXiv preprint arXiv:2507.02860},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)
        check_whole("warmup", self.warmup, 0)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The model's output over its latents."""
        return Recipe(
            what="model",
            when=lambda: LatentChange(self.threshold, self.warmup),
            guards=Guards(tail=1),
            follow_first=True,
        )

    @classmethod
    def disabled(cls) -> EasyCache:
        """Every step computed."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> EasyCache:
        """Skips at any change."""
        return cls(threshold=1e9, warmup=2)

    @classmethod
    def ladder(cls) -> tuple[EasyCache, ...]:
        """Thresholds 0.02 to 0.2."""
        return tuple(cls(threshold=t) for t in (0.02, 0.05, 0.1, 0.2))
