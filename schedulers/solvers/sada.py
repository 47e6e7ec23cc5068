"""SADA: a step is skipped after one at which the trajectory was stable; the clean sample stands for the model's output.

Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration", ICML 2025, arXiv 2507.17135.

When: with f the slope of the probability-flow ODE, x' = x_t - D (5/8 f_t + 3/4 f_t+1 - 3/8 f_t+2) the sample that three
slopes foretell, and x_t-1 the scheduler's, the momentum is M = (x_t-1 - x') (f_t - 2 f_t+1 + f_t+2). If its mean is not
above 0, the transformer is left out at the next step, for all branches of guidance. From the share `lagrange` of the
run on, the criterion is not asked: one step of every `interval` is computed. Nothing is skipped before `start`, from
`stop` on, and after `max_skip` skipped steps in a row; the first four steps and the last are always computed.

How: at a skipped step the scheduler is given the output of a model that sees a certain x0, so that all it does with an
output is its own: before `lagrange` the x0 that the old output shows in x', after it the polynomial through the last
`terms` x0 that were kept, one every `interval` steps. The transformer's last outputs are returned meanwhile, for the
pipeline to combine; they serve for the slope. Under flow matching f is the output itself, M = -(f_t - 2 f_t+1 + f_t+2),
and there is no polynomial: in both parts of the run a skipped step gets 2 f_t+1 - f_t+2 of the last two outputs
remembered, the following ones the last of them, whatever `terms` is.

Published for 50 steps: skip after steps 10 to 46, `lagrange` from step 24 with 4 terms (SD-2, SDXL) or from 20 with 3
(FLUX), both with interval 4 and max_skip 4. Here these are shares of the run's steps; 50 steps give the published ones.
`interval` and `max_skip` stay numbers of steps: runs of 20 steps may want 2 or 3, runs of 10 steps 2.

The criterion is one number for the batch, and a call cannot be skipped for one of its samples. `agree="all"` takes the
mean for each sample and skips if all are stable: no sample is skipped that would not be, were it alone, but batch mates
may keep it from being skipped. `agree="mean"` is the authors' mean over the batch.

The scheduler must be deterministic, with one call of the model a step: DDIM, Euler, DPM-Solver++, UniPC, FlowMatchEuler
and the like. Step skipping goes along with caches and sparse attention, which see fewer steps, and with guidance
methods. `sada-token`, the token-wise part of the paper, may be attached with it: SADA decides which steps call the
transformer, by the mean of M, and sada-token which tokens are computed in those calls, by M of each token over the
steps it sees. The authors do both by one M.

Differs from the paper: the paper takes the length of a step for D; the authors' code multiplies the slope with the beta
of a single timestep of the training schedule, which at 50 steps of 1000 is a twentieth of it. `reach` chooses; the code
is the default, since the published numbers are the code's, and it judges more finely: with the true length nearly every
step is stable. Betas are read off the noise levels. For v-prediction with Euler the authors' code shows the old output
in x_t-1, here in x' as with DPM-Solver++. DDIM, UniPC and flow matching with solvers other than Euler's are ours.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError, DitaWarning
from dita.loop import Loop, LoopVariables, Request, Run, Runner, Solver, Step, tensors_of
from dita.registry import register
from dita.schedulers.base import SamplingMethod
from dita.schedulers.levels import entry_of
from dita.schedulers.solvers.stability import Criterion, FlowCriterion, criterion_for
from dita.schedulers.timesteps.schedule import check_scheduler


@dataclass(frozen=True)
class Held:
    """What a call of the transformer returned.

    Attributes:
        step: at which step.
        shape: of the latents that it was called with.
        tensors: copies, for a pipeline may write into what it gets.
    """

    step: int
    shape: torch.Size
    tensors: tuple[torch.Tensor | None, ...]


class SADALoop(Loop):
    """Leaves the transformer out at the steps that a criterion finds unnecessary.

    Args:
        settings: see there.
    """

    def __init__(self, settings: SADA) -> None:
        self.settings = settings
        self._forget(None)

    def _forget(self, criterion: Criterion | None) -> None:
        self._criterion = criterion
        self._held: dict[tuple[Any, ...], Held] = {}
        self._shape: torch.Size | None = None
        self._begin, self._computed, self._skipped, self._in_a_row = 0, -1, -1, 0
        self._planned, self._reason = -1, "first steps"

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        self._forget(self.settings.criterion(run.scheduler))
        eta = LoopVariables(run.pipe).read().get("eta")
        if isinstance(eta, (int, float)) and eta > 0:
            raise DitaError(f"sada needs deterministic steps, this run has eta={eta:g}: call the pipeline with eta=0")

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        number, shape = request.position.step, request.latents.shape
        key = (id(request.anatomy.model), request.position.branch, request.roles)
        held = self._held.get(key)
        # A branch or an expert that the last computed step had not is computed; a step is skipped wholly or not at all.
        current = held is not None and held.step == self._computed < number and held.shape == shape
        if number == self._planned and current and held is not None:
            self._skipped = number
            request.leave_out(self._reason)
            return request.answer([None if t is None else t.clone() for t in held.tensors])
        result = run(replace(request, reason=request.reason or self._reason))
        self._computed = number
        self._held[key] = Held(number, shape, tuple(None if t is None else t.clone() for t in tensors_of(result)))
        return result

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        number = step.position.step
        if number == 0:
            self._begin = entry_of(step.scheduler, step.timestep, step.position.index)
        if self._shape not in (None, step.sample.shape):
            self._criterion, self._skipped = self.settings.criterion(step.scheduler), -1
        self._shape = step.sample.shape
        criterion, entry, skipped = self._criterion, self._begin + number, self._skipped == number
        assert criterion is not None
        used = criterion.stand_in(step, entry) if skipped else step.output
        after = solve(used, step.sample)
        self._decide(criterion, step, entry, criterion.stepped(step, entry, used, after, skipped))
        return after

    def _decide(self, criterion: Criterion, step: Step, entry: int, momenta: list[float] | None) -> None:
        """Settle whether the next step is skipped."""
        settings, number = self.settings, step.position.step
        first, end, switch = settings.phases(step.position.steps)
        skip, polynomial = False, number >= switch
        if momenta is None or number < first:
            self._reason = "first steps"
        elif number >= end:
            self._reason = "last steps"
        elif self._in_a_row >= settings.max_skip:
            self._reason = f"{settings.max_skip} skipped in a row"
        elif polynomial:
            skip = number % settings.interval > 0
            self._reason = "between steps that are computed" if skip else f"one of every {settings.interval} steps"
        else:
            skip, value = settings.stable(momenta)
            self._reason = f"momentum {value:.1e}"
        skip = skip and criterion.plan(step, entry, polynomial)
        self._planned = number + 1 if skip else -1
        self._in_a_row = self._in_a_row + 1 if skip else 0

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        kept = [t for held in self._held.values() for t in held.tensors]
        kept += self._criterion.tensors() if self._criterion is not None else []
        return sum(t.numel() * t.element_size() for t in kept if t is not None)


@register
@dataclass(frozen=True)
class SADA(SamplingMethod):
    """SADA's settings.

    Attributes:
        start, stop: shares of the run between which a step may be followed by a skipped one.
        lagrange: share of the run from which one step of every `interval` is computed; 1 for the criterion throughout.
        interval: steps from one x0 that is kept to the next.
        terms: how many x0 the polynomial goes through, at most; without effect under flow matching, where setting it
            brings a warning.
        max_skip: most skipped steps in a row; 0 skips none.
        agree: "all" samples of a batch must be stable, or their "mean".
        reach: "timestep", as the authors' code, or "step", as their formula: how far a sample is extrapolated.

    Raises:
        DitaError: a setting out of range; on attaching, a scheduler that draws noise, calls the model twice a step, or
            does not say what the model predicts.

    Example:
        >>> SADA(interval=2).label()
        'interval=2'
    """

    start: float = 0.2
    stop: float = 0.94
    lagrange: float = 0.48
    interval: int = 4
    terms: int = 4
    max_skip: int = 4
    agree: Literal["all", "mean"] = "all"
    reach: Literal["timestep", "step"] = "timestep"

    name: ClassVar[str] = "sada"
    title: ClassVar[str] = "SADA"
    arxiv: ClassVar[str] = "2507.17135"
    axes: ClassVar[str] = "whole steps; stability of the trajectory, then every few steps; x0 extrapolated"
    seams: ClassVar[frozenset[str]] = frozenset({"step", "model"})
    joint: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"solver"})
    citation: ClassVar[str] = """@inproceedings{jiang2025sada,
  title={SADA: Stability-guided Adaptive Diffusion Acceleration},
  author={Jiang, Ting and Wang, Yixiao and Ye, Hancheng and Shao, Zishan and Sun, Jingwei and Zhang, Jingyang and
    Chen, Zekai and Zhang, Jianyi and Chen, Yiran and Li, Hai},
  booktitle={International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        for name in ("start", "stop", "lagrange"):
            check_number(name, getattr(self, name), 0, 1)
        check_whole("interval", self.interval, 1)
        check_whole("terms", self.terms, 1)
        check_whole("max_skip", self.max_skip, 0)
        for name, known in (("agree", ("all", "mean")), ("reach", ("timestep", "step"))):
            if getattr(self, name) not in known:
                raise DitaError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")

    def phases(self, steps: int) -> tuple[int, int, int]:
        """The numbers of three steps in a run of that many.

        Returns:
            the first that may be followed by a skipped one, the first after that which may not, and the first of the
            part in which one of every `interval` is computed, a multiple of that.

        Example:
            >>> SADA().phases(50), SADA(lagrange=0.4).phases(50)
            ((10, 47, 24), (10, 47, 20))
        """
        first = max(3, math.ceil(self.start * steps - 1e-9))
        end = min(math.floor(self.stop * steps + 1e-9), steps - 2)
        switch = steps if self.lagrange == 1 else self.interval * round(self.lagrange * steps / self.interval)
        return first, end, switch

    def stable(self, momenta: list[float]) -> tuple[bool, float]:
        """Whether a batch with these means of M is stable, and the value that decided.

        Example:
            >>> SADA().stable([0.5, -1.0]), SADA(agree="mean").stable([0.5, -1.0])
            ((False, 0.5), (True, -0.25))
        """
        value = max(momenta) if self.agree == "all" else sum(momenta) / len(momenta)
        return value <= 0, value

    def criterion(self, scheduler: Any) -> Criterion:
        """A fresh criterion for a run on this scheduler.

        Raises:
            DitaError: not one it can work with.
        """
        check_scheduler(self.name, scheduler)
        return criterion_for(scheduler, self.interval, self.terms, self.reach)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> SADALoop:
        """See `SamplingMethod.make`."""
        flows = pipe is not None and isinstance(self.criterion(pipe.scheduler), FlowCriterion)
        if flows and self.terms != type(self).terms:
            text = "sada's terms have no effect under flow matching, where no polynomial through x0 is used"
            warnings.warn(text, DitaWarning, stacklevel=2)
        return SADALoop(self)

    @classmethod
    def disabled(cls) -> SADA:
        """No step is skipped."""
        return cls(max_skip=0)

    @classmethod
    def forced(cls) -> SADA:
        """From the fourth step on, every other one, whatever the criterion says."""
        return cls(start=0.0, stop=1.0, lagrange=0.0, interval=2)

    @classmethod
    def ladder(cls) -> tuple[SADA, ...]:
        """From every other step of the second half to three of four steps."""
        early = tuple(cls(lagrange=0.2, interval=interval) for interval in (2, 3, 4))
        return (cls(interval=2), cls(), *early)
