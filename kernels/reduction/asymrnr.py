"""AsymRnR: queries are reduced and restored, keys and values are reduced, by different amounts at every layer and step.

Sun et al., "AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction and Restoration", ICML 2025,
arXiv 2412.11706.

Where: inside the attention, after normalisation and rotary positions, on image tokens, head by head; text is left
alone. Destinations: one random token of every whole chunk of `chunk` frames x rows x columns. Every other token is
matched to the destination of the smallest squared Euclidean distance; those farthest from theirs are kept so that 1 - r
of the tokens remain, the others are dropped. Keys go where the values' matching says. After the attention a dropped
query gets its destination's output. How much: a table says how redundant q and v are at each layer and step, in tiers
from 0 to 9, and settings which ratio r a tier gets. When: a matching serves `refresh` steps.

The table comes from one run (`dita.calibrate`): the mean likeness of tokens to their nearest destination, 1 for equal
ones, spread over ten tiers from its least to its greatest value. Without a table `q` and `kv` hold everywhere. The
tiers' defaults are the published ones of HunyuanVideo; others: its fast setting adds (5, 0.3) for q; CogVideoX-2B has
q (6, 0.4), (7, 0.8) and kv (8, 0.3), refreshed every 5 steps, fast q (6, 0.6), (7, 0.8) and kv (7, 0.3), (9, 0.4).

Differs from the paper: their tables came with the code and are not ours, ours counts tiers anew; likeness is
1 - d^2 / (|a|^2 + |b|^2), so that layers of different scale compare; chunks shrink to a grid that is smaller; a
matching is made at the first use in its `refresh` steps; branches of guidance apart from each other have their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.attention_view import Attended
from dita.caching.table import Measurement
from dita.config import Method, check_number, check_whole
from dita.errors import DitaError
from dita.kernels.reduction.base import CLAIM
from dita.kernels.reduction.matching import Grid, Matching, draw_destinations, fitting, seed_of
from dita.kernels.reduction.operators import Pruned
from dita.kernels.sparse.handler import SparseHandler
from dita.kernels.sparse.policy import Asked, Policy
from dita.registry import register
from dita.seams import Call, Handler, Site
from dita.table import Table, table_for

TIERS = 10

Ratios = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TierTable(Table):
    """How redundant queries and values are.

    Attributes:
        values: "q" and "kv" -> for each layer, for each step of the run, a tier from 0 to 9, 9 for the most redundant.
            The rest as in `Table`.
    """

    noun: ClassVar[str] = "table of redundancy"
    form: ClassVar[Any] = {"q": [[int]], "kv": [[int]]}

    __hash__ = Table.__hash__

    def tier(self, feature: str, layer: int, step: int, steps: int) -> int:
        """The tier of a layer and step; another number of steps reads the nearest.

        Example:
            >>> TierTable({"q": ((0, 3, 9),), "kv": ((1, 1, 1),)}).tier("q", 0, step=4, steps=5)
            9
        """
        row = self.values[feature][layer]
        return row[
            min(len(row) - 1, step) if len(row) == steps or steps < 2 else round(step * (len(row) - 1) / (steps - 1))
        ]


def ratio_of(tier: int, ratios: Ratios) -> float:
    """The largest ratio whose threshold the tier reaches; 0 for none.

    Example:
        >>> [ratio_of(tier, ((6, 0.4), (7, 0.8))) for tier in (5, 6, 9)]
        [0.0, 0.4, 0.8]
    """
    return max((ratio for threshold, ratio in ratios if tier >= threshold), default=0.0)


def visual(asked: Asked, x: torch.Tensor) -> torch.Tensor:
    """Image tokens of [B, H, N, D], each head a sample: [B H, V, D]."""
    return x[:, :, asked.layout.visual_slice].flatten(0, 1)


class Asymmetric(Policy):
    """Answer the attention of fewer queries over fewer keys.

    Args:
        settings: see there.
        table: tiers; None for the plain ratios.
    """

    def __init__(self, settings: AsymRnR, table: TierTable | None) -> None:
        self.settings, self.table = settings, table

    def ratios(self, asked: Asked) -> tuple[float, float]:
        """How much of queries and of keys goes at this layer and step."""
        settings, table = self.settings, self.table
        if table is None:
            return settings.q, settings.kv
        place = (asked.layer, asked.step, asked.steps)
        return ratio_of(table.tier("q", *place), settings.q_tiers), ratio_of(
            table.tier("kv", *place), settings.kv_tiers
        )

    def attend(self, asked: Asked) -> torch.Tensor:
        """Reduce, attend, restore."""
        asked.reason = self.stays_dense(asked)
        if asked.reason:
            return asked.dense()
        settings, layout = self.settings, asked.layout
        query_ratio, key_ratio = self.ratios(asked)
        cell = fitting(settings.chunk, layout.grid)
        if not layout.visual or not (query_ratio or key_ratio):
            asked.reason = "not redundant enough"
            return asked.dense()
        queries = self._pair(asked, "q", asked.q, query_ratio, cell)
        keys = self._pair(asked, "kv", asked.v, key_ratio, cell)
        q, k, v = asked.q, asked.k, asked.v
        if queries is not None:
            q = _shortened(asked, q, queries)
        mask = None if asked.key_mask is None else asked.key_mask[:, None, None]
        if keys is not None:
            k, v = _shortened(asked, k, keys), _shortened(asked, v, keys)
            if asked.key_mask is not None:
                whole = asked.key_mask[:, None, :, None].float().expand(-1, asked.k.shape[1], -1, 1)
                mask = (_shortened(asked, whole, keys)[..., 0] > 0)[:, :, None]
                mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
        asked.density = q.shape[2] * k.shape[2] / (asked.q.shape[2] * asked.k.shape[2])
        if asked.density == 1:
            asked.reason = "nothing to reduce"
            return asked.dense()
        out = Attended(q, k, v, mask, asked.scale).attend()
        return out if queries is None else _lengthened(asked, out, queries)

    def _pair(self, asked: Asked, name: str, x: torch.Tensor, ratio: float, cell: Grid) -> Pruned | None:
        """The operators of one feature; the matching may be some steps old."""
        if not ratio:
            return None
        settings, period = self.settings, asked.step // self.settings.refresh
        held: tuple[int, tuple[torch.Tensor, ...]] | None = asked.state.get(name)
        if held is None or held[0] != period:
            seed = seed_of(settings.seed, 2 * asked.layer + (name == "kv"), period)
            destinations = draw_destinations(asked.layout.grid, cell, seed, shifted=True)
            asked.state[name] = held = (period, Matching.of(visual(asked, x), destinations).tensors)
        matching = Matching(*held[1])
        count = matching.sources.shape[1] + matching.destinations.shape[1]
        # 10 * (1 - 0.9) is a hair below 1.
        kept = max(0, math.floor(count * (1 - ratio) + 1e-9) - matching.destinations.shape[1])
        return matching.pair(min(kept, matching.sources.shape[1]), mean=settings.mean)


def _shortened(asked: Asked, x: torch.Tensor, pair: Pruned) -> torch.Tensor:
    """Reduced image tokens, then the text: [B, H, M + T, D]."""
    image = pair.reduce(visual(asked, x)).unflatten(0, x.shape[:2])
    return torch.cat([image, x[:, :, asked.layout.text_slice]], 2) if asked.layout.text else image


def _lengthened(asked: Asked, out: torch.Tensor, pair: Pruned) -> torch.Tensor:
    """All tokens in the model's order [B, H, N, D]."""
    text = asked.layout.text
    count = out.shape[2] - text
    image = pair.restore(out[:, :, :count].flatten(0, 1)).unflatten(0, out.shape[:2])
    parts = [out[:, :, count:], image] if asked.layout.text_first else [image, out[:, :, count:]]
    return torch.cat(parts, 2) if text else image


def likeness(x: torch.Tensor, matching: Matching) -> float:
    """Mean of 1 - d^2 / (|a|^2 + |b|^2) over tokens a and their nearest destinations b; 1 if all are equal.

    Args:
        x: [B, N, C].
        matching: of it.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> likeness(x, Matching.of(x, torch.tensor([0])))
        0.5
    """
    squares = x.float().square().sum(-1)
    sources = squares.gather(1, matching.sources.expand(len(x), -1))
    nearest = matching.destinations.expand(len(x), -1).gather(1, matching.nearest)
    both = sources + squares.gather(1, nearest)
    return float((1 - matching.distance / both.clamp_min(1e-12)).mean()) if both.numel() else 1.0


class _Recording(Policy):
    """Watch how alike tokens are, and answer densely."""

    def __init__(self, settings: AsymRnR, seen: dict[str, Any]) -> None:
        self.settings, self.seen = settings, seen

    def attend(self, asked: Asked) -> torch.Tensor:
        """Note the likeness of queries and values."""
        cell = fitting(self.settings.chunk, asked.layout.grid)
        for name, x in (("q", asked.q), ("kv", asked.v)):
            seed = seed_of(self.settings.seed, 2 * asked.layer + (name == "kv"), asked.step)
            tokens = visual(asked, x)
            matching = Matching.of(tokens, draw_destinations(asked.layout.grid, cell, seed, shifted=True))
            kept = self.seen.setdefault(name, {}).setdefault((asked.layer, asked.step), [])
            kept.append(likeness(tokens, matching))
        asked.reason = "calibration"
        return asked.dense()


class _RecordingHandler(SparseHandler):
    """Notes the conditions of the run as well.

    Args:
        sink: where they go; the others see `SparseHandler`.
    """

    def __init__(self, policy: Policy, sites: tuple[Site, ...], text_at: str, sink: Measurement) -> None:
        super().__init__(policy, sites, text_at)
        self.sink = sink

    def begin_call(self, call: Call) -> None:
        """See `Handler.begin_call`."""
        super().begin_call(call)
        self.sink.scheduler, self.sink.steps = call.scheduler, call.position.steps
        self.sink.shape = tuple(call.shapes[0][1:]) if call.shapes else ()


def tiers(seen: dict[tuple[int, int], list[float]], layers: int, steps: int) -> tuple[tuple[int, ...], ...]:
    """Spread what was measured over ten tiers; a step that was not seen is in the lowest.

    Example:
        >>> tiers({(0, 0): [0.2], (0, 1): [0.4, 0.8], (1, 0): [0.7]}, 2, 2)
        ((0, 8), (9, 0))
    """
    means = {place: sum(values) / len(values) for place, values in seen.items()}
    least, most = min(means.values()), max(means.values())
    width = (most - least) or 1.0

    def tier(place: tuple[int, int]) -> int:
        return min(TIERS - 1, int(TIERS * (means.get(place, least) - least) / width + 1e-9))

    return tuple(tuple(tier((layer, step)) for step in range(steps)) for layer in range(layers))


@dataclass(frozen=True)
class _Calibration(Method):
    """Watches, and reduces nothing."""

    settings: AsymRnR = field(default_factory=lambda: AsymRnR(), compare=False)
    sink: Measurement = field(default_factory=Measurement, compare=False)

    name: ClassVar[str] = "asymrnr-calibration"

    def handler(self, anatomy: Anatomy) -> Handler:
        """Experts that share a run, with as many layers each, fill one table."""
        anatomy.require("attention", self.settings.name)
        sites = anatomy.attention_sites
        self.sink.seen["layers"] = max(len(sites), self.sink.seen.get("layers", 0))
        return _RecordingHandler(_Recording(self.settings, self.sink.seen), sites, anatomy.text_at, self.sink)

    @classmethod
    def disabled(cls) -> _Calibration:
        """It never reduces, so that no warning is due."""
        return cls()


@register
@dataclass(frozen=True)
class AsymRnR(Method):
    """AsymRnR's settings.

    Attributes:
        q, kv: parts of the image tokens that go at every layer and step, where there is no table, from 0 to 1.
        q_tiers, kv_tiers: with a table, pairs (tier, ratio): the ratio from that tier on, the largest that applies.
        chunk: frames, rows and columns of a chunk, one token of which is a destination.
        refresh: steps that a matching serves; published: 3, CogVideoX 5, distilled models 1.
        mean: destinations become means with what is dropped to them, which restoring does not undo; else dropped tokens
            are ignored, as published.
        dense_steps: first part of the run, from 0 to 1, in which nothing is reduced; none in the paper.
        seed: of the random destinations.
        table: tiers, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks, or a table of
            another model.

    Example:
        >>> AsymRnR(q=0.5, kv=0.2).label()
        'q=0.5 kv=0.2'
    """

    q: float = 0.4
    kv: float = 0.3
    q_tiers: Ratios = ((7, 0.9),)
    kv_tiers: Ratios = ((8, 0.3),)
    chunk: tuple[int, ...] = (6, 2, 2)
    refresh: int = 3
    mean: bool = False
    dense_steps: float = 0.0
    seed: int = 0
    table: TierTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "asymrnr"
    title: ClassVar[str] = "AsymRnR"
    arxiv: ClassVar[str] = "2412.11706"
    axes: ClassVar[str] = "q and kv inside attention; tokens nearest a destination dropped; q copied back; tiers"
    claims: ClassVar[frozenset[str]] = frozenset({CLAIM})
    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    table_kind: ClassVar[type[Table] | None] = TierTable
    needs_calibration: ClassVar[bool] = True
    shaping: ClassVar[tuple[str, ...]] = ("chunk", "seed")
    citation: ClassVar[str] = """@inproceedings{sun2025asymrnr,
  title={AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction and Restoration},
  author={Sun, Wenhao and Tu, Rong-Cheng and Liao, Jingyi and Jin, Zhao and Tao, Dacheng},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        for name in ("q", "kv", "dense_steps"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("q_tiers", "kv_tiers"):
            for pair in getattr(self, name):
                if not isinstance(pair, tuple) or len(pair) != 2:
                    raise DitaError(f"{name} holds {pair!r}; expected pairs of a tier and a ratio, such as (7, 0.9)")
                check_whole(f"a tier of {name}", pair[0], 0)
                check_number(f"a ratio of {name}", pair[1], 0, 1)
        if not isinstance(self.chunk, tuple) or len(self.chunk) != 3:
            raise DitaError(f"chunk is {self.chunk!r}; expected frames, rows and columns")
        for side in self.chunk:
            check_whole("a side of chunk", side, 1)
        check_whole("refresh", self.refresh, 1)
        check_whole("seed", self.seed, 0)
        if not isinstance(self.mean, bool):
            raise DitaError(f"mean is {self.mean!r}; expected True or False")

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        anatomy.require("attention", self.name)
        sites = anatomy.attention_sites
        table = None if self.table is None else table_for(self.name, self.table, anatomy)
        if table is not None and any(len(table.values.get(name, ())) != len(sites) for name in ("q", "kv")):
            raise DitaError(f"this {table.noun} is not one of {len(sites)} layers: calibrate again")
        policy = Asymmetric(self, table)
        policy.dense_steps = self.dense_steps
        return SparseHandler(policy, sites, anatomy.text_at)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> AsymRnR:
        """Measure the tiers in one dense run; the pipeline comes back as it was."""
        from dita.session import accelerated

        sink = Measurement()
        with accelerated(pipe, _Calibration(self, sink)):
            call(pipe)
        if "q" not in sink.seen:
            raise DitaError(
                "the calibration call ran no sampling loop, or the model does not tell how its tokens lie: it must "
                "run the pipeline once"
            )
        layers = sink.seen["layers"]
        values = {name: tiers(sink.seen[name], layers, sink.steps) for name in ("q", "kv")}
        return replace(self, table=sink.table(TierTable, values, pipe))

    @classmethod
    def decode(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rebuild pairs from JSON."""
        values = super().decode(values)
        for name in ("q_tiers", "kv_tiers"):
            if name in values:
                values[name] = tuple(tuple(pair) for pair in values[name])
        return values

    @classmethod
    def disabled(cls) -> AsymRnR:
        """Nothing reduced, with a table or without."""
        return cls(q=0.0, kv=0.0, q_tiers=(), kv_tiers=())

    @classmethod
    def forced(cls) -> AsymRnR:
        """Half of all, whatever the tier, after one dense step of eight."""
        return cls(0.5, 0.5, ((0, 0.5),), ((0, 0.5),), chunk=(2, 2, 2), dense_steps=0.1)

    @classmethod
    def ladder(cls) -> tuple[AsymRnR, ...]:
        """From mild to strong, alike with a table and without."""
        return (
            cls(q=0.2, kv=0.1, q_tiers=((8, 0.5),), kv_tiers=((9, 0.3),)),
            cls(),
            cls(q=0.6, kv=0.3, q_tiers=((5, 0.3), (7, 0.9))),
            cls(q=0.8, kv=0.5, q_tiers=((4, 0.6), (6, 0.9)), kv_tiers=((6, 0.4),)),
        )
