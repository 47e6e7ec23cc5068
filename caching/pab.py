"""PAB: broadcast attention outputs over steps, each kind of attention over its own number of them.

Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast", ICLR 2025, arXiv 2408.12588.

Kept: the outputs of attention modules. When: inside a range of timesteps, self-attention (joint attention too) is
computed at every `self_interval`-th step, attention over time alone at every `temporal_interval`-th and cross-attention
at every `cross_interval`-th; outside it always. How: reuse. MLPs always run.

Published, in steps for spatial, temporal and cross-attention and range: Open-Sora 2, 4, 6 in (450, 930); Latte 2, 3,
6 in (100, 800); Open-Sora-Plan 2, 4, 6 in (100, 850); CogVideoX 2 in (100, 850), whose self-attention is over space
and time at once. Of the models of diffusers Latte alone attends over time apart. Not built: the broadcast of chosen
MLPs at listed timesteps, which the authors use for Open-Sora alone.
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


class Broadcast(Policy):
    """Compute each kind of attention at multiples of its interval.

    Args:
        intervals: kind of a site, as `kind_of` has it -> its interval.
        low, high: timesteps between which, exclusive, outputs are reused.
    """

    def __init__(self, intervals: dict[str, int], low: float, high: float) -> None:
        self.intervals, self.low, self.high = intervals, low, high

    def decide(self, view: View) -> Verdict:
        """Follow the schedule."""
        position = view.position
        if not self.low < position.timestep < self.high:
            return Verdict(True, f"timestep outside {self.low:g} to {self.high:g}", position.timestep)
        due = frozenset(role for role, every in self.intervals.items() if position.local_step % every == 0)
        if len(due) == len(self.intervals):
            return Verdict(True, "all intervals due", position.timestep)
        reason = "intervals " + ", ".join(f"{role} {every}" for role, every in self.intervals.items())
        return Verdict(False, reason, position.timestep, computes=lambda site: kind_of(site) in due)


def kind_of(site: Site) -> str:
    """Which of PAB's kinds of attention a module is: "temporal", "attention" or "cross-attention".

    Example:
        >>> kind_of(Site("module", "temporal_transformer_blocks.0.attn1", role="attention", temporal=True))
        'temporal'
    """
    return "temporal" if site.temporal else site.role


@register
@dataclass(frozen=True)
class PAB(CachingMethod):
    """PAB's settings; the defaults are those for CogVideoX, with Open-Sora's for cross- and temporal attention.

    Attributes:
        self_interval: steps over which the output of a self-attention is used, over space or over space and time at
            once; 1 computes all.
        cross_interval: steps over which a cross-attention output is used.
        low, high: timesteps, of 1000, between which outputs are reused, exclusive.
        temporal_interval: steps over which the output of an attention over time alone is used.

    Raises:
        DitaError: a setting out of range; on attaching, a model without recognised attention modules.

    Example:
        >>> PAB(self_interval=4).label()
        'self_interval=4'
    """

    self_interval: int = 2
    cross_interval: int = 6
    low: float = 100.0
    high: float = 850.0
    temporal_interval: int = 4

    name: ClassVar[str] = "pab"
    title: ClassVar[str] = "PAB"
    arxiv: ClassVar[str] = "2408.12588"
    axes: ClassVar[str] = "attention modules; fixed interval per kind within a timestep range; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@inproceedings{zhao2025pab,
  title={Real-Time Video Generation with Pyramid Attention Broadcast},
  author={Zhao, Xuanlei and Jin, Xiaolong and Wang, Kai and You, Yang},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("self_interval", self.self_interval, 1)
        check_whole("cross_interval", self.cross_interval, 1)
        check_whole("temporal_interval", self.temporal_interval, 1)
        check_number("low", self.low, -1, 1001)
        check_number("high", self.high, -1, 1001)
        if self.low > self.high:
            raise DitaError(f"the timesteps {self.low:g} to {self.high:g} are no range; expected low up to high")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Attention modules."""
        anatomy.require("module", self.name)
        sites = tuple(part.site for part in anatomy.attentions())
        if not sites:
            raise DitaError(f"pab found no attention module inside the blocks of {anatomy.name}")
        intervals = {
            "attention": self.self_interval,
            "temporal": self.temporal_interval,
            "cross-attention": self.cross_interval,
        }
        kinds = {kind_of(site) for site in sites}
        present = {kind: every for kind, every in intervals.items() if kind in kinds}
        return Recipe(what="module", when=lambda: Broadcast(present, self.low, self.high), keep="output", sites=sites)

    @classmethod
    def disabled(cls) -> PAB:
        """Every step computed."""
        return cls(self_interval=1, cross_interval=1, temporal_interval=1)

    @classmethod
    def forced(cls) -> PAB:
        """Every other step at any timestep."""
        return cls(self_interval=2, cross_interval=3, low=-1, high=1001, temporal_interval=3)

    @classmethod
    def ladder(cls) -> tuple[PAB, ...]:
        """Intervals 2 to 6 in the published range."""
        return tuple(cls(self_interval=n) for n in (2, 3, 4, 6))
