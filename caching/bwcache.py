"""BWCache: once the outputs of all blocks have settled, freeze them for a few steps.

Cui et al., "BWCache: Accelerating Video Diffusion Transformers through Block-Wise Caching", ICLR 2026,
arXiv 2509.13789.

Kept: the outputs of the blocks, of which only the last one's is used when all are reused. When: after a computed step,
the mean over blocks of the relative L1 change of their outputs since the last computed step is below `threshold`; then
`reuse` of all steps are skipped, one is computed, and the test is made again. If the first trigger leaves K steps, the
last K // 2 are always computed.

Confidence: medium. The authors' code was not available; this follows the paper as described by others. Differences: the
change is taken per sample and all samples must settle; under batched guidance both halves must.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View, against
from dita.config import check_number
from dita.registry import register


class SettledBlocks(Policy):
    """Skip `reuse` of the run's steps whenever the blocks changed by less than `threshold`.

    Args:
        threshold: largest mean relative L1 change, exclusive; 0 never skips.
        reuse: fraction of the run's steps to skip in a row.
    """

    watch_blocks = True

    def __init__(self, threshold: float, reuse: float) -> None:
        self.threshold, self.reuse = threshold, reuse
        self._left = 0
        self._tail: int | None = None
        self._change: float | None = None

    def decide(self, view: View) -> Verdict:
        """Spend what the last test granted."""
        if self._tail is not None and view.position.step >= self._tail:
            return Verdict(True, "tail", self._change)
        if self._left > 0:
            return Verdict(False, against("block change", self.threshold), self._change)
        return Verdict(True, against("block change", self.threshold), self._change)

    def computed(self, view: View) -> None:
        """Test how far the blocks moved."""
        self._left = 0
        if view.block_change is None:
            return
        self._change = view.block_change.max().item()
        if self.threshold > 0 and self._change < self.threshold:
            steps = view.position.steps
            if self._tail is None:
                self._tail = steps - (steps - 1 - view.position.step) // 2
            self._left = max(1, round(self.reuse * steps))

    def skipped(self, view: View) -> None:
        """One of the granted steps is used up."""
        self._left -= 1


@register
@dataclass(frozen=True)
class BWCache(CachingMethod):
    """BWCache's settings.

    Attributes:
        threshold: largest mean relative L1 change of block outputs that triggers reuse, exclusive; 0 computes all. The
            paper uses 0.15 (slow), 0.20 and 0.25 (fast).
        reuse: steps skipped after a trigger, as a fraction of the run's steps; at least one step.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> BWCache(threshold=0.25).label()
        'threshold=0.25'
    """

    threshold: float = 0.15
    reuse: float = 0.1

    name: ClassVar[str] = "bwcache"
    title: ClassVar[str] = "BWCache"
    arxiv: ClassVar[str] = "2509.13789"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "output of all blocks; mean block change at computed steps; reuse for a tenth of the run"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@article{cui2025bwcache,
  title={BWCache: Accelerating Video Diffusion Transformers through Block-Wise Caching},
  author={Cui, Hanshuai and Tang, Zhiqing and Xu, Zhifei and Yao, Zhi and Zeng, Wenyi and Jia, Weijia},
  journal={arXiv preprint arXiv:2509.13789},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)
        check_number("reuse", self.reuse, 0, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's output, gated by the change of every block."""
        return Recipe(what="trunk", when=lambda: SettledBlocks(self.threshold, self.reuse), keep="output")

    @classmethod
    def disabled(cls) -> BWCache:
        """Every step computed."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> BWCache:
        """Triggers at any change."""
        return cls(threshold=1e9)

    @classmethod
    def ladder(cls) -> tuple[BWCache, ...]:
        """Thresholds 0.05 to 0.4, and shorter reuse."""
        long = tuple(cls(threshold=t) for t in (0.05, 0.1, 0.15, 0.2, 0.25))
        return (*(cls(threshold=t, reuse=0.02) for t in (0.1, 0.15, 0.25)), *long)
