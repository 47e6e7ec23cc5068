"""Running one setting of a sweep: its images, its time next to plain runs, its operations, its report."""

from __future__ import annotations

import statistics
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import dita
from dita.errors import DitaWarning
from dita.eval.flops import count_flops
from dita.eval.sampling import Sampling, draw
from dita.eval.settings import Setting
from dita.eval.timing import timed

_WINDOW = 5  # latest plain runs that a setting is compared with
_LEAST_PLAIN = 3
_LEAST_TIMED = 2


@dataclass
class Measured:
    """The images of a setting, float32 [samples, 1, 32, 32] in [0, 1], and what it cost, as JSON values."""

    images: torch.Tensor
    cost: dict[str, Any]


@dataclass
class Bench:
    """One pipeline on one device, and the plain runs timed on it so far.

    Attributes:
        pipe: a DiTPipeline without acceleration.
        sampling: what every setting draws.
        plain_repeats: plain runs timed in between the batches of each setting.
        advance: called after each batch, for a progress bar.
        plain_flops: operations of the plain run on the first batch; set by the first `run` of the plain setting.
    """

    pipe: Any
    sampling: Sampling
    plain_repeats: int = 1
    advance: Callable[[], None] = lambda: None
    plain_flops: int | None = None
    plain_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

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
        plain runs of the same batch in between, so that a drift of the machine strikes both. Where there are too few
        batches the first is drawn again.

        Args:
            setting: what to run. The plain setting must come first if ratios are wanted.

        Returns:
            Images and cost. Speedup is the median of the latest five plain runs over the median of this setting's.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DitaWarning)
            setting, calibration = self._calibrated(setting)
            batches = list(self.sampling.batches())
            flops, first, runs = self._counted(setting, batches[0])
            images, seconds = [first], []
            full = [indices for indices in batches[1:] if len(indices) == len(batches[0])]
            spread = len(full) / max(1, self.plain_repeats)
            plain_after = {int((number + 0.5) * spread) for number in range(self.plain_repeats)}
            for position, indices in enumerate(batches[1:]):
                drawn, taken, run = self._timed(setting, indices)
                images.append(drawn)
                runs.append(run)
                if len(indices) == len(batches[0]):
                    seconds.append(taken)
                if setting.method != "plain" and position in plain_after:
                    self._time_plain(indices)
                self.advance()
            while len(seconds) < _LEAST_TIMED:
                seconds.append(self._timed(setting, batches[0])[1])
            if setting.method == "plain":
                self.plain_flops = flops
                self.plain_seconds.extend(seconds)
            while len(self.plain_seconds) < _LEAST_PLAIN:
                self._time_plain(batches[0])
        cost = self._cost(setting, seconds, flops, len(batches[0]))
        cost |= self._reported(setting, [run for run in runs if run is not None])
        if calibration is not None:
            cost["calibration_seconds"] = calibration
        notes = set()
        for warning in caught:
            if issubclass(warning.category, DitaWarning):
                notes.add(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return Measured(torch.cat(images), {**cost, **({"notes": sorted(notes)} if notes else {})})

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

    def _counted(self, setting: Setting, indices: range) -> tuple[int, torch.Tensor, list[Any]]:
        with self._attached(setting):
            flops, images = count_flops(lambda: draw(self.pipe, self.sampling, indices, setting.steps))
            run = dita.report(self.pipe).last if setting.config is not None else None
        self.advance()
        return flops, images, [run]

    def _timed(self, setting: Setting, indices: range) -> tuple[torch.Tensor, float, Any]:
        kept = []
        with self._attached(setting):
            call = lambda: kept.append(draw(self.pipe, self.sampling, indices, setting.steps))  # noqa: E731
            seconds = timed(call, self.device)
            run = dita.report(self.pipe).last if setting.config is not None else None
        return kept[0], seconds, run

    def _time_plain(self, indices: range) -> None:
        self.plain_seconds.append(timed(lambda: draw(self.pipe, self.sampling, indices), self.device))

    def _cost(self, setting: Setting, seconds: list[float], flops: int, batch: int) -> dict[str, Any]:
        middle, plain = statistics.median(seconds), statistics.median(self.plain_seconds)
        return {
            "speedup": 1.0 if setting.method == "plain" else plain / middle,
            "seconds_per_image": middle / batch,
            "plain_seconds_per_image": plain / batch,
            "seconds": [round(value, 5) for value in seconds],
            "plain_seconds": [round(value, 5) for value in self.plain_seconds],
            "flops_per_image": flops / batch,
            "flops_ratio": flops / self.plain_flops if self.plain_flops else None,
        }

    def _reported(self, setting: Setting, runs: list[Any]) -> dict[str, Any]:
        if setting.config is None:
            return {"computed_fraction": setting.steps / self.sampling.steps, "peak_cache_bytes": 0}
        return {
            "computed_fraction": statistics.fmean(run.computed_fraction for run in runs),
            "peak_cache_bytes": max(run.peak_cache_bytes for run in runs),
            "resolved_config": setting.config.to_dict(),
        }
