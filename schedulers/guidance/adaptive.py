"""Adaptive Guidance: the unconditional branch is dropped once both branches say the same.

Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025, arXiv
2312.12487.

What: gamma, the cosine of the conditional and the unconditional output, over all elements of a sample. When: a sample
is guided up to the first evaluation at which gamma reaches `threshold`, that one included, for it has both branches;
from then on its conditional output is used alone, whatever gamma would be. The branch is left out when every sample of
the batch has come so far. Until then it is computed for the others only: no image depends on its batch mates.

Defaults: threshold 0.991 is published, for Stable Diffusion, which predicts noise, with 20 steps and a scale of 7.5;
0.994 and 0.996 are the authors' milder ones.

Other models have other cosines. A flow's lies below noise's in large models and can lie above 0.991 from the first step
in small ones: on the bundled fashion-flux and fashion-wan guidance then ends after 3 to 6 steps. `dita.calibrate` sets
the threshold to what gamma has reached at `share` of the user's own run, the least over its samples, so that none of
them is guided for longer; it is a number like any other, and one from elsewhere can be given. Without either, on flow
matching a warning says so and 0.991 is taken. With `of="clean"` the pictures
that the two branches see in the latents are compared instead, x0 = x - sigma v for a flow; their cosine goes to 1.

Differs from the paper: the calibration and `of`. Of the output only what the solver steps is compared: no learned
variance, no tokens of a reference image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cosine_similarity

from dita.anatomy import Anatomy
from dita.config import check_number
from dita.errors import DitaError, DitaWarning
from dita.loop import LoopVariables, Run
from dita.registry import register
from dita.schedulers.guidance.moment import Moment, refuse_stream
from dita.schedulers.guidance.policy import GuidanceLoop, GuidanceMethod, GuidancePolicy, Wanted
from dita.schedulers.levels import Level, entry_of, predicts
from dita.watching import watched

COMPARED = ("output", "clean")
_NEVER = 2.0
_PUBLISHED = 0.991


class Similarity(GuidancePolicy):
    """Drops guidance of a sample for good when its branches agree.

    Args:
        threshold: cosine from which they do.
        of: what is compared, "output" or "clean".
    """

    def __init__(self, threshold: float, of: str) -> None:
        self.threshold, self.of = threshold, of
        self.history: list[list[float]] = []
        self._agreed: list[bool] = []

    def begin_run(self, run: Run) -> None:
        """See `GuidancePolicy.begin_run`."""
        if self.of == "clean":
            predicts(run.scheduler)
        self._run, self.history, self._agreed = run, [], []

    def wants(self, moment: Moment) -> Wanted:
        """See `GuidancePolicy.wants`."""
        refuse_stream(AdaptiveGuidance.name, moment)
        if not self.history:
            return Wanted("both", "first evaluation")
        below = [gamma for gamma, agreed in zip(self.history[-1], self._agreed, strict=True) if not agreed]
        if below:
            return Wanted("both", f"cosine {min(below):.4f}, below {self.threshold:g}")
        return Wanted("cond", f"the cosine of every sample reached {self.threshold:g}")

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """See `GuidancePolicy.uncond`."""
        if uncond is None:
            return cond
        refuse_stream(AdaptiveGuidance.name, moment, cond)
        before = self._agreed or [False] * len(cond)
        gammas: list[float] = self._gamma(moment, cond, uncond).tolist()
        self.history.append(gammas)
        self._agreed = [agreed or gamma >= self.threshold for agreed, gamma in zip(before, gammas, strict=True)]
        if not any(before):
            return uncond
        alone = torch.tensor(before, device=cond.device).view(-1, *(1,) * (cond.ndim - 1))
        return torch.where(alone, cond, uncond)

    def _gamma(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        """The cosine of each sample, float32 [B]."""
        pair = [moment.guided(output).float() for output in (cond, uncond)]
        if self.of == "clean":
            assert moment.request is not None
            latents = moment.guided(moment.request.part("cond").latents).float()
            level = self._level(moment)
            # Image-to-video models read the conditions in further channels, after the latents.
            latents = latents[tuple(slice(size) for size in pair[0].shape)]
            pair = [level.clean(latents, output) for output in pair]
        first, second = pair
        return cosine_similarity(first.flatten(1), second.flatten(1))

    def _level(self, moment: Moment) -> Level:
        scheduler = self._run.scheduler
        # The loop's own timestep: where image-to-image begins, some schedulers know only after the first step.
        timestep = LoopVariables(self._run.pipe).read().get("t")
        return Level.of(scheduler, entry_of(scheduler, timestep, moment.position.index))


def _flows(scheduler: Any) -> bool:
    try:
        return predicts(scheduler) == "flow"
    except DitaError:
        return False


def cosine_at(history: list[list[float]], share: float) -> float:
    """The cosine that every sample of a run has reached at a share of it.

    Args:
        history: for each evaluation, the cosines of the samples.
        share: from 0 to 1; at least one evaluation is counted.

    Example:
        >>> cosine_at([[0.9, 0.8], [0.7, 0.85], [0.99, 0.99]], 0.67)
        0.85
    """
    count = max(1, int(share * len(history)))
    return min(max(values[:count]) for values in zip(*history, strict=True))


@register
@dataclass(frozen=True)
class AdaptiveGuidance(GuidanceMethod):
    """The settings of Adaptive Guidance.

    Attributes:
        threshold: cosine from which a sample is no longer guided; above 1 all of the run is. `dita.calibrate` sets it;
            None is the published one, which holds where noise is predicted.
        of: what is compared: "output", or "clean", the picture that each branch sees in the latents.
        share: of the run after which a calibrated threshold ends guidance, at the latest.

    Raises:
        DitaError: a setting out of range; with "clean" on attaching, a scheduler that does not say what is predicted.

    Example:
        >>> AdaptiveGuidance(threshold=0.994).label()
        'threshold=0.994'
    """

    threshold: float | None = None
    of: str = "output"
    share: float = 0.55

    name: ClassVar[str] = "adaptive-guidance"
    title: ClassVar[str] = "Adaptive Guidance"
    arxiv: ClassVar[str] = "2312.12487"
    trajectories: ClassVar[int] = 4
    axes: ClassVar[str] = "guidance; until the branches' cosine reaches a threshold; conditional output alone after"
    citation: ClassVar[str] = """@inproceedings{castillo2025adaptive,
  title={Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models},
  author={Castillo, Angela and Kohler, Jonas and P{\\'e}rez, Juan C. and P{\\'e}rez, Juan Pablo and Pumarola, Albert and
    Ghanem, Bernard and Arbel{\\'a}ez, Pablo and Thabet, Ali},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if self.threshold is not None:
            check_number("threshold", self.threshold, -1, _NEVER)
        check_number("share", self.share, 0, 1)
        if self.of not in COMPARED:
            raise DitaError(f"of is {self.of!r}; expected one of {', '.join(COMPARED)}")

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> GuidanceLoop:
        """See `SamplingMethod.make`."""
        if pipe is not None and self.of == "clean":
            predicts(pipe.scheduler)
        if self.threshold is None and pipe is not None and _flows(pipe.scheduler):
            text = (
                f"adaptive-guidance has no threshold for this pipeline: {_PUBLISHED} was published for models that "
                "predict noise, and this one predicts a flow. Measure one with guidance = dita.calibrate(pipe, "
                '"adaptive-guidance", lambda p: p(...)), or give threshold= yourself'
            )
            warnings.warn(text, DitaWarning, stacklevel=2)
        return super().make(anatomies, pipe)

    def policy(self, anatomies: tuple[Anatomy, ...]) -> Similarity:
        """See `GuidanceMethod.policy`."""
        return Similarity(_PUBLISHED if self.threshold is None else self.threshold, self.of)

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> AdaptiveGuidance:
        """The same with the threshold that every sample has reached at `share` of a run of `call`.

        Raises:
            DitaError: the call ran no loop, or one without guidance.
        """
        watcher = Similarity(_NEVER, self.of)
        with watched(pipe, GuidanceLoop(watcher, self.name)):
            call(pipe)
        if not watcher.history:
            raise DitaError("the calibration call ran no guided sampling loop: it must run the pipeline with guidance")
        return self.replace(threshold=cosine_at(watcher.history, self.share))

    @property
    def uncalibrated(self) -> bool:
        """See `Method.uncalibrated`."""
        return self.threshold is None

    @classmethod
    def disabled(cls) -> AdaptiveGuidance:
        """No cosine is large enough."""
        return cls(threshold=_NEVER)

    @classmethod
    def forced(cls) -> AdaptiveGuidance:
        """Any cosine is large enough."""
        return cls(threshold=-1.0)

    @classmethod
    def ladder(cls) -> tuple[AdaptiveGuidance, ...]:
        """From thresholds that flows of small models reach late to one that noise reaches early."""
        return tuple(cls(threshold=threshold) for threshold in (0.9985, 0.997, 0.994, 0.991, 0.98))
