"""Measuring what the fitted forecast needs: full runs, and an accelerated one to see how the model takes errors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dita.caching.fitted_table import FittedTable, equal_steps
from dita.errors import DitaError, DitaWarning
from dita.fingerprint import fingerprint
from dita.loop import Loop, Request, Run, Runner, Solver, Step
from dita.response import linear_response
from dita.table import frozen
from dita.watching import watched

_ENTRIES = 16384  # of each sample that the moments are averaged over
_SKEWED = 0.02  # of the last latents' size, by which they may differ from what the linear map makes of the outputs


class Observer(Loop):
    """Watches the outputs after guidance, and the latents, of every run.

    Attributes:
        runs: one list per run: its latents before the first step, then the outputs of each; float32 [S + 1, N] on the
            host, of a fixed choice of entries.
        states: the same entries of the latents before each step and after the last, float32 [S + 1, N].
        seconds: of the steps of each run, from the end of one step to that of the next.
        times: of the steps of the last run, scaled to 0..1000.
        computed: the steps of the first run in which the transformer was computed.
        response: of the scheduler, see `dita.response.linear_response`.
        scheduler, shape: the scheduler's fingerprint, and the shape of the transformer's input without the batch.
    """

    def __init__(self) -> None:
        self.runs: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []
        self.seconds: list[list[float]] = []
        self.times: list[float] = []
        self.response: np.ndarray | None = None
        self.computed: list[int] = []
        self.scheduler, self.shape = "", ()
        self._chosen: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self._states: list[torch.Tensor] = []
        self._since = 0.0

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        if getattr(run.scheduler, "order", 1) != 1:
            raise DitaError(
                f"fitted forecasts outputs of solvers that call the model once a step; {type(run.scheduler).__name__} "
                "calls it twice. Choose another scheduler, or a method such as taylorseer"
            )
        self.scheduler = fingerprint(run.scheduler)
        if not self.runs:
            self.response = linear_response(run.scheduler)
        self._outputs, self._states = [], []

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        tensors = [v for v in (*request.args, *request.kwargs.values()) if isinstance(v, torch.Tensor)]
        self.shape = tuple(tensors[0].shape[1:]) if tensors else ()
        return run(request)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        position = step.position
        if position.index != position.step or step.output.shape != step.sample.shape:
            raise DitaError(
                "fitted is calibrated on whole runs from noise, whose outputs have the shape of the latents; "
                f"this one began at step {position.index - position.step} of {position.schedule_length}, its output is "
                f"{tuple(step.output.shape)} for latents of {tuple(step.sample.shape)}"
            )
        if position.step == 0:
            self.times, self._since = [], time.perf_counter()
            self.seconds.append([])
            self._states = [self._some(step.sample)]
        self.times.append(position.timestep)
        self._outputs.append(self._some(step.output))
        new = solve(step.output, step.sample)
        self._states.append(self._some(new))
        now = time.perf_counter()
        if position.step:
            self.seconds[-1].append(now - self._since)
        self._since = now
        if position.step == position.steps - 1:
            self.runs.append(torch.stack([self._states[0], *self._outputs]))
            self.states.append(torch.stack(self._states))
            self._outputs, self._states = [], []
        return new

    def _some(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same entries of every sample, at every step."""
        flat = tensor.detach().flatten(1)
        if self._chosen is None or len(self._chosen) != min(flat.shape[1], _ENTRIES):
            order = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
            self._chosen = order[:_ENTRIES].sort().values.to(flat.device)
        return flat[:, self._chosen].flatten().float().cpu()


def observe(
    pipe: Any,
    calls: Sequence[Callable[[Any], Any]],
    accelerated: Callable[[FittedTable], Any],
    advance: Callable[[], None] = lambda: None,
    beside: Sequence[Any] = (),
) -> tuple[FittedTable, Any]:
    """Run every call in full, and the first once more with steps skipped.

    Args:
        pipe: the pipeline; it comes back as it was.
        calls: each runs it, once or several times.
        accelerated: makes the method with the fit at hand that the first call is run with again.
        advance: called after every run.
        beside: methods that are at work in all of these runs.

    Returns:
        the table, and what the first call returned in its full run.

    Raises:
        DitaError: the calls ran no whole loop, or loops of different timesteps.
    """
    from dita.session import model_of

    gram, entries, first, trajectories = None, 0, Observer(), 0
    shown, rest, whole = None, [], []
    for number, call in enumerate(calls):
        watcher = first if number == 0 else Observer()
        began = time.perf_counter()
        result = _watched(pipe, watcher, number, call, *beside)
        taken = (time.perf_counter() - began) / max(1, len(watcher.runs))
        if not watcher.runs:
            raise DitaError("the calibration call ran no whole sampling loop: it must run the pipeline once")
        if number == 0:
            shown = result
        for outputs in watcher.runs:
            vectors = torch.cat([outputs[1:], outputs[:1]]).double()
            product = (vectors @ vectors.T).numpy()
            if gram is not None and (gram.shape != product.shape or watcher.times != first.times):
                raise DitaError("the calibration calls run different timesteps; give all of them the same steps")
            gram = product if gram is None else gram + product
            entries += vectors.shape[1]
            trajectories += 1
        steps = [s for run in watcher.seconds for s in run]
        whole.append(float(np.median(steps)) if steps else taken)
        # Against the mean: where other work slows some steps down, that is no time outside of them.
        rest.append(max(0.0, taken - len(first.times) * float(np.mean(steps)) if steps else 0.0))
        advance()
    assert gram is not None
    if len(first.times) < 3:
        raise DitaError(f"a fit needs runs of at least 3 steps; the calibration call ran {len(first.times)}")
    response, linear = first.response, True
    if response is None or not _follows(response, first):
        response, linear = equal_steps(len(first.times)), False
    count = len(first.times)
    values: dict[str, Any] = {
        "gram": (gram / entries).tolist(),
        "response": response.tolist(),
        "unrest": [0.0] * count,
        "timesteps": first.times,
        "seconds": [float(np.median(rest)), float(np.median(whole)), 0.0],
        "trajectories": trajectories,
        "linear": int(linear),
    }
    conditions = (model_of(pipe), first.scheduler, first.shape, count)
    table = FittedTable(frozen(values), *conditions)
    second = Observer()
    _watched(pipe, second, 0, calls[0], accelerated(table), *beside)
    advance()
    values["unrest"], values["seconds"][2] = _compare(first, second, whole[0])
    return FittedTable(frozen(values), *conditions), shown


def rerun(pipe: Any, call: Callable[[Any], Any], *methods: Any) -> np.ndarray:
    """What the first call of a calibration shows with methods attached, from the noise it began with there."""
    return media_of(_watched(pipe, Observer(), 0, call, *methods))


def media_of(shown: Any) -> np.ndarray:
    """The images or frames that a pipeline returned, in [0, 1].

    Args:
        shown: a pipeline's output or its tuple, images of PIL, an array or a tensor.

    Returns:
        float64, of whatever shape they have.

    Raises:
        DitaError: neither images nor frames.

    Example:
        >>> media_of([[np.zeros((2, 2, 3))]]).shape
        (1, 1, 2, 2, 3)
    """
    for name in ("images", "frames", "videos"):
        shown = getattr(shown, name, shown)
    if isinstance(shown, tuple):
        shown = shown[0]
    if isinstance(shown, torch.Tensor):
        shown = shown.detach().float().cpu().numpy()
    if isinstance(shown, (list, tuple)):
        return np.stack([media_of(item) for item in shown])
    array = np.asarray(shown)
    if array.dtype == object or array.dtype.kind not in "uif" or array.ndim < 2:
        raise DitaError(
            f"the call returned {type(shown).__name__}, neither images nor frames: let it return what the pipeline does"
        )
    return array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def psnr_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of media in [0, 1], infinite if they are equal.

    Example:
        >>> psnr_of(np.full((2, 2), 0.1), np.zeros((2, 2)))
        20.0
    """
    error = float(np.square(found - wanted).mean())
    return float("inf") if error == 0 else round(-10 * float(np.log10(error)), 6)


def _watched(pipe: Any, watcher: Observer, seed: int, call: Callable[[Any], Any], *methods: Any) -> Any:
    from dita.session import report

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), watched(pipe, watcher, *methods):
        torch.manual_seed(seed)  # a call without a generator draws the same noise in every run
        result = call(pipe)
        runs = report(pipe).runs
    watcher.computed = list(runs[0].computed_steps if runs else ())
    return result


def _follows(response: np.ndarray, watcher: Observer) -> bool:
    """The latents really are what the linear map makes of the outputs."""
    outputs = watcher.runs[0].double().numpy()
    found = response[-1, :-1] @ outputs[1:] + response[-1, -1] * outputs[0]
    last = watcher.states[0][-1].double().numpy()
    return bool(np.square(found - last).mean() <= _SKEWED**2 * np.square(last).mean())


def _compare(full: Observer, skipping: Observer, whole: float) -> tuple[list[float], float]:
    """How far outputs move when latents do, step by step, and the seconds of a skipped step."""
    steps = len(full.times)
    taken = skipping.seconds[0] if skipping.seconds else []
    skipped = min(float(np.quantile(taken, 0.25)) if taken else 0.0, whole)
    same = skipping.runs and torch.equal(skipping.runs[0][0], full.runs[0][0])
    if not same:
        text = (
            "the calibration call began from other noise when it was run again, so that how the model takes errors is "
            "not known and the schedule may be worse: give it a generator of its own, made within the call"
        )
        warnings.warn(text, DitaWarning, stacklevel=4)
        return [0.0] * steps, skipped
    outputs = (skipping.runs[0][1:] - full.runs[0][1:]).square().mean(1).sqrt().numpy()
    latents = (skipping.states[0][:-1] - full.states[0][:-1]).square().mean(1).sqrt().numpy()
    size = full.states[0][:-1].square().mean(1).sqrt().numpy()
    places = [s for s in skipping.computed if s and latents[s] > 1e-5 * size[s]]
    if not places:
        return [0.0] * steps, skipped
    return np.interp(range(steps), places, outputs[places] / latents[places]).tolist(), skipped
