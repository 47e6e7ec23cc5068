"""Optimal steps: the few timesteps, chosen from a fine run by a dynamic programme, that follow it best.

Pei, Hu, Gu, "Optimal Stepsize for Diffusion Sampling", 2025, arXiv 2503.21774 (OSS); with one reference run in place of
their many, the programme is that of Watson, Ho, Norouzi, Chan, "Learning to Efficiently Sample from Diffusion
Probabilistic Models", 2021, arXiv 2106.03802, over another cost.

When: `dita.calibrate` runs the pipeline with many steps, N, and the table holds a choice among them for every n < N. A
run of n steps then takes the chosen timesteps in place of the scheduler's own; with `steps` set, every longer run is
cut to so many. How: a jump from fine step i to j is one step of first order along the reference's slope at i; its error
is the distance from the reference at j. The choice of n steps minimises the sum of these errors to the power `power`,
exactly, by dynamic programming. With `rounds`, as published: round k moves the best path of k - 1 steps to every j on
slopes that the model gives at that path's own states, and keeps the one that comes nearest to the reference; one more
run of N steps a round, and a choice for n up to `rounds`.

Differs from OSS: by default one run suffices, because the reference's own slopes are used. Both searches measure
distances in the coordinates of flow matching, x / (a + s), whatever the process; average over all images of the
calibration call, where the authors choose for each image; and take exactly n steps, where theirs takes n at most.
Slopes are those of the reference's steps, so that a multistep solver is chosen for as if it were of first order. The
scaling of latents to the reference's quantiles is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.loop import Loop
from dita.registry import register
from dita.schedulers.base import CalibratedSampling
from dita.schedulers.timesteps.paths import best_paths, jump_errors, student_paths
from dita.schedulers.timesteps.running import ListedLoop, PointsTable
from dita.schedulers.timesteps.schedule import Points, check_scheduler
from dita.schedulers.timesteps.tracing import trace
from dita.seams import Position
from dita.table import Table, table_for


class ChoiceTable(PointsTable):
    """The fine run's timesteps, and for each smaller number of steps which of them to run.

    `values` holds "timesteps" and "sigmas" of the fine run and "chosen": number of steps -> indices.
    """

    noun: ClassVar[str] = "choice of timesteps"
    form: ClassVar[Any] = {"timesteps": [float], "chosen": {str: [int]}}

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        count = len(self.values["timesteps"])
        if any(max(indices) >= count for indices in self.values["chosen"].values()):
            raise ValueError(f"there are {count} timesteps to choose from")

    def points(self, steps: int) -> Points | None:
        """The timesteps to run in so many steps; all of the fine run for its own number, None where none were chosen.

        Example:
            >>> table = ChoiceTable({"timesteps": (9.0, 5.0, 1.0), "sigmas": (), "chosen": {"2": (0, 2)}}, steps=3)
            >>> table.points(2).timesteps
            (9.0, 1.0)
        """
        if steps == len(self.listed):
            return self.listed
        indices = self.values["chosen"].get(str(steps))
        return None if indices is None else self.listed.pick(indices)


class Choosing(ListedLoop):
    """Runs the chosen timesteps.

    Args:
        method: the settings.
        table: the choices; None for the scheduler's own timesteps.
        pipe: the pipeline.
    """

    def __init__(self, method: OptimalSteps, table: ChoiceTable | None, pipe: Any) -> None:
        super().__init__(method.name, pipe, table)
        self.choices, self.steps = table, method.steps

    def chosen(self, asked: int) -> Points | int | str:
        """See `ListedLoop.chosen`."""
        steps = min(self.steps, asked) if self.steps else asked
        if self.choices is None or steps == asked == self.choices.steps:
            return steps
        found = self.choices.points(steps)
        return f"no timesteps were chosen for {steps} steps" if found is None else found

    def reason(self, position: Position) -> str:
        """See `ListedLoop.reason`."""
        return super().reason(position) if self.choices is None else f"chosen: {super().reason(position)}"


@register
@dataclass(frozen=True)
class OptimalSteps(CalibratedSampling):
    """The settings of optimal steps.

    Attributes:
        steps: steps to run where more are asked for; 0 for as many as are asked for.
        choice: "optimal", or "even" for the scheduler's own timesteps: what the others have to beat.
        power: of a jump's error. 1 adds errors up as if they all pointed the same way, 2 as if they were independent.
            Often all choose alike. On fashion-dit 1, 1.5 and 2 gave 30.5, 31.1 and 31.1 dB in 8 steps, 32.9, 33.2 and
            32.2 in 10, 37.0, 36.9 and 36.9 in 15; on fashion-flux they differed in 10 steps, where 2 lost 1.0 dB. That
            is the mean PSNR of 16 samples, two calibrations on 4 others each (`benchmarks/step_powers.py`).
        rounds: search as published, for up to so many steps; 0 for the search that needs one run.
        table: the choices, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no table, or one of another model, or a scheduler that calls
            the model twice a step, adds noise, or keeps its timesteps in an unknown way.

    Example:
        >>> OptimalSteps(steps=10).label()
        'steps=10'
    """

    steps: int = 0
    choice: Literal["optimal", "even"] = "optimal"
    power: float = 1.5
    rounds: int = 0
    table: ChoiceTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "optimal-steps"
    title: ClassVar[str] = "Optimal steps"
    arxiv: ClassVar[str] = "2503.21774"
    axes: ClassVar[str] = "timesteps; chosen from a fine run by dynamic programming; the scheduler's own step"
    confidence: ClassVar[str] = "medium"
    seams: ClassVar[frozenset[str]] = frozenset({"step"})
    claims: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    saves: ClassVar[bool] = False  # where as many steps are asked for as the list has
    table_kind: ClassVar[type[Table]] = ChoiceTable
    shaping: ClassVar[tuple[str, ...]] = ("power", "rounds")
    citation: ClassVar[str] = """@article{pei2025optimal,
  title={Optimal Stepsize for Diffusion Sampling},
  author={Pei, Jianning and Hu, Han and Gu, Shuyang},
  journal={arXiv preprint arXiv:2503.21774},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("steps", self.steps, 0)
        check_whole("rounds", self.rounds, 0)
        check_number("power", self.power, 0.1)
        if self.choice not in ("optimal", "even"):
            raise DitaError(f'choice is {self.choice!r}; expected "optimal" or "even"')

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> Loop:
        """See `SamplingMethod.make`."""
        if pipe is not None:
            check_scheduler(self.name, pipe.scheduler)
        table = table_for(self.name, self.table, anatomies[0]) if self.choice == "optimal" else None
        return Choosing(self, table, pipe)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> OptimalSteps:
        """Choose from the timesteps of one run, which should have many; the pipeline comes back as it was.

        Raises:
            DitaError: the call ran fewer than 2 steps, no whole loop, or (with `rounds`) something else each time.
        """
        fine = trace(self.name, pipe, call)
        if fine.steps < 2:
            raise DitaError(f"{self.name} chooses from the timesteps of the calibration call; it ran {fine.steps}")
        if self.rounds:
            chosen = student_paths(pipe, call, fine, min(self.rounds, fine.steps - 1))
        else:
            chosen = best_paths(jump_errors(fine.straight(), fine.u) ** self.power)
        values = {
            "timesteps": fine.points.timesteps,
            "sigmas": fine.points.sigmas,
            "chosen": {str(steps): tuple(path) for steps, path in chosen.items()},
        }
        return replace(self, table=fine.table(ChoiceTable, values, pipe))

    @classmethod
    def disabled(cls) -> OptimalSteps:
        """As many steps as are asked for, at the scheduler's own timesteps; needs no table."""
        return cls(choice="even")

    @classmethod
    def forced(cls) -> OptimalSteps:
        """Five steps."""
        return cls(steps=5)

    @classmethod
    def ladder(cls) -> tuple[OptimalSteps, ...]:
        """From 20 to 6 steps, and 10 even ones."""
        return (*(cls(steps=steps) for steps in (20, 15, 10, 8, 6)), cls(steps=10, choice="even"))
