"""The few steps that follow a fine run best: by its own slopes, or by those that the model gives on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dita.errors import DitaError
from dita.loop import Solver, Step
from dita.schedulers.timesteps.tracing import Trace, Watcher, same_start
from dita.watching import watched


def jump_errors(path: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """How far one step of first order leads from the path that it starts on.

    Args:
        path: float64 [N + 1, D], the states of a run in straight coordinates.
        u: float64 [N + 1], where they stand; see `straightened`.

    Returns:
        float64 [N + 1, N + 1]: root mean square over D of the error at j of a jump from i; infinite for j <= i.

    Example:
        >>> u = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        >>> jump_errors((u**2)[:, None], u)[0]
        tensor([   inf, 0.0000, 0.5000], dtype=torch.float64)
    """
    count = len(u)
    errors = torch.full((count, count), torch.inf, dtype=torch.float64)
    for i in range(count - 1):
        slope = (path[i + 1] - path[i]) / (u[i + 1] - u[i])
        reached = path[i] + (u[i + 1 :] - u[i])[:, None] * slope
        errors[i, i + 1 :] = (reached - path[i + 1 :]).square().mean(1).sqrt()
        errors[i, i + 1] = 0  # the step that the path itself made
    return errors


def best_paths(costs: torch.Tensor) -> dict[int, list[int]]:
    """For each number of jumps, the path from the first to the last place whose jumps cost least in sum.

    Args:
        costs: float64 [N + 1, N + 1], of a jump from i to j; infinite where there is none.

    Returns:
        number of jumps, 1 to N - 1 -> where they start.

    Example:
        >>> costs = torch.tensor([[torch.inf, 1, 5, 9], [torch.inf, torch.inf, 1, 2], [torch.inf] * 2 + [1.0] * 2])
        >>> best_paths(torch.cat([costs, torch.full((1, 4), torch.inf)]))
        {1: [0], 2: [0, 1]}
    """
    last = len(costs) - 1
    best = torch.full((len(costs),), torch.inf, dtype=torch.float64)
    best[0] = 0
    came: list[torch.Tensor] = []
    paths: dict[int, list[int]] = {}
    for jumps in range(1, last):
        best, start = (best[:, None] + costs).min(0)
        came.append(start)
        path = [last]
        for step in reversed(range(jumps)):
            path.append(int(came[step][path[-1]]))
        paths[jumps] = path[:0:-1]
    return paths


class Visiting(Watcher):
    """Runs all fine steps, each from a state that was set beforehand, and writes down the slopes there."""

    def __init__(self, pipe: Any, fine: Trace, states: Sequence[torch.Tensor]) -> None:
        super().__init__(fine.name, pipe)
        self.fine, self.visited = fine, states
        self.slopes: list[torch.Tensor] = []

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        fine, number = self.fine, step.position.step
        found = solve(step.output, step.sample)
        start, end = step.sample.double() / fine.scale[number], found.double() / fine.scale[number + 1]
        self.slopes.append((end - start) / (fine.u[number + 1] - fine.u[number]))
        if self.trace is not None and number == 0:
            self.trace.states.append(step.sample.detach().clone())
        return (self.visited[number + 1] * fine.scale[number + 1]).to(found.dtype)


def student_paths(pipe: Any, call: Callable[[Any], Any], fine: Trace, rounds: int) -> dict[int, list[int]]:
    """The paths on which a sampler of few steps, on its own states, comes nearest to the fine run.

    Args:
        pipe: the pipeline.
        call: runs it as it was run for `fine`, from the same noise.
        fine: the run to follow.
        rounds: most steps; the call is run once for each.

    Returns:
        number of steps, 1 to `rounds` -> where they start.

    Raises:
        DitaError: the scheduler is a multistep solver, or the call begins from other noise each time.

    Example:
        >>> student_paths(pipe, call, trace("m", pipe, call), 10)[10]  # doctest: +SKIP
        [0, 2, 4, 6, 8, 11, 16, 23, 36, 45]
    """
    if len(getattr(pipe.scheduler, "model_outputs", ())) > 1:
        raise DitaError(
            f"the published search of {fine.name} asks for slopes at states off the path, which a multistep solver "
            f"such as {type(pipe.scheduler).__name__} mixes with those before; leave out rounds"
        )
    target = [state.double() / scale for state, scale in zip(fine.states, fine.scale, strict=True)]
    reached: dict[int, tuple[torch.Tensor, list[int]]] = {0: (target[0], [])}
    chosen: dict[int, list[int]] = {}
    for jumps in range(1, rounds + 1):
        visiting = Visiting(pipe, fine, [reached.get(n, (target[n],))[0] for n in range(fine.steps + 1)])
        with watched(pipe, visiting):
            call(pipe)
        if visiting.trace is None or len(visiting.slopes) != fine.steps:
            raise DitaError(f"{fine.name} runs the calibration call again and again; once it had other steps")
        same_start(fine, visiting.trace)
        following: dict[int, tuple[float, torch.Tensor, list[int]]] = {}
        for start, (state, path) in reached.items():
            for end in range(start + 1, fine.steps + 1):
                moved = state + (fine.u[end] - fine.u[start]) * visiting.slopes[start]
                error = (moved - target[end]).square().mean().item()
                if end not in following or error < following[end][0]:
                    following[end] = (error, moved, [*path, start])
        chosen[jumps] = following[fine.steps][2]
        reached = {end: (state, path) for end, (_, state, path) in following.items() if end < fine.steps}
    return chosen
