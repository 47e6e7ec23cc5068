"""DuCa: ToCa's steps take turns with steps on which no block runs, and short values choose the tokens.

Zou et al., "Accelerating Diffusion Transformers with Dual Feature Caching", 2024, arXiv 2412.18911.

Kept: what ToCa keeps, and the output of the last block. When: as ToCa; of the skipped steps those at an odd distance to
the computed one are ToCa's, on those at an even one all blocks are bypassed. How: as ToCa; a bypassed step takes the
last block's output of the step before, whatever it was. Tokens are ranked by the sum over heads of 1 - |v|, with v
their values in the block's attention at the computed step, so that no attention map is needed; the shortest are taken,
as in the released code of DiT, PixArt and Open-Sora (that of FLUX takes the longest).

Published: DiT-XL 50 steps interval 3, ratio 0.05, with 0.8 for ToCa's bonus; PixArt-alpha interval 3 without
modulation, ratio 0.75; Open-Sora interval 3, ratio 0.1. The commands released for DiT and PixArt rank by ToCa's maps
(`score` "auto" here) and the paper by values. Differences: those of ToCa.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.toca import ToCa
from dita.caching.tokenwise import SPREADS, TokenSettings, spread_for, token_wise
from dita.registry import register

_SPREADS = {
    **SPREADS,
    "dit": replace(SPREADS["dit"], bonus=0.8),
    "pixart": replace(SPREADS["pixart"], interval=0.0),
}


@register
@dataclass(frozen=True)
class DuCa(ToCa):
    """DuCa's settings.

    Attributes:
        interval, ratio, staleness, preset: as ToCa's.
        score: as ToCa's; "value" by default.

    Raises:
        DitaError: as ToCa.

    Example:
        >>> DuCa(interval=3, ratio=0.05, preset="dit").label()
        'interval=3 ratio=0.05 preset=dit'
    """

    score: str = "value"

    name: ClassVar[str] = "duca"
    title: ClassVar[str] = "DuCa"
    arxiv: ClassVar[str] = "2412.18911"
    axes: ClassVar[str] = "modules and last block; modulated interval; ToCa's steps and bypassed ones in turn; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"module", "block"})
    citation: ClassVar[str] = """@article{zou2024duca,
  title={Accelerating Diffusion Transformers with Dual Feature Caching},
  author={Zou, Chang and Zhang, Evelyn and Guo, Runlin and Xu, Haohang and He, Conghui and Hu, Xuming and
    Zhang, Linfeng},
  journal={arXiv preprint arXiv:2412.18911},
  year={2024}
}"""

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Attention and MLP modules, and all blocks."""
        spread = spread_for(self.preset, anatomy, _SPREADS)
        settings = TokenSettings(self.interval, self.ratio, self.score, self.staleness, spread, aggressive=True)
        return token_wise(anatomy, self.name, settings)

    @classmethod
    def forced(cls) -> DuCa:
        """One of three steps computed, one on a quarter of the tokens, one bypassed."""
        return cls(interval=3, ratio=0.25, preset="even")
