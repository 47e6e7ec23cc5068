"""AdaCache: after each computed step, one layer's change looks up in a codebook how many steps to skip.

Kahatapitiya et al., "Adaptive Caching for Faster Video Generation with Diffusion Transformers", arXiv 2411.02397.

Kept: the authors keep, per block, the gated attention residual and the joint residual of cross-attention and MLP. All
blocks share one decision and residuals are only added, so that what stands in for a skipped step is the trunk's
residual: one tensor, kept here, with the same result. When: at a computed step, the change of one layer's attention
output since the last computed one, c = |C - R|_1 / |C|_1 over the steps between them, gives by the codebook the
number of steps until the next computed one. The first and the last two steps are computed. Motion regularisation
(video only): c is multiplied by M + |gradient of M|, with M the eighth power of the frames' relative change over
0.385. How: reuse.

Differences: the change is read off the attention module's output before the adaLN gate, and per sample, the largest
counting. Codebooks belong to a number of steps: the default is the authors' fast one for 30 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.caching.storage import bytes_of
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Features, Site

FAST: tuple[tuple[float, int], ...] = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (math.inf, 1))
SLOW: tuple[tuple[float, int], ...] = ((0.08, 3), (0.16, 2), (math.inf, 1))
HUNDRED: tuple[tuple[float, int], ...] = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (math.inf, 3))
CODEBOOKS = {"fast": FAST, "slow": SLOW, "100 steps": HUNDRED}
_TYPICAL_MOTION, _POWER, _GRADIENT = 0.385, 8, 10.0


class CodebookRate(Policy):
    """Skip as many steps as the codebook says after each computed one.

    Args:
        codebook: (largest change, exclusive; steps until the next computed one), ascending.
        motion: regularise by the motion between frames.
    """

    def __init__(self, codebook: tuple[tuple[float, int], ...], motion: bool) -> None:
        self.codebook, self.motion = codebook, motion
        self._kept: torch.Tensor | None = None
        self._motion: torch.Tensor | None = None
        self._change: float | None = None
        self._rate, self._next = 1, 0

    def decide(self, view: View) -> Verdict:
        """Follow the rate."""
        step, steps = view.position.step, view.position.steps
        if step >= steps - 2:
            return Verdict(True, "tail")
        return Verdict(step >= self._next, f"every {self._rate} steps by the codebook", self._change)

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Measure the layer and look up the rate."""
        new = outputs[0]
        if site.kind != "module" or new is None:
            return
        if self._kept is not None and view.gap > 0:
            moved = (self._kept.float() - new.float()).abs().flatten(1).sum(1)
            change = moved / self._kept.float().abs().flatten(1).sum(1).clamp_min(1e-12) / view.gap
            change = change * self._factor(new, view)
            self._change = change.max().item()
            self._rate = next(rate for limit, rate in self.codebook if self._change < limit or math.isinf(limit))
        self._kept = new.detach().clone()
        self._next = view.position.step + self._rate

    def _factor(self, new: torch.Tensor, view: View) -> torch.Tensor | float:
        frames, step, steps = (view.grid or (1,))[0], view.position.step, view.position.steps
        count = math.prod(view.grid) if view.grid else 0
        if not self.motion or frames < 2 or new.ndim != 3 or new.shape[1] != count:
            return 1.0
        if not 0.1 * steps <= step <= 0.9 * steps:
            return 1.0
        tokens = new.float().unflatten(1, (frames, -1))
        later, earlier = tokens[:, 1:], tokens[:, :-1]
        size = later.abs().flatten(1).sum(1) + earlier.abs().flatten(1).sum(1)
        motion = ((later - earlier).abs().flatten(1).sum(1) / size / _TYPICAL_MOTION) ** _POWER
        gradient = 0.0 if self._motion is None else _GRADIENT * (motion - self._motion) / view.gap
        self._motion = motion
        return motion + abs(gradient)

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """The layer's output."""
        return outputs[:1] if site.kind == "module" else ()

    def bytes_held(self) -> int:
        """Bytes of the layer's output."""
        return bytes_of([self._kept])


@register
@dataclass(frozen=True)
class AdaCache(CachingMethod):
    """AdaCache's settings.

    Attributes:
        codebook: "fast" or "slow" (published for 30 steps), "100 steps", or "off", which computes all.
        stretch: factor on the codebook's limits: above 1 skips more.
        block: the block whose attention is watched, counted from 0; -1 takes the middle one. Open-Sora: 13 of 28.
        motion: motion regularisation; without frames it does nothing.

    Raises:
        DitaError: a setting out of range; on attaching, no attention module in that block.

    Example:
        >>> AdaCache("slow").label()
        'codebook=slow'
    """

    codebook: str = "fast"
    stretch: float = 1.0
    block: int = -1
    motion: bool = True

    name: ClassVar[str] = "adacache"
    title: ClassVar[str] = "AdaCache"
    arxiv: ClassVar[str] = "2411.02397"
    axes: ClassVar[str] = "residual of the trunk; a layer's change picks the rate, regularised by motion; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@article{kahatapitiya2024adaptive,
  title={Adaptive Caching for Faster Video Generation with Diffusion Transformers},
  author={Kahatapitiya, Kumara and Liu, Haozhe and He, Sen and Liu, Ding and Jia, Menglin and Zhang, Chenyang and
    Ryoo, Michael S and Xie, Tian},
  journal={arXiv preprint arXiv:2411.02397},
  year={2024}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if self.codebook not in (*CODEBOOKS, "off"):
            raise DitaError(f"codebook is {self.codebook!r}; expected one of {', '.join(CODEBOOKS)} or off")
        check_number("stretch", self.stretch, 0)
        check_whole("block", self.block, -1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's residual, with one attention module watched."""
        anatomy.require("module", self.name)
        number = len(anatomy.blocks) // 2 if self.block < 0 else self.block
        layers = [part.site for part in anatomy.attentions(cross=False) if part.site.block == number]
        if not layers:
            raise DitaError(
                f"adacache watches the attention of block {number}, but {anatomy.name} has none there; it has "
                f"{len(anatomy.blocks)} blocks"
            )
        codebook = CODEBOOKS.get(self.codebook, ((math.inf, 1),))
        stretched = tuple((limit * self.stretch, rate) for limit, rate in codebook)
        return Recipe(what="trunk", when=lambda: CodebookRate(stretched, self.motion), watch=(layers[0],))

    @classmethod
    def disabled(cls) -> AdaCache:
        """Every step computed."""
        return cls("off")

    @classmethod
    def forced(cls) -> AdaCache:
        """Limits so wide that any change skips the most."""
        return cls(stretch=1e9, motion=False)

    @classmethod
    def ladder(cls) -> tuple[AdaCache, ...]:
        """The slow and the fast codebook, and narrower and wider limits."""
        return (cls("slow"), cls(stretch=0.3), cls(stretch=0.6), cls(), cls(stretch=2.0))
