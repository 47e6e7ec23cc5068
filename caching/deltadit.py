"""Delta-DiT: reuse what a span of blocks adds, the rear blocks early and the front blocks late.

Chen et al., "Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers", arXiv 2406.01125.

Kept: the residual over the rear span and over the front span. When: steps whose number is a multiple of `interval`
are computed. On the others, in the first `switch` of the run (when outlines form) the rear span is skipped, after
that (details) the front span. How: reuse, added to the span's present input.

Confidence: medium. The paper's formula was read, of the code only a port to FLUX. The authors keep one span at a time
and compute a step in full at the switch; keeping both spares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Site


class RearThenFront(Policy):
    """Skip one span between the steps of a fixed interval.

    Args:
        interval: steps whose number is a multiple of it are computed.
        switch: fraction of the run after which the front is skipped.
        front, rear: the spans, in pieces.
    """

    def __init__(self, interval: int, switch: float, front: tuple[Site, ...], rear: tuple[Site, ...]) -> None:
        self.interval, self.switch = interval, switch
        self.front, self.rear = frozenset(front), frozenset(rear)

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        position = view.position
        if position.local_step % self.interval == 0:
            return Verdict(True, f"interval {self.interval}")
        early = position.step < self.switch * position.steps
        skipped = self.rear if early else self.front
        return Verdict(False, f"{'rear' if early else 'front'} blocks", computes=lambda site: site not in skipped)


@register
@dataclass(frozen=True)
class DeltaDiT(CachingMethod):
    """Delta-DiT's settings.

    Attributes:
        interval: steps whose number is a multiple of it are computed; 1 computes all.
        fraction: of the blocks that make a span, above 0 and at most 1.
        switch: fraction of the run in which the rear span is skipped; 0 skips the front span only.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> DeltaDiT(interval=3).label()
        'interval=3'
    """

    interval: int = 2
    fraction: float = 0.75
    switch: float = 0.5

    name: ClassVar[str] = "delta-dit"
    title: ClassVar[str] = "Delta-DiT"
    arxiv: ClassVar[str] = "2406.01125"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "residual of the rear, later of the front blocks; fixed interval; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@article{chen2024deltadit,
  title={Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers},
  author={Chen, Pengtao and Shen, Mingzhu and Ye, Peng and Cao, Jianjian and Tu, Chongjun and
    Bouganis, Christos-Savvas and Zhao, Yiren and Chen, Tao},
  journal={arXiv preprint arXiv:2406.01125},
  year={2024}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("fraction", self.fraction, 0, 1)
        check_number("switch", self.switch, 0, 1)
        if self.fraction == 0:
            raise DitaError("fraction is 0; expected a number above 0, as nothing is skipped otherwise")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Two spans."""
        anatomy.require("block", self.name)
        count = len(anatomy.blocks)
        length = max(1, round(self.fraction * count))
        front, rear = anatomy.spans(0, length - 1), anatomy.spans(count - length, count - 1)
        return Recipe(
            what="span",
            when=lambda: RearThenFront(self.interval, self.switch, front, rear),
            sites=tuple(dict.fromkeys((*front, *rear))),
        )

    @classmethod
    def disabled(cls) -> DeltaDiT:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> DeltaDiT:
        """Two of three steps."""
        return cls(interval=3)

    @classmethod
    def ladder(cls) -> tuple[DeltaDiT, ...]:
        """Intervals 2 and 3 at three quarters of the blocks, and all but one block in eight."""
        return (cls(), cls(interval=3), cls(fraction=0.875), cls(interval=4, fraction=0.875))
