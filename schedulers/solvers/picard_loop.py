"""Picard iteration at work on a pipeline's loop: which rows are evaluated, and what the pipeline is answered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dita.errors import DitaError
from dita.loop import Loop, LoopVariables, Request, Run, Runner, Solver, Step
from dita.passage import flatten
from dita.schedulers.solvers.ahead import changed_argument, close, guided, timesteps_like, unsuited, widened
from dita.schedulers.solvers.first_order import FirstOrder, check_first_order
from dita.schedulers.solvers.trajectory import Trajectory


class PicardLoop(Loop):
    """Evaluates several states at once, keeps those that are known, and answers the pipeline with them.

    A step is taken in one of three ways. "window": some sample's next state is not known; every call brings the rows of
    all windows, and the pipeline gets those of the present states, by which its guidance and its scheduler's step are
    checked. "ahead": all next states are known, and nothing is called. "alone": as the pipeline does it.

    Args:
        window: most states evaluated at once, of one sample.
        tolerance: largest change of a known state, in standard deviations of the ancestral step's noise.
    """

    def __init__(self, window: int, tolerance: float) -> None:
        self.window, self.tolerance = window, tolerance
        self._checked: set[str] = set()
        self._forget(None)

    def _forget(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._solver: FirstOrder | None = None
        self._variances: list[float] = []
        self._given_up = ""
        self._paths: list[Trajectory] = []
        self._last: dict[tuple[str, ...], Request] = {}
        self._branches: tuple[tuple[str, ...], ...] = ()
        self._calls = self._rows = 0
        self._open(-1)

    def _open(self, step: int) -> None:
        self._step, self._way = step, "alone"
        self._pairs: list[tuple[int, int]] = []  # sample and place of every row of a branch
        self._seen: list[tuple[str, ...]] = []
        self._outputs: dict[str, torch.Tensor] = {}

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`.

        Raises:
            DitaError: the scheduler is not of first order, or the run is to draw noise.
        """
        check_first_order(run.scheduler, "picard")
        eta = LoopVariables(run.pipe).read().get("eta")
        if isinstance(eta, (int, float)) and eta > 0:
            raise DitaError(f"picard needs deterministic steps, this run has eta={eta:g}: call the pipeline with eta=0")
        self._forget(run.scheduler)

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        kept = [state for path in self._paths for state in path.states.values()]
        return sum({id(t): t.nbytes for t in (*kept, *self._outputs.values())}.values())

    # Calls of the transformer

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`.

        Raises:
            DitaError: the transformer gives other outputs where rows differ in their timestep, or the pipeline changes
                a later branch of a step of which an earlier one was left out already.
        """
        if request.position.step != self._step:
            self._begin_step(request)
        elif self._way != "alone":
            self._check(request)
        self._seen.append(request.roles)
        self._last[request.roles] = request
        if self._way == "alone":
            given = request.get("hidden_states")
            self._calls, self._rows = self._calls + 1, self._rows + (len(given) if given is not None else 0)
            return run(replace(request, reason=self._given_up or "the first step alone"))
        if self._way == "ahead":
            request.leave_out("solved ahead")
            return request.answer((request.empty(),))
        return self._evaluate(request, run)

    def _begin_step(self, request: Request) -> None:
        step = request.position.step
        self._open(step)
        if self._given_up:
            return
        why = unsuited(request)
        if why:
            self._give_up(request, why)
            return
        if self._solver is None:
            # Not sooner: some pipelines set the sigmas after the timesteps.
            self._solver = FirstOrder(self._scheduler)
            self._variances = self._solver.variances()
        if not self._paths:
            # Where an image-to-image run begins is sometimes known from its first step only, and so is what a scaled
            # sample was before: these steps are taken alone, without giving up.
            if self._solver.scales or self._unfit(request):
                return
            self._paths = [Trajectory(step, state) for state in request.latents[: request.batch]]
        self._way = "window" if any(path.base == step for path in self._paths) else "ahead"
        for path in self._paths:
            path.forget_before(step)
        self._check(request)
        if self._way == "window":
            steps = request.position.steps
            self._pairs = [(b, p) for b, path in enumerate(self._paths) for p in path.window(self.window, steps)]

    def _check(self, request: Request) -> None:
        why = unsuited(request) or self._unfit(request)
        if why and self._seen and any(path.base > self._step for path in self._paths):
            raise DitaError(
                f"picard had left out a part of step {self._step} before it could see that {why}; keep that as it is "
                "for the whole run, or restore the pipeline"
            )
        if why:
            self._give_up(request, why)

    def _give_up(self, request: Request, why: str) -> None:
        self._given_up, self._way = f"steps one by one: {why}", "alone"
        request.remark(f"picard takes {self._given_up}")

    def _unfit(self, request: Request) -> str:
        """Why this call is not the one that was expected of the present states; "" if it is."""
        solver, position, latents = self._solver, request.position, request.latents
        assert solver is not None
        if self._times(request) is None:
            return "the transformer's timestep is not one number read off the scheduler's"
        parts = [latents[n * request.batch : (n + 1) * request.batch] for n in range(len(request.roles))]
        expected = parts[0]
        if self._paths:
            if len(self._paths) != request.batch:
                return "the number of samples changed"
            known = [solver.scaled(position.index, path.states[position.step]) for path in self._paths]
            expected = torch.stack(known).to(latents.dtype)
        if any(not torch.equal(part, expected) for part in parts):
            return "what the transformer is called with is not the sample that the last step left, and nothing else"
        last = self._last.get(request.roles)
        changed = "" if last is None else changed_argument(request, last)
        return f"the {changed} changed" if changed else ""

    def _times(self, request: Request) -> torch.Tensor | None:
        assert self._solver is not None
        timesteps, trained = self._solver.timesteps, self._solver.trained
        return timesteps_like(request.get("timestep"), timesteps, request.position.index, trained)

    def _at(self, request: Request, pairs: list[tuple[int, int]]) -> Request:
        """The call for other samples and places, one row each in every branch."""
        solver, times, shift = self._solver, self._times(request), request.position.index - request.position.step
        assert solver is not None and times is not None
        entries = [shift + place for _, place in pairs]
        states = [solver.scaled(shift + place, self._paths[b].states[place]) for b, place in pairs]
        return widened(request, [b for b, _ in pairs], torch.stack(states), entries, times)

    def _evaluate(self, request: Request, run: Runner) -> Any:
        """Run the rows of all windows; answer with those of the present states."""
        count, branches, places = len(self._pairs), len(request.roles), [p for _, p in self._pairs]
        self._calls, self._rows = self._calls + 1, self._rows + branches * count
        states = f"states {min(places)} to {max(places)} at once" if max(places) > min(places) else "the last state"
        reason = f"{states}, {branches * count} rows; call {self._calls} in a row, {self._rows} rows in all"
        features, rebuild = flatten(run(replace(self._at(request, self._pairs), reason=reason)))
        output = features[0]
        assert output is not None
        for n, role in enumerate(request.roles):
            self._outputs[role] = output[n * count : (n + 1) * count]
        self._check_rows(request, run, output)
        # A sample that is ahead has no row at this step; what stands in for it is dropped in `step`.
        rows = {b: row for row, (b, p) in enumerate(self._pairs) if p == self._step}
        answer = [n * count + rows.get(b, 0) for n in range(branches) for b in range(request.batch)]
        return rebuild(tuple(None if t is None else t[answer] for t in features))

    def _check_rows(self, request: Request, run: Runner, output: torch.Tensor) -> None:
        """See once whether the rows of the last place come out as they do in a call of their own."""
        place, model = max(p for _, p in self._pairs), request.anatomy.name
        pairs = [(b, place) for b in range(request.batch)]
        if model in self._checked or request.apart or place == self._step or not set(pairs) <= set(self._pairs):
            return
        alone, given = self._at(request, pairs), request.get("timestep")
        now = alone.get("timestep")[0]
        time = now.expand_as(given) if isinstance(given, torch.Tensor) else type(given)(now.item())
        alone = replace(
            alone.changed(timestep=time),
            # At the index of its own, so that a method that changes timesteps by their place gives itself away.
            position=replace(request.position, branch="check", index=request.position.index - self._step + place),
            roles=("check",),
            entries=(),
            reason="does the transformer take a timestep for each row?",
        )
        expected = flatten(run(alone))[0][0]
        count = len(self._pairs)
        rows = [n * count + self._pairs.index(pair) for n in range(len(request.roles)) for pair in pairs]
        if expected is None or not close(output[rows], expected):
            raise DitaError(
                f"picard evaluates several timesteps in one batch, but {model} gives such rows other outputs than it "
                "gives them alone: it does not take a timestep for each row, or another method changes them by the "
                "step under way. Restore the pipeline, or leave out the other method"
            )
        self._checked.add(model)

    # Steps of the scheduler

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`.

        Raises:
            DitaError: the pipeline did not call the branches that it called in earlier steps, of which this step's were
                solved ahead.
        """
        place, seen = step.position.step, tuple(self._seen)
        if place != self._step or not seen:
            return solve(step.output, step.sample)
        request = self._last[seen[0]]
        if self._way != "alone" and self._branches and seen != self._branches:
            why = f"the pipeline called the branches {seen} in step {place}, and {self._branches} before"
            if any(path.base > place for path in self._paths):
                raise DitaError(f"picard had solved step {place} ahead, but {why}; restore the pipeline")
            self._give_up(request, why)
        self._branches = seen
        if self._way == "ahead":
            known = torch.stack([path.states[place + 1] for path in self._paths])
            return torch.cat([known] * (len(step.sample) // len(known)))
        new = solve(step.output, step.sample)
        why = self._advance(step, new) if self._way == "window" else ""
        if why:
            self._give_up(request, why)
        new = self._merged(new, place)
        self._outputs = {}
        if self._given_up:
            self._paths = []
        elif self._way == "alone":
            self._paths = [Trajectory(place + 1, state) for state in new[: request.batch]]
        return new

    def _merged(self, new: torch.Tensor, place: int) -> torch.Tensor:
        """Put in the known states of samples that had no row at this step."""
        present = {b for b, p in self._pairs if p == place}
        ahead = [b for b in range(len(self._paths)) if b not in present]
        if self._outputs and ahead:
            new = new.clone()
            for b in ahead:
                new[b :: len(self._paths)] = self._paths[b].states[place + 1]
        return new

    def _advance(self, step: Step, new: torch.Tensor) -> str:
        """One Picard iteration of every sample under evaluation; why it cannot be, if so.

        Args:
            step: the scheduler's.
            new: what it made of the present states.
        """
        solver, place, batch = self._solver, step.position.step, len(self._paths)
        assert solver is not None
        shift = step.position.index - place
        present = {b: row for row, (b, p) in enumerate(self._pairs) if p == place}
        samples = list(present)
        copies = new.view(-1, batch, *new.shape[1:]) if len(new) % batch == 0 else new[:0]
        if not len(copies) or any(not torch.equal(copy, copies[0]) for copy in copies[1:]):
            return "the scheduler is not given one row for each sample"
        request = next(iter(self._last.values()))
        states = torch.stack([self._paths[b].states[place] for b in samples]).to(request.latents.dtype)
        if not close(states, step.sample[samples].to(states.dtype)):
            return "the transformer is called with something else than the scheduler's sample"
        outputs = guided(self._outputs, request.scale, step.output[samples], list(present.values()))
        if isinstance(outputs, str):
            return outputs
        outputs[list(present.values())] = step.output[samples]
        for b in samples:
            self._paths[b].states[place] = step.sample[b]  # before the pipeline rounds it to the transformer's dtype
        stepped: dict[tuple[int, int], torch.Tensor] = {}
        for at in sorted({p for _, p in self._pairs}):
            rows = [row for row, (_, p) in enumerate(self._pairs) if p == at]
            states = torch.stack([self._paths[self._pairs[row][0]].states[at] for row in rows])
            made = solver.step(shift + at, outputs[rows], states)
            stepped |= {self._pairs[row]: state for row, state in zip(rows, made, strict=True)}
        if not close(torch.stack([stepped[b, place] for b in samples]), new[samples]):
            return "the scheduler's step is not the plain one of its class"
        stepped |= {(b, place): new[b] for b in samples}
        for b, path in enumerate(self._paths):
            places = [p for sample, p in self._pairs if sample == b]
            if places:
                limits = [self.tolerance**2 * self._variances[shift + p] for p in places[1:]]
                path.slide([stepped[b, p] for p in places], limits)
        return ""
