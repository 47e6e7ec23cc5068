"""ToMA: destinations that cover their window, and merging by attention, in matrix products alone.

Lu et al., "ToMA: Token Merge with Attention for Diffusion Models", ICML 2025, arXiv 2509.10918.

Destinations: in every window of `window` x `window` tokens, greedy facility location on cosine similarity: repeatedly
the token v of the largest sum_j max(S_jv - best_j, 0). Merging: X' = A X with A = softmax(X_D X^T / tau) over the
tokens, of the whole image or (`local`) of the window. After the attention the transposed weights spread its output
again. Destinations serve `reuse` steps and weights `refresh`, and all layers: those of the first layer that needs them.

Differs from the paper, of which we know the method from descriptions and have not seen the code: the rows of A^T are
scaled to sum to 1, without which outputs would shrink by the share of tokens kept; tau is ours, for cosines; a merged
token has the position of its destination; MLPs run on all tokens; windows of films lie within frames, and those at the
edges of the grid are smaller, with destinations in proportion. `local` is what large images need: A of the whole image
has (1 - ratio) V^2 entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.kernels.reduction.base import ReductionMethod
from dita.kernels.reduction.handler import ReductionPolicy, Tokens
from dita.kernels.reduction.operators import Mixed
from dita.kernels.reduction.similarity import cover, shared_out, unit, windows
from dita.registry import register
from dita.seams import Reducer


@dataclass(frozen=True)
class Destinations:
    """Which tokens the others are merged into.

    Attributes:
        members: int64 [W, n], tokens of the windows, -1 for none.
        places: int64 [B, W, D], where in the windows the destinations are.
        kept: bool [W, D], where a window has a destination.
    """

    members: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, tokens: Tokens, window: int, ratio: float) -> Destinations:
        """Choose them in every window."""
        members = windows(tokens.grid, window).to(tokens.x.device)
        present = members >= 0
        counts = shared_out(present.sum(1), ratio)
        x = unit(tokens.x[:, members.clamp_min(0)])
        places = cover(x @ x.transpose(-2, -1), present, counts)
        kept = torch.arange(places.shape[-1], device=counts.device) < counts[:, None]
        return cls(members, places, kept)

    @property
    def tokens(self) -> torch.Tensor:
        """The destinations [B, M], window after window."""
        members = self.members.expand(len(self.places), -1, -1)
        return members.gather(2, self.places)[:, self.kept]

    def weights(self, x: torch.Tensor, tau: float, local: bool) -> Mixed:
        """The operators for tokens [B, V, C]."""
        positions = self.tokens
        if not local:
            all_tokens = unit(x)
            batch = torch.arange(len(x), device=x.device)[:, None]
            logits = all_tokens[batch, positions] @ all_tokens.transpose(1, 2) / tau
            return Mixed.of(logits[:, None], positions, dtype=x.dtype)
        windows = unit(x[:, self.members.clamp_min(0)])
        chosen = windows.gather(2, self.places[..., None].expand(-1, -1, -1, x.shape[-1]))
        logits = chosen @ windows.transpose(-2, -1) / tau
        return Mixed.of(logits, positions, self.members, self.kept, x.dtype)


class AttentionMerging(ReductionPolicy):
    """Merge by attention to destinations that all layers share.

    Args:
        settings: see there.
    """

    def __init__(self, settings: ToMA) -> None:
        self.settings = settings

    def reducer(self, tokens: Tokens) -> Reducer | None:
        """Renew destinations and weights when they are due, at the first layer that asks."""
        settings, kept = self.settings, tokens.shared
        if settings.ratio == 0:
            return None
        if tokens.step >= kept.get("destinations until", -1):
            kept["destinations"] = Destinations.of(tokens, settings.window, settings.ratio)
            kept["destinations until"] = tokens.step + settings.reuse
            kept["weights until"] = tokens.step
        if tokens.step >= kept["weights until"]:
            made = kept["destinations"].weights(tokens.x, settings.tau, settings.local)
            kept["weights"] = replace(made, sizes=made.weighed()) if settings.proportional else made
            kept["weights until"] = tokens.step + settings.refresh
        return kept["weights"]


@register
@dataclass(frozen=True)
class ToMA(ReductionMethod):
    """ToMA's settings.

    Attributes:
        ratio: part of the image tokens that is merged away, from 0 (none) to below 1.
        window: side in tokens of the windows in which destinations are chosen.
        tau: temperature of the weights; cosines are divided by it.
        local: weights within the window only.
        reuse: steps that the destinations serve.
        refresh: steps that the weights serve.

    Raises:
        DitaError: a setting out of range; on attaching, a model of which dita does not know how positions are passed.

    Example:
        >>> ToMA(ratio=0.25, local=True).label()
        'ratio=0.25 local=True'
    """

    ratio: float = 0.5
    window: int = 8
    tau: float = 0.1
    local: bool = False
    reuse: int = 10
    refresh: int = 5

    name: ClassVar[str] = "toma"
    title: ClassVar[str] = "ToMA"
    arxiv: ClassVar[str] = "2509.10918"
    axes: ClassVar[str] = "what self-attention reads; attention to covering destinations; spread by the transpose"
    confidence: ClassVar[str] = "medium"
    citation: ClassVar[str] = """@inproceedings{lu2025toma,
  title={ToMA: Token Merge with Attention for Diffusion Models},
  author={Lu, Wenbo and Zheng, Shaoyi and Xia, Yuxuan and Wang, Shengjie},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("ratio", self.ratio, 0, 0.99)
        check_number("tau", self.tau, 1e-3)
        for name in ("window", "reuse", "refresh"):
            check_whole(name, getattr(self, name), 1)
        if not isinstance(self.local, bool):
            raise DitaError(f"local is {self.local!r}; expected True or False")

    def policy(self, anatomy: Anatomy) -> ReductionPolicy:
        """See `ReductionMethod.policy`."""
        return AttentionMerging(self)

    @classmethod
    def disabled(cls) -> ToMA:
        """Nothing merged."""
        return cls(ratio=0.0)

    @classmethod
    def forced(cls) -> ToMA:
        """The published ratio in small windows, after one dense step of eight."""
        return cls(window=3, local=True, refresh=2, dense_steps=0.1)

    @classmethod
    def ladder(cls) -> tuple[ToMA, ...]:
        """Ratios around the published one."""
        return tuple(cls(ratio=ratio) for ratio in (0.15, 0.25, 0.5, 0.7))
