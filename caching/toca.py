"""ToCa: between computed steps, MLPs run on the tokens that matter most, and attention is reused.

Zou et al., "Accelerating Diffusion Transformers with Token-wise Feature Caching", ICLR 2025, arXiv 2410.05317.

Kept: outputs of attention and MLP modules, before the adaLN gate; where both run side by side (FLUX's single-stream
blocks), those of the attention, of the layer beside it and of the projection that joins them. When: at intervals of
about `interval`, see below. How: reuse, in which each MLP's output is replaced on `ratio` of its tokens, times factors
of step, depth and module, by what it gives on them now. The choice is by s1 + `staleness` * s3, the best token of each
cell of 2 x 2 getting a bonus: s1 is what a token receives of its block's attention map at the computed step (column
sums averaged over heads, scaled to length 1 over tokens), s3 the skipped steps since it was last computed, over
`interval`. With cross-attention s2 takes the place of s1: 1 plus the entropy of a token's row of that map, averaged
over the two halves of a batched guidance, which so get the same tokens.

Published, as presets: DiT-XL 50 steps interval 3, ratio 0.07; 250 steps interval 4, ratio 0.07; PixArt-alpha 3 and 0.3;
FLUX 4 and 0.1; Open-Sora 3 and 0.1. Those of DiT and PixArt modulate the interval: DiT's 3 means 5 at first, 2 at last
and from 60 to 80 % of the run, 18 computed steps of 50.

Differences: the map is summed up in chunks of its rows and never held, so that attention runs as it does without us.
Cross-attention, of which the authors' PixArt code runs a small part, is reused; in Open-Sora it has an interval of its
own. Depth is counted from 0 to 1 in each stack of blocks, in their code in 27ths. A step that their code computes in
the first block alone, by a change of interval within the step, is skipped. A negative score's bonus raises it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.tokenwise import SCORES, SPREADS, TokenSettings, spread_for, token_wise
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register


@register
@dataclass(frozen=True)
class ToCa(CachingMethod):
    """ToCa's settings.

    Attributes:
        interval: N, steps from one computed step to the next before modulation; 1 computes all.
        ratio: part of its tokens on which an MLP runs, from 0 (none) to 1, before the preset's factors.
        score: "self" (s1), "cross" (s2), "value" (DuCa's) or "auto": "cross" if the model has cross-attention.
        staleness: weight of s3.
        preset: factors and schedule of "dit", "dit-250", "pixart", "flux", "open-sora" or "even", ours, which has
            three computed steps first, a steady interval and factors of 1; "auto" takes the model's own, else that.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention to rank tokens by, without MLPs that
            treat each token by itself, or of which it is unknown where its text tokens lie.

    Example:
        >>> ToCa(interval=3, ratio=0.07, preset="dit").label()
        'interval=3 ratio=0.07 preset=dit'
    """

    interval: int = 4
    ratio: float = 0.1
    score: str = "auto"
    staleness: float = 0.25
    preset: str = "auto"

    name: ClassVar[str] = "toca"
    title: ClassVar[str] = "ToCa"
    arxiv: ClassVar[str] = "2410.05317"
    axes: ClassVar[str] = "modules; modulated interval; reuse, MLPs on the tokens most attended to"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@inproceedings{zou2025toca,
  title={Accelerating Diffusion Transformers with Token-wise Feature Caching},
  author={Zou, Chang and Liu, Xuyang and Liu, Ting and Huang, Siteng and Zhang, Linfeng},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("ratio", self.ratio, 0, 1)
        check_number("staleness", self.staleness, 0)
        for name, value, known in (("score", self.score, SCORES), ("preset", self.preset, ("auto", *SPREADS))):
            if value not in known:
                raise DitaError(f"{name} is {value!r}; expected one of {', '.join(known)}")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Attention and MLP modules."""
        spread = spread_for(self.preset, anatomy)
        settings = TokenSettings(self.interval, self.ratio, self.score, self.staleness, spread)
        return token_wise(anatomy, self.name, settings)

    @classmethod
    def disabled(cls) -> ToCa:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> ToCa:
        """Every other step on a quarter of the tokens."""
        return cls(interval=2, ratio=0.25, preset="even")

    @classmethod
    def ladder(cls) -> tuple[ToCa, ...]:
        """Intervals 2 to 6, on more tokens and on fewer."""
        return tuple(cls(interval=n, ratio=ratio) for n in (2, 3, 4, 6) for ratio in (0.3, 0.1))
