"""CFG-Zero*: the unconditional output is rescaled to lie nearest the conditional one, and the first steps are zero.

Fan et al., "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models", arXiv 2503.18886, 2025.

How: guidance is s u + w (c - s u) with s = <c, u> / (|u|^2 + 1e-8) for each sample, the number that makes |c - s u|
smallest. In the first K steps the velocity is zero instead: the latents stay, and neither branch is computed, which is
all that the method saves. It is made to improve pictures, not to keep them as they are.

Defaults: K is 4 % of the steps, which is what the authors recommend (2 of the 50 of Wan), rounded, and at least one, as
in diffusers' guider. Zero steps are meant for models whose first velocities are worse than none; a well trained one may
do better with `zero_steps=0`.

Differs from the paper: models that predict noise or v take part. There the latents are x = alpha x0 + sigma n, which is
alpha + sigma times a point of a straight flow between x0 and n; zero velocity keeps that point. Of the output only what
the solver steps counts for s: no learned variance, no tokens of a reference image. A run that begins in the middle of
the schedule (image-to-image) has left the first steps behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.loop import LoopVariables, Run, Solver, Step
from dita.registry import register
from dita.schedulers.guidance.moment import Moment
from dita.schedulers.guidance.policy import GuidanceLoop, GuidanceMethod, GuidancePolicy, Wanted
from dita.schedulers.levels import Level, entry_of, predicts


def nearest_scale(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """The factors s that make |cond - s uncond| smallest.

    Args:
        cond, uncond: [B, ...].

    Returns:
        float32 [B, 1, ...], with as many axes as `cond`.

    Example:
        >>> nearest_scale(torch.tensor([[2.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])).flatten()
        tensor([1., 0.])
    """
    c, u = cond.flatten(1).float(), uncond.flatten(1).float()
    scale = (c * u).sum(1) / (u.square().sum(1) + 1e-8)
    return scale.view(-1, *(1,) * (cond.ndim - 1))


class ZeroStar(GuidancePolicy):
    """Rescales the unconditional output and leaves the first steps out.

    Args:
        zero_steps: see `CFGZero`.
        rescale: see `CFGZero`.
    """

    def __init__(self, zero_steps: float, rescale: bool) -> None:
        self.zero_steps, self.rescale = zero_steps, rescale
        self._still: tuple[int, int, torch.Tensor] | None = None

    def begin_run(self, run: Run) -> None:
        """See `GuidancePolicy.begin_run`."""
        if self.zero_steps:
            predicts(run.scheduler)
        self._run, self._still = run, None

    def first(self, steps: int) -> int:
        """How many of that many steps are zero."""
        if isinstance(self.zero_steps, int) or not self.zero_steps:
            return int(self.zero_steps)
        return max(1, round(self.zero_steps * steps))

    def wants(self, moment: Moment) -> Wanted:
        """See `GuidancePolicy.wants`."""
        position, request = moment.position, moment.request
        count = self.first(position.schedule_length)
        # Where image-to-image begins, some schedulers know only after the first step; the pipeline's loop knows.
        timestep = LoopVariables(self._run.pipe).read().get("t")
        starts = position.step == position.stage == 0
        begun = entry_of(self._run.scheduler, timestep, position.index) if starts else position.index
        if begun < count and request is not None and not request.entries:
            latents = moment.guided(request.part("cond").latents)
            self._still = (position.step, position.stage, latents)
            return Wanted("none", f"zero velocity in the first {count} of {position.schedule_length} steps")
        return Wanted("both", "guided" if not self.rescale else "guided, with the unconditional branch rescaled")

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """See `GuidancePolicy.uncond`."""
        if uncond is None or not self.rescale:
            return cond if uncond is None else uncond
        c, u = moment.guided(cond), moment.guided(uncond)
        return moment.with_guided(uncond, nearest_scale(c, u) * u.float())

    def step(self, step: Step, solve: Solver) -> torch.Tensor:
        """See `GuidancePolicy.step`."""
        position, still, self._still = step.position, self._still, None
        if still is None or still[:2] != (position.step, position.stage):
            return solve(step.output, step.sample)
        # Whatever the pipeline made of the zeros: a formula that normalises makes them NaN.
        level = Level.of(step.scheduler, entry_of(step.scheduler, step.timestep, position.index))
        output = torch.zeros_like(step.output)
        if level.kind != "flow":
            latents = still[2].float()
            output = level.output(latents, latents / (level.alpha + level.sigma)).to(step.output.dtype)
            output = output.repeat(step.output.shape[0] // len(output), *(1,) * (output.ndim - 1))
        return solve(output, step.sample)


@register
@dataclass(frozen=True)
class CFGZero(GuidanceMethod):
    """The settings of CFG-Zero*.

    Attributes:
        zero_steps: first steps whose velocity is zero: a whole number, or a share of the schedule below 1, rounded to
            at least one step; 0 for none.
        rescale: multiply the unconditional output by s.

    Raises:
        DitaError: a setting out of range; with zero steps on attaching, a scheduler that does not say what is
            predicted.

    Example:
        >>> CFGZero(zero_steps=1).label()
        'zero_steps=1'
    """

    zero_steps: int | float = 0.04
    rescale: bool = True

    name: ClassVar[str] = "cfg-zero"
    title: ClassVar[str] = "CFG-Zero*"
    arxiv: ClassVar[str] = "2503.18886"
    axes: ClassVar[str] = "guidance; first steps left out; unconditional output rescaled"
    citation: ClassVar[str] = """@article{fan2025cfgzero,
  title={CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models},
  author={Fan, Weichen and Zheng, Amber Yijia and Yeh, Raymond A. and Liu, Ziwei},
  journal={arXiv preprint arXiv:2503.18886},
  year={2025}
}"""

    @property
    def saves(self) -> bool:
        """Without zero steps both branches always run."""
        return bool(self.zero_steps)

    def validate(self) -> None:
        """Check ranges."""
        if isinstance(self.zero_steps, float):
            check_number("zero_steps, unless a whole number,", self.zero_steps, 0, 0.999)
        else:
            check_whole("zero_steps", self.zero_steps, 0)
        if not isinstance(self.rescale, bool):
            raise DitaError(f"rescale is {self.rescale!r}; expected True or False")

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> GuidanceLoop:
        """See `SamplingMethod.make`."""
        if pipe is not None and self.zero_steps:
            predicts(pipe.scheduler)
        return super().make(anatomies, pipe)

    def policy(self, anatomies: tuple[Anatomy, ...]) -> ZeroStar:
        """See `GuidanceMethod.policy`."""
        return ZeroStar(self.zero_steps, self.rescale)

    @classmethod
    def disabled(cls) -> CFGZero:
        """Neither."""
        return cls(zero_steps=0, rescale=False)

    @classmethod
    def forced(cls) -> CFGZero:
        """The first step is zero, whatever the number of steps."""
        return cls(zero_steps=1)

    @classmethod
    def ladder(cls) -> tuple[CFGZero, ...]:
        """No zero steps, one, the default, a tenth of the run."""
        return (cls(zero_steps=0), cls(zero_steps=1), cls(), cls(zero_steps=0.1))
