"""Timestep aligner: tell the transformer another timestep than the sampler steps from, so that few steps lead further.

Xia et al., "Towards More Accurate Diffusion Model Acceleration with A Timestep Aligner", CVPR 2024, arXiv 2310.09469.

When: at every step. How: the sampler keeps its noise levels, and the transformer is told tau_i in place of t_i. The
taus are scalars found once, one after the other: with tau_0 .. tau_{i-1} in place, tau_i is searched so that the state
after step i comes nearest to a run with many more steps from the same noise. They belong to a number of steps and a
scheduler; another run is left alone, with a warning. No call is saved: a run of few steps comes closer to one of many.

Differs from the paper: taus are trained there by gradient steps, over images of the training set, on the difference
between predicted noises; here the search takes `evaluations` trials a step and no gradients, on the images of one
calibration call, and compares states. A tau stays t_i where no other is better, and lies within `reach` times the gap
to the next timestep; the last step is aligned too, which the authors leave alone. Of their sequential and parallel
training only the first is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.fingerprint import fingerprint
from dita.loop import Loop, Request, Run, Runner
from dita.registry import register
from dita.schedulers.base import CalibratedSampling
from dita.schedulers.timesteps.alignment import Trial, minimise, moved, targets
from dita.schedulers.timesteps.running import RunTable
from dita.schedulers.timesteps.schedule import check_scheduler
from dita.schedulers.timesteps.tracing import argument_of, trace
from dita.table import Table, table_for


class OffsetTable(RunTable):
    """By how much each step's timestep is moved, on the scale of the transformer's argument: `values["offset"]`."""

    noun: ClassVar[str] = "alignment of timesteps"
    form: ClassVar[Any] = {"offset": [float]}

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        if len(self.values["offset"]) != self.steps:
            raise ValueError(f"{len(self.values['offset'])} timesteps of {self.steps}")


class Aligning(Loop):
    """Moves the timestep that the transformer is told.

    Args:
        method: its settings.
        table: by how much.
    """

    def __init__(self, method: TimestepAligner, table: OffsetTable) -> None:
        self.table, self.strength = table, method.strength
        self._compared, self._fingerprint = False, ""

    def begin_run(self, run: Run) -> None:
        """See `Loop.begin_run`."""
        self._compared, self._fingerprint = False, fingerprint(run.scheduler)

    def model(self, request: Request, run: Runner) -> Any:
        """See `Loop.model`."""
        position = request.position
        if not self._compared:
            self._compared = True
            self.table.compare(position.schedule_length, tuple(request.latents.shape[1:]), self._fingerprint)
        if position.schedule_length != self.table.steps:
            return run(replace(request, reason=f"timesteps were aligned for {self.table.steps} steps"))
        offset = self.strength * self.table.values["offset"][position.index]
        reason = f"told {offset:+.4g} of its timestep" if offset else "its own timestep"
        return run(replace(moved(request, offset), reason=reason))


@register
@dataclass(frozen=True)
class TimestepAligner(CalibratedSampling):
    """The settings of the timestep aligner.

    Attributes:
        strength: share of the found displacement that is applied; 0 is the plain run.
        fine: the run that is compared with has so many times the steps.
        evaluations: trials for each step, at least 5.
        reach: farthest displacement, in gaps between timesteps.
        table: the displacements, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no table, or one of another model, a transformer that is told
            no timestep, or a scheduler that calls the model twice a step, adds noise, or keeps its timesteps in an
            unknown way.

    Example:
        >>> TimestepAligner(strength=0.5).label()
        'strength=0.5'
    """

    strength: float = 1.0
    fine: int = 10
    evaluations: int = 12
    reach: float = 1.0
    table: OffsetTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "timestep-aligner"
    title: ClassVar[str] = "Timestep aligner"
    arxiv: ClassVar[str] = "2310.09469"
    axes: ClassVar[str] = "timestep told to the transformer; every step; searched against a fine run"
    confidence: ClassVar[str] = "medium"
    seams: ClassVar[frozenset[str]] = frozenset({"model"})
    claims: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    saves: ClassVar[bool] = False
    table_kind: ClassVar[type[Table]] = OffsetTable
    shaping: ClassVar[tuple[str, ...]] = ("fine", "evaluations", "reach")
    citation: ClassVar[str] = """@inproceedings{xia2024timestep,
  title={Towards More Accurate Diffusion Model Acceleration with A Timestep Aligner},
  author={Xia, Mengfei and Shen, Yujun and Lei, Changsong and Zhou, Yu and Yi, Ran and Zhao, Deli and Wang, Wenping
    and Liu, Yong-Jin},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("strength", self.strength, 0, 1)
        check_whole("fine", self.fine, 2)
        check_whole("evaluations", self.evaluations, 5)
        check_number("reach", self.reach, 0)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> Loop:
        """See `SamplingMethod.make`."""
        for anatomy in anatomies:
            argument_of(anatomy.model)
        if pipe is not None:
            check_scheduler(self.name, pipe.scheduler)
        if self.strength == 0:
            return Loop()
        return Aligning(self, table_for(self.name, self.table, anatomies[0]))

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> TimestepAligner:
        """Search the displacements for runs of as many steps as `call` asks for; the pipeline comes back as it was.

        Runs the call once as it is and once with `fine` times the steps, and then, for each step, up to that step and
        `evaluations` times; what was computed before that step is not computed again.

        Raises:
            DitaError: the call ran fewer than 2 steps, no whole loop, or began from other noise each time.
        """
        plain = trace(self.name, pipe, call)
        if plain.steps < 2:
            raise DitaError(f"{self.name} aligns the steps of the calibration call, which has {plain.steps}")
        trained = int(pipe.scheduler.config.get("num_train_timesteps", 1000))
        fine = trace(self.name, pipe, call, plan=min(self.fine * plain.steps, max(trained, plain.steps)))
        aim, trial = targets(plain, fine), Trial(plain, trained)
        offsets: list[float] = []
        for number in range(plain.steps):
            trial.begin(number)

            def error(offset: float, number: int = number) -> float:
                found = trial.state(pipe, call, offset) / plain.scale[number + 1]
                return (found - aim[number]).square().mean().item()

            # The first trial tells how the transformer's timesteps run.
            plain_error = error(0.0)
            low, high = trial.range(self.reach)
            best, least = minimise(error, low, high, self.evaluations)
            offsets.append(best if least < plain_error else 0.0)
            trial.keep(offsets[-1])
        return replace(self, table=plain.table(OffsetTable, {"offset": tuple(offsets)}, pipe))

    @classmethod
    def disabled(cls) -> TimestepAligner:
        """The timesteps as they are; needs no table."""
        return cls(strength=0.0)

    @classmethod
    def forced(cls) -> TimestepAligner:
        """A short search."""
        return cls(fine=4, evaluations=5)

    @classmethod
    def ladder(cls) -> tuple[TimestepAligner, ...]:
        """Half of what was found, and all of it."""
        return (cls(strength=0.5), cls())
