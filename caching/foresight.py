"""Foresight: each layer's own change during warm-up tells how deep its cache may be trusted.

Adnan et al., "Foresight: Adaptive Layer Reuse for Accelerated and High-Quality Text-to-Video Generation", arXiv
2506.00329.

Kept: the output of every block. When: the first `warmup` steps are computed, and the mean squared change of each
block's output between the last two of them, times `gamma`, becomes its threshold. After that every `refresh`-th step
is computed and measures the changes anew; on the others the deepest block whose last change stays within its
threshold stands in from the cache, and the blocks behind it run. How: reuse.

Confidence: medium, the released code having been read in part. Differences: the change is taken per sample and every
sample must stay within its own threshold; the authors compare temporal blocks with the spatial blocks' cache, which
is an error that is not repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.config import check_number, check_whole
from dita.registry import register
from dita.seams import Features, Site


class LayerThresholds(Policy):
    """Resume behind the deepest block that moves no more than it did during warm-up, times gamma.

    Args:
        gamma: factor on the warm-up change; 0 never skips.
        warmup: first steps, all computed.
        refresh: period of computed steps after warm-up.
        pieces: for each block, the spans that make up everything from the first block to it.
    """

    def __init__(self, gamma: float, warmup: int, refresh: int, pieces: tuple[tuple[Site, ...], ...]) -> None:
        self.gamma, self.warmup, self.refresh, self.pieces = gamma, warmup, refresh, pieces
        self._block = {parts[-1]: number for number, parts in enumerate(pieces)}
        self._limits: dict[int, torch.Tensor] = {}
        self._changes: dict[int, torch.Tensor] = {}

    def decide(self, view: View) -> Verdict:
        """Look for the block to resume behind."""
        step = view.position.local_step
        if self.gamma <= 0 or step < self.warmup:
            return Verdict(True, "warm-up" if self.gamma > 0 else "gamma 0")
        if (step - self.warmup) % self.refresh == 0:
            return Verdict(True, f"refreshed every {self.refresh} steps")
        trusted = [n for n, limit in self._limits.items() if bool((self._changes[n] <= limit).all())]
        if not trusted:
            return Verdict(True, "no block within its threshold")
        deepest = max(trusted)
        skipped = frozenset(self.pieces[deepest])
        reason = f"resumed behind block {deepest}"
        return Verdict(False, reason, float(deepest), computes=lambda site: site not in skipped)

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Measure a block's change against the output that is kept of it."""
        number, new, old = self._block.get(site), outputs[0], (*view.kept(site), None)[0]
        if not view.computing or number is None or new is None or old is None:
            return
        self._changes[number] = (new.float() - old.float()).square().flatten(1).mean(1)
        if view.position.local_step < self.warmup:
            self._limits[number] = self.gamma * self._changes[number]


@register
@dataclass(frozen=True)
class Foresight(CachingMethod):
    """Foresight's settings.

    Attributes:
        gamma: factor on the change during warm-up below which a block is trusted; 0 computes all.
        warmup: first steps that are all computed, at least 2.
        refresh: after warm-up every so many steps are computed.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> Foresight(gamma=1.0, refresh=3).label()
        'gamma=1 refresh=3'
    """

    gamma: float = 0.5
    warmup: int = 5
    refresh: int = 2

    name: ClassVar[str] = "foresight"
    title: ClassVar[str] = "Foresight"
    arxiv: ClassVar[str] = "2506.00329"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "outputs of all blocks; change per block against its warm-up; reuse up to one block"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@article{adnan2025foresight,
  title={Foresight: Adaptive Layer Reuse for Accelerated and High-Quality Text-to-Video Generation},
  author={Adnan, Muhammad and Kurella, Nithesh and Arunkumar, Akhil and Nair, Prashant J},
  journal={arXiv preprint arXiv:2506.00329},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("gamma", self.gamma, 0)
        check_whole("warmup", self.warmup, 2)
        check_whole("refresh", self.refresh, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Spans from the first block to each."""
        anatomy.require("block", self.name)
        pieces = tuple(anatomy.spans(0, last) for last in range(len(anatomy.blocks)))
        return Recipe(
            what="span",
            when=lambda: LayerThresholds(self.gamma, self.warmup, self.refresh, pieces),
            keep="output",
            sites=tuple(dict.fromkeys(site for parts in pieces for site in parts)),
        )

    @classmethod
    def disabled(cls) -> Foresight:
        """Every step computed."""
        return cls(gamma=0.0)

    @classmethod
    def forced(cls) -> Foresight:
        """Trusts every block."""
        return cls(gamma=1e9, warmup=2)

    @classmethod
    def ladder(cls) -> tuple[Foresight, ...]:
        """The published gamma, and larger ones with longer periods."""
        return (cls(), cls(gamma=1.0), cls(gamma=1.0, refresh=3), cls(gamma=2.0, refresh=4))
