"""The states of guided runs, from which AGD's adapters learn. See `dita.schedulers.guidance.agd_training`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dita.anatomy import Anatomy, describe
from dita.errors import DitaError
from dita.grid import channel_axis
from dita.loop import Loop, Request, Runner, tensors_of
from dita.watching import watched


@dataclass(frozen=True)
class State:
    """One sample at one step of a guided run.

    Attributes:
        arguments: what the conditional branch is called with, by name; tensors [1, ...].
        timestep: of the training schedule, scaled to 0..1000.
        scale: the guidance scale of the run.
        target: [1, ...], the guided output.
    """

    arguments: dict[str, Any]
    timestep: float
    scale: float
    target: torch.Tensor


class Recorder(Loop):
    """Keeps the states of guided runs, which go on as they would without it. See `dita.loop.Loop`."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self._key: tuple[int, int] | None = None
        self._parts: dict[str, torch.Tensor] = {}
        self._cond: Request | None = None
        self._last: list[State] = []

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        if "third" in request.roles:
            raise DitaError("agd stands for two branches, and this pipeline runs three; switch the third one off")
        result, key = run(request), (request.position.step, request.position.stage)
        output = tensors_of(result)[0]
        if request.roles == ("all",) or request.scale is None or output is None:
            return result
        if key != self._key:
            self._key, self._parts, self._cond = key, {}, None
        for number, role in enumerate(request.roles):
            self._parts[role] = output[number * request.batch : (number + 1) * request.batch]
        if "cond" in request.roles:
            self._cond = request.part("cond")
        if self._cond is not None and "uncond" in self._parts:
            self._record(self._cond, self._parts["cond"], self._parts["uncond"])
            self._parts, self._cond = {}, None
        return result

    def _record(self, request: Request, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        scale = request.scale
        assert scale is not None
        target, latents = uncond + scale * (cond - uncond), request.latents
        if latents.ndim >= 4:
            # Pipelines drop what a model puts out beyond the latents' channels, such as a variance.
            axis = channel_axis(request.anatomy.model, latents)
            count = min(latents.shape[axis], target.shape[axis])
            rest = cond.narrow(axis, count, cond.shape[axis] - count)
            target = torch.cat([target.narrow(axis, 0, count), rest], axis)
        new = []
        for row in range(request.batch):
            one = request.taken([row])
            arguments = {**dict(zip(one.parameters, one.args, strict=False)), **one.kwargs}
            before = self._last[row].arguments if row < len(self._last) else {}
            arguments = {name: _kept(value, before.get(name)) for name, value in arguments.items()}
            new.append(State(arguments, request.position.timestep, scale, target[row : row + 1].detach().clone()))
        self._last = new
        self.states += new


def _kept(value: Any, before: Any) -> Any:
    """A copy; of what did not change since the step before, such as the text, the one that is kept already."""
    if isinstance(value, torch.Tensor):
        same = isinstance(before, torch.Tensor) and before.shape == value.shape and torch.equal(before, value)
        return before if same else value.detach().clone()
    if isinstance(value, (list, tuple)):
        old = before if isinstance(before, (list, tuple)) and len(before) == len(value) else [None] * len(value)
        return type(value)(_kept(v, b) for v, b in zip(value, old, strict=True))
    return value


def spread(number: int, low: float, high: float) -> float:
    """A term of a sequence that fills an interval evenly, however many terms are taken: multiples of the golden ratio.

    Example:
        >>> [round(spread(number, 1.0, 6.0), 2) for number in range(4)]
        [3.5, 1.59, 4.68, 2.77]
    """
    return low + (high - low) * ((0.5 + number * (math.sqrt(5) - 1) / 2) % 1)


def record_states(
    pipe: Any, call: Callable[[Any, float], Any], runs: int, scales: tuple[float, float] = (1.0, 6.0), seed: int = 0
) -> list[State]:
    """Run a pipeline under guidance, as it is without any method, and keep the states that adapters learn from.

    Args:
        pipe: with one transformer.
        call: runs it once at the guidance scale it is given, on other conditioning each time if it likes; torch's
            global generator is seeded before.
        runs: how often.
        scales: between which the scales of the runs lie, spread evenly.
        seed: of the first run; the next ones follow.

    Returns:
        one state for each sample and call of the conditional branch.

    Raises:
        DitaError: two transformers, three branches, or a run without guidance.

    Example:
        >>> states = record_states(pipe, lambda p, w: p("a prompt", guidance_scale=w), 8)  # doctest: +SKIP
    """
    one_transformer(pipe)
    recorder = Recorder()
    with watched(pipe, recorder), torch.no_grad():
        for number in range(runs):
            before, scale = len(recorder.states), spread(number, *scales)
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed + number)
                call(pipe, scale)
            if len(recorder.states) == before:
                raise DitaError(
                    f"the call ran no guided step at a guidance scale of {scale:g}: agd learns from guidance"
                )
    return recorder.states


def one_transformer(pipe: Any) -> Anatomy:
    """What is known of a pipeline's only transformer.

    Raises:
        DitaError: it has several.
    """
    from dita.session import transformers_of

    models = list(transformers_of(pipe).values())
    if len(models) != 1:
        raise DitaError(f"agd's adapters are trained for one transformer, and {type(pipe).__name__} has {len(models)}")
    return describe(models[0])
