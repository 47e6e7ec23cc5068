"""The run clock: which step of which run a transformer call belongs to, read off the scheduler.

A run starts when `set_timesteps` is called and advances when `step` returns. Model calls are never counted as steps:
Heun calls the model twice a step, guidance two or three times, and image-to-image begins in the middle.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dita.fingerprint import fingerprint
from dita.loop import Loop, LoopVariables, Step, StepCall, previous_sample, with_sample
from dita.models import ENDED_TIMESTEPS
from dita.patch import Patch
from dita.response import Schedule, linear_response
from dita.seams import Position

MAX_BRANCHES = 4


class RunClock:
    """Follows one pipeline's scheduler.

    Args:
        scheduler_of: returns the pipeline's present scheduler, which a user may replace at any time.
        on_start: called when a run starts.
        on_finish: called when the last step of a run returned.
        on_step: called when a solver step is finished, after all its stages, with the number of the model called in it
            (the first, if several), its position and the latents; returns the latents to go on from.
        loops: methods that take part in `set_timesteps` and `step`, the first one outermost.
        pipe: the pipeline, for them.
        before: called before a run starts; says whether another clock has taken this one's place.
    """

    def __init__(
        self,
        scheduler_of: Callable[[], Any],
        on_start: Callable[[], None],
        on_finish: Callable[[], None],
        on_step: Callable[[int, Position, torch.Tensor], torch.Tensor] | None = None,
        loops: Sequence[Loop] = (),
        pipe: Any = None,
        before: Callable[[], bool] = lambda: False,
    ) -> None:
        self._scheduler_of, self._before = scheduler_of, before
        self._on_step = on_step
        self._loops, self._pipe, self._variables = tuple(loops), pipe, LoopVariables(pipe)
        self._on_start, self._on_finish = on_start, on_finish
        self._scheduler: Any = None
        self._patches: list[Patch] = []
        self.run = 0
        self.done = 0
        self.running = False
        self.scheduler_fingerprint = ""
        self._begin: int | None = None
        self._timesteps: list[float] | None = None
        self._layout: tuple[int, int, int] | None = None
        self._calls: dict[int, list[str]] = {}
        self._first_step: dict[int, int] = {}
        self._response: tuple[int, np.ndarray | None] = (-1, None)

    def attach(self) -> None:
        """Hook the present scheduler's `set_timesteps`, `step` and what adds noise, on this instance only."""
        self._scheduler = self._scheduler_of()
        hooks = [("set_timesteps", self._set_timesteps), ("step", self._step)]
        for name in ("scale_noise", "add_noise") if self._loops else ():
            if hasattr(self._scheduler, name):
                hooks.append((name, functools.partial(self._add_noise, name)))
        for name, around in hooks:
            patch = Patch(self._scheduler, name, around)
            patch.apply()
            self._patches.append(patch)

    def detach(self) -> None:
        """Leave the scheduler as it was found."""
        while self._patches:
            self._patches.pop().remove()
        self._scheduler = None
        self.running = False

    @property
    def order(self) -> int:
        """Model evaluations per solver step."""
        return max(1, int(getattr(self._scheduler, "order", 1)))

    @property
    def evaluations(self) -> int:
        """Entries of the executed timestep list."""
        return self._length - self.begin

    @property
    def _length(self) -> int:
        """Entries of the timestep list at which a step starts."""
        ended = any(cls.__name__ in ENDED_TIMESTEPS for cls in type(self._scheduler).__mro__)
        return len(self._scheduler.timesteps) - ended

    @property
    def entry(self) -> tuple[int, int]:
        """Run and number of the scheduler's step under way."""
        return (self.run, self.done)

    @property
    def steps(self) -> int:
        """Solver steps of the run."""
        return math.ceil(self.evaluations / self.order)

    @property
    def begin(self) -> int:
        """First executed entry of the full timestep list."""
        if self._begin is None:
            index = getattr(self._scheduler, "begin_index", None)
            return 0 if index is None else int(index)
        return self._begin

    def schedule(self) -> Schedule:
        """The timesteps that are executed, and what the scheduler makes of outputs at them."""
        begin, count = self.begin, self.evaluations
        return Schedule(
            tuple(self._timestep(begin + entry) for entry in range(count)),
            self.order,
            functools.partial(self._response_of, self.run, begin),
        )

    def _response_of(self, run: int, begin: int) -> np.ndarray | None:
        """Measured before the run's first step, and remembered for who asks later."""
        if self._response[0] != run and run == self.run and self.done == 0:
            self._response = (run, linear_response(self._scheduler, begin))
        return self._response[1] if self._response[0] == run else None

    def position(self, model: int, branch: str | None) -> Position | None:
        """Place a call of model number `model`, or return None for a call outside any run.

        A branch that comes twice in one step, or a fifth one, means that something other than this pipeline's loop is
        calling the model: such calls have no place either. Nor have those of another pipeline that shares it, though a
        run of this one was left in the middle.
        """
        if self._variables.elsewhere(self._scheduler_of()):
            return None
        if self._scheduler_of() is not self._scheduler:
            self.detach()
            self.attach()
            self._start()
        if not self.running:
            return None
        calls = self._calls.setdefault(model, [])
        name = branch if branch is not None else f"call {len(calls)}"
        if name in calls or len(calls) >= MAX_BRANCHES:
            return None
        calls.append(name)
        return self._place(model, name)

    def _place(self, model: int, branch: str) -> Position:
        # Settled once the first step told where the run began.
        layout = self._layout or (self.order, self.begin, self._length)
        if self._begin is not None:
            self._layout = layout
        order, begin, length = layout
        step, stage = divmod(self.done, order)
        first = self._first_step.setdefault(model, step)
        return Position(
            step=step,
            steps=math.ceil((length - begin) / order),
            stage=stage,
            branch=branch,
            index=begin // order + step,
            schedule_length=math.ceil(length / order),
            local_step=step - first,
            timestep=self._timestep(begin + self.done),
        )

    def _timestep(self, entry: int) -> float:
        """An entry of the timestep list on the scale of 0..1000; read once a run, because reading waits for a GPU."""
        timesteps = self._timesteps
        if timesteps is None:
            values = torch.as_tensor(self._scheduler.timesteps).flatten().float()
            trained = getattr(getattr(self._scheduler, "config", None), "num_train_timesteps", None) or 1000
            timesteps = self._timesteps = (values * (1000 / trained)).tolist()
        return timesteps[min(entry, len(timesteps) - 1)]

    def _start(self) -> None:
        timesteps = getattr(self._scheduler, "timesteps", None)
        self.running = timesteps is not None and len(timesteps) > 0
        self.scheduler_fingerprint = fingerprint(self._scheduler)
        self.run += 1
        self.done = 0
        self._begin, self._timesteps, self._layout = None, None, None
        self._calls.clear()
        self._first_step.clear()
        self._on_start()

    def _set_timesteps(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scheduler = self._scheduler
        if self._before():
            return scheduler.set_timesteps(*args, **kwargs)
        for loop in reversed(self._loops):
            original = functools.partial(self._through, loop, original)
        result = original(*args, **kwargs)
        self._start()
        return result

    def _through(self, loop: Loop, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return loop.timesteps(self._scheduler, original, args, kwargs)

    def _add_noise(self, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = original(*args, **kwargs)
        if self.running and self.done == 0:
            first = list(inspect.signature(getattr(type(self._scheduler), name)).parameters)[1]
            clean = args[0] if args else kwargs.get(first)
            if isinstance(clean, torch.Tensor) and isinstance(result, torch.Tensor):
                for loop in self._loops:
                    loop.noised(clean, result)
        return result

    def _step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._step_back()
        result = self._solve(original, args, kwargs) if self.running and self._loops else original(*args, **kwargs)
        if not self.running:
            return result
        if self.done == 0:
            self._begin = self._find_begin(args, kwargs)
        result = self._correct(result)
        self.done += 1
        self._calls.clear()
        if self.done >= self.evaluations:
            self.running = False
            self._on_finish()
        return result

    def _step_back(self) -> None:
        """Cosmos asks the scheduler for its x0 first, sets its index back, and steps for good: one step, not two."""
        index = getattr(self._scheduler, "step_index", None)
        if self.running and self._begin is not None and isinstance(index, int):
            self.done = min(self.done, max(index - self._begin, 0))

    def _solve(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the methods on the loop take part in a step."""
        call = StepCall(self._scheduler, original, args, kwargs)
        if not self._calls or not call.readable:
            return original(*args, **kwargs)
        results: list[Any] = []

        def solve(output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            results.append(call.run(output, sample))
            found = previous_sample(results[-1])
            assert found is not None
            return found

        position = self._place(next(iter(self._calls)), "")
        timestep = call.arguments.get("timestep")

        def through(loop: Loop, inner: Any, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            return loop.step(Step(position, self._scheduler, output, timestep, sample, self._pipe), inner)

        chain: Any = solve
        for loop in reversed(self._loops):
            chain = functools.partial(through, loop, chain)
        sample = chain(call.arguments[call.first], call.arguments["sample"])
        if not results:
            results.append(original(*args, **kwargs))
        return results[-1] if previous_sample(results[-1]) is sample else with_sample(results[-1], sample)

    def _correct(self, result: Any) -> Any:
        """Let the latents of a finished step be corrected, in whatever the scheduler wrapped them."""
        whole = (self.done + 1) % self.order == 0 or self.done + 1 >= self.evaluations
        if self._on_step is None or not whole or not self._calls:
            return result
        model = next(iter(self._calls))
        old = previous_sample(result)
        if old is None:
            return result
        new = self._on_step(model, self._place(model, ""), old)
        return result if new is old else with_sample(result, new)

    def _find_begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Tell where the run began from its first step; schedulers without an index are asked by their timestep."""
        index = getattr(self._scheduler, "step_index", None)
        if index is not None:
            return int(index) - 1
        parameters = list(inspect.signature(type(self._scheduler).step).parameters)[1:]
        place = parameters.index("timestep") if "timestep" in parameters else len(args)
        timestep = kwargs.get("timestep", args[place] if place < len(args) else None)
        if timestep is None:
            return 0
        timesteps = torch.as_tensor(self._scheduler.timesteps).flatten()
        matches = (timesteps == torch.as_tensor(timestep, device=timesteps.device).flatten()[0]).nonzero()
        return int(matches[0]) if len(matches) else 0
