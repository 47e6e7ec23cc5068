"""What ToCa and DuCa share: when steps are computed, how many tokens MLPs run on in between, and which.

The published numbers differ from model to model; `SPREADS` has those of the released code. A ratio of tokens is
multiplied by a factor of the step, 1 - w + 2 w p, with p the part of the run that is done, one of the depth,
1 + w - 2 w l, with l from 0 (first block) to 1, and one of the kind of module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from dita.anatomy import Anatomy
from dita.attention_view import Attended, joined
from dita.caching.engine import Recipe
from dita.caching.policy import Policy, Verdict, View
from dita.caching.storage import bytes_of
from dita.errors import DitaError
from dita.kernels.tokens import cell_bonus, choose
from dita.seams import Features, Fresh, Site

SCORES = ("auto", "self", "cross", "value")


@dataclass(frozen=True)
class Spread:
    """How computed steps and tokens are spread over a run and a model.

    Attributes:
        warmup: first steps that are all computed. At 1 the interval is modulated: a computed step sets it to
            N / (1 - w + 2 w p), rounded, and the next computed one is the next whose number it divides.
        interval: w of the interval.
        down: steps are numbered from the last, which is 0, else from the first.
        sensitive: between 20 and 40 % of such numbers the interval is 2.
        step, depth: w of the ratio's factors.
        mlp: factor of MLPs in blocks where they follow attention.
        joint: factor of the MLP of blocks where it runs beside attention.
        bonus, cell: of `cell_bonus`; 0 for none.
    """

    warmup: int = 3
    interval: float = 0.0
    down: bool = False
    sensitive: bool = False
    step: float = 0.0
    depth: float = 0.0
    mlp: float = 1.0
    joint: float = 1.0
    bonus: float = 0.0
    cell: int = 2


SPREADS: dict[str, Spread] = {
    "even": Spread(bonus=0.6),
    "dit": Spread(1, 0.4, True, True, 2.0, -0.2, 2.5, bonus=0.6),
    "dit-250": Spread(1, 0.4, True, True, 0.4, 0.8, 2.5, bonus=0.6),
    "pixart": Spread(1, 0.2, step=-0.9, depth=0.6, mlp=1.6, bonus=0.4, cell=4),
    "flux": Spread(depth=0.5, mlp=0.4, joint=1.6),
    "open-sora": Spread(mlp=1.495),
}
"""By name: "even" is ours, for any model; DiT-XL with 50 and with 250 steps, PixArt-alpha, FLUX and Open-Sora."""


@lru_cache(maxsize=64)
def plan_steps(steps: int, interval: int, spread: Spread) -> tuple[str, ...]:
    """What happens at each step of a run: "full", "some" (tokens) or "none", of which ToCa makes "some".

    The skipped steps of an odd distance to the computed one before (after, where steps are numbered from the last) are
    "some". In the released code of DiT and PixArt a new interval already holds for the rest of the step that sets it,
    so that a step which the old one divides and the new one does not is computed in the first block only: it is
    skipped here.

    Args:
        steps: of the run.
        interval: N.
        spread: see there.

    Example:
        >>> plan_steps(7, 3, SPREADS["flux"])
        ('full', 'full', 'full', 'some', 'none', 'full', 'some')
        >>> [step for step, kind in enumerate(plan_steps(20, 3, SPREADS["pixart"])) if kind == "full"]
        [0, 6, 9, 12, 15, 18]
    """
    plan, now = ["full"], interval if spread.warmup > 1 else _interval_at(0, steps, interval, spread)
    for step in range(1, steps):
        if spread.warmup > 1:
            distance = max(0, step - spread.warmup + 1) % interval
        else:
            number = _number(step, steps, spread)
            if number % now == 0:
                now = _interval_at(step, steps, interval, spread)
            distance = number % now
        plan.append("full" if interval == 1 or distance == 0 else ("none", "some")[distance % 2])
    return tuple(plan)


def _number(step: int, steps: int, spread: Spread) -> int:
    return steps - 1 - step if spread.down else step


def _interval_at(step: int, steps: int, interval: int, spread: Spread) -> int:
    if spread.sensitive and int(steps * 0.2) <= _number(step, steps, spread) < int(steps * 0.4):
        return 2
    return max(1, round(interval / _ramp(spread.interval, step, steps, spread)))


def _ramp(weight: float, step: int, steps: int, spread: Spread) -> float:
    # The first step has number S - 1 of S where they count down, 0 of S where they count up.
    done = (step + 1 if spread.down else step) / steps
    return 1 - weight + 2 * weight * done


def token_share(ratio: float, spread: Spread, step: int, steps: int, depth: float = 0.0, beside: bool = False) -> float:
    """The part of its tokens on which an MLP runs at a skipped step, from 0 to 1.

    Args:
        ratio: before the factors.
        spread: the factors.
        step, steps: of the run.
        depth: of the block, from 0 (first) to 1 (last).
        beside: the MLP runs beside attention.

    Example:
        >>> token_share(0.07, SPREADS["dit"], 49, 50, depth=1)
        0.63
        >>> token_share(0.07, SPREADS["dit"], 0, 50)
        0.0
    """
    factor = _ramp(spread.step, step, steps, spread) * (1 + spread.depth - 2 * spread.depth * depth)
    return min(1.0, max(0.0, ratio * factor * (spread.joint if beside else spread.mlp)))


@dataclass(frozen=True)
class Layout:
    """Where the modules of one model are: what a token-wise policy must know besides the sites.

    Attributes:
        sites: attention modules and MLPs, those that run side by side as the layers they are made of.
        row_wise: those that may run on some tokens.
        scored: by block, the attention module whose map ranks its tokens.
        depths: by block, from 0 to 1, in the stack of blocks of its kind.
        beside: blocks whose MLP runs beside attention.
        text: by block, where text lies among the tokens of its attention, "first", "last" or "" (there is none).
        cross: there is cross-attention, which differs so much between the halves of a batched guidance that both get
            the same tokens.
    """

    sites: tuple[Site, ...]
    row_wise: frozenset[Site]
    scored: Mapping[int, Site]
    depths: Mapping[int, float]
    beside: frozenset[int] = frozenset()
    text: Mapping[int, str] = field(default_factory=dict)
    cross: bool = False


def layout_of(anatomy: Anatomy, method: str, score: str) -> Layout:
    """Read the layout off a model.

    Raises:
        DitaError: it has no attention, no cross-attention where that is wanted, no MLP that treats each token by
            itself, or does not tell where text tokens lie.
    """
    anatomy.require("module", method)
    parts = anatomy.apart
    row_wise = frozenset(part.site for part in parts if part.row_wise)
    if not row_wise:
        raise DitaError(f"{method} found no MLP in the blocks of {anatomy.name} that treats every token by itself")
    crossing = any(part.site.role == "cross-attention" for part in parts)
    cross = score == "cross" or (score == "auto" and crossing)
    role = "cross-attention" if cross else "attention"
    scored: dict[int, Site] = {}
    for part in parts:
        if part.site.role == role:
            scored.setdefault(part.site.block, part.site)
    if not scored:
        raise DitaError(
            f"{method} found no {role} inside the blocks of {anatomy.name}; expected some to rank tokens by"
        )
    beside = frozenset(part.site.block for part in anatomy.modules if part.site.role == "parallel")
    text = {}
    for block in anatomy.blocks:
        joint = "encoder" in block.entry.returns
        if joint and not block.entry.text:
            raise DitaError(
                f"{method} must know whether text comes first or last in the attention of "
                f"{type(block.module).__name__}, which dita has not been told (dita/models.py lists what it knows)"
            )
        text[block.number] = block.entry.text if joint else ""
    depths = {}
    for kind in (beside, frozenset(text) - beside):
        depths |= {block: n / max(1, len(kind) - 1) for n, block in enumerate(sorted(kind))}
    return Layout(tuple(part.site for part in parts), row_wise, scored, depths, beside, text, crossing)


@dataclass(frozen=True)
class TokenSettings:
    """The settings of `TokenWise`; see ToCa for their meaning."""

    interval: int
    ratio: float
    score: str
    staleness: float
    spread: Spread
    aggressive: bool = False


class TokenWise(Policy):
    """Between computed steps, reuse attention and run MLPs on the tokens of the highest scores.

    Args:
        settings: see there.
        layout: of the model.
    """

    def __init__(self, settings: TokenSettings, layout: Layout) -> None:
        self.settings, self.layout = settings, layout
        self._parts: dict[int, list[torch.Tensor]] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._aged: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}
        self._chosen: dict[tuple[int, int], Fresh | None] = {}
        self._halves: bool | None = None

    def _kind(self, view: View, ahead: int = 0) -> str:
        place = view.position
        plan = plan_steps(place.steps, self.settings.interval, self.settings.spread)
        return plan[min(place.step + ahead, place.steps - 1)]

    def decide(self, view: View) -> Verdict:
        """Follow the plan."""
        kind = self._kind(view)
        if kind == "full":
            return Verdict(True, f"interval {self.settings.interval}")
        if not self.settings.aggressive:
            return Verdict(False, "some tokens", fresh=self._picker(view))
        if kind == "none":
            return Verdict(False, "all blocks bypassed")
        return Verdict(False, "some tokens", computes=lambda site: site.kind == "span", fresh=self._picker(view))

    def wants_attention(self, site: Site, view: View) -> bool:
        """Only at computed steps before a skipped one."""
        return self._kind(view, ahead=1) != "full"

    def attended(self, site: Site, seen: Attended, view: View) -> None:
        """Keep the score of every token [B, N]."""
        batch = view.latents.shape[0] if view.latents is not None else len(seen.q)
        parts = self._parts.setdefault(site.block, [])
        # Image prompts are attended to in further calls; a model may also attend sample by sample.
        if sum(map(len, parts)) >= batch:
            return
        if self.settings.score == "value":
            parts.append(seen.value_lack(self.layout.cross and self._guided(view, len(seen.q))))
        elif site.role == "cross-attention":
            parts.append(1 + seen.row_entropy(self._guided(view, len(seen.q))))
        else:
            parts.append(seen.column_mass())

    def _guided(self, view: View, batch: int) -> bool:
        """Batched guidance shows the model the same latents twice."""
        if self._halves is None:
            latents = view.latents
            even = latents is not None and len(latents) % 2 == 0 and len(latents) == batch
            self._halves = even and torch.equal(*latents.chunk(2))  # pyright: ignore
        return self._halves

    def computed(self, view: View) -> None:
        """Everything is fresh; the new scores replace the old."""
        self._scores |= {block: joined(parts) for block, parts in self._parts.items()}
        self._parts.clear()
        self._aged.clear()
        self._halves = None

    def _picker(self, view: View) -> Callable[[Site, tuple[int, ...]], Fresh | None]:
        self._chosen.clear()
        return lambda site, shape: self._pick(site, shape, view)

    def _pick(self, site: Site, shape: tuple[int, ...], view: View) -> Fresh | None:
        if site not in self.layout.row_wise:
            return None
        beside = site.block in self.layout.beside
        key = (site.block, shape[1])
        if beside and key in self._chosen:
            return self._chosen[key]  # the projection runs on what the layer before it ran on
        fresh = self._choose(site, shape, view, beside)
        self._chosen[key] = fresh
        return fresh

    def _choose(self, site: Site, shape: tuple[int, ...], view: View, beside: bool) -> Fresh | None:
        place, spread, tokens = view.position, self.settings.spread, shape[1]
        depth = self.layout.depths[site.block]
        share = token_share(self.settings.ratio, spread, place.step, place.steps, depth, beside)
        count = int(share * tokens + 1e-6)
        scores = self._scores_of(site, tokens, math.prod(view.grid) if view.grid else 0)
        if scores is None:
            return None
        if site not in self._aged:
            fresh_scores = torch.nn.functional.normalize(scores, dim=1)
            self._aged[site] = (fresh_scores, fresh_scores.clone())
        young, aged = self._aged[site]
        index = choose(self._with_bonus(aged, site, view.grid), count) if count else None
        aged += self.settings.staleness / self.settings.interval
        if index is None:
            return None
        aged.scatter_(1, index, young.gather(1, index))
        return Fresh(index)

    def _scores_of(self, site: Site, tokens: int, image: int) -> torch.Tensor | None:
        """The scores of the tokens that a module reads, of those that the attention saw."""
        if site.block not in self.layout.scored:
            return None
        scores = self._scores.get(site.block)
        if scores is None:
            raise DitaError(
                f"{self.layout.scored[site.block].name} made no call of torch's scaled_dot_product_attention, by which "
                "tokens are to be ranked: choose torch's own attention backend, or a processor that calls it"
            )
        have, text = scores.shape[1], self.layout.text[site.block]
        if have == tokens:
            return scores
        if not text:
            raise DitaError(f"{site.name} reads {tokens} tokens, but its attention ranked {have}; expected as many")
        if site.text and image + tokens != have:
            return None  # masked text that takes no part in attention (Mochi) is not ranked
        return scores[:, :tokens] if (text == "first") == site.text else scores[:, -tokens:]

    def _with_bonus(self, scores: torch.Tensor, site: Site, grid: tuple[int, ...]) -> torch.Tensor:
        image = math.prod(grid) if grid else 0
        spread, count = self.settings.spread, scores.shape[1]
        if not spread.bonus or not image or site.text or count < image:
            return scores
        start = count - image if self.layout.text[site.block] == "first" else 0
        better = cell_bonus(scores[:, start : start + image], grid, spread.bonus, spread.cell)
        return torch.cat([scores[:, :start], better, scores[:, start + image :]], 1)

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """A score of every token that an attention saw, and two, young and aged, of every token that an MLP reads."""
        first = outputs[0]
        if first is None or site.kind != "module":
            return ()
        seen = sum(t.shape[1] for t in outputs if t is not None) if site in self.layout.scored.values() else 0
        aged = 2 * first.shape[1] if self._ages(site) else 0
        return tuple(first.new_empty(len(first), count, dtype=torch.float32) for count in (seen, aged) if count)

    def _ages(self, site: Site) -> bool:
        """An MLP whose tokens are chosen; where it is two layers beside the attention, the first chooses for both."""
        if site not in self.layout.row_wise or site.block not in self.layout.scored:
            return False
        beside = (s for s in self.layout.sites if s.block == site.block and s in self.layout.row_wise)
        return site.block not in self.layout.beside or site == next(beside)

    def bytes_held(self) -> int:
        """Scores, as they were and with what age adds."""
        return bytes_of([*self._scores.values(), *(tensor for pair in self._aged.values() for tensor in pair)])


def token_wise(anatomy: Anatomy, method: str, settings: TokenSettings) -> Recipe:
    """The recipe of ToCa and DuCa."""
    layout = layout_of(anatomy, method, settings.score)
    spans = anatomy.spans(0, len(anatomy.blocks) - 1) if settings.aggressive else ()
    return Recipe(
        what="module",
        when=lambda: TokenWise(settings, layout),
        keep="output",
        sites=(*spans, *layout.sites),
        attend=tuple(layout.scored.values()) if settings.interval > 1 and settings.ratio > 0 else (),
    )


def spread_for(preset: str, anatomy: Anatomy, spreads: Mapping[str, Spread] = SPREADS) -> Spread:
    """The spread of a preset; "auto" is the model's own if it has one, else "even"."""
    if preset == "auto":
        preset = anatomy.family if anatomy.family in spreads else "even"
    return spreads[preset]
