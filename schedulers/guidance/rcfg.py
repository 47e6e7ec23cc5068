"""RCFG: residual classifier-free guidance computes no unconditional branch, or one step of it.

Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation", arXiv 2312.12491,
2023.

What: the unconditional prediction is not computed but told from the picture x0 that it is supposed to see in x_t,
always the same one. That is the input image ("self"), or what the unconditional branch saw in the first step, the only
one in which it runs ("initialize", the paper's onetime negative).

How: with x_t = alpha x0 + sigma n the virtual prediction u is

    noise     n = (x_t - alpha x0) / sigma
    v         alpha n - sigma x0 = (alpha x_t - x0) / sigma
    flow      n - x0 = (x_t - x0) / sigma                      (alpha = 1 - sigma)

and the guided one is delta u + w (c - delta u). With delta = 1 the predicted picture moves from x0 towards c's, by w.
x_t is at hand in each step, so that the solver does not matter. In a deterministic step of first order x0 drops out:
with s = sigma / alpha and ' for the next level, DDIM takes the virtual noise n to eps + (s / s') (n - eps), eps the
guided noise; Euler under flow matching takes the virtual v to g + (sigma / sigma') (v - g), g the guided flow. The
paper's LCM adds fresh noise z instead: its n becomes z + (alpha' / sigma') (sigma / alpha) (n - eps).

Text-to-image has no input image, and its latents are the noise: x0 is 0, the mean of latents, and u = x_t / sigma for
noise and flow.

Defaults: w = 1.2 and delta = 1 are published, for image-to-image with an LCM of four steps. w replaces the pipeline's
scale: what suits a computed branch (3 to 7) is far too strong here. `scale=None` takes the pipeline's.

Differs from the paper: any solver instead of the LCM. With models that predict v or a flow, delta scales that, not the
noise in it: at a first step from pure noise no other noise can be meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number
from dita.errors import DitaError
from dita.loop import LoopVariables, Request, Run
from dita.registry import register
from dita.schedulers.guidance.policy import GuidanceLoop, GuidanceMethod, GuidancePolicy, Moment, Wanted
from dita.schedulers.levels import Level, Origin, entry_of, predicts

KINDS = ("self", "initialize", "full")


class Residual(GuidancePolicy):
    """A virtual unconditional prediction.

    Args:
        kind: "self", "initialize", or "full" for plain guidance.
        scale: w; None for the pipeline's.
        delta: weight of the virtual prediction.
    """

    def __init__(self, kind: str, scale: float | None, delta: float) -> None:
        self.kind, self.scale, self.delta = kind, scale, delta
        self._clean: torch.Tensor | None = None

    def begin_run(self, run: Run) -> None:
        """See `GuidancePolicy.begin_run`."""
        predicts(run.scheduler)
        self._run, self._origin, self._clean = run, Origin(run.pipe), None

    def noised(self, clean: torch.Tensor, result: torch.Tensor) -> None:
        """See `GuidancePolicy.noised`."""
        self._origin.noised(clean, result)

    def bytes_held(self) -> int:
        """See `GuidancePolicy.bytes_held`."""
        return 0 if self._clean is None else self._clean.nbytes

    def wants(self, moment: Moment) -> Wanted:
        """See `GuidancePolicy.wants`."""
        request = moment.request
        assert request is not None
        if self.kind == "full":
            return Wanted("both", "guided")
        if request.entries and self.kind == "initialize":
            raise DitaError(
                'rcfg of kind "initialize" computes the unconditional branch in the first step of each image, which a '
                'stream batch does not single out; take kind="self" with stream'
            )
        if self.scale is not None and moment.scale is None:
            raise DitaError(
                f"{type(self._run.pipe).__name__} does not tell its guidance scale, which rcfg has to replace by "
                f"{self.scale:g}; pass scale=None to take the pipeline's, whatever it is"
            )
        if moment.position.step == 0 and moment.position.stage == 0:
            if self.kind == "initialize":
                return Wanted("both", "first step: what the unconditional branch sees")
            if not request.entries:
                self._clean = self._input(request)
        return Wanted("cond", "residual guidance: a virtual unconditional prediction")

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """See `GuidancePolicy.uncond`."""
        request = moment.request
        assert request is not None
        if self.kind == "full":
            return cond if uncond is None else uncond
        c = moment.guided(cond)
        x, c = self._sample(request, cond, c.shape), c.float()
        if uncond is not None:
            virtual = moment.guided(uncond).float()
            self._clean = self._levels(moment)[0].clean(x, virtual)
        else:
            clean = request.clean if request.entries else self._clean
            clean = torch.zeros_like(x) if clean is None else clean.to(x)
            levels = self._levels(moment)
            parts = zip(levels, x.chunk(len(levels)), clean.chunk(len(levels)), strict=True)
            virtual = torch.cat([level.output(sample, picture) for level, sample, picture in parts])
        return moment.with_guided(cond, self._at_scale(moment.scale, c, self.delta * virtual))

    def _at_scale(self, own: float | None, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """What makes the pipeline's formula at its own scale give u + w (c - u)."""
        if self.scale is None or own is None or own == 1 or own == self.scale:
            return u
        return (u * (1 - self.scale) + c * (self.scale - own)) / (1 - own)

    def _sample(self, request: Request, cond: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """x_t in the shape of what is predicted of it, float32."""
        latents = request.part("cond").latents
        if latents.shape[0] != cond.shape[0]:
            raise DitaError(
                f"the transformer was given {latents.shape[0]} samples and put out {cond.shape[0]}: a method within "
                "rcfg batches images of several calls. Name stream before rcfg."
            )
        # Conditions that models read besides come after the latents, as further channels or tokens.
        return latents[tuple(slice(0, count) for count in shape)].float()

    def _input(self, request: Request) -> torch.Tensor | None:
        clean = self._origin.clean(request.part("cond").latents)
        if clean is None and self._entry(request) > 0:
            raise DitaError(
                "the run begins in the middle of the schedule, but the scheduler added no noise to an image before "
                '(latents were given, or the scheduler is new): rcfg of kind "self" needs the image\'s latents; '
                'kind="initialize" does without'
            )
        return clean

    def _levels(self, moment: Moment) -> list[Level]:
        request = moment.request
        assert request is not None
        return [Level.of(self._run.scheduler, entry) for entry in request.entries or (self._entry(request),)]

    def _entry(self, request: Request) -> int:
        # Schedulers without an index know where image-to-image begins only after the first step; the loop knows.
        timestep = LoopVariables(self._run.pipe).read().get("t")
        return entry_of(self._run.scheduler, timestep, request.position.index)


@register
@dataclass(frozen=True)
class RCFG(GuidanceMethod):
    """The settings of residual classifier-free guidance.

    Attributes:
        kind: "self" (the unconditional branch never runs), "initialize" (in the first step) or "full" (always: plain
            guidance at the pipeline's scale).
        scale: guidance scale w, instead of the pipeline's; None for that one. The pipeline's has to be above 1 all the
            same, or it asks for no guidance at all.
        delta: weight of the virtual prediction.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> RCFG(kind="initialize", scale=2.0).label()
        'kind=initialize scale=2'
    """

    kind: str = "self"
    scale: float | None = 1.2
    delta: float = 1.0

    name: ClassVar[str] = "rcfg"
    title: ClassVar[str] = "RCFG (StreamDiffusion)"
    arxiv: ClassVar[str] = "2312.12491"
    axes: ClassVar[str] = "guidance; every step, or all but the first; virtual residual noise of a fixed picture"
    citation: ClassVar[str] = """@article{kodaira2023streamdiffusion,
  title={StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation},
  author={Kodaira, Akio and Xu, Chenfeng and Hazama, Toshiki and Yoshimoto, Takanori and Ohno, Kohei and
    Mitsuhori, Shogo and Sugano, Soichi and Cho, Hanying and Liu, Zhijian and Keutzer, Kurt},
  journal={arXiv preprint arXiv:2312.12491},
  year={2023}
}"""

    def validate(self) -> None:
        """Check ranges."""
        if self.kind not in KINDS:
            raise DitaError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.scale is not None:
            check_number("scale", self.scale, 1)
        check_number("delta", self.delta, 0)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> GuidanceLoop:
        """See `SamplingMethod.make`.

        Raises:
            DitaError: the scheduler does not say what the model predicts.
        """
        if pipe is not None:
            predicts(pipe.scheduler)
        return super().make(anatomies, pipe)

    def policy(self, anatomies: tuple[Anatomy, ...]) -> Residual:
        """See `GuidanceMethod.policy`."""
        return Residual(self.kind, self.scale, float(self.delta))

    @classmethod
    def disabled(cls) -> RCFG:
        """Plain guidance."""
        return cls(kind="full")

    @classmethod
    def forced(cls) -> RCFG:
        """No unconditional branch at all."""
        return cls()

    @classmethod
    def ladder(cls) -> tuple[RCFG, ...]:
        """One step of the unconditional branch, or none, at two scales."""
        return (cls(kind="initialize"), cls(kind="initialize", scale=2.0), cls(), cls(scale=1.5))
