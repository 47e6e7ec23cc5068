"""LinearAG: at every other step the unconditional output is estimated from outputs that are there already.

Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025, arXiv
2312.12487, section on LinearAG.

What: at step t the unconditional output is u_t = sum_{i<=t} a_i c_i + sum_{i<t} b_i u_i, c and u the outputs of the
run's steps so far, with a number per step for each. When: in the first half every second step computes both branches,
the others estimate; in the second half the conditional output is used alone.

The numbers come from runs with both branches everywhere (`dita.calibrate`), by least squares over all elements of all
samples, each of which is a trajectory. Only inner products are kept of a run that is over, so that the normal equations
are solved without any trajectory. They belong to a scheduler, its steps, the guidance scale, and the negative prompt
of the calibration (none can tell that one from others); another scale, scheduler or size warns, and with another number
of steps nothing is estimated.

Defaults: half of the run and every second step are published; the authors fit 200 trajectories of 20 steps. Here it is
4 runs, and `ridge` keeps their weights near those of a difference held, u_t = c_t + u_j - c_j with j the last computed
step: it counts as much as that share of one trajectory. On fashion-dit with 50 steps, the error of u_t against |u - c|
was 0.21 after one trajectory, 0.17 after 4 and 0.16 after 10, and 0.22 for the difference held.

Differs from the paper: estimates are no regressors. Each is a weighted sum of the others, so that nothing is lost, and
fitting with the true u_i in the place of estimates, as the authors do, was worse (0.17 to 0.25 there for 1 to 10
trajectories, 0.4 against 0.3 for one step in five). Of the outputs only what the solver steps is fitted: no learned
variance, no tokens of a reference image. A solver's second stage has weights of its own.

Confidence: the paper's text on this variant is short and no code is public; the regularisation is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.kernels.weighted_sum import MAX_TERMS, weighted_sum
from dita.loop import Run
from dita.registry import register
from dita.schedulers.base import CalibratedSampling
from dita.schedulers.guidance.linear_fit import LinearWeights, Measured, Trajectories
from dita.schedulers.guidance.moment import Moment, refuse_stream
from dita.schedulers.guidance.policy import GuidanceLoop, GuidanceMethod, GuidancePolicy, Wanted
from dita.seams import Position
from dita.table import Table, frozen, table_for
from dita.watching import watched


class Estimates(GuidancePolicy):
    """Estimates unconditional outputs of the first part of a run, and does without them in the rest.

    Args:
        table: the weights.
        interval: every how many steps both branches run in the first part.
        stop: share of the run at which that ends.
    """

    def __init__(self, table: LinearWeights, interval: int, stop: float) -> None:
        self.table, self.interval, self.stop = table, interval, stop
        self._cond: dict[tuple[int, int], torch.Tensor] = {}
        self._uncond: dict[tuple[int, int], torch.Tensor] = {}

    def begin_run(self, run: Run) -> None:
        """See `GuidancePolicy.begin_run`."""
        self._scheduler, self._checked = fingerprint(run.scheduler), False
        self._forget(())

    def bytes_held(self) -> int:
        """See `GuidancePolicy.bytes_held`."""
        return sum(kept.nbytes for kept in (*self._cond.values(), *self._uncond.values()))

    def wants(self, moment: Moment) -> Wanted:
        """See `GuidancePolicy.wants`."""
        refuse_stream(LinearAG.name, moment)
        position, measured = moment.position, Measured.at(moment, self._scheduler)
        if self.interval > 1 and not self._checked:
            self.table.check(measured)
            self._checked = True
        if measured.shapes != self._shapes:
            self._forget(measured.shapes)
        if not self._guided(position):
            return Wanted("cond", f"guided in the first {self.stop:g} of the run")
        if position.step % self.interval == 0:
            return Wanted("both", f"one step in {self.interval}")
        if self._weights(position) is None:
            return Wanted("both", "no weights for this step and those before it")
        return Wanted("cond", "estimated from the outputs so far")

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """See `GuidancePolicy.uncond`."""
        refuse_stream(LinearAG.name, moment, cond)
        position = moment.position
        if not self._guided(position):
            self._forget(self._shapes)
            return cond if uncond is None else uncond
        key = (position.stage, position.index)
        self._cond[key] = moment.guided(cond).to(torch.float32, copy=True)
        if uncond is not None:
            self._uncond[key] = moment.guided(uncond).to(torch.float32, copy=True)
            return uncond
        terms = self._weights(position)
        assert terms is not None
        total = None
        for start in range(0, len(terms), MAX_TERMS):
            some = terms[start : start + MAX_TERMS]
            total = weighted_sum([kept for kept, _ in some], [weight for _, weight in some], total)
        assert total is not None
        return moment.with_guided(cond, total)

    def _guided(self, position: Position) -> bool:
        return position.step < self.stop * position.steps

    def _weights(self, position: Position) -> list[tuple[Any, float]] | None:
        """Outputs with their weights, None in the place of the step's own if it did not run yet; None if some lack."""
        row = self.table.row(position)
        if row is None:
            return None
        terms: list[tuple[Any, float]] = []
        for kept, weights in zip((self._cond, self._uncond), row, strict=True):
            for index, weight in enumerate(weights):
                value = kept.get((position.stage, index))
                if weight and value is None and index != position.index:
                    return None
                if weight:
                    terms.append((value, weight))
        return terms

    def _forget(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        self._cond.clear()
        self._uncond.clear()
        self._shapes = shapes


@register
@dataclass(frozen=True)
class LinearAG(GuidanceMethod, CalibratedSampling):
    """The settings of LinearAG.

    Attributes:
        interval: in the first part, steps from one unconditional branch to the next; 1 computes all of them there.
        stop: share of the run at which the first part ends; 1 for guidance to the end.
        runs: how often a calibration runs the pipeline, with torch seeded differently; every sample is a trajectory. A
            run that repeats the one before it ends the calibration: the call then fixes its own noise.
        ridge: how much the difference held counts, as a share of one trajectory.
        seed: of the calibration's first run.
        table: the weights, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model or interval.

    Example:
        >>> LinearAG(stop=0.75).label()
        'stop=0.75'
    """

    interval: int = 2
    stop: float = 0.5
    runs: int = 4
    ridge: float = 1e-3
    seed: int = 0
    table: LinearWeights | None = field(default=None, repr=False)

    name: ClassVar[str] = "linear-ag"
    title: ClassVar[str] = "LinearAG"
    arxiv: ClassVar[str] = "2312.12487"
    axes: ClassVar[str] = "guidance; every second step of the first half; unconditional output by linear regression"
    confidence: ClassVar[str] = "medium"
    table_kind: ClassVar[type[Table]] = LinearWeights
    shaping: ClassVar[tuple[str, ...]] = ("interval", "runs", "ridge")
    trained: ClassVar[bool] = True
    citation: ClassVar[str] = """@inproceedings{castillo2025adaptive,
  title={Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models},
  author={Castillo, Angela and Kohler, Jonas and P{\\'e}rez, Juan C. and P{\\'e}rez, Juan Pablo and Pumarola, Albert and
    Ghanem, Bernard and Arbel{\\'a}ez, Pablo and Thabet, Ali},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("stop", self.stop, 0, 1)
        check_whole("runs", self.runs, 1)
        check_number("ridge", self.ridge, 0)
        check_whole("seed", self.seed, 0)

    def policy(self, anatomies: tuple[Anatomy, ...]) -> Estimates:
        """See `GuidanceMethod.policy`."""
        if self.interval == 1:
            return Estimates(LinearWeights({}), 1, self.stop)
        table = table_for(self.name, self.table, anatomies[0])
        fitted = table.values.get("interval")
        if fitted != self.interval:
            raise DitaError(f"these weights were fitted for interval {fitted}, not {self.interval}: calibrate again")
        return Estimates(table, self.interval, self.stop)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> LinearAG:
        """Fit the weights to `runs` runs of `call`, each under another seed of torch's global generator.

        Raises:
            DitaError: the call ran no loop, one without guidance, or runs that differ in their number of steps.
        """
        from dita.session import model_of

        seen = Trajectories()
        with watched(pipe, GuidanceLoop(seen, self.name)):
            for number in range(self.runs):
                with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                    torch.manual_seed(self.seed + number)
                    call(pipe)
                if not seen.finish():
                    break
        measured = seen.measured
        if measured is None:
            raise DitaError("the calibration call ran no guided sampling loop: it must run the pipeline with guidance")
        values = {**seen.weights(self.interval, self.ridge), "interval": self.interval, "scale": measured.scale or 0.0}
        model, shape = model_of(pipe), tuple(measured.shapes[0][1:])
        table = LinearWeights(frozen(values), model, measured.scheduler, shape, measured.position.schedule_length)
        return self.replace(table=table)

    @classmethod
    def disabled(cls) -> LinearAG:
        """Every branch computed; needs no weights."""
        return cls(interval=1, stop=1.0)

    @classmethod
    def forced(cls) -> LinearAG:
        """As published: the second half has no unconditional branch."""
        return cls()

    @classmethod
    def ladder(cls) -> tuple[LinearAG, ...]:
        """Every second step estimated in the whole run, three quarters of it and half; two in three."""
        return (cls(stop=1.0), cls(stop=0.75), cls(), cls(interval=3, stop=1.0), cls(interval=3))
