"""Running one setting of a sweep: its images, its time next to plain runs, its operations, its report."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

import dita
from dita.errors import DitaWarning
from dita.eval.flops import count_flops
from dita.eval.sampling import Sampling, draw
from dita.eval.settings import PLAIN, Setting
from dita.eval.timing import timed

_LEAST_PAIRS = 2
_UNSTEADY = 1.25  # largest over smallest time of the same plain run, above which a setting is marked


@dataclass
class Measured:
    """The images of a setting, float32 [samples, 1, 32, 32] in [0, 1], and what it cost, as JSON values."""

    images: torch.Tensor
    cost: dict[str, Any]


@dataclass
class Bench:
    """One pipeline on one device.

    Attributes:
        pipe: a DiTPipeline without acceleration.
        sampling: what every setting draws.
        pairs: how often a setting is timed side by side with the plain run, at least twice.
        advance: called after each batch, for a progress bar.
        plain_flops: operations of the plain run on the first batch; set by the first `run` of the plain setting.
    """

    pipe: Any
    sampling: Sampling
    pairs: int = 2
    advance: Callable[[], None] = lambda: None
    plain_flops: int | None = None

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def first_batch(self) -> int:
        """Images in the first batch, which is as large as any."""
        return len(next(self.sampling.batches()))

    def run(self, setting: Setting) -> Measured:
        """Draw all images of a setting.

        The first batch warms up and has its operations counted; it is not timed. Every later full batch is timed, and
        some of them are followed at once by the plain run of the same batch, so that whatever else the machine does
        strikes both. Where there are too few batches the first is drawn again.

        Args:
            setting: what to run. The plain setting must come first if the ratio of operations is wanted.

        Returns:
            Images and cost. Speedup is the median over these pairs of plain seconds / own seconds; where the plain
            seconds of the pairs differ by more than a quarter, a note says so.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DitaWarning)
            images, cost = self._measure(setting)
        notes = [str(warning.message) for warning in caught if issubclass(warning.category, DitaWarning)]
        for warning in caught:
            if not issubclass(warning.category, DitaWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        fastest, slowest = min(cost["plain_seconds"]), max(cost["plain_seconds"])
        if slowest > _UNSTEADY * fastest:
            notes.append(f"unsteady machine: the plain run took {fastest:.2f} to {slowest:.2f} s, so doubt the speedup")
        return Measured(images, {**cost, **({"notes": list(dict.fromkeys(notes))} if notes else {})})

    def _measure(self, setting: Setting) -> tuple[torch.Tensor, dict[str, Any]]:
        setting, calibration = self._calibrated(setting)
        first, *rest = self.sampling.batches()
        flops, images, run = self._counted(setting, first)
        parts, runs, seconds, plain = [images], [run], [], []
        full = [indices for indices in rest if len(indices) == len(first)]
        paired = {int((number + 0.5) * len(full) / self.pairs) for number in range(self.pairs)}
        matched = []
        for position, indices in enumerate(rest):
            images, taken, run = self._timed(setting, indices)
            parts.append(images)
            runs.append(run)
            if len(indices) == len(first):
                seconds.append(taken)
                if position in paired:
                    plain.append(self._plain(setting, indices, taken))
                    matched.append(taken)
            self.advance()
        while len(plain) < _LEAST_PAIRS:
            taken = self._timed(setting, first)[1]
            seconds.append(taken)
            plain.append(self._plain(setting, first, taken))
            matched.append(taken)
        if setting.method == PLAIN:
            self.plain_flops = flops
        middle = statistics.median(seconds)
        cost: dict[str, Any] = {
            "speedup": statistics.median(p / own for p, own in zip(plain, matched, strict=True)),
            "seconds_per_image": middle / len(first),
            "plain_seconds_per_image": statistics.median(plain) / len(first),
            "seconds": [round(value, 5) for value in seconds],
            "plain_seconds": [round(value, 5) for value in plain],
            "flops_per_image": flops / len(first),
            "flops_ratio": flops / self.plain_flops if self.plain_flops else None,
            **self._reported(setting, [run for run in runs if run is not None]),
        }
        if calibration is not None:
            cost["calibration_seconds"] = calibration
        return torch.cat(parts), cost

    def _calibrated(self, setting: Setting) -> tuple[Setting, float | None]:
        config = setting.config
        if config is None or not config.needs_calibration:
            return setting, None
        other = replace(self.sampling, samples=1, batch=1, seed=self.sampling.seed + 1)
        kept = []
        taken = timed(
            lambda: kept.append(config.calibrated(self.pipe, lambda pipe: draw(pipe, other, range(1)))),
            self.device,
        )
        return replace(setting, config=kept[0]), taken

    def _attached(self, setting: Setting):
        return nullcontext() if setting.config is None else dita.accelerated(self.pipe, setting.config)

    def _counted(self, setting: Setting, indices: range) -> tuple[int, torch.Tensor, Any]:
        with self._attached(setting):
            flops, images = count_flops(lambda: draw(self.pipe, self.sampling, indices, setting.steps))
            run = dita.report(self.pipe).last if setting.config is not None else None
        self.advance()
        return flops, images, run

    def _timed(self, setting: Setting, indices: range) -> tuple[torch.Tensor, float, Any]:
        kept = []
        with self._attached(setting):
            call = lambda: kept.append(draw(self.pipe, self.sampling, indices, setting.steps))  # noqa: E731
            seconds = timed(call, self.device)
            run = dita.report(self.pipe).last if setting.config is not None else None
        return kept[0], seconds, run

    def _plain(self, setting: Setting, indices: range, taken: float) -> float:
        if setting.method == PLAIN:
            return taken
        return timed(lambda: draw(self.pipe, self.sampling, indices), self.device)

    def _reported(self, setting: Setting, runs: list[Any]) -> dict[str, Any]:
        if setting.config is None:
            return {"computed_fraction": setting.steps / self.sampling.steps, "peak_cache_bytes": 0}
        return {
            "computed_fraction": statistics.fmean(run.computed_fraction for run in runs),
            "peak_cache_bytes": max(run.peak_cache_bytes for run in runs),
            "resolved_config": setting.config.to_dict(),
        }
