"""What a calibration of the fitted forecast found: kept as safetensors or JSON, and carried over to other runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dita.caching.fitting import Moments
from dita.errors import DitaError
from dita.files import read_tensors
from dita.table import Table

_FORMAT = "dita fitted 1"
_TENSORS = ("gram", "response", "unrest", "timesteps")


class FittedTable(Table):
    """Second moments of a pipeline's runs, the linear map of its scheduler, and what steps cost.

    `values` holds "gram", "response" and "unrest" (see `dita.caching.fitting.Moments`), "timesteps" of the calibrated
    run, scaled to 0..1000, "seconds": what a run takes outside of its steps, for a computed step and for a skipped
    one, "trajectories" that were averaged, and "linear": 1 if the scheduler's step is linear, 0 where that of equal
    steps stands in.
    """

    noun: ClassVar[str] = "fit"

    @cached_property
    def moments(self) -> Moments:
        """The moments, as arrays.

        Raises:
            DitaError: the numbers do not fit each other.
        """
        try:
            arrays = {name: np.asarray(self.values.get(name, ()), dtype=np.float64) for name in _TENSORS}
            size = len(arrays["timesteps"]) + 1
        except (TypeError, ValueError) as error:
            raise DitaError(f"this fit is damaged: {error}; calibrate again") from None
        shapes = {"gram": (size, size), "response": (size, size), "unrest": (size - 1,), "timesteps": (size - 1,)}
        wrong = [name for name in _TENSORS if arrays[name].shape != shapes[name] or not np.isfinite(arrays[name]).all()]
        if wrong or size < 3:
            raise DitaError(f"this fit is damaged: {', '.join(wrong) or 'too few steps'}; calibrate again")
        return Moments(arrays["gram"], arrays["response"], arrays["unrest"])

    def check_parts(self) -> None:
        """Raise `DitaError` unless the numbers are there and fit each other."""
        seconds = self.values.get("seconds", ())
        fine = isinstance(seconds, tuple) and len(seconds) == 3 and all(isinstance(s, (int, float)) for s in seconds)
        if len(self.moments.gram) != self.steps + 1 or not fine:
            raise DitaError("this fit is damaged: its parts do not fit each other; calibrate again")

    @cached_property
    def timesteps(self) -> np.ndarray:
        """Of the calibrated run: float64 [S], falling."""
        return np.asarray(self.values["timesteps"], dtype=np.float64)

    def speedup(self, full: int) -> float:
        """How much faster a run of the calibrated number of steps is with so many computed, by the measured seconds.

        Example:
            >>> FittedTable({"seconds": (1.0, 0.5, 0.0)}, steps=10).speedup(2)
            3.0
        """
        rest, whole, skipped = self.values["seconds"]
        return (rest + self.steps * whole) / (rest + full * whole + (self.steps - full) * skipped)

    def full_for(self, speedup: float, steps: int) -> int:
        """The most steps of a run that may be computed for it to be so much faster.

        What a run takes besides its computed steps may leave too little: the number is then half of what it would be
        if it took nothing, and at least 2.

        Example:
            >>> FittedTable({"seconds": (0.0, 0.5, 0.0)}, steps=50).full_for(4.0, 50)
            12
        """
        rest, whole, skipped = self.values["seconds"]
        if speedup <= 1:
            return steps
        most = ((rest + steps * whole) / speedup - rest - steps * skipped) / max(whole - skipped, 1e-9)
        return int(min(steps, max(2, np.ceil(steps / speedup / 2), np.floor(most + 1e-9))))

    def at(self, timesteps: tuple[float, ...], response: np.ndarray | None) -> Moments:
        """The moments of runs at other timesteps: outputs in between are taken to lie on a line.

        Args:
            timesteps: falling, scaled to 0..1000.
            response: of that run's scheduler; None for equal steps.
        """
        now = np.asarray(timesteps)
        if response is None:
            response = equal_steps(len(now))
        m = self.moments
        if len(now) == self.steps and np.allclose(now, self.timesteps, atol=1e-2):
            return Moments(m.gram, response, m.unrest)
        before, order = self.timesteps, np.argsort(self.timesteps)
        mix = np.stack([np.interp(now, before[order], row[order]) for row in np.eye(len(before))], axis=1)
        # A run that begins later begins with what the calibrated ones had come to by then.
        start = np.stack([np.interp(now[:1], before[order], row[order]) for row in m.response[:-1].T], axis=1)
        lift = np.zeros((len(now) + 1, len(before) + 1))
        lift[:-1, :-1], lift[-1] = mix, start[0]
        return Moments(lift @ m.gram @ lift.T, response, mix @ m.unrest)

    def save(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Write it as safetensors, with the settings of the method in its header."""
        from safetensors.torch import save_file

        tensors = {name: torch.tensor(np.asarray(self.values[name], dtype=np.float64)) for name in _TENSORS}
        kept = {name: value for name, value in self.values.items() if name not in _TENSORS}
        head = {"format": _FORMAT, "settings": dict(settings), "values": kept, "model": self.model}
        head |= {"scheduler": self.scheduler, "shape": list(self.shape), "steps": self.steps}
        save_file(tensors, str(path), {"dita": json.dumps(head, sort_keys=True)})


def read_fit(path: str | Path) -> tuple[FittedTable, dict[str, Any]]:
    """Read what `FittedTable.save` wrote: the table and the settings of the method.

    Raises:
        DitaError: no such file, or not such a file.

    Example:
        >>> table, settings = read_fit("flux.safetensors")  # doctest: +SKIP
    """
    arrays, texts = read_tensors(path, "the fit", "dita.calibrate(..., save=...)")
    try:
        head = json.loads(texts.get("dita", "{}"))
    except (ValueError, RecursionError) as error:
        raise DitaError(f"cannot read the fit {path}: {error}; dita.calibrate(..., save=...) writes it") from None
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise DitaError(f"{path} is no fit of this version of dita; dita.calibrate(..., save=...) writes it")
    try:
        tensors = {name: arrays[name].tolist() for name in _TENSORS}
        table = FittedTable.from_dict({**head, "values": {**head["values"], **tensors}})
        settings = dict(head["settings"])
        table.check_parts()
    except (KeyError, TypeError, ValueError, DitaError) as error:
        raise DitaError(f"the fit {path} is damaged ({error}); calibrate again") from None
    return table, settings


def equal_steps(count: int) -> np.ndarray:
    """The response of a solver that adds up outputs, each as much as the others, to the latents it began with.

    Example:
        >>> equal_steps(2).tolist()
        [[0.0, 0.0, 1.0], [0.5, 0.0, 1.0], [0.5, 0.5, 1.0]]
    """
    response = np.tril(np.full((count + 1, count + 1), 1 / count), -1)
    response[:, -1] = 1.0
    return response
