"""HyCa: a solver of its own for every cluster of channels, chosen once per model.

Zheng et al., "Let Features Decide Their Own Solvers: Hybrid Feature Caching for Diffusion Transformers", ICLR 2026,
arXiv 2510.04188.

Kept: outputs of every attention and MLP before the adaLN gate. When: the first `warmup` steps, then every
`interval`-th. How: the channels of each module are clustered by how they move (size of first and second differences,
their ratio, the third's, energy, spectral flatness); each cluster takes the solver of the pool with the least squared
error. All solvers being weighted sums of anchors, the forecast is one weighted sum with a vector of weights per
anchor.

Confidence: medium. The appendix with the solvers' exact forms was not available: the pool is reuse, Taylor of order 1
and 2 (TaylorSeer's ladder), Adams-Bashforth 2, BDF2, its trapezoidal correction (Adams-Moulton) and the midpoint rule
(Runge-Kutta), each on slopes between computed steps. On three anchors these are one family, F_0 + k F' plus a multiple
of the slope's change, in which BDF2 comes to Taylor's order 1 and the midpoint rule to its order 2. Differences: the
solver is chosen by its error over the whole skip distance, averaged over its steps, where the paper takes one step
ahead; the calibration looks at the whole run where the paper takes the first few steps.

The squared error is not what an image suffers from: most of it is noise that changes sign from step to step, while the
sampler adds the errors up. `criterion` "drift" is ours and takes the solver whose errors over the run's skipped steps,
at the anchors as they occur, have the least sum. On fashion-dit (interval 4, warm-up 5, 6 images;
eval/results/fashion-dit) it gives 42.2 dB where the paper's criterion gives 37.4 and TaylorSeer 39.9 at order 2; at
interval 3 these are 47.1, 43.5 and 44.6 dB, at 5 38.3, 34.2 and 36.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast, taylor_weights
from dita.caching.history import History
from dita.caching.policy import FixedInterval, View
from dita.caching.table import CalibratedMethod, Measurement, Recorder, measure
from dita.config import check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Call, Features, Site
from dita.table import Table, table_for

_ANCHORS = 3
_TOKENS = 64  # per sample, that the calibration looks at


def _slopes(anchors: Sequence[int]) -> tuple[list[float], list[float]]:
    """Weights of the newest slope between anchors, and of the one before (the same where there are but two)."""
    d1 = anchors[0] - anchors[1]
    new = [1 / d1, -1 / d1, 0.0]
    if len(anchors) < _ANCHORS:
        return new[:2], new[:2]
    d2 = anchors[1] - anchors[2]
    return new, [0.0, 1 / d2, -1 / d2]


def solver_weights(solver: str, k: int, anchors: Sequence[int]) -> list[float]:
    """Weights of one solver of the pool, one per anchor; all sum to 1.

    Args:
        solver: a name in SOLVERS.
        k: steps from the newest anchor to the one forecast.
        anchors: steps of the anchors, newest first, at most 3.

    Example:
        >>> solver_weights("adams-bashforth", 1, [4, 2, 0])
        [1.75, -1.0, 0.25]
    """
    if solver == "reuse" or len(anchors) < 2:
        return [1.0] + [0.0] * (len(anchors) - 1)
    if solver.startswith("taylor"):
        used = taylor_weights(k, anchors[: int(solver[-1]) + 1])
        return used + [0.0] * (len(anchors) - len(used))
    new, old = _slopes(anchors)
    now = [1.0] + [0.0] * (len(anchors) - 1)
    bend = [a - b for a, b in zip(new, old, strict=True)]
    before = [0.0, 1.0] + [0.0] * (len(anchors) - 2)
    gap = anchors[0] - anchors[1]
    # BDF2 over a step as long as the gap, (4 F0 - F1) / 3 + 2/3 gap F', taken k / gap of the way.
    bdf = [(4 * a - b) / 3 + 2 / 3 * gap * s for a, b, s in zip(now, before, new, strict=True)]
    change = {
        "adams-bashforth": [k * (1.5 * a - 0.5 * b) for a, b in zip(new, old, strict=True)],
        "bdf": [k / gap * (b - a) for a, b in zip(now, bdf, strict=True)],
        # Slope halfway, extrapolated from the two slopes.
        "runge-kutta": [k * (s + k / (2 * gap) * c) for s, c in zip(new, bend, strict=True)],
        # The mean of the slope now and the one that Adams-Bashforth's forecast implies.
        "adams-moulton": [k * (s + 0.25 * c) for s, c in zip(new, bend, strict=True)],
    }[solver]
    return [a + c for a, c in zip(now, change, strict=True)]


SOLVERS = ("reuse", "taylor 1", "taylor 2", "adams-bashforth", "bdf", "runge-kutta", "adams-moulton")


@lru_cache(maxsize=256)
def pool_weights(k: int, anchors: tuple[int, ...]) -> torch.Tensor:
    """Weights of every solver of the pool: float32 [solvers, anchors].

    Example:
        >>> pool_weights(1, (2, 0))[0]
        tensor([1., 0.])
    """
    return torch.tensor([solver_weights(solver, k, anchors) for solver in SOLVERS])


def describe_channels(features: torch.Tensor) -> torch.Tensor:
    """How each channel moves over the steps.

    Args:
        features: float32 [S, T, C]: steps, tokens, channels; S at least 4.

    Returns:
        float32 [C, 6], each column standardised.

    Example:
        >>> describe_channels(torch.randn(8, 4, 5)).shape
        torch.Size([5, 6])
    """
    first = features.diff(dim=0)
    second = first.diff(dim=0)
    third = second.diff(dim=0)
    sizes = [d.square().mean((0, 1)).clamp_min(1e-12).sqrt() for d in (features, first, second, third)]
    power = torch.fft.rfft(features - features.mean(0), dim=0).abs().square().mean(1)[1:].clamp_min(1e-20)
    flatness = power.log().mean(0).exp() / power.mean(0)
    columns = [sizes[1] / sizes[0], sizes[2] / sizes[0], sizes[0], sizes[3] / sizes[1], sizes[2] / sizes[1], flatness]
    table = torch.stack([column.log() for column in columns], 1)
    return (table - table.mean(0)) / table.std(0).clamp_min(1e-6)


def cluster(points: torch.Tensor, count: int, rounds: int = 20) -> torch.Tensor:
    """K-means from the points furthest apart, so that the same points always give the same clusters.

    Args:
        points: float32 [N, D].
        count: clusters, at most N.

    Returns:
        int64 [N] of cluster numbers.

    Example:
        >>> cluster(torch.tensor([[0.0], [0.1], [5.0]]), 2).tolist()
        [1, 1, 0]
    """
    centres = points[points.norm(dim=1).argmax()][None]
    while len(centres) < count:
        far = torch.cdist(points, centres).amin(1).argmax()
        centres = torch.cat([centres, points[far][None]])
    groups = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        for number in range(count):
            if (groups == number).any():
                centres[number] = points[groups == number].mean(0)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, groups):
            break
        groups = moved
    return groups


def equal_gaps(length: int, interval: int) -> list[tuple[tuple[int, ...], int]]:
    """Three anchors and a step to forecast from them, for all places of equal intervals in a run.

    Args:
        length: steps.
        interval: of the schedule; runs too short for three anchors are judged on shorter intervals.

    Example:
        >>> equal_gaps(7, 2)
        [((4, 2, 0), 5), ((5, 3, 1), 6)]
    """
    interval = max(1, min(interval, (length - 2) // 2))
    newest = range(2 * interval, length - 1)
    ahead = range(1, max(2, interval))
    return [((n, n - interval, n - 2 * interval), n + k) for n in newest for k in ahead if n + k < length]


def scheduled(length: int, interval: int, warmup: int) -> list[tuple[tuple[int, ...], int]]:
    """The anchors and the step to forecast from them, as they occur in a run on the method's schedule.

    Example:
        >>> scheduled(7, 3, 2)
        [((1, 0), 2), ((1, 0), 3), ((4, 1, 0), 5), ((4, 1, 0), 6)]
    """
    computed = list(filter(FixedInterval(interval, warmup).due, range(length)))
    kept = [s for s in computed if s >= warmup - 2]
    anchors = [(tuple(a for a in reversed(kept) if a < s)[:_ANCHORS], s) for s in range(length) if s not in computed]
    return [(before, s) for before, s in anchors if before]


def choose(
    features: torch.Tensor, groups: torch.Tensor, cases: Sequence[tuple[tuple[int, ...], int]], criterion: str
) -> list[int]:
    """The best solver for each cluster.

    Args:
        features: float32 [S, T, C].
        groups: int64 [C].
        cases: anchors, newest first, and the step forecast from them.
        criterion: "error", the least sum of squared errors, or "drift", the least square of the errors' sum.

    Returns:
        numbers in SOLVERS, one per cluster.

    Example:
        Noise is what a squared error sees; over a run it cancels, and falling behind does not:

        >>> rising = 0.1 * torch.arange(40.0)[:, None, None]
        >>> noisy = rising + torch.randn(40, 64, 1, generator=torch.Generator().manual_seed(0))
        >>> one = torch.zeros(1, dtype=torch.long)
        >>> [SOLVERS[choose(noisy, one, equal_gaps(40, 4), c)[0]] for c in ("error", "drift")]
        ['reuse', 'taylor 1']
    """
    squares = torch.zeros(len(SOLVERS), features.shape[-1])
    sums = torch.zeros(len(SOLVERS), *features.shape[1:])
    for anchors, step in cases:
        weights = pool_weights(step - anchors[0], anchors).to(features.dtype)
        errors = torch.einsum("sa,atc->stc", weights, features[list(anchors)]) - features[step]
        squares += errors.square().mean(1)
        sums += errors
    found = squares if criterion == "error" else sums.square().mean(1)
    return [int(found[:, groups == g].sum(1).argmin()) for g in range(int(groups.max()) + 1)]


@dataclass(frozen=True)
class SolverTable(Table):
    """The solver of each channel: "site, output" -> numbers in the pool."""

    noun: ClassVar[str] = "choice of solvers"
    form: ClassVar[Any] = {str: [int]}

    __hash__ = Table.__hash__

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        if any(max(row) >= len(SOLVERS) for row in self.values.values()):
            raise ValueError(f"there are {len(SOLVERS)} solvers")


@dataclass(frozen=True)
class Hybrid(Forecast):
    """A forecast with a solver per channel.

    Attributes:
        table: "site, output" -> the solver of each channel.
    """

    table: SolverTable = field(default_factory=lambda: SolverTable({}))

    @cached_property
    def chosen(self) -> dict[str, torch.Tensor]:
        """The table as tensors."""
        return {name: torch.tensor(solvers) for name, solvers in self.table.values.items()}

    def pool(self, k: int, anchors: tuple[int, ...]) -> torch.Tensor:
        """`pool_weights`, with Taylor's order 1 or reuse in place of solvers that amplify too much.

        Example:
            >>> Hybrid(2, amplification=3).pool(5, (2, 1))[1]
            tensor([1., 0.])
        """
        rows = pool_weights(k, anchors)
        if not self.amplification:
            return rows
        within = rows.abs().sum(1, keepdim=True) <= self.amplification + 1e-5
        return torch.where(within, rows, rows[1] if within[1] else rows[0])

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        """See `Forecast.forecast`; outputs that the calibration did not see take Taylor's order 1."""
        steps = tuple(history.steps)
        rows = self.pool(call.position.step - steps[0], steps)
        results: list[torch.Tensor | None] = []
        for number, newest in enumerate(history.newest):
            chosen = self.chosen.get(f"{site.name}, {number}")
            if newest is None:
                results.append(None)
            elif chosen is None or len(chosen) != newest.shape[-1]:
                results.append(history.combine(rows[1].tolist(), only=number)[0])
            else:
                weights = rows[chosen].T.contiguous().to(newest.device)
                results.append(history.combine(weights, only=number)[0])
        return tuple(results)


class _Recorder(Recorder):
    """Keeps some tokens of every module's outputs at every step."""

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Keep them on the host."""
        if site.kind != "module":
            return
        for number, new in enumerate(outputs):
            if new is not None and new.ndim == 3:
                stride = max(1, new.shape[1] // _TOKENS)
                kept = self.sink.seen.setdefault(f"{site.name}, {number}", {}).setdefault(view.position.stream, [])
                kept.append(new[:, ::stride].flatten(0, 1).float().cpu())


@register
@dataclass(frozen=True)
class HyCa(CalibratedMethod, ForecastingMethod):
    """HyCa's settings.

    Attributes:
        interval: one computed step, then interval - 1 forecast ones; 1 computes all. Published: 4 to 7 for FLUX, 3, 6
            and 8 for Qwen-Image, 6 for HunyuanVideo, 2 for four-step models.
        warmup: first steps that are all computed.
        clusters: of the channels of each module.
        criterion: "error" (published): the solver of least squared error; or "drift": of the least sum of errors over
            a run on this schedule, which see above.
        table: the solver of every channel, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model.

    Example:
        >>> HyCa(interval=7).label()
        'interval=7'
    """

    interval: int = 5
    warmup: int = 3
    clusters: int = 3
    criterion: str = "error"
    table: SolverTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "hyca"
    table_kind: ClassVar[type[Table] | None] = SolverTable
    title: ClassVar[str] = "HyCa"
    arxiv: ClassVar[str] = "2510.04188"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "modules; fixed interval; a solver per cluster of channels"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    bound: ClassVar[bool] = False
    citation: ClassVar[str] = """@inproceedings{zheng2026hyca,
  title={Let Features Decide Their Own Solvers: Hybrid Feature Caching for Diffusion Transformers},
  author={Zheng, Shikang and Chen, Guantao and Zhou, Qinming and Lin, Yuqi and He, Lixuan and Zou, Chang and
    Cai, Peiliang and Liu, Jiacheng and Zhang, Linfeng},
  booktitle={International Conference on Learning Representations},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 1)
        check_whole("clusters", self.clusters, 1, 16)
        if self.criterion not in ("error", "drift"):
            raise DitaError(f"criterion is {self.criterion!r}; expected 'error' or 'drift'")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over modules."""
        table = SolverTable({}) if self.interval == 1 else table_for(self.name, self.table, anatomy)
        return Recipe(
            what="module",
            when=lambda: FixedInterval(self.interval, self.warmup),
            how=Hybrid(_ANCHORS - 1, amplification=self.amplification, table=table),
            keep="output",
            oldest_anchor=self.warmup - 2,
        )

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> HyCa:
        """Cluster the channels and choose the solvers in one full run; the pipeline comes back as it was."""

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            anatomy.require("module", self.name)
            watch = tuple(part.site for part in anatomy.modules)
            return Recipe(what="trunk", when=lambda: _Recorder(sink), watch=watch)

        sink = measure(pipe, call, build)
        values = {}
        for name, streams in sink.seen.items():
            length = min(map(len, streams.values()))  # Heun's second stage has one step less
            features = torch.cat([torch.stack(kept[:length]) for kept in streams.values()], dim=1)
            if len(features) < 4:
                raise DitaError(f"hyca needs a calibration run of at least 4 steps, got {len(features)}")
            cases = equal_gaps(len(features), self.interval)
            if self.criterion == "drift":
                cases = scheduled(len(features), self.interval, self.warmup)
            if not cases:
                raise DitaError(
                    f"hyca chooses by the steps that its schedule skips, but of the {len(features)} of the calibration "
                    f"run it skips none at interval {self.interval} and warm-up {self.warmup}: run more steps"
                )
            groups = cluster(describe_channels(features), min(self.clusters, features.shape[-1]))
            solvers = choose(features, groups, cases, self.criterion)
            values[name] = [solvers[g] for g in groups.tolist()]
        return replace(self, table=sink.table(SolverTable, values, pipe))

    @classmethod
    def disabled(cls) -> HyCa:
        """Every step computed; needs no calibration."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> HyCa:
        """Every other step forecast."""
        return cls(interval=2, warmup=1)

    @classmethod
    def ladder(cls) -> tuple[HyCa, ...]:
        """Intervals 3 to 7 by either criterion, with a warm-up of 5 as for TaylorSeer."""
        return tuple(cls(interval=n, warmup=5, criterion=c) for c in ("error", "drift") for n in (3, 4, 5, 7))
