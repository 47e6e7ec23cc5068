"""Bottleneck sampling: the first and last steps at full size, those between on a smaller picture.

Tian et al., "Training-free Diffusion Acceleration with Bottleneck Sampling", 2025, arXiv 2503.18940.

What: height and width of the latents; frames stay. When: stages high, low, high by numbers of steps. How: where the
resolution changes x0 is estimated, resized and noised again, to a level above the present one (the strength), and the
schedule of the stage is shifted further. The first steps lay out the picture, the middle ones need no detail.

A stage ends where the plain schedule would be after as many steps; that is the level up to which its predecessor's x0
is trusted, and the strength of the next stage says how far it goes back from there. Published are the workflow, sizes
of 1024, 512 and 1024 for FLUX.1-dev, and speed-ups of 3 for images and 2.5 for films.

Differs from the paper: the numbers of steps, strengths and shifts that it found by search were not to be had, nor its
code. The defaults here are sensible ones, and the way in which a stage's end follows from them is ours: confidence is
low. Search them on your own pipeline, with `dita sweep` for instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dita.config import check_number
from dita.errors import DitaError
from dita.registry import register
from dita.schedulers.resolution.staged import StagedLoop, StagedMethod, check_stages
from dita.schedulers.resolution.stages import Stage, apportioned, level_at, shifted


class Bottleneck(StagedLoop):
    """Stages along the plain schedule, each from its strength to where the plain run would be.

    Args:
        settings: of the method.
        pipe: the pipeline.
    """

    def __init__(self, settings: BottleneckSampling, pipe: Any) -> None:
        super().__init__(settings.name, pipe, settings.stretched)
        self.settings = settings

    def plan(self, levels: tuple[float, ...]) -> tuple[Stage, ...]:
        """See `StagedLoop.plan`."""
        settings, total = self.settings, len(levels) - 1
        stages, done = [], 0
        for scale, steps, strength, shift in zip(
            settings.scales, apportioned(total, settings.steps), settings.strengths, settings.shifts, strict=True
        ):
            left = 1 - done / total
            if strength < left - 1e-9:
                raise DitaError(
                    f"a stage of {self.name} starts at strength {strength:g}, when {left:g} of the {total} steps are "
                    "still to come; expected no less"
                )
            start, done = 1 - strength, done + steps
            pace = (done / total - start) / steps
            own = [shifted(level_at(levels, start + n * pace), shift) for n in range(steps)]
            stages.append(Stage(scale, (*own, shifted(level_at(levels, done / total), shift))))
        return tuple(stages)


@register
@dataclass(frozen=True)
class BottleneckSampling(StagedMethod):
    """The settings of bottleneck sampling.

    Attributes:
        scales: of height and width, one for each stage; the last is 1.
        steps: shares of the steps, such as their numbers in a run of as many; other runs are split in proportion.
        strengths: part of the pipeline's schedule that is left when a stage starts, as in image-to-image; 1 for the
            first, below 1 for the others, and at least what is left anyway.
        shifts: factor of each stage on the shift of the pipeline's schedule; 1 for the first.
        stretched: tokens of a small picture are told to lie as far apart as in the large one; see `StagedMethod`.

    Raises:
        DitaError: a setting out of range; on attaching, a pipeline that is not flow matching from noise.

    Example:
        >>> BottleneckSampling(steps=(2, 10, 8)).label()
        'steps=(2, 10, 8)'
    """

    scales: tuple[float, ...] = (1.0, 0.5, 1.0)
    steps: tuple[float, ...] = (3, 10, 7)
    strengths: tuple[float, ...] = (1.0, 0.9, 0.45)
    shifts: tuple[float, ...] = (1.0, 1.5, 1.5)

    name: ClassVar[str] = "bottleneck"
    title: ClassVar[str] = "Bottleneck sampling"
    arxiv: ClassVar[str] = "2503.18940"
    axes: ClassVar[str] = "resolution; full, low, full by numbers of steps; x0 resized and noised further than it was"
    confidence: ClassVar[str] = "low"
    citation: ClassVar[str] = """@article{tian2025bottleneck,
  title={Training-free Diffusion Acceleration with Bottleneck Sampling},
  author={Tian, Ye and Xia, Xin and Ren, Yuxi and Lin, Shanchuan and Wang, Xing and Xiao, Xuefeng and Tong, Yunhai and
    Yang, Ling and Cui, Bin},
  journal={arXiv preprint arXiv:2503.18940},
  year={2025}
}"""

    def validate(self) -> None:
        """Check lengths and ranges."""
        check_stages(self.name, scales=self.scales, steps=self.steps, strengths=self.strengths, shifts=self.shifts)
        for scale, steps, shift in zip(self.scales, self.steps, self.shifts, strict=True):
            check_number("scales", scale, 0.05, 1)
            check_number("steps", steps, 1e-6)
            check_number("shifts", shift, 0.01, 100)
        if self.scales[-1] != 1 or self.strengths[0] != 1 or self.shifts[0] != 1:
            raise DitaError(
                f"scales are {self.scales}, strengths {self.strengths} and shifts {self.shifts}; expected the last "
                "scale, the first strength and the first shift to be 1"
            )
        for strength in self.strengths[1:]:
            check_number("strengths", strength, 0, 0.999)

    def staged(self, pipe: Any) -> Bottleneck:
        """See `StagedMethod.staged`."""
        return Bottleneck(self, pipe)

    @classmethod
    def disabled(cls) -> BottleneckSampling:
        """One stage."""
        return cls((1.0,), (1,), (1.0,), (1.0,))

    @classmethod
    def forced(cls) -> BottleneckSampling:
        """The default."""
        return cls()

    @classmethod
    def ladder(cls) -> tuple[BottleneckSampling, ...]:
        """Fewer and more steps at half the size, and a weaker bottleneck."""
        return (
            cls((1.0, 0.75, 1.0)),
            cls(steps=(5, 6, 9), strengths=(1.0, 0.85, 0.6)),
            cls(),
            cls(steps=(2, 12, 6), strengths=(1.0, 0.95, 0.4)),
            cls(steps=(2, 14, 4), strengths=(1.0, 0.95, 0.3)),
        )
