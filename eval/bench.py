"""Running one setting of a sweep: its samples, its time next to plain runs, its operations, its report."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import dita
from dita.errors import DitaError, DitaWarning
from dita.eval.composition import Composition
from dita.eval.flops import count_flops
from dita.eval.group import Group
from dita.eval.memory import resident_growth
from dita.eval.peers import Peer
from dita.eval.sampling import Drawn, Sampling, draw
from dita.eval.settings import PLAIN, Setting, digest
from dita.eval.timing import timed

_LEAST_PAIRS = 2
_UNSTEADY = 1.25  # largest over smallest time of the same plain run, above which a setting is marked
_TRAINING = 1000  # samples that a training draws from
_LETTERS = {
    "computed": "C", "low-bit": "L", "sparse": "S", "partial": "P", "reused": "R", "forecast": "F", "skipped": "N"
}  # fmt: skip

Observe = Callable[[Drawn, range], None]


@dataclass
class Cost:
    """What one process measured of a setting; `merge` makes a row's numbers of several."""

    flops: int = 0
    first_batch: int = 0
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)  # own seconds next to each of plain_seconds
    computed: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    memory_bytes: int | None = None  # of the GPU
    resident_bytes: int | None = None  # by which the process grew, on a CPU
    timeline: dict[str, str] = field(default_factory=dict)
    calibration_seconds: float | None = None
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    density: list[float] = field(default_factory=list)  # of the attention, where a method thins it


@dataclass
class Bench:
    """One pipeline on one device.

    Attributes:
        pipe: a pipeline without acceleration.
        sampling: what every setting draws, all processes together.
        pairs: how often a setting is timed side by side with the plain run, as a rule twice or more.
        group: the processes that share the batches.
        advance: called after each batch, for a progress bar.
    """

    pipe: Any
    sampling: Sampling
    pairs: int = 2
    group: Group = Group()
    advance: Callable[[], None] = lambda: None
    _tables: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def batches(self) -> list[range]:
        """Indices of the calls of this process."""
        batches = list(self.sampling.batches())
        if len(batches) < self.group.size:
            raise DitaError(
                f"{self.sampling.samples} samples in batches of {self.sampling.batch} are {len(batches)} calls, too "
                f"few for {self.group.size} processes; draw more samples or make the batches smaller"
            )
        return self.group.share(batches)

    def run(self, setting: Setting, observe: Observe) -> Cost:
        """Draw this process's samples of a setting and hand each batch to `observe`.

        The first batch warms up and has its operations counted; it is not timed. Every later full batch is timed, and
        some of them are followed at once by the plain run of the same batch, so that whatever else the machine does
        strikes both. Where there are too few batches the first is drawn again.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DitaWarning)
            cost = self._measure(setting, observe)
        ours = [warning for warning in caught if issubclass(warning.category, DitaWarning)]
        for warning in caught:
            if warning not in ours:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        cost.notes += [str(warning.message) for warning in ours]
        fastest, slowest = min(cost.plain_seconds), max(cost.plain_seconds)
        if slowest > _UNSTEADY * fastest:
            took = f"the plain run took {fastest:.2f} to {slowest:.2f} s"
            cost.notes.append(f"unsteady machine: {took}, so doubt the speedup")
        return cost

    def _measure(self, setting: Setting, observe: Observe) -> Cost:
        cost = Cost(computed=[] if setting.config else [setting.steps / self.sampling.steps])
        setting, cost.calibration_seconds = self._calibrated(setting)
        cost.config = compact(setting.config.to_dict()) if setting.config else None
        first, *rest = self.batches
        cost.first_batch = len(first)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._attached(setting, cost, first=True), resident_growth() as growth:
            cost.flops, drawn = count_flops(lambda: draw(self.pipe, self.sampling, first, setting.steps))
        if self.device.type == "cuda":
            cost.memory_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            cost.resident_bytes = growth.bytes
        observe(drawn, first)
        self.advance()
        full = [indices for indices in rest if len(indices) == len(first)]
        paired = {int((number + 0.5) * len(full) / self.pairs) for number in range(self.pairs)}
        for position, indices in enumerate(rest):
            drawn, taken = self._timed(setting, indices, cost)
            observe(drawn, indices)
            if len(indices) == len(first):
                cost.seconds.append(taken)
                if position in paired:
                    self._pair(setting, indices, taken, cost)
            self.advance()
        while len(cost.plain_seconds) < min(_LEAST_PAIRS, self.pairs):
            taken = self._timed(setting, first, Cost())[1]
            cost.seconds.append(taken)
            self._pair(setting, first, taken, cost)
        return cost

    def _calibrated(self, setting: Setting) -> tuple[Setting, float | None]:
        config = setting.config
        if config is None or not config.uncalibrated:
            return setting, None
        spent: list[float] = []

        def measure(part: Any, beside: Sequence[Any] = ()) -> Any:
            found, taken = self._measured(part, setting.steps, beside)
            spent.append(taken)
            return found

        config = config.calibrated(measure) if isinstance(config, Composition) else measure(config)
        return replace(setting, config=config), sum(spent)

    def _measured(self, config: Any, steps: int, beside: Sequence[Any]) -> tuple[Any, float]:
        """A calibrated method, and the seconds that took; what serves several of its settings is measured once."""
        shaping: tuple[str, ...] | None = None if beside else getattr(config, "shaping", None)
        shape = (config.name, steps, *(getattr(config, name) for name in shaping or ()))
        if shaping is not None and shape in self._tables:
            table, taken = self._tables[shape]  # the seconds are what this setting alone would have taken
            return config.replace(table=table), taken
        trained: bool = getattr(config, "trained", False)
        drawn: int = getattr(config, "trajectories", 1)
        other = replace(self.sampling, samples=_TRAINING if trained else drawn, batch=1, seed=self.sampling.seed + 1)

        def run(pipe: Any) -> None:
            # What is trained seeds torch anew for every run and wants another sample each time.
            index = int(torch.randint(_TRAINING, (1,))) if trained else 0
            draw(pipe, other, range(index, index + drawn), steps)

        kept = []

        def calibrate() -> None:
            kept.append(
                dita.calibrate(self.pipe, config, run, beside=beside) if beside else config.calibrated(self.pipe, run)
            )

        taken = timed(calibrate, self.device)
        if shaping is not None:
            self._tables[shape] = kept[0].table, taken
        return kept[0], taken

    @contextmanager
    def _attached(self, setting: Setting, cost: Cost, first: bool = False) -> Iterator[None]:
        if setting.config is None:
            yield
        elif isinstance(setting.config, Peer):
            with setting.config.attached(self.pipe) as counter:
                yield
            cost.computed.append(counter.full_calls_fraction)
        else:
            config = setting.config
            with dita.accelerated(self.pipe, *(config.parts if isinstance(config, Composition) else (config,))):
                yield
                run = dita.report(self.pipe).last
            # The pipeline's call may be shorter than the plain one; what a method leaves out of it is in the records.
            cost.computed.append(run.computed_fraction * run.length / self.sampling.steps)
            if run.density < 1:
                cost.density.append(run.density)
            cost.cache_bytes.append(run.peak_cache_bytes)
            if first:
                cost.timeline = timeline(run)

    def _timed(self, setting: Setting, indices: range, cost: Cost) -> tuple[Drawn, float]:
        kept: list[Drawn] = []
        with self._attached(setting, cost):
            call = lambda: kept.append(draw(self.pipe, self.sampling, indices, setting.steps))  # noqa: E731
            seconds = timed(call, self.device)
        return kept[0], seconds

    def _pair(self, setting: Setting, indices: range, taken: float, cost: Cost) -> None:
        plain = taken
        if setting.method != PLAIN:
            plain = timed(lambda: draw(self.pipe, self.sampling, indices), self.device)
        cost.plain_seconds.append(plain)
        cost.matched.append(taken)


def compact(config: dict[str, Any], most: int = 2000) -> dict[str, Any]:
    """Put the digest of a measured table in its place where it is long, so that a row stays readable.

    Args:
        config: a method's or peer's `to_dict`.
        most: characters of JSON up to which a setting is kept.

    Example:
        >>> compact({"method": "bac", "settings": {"updates": 30, "table": [0.5] * 1000}})["settings"]["updates"]
        30
    """
    settings = {
        name: {"digest": digest(value)} if len(json.dumps(value)) > most else value
        for name, value in config["settings"].items()
    }
    return {**config, "settings": settings}


def timeline(run: Any) -> dict[str, str]:
    """Write what each transformer call of a run did, by branch: C computed, R reused, F forecast.

    Args:
        run: a `RunReport`.

    Example:
        >>> timeline(dita.report(pipe).last)  # doctest: +SKIP
        {'cond': 'CCRRF', 'uncond': 'CCRRF'}
    """
    streams = run.settle().streams()
    models = {model for model, _, _ in streams}
    lines = {}
    for (model, branch, stage), records in streams.items():
        name = branch if stage == 0 else f"{branch}/{stage}"
        name = name if len(models) == 1 else f"{model} {name}"
        lines[name] = "".join(_LETTERS[record.action] for record in records)
    return lines


def _mean(name: str, costs: list[Cost]) -> dict[str, float]:
    values = [x for cost in costs for x in getattr(cost, name)]
    return {name: statistics.fmean(values)} if values else {}


def merge(costs: list[Cost], plain_flops: float | None) -> dict[str, Any]:
    """Make a row's numbers of what each process measured.

    Args:
        costs: one of each process, by rank; operations and timeline are those of the first.
        plain_flops: operations per sample of the plain run, or None.

    Returns:
        JSON values. Speedup is the median over all pairs of plain seconds / own seconds.
    """
    first = costs[0]
    joined = {
        name: [x for cost in costs for x in getattr(cost, name)] for name in ("seconds", "plain_seconds", "matched")
    }
    flops = first.flops / first.first_batch
    pairs = zip(joined["plain_seconds"], joined["matched"], strict=True)
    row: dict[str, Any] = {
        "speedup": statistics.median(plain / own for plain, own in pairs),
        "seconds_per_image": statistics.median(joined["seconds"]) / first.first_batch,
        "plain_seconds_per_image": statistics.median(joined["plain_seconds"]) / first.first_batch,
        "seconds": [round(value, 5) for value in joined["seconds"]],
        "plain_seconds": [round(value, 5) for value in joined["plain_seconds"]],
        "flops_per_image": flops,
        "flops_ratio": flops / plain_flops if plain_flops else None,
        "computed_fraction": statistics.fmean(x for cost in costs for x in cost.computed),
        **_mean("density", costs),
        "peak_cache_bytes": max((x for cost in costs for x in cost.cache_bytes), default=0),
        "processes": len(costs),
    }
    if first.timeline:
        row["timeline"] = first.timeline
    if first.config is not None:
        row["resolved_config"] = first.config
    if first.memory_bytes is not None:
        row["peak_memory_bytes"] = max(cost.memory_bytes or 0 for cost in costs)
    if first.resident_bytes is not None:
        row["peak_resident_bytes"] = max(cost.resident_bytes or 0 for cost in costs)
    if first.calibration_seconds is not None:
        row["calibration_seconds"] = first.calibration_seconds
    notes = list(dict.fromkeys(note for cost in costs for note in cost.notes))
    return {**row, **({"notes": notes} if notes else {})}
