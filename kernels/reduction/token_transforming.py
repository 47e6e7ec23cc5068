"""Token Transforming: every reduced token is made of all, by how like them it is.

Zeng et al., "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer
Acceleration", 2025, arXiv 2506.05709.

X' = W X with W = softmax(sim / tau) over all V tokens, many to many, for the M most informative tokens; after the
attention the transpose of W, its rows scaled to sum to 1, spreads the output again. Made anew in every block.

Low confidence: reconstructed from the idea. The paper ranks tokens of classifiers by the attention that the class token
pays them, which a diffusion transformer does not have; here they rank by representation shift (`rank="shift"`, Choi et
al., arXiv 2508.00367, see `dita.kernels.reduction.shift`), which the first attention of a run does without, or by how
unlike the mean token they are ("contrast"). The paper compresses for good as depth grows; a denoiser needs every token
back. tau is ours, for cosines. A reduced token has the position of the informative token it is made around.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number
from dita.errors import DitaError
from dita.kernels.reduction.base import ReductionMethod
from dita.kernels.reduction.handler import ReductionPolicy, Tokens
from dita.kernels.reduction.operators import Mixed
from dita.kernels.reduction.similarity import unit
from dita.kernels.tokens import choose
from dita.registry import register
from dita.seams import Reducer


class Transforming(ReductionPolicy):
    """Make tokens around the most informative ones.

    Args:
        settings: see there.
    """

    def __init__(self, settings: TokenTransforming) -> None:
        self.settings = settings

    def reducer(self, tokens: Tokens) -> Reducer | None:
        """The weights for these very tokens."""
        settings, x = self.settings, unit(tokens.x)
        if settings.ratio == 0:
            return None
        scores = tokens.shift
        if settings.rank == "contrast":
            scores = -(x @ unit(x.mean(1, keepdim=True)).transpose(1, 2))[..., 0]
        if scores is None:
            return None
        positions = choose(scores, max(1, round((1 - settings.ratio) * x.shape[1])))
        batch = torch.arange(len(x), device=x.device)[:, None]
        logits = x[batch, positions] @ x.transpose(1, 2) / settings.tau
        made = Mixed.of(logits[:, None], positions, dtype=tokens.x.dtype)
        return replace(made, sizes=made.weighed()) if settings.proportional else made


@register
@dataclass(frozen=True)
class TokenTransforming(ReductionMethod):
    """Token Transforming's settings.

    Attributes:
        ratio: part of the image tokens that goes, from 0 (none) to below 1.
        rank: which tokens are informative: "shift" (changed most when the MLP last ran) or "contrast" (least
            like the mean token).
        tau: temperature of the weights; cosines are divided by it.

    Raises:
        DitaError: a setting out of range; on attaching, a model of which dita does not know how positions are passed,
            or without MLPs to rank tokens by.

    Example:
        >>> TokenTransforming(ratio=0.25).label()
        'ratio=0.25'
    """

    ratio: float = 0.5
    rank: str = "shift"
    tau: float = 0.1

    name: ClassVar[str] = "token-transforming"
    title: ClassVar[str] = "Token Transforming"
    arxiv: ClassVar[str] = "2506.05709"
    axes: ClassVar[str] = "what self-attention reads; weighted means around informative tokens; spread by the transpose"
    confidence: ClassVar[str] = "low"
    citation: ClassVar[str] = """@article{zeng2025tokentransforming,
  title={Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration},
  author={Zeng, Fanhu and Yu, Deli and Kong, Zhenglun and Tang, Hao},
  journal={arXiv preprint arXiv:2506.05709},
  year={2025}
}"""  # noqa: E501

    def validate(self) -> None:
        """Check ranges."""
        check_number("ratio", self.ratio, 0, 0.99)
        check_number("tau", self.tau, 1e-3)
        if self.rank not in ("shift", "contrast"):
            raise DitaError(f'rank is {self.rank!r}; expected "shift" or "contrast"')

    @property
    def watches_shift(self) -> bool:
        """Only for that ranking."""
        return self.rank == "shift" and self.ratio > 0

    def policy(self, anatomy: Anatomy) -> ReductionPolicy:
        """See `ReductionMethod.policy`."""
        return Transforming(self)

    @classmethod
    def disabled(cls) -> TokenTransforming:
        """Nothing reduced."""
        return cls(ratio=0.0)

    @classmethod
    def forced(cls) -> TokenTransforming:
        """Half of the tokens, after one dense step of eight."""
        return cls(rank="contrast", dense_steps=0.1)

    @classmethod
    def ladder(cls) -> tuple[TokenTransforming, ...]:
        """From mild to strong."""
        return tuple(cls(ratio=ratio) for ratio in (0.15, 0.3, 0.5, 0.7))
