"""Guidance on any pipeline: which branches run, and what stands for the unconditional one.

Pipelines hard-code u + w (c - u), some with a rescaling after it, and keep w to themselves. All methods here need no
more than to choose u: with u = c the formula gives c, with s u it gives CFG-Zero*, with an estimate of u it gives an
estimate of the guided output. So the pipeline's own formula stays in charge, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from dita.anatomy import Anatomy
from dita.loop import Loop, LoopVariables, Request, Run, Runner, Solver, Step, tensors_of
from dita.passage import flatten
from dita.schedulers.base import SamplingMethod
from dita.schedulers.guidance.moment import Moment
from dita.seams import Position

Features = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Wanted:
    """Which branches of a step are computed.

    Attributes:
        branches: "both"; "cond", so that `GuidancePolicy.uncond` is given None; or "none": the guided output is zero.
        reason: why, in words.
        fresh: what is computed is compared over the steps, so that no cache may stand in for it.
    """

    branches: Literal["both", "cond", "none"]
    reason: str
    fresh: bool = False


class GuidancePolicy:
    """Plain classifier-free guidance; methods override what they change. State belongs to a run."""

    def begin_run(self, run: Run) -> None:
        """A run starts: forget everything."""

    def noised(self, clean: torch.Tensor, result: torch.Tensor) -> None:
        """See `dita.loop.Loop.noised`."""

    def wants(self, moment: Moment) -> Wanted:
        """Say which branches are computed; asked once for each model evaluation, before any branch runs."""
        return Wanted("both", "guided")

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """Say what stands for the unconditional output in the pipeline's formula.

        Args:
            cond: the conditional output, [B, ...] as the transformer shapes it; must not be changed.
            uncond: the unconditional one, None where it was not computed.

        Returns:
            of the same shape; `uncond` itself to leave it.
        """
        return cond if uncond is None else uncond

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `dita.loop.Loop.step`."""
        return solve(step.output, step.sample)

    def bytes_held(self) -> int:
        """Bytes of tensors kept between calls."""
        return 0


class GuidanceLoop(Loop):
    """Carries a policy out, for branches that come one by one as well as in one batch.

    A batch is run whole where both branches are wanted, unless some other method keeps features of each branch: those
    then run one by one, so that what is kept of the conditional branch serves when it runs alone.

    Args:
        policy: what to do.
        name: of the method.
    """

    def __init__(self, policy: GuidancePolicy, name: str) -> None:
        self.policy, self.name = policy, name
        self._key: tuple[int, int] | None = None
        self._wanted = Wanted("both", "")
        self._cond: Features | None = None
        self._variables: LoopVariables | None = None

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        self._key = self._cond = None
        self._variables = LoopVariables(run.pipe)
        self.policy.begin_run(run)

    def noised(self, clean: torch.Tensor, result: torch.Tensor) -> None:
        """See `Loop.noised`."""
        self.policy.noised(clean, result)

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        return self.policy.step(step, solve)

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        return self.policy.bytes_held()

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        if (request.position.step, request.position.stage) != self._key:
            self._cond = None  # left over where the unconditional branch came first
        if "uncond" in request.roles and len(request.roles) > 1:
            return self._together(request, run)
        if request.roles == ("cond",):
            return self._first(request, run)
        if request.roles == ("uncond",) and self._cond is not None:
            return self._second(request, run)
        if request.roles == ("third",) and self._key is not None and self._wanted.branches == "none":
            request.leave_out(self._wanted.reason)
            return request.answer((request.empty(),))
        if request.roles == ("all",):
            request.remark(
                f"{self.name} changes guidance, but this run has none (a guidance-distilled model, a scale of 1, or no "
                "negative prompt): there is no unconditional branch to leave out"
            )
        elif request.roles == ("uncond",):
            request.remark(f"{self.name} needs the conditional branch before the other; this pipeline runs it after it")
        return run(replace(request, reason="not under guidance"))

    def _ask(self, request: Request) -> Moment:
        position = Position(**{**vars(request.position), "branch": ""})
        moment = Moment(position, request.scale, request.batch, request, self._tokens(request))
        key = (position.step, position.stage)
        if key != self._key:
            self._key, self._cond = key, None
            self._wanted = self.policy.wants(moment)
        return moment

    def _tokens(self, request: Request) -> int:
        own = self._variables.read().get("latents") if self._variables and request.latents.ndim == 3 else None
        return own.shape[1] if isinstance(own, torch.Tensor) and own.ndim == 3 else 0

    def _first(self, request: Request, run: Runner) -> Any:
        self._ask(request)
        if self._wanted.branches == "none":
            request.left_out(request.position, "cond", self._wanted.reason)
            self._cond = (request.empty(),)
            return request.answer(self._cond)
        result = run(replace(request, reason=self._wanted.reason, fresh=self._wanted.fresh))
        self._cond = tensors_of(result)
        return result

    def _second(self, request: Request, run: Runner) -> Any:
        moment, cond = self._ask(request), self._cond
        assert cond is not None
        request = replace(request, reason=self._wanted.reason, fresh=self._wanted.fresh)
        self._cond = None
        if self._wanted.branches == "both":
            result = run(request)
            uncond, rebuild = flatten(result)
            stand_in = self._stand_in(moment, cond, uncond)
            return result if stand_in is uncond else rebuild(stand_in)
        request.left_out(request.position, "uncond", self._wanted.reason)
        return request.answer(cond if self._wanted.branches == "none" else self._stand_in(moment, cond, None))

    def _together(self, request: Request, run: Runner) -> Any:
        moment = self._ask(request)
        request = replace(request, reason=self._wanted.reason, fresh=self._wanted.fresh)
        wanted = self._wanted.branches
        if not request.divisible or (wanted == "both" and not request.apart):
            result = run(request)
            whole, rebuild = flatten(result)
            places = {role: n for n, role in enumerate(request.roles)}
            size = request.batch
            parts = {
                role: tuple(None if t is None else t[n * size : (n + 1) * size] for t in whole)
                for role, n in places.items()
            }
            if wanted != "both":
                request.remark(
                    f"{self.name} leaves out no branch of this pipeline, whose attention reads all rows of the batch "
                    "at once (perturbed-attention guidance): the output is the method's, nothing is saved"
                )
            if wanted == "none":
                return rebuild(tuple(None if t is None else torch.zeros_like(t) for t in whole))
            stand_in = self._stand_in(moment, parts["cond"], parts["uncond"] if wanted == "both" else None)
            if stand_in is parts["uncond"]:
                return result
            parts["uncond"] = stand_in
            return rebuild(_joined(request.roles, parts))
        left_out: tuple[str, ...] = {"both": (), "cond": ("uncond",), "none": tuple(sorted(request.roles))}[wanted]
        results = {role: run(request.part(role)) for role in request.roles if role not in left_out}
        parts = {role: tensors_of(result) for role, result in results.items()}
        for role in left_out:
            request.left_out(request.position, role, self._wanted.reason)
        if wanted == "none":
            empty = request.part("cond").empty()
            parts.update(dict.fromkeys(request.roles, (empty,)))
        else:
            parts["uncond"] = self._stand_in(moment, parts["cond"], parts.get("uncond"))
        joined = _joined(request.roles, parts)
        return flatten(next(iter(results.values())))[1](joined) if results else request.answer(joined)

    def _stand_in(self, moment: Moment, cond: Features, uncond: Features | None) -> Features:
        """The policy chooses what is denoised, the first tensor; what else a model returns follows plainly."""
        first = cond[0]
        assert first is not None
        old = None if uncond is None else uncond[0]
        new = self.policy.uncond(moment, first, old)
        if uncond is not None and new is old:
            return uncond
        return (new, *(cond if uncond is None else uncond)[1:])


def _joined(roles: tuple[str, ...], parts: dict[str, Features]) -> Features:
    columns = zip(*(parts[role] for role in roles), strict=True)
    return tuple(None if column[0] is None else torch.cat([t for t in column if t is not None]) for column in columns)


@dataclass(frozen=True)
class GuidanceMethod(SamplingMethod):
    """A method that changes classifier-free guidance; subclasses define `policy`.

    On a pipeline, or in a run, without such guidance (guidance-distilled models, a scale of 1) there is nothing to
    change: the run is left alone and a warning says so.
    """

    seams: ClassVar[frozenset[str]] = frozenset({"model"})
    claims: ClassVar[frozenset[str]] = frozenset({"guidance"})

    def policy(self, anatomies: tuple[Anatomy, ...]) -> GuidancePolicy:
        """What to do, for a pipeline with these transformers."""
        raise NotImplementedError(f"{type(self).__name__} must define policy()")

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> GuidanceLoop:
        """See `SamplingMethod.make`."""
        return GuidanceLoop(self.policy(anatomies), self.name)
