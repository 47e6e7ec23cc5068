"""ToMe for Stable Diffusion: similar image tokens are merged before self-attention, and copied apart after it.

Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023, arXiv 2303.17604.

Destinations: one random token of every 2 x 2 cell, the same for all samples. Every other token is matched to the
destination of the highest cosine similarity; the `ratio` V most similar are merged into theirs, by the mean of all that
meet there. After the attention a merged token gets a copy of its destination's output. Matched anew in every block and
at every step, on what its attention reads.

Differs from the paper: it merges at the highest resolution of a U-Net only; a transformer has one resolution, so that
every block merges. A merged token has the position of its destination where the model turns queries and keys by
position, which the U-Net does not. Text of joint attention is left alone. The authors take the first token of a cell
in place of a random one in batches of odd size; here draws are alike in all batches. A grid thinner than a cell gets
thinner cells. "shift" destinations are Choi et al.'s ranking (arXiv 2508.00367), see `dita.kernels.reduction.shift`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.reduction.base import ReductionMethod
from dita.kernels.reduction.handler import ReductionPolicy, Tokens
from dita.kernels.reduction.matching import Matching, cells, draw_destinations, fitting, seed_of
from dita.kernels.reduction.operators import Pruned
from dita.kernels.reduction.shift import best_of_cells
from dita.registry import register
from dita.seams import Reducer


class Merging(ReductionPolicy):
    """Merge the tokens most like their destination.

    Args:
        settings: see there.
    """

    def __init__(self, settings: ToMe) -> None:
        self.settings = settings

    def reducer(self, tokens: Tokens) -> Reducer | None:
        """Match anew when the last matching is `reuse` steps old."""
        if self.settings.ratio == 0:
            return None
        made, step = tokens.state.get("pair"), tokens.state.get("step", -1)
        if made is None or tokens.step >= step + self.settings.reuse:
            made = self._pair(tokens)
            tokens.state.update(pair=made, step=tokens.step)
        return made

    def _pair(self, tokens: Tokens) -> Pruned:
        settings, count = self.settings, tokens.x.shape[1]
        cell = fitting((1, settings.cell, settings.cell), tokens.grid)
        if settings.destinations == "shift" and tokens.shift is not None:
            destinations = best_of_cells(cells(tokens.grid, cell).to(tokens.x.device), tokens.shift)
        else:
            seed = seed_of(settings.seed, tokens.layer, tokens.step)
            destinations = draw_destinations(tokens.grid, cell, seed)
        matching = Matching.of(functional.normalize(tokens.x.float(), dim=-1), destinations)
        many = matching.sources.shape[1]
        kept = many - min(int(settings.ratio * count), many)
        return matching.pair(kept, mean=True, weigh=settings.proportional)


@register
@dataclass(frozen=True)
class ToMe(ReductionMethod):
    """ToMe's settings.

    Attributes:
        ratio: part of the image tokens that is merged away, from 0 (none) up; destinations, a quarter, always stay.
        cell: side of a cell in tokens, within one frame.
        destinations: "random", or "shift": of every cell the token that the MLP changed most when it last ran.
        reuse: steps that one matching serves; 1 as published.
        seed: of the random destinations.

    Raises:
        DitaError: a setting out of range; on attaching, a model of which dita does not know how positions are passed.

    Example:
        >>> ToMe(ratio=0.3).label()
        'ratio=0.3'
    """

    ratio: float = 0.5
    cell: int = 2
    destinations: str = "random"
    reuse: int = 1
    seed: int = 0

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe for SD"
    arxiv: ClassVar[str] = "2303.17604"
    axes: ClassVar[str] = "what self-attention reads; most similar tokens merged by mean; copied back"
    citation: ClassVar[str] = """@inproceedings{bolya2023tomesd,
  title={Token Merging for Fast Stable Diffusion},
  author={Bolya, Daniel and Hoffman, Judy},
  booktitle={CVPR Workshop on Efficient Deep Learning for Computer Vision},
  year={2023}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("ratio", self.ratio, 0, 1)
        check_whole("cell", self.cell, 1)
        check_whole("reuse", self.reuse, 1)
        check_whole("seed", self.seed, 0)
        if self.destinations not in ("random", "shift"):
            raise DitaError(f'destinations is {self.destinations!r}; expected "random" or "shift"')

    @property
    def watches_shift(self) -> bool:
        """Only for that choice of destinations."""
        return self.destinations == "shift" and self.ratio > 0

    def policy(self, anatomy: Anatomy) -> ReductionPolicy:
        """See `ReductionMethod.policy`."""
        return Merging(self)

    @classmethod
    def disabled(cls) -> ToMe:
        """Nothing merged."""
        return cls(ratio=0.0)

    @classmethod
    def forced(cls) -> ToMe:
        """The published ratio, after one dense step of eight."""
        return cls(dense_steps=0.1)

    @classmethod
    def ladder(cls) -> tuple[ToMe, ...]:
        """Ratios around the published one."""
        return tuple(cls(ratio=ratio) for ratio in (0.15, 0.3, 0.5, 0.7))
