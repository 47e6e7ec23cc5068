"""DualFast: each prediction is led away from an earlier one, so that a run of few steps comes closer to one of many.

Yu et al., "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models", 2025, arXiv 2506.13058.

When: at every step but the first. How: the solver is given e' = e_t + c (e_t - e_tau), where e_t is the model's output
after guidance and e_tau that of `back` steps before, at a larger timestep; the first step's, until there are so many.
Kept are outputs as the model gave them. c falls over the run as c0 (1 - step / steps)^decay. The combination is taken
in the space of the model's own output: noise for epsilon, velocity for v-prediction, n - x0 for flow matching. The rest
of the step is the scheduler's own. No call is saved; compare with the plain sampler at the same number of steps.

The paper divides the error of sampling into that of the solver and that of the network, which is smaller at larger
timesteps, and means to lessen both. Confidence is low: its form is reconstructed from a summary and the authors' code
was not available, so that which prediction is kept, the sign of c and its schedule are ours. They are searched:
`dita.calibrate` runs the pipeline with `fine` times the steps, then once for each c0 of `tried` with each of `decays`,
from the same noise, and takes the pair whose final latents come nearest to the fine run's; plain sampling if none is
nearer. On a solver of first order, c near 1/2 with `back` 1 acts as the second-order formula of Adams and Bashforth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.loop import Loop, Request, Run, Runner, Solver, Step
from dita.registry import register
from dita.schedulers.base import CalibratedSampling
from dita.schedulers.timesteps.running import RunTable
from dita.schedulers.timesteps.schedule import check_scheduler
from dita.schedulers.timesteps.tracing import same_start, trace
from dita.seams import Position
from dita.table import Table, table_for
from dita.watching import watched


class CoefficientTable(RunTable):
    """The coefficients: `values` holds "c0" and "decay" and, after a search, the "error" with and "plain" without."""

    noun: ClassVar[str] = "search for coefficients"
    form: ClassVar[Any] = {"c0": float, "decay": float}


class Combining(Loop):
    """Gives the solver a combination of this prediction and an earlier one.

    Args:
        name: of the method.
        back: how many steps earlier.
        c0, decay: of the coefficient.
        table: which is compared with each run; None for none.
    """

    def __init__(self, name: str, back: int, c0: float, decay: float, table: CoefficientTable | None = None) -> None:
        self.name, self.back, self.c0, self.decay, self.table = name, back, c0, decay, table
        self._earlier: list[torch.Tensor] = []
        self._compared, self._fingerprint = False, ""

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        check_scheduler(self.name, run.scheduler)
        self._earlier = []
        self._compared, self._fingerprint = False, fingerprint(run.scheduler)

    def coefficient(self, position: Position) -> float:
        """The c of a step.

        Example:
            >>> at = Position(2, 4, 0, "", 2, 4, 2)
            >>> Combining("dualfast", 1, 0.5, 1.0).coefficient(at), Combining("dualfast", 1, 0.5, 0.0).coefficient(at)
            (0.25, 0.5)
        """
        return self.c0 * (1 - position.step / position.steps) ** self.decay

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        position = request.position
        if self.table is not None and not self._compared:
            self._compared = True
            self.table.compare(position.schedule_length, tuple(request.latents.shape[1:]), self._fingerprint)
        reason = f"c = {self.coefficient(position):.3g}" if position.step else "no earlier prediction"
        return run(replace(request, reason=request.reason or reason))

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `Loop.step`."""
        output = step.output
        if self._earlier and self._earlier[-1].shape != output.shape:
            self._earlier = []
        used = output
        if self._earlier:
            wide = output.to(torch.promote_types(output.dtype, torch.float32))
            used = (wide + self.coefficient(step.position) * (wide - self._earlier[0])).to(output.dtype)
        self._earlier = [*self._earlier, output.detach().clone()][-self.back :]
        return solve(used, step.sample)

    def bytes_held(self) -> int:
        """See `Loop.bytes_held`."""
        return sum(t.numel() * t.element_size() for t in self._earlier)


class _Attempt(Combining):
    """Also writes down where a run began and ended."""

    first: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        self.first = step.sample if self.first is None else self.first
        self.last = super().step(step, solve)
        return self.last


@register
@dataclass(frozen=True)
class DualFast(CalibratedSampling):
    """DualFast's settings.

    Attributes:
        c0: coefficient at the start of the run; None for the table's, and its decay. 0 is the plain run.
        decay: power with which the coefficient falls, where `c0` is given; 0 for a constant one.
        back: how many steps before the present one the kept prediction was made.
        fine: the run that the search compares with has so many times the steps.
        tried, decays: what the search tries, each with each.
        table: what it found, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, neither a c0 nor a table, a table of another model, or a
            scheduler that draws noise or calls the model twice a step.

    Example:
        >>> DualFast(c0=0.5, decay=0.0).label()
        'c0=0.5 decay=0'
    """

    c0: float | None = None
    decay: float = 1.0
    back: int = 1
    fine: int = 10
    tried: tuple[float, ...] = (-0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0, 1.5)
    decays: tuple[float, ...] = (0.0, 1.0, 2.0)
    table: CoefficientTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "dualfast"
    title: ClassVar[str] = "DualFast"
    arxiv: ClassVar[str] = "2506.13058"
    axes: ClassVar[str] = "model output at every step; led away from an earlier one; coefficients searched"
    confidence: ClassVar[str] = "low"
    seams: ClassVar[frozenset[str]] = frozenset({"step"})
    claims: ClassVar[frozenset[str]] = frozenset({"solver"})
    saves: ClassVar[bool] = False
    table_kind: ClassVar[type[Table]] = CoefficientTable
    shaping: ClassVar[tuple[str, ...] | None] = None  # a given c0 leaves nothing to search
    citation: ClassVar[str] = """@article{yu2025dualfast,
  title={DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models},
  author={Yu, Hu and Luo, Hao and Wang, Fan and Zhao, Feng},
  journal={arXiv preprint arXiv:2506.13058},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if self.c0 is not None:
            check_number("c0", self.c0, -1, 10)
        check_number("decay", self.decay, 0, 10)
        check_whole("back", self.back, 1)
        check_whole("fine", self.fine, 2)
        for c0, decay in product(self.tried or (None,), self.decays or (None,)):
            check_number("a coefficient in tried", c0, -1, 10)
            check_number("a power in decays", decay, 0, 10)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> Combining:
        """See `SamplingMethod.make`."""
        if pipe is not None:
            check_scheduler(self.name, pipe.scheduler)
        given = self.c0 is not None and self.table is None
        table = None if given else table_for(self.name, self.table, anatomies[0])
        if self.c0 is not None:
            return Combining(self.name, self.back, self.c0, self.decay, table)
        assert table is not None
        return Combining(self.name, self.back, table.values["c0"], table.values["decay"], table)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> DualFast:
        """Search for the coefficients, in as many runs as there are pairs, a plain one and a fine one.

        For a setting with a `c0` nothing is searched, and one run is watched: the table tells under which conditions
        the coefficients were chosen. The pipeline comes back as it was.

        Raises:
            DitaError: the call ran no whole loop, or does not start from the same noise each time.
        """
        plain = trace(self.name, pipe, call)
        if self.c0 is not None:
            return replace(self, table=plain.table(CoefficientTable, {"c0": self.c0, "decay": self.decay}, pipe))
        reference = trace(self.name, pipe, call, plan=self.fine * plain.steps)
        same_start(plain, reference)
        goal = reference.states[-1].double()

        def error(found: torch.Tensor | None) -> float:
            assert found is not None
            return (found.double() - goal).square().mean().sqrt().item()

        least = alone = error(plain.states[-1])
        best = (0.0, 0.0)
        for c0, decay in product(self.tried, self.decays):
            attempt = _Attempt(self.name, self.back, c0, decay)
            with watched(pipe, attempt):
                call(pipe)
            if attempt.first is None or not torch.equal(attempt.first, plain.states[0]):
                raise DitaError(f"{self.name} must see the same noise in each run: make a generator within the call")
            if error(attempt.last) < least:
                least, best = error(attempt.last), (c0, decay)
        values = {"c0": best[0], "decay": best[1], "error": least, "plain": alone}
        return replace(self, table=plain.table(CoefficientTable, values, pipe))

    @classmethod
    def disabled(cls) -> DualFast:
        """Every prediction as it is; needs no table."""
        return cls(c0=0.0)

    @classmethod
    def forced(cls) -> DualFast:
        """A constant coefficient, whatever a search would find; it leaves no call out."""
        return cls(c0=0.5, decay=0.0)

    @classmethod
    def ladder(cls) -> tuple[DualFast, ...]:
        """Searched, against the last prediction and against the first; and two fixed coefficients."""
        return (cls(), cls(back=1000), cls(c0=0.25, decay=0.0), cls(c0=0.5, decay=0.0))
